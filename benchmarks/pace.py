"""How many steps a sweep's priors take to a loss (the paper: diverged priors take longer).

    python benchmarks/pace.py SWEEP --losses 1.2 1.0

A run has come to a loss when the mean training loss of its last --window steps is at or below it.
Runs of one seed see the same questions in the same order, so the steps of two cells are compared
seed by seed, with the first cell all of whose runs come to the loss. Cells that do not are not
compared; the number of their runs that do is shown. In brackets 95 % intervals of Student's t;
Holm's correction is over the cells, for each loss alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from runs import ROOT, metrics

sys.path.insert(0, str(ROOT))

from lab.console import show, table  # noqa: E402
from lab.plan import read_plan  # noqa: E402
from lab.statistics import holm  # noqa: E402
from lab.sweep_table import cells_of, with_interval  # noqa: E402

TITLES = {"seeds": "seeds", "reached": "reached", "steps": "steps", "difference": "difference",
          "p": "p, no difference", "holm": "Holm's"}


def steps_to(lines: list[dict], level: float, window: int) -> float:
    """The first step of a log's training lines at which the mean of the last `window` losses is at
    most level; infinite if there is none."""
    sums = np.cumsum([0.0, *(line["loss"] for line in lines)])
    reached = np.flatnonzero((sums[window:] - sums[:-window]) / window <= level)
    return float(lines[reached[0] + window - 1]["step"]) if len(reached) else math.inf


def compared(by_cell: dict[str, dict[int, float]]) -> tuple[str, list[tuple[str, dict]]]:
    """The first of the cells {seed: steps} that came to the loss with every seed, and a row of each
    cell, compared with it."""
    rows, first, tests = [], "", {}
    for name, by_seed in by_cell.items():
        reached = sum(map(math.isfinite, by_seed.values()))
        numbers: dict = {"seeds": len(by_seed), "reached": reached}
        rows.append((name, numbers))
        if reached < len(by_seed):
            continue
        numbers |= with_interval("steps", [*by_seed.values()])
        first = first or name
        both = sorted(by_cell[first].keys() & by_seed.keys())
        differences = [by_seed[seed] - by_cell[first][seed] for seed in both]
        if name != first and len(both) > 1:
            numbers |= with_interval("difference", differences)
            # Of differences that are all alike nothing tells how they vary.
            p = ttest_1samp(differences, 0).pvalue if len({*differences}) > 1 else 1.0
            tests[name] = numbers["p"] = float(p)
    corrected = dict(zip(tests, holm([*tests.values()])))
    return first, [(name, numbers | ({"holm": corrected[name]} if name in corrected else {}))
                   for name, numbers in rows]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("sweep", type=Path)
    p.add_argument("--losses", type=float, nargs="+", required=True)
    p.add_argument("--window", type=int, default=10)
    a = p.parse_args()
    if a.window < 1:
        p.error("--window: give 1 or more")
    plan = read_plan(a.sweep / "plan.json")
    cells = cells_of(plan, {*plan.finished()})
    for level in a.losses:
        by_cell = {cell.name: {
            seed: steps_to([line for line in metrics(run.path) if line["split"] == "train"],
                           level, a.window) for seed, run in cell.runs.items()} for cell in cells}
        first, rows = compared(by_cell)
        against = f", and the difference from {first}" if first else ""
        show(f"\nsteps to a training loss of {level:g}{against}\n{table(rows, TITLES)}")


if __name__ == "__main__":
    main()
