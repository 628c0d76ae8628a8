"""How fast prompt tuning of a real model reaches an F1, ours beside PEFT's.

    python benchmarks/smollm2.py smollm2
    python benchmarks/real.py --model smollm2 --data squad:train-v1.1.json \\
        --eval-data squad:dev-v1.1.json --peft-steps 50
    python benchmarks/real.py --out runs/real --plot-only      # table and picture of what is there

Both train 20 rows from the same draw of --prior vocab, in fp32 on the CPU, on the same questions in
the same order, with the same AdamW, learning rates and clipping. Ours is the loop of `train`.
PEFT's is the one that its users write: every question with its paragraph, padded to the longest.
Before a seed is measured, loss and gradient of both are compared on one batch.

F1 and loss come from one evaluation for both: PEFT's rows are put into our Prompt, for the two are
the same object. As objective and batches are the same too, F1 at a step should agree up to
rounding. What differs is the seconds; they are those of training steps, without evaluations.

The two take turns of --eval-every steps on the same threads, so that a slow minute of the machine
hits both. PEFT may stop after --peft-steps of the same schedule. The ratio of their seconds depends
on the data: ours computes a paragraph once for all of its questions. Every evaluation is a line of
OUT/points.jsonl, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, as promptprior.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save  # noqa: E402
from torch import Tensor  # noqa: E402

import data  # noqa: E402
import llama  # noqa: E402
import viz  # noqa: E402
from lab.commands import Parser  # noqa: E402
from lab.console import Stopped, UserError, one_line, say, show  # noqa: E402
from lab.beginning import Inputs, begin_run, make_posterior, read_inputs  # noqa: E402
from lab.evaluation import evaluate  # noqa: E402
from lab.files import read_tensors, reading, write_file  # noqa: E402
from lab.folder import Run  # noqa: E402
from lab.inputs import mean_answer_tokens, parse_spec  # noqa: E402
from lab.loss import answer_loss, begin  # noqa: E402
from lab.settings import Settings, flat, spec_name  # noqa: E402
from lab.train import (Training, begin_or_cut_back, checkpoint_of,  # noqa: E402
                       keep_freed_memory, schedule)
from promptprior import exit_status, message  # noqa: E402

METHODS = OURS, PEFT = "promptprior", "PEFT"
TARGETS = (40, 50, 60)  # F1 in percent; the table says after how many seconds it was reached
TOLERANCE = 1e-4  # relative, between the losses and between the gradients of the two


class Point(NamedTuple):
    """An evaluation, a line of points.jsonl."""

    seed: int
    method: str
    step: int  # steps that were made
    seconds: float  # that these steps took
    f1: float  # percent
    loss: float  # nats an answer token


# --------------------------------------------------------------------------------------------------
# PEFT


class PeftTraining:
    """PEFT's prompt tuning in a plain loop, with the batches and learning rates of ours."""

    def __init__(self, base, rows: Tensor, ours: Training, path: Path):
        """base: transformers' model. rows (n, D): where the prompt starts. path: of a checkpoint,
        from which it goes on if there is one."""
        import peers

        self.ours, self.path, self.step, self.seconds = ours, path, 0, 0.0
        self.model = peers.peft_model(base, rows)
        self.rows = self.model.prompt_encoder["default"].embedding.weight  # (n, D)
        self.optimiser = torch.optim.AdamW([self.rows], weight_decay=0.0)
        if path.exists():
            tensors, about = read_tensors(path, "PEFT's checkpoint", "choose another --out")
            self.step, self.seconds = int(about["step"]), float(about["seconds"])
            self.rows.data.copy_(tensors.pop("rows"))
            self.optimiser.state[self.rows] = tensors

    def backward(self, step: int) -> float:
        """The loss of a step's batch in nats a token; its gradient is left in the rows."""
        from training import theirs

        rows = [self.ours.questions.row(i) for i in self.ours.order[step]]
        return theirs(self.model, rows, "cpu").item()

    def divide_as_ours(self, step: int) -> None:
        """Turn the gradient of the mean over the batch's answer tokens into that of our objective,
        which divides by their expected number."""
        rows = [self.ours.questions.row(i) for i in self.ours.order[step]]
        tokens = sum(len(row.ids) - row.start for row in rows)
        self.rows.grad.mul_(tokens / (len(rows) * self.ours.answer_tokens))

    def go_to(self, step: int) -> None:
        """Train until so many steps are made, and write the checkpoint."""
        train, peak = self.ours.settings.train, self.ours.optimiser.param_groups[0]["peak"]
        while self.step < step:
            start = time.perf_counter()
            rate = peak * schedule(self.step, train.steps, train.warmup)
            self.optimiser.param_groups[0]["lr"] = rate
            self.backward(self.step)
            self.divide_as_ours(self.step)
            torch.nn.utils.clip_grad_norm_([self.rows], train.clip)
            self.optimiser.step()
            self.seconds += time.perf_counter() - start
            self.step += 1
        tensors = {"rows": self.rows.detach(), **self.optimiser.state[self.rows]}
        about = {"step": str(self.step), "seconds": str(self.seconds)}
        write_file(self.path, save(tensors, about))

    def check(self) -> None:
        """End here if loss or gradient of the next step is not ours. It warms up both."""
        rows = self.rows.detach().clone().requires_grad_()
        batch = self.ours.questions.batch(self.ours.order[self.step], True, "before", "cpu")
        model = self.ours.loaded.model
        past, batch = begin(model, batch, llama.Prompt({0: rows}))
        summed, tokens = answer_loss(model, past, batch)
        (summed / tokens).backward()
        loss, theirs = summed.item() / tokens, self.backward(self.step)
        off = float((rows.grad - self.rows.grad).norm() / self.rows.grad.norm())
        compared = (f"step {self.step + 1}: loss {loss:.6f}, PEFT's {theirs:.6f}; gradients differ "
                    f"by {off:.1e} of PEFT's")
        if not (abs(loss - theirs) <= TOLERANCE * abs(theirs) and off <= TOLERANCE):
            raise SystemExit(f"real: {compared}, and {TOLERANCE:.0e} is allowed: the two do not "
                             "train the same, so their seconds cannot be compared")
        say(compared)


