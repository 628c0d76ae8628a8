"""Measures of the geometry of embeddings: arrays in, numbers out. Needs numpy alone.

    index, distance = nearest(trained, vocabulary, k=5)   # the tokens around every trained row
    collapse_index(trained, vocabulary)                   # (n,), below 1: the row sits on a token
    effective_rank(trained), frechet(activations, text)   # how wide a set is, how far two are apart

A set is an array of rows (N, D) of any float type. Sums are in float64, and populations are read in
blocks. Nothing is printed or written, and the same seed gives the same number. GeometryError
refuses too few rows, widths that differ, and values that are not finite or exceed 1e15, whose
squares float32 cannot add.

n is the number of rows that are judged, N and M the sizes of whole sets, D the width. `paper` is
Exploring Embedding Priors in Prompt-Tuning (arXiv 2412.18582).
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 2048  # rows of a population that are converted to float64 at a time
GROUP = 64  # columns whose maximum is compared first, where the k largest are selected
THREADS = min(os.cpu_count() or 1, 8)  # each holds a block's scores


class GeometryError(ValueError):
    """Data that cannot be measured. The message is one line: the problem and the remedy."""


# --------------------------------------------------------------------------------------------------
# rows in a population


def displacement(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """L2 distance from every row of start (n, D) to the same row of end (n, D): (n,)."""
    start = checked(start, "start")
    end = checked(end, "end", width=start.shape[1])
    if len(start) != len(end):
        raise GeometryError(f"start has {len(start)} rows and end {len(end)}: give the same rows")
    return _distances(start.astype(np.float64), end.astype(np.float64))


def keep_their_own(rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(N,) bool: whether no other draw is nearer to a row (N, D) than the one (N, D) that it began
    as. Draws that are equal, as those of a text are in every run, count as one."""
    return displacement(draws, rows) <= 1.0001 * nearest(rows, draws)[1][:, 0]


