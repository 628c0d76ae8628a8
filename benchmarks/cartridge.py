"""A prefix that a text teaches, against PEFT's CARTRIDGE: seconds of a step, and equal gradients;
and a CARTRIDGE that is trained as a run was, with its scores.

    python benchmarks/cartridge.py --model smollm2 --data squad:train-v1.1.json --examples 4
    python benchmarks/cartridge.py --model tiny --data squad --examples 1
    python benchmarks/cartridge.py --like RUN --lr 0.02     # of train --teacher --method prefix

The teacher is the model with worked examples in front, as in distil.py. Both prompts begin as the
keys and values of the teacher's first --columns tokens, as initialize_kv_prefix_from_text makes
them, and learn its distributions at the tokens of the answers. That is self-study's objective; here
the answers are the data's. PEFT's step is the one that its users write: teacher and student read
every question with its paragraph, padded to the longest, the teacher after all of its text. In ours
the teacher's text was run once. Before anything is timed, loss and gradient of both are compared in
fp32; then they take turns.

With --like a CARTRIDGE learns what RUN did: from the same teacher, beginning, questions, batches,
schedule and dtype, by AdamW at one rate for all of its numbers, and with its first column frozen,
as PEFT has it by default. Its keys are trained after rotation and ours before, so that AdamW takes
other steps even at equal rates. Then it learns again, in as many steps as it makes in the processor
time of RUN's, with as much less warm-up; how many that is, is measured on the first --timed
batches, where PEFT's own teacher runs. In training, the teacher's distributions come from ours,
which are the same and faster. Both are saved by PEFT, imported and scored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, as promptprior.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import data
import llama
import peers
from distil import worked_examples
from lab.adapters import from_peft, prefix_numbers
from lab.beginning import Inputs, read_inputs, with_teacher
from lab.console import SCORES, show, table
from lab.distil import Teacher, teacher_text
from lab.evaluation import evaluate
from lab.files import write_file
from lab.folder import FIRST_PROMPT, Run
from lab.loss import begin, taught_loss
from lab.settings import Settings, TrainSettings
from lab.train import schedule

TOLERANCE = 1e-4  # relative, between the losses and between the gradients of the two
TIMED = 8  # steps
TITLES = {"steps": "steps", "times_as_long": "times as long", **SCORES,
          "held_out_kl": "held-out KL"}


class Ours:
    def __init__(self, inputs: Inputs, teacher: Teacher, prefix: llama.Past):
        self.model, self.questions, self.teacher = inputs.loaded.model, inputs.questions, teacher
        self.prefix = prefix._replace(
            keys=tuple(t.detach().clone().requires_grad_() for t in prefix.keys),
            values=tuple(t.detach().clone().requires_grad_() for t in prefix.values))

    def step(self, indices: list[int]) -> float:
        """The divergence in nats a token; its gradient is left in the prefix."""
        for t in (*self.prefix.keys, *self.prefix.values):
            t.grad = None
        batch = self.questions.batch(indices, True, "before", "cpu")
        states = self.teacher.states(indices, batch.labels)
        past, batch = begin(self.model, batch, self.prefix)
        summed, _, kl = taught_loss(self.model, past, batch, states, 0.0)
        tokens = int((batch.labels != data.NO_LABEL).sum())
        (summed / tokens).backward()
        return kl / tokens

    @torch.no_grad()
    def target(self, indices: list[int]) -> Tensor:
        """(M, V): the teacher's log-probabilities of the answers' tokens, question by question."""
        labels = self.questions.batch(indices, True, "before", "cpu").labels
        return self.model.logits(self.teacher.states(indices, labels)).float().log_softmax(dim=-1)

    def gradient(self) -> Tensor:
        """(n, L 2 G hd), as PEFT keeps a prefix."""
        keys, values = (tuple(t.grad for t in cached)
                        for cached in (self.prefix.keys, self.prefix.values))
        return prefix_numbers(self.prefix._replace(keys=keys, values=values))


class Theirs:
    def __init__(self, base, inputs: Inputs, teacher: Teacher, prefix: llama.Past, frozen: int = 0):
        """frozen: columns at the beginning that are not trained."""
        self.base, self.student, self.taught = base, inputs.questions, teacher.questions
        numbers = prefix_numbers(prefix)
        self.model = peft.get_peft_model(base, peft.CartridgeConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(numbers), num_frozen_tokens=frozen))
        self.encoder = self.model.prompt_encoder["default"]
        self.encoder.load_prompt_embeddings(numbers)

    def step(self, indices: list[int], target: Tensor | None = None) -> float:
        """target (M, V): the teacher's log-probabilities of the answers' tokens, if known."""
        self.encoder.trainable_embedding.grad = None
        if target is None:
            with torch.no_grad():
                target = self.log_probabilities(self.base, [self.taught.row(i) for i in indices])
        said = self.log_probabilities(self.model, [self.student.row(i) for i in indices])
        loss = F.kl_div(said, target, reduction="batchmean", log_target=True)
        loss.backward()
        return loss.item()

    @staticmethod
    def log_probabilities(model, rows: list[data.Row]) -> Tensor:
        """(M, V) of the answers' tokens."""
        ids = llama.pad([r.ids for r in rows], value=0)
        mask = llama.pad([[1] * len(r.ids) for r in rows], value=0)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return torch.cat([logits[i, r.start - 1:len(r.ids) - 1]
                          for i, r in enumerate(rows)]).float().log_softmax(dim=-1)


