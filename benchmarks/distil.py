"""Worked examples against a prompt that was taught by them: what twenty rows, or a prefix of twenty
columns, keep of a text of several hundred tokens.

    python benchmarks/distil.py --out runs/distil --model smollm2 \\
        --data squad:train-v1.1-4330.jsonl --eval-data squad:xquad-en-a.json [FLAG of sweep ...]

The teacher is the model with --examples questions of --data in front, with their contexts and
answers, drawn with seed 0 among the quarter with the shortest contexts. The prompts learn its
distributions (train --teacher), from every prior and seed; text is the teacher's own first tokens.
teacher KL, as teacher: the divergence from the teacher's next-token distributions, and the share of
answers equal to the teacher's, on questions of --eval-data. tokens saved: of every question's
keys and values. Means over seeds, with 95 % intervals of Student's t. With several --lr-factor
each prior and method has its best one, by held-out training questions. With --cartridge every
prefix from text has PEFT's CARTRIDGE beside it (cartridge.py --like), at each of the rates given;
held-out KL is of these alone.

It is a sweep: the same command goes on where it was stopped, with --table it only shows what is
finished, and other processes may share OUT by `promptprior.py sweep OUT`. `--model tiny --data
squad --examples 1 --steps 20` tries it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

from runs import ROOT, evaluations, metrics, sweep

sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from lab.console import show, table  # noqa: E402
from lab.files import write_file  # noqa: E402
from lab.inputs import parse_spec  # noqa: E402
from lab.plan import read_plan  # noqa: E402
from lab.settings import TINY  # noqa: E402
from lab.sweep_table import Cell, cells_of, with_interval  # noqa: E402

COLUMNS = 20  # rows, or columns of a prefix
METHODS = {"prompt": "rows", "prefix": "prefix"}
TITLES = {"seeds": "seeds", "loss": "loss", "teacher_kl": "teacher KL", "f1": "F1",
          "agreement": "as teacher", "held_out_kl": "held-out KL", "tokens": "tokens",
          "saved": "tokens saved"}


def worked_examples(spec: str, count: int) -> str:
    """Questions with their contexts and answers, as one text."""
    examples = [e for e in data.read(*parse_spec(spec, 0)) if e.answers]
    by_context = list({e.context: e for e in examples}.values())
    by_context.sort(key=lambda e: len(e.context))
    shortest = by_context[:max(len(by_context) // 4, count)]
    drawn = random.Random(0).sample(shortest, count)
    return "\n".join(data.question_text(e.context, e.question) + data.answer_text(e)
                     for e in drawn)


def grids(a: argparse.Namespace, teacher: str) -> list[dict]:
    """Of every prior; the prior text begins as the text prompt, which is scored beside."""
    common = {"model": a.model, "data": a.data, "teacher": teacher, "teacher_mix": a.mix,
              "steps": a.steps, "eval_limit": a.eval_limit, "tokens": COLUMNS,
              "method": a.methods}
    # Seed by seed, so that while runs are missing there are as many of each.
    return [{**common, "seed": [seed], "prior": prior, "text": [[teacher] * (prior == "text")]}
            for seed in a.seeds for prior in a.priors]


def cartridges(out: Path, rates: list[float], only_shown: bool) -> dict[str, list[dict]]:
    """The scores of the CARTRIDGEs beside the finished prefixes from text, a file each."""
    rows: dict[str, list[dict]] = {}
    folder = out.parent / f"{out.name}.cartridges"
    for cell in finished(out):
        if (cell.settings.prompt.method, cell.settings.prior.prior) != ("prefix", "text"):
            continue
        for lr, run in itertools.product(rates, cell.runs.values()):
            path = folder / f"{run.path.name}-{lr:g}.json"
            if not path.exists():
                if only_shown:
                    continue
                subprocess.run([sys.executable, ROOT / "benchmarks/cartridge.py", "--like",
                                run.path, "--lr", str(lr), "--to", path], check=True,
                               stdout=sys.stderr)
            scored = json.loads(path.read_text())
            for equal in ("equal steps", "equal seconds"):
                name = f"CARTRIDGE beside {name_of(cell)}, rate {lr:g}, {equal}"
                rows.setdefault(name, []).append(scored[equal])
    return rows


def finished(out: Path) -> list[Cell]:
    plan = read_plan(out / "plan.json")
    return cells_of(plan, {*plan.finished()})


def name_of(cell: Cell) -> str:
    settings = cell.settings
    name = f"{METHODS[settings.prompt.method]}, {settings.prior.prior}"
    if settings.prompt.frozen_tokens:
        name += f", {settings.prompt.frozen_tokens} frozen"
    return name


def rows_of(out: Path, tokens: int, cells: dict[str, list[dict]]) -> list[tuple[str, dict]]:
    """The teacher, no prompt, every prior and method untrained and trained, and the cells."""
    cells, beside = {**cells}, {}
    for cell in finished(out):
        name, runs = name_of(cell), [run.path for run in cell.runs.values()]
        if cell.held_out:
            name += f", factor {cell.settings.train.lr_factor:g}"
        if name in cells:
            raise SystemExit(f"{out}: several cells are {name}: vary priors, methods, rates, seeds "
                             "and --frozen-tokens alone")
        cells[f"{name}, untrained"] = [evaluations(run)[0] for run in runs]
        cells[name] = [*cell.logs.values()]
        beside |= {line["split"]: line for line in metrics(runs[0])}

    rows = [("teacher", {**beside["teacher"], "tokens": tokens, "saved": 0}),
            ("no prompt", {**beside["baseline"], "tokens": 0, "saved": tokens})]
    for cell, lines in sorted(cells.items()):
        numbers = {"seeds": len(lines), "tokens": COLUMNS, "saved": tokens - COLUMNS}
        for key in TITLES.keys() & lines[0].keys():
            numbers |= with_interval(key, [line[key] for line in lines])
        rows.append((cell, numbers))
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--model", default="smollm2", help="a folder; benchmarks/smollm2.py makes one")
    p.add_argument("--data", required=True, help="a SPEC, such as squad:train-v1.1.json")
    p.add_argument("--examples", type=int, default=4, help="worked examples of the teacher")
    p.add_argument("--priors", nargs="+", default=["fitted", "text", "isotropic"])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--mix", type=float, default=0.0, help="--teacher-mix")
    p.add_argument("--eval-limit", type=int, default=200)
    p.add_argument("--cartridge", type=float, nargs="+", default=[], metavar="LR",
                   help="peak learning rates of PEFT's CARTRIDGE")
    a, flags = p.parse_known_args()

    teacher = worked_examples(a.data, a.examples)
    grid = json.dumps(grids(a, teacher), indent=1)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    path = a.out.parent / f"{a.out.name}.grid.json"
    write_file(path, grid.encode())
    sweep(a.out, path, flags)
    folder = TINY if a.model == "tiny" else a.model
    tokens = len(data.Vocabulary(folder).encode_plain(teacher + "\n"))
    beside = cartridges(a.out, a.cartridge, "--table" in flags)
    show(f"\n{table(rows_of(a.out, tokens, beside), TITLES)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the sweep has said how to go on
        sys.exit(130)
