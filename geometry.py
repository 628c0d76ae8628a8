"""Measures of the geometry of embeddings: arrays in, numbers out. Needs numpy alone.

    index, distance = nearest(trained, vocabulary, k=5)   # the tokens around every trained row
    collapse_index(trained, vocabulary)                   # (n,), below 1: the row sits on a token
    effective_rank(trained), frechet(activations, text)   # how wide a set is, how far two are apart
    locality(paths, vocabulary)["p_matched_step"]         # are a text's steps shorter than chance?

A set is rows (N, D) of any float type; sums are in float64, populations are read by blocks. Nothing
is printed or written, and the same seed gives the same number. Too few rows, widths that differ
and values that are not finite (or beyond 1e15, whose squares float32 cannot add) are refused.

n rows judged, N and M rows of whole sets, D width. `paper` is Exploring Embedding Priors in
Prompt-Tuning (arXiv 2412.18582).
"""

from __future__ import annotations

import math

import numpy as np

BLOCK = 2048  # rows of a population that are in float64 at a time


class GeometryError(ValueError):
    """Data that cannot be measured: what, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# rows in a population


def displacement(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """L2 distance from every row of start (n, D) to the same row of end (n, D): (n,)."""
    start = _points(start, "start")
    end = _points(end, "end", width=start.shape[1])
    if len(start) != len(end):
        raise GeometryError(f"start has {len(start)} rows and end {len(end)}: give the same rows")
    return METRICS["l2"](start.astype(np.float64), end.astype(np.float64))


def nearest(rows: np.ndarray, population: np.ndarray, k: int = 1, metric: str = "l2"
            ) -> tuple[np.ndarray, np.ndarray]:
    """The k members of population (N, D) nearest to each of rows (n, D): index (n, k) and value
    (n, k), distances ascending or cosines descending, ties by index. A row of zeros has cosine 0.

    Exact: a product in float32 leaves what its rounding cannot rule out, and that is measured in
    float64. A row that is in the population has distance 0. Ties cost a difference each."""
    if metric not in METRICS or k < 1:
        raise GeometryError(f"{k} nearest by {metric!r}: ask for at least 1, by one of "
                            f"{', '.join(METRICS)}")
    population = _points(population, "the population", k)
    rows = _points(rows, "rows", width=population.shape[1])
    parts = [_nearest(rows[i:i + BLOCK], population, k, metric) for i in range(0, len(rows), BLOCK)]
    index, value = (np.concatenate(part) for part in zip(*parts))
    return index, value


def _nearest(rows, population, k, metric):
    centre = population[::len(population) // 4096 + 1].mean(0, dtype=np.float64).astype(np.float32)

    def single(x):  # near the origin, where float32 is finest
        x = (x - centre if metric == "l2" else _unit(x.astype(np.float64))).astype(np.float32)
        return x, np.square(x).sum(1)

    (a, a2), found = single(rows), []
    bound = np.full((len(rows), k), np.inf, np.float32)  # the k smallest upper bounds so far
    # a dot product of D terms errs by at most D 2^-24 |a| |b|, and so does each squared length
    rounding = np.float32(2 * (rows.shape[1] + 16) * 2.0**-24)
    for at in range(0, len(population), BLOCK):
        b, b2 = single(population[at:at + BLOCK])
        size = a2[:, None] + b2
        low = a @ b.T
        low *= -2
        low += size * (1 - rounding) if metric == "l2" else -rounding * size
        high = low + 2 * rounding * size
        bound = np.partition(np.concatenate([bound, high], axis=1), k - 1)[:, :k]
        i, j = np.nonzero(low <= bound[:, -1:])
        found.append((i, j + at, low[i, j]))
    i, j, low = (np.concatenate(part) for part in zip(*found))
    kept = low <= bound[i, -1]  # the bound has fallen since
    i, j = i[kept], j[kept]
    value = _pairs(metric, rows, population, i, j)
    order = np.lexsort((j, value if metric == "l2" else -value, i))
    order = order[np.searchsorted(i[order], np.arange(len(rows)))[:, None] + np.arange(k)]
    return j[order], value[order]


def neighbour_distance(x: np.ndarray, k: int = 1, sample: int = 2000, seed: int = 0) -> np.ndarray:
    """Distance (min(N, sample),) of rows of x (N, D), drawn by the seed and in order, to their k-th
    nearest other row. Others are told by index: a duplicate is at distance 0."""
    if k < 1:
        raise GeometryError(f"neighbour {k}: ask for the first, 1, or a later one")
    x = _points(x, "x", k + 1)
    # the row itself, at 0, is never farther than another: it takes the first of k + 1 places
    return nearest(x[_sample(len(x), sample, seed)], x, k + 1)[1][:, k]


def collapse_index(rows: np.ndarray, population: np.ndarray) -> np.ndarray:
    """A row's distance to the nearest token over the median token's distance to its nearest other
    token (a sample of 2000): (n,). Below 1 the row has collapsed onto a token."""
    typical = np.median(neighbour_distance(population))
    if not typical > 0:
        raise GeometryError("over half of the population are duplicates, so it has no spacing: "
                            "give each member once")
    return nearest(rows, population)[1][:, 0] / typical


# --------------------------------------------------------------------------------------------------
# Gaussians and spectra


def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of x (N, D) in float64, of maximum likelihood (over N)."""
    x = _points(x, "x", 2)
    return _mean(x), sum(b.T @ b for b in _centred(x)) / len(x)


