"""lab/geometry.py against scipy, scikit-learn and closed forms."""

import math
import time

import numpy as np
import pytest
from scipy import linalg
from sklearn import metrics
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import NearestNeighbors

from lab import geometry as g
from lab.locality import locality
from lab.two_samples import mmd, probe_auc

DTYPES = [np.float16, np.float32, np.float64]


def R(seed=0):
    return np.random.default_rng(seed)


def cloud(N, D, seed=0):
    """Neither centred nor round."""
    return R(seed).normal(size=(N, D)) @ R(9).normal(size=(D, D)) + 3


def neighbours(rows, population, k, metric="euclidean"):
    """scikit-learn's, by direct differences: (distance, index)."""
    model = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=metric).fit(population)
    return model.kneighbors(rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_displacement(dtype):
    start, end = (cloud(30, 7, seed).astype(dtype) for seed in (0, 1))
    expected = [math.dist(a, b) for a, b in zip(start.tolist(), end.tolist())]
    np.testing.assert_allclose(g.displacement(start, end), expected, rtol=1e-12)
    with pytest.raises(g.GeometryError, match="start has 30 rows and end 29"):
        g.displacement(start, end[1:])


@pytest.mark.parametrize("N, n", [(500, 60), (2 * g.BLOCK + 5, g.BLOCK + 9)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nearest_equals_scikit_learns(dtype, metric, N, n):
    population, rows = cloud(N, 24).astype(dtype), cloud(n, 24, 1).astype(dtype)
    rows[:5] = population[[3, 77, 400, 0, 499]]
    index, value = g.nearest(rows, population, 6, metric)
    distance, expected = neighbours(rows.astype(float), population.astype(float), 6,
                                    "euclidean" if metric == "l2" else "cosine")
    np.testing.assert_allclose(value, distance if metric == "l2" else 1 - distance, atol=1e-6)
    assert index.dtype == np.int64 and (index == expected).mean() > 0.95  # its ties have no order
    assert index[:5, 0].tolist() == [3, 77, 400, 0, 499]
    if metric == "l2":
        assert value[:5, 0].tolist() == [0] * 5 and (value[:, 1:] >= value[:, :-1]).all()


@pytest.mark.parametrize("D, shift", [(3, 1e4), (300, 0.0), (300, 1e6)])
def test_nearest_sees_what_float32_does_not(D, shift):
    """Members whose squared distances differ in the eighth digit, far from the origin, with an
    outlier that would drown them."""
    direction = R().normal(size=(400, D))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    radius = 1 + 1e-8 * R(1).permutation(400)
    population = np.concatenate([shift + radius[:, None] * direction, np.full((1, D), 1e5)])
    row = np.full((1, D), shift)
    index, value = g.nearest(row, population, 5)
    exact = np.sqrt(np.square(row - population).sum(1))
    assert index[0].tolist() == np.argsort(exact, kind="stable")[:5].tolist()
    assert value[0].tolist() == np.sort(exact)[:5].tolist()


def test_nearest_is_far_faster_than_differences_in_float64():
    """Far from the origin too, where a bound on float32's rounding could rule out little."""
    rows, population = cloud(400, 200, 1) + 1000, cloud(5000, 200) + 1000
    start = time.perf_counter()
    _, value = g.nearest(rows, population, 2)
    middle = time.perf_counter()
    exact = [np.sort(np.sqrt(np.square(row - population).sum(1)))[:2] for row in rows]
    end = time.perf_counter()
    assert (value == exact).all()
    assert middle - start < (end - middle) / 3


def test_nearest_breaks_ties_by_index():
    population = np.tile(cloud(10, 33).astype(np.float32), (60, 1))
    for metric in g.METRICS:
        index, value = g.nearest(population[:10], population, 4, metric)
        assert (index == np.arange(10)[:, None] + [0, 10, 20, 30]).all()
        assert (np.ptp(value, axis=1) == 0).all()
    assert g.nearest(np.ones((1, 4)), np.full((9, 4), 0.1), 3)[0].tolist() == [[0, 1, 2]]
    assert g.nearest(np.zeros((1, 2)), -np.eye(2), 2, "cosine")[1].tolist() == [[0, 0]]


def test_nearest_refuses():
    with pytest.raises(g.GeometryError, match="l2, cosine"):
        g.nearest(cloud(3, 2), cloud(3, 2), metric="l1")
    with pytest.raises(g.GeometryError, match="the population: 3 rows, and at least 4"):
        g.nearest(cloud(3, 2), cloud(3, 2), 4)


@pytest.mark.parametrize("N, k", [(30, 4), (700, 5), (5000, 3), (5000, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_similar_equals_nearest_by_cosine(N, k, dtype):
    population, rows = cloud(N, 40).astype(dtype), cloud(300, 40, 1).astype(dtype)
    rows[0] = 0
    index, cosine = g.similar(rows, population, k)
    expected_index, expected = g.nearest(rows, population, k, "cosine")
    assert index.dtype == np.int64 and cosine.dtype == np.float32
    np.testing.assert_allclose(cosine, expected, atol=1e-6)
    assert (index[1:] == expected_index[1:]).mean() > 0.99
    unit = population.astype(float) / np.linalg.norm(population.astype(float), axis=1)[:, None]
    np.testing.assert_allclose((unit[index[1:]] @ rows[1:, :, None].astype(float))[:, :, 0]
                               / np.linalg.norm(rows[1:].astype(float), axis=1)[:, None],
                               cosine[1:], atol=1e-6)


def test_similar_leaves_the_row_itself_out():
    x = cloud(3000, 20)
    x[10] = 2 * x[500]  # of the same direction, but another row
    members = np.r_[R().permutation(3000)[:600], 10, 500]
    index, cosine = g.similar(x[members], x, 4, members)
    assert (index != members[:, None]).all()
    with_itself, expected = g.nearest(x[members[:-2]], x, 5, "cosine")
    assert (with_itself[:, 0] == members[:-2]).all()
    assert (index[:-2] == with_itself[:, 1:]).mean() > 0.99
    np.testing.assert_allclose(cosine[:-2], expected[:, 1:], atol=1e-6)
    assert index[-2:, 0].tolist() == [500, 10]


def test_similar_refuses():
    x = cloud(5, 3)
    assert g.similar(x, x, 4, np.arange(5))[0].shape == (5, 4)
    for arguments, words in (((x, x, 0), "ask for at least 1"), ((x, x, 6), "5 rows, and at least"),
                             ((x, x, 5, np.arange(5)), "5 rows, and at least 6"),
                             ((x, x, 2, np.arange(4)), "one index a row"),
                             ((x, x[:, :2], 2), "width 3, expected 2")):
        with pytest.raises(g.GeometryError, match=words):
            g.similar(*arguments)


@pytest.mark.parametrize("k", [1, 3])
def test_neighbour_distance_leaves_the_row_itself_out(k):
    x = cloud(300, 9)
    distance, _ = neighbours(x, x, k + 1)
    np.testing.assert_allclose(g.neighbour_distance(x, k), distance[:, k], rtol=1e-9)
    sample = g.neighbour_distance(x, k, sample=40, seed=1)
    assert len(sample) == 40 and np.isin(sample, g.neighbour_distance(x, k)).all()
    assert (sample == g.neighbour_distance(x, k, 40, 1)).all()
    assert (sample != g.neighbour_distance(x, k, 40, 2)).any()
    twice = g.neighbour_distance(np.concatenate([x, x[:5]]), k)
    assert (twice[:5] == 0).all() == (k == 1) and (twice[5:300] > 0).all()
    for N, wrong in ((k, k), (9, 0)):
        with pytest.raises(g.GeometryError):
            g.neighbour_distance(x[:N], wrong)


def test_collapse_index():
    grid = np.stack(np.meshgrid(*[np.arange(12.0)] * 2), -1).reshape(-1, 2)  # spacing 1
    grid = np.concatenate([grid, [[500, 500]]])
    rows = np.array([[5, 5], [5.25, 5], [-3, 0], [15, 15]])
    np.testing.assert_allclose(g.collapse_index(rows, grid), [0, 0.25, 3, 4 * math.sqrt(2)])
    np.testing.assert_allclose(g.collapse_index(7 * rows, 7 * grid), g.collapse_index(rows, grid))
    with pytest.raises(g.GeometryError, match="duplicates"):
        g.collapse_index(rows, np.concatenate([grid, grid]))


@pytest.mark.parametrize("N, dtype", [(500, np.float64), (5000, np.float32), (4, np.float16)])
def test_gaussian(N, dtype):
    x = cloud(N, 6).astype(dtype)
    mean, covariance = g.gaussian(x)
    np.testing.assert_allclose(mean, x.astype(float).mean(0), rtol=1e-10)
    np.testing.assert_allclose(covariance, np.cov(x.astype(float).T, bias=True), atol=1e-9)
    assert mean.dtype == covariance.dtype == np.float64
    assert (g.gaussian(np.full((7, 3), 0.1, np.float32))[1] == 0).all()


@pytest.mark.parametrize("N", [400, 30])
def test_effective_rank_of_a_designed_spectrum(N):
    """Nine equal components and one with a hundredth of their variance, in 50 dimensions."""
    left = np.linalg.qr(np.c_[np.ones(N), R().normal(size=(N, 10))])[0][:, 1:]  # each sums to 0
    right = np.linalg.qr(R(1).normal(size=(50, 10)))[0]
    x = left * np.sqrt([1.0] * 9 + [0.01]) @ right.T + 5
    for variance, rank in ((1, 1), (1.001, 2), (4.5, 5), (9, 9), (9.001, 10), (9.01, 10)):
        assert g.effective_rank(x, variance / 9.01) == rank


@pytest.mark.parametrize("N, D", [(20, 2048), (500, 30), (30, 30)])
def test_effective_rank_equals_scikit_learns_pca(N, D):
    x = cloud(N, D) if D < 99 else R().normal(size=(N, D)).astype(np.float32)
    rank = g.effective_rank(x)
    assert rank == PCA(0.95, svd_solver="full").fit(x).n_components_ <= N - 1
    assert N > 20 or rank == 18


def test_effective_rank_of_equal_rows():
    assert g.effective_rank(np.full((9, 5), 0.1)) == g.effective_rank(np.full((9, 50), 0.1)) == 0
    for share in (0, 1.1, math.nan):
        with pytest.raises(g.GeometryError):
            g.effective_rank(cloud(9, 3), share)


def test_total_variance_ratio():
    x, y = cloud(70, 8), cloud(900, 8, 1) * 3
    expected = np.trace(np.cov(x.T)) / np.trace(np.cov(y.T))
    assert g.total_variance_ratio(x, y) == pytest.approx(expected, rel=1e-12)
    assert g.total_variance_ratio(x[:1].repeat(9, 0), y) == 0
    with pytest.raises(g.GeometryError, match="equal"):
        g.total_variance_ratio(x, np.full((5, 8), 0.1))


@pytest.mark.parametrize("N, M, D", [(300, 200, 10), (8, 200, 10), (300, 7, 10), (6, 9, 10)])
def test_frechet_equals_the_formula(N, M, D):
    x, y = cloud(N, D), 0.5 * R(3).normal(size=(M, D)) + 1
    S1, S2 = (np.cov(z.T, bias=True) for z in (x, y))
    root = linalg.sqrtm(S1 + 1e-12 * np.eye(D))
    cross = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root).clip(0)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(S1 + S2) - 2 * cross
    assert g.frechet(x, y) == pytest.approx(expected, rel=1e-4)
    assert g.frechet(x, y) == pytest.approx(g.frechet(y, x), rel=1e-9)


def test_frechet_closed_forms():
    x = cloud(200, 12)
    assert g.frechet(x, x + 2) == pytest.approx(12 * 4, rel=1e-9)  # shifted
    mean, covariance = g.gaussian(x)
    assert g.frechet(x, mean + 3 * (x - mean)) == pytest.approx(
        (3 - 1) ** 2 * np.trace(covariance), rel=1e-9)  # scaled
    assert 0 <= g.frechet(x, x) < 1e-9 and 0 <= g.frechet(x[:5], x[:5]) < 1e-9
    assert g.frechet(np.full((3, 2), 0.1), np.full((9, 2), 1.1)) == pytest.approx(2)


def test_precision_recall_equals_the_definition():
    x, y = R().normal(size=(80, 3)), 0.6 * R(1).normal(size=(90, 3)) + 0.5

    def share(points, centres):
        radius = neighbours(centres, centres, 4)[0][:, 3]
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radius))
                        for p in points])

    assert g.precision_recall(x, y) == pytest.approx((share(x, y), share(y, x)), abs=1e-12)
    assert g.precision_recall(y, x) == g.precision_recall(x, y)[::-1]
    assert g.precision(x, y) == g.precision_recall(x, y)[0]
    assert g.precision(x[:1], y) == float(share(x[:1], y))


def test_precision_recall_of_known_sets():
    x = cloud(60, 5).astype(np.float16)
    assert g.precision_recall(x, x) == (1, 1)
    assert g.precision_recall(x, x + np.float16(1000)) == (0, 0)
    # one mode of two: all of it is real, and half of what is real is missed
    y = np.concatenate([x, x + np.float16(1000)])
    assert g.precision_recall(x, y) == (1, 0.5)
    same = np.full((9, 5), 0.1)  # balls of radius 0 hold their duplicates, and nothing else
    assert g.precision_recall(same, same) == (1, 1)
    assert g.precision_recall(same, same + 1e-7) == (0, 0)
    # the edge belongs to the ball: 2 is at distance 1 of 1, whose nearest other is 0
    assert g.precision_recall([[2.0], [9.0]], [[0.0], [1.0]], k=1) == (0.5, 1)
    with pytest.raises(g.GeometryError, match="x: 3 rows, and at least 4"):
        g.precision_recall(x[:3], x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silhouette_equals_scikit_learns(dtype):
    x, labels = cloud(200, 6).astype(dtype), R(1).integers(0, 4, 200)
    x[labels == 2] += 9
    labels[7] = 99  # alone
    assert g.silhouette(x, labels) == pytest.approx(
        metrics.silhouette_score(x.astype(float), labels), abs=1e-9)
    names = np.array(["a", "b", "c", "d"] + [""] * 95 + ["e"])[labels]
    assert g.silhouette(x, names, sample=50) == g.silhouette(x, labels, sample=50)
    assert g.silhouette(x, labels, sample=150) != g.silhouette(x, labels, sample=150, seed=1)


def test_variance_between_is_a_regressions():
    x, y = R(1).normal(size=(30, 4)), R(2).normal([1, 0, 3, 0], [1, 2, 3, 4], size=(50, 4))
    rows, label = np.concatenate([x, y]), np.repeat([[0.0], [1.0]], [30, 50], axis=0)
    predicted = LinearRegression().fit(label, rows).predict(label)
    expected = metrics.r2_score(rows, predicted, multioutput="variance_weighted")
    assert g.variance_between(x, y) == pytest.approx(100 * expected, rel=1e-9)
    assert g.variance_between([[0.0], [0]], [[2.0], [2]]) == 100
    with pytest.raises(g.GeometryError, match="all rows are equal"):
        g.variance_between([[1.0]], [[1.0]])


def test_silhouette_of_known_sets():
    x = np.array([[0.0], [0], [1], [1]])
    assert g.silhouette(x, [0, 0, 1, 1]) == 1 and g.silhouette(x, [0, 1, 0, 1]) == -0.5
    assert g.silhouette(np.full((6, 2), 0.1), [0, 0, 0, 1, 1, 1]) == 0
    with pytest.raises(g.GeometryError, match="two clusters"):
        g.silhouette(x, [3, 3, 3, 3])
    with pytest.raises(g.GeometryError, match="labels of shape"):
        g.silhouette(x, [3, 3])


ONE = [g.neighbour_distance, g.gaussian, g.effective_rank,
       lambda x: g.silhouette(x, np.arange(len(x))), lambda x: locality([x], x)]
TWO = [g.displacement, g.nearest, lambda x, y: g.similar(x, y, 1), g.collapse_index,
       g.total_variance_ratio, g.frechet, g.precision_recall, g.precision, mmd, probe_auc,
       lambda x, y: locality([x], y)]
ALL = [*ONE, *(lambda x, f=f: f(x, cloud(9, 3)) for f in TWO),
       *(lambda x, f=f: f(cloud(9, 3), x) for f in TWO)]


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_values_that_are_not_finite(measure, bad):
    x = cloud(9, 3)
    x[4, 1] = bad
    with pytest.raises(g.GeometryError, match="not finite") as error:
        measure(x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("x", [np.ones((0, 3)), np.ones(3), np.ones((9, 0)),
                               np.full((9, 3), "a"), np.ones((2, 2, 3))], ids=str)
def test_what_is_no_set_of_rows(measure, x):
    with pytest.raises(g.GeometryError):
        measure(x)


@pytest.mark.parametrize("measure", TWO)
def test_widths_that_differ(measure):
    with pytest.raises(g.GeometryError, match="width"):
        measure(cloud(9, 3), cloud(9, 4))


@pytest.mark.parametrize("measure", [g.neighbour_distance, g.gaussian, g.effective_rank,
                                     lambda x: g.frechet(x, x), lambda x: mmd(x, x),
                                     lambda x: g.silhouette(x, [0]), lambda x: probe_auc(x, x)])
def test_one_row_is_too_few(measure):
    with pytest.raises(g.GeometryError, match="1 rows, and at least"):
        measure(np.ones((1, 3)))


def test_mixtures_have_the_weights_of_nnls():
    """On the members that were chosen; among them some that a later one makes needless."""
    from scipy.optimize import nnls

    rng = np.random.default_rng(0)
    population = (rng.normal(size=(5000, 24)) + 0.7).astype(np.float32)
    rows = (rng.normal(size=(60, 24)) + 0.3).astype(np.float32)
    index, weight, share = g.mixtures(rows, population)
    needless = 0
    for i, row in enumerate(rows.astype(np.float64)):
        for k in range(1, 9):
            chosen = index[i, :k]
            expected, left = nnls(population[chosen].T.astype(np.float64), row)
            assert share[i, k - 1] == pytest.approx(1 - left**2 / np.square(row).sum(), abs=1e-9)
        np.testing.assert_allclose(weight[i], expected, atol=1e-7)
        needless += (expected == 0).sum()
        assert len(set(index[i])) == 8
    assert needless > 0 and (weight >= 0).all() and (np.diff(share, axis=1) > -1e-12).all()


def test_mixtures_choose_as_scikit_learns_pursuit_does():
    """Where no weight would be negative."""
    from sklearn.linear_model import OrthogonalMatchingPursuit

    rng, compared = np.random.default_rng(1), 0
    population = np.abs(rng.normal(size=(3000, 60)))
    rows = np.abs(rng.normal(size=(30, 60)))
    index, weight, _ = g.mixtures(rows, population, 3)
    norm = np.linalg.norm(population, axis=1)
    for i, row in enumerate(rows):
        fit = OrthogonalMatchingPursuit(n_nonzero_coefs=3, fit_intercept=False).fit(
            (population / norm[:, None]).T, row)
        chosen = np.flatnonzero(fit.coef_)
        if (fit.coef_[chosen] > 0).all():
            assert sorted(index[i]) == sorted(chosen)
            order = np.argsort(index[i])
            np.testing.assert_allclose(weight[i][order], fit.coef_[chosen] / norm[chosen])
            compared += 1
    assert compared > 5


def test_a_mixture_is_found_and_ends_where_it_is_whole():
    rng = np.random.default_rng(2)
    population = rng.normal(size=(3000, 100))
    population[5] = 0  # explains nothing
    rows = np.stack([population[7] + 0.5 * population[2900], 3 * population[40],
                     0 * population[40], -10 * np.ones(100)])
    index, weight, share = g.mixtures(rows, population, 4)
    assert index[0].tolist() == [7, 2900, -1, -1] and index[1].tolist() == [40, -1, -1, -1]
    np.testing.assert_allclose(weight[0], [1, 0.5, 0, 0], atol=1e-9)
    assert weight[1, 0] == pytest.approx(3) and (index[2] == -1).all()
    assert share[:2, -1] == pytest.approx([1, 1]) and (weight[2:] >= 0).all()
    # a row that all members oppose has none
    index, _, share = g.mixtures(-np.ones((1, 100)), np.abs(population) + 0.1, 2)
    assert (index == -1).all() and (share == 0).all()
    for arguments in ((rows, population, 0), (rows, population[:3], 4), (rows[:, :9], population)):
        with pytest.raises(g.GeometryError):
            g.mixtures(*arguments)
