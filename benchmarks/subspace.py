"""How small is a prompt? Score and loss of prompts whose rows may move from the prior's draw in k
directions alone: the k principal ones of the reference, and k random ones.

    python benchmarks/subspace.py [--sizes 1 4 16 64] [--seeds 2] [--out runs/subspace]

`train --subspace k --directions principal` and `random` on the bundled world, and the same prompts
free. Every run begins at the same draw of its seed and makes the same steps. The picture is in
--out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from runs import ROOT, evaluations, swept

sys.path.insert(0, str(ROOT))

import viz  # noqa: E402
from lab.folder import Run  # noqa: E402

LOOKS = {"principal": (viz.BLUE, "circle"), "random": (viz.VERMILION, "square"),
         "all": (viz.GREEN, "circle")}


def picture(scores: dict, key: str, caption: str) -> str:
    """SVG of the means over seeds by k. scores {(directions, k): [(score, loss), ...]}."""
    panels, sizes = [], sorted({k for kind, k in scores if kind != "all"})
    title = {"f1": "F1"}.get(key, key)
    for column, name in enumerate((f"{title}, percent", "loss, nats a token")):
        marks = []
        for kind, (colour, shape) in LOOKS.items():
            ks = [k for name_, k in scores if name_ == kind]
            values = np.array([[seed[column] for seed in scores[kind, k]] for k in sorted(ks)])
            x = np.log2(sorted(ks)) if kind != "all" else np.log2([sizes[0], sizes[-1]])
            if kind == "all":
                values = np.repeat(values, 2, axis=0)
            marks.append(viz.Curve(f"{kind} directions", x, values.mean(axis=1),
                                   values.min(axis=1), values.max(axis=1), colour, kind != "all",
                                   shape))
        panels.append(viz.Panel(marks, ("k, the number of directions", name), equal=False,
                                places=tuple((np.log2(k), str(k)) for k in sizes)))
    return viz.figure(panels, "Prompts that move in k directions", caption, columns=2)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--data", default="squad")
    p.add_argument("--prior", default="vocab")
    p.add_argument("--out", default="runs/subspace")
    a = p.parse_args()
    common = {"data": a.data, "prior": a.prior, "steps": a.steps, "eval_every": a.steps,
              "lr": a.lr, "batch_size": 8, "seed": list(range(a.seeds))}
    runs = swept(Path(a.out), common, {**common, "subspace": a.sizes,
                                       "directions": ["principal", "random"]})
    scores: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for path in runs:
        prompt, last = Run(path).settings().prompt, evaluations(path)[-1]
        key = "accuracy" if "accuracy" in last else "f1"
        kind = prompt.directions if prompt.subspace else "all"
        scores.setdefault((kind, prompt.subspace), []).append((last[key], last["loss"]))
    print(f"--data {a.data} --prior {a.prior}, {a.steps} steps at {a.lr}; {key} and loss, seed by "
          "seed")
    for (kind, k), each in sorted(scores.items()):
        print(f"  {kind:<10}{k or 'all':>4}  " + ", ".join(f"{s:.1f}" for s, _ in each) + "   "
              + ", ".join(f"{loss:.3f}" for _, loss in each))
    caption = (f"Bundled world, {a.data}, prior {a.prior}, {a.steps} steps of 8 questions; lines "
               f"are means of {a.seeds} seeds, bands from the least to the most. All: rows move "
               "freely.")
    path = Path(a.out) / "subspace.svg"
    path.write_text(picture(scores, key, caption))
    print(path)


if __name__ == "__main__":
    main()
