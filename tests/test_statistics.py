"""lab/statistics.py against scipy, definitions, and the levels of tests by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

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
    for observed, values in ((math.nan, null), (1.0, np.append(null, math.nan))):
        with pytest.raises(s.StatisticsError, match="not finite"):
            s.p_value(values, observed)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("tests", [1, 7, 93])
def test_of_many_tests_one_can_be_significant(tests, two_sided):
    """What is beyond all values under the hypothesis is, after Holm's correction."""
    null = np.arange(s.enough(tests, 1000, two_sided))
    assert s.holm(np.full(tests, s.p_value(null, 1e9, two_sided))).max() <= 0.025
    assert len(null) >= 1000


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


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999, 0.9999, 0.999998])
def test_student_quantile_equals_scipys(level):
    for freedom in (1, 2, 3, 9, 10, 40, 41, 250, 10**4, 10**8):
        expected = stats.t.ppf((1 + level) / 2, freedom)
        assert s.student_quantile(freedom, level) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(s.StatisticsError, match="at least two values"):
        s.student_quantile(0)


@pytest.mark.parametrize("groups", [2, 3, 12, 200])
def test_p_values_are_students(groups):
    """Of one seed, from nearly 1 down to the least that is told, 1e-6 on one side."""
    one = s.Paired(0.0, 0.0, 4.0, 0.0, 1, groups)
    for p in (0.9, 0.3, 0.05, 1e-3, 1e-5, 4e-6):
        mean = 2 * stats.t.isf(p / 2, groups - 1)
        assert one._replace(mean=mean).difference_p() == pytest.approx(p, rel=2e-4, abs=2e-7)
        assert one.equivalence_p(mean) == pytest.approx(p / 2, rel=2e-4, abs=1e-7)
    assert one._replace(mean=1e9).difference_p() == pytest.approx(2e-6, abs=2e-7)


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
    # their mean is the area under the ROC curve
    is_value = np.repeat([True, False], [len(values), len(sample)])
    area = roc_auc_score(is_value, np.concatenate([values, sample]))
    assert s.percentiles(values, sample).mean() == pytest.approx(100 * area)


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
# sameness


def paired_scores(r, S=3, groups=60, size=3, seeds=0.0, questions=0.0, noise=20.0, shift=0.0):
    """Differences (S, groups * size), in points, of standard deviations by seed, by group of
    questions, and of single answers."""
    by_group = np.repeat(questions * r.normal(size=groups), size)
    answers = noise * r.normal(size=(S, groups * size))
    return shift + seeds * r.normal(size=(S, 1)) + by_group + answers


def test_mean_interval_is_students():
    x = R().normal(size=5)
    expected = (x.mean(), *stats.t.interval(0.95, 4, x.mean(), stats.sem(x)))
    assert s.mean_interval(x) == pytest.approx(expected, rel=1e-5)


def test_paired_scores_of_one_seed_are_a_t_test():
    x = R().normal(0.3, 1, size=40)
    one = s.paired(x)
    assert one.mean + one.half_width() == pytest.approx(
        stats.t.interval(0.95, 39, x.mean(), stats.sem(x))[1], rel=1e-5)
    assert one.difference_p() == pytest.approx(stats.ttest_1samp(x, 0).pvalue, rel=1e-3)
    for margin in (0.1, 0.4, 1.0):
        sides = [stats.ttest_1samp(x, -margin, alternative="greater").pvalue,
                 stats.ttest_1samp(x, margin, alternative="less").pvalue]
        assert one.equivalence_p(margin) == pytest.approx(max(sides), rel=1e-3, abs=2e-6)
        # The test at 5 % is whether the 90 % interval lies within the margin.
        assert (one.equivalence_p(margin) <= 0.05) == (
            abs(one.mean) + one.half_width(0.90) <= margin)
    same = s.paired(np.zeros((3, 9)))
    assert (same.difference_p(), same.equivalence_p(1) < 1e-5) == (1, True)
    with pytest.raises(s.StatisticsError, match="1 independent groups"):
        s.paired(np.ones((3, 9)), np.zeros(9))


def test_of_questions_that_agree_only_seeds_count():
    x = np.array([1.0, 2.0, 4.0])
    agreed = s.paired(np.repeat(x[:, None], 30, axis=1))
    assert agreed.mean + agreed.half_width() == pytest.approx(s.mean_interval(x)[2])


def test_variances_are_those_of_bootstraps():
    """Of seeds, and of groups of unequal sizes as wholes, but for their bias."""
    r = R(3)
    group = np.repeat(np.arange(40), r.integers(1, 6, 40))
    x = paired_scores(r, 4, len(group), 1, 3, 5)
    ours, sizes = s.paired(x, group), np.bincount(group)
    sums = np.stack([np.bincount(group, row) for row in x])
    seeds, groups = r.multinomial(4, [1 / 4] * 4, 20000), r.multinomial(40, [1 / 40] * 40, 20000)
    assert (seeds @ x.mean(1) / 4).var() * 4 / 3 == pytest.approx(ours.by_seed, rel=0.05)
    drawn = (groups @ sums.mean(0)) / (groups @ sizes)
    assert drawn.var() * 40 / 39 == pytest.approx(ours.by_group, rel=0.08)
    both = np.einsum("bs,sg,bg->b", seeds, sums, groups) / 4 / (groups @ sizes)
    parts = 3 / 4 * ours.by_seed + 39 / 40 * ours.by_group + ours.by_both
    assert both.var() == pytest.approx(parts, rel=0.1)


