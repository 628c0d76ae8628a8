"""Tests of hypotheses and intervals: numbers in, numbers out. Needs numpy alone.

    p = p_value(permuted, observed, two_sided=True)           # exact for exchangeable values
    error = jackknife_error(totals, lambda t: t[..., 0] / t[..., 1])    # groups are the units
    low, high = interval(value, error, groups=len(totals))
    unimodal_p(x, groups)                                     # small: x has more than one mode
    paired(scores - others, articles).equivalence_p(margin=2)  # small: equal within the margin

Rows of one text, and questions of one article, depend on each other. Where a function takes groups
(N,), rows of one group may depend on each other, and different groups are independent. The same
seed gives the same number. StatisticsError refuses data that cannot be tested.

N rows, D width, G groups, S seeds.
"""

from __future__ import annotations

import functools
import math
from typing import Callable, Iterable, NamedTuple

import numpy as np

BINS = 2048  # of the grid on which densities are estimated
CALIBRATION_BINS = 15  # of confidences


class StatisticsError(ValueError):
    """Data that cannot be tested. The message is one line: the problem and the remedy."""


# --------------------------------------------------------------------------------------------------
# p-values


def p_value(null: np.ndarray, observed: float, two_sided: bool = False) -> float:
    """The p-value of an observed statistic beside its values under the null hypothesis (m,), nan
    for none: the share of values as large as the observed one, which counts as one of them (Phipson
    and Smyth 2010). Two-sided: twice the share of the smaller tail, at most 1.

    If observed and null values are exchangeable under the hypothesis, p <= a has at most the
    probability a."""
    null = np.asarray(null, np.float64)
    if not len(null):
        return math.nan
    if not (math.isfinite(observed) and np.isfinite(null).all()):
        raise StatisticsError(f"a statistic of {observed:g}, or one under the hypothesis, is not "
                              "finite: give finite data")
    # The same terms summed in another order differ in their last bits
    tolerance = 1e-9 * max(abs(observed), np.abs(null).max())
    above = 1 + int((null >= observed - tolerance).sum())
    below = 1 + int((null <= observed + tolerance).sum())
    count = min(1 + len(null), 2 * min(above, below)) if two_sided else above
    return count / (1 + len(null))


def holm(p: np.ndarray) -> np.ndarray:
    """p-values (k,) of k tests, adjusted: rejecting those up to a has at most the probability a of
    even one false rejection, however the tests depend on each other (Holm 1979)."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    factors = np.arange(len(p), 0, -1)
    adjusted[order] = np.maximum.accumulate(factors * p[order]).clip(max=1)
    return adjusted


def enough(tests: int, least: int, two_sided: bool = False) -> int:
    """How many values under the hypothesis a `p_value` needs that is one of so many tests, at least
    `least`: of fewer no p-value could be small after Holm's correction. With these the smallest is
    0.025."""
    return max(least, 40 * tests * (1 + two_sided))


def sign_flip_p(difference: np.ndarray, flips: int = 2000, seed: int = 0) -> float:
    """The p-value of the mean of paired differences (n, D), against random signs of the pairs
    (Fisher 1935). The hypothesis: a difference and its negative are equally likely. The statistic
    is the length of the sum. Of n pairs p is at least about 2^(1 - n)."""
    difference = np.asarray(difference, np.float64)
    if difference.ndim != 2 or len(difference) < 2:
        raise StatisticsError(f"differences of shape {difference.shape}: give two pairs or more")
    products = difference @ difference.T
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (flips, len(difference)))
    squares = ((signs @ products) * signs).sum(1)  # squared lengths of the sums
    return p_value(squares, products.sum())


# --------------------------------------------------------------------------------------------------
# intervals


def student_quantile(freedom: float, level: float = 0.95) -> float:
    """The t that a Student variable of so many degrees of freedom exceeds neither way with the
    probability `level`, to 1e-5 of itself up to a level of 0.999998."""
    if freedom < 1:
        raise StatisticsError(f"{freedom} degrees of freedom: give at least two values")
    share, angles = _student_angles(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(level, share, angles))


@functools.lru_cache(maxsize=64)
def _student_angles(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Of t = sqrt(freedom) tan(angle), with the density of an angle proportional to
    cos(angle)^(freedom - 1): the probabilities of angles up to these either way, and the angles."""
    # Of many degrees the mass lies near 0, and what lies beyond t = 40 is less than 1e-15 of it
    largest = min(math.pi / 2, math.atan(40 / math.sqrt(freedom)) if freedom > 40 else 2)
    # Steps shorten towards the end, where of few degrees the tail is
    edges = largest * (1 - np.linspace(1, 0, 20001) ** 2)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = np.cumsum(np.cos(middles) ** (freedom - 1) * np.diff(edges))
    return np.append(0, mass / mass[-1]), edges


