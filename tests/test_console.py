"""What the program says while it works."""

import gc
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import llama
import promptprior
from lab import console, train
from lab.files import NotWritten
from small import MODEL

HERE = Path(promptprior.__file__).parent


def test_a_stage_is_a_line_where_there_is_no_terminal(capsys):
    """One when it begins, and none within the next 30 seconds but for its end, if that is kept."""
    with console.progress(total=5, desc="train", unit=" steps") as bar:
        for _ in range(5):
            bar.set_postfix_str("loss 0.123", refresh=False)
            bar.update()
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train: 5 steps" and last.startswith("train: 5 of 5 steps, loss 0.123, ")
    assert [*console.progress(range(3), desc="x\x1b[2J", unit=" rows", leave=False)] == [0, 1, 2]
    assert capsys.readouterr().err == "x: 3 rows\n"
    for noun in ("layers", "batches"):
        assert [*console.progress(range(1), desc="x", unit=f" {noun}")] == [0]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "x: 1 layer", "x: 1 of 1 layer", "x: 1 batch", "x: 1 of 1 batch"]


def test_a_long_stage_goes_on_speaking(capsys, monkeypatch):
    monkeypatch.setattr(console, "SILENCE", 0)
    with console.progress(total=10, initial=4, desc="train", unit=" steps", leave=False) as bar:
        for _ in range(3):
            bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "s left" in lines[1]
    assert [line.split(",")[0] for line in lines[1:]] == [
        f"train: {n} of 10 steps" for n in (6, 8, 10)]


@pytest.fixture
def clock(monkeypatch):
    """A list of one number, the seconds that tqdm and training are told."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(train, "time", SimpleNamespace(
        perf_counter=lambda: now[0], time=lambda: now[0]))
    return now


@pytest.mark.parametrize("seconds, known, said", [
    (3, None, ["x: 3 of 10 steps, 9 s, 21 s left"]), (0.5, None, []),
    (3, lambda: 123, ["x: 3 of 10 steps, 9 s, 123 s left"])])
def test_the_time_of_a_long_stage_is_said_early(clock, capsys, seconds, known, said):
    """After three steps, if they took more than two seconds; then not before half a minute."""
    with console.progress(total=10, desc="x", unit=" steps", leave=False) as bar:
        bar.seconds_left = known
        for _ in range(8):
            clock[0] += seconds
            bar.update()
    assert capsys.readouterr().err.splitlines() == ["x: 10 steps", *said]


def test_the_time_of_a_run_counts_its_evaluations(clock, monkeypatch, capsys, tmp_path):
    """Where each takes 10 s and a step 1 s, what a line says is left is what comes."""
    for name, seconds in (("_record", 10), ("_train_step", 1)):
        def slow(self, work=getattr(train.Training, name), seconds=seconds):
            work(self)
            clock[0] += seconds

        monkeypatch.setattr(train.Training, name, slow)
    monkeypatch.setattr(console, "SILENCE", 0)
    assert promptprior.main(["train", "--model", str(MODEL), "--data", "math", "--steps", "7",
                             "--eval-every", "3", "--eval-limit", "2", "--batch-size", "2",
                             "--text", "", "--max-length", "60", "--out", str(tmp_path / "r")]) == 0
    lines = re.findall(r"^train: (\d) of 7 steps, .* (\d+) s, (\d+) s left$",
                       capsys.readouterr().err, re.M)
    assert {tuple(map(int, line)) for line in lines} == {
        (step, done, 4 * 10 + 7 - done) for step, done in (
            (1, 11), (2, 12), (3, 13), (4, 24), (5, 25), (6, 26))}


def test_a_remark_beside_a_bar_has_a_line_of_its_own(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.progress(total=5, desc="train", mininterval=0) as bar:
        bar.update(2)
        console.say("step 2: loss 1.5")
    # After a carriage return a terminal writes over the line.
    shown = [line.split("\r")[-1] for line in terminal.getvalue().splitlines()]
    assert "step 2: loss 1.5" in shown and "2/5" in shown[-1]


@pytest.mark.filterwarnings("error")
def test_a_stage_that_a_signal_cuts_short_at_its_beginning(monkeypatch):
    """Before tqdm has set what its end asks for, which Python would print."""
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(console._line_progress(), "_get_free_pos", stop)
    with pytest.raises(KeyboardInterrupt):
        console.progress(total=5, desc="train", unit=" steps")
    gc.collect()


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setattr(console, "FIRST", False)
    assert [*console.progress(range(3), desc="x", unit=" rows")] == [0, 1, 2]
    console.say("a remark")
    assert capsys.readouterr() == ("", "")


def test_scores_in_a_line():
    scores = {"loss": 0.5987, "exact_match": 6.5, "precision": 1.0, "f1": 17.64,
              "calibration_error": 3.0}
    assert console.scores_line(scores) == "loss 0.599, exact match 6.5, F1 17.6"


def test_of_many_files_the_ends_are_named():
    names = [f"layer-{i:02d}.svg" for i in range(30)]
    assert console.file_list(names[:2]) == "layer-00.svg, layer-01.svg"
    assert console.file_list(names) == "layer-00.svg to layer-29.svg"


def test_every_error_can_be_sent_to_another_process():
    """With its message and all that a handler asks of it."""
    reason = PermissionError(13, "Permission denied")
    made = {"NotWritten": NotWritten(Path("a/b"), reason), "Stopped": console.Stopped("by", -15),
            "FileError": llama.FileError(Path("a/b"), "no such file")}
    names = ["data", "llama", "priors", "viz",
             *(f"lab.{path.stem}" for path in (HERE / "lab").glob("[a-z]*.py"))]
    kinds = {kind for name in names for kind in vars(importlib.import_module(name)).values()
             if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ in names}
    assert len(kinds) > 9
    for kind in kinds:
        error = made[kind.__name__] if kind.__name__ in made else kind("what, where, remedy")
        received = pickle.loads(pickle.dumps(error))
        assert type(received) is kind and str(received) == str(error)
        for name in ("errno", "path", "status"):
            assert getattr(received, name, None) == getattr(error, name, None)


@pytest.mark.parametrize("given", [None, "active"])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code = ("import os, sys, promptprior\n"
            "promptprior.main(['eval', 'nowhere'])\n"
            "assert 'torch' in sys.modules\n"
            "print(os.environ['OMP_WAIT_POLICY'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, text=True,
                          capture_output=True, check=True)
    assert done.stdout.strip() == (given or "passive")
