"""lab/two_samples.py against scikit-learn, definitions, and the laws of its tests by simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from sklearn.linear_model import Ridge
from test_geometry import R, cloud
from test_statistics import at_most_level, clustered

from lab import two_samples
from lab.geometry import GeometryError
from lab.statistics import StatisticsError
from lab.two_samples import mmd, probe_auc


def kernel_of(pooled):
    distance = np.array([[math.dist(a, b) for b in pooled] for a in pooled])
    above = distance[np.triu_indices(len(pooled), 1)]
    return np.exp(-distance**2 / (2 * np.median(above) ** 2))


def test_mmd_equals_the_definition():
    x, y = cloud(20, 4), cloud(15, 4, 1) + 1
    K = kernel_of(np.concatenate([x, y]))
    xx = [K[i, j] for i in range(20) for j in range(20) if i != j]
    yy = [K[i, j] for i in range(20, 35) for j in range(20, 35) if i != j]
    expected = np.mean(xx) + np.mean(yy) - 2 * K[:20, 20:].mean()
    value, p = mmd(x, y, permutations=0)
    assert value == pytest.approx(expected, rel=1e-9) and math.isnan(p)


def test_mmd_of_groups_equals_the_definition():
    """Every group counts the same, and its pair with itself is left out."""
    x, y = cloud(20, 4), cloud(15, 4, 1) + 1
    x_group, y_group = R(2).integers(0, 6, 20), R(3).integers(0, 4, 15)
    K, group = kernel_of(np.concatenate([x, y])), np.concatenate([x_group, 10 + y_group])
    labels = np.unique(group)
    means = {(a, b): K[np.ix_(group == a, group == b)].mean() for a in labels for b in labels}

    def mean(first, second):
        return np.mean([means[a, b] for a in labels for b in labels
                        if a != b and (a < 10) == first and (b < 10) == second])

    expected = mean(True, True) + mean(False, False) - 2 * mean(True, False)
    assert mmd(x, y, x_group, y_group, permutations=0)[0] == pytest.approx(expected, rel=1e-9)
    pairs = {(a, b): K[np.ix_(group == a, group == b)].ravel() for a in labels for b in labels}

    def by_row(first, second):
        return np.concatenate([pairs[a, b] for a in labels for b in labels
                               if a != b and (a < 10) == first and (b < 10) == second]).mean()

    expected = by_row(True, True) + by_row(False, False) - 2 * by_row(True, False)
    value, _ = mmd(x, y, x_group, y_group, permutations=0, by_row=True)
    assert value == pytest.approx(expected, rel=1e-9)
    assert mmd(x, y, by_row=True) == mmd(x, y)
    names = np.array(list("fedcba"))[x_group]
    assert mmd(x, y, names, y_group, 20) == pytest.approx(mmd(x, y, 5 - x_group, y_group, 20))
    with pytest.raises(StatisticsError, match="1 and 15 independent groups"):
        mmd(x, y, np.zeros(20))


def test_mmd_is_unbiased_and_its_p_uniform_when_the_laws_are_equal():
    results = np.array([mmd(R(s).normal(size=(14, 3)), R(1000 + s).normal(size=(10, 3)),
                            permutations=39, seed=s) for s in range(400)])
    assert abs(results[:, 0].mean()) < 4 * results[:, 0].std() / 20
    uniform(np.rint(results[:, 1] * 40), 40)


def uniform(rank, m):
    """Ranks 1 to m of exact permutation tests are uniform, and at most 5 % are in the first 5 %."""
    assert rank.min() >= 1 and rank.max() <= m
    tens = np.bincount(((rank - 1) * 10 // m).astype(int), minlength=10)
    assert stats.chisquare(tens).pvalue > 1e-3
    assert stats.binomtest(int((rank <= m // 20).sum()), len(rank), 0.05).pvalue > 1e-3


def halves(k, D=20):
    """Two halves of one population: 12 paragraphs each of 5 questions with correlation 0.3."""
    x, x_group = clustered(k, 12, 5, 0.3, D)
    y, y_group = clustered(10_000 + k, 12, 5, 0.3, D)
    return x, y, x_group, y_group


def test_mmd_level_of_paragraphs():
    """200 repetitions. Rows taken as independent are told apart in most of them."""
    p = [mmd(*halves(k), 39, k)[1] for k in range(200)]
    at_most_level(p)
    assert np.mean(np.array(p) <= 0.05) >= 0.01  # exact, not merely careful
    assert np.mean([mmd(*halves(k)[:2], permutations=39, seed=k)[1] <= 0.05
                    for k in range(20)]) > 0.5


def test_mmd_has_power():
    x, y = R().normal(size=(60, 5)), R(1).normal(size=(50, 5))
    assert mmd(x, y + 1) == mmd(x, y + 1) and mmd(x, y + 1)[1] == 1 / 201
    assert mmd(x, 3 * y)[1] == 1 / 201  # equal means
    x = x[:10]
    assert mmd(x, x, permutations=99)[1] > 0.5  # a copy is nearer than chance, never farther
    with pytest.raises(GeometryError, match="duplicates"):
        mmd(np.full((9, 5), 0.1), np.full((9, 5), 0.1))
    assert mmd(np.full((9, 5), 0.1), np.full((9, 5), 0.2))[1] == 1 / 201


def test_mmd_sees_what_its_median_width_does_not(monkeypatch):
    """One direction is a tenth as wide as the other, and there one sample has two heaps: power over
    20 repetitions."""

    def rejected(k):
        x, y = R(k).normal(size=(2, 150, 2))
        x[:, 0] *= 0.1
        y[:, 0] = 0.1 * np.sign(y[:, 0]) + 0.01 * y[:, 0]
        return mmd(x, y, permutations=39, seed=k)[1] <= 0.05

    assert sum(map(rejected, range(20))) >= 14
    monkeypatch.setattr(two_samples, "HALVINGS", 0)
    assert sum(map(rejected, range(20))) <= 6


def fold_scores(x, y, x_group, y_group, seed):
    """Scores of scikit-learn's ridge of the folds that probe_auc deals out: x's, y's, folds."""
    rng, rows = R(seed), np.concatenate([x, y])
    counts = x_group.max() + 1, y_group.max() + 1
    dealt = [rng.permutation(count) % min(5, *counts) for count in counts]
    fold = np.concatenate([dealt[0][x_group], dealt[1][y_group]])
    sign, scores = np.repeat([1, -1], [len(x), len(y)]), np.empty(len(rows))
    for k in range(fold.max() + 1):
        fit = rows[fold != k]
        scaled = (rows - fit.mean(0)) / fit.std(0)
        probe = Ridge(alpha=x.shape[1]).fit(scaled[fold != k], sign[fold != k])
        scores[fold == k] = probe.predict(scaled[fold == k])
    return scores, sign, fold


