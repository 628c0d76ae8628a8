"""What the studies in benchmarks/ make of trained prompts, before they score it."""

import contextlib
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scipy.stats
import torch

import promptprior

sys.path.insert(0, str(Path(promptprior.__file__).parent / "benchmarks"))

import claims  # noqa: E402
import displacements  # noqa: E402
import keys_values  # noqa: E402
import many  # noqa: E402
import pace  # noqa: E402
import runs  # noqa: E402
import small  # noqa: E402
import subspace  # noqa: E402
import worked  # noqa: E402
from lab.plan import make_runs  # noqa: E402


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


def test_worked_sums_are_right_and_those_of_the_data_are_new():
    r = random.Random(0)
    for held_out in (False, True):
        for _ in range(50):
            question, steps, answer = worked.long_sum(r, 5, held_out)
            expression = question.removeprefix("What is ").removesuffix("?")
            assert worked.make.reserved(expression) == held_out
            assert str(eval(expression)) == answer == steps.split(" = ")[-1]
            before = expression[0]
            for step, sign_and_number in zip(steps.split(", "),
                                             re.findall("[+-] [0-9]", expression), strict=True):
                left, right = step.split(" = ")
                assert left == f"{before} {sign_and_number}" and str(eval(left)) == right
                before = right

    # Long sums are worked or answered at once, as a header tells if there is one.
    seen = set()
    for _ in range(200):
        text, style = worked.document(r, None, 5)
        if style in (worked.WORKED, worked.AT_ONCE) and re.search(r"What is (\d [+-] ){4}", text):
            assert ("Steps: " in text) == (style == worked.WORKED), text
            seen.add((style, text.startswith(style)))
    assert len(seen) == 4


def test_pages_that_processes_share_are_counted_once(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(2**26))
    code = ("import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, "
            "prot=mmap.PROT_READ); sum(m[::4096]); print(flush=True); sys.stdin.read()")
    both = [subprocess.Popen([sys.executable, "-c", code, file], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        process.stdout.readline()
    held, really = many.memory([process.pid for process in both])
    for process in both:
        process.communicate()
    assert held > 2 * 0.067 and held - really > 0.067


def test_a_process_has_those_that_it_started():
    code = ("import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'], "
            "stdin=subprocess.PIPE); print(p.pid, flush=True); input(); p.communicate()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    found = many.processes_of(process.pid)
    process.communicate(b"\n")
    assert found == [process.pid, child]


def test_claims_are_grids_that_a_sweep_takes():
    """With the priors that are asked for where a claim compares several, and rows at all layers of
    the model where it says so."""
    for name, claim in claims.CLAIMS.items():
        made = make_runs(claims.grids_of(claim, None, "tiny"))
        assert len(made) > 1
        others = make_runs(claims.grids_of(claim, ["sparse", "vae"], str(small.MODEL)))
        if name in ("prior", "deep", "last"):
            assert [run["prior"] for run in others.values()] == ["sparse", "vae"]
        elif name.startswith("cut"):
            assert others == made
        else:
            assert {run.get("deep_layers") for run in others.values()} == {None, 3}
    structures = make_runs(claims.grids_of(claims.CLAIMS["samples-16"], None, "tiny"))
    assert [(run.get("reparam"), run.get("deep_layers")) for run in structures.values()] == [
        ("none", None), ("shared", None), ("mlp", None), (None, 6)]
    assert {(run["train_examples"], tuple(run["reference"])) for run in structures.values()} == {
        (16, ("text",))}


def test_one_factor_for_all_runs_of_a_claim(monkeypatch, tmp_path):
    """Nothing is tuned then, and seeds begin at 0."""
    grids = []

    def run_sweep(folder, made, flags):
        folder.mkdir()
        grids.extend(made)
        return ""

    monkeypatch.setattr(claims, "run_sweep", run_sweep)
    monkeypatch.setattr(sys, "argv", ["claims.py", "--out", str(tmp_path), "--only", "cut-vocab",
                                      "--seeds", "2", "--factors", "3"])
    claims.main()
    assert [(run["lr_factor"], run["seed"]) for run in make_runs(grids).values()] == [
        (3.0, seed) for seed in (0, 0, 1, 1)]


def test_the_steps_to_a_loss():
    lines = [{"step": step, "loss": loss} for step, loss in zip(
        (1, 2, 3, 4, 6, 7), (3.0, 2.0, 1.0, 2.0, 0.5, 0.1))]  # step 5 was left out
    assert pace.steps_to(lines, 1.5, 2) == 3 and pace.steps_to(lines, 1.5, 1) == 3
    assert pace.steps_to(lines, 1.2, 3) == 6 and pace.steps_to(lines, 0.2, 2) == math.inf
    assert pace.steps_to(lines, 9.0, 10) == pace.steps_to([], 1.2, 10) == math.inf
    first, rows = pace.compared({
        "none": {1: 5.0, 2: math.inf}, "first": {1: 10.0, 2: 20.0, 3: 27.0},
        "second": {1: 12.0, 2: 25.0, 3: 28.0}, "third": {2: 10.5, 3: 17.0},
        "alike": {1: 7.0, 2: 17.0, 3: 24.0}})
    rows = dict(rows)
    assert first == "first" and rows["alike"]["p"] == 1
    assert rows["none"] == {"seeds": 2, "reached": 1} and rows["first"]["steps"] == 19
    expected = scipy.stats.ttest_rel([12, 25, 28], [10, 20, 27])
    assert rows["second"]["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (rows["second"]["difference_low"], rows["second"]["difference_high"]) == \
        pytest.approx((interval.low, interval.high), rel=1e-4)
    assert rows["third"]["difference"] == -9.75 and rows["third"]["p"] < rows["second"]["p"]
    assert rows["third"]["holm"] == 3 * rows["third"]["p"]


def is_training(folder):
    """Whether the log of a run in a folder has a step; other folders come and go meanwhile."""
    for parent, _, files in os.walk(folder):
        with contextlib.suppress(FileNotFoundError):
            if "metrics.jsonl" in files and '"train"' in Path(parent, "metrics.jsonl").read_text():
                return True
    return False


@pytest.mark.parametrize("script", ["claims.py", "distil.py"])
def test_an_interrupted_study_ends_after_its_sweep(tmp_path, script):
    """Ctrl-C is sent to both; the sweep's step ends first, and it alone speaks."""
    own = ["--only", "last"] if script == "claims.py" else ["--data", "squad", "--model", "tiny"]
    study = subprocess.Popen(
        [sys.executable, Path(runs.ROOT, "benchmarks", script), "--out", tmp_path / "out", *own,
         "--steps", "4000", "--eval-limit", "1"], text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True)
    try:
        while not is_training(tmp_path):
            assert study.poll() is None
            time.sleep(0.05)
        os.killpg(study.pid, signal.SIGINT)
        error = study.communicate(timeout=60)[1]
    finally:
        if study.poll() is None:
            os.killpg(study.pid, signal.SIGKILL)
    assert study.returncode == 130 and "Traceback" not in error, error
    assert "stopped by SIGINT" in error and "sweep" in error.strip().split("\n")[-1]
