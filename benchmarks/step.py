"""What a training step on a real model is made of, and what its matrix products alone would take.

    python benchmarks/smollm2.py smollm2
    python benchmarks/step.py --model smollm2 --data squad:train-v1.1.json
    python benchmarks/step.py --model smollm2 --dtype bfloat16 --layers 6    # a fifth of the time

A step is forward, backward and the update of 20 rows, on a batch as `train` makes it. Its matrix
products are recorded, with the layouts of their operands, and made again alone, in the order of the
step; the two take turns. Products are those of projections and head; attention's own, which a fused
kernel makes, stand beside them. Seconds are CPU seconds of the process, which other work on the
machine disturbs least; with several threads the wall clock's are printed too.

The share of each kind of operation is the profiler's self time, with its own cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded, as promptprior.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import data  # noqa: E402
import llama  # noqa: E402
from lab.inputs import parse_spec  # noqa: E402
from lab.loss import answer_loss, begin  # noqa: E402
from lab.train import keep_freed_memory  # noqa: E402

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

# kind of operation -> beginnings of the names of torch's operators
KINDS = {
    "products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "loss": ("aten::_log_softmax", "aten::nll_loss"),
    "norms, rotation, silu, sums": (
        "aten::mul", "aten::add", "aten::sub", "aten::silu", "aten::sigmoid", "aten::pow",
        "aten::mean", "aten::rsqrt", "aten::sum", "aten::neg", "aten::div", "aten::linalg"),
    "copies and gathers": (
        "aten::cat", "aten::copy_", "aten::index", "aten::fill_", "aten::zero_", "aten::roll",
        "aten::embedding", "aten::masked"),
    "optimiser": ("Optimizer", "aten::_fused_adamw", "aten::lerp", "aten::addc"),
}


class Recorder(TorchDispatchMode):
    """The matrix products of what runs under it, in order, and the shapes of its attention."""

    def __init__(self):
        super().__init__()
        self.products: list[tuple] = []  # (shape and stride of the left operand, of the right one)
        self.attention: list[tuple] = []  # ((heads, queries, width), keys, whether backward)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().removeprefix("aten::")
        if name in ("mm", "bmm", "addmm"):
            a, b = args[-2:]
            described = tuple((tuple(t.shape), tuple(t.stride())) for t in (a, b))
            (self.products if name != "bmm" else self.attention).append(described)
        elif name.startswith(ATTENTION):
            is_backward = name.startswith(f"{ATTENTION}_backward")
            q, k = args[1:3] if is_backward else args[:2]
            self.attention += attention_products(q.shape, k.shape[2], is_backward)
        return operator(*args, **(kwargs or {}))


def attention_products(shape: tuple[int, ...], keys: int, is_backward: bool) -> list[tuple]:
    """The products that attention with queries of this shape (B, H, T, hd) stands for: scores and
    sums forward; backward the gradients of weights, values, queries and keys."""
    heads, T, hd = shape[0] * shape[1], shape[2], shape[3]

    def described(m, k, n, transposed):
        left = ((heads, m, k), (m * k, k, 1))
        return left, ((heads, k, n), (n * k, 1, k) if transposed else (n * k, n, 1))

    if is_backward:
        return [described(T, hd, keys, True), described(keys, T, hd, False),
                described(T, keys, hd, False), described(keys, T, hd, False)]
    return [described(T, hd, keys, True), described(T, keys, hd, False)]


def multiply_adds(products: list[tuple]) -> int:
    total = 0
    for (left, _), (right, _) in products:
        total += torch.Size(left).numel() * right[-1]
    return total


class Products:
    """The recorded products, on random operands of the same layouts."""

    def __init__(self, recorded: list[tuple], dtype: torch.dtype):
        self.recorded, self.operands = recorded, {}
        for pair in set(recorded):
            self.operands[pair] = [_random(*operand, dtype) for operand in pair]

    @torch.no_grad()
    def __call__(self) -> None:
        for pair in self.recorded:
            torch.matmul(*self.operands[pair])


def _random(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride))
    return torch.randn(size).to(dtype).as_strided(shape, stride)


def make_step(model: llama.Llama, batch: data.Batch, tokens: int):
    """A call that makes a training step of prompt rows."""
    picked = torch.randint(len(model.embeddings), (tokens,),
                           generator=torch.Generator().manual_seed(0))
    rows = model.embeddings[picked].float().requires_grad_()
    optimiser = torch.optim.AdamW([rows], lr=1e-3, weight_decay=0.0)

    def step() -> None:
        past, begun = begin(model, batch, llama.Prompt({0: rows}))
        summed, count = answer_loss(model, past, begun)
        (summed / count).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def shares(step) -> dict[str, float]:
    """The share of each kind of operation in the profiler's self time; the rest is views,
    autograd and Python."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    seconds: Counter = Counter()
    for event in profiled.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "rest")
        seconds[kind] += event.self_cpu_time_total
    return {kind: value / seconds.total() for kind, value in seconds.most_common()}