# --------------------------------------------------------------------------------------------------
# measuring


def measure(a: argparse.Namespace, out: Path) -> None:
    """Train every seed with both, as far as OUT does not have it yet."""
    import peers
    import transformers

    keep_freed_memory()  # both gain by it
    names = ("model", "data", "eval_data", "steps", "lr", "batch_size", "eval_every", "eval_limit")
    given = {name: getattr(a, name) for name in names if getattr(a, name) is not None}
    given |= {"device": "cpu", "dtype": "float32"}
    of_seeds = [Settings.from_flags({**given, "seed": seed}).complete() for seed in a.seeds]
    settings = of_seeds[0]
    for spec in (settings.data.data, settings.data.eval_data or settings.data.data):
        if parse_spec(spec, 0)[0] != "squad":
            raise UserError(f"{spec}: F1 is the score of SQuAD: give squad:PATH")
    steps = settings.train.steps
    peft_steps = steps if a.peft_steps is None else a.peft_steps
    if not 0 <= peft_steps <= steps:
        raise UserError(f"--peft-steps {peft_steps}: expected 0 to {steps}, which is --steps")
    inputs = read_inputs(Run(out), settings, None, False)

    # Points that were measured otherwise, or elsewhere, are not continued.
    about = {**{name: flat(settings)[name] for name in names}, "peft_steps": peft_steps,
             "evaluated": len(inputs.evaluation.examples), "sha256": inputs.sums,
             "shared": len(inputs.examples) / len({e.context for e in inputs.examples}),
             "machine": peers.machine(argparse.Namespace(device="cpu"))}
    earlier, points = read_points(out)
    for key, value in about.items():
        if earlier and earlier.get(key) != value:
            raise UserError(f"{out}: measured with {key} {earlier.get(key)}, now {value}: choose "
                            "another --out")
    if not earlier:
        append(out, {"about": about})

    transformers.utils.logging.disable_progress_bar()
    base = transformers.LlamaForCausalLM.from_pretrained(inputs.loaded.folder, dtype=torch.float32)
    there = {point[:3] for point in points}
    for of_seed in of_seeds:
        settings = replace(inputs.settings, prior=of_seed.prior)
        measure_seed(out, inputs._replace(settings=settings), base, peft_steps, there)


