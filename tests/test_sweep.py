"""Grids of runs: the plan, runs shared among processes that may die, and the table."""

import csv
import json
import os
import re
import shutil
import signal
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from test_survival import same

import promptprior
from forked import Forked
from lab import (beginning, commands, evaluation, plan, populations, sweep, sweep_table,
                 train)
from lab.folder import Run, best_evaluation, objective
from lab.inputs import divided, topic
from lab.settings import DataSettings, Settings
from lab.statistics import paired
from small import MODEL

ROOT = Path(promptprior.__file__).parent
FEW = ["--data", "math", "--tokens", "3", "--batch-size", "2", "--eval-limit", "12", "--max-new",
       "2", "--steps", "4", "--eval-every", "2", "--train-examples", "40", "--model", str(MODEL)]
GRID = ["--prior", "vocab", "fitted", "--lr", "3e-3", "1e-2", "--seed", "0", "1", *FEW]


def main(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed sweep. Tests change copies of it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "sweep"
    assert main("sweep", "--out", out, *GRID) == 0
    return out


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "sweep")
    return tmp_path / "sweep"


def rows(folder):
    with open(folder / "table.csv", newline="") as f:
        return list(csv.DictReader(f))


# --------------------------------------------------------------------------------------------------
# the plan


def test_the_plan_says_all(whole):
    written = json.loads((whole / "plan.json").read_text())
    assert written["margin"] == 2 and written["threads"] == 1
    # One seed of all cells comes first, and of a cell all rates.
    assert list(written["runs"]) == [f"{prior}-seed{seed}-lr{lr}" for seed in (0, 1)
                                     for prior in ("vocab", "fitted") for lr in ("0.003", "0.01")]
    flags = written["runs"]["fitted-seed1-lr0.01"]
    assert flags == {"data": "math", "tokens": 3, "batch_size": 2, "eval_limit": 12, "max_new": 2,
                     "steps": 4, "eval_every": 2, "train_examples": 40, "prior": "fitted",
                     "seed": 1, "lr": 0.01, "hold_out": True, "model": str(MODEL)}
    assert {path.name for path in whole.iterdir()} == {"plan.json", "runs", "table.csv",
                                                       "table.html"}


def test_grids():
    """Of switches and of flags that take several values; what is given twice is one run."""
    given = commands.parse(["sweep", "--cut", "--keep", "--reference", "vocab", "--reference",
                            "squad", "math", "--steps", "0", "0"], "")[1]
    runs = plan.make_runs([{name[5:]: values for name, values in given.items()}])
    assert sorted((flags["cut"], *flags["reference"]) for flags in runs.values()) == [
        (False, "squad", "math"), (False, "vocab"), (True, "squad", "math"), (True, "vocab")]
    assert all("hold_out" not in flags for flags in runs.values())
    assert len({*runs}) == 4 and all(plan.NAME.fullmatch(name) for name in runs)
    # Cells with a rate each have none to choose; one with two has, and then all hold out.
    cells = [{"prior": ["vocab"], "lr_factor": [3.0]}, {"prior": ["fitted"], "lr_factor": [1.0]}]
    for more, held_out in (([], 0), ([{"prior": ["vocab"], "lr": [0.1]}], 3)):
        runs = plan.make_runs(cells + more)
        assert sum(flags.get("hold_out", False) for flags in runs.values()) == held_out


def test_a_cells_name_is_one_short_line():
    """Whatever its text; a path in a text is no file's, of which the folders are left out."""
    assert plan.setting_name("reference", ["squad:a/b.json"]) == "reference squad:b.json"
    assert plan.setting_name("text", ["yes/no", "a\nb"]) == "text 'yes/no' 'a b'"
    assert len(plan.setting_name("text", ["word " * 100])) < 50
    assert plan.setting_name("text", []) == "no text"


