"""lab/locality.py: steps against their definition, and the levels of its tests by simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from test_geometry import R, cloud
from test_statistics import at_most_level

from lab.geometry import GeometryError
from lab.locality import locality


def walks(seed, D=5, lengths=(9, 1, 14, 2), smooth=False):
    points = [R((seed, i)).normal(size=(T, D)) for i, T in enumerate(lengths)]
    return [np.cumsum(p, axis=0) / 2 if smooth else p for p in points]


def steps_of(paths):
    return np.concatenate([np.linalg.norm(np.diff(p, axis=0), axis=1) for p in paths])


def test_steps_within_paths():
    paths = [p.astype(np.float32) for p in walks(0)]
    result = locality(paths, cloud(50, 5), permutations=0, walks=0)
    steps = [math.dist(a, b) for p in paths for a, b in zip(p.tolist(), p[1:].tolist())]
    assert len(steps) == 8 + 0 + 13 + 1 == result["steps"] and result["repeats"] == 0
    assert result["step"] == pytest.approx(np.mean(steps), rel=1e-9)
    assert result["spread"] == pytest.approx(np.std(steps), rel=1e-9)
    assert set(result) == {"steps", "repeats", "step", "spread"} | {
        f"{prefix}{kind}_{name}" for prefix in ("", "p_")
        for kind in ("within", "between", "uniform") for name in ("step", "spread")}
    assert all(math.isnan(v) for k, v in result.items() if k.startswith("p_"))


def test_long_walks():
    paths = walks(0, 40_000, (7, 4, 9))
    population = paths[0].astype(np.float32)  # some four rows to a block
    result = locality(paths, population, permutations=0, walks=3)
    steps = steps_of(paths)
    assert result["step"] == pytest.approx(steps.mean(), rel=1e-9)
    assert result["spread"] == pytest.approx(steps.std(), rel=1e-9)
    assert result["uniform_step"] == pytest.approx(steps.mean(), rel=0.2)


def test_a_token_that_follows_itself_makes_no_step():
    """Steps are those of the text without its immediate repeats, at any offset and in float16."""
    paths = [np.array([[0.0], [3.0], [3.0], [4.0], [4.0], [4.0]]), np.array([[7.0], [7.0]])]
    for shift, dtype in ((0, np.float64), (1000, np.float16)):
        moved = [(p + shift).astype(dtype) for p in paths]
        result = locality(moved, np.eye(1), permutations=0, walks=0)
        assert (result["steps"], result["repeats"]) == (2, 4)
        assert (result["step"], result["spread"]) == pytest.approx((2, 1))
    with pytest.raises(GeometryError, match="another token"):
        locality([np.ones((5, 2))], np.eye(2))


def test_repeats_alone_make_no_text_even():
    """A text that repeats every token seems uneven by its steps of 0, and has no fewer steps of
    other lengths than its shuffled tokens: only the order tells, and it is left out."""
    points = R().normal(size=(60, 4))
    plain = locality([points], cloud(9, 4), permutations=200)
    repeated = locality([np.repeat(points, 2, axis=0)], cloud(9, 4), permutations=200)
    assert repeated["step"] == pytest.approx(plain["step"])
    assert repeated["spread"] == pytest.approx(plain["spread"])
    assert plain["p_within_spread"] > 0.05 < repeated["p_within_spread"]


def texts(seed, share=0.05, G=20, T=15, D=8):
    """Texts of independent tokens, with a share of the variance between texts."""
    r = R(seed)
    return [math.sqrt(1 - share) * r.normal(size=(T, D)) + math.sqrt(share) * r.normal(size=D)
            for _ in range(G)]


def test_levels_where_texts_differ_and_order_does_not_matter():
    """200 repetitions of independent tokens with a text effect of 5 %: the test within texts keeps
    its level, the interval holds 1, and the test between texts rejects, as it should."""
    found = [locality(texts(k), np.eye(8), permutations=39, walks=0, seed=k) for k in range(200)]
    for name in ("step", "spread"):
        p = np.array([one[f"p_within_{name}"] for one in found])
        at_most_level(p)
        at_most_level(p, 0.2)
        assert np.mean(p <= 0.2) > 0.1  # exact, and not merely careful
        holds = [one[f"{name}_ratio_low"] <= 1 <= one[f"{name}_ratio_high"] for one in found]
        assert 0.9 <= np.mean(holds)
    assert np.mean([one["p_between_step"] <= 0.05 for one in found]) > 0.3


def test_uniform_walks_are_the_null_of_random_tokens():
    """150 repetitions."""
    population = cloud(300, 4)
    found = [locality([population[R((k, i)).integers(0, 300, T)] for i, T in enumerate((9, 14, 2))],
                      population, permutations=0, walks=39, seed=k) for k in range(150)]
    for name in ("step", "spread"):
        at_most_level([one[f"p_uniform_{name}"] for one in found])
        at_most_level([one[f"p_uniform_{name}"] for one in found], 0.2)


def test_power_both_ways():
    smooth = walks(0, 20, (60, 80, 70), smooth=True)
    result = locality(smooth, 5 * R(1).normal(size=(500, 20)))
    for kind, least in (("within", 2 / 1001), ("between", 2 / 1001), ("uniform", 2 / 201)):
        assert result[f"p_{kind}_step"] == result[f"p_{kind}_spread"] == least
        assert result["step"] < result[f"{kind}_step"] / 1.5
    assert result["step_ratio_high"] < 0.8
    far = [np.array([[0.0], [9.0]] * 20) + 0.1 * R(2).normal(size=(40, 1))]  # longer than chance
    result = locality(far, R(1).normal(size=(500, 1)))
    assert result["p_within_step"] == 2 / 1001 and result["step_ratio"] > 1.5


def test_the_null_walks():
    """Uniform walks draw by the weights; shuffled ones only from the paths' own points."""
    population = np.array([[0.0], [1.0], [1000.0]])
    path = [np.array([[0.0], [3.0], [5.0]] * 200)]
    result = locality(path, population, np.array([3.0, 1.0, 0.0]), permutations=200)
    assert result["uniform_step"] == 1 and result["uniform_spread"] == 0  # steps of 0 left out
    assert result["within_step"] == pytest.approx((3 + 2 + 5) / 3, abs=0.03)
    # of two texts that are each of one place, only the walk between texts leaves the place
    apart = [R().normal(size=(30, 3)), 100 + R(1).normal(size=(30, 3))]
    result = locality(apart, np.eye(3), permutations=200)
    assert result["within_step"] < 4 < 50 < result["between_step"]
    pair = locality([np.array([[0.1, 0.2], [3.0, 4.0]])], np.eye(2))  # one step: always a tie
    assert pair["p_within_step"] == pair["p_between_spread"] == 1


