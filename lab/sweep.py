"""Grids of runs in any number of processes, and what they show: the command sweep.

    plan, shared = open_plan(options, grids)
    work(plan, shared)                          # runs that no other process has, to their ends

DIR/plan.json is written first: the runs by name, each with its flags of train. DIR/runs/NAME are
ordinary runs, with the bytes that train gives. Nothing schedules: a process takes the first run
that has not ended and whose lock is free. So processes on all machines that share the folder may
take part, and a run of one that died is gone on with by another. DIR/failed/NAME.txt says why a run
failed. sweep_table.py compares what the runs came to.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

import data
from lab.commands import NOT_IN_GRIDS, SweepOptions, resolved
from lab.console import Stopped, UserError, one_line, say
from lab.files import free_place, reading, write_file
from lab.folder import Locked, Run
from lab.inputs import Shared
from lab.settings import (FIELDS, DataSettings, ModelSettings, Settings, flag_name, flat,
                          from_flags, is_value, prior_name, spec_name, value_type)
from lab.train import differences, read_inputs, train_run

MARGIN = 2.0  # points
MOST = 10_000  # runs
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,200}")  # of a run
PROGRAM = Path(__file__).resolve().parent.parent / "promptprior.py"


class Plan(NamedTuple):
    folder: Path
    runs: dict[str, dict]  # by name, the flags of train that were given
    threads: int  # of every process, whatever their number: others would change last digits
    margin: float  # points within which scores count as equal

    def run(self, name: str) -> Run:
        return Run(self.folder / "runs" / name)

    def settings(self, name: str) -> Settings:
        out = {"out": str(self.run(name).path)}
        return Settings.from_flags({**self.runs[name], **out}).complete()

    def failure(self, name: str) -> Path:
        """The file that says why a run failed, if it did."""
        return self.folder / "failed" / f"{name}.txt"

    def is_finished(self, name: str) -> bool:
        """Whether a run has all that training writes, the pictures of its layers last."""
        run, settings = self.run(name), self.settings(name)
        if not (run.path / "prompt.safetensors").exists():
            return False
        last = [line["split"] for line in run.metrics() if line.get("step") == settings.train.steps]
        wanted = {"eval", "held_out"} if settings.data.hold_out else {"eval"}
        figures = [run.path / f"figures/layer-{i:02d}.svg" for i in run.prompt().layers]
        return wanted <= set(last) and all(figure.exists() for figure in figures)


# --------------------------------------------------------------------------------------------------
# the plan


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
        free_place(folder, "--out", is_folder=True)
        plan = Plan(folder, runs, max(1, torch.get_num_threads() // options.jobs),
                    options.margin or MARGIN)
        check_inputs(plan, shared)
        write_file(path, (json.dumps({"margin": plan.margin, "threads": plan.threads, "runs": runs},
                                     indent=1, ensure_ascii=False) + "\n").encode())
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
        others = json.dumps({**flags, "lr": None, "seed": None})
        if others not in checked:
            checked.add(others)
            read_inputs(plan.run(name), plan.settings(name), None, False, shared)


def read_plan(path: Path) -> Plan:
    if not path.exists():
        raise UserError(f"{path.parent}: no {path.name}, so no sweep is here: give the folder of "
                        "one, or --out and what to vary")
    content = data.read_json(path, dict)
    with reading(path, "a sweep's plan", "restore it, or begin another in another --out"):
        plan = Plan(path.parent, content["runs"], content["threads"], content["margin"])
        if type(plan.threads) is not int or not 0 < plan.threads <= 1024:
            raise ValueError(f"threads {plan.threads!r:.80}")
        if type(plan.margin) not in (int, float) or not 0 < plan.margin < math.inf:
            raise ValueError(f"margin {plan.margin!r:.80}")
        for name, flags in plan.runs.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"a run {name!r:.80}")
            check_values(flags)
            plan.settings(name)
    return plan


def read_grids(path: str) -> list[dict[str, list]]:
    """The grids of a JSON file: {name: value or list of values}, or a list of these."""
    content = data.read_json(path)
    grids = content if isinstance(content, list) else [content]
    for grid in grids:
        if not isinstance(grid, dict):
            raise UserError(f"{path}: {grid!r:.80}: expected {{name of a flag: values}}")
        for name, value in grid.items():
            # A list is one value of --reference and --text, several of others.
            is_list = isinstance(value, list)
            if name in FIELDS and value_type(FIELDS[name]) is tuple:
                is_list = is_list and all(isinstance(v, list) for v in value)
            grid[name] = value if is_list else [value]
            for v in grid[name]:
                with reading(path, "a grid", "write names and values as in a run's config.json"):
                    check_values({name: v})
    return grids


def check_values(flags: dict) -> None:
    """Raises ValueError for what is no flag of train, or no value of it. None stands for its
    default."""
    for name, value in flags.items():
        if name not in FIELDS or name in NOT_IN_GRIDS:
            raise ValueError(f"there is no setting {name!r:.80}")
        if value is not None and not is_value(FIELDS[name], value):
            raise ValueError(f"{name} is {value!r:.80}")


def make_runs(grids: list[dict[str, list]]) -> dict[str, dict]:
    """The runs of all grids by name, each with its flags."""
    if sum(math.prod(map(len, grid.values())) for grid in grids) > MOST:
        raise UserError(f"more than {MOST} runs: give fewer values, or several sweeps")
    runs = []
    for grid in filter(None, grids):
        names = sorted(grid, key=_place)
        for values in product(*(grid[name] for name in names)):
            flags = resolved({n: value for n, value in zip(names, values) if value is not None})
            settings = flat(Settings.from_flags(flags).complete())  # with paths that are absolute
            flags = {name: settings[name] for name in flags}
            if flags not in runs:
                runs.append(flags)
    # The best of several rates is chosen by questions that are neither trained on nor evaluated.
    if len({flags.get("lr") for flags in runs}) > 1:
        runs = [{**flags, "hold_out": True} for flags in runs]
    return dict(zip(run_names(runs), runs))


def _place(name: str) -> tuple[int, int]:
    """Where a setting stands in the order of loops. Runs that share most follow each other, and all
    cells have one seed before any has the next, so that a sweep can be looked at early."""
    if name not in FIELDS:
        return 3, 0  # text_file
    later = {"seed": 2, "prior": 4, "lr": 5}
    place = later.get(name, 3)
    if name in vars(ModelSettings()) | vars(DataSettings()):
        place = 0 if name in vars(ModelSettings()) else 1
    return place, list(FIELDS).index(name)


def run_names(runs: list[dict]) -> list[str]:
    """Names of folders, made of the settings that runs do not have in common."""
    varied = varied_settings(runs)
    names = []
    for flags in runs:
        parts = [setting_name(name, flags[name]).replace(" ", "")
                 for name in dict.fromkeys(("prior", *varied)) if name in flags]
        name = "-".join(re.sub(r"[^A-Za-z0-9.=+]+", "-", part).strip("-.")[:40] for part in parts)
        name = name[:180] or "run"
        numbered = (f"{name}-{i}" for i in range(2, MOST + 2))
        names.append(next(n for n in (name, *numbered) if n not in names))
    return names


def varied_settings(runs: list[dict]) -> list[str]:
    """The settings in which runs differ, in the order of loops."""
    names = sorted({name for flags in runs for name in flags}, key=_place)
    return [name for name in names
            if len({json.dumps(flags.get(name)) for flags in runs}) > 1]


def setting_name(name: str, value) -> str:
    """Such as "deep-layers 3"; of a prior its name."""
    if name == "prior":
        return prior_name(value)
    switches = FIELDS[name].metadata.get("switches", {})
    for switch, (meaning, _) in switches.items():
        if value == meaning:
            return switch
    word = flag_name(name)[2:]
    if isinstance(value, bool):
        return word if value else f"no {word}"
    values = value if isinstance(value, list) else [value]
    return " ".join([word, *(spec_name(str(v)) for v in values)])


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
                    finished.add(name)
                    return False
                say(f"\nrun {list(plan.runs).index(name) + 1} of {len(plan.runs)}: {name}")
                with contextlib.redirect_stdout(sys.stderr):  # the table alone is the answer
                    train_or_resume(plan, name, shared)
                finished.add(name)
            except Exception as e:
                if isinstance(e, Stopped) and e.status < 0:
                    raise Stopped(f"{e}; with all runs of it: sweep {plan.folder}", e.status) from e
                kind = "" if isinstance(e, (ValueError, OSError, Stopped)) \
                    else f"{type(e).__name__}: "
                reason = one_line(f"{kind}{e}")
                say(f"{name} failed: {reason}")
                write_file(plan.failure(name), f"{reason}\n".encode())
    except Locked:
        return False
    return True


def train_or_resume(plan: Plan, name: str, shared: Shared) -> None:
    """Train a run whose lock is held. Its bytes are those of `train` with as many threads."""
    run, flags = plan.run(name), plan.runs[name]
    torch.set_num_threads(plan.threads)
    if not (run.path / "config.json").exists():
        train_run(run, plan.settings(name), None, sorted(flags), shared)
        return
    if different := differences(run.settings(), flags):
        raise UserError(f"{run.path}: trained otherwise, with {different[0]}: remove it, or choose "
                        "another --out")
    train_run(run, run.settings(), run.config(), None, shared)


@contextlib.contextmanager
def helpers(plan: Plan, count: int) -> Iterator[None]:
    """So many other processes at the same sweep, which speak to files. At the end this one waits
    for theirs; if it is stopped, they are too."""
    processes = []
    try:
        for i in range(count):
            path = plan.folder / "jobs" / f"{i + 2}.txt"
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as log:
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
    from lab.sweep_table import show_table  # which imports this module

    options = from_flags(SweepOptions, given)
    flags = {name.removeprefix("grid."): values for name, values in given.items()
             if name.startswith("grid.")}
    grids = read_grids(options.grid) if options.grid else [{}]
    plan, shared = open_plan(options, [{**grid, **flags} for grid in grids])
    margin = options.margin or plan.margin
    if margin != plan.margin:
        say(f"--margin {margin:g}: the sweep began with {plan.margin:g}, and a margin that is "
            "chosen after its scores may be seen tests nothing")
    if options.retry:
        for name in plan.runs:
            plan.failure(name).unlink(missing_ok=True)
    if not options.table:
        with helpers(plan, options.jobs - 1):
            work(plan, shared)
        work(plan, shared)  # what a helper that was killed left

    failed = {name: data.read_text(path).strip() for name in plan.runs
              if (path := plan.failure(name)).exists()}
    finished = [name for name in plan.runs if name not in failed and plan.is_finished(name)]
    for name, reason in failed.items():
        say(f"failed: {name}: {reason}")
    left = len(plan.runs) - len(finished) - len(failed)
    if left:
        say(f"{left} of {len(plan.runs)} runs have not ended: sweep {plan.folder} goes on with "
            "those that no other process trains")
    if finished:
        show_table(plan, finished, margin)
    if failed and not options.table:
        raise Stopped(f"{plan.folder}: {len(failed)} of {len(plan.runs)} runs failed, see above: "
                      f"mend what is wrong, then try them by: sweep {plan.folder} --retry", 1)
