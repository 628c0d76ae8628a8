"""What the studies in benchmarks/ make of trained prompts, before they score it."""

import sys
from pathlib import Path

import pytest
import torch

import promptprior

sys.path.insert(0, str(Path(promptprior.__file__).parent / "benchmarks"))

import displacements  # noqa: E402
import keys_values  # noqa: E402
import subspace  # noqa: E402


def trained(prior, task, seed, displacement):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(4, 6, generator=generator)
    return displacements.Trained(prior, task, seed, draw, displacement)


def test_pairs_of_displacements_by_what_they_have_in_common():
    x, y = torch.eye(6)[:4], torch.eye(6)[2:]
    whole = displacements.cosines([
        trained("a", "squad", 0, x), trained("a", "squad", 1, -x), trained("b", "squad", 0, 2 * x),
        trained("a", "math", 0, y)])
    found = {name: [pair[0] for pair in pairs] for name, pairs in whole.items()}
    assert whole["same draw, other task"][0][1] == pytest.approx(0.5)  # two columns of four
    assert found == {
        "same prior and task, other draw": [pytest.approx(-1)],
        "same task and order of questions, other prior": [pytest.approx(1)],
        "same task, other prior and order of questions": [pytest.approx(-1)],
        "same draw, other task": [pytest.approx(0)], "other prior and task": [pytest.approx(0)]}


def test_what_a_draw_is_given():
    own = torch.arange(24.0).view(4, 6)
    one, other = trained("a", "squad", 0, own), trained("b", "squad", 0, torch.ones(4, 6))
    by_key = {("a", "squad", 0): one, ("b", "squad", 0): other}
    assert torch.equal(displacements.added(one, "none", by_key), one.draw)
    assert torch.equal(displacements.added(one, "a", by_key), one.draw + own)
    assert torch.equal(displacements.added(one, "b", by_key), one.draw + 1)
    shuffled, random = (displacements.added(one, name, by_key) - one.draw
                        for name in ("shuffled", "random"))
    torch.testing.assert_close(displacements.added(one, "mean row", by_key) - one.draw,
                               own.mean(dim=0).expand(4, 6), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled.sort(dim=0).values, own, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(shuffled, own)
    torch.testing.assert_close(random.norm(dim=1), own.norm(dim=1))
    assert not torch.allclose(random, own, atol=1)


def test_keys_of_one_and_values_of_another():
    a, b = {3: torch.zeros(5, 2, 2, 8)}, {3: torch.ones(5, 2, 2, 8)}
    mixed = keys_values.swapped(a, b)[3]
    assert mixed.shape == (5, 2, 2, 8) and not mixed[:, 0].any() and mixed[:, 1].all()


def test_the_picture_of_subspaces():
    scores = {(kind, k): [(50.0 + k, 1.0), (52.0 + k, 0.9)]
              for kind in ("principal", "random") for k in (1, 4)} | {("all", 0): [(90, 0.1)]}
    svg = subspace.picture(scores, "f1", "caption")
    assert all(f"{kind} directions" in svg.replace("</tspan><tspan", "")
               for kind in ("random", "all")) and "F1, percent" in svg