def test_a_file_of_grids(tmp_path, capsys):
    path = tmp_path / "grids.json"
    path.write_text(json.dumps([
        {"prior": ["vocab", "fitted"], "seed": 0},
        {"prior": "vocab", "seed": [0, 1], "deep_layers": [None, 2]}]))
    grids = plan.read_grids(str(path))
    assert list(plan.make_runs(grids)) == [
        "vocab-seed0", "fitted-seed0", "vocab-seed0-deep-layers2", "vocab-seed1",
        "vocab-seed1-deep-layers2"]
    for content, words in (('{"priors": 1}', "no setting 'priors'"), ('{"seed": "a"}', "seed is"),
                           ("[3]", "expected {name"), ('{"out": "x"}', "no setting 'out'"),
                           ("{", "not JSON"), ('{"seed": [[1]]}', "seed is")):
        path.write_text(content)
        assert main("sweep", "--out", tmp_path / "no", "--grid", path) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--prior", "vocab", "no"], "prior 'no' is not known"),
    (["--lr", "0.1", "-1"], "--lr -1.0: expected more than 0"),
    (["--method", "prompt", "prefix", "--deep-layers", "2"], "--method prefix has keys"),
    (["--data", "math", "squad:nowhere.json"], "nowhere.json"),
    (["--model", "tiny", "nowhere"], "no such folder"),
    (["--deep-layers", "0", "9"], "the model has 3 layers"),
    (["--prior", "vocab", "text"], "needs --text"),
    (["--prior", "interpolation", "--reference", "math"], "two references"),
    (["--reference", "vocab", "--reference", "collection:no"], "no such file"),
    (["--seed", *map(str, range(200)), "--tokens", *map(str, range(1, 200))], "more than 10000"),
    ([], "no plan.json")])
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, capsys, arguments, words):
    few = FEW if arguments else []
    if "--data" in arguments or "--tokens" in arguments:
        few = ["--steps", "1"]
    assert main("sweep", "--out", tmp_path / "no", *few, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("promptprior: error:") and words in error
    assert not (tmp_path / "no").exists()


def test_a_folder_has_one_plan(copy, capsys):
    before = (copy / "plan.json").read_bytes()
    assert main("sweep", "--out", copy, *GRID, "--seed", 0) == 2
    assert "a plan of other runs" in capsys.readouterr().err
    assert main("sweep", copy, "--out", copy) == 2 and main("sweep") == 2
    assert main("sweep", "--out", copy / "runs", *GRID) == 2
    assert "is no sweep: choose another --out" in capsys.readouterr().err
    assert (copy / "plan.json").read_bytes() == before
    for old, new in (('"threads": 1', '"threads": -1'), ('"margin": 2.0', '"margin": "a"'),
                     ('"vocab-seed0-lr0.003"', '"../x"'), ('"seed": 0', '"seed": {}'),
                     ('"runs": {', '"rums": {'), ('"steps": 4', '"out": "x"'),
                     ('"runs": {', '"runs": {' + "".join(f'"x{i}": {{}}, ' for i in range(10**4)))):
        (copy / "plan.json").write_bytes(before.replace(old.encode(), new.encode(), 1))
        assert main("sweep", copy, "--table") == 2
        assert "restore it" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# the work


def test_runs_have_the_bytes_of_train(whole, tmp_path):
    """Though they take what others left: the run was the last but one of its process."""
    name = "fitted-seed1-lr0.003"
    flags = json.loads((whole / "plan.json").read_text())["runs"][name]
    words = [word for key, value in flags.items() if key != "hold_out"
             for word in ("--" + key.replace("_", "-"), value)]
    assert main("train", "--out", tmp_path / name, "--hold-out", *words) == 0
    same(whole / "runs" / name, tmp_path / name)
    configs = [(folder / "config.json").read_text().replace(str(folder), "")
               for folder in (whole / "runs" / name, tmp_path / name)]
    assert configs[0] == configs[1]


def test_held_out_questions_are_not_trained_on(whole):
    settings = Run(whole / "runs/vocab-seed0-lr0.01").settings()
    parts = divided(settings.data)
    topics = [set(map(topic, part)) for part in parts]
    assert not topics[2] & topics[0] and len(parts.held_out) >= 12
    assert len(divided(DataSettings("squad", "squad"))[2]) == 0
    # Without evaluation data two tenths are held out.
    parts = divided(DataSettings("math", None, hold_out=True, eval_limit=0))
    assert list(map(len, parts)) == [972, 120, 108]
    assert not set(map(topic, parts.evaluation)) & set(map(topic, parts.held_out))
    for run in (whole / "runs").iterdir():
        line = [m for m in Run(run).metrics() if m["split"] == "held_out"]
        assert [m["step"] for m in line] == [4]


def test_what_is_equal_is_done_once(tmp_path, monkeypatch):
    calls = []

    def counted(module, name):
        function = getattr(module, name)

        def call(*arguments, **named):
            calls.append(name)
            return function(*arguments, **named)
        monkeypatch.setattr(module, name, call)

    for name in ("load_model", "encode", "references", "fit", "divided"):
        counted(beginning, name)
    counted(evaluation, "plain_prompts")
    counted(populations, "population")
    assert main("sweep", "--out", tmp_path / "a", *GRID, "--steps", 0) == 0
    counts = {name: calls.count(name) for name in calls}
    assert counts == {"load_model": 1, "divided": 1, "encode": 3, "references": 1, "population": 1,
                      "fit": 2, "plain_prompts": 1}


def test_killed_and_started_again_it_comes_to_the_same_bytes(whole, tmp_path):
    """Killed when the third run has a checkpoint."""
    out = tmp_path / "sweep"
    victim = Forked(ROOT / "promptprior.py", "sweep", "--out", out, *GRID)
    third = out / "runs/fitted-seed0-lr0.003/checkpoints/000002.safetensors"
    end = time.monotonic() + 300
    while not third.exists():
        assert victim.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 3 <= len(list((out / "runs").iterdir())) < 8  # so that some are left
    assert main("sweep", "--out", out, *GRID) == 0
    for name in json.loads((whole / "plan.json").read_text())["runs"]:
        same(whole / "runs" / name, out / "runs" / name)
        for file in ("config.json", "figures/layer-00.svg"):
            texts = [(folder / "runs" / name / file).read_text().replace(str(folder), "")
                     for folder in (whole, out)]
            assert texts[0] == texts[1]
    for file in ("plan.json", "table.csv", "table.html"):
        assert (whole / file).read_bytes() == (out / file).read_bytes()


def test_runs_of_others_are_left_to_them(copy, capsys):
    """A run that another process trains is not waited for, and one that died is gone on with."""
    names = list(json.loads((copy / "plan.json").read_text())["runs"])
    for name in names[:2]:
        (copy / "runs" / name / "figures/layer-00.svg").unlink()  # not quite at their end
    (copy / "runs" / names[1] / "run.lock").write_text("process 1 on nowhere\n")
    with Run(copy / "runs" / names[0]).lock():
        assert main("sweep", copy) == 0
    error = capsys.readouterr().err
    assert "taken over from process 1 on nowhere" in error
    assert "1 of 8 runs have not ended" in error
    (copy / "runs" / names[0] / "figures/layer-00.svg").unlink(missing_ok=True)
    assert main("sweep", copy, "--table") == 0
    assert "7 of 8 runs" in (copy / "table.html").read_text()
    assert main("sweep", copy) == 0 and (
        copy / "runs" / names[0] / "figures/layer-00.svg").exists()


def test_a_run_that_failed_does_not_stop_the_rest(tmp_path, capsys):
    out = tmp_path / "sweep"
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps({"prior": ["isotropic:std=1e5", "vocab"], "prior_weight": 0}))
    few = [*FEW, "--grid", str(grid), "--dtype", "float16"]
    assert main("sweep", "--out", out, *few) == 1
    text = capsys.readouterr()
    (failed,) = (out / "failed").iterdir()
    reason = failed.read_text().strip()
    assert failed.name.startswith("isotropic") and "not finite" in reason
    assert f"failed: {failed.stem}: {reason}" in text.err and "1 of 2 runs failed" in text.err
    assert re.search("^vocab +1 ", text.out, re.M)
    # It is not tried again unless that is asked for.
    assert main("sweep", out) == 1 and "run 1 of 2" not in capsys.readouterr().err
    assert main("sweep", out, "--retry") == 1 and "run 1 of 2" in capsys.readouterr().err
    failed.write_text(f"{reason}\n" * 10**5)
    assert main("sweep", out, "--table") == 0
    assert len(capsys.readouterr().err) < 3000


