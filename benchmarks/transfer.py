"""A task's posterior as the next task's prior: training steps to a given loss.

    python benchmarks/transfer.py [--seeds 3] [--loss 0.1]

The bundled world. Prompts trained on one task, --seeds of them from the fitted prior, are the prior
of the other: pooled as one Gaussian (posterior:RUNS), or resampled row by row
(posterior:RUNS,resample=1). Beside them the prior fitted on the vocabulary; all else is the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from runs import evaluations, promptprior

SCORE = {"squad": "f1", "math": "accuracy"}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--every", type=int, default=2, help="steps between evaluations")
    p.add_argument("--loss", type=float, default=0.1, help="nats a token of the evaluation")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for first, second in (("squad", "math"), ("math", "squad")):
            runs = [Path(folder) / f"{first}-{seed}" for seed in range(a.seeds)]
            for seed, run in enumerate(runs):
                promptprior("train", "--data", first, "--prior", "fitted", "--seed", seed,
                            "--eval-limit", 50, "--out", run)
            posterior = "posterior:" + ",".join(map(str, runs))
            print(f"{second} after {first}: steps to an evaluation loss of {a.loss} seed by seed "
                  f"(-: not in {a.steps}); loss untrained -> trained; {SCORE[second]} untrained -> "
                  "trained")
            for name, prior in (("fitted", "fitted"), ("posterior", posterior),
                                ("posterior, resampled", f"{posterior},resample=1")):
                steps, ends = [], []
                for seed in range(a.seeds):
                    run = Path(folder) / f"{second}-{name}-{seed}"
                    promptprior("train", "--data", second, "--prior", prior, "--seed", 100 + seed,
                                "--steps", a.steps, "--eval-every", a.every, "--eval-limit", 50,
                                "--out", run)
                    evals = evaluations(run)
                    steps.append(next((str(m["step"]) for m in evals if m["loss"] <= a.loss), "-"))
                    ends.append([m[key] for key in ("loss", SCORE[second])
                                 for m in (evals[0], evals[-1])])
                l0, l1, s0, s1 = map(statistics.mean, zip(*ends))
                print(f"  {name:<22}{', '.join(steps):<16}{l0:.3f} -> {l1:.3f}   {s0:.1f} -> "
                      f"{s1:.1f}", flush=True)


if __name__ == "__main__":
    main()
