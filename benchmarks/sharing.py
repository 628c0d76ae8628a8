"""Sample efficiency of shared structure: score against the number of training questions.

Prefixes whose keys and values are independent (none), come from one vector a row (shared), or from
one network (mlp); and rows at every layer, cut, whose keys and values share the frozen W_k and W_v.

    python benchmarks/sharing.py [--sizes 16,64,256,1024] [--seeds 5] [--data squad]

The claim is that of Revisiting Prefix-tuning (arXiv 2410.02200). The bundled world, 20 columns at
every layer, the same draws and steps for all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from runs import evaluations, promptprior

KINDS = {"none": ("--method", "prefix"), "shared": ("--method", "prefix", "--reparam", "shared"),
         "mlp": ("--method", "prefix", "--reparam", "mlp"), "cut rows": ("--deep-layers", 6)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", default="16,64,256,1024")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--data", default="squad")
    p.add_argument("--lr", help="instead of each layer's own")
    a = p.parse_args()
    print(f"--data {a.data}, {a.steps} steps, {a.seeds} seeds: mean score (standard error), loss")
    with tempfile.TemporaryDirectory() as folder:
        for size in a.sizes.split(","):
            for kind, flags in KINDS.items():
                scores, losses = [], []
                for seed in range(a.seeds):
                    run = Path(folder) / f"{size}-{kind}-{seed}".replace(" ", "")
                    promptprior("train", *flags, "--data", a.data, "--train-examples", size,
                                "--seed", seed, "--steps", a.steps, "--eval-every", a.steps,
                                # the same draws, however few the questions are
                                "--reference", "text", "--reference-rows", 2000, "--out", run,
                                *(("--lr", a.lr) if a.lr else ()))
                    last = evaluations(run)[-1]
                    scores.append(last["accuracy" if "accuracy" in last else "f1"])
                    losses.append(last["loss"])
                error = statistics.stdev(scores) / a.seeds**0.5 if a.seeds > 1 else 0
                print(f"{size:>6} questions  {kind:9} {statistics.mean(scores):5.1f} ({error:.1f})"
                      f"  {statistics.mean(losses):.3f}", flush=True)


if __name__ == "__main__":
    main()
