"""With --tokens 0, steps that begin at the first layer with rows against steps through all.

The inputs of that layer are kept; what keeping them costs once is timed too.

    python benchmarks/trunk.py --deep-layers 3
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch

import peers
import data
import llama
from train import answer_loss, trunk


def main() -> None:
    a = peers.arguments(__doc__.splitlines()[0], deep_layers=(3, "last layers that own rows"))
    a.trunk_memory = 4.0
    rows = [r for batch in peers.questions(a, 1) for r in batch]
    peer, model = peers.models(a, "float32")
    L, D = model.config.num_hidden_layers, model.config.hidden_size
    layers = range(L - a.deep_layers, L)
    prompt = llama.Prompt({i: torch.randn(a.tokens, D, generator=torch.Generator().manual_seed(i))
                           for i in layers}, cut=True).to(a.device)
    labels = data.collate(rows).labels

    def step(model, rows):
        prompt.zero_grad()
        batch = data.collate(rows)._replace(labels=labels).to(a.device)
        total, count = answer_loss(model, model.extend(batch.shared, prompt.past(model)), batch)
        (total / count).backward()
        return total.item() / count, torch.cat([p.grad for p in prompt.parameters()])

    with tempfile.TemporaryDirectory() as folder:
        keep = lambda: trunk(model, rows, layers[0], a.tokens, a, Path(folder) / "trunk")
        top, placed = keep()
        whole, short = step(model, rows), step(top, placed)
        off = float((whole[1] - short[1]).norm() / whole[1].norm())
        print(f"{peers.machine(a)}\n{a.shape} shape, {L} layers, {a.dtype}; rows at the last "
              f"{a.deep_layers}; {len(rows)} questions of {a.data}\nfp32: loss {whole[0]:.6f} and "
              f"{short[0]:.6f}; gradients differ by {off:.1e}")
        assert abs(whole[0] - short[0]) <= 1e-5 * whole[0] and off <= 1e-5
        model.to(getattr(torch, a.dtype))
        top, placed = keep()
        times, _ = peers.take_turns({"whole": lambda: step(model, rows),
                                     "kept": lambda: step(top, placed), "keeping": keep},
                                    a.repeats, a.device)
    size = top.inputs.numel() * top.inputs.element_size()
    print(", ".join(f"{name} {statistics.median(t):.3f} s" for name, t in times.items())
          + "; a step is faster by {:.2f} ({:.2f} to {:.2f})".format(
              *peers.ratio(times, "whole", "kept"))
          + f"; {size / len(top.inputs):.0f} bytes kept a token")


if __name__ == "__main__":
    main()
