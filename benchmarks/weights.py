"""What the weight of the prior does: how far rows move from it, and how well they answer.

    python benchmarks/weights.py [--prior fitted] [--seeds 3]

The bundled SQuAD task, the same draws at every weight. radius: mean Mahalanobis radius of the rows
in the reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from runs import evaluations, promptprior

WEIGHTS = (0, 0.1, 1, 10, 100)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--prior", default="fitted")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=200)
    a = p.parse_args()
    print(f"--prior {a.prior}, {a.steps} steps, means of {a.seeds} seeds\n"
          f"  weight   moved  radius    loss    F1")
    with tempfile.TemporaryDirectory() as folder:
        for weight in WEIGHTS:
            found = []
            for seed in range(a.seeds):
                run = Path(folder) / f"{weight}-{seed}"
                promptprior("train", "--prior", a.prior, "--prior-weight", weight, "--seed", seed,
                            "--steps", a.steps, "--eval-every", a.steps, "--out", run)
                rows = json.loads(promptprior("compare", run, "--json"))[0]["measures"]
                rows, last = rows["layer 0 trained"], evaluations(run)[-1]
                found.append((rows["moved"], rows["radius"], last["loss"], last["f1"]))
            moved, radius, loss, f1 = map(statistics.mean, zip(*found))
            print(f"{weight:>8g}  {moved:6.2f}  {radius:6.1f}  {loss:6.3f}  {f1:4.1f}", flush=True)


if __name__ == "__main__":
    main()
