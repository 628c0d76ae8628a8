"""A run's folder under attack: kills before every system call, links, files of other runs, damage,
several commands at once, and folders that are moved while a run trains."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import calls
import promptprior
from lab import adapters, files, train
from lab.console import UserError
from lab.figures import is_finished
from lab.folder import CONFIG, LAST_PROMPT, LOG, Run
from lab.settings import Settings, flat
from small import MODEL

FEW = ["--data", "math", "--prior", "isotropic", "--tokens", "3", "--batch-size", "2",
       "--eval-limit", "2", "--max-new", "2", "--steps", "4", "--eval-every", "2",
       "--train-examples", "20", "--model", str(MODEL)]


def main(*arguments):
    return promptprior.main([str(a) for a in arguments])


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(*arguments) == 2, arguments
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("promptprior: error: "), error
    return error


def everything(folder):
    """All files and links of a folder, and what they hold."""
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their seed alone."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        assert main("train", "--out", folder / str(seed), *FEW, "--seed", seed) == 0
    return folder


@pytest.fixture
def run(runs, tmp_path):
    shutil.copytree(runs / "0", tmp_path / "run")
    return tmp_path / "run"


# --------------------------------------------------------------------------------------------------
# nothing is lost


def test_a_run_without_checkpoints_is_not_begun_anew(run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoints")
    before = everything(run)
    error = refused(capsys, "train", "--out", run, "--resume", "--steps", 9)
    assert everything(run) == before
    # both remedies work
    prior = re.search(r"--prior (\S+)", error)[1]
    assert main("train", "--out", tmp_path / "next", *FEW, "--prior", prior) == 0
    torch.testing.assert_close(load_file(tmp_path / "next/prompts/000000.safetensors"),
                               load_file(run / LAST_PROMPT))
    again = re.search(r"train again by train (.*)", error)[1].split()
    assert main("train", *again) == 0
    assert (run / LAST_PROMPT).read_bytes() == before[LAST_PROMPT]
    # and where nothing would be lost it begins
    for name in ("checkpoints", "prompts"):
        shutil.rmtree(run / name)
    for name in (LOG, LAST_PROMPT):
        (run / name).unlink()
    assert main("train", "--out", run, "--resume") == 0
    assert (run / LAST_PROMPT).read_bytes() == before[LAST_PROMPT]


@pytest.mark.parametrize("lost", ["prompt.safetensors", "prompts"])
def test_a_lost_prompt_is_written_again(run, capsys, lost):
    before = everything(run)
    if lost == "prompts":
        shutil.rmtree(run / lost)
    else:
        (run / lost).unlink()
    command = "generate" if lost == LAST_PROMPT else "compare"
    assert "--resume" in refused(capsys, command, run, *["a"] * (command == "generate"))
    assert main("train", "--out", run, "--resume") == 0
    for name in (LAST_PROMPT, "prompts/000000.safetensors"):
        assert (run / name).read_bytes() == before[name]
    assert main("compare", run) == 0
    shutil.rmtree(run / "checkpoints")
    (run / LAST_PROMPT).unlink()
    assert "--overwrite" in refused(capsys, "generate", run, "a")


@pytest.mark.parametrize("name", [LAST_PROMPT, "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_missing(run, monkeypatch, capsys, name):
    original = Path.open

    def forbidden(path, *more, **options):
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *more, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    error = refused(capsys, "generate", run, "a")
    assert "Permission denied" in error and "no such file" not in error.lower()


# --------------------------------------------------------------------------------------------------
# kills: the old or the new, before every system call


needs_ptrace = pytest.mark.skipif(not calls.is_possible(), reason="no ptrace of x86_64 Linux here")


def an_import(run, rows, overwrite):
    """What `import` writes, without a model."""
    settings = Settings.from_flags({"tokens": len(rows), "steps": 0, "imported": f"of {len(rows)}"})
    config = {"settings": flat(settings.complete()), "sha256": {"model": "0"}, "threads": 1}
    with run.lock():
        train.check_new(run, overwrite)
        with run.beginning():
            for name in ("prompts/000000.safetensors", LAST_PROMPT):
                run.write_prompt(name, {"layers.0": rows}, settings.complete(), 0)
            run.write_json(CONFIG, config)


@needs_ptrace
def test_an_overwrite_leaves_the_old_run_or_the_new(run):
    """At every third call. Each is read as one run, and a killed command can be repeated."""
    (run / "notes.txt").write_text("mine")
    (run / "prompts/.mine").write_text("mine")
    old, new, copy = 3, torch.ones(5, 8), run.parent / "copy"
    seen, n, lived = set(), 0, False
    while not lived:
        shutil.copytree(run, copy)
        lived = calls.run(lambda: an_import(Run(copy), new, True), copy, n).status == 0
        found = Run(copy)
        if files.is_unfinished(copy) or (copy / files.LOCK).exists():
            with found.lock():
                pass  # as the next command does
        rows = len(found.tensors()["layers.0"])
        seen.add(rows)
        assert rows == found.settings().prior.tokens == len(
            found.tensors("prompts/000000.safetensors")["layers.0"])
        names = everything(copy)
        assert {"notes.txt", "prompts/.mine"} < names.keys()
        if rows == old:
            assert names == everything(run), n
        else:
            assert names.keys() == {CONFIG, LAST_PROMPT, "prompts/000000.safetensors", "notes.txt",
                                    "prompts/.mine"}, n
        an_import(found, new, True)
        shutil.rmtree(copy)
        n += 3
    assert seen == {3, 5} and n > 60


@needs_ptrace
def test_a_reader_finishes_what_a_killed_overwrite_began(run, capsys):
    new, copy, unfinished = torch.ones(5, 8), run.parent / "copy", 0
    for n in range(20, 120, 3):
        shutil.copytree(run, copy)
        calls.run(lambda: an_import(Run(copy), new, True), copy, n)
        unfinished += files.is_unfinished(copy)
        assert len(Run(copy).tensors()["layers.0"]) == Run(copy).settings().prior.tokens
        shutil.rmtree(copy)
    assert unfinished > 5


@needs_ptrace
def test_a_beginning_can_be_repeated(tmp_path):
    """A killed command that made a folder leaves none, beginnings, or all of it."""
    whole, n, lived = {"a.json": b"{}", "figures/b.svg": b"svg"}, 0, False

    def make():
        with files.new_folder(tmp_path / "made", "--out") as folder:
            for name, content in whole.items():
                folder.write(name, content)

    while not lived:
        lived = calls.run(make, tmp_path, n).status == 0
        try:
            make()
        except UserError as e:
            assert "exists" in str(e)
        made = everything(tmp_path / "made")
        made.pop(files.LOCK, None)  # of the dead; the next that holds the folder takes it
        assert made == whole, n
        shutil.rmtree(tmp_path / "made")
        n += 1
    assert n > 25


@needs_ptrace
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_keeps_the_old(run, number):
    """At every sixth call of an overwrite, and wherever it opens a folder, also to read: one error
    that names the file, and the old run or the new; what is said to be done is."""
    copy, new, before = run.parent / "copy", torch.ones(5, 8), everything(run)

    def work():
        try:
            an_import(Run(copy), new, True)
        except (OSError, ValueError) as e:
            assert os.strerror(number) in str(e) and str(copy) in str(e), e
            return 1

    shutil.copytree(run, copy)
    whole = calls.run(work, copy, reads=True)
    after = everything(copy)
    assert whole.status == 0 and len(whole.calls) > 100
    for n, call in enumerate(whole.calls):
        if n % 6 != number % 5 and not call.endswith("tmp/prompts"):
            continue
        shutil.rmtree(copy)
        shutil.copytree(run, copy)
        status = calls.run(work, copy, n, number).status
        left = everything(copy)
        left.pop(files.LOCK, None)
        rows = len(Run(copy).tensors()["layers.0"])
        assert status in (0, 1) and rows == Run(copy).settings().prior.tokens, call
        assert left == after if status == 0 else rows == 5 or left == before, call


# --------------------------------------------------------------------------------------------------
# links


@pytest.mark.parametrize("link", ["run.lock", LOG, LAST_PROMPT, CONFIG, "predictions.jsonl",
                                  "prompts", "checkpoints", "figures", "report.html",
                                  "figures/layer-00.svg", "prompts/000002.safetensors",
                                  "checkpoints/000004.safetensors"])
def test_nothing_is_written_through_a_link(run, tmp_path, capsys, link):
    """Of a run that goes on, is overwritten or drawn; its own folder may be a link."""
    outside = tmp_path / "outside"
    outside.mkdir()
    if (run / link).exists():
        shutil.move(run / link, outside / "it")
    else:
        (outside / "it").write_text("mine")
    (run / link).symlink_to(outside / "it")
    (tmp_path / "way").symlink_to(run)
    before = everything(outside)
    for command in (["train", "--resume", "--steps", "5", "--out"],
                    ["train", "--overwrite", *FEW, "--out"], ["plot"]):
        status = main(*command, tmp_path / "way")
        assert status in (0, 1, 2) and everything(outside) == before, command
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert status == 0 or "a link" in error or "not a regular file" in error, error
    assert (tmp_path / "way").is_symlink()


@pytest.mark.parametrize("name", [files.MADE, files.MOVING])
def test_a_link_is_no_run_to_be_finished(runs, run, name):
    """Nor does it stand in the way of the next one to be made."""
    before, other = everything(run), everything(runs / "1")
    (run / name).symlink_to(runs / "1")
    assert main("compare", run) == 0 and main("train", "--out", run, "--resume") == 0
    (run / name).symlink_to(runs / "1")
    shutil.copytree(run, run.parent / "copy", symlinks=True)
    an_import(Run(run.parent / "copy"), torch.ones(5, 8), True)
    assert Run(run.parent / "copy").settings().imported
    assert everything(runs / "1") == other
    (run / name).unlink()
    assert everything(run).keys() == before.keys()
    assert (run / LAST_PROMPT).read_bytes() == before[LAST_PROMPT]


@pytest.mark.parametrize("name", ["prompts", LAST_PROMPT, CONFIG])
def test_what_stands_in_the_way_is_found_before_the_old_goes(tmp_path, name):
    """A folder of the user's with a file's name, or a file with a folder's."""
    run, mine = Run(tmp_path / "run"), tmp_path / "run" / name
    an_import(run, torch.ones(3, 8), False)
    shutil.rmtree(mine) if mine.is_dir() else mine.unlink()
    if name == "prompts":
        mine.write_text("mine")
    else:
        mine.mkdir()
        (mine / "notes").write_text("mine")
    before = everything(run.path)
    with pytest.raises((OSError, UserError), match=name):
        with run.lock(), run.beginning():
            for file in (CONFIG, LAST_PROMPT, "prompts/000000.safetensors"):
                run.write(file, b"new")
    assert everything(run.path) == before