def interval(value: float, error: float, groups: int) -> tuple[float, float]:
    """The 95 % confidence interval of a value whose standard error was estimated from so many
    independent groups, by Student's t."""
    half = student_quantile(groups - 1) * error
    return value - half, value + half


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent values (n,), of two or more, and its 95 % interval."""
    n = len(values)
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, *interval(mean, error, n)


def jackknife_error(totals: np.ndarray, statistic: Callable) -> float:
    """The standard error of a statistic of sums over groups, by leaving out one group at a time
    (Efron and Stein 1981). totals (G, k): what each group adds to the k sums; statistic: sums
    (..., k) -> (...)."""
    G = len(totals)
    if G < 2:
        raise StatisticsError(f"{G} independent groups: give two or more")
    left_out = statistic(totals.sum(0) - totals)
    deviations = left_out - left_out.mean()
    return float(np.sqrt((G - 1) / G * np.square(deviations).sum()))


def ratio_error(x: np.ndarray, n: np.ndarray, cluster: np.ndarray) -> float:
    """The standard error of sum(x) / sum(n), such as a mean (n of ones), by linearisation (Cochran
    1977, chapter 6). x, n (N,); cluster (N,) int: units in one cluster may depend on each other;
    clusters, two or more, are independent."""
    residual = np.bincount(cluster, x - x.sum() / n.sum() * n)  # of each cluster
    C = len(np.unique(cluster))
    return float(np.sqrt(C / (C - 1) * (residual**2).sum()) / n.sum())


def percentiles(values: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """For each of values (n,) the percentage of the sample (N,) that lies below it; equal ones
    count half."""
    ordered = np.sort(sample)
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return 50 * below / len(ordered)


def group_numbers(groups: np.ndarray | None, N: int) -> np.ndarray:
    """Groups (N,) of any type as the numbers 0 to G - 1; None: every row is its own group."""
    if groups is None:
        return np.arange(N)
    if np.shape(groups) != (N,):
        raise StatisticsError(f"groups of shape {np.shape(groups)} for {N} rows: give one a row")
    return np.unique(groups, return_inverse=True)[1]


# --------------------------------------------------------------------------------------------------
# sameness


class Paired(NamedTuple):
    """A mean difference between paired scores of seeds and questions, which are both random: the
    mean is meant to hold of other seeds and of other questions."""

    mean: float
    by_seed: float  # the variance of the mean by the spread among seeds; 0 of a single one
    by_group: float  # the same by the spread among groups of questions
    by_both: float  # the same by the residual, which neither explains; both of the above contain it
    seeds: int
    groups: float  # of questions; if they differ in size, as many equal ones as tell as much

    def half_width(self, level: float = 0.95) -> float:
        """Half of the interval about the mean that holds the true difference with this probability,
        or more. A part of the variance that was estimated from few seeds is weighted by their
        Student's t (Howe 1974), so that three lucky seeds do not make a narrow interval."""
        question = student_quantile(self.groups - 1, level) ** 2
        least = question * self.by_group
        if self.seeds == 1:
            return math.sqrt(least)
        seed = student_quantile(self.seeds - 1, level) ** 2
        rest = max(self.by_group - self.by_both, 0)  # by_seed has what is of both already
        return math.sqrt(max(seed * self.by_seed + question * rest, least))

    def equivalence_p(self, margin: float) -> float:
        """The p-value of the hypothesis that the true difference is the margin or more, either way,
        by two one-sided tests (Schuirmann 1987). The margin has to be chosen before scores are
        seen. Small: the two are equal within the margin. Not small: nothing is known."""
        room = margin - abs(self.mean)
        return self._tail(room) if room > 0 else 1 - self._tail(-room)

    def difference_p(self) -> float:
        """The two-sided p-value of the hypothesis that there is no difference. Not small: nothing
        is known; that there is none is a matter of equivalence_p."""
        return 2 * self._tail(abs(self.mean))

    def detectable(self, level: float, power: float) -> float:
        """The true difference that as many other seeds and questions tell from none, at this level
        with this power: the distance that is significant, and the one by which a mean falls short
        of the truth with the probability 1 - power. It is as uncertain as the spread is."""
        return self.half_width(1 - level) + self.half_width(2 * power - 1)

    def with_any_seeds(self) -> Paired:
        """What is left of the spread with ever more seeds: that of the questions."""
        return self._replace(by_seed=0.0, by_group=max(self.by_group - self.by_both, 0.0),
                             by_both=0.0)

    def _tail(self, distance: float) -> float:
        """The probability that the mean lies this far above the truth, 1e-6 if it is smaller: the
        level at which half_width is the distance is found by bisection. To 1e-7, or of a larger one
        to 2e-4 of itself."""
        if distance == 0:
            return 0.5
        low, high = 1e-6, 0.5
        while high - low > 1e-7 + 1e-4 * low:
            middle = math.sqrt(low * high)
            too_wide = self.half_width(1 - 2 * middle) > distance
            low, high = (middle, high) if too_wide else (low, middle)
        return high


