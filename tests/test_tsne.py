"""t-SNE against all pairs, finite differences, scikit-learn and itself."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import viz


def clusters(n, width=50, groups=12, seed=0):
    r = np.random.default_rng(seed)
    shape = r.normal(size=(groups, width, width)) * np.exp(-np.arange(width) / 10)
    group = r.integers(groups, size=n)
    x = 3 * r.normal(size=(groups, width))[group]
    return (x + np.einsum("nd,ndk->nk", r.normal(size=(n, width)), shape.transpose(0, 2, 1)[group])
            ).astype(np.float32)


def tokens(n, width=192, seed=0):
    """As a table of token embeddings: variance in all dimensions, groups of about 20 that hardly
    stand out, and rows of different lengths, of which the short ones are neighbours of most."""
    r = np.random.default_rng(seed)
    spread = np.arange(1, width + 1) ** -0.25
    groups = 0.6 * spread * r.normal(size=(n // 20, width))
    x = groups[r.integers(len(groups), size=n)] + spread * r.normal(size=(n, width))
    return x * np.exp(0.1 * r.normal(size=(n, 1)))


def far_apart(n, ratio, width=20, groups=10):
    """Clusters of width 1 in each dimension, at distances of about sqrt(2) ratio."""
    r = np.random.default_rng(0)
    centres = r.normal(size=(groups, width))
    centres *= ratio / np.linalg.norm(centres, axis=1, keepdims=True)
    return centres[r.integers(groups, size=n)] + r.normal(size=(n, width))


def nearest(x, k):
    """(N, k) other rows, nearest first, by all distances in float64."""
    x = x.astype(np.float64)
    square = np.square(x).sum(1)[:, None] + np.square(x).sum(1) - 2 * x @ x.T
    np.fill_diagonal(square, np.inf)
    return np.argsort(square, axis=1)[:, :k]


def recall(x, points, k=10):
    return np.mean([len(set(a) & set(b)) / k
                    for a, b in zip(nearest(x, k), nearest(points, k))])


def dense_affinities(x, perplexity):
    """(N, N) as the paper has them: bisection over all other points, symmetric, of sum 1."""
    N = len(x)
    square = np.square(x[:, None].astype(np.float64) - x).sum(2)
    p = np.zeros((N, N))
    for i, d in enumerate(square):
        others = np.delete(d, i)
        farthest = np.sort(others)[int(3 * perplexity) - 1]  # of the neighbours that count
        d = np.where(others <= farthest, others, np.inf)
        low, high = 0.0, 1e6
        for _ in range(200):
            beta = (low + high) / 2
            q = np.exp(-beta * (d - d.min()))
            q /= q.sum()
            entropy = -(q[q > 0] * np.log(q[q > 0])).sum()
            low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
        p[i] = np.insert(q, i, 0)
    return (p + p.T) / (2 * N)


def divergence(p, y):
    """KL(P || Q) of dense P (N, N) and places y (N, 2): the definition."""
    q = 1 / (1 + np.square(y[:, None] - y).sum(2))
    np.fill_diagonal(q, 0)
    q /= q.sum()
    return (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()


def sparse(x, perplexity):
    index, square = viz._neighbours(x, x, int(3 * perplexity), itself=True)
    return viz._symmetric(index, viz._affinities(square, perplexity))


def dense(order, edges):
    """The blocks of _symmetric as a matrix (N, N) in the data's order."""
    p = np.zeros((len(order), len(order)))
    first = 0
    for index, value in edges:
        points = order[first:first + index.shape[1]]
        np.add.at(p, (np.broadcast_to(points, index.shape), order[index]), value)
        first += len(points)
    return p


@pytest.fixture(scope="module")
def small():
    """200 points, their affinities by the definition, and some places, far from converged."""
    x = clusters(200, seed=1)
    return x, dense_affinities(x, 20), np.random.default_rng(2).normal(size=(200, 2)) * 3


@pytest.fixture(scope="module")
def thousand():
    return clusters(1000)


