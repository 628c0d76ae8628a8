"""Grids of runs in any number of processes: the command sweep.

    plan, shared = open_plan(options, grids)
    work(plan, shared)                          # runs that no other process has, to their ends

DIR/plan.json is written first: the runs by name, each with its flags of train. DIR/runs/NAME are
ordinary runs, with the bytes that train gives. Nothing schedules: a process takes the first run
that has not ended and whose lock is free. So processes on all machines that share the folder may
take part, and a run of one that died is gone on with by another. DIR/failed/NAME.txt says why a run
failed. plan.py makes the runs of a grid, sweep_table.py compares what they came to.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import torch

import data
from lab.beginning import read_inputs
from lab.commands import SweepOptions
from lab.console import Diverged, Stopped, UserError, one_line, say
from lab.files import SMALL, Folder, Locked, NotWritten, check_folder, write_file
from lab.folder import CONFIG, Run
from lab.inputs import Shared
from lab.plan import DIVERGED, Plan, cell_key, make_runs, rate_of, read_grids, read_plan
from lab.processes import raise_signals, use_threads
from lab.settings import from_flags
from lab.sweep_table import show_table
from lab.train import train_run

MARGIN = 2.0  # points
PROGRAM = Path(__file__).resolve().parent.parent / "promptprior.py"


# --------------------------------------------------------------------------------------------------
# the beginning


def open_plan(options: SweepOptions, grids: list[dict[str, list]]) -> tuple[Plan, Shared]:
    """The plan of a sweep, written if it begins now, and what was read to check it. Raises
    UserError for settings with which no run could begin, before anything is written."""
    if None not in (options.folder, options.out):
        raise UserError(f"{options.folder} and --out {options.out}: a sweep has one folder: give "
                        "one of the two")
    if options.folder is None and options.out is None:
        raise UserError("sweep: give --out DIR and what to vary, as in --prior vocab fitted --seed "
                        "0 1 2, or the DIR of a sweep to go on with")
    folder, shared = Path(options.folder or options.out), Shared()
    path, runs = folder / "plan.json", make_runs(grids)
    if runs and not path.exists():
        # Another process may be writing the same plan at this moment.
        if not Run(folder).empty and not path.exists():
            raise UserError(f"{folder} exists, and is no sweep: choose another --out")
        plan = Plan(folder, runs, max(1, torch.get_num_threads() // options.jobs),
                    options.margin or MARGIN)
        check_inputs(plan, shared)
        content = json.dumps({"margin": plan.margin, "threads": plan.threads, "runs": runs},
                             indent=1, ensure_ascii=False) + "\n"
        try:
            write_file(path, content.encode(), is_new=True)
        except NotWritten:
            if not path.exists():  # else another process was first, and its plan is that of all
                raise
    plan = read_plan(path)
    if runs and plan.runs != runs:
        raise UserError(f"{path}: a plan of other runs than these: choose another --out, or go on "
                        f"with it by: sweep {folder}")
    return plan, shared


def check_inputs(plan: Plan, shared: Shared) -> None:
    """Read what runs begin with, once for those that differ in rate and seed alone. Raises
    UserError and the like for what would be wrong with a run."""
    checked = set()
    for name, flags in plan.runs.items():
        if cell_key(flags) not in checked:
            checked.add(cell_key(flags))
            read_inputs(plan.run(name), plan.settings(name), None, False, shared)


# --------------------------------------------------------------------------------------------------
# the work


def work(plan: Plan, shared: Shared) -> None:
    """Train runs until every one has ended, or is another process's. Raises Stopped on a signal."""
    finished: set[str] = set()
    while any(take(plan, name, shared, finished) for name in plan.runs if name not in finished):
        pass  # a run that another process had may be free now