def mahalanobis(rows: np.ndarray, mean: np.ndarray, basis: np.ndarray, scale: np.ndarray
                ) -> np.ndarray:
    """Radius (n,) of rows (n, D) under a Gaussian: mean (D,), principal directions as columns of
    basis (D, D), their standard deviations scale (D,). For rows of that Gaussian, chi_law(D)."""
    mean, basis, scale = (np.asarray(v, np.float64) for v in (mean, basis, scale))
    rows = _points(rows, "rows", width=len(mean))
    if not (scale > 0).all():
        raise GeometryError("a direction with no spread: shrink the covariance, or leave it out")
    return np.concatenate([np.linalg.norm((b - mean) @ basis / scale, axis=1)
                           for b in _blocks(rows)])


def chi_law(d: int) -> tuple[float, float]:
    """Mean and standard deviation of a Gaussian's radius in d dimensions: (radius - mean) / sd says
    how far outside a row lies."""
    if d < 1:
        raise GeometryError(f"{d} degrees of freedom: give at least 1")
    mean = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    if d <= 200:
        return mean, math.sqrt(d - mean**2)
    # d - mean^2 cancels; from here on its series errs by less than 1e-10
    variance = 1 / 2 - 1 / (8 * d) - 1 / (16 * d**2) + 5 / (128 * d**3)
    return math.sqrt(d - variance), math.sqrt(variance)


def effective_rank(x: np.ndarray, share: float = 0.95) -> int:
    """How many principal components hold that share of the variance of x (N, D), to 1e-9; at most
    N - 1, and 0 if all rows are equal. Of 20 isotropic rows at D = 2048 it is 18; about the origin,
    without a mean, 19, the paper's number for trained rows."""
    x = _points(x, "x", 2)
    if not 0 < share <= 1:
        raise GeometryError(f"share is {share}, expected more than 0 and at most 1")
    held = np.cumsum(np.linalg.svd(_factor(x), compute_uv=False) ** 2)
    return int((held < (share - 1e-9) * held[-1]).sum()) + 1 if held[-1] > 0 else 0


