"""Does it cost quality that questions of one paragraph meet in a batch?

The bundled SQuAD task, grouped and with --no-share, seed by seed: final F1, and F1 at equal seconds
of training.

    python benchmarks/grouping.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from runs import metrics, promptprior


def curve(run: Path) -> list[tuple[float, float]]:
    """(seconds of training, F1) at every evaluation."""
    seconds, points = 0.0, []
    for m in metrics(run):
        seconds += m.get("seconds", 0.0)
        if m["split"] == "eval":
            points.append((seconds, m["f1"]))
    return points


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=200)
    a = p.parse_args()
    curves = {"grouped": [], "ungrouped": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(a.seeds):
            for name in curves:
                out = Path(folder) / f"{name}{seed}"
                promptprior("train", "--seed", seed, "--out", out, "--steps", a.steps,
                            "--eval-every", max(a.steps // 10, 1),
                            *(["--no-share"] if name == "ungrouped" else []))
                curves[name].append(curve(out))
            print(f"seed {seed}: " + ", ".join(
                f"{name} F1 {c[-1][-1][1]:.1f} after {c[-1][-1][0]:.1f} s"
                for name, c in curves.items()), flush=True)
    difference = [g[-1][1] - u[-1][1] for g, u in zip(*curves.values())]
    print("final F1: " + ", ".join(
        f"{name} {statistics.mean(c[-1][1] for c in cs):.1f}" for name, cs in curves.items())
        + f"; grouped - ungrouped {statistics.mean(difference):+.1f}"
        + (f", standard error {statistics.stdev(difference) / len(difference) ** 0.5:.1f}"
           if a.seeds > 1 else ""))
    whole = statistics.median(c[-1][0] for c in curves["grouped"])
    for part in (0.25, 0.5, 1.0):  # the last evaluation not more than 5 % later
        at = {name: statistics.mean(max(x for x in c if x[0] <= part * whole * 1.05)[1] for c in cs)
              for name, cs in curves.items()}
        print(f"F1 after {part * whole:.1f} s of training: " + ", ".join(
            f"{name} {f1:.1f}" for name, f1 in at.items()))


if __name__ == "__main__":
    main()