# --------------------------------------------------------------------------------------------------
# affinities


@pytest.mark.parametrize("N, k", [(300, 5), (4000, 90), (4001, 3)])
def test_neighbours_are_the_nearest(N, k):
    x = np.random.default_rng(0).normal(size=(N, 8)) + 100
    x[:3] *= 1e4  # far outliers
    index, square = viz._neighbours(x, x, k, itself=True)
    true = nearest(x - np.median(x, 0), k)
    assert (np.sort(index) == np.sort(true)).all()
    np.testing.assert_allclose(square, np.square(x[:, None] - x[index]).sum(2), rtol=1e-9)


@pytest.mark.parametrize("ratio, dtype", [
    (1e3, np.float64), (3e3, np.float64), (3e3, np.float32), (1e5, np.float32), (1e6, np.float64)])
def test_neighbours_in_tight_clusters_far_apart(ratio, dtype):
    from scipy.spatial import KDTree

    x = far_apart(2000, ratio).astype(dtype)
    distance, true = KDTree(x).query(x, 91)  # the first is the row itself
    index, square = viz._neighbours(x, x, 90, itself=True)
    assert (np.sort(index) == np.sort(true[:, 1:])).all()
    np.testing.assert_allclose(np.sqrt(square), distance[:, 1:], rtol=1e-9)

    index, square = viz._neighbours(x[:300], x, 91)
    assert (index == true[:300]).all() and (square[:, 0] == 0).all()


@pytest.mark.parametrize("N", [300, 2000, 20_011])
def test_the_largest_of_each_row(N):
    score = np.random.default_rng(0).normal(size=(40, N)).astype(np.float32)
    score[1] = 0  # all are equal
    score[2] = np.arange(N)
    score[3, :50] = -np.inf
    index = viz._largest(score, 30)
    assert all(len(set(row)) == 30 for row in index)
    assert (np.sort(np.take_along_axis(score, index, 1)) == np.sort(score)[:, -30:]).all()


def shared(a, b):
    return np.mean([len(set(i) & set(j)) / len(i) for i, j in zip(a, b)])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_near_cells_hold_the_share_of_the_neighbours(dtype):
    x = clusters(6000).astype(dtype)
    x[:300] = x[0]  # more duplicates than a cell has rows
    parts = viz._near_cells(x, 90, 0.98)
    assert (np.sort(np.concatenate([rows for rows, _ in parts])) == np.arange(6000)).all()
    assert np.mean([sum(map(len, members)) for _, members in parts]) < 6000 / 3
    true, _ = viz._neighbours(x, x, 90, itself=True)
    index, square = viz._neighbours(x, x, 90, itself=True, parts=parts)
    assert 0.97 <= shared(true[300:], index[300:]) < 1
    np.testing.assert_allclose(square[::60], np.square(
        x[::60, None].astype(np.float64) - x[index[::60]]).sum(2), rtol=1e-9)


def test_all_pairs_are_compared_where_every_cell_is_near():
    x = np.random.default_rng(0).normal(size=(3000, 200))
    assert viz._near_cells(x, 90, 0.98) is None


def test_recall_of_1_compares_all_pairs(thousand, monkeypatch):
    exact = viz.tsne(thousand, 10).points
    monkeypatch.setattr(viz, "APPROXIMATE", 500)
    assert (viz.tsne(thousand, 10, recall=1).points == exact).all()
    assert (viz.tsne(thousand, 10).points != exact).any()


def test_affinities_are_the_definition(small):
    x, p, _ = small
    order, edges = sparse(x, 20)
    assert np.array_equal(np.sort(order), np.arange(200))
    np.testing.assert_allclose(dense(order, edges), p, atol=2e-8)
    assert sum(value.sum(dtype=np.float64) for _, value in edges) == pytest.approx(1, abs=1e-6)