def test_a_rate_that_diverged_lost(tmp_path, capsys):
    """That is an answer about the rate, so neither the sweep nor what calls it has failed, unless
    no rate of a cell is left."""
    out = tmp_path / "sweep"
    grid = ["--prior", "isotropic", *FEW, "--prior-weight", 1]
    assert main("sweep", "--out", out, *grid, "--lr", "1e-2", "9e29") == 0
    text = capsys.readouterr()
    (failed,) = (out / "failed").iterdir()
    assert f"failed: {failed.stem}: diverged: loss " in text.err
    assert "9e+29 not compared (diverged): the best is the lowest one tried" in text.out
    assert rows(out)[0]["cell"] == "isotropic" and rows(out)[0]["lr"] == "0.01"
    assert main("sweep", out) == 0
    assert main("sweep", "--out", tmp_path / "b", *grid, "--lr", "9e29") == 1
    assert "1 of 1 runs failed, see above: give lower rates" in capsys.readouterr().err


def test_a_cell_needs_a_rate_that_never_diverged(copy, capsys):
    """The mean of the seeds that did not diverge says nothing of a rate."""
    (copy / "failed").mkdir()
    for rate, status in (("0.01", 0), ("0.003", 1)):
        (copy / f"failed/vocab-seed1-lr{rate}.txt").write_text("diverged: loss nan")
        assert main("sweep", copy) == status
    assert "2 of 8 runs failed, see above: give lower rates" in capsys.readouterr().err


