"""The paper's claims, and one of another paper, each a sweep with its table and tests.

    python benchmarks/claims.py --out claims [--only prior deep] [--seeds 5] [FLAG of sweep ...]

Without more flags: the bundled model on its questions, an hour and a half of one core. Every other
flag goes to all runs, such as --model DIR --data SPEC --eval-data SPEC --steps 100 --jobs 2. When
it is started again it goes on. CLAIM/ in the folder is an ordinary sweep, and CLAIM/table.txt what
it came to.

With several --factors the learning rates are tuned first, in CLAIM-rates/: each cell is trained
with seed 0 at every factor, and the one with the lowest loss on held-out training questions is
taken for the seeds that count, 1 and up. Runs that choose a rate hold out, and are evaluated on,
160 questions; --eval-limit is of those that count, which train on all questions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from runs import ROOT, sweep

sys.path.insert(0, str(ROOT))

from llama import read_config  # noqa: E402
from lab.hub import model_folder  # noqa: E402
from lab.plan import RATES, read_plan  # noqa: E402
from lab.settings import ModelSettings  # noqa: E402
from lab.sweep_table import cells_of  # noqa: E402


class Claim(NamedTuple):
    sentence: str  # what the paper says
    grids: list[dict[str, list]]


HELD_OUT = 160  # questions to choose a rate by
ALL = "all"  # in place of a number of layers
SIZES = (16, 64, 256, 1024)  # training questions
FEW = ["isotropic", "xavier", "vocab", "fitted", "exclusion"]
CLAIMS = {
    "prior": Claim("The prior of token rows does not decide how well a prompt answers (4.1).",
                   [{"prior": ["isotropic", "xavier", "text", "vocab", "fitted", "exclusion",
                               "exclusion:k=2", "exclusion:radius=1.5", "sparse", "vae"]}]),
    "deep": Claim("Nor does that of token rows and rows at the last three layers (4.2).",
                  [{"prior": FEW, "deep_layers": [3]}]),
    **{f"cut-{prior}": Claim("Token rows may be cut off after the first layer, or kept (3.2).",
                             [{"prior": [prior], "cut": [False, True]}])
       for prior in ("isotropic", "vocab", "fitted")},
    "last": Claim("Interpolation and VAE priors of the last layer do as well (4.5, 4.6).",
                  [{"prior": ["fitted", "vocab", "interpolation", "vae"], "tokens": [0],
                    "deep_layers": [1]}]),
    # Four ways to make keys and values: each number by itself (none), a key and its value from one
    # vector (shared), all from one network (mlp), or rows through the model's own W_k and W_v. The
    # reference is prose, so that the draws are the same however few the questions are.
    **{f"samples-{count}": Claim(
        "Keys and values of shared structure need fewer questions (arXiv 2410.02200).",
        [{"method": ["prefix"], "reparam": ["none", "shared", "mlp"], **few},
         {"deep_layers": [ALL], **few}])
       for count in SIZES for few in [{"train_examples": [count], "reference": [["text"]],
                                       "reference_rows": [2000]}]},
}
PAPER = [name for name in CLAIMS if not name.startswith("samples")]


def grids_of(claim: Claim, priors: list[str] | None, model: str) -> list[dict[str, list]]:
    """A claim's grids for a model, with the given priors where it compares several."""
    grids = []
    for grid in claim.grids:
        grid = dict(grid)
        if priors and len(grid.get("prior", ())) > 1:
            grid["prior"] = priors
        if grid.get("deep_layers") == [ALL]:
            folder = model_folder(ModelSettings(model))
            grid["deep_layers"] = [read_config(folder / "config.json").num_hidden_layers]
        grids.append(grid)
    return grids


def run_sweep(folder: Path, grids: list[dict[str, list]], flags: list[str]) -> str:
    """Train what is missing of a sweep; its table."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(grids, indent=1))
    return sweep(folder, path, flags, stdout=subprocess.PIPE)


def best_rates(folder: Path) -> list[dict[str, list]]:
    """Of a sweep of learning rates, a grid for every cell, at its best rate."""
    plan = read_plan(folder / "plan.json")
    grids = []
    for cell in cells_of(plan, {*plan.finished()}):
        flags = plan.runs[next(iter(cell.runs.values())).path.name]
        assert cell.rate == tuple(flags.get(name) for name in RATES)
        grids.append({name: [value] for name, value in flags.items()
                      if name not in ("seed", "hold_out", "eval_limit")})
    return grids


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="a folder, new or of an earlier start")
    p.add_argument("--only", nargs="+", choices=CLAIMS, default=PAPER,
                   help="by default those of the paper, without samples-N")
    p.add_argument("--model", help="as for train")
    p.add_argument("--priors", nargs="+", metavar="SPEC",
                   help="in place of each claim's own, where it compares several (claims prior, "
                        "deep and last)")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--factors", nargs="+", type=float, default=[],
                   help="of each layer's own learning rate; several: the best is taken")
    p.add_argument("--eval-limit", type=int, help="most questions evaluated, as for train")
    a, flags = p.parse_known_args()
    flags += ["--model", a.model] if a.model else []
    for name in a.only:
        claim, first = CLAIMS[name], 0
        grids = grids_of(claim, a.priors, a.model or "tiny")
        if len(a.factors) > 1:
            rates = a.out / f"{name}-rates"
            run_sweep(rates, [{**grid, "lr_factor": a.factors, "seed": [0],
                               "eval_limit": [HELD_OUT]} for grid in grids], flags)
            grids, first = best_rates(rates), 1
        elif a.factors:
            grids = [{**grid, "lr_factor": a.factors} for grid in grids]
        limit = {} if a.eval_limit is None else {"eval_limit": [a.eval_limit]}
        # Seed by seed, so that while runs are missing there are as many of each cell.
        table = run_sweep(a.out / name, [{**grid, **limit, "seed": [seed]}
                                         for seed in range(first, first + a.seeds)
                                         for grid in grids], flags)
        text = f"{name}: {claim.sentence}\n\n{table}\n"
        (a.out / name / "table.txt").write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the sweep has said how to go on
        sys.exit(130)
