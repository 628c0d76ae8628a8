"""lab/statistics.py against scipy, definitions, and the levels of tests by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lab import statistics as s


def R(seed=0):
    return np.random.default_rng(seed)


def at_most_level(p, level=0.05):
    """Rejections at a level are no more than its binomial law allows (one in a thousand)."""
    rejections = int((np.asarray(p) <= level + 1e-12).sum())
    assert rejections <= stats.binom(len(p), level).ppf(0.999), rejections / len(p)


def clustered(seed, groups=20, size=6, correlation=0.5, D=1):
    """Rows of groups whose members correlate, marginally N(0, 1): (rows, D), (rows,)."""
    r = R(seed)
    common = np.repeat(r.normal(size=(groups, D)), size, axis=0)
    own = r.normal(size=(groups * size, D))
    rows = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
    return rows, np.repeat(np.arange(groups), size)


def test_p_value_counts_the_observed_one():
    null = np.arange(1, 20.0)
    assert s.p_value(null, 20) == 1 / 20 and s.p_value(null, 0) == 1
    assert s.p_value(null, 19) == 2 / 20  # a tie counts
    assert s.p_value(null, 20, two_sided=True) == s.p_value(null, 0, two_sided=True) == 2 / 20
    assert s.p_value(null, 10, two_sided=True) == 1
    assert s.p_value(null * 0.1, 0.1 + 1.8) == 2 / 20  # the last bits of a sum do not matter
    assert math.isnan(s.p_value(np.array([]), 1.0))


def test_holm():
    """By its definition, and by the closed Bonferroni tests that it shortens."""
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(s.holm(p), [0.03, 0.06, 0.06, 0.02])
    for seed in range(20):
        p = R(seed).uniform(size=4) ** 3
        closed = [max(min(1, len(others) * min(p[list(others)]))
                      for k in range(1, 5) for others in itertools.combinations(range(4), k)
                      if i in others) for i in range(4)]
        np.testing.assert_allclose(s.holm(p), closed)
    assert s.holm([]).shape == (0,)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_student_quantile_equals_scipys(level):
    for freedom in (1, 2, 3, 9, 10, 40, 41, 250, 10**4, 10**8):
        expected = stats.t.ppf((1 + level) / 2, freedom)
        assert s.student_quantile(freedom, level) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(s.StatisticsError, match="at least two values"):
        s.student_quantile(0)


def test_an_interval_of_few_values_is_students():
    for k in (2, 5, 12, 40):
        x = R(k).normal(size=k)
        expected = stats.t.interval(0.95, k - 1, x.mean(), stats.sem(x))
        assert s.interval(x.mean(), stats.sem(x), k) == pytest.approx(expected, rel=1e-5)


def test_jackknife_of_a_mean_is_the_standard_error():
    x = R().normal(size=30)
    totals = np.stack([x, np.ones(30)], axis=1)
    error = s.jackknife_error(totals, lambda t: t[..., 0] / t[..., 1])
    assert error == pytest.approx(stats.sem(x))
    # of sums over groups it is the linearised error, but for terms of higher order
    n = R(1).integers(5, 9, 200)
    x = R(2).normal(3, 1, 200) * n
    error = s.jackknife_error(np.stack([x, n], axis=1), lambda t: t[..., 0] / t[..., 1])
    assert error == pytest.approx(s.ratio_error(x, n, np.arange(200)), rel=0.02)
    with pytest.raises(s.StatisticsError, match="1 independent groups"):
        s.jackknife_error(totals[:1], lambda t: t[..., 0])


def test_sign_flips_see_a_shift_of_every_pair():
    """Rows that are far apart move by 1: as two samples they are the same, p 1.0."""
    start = 10 * R().normal(size=(20, 50))
    assert s.sign_flip_p(np.full_like(start, 1 / math.sqrt(50))) <= 1 / 1000
    difference = np.array([[2.0, 1.0], [1.0, 0.0], [3.0, -1.0]])
    exact = [np.linalg.norm(np.array(signs) @ difference)
             for signs in itertools.product((1, -1), repeat=3)]
    share = np.mean(np.array(exact) >= np.linalg.norm(difference.sum(0)) - 1e-9)
    assert s.sign_flip_p(difference, 20000) == pytest.approx(share, abs=0.02)
    with pytest.raises(s.StatisticsError, match="two pairs"):
        s.sign_flip_p(difference[:1])


def test_sign_flips_level():
    """300 repetitions of differences of no shift and very unequal sizes."""
    p = [s.sign_flip_p(R(k).normal(size=(12, 5)) * R(k).exponential(size=(12, 1)), 99, k)
         for k in range(300)]
    at_most_level(p)
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_percentiles_equal_scipys():
    sample, values = R().normal(size=200).round(1), R(1).normal(size=50).round(1)
    expected = [stats.percentileofscore(sample, value, "mean") for value in values]
    np.testing.assert_allclose(s.percentiles(values, sample), expected)


def test_group_numbers():
    assert s.group_numbers(np.array(["b", "a", "b"]), 3).tolist() == [1, 0, 1]
    assert s.group_numbers(None, 3).tolist() == [0, 1, 2]
    with pytest.raises(s.StatisticsError, match="one a row"):
        s.group_numbers(np.zeros(2), 3)


def test_ratio_error_is_the_spread_of_clustered_means():
    """Over 400 repetitions; errors that ignore the clusters are half of it."""
    means, errors, naive = [], [], []
    for seed in range(400):
        x, group = clustered(seed)
        means.append(x.mean())
        errors.append(s.ratio_error(x[:, 0], np.ones(len(x)), group))
        naive.append(s.ratio_error(x[:, 0], np.ones(len(x)), np.arange(len(x))))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(naive) < 0.6 * np.std(means)


# --------------------------------------------------------------------------------------------------
# calibration


def test_calibration_error():
    # by hand: a bin of two at 0.8 and 0.9 with one right, and one of two at 0.3 with one right
    assert s.calibration_error([0.8, 0.9, 0.3, 0.3], [1, 0, 1, 0], bins=2) == pytest.approx(
        100 * (2 / 4 * abs(0.85 - 0.5) + 2 / 4 * abs(0.3 - 0.5)))
    assert s.calibration_error([1, 1, 1], [1, 1, 1]) == 0
    assert s.calibration_error([1.0, 0.0], [False, True]) == 100
    # closed above: 0.5 belongs to the lower half, where it balances 0
    assert s.calibration_error([0.5, 0.1, 0.9], [0, 1, 1], bins=2) == pytest.approx(
        100 * (0.4 + 0.1) / 3)
    confidence = R().uniform(size=200_000)
    answers = R(1).uniform(size=200_000)
    assert s.calibration_error(confidence, answers < confidence) < 0.6
    expected = np.abs(np.arange(15) / 15 + 1 / 30 - 0.5).mean()  # half of all answers are right
    assert s.calibration_error(confidence, answers < 0.5) == pytest.approx(100 * expected, abs=0.6)


def test_calibration_error_refuses():
    for confidence, correct in (([], []), ([0.5], [1, 0]), ([[0.5]], [[1]]), ([1.1], [1]),
                                ([math.nan], [1]), ([0.5], [2])):
        with pytest.raises(s.StatisticsError):
            s.calibration_error(confidence, correct)


def test_a_calibrated_model_has_a_calibration_error():
    """Of 200 questions that a calibrated model answers, the interval holds the error in 95 of 100
    cases, and it is far from 0: it cannot tell 1.9 from 2.8."""
    confidence = R().beta(20, 1, size=200)
    mean, low, high = s.calibrated_error(confidence)
    errors = [s.calibration_error(confidence, R(k).random(200) < confidence)
              for k in range(1, 401)]
    assert mean == pytest.approx(np.mean(errors), rel=0.05)
    assert 0.92 <= np.mean([low <= error <= high for error in errors]) <= 0.98
    assert low < 1.9 < 2.8 < high
    assert s.calibrated_error(np.ones(9)) == (0, 0, 0)


# --------------------------------------------------------------------------------------------------
# modes


@pytest.mark.parametrize("draw, expected", [
    (lambda r: r.normal(size=100_000), 1 / 3), (lambda r: r.uniform(size=100_000), 5 / 9),
    (lambda r: r.integers(0, 2, 100_000), 1.0), (lambda r: r.exponential(size=1000), None)])
def test_bimodality(draw, expected):
    x = draw(np.random.default_rng(0))
    value = s.bimodality(x)
    assert value == pytest.approx((stats.skew(x)**2 + 1) / stats.kurtosis(x, fisher=False))
    assert s.bimodality(7 - 3e-7 * x.astype(float)) == pytest.approx(value, rel=1e-6)
    assert expected is None or value == pytest.approx(expected, rel=0.02)
    with pytest.raises(s.StatisticsError, match="equal"):
        s.bimodality(np.full(9, 0.1))


@pytest.mark.parametrize("draw", [
    lambda r: r.normal(size=300), lambda r: r.exponential(size=300),
    lambda r: r.lognormal(size=300), lambda r: r.standard_t(3, size=300)])
def test_laws_of_one_mode_are_not_called_bimodal(draw):
    """40 repetitions each. Sarle's coefficient of the exponential is 5/9 and more, as of a uniform
    distribution."""
    at_most_level([s.unimodal_p(draw(R(k)), draws=39, seed=k) for k in range(40)])


def test_two_modes_are_seen():
    for k in range(5):
        heaps = R(k).normal(size=300) + 4 * R(k + 9).integers(0, 2, 300)
        far = [40, -50, 60]  # single rows far out are no modes, and hide none
        assert s.unimodal_p(np.append(heaps, far), draws=99, seed=k) <= 3 / 100
        assert s.unimodal_p(1e-6 * heaps + 7, draws=99, seed=k) == 1 / 100
    x, group = clustered(0, 40, 10)
    assert s.unimodal_p(x[:, 0] + 5 * (group % 2), group, draws=99) == 1 / 100


def test_texts_of_one_mode_are_not_called_bimodal():
    """40 repetitions of 40 texts whose rows are much alike: each text is a heap of its own."""
    by_text, by_row = [], []
    for k in range(40):
        x, group = clustered(k, 40, 25, correlation=0.97)
        by_text.append(s.unimodal_p(x[:, 0], group, 39, k))
        by_row.append(s.unimodal_p(x[:, 0], None, 39, k))
    at_most_level(by_text)
    assert np.mean(np.array(by_row) <= 0.05) > 0.3