def test_affinities_have_the_perplexity():
    square = np.random.default_rng(0).exponential(size=(3000, 90)) ** 3
    square[::2] *= 1e-9
    square[5] = 0
    p = viz._affinities(square, 30)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    assert entropy[5] == pytest.approx(math.log(90))  # ties: no beta would do
    np.testing.assert_allclose(np.delete(entropy, 5), math.log(30), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# gradient


@pytest.mark.parametrize("repulsion", [viz._all_pairs, partial(viz._on_mesh, spacing=0.05)])
def test_gradient_equals_finite_differences(small, repulsion):
    x, p, y = small
    order, edges = sparse(x, 20)
    slope, kl, _ = viz._gradient(edges, y[order], repulsion, cost=True)
    assert kl == pytest.approx(divergence(p, y), abs=1e-5)
    for i, axis in [(0, 0), (17, 1), (55, 0), (199, 1)]:
        e = np.zeros_like(y)
        e[order[i], axis] = 1e-4
        difference = (divergence(p, y + e) - divergence(p, y - e)) / 2e-4
        assert slope[i, axis] == pytest.approx(difference, rel=1e-3, abs=1e-3 * np.abs(slope).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale, spacing, tolerance", [
    (1e-4, 0.35, 1e-4), (0.1, 0.35, 1e-3), (1, 0.35, 1e-3), (30, 0.35, 1e-2), (30, 0.15, 1e-3)])
def test_mesh_equals_all_pairs(dtype, scale, spacing, tolerance):
    r = np.random.default_rng(0)
    y = np.concatenate([r.normal(size=(1500, 2)), r.normal(size=(500, 2)) / 20 + 1])
    y *= [scale, scale / 2]
    force, Z, _ = viz._all_pairs(y)
    push, total, mesh = viz._on_mesh(y.astype(dtype), spacing=spacing)
    assert push.dtype == dtype and mesh.size[0] > 1.5 * mesh.size[1]
    assert np.linalg.norm(push - force) < tolerance * np.linalg.norm(force)
    assert total == pytest.approx(Z, rel=1e-3)


def test_a_mesh_serves_while_the_map_fits():
    y = np.random.default_rng(0).uniform(size=(500, 2)).astype(np.float32) * 50
    mesh = viz._on_mesh(y)[2]
    assert viz._on_mesh(y * 1.05, mesh)[2] is mesh
    for scale in (1.3, 0.3):
        push, Z, other = viz._on_mesh(y * np.float32(scale), mesh)
        assert other is not mesh
        assert Z == pytest.approx(viz._all_pairs(y * np.float32(scale))[1], rel=2e-3)
        assert np.array_equal(push, viz._on_mesh(y * np.float32(scale))[0])


# --------------------------------------------------------------------------------------------------
# maps


def test_map_is_as_good_as_scikit_learns(thousand):
    from sklearn.manifold import TSNE, trustworthiness

    map_ = viz.tsne(thousand)
    peer = TSNE(perplexity=30, random_state=0, max_iter=750).fit(thousand)
    assert map_.perplexity == 30 and map_.points.dtype == np.float64
    assert map_.kl == pytest.approx(divergence(dense(*sparse(thousand, 30)), map_.points), rel=1e-3)
    assert map_.kl <= 1.005 * peer.kl_divergence_
    assert recall(thousand, map_.points) >= recall(thousand, peer.embedding_) - 0.02
    assert (trustworthiness(thousand, map_.points, n_neighbors=10)
            >= trustworthiness(thousand, peer.embedding_, n_neighbors=10) - 0.02)


@pytest.mark.parametrize("name, kl, slack", [
    ("isotropic", 3.0670, 1.015), ("clusters", 0.4616, 1.005), ("few", 0.0792, 1.03)])
def test_map_is_as_good_as_openTSNEs(name, kl, slack, thousand):
    """Its KL, of version 1.0.4 with exact neighbours and theta 0.1; data without clusters are where
    a schedule that ends too fast fails, and few points where it diverges. Seeds differ by slack."""
    x = {"isotropic": np.random.default_rng(5).normal(size=(1600, 50)), "clusters": thousand,
         "few": clusters(60, groups=4)}[name]
    assert viz.tsne(x).kl <= slack * kl


