"""Training steps of prompt tuning, ours against PEFT's, on the same weights and questions.

    python benchmarks/training.py                                    # 135M shape, bundled SQuAD
    python benchmarks/training.py --data squad:train-v1.1.json       # real SQuAD
    python benchmarks/training.py --shape 1b --layers 4              # LLaMA 3.2 1B's shape, bf16
    python benchmarks/training.py --data math:train-easy

A step is forward and backward of one batch to the prompt's gradient. PEFT gets the batch as its
users give it: every question with its paragraph, padded to the longest. Before anything is timed,
loss and gradient of both are compared in fp32. Rows are fp32 on our side and of the model's dtype
on PEFT's.

What the operations allow counts every distinct token once through every layer. A step does less
where nothing is wanted: in the last layer, and in the backward of the first one's projections.
"""

from __future__ import annotations

import statistics

import torch

import peers
import data
import llama
from lab.loss import answer_loss


def ours(model: llama.Llama, prompt: llama.Prompt, rows: list[data.Row], device: str):
    """Our step: loss (nats a token); the gradient is left in the prompt's rows."""
    prompt.layers[0].grad = None
    batch = data.collate(rows).to(device)
    total, count = answer_loss(model, model.extend(batch.shared, prompt.past(model)), batch)
    loss = total / count
    loss.backward()
    return loss.detach()


def theirs(model, rows: list[data.Row], device: str):
    model.zero_grad()
    ids = llama.pad([r.ids for r in rows], value=0).to(device)
    mask = llama.pad([[1] * len(r.ids) for r in rows], value=0).to(device)
    labels = llama.pad([[-100] * r.start + r.ids[r.start:] for r in rows], value=-100).to(device)
    # as transformers' Trainer: no cache of keys and values
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach()


def operations(c: llama.Config, rows: list[data.Row], n: int) -> tuple[int, int]:
    """Multiply-adds of a step (forward, and backward to activations): PEFT's, and ours when every
    distinct token is computed once and the head only at answers. Attention counts every query with
    every key in PEFT's padded square, and only those that it can see in ours."""
    linear = c.num_hidden_layers * c.hidden_size * (
        2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        + 3 * c.intermediate_size)
    pair = c.num_hidden_layers * 2 * c.num_attention_heads * c.head_dim  # scores, and their sum
    head = c.hidden_size * c.vocab_size
    T = n + max(len(r.ids) for r in rows)
    theirs = len(rows) * T * (2 * linear + 3 * pair * T + 2 * head)
    prefixes = {tuple(r.ids[:i]) for r in rows for i in range(1, len(r.ids))}
    pairs = n * (n + 1) // 2 + sum(n + len(p) for p in prefixes)
    answers = sum(len(r.ids) - r.start for r in rows)
    return theirs, (n + len(prefixes)) * 2 * linear + 3 * pair * pairs + answers * 2 * head


def main() -> None:
    a = peers.arguments(__doc__.splitlines()[0], batches=(3, "different batches"),
                        recompute=(0, "1: ours keeps no activations inside a block"))
    batches = peers.questions(a, a.batches)
    rows = torch.randn(a.tokens, peers.SHAPES[a.shape][1]["hidden_size"],
                       generator=torch.Generator().manual_seed(a.seed)) * 0.02
    peer, model = peers.models(a, "float32")
    tuned, model.recompute = peers.peft_model(peer, rows.to(a.device)), bool(a.recompute)
    prompt = llama.Prompt({0: rows.to(a.device).requires_grad_()})
    weight = tuned.prompt_encoder["default"].embedding.weight
    c = model.config
    print(f"{peers.machine(a)}\n{a.shape} shape, {c.num_hidden_layers} layers, {a.dtype}; "
          f"{a.tokens} rows; {a.batches} batches of {a.batch_size} questions of {a.data}")
    for batch in batches[:1]:
        mine, other = ours(model, prompt, batch, a.device), theirs(tuned, batch, a.device)
        gradient = prompt.layers[0].grad
        off = float((gradient - weight.grad).norm() / weight.grad.norm())
        print(f"fp32: loss {mine:.6f}, PEFT's {other:.6f}; gradients differ by {off:.1e} of theirs")
        assert abs(mine - other) <= 1e-5 * abs(other) and off <= 1e-5
    tuned.to(getattr(torch, a.dtype)), model.to(getattr(torch, a.dtype))

    for number, batch in enumerate(batches):
        few = data.collate(batch)
        print(f"\nbatch {number + 1}: {len(few.shared)} beginnings of {few.shared.shape[1]} tokens "
              f"at most, {sum(len(r.ids) for r in batch)} tokens in all, longest "
              f"{max(len(r.ids) for r in batch)}")
        calls = {"ours": lambda: ours(model, prompt, batch, a.device),
                 "PEFT": lambda: theirs(tuned, batch, a.device)}
        times, memory = peers.take_turns(calls, a.repeats, a.device)
        most, least = operations(c, batch, a.tokens)
        middle, low, high = peers.ratio(times, "PEFT", "ours")
        for name in calls:
            print(f"  {name}: {len(batch) / statistics.median(times[name]):8.2f} examples/s   "
                  f"{memory[name] / 2**20:8.0f} MiB above the weights")
        print(f"  faster by {middle:.2f} ({low:.2f} to {high:.2f}); operations allow "
              f"{most / least:.2f}, of which {100 * middle * least / most:.0f} %; memory "
              f"{memory['ours'] / memory['PEFT']:.3f} of PEFT's", flush=True)


if __name__ == "__main__":
    main()