def describe(model: llama.Llama, batch: data.Batch, recorder: Recorder) -> str:
    """Tokens and multiply-adds of a step."""
    lines = []
    for name, ids in (("beginnings", batch.shared), ("tails", batch.tails)):
        real = int((ids != llama.PAD).sum())
        lines.append(f"{name}: {len(ids)} rows, {real} tokens, {ids.numel()} with padding, which "
                     "attention alone may see")
    scored = int((batch.labels != data.NO_LABEL).sum())
    product, attention = map(multiply_adds, (recorder.products, recorder.attention))
    lines.append(f"{scored} answer tokens; multiply-adds: {product / 1e9:.1f} G in "
                 f"{len(recorder.products)} products, {attention / 1e9:.1f} G in attention's "
                 f"{len(recorder.attention)}")
    return "\n".join(lines)


def take_turns(calls: dict, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, seconds) of each call, one after the other, after a turn to warm up."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if turn:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, help="a model folder")
    p.add_argument("--data", default="squad", help="SPEC of the questions, as for train")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--batch", type=int, default=0, help="which batch of the order of --seed")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--tokens", type=int, default=20, help="prompt rows")
    p.add_argument("--layers", type=int, help="of the model, the first ones alone")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--repeats", type=int, default=5, help="timed turns of each, after a warm-up")
    a = p.parse_args()
    keep_freed_memory()
    torch.set_num_threads(a.threads)

    model = llama.load(a.model, a.dtype)
    if a.layers:
        model.config = replace(model.config, num_hidden_layers=a.layers)
        model.model.layers = model.model.layers[:a.layers]
    vocabulary = data.Vocabulary(a.model, bos=model.config.bos_token_id)
    examples = [e for e in data.read(*parse_spec(a.data, 0)) if e.answers]
    order = data.Order([e.context for e in examples], a.batch_size, a.seed)
    encoded = [data.encode(examples[i], vocabulary, 1024) for i in order[a.batch]]
    batch = data.collate([row for row in encoded if row])
    step = make_step(model, batch, a.tokens)

    with Recorder() as recorder:
        step()
    dtype = model.embeddings.dtype
    print(f"{a.model}, {model.config.num_hidden_layers} layers, {a.dtype}, {a.threads} threads, "
          f"torch {torch.__version__}\n{describe(model, batch, recorder)}", flush=True)
    calls = {"step": step, "products": Products(recorder.products, dtype),
             "attention's products": Products(recorder.attention, dtype)}
    times = take_turns(calls, a.repeats)
    clocks = ("CPU seconds", "seconds") if a.threads > 1 else ("CPU seconds",)
    for clock, name in enumerate(clocks):
        medians = {key: statistics.median(t[clock] for t in of_call)
                   for key, of_call in times.items()}
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in medians.items()))
        for keys in (["products"], ["products", "attention's products"]):
            ratios = [sum(times[key][i][clock] for key in keys) / times["step"][i][clock]
                      for i in range(a.repeats)]
            print(f"  {' and '.join(keys)} alone / step: {statistics.median(ratios):.3f} "
                  f"({min(ratios):.3f} to {max(ratios):.3f})")
    rate = multiply_adds(recorder.products) / statistics.median(
        t[0] for t in times["products"]) / 1e9
    print(f"  products: {2 * rate:.0f} GFLOP/s of CPU time")
    print("of the profiled step: " + ", ".join(
        f"{kind} {100 * share:.1f} %" for kind, share in shares(step).items()))


if __name__ == "__main__":
    main()
