"""Are draws of the same law as real rows? Measures that see holes which the moments hide. Needs
numpy, lab/geometry.py and lab/statistics.py.

    split = most_bimodal(reference)          # the direction along which the rows fall into two
    split.share_in_gap(draws)                # 0.38 of a Gaussian's draws lie between the two ...
    split.share_in_gap(held_out)             # ... and 0.01 of real rows
    c2st(draws, held_out)                    # AUC of a classifier: 0.5 if it cannot tell them apart

N, n and m rows of sets, D the width, P principal directions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lab.geometry import GeometryError, checked, squared_distances
from lab.statistics import StatisticsError, group_numbers, percentiles

LEAST = 20  # rows of a set


class Split(NamedTuple):
    """Two groups of rows along a direction."""

    direction: np.ndarray  # (D,)
    low: float  # the groups' means along it
    high: float

    def share_in_gap(self, x: np.ndarray) -> float:
        """Share of rows (n, D) in the middle half of the way between the two groups' means. It is
        0.31 of a Gaussian, and near 0 of two clusters."""
        along = x.astype(np.float64) @ self.direction
        margin = (self.high - self.low) / 4
        return float(((along > self.low + margin) & (along < self.high - margin)).mean())


def most_bimodal(x: np.ndarray) -> Split:
    """The direction along which rows (N, D) fall most clearly into two groups of a tenth of them or
    more: the one of the largest share of variance between the groups (Otsu 1979).

    From each principal direction rows are split in two, and Fisher's discriminant of the two parts
    is the next direction, until the share grows no more. All of this is in the first N / 20
    principal coordinates, 50 at most: in more, any rows have a direction that divides them."""
    x = _varied(x, "x")
    centred = x - x.mean(0)
    deviation, axes = _principal(centred, min(len(x) // 20, 50))
    scaled_axes = axes / deviation  # (D, P), to coordinates of variance 1
    z = centred @ scaled_axes

    best, best_share = None, -1.0
    for start in np.eye(len(deviation)):
        direction, threshold, share = _discriminate(z, start)
        if share > best_share:
            best, best_share = (direction, threshold), share
    direction, threshold = best
    above = z @ direction > threshold
    direction = scaled_axes @ direction
    along = x @ direction
    return Split(direction, float(along[~above].mean()), float(along[above].mean()))


def _principal(x: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The standard deviations (P,), falling, of centred rows x (N, D) along their first principal
    directions (D, P), of which there are at most so many. Those that rounding may have made are
    left out."""
    N, D = x.shape
    # The smaller of the two matrices of products, whose decomposition is quicker than x's own.
    square, vectors = np.linalg.eigh(x @ x.T if N < D else x.T @ x)
    square, vectors = square[::-1][:most], vectors[:, ::-1][:, :most]
    P = int((square > 1e-12 * square[0]).sum())
    length = np.sqrt(square[:P])
    axes = x.T @ vectors[:, :P] / length if N < D else vectors[:, :P]
    return length / N**0.5, axes


def _discriminate(z: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Fisher's discriminant of rows (N, P) of unit covariance, split along itself: the direction
    (P,), its threshold, and the share of variance that lies between the two parts."""
    threshold, share = _otsu(z @ direction)
    for _ in range(20):
        above = z @ direction > threshold
        # For a unit total covariance it is the difference of means.
        discriminant = z[above].mean(0) - z[~above].mean(0)
        discriminant /= np.linalg.norm(discriminant)
        next_threshold, next_share = _otsu(z @ discriminant)
        if next_share <= share + 1e-9:
            break
        direction, threshold, share = discriminant, next_threshold, next_share
    return direction, threshold, share


def _otsu(t: np.ndarray) -> tuple[float, float]:
    """The threshold that splits numbers (N,) into groups of at least a tenth of them with the
    largest share of variance between the groups, and that share."""
    t = np.sort(t - t.mean())
    N = len(t)
    below = np.arange(1, N)
    between = np.cumsum(t)[:-1]**2 / (below * (N - below))  # variance between groups
    tenth = N // 10
    i = tenth + int(np.argmax(between[tenth : N - 1 - tenth]))
    return float((t[i] + t[i + 1]) / 2), float(between[i] / np.square(t).mean())


def c2st(x: np.ndarray, y: np.ndarray, x_groups: np.ndarray | None = None,
         y_groups: np.ndarray | None = None, seed: int = 0) -> float:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): the area under the ROC curve of a
    classifier that tells rows (n, D) from rows (m, D). 0.5 says that it cannot; the standard error
    of that is at most sqrt((n + m + 2) / (6 n m)), for independent rows and halves of one size:
    that of one half's area, as the areas of the two are not independent. Sets of one size are
    compared best.

    The classifier is kernel ridge regression on the label, with the Gaussian kernel
    exp(-4 distance^2 / median distance^2). It is fitted on either half of the groups of rows,
    (n,) and (m,), and judged by the other half: it would know a text that stood in both. Without
    groups every row is one. Groups whose labels are neighbours stand in different halves."""
    x = _varied(x, "x")
    y = _varied(y, "y", x.shape[1])
    rng = np.random.default_rng(seed)
    halves = []
    for groups, rows in ((x_groups, x), (y_groups, y)):
        group = group_numbers(groups, len(rows))
        if not group.any():
            raise StatisticsError("all rows of a set are of one group, and either half needs one: "
                                  "give more texts")
        # Of two neighbouring groups one is in each half, so that the halves have as much of every
        # part of a file: a classifier that saw more of one part would err where there is less
        coin = rng.integers(2, size=group.max() // 2 + 1)
        halves.append((group + coin[group // 2]) % 2)
    half = np.concatenate(halves)

    z = np.concatenate((x, y))
    label = np.repeat([1.0, -1.0], [len(x), len(y)])

    # The kernel of all pairs of rows.
    squares = squared_distances(z, z)
    squares *= -4 / np.median(squares[squares > 0])
    kernel = np.exp(squares, out=squares)

    areas = []
    for k in (0, 1):
        train, test = np.flatnonzero(half == k), np.flatnonzero(half != k)
        ridge = 0.1 * np.eye(len(train))
        weight = np.linalg.solve(kernel[np.ix_(train, train)] + ridge, label[train])
        score, is_x = kernel[np.ix_(test, train)] @ weight, label[test] > 0
        areas.append(percentiles(score[is_x], score[~is_x]).mean() / 100)
    return float(np.mean(areas))


def _varied(x: np.ndarray, name: str, width: int | None = None) -> np.ndarray:
    """Rows (N, D) in float64, after checking that they are enough and not all equal."""
    x = checked(x, name, LEAST, width).astype(np.float64)
    if not np.ptp(x, axis=0).any():
        raise GeometryError(f"{name}: its rows are all equal: give another set")
    return x