def total_variance_ratio(x: np.ndarray, reference: np.ndarray) -> float:
    """trace Cov(x) / trace Cov(reference), both over N - 1: a few rows of the reference's own law
    give 1 in the mean."""
    x = _points(x, "x", 2)
    reference = _points(reference, "reference", 2, x.shape[1])
    spread, whole = (sum(np.square(b).sum() for b in _centred(z)) / (len(z) - 1)
                     for z in (x, reference))
    if not whole > 0:
        raise GeometryError("all rows of the reference are equal: give another reference")
    return float(spread / whole)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted (over N) on x (N, D) and y (M, D),
    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) (Dowson and Landau 1982). It grows with D
    and with how few the rows are: compare at the same N and M."""
    x = _points(x, "x", 2)
    y = _points(y, "y", 2, x.shape[1])
    a, b = _factor(x), _factor(y)
    # the root's trace is the sum of singular values of A B^T, for any A^T A = S1 and B^T B = S2
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    between = np.square(_mean(x) - _mean(y)).sum()
    return max(0.0, float(between + np.square(a).sum() + np.square(b).sum() - 2 * overlap))


def _factor(x):
    """A (min(N, D), D) with A^T A the covariance of x."""
    if len(x) <= x.shape[1]:
        return np.concatenate(list(_centred(x))) / math.sqrt(len(x))
    variance, basis = np.linalg.eigh(gaussian(x)[1])
    return np.sqrt(variance.clip(0))[:, None] * basis.T


# --------------------------------------------------------------------------------------------------
# two sets


def precision_recall(x: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """The share of x (N, D) in the manifold of the reference (M, D), and of the reference in x's. A
    manifold is a union of balls, one around each point out to its k-th nearest other (Kynkaanniemi
    et al. 2019). N M distances, by blocks."""
    x = _points(x, "x", k + 1)
    reference = _points(reference, "reference", k + 1, x.shape[1])
    return _share_inside(x, reference, k), _share_inside(reference, x, k)


def _share_inside(points, centres, k):
    radius, inside = neighbour_distance(centres, k, sample=len(centres)), []
    for p in _blocks(points):
        square = _squares(p, centres)
        slack = 1e-10 * (square.max() + np.square(radius).max())  # float64's rounding and more
        hit = square < np.square(radius) - slack
        i, j = np.nonzero(~hit & (square <= np.square(radius) + slack))
        hit[i, j] = _pairs("l2", p, centres, i, j) <= radius[j]  # too near the edge to tell
        inside.append(hit.any(1))
    return float(np.concatenate(inside).mean())


def mmd(x: np.ndarray, y: np.ndarray, permutations: int = 200, seed: int = 0
        ) -> tuple[float, float]:
    """The unbiased estimate of MMD^2 between the laws of x (N, D) and y (M, D), which may be
    negative, and its p-value by permutations, nan for none (Gretton et al. 2012).

    The kernel is exp(-d^2 / 2 s^2), s the median distance within the pooled sample. It holds some
    float64 matrices of (N + M)^2."""
    x = _points(x, "x", 2)
    y = _points(y, "y", 2, x.shape[1])
    N, M = len(x), len(y)
    pooled = np.concatenate([x, y])
    square = _squares(pooled, pooled)
    pairs = square[np.triu_indices(N + M, 1)]
    typical = np.median(pairs)
    if typical <= 1e-12 * pairs.max():
        raise GeometryError("over half of the pairs of rows are duplicates, so the kernel has no "
                            "width: give each row once")
    kernel = np.exp(square / (-2 * typical))
    np.fill_diagonal(kernel, 0)
    of_x = np.tile(np.arange(N + M) < N, (1 + permutations, 1))  # the sample's own labels first
    of_x[1:] = np.random.default_rng(seed).permuted(of_x[1:], axis=1)
    to_x = of_x.astype(np.float64) @ kernel
    xx = (to_x * of_x).sum(1)
    xy = to_x.sum(1) - xx
    yy = kernel.sum() - xx - 2 * xy
    value = xx / (N * (N - 1)) + yy / (M * (M - 1)) - 2 * xy / (N * M)
    return float(value[0]), _p_value(value[1:] >= value[0] - 1e-12)


def probe_auc(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """How well a linear probe tells x (N, D) from y (M, D): area under its ROC, 0.5 by chance.

    Ridge regression of +-1 on a half of each set, drawn by the seed, is scored on the other halves.
    Coordinates are standardised; the ridge is D, that of unit noise and weights of variance 1 / D,
    which keeps D > N well posed."""
    x = _points(x, "x", 4)
    y = _points(y, "y", 4, x.shape[1])
    D, rng = x.shape[1], np.random.default_rng(seed)
    x, y = rng.permutation(x).astype(np.float64), rng.permutation(y).astype(np.float64)
    n, m = len(x) // 2, len(y) // 2
    fit = np.concatenate([x[:n], y[:m]])
    mean = _mean(fit)
    scale = np.sqrt(np.square(fit - mean).mean(0))
    scale[scale == 0] = 1
    fit, x, y = ((z - mean) / scale for z in (fit, x[n:], y[m:]))
    target = np.repeat([1.0, -1.0], [n, m])
    target -= target.mean()
    if n + m < D:  # the same weights either way
        weights = fit.T @ np.linalg.solve(fit @ fit.T + D * np.eye(n + m), target)
    else:
        weights = np.linalg.solve(fit.T @ fit + D * np.eye(D), fit.T @ target)
    _, place, count = np.unique(np.concatenate([x, y]) @ weights, return_inverse=True,
                                return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place][:len(x)]  # from 1; ties share their mean
    return float((rank.mean() - (len(x) + 1) / 2) / len(y))


def silhouette(x: np.ndarray, labels: np.ndarray, sample: int = 2000, seed: int = 0) -> float:
    """Mean silhouette of clusters labels (N,) of x (N, D), or of a sample of rows, from -1 to 1
    (Rousseeuw 1987): 0 for a cluster of one row. Euclidean; holds sample^2 distances."""
    x, labels = _points(x, "x", 2), np.asarray(labels)
    if labels.shape != (len(x),):
        raise GeometryError(f"labels of shape {labels.shape} for {len(x)} rows: give one a row")
    chosen = _sample(len(x), sample, seed)
    own, count = np.unique(labels[chosen], return_inverse=True, return_counts=True)[1:]
    if len(count) < 2:
        raise GeometryError("one label among the rows: give at least two clusters, "
                            "or a larger sample")
    distance = np.sqrt(_squares(x[chosen], x[chosen]))
    np.fill_diagonal(distance, 0)
    total, each = distance @ np.eye(len(count))[own], np.arange(len(own))  # (n, clusters)
    within = total[each, own] / np.maximum(count[own] - 1, 1)
    total[each, own] = np.inf
    other = (total / count).min(1)
    width = np.maximum(within, other)
    return float(np.where((count[own] > 1) & (width > 0), (other - within)
                          / np.where(width > 0, width, 1), 0).mean())


def bimodality(x: np.ndarray) -> float:
    """Sarle's coefficient (skewness^2 + 1) / kurtosis of x (N,): 1/3 for a Gaussian, 5/9 if
    uniform, 1 for two points. Heavy tails lower it."""
    x = _points(np.reshape(x, (-1, 1)), "x", 4)[:, 0].astype(np.float64)
    z = x - x.mean()
    if not z.any():
        raise GeometryError("all values are equal: they have no shape")
    second, third, fourth = (np.mean((z / np.abs(z).max())**k) for k in (2, 3, 4))
    return float((third**2 / second**3 + 1) * second**2 / fourth)


# --------------------------------------------------------------------------------------------------
# paths, and confidences


def locality(paths: list[np.ndarray], population: np.ndarray, weights: np.ndarray | None = None,
             permutations: int = 200, seed: int = 0) -> dict[str, float]:
    """Are the steps of paths, each (T, D), shorter or more even than those of random walks of the
    same lengths (paper, trajectories)?

    `step` and `spread` are mean and standard deviation of all step lengths. A uniform walk draws
    each point from population (N, D), with probabilities weights (N,) if given: among activations
    they let every token type count the same. A matched walk exchanges the paths' own points among
    all their places, so that frequencies are the text's: an exact test. uniform_ and matched_ are
    means over walks, p_ the share of walks with a value as small; nan without permutations.

    It reads all points 2 x permutations times: for 200 and 2000 points, 0.2 s at width 192 and 2 s
    at 2048 on one core."""
    population = _points(population, "the population")
    N, D = population.shape
    paths = [_points(path, "a path", width=D) for path in paths]
    M = sum(map(len, paths))
    if M == len(paths):
        raise GeometryError("no path has a step: give one of at least 2 points")
    if weights is not None:
        weights = np.asarray(weights, np.float64)
        if weights.shape != (N,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise GeometryError(f"weights must be {N} numbers from 0 up, not all 0: "
                                "give one a member of the population")
        weights = weights / weights.sum()
    points, rng = np.concatenate(paths), np.random.default_rng(seed)
    stays = np.ones(M - 1, bool)  # steps that do not lead from one path to the next
    stays[np.cumsum([len(path) for path in paths])[:-1] - 1] = False

    def measure(source, order):
        block, lengths = 2**17 // D + 1, np.empty(M - 1)  # in the processor's cache
        for at in range(0, M - 1, block):
            walk = source[order[at:at + block + 1]].astype(np.float64)
            lengths[at:at + block] = np.sqrt(np.square(np.diff(walk, axis=0)).sum(1))
        return lengths[stays].mean(), lengths[stays].std()

    names = ("step", "spread")
    observed = measure(points, np.arange(M))
    result = {name: float(value) for name, value in zip(names, observed)}
    for kind, draw in (("uniform", lambda: (population, rng.choice(N, M, p=weights))),
                       ("matched", lambda: (points, rng.permutation(M)))):
        null = np.array([measure(*draw()) for _ in range(permutations)]).reshape(-1, 2)
        for name, value, walks in zip(names, observed, null.T):
            result[f"{kind}_{name}"] = float(walks.mean()) if permutations else math.nan
            # the same steps in another order differ in their last bits
            result[f"p_{kind}_{name}"] = _p_value(walks <= value + 1e-9 * observed[0])
    return result


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in percent over bins of equal width, closed above (Guo et al.
    2017). confidence (N,) from 0 to 1; correct (N,) 0 or 1, or a share."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not confidence.size:
        raise GeometryError(f"confidences {confidence.shape} of answers {correct.shape}: give one "
                            "of each")
    if bins < 1 or not all(((0 <= v) & (v <= 1)).all() for v in (confidence, correct)):
        raise GeometryError("confidences or answers outside 0 to 1, or no bins: give "
                            "probabilities, 0 or 1, and at least 1 bin")
    place = np.ceil(confidence * bins).astype(np.int64).clip(1) - 1
    return float(100 * np.abs(np.bincount(place, confidence - correct)).sum() / len(confidence))


# --------------------------------------------------------------------------------------------------
# what they share


def _points(x, name, least=1, width=None):
    """x as an array (N, D) of floats, checked."""
    x = np.asarray(x)
    x = x.astype(np.float64) if x.dtype.kind in "biu" else x
    if x.ndim != 2 or x.dtype.kind != "f" or not x.shape[1]:
        raise GeometryError(f"{name} is {x.dtype} of shape {x.shape}: give numbers (rows, width)")
    if len(x) < least:
        raise GeometryError(f"{name}: {len(x)} rows, and at least {least} are needed: give more")
    if x.shape[1] != (width or x.shape[1]):
        raise GeometryError(f"{name} has width {x.shape[1]}, expected {width}: "
                            "give rows of one space")
    if not all((np.abs(b) < 1e15).all() for b in _blocks(x)):
        raise GeometryError(f"{name} has values that are not finite or beyond 1e15: leave those "
                            "rows out")
    return x


def _blocks(x):
    return (x[i:i + BLOCK].astype(np.float64, copy=False) for i in range(0, len(x), BLOCK))


def _mean(x):
    """(D,) float64, exact for equal rows: their deviations are then 0, and not rounding."""
    origin = x[0].astype(np.float64)
    return origin + sum((b - origin).sum(0) for b in _blocks(x)) / len(x)


def _centred(x):
    mean = _mean(x)
    return (b - mean for b in _blocks(x))


def _squares(a, b):
    """Squared distances (N, M) float64 of a (N, D) and b (M, D), to the rounding of a product."""
    centre = _mean(a)
    a, b = a - centre, b - centre
    square = a @ b.T
    square *= -2
    square += np.square(a).sum(1)[:, None]
    square += np.square(b).sum(1)
    return np.maximum(square, 0, out=square)


def _unit(x):
    return x / np.maximum(np.sqrt(np.square(x).sum(1, keepdims=True)), 1e-300)


METRICS = {"l2": lambda u, v: np.sqrt(np.square(u - v).sum(1)),
           "cosine": lambda u, v: (_unit(u) * _unit(v)).sum(1).clip(-1, 1)}


def _pairs(metric, a, b, i, j):
    """The metric of a[i] and b[j] for i and j (pairs,), in float64."""
    block = 2**20 // a.shape[1] + 1
    return np.concatenate([np.zeros(0)] + [
        METRICS[metric](a[i[at:at + block]].astype(np.float64),
                        b[j[at:at + block]].astype(np.float64))
        for at in range(0, len(i), block)])


def _sample(N, sample, seed):
    """Which rows of N, in order; all of them where the sample is as large."""
    return np.sort(np.random.default_rng(seed).choice(N, min(N, sample), replace=False))


def _p_value(as_extreme):
    """By permutations, of which what was observed is one."""
    return (1 + int(as_extreme.sum())) / (1 + len(as_extreme)) if len(as_extreme) else math.nan