def measure_seed(out: Path, inputs: Inputs, base, peft_steps: int, there: set[tuple]) -> None:
    """Train a seed with both, in turns. there: (seed, method, step) of points that are measured."""
    settings, loaded = inputs.settings, inputs.loaded
    seed, run = settings.seed, Run(out / f"seed-{settings.seed}")
    if {(seed, OURS, settings.train.steps), (seed, PEFT, peft_steps)} <= there:
        return
    begun = begin_run(inputs)
    start = begun.start  # {0: (1, n, D)}
    posterior = make_posterior(settings, begun, 1)

    def score(method: str, step: int, seconds: float, rows: Tensor):
        """Evaluate a prompt, and write its point if it is not there yet."""
        metrics, predictions = evaluate(loaded, [llama.Prompt({0: rows})], inputs.evaluation,
                                        "before", settings.data, f"{method}, step {step}")
        point = Point(seed, method, step, round(seconds, 3), metrics["f1"], metrics["loss"])
        if point[:3] not in there:
            append(out, point._asdict())
            there.add(point[:3])
            say(f"seed {seed}, {method}, step {step}: F1 {point.f1:.1f} after {seconds:.1f} s")
        return metrics, predictions

    def take_turn(step: int):
        """Called when ours has made so many steps: PEFT makes them too, and both are scored."""
        last = min(step, peft_steps)
        if (seed, PEFT, last) not in there:
            peft.go_to(last)
            score(PEFT, last, peft.seconds, peft.rows.detach())
        seconds = sum(line["seconds"] for line in run.metrics() if line["split"] == "train")
        return score(OURS, step, seconds, posterior.representative()[0])

    with run.lock():
        ours = Training(run, settings, loaded, posterior, inputs.questions, None, take_turn,
                        mean_answer_tokens(inputs.questions))
        peft = PeftTraining(base, start[0][0], ours, run.path / "peft.safetensors")
        peft.check()
        checkpoint = checkpoint_of(run, settings)
        begin_or_cut_back(ours, checkpoint, inputs, [], begun.reports)
        ours.go(checkpoint)


# --------------------------------------------------------------------------------------------------
# points.jsonl: a line about what is measured, and a line a point


