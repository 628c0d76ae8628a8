"""Do keys route and values store? Prefixes of two tasks, with keys or values of the other.

    python benchmarks/keys_values.py [--seeds 2] [--out runs/keys-values]

A prefix (`train --method prefix`) is trained on each bundled task from the same draw. Every
prefix with the keys of one and the values of another, among them the draw itself, is scored on both
tasks. If values store what a task needs, a prefix does what its values were trained for, whatever
its keys. The picture and the runs are in --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

from runs import ROOT, Scorer, swept

sys.path.insert(0, str(ROOT))

import viz  # noqa: E402
from lab.folder import FIRST_PROMPT, Run  # noqa: E402

TASKS = {"squad": "F1 in percent", "math": "accuracy in percent"}
SOURCES = (*TASKS, "draw")


def swapped(keys: dict[int, torch.Tensor], values: dict[int, torch.Tensor]
            ) -> dict[int, torch.Tensor]:
    """The prefix {layer: (n, 2, G, hd)} with the keys of one and the values of another."""
    return {i: torch.stack((keys[i][:, 0], values[i][:, 1]), dim=1) for i in keys}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--prior", default="vocab")
    p.add_argument("--out", default="runs/keys-values")
    a = p.parse_args()
    paths = swept(Path(a.out), {
        # one reference for both tasks, so that their prefixes begin as the same draw
        "method": "prefix", "reference": ["text"], "reference_rows": 2000, "prior": a.prior,
        "data": list(TASKS), "seed": list(range(a.seeds)), "steps": a.steps,
        "eval_every": a.steps, "batch_size": 8, "eval_limit": 100})
    prefixes, scorers = {}, {}
    for path in paths:
        run, settings = Run(path), Run(path).settings()
        task, seed = settings.data.data, settings.seed
        prefixes[task, seed] = run.prompt().layers
        prefixes["draw", seed] = run.prompt(FIRST_PROMPT).layers
        if task not in scorers:
            scorers[task] = Scorer(path)

    panels = []
    for task in TASKS:
        print(f"{task}: score of keys of (line) with values of (column) {', '.join(SOURCES)}; "
              f"means of {a.seeds} seeds")
        scores = np.zeros((3, 3))
        for (k, keys), (v, values) in product(enumerate(SOURCES), enumerate(SOURCES)):
            scores[k, v] = statistics.mean(
                scorers[task](swapped(prefixes[keys, seed], prefixes[values, seed]))
                for seed in range(a.seeds))
        for keys, row in zip(SOURCES, scores):
            print(f"  {keys:<6}" + "".join(f"{score:7.1f}" for score in row), flush=True)
        panels.append(viz.Panel([viz.Heat(scores, SOURCES, SOURCES, 0, 100)],
                                ("values of", "keys of"), f"scored on {task}, {TASKS[task]}"))
    caption = (f"Bundled world, prior {a.prior}, {a.steps} steps of 8 questions: scores of "
               "prefixes with the keys of one and the values of another, each trained on a task "
               f"or as drawn; means of {a.seeds} seeds.")
    path = Path(a.out) / "keys-values.svg"
    path.write_text(viz.figure(panels, "Keys of one prefix, values of another", caption))
    print(path)


if __name__ == "__main__":
    main()