@pytest.mark.parametrize("command", [["--resume", "--steps", "5"], ["--overwrite", *FEW]])
@pytest.mark.parametrize("name, kind", [
    (LAST_PROMPT, "link"), ("predictions.jsonl", "pipe"), ("figures/layer-00.svg", "folder"),
    ("checkpoints/000004.safetensors", "folder"), ("figures", "pipe"), ("prompts", "file")])
def test_what_cannot_be_replaced_is_found_before_training(run, capsys, command, name, kind):
    """Also what is written last, long after the first step."""
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    {"link": lambda: path.symlink_to("/dev/null"), "pipe": lambda: os.mkfifo(path),
     "folder": path.mkdir, "file": path.touch}[kind]()
    before = everything(run)
    assert main("train", "--out", run, *command) in (1, 2)
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert str(path) in error and ("move it away" in error or "a link" in error), error
    assert everything(run) == before


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_what_stands_in_the_place_of_the_figures_is_named(run, capsys, kind):
    shutil.rmtree(run / "figures")
    {"file": Path.touch, "pipe": os.mkfifo}[kind](run / "figures")
    before = everything(run)
    error = refused(capsys, "plot", run)
    assert f"{run / 'figures'}: not a folder" in error and "move it away" in error
    assert everything(run) == before


