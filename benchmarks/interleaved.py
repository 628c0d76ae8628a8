"""Two runs at once: in one process by turns or in threads of its own, and in two processes.

    python benchmarks/interleaved.py --model smollm2 --dtype bfloat16 --data squad:train-v1.1.json

Steps an hour of all runs together, forward and backward of a batch of real questions, in --turns
turns. by turns: one run after the other, a step each, with two threads of torch. python threads:
two, with a thread of torch each, which share the model. processes: two, with a thread of torch
each and a model of their own, as `sweep --jobs 2` has them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time

import torch

from training import ours  # first, as it lets the program's modules be found
import data
import llama
from lab.inputs import parse_spec

WAYS = ("by turns", "python threads", "processes")


def steps(model: llama.Llama, rows: list[data.Row], count: int, threads: int, seed: int) -> None:
    """So many steps of one run, whose prompt is of its own."""
    torch.set_num_threads(threads)  # of the thread that calls
    g = torch.Generator().manual_seed(seed)
    drawn = model.embeddings[torch.randint(len(model.embeddings), (20,), generator=g)].float()
    prompt = llama.Prompt({0: drawn.clone().requires_grad_()})
    for _ in range(count):
        ours(model, prompt, rows, "cpu")


def child(a) -> None:
    """One of two processes: it says when it is ready, and begins when it is told."""
    model, rows = inputs(a)
    steps(model, rows, 1, 1, 0)
    print(flush=True)
    sys.stdin.readline()
    steps(model, rows, a.steps, 1, a.child)


def inputs(a) -> tuple[llama.Llama, list[data.Row]]:
    model = llama.load(a.model, a.dtype)
    for weight in model.parameters():
        weight.requires_grad_(False)
    vocabulary = data.Vocabulary(a.model, bos=model.config.bos_token_id)
    examples = [e for e in data.read(*parse_spec(a.data, 0)) if e.answers][:a.batch_size]
    return model, [data.encode(e, vocabulary, 1024, "") for e in examples]


def seconds(way: str, a, model: llama.Llama, rows: list[data.Row]) -> float:
    """Of a.steps steps of each of two runs."""
    if way == "processes":
        both = [subprocess.Popen([sys.executable, *sys.argv, "--child", str(i)],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE) for i in (1, 2)]
        for process in both:
            process.stdout.readline()
        begin = time.perf_counter()
        for process in both:
            process.stdin.write(b"\n")
            process.stdin.flush()
        for process in both:
            process.communicate()
    elif way == "python threads":
        both = [threading.Thread(target=steps, args=(model, rows, a.steps, 1, i)) for i in (1, 2)]
        begin = time.perf_counter()
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    else:
        begin = time.perf_counter()
        for _ in range(a.steps):
            for i in (1, 2):
                steps(model, rows, 1, 2, i)
    return time.perf_counter() - begin


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--data", required=True)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--child", type=int, default=0, help="of this script alone")
    a = p.parse_args()
    if a.child:
        return child(a)
    model, rows = inputs(a)
    steps(model, rows, 1, 2, 0)  # a warm-up
    times = {way: [] for way in WAYS}
    for _ in range(a.turns):
        for way in WAYS:
            times[way].append(seconds(way, a, model, rows))
    for way in WAYS:
        median, ratios = statistics.median(times[way]), [
            first / own for first, own in zip(times["by turns"], times[way])]
        print(f"{way}: {3600 * 2 * a.steps / median:.0f} steps an hour; faster than by turns by "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
              flush=True)


if __name__ == "__main__":
    main()