def paired(difference: np.ndarray, groups: np.ndarray | None = None) -> Paired:
    """Differences (S, N) between two scores of the same seed and question. groups (N,): questions
    of one group depend on each other. One seed is allowed; then the result is about that seed.

    The variances are those to which bootstraps of seeds alone, of groups alone, and of the part
    that neither explains converge, without their bias. A two-way bootstrap that draws both at once
    and takes percentiles counts that part three times (Owen 2007), and of few seeds it draws no
    other ones: the test of levels shows both."""
    difference = np.atleast_2d(np.asarray(difference, np.float64))
    S, N = difference.shape
    group = group_numbers(groups, N)
    sizes = np.bincount(group)
    G = len(sizes)
    if G < 2:
        raise StatisticsError(f"{G} independent groups: give two or more")

    # A variance that a few large groups decide is known as badly as one of few groups (Kish 1965)
    effective = max(2.0, N**2 / float(np.square(sizes).sum()))
    # What each group adds to the mean of a seed, linearised, because groups differ in size
    mean = difference.mean()
    residual = difference - mean
    cells = np.stack([np.bincount(group, row) for row in residual]) * G / N  # (S, G), mean 0
    of_seed, of_group = cells.mean(axis=1), cells.mean(axis=0)
    by_group = float(of_group @ of_group) / (G - 1) / G
    if S == 1:
        return Paired(float(mean), 0.0, by_group, 0.0, S, effective)
    rest = cells - of_seed[:, None] - of_group
    return Paired(float(mean), float(of_seed @ of_seed) / (S - 1) / S, by_group,
                  float(np.square(rest).sum()) / ((S - 1) * (G - 1)) / (S * G), S, effective)


# --------------------------------------------------------------------------------------------------
# calibration