def base_model(inputs: Inputs):
    """transformers' model of the same folder, frozen, in the dtype of the settings."""
    dtype = getattr(torch, inputs.settings.model.dtype)
    base = transformers.LlamaForCausalLM.from_pretrained(inputs.loaded.folder, dtype=dtype)
    return base.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# a CARTRIDGE that is trained and scored


def trained_like(run: Path, lr: float, timed: int = TIMED) -> dict[str, dict]:
    """Scores of two CARTRIDGEs on the run's evaluation data: {"equal steps", "equal seconds":
    {"steps", "loss", ...}}, with "held_out_kl" if the run held questions out."""
    settings, config = Run(run).settings(), Run(run).config()
    prompt = settings.prompt
    if (not settings.teacher.teaches or settings.teacher.teacher_mix
            or (prompt.method, prompt.place) != ("prefix", "before")
            or prompt.prefix_layers is not None or settings.model.device != "cpu"):
        raise SystemExit(f"{run}: give a run of train --teacher TEXT --method prefix --device cpu, "
                         "without --teacher-mix, --place and --prefix-layers")
    inputs = with_teacher(read_inputs(Run(run), settings, config, True), Run(run), config)
    first = Run(run).prompt(FIRST_PROMPT).past(inputs.loaded.model)
    ours, base = Ours(inputs, inputs.lessons.teacher, first), base_model(inputs)
    order = data.Order([e.context for e in inputs.questions.examples], settings.data.batch_size,
                       settings.seed, settings.data.share)

    def scored_after(steps: int) -> dict:
        other = Theirs(base, inputs, ours.teacher, first, frozen=1)
        train(other, ours, order, settings.train, steps, lr)
        with tempfile.TemporaryDirectory() as folder:
            other.model.save_pretrained(folder)
            prompt = from_peft(Path(folder), inputs.loaded.model)
        scored = partial(evaluate, inputs.loaded, [prompt], place="before", settings=settings.data,
                         name=f"CARTRIDGE, {steps} steps")
        scores, _ = scored(inputs.evaluation, teacher=inputs.exam)
        if inputs.held_out:
            held_out, _ = scored(inputs.held_out, teacher=inputs.held_out_exam)
            scores["held_out_kl"] = held_out["teacher_kl"]
        return {"steps": steps, **scores}

    steps = settings.train.steps
    ratio = times_as_long(Theirs(base, inputs, ours.teacher, first, frozen=1), ours, order, timed)
    return {"equal steps": {**scored_after(steps), "times_as_long": ratio},
            "equal seconds": scored_after(max(int(steps / ratio), 1))}