@pytest.mark.parametrize("inside", [None, "notes.txt"])
def test_a_folder_that_holds_no_run_replaces_none(run, inside):
    """Of the name of new files that wait for the old ones to go."""
    (run / files.MADE).mkdir()
    before = everything(run)
    if inside:
        (run / files.MADE / inside).write_text("mine")
    assert main("generate", run, "Who?") == 0
    assert everything(run) == before and not (run / files.MADE).exists()


def test_a_refused_command_clears_what_a_killed_one_left(run, tmp_path, capsys):
    """Killed after its file had its name, and before it lost the temporary one."""
    half = tmp_path / f".log.csv.77{files.UNFINISHED}"
    assert main("export", run, "--csv", tmp_path / "log.csv") == 0
    os.link(tmp_path / "log.csv", half)
    assert "exists" in refused(capsys, "export", run, "--csv", tmp_path / "log.csv")
    assert not half.exists() and (tmp_path / "log.csv").exists()
    with files.replacing(tmp_path / "log.csv"):  # of one that lives
        assert "exists" in refused(capsys, "export", run, "--csv", tmp_path / "log.csv")
        assert len(list(tmp_path.glob(f".log.csv.*{files.UNFINISHED}"))) == 1
    (tmp_path / "loop").symlink_to("loop")
    assert "a link" in refused(capsys, "export", run, "--csv", tmp_path / "loop")