def append(out: Path, line: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "points.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def read_points(out: Path) -> tuple[dict, list[Point]]:
    """What is measured, {} if nothing yet, and the points. A last line that a killed process left
    unfinished is removed."""
    path = out / "points.jsonl"
    text = data.read_text(path) if path.exists() else ""
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        write_file(path, whole.encode())
    lines = [line for _, line in data.json_lines(whole, path)]
    with reading(path, "points of this script", "choose another --out"):
        return lines[0]["about"] if lines else {}, [Point(**line) for line in lines[1:]]


def curves(points: list[Point]) -> dict[tuple[int, str], list[Point]]:
    """The points of every (seed, method), by step."""
    found = {}
    for p in sorted(points, key=lambda p: (p.seed, METHODS.index(p.method), p.step)):
        found.setdefault((p.seed, p.method), []).append(p)
    return found


def ratios(points: list[Point]) -> dict[int, list[float]]:
    """PEFT's seconds over ours by seed, of every turn in which both made the same steps."""
    seconds = {}
    for (seed, method), line in curves(points).items():
        for p, q in zip(line, line[1:]):
            seconds[seed, method, p.step, q.step] = q.seconds - p.seconds
    found = {}
    for (seed, method, *steps), ours in seconds.items():
        theirs = seconds.get((seed, PEFT, *steps))
        if method == OURS and theirs is not None:
            found.setdefault(seed, []).append(theirs / ours)
    return found


# --------------------------------------------------------------------------------------------------
# table and picture


def table(points: list[Point]) -> str:
    """What both reached and how soon, a line a seed and method."""
    targets = "".join(f"{f'to F1 {target}':>10}" for target in TARGETS)
    by_seed = ratios(points)
    lines = [f"seed  method       steps     F1    loss   seconds{targets}  ratio"]
    for (seed, method), line in curves(points).items():
        end = line[-1]
        text = f"{seed:>4}  {method:<11}{end.step:>7}{end.f1:>7.1f}{end.loss:>8.3f}"
        text += f"{end.seconds:>10.1f}"
        for target in TARGETS:
            first = next((p for p in line if p.f1 >= target), None)
            cell = f"{first.seconds:.1f}" if first else f"> {end.seconds:.1f}"
            text += f"{cell:>10}"
        if method == PEFT and seed in by_seed:
            text += f"{statistics.median(by_seed[seed]):>7.2f}"
        lines.append(text)
    return "\n".join(lines)


def agreement(points: list[Point]) -> str:
    """A sentence: how far the two agree by step, and how far they differ in seconds."""
    at = {p[:3]: p for p in points}
    pairs = [(p, at[p.seed, PEFT, p.step]) for p in points
             if p.method == OURS and (p.seed, PEFT, p.step) in at]
    turns = [ratio for by_seed in ratios(points).values() for ratio in by_seed]
    if not turns:
        return "The two have no turn in common."
    f1, loss = (max(abs(getattr(p, key) - getattr(q, key)) for p, q in pairs)
                for key in ("f1", "loss"))
    return (f"At the same step F1 differs by at most {f1:.2f}, loss by {loss:.1e}. PEFT's seconds "
            f"a step are {statistics.median(turns):.2f} times ours ({min(turns):.2f} to "
            f"{max(turns):.2f}), the median of {len(turns)} turns.")


def picture(about: dict, points: list[Point]) -> str:
    """SVG of F1 and loss over the seconds of training, and over the steps."""
    panels, seeds = [], ", ".join(map(str, sorted({p.seed for p in points})))
    for y, y_name in (("f1", "F1, percent"), ("loss", "loss, nats a token")):
        for x, x_name in (("seconds", "seconds of training"), ("step", "step")):
            marks = []
            # PEFT's first: by step the two coincide, and then our dots stand in its squares.
            for (_, method), line in sorted(curves(points).items(), key=lambda item: item[0][1]):
                xy = np.array([(getattr(p, x), getattr(p, y)) for p in line])
                look = (viz.BLUE, True, "square") if method == PEFT else (viz.VERMILION,)
                marks.append(viz.Curve(method, xy[:, 0], xy[:, 1], colour=look[0]))
                marks.append(viz.Points(method, xy, *look, size=1.0 if method == PEFT else 0.5))
            panels.append(viz.Panel(marks, (x_name, y_name), equal=False))
    specs = [spec_name(about[key] or about["data"]) for key in ("data", "eval_data")]
    caption = (f"{Path(about['model']).name}, 20 rows from the vocab prior, batches of "
               f"{about['batch_size']} of {specs[0]}, which has {about['shared']:.1f} questions a "
               f"paragraph. Marks: {about['evaluated']} questions of {specs[1]}, scored by the "
               f"same code for both. A line is a seed ({seeds}). {agreement(points)} fp32 on "
               f"{about['machine']}.")
    return viz.figure(panels, "Prompt tuning of a real model", caption, columns=2)


def arguments() -> argparse.Namespace:
    p = Parser(prog="real.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--model", help="folder in Hugging Face's layout, or a model of the hub")
    p.add_argument("--data", help="training questions, squad:PATH")
    p.add_argument("--eval-data", help="questions to evaluate, squad:PATH (a tenth of --data)")
    p.add_argument("--out", default="runs/real", help="folder of what is measured (runs/real)")
    p.add_argument("--steps", type=int, default=200, help="training steps (200)")
    p.add_argument("--peft-steps", type=int, help="how many of them PEFT makes (all)")
    p.add_argument("--eval-every", type=int, default=10, help="steps of a turn (10)")
    p.add_argument("--eval-limit", type=int, default=200, help="most questions evaluated (200)")
    p.add_argument("--batch-size", type=int, default=16, help="questions a step (16)")
    p.add_argument("--lr", type=float, help="peak learning rate (that of train)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of draw and order (0)")
    p.add_argument("--plot-only", action="store_true", help="table and picture of what is there")
    return p.parse_args()


def main() -> int:
    a = arguments()
    out = Path(a.out)
    try:
        if not a.plot_only:
            if a.model is None or a.data is None:
                raise UserError("give --model and --data, or --plot-only")
            measure(a, out)
        about, points = read_points(out)
        if not points:
            raise UserError(f"{out}/points.jsonl: no points in it: measure first")
        write_file(out / "against-peft.svg", picture(about, points).encode())
        show(f"{table(points)}\n{agreement(points)}\n{out}/against-peft.svg")
        return 0
    except Stopped as e:
        # Behind the semicolon stands how `train` would go on.
        say(f"real: {one_line(str(e)).split('; ')[0]}; the same command goes on")
        return e.status if e.status > 0 else 128 - e.status
    except KeyboardInterrupt:
        say("real: stopped; the same command goes on")
        return 130
    except ModuleNotFoundError as e:
        say(f"real: error: {e}: pip install -r tests/requirements.txt")
        return 2
    except Exception as e:
        status = exit_status(e)
        if status is None:
            raise
        say(f"real: error: {one_line(message(e))}")
        return status


if __name__ == "__main__":
    sys.exit(main())
