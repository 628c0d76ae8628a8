"""The paper's main claim, on a correct loss: priors decide where a prompt ends, and not how well it
answers.

    python benchmarks/claims.py [--data squad] [--deep-layers 0] [--seeds 5] [--cut]

Every prior on the bundled task with the same seeds. start, end: mean norm of rows over that of all
tokens, of the draw and trained. moved: mean distance between the two. own: percent of trained
rows that no other draw, of any run, is nearer to than their own; by chance: the same of rows that
moved as far from their draws in random directions. steps: to an evaluation within a tenth of the
last loss. against: the score less the first prior's of the same seed, with Student's
95 % interval over seeds. p: of a permutation of the scores among priors, by the variance of their
means: how often chance sets them as far apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from runs import ROOT, evaluations, promptprior

sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import llama  # noqa: E402
from lab.folder import Run  # noqa: E402
from lab.geometry import keep_their_own, moved_at_random  # noqa: E402
from lab.settings import TINY  # noqa: E402
from lab.statistics import mean_interval  # noqa: E402

PRIORS = ("isotropic", "xavier", "text", "vocab", "fitted", "exclusion", "exclusion:k=2", "sparse",
          "vae")


def chance(scores: np.ndarray, draws: int = 10000) -> float:
    """The permutation p of scores (priors, seeds); a seed is a block, for it decides the order of
    the data."""
    rng = np.random.default_rng(0)
    spread = scores.mean(axis=1).var()
    shuffled = (rng.permuted(scores, axis=0).mean(axis=1).var() for _ in range(draws))
    return (1 + sum(s >= spread - 1e-12 for s in shuffled)) / (1 + draws)


def difference(differences: np.ndarray) -> str:
    """Such as "-1.03 (-1.31 to -0.75)": the mean of differences (seeds,) and its 95 % interval."""
    if len(differences) < 2:
        return f"{differences.mean():+.2f}"
    mean, low, high = mean_interval(differences)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data", default="squad")
    p.add_argument("--deep-layers", type=int, default=0)
    p.add_argument("--cut", action="store_true", help="drop the outputs of token rows too")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--priors", nargs="+", default=PRIORS)
    a = p.parse_args()
    found, starts, ends = {}, [], []
    tokens = llama.load(TINY, "float32").embeddings[data.Vocabulary(TINY, (1,)).ordinary]
    size = tokens.norm(dim=1).mean().item()
    with tempfile.TemporaryDirectory() as folder:
        for prior in a.priors:
            for seed in range(a.seeds):
                path = Path(folder) / f"{prior}-{seed}"
                promptprior("train", "--prior", prior, "--data", a.data, "--seed", seed,
                            "--deep-layers", a.deep_layers, "--steps", a.steps, "--eval-every", 20,
                            "--out", path, *["--cut"] * a.cut)
                draw, trained = (rows[0].numpy() for rows in Run(path).start_and_end())
                starts.append(draw)
                ends.append(trained)
                log = evaluations(path)
                last = log[-1]
                near = next(m["step"] for m in log if m["loss"] <= 1.1 * last["loss"])
                found.setdefault(prior, []).append((
                    last["accuracy" if "accuracy" in last else "f1"], last["loss"], near,
                    *(float(np.linalg.norm(x, axis=1).mean() / size) for x in (draw, trained)),
                    float(np.linalg.norm(trained - draw, axis=1).mean())))
    print(f"--data {a.data} --deep-layers {a.deep_layers}{' --cut' * a.cut}, {a.steps} steps, "
          f"means of {a.seeds} seeds\n  prior          score (s.e.)   loss  steps  start    end  "
          f"moved   own  by chance  against {a.priors[0]}")
    draws, trained = np.concatenate(starts), np.concatenate(ends)
    shares = [100 * keep_their_own(rows, draws).reshape(len(a.priors), -1).mean(axis=1)
              for rows in (trained, moved_at_random(trained, draws))]
    scores = np.array([[score for score, *_ in each] for each in found.values()])
    for (prior, each), own, by_chance, row in zip(found.items(), *shares, scores):
        score, loss, near, start, end, moved = map(statistics.mean, zip(*each))
        error = statistics.stdev(s for s, *_ in each) / a.seeds**0.5 if a.seeds > 1 else 0
        print(f"  {prior:14} {score:5.1f} ({error:.1f})   {loss:6.3f}  {near:5.0f}  {start:5.2f}  "
              f"{end:5.2f}  {moved:5.2f}  {own:4.0f}  {by_chance:9.0f}  "
              f"{difference(row - scores[0])}")
    print(f"p {chance(scores):.3f}; the means' standard deviation {scores.mean(axis=1).std():.2f}, "
          f"a seed's {scores.std(axis=1).mean():.2f}")


if __name__ == "__main__":
    main()
