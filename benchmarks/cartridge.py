"""A prefix that a text teaches, against PEFT's CARTRIDGE: seconds of a step, and equal gradients.

    python benchmarks/cartridge.py --model smollm2 --data squad:train-v1.1.json --examples 4
    python benchmarks/cartridge.py --model tiny --data squad --examples 1

The teacher is the model with worked examples in front, as in distil.py. Both prompts begin as the
keys and values of the teacher's first --columns tokens, as initialize_kv_prefix_from_text makes
them, and learn its distributions at the tokens of the answers. That is self-study's objective; here
the answers are the data's. PEFT's step is the one that its users write: teacher and student read
every question with its paragraph, padded to the longest, the teacher after all of its text. In ours
the teacher's text was run once. Before anything is timed, loss and gradient of both are compared in
fp32; then they take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
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
from lab.adapters import prefix_numbers
from lab.beginning import read_inputs
from lab.distil import Teacher, teacher_text
from lab.folder import Run
from lab.loss import begin, taught_loss
from lab.settings import Settings

TOLERANCE = 1e-4  # relative, between the losses and between the gradients of the two


class Ours:
    def __init__(self, inputs, text, prefix: llama.Past):
        self.model, self.questions = inputs.loaded.model, inputs.questions
        self.teacher = Teacher(inputs.loaded, text, inputs.questions, inputs.settings)
        self.prefix = prefix._replace(
            keys=tuple(t.clone().requires_grad_() for t in prefix.keys),
            values=tuple(t.clone().requires_grad_() for t in prefix.values))

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

    def gradient(self) -> Tensor:
        """(n, L 2 G hd), as PEFT keeps a prefix."""
        keys, values = (tuple(t.grad for t in cached)
                        for cached in (self.prefix.keys, self.prefix.values))
        return prefix_numbers(self.prefix._replace(keys=keys, values=values))


class Theirs:
    def __init__(self, base, inputs, teacher: Teacher, prefix: llama.Past):
        self.base, self.student, self.taught = base, inputs.questions, teacher.questions
        numbers = prefix_numbers(prefix)
        self.model = peft.get_peft_model(base, peft.CartridgeConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(numbers), num_frozen_tokens=0))
        self.encoder = self.model.prompt_encoder["default"]
        self.encoder.load_prompt_embeddings(numbers)

    def step(self, indices: list[int]) -> float:
        self.encoder.trainable_embedding.grad = None
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
                          for i, r in enumerate(rows)]).log_softmax(dim=-1)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="smollm2", help="a folder; benchmarks/smollm2.py makes one")
    p.add_argument("--data", required=True, help="a SPEC, such as squad:train-v1.1.json")
    p.add_argument("--examples", type=int, default=4, help="worked examples of the teacher")
    p.add_argument("--columns", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--batches", type=int, default=3, help="a turn of each")
    a = p.parse_args()

    settings = Settings.from_flags({
        "model": a.model, "data": a.data, "teacher": worked_examples(a.data, a.examples),
        "device": "cpu", "dtype": "float32", "batch_size": a.batch_size}).complete()
    inputs = read_inputs(Run(Path("none")), settings, None, False)
    text = teacher_text(inputs.loaded, settings)
    first = text.first(a.columns)
    first = llama.Past(first.keys, first.values, first.real[:, :0], first.position)
    mine = Ours(inputs, text, first)
    base = transformers.LlamaForCausalLM.from_pretrained(inputs.loaded.folder, dtype=torch.float32)
    other = Theirs(base.requires_grad_(False), inputs, mine.teacher, first)

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