def times_as_long(other: Theirs, ours: Ours, order: data.Order, steps: int) -> float:
    """How many times the processor seconds of our step CARTRIDGE's takes: the median of steps, in
    each of which the two take turns."""
    ratios = []
    for step in range(steps):
        seconds = []
        for prompt in (ours, other):
            start = time.process_time()
            prompt.step(order[step])
            seconds.append(time.process_time() - start)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def train(other: Theirs, ours: Ours, order: data.Order, settings: TrainSettings, steps: int,
          lr: float) -> None:
    """Train CARTRIDGE as the run of these settings, in so many steps of its schedule."""
    trained = other.encoder.trainable_embedding
    optimiser = torch.optim.AdamW([trained], lr, weight_decay=0.0)
    warmup = round(settings.warmup * steps / settings.steps)
    for step in range(steps):
        loss = other.step(order[step], ours.target(order[step]))
        optimiser.param_groups[0]["lr"] = lr * schedule(step, steps, warmup)
        torch.nn.utils.clip_grad_norm_([trained], settings.clip)
        optimiser.step()
        print(f"step {step + 1} of {steps}: KL {loss:.3f}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# one step beside the other


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="smollm2", help="a folder; benchmarks/smollm2.py makes one")
    p.add_argument("--data", help="a SPEC, such as squad:train-v1.1.json")
    p.add_argument("--examples", type=int, default=4, help="worked examples of the teacher")
    p.add_argument("--columns", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--batches", type=int, default=3, help="a turn of each")
    p.add_argument("--like", type=Path, help="train a CARTRIDGE as this run was, and score it")
    p.add_argument("--lr", type=float, default=0.02, help="its peak learning rate")
    p.add_argument("--timed", type=int, default=TIMED, help="steps that are timed")
    p.add_argument("--to", type=Path, help="write its scores as JSON, too")
    a = p.parse_args()
    if a.like:
        scores = trained_like(a.like, a.lr, a.timed)
        if a.to:
            write_file(a.to, json.dumps({"lr": a.lr, **scores}, indent=1).encode())
        show(table([*scores.items()], TITLES))
        return
    if not a.data:
        p.error("give --data, or --like RUN")
    compare(a)


def compare(a: argparse.Namespace) -> None:
    settings = Settings.from_flags({
        "model": a.model, "data": a.data, "teacher": worked_examples(a.data, a.examples),
        "device": "cpu", "dtype": "float32", "batch_size": a.batch_size}).complete()
    inputs = read_inputs(Run(Path("none")), settings, None, False)
    text = teacher_text(inputs.loaded, settings)
    first = text.first(a.columns)
    first = llama.Past(first.keys, first.values, first.real[:, :0], first.position)
    mine = Ours(inputs, Teacher(inputs.loaded, text, inputs.questions, inputs.settings), first)
    other = Theirs(base_model(inputs), inputs, mine.teacher, first)

    order = data.Order([e.context for e in inputs.questions.examples], a.batch_size, 0)
    print(f"{peers.machine(argparse.Namespace(device='cpu'))}\n{a.model}: a teacher of "
          f"{len(text.ids)} tokens, {a.columns} columns, batches of {a.batch_size}")
    ratios = []
    for step in range(a.batches):
        indices = list(order[step])
        kl, theirs = mine.step(indices), other.step(indices)  # a warm-up, too
        wanted = other.encoder.trainable_embedding.grad
        off = float((mine.gradient() - wanted).norm() / wanted.norm())
        assert abs(kl - theirs) <= TOLERANCE * theirs and off <= TOLERANCE, (kl, theirs, off)
        seconds = [peers.seconds(lambda: call(indices), "cpu") for call in (mine.step, other.step)]
        ratios.append(seconds[1] / seconds[0])
        print(f"batch {step + 1}: KL {kl:.6f}, CARTRIDGE's {theirs:.6f}; gradients differ by "
              f"{off:.1e}; {seconds[0]:.2f} s and {seconds[1]:.2f} s: {ratios[-1]:.2f} times",
              flush=True)
    print(f"CARTRIDGE's step takes {statistics.median(ratios):.2f} times as long as ours "
          f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
