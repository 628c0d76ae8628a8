"""Are two samples of one distribution? A kernel test and a linear probe. Needs numpy,
lab/geometry.py and lab/statistics.py.

    value, p = mmd(x, y, articles_of_x, articles_of_y)        # MMD^2, its p-value
    auc, low, high = probe_auc(x, y, articles_of_x, articles_of_y)

x (N, D) and y (M, D) are rows of any float type. Rows of one group may depend on each other, those
of different groups do not: groups are labels (N,) and (M,), and without them every row is a group.
GeometryError refuses what cannot be measured, StatisticsError too few groups.

N and M rows, D width, G groups of both samples.
"""

from __future__ import annotations

import math

import numpy as np

from lab.geometry import GeometryError, checked, mean_of, squared_distances
from lab.statistics import (StatisticsError, group_numbers, interval, jackknife_error, p_value,
                            percentiles)

HALVINGS = 4  # of the kernel's width, from the median distance on
FOLDS = 5


def _sample_groups(x, y, x_groups, y_groups):
    """The checked rows of both samples and their groups' numbers, those of y after those of x, and
    the number of x's groups."""
    x = checked(x, "x", 2)
    y = checked(y, "y", 2, x.shape[1])
    x_group = group_numbers(x_groups, len(x))
    y_group = group_numbers(y_groups, len(y))
    counts = int(x_group.max()) + 1, int(y_group.max()) + 1
    if min(counts) < 2:
        raise StatisticsError(f"{counts[0]} and {counts[1]} independent groups of rows, and each "
                              "sample needs two: give more texts")
    return x, y, x_group, y_group + counts[0], counts[0]


# --------------------------------------------------------------------------------------------------
# maximum mean discrepancy


def mmd(x: np.ndarray, y: np.ndarray, x_groups: np.ndarray | None = None,
        y_groups: np.ndarray | None = None, permutations: int = 200, seed: int = 0,
        by_row: bool = False) -> tuple[float, float]:
    """The unbiased estimate of the squared maximum mean discrepancy between the distributions of x
    and y, which may be negative, and its p-value by permutations, nan for none (Gretton et al.
    2012). Permutations move whole groups, and pairs of rows of one group are left out.

    Every group weighs the same, which keeps the level where one sample has small groups and the
    other large ones. by_row: every row does, so that y's groups may be of unequal laws (long texts
    and short ones) and x rows of the law of all; for it x should have groups as large as y's.

    The value is of the kernel exp(-d^2 / 2 s^2) with the median distance in the pooled sample as s.
    The test takes the largest of the values at s and at HALVINGS halves of it, each in standard
    deviations of its permutations, because one width is blind to differences at other scales
    (Schrab et al. 2023). Holds a few float64 matrices (N + M, N + M)."""
    x, y, x_group, y_group, x_count = _sample_groups(x, y, x_groups, y_groups)
    group = np.concatenate([x_group, y_group])
    order = np.argsort(group, kind="stable")
    group, pooled = group[order], np.concatenate([x, y])[order]
    square = squared_distances(pooled, pooled)
    pairs = np.concatenate([row[i + 1:] for i, row in enumerate(square)])
    typical = np.median(pairs)
    if typical <= 1e-12 * pairs.max():
        raise GeometryError("over half of the pairs of rows are duplicates, so the kernel has no "
                            "width: give each row once")

    # Which groups count as x: (1 + permutations, G), the true labels first
    G = int(group[-1]) + 1
    of_x = np.tile(np.arange(G) < x_count, (1 + permutations, 1))
    of_x[1:] = np.random.default_rng(seed).permuted(of_x[1:], axis=1)

    square /= -2 * typical
    kernel = np.exp(square, out=square)
    values = np.empty((HALVINGS + 1, 1 + permutations))
    for k in range(HALVINGS + 1):
        values[k] = _mmd_values(kernel, group, of_x, by_row)
        for _ in range(2):  # half as wide a kernel is the fourth power of this one
            np.square(kernel, out=kernel)
    value = float(values[0, 0])
    if not permutations:
        return value, float("nan")
    # The true labels are one of the permutations that the scale is taken from, so that they are
    # exchangeable with the others. A kernel that sees no two rows as near has no scale
    deviations = values - values.mean(1, keepdims=True)
    scale = values.std(1, keepdims=True)
    largest = (deviations / np.where(scale > 0, scale, 1)).max(0)
    return value, p_value(largest[1:], largest[0])