def take(plan: Plan, name: str, shared: Shared, finished: set[str]) -> bool:
    """Train a run to its end, from where it stands -> whether there was anything to do here."""
    if plan.failure(name).exists():
        return False
    run = plan.run(name)
    try:
        with run.lock() as remark:
            if remark:
                say(remark)
            try:
                if plan.is_finished(name):
                    plan.check_flags(name)
                    finished.add(name)
                    return False
                say(f"\nrun {list(plan.runs).index(name) + 1} of {len(plan.runs)}: {name}")
                with contextlib.redirect_stdout(sys.stderr):  # the table alone is the answer
                    train_or_resume(plan, name, run, shared)
                finished.add(name)
            except Exception as e:
                if isinstance(e, Stopped) and e.status < 0:
                    raise Stopped(f"{e}; with all runs of it: sweep {plan.folder}", e.status) from e
                kind = "" if isinstance(e, (ValueError, OSError, Stopped)) \
                    else f"{type(e).__name__}: "
                reason = one_line(f"{DIVERGED}: {e.what}" if isinstance(e, Diverged)
                                  else f"{kind}{e}")
                say(f"{name} failed: {reason}")
                write_file(plan.failure(name), f"{reason}\n".encode())
    except Locked:
        return False
    return True


def train_or_resume(plan: Plan, name: str, run: Run, shared: Shared) -> None:
    """Train a run whose lock is held. Its bytes are those of `train` with as many threads."""
    flags = plan.runs[name]
    use_threads(plan.threads)
    if not (run.path / CONFIG).exists():
        train_run(run, plan.settings(name), None, sorted(flags), shared)
        return
    plan.check_flags(name)
    train_run(run, run.settings(), run.config(), None, shared)


@contextlib.contextmanager
def helpers(plan: Plan, count: int) -> Iterator[None]:
    """So many other processes at the same sweep, which speak to files. At the end this one waits
    for theirs; if it is stopped, they are too."""
    processes = []
    with raise_signals(f"go on by: sweep {plan.folder}"):
        try:
            for i in range(count):
                name = f"jobs/{i + 2}.txt"
                with Folder(plan.folder) as folder:
                    folder.write(name, b"")
                    log = folder.open(name, os.O_WRONLY)
                with log:
                    processes.append(subprocess.Popen(
                        [sys.executable, str(PROGRAM), "sweep", str(plan.folder)],
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            yield
            for process in processes:
                process.wait()
        except BaseException:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
            raise


# --------------------------------------------------------------------------------------------------
# the command


def command_sweep(given: dict) -> None:
    options = from_flags(SweepOptions, given)
    flags = {name.removeprefix("grid."): values for name, values in given.items()
             if name.startswith("grid.")}
    grids = read_grids(options.grid) if options.grid else [{}]
    plan, shared = open_plan(options, [{**grid, **flags} for grid in grids])
    margin = options.margin or plan.margin
    if margin != plan.margin:
        say(f"--margin {margin:g}: the sweep began with {plan.margin:g}, and a margin that is "
            "chosen after its scores may be seen tests nothing")
    if not options.table:
        for name in ("runs", "failed"):
            check_folder(plan.folder / name)
    if options.retry:
        for name in plan.runs:
            plan.failure(name).unlink(missing_ok=True)
    if not options.table:
        with helpers(plan, options.jobs - 1):
            work(plan, shared)
        work(plan, shared)  # what a helper that was killed left

    failed = {name: one_line(data.read_text(path, SMALL)) for name in plan.runs
              if (path := plan.failure(name)).exists()}
    for name, reason in failed.items():
        say(f"failed: {name}: {reason}")
    finished = plan.finished()
    left = len(plan.runs) - len(finished) - len(failed)
    if left:
        say(f"{left} of {len(plan.runs)} runs have not ended: sweep {plan.folder} goes on with "
            "those that no other process trains; with --table it shows the others")
    if finished and (options.table or not left):  # of several processes the last one shows it
        show_table(plan, finished, margin)
    # That a rate diverged is an answer, if all runs at another rate of its cell ended.
    lost = {place_of(plan.runs[name]) for name in failed}
    answered = {place[0] for name in finished if (place := place_of(plan.runs[name])) not in lost}
    unanswered = [name for name, reason in failed.items() if not (
        reason.startswith(DIVERGED) and cell_key(plan.runs[name]) in answered)]
    if unanswered and not options.table:
        only_diverged = all(failed[name].startswith(DIVERGED) for name in unanswered)
        remedy = ("give lower rates, or --skip-bad-steps, in another --out" if only_diverged else
                  f"mend what is wrong, then try them by: sweep {plan.folder} --retry")
        raise Stopped(f"{plan.folder}: {len(failed)} of {len(plan.runs)} runs failed, see above: "
                      f"{remedy}", 1)


def place_of(flags: dict) -> tuple:
    """A run's cell and rate."""
    return cell_key(flags), rate_of(flags)