@pytest.mark.parametrize("other, flag", [
    ({"--steps": 1}, "--steps 4 (the run has 1)"),
    ({"--lr": 0.02}, "--lr 0.01 (the run has 0.02)"),
    ({"--deep-layers": 1}, "--deep-layers 0 (the run has 1)")])  # a flag that the plan lacks
def test_another_run_in_a_runs_place_is_not_taken_for_it(copy, capsys, other, flag):
    """Whether it has ended or not."""
    run = copy / "runs/vocab-seed0-lr0.01"
    assert main("train", "--config", run / "config.json", "--out", run, "--overwrite",
                *chain(*other.items())) == 0
    if "--steps" not in other:
        assert main("sweep", copy, "--table") == 2
        assert f"trained otherwise, with {flag}: remove it" in capsys.readouterr().err
    assert main("sweep", copy) == 1
    assert f"trained otherwise, with {flag}: remove it" in capsys.readouterr().err
    shutil.rmtree(run)
    assert main("sweep", copy, "--retry") == 0


def test_runs_that_went_on_elsewhere_are_taken(copy, tmp_path):
    """With their data in another place."""
    shutil.copytree(ROOT / "tiny/math", tmp_path / "math")
    assert main("train", "--resume", "--out", copy / "runs/fitted-seed1-lr0.01", "--data",
                f"math:{tmp_path / 'math/train-easy'}") == 0
    assert main("sweep", copy, "--table") == 0


def test_runs_of_other_data_are_not_mixed(copy, capsys):
    """A file that changed while a sweep was trained, and answers to other questions."""
    path = copy / "runs/fitted-seed1-lr0.01/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sha256": {**config["sha256"], "data": "0" * 64}}))
    assert main("sweep", copy, "--table") == 2
    error = capsys.readouterr().err
    assert (f"{path.parent}: the data changed between this run and {copy}/runs/vocab-seed0-lr0.003"
            ": restore the files") in error
    path.write_text(json.dumps(config))
    path = copy / "runs/fitted-seed1-lr0.01/predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    assert main("sweep", copy, "--table") == 2
    assert f"{path.parent}: predictions.jsonl has other questions" in capsys.readouterr().err


def test_of_two_processes_at_once_the_first_ones_plan_is_both(tmp_path, monkeypatch, capsys):
    check_inputs, out = sweep.check_inputs, tmp_path / "sweep"

    def beside_another(made, shared):
        check_inputs(made, shared)
        sweep.write_file(out / "plan.json", json.dumps({
            "margin": 3.0, "threads": 2, "runs": made.runs}).encode())

    monkeypatch.setattr(sweep, "check_inputs", beside_another)
    monkeypatch.setattr(sweep, "use_threads", lambda threads: used.append(threads))
    used = []
    assert main("sweep", "--out", out, "--margin", 1, "--prior", "vocab", "fitted", *FEW) == 0
    assert used == [2, 2] and json.loads((out / "plan.json").read_text())["margin"] == 3
    assert "--margin 1: the sweep began with 3" in capsys.readouterr().err


def test_processes_share_the_runs(tmp_path, capsys):
    """Every run is trained once, by one of the two."""
    few = [*FEW, "--steps", "1", "--seed", *map(str, range(6))]
    assert main("sweep", "--out", tmp_path / "a", "--jobs", 2, *few) == 0
    here = capsys.readouterr().err.count("\nrun ")
    there = (tmp_path / "a/jobs/2.txt").read_text().count("\nrun ")
    assert here + there == 6 and len(list((tmp_path / "a/runs").iterdir())) == 6
    assert rows(tmp_path / "a")[0]["seeds"] == "6"


def test_a_process_of_torchrun_works_alone(tmp_path):
    """Any of them: it meets no others."""
    second = Forked(ROOT / "promptprior.py", "sweep", "--out", tmp_path / "a", *FEW, "--steps", 1,
                    RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost")
    assert second.wait() == 0, second.err
    assert (tmp_path / "a/runs/run/figures/layer-00.svg").exists()
    assert rows(tmp_path / "a")[0]["cell"] == "vocab"


def test_a_signal_stops_it_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    step = train.Training._train_step

    def stop(self):
        step(self)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train.Training, "_train_step", stop)
    monkeypatch.setattr(promptprior.os, "kill", lambda pid, number: signal.raise_signal(number))
    given = {"out": str(tmp_path / "a"), "grid.seed": [0, 1], "grid.data": ["math"],
             "grid.steps": [3], "grid.eval_limit": [4], "grid.tokens": [2]}
    with pytest.raises(promptprior.Stopped, match="with all runs of it: sweep") as stopped:
        sweep.command_sweep(given)
    assert stopped.value.status == -signal.SIGTERM and not (tmp_path / "a/failed").exists()