def moved_at_random(rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Rows (N, D) as far from their draws (N, D) as these are, in random directions."""
    direction = np.random.default_rng(0).normal(size=draws.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return draws + direction * displacement(draws, rows)[:, None]


def nearest(rows: np.ndarray, population: np.ndarray, k: int = 1, metric: str = "l2"
            ) -> tuple[np.ndarray, np.ndarray]:
    """The k members of population (N, D) nearest to each of rows (n, D): index (n, k) and value
    (n, k). Values are distances in ascending order (l2) or cosines in descending order (cosine).

    The result is that of float64 arithmetic on all pairs. A row that is in the population has
    distance 0; members at equal distance are sorted by index; a row of zeros has cosine 0."""
    if metric not in METRICS or k < 1:
        raise GeometryError(f"{k} nearest by {metric!r}: ask for at least 1, by one of "
                            f"{', '.join(METRICS)}")
    population = checked(population, "the population", k)
    rows = checked(rows, "rows", width=population.shape[1])
    index = np.empty((len(rows), k), np.int64)
    value = np.empty((len(rows), k))

    def search(block: slice) -> None:
        index[block], value[block] = _nearest(rows[block], population, k, metric)

    _in_threads(search, len(rows), BLOCK)
    return index, value


def _nearest(rows, population, k, metric):
    """`nearest` of one block of rows."""
    # Float32 rules out nearly all pairs; float64 measures the remaining ones
    i, j = _candidates(rows, population, k, metric)
    value = _pairs(metric, rows, population, i, j)

    # Sort by row, then from near to far, then by index, and take the first k of every row
    from_near = value if metric == "l2" else -value
    order = np.lexsort((j, from_near, i))
    first = np.searchsorted(i[order], np.arange(len(rows)))
    best = order[first[:, None] + np.arange(k)]
    return j[best], value[best]


def _candidates(rows, population, k, metric):
    """Pairs of a row i and a member j, both (pairs,), that include the k nearest members of every
    row (n, D).

    A pair's score, smaller for nearer members, is computed in float32 with a bound on its rounding
    error, so the exact score lies between `low` and `high`. At least k members of a row have
    exact scores up to `limit`, the k-th smallest `high` of the row. A member whose `low` exceeds
    that limit is therefore not among the k nearest."""
    D = rows.shape[1]

    # The population's mean becomes the origin, because float32 has the smallest steps near zero
    sample = population[::len(population) // 4096 + 1]
    origin = sample.mean(0, dtype=np.float64).astype(np.float32)

    # A dot product of D terms errs by at most D 2^-24 |a| |b|, a squared length by D 2^-24 |a|^2
    relative_error = np.float32(2 * (D + 16) * 2.0**-24)

    # The score is |a|^2 + |b|^2 - 2 a.b = |a - b|^2 for l2, and -2 a.b for unit vectors. Its error
    # is a share of |a|^2 + |b|^2, which `low` subtracts at once
    a, a_square = _for_scores(rows, origin, metric)
    a *= -2
    weight = -relative_error if metric == "cosine" else 1 - relative_error

    smallest_highs = np.full((len(rows), k), np.inf, np.float32)
    limit = smallest_highs[:, -1].copy()
    i_parts, j_parts, low_parts = [], [], []
    for first in range(0, len(population), BLOCK):
        b, b_square = _for_scores(population[first:first + BLOCK], origin, metric)
        low = a @ b.T
        low += weight * b_square
        low += (weight * a_square)[:, None]

        # Only the rows with a member that the limits do not rule out need another look, which
        # after the first blocks are few. Their limits are lowered, and such members kept
        i = np.flatnonzero(low.min(1) <= limit)
        low = low[i]
        high = low + 2 * relative_error * (a_square[i, None] + b_square)
        highs = np.concatenate([smallest_highs[i], high], axis=1)
        smallest_highs[i] = np.partition(highs, k - 1, axis=1)[:, :k]
        limit[i] = smallest_highs[i, -1]
        row, j = np.nonzero(low <= limit[i, None])
        i_parts.append(i[row])
        j_parts.append(first + j)
        low_parts.append(low[row, j])

    # Later blocks have lowered the limits, which rules out more members of the earlier blocks
    i, j, low = (np.concatenate(parts) for parts in (i_parts, j_parts, low_parts))
    remaining = low <= limit[i]
    return i[remaining], j[remaining]


def _for_scores(x, origin, metric):
    """x (N, D) in float32 as the scores need it, relative to the origin (l2) or of length 1
    (cosine), and its squared lengths (N,)."""
    if metric == "l2":
        single = (x - origin).astype(np.float32)
    else:
        single = _unit(x.astype(np.float64)).astype(np.float32)
    return single, np.square(single).sum(1)


def similar(rows: np.ndarray, population: np.ndarray, k: int, members: np.ndarray | None = None
            ) -> tuple[np.ndarray, np.ndarray]:
    """The k members of population (N, D) with the largest cosine to each of rows (n, D), in
    descending order: index (n, k) and cosine (n, k) float32.

    For many rows: in float32, so members whose cosines agree to 1e-6 may change places, where
    `nearest` is exact. members (n,), if given, says which member every row is, and no row is then
    its own neighbour; the population has to have k others."""
    if k < 1:
        raise GeometryError(f"{k} most similar members: ask for at least 1")
    least = k if members is None else k + 1
    population = checked(population, "the population", least)
    rows = checked(rows, "rows", width=population.shape[1])
    N, D = population.shape
    if members is not None and np.shape(members) != (len(rows),):
        raise GeometryError(f"members of shape {np.shape(members)} for {len(rows)} rows: "
                            "give one index a row")

    # Members of length 1; rows of zeros make their number a multiple of GROUP
    unit = np.zeros((math.ceil(N / GROUP) * GROUP, D), np.float32)
    for first in range(0, N, BLOCK):
        last = min(first + BLOCK, N)
        unit[first:last] = _unit(population[first:last].astype(np.float64))

    index = np.empty((len(rows), k), np.int64)
    cosine = np.empty((len(rows), k), np.float32)

    def search(part: slice) -> None:
        scores = np.empty((256, len(unit)), np.float32)  # allocated once, since allocating is slow
        for first in range(part.start, part.stop, 256):
            block = slice(first, min(first + 256, part.stop))
            directions = _unit(rows[block].astype(np.float64)).astype(np.float32)
            score = np.matmul(directions, unit.T, out=scores[:len(directions)])
            score[:, N:] = -np.inf
            if members is not None:
                score[np.arange(len(score)), members[block]] = -np.inf
            index[block], cosine[block] = _largest(score, k)

    _in_threads(search, len(rows), len(rows))
    return index, cosine


def _largest(score, k):
    """The k largest numbers in every row of score (n, N), N a multiple of GROUP: columns (n, k) and
    values (n, k) in descending order.

    They are in the k groups with the largest maxima, so that the rest is not sorted. Group g has
    the columns g, g + N / GROUP, g + 2 N / GROUP, ..., which makes its maximum fast to compute."""
    n, N = score.shape
    groups = N // GROUP
    columns = np.broadcast_to(np.arange(N), score.shape)
    if groups > k:
        maxima = score.reshape(n, GROUP, groups).max(1)
        best_groups = np.argpartition(maxima, groups - k, axis=1)[:, groups - k:]
        offsets = groups * np.arange(GROUP)
        columns = (best_groups[:, :, None] + offsets).reshape(n, -1)
    candidates = np.take_along_axis(score, columns, 1)
    by_value = np.argsort(-candidates, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(columns, by_value, 1), np.take_along_axis(candidates, by_value, 1)


def neighbour_distance(x: np.ndarray, k: int = 1, sample: int = 2000, seed: int = 0) -> np.ndarray:
    """Distance (min(N, sample),) from rows of x (N, D) to their k-th nearest other row. The rows
    are a sample drawn by the seed, in ascending order. A duplicate of a row counts as another row,
    at distance 0."""
    if k < 1:
        raise GeometryError(f"neighbour {k}: ask for the first, 1, or a later one")
    x = checked(x, "x", k + 1)
    # The row itself, at distance 0, is one of the k + 1 nearest, and none of them is nearer
    _, distance = nearest(x[_sample(len(x), sample, seed)], x, k + 1)
    return distance[:, k]


def spacing(population: np.ndarray) -> float:
    """The median distance of a member of the population (N, D) to its nearest other member, over a
    sample of 2000. Takes 2000 N distances."""
    typical = float(np.median(neighbour_distance(population)))
    if not typical > 0:
        raise GeometryError("over half of the population are duplicates, so it has no spacing: "
                            "give each member once")
    return typical


def collapse_index(rows: np.ndarray, population: np.ndarray, typical: float | None = None
                   ) -> np.ndarray:
    """The distance of every row (n, D) to its nearest token, in units of the tokens' spacing: (n,).
    A row below 1 has collapsed onto a token. population (N, D): the tokens. typical: their spacing,
    if it is known already."""
    typical = typical or spacing(population)
    _, distance = nearest(rows, population)
    return distance[:, 0] / typical


# --------------------------------------------------------------------------------------------------
# rows as mixtures


def mixtures(rows: np.ndarray, population: np.ndarray, most: int = 8
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each of rows (n, D) as a sum of few members of population (N, D), with weights from 0 up:
    index (n, most), weight (n, most), and the share (n, most) of |row|^2 that the first 1, 2, ...
    members explain. Where no further member would explain more, the index is -1.

    Orthogonal matching pursuit (Pati et al. 1993) with non-negative weights (Bruckstein et al.
    2008): the next member is the one with the largest cosine to what is left of the row, and then
    all weights are fitted anew. It is greedy: of two members it may not find the best pair."""
    if most < 1:
        raise GeometryError(f"mixtures of {most} members: ask for at least 1")
    population = checked(population, "the population", most)
    rows = checked(rows, "rows", width=population.shape[1]).astype(np.float64)
    norm = np.concatenate([np.linalg.norm(block, axis=1) for block in _blocks(population)])
    norm[norm == 0] = np.inf  # a member that is zero explains nothing
    square = np.maximum(np.square(rows).sum(1), 1e-300)

    index = np.full((len(rows), most), -1)
    weight, share = np.zeros((len(rows), most)), np.zeros((len(rows), most))
    left, active = rows.copy(), np.ones(len(rows), bool)
    for k in range(most):
        j, projection = _most_similar(left, population, norm, index[:, :k])
        active &= projection > 1e-6 * np.sqrt(square)
        for i in np.flatnonzero(active):
            index[i, k] = j[i]
            chosen = index[i, :k + 1]
            unit = population[chosen].astype(np.float64) / norm[chosen, None]
            w = _non_negative(unit @ unit.T, unit @ rows[i])
            left[i] = rows[i] - w @ unit
            weight[i, :k + 1] = w / norm[chosen]
        share[:, k] = 1 - np.square(left).sum(1) / square
    return index, weight, share


def _most_similar(rows, population, norm, excluded):
    """The member with the largest product of its direction with each of rows (n, D), but for those
    excluded (n, k), and that product: (n,) each. In float32, as ties do not matter."""
    single, best = rows.astype(np.float32), np.zeros(len(rows), np.int64)
    value = np.full(len(rows), -np.inf)
    for first in range(0, len(population), BLOCK):
        block = population[first:first + BLOCK].astype(np.float32, copy=False)
        score = single @ block.T / norm[first:first + BLOCK]
        i, k = np.nonzero((excluded >= first) & (excluded < first + BLOCK))
        score[i, excluded[i, k] - first] = -np.inf
        j = score.argmax(1)
        largest = score[np.arange(len(rows)), j]
        better = largest > value
        best[better], value[better] = first + j[better], largest[better]
    return best, value


def _non_negative(gram, product):
    """Weights w (k,) from 0 up with the least w gram w - 2 product w, gram (k, k) (Lawson and
    Hanson 1974, chapter 23)."""
    k = len(product)
    w, free = np.zeros(k), np.zeros(k, bool)
    for _ in range(3 * k):
        gradient = np.where(free, -np.inf, product - gram @ w)
        if gradient.max() <= 1e-10 * np.abs(product).max():
            break
        free[gradient.argmax()] = True
        while True:
            z = np.zeros(k)
            z[free] = np.linalg.lstsq(gram[np.ix_(free, free)], product[free], rcond=None)[0]
            below = free & (z <= 0)
            if not below.any():
                w = z
                break
            # As far towards z as no weight falls below 0; the one that reaches 0 is left out.
            steps = w[below] / np.maximum(w[below] - z[below], 1e-300)
            w = w + steps.min() * (z - w)
            free[np.flatnonzero(below)[steps.argmin()]] = False
            w[~free] = 0
    return w


# --------------------------------------------------------------------------------------------------
# Gaussians and spectra


def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of x (N, D) in float64. The covariance is the maximum
    likelihood estimate, which divides by N."""
    x = checked(x, "x", 2)
    products = sum(block.T @ block for block in _centred(x))
    return mean_of(x), products / len(x)


def effective_rank(x: np.ndarray, share: float = 0.95) -> int:
    """The smallest number of principal components that hold a share (to 1e-9) of the variance of
    x (N, D): at most N - 1, and 0 if all rows are equal.

    For 20 isotropic rows at D = 2048 it is 18. Without subtracting the mean it would be 19, which
    is the paper's number for trained rows."""
    x = checked(x, "x", 2)
    if not 0 < share <= 1:
        raise GeometryError(f"share is {share}, expected more than 0 and at most 1")
    variance = _variances(x)
    cumulative = np.cumsum(variance)
    total = cumulative[-1]
    if total == 0:
        return 0
    too_few = cumulative < (share - 1e-9) * total
    return int(too_few.sum()) + 1


def total_variance_ratio(x: np.ndarray, reference: np.ndarray) -> float:
    """trace Cov(x) / trace Cov(reference), both divided by N - 1, so that even a few rows drawn
    from the reference have an expected ratio of 1."""
    x = checked(x, "x", 2)
    reference = checked(reference, "reference", 2, x.shape[1])
    total = _total_variance(reference)
    if not total > 0:
        raise GeometryError("all rows of the reference are equal: give another reference")
    return float(_total_variance(x) / total)


def _total_variance(x):
    return sum(np.square(block).sum() for block in _centred(x)) / (len(x) - 1)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians fitted to x (N, D) and y (M, D), with their
    covariances divided by N and M: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) (Dowson and
    Landau 1982).

    It grows with D and as N and M fall, so compare values of the same N and M only."""
    x = checked(x, "x", 2)
    y = checked(y, "y", 2, x.shape[1])

    # For A^T A = S1 and B^T B = S2 the trace of the root is the sum of A B^T's singular values
    a = _factor(x)
    b = _factor(y)
    root_trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()

    between_means = np.square(mean_of(x) - mean_of(y)).sum()
    distance = between_means + np.square(a).sum() + np.square(b).sum() - 2 * root_trace
    return max(0.0, float(distance))


def _variances(x):
    """The variances (min(N, D),) of x (N, D) along its principal components, falling."""
    if len(x) <= x.shape[1]:
        centred = np.concatenate(list(_centred(x)))
        squares = centred @ centred.T / len(x)
    else:
        _, squares = gaussian(x)
    return np.linalg.eigvalsh(squares)[::-1].clip(0)


def _factor(x):
    """A (min(N, D), D) such that A^T A is the covariance of x."""
    if len(x) <= x.shape[1]:
        return np.concatenate(list(_centred(x))) / math.sqrt(len(x))
    _, covariance = gaussian(x)
    variance, basis = np.linalg.eigh(covariance)
    return np.sqrt(variance.clip(0))[:, None] * basis.T


# --------------------------------------------------------------------------------------------------
# two sets, and clusters


def precision_recall(x: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """The share of x (N, D) inside the manifold of reference (M, D), and the share of the reference
    inside that of x. A manifold is a union of balls around points, each with the distance to the
    k-th nearest other point as its radius (Kynkaanniemi et al. 2019). Holds N M distances."""
    x = checked(x, "x", k + 1)
    reference = checked(reference, "reference", k + 1, x.shape[1])
    square = squared_distances(x, reference)
    return _share_inside(x, reference, square, k), _share_inside(reference, x, square.T, k)


def precision(x: np.ndarray, reference: np.ndarray, k: int = 3) -> float:
    """That of precision_recall alone, for which x (N, D) may be a single row."""
    x = checked(x, "x")
    reference = checked(reference, "reference", k + 1, x.shape[1])
    return _share_inside(x, reference, squared_distances(x, reference), k)


def _share_inside(points, centres, square, k):
    """The share of points (N, D) that lie in a ball of centres (M, D), at squared distances
    (N, M)."""
    radius = neighbour_distance(centres, k, sample=len(centres))
    # The squares carry the rounding of a product. Pairs closer than that to the edge of a ball are
    # compared by the arithmetic that gave the radius
    slack = 1e-10 * (square.max() + np.square(radius).max())
    hit = square < np.square(radius) - slack
    undecided = ~hit & (square <= np.square(radius) + slack)
    i, j = np.nonzero(undecided)
    hit[i, j] = _pairs("l2", points, centres, i, j) <= radius[j]
    return float(hit.any(1).mean())


def variance_between(x: np.ndarray, y: np.ndarray) -> float:
    """How much of the variance of x (N, D) and y (M, D) together lies between their means, percent:
    that of a regression of the rows on the label, R^2 over all dimensions."""
    x = checked(x, "x")
    y = checked(y, "y", width=x.shape[1])
    N, M = len(x), len(y)
    between = N * M / (N + M) * np.square(x.mean(0) - y.mean(0)).sum()
    within = sum(np.square(rows - rows.mean(0)).sum() for rows in (x, y))
    if between + within == 0:
        raise GeometryError("all rows are equal: they have no variance")
    return float(100 * between / (between + within))


def silhouette(x: np.ndarray, labels: np.ndarray, sample: int = 2000, seed: int = 0) -> float:
    """Mean silhouette of the clusters of x (N, D) given by labels (N,), from -1 to 1, over a sample
    of the rows (Rousseeuw 1987). A cluster of one row counts 0. Euclidean; holds sample^2
    distances."""
    x = checked(x, "x", 2)
    labels = np.asarray(labels)
    if labels.shape != (len(x),):
        raise GeometryError(f"labels of shape {labels.shape} for {len(x)} rows: give one a row")
    chosen = _sample(len(x), sample, seed)
    _, cluster, count = np.unique(labels[chosen], return_inverse=True, return_counts=True)
    if len(count) < 2:
        raise GeometryError("one label among the rows: give at least two clusters, "
                            "or a larger sample")
    members = x[chosen]
    distance = np.sqrt(squared_distances(members, members))
    np.fill_diagonal(distance, 0)

    # Mean distance of every row to the rest of its cluster, and to the nearest other cluster
    row = np.arange(len(chosen))
    membership = np.eye(len(count))[cluster]
    total = distance @ membership  # (n, clusters)
    within = total[row, cluster] / np.maximum(count[cluster] - 1, 1)
    total[row, cluster] = np.inf
    other = (total / count).min(1)

    width = np.maximum(within, other)
    defined = (count[cluster] > 1) & (width > 0)
    score = (other - within) / np.where(width > 0, width, 1)
    return float(np.where(defined, score, 0).mean())


# --------------------------------------------------------------------------------------------------
# what they share with other modules


def checked(x: np.ndarray, name: str, least: int = 1, width: int | None = None) -> np.ndarray:
    """x as an array (N, D) of floats. Raises GeometryError, which names it, for fewer than `least`
    rows, another width, and values that are not finite or too large."""
    x = np.asarray(x)
    if x.dtype.kind in "biu":
        x = x.astype(np.float64)
    if x.ndim != 2 or x.dtype.kind != "f" or not x.shape[1]:
        raise GeometryError(f"{name} is {x.dtype} of shape {x.shape}: give numbers (rows, width)")
    if len(x) < least:
        raise GeometryError(f"{name}: {len(x)} rows, and at least {least} are needed: give more")
    if width is not None and x.shape[1] != width:
        raise GeometryError(f"{name} has width {x.shape[1]}, expected {width}: "
                            "give rows of one space")
    # A comparison with nan is false, so nan is refused with the large values
    if not (-1e15 < float(x.min(initial=0)) and float(x.max(initial=0)) < 1e15):
        raise GeometryError(f"{name} has values that are not finite or beyond 1e15: leave those "
                            "rows out")
    return x


def _in_threads(call, count, most):
    """call(slice) for all of so many rows, at most `most` at a time, on every core: numpy holds no
    lock while it computes."""
    size = max(min(most, math.ceil(count / THREADS)), 128)
    parts = [slice(first, min(first + size, count)) for first in range(0, count, size)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(call, parts))  # raises what a call raised


def _blocks(x):
    """x (N, D) in float64, BLOCK rows at a time."""
    return (x[i:i + BLOCK].astype(np.float64, copy=False) for i in range(0, len(x), BLOCK))


def mean_of(x: np.ndarray) -> np.ndarray:
    """Mean (D,) in float64 of x (N, D), taken relative to the first row: if all rows are equal it
    is exactly that row, and their deviations are exactly 0."""
    origin = x[0].astype(np.float64)
    return origin + sum((block - origin).sum(0) for block in _blocks(x)) / len(x)


def _centred(x):
    """x (N, D) less its mean, in float64 by blocks."""
    mean = mean_of(x)
    return (block - mean for block in _blocks(x))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (N, M) in float64 between a (N, D) and b (M, D), by a matrix product, whose
    rounding error is relative to the squared lengths."""
    centre = mean_of(a)
    a_centred = a - centre
    # A product of an array with itself takes half of the time
    b_centred = a_centred if b is a else b - centre
    square = a_centred @ b_centred.T
    square *= -2
    square += np.square(a_centred).sum(1)[:, None]
    square += np.square(b_centred).sum(1)
    return np.maximum(square, 0, out=square)