def test_a_page_elsewhere_replaces_only_a_page(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "thesis.tex")
    assert "exists" in refused(capsys, "plot", run, "--out", tmp_path / "thesis.tex")
    assert "only a page" in refused(capsys, "plot", run, "--out", tmp_path / "thesis.tex",
                                    "--overwrite")
    assert "a link" in refused(capsys, "plot", run, "--out", tmp_path / "link")
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert main("plot", run, "--out", tmp_path / "page.html") == 0
    assert "--overwrite" in refused(capsys, "plot", run, "--out", tmp_path / "page.html")

    # of a run that may only be read
    shutil.rmtree(run / "figures")
    original = os.mkdir

    def read_only(path, *more, **options):
        if path == "figures":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", read_only)
    assert main("plot", run, "--out", tmp_path / "page.html", "--overwrite") == 0
    assert "left out" in capsys.readouterr().err and not (run / "figures").exists()
    assert main("plot", run) == 1


# --------------------------------------------------------------------------------------------------
# files of other runs, and damage


@pytest.mark.parametrize("name, step", [
    (LAST_PROMPT, []), (CONFIG, []), ("prompts/000000.safetensors", []),
    ("prompts/000002.safetensors", ["--step", 2])])
def test_files_of_another_run_are_noticed(runs, run, capsys, name, step):
    shutil.copy(runs / "1" / name, run / name)
    for command in ("compare", "plot"):
        assert "of another run" in refused(capsys, command, run, *step)


def test_prompts_of_other_steps_are_noticed(run, capsys):
    last, early = run / LAST_PROMPT, run / "prompts/000002.safetensors"
    kept = last.read_bytes()
    shutil.copy(early, last)
    error = refused(capsys, "generate", run, "a")
    assert "the prompt of step 2, while metrics.jsonl has scored step 4" in error
    assert "--resume" in error and main("train", "--out", run, "--resume") == 0
    assert last.read_bytes() == kept
    shutil.copy(last, early)
    assert "the prompt of step 4" in refused(capsys, "generate", run, "a", "--step", 2)


