"""Runs that are killed, interrupted, out of disk or memory: what is left is good, and resuming ends
in the bytes of an undisturbed run."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import promptprior
from forked import CONTEXT, Forked
from lab import commands, evaluation, files, train
from lab import folder as run_module
from priors import PRIORS
from small import MODEL

HERE = Path(__file__).resolve().parent.parent
FEW = ["--data", "math", "--prior", "isotropic", "--tokens", "3", "--batch-size", "2",
       "--eval-limit", "3", "--max-new", "2", "--steps", "6", "--eval-every", "2",
       "--train-examples", "40", "--model", str(MODEL)]


def main(*arguments):
    return promptprior.main([str(a) for a in arguments])


def same(whole, parts):
    """Whether two runs ended alike: every byte but of clocks, and of what names the run."""
    names = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    assert names == {p.relative_to(parts) for p in parts.rglob("*") if p.is_file()}
    for name in names:
        if name.suffix == ".safetensors" and name.parent.name != "checkpoints" \
                or name.name == "predictions.jsonl":
            assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    logs = [[{k: v for k, v in json.loads(line).items()
              if k not in ("seconds", "examples_per_second")}
             for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (whole, parts)]
    assert logs[0] == logs[1]
    ends = [run_module.Run(folder).load_checkpoint()[0] for folder in (whole, parts)]
    assert ends[0].step == ends[1].step and all(
        torch.equal(t, ends[1].tensors[k]) for k, t in ends[0].tensors.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main("train", "--out", out, *FEW) == 0
    return out


# --------------------------------------------------------------------------------------------------
# faults inside the writer


class Faults:
    """Stands before and after the system calls of writing the n-th checkpoint, and acts at one."""

    def __init__(self, point, n, act):
        self.point, self.left, self.act = point, n, act

    def pass_by(self, point):
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                self.act()

    def install(self, patch):
        faults = self
        calls = {name: getattr(os, name) for name in ("fsync", "replace", "open", "unlink")}

        def of_checkpoints(descriptor, end=""):
            place = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor is not None else ""
            return "/checkpoints" in place and place.endswith(end)

        class Half:
            """A file whose write stops half-way."""

            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, content):
                self.file.write(content[:len(content) // 2])
                self.file.flush()
                faults.pass_by("half-written")
                self.file.write(content[len(content) // 2:])

        def open_at(path, flags, *more, dir_fd=None):
            ours = flags & os.O_EXCL and of_checkpoints(dir_fd)
            if ours:
                faults.pass_by("before open")
            descriptor = calls["open"](path, flags, *more, dir_fd=dir_fd)
            if ours:
                faults.pass_by("after open")
            return descriptor

        def open_(path, mode="r", *more, **options):
            file = open(path, mode, *more, **options)
            return Half(file) if mode == "w+b" and of_checkpoints(path) else file

        def fsync(fd):
            kind = "folder's fsync" if of_checkpoints(fd, "/checkpoints") else "fsync" \
                if of_checkpoints(fd) else ""
            faults.pass_by(f"before {kind}")
            calls["fsync"](fd)
            faults.pass_by(f"after {kind}")

        def replace(source, target, src_dir_fd=None, dst_dir_fd=None):
            kind = "replace" if of_checkpoints(dst_dir_fd) else ""
            faults.pass_by(f"before {kind}")
            calls["replace"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            faults.pass_by(f"after {kind}")

        def remove(path, *more, dir_fd=None):
            kind = "removal" if of_checkpoints(dir_fd) and path.endswith(".safetensors") else ""
            faults.pass_by(f"before {kind}")
            calls["unlink"](path, *more, dir_fd=dir_fd)
            faults.pass_by(f"after {kind}")

        patch(files, "open", open_)
        patch(os, "open", open_at)
        patch(os, "fsync", fsync)
        patch(os, "replace", replace)
        patch(os, "unlink", remove)


POINTS = ["before open", "after open", "half-written", "before fsync", "after fsync",
          "before replace", "after replace", "before folder's fsync", "after folder's fsync"]
# Every evaluated step is kept twice, before its evaluation and after: eight in all. Points meet the
# first and the last in turn.
CASES = [(point, (1, 8)[i % 2]) for i, point in enumerate(POINTS)] + [
    ("before removal", 1), ("after removal", 2)]


def victim(arguments, point, n):
    """A process of its own that SIGKILL meets at the point."""
    torch.set_num_threads(1)
    Faults(point, n, lambda: os.kill(os.getpid(), signal.SIGKILL)).install(setattr)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os._exit(promptprior.main(arguments))


def test_killed_inside_the_writer(tmp_path):
    """At every point of the first or the last checkpoint."""
    threads, alone = torch.get_num_threads(), tmp_path / "whole"
    torch.set_num_threads(1)  # as its victims
    try:
        assert main("train", "--out", alone, *FEW) == 0
        for case, (point, n) in enumerate(CASES):
            out = tmp_path / str(case)
            child = CONTEXT.Process(target=victim, args=(
                ["train", "--out", str(out), *FEW], point, n))
            child.start()
            child.join(60)
            assert child.exitcode == -signal.SIGKILL, (point, n)
            checkpoints = run_module.Run(out).checkpoints()
            assert point.startswith("before open") or not checkpoints or all(
                run_module.read_checkpoint(p) for p in checkpoints), (point, n)
            assert main("train", "--out", out, "--resume", *FEW) == 0, (point, n)
            same(alone, out)
            shutil.rmtree(out)
    finally:
        torch.set_num_threads(threads)


# A third of the combinations, each point and each error among them.
FAILURES = [(point, n, number) for i, point in enumerate(POINTS) for n in (1, 5)
            for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT)
            if "after" not in point and (i + n + number) % 3 == 0]
assert {point for point, _, _ in FAILURES} == {p for p in POINTS if "after" not in p}


@pytest.mark.parametrize("point, n, number", FAILURES)
def test_a_disk_that_fails(whole, tmp_path, monkeypatch, capsys, point, n, number):
    """One line, exit 1, no temporary, and the checkpoint before is good."""
    def fail():
        raise OSError(number, os.strerror(number))

    out = tmp_path / "run"
    with monkeypatch.context() as m:
        Faults(point, n, fail).install(lambda *a: m.setattr(*a, raising=False))
        assert main("train", "--out", out, *FEW) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("promptprior: error: ") and os.strerror(number) in error \
        and "/checkpoints/" in error
    assert not [p for p in out.rglob("*") if p.name.endswith((".tmp", ".lock"))]
    if n == 1:  # a run has begun when its first checkpoint is there
        assert not out.exists()
    else:
        assert "--resume" in error and run_module.Run(out).checkpoints()
        assert all(map(run_module.read_checkpoint, run_module.Run(out).checkpoints()))
    assert main("train", "--out", out, *["--resume"] * (n > 1), *FEW) == 0
    same(whole, out)


LIMITED = """  # promptprior.py, whose files have a largest size
import os, resource, sys
sys.path.insert(0, os.getcwd())
import promptprior
limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(promptprior.main(sys.argv[1:]))
"""


def test_a_full_disk(tmp_path):
    """A real limit on file sizes, met by the log in the middle of a run."""
    (tmp_path / "limited.py").write_text(LIMITED)
    program = HERE / "promptprior.py"
    few = [*FEW, "--tokens", "1", "--steps", "45", "--eval-every", "15"]
    assert Forked(program, "train", "--out", tmp_path / "a", *few).wait() == 0
    limit = (tmp_path / "a/metrics.jsonl").stat().st_size * 2 // 3
    assert limit > 1.2 * max(p.stat().st_size for p in (tmp_path / "a").rglob("*.safetensors"))
    found = Forked(tmp_path / "limited.py", "train", "--out", tmp_path / "b", *few, limit)
    assert found.wait() == 1
    error = found.err.strip().split("\n")[-1]
    assert "metrics.jsonl: cannot be written" in error and "--resume" in error \
        and "Traceback" not in found.err
    assert Forked(program, "train", "--out", tmp_path / "b", "--resume").wait() == 0
    same(tmp_path / "a", tmp_path / "b")


# --------------------------------------------------------------------------------------------------
# kills and signals from outside


@pytest.mark.parametrize("kills", [2])
def test_killed_at_random(tmp_path, kills):
    """SIGKILLs of the real program, as many to each of three runs, at random moments of its work;
    two at a time."""
    kinds = [["--prior", "fitted", "--prior-weight", "1"],
             ["--prior", "fitted", "--posterior", "sgld", "--particles", "2"],
             ["--posterior", "gaussian", "--deep-layers", "1", "--dtype", "bfloat16"]]

    def start(out, *arguments):
        return Forked(HERE / "promptprior.py", "train", "--out", out, *FEW, "--reference-rows",
                      "300", "--steps", "16", "--eval-every", "4", *arguments)

    def survive(i):
        whole, parts, rng = tmp_path / f"whole{i}", tmp_path / f"parts{i}", random.Random(i)
        done = start(whole, *kinds[i])
        assert done.wait() == 0, done.err
        killed = 0
        while killed < kills:
            child = start(parts, *kinds[i], *["--resume"] * parts.exists())
            while not (parts / "run.lock").exists() and child.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6))
            child.send_signal(signal.SIGKILL)
            if child.wait() == 0:  # it was done: from the start again
                same(whole, parts)
                shutil.rmtree(parts)
                continue
            killed += 1
        last = start(parts, *kinds[i], *["--resume"] * parts.exists())
        assert last.wait() == 0, last.err
        assert "taken over from process" in last.err or not killed
        same(whole, parts)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(survive, range(3)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_by_itself(tmp_path, number):
    child = Forked(HERE / "promptprior.py", "train", "--out", tmp_path / "b", *FEW, "--steps",
                   "400", "--eval-every", "200")
    while not (tmp_path / "b/metrics.jsonl").exists() or \
            (tmp_path / "b/metrics.jsonl").read_text().count('"train"') < 3:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait(60) == -number  # a shell sees 130 or 143
    error = child.err.strip().split("\n")[-1]
    step = int(re.search(r"after step (\d+) of 400", error)[1])
    assert signal.Signals(number).name in error and "--resume" in error
    assert run_module.Run(tmp_path / "b").load_checkpoint()[0].step == step
    assert not (tmp_path / "b/run.lock").exists()


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, capsys):
    """In a step that does not end; the checkpoint before is good."""
    original = train.answer_loss

    def stuck(*arguments):
        if len(list((tmp_path / "b/checkpoints").glob("*"))) > 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return original(*arguments)

    monkeypatch.setattr(train, "answer_loss", stuck)
    with pytest.raises(KeyboardInterrupt):
        train.command_train(commands.parse(["train", "--out", str(tmp_path / "b"), *FEW], "")[1])
    checkpoint, _ = run_module.Run(tmp_path / "b").load_checkpoint()
    assert checkpoint.step == 2
    assert all(torch.isfinite(t).all() for t in checkpoint.tensors.values())


def test_a_signal_while_another_is_reported_shows_no_traceback():
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import promptprior
def interrupt(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
promptprior.resolved = promptprior.say = interrupt
promptprior.main(["export", "none"])"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


# --------------------------------------------------------------------------------------------------
# two processes, no memory, no number


def test_one_process_a_run(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with run_module.Run(out).lock() as word:
        assert not word
        for more in (["--resume"], ["--overwrite", *FEW]):
            assert main("train", "--out", out, *more) == 2
            error = capsys.readouterr().err
            assert f"process {os.getpid()} on " in error and "another --out" in error
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    # Its owner is dead, so nobody locks it; it died before it cut off a longer name.
    (out / "run.lock").write_text("process 1 on elsewhere\nsewhere\n")
    half = [out / f".prompt.safetensors.77{files.UNFINISHED}",
            out / f"figures/.layer-00.svg.77{files.UNFINISHED}"]
    for path in half:
        path.write_bytes(b"half")
    mine = [out / ".notes.12.tmp", out / "prompts/.mine.tmp"]  # as an editor leaves them
    for path in mine:
        path.write_text("mine")
    with files.Folder(out / "figures") as folder, folder.replacing("curves.svg") as being_written:
        assert main("train", "--out", out, "--resume") == 0  # while a plot is under way
        being_written.write(b"whole")
    assert "taken over from process 1 on elsewhere, which is gone" in capsys.readouterr().err
    assert not (out / "run.lock").exists() and not any(path.exists() for path in half)
    assert all(path.exists() for path in mine)
    assert (out / "figures/curves.svg").read_bytes() == b"whole"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to"),
                                   MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory(whole, tmp_path, monkeypatch, capsys, error):
    calls, original = [], train.answer_loss

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return original(*arguments)

    with monkeypatch.context() as m:
        m.setattr(train, "answer_loss", loss)
        assert main("train", "--out", tmp_path / "b", *FEW) == 1
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert re.search(r"out of memory at step 4, in a batch of 2 questions with up to \d+ tokens",
                     said) and "--batch-size (now 2)" in said and "holds step 2" in said
    assert main("train", "--out", tmp_path / "b", "--resume") == 0
    same(whole, tmp_path / "b")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite(whole, tmp_path, monkeypatch, capsys, where):
    """Stops before the step, or leaves it out if allowed; no file ever holds it."""
    bad, original = {3}, train.answer_loss

    def loss(model, past, batch):
        summed, count = original(model, past, batch)
        if len([1 for m in run_module.Run(out).metrics() if m["split"] in (
                "train", "skipped")]) in bad:
            # a square root's slope at 0 is infinite, its value is not
            summed = summed * float("nan") if where == "loss" else \
                summed + (summed - summed.detach()).abs().sqrt()
        return summed, count

    monkeypatch.setattr(train, "answer_loss", loss)
    out = tmp_path / "stops"
    assert main("train", "--out", out, *FEW) == 1
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert "at step 4, learning rate" in said and "not finite" in said and "holds step 2" in said \
        and ("train-easy" in said or "arithmetic" in said)
    out = tmp_path / "skips"
    assert main("train", "--out", out, *FEW, "--skip-bad-steps", 1) == 0
    skipped = [m for m in run_module.Run(out).metrics() if m["split"] == "skipped"]
    assert len(skipped) == 1 and skipped[0]["step"] == 4 and len(skipped[0]["ids"]) == 2
    bad.add(4)
    out = tmp_path / "too many"
    assert main("train", "--out", out, *FEW, "--skip-bad-steps", 1) == 1
    for folder in ("stops", "skips", "too many"):
        for path in (tmp_path / folder).rglob("*.safetensors"):
            assert all(torch.isfinite(t).all() for t in load_file(path).values()), path


# --------------------------------------------------------------------------------------------------
# the same bytes


# Each prior in one of the two types, MAP on a fit and on a network in both.
RESUMED = [(prior, dtype) for i, prior in enumerate(sorted(PRIORS))
           for dtype in ("float32", "bfloat16")
           if prior in ("vae", "fitted") or (i + (dtype == "float32")) % 2 == 0]
assert {prior for prior, _ in RESUMED} == set(PRIORS)


@pytest.mark.parametrize("prior, dtype", RESUMED)
def test_every_prior_resumes_to_the_same_bytes(whole, tmp_path, monkeypatch, prior, dtype):
    few = [*FEW, "--prior", f"posterior:{whole}" if prior == "posterior" else prior, "--dtype",
           dtype, "--tokens", 3, "--reference-rows", 200, "--text", "a b c"]
    few += ["--prior-weight", 1] if PRIORS[prior].has_density else []
    assert main("train", "--out", tmp_path / "a", *few) == 0
    calls, original = [], train.answer_loss

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError  # as good as SIGKILL: nothing is caught
        return original(*arguments)

    with monkeypatch.context() as m:
        m.setattr(train, "answer_loss", loss)
        with pytest.raises(ZeroDivisionError):
            main("train", "--out", tmp_path / "b", *few)
    assert main("train", "--out", tmp_path / "b", "--resume") == 0
    same(tmp_path / "a", tmp_path / "b")


def test_a_config_begins_the_same_run(whole, tmp_path, capsys):
    config = json.loads((whole / "config.json").read_text())
    assert main("train", "--config", whole / "config.json", "--out", tmp_path / "b") == 0
    same(whole, tmp_path / "b")
    again = json.loads((tmp_path / "b/config.json").read_text())
    assert {**again["settings"], "out": 0} == {**config["settings"], "out": 0}
    assert main("train", "--config", whole / "config.json", "--seed", 1, "--out",
                tmp_path / "c") == 0
    assert (tmp_path / "c/prompt.safetensors").read_bytes() != \
        (whole / "prompt.safetensors").read_bytes()
    assert main("train", "--config", whole / "config.json", "--out", tmp_path / "b",
                "--resume") == 2
    assert main("train", "--config", tmp_path / "none.json", "--out", tmp_path / "d") == 2
    assert not (tmp_path / "d").exists()


def test_what_may_change_on_the_way(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    capsys.readouterr()
    assert main("train", "--out", out, "--resume", "--steps", 9, "--eval-every", 3) == 0
    said = capsys.readouterr().err
    assert "from step 6 on with --steps 9 instead of 6, --eval-every 3 instead of 2" in said
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["steps"] == 9 and config["changes"] == [
        {"step": 6, "steps": 9, "eval_every": 3}]
    steps = [m["step"] for m in run_module.Run(out).metrics() if m["split"] == "eval"]
    assert steps == [0, 2, 4, 6, 9]
    assert main("train", "--out", out, "--resume", "--steps", 5) == 2
    assert "step 9 already" in capsys.readouterr().err


def test_the_golden_master(tmp_path):
    """Numbers of this machine's kind, with room for another's."""
    assert main("train", "--prior", "xavier", "--steps", 20, "--eval-limit", 20, "--text", "",
                "--out", tmp_path / "run") == 0
    log = run_module.Run(tmp_path / "run").metrics()
    first, last = ([m for m in log if m["split"] == "eval"][i]["loss"] for i in (0, -1))
    assert first == pytest.approx(GOLDEN["first"], rel=1e-3)
    assert last == pytest.approx(GOLDEN["last"], rel=0.05)
    prediction = json.loads((tmp_path / "run/predictions.jsonl").read_text().split("\n")[0])
    assert (prediction["question"], prediction["prediction"]) == GOLDEN["prediction"]


GOLDEN = {"first": 0.61986, "last": 0.05933, "prediction": (
    "What is the name of the dog of Mitrovuth?", "Wodro")}


def test_what_is_ignored_stays_ignored(whole, tmp_path, monkeypatch):
    """As nohup asks: a terminal that closes does not stop the run."""
    original = train.answer_loss

    def loss(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return original(*arguments)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(train, "answer_loss", loss)
        assert main("train", "--out", tmp_path / "run", *FEW) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    same(whole, tmp_path / "run")


def test_snapshots_of_another_schedule_go(whole, tmp_path):
    """Killed after a snapshot and resumed to fewer steps: nothing of what was cut off stays."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints/000006.safetensors").unlink()
    assert run_module.Run(out).snapshots()[-1] == 6
    assert main("train", "--out", out, "--resume", "--steps", 5) == 0
    assert run_module.Run(out).snapshots() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("refused", ["fewer steps", "another run's checkpoint"])