@pytest.mark.parametrize("during", ["work", "wait"])
def test_helpers_are_stopped_with_the_process_that_began_them(tmp_path, during):
    """Also by a signal that comes between steps, or while it waits for them."""
    (tmp_path / "helper.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "main.py").write_text(f"""
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
from lab import console, sweep
begun = []
sweep.PROGRAM = Path({str(tmp_path / "helper.py")!r})
sweep.subprocess.Popen = lambda *a, start=subprocess.Popen, **k: \
    begun.append(start(*a, **k)) or begun[-1]
threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    with sweep.helpers(SimpleNamespace(folder=Path({str(tmp_path)!r})), 2):
        time.sleep(60 if {during!r} == "work" else 0)
except console.Stopped as e:
    print(e, [process.returncode for process in begun], e.status)
""")
    process = Forked(tmp_path / "main.py")
    assert process.wait(50) == 0, process.err
    assert process.out == f"stopped by SIGTERM; go on by: sweep {tmp_path} [-15, -15] -15\n"


# --------------------------------------------------------------------------------------------------
# the table


def change(folder, name, split, **numbers):
    """Rewrite what a run logged last of a split."""
    path = folder / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    [line for line in lines if line["split"] == split][-1].update(numbers)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_rate_is_chosen_by_held_out_questions_alone(copy, capsys):
    for seed in (0, 1):
        change(copy, f"vocab-seed{seed}-lr0.01", "held_out", loss=0.5 + seed)
        change(copy, f"vocab-seed{seed}-lr0.003", "held_out", loss=1.5 - 1.6 * seed)
        change(copy, f"vocab-seed{seed}-lr0.01", "eval", loss=0.001, accuracy=99.0)
        change(copy, f"fitted-seed{seed}-lr0.003", "held_out", loss=1.0)
        change(copy, f"fitted-seed{seed}-lr0.01", "held_out", loss=0.9)
    assert main("sweep", copy, "--table") == 0
    assert [(row["cell"], row["lr"]) for row in rows(copy)] == [("vocab", "0.003"),
                                                                ("fitted", "0.01")]
    assert "vocab: 0.003 0.700, 0.01 1.000: the best is the lowest one tried" in (
        capsys.readouterr().out)
    # Of a rate at which a run failed nobody knows how good it is, and the table says so. Nor are
    # rates compared by other seeds.
    (copy / "failed").mkdir()
    (copy / "failed/vocab-seed1-lr0.003.txt").write_text("why")
    assert main("sweep", copy, "--table") == 0 and rows(copy)[0]["lr"] == "0.01"
    assert "vocab: 0.01 1.000, 0.003 not compared (1 of 2 runs ended)\n" in (
        capsys.readouterr().out)
    (copy / "failed/vocab-seed0-lr0.01.txt").write_text("why")
    assert main("sweep", copy, "--table") == 0 and rows(copy)[0]["lr"] == "0.003"
    assert "vocab: 0.003 1.500, 0.01 not compared (1 of 2 runs ended)\n" in (
        capsys.readouterr().out)


def draw_answers(folder):
    """Rewrite the scores of every answer at random."""
    r = np.random.default_rng(0)
    for run in sorted((folder / "runs").iterdir()):
        lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        for line in lines:
            line["accuracy"] = float(r.choice([0, 100]))
        (run / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        change(folder, run.name, "eval", accuracy=np.mean([line["accuracy"] for line in lines]))


def test_a_verdict_says_what_it_rests_on(copy, capsys):
    assert main("sweep", copy, "--table") == 0  # four steps get no answer right
    assert "fitted and vocab: cannot be told: the difference is 0 in all" in capsys.readouterr().out
    draw_answers(copy)
    for run in (copy / "runs").glob("*-seed1-*"):
        shutil.rmtree(run)
    assert main("sweep", copy, "--table") == 0
    assert "fitted and vocab, for seed 0 alone: " in capsys.readouterr().out
    assert rows(copy)[1]["only_seed"] == "0"


def test_numbers_of_the_table(copy, capsys):
    """Against scipy's, by hand, of answers that are drawn: four steps get none right."""
    draw_answers(copy)
    assert main("sweep", copy, "--table", "--margin", 3) == 0
    out, error = capsys.readouterr()
    assert "the sweep began with 2" in error and "equal within 3 points" in out
    first, second = rows(copy)
    scores = {}
    for row in (first, second):
        runs = [copy / "runs" / f"{row['cell']}-seed{seed}-lr{row['lr']}" for seed in (0, 1)]
        lines = [[m for m in Run(run).metrics() if m["split"] == "eval"][-1] for run in runs]
        scores[row["cell"]] = x = np.array([m["accuracy"] for m in lines])
        assert float(row["accuracy"]) == pytest.approx(x.mean())
        assert float(row["loss"]) == pytest.approx(np.mean([m["loss"] for m in lines]))
        expected = np.clip(stats.t.interval(0.95, 1, x.mean(), stats.sem(x)), 0, 100)
        assert [float(row[f"accuracy_{end}"]) for end in ("low", "high")] == pytest.approx(
            expected, rel=1e-4)
        start, end = zip(*(Run(run).start_and_end() for run in runs))
        moved = torch.stack([(b[0] - a[0]).norm(dim=1) for a, b in zip(start, end)])
        assert float(row["layer 0 moved"]) == pytest.approx(moved.mean().item(), rel=1e-5)
        assert 0 <= float(row["layer 0 own"]) <= 100 and 0 < float(row["layer 0 norm"]) < 5
    difference = scores["fitted"] - scores["vocab"]
    assert difference.std()
    assert float(second["difference"]) == pytest.approx(difference.mean(), abs=1e-9)
    assert float(second["wide"]) == pytest.approx(difference.mean(), abs=0.02)  # rounded answers
    assert first["difference"] == "" and second["against"] == "vocab"
    found, more_seeds = (float(second[key]) for key in ("detectable", "detectable_any_seeds"))
    assert found > float(second["wide_high"]) - float(second["wide"]) > 0  # half the interval
    assert 0 < more_seeds < found
    assert found > 100  # of two seeds whose answers are drawn
    assert "not even a true difference of 100 points would be found in 80% of such sweeps; one " \
           f"smaller than {more_seeds:.1f} would not, with any number of seeds " in " ".join(out.split())


def test_of_many_layers_a_few_are_printed():
    def ends(layers):
        return [(f"{cell}, layer {i}", {"moved": float(i)}) for cell in ("a, b", "c")
                for i in layers]

    assert sweep_table.some_layers(ends(range(5))) == ends(range(5))
    assert sweep_table.some_layers(ends(range(30))) == ends((0, 7, 14, 22, 29))


def test_damaged_runs_are_one_line(copy, capsys):
    run = copy / "runs/vocab-seed0-lr0.01"
    other = copy / "runs/vocab-seed0-lr0.003"
    for name, old, new in (("predictions.jsonl", '"accuracy"', '"acc"'),
                           ("predictions.jsonl", '"accuracy": ', '"accuracy": -1e308, "x": '),
                           ("predictions.jsonl", '"accuracy": ', '"accuracy": -Infinity, "x": '),
                           ("config.json", '"layer": 0', '"layer": 7'),
                           ("metrics.jsonl", '"accuracy"', '"acc"')):
        for folder in (run, other):
            text = (folder / name).read_text()
            (folder / f"{name}.whole").write_text(text)
            (folder / name).write_text(text.replace(old, new))
        assert main("sweep", copy, "--table") == 2, name
        assert "restore" in capsys.readouterr().err
        for folder in (run, other):
            (folder / f"{name}.whole").rename(folder / name)
    assert main("sweep", copy, "--table") == 0


@pytest.mark.parametrize("name", ["runs", "failed", "jobs", "jobs/2.txt"])
def test_nothing_is_written_through_a_link(copy, tmp_path, capsys, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in ("2.txt", "vocab-seed0-lr0.01.txt"):
        (outside / file).write_text("mine")
    if name == "runs":
        shutil.rmtree(copy / name)
    (copy / "jobs").mkdir(exist_ok=name == "jobs/2.txt")
    if name == "jobs":
        (copy / "jobs").rmdir()
    (copy / name).symlink_to(outside / "2.txt" if "/" in name else outside)
    assert main("sweep", copy, "--jobs", 2, "--retry") == 2
    assert "a link" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in outside.iterdir()} == {
        "2.txt": "mine", "vocab-seed0-lr0.01.txt": "mine"}


def test_a_plan_without_runs(copy, capsys):
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps({**plan, "runs": {}}))
    assert main("sweep", copy) == 2 and "0 runs" in capsys.readouterr().err