def test_checkpoints_of_another_run_change_nothing(runs, run, capsys):
    """Refused before the log is cut; taken away, the run goes on."""
    for path in (run / "checkpoints").iterdir():
        shutil.copy(runs / "1/checkpoints" / path.name, path)
    before = everything(run)
    assert "of another run" in refused(capsys, "train", "--out", run, "--resume", "--steps", 9)
    assert everything(run) == before
    # A log of another run, with the checkpoints of this one
    for path in (run / "checkpoints").iterdir():
        shutil.copy(runs / "0/checkpoints" / path.name, path)
    shutil.copy(runs / "1" / LOG, run / LOG)
    before = everything(run)
    assert "not the log" in refused(capsys, "train", "--out", run, "--resume", "--steps", 9)
    assert everything(run) == before


def test_files_whose_checksums_are_right_and_whose_numbers_do_not_fit(run, capsys):
    """As who means harm would write them: layers of one snapshot, the optimiser's numbers."""
    about = Run(run)
    first, settings = about.tensors("prompts/000000.safetensors"), about.settings()
    about.write_prompt("prompts/000000.safetensors", {"layers.1": first["layers.0"]}, settings, 0)
    for command in ("compare", "plot"):
        assert "not of one run" in refused(capsys, command, run)
    about.write_prompt("prompts/000000.safetensors", first, settings, 0)
    checkpoint, _ = about.load_checkpoint()
    more = ["train", "--out", run, "--resume", "--steps", 5]
    kinds = {key.split(".")[0]: key for key in checkpoint.tensors}
    assert kinds.keys() == {"rows", "step", "exp_avg", "exp_avg_sq"}
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        tensors = {key: t for key, t in checkpoint.tensors.items() if key != kinds[kind]}
        about.save_checkpoint(4, tensors, False, settings)
        assert "what the optimiser keeps" in refused(capsys, *more)
    tensors = {**checkpoint.tensors, kinds["step"]: torch.tensor(float("nan"))}
    about.save_checkpoint(4, tensors, False, settings)
    assert main(*more) == 0 and "not finite" in capsys.readouterr().err


def test_flipped_bits_are_noticed(run):
    """Anywhere in the numbers of a prompt, and in its metadata but for its name."""
    r, path = random.Random(18), run / LAST_PROMPT
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    kept = Run(run).tensors()
    for i in range(60):
        damaged = bytearray(content)
        place = r.randrange(start, len(content)) if i % 2 else r.randrange(8, start)
        damaged[place] ^= 1 << r.randrange(8)
        path.write_bytes(damaged)
        try:
            found = Run(run).tensors()
        except UserError:
            continue
        # What is left is the name of the metadata: the numbers are the run's.
        assert not i % 2 and all(torch.equal(t, found[key]) for key, t in kept.items())


def test_runs_of_early_versions_open(run, capsys):
    """Their prompts and checkpoints do not say whose they are, and settings may be missing."""
    config = json.loads((run / CONFIG).read_text())
    del config["settings"]["place"], config["settings"]["share"]
    (run / CONFIG).write_text(json.dumps(config))
    for path in (run / LAST_PROMPT, *(run / "prompts").iterdir()):
        save_file(load_file(path), path, {"settings": "{}"})
    opened = Run(run)
    for path in opened.checkpoints():
        from lab.folder import digest_of, read_checkpoint

        checkpoint = read_checkpoint(path)
        state = {"step": checkpoint.step, "metrics_bytes": checkpoint.metrics_bytes,
                 "due": checkpoint.due}
        path.write_bytes(save(checkpoint.tensors, {
            "state": json.dumps(state), "sha256": digest_of(checkpoint.tensors, state)}))
    assert main("compare", run) == 0 and main("plot", run) == 0
    assert "4 steps" in (run / "figures/layer-00.svg").read_text()
    (run / "checkpoints/000004.safetensors").unlink()  # to write prompts that say whose they are
    assert main("train", "--out", run, "--resume") == 0 and main("compare", run) == 0
    assert main("train", "--out", run, "--resume", "--steps", 6) == 0
    assert main("compare", run) == 0