def test_a_refused_resume_changes_nothing(whole, tmp_path, capsys, refused):
    """Of a run whose log and snapshots are ahead of its checkpoint."""
    out, last = tmp_path / "run", "checkpoints/000006.safetensors"
    shutil.copytree(whole, out)
    (out / last).write_bytes(b"damaged")  # so 000004 is the last
    if refused != "fewer steps":
        assert main("train", "--out", tmp_path / "other", *FEW, "--tokens", 2) == 0
        shutil.copy(tmp_path / "other" / last, out / last)
        (out / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes() * 2)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    steps, said = (3, "step 4 already") if refused == "fewer steps" else (9, "of another run")
    assert main("train", "--out", out, "--resume", "--steps", steps) == 2
    assert said in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("first, then", [
    ({"data": "math"}, {"data": "squad"}),
    ({"prior": "fitted"}, {"posterior": "sgld", "particles": 2}),
    ({"deep-layers": 2}, {"deep-layers": 0}), ({"prior": "interpolation"}, {"prior": "fitted"}),
    ({"deep-layers": 2}, {"deep-layers": 0, "method": "prefix"}),
    ({"method": "prefix", "prefix-layers": 2}, {"method": "prompt", "prefix-layers": 0}),
    ({}, {"steps": 3}), ({"prior": "fitted", "prior-weight": 3}, {"seed": 2})], ids=str)