@pytest.mark.parametrize("name, theirs", [("clusters", 1.3743), ("isotropic", 3.1157)])
def test_large_map_is_as_good_as_openTSNEs(name, theirs):
    """As above, the divergence for all 90 neighbours, and for those that pull. Without clusters a
    schedule fails whose first stages are short."""
    x = {"clusters": clusters(5000),
         "isotropic": np.random.default_rng(5).normal(size=(5000, 10))}[name]
    map_ = viz.tsne(x)
    for near, kl in ((90, theirs), (45, map_.kl)):
        index, square = viz._neighbours(x, x, 90, itself=True)
        p = viz._affinities(square, 30)[:, :near]
        order, edges = viz._symmetric(index[:, :near], p / p.sum() * len(x))
        points = map_.points[order]
        all_pairs = viz._gradient(edges, points, viz._all_pairs, cost=True)[1]
        assert all_pairs <= 1.005 * kl
    assert all_pairs == pytest.approx(map_.kl, rel=5e-3)  # Z is of a mesh, at twice the spacing


def test_wide_data_keep_as_many_neighbours_as_openTSNE_keeps():
    """Its version 1.0.4 with exact neighbours and theta 0.1 on all dimensions."""
    x = tokens(1600)
    map_ = viz.tsne(x)
    assert recall(x, map_.points) > 0.447 - 0.01
    assert map_.kl < 1.01 * 1.940


@pytest.mark.parametrize("x", [np.random.default_rng(0).normal(size=(150, 200)),
                               far_apart(150, 3e3, groups=2)], ids=["wide", "far apart"])
def test_reported_divergence_is_the_data_s(x):
    map_ = viz.tsne(x, 10)
    assert map_.kl == pytest.approx(divergence(dense_affinities(x, 10), map_.points), rel=1e-4)


def test_mesh_and_all_pairs_give_maps_alike(thousand):
    exact, mesh = (viz.tsne(thousand, exact=e) for e in (True, False))
    assert mesh.kl == pytest.approx(exact.kl, rel=0.03)
    assert recall(thousand, mesh.points) == pytest.approx(recall(thousand, exact.points), abs=0.02)


def test_progress_reports_every_step():
    reports = []
    end = viz.tsne(clusters(100), progress=lambda *report: reports.append(report)).kl
    steps = len(reports)
    assert [step for step, _, _ in reports] == list(range(1, steps + 1))
    assert {total for _, total, _ in reports} == {steps}
    assert [step for step, _, kl in reports if kl is not None] == list(range(50, steps + 1, 50))
    assert reports[steps - steps % 50 - 1][2] == pytest.approx(end, rel=0.1)


CODE = """
import hashlib, numpy as np, viz
x = np.random.default_rng(0).normal(size=(1800, 70)).astype(np.float32)
maps = [viz.tsne(x, 10), viz.tsne(x[:500], 10, seed=1)]
viz.LARGE = viz.APPROXIMATE = 1000
x[:, 2:] /= 100  # all cells are near in 70 dimensions
assert viz._near_cells(x, 30, 0.98)
print([hashlib.sha256(m.points.tobytes()).hexdigest() for m in maps + [viz.tsne(x, 10)]])
"""


def test_same_seed_same_bits():
    def digest(threads):
        return subprocess.run(
            [sys.executable, "-c", CODE], cwd=Path(viz.__file__).parent, text=True, check=True,
            capture_output=True, env={**os.environ, "OPENBLAS_NUM_THREADS": threads}).stdout

    assert digest("1") == digest("2")


def test_seeds_differ():
    x = clusters(100)
    assert (viz.tsne(x, seed=1).points != viz.tsne(x).points).any()


# --------------------------------------------------------------------------------------------------
# new rows on a map


