"""Is what training adds to a draw the same whatever the prior?

    python benchmarks/displacements.py [--priors isotropic vocab fitted] [--seeds 2] [--out DIR]

Prompts of several priors, trained on both bundled tasks. A displacement is the trained rows less
the drawn ones. The cosine of two displacements says whether they point the same way: of all their
numbers, row by row, and of their mean rows. And a displacement is added to another prior's draw,
and scored: beside the draw alone (none), the draw with its own displacement (the trained prompt),
with its own in another order of the rows (shuffled), with its own mean in every row (mean row), and
with steps of the same lengths in random directions (random). The picture and the runs are in --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from runs import ROOT, Scorer, swept

sys.path.insert(0, str(ROOT))

import viz  # noqa: E402
from lab.folder import Run  # noqa: E402

TASKS = {"squad": "F1 in percent", "math": "accuracy in percent"}
CONTROLS = ("shuffled", "mean row", "random", "none")


class Trained(NamedTuple):
    prior: str
    task: str
    seed: int
    draw: torch.Tensor  # (n, D)
    displacement: torch.Tensor  # (n, D)


def read(path: Path) -> Trained:
    start, end = Run(path).start_and_end()
    settings = Run(path).settings()
    return Trained(settings.prior.prior, settings.data.data, settings.seed, start[0],
                   end[0] - start[0])


def cosines(trained: list[Trained]) -> dict[str, list[tuple[float, float]]]:
    """The cosines of pairs of displacements, of all numbers and of the mean rows, by what the two
    runs have in common."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for a, b in combinations(trained, 2):
        same = (a.prior == b.prior, a.task == b.task, a.seed == b.seed)
        name = {(True, True, False): "same prior and task, other draw",
                (False, True, True): "same task and order of questions, other prior",
                (False, True, False): "same task, other prior and order of questions",
                (True, False, True): "same draw, other task",
                (False, False, True): "other prior and task"}.get(same)
        if name:
            pairs = [(a.displacement.flatten(), b.displacement.flatten()),
                     (a.displacement.mean(dim=0), b.displacement.mean(dim=0))]
            kinds.setdefault(name, []).append(tuple(
                float(torch.cosine_similarity(x, y, dim=0)) for x, y in pairs))
    return kinds


def added(receiver: Trained, giver: str, trained: dict) -> torch.Tensor:
    """The rows (n, D) of a receiver's draw with the displacement that giver names: a prior, or one
    of CONTROLS."""
    own, generator = receiver.displacement, torch.Generator().manual_seed(receiver.seed)
    if giver == "none":
        return receiver.draw
    if giver == "shuffled":
        return receiver.draw + own[torch.randperm(len(own), generator=generator)]
    if giver == "mean row":
        return receiver.draw + own.mean(dim=0)
    if giver == "random":
        noise = torch.randn(own.shape, generator=generator)
        return receiver.draw + noise * own.norm(dim=1, keepdim=True) / noise.norm(
            dim=1, keepdim=True)
    return receiver.draw + trained[giver, receiver.task, receiver.seed].displacement


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--priors", nargs="+", default=["isotropic", "vocab", "fitted"])
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--out", default="runs/displacements")
    a = p.parse_args()
    paths = swept(Path(a.out), {
        "prior": a.priors, "data": list(TASKS), "seed": list(range(a.seeds)), "steps": a.steps,
        "eval_every": a.steps, "lr": a.lr, "batch_size": 8, "eval_limit": 100})
    trained, scorers = {}, {}
    for path in paths:
        run = read(path)
        trained[run.prior, run.task, run.seed] = run
        if run.task not in scorers:
            scorers[run.task] = Scorer(path)

    print("cosines of displacements, row by row, and of their mean rows: mean (least to most)")
    found = cosines([*trained.values()])
    for name, pairs in found.items():
        listed = [f"{statistics.mean(values):6.2f} ({min(values):.2f} to {max(values):.2f})"
                  for values in zip(*pairs)]
        print(f"  {name:<48}{'   '.join(listed)}")

    lengths = {prior: statistics.mean(float(t.displacement.norm(dim=1).mean())
                                      for t in trained.values() if t.prior == prior)
               for prior in a.priors}
    print("mean length of a row's displacement: "
          + ", ".join(f"{prior} {length:.2f}" for prior, length in lengths.items()))

    givers, panels = [*a.priors, *CONTROLS], []
    for task in TASKS:
        print(f"{task}: score of a prior's draw (line) with the displacement of (column) "
              f"{'; '.join(givers)}; means of {a.seeds} seeds")
        scores = np.zeros((len(a.priors), len(givers)))
        for (r, receiver), (g, giver) in product(enumerate(a.priors), enumerate(givers)):
            scores[r, g] = statistics.mean(
                scorers[task]({0: added(trained[receiver, task, seed], giver, trained)})
                for seed in range(a.seeds))
        for receiver, row in zip(a.priors, scores):
            print(f"  {receiver:<12}" + "".join(f"{score:7.1f}" for score in row), flush=True)
        panels.append(viz.Panel([viz.Heat(scores, tuple(a.priors), tuple(givers), 0, 100)],
                                ("displacement added to it", "prior's draw"),
                                f"{task}, {TASKS[task]}"))
    caption = ("Bundled world. A cell is the score of a prior's draw (its line) with a "
               "displacement added: what training added to the draw of the prior in its column, "
               "with the same seed. shuffled: the draw's own displacement, in another order of its "
               "rows; mean row: its mean in every row; random: of its lengths, in random "
               f"directions; none: the draw alone. Means of {a.seeds} seeds.")
    path = Path(a.out) / "displacements.svg"
    path.write_text(viz.figure(panels, "Displacements of other priors", caption))
    print(path)


if __name__ == "__main__":
    main()
