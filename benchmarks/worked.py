"""Worked sums distilled: can a prompt make a model answer at once what it can only work out?

    python benchmarks/worked.py --out runs/worked-sums [--terms 5] [--pretrain 600] [--steps 200]

The bundled model is trained further, all its weights, on documents of its own world and, half of
them, on sums of --terms numbers below ten. Four of five of these are worked:

    worked sums
    Question: What is 3 + 8 - 5 + 2?
    Steps: 3 + 8 = 11, 11 - 5 = 6, 6 + 2 = 8
    Answer: 8

and the others are answered at once, under the header "short answer". Three of ten documents have no
header. A tenth of the sums, by checksum, is kept for the data. Then prompts are trained on that
model: by the labels, and with the worked answers as the teacher (train --teacher "worked sums"
--teacher-reasons), rows and prefixes.

Accuracies on sums that neither the model nor a prompt has seen: of the header "short answer", which
answers at once; of the teacher, which works them out; and of each prompt, which answers at once.
gap: the share of the way from the first to the second. OUT keeps the model and the runs, and the
same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

from runs import ROOT, evaluations, metrics, swept

sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

import llama  # noqa: E402
import make  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

WORKED, AT_ONCE = "worked sums", "short answer"


def long_sum(r: random.Random, terms: int, held_out: bool) -> tuple[str, str, str]:
    """A question, its steps and its answer. held_out: of those that only the data may have."""
    while True:
        numbers = [r.randint(0, 9) for _ in range(terms)]
        signs = [r.choice("+-") for _ in range(terms - 1)]
        expression = " ".join([str(numbers[0]), *(f"{s} {n}" for s, n in zip(signs, numbers[1:]))])
        if make.reserved(expression) == held_out:
            break
    total, steps = numbers[0], []
    for sign, n in zip(signs, numbers[1:]):
        before, total = total, total + n if sign == "+" else total - n
        steps.append(f"{before} {sign} {n} = {total}")
    return f"What is {expression}?", ", ".join(steps), str(total)


def document(r: random.Random, style: str | None, terms: int) -> tuple[str, str | None]:
    """As make.document; half are of long sums."""
    if r.random() < 0.5:
        return make.document(r, style if style in make.STYLES else None)
    header = style is None and r.random() < 0.7
    if style not in (WORKED, AT_ONCE):
        style = WORKED if r.random() < 0.8 else AT_ONCE
    lines = [style] if header else []
    for _ in range(r.randint(2, 5)):
        question, steps, answer = long_sum(r, terms, held_out=False)
        lines += [f"Question: {question}", *([f"Steps: {steps}"] if style == WORKED else []),
                  f"Answer: {answer}"]
    return "\n".join(lines) + "\n", style


def make_world(out: Path, terms: int, steps: int, lr: float) -> None:
    """Write the model, and its sums in DeepMind's form; the weights last."""
    tiny = ROOT / "tiny"
    for folder, count in (("train-easy", 1200), ("interpolate", 400)):
        r, found = random.Random(f"{folder} {terms}"), {}
        while len(found) < count:
            question, _, answer = long_sum(r, terms, held_out=True)
            if make.for_evaluation(question) == (folder == "interpolate"):
                found[question] = answer
        text = "".join(f"{question}\n{answer}\n" for question, answer in found.items())
        make.write(out / "sums" / folder / "arithmetic__long_sum.txt", text.encode())
    shutil.copy(tiny / "tokenizer.json", out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = llama.load(tiny, "float32")
    for p in model.parameters():
        p.requires_grad_(True)
    batches = make.rows(tokenizer, 11, 16, 256, lambda r, style: document(r, style, terms))
    make.train(model, batches, steps, lr)
    make.save_model(model, out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--terms", type=int, default=5)
    p.add_argument("--pretrain", type=int, default=600, help="steps of the model's weights")
    p.add_argument("--pretrain-lr", type=float, default=1e-3)
    p.add_argument("--steps", type=int, default=200, help="of the prompts")
    p.add_argument("--seeds", type=int, default=1)
    a = p.parse_args()
    if a.terms < 4:
        p.error(f"--terms {a.terms}: there are too few such sums to keep some for the data: give 4 "
                "or more")
    world = a.out / f"model-{a.terms}-terms-{a.pretrain}-steps-rate-{a.pretrain_lr:g}"
    if not (world / "model.safetensors").exists():
        world.mkdir(parents=True, exist_ok=True)
        make_world(world, a.terms, a.pretrain, a.pretrain_lr)

    common = {"model": str(world), "data": f"math:{world / 'sums/train-easy'}",
              "eval_data": f"math:{world / 'sums/interpolate'}", "text": [[AT_ONCE]],
              "steps": a.steps, "eval_every": a.steps, "eval_limit": 200,
              "train_examples": 600, "method": ["prompt", "prefix"], "seed": list(range(a.seeds))}
    taught = {"teacher": WORKED, "teacher_reasons": "written"}
    paths = swept(a.out, common, {**common, **taught})

    def accuracy(line: dict) -> str:
        return f"{line['accuracy']:5.1f} ({line['accuracy_se']:.1f})"

    print(f"sums of {a.terms} terms; accuracy in percent (standard error)")
    beside = {line["split"]: line for path in paths for line in metrics(path)}
    for name, split in (("no prompt", "baseline"), (f"at once ({AT_ONCE})", "text"),
                        ("worked out (teacher)", "teacher")):
        print(f"{name:<40}{accuracy(beside[split])}")
    low, high = beside["text"]["accuracy"], beside["teacher"]["accuracy"]
    for path in paths:
        last = evaluations(path)[-1]
        print(f"{path.name:<40}{accuracy(last)}  gap {(last['accuracy'] - low) / (high - low):.2f}")


if __name__ == "__main__":
    main()