def test_a_run_killed_between_prompt_and_log_is_not_finished(run):
    """Nor between log and prompt, as early versions wrote them."""
    assert is_finished(Run(run), 4)
    lines = (run / LOG).read_text().splitlines(keepends=True)
    (run / LOG).write_text("".join(line for line in lines if '"eval"' not in line
                                   or json.loads(line)["step"] < 4))
    assert not is_finished(Run(run), 4)
    assert Run(run).last_step() == 4 and Run(run).last_scored() == 2
    (run / LOG).write_text("".join(lines))
    save_file(load_file(run / "prompts/000002.safetensors"), run / LAST_PROMPT)
    assert Run(run).last_step() == 4  # of an early prompt only the log tells


# --------------------------------------------------------------------------------------------------
# several at once


def at_once(count, work):
    """How many of several processes that do this work at the same time come to a good end."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)

    def child():
        barrier.wait()
        try:
            work()
        except (UserError, OSError):
            os._exit(2)
        except BaseException:
            os._exit(1)
        os._exit(0)

    children = [context.Process(target=child) for _ in range(count)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    ends = [process.exitcode for process in children]
    assert set(ends) <= {0, 2}, ends
    return ends.count(0)


def test_of_several_at_once_one_makes_it(tmp_path):
    """A run, a folder, a file."""
    def folder(place):
        with files.new_folder(place, "--to") as made:
            made.write("a.json", str(os.getpid()).encode())
            made.write("b.json", str(os.getpid()).encode())

    for i in range(5):
        place = tmp_path / str(i)
        assert at_once(6, lambda: an_import(Run(place), torch.ones(2, 8), False)) == 1
        assert sorted(everything(place)) == [CONFIG, LAST_PROMPT, "prompts/000000.safetensors"]
        place = tmp_path / f"folder{i}"
        assert at_once(6, lambda: folder(place)) == 1
        assert len(set(everything(place).values())) == 1 and len(everything(place)) == 2
        place = tmp_path / f"file{i}"
        assert at_once(6, lambda: files.write_file(place, b"x" * 10000, is_new=True)) == 1
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(files.UNFINISHED)]


def test_a_run_that_another_process_made_meanwhile_stays(tmp_path, monkeypatch, capsys):
    """It is looked for again under the lock."""
    out, original = tmp_path / "run", Run.lock

    def late(self):
        if not out.exists():
            with monkeypatch.context() as m:
                m.setattr(Run, "lock", original)
                an_import(Run(out), torch.ones(2, 8), False)
        return original(self)

    monkeypatch.setattr(Run, "lock", late)
    assert "exists" in refused(capsys, "train", "--out", out, *FEW)
    assert len(Run(out).tensors()["layers.0"]) == 2


# --------------------------------------------------------------------------------------------------
# the folder while a run trains


@pytest.mark.parametrize("what", ["moved", "replaced", "removed", "gutted"])
def test_the_folder_goes_while_a_run_trains(runs, tmp_path, monkeypatch, capsys, what):
    """One line, and what was learned is kept where the folder went."""
    out, away, calls, original = tmp_path / "run", tmp_path / "away", [], train.answer_loss

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 3:
            if what == "moved":
                out.rename(away)
            elif what == "replaced":
                out.rename(away)
                shutil.copytree(runs / "1", out)
            elif what == "removed":
                shutil.rmtree(out)
            else:
                for path in (CONFIG, LOG):
                    (out / path).unlink()
        return original(*arguments)

    monkeypatch.setattr(train, "answer_loss", loss)
    assert main("train", "--out", out, *FEW) == 1
    monkeypatch.undo()
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("promptprior: error: ") and str(out) in error
    if what == "removed":
        assert not out.exists() and "train it again" in error
    elif what == "gutted":
        assert LOG in error and (out / LAST_PROMPT).exists() and not (out / LOG).exists()
    else:
        assert f"--out {away} --resume" in error
        assert what == "moved" and not out.exists() or everything(out) == everything(runs / "1")
        assert main("train", "--out", away, "--resume") == 0
        assert (away / LAST_PROMPT).read_bytes() == (runs / "0" / LAST_PROMPT).read_bytes()


# --------------------------------------------------------------------------------------------------
# smaller


def test_a_table_holds_no_formulas():
    lines = [{"step": 1, "split": "eval", "=HYPERLINK(1)": "@SUM(1)", "loss": -0.5}]
    assert adapters.to_csv(lines) == \
        "step,split,'=HYPERLINK(1),loss\n1,eval,'@SUM(1),-0.5\n"


def test_a_name_that_changes_the_direction_of_writing(runs, tmp_path):
    out = tmp_path / "run\u202egvs"
    shutil.copytree(runs / "0", out)
    assert main("plot", out) == 0
    for path in (out / "figures").iterdir():
        assert "\u202e" not in path.read_text()


def test_the_hub_is_not_asked_for_what_an_adapter_names(tmp_path, monkeypatch, capsys):
    from lab import hub

    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *names: asked.append(names) or 1 / 0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"prompt_embeddings": torch.zeros(3, 192)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3,
        "base_model_name_or_path": "stranger/model"}))
    error = refused(capsys, "import", folder, "--out", tmp_path / "run")
    assert "--model stranger/model" in error and not asked
    with pytest.raises(ZeroDivisionError):
        main("import", folder, "--out", tmp_path / "run", "--model", "stranger/model")
    assert not (tmp_path / "run").exists()


def test_a_file_is_hashed_once_a_process_until_it_changes(tmp_path, monkeypatch):
    file, hashed = tmp_path / "model.safetensors", []
    file.write_bytes(b"one")
    digest, now = files.hashlib.file_digest, files.time.time_ns
    monkeypatch.setattr(files.hashlib, "file_digest",
                        lambda f, kind: hashed.append(f.name) or digest(f, kind))
    first = files.checksum([file])
    # It may change within a tick of the clock
    assert files.checksum([file]) == first and len(hashed) == 2
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + 10**10)
    assert {files.checksum([file]) for _ in range(4)} == {first} and len(hashed) == 3
    file.write_bytes(b"two")
    second = files.checksum([file])
    assert second != first and files.checksum([file]) == second and len(hashed) == 4
    (tmp_path / "other").write_bytes(b"one")
    os.replace(tmp_path / "other", file)
    assert files.checksum([file]) == first and len(hashed) == 5
    file.unlink()
    with pytest.raises(UserError, match="restore it"):
        files.checksum([file])


def test_runs_of_one_model_hash_it_once(runs, monkeypatch, capsys):
    hashed, digest, now = [], files.hashlib.file_digest, files.time.time_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + 10**10)
    files._sum_of.cache_clear()
    monkeypatch.setattr(files.hashlib, "file_digest",
                        lambda f, kind: hashed.append(Path(f.name).name) or digest(f, kind))
    assert main("compare", runs / "0", runs / "1") == 0
    assert hashed.count("model.safetensors") == 1


def test_a_log_is_read_once_until_it_grows(run, monkeypatch):
    now, log = files.time.time_ns, run / LOG
    monkeypatch.setattr(files.time, "time_ns", lambda: now() + 10**10)
    opened, read = Run(run), []
    parse = Run._read_log
    monkeypatch.setattr(Run, "_read_log", lambda self, path: read.append(path) or parse(self, path))
    lines = opened.metrics()
    lines.pop()  # the caller's own
    assert opened.metrics() == Run(run).metrics() != lines and len(read) == 2
    with log.open("a") as f:
        f.write(json.dumps({"split": "train", "step": 5, "loss": 1.0}) + "\n")
    assert opened.metrics()[-1]["step"] == 5 and len(read) == 3
    assert main("plot", run) == 0 and len(read) == 4
