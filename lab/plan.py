"""The plan of a sweep: a grid of settings, and the runs that it stands for.

    runs = make_runs([{"prior": ["vocab", "fitted"], "seed": [0, 1]}])      # {name: flags of train}
    plan = read_plan(Path("runs/first/plan.json"))
    plan.finished()                                                         # names of runs

Settings that a user writes, or that a file holds, are checked here without loading anything.
"""

from __future__ import annotations

import json
import math
import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

import data
from lab.commands import NOT_IN_GRIDS, resolved
from lab.console import UserError
from lab.files import SMALL, reading
from lab.folder import LAST_PROMPT, Run, layer_picture
from lab.settings import (FIELDS, MAY_CHANGE, MAY_MOVE, DataSettings, ModelSettings, Settings,
                          TeacherSettings, differences, flag_name, flat, is_value, prior_name,
                          shortened, spec_name, value_type)

MOST = 10_000  # runs
RATES = ("lr", "lr_factor")  # settings of which the best is taken
FILES = ("model", "revision", "data", "eval_data")  # settings that name what scores are of
DIVERGED = "diverged"  # begins the reason of a failure whose numbers were not finite
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,200}")  # of a run


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

    def has_diverged(self, name: str) -> bool:
        path = self.failure(name)
        return path.exists() and data.read_text(path, SMALL).startswith(DIVERGED)

    def is_finished(self, name: str) -> bool:
        """Whether a run has all that training writes, the pictures of its layers last."""
        run, settings = self.run(name), self.settings(name)
        if not (run.path / LAST_PROMPT).exists():
            return False
        last = [line["split"] for line in run.metrics() if line.get("step") == settings.train.steps]
        wanted = {"eval", "held_out"} if settings.data.hold_out else {"eval"}
        figures = [run.path / layer_picture(i) for i in run.prompt().layers]
        return wanted <= set(last) and all(figure.exists() for figure in figures)

    def check_flags(self, name: str) -> None:
        """Raises UserError for a run that was not trained with its flags."""
        run, planned = self.run(name), flat(self.settings(name))
        given = {*self.runs[name], *run.config().get("given", ())} & planned.keys()
        # A run keeps the commit that a revision stood for, and may go on in another place.
        given -= {"revision", *MAY_MOVE, *MAY_CHANGE} - {"steps", "prior"}
        if different := differences(run.settings(), {key: planned[key] for key in sorted(given)}):
            raise UserError(f"{run.path}: trained otherwise, with {different[0]}: remove it, or "
                            "choose another --out")

    def finished(self) -> list[str]:
        """The runs that have ended. Raises UserError for one that was not trained with its flags,
        or on other files than another one of the same names."""
        names = [name for name in self.runs
                 if not self.failure(name).exists() and self.is_finished(name)]
        first: dict[tuple, tuple[Run, dict]] = {}
        changed: list[str] = []
        for name in names:
            self.check_flags(name)
            run, settings = self.run(name), flat(self.settings(name))
            sums = run.config().get("sha256", {})
            other, others = first.setdefault(tuple(settings[key] for key in FILES), (run, sums))
            if keys := [key for key in FILES if sums.get(key) != others.get(key)]:
                changed.append(f"{run.path}: the {' and the '.join(keys)} changed between this run "
                               f"and {other.path}")
        if changed:
            more = f" (and {len(changed) - 1} runs more)" if len(changed) > 1 else ""
            raise UserError(f"{changed[0]}{more}: restore the files, remove the runs of others, "
                            f"and go on by: sweep {self.folder}")
        return names


def read_plan(path: Path) -> Plan:
    if not path.exists():
        raise UserError(f"{path.parent}: no {path.name}, so no sweep is here: give the folder of "
                        "one, or --out and what to vary")
    content = data.read_json(path, dict, SMALL)
    with reading(path, "a sweep's plan", "restore it, or begin another in another --out"):
        plan = Plan(path.parent, content["runs"], content["threads"], content["margin"])
        if type(plan.threads) is not int or not 0 < plan.threads <= 1024:
            raise ValueError(f"threads {plan.threads!r:.80}")
        if type(plan.margin) not in (int, float) or not 0 < plan.margin < math.inf:
            raise ValueError(f"margin {plan.margin!r:.80}")
        if not 0 < len(plan.runs) <= MOST:
            raise ValueError(f"{len(plan.runs)} runs, not 1 to {MOST}")
        for name, flags in plan.runs.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"a run {name!r:.80}")
            check_values(flags)
            plan.settings(name)
    return plan


def read_grids(path: str) -> list[dict[str, list]]:
    """The grids of a JSON file: {name: value or list of values}, or a list of these."""
    content = data.read_json(path, most=SMALL)
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
    # The best of a cell's rates is chosen by questions that are neither trained on nor evaluated.
    rates = {(cell_key(flags), rate_of(flags)) for flags in runs}
    if len(rates) > len(set(map(cell_key, runs))):
        runs = [{**flags, "hold_out": True} for flags in runs]
    return dict(zip(run_names(runs), runs))


def cell_key(flags: dict) -> str:
    """A text that is equal for runs which differ in learning rate and seed alone."""
    return json.dumps({**flags, **dict.fromkeys((*RATES, "seed"))}, sort_keys=True)


def rate_of(flags: dict) -> tuple:
    """The values of RATES that flags have, None for those that they leave to the default."""
    return tuple(flags.get(name) for name in RATES)


def _place(name: str) -> tuple[int, int]:
    """Where a setting stands in the order of loops. Runs that share most follow each other, and all
    cells have one seed before any has the next, so that a sweep can be looked at early."""
    if name not in FIELDS:
        return 3, 0  # text_file
    if name in vars(ModelSettings()):
        place = 0
    elif name in vars(DataSettings()) or name in vars(TeacherSettings()):
        place = 1
    else:
        place = {"seed": 2, "prior": 4, **dict.fromkeys(RATES, 5)}.get(name, 3)
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
    if not values:
        return f"no {word}"
    named = (lambda v: repr(shortened(v))) if name in ("teacher", "text") else spec_name
    return " ".join([word, *(named(str(v)) for v in values)])