@pytest.mark.parametrize("D", [5, 60])
def test_probe_auc_equals_scikit_learns_ridge(D):
    x, y = cloud(41, D) + 0.3, cloud(33, D, 1)
    x_group, y_group = np.arange(41) // 4, np.arange(33) // 3
    scores, sign, fold = fold_scores(x, y, x_group, y_group, 7)
    areas, pairs = [], []
    for k in range(5):
        mine = fold == k
        areas.append(metrics.roc_auc_score(sign[mine], scores[mine]))
        pairs.append((sign[mine] > 0).sum() * (sign[mine] < 0).sum())
    auc, low, high = probe_auc(x, y, x_group, y_group, seed=7)
    assert auc == pytest.approx(np.average(areas, weights=pairs), abs=1e-12)
    assert 0 <= low < auc < high <= 1


def test_probe_auc_of_known_sets():
    x = np.c_[cloud(40, 12), np.ones(40)]  # a coordinate that never varies counts for nothing
    y = x + np.r_[[100.0] * 12, 0]
    assert probe_auc(x, y) == probe_auc(y, x) == (1, 1, 1)
    assert probe_auc(np.full((20, 3), 0.1), np.full((9, 3), 0.1)) == (0.5, 0.5, 0.5)  # all ties
    # a Gaussian pair d apart: the best probe's area is Phi(d / sqrt 2)
    x, y = R(5).normal(size=(4000, 6)), R(6).normal(size=(4000, 6)) - [1, 0, 0, 0, 0, 0]
    auc, low, high = probe_auc(x, y)
    expected = stats.norm.cdf(1 / math.sqrt(2))
    assert auc == pytest.approx(expected, abs=0.01) and low < expected < high
    # the error is DeLong's, of scores whose law is known, widened for five folds by 1 + 5 / 4
    error = (high - low) / 2 / stats.norm.ppf(0.975) / math.sqrt(9 / 4)
    assert error == pytest.approx(delong_error(x[:, 0], y[:, 0]), rel=0.05)


def delong_error(x, y):
    wins = (x[:, None] > y).astype(float)
    return math.sqrt(wins.mean(1).var(ddof=1) / len(x) + wins.mean(0).var(ddof=1) / len(y))


def test_probe_auc_of_halves_of_one_population_is_chance():
    """150 repetitions: the mean is 0.5, and the interval holds 0.5 in about 95 of 100. Of rows
    taken as independent the probe knows the paragraphs, and the area is far above."""
    found = np.array([probe_auc(*halves(k), seed=k) for k in range(150)])
    auc, low, high = found.T
    assert abs(auc.mean() - 0.5) < 4 * auc.std() / math.sqrt(150)
    assert np.mean((low <= 0.5) & (0.5 <= high)) >= 0.92
    assert np.mean([probe_auc(*halves(k)[:2], seed=k)[0] for k in range(20)]) > 0.6


def texts_of_unequal_laws(r, T):
    """Rows of texts, half of them long, whose mean moves with their length; and the texts."""
    sizes = np.where(r.random(T) < 0.5, r.integers(3, 8, T), r.integers(40, 80, T))
    text = np.repeat(np.arange(T), sizes)
    means = r.normal(size=(T, 5)) + np.c_[2 * (sizes > 20), np.zeros((T, 4))]
    return math.sqrt(0.3) * means[text] + math.sqrt(0.7) * r.normal(size=(len(text), 5)), text


def test_mmd_by_row_is_of_the_law_of_all_rows():
    """100 repetitions of independent rows of the law of 20 texts' rows. Weighted by texts they are
    told apart."""
    by_row, by_group = [], []
    for k in range(100):
        y, y_text = texts_of_unequal_laws(R(k), 20)
        x, _ = texts_of_unequal_laws(R(k + 1000), 800)
        x = R(k).permutation(x)[:len(y)]
        by_row.append(mmd(x, y, y_text, y_text, 39, k, by_row=True))
        by_group.append(mmd(x, y, y_text, y_text, 39, k)[1])
    value, p = np.array(by_row).T
    at_most_level(p)
    assert abs(value.mean()) < 4 * value.std() / 10
    assert np.mean(np.array(by_group) <= 0.05) > 0.2