def _unit(x):
    """x (N, D) float64 with rows of length 1; rows of zeros stay."""
    length = np.sqrt(np.square(x).sum(1, keepdims=True))
    return x / np.maximum(length, 1e-300)


def _distances(a, b):
    """Distance (N,) between the same rows of a and b, both (N, D) float64."""
    return np.sqrt(np.square(a - b).sum(1))


def _cosines(a, b):
    """Cosine (N,) between the same rows of a and b, both (N, D) float64."""
    return (_unit(a) * _unit(b)).sum(1).clip(-1, 1)


METRICS = {"l2": _distances, "cosine": _cosines}


def _pairs(metric, a, b, i, j):
    """The metric (pairs,) between the rows a[i] and b[j], in float64; i and j are (pairs,)."""
    value = np.empty(len(i))
    block = 2**20 // a.shape[1] + 1
    for first in range(0, len(i), block):
        pairs = slice(first, first + block)
        a_rows = a[i[pairs]].astype(np.float64)
        b_rows = b[j[pairs]].astype(np.float64)
        value[pairs] = METRICS[metric](a_rows, b_rows)
    return value


def _sample(N, sample, seed):
    """Indices, in ascending order, of a sample of N rows, or of all if the sample is as large."""
    size = min(N, sample)
    return np.sort(np.random.default_rng(seed).choice(N, size, replace=False))