@pytest.mark.parametrize("spread", [
    dict(noise=30), dict(questions=15, noise=30), dict(seeds=2, noise=30),
    dict(seeds=2, questions=8, noise=5), dict(seeds=2, questions=0.1, noise=1)])
def test_levels_of_sameness(spread):
    """500 repetitions of 3 and 5 seeds. A true difference as large as the margin is called equal,
    and none is called one, no more often than a level of 5 % allows; percentiles of a two-way
    bootstrap are far off."""
    for S in (3, 5):
        equal, different, naive = [], [], []  # p-values; whether an interval leaves out 0
        for k in range(500):
            x = paired_scores(R(k), S, **spread)
            group = np.repeat(np.arange(60), 3)
            different.append(s.paired(x, group).difference_p())
            equal.append(s.paired(x + 2, group).equivalence_p(2))
            if k < 100:
                r, sums = R(k + 1000), x.reshape(S, 60, 3).mean(2)
                seeds, groups = (r.multinomial(n, [1 / n] * n, 400) / n for n in (S, 60))
                low, high = np.quantile(np.einsum("bs,sg,bg->b", seeds, sums, groups),
                                        (0.025, 0.975))
                naive.append(not low <= 0 <= high)
        shares = [np.mean(np.array(p) <= 0.05) for p in (equal, different)]
        print(f"{spread}, {S} seeds: called equal {shares[0]:.3f}, different {shares[1]:.3f}; "
              f"percentiles: different {np.mean(naive):.2f}")
        at_most_level(equal)
        at_most_level(different)
        if spread.get("noise") == 1 and S == 3:
            assert np.mean(naive) > 0.15


def test_levels_where_one_group_is_large():
    """500 repetitions of one group of 100 questions and eleven of 10: the large one decides, so
    twelve groups tell no more than four equal ones would."""
    group = np.repeat(np.arange(12), [100, *[10] * 11])
    equal, different = [], []
    for k in range(500):
        r = R(k)
        x = r.normal(0, 15, 12)[group] + r.normal(0, 20, (3, len(group)))
        effect = s.paired(x, group)
        different.append(effect.difference_p())
        equal.append(effect._replace(mean=effect.mean + 10).equivalence_p(10))
    at_most_level(equal)
    at_most_level(different)
    assert effect.groups == pytest.approx(210**2 / (100**2 + 11 * 10**2))


def test_power_of_sameness():
    """Of 201 questions whose answers differ by chance between runs, five seeds tell that two
    settings are equal within 2 points, or that they differ by 5; three are too few for the first.
    """
    for S in (3, 5):
        tests = [s.paired(paired_scores(R(k), S, 67, 3, noise=15), np.repeat(np.arange(67), 3))
                 for k in range(200)]
        equal = np.mean([test.equivalence_p(2) <= 0.05 for test in tests])
        different = np.mean([test._replace(mean=test.mean + 5).difference_p() <= 0.05
                             for test in tests])
        print(f"{S} seeds: equal within 2 in {equal:.2f}, different by 5 in {different:.2f}")
    assert equal > 0.9 and different > 0.9


@pytest.mark.parametrize("spread", [dict(noise=30), dict(questions=15, noise=30),
                                    dict(seeds=2, questions=8, noise=5)])
def test_a_detectable_difference_is_found_with_its_power(spread):
    """At a strict level too. Variances are averaged, because of three seeds each is a guess; what
    ever more seeds would detect is what 200 do."""
    group = np.repeat(np.arange(60), 3)
    for S in (1, 3, 5):
        tests = [s.paired(paired_scores(R(k), S, **spread), group) for k in range(200)]
        for level in (0.05, 0.0125):
            d = np.sqrt(np.mean([test.detectable(level, 0.8) ** 2 for test in tests]))
            power = np.mean([test._replace(mean=test.mean + d).difference_p() <= level
                             for test in tests])
            print(f"{spread}, {S} seeds, level {level}: {d:.2f} points, power {power:.2f}")
            assert 0.65 < power < 0.92
    if "questions" in spread:
        many = s.paired(paired_scores(R(0), 200, **spread), group)
        any_seeds = np.median([test.with_any_seeds().detectable(0.05, 0.8) for test in tests])
        assert any_seeds == pytest.approx(many.detectable(0.05, 0.8), rel=0.25)
    one = s.paired(R().normal(size=(1, 40)))  # the textbook's formula, of a mean of 40 values
    quantiles = stats.t.ppf([0.975, 0.8], 39).sum()
    assert one.detectable(0.05, 0.8) == pytest.approx(quantiles * one.by_group ** 0.5, rel=1e-4)


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
