"""gaps.py against scikit-learn and laws of probability."""

import numpy as np
import pytest
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_statistics import clustered

from lab import gaps
from lab.geometry import GeometryError
from lab.statistics import StatisticsError


def clusters(N, D=12, share=0.5, seed=0):
    """Two clusters along a narrow direction, neither an axis nor the widest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, D))
    second = rng.random(N) < share
    x[:, 0] = 3 * (2 * second - 1) + 0.4 * x[:, 0]
    x[:, 1:] *= 4
    turn = np.linalg.qr(np.random.default_rng(9).standard_normal((D, D)))[0]
    return x @ turn + 5, second


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_most_bimodal_direction_is_fishers(share):
    x, second = clusters(2000, share=share)
    split = gaps.most_bimodal(x)
    fisher = LinearDiscriminantAnalysis(solver="lsqr").fit(x, second).coef_[0]
    cosine = split.direction @ fisher / np.linalg.norm(split.direction) / np.linalg.norm(fisher)
    assert abs(cosine) > 0.99

    # The gap is empty, and of a Gaussian of the same moments it has the share that scipy says.
    unseen, _ = clusters(2000, share=share, seed=1)
    assert split.share_in_gap(unseen) < 0.002
    mean, deviation = x.mean(0) @ split.direction, np.std(x @ split.direction)
    margin = (split.high - split.low) / 4
    expected = np.diff(stats.norm(mean, deviation).cdf([split.low + margin, split.high - margin]))
    draws = np.random.default_rng(3).multivariate_normal(x.mean(0), np.cov(x.T), 4000)
    assert split.share_in_gap(draws) == pytest.approx(expected[0], abs=0.03)


def test_the_gap_of_a_gaussian():
    """Halves of a Gaussian have the means +-sqrt(2 / pi)."""
    x = np.random.default_rng(0).standard_normal((4000, 5))
    expected = 2 * stats.norm.cdf(0.5 * np.sqrt(2 / np.pi)) - 1
    assert gaps.most_bimodal(x).share_in_gap(x) == pytest.approx(expected, abs=0.03)


def test_gaps_of_one_law_cannot_be_told_apart():
    """The AUC is 0.5, and within 1.96 of the stated errors in 95 of 100 of 200 pairs; 1 for sets
    far apart."""
    rng = np.random.default_rng(0)
    for n, m in ((100, 100), (60, 140)):
        areas = np.array([gaps.c2st(rng.standard_normal((n, 6)), rng.standard_normal((m, 6)))
                          for _ in range(200)])
        assert areas.mean() == pytest.approx(0.5, abs=4 * areas.std() / np.sqrt(200))
        outside = np.abs(areas - 0.5) > 1.96 * np.sqrt((n + m + 2) / (6 * n * m))
        assert outside.sum() <= stats.binom(200, 0.05).ppf(0.999)
    x = rng.standard_normal((200, 6))
    assert gaps.c2st(x, x + 9) == 1


def test_the_classifier_is_judged_by_other_texts():
    """50 pairs of halves of one population of texts: by rows it would know the texts."""
    by_text, by_row = [], []
    for k in range(50):
        (x, text), (y, _) = (clustered(2 * k + i, 20, 10, 0.5, 6) for i in (0, 1))
        by_text.append(gaps.c2st(x, y, text, text, seed=k))
        by_row.append(gaps.c2st(x, y, seed=k))
    assert np.mean(by_text) == pytest.approx(0.5, abs=4 * np.std(by_text) / np.sqrt(50))
    assert np.mean(by_row) > 0.6
    with pytest.raises(StatisticsError, match="of one group"):
        gaps.c2st(x, y, np.zeros(200), text)


def test_halves_have_as_much_of_every_part():
    """Texts of two parts, with as many rows of each in both sets: were there more of one part in a
    half, there would be fewer of it in the other, and the area would fall below 0.5."""
    text = np.repeat(np.arange(12), 10)
    areas = []
    for k in range(100):
        x, y = np.random.default_rng(k).standard_normal((2, 120, 3)) + 4 * (text[:, None] < 6)
        areas.append(gaps.c2st(x, y, text, text, seed=k))
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * np.std(areas) / 10)


def test_the_classifier_sees_what_the_moments_hide():
    """Two clusters and the Gaussian of their mean and covariance."""
    x, _ = clusters(1000, D=4)
    x[:, 1:] /= 4
    draws = np.random.default_rng(1).multivariate_normal(x.mean(0), np.cov(x.T), 1000)
    assert gaps.c2st(draws, x) > 0.65
    assert abs(gaps.c2st(clusters(1000, 4, seed=5)[0], clusters(1000, 4)[0]) - 0.5) < 0.06


@pytest.mark.parametrize("x, message", [
    (np.ones((40, 3)), "all equal"), (np.zeros((19, 3)), "at least 20 are needed"),
    (np.full((40, 3), np.nan), "not finite"), (np.eye(40), "width 3, expected 40")])
def test_refusals(x, message):
    with pytest.raises(GeometryError, match=message):
        gaps.c2st(x, np.random.default_rng(0).standard_normal((40, 3)))