def test_groups_widen_the_interval():
    """Ten articles of four texts, local by their article's amount: with texts as the units the
    interval is too narrow. It is Student's interval of the log ratio, by the jackknife."""
    local = np.repeat(R(3).uniform(0, 0.9, 10), 4)
    paths = []
    for k, share in enumerate(local):
        noise, path = R(k).normal(size=(30, 3)), [np.zeros(3)]
        for z in noise:
            path.append(share * path[-1] + math.sqrt(1 - share**2) * z)
        paths.append(np.array(path))
    article = np.repeat(np.arange(10), 4)
    by_text = locality(paths, np.eye(3), permutations=100, walks=0)
    by_article = locality(paths, np.eye(3), groups=article, permutations=100, walks=0)

    def width(result):
        return math.log(result["step_ratio_high"] / result["step_ratio_low"])

    assert by_article["step_ratio"] == pytest.approx(by_text["step_ratio"])
    assert width(by_article) > 1.3 * width(by_text)
    lengths = np.array([steps_of(paths[4 * k:4 * k + 4]).mean() for k in range(10)])
    error = stats.sem(lengths) / lengths.mean()  # the shuffled steps add a little
    half = stats.t.ppf(0.975, 9) * error
    assert width(by_article) / 2 == pytest.approx(half, rel=0.35)


def test_locality_refuses():
    for weights in ([1, 1], [1, 1, -1], [0, 0, 0], [1, math.nan, 1]):
        with pytest.raises(GeometryError, match="3 numbers"):
            locality([cloud(4, 2)], cloud(3, 2), weights)
    for paths in ([], [cloud(1, 2)] * 3):
        with pytest.raises(GeometryError, match="no path has a step"):
            locality(paths, cloud(3, 2))
    with pytest.raises(GeometryError, match="a path has width 3, expected 2"):
        locality([cloud(4, 3)], cloud(3, 2))
