"""How many steps a sweep's priors take to a loss (the paper: diverged priors take longer).

    python benchmarks/pace.py SWEEP --losses 1.2 1.0

A run has come to a loss when the mean training loss of its last --window steps is at or below it.
Runs of one seed see the same questions in the same order, so the steps of two cells are compared
seed by seed. In brackets 95 % intervals of Student's t. Of a cell, some of whose runs do not come
to a loss, the number of those that do is shown.
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

TITLES = {"seeds": "seeds", "reached": "reached", "steps": "steps", "difference": "against first",
          "p": "p, no difference", "holm": "Holm's"}


def steps_to(losses: list[float], level: float, window: int) -> float:
    """The first step at which the mean of the last `window` losses is at most level; infinite if
    there is none."""
    means = np.convolve(losses, np.full(window, 1 / window), "valid")
    reached = np.flatnonzero(means <= level)
    return float(reached[0] + window) if len(reached) else math.inf


def compared(by_cell: dict[str, dict[int, float]]) -> list[tuple[str, dict]]:
    """A row a cell of {seed: steps}. Cells that came to the loss with every seed are compared with
    the first of them."""
    rows, first, tests = [], None, {}
    for name, by_seed in by_cell.items():
        reached = sum(map(math.isfinite, by_seed.values()))
        numbers: dict = {"seeds": len(by_seed), "reached": reached}
        rows.append((name, numbers))
        if reached < len(by_seed):
            continue
        numbers |= with_interval("steps", [*by_seed.values()])
        if first is None:
            first = by_seed
            continue
        both = sorted(first.keys() & by_seed.keys())
        differences = [by_seed[seed] - first[seed] for seed in both]
        if len(both) > 1:
            numbers |= with_interval("difference", differences)
            tests[name] = numbers["p"] = float(ttest_1samp(differences, 0).pvalue)
    corrected = dict(zip(tests, holm([*tests.values()])))
    return [(name, numbers | ({"holm": corrected[name]} if name in corrected else {}))
            for name, numbers in rows]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("sweep", type=Path)
    p.add_argument("--losses", type=float, nargs="+", required=True)
    p.add_argument("--window", type=int, default=10)
    a = p.parse_args()
    plan = read_plan(a.sweep / "plan.json")
    cells = cells_of(plan, [name for name in plan.runs if plan.is_finished(name)])
    for level in a.losses:
        by_cell = {cell.name: {
            seed: steps_to([line["loss"] for line in metrics(run.path) if line["split"] == "train"],
                           level, a.window) for seed, run in cell.runs.items()} for cell in cells}
        show(f"\nsteps to a training loss of {level:g}\n{table(compared(by_cell), TITLES)}")


if __name__ == "__main__":
    main()