def test_of_one_question_nothing_is_tested(tmp_path, capsys):
    few = ["--prior", "vocab", "fitted", *FEW, "--steps", "0", "--eval-limit", "1"]
    assert main("sweep", "--out", tmp_path / "a", *few) == 0
    out = capsys.readouterr().out
    assert "p, equal" not in out and "fitted and vocab: not compared: all questions are abo" in out


def test_of_other_seeds_nothing_is_tested(tmp_path, capsys):
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps([{"prior": "vocab", "seed": 0}, {"prior": "fitted", "seed": 1}]))
    assert main("sweep", "--out", tmp_path / "a", "--grid", grid, *FEW, "--steps", "0") == 0
    assert "fitted and vocab: not compared: no seed of both has ended" in capsys.readouterr().out


def test_the_page_is_safe(whole, tmp_path):
    page = (whole / "table.html").read_text()
    assert "<svg" in page and "<script" not in page
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps({"prior": "text", "text": [["<b>"], ["a"]]}))
    assert main("sweep", "--out", tmp_path / "a", "--grid", grid, *FEW, "--steps", "0") == 0
    page = (tmp_path / "a/table.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_rates_that_differ_by_a_factor_are_one_cell(tmp_path, capsys):
    """At every layer, so that the rates of token rows and of deep rows are tuned together."""
    few = [*FEW, "--steps", "2", "--eval-every", "2", "--deep-layers", "1"]
    assert main("sweep", "--out", tmp_path / "a", "--lr-factor", "1", "3", *few) == 0
    [row] = rows(tmp_path / "a")
    assert float(row["lr_factor"]) in (1, 3) and "lr" not in row
    out = capsys.readouterr().out
    assert re.search(r"\nvocab: factor 1 [\d.]+, factor 3 [\d.]+: the best is the "
                     "(lowest|highest)", out)
    usual, tripled = (Run(tmp_path / f"a/runs/lr-factor{factor}").config()["learning_rates"]
                      for factor in ("1.0", "3.0"))
    assert len(usual) == 2 and len(set(usual.values())) == 2
    assert tripled == pytest.approx({name: 3 * rate for name, rate in usual.items()})
    assert {row["lr"] for row in Run(tmp_path / "a/runs/lr-factor3.0").metrics()
            if row["split"] == "train"} and Run(
        tmp_path / "a/runs/lr-factor3.0").settings().data.hold_out


def test_a_taught_cells_rate_is_chosen_by_what_it_is_taught():
    """The labels of held-out questions are none where the teacher's answers are learned."""
    line = {"loss": 8.0, "teacher_kl": 0.5}
    assert objective({"loss": 8.0}, 0) == 8
    assert objective(line, 0) == 0.5
    assert objective(line, 0.25) == 0.75 * 0.5 + 0.25 * 8


def test_a_taught_runs_best_step_and_its_steps_are_by_what_it_is_taught(tmp_path):
    """Its divergence falls while the labels' cross-entropy rises, and half of both falls first."""
    log = [{"split": "eval", "step": step, "loss": loss, "teacher_kl": kl}
           for step, loss, kl in ((0, 1.0, 0.9), (5, 1.02, 0.3), (10, 1.5, 0.11), (15, 2.0, 0.1))]
    plain = [{key: line[key] for key in ("split", "step", "loss")} for line in log]
    for metrics, mix, best, steps in ((log, 0, 15, 10), (log, 0.5, 5, 0), (log, 1, 0, 0),
                                      (plain, 0, 0, 0)):
        assert best_evaluation(metrics, [0, 5, 10, 15], mix)["step"] == best
        assert sweep_table.steps_to_loss(metrics, mix) == steps

    # as a run tells it, by --step best and in its table
    taught = [*FEW, "--teacher", "Answer:", "--out", tmp_path / "run"]
    assert main("train", *taught) == 0
    run = Run(tmp_path / "run")
    losses = dict(zip((0, 2, 4), ((1.0, 0.9), (1.3, 0.1), (1.2, 0.5))))
    changed = [line | dict(zip(("loss", "teacher_kl"), losses[line["step"]]))
               if line["split"] == "eval" else line for line in run.metrics()]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    run.show_step("best")
    assert run.step == 2
    assert "2 steps (lowest objective)" in evaluation.score_table(run.settings(), changed)


def test_flags_that_may_stand_alone_do_so_in_a_grid_and_alike_names_have_numbers(tmp_path):
    """Two teachers whose texts begin alike are two rows of the table; held-out questions have the
    divergence from the teacher."""
    few = [*FEW, "--steps", "1", "--eval-every", "1", "--lr", "1e-3", "1e-2"]
    long = "You are a helpful and careful assistant who answers"
    assert main("sweep", "--out", tmp_path / "a", "--teacher", f"{long} A", f"{long} B",
                "--teacher-answers", *few) == 0
    table = rows(tmp_path / "a")
    assert len({row["cell"] for row in table}) == 2
    assert "held-out loss of taught prompts: of the div" in (tmp_path / "a/table.html").read_text()
    assert all(row["cell"].endswith(f"({i + 1})") for i, row in enumerate(table))
    for run in (tmp_path / "a/runs").iterdir():
        line = [m for m in Run(run).metrics() if m["split"] == "held_out"][-1]
        assert line["teacher_kl"] > 0 and Run(run).settings().teacher.teacher_answers == 0


def test_cells_of_one_data_setting_have_units_of_their_own(monkeypatch):
    """Two pairs of cells whose settings are equal, and which answered other questions."""
    def cell(name, questions):
        asked = [{"id": str(k), "question": "", "f1": 50.0 + k} for k in range(questions)]
        runs = {seed: SimpleNamespace(predictions=lambda: asked) for seed in (0, 1)}
        return sweep_table.Cell(name, runs, {0: {"f1": 50.0}, 1: {"f1": 50.0}}, {0: 1, 1: 1},
                                Settings(), (None, None), {}, {})

    monkeypatch.setattr(sweep_table, "question_units", lambda _, asked: np.arange(len(asked)))
    cells = [cell("a", 3), cell("b", 3), cell("c", 2), cell("d", 2)]
    pairs, _ = sweep_table.compare_cells(cells, 2.0)
    assert [names for *names, _ in pairs] == [["b", "a"], ["d", "c"]]
    # No answer differs, which tells nothing of others.
    assert all(numbers["holm_equal"] == numbers["holm_different"] == 1 for *_, numbers in pairs)


def test_a_small_difference_is_told_in_plain_words():
    """A difference may be there, and be less than the margin: both tests are right."""
    effect = paired(np.random.default_rng(0).normal(1, 0.5, (3, 2000)))
    numbers = {"holm_equal": effect.equivalence_p(2), "holm_different": effect.difference_p(),
               "wide_low": 0.9, "wide_high": 1.1}
    words = sweep_table.verdict("a", "b", numbers, 2)
    assert words == "a and b: different, but by less than 2 points"
    assert sweep_table.verdict("a", "b", numbers | {"holm_different": 0.5}, 2.5).endswith(
        ": equal within 2.5 points")
    assert sweep_table.verdict("a", "b", numbers | {"holm_equal": 0.5}, 2).endswith(": different")
    numbers |= {"holm_equal": 0.5, "holm_different": 0.5, "detectable_any_seeds": 0.0}
    assert sweep_table.verdict("a", "b", numbers | {"detectable": 7.21}, 2).endswith(
        "; a true difference of 7.2 points would be found in 80% of such sweeps")


def test_what_reads_evaluation_data_alone_needs_no_training_data(tmp_path, capsys):
    for name in ("training", "evaluation"):
        (tmp_path / f"{name}.txt").write_text("".join(
            f"What is {i} + 1?\n{i + 1}\n" for i in range(30)))
    out = tmp_path / "a"
    data = [f"math:{tmp_path}/{name}.txt" for name in ("training", "evaluation")]
    few = [*FEW, "--steps", "1", "--eval-every", "1", "--data", data[0], "--eval-data", data[1]]
    assert main("sweep", "--out", out, "--prior", "vocab", "fitted", *few) == 0
    (tmp_path / "training.txt").unlink()
    runs = [out / "runs" / name for name in ("vocab", "fitted")]
    for command in (["sweep", out, "--table"], ["eval", runs[0]], ["attention", runs[0]],
                    ["interpolate", *runs, "--points", 2, "--out", tmp_path / "line"]):
        assert main(*command) == 0, capsys.readouterr().err


def test_intervals_stay_where_values_can_be():
    interval = sweep_table.with_interval
    assert interval("f1", [90.0, 98.0]) == {"f1": 94.0, "f1_low": pytest.approx(43.2, abs=0.1),
                                            "f1_high": 100.0}
    assert interval("loss", [0.1, 0.9])["loss_low"] == 0 < interval("steps", [99, 101])["steps_low"]
    assert interval("steps", [90.0, 120.0])["steps_high"] > 100
    assert interval("difference", [-1.0, 5.0])["difference_low"] < -10
    assert interval("f1", [90.0]) == {"f1": 90.0}