def test_embed_places_rows_among_their_neighbours(thousand):
    reference, new = thousand[:900], thousand[900:]
    points = viz.tsne(reference).points
    unchanged = points.copy()
    y = viz.embed(new, reference, points)

    def shared(y):  # of a row's 10 nearest reference rows, the share that is among 10 in the map
        near = [np.argsort(np.square(a[:, None].astype(np.float64) - b).sum(2), axis=1)[:, :10]
                for a, b in ((new, reference), (y, points))]
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*near)])

    index, _ = viz._neighbours(new, reference, 25)
    assert shared(y) > shared(np.median(points[index], axis=1)) + 0.03
    assert shared(y) > recall(thousand[:900], points) - 0.1
    # a row's place depends neither on the other rows nor on the scale
    np.testing.assert_allclose(viz.embed(new[:3], reference, points), y[:3], atol=1e-4)
    np.testing.assert_allclose(viz.embed(1e3 * new, 1e3 * reference, points), y, atol=1e-2)
    assert (points == unchanged).all() and viz.embed(new[:0], reference, points).shape == (0, 2)


def test_embed_finds_the_place_of_a_reference_row():
    x = clusters(600, width=100)
    points = viz.tsne(x).points
    apart = np.linalg.norm(viz.embed(x, x, points) - points, axis=1)
    assert np.median(apart) < 0.1 * np.ptp(points)


# --------------------------------------------------------------------------------------------------
# odd data


@pytest.mark.parametrize("x, words", [
    (np.ones((9, 3)), "are equal"), (np.full((9, 3), 0.1), "are equal"),
    (np.full((9, 3), np.nan), "finite"), (np.ones((3, 3)), "3 rows"), (np.ones(9), "shape"),
    (np.array([["a"] * 3] * 9), "shape"), (np.ones((9, 0)), "shape"),
    (np.diag([1e20] * 9), "1e15"), (np.array([[0.0, np.inf]] * 9), "finite")])
def test_refuses(x, words):
    with pytest.raises(viz.PictureError, match=words) as error:
        viz.tsne(x)
    assert "\n" not in str(error.value)


def test_refuses_arguments():
    x = clusters(20)
    for perplexity in (0, -1, 0.5, math.nan):
        with pytest.raises(viz.PictureError, match="perplexity"):
            viz.tsne(x, perplexity)
    for new, reference, points in ((x[:, :3], x, x[:, :2]), (x, x, x), (x, x, x[:9, :2])):
        with pytest.raises(viz.PictureError, match="points"):
            viz.embed(new, reference, points)


R = np.random.default_rng(3)
ODD = {"four": R.normal(size=(4, 3)), "five": R.normal(size=(5, 3)),
       "one column": R.normal(size=(90, 1)), "integers": R.integers(9, size=(90, 3)),
       "booleans": R.integers(2, size=(90, 70)) > 0, "half": np.float16(R.normal(size=(90, 5))),
       "wide": R.normal(size=(30, 300)), "tiny": 1e-30 * R.normal(size=(90, 5)),
       "far": R.normal(size=(90, 5)) + 1e7,
       "duplicates": np.repeat(R.normal(size=(30, 5)), 4, axis=0),
       "nearly all equal": np.eye(90)[:, :5], "line": np.arange(90)[:, None] * np.ones(6),
       "outliers": R.normal(size=(200, 5)) * np.where(np.arange(200) < 3, 1e9, 1)[:, None]}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_odd_data_are_mapped(name, exact):
    x = ODD[name]
    with np.errstate(all="raise", under="ignore"):
        map_ = viz.tsne(x, exact=exact)
    assert map_.points.shape == (len(x), 2) and np.isfinite(map_.points).all()
    assert math.isfinite(map_.kl) and map_.perplexity == min(30, (len(x) - 1) / 3)
    assert np.abs(map_.points.mean(0)).max() < 1e-6 * np.abs(map_.points).max()
    assert np.abs(map_.points).max() < 1e3


def test_structure_beside_far_outliers_survives():
    x = clusters(400, groups=4, seed=2)
    x[:4] *= 1e5
    assert recall(x[4:], viz.tsne(x).points[4:]) > recall(x[4:], viz.tsne(x[4:]).points) - 0.05