def _mmd_values(kernel, group, of_x, by_row):
    """MMD^2 (labellings,) from the kernel of all pairs of rows (N + M, N + M), the rows' groups
    (N + M,) in ascending order, and which groups count as x (labellings, G). by_row: see mmd."""
    # The kernel between two groups, its sum over their rows or its mean; the unbiased estimate
    # leaves out a group's pair with itself
    sizes = np.bincount(group)
    weight = sizes if by_row else np.ones_like(sizes)
    if len(sizes) < len(group):
        starts = np.cumsum(sizes) - sizes
        kernel = np.add.reduceat(kernel, starts, axis=0)
        kernel = np.add.reduceat(kernel, starts, axis=1)
        kernel /= np.outer(sizes // weight, sizes // weight)
    np.fill_diagonal(kernel, 0)

    # Sums of the kernel within x, between x and y, and within y, for all labellings at once
    to_x = of_x.astype(np.float64) @ kernel
    xx = (to_x * of_x).sum(1)
    xy = to_x.sum(1) - xx
    yy = kernel.sum() - xx - 2 * xy
    # and the weights of these pairs
    n, squares = of_x @ weight, of_x @ weight**2
    m, y_squares = weight.sum() - n, (weight**2).sum() - squares
    return xx / (n**2 - squares) + yy / (m**2 - y_squares) - 2 * xy / (n * m)


# --------------------------------------------------------------------------------------------------
# a linear probe


def probe_auc(x: np.ndarray, y: np.ndarray, x_groups: np.ndarray | None = None,
              y_groups: np.ndarray | None = None, seed: int = 0) -> tuple[float, float, float]:
    """Area under the ROC curve of a linear probe that tells x from y, 0.5 for chance, and the
    bounds of its 95 % confidence interval.

    The probe is a ridge regression of +1 and -1. Groups are divided into FOLDS by the seed; a row
    is scored by the probe that was fitted on the other folds, and compared with the rows of its own
    fold (cross-validation). Coordinates are standardised. The ridge is D, which stands for unit
    noise and weights of variance 1 / D, and keeps the fit well posed for D > N.

    The interval is Student's, with the groups' jackknife error (Obuchowski 1997 gives the same to
    first order). That is the error of fixed probes; their share of the fitted groups makes the
    folds' areas vary together, for which Nadeau and Bengio (2003) widen the variance by
    1 + folds / (folds - 1)."""
    x, y, x_group, y_group, x_count = _sample_groups(x, y, x_groups, y_groups)
    group = np.concatenate([x_group, y_group])
    y_count = int(group.max()) + 1 - x_count
    folds = min(FOLDS, x_count, y_count)

    # Each sample's groups are dealt out to the folds in a random order
    rng = np.random.default_rng(seed)
    fold_of_group = np.concatenate([rng.permutation(x_count), rng.permutation(y_count)]) % folds
    fold = fold_of_group[group]

    # Of each group: how often x's score exceeds y's (ties count half), and the number of pairs
    totals = np.zeros((x_count + y_count, 2))
    rows = np.concatenate([x, y]).astype(np.float64)
    sign = np.repeat([1.0, -1.0], [len(x), len(y)])
    for k in range(folds):
        fit, test = fold != k, fold == k
        scores = _ridge_scores(rows[fit], sign[fit], rows[test])
        is_x, of = sign[test] > 0, group[test]
        wins = np.empty((len(scores), 2))
        wins[is_x] = _wins(scores[is_x], scores[~is_x])
        wins[~is_x] = _wins(-scores[~is_x], -scores[is_x])
        np.add.at(totals, of, wins)

    def area(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    # Both samples are sums over the same pairs, and their errors are independent
    auc = float(area(totals[:x_count].sum(0)))
    errors = [jackknife_error(part, area) for part in (totals[:x_count], totals[x_count:])]
    error = float(np.hypot(*errors)) * math.sqrt(1 + folds / (folds - 1))
    low, high = interval(auc, error, min(x_count, y_count))
    return auc, max(low, 0.0), min(high, 1.0)


def _ridge_scores(fit, sign, test):
    """Scores (M,) of rows to test (M, D) by a ridge regression of signs (N,) on rows (N, D)."""
    # A coordinate that never varies stays as it is
    N, D = fit.shape
    mean = mean_of(fit)
    scale = np.sqrt(np.square(fit - mean).mean(0))
    scale[scale == 0] = 1
    fit, test = ((rows - mean) / scale for rows in (fit, test))

    # The two forms give the same weights, and the smaller system is solved
    target = sign - sign.mean()
    if N < D:
        weights = fit.T @ np.linalg.solve(fit @ fit.T + D * np.eye(N), target)
    else:
        weights = np.linalg.solve(fit.T @ fit + D * np.eye(D), fit.T @ target)
    return test @ weights


def _wins(scores, others):
    """For each of scores (n,): how many of others (m,) it exceeds, of which ties count half, and m:
    (n, 2)."""
    count = np.full(len(scores), float(len(others)))
    return np.stack([percentiles(scores, others) / 100 * count, count], axis=1)