def calibration_error(confidence: np.ndarray, correct: np.ndarray,
                      bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error in percent over bins of equal width, closed above (Guo et al.
    2017). confidence (N,) from 0 to 1; correct (N,) 0 or 1, or a share."""
    confidence = np.asarray(confidence, np.float64)
    correct = np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not confidence.size:
        raise StatisticsError(f"confidences {confidence.shape} of answers {correct.shape}: give "
                              "one of each")
    in_range = [((0 <= v) & (v <= 1)).all() for v in (confidence, correct)]
    if bins < 1 or not all(in_range):
        raise StatisticsError("confidences or answers outside 0 to 1, or no bins: give "
                              "probabilities, 0 or 1, and at least 1 bin")
    [error] = _calibration_errors(confidence, [correct], bins)
    return error


def _calibration_errors(confidence: np.ndarray, answers: Iterable[np.ndarray], bins: int
                        ) -> list[float]:
    """The calibration error of each of several answers to the same questions."""
    bin_of = np.ceil(confidence * bins).astype(np.int64).clip(1) - 1
    gaps = (np.abs(np.bincount(bin_of, confidence - correct)) for correct in answers)
    return [float(100 * gap.sum() / len(confidence)) for gap in gaps]


def calibrated_error(confidence: np.ndarray) -> tuple[float, float, float]:
    """The calibration error in percent that a perfectly calibrated model of these confidences (N,)
    has: its mean, and the bounds of the central 95 %. It is not 0, because each answer is right or
    wrong. From 400 draws in which an answer is right with the probability of its confidence."""
    confidence = np.asarray(confidence, np.float64)
    calibration_error(confidence, confidence)  # refuses what is no probability
    rng = np.random.default_rng(0)
    answers = (rng.random(len(confidence)) < confidence for _ in range(400))
    errors = _calibration_errors(confidence, answers, CALIBRATION_BINS)
    low, high = np.quantile(errors, (0.025, 0.975))
    return float(np.mean(errors)), float(low), float(high)


# --------------------------------------------------------------------------------------------------
# modes


def bimodality(x: np.ndarray) -> float:
    """Sarle's coefficient (skewness^2 + 1) / kurtosis of x (N,): 1/3 for a Gaussian, 5/9 for a
    uniform distribution, 1 for two points. Heavy tails lower it, and skewness raises it: that a
    distribution has two modes is shown by unimodal_p alone."""
    centred = _centred(x)
    scaled = centred / np.abs(centred).max()
    second, third, fourth = (np.mean(scaled**power) for power in (2, 3, 4))
    return float((third**2 / second**3 + 1) * second**2 / fourth)


def unimodal_p(x: np.ndarray, groups: np.ndarray | None = None, draws: int = 500, seed: int = 0
               ) -> float:
    """The p-value of the hypothesis that x (N,) has a density of one mode, by Silverman's test
    (1981): does a sample of the least smoothed density that has one mode show more?

    The densities of x and of the samples are kernel estimates of the critical width, the least at
    which x's has no valley between its 1 % and 99 % points; in the tails single rows would be modes
    (Hall and York 2001). A draw takes whole groups with replacement, and shifts each as a whole by
    the kernel's noise."""
    values = _centred(x)
    values = values / values.std()
    group = group_numbers(groups, len(values))
    order = np.argsort(group, kind="stable")
    values, sizes = values[order], np.bincount(group)
    starts = np.cumsum(sizes) - sizes

    # The grid reaches beyond both points by the distance between them, so that what lies at its
    # ends, or is moved there from beyond, is out of the kernel's reach
    low, high = np.quantile(values, (0.01, 0.99))
    reach = high - low
    first, step = low - reach, 3 * reach / BINS
    between = slice(BINS // 3, BINS - BINS // 3 + 1)

    def has_valley(sample: np.ndarray, width: float) -> bool:
        density = _kernel_density(np.rint((sample - first) / step), width / step)[between]
        rises = np.diff(density) > 1e-12 * density.max()
        falls = np.diff(density) < -1e-12 * density.max()
        # A valley: the density rises somewhere after it fell
        return bool((np.maximum.accumulate(falls) & rises).any())

    # Bisection for the critical width
    small, width = step, reach
    while width > 1.001 * small:
        middle = math.sqrt(small * width)
        small, width = (middle, width) if has_valley(values, middle) else (small, middle)

    rng = np.random.default_rng(seed)
    valleys = 0
    for _ in range(draws):
        drawn = rng.integers(len(sizes), size=len(sizes))
        shift = np.repeat(width * rng.standard_normal(len(sizes)), sizes[drawn])
        # Rows of the drawn groups, one group after the other
        ends = np.cumsum(sizes[drawn])
        rows = np.arange(ends[-1]) + np.repeat(starts[drawn] - ends + sizes[drawn], sizes[drawn])
        # The kernel adds its variance, which the scale takes away
        sample = (values[rows] + shift) / math.sqrt(1 + width**2)
        valleys += has_valley(sample, width)
    return (1 + valleys) / (1 + draws)


def _kernel_density(bins: np.ndarray, width: float) -> np.ndarray:
    """Gaussian kernel estimate (BINS,), not normalised, from the bins (N,) of values; the width is
    in bins."""
    counts = np.bincount(bins.clip(0, BINS - 1).astype(np.int64), minlength=BINS)
    kernel = np.exp(-2 * np.square(np.pi * width * np.fft.rfftfreq(BINS)))
    return np.fft.irfft(np.fft.rfft(counts) * kernel, BINS)


def _centred(x: np.ndarray) -> np.ndarray:
    """x (N,) less its mean, in float64, after checking that it has a shape to speak of."""
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or len(x) < 4 or not np.isfinite(x).all():
        raise StatisticsError(f"values of shape {x.shape}, or not finite: give at least 4 finite "
                              "numbers")
    centred = x - x.mean()
    if not centred.any():
        raise StatisticsError("all values are equal: they have no shape")
    return centred