def test_other_flags_over_a_config(tmp_path, first, then):
    """What nobody gave follows from the new flags, as it would without the config; what was given
    stays."""
    few = {"model": MODEL, "steps": 1, "eval-limit": 2, "batch-size": 2, "max-new": 2,
           "reference-rows": 100, "train-examples": 40}
    flags = lambda given: [x for flag, value in given.items() for x in (f"--{flag}", value)]
    source, direct, over = (tmp_path / name for name in ("source", "direct", "over"))
    assert main("train", "--out", source, *flags(few | first)) == 0
    assert main("train", "--out", direct, *flags(few | first | then)) == 0
    assert main("train", "--config", source / "config.json", "--out", over, *flags(then)) == 0
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (direct, over))
    assert {**one["settings"], "out": 0} == {**two["settings"], "out": 0}
    assert one["given"] == two["given"]


def test_a_clock_that_stands_still(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "perf_counter", lambda: 5.0)
    assert main("train", "--out", tmp_path / "b", *FEW) == 0
    same(whole, tmp_path / "b")


def test_an_evaluation_that_is_not_finite(tmp_path, monkeypatch, capsys):
    original = evaluation.answers

    def not_finite(*arguments):
        result = original(*arguments)
        return result._replace(loss=[float("nan") for _ in result.loss])

    monkeypatch.setattr(evaluation, "answers", not_finite)
    assert main("train", "--out", tmp_path / "run", *FEW) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "not finite in float32" in error and "--lr" in error


def test_a_folder_that_vanishes_or_cannot_be(tmp_path, monkeypatch, capsys):
    original, calls = train.answer_loss, []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(tmp_path / "run")
        return original(*arguments)

    with monkeypatch.context() as m:
        m.setattr(train, "answer_loss", loss)
        assert main("train", "--out", tmp_path / "run", *FEW) == 1
    (tmp_path / "file").write_text("mine")
    assert main("train", "--out", tmp_path / "file/run", *FEW) == 1
    os.mkfifo(tmp_path / "pipe")
    assert main("collect", "--out", tmp_path / "pipe", "--examples", 2, "--overwrite") in (1, 2)
    errors = [line for line in capsys.readouterr().err.split("\n") if "promptprior: " in line]
    assert len(errors) == 3 and "cannot be written: No such file" in errors[0] \
        and "train it again" in errors[0] \
        and "file" in errors[1] and "pipe" in errors[2]
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "pipe").is_fifo()
    assert not (tmp_path / "run").exists()
