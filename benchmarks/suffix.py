"""What the distance alone costs that a prompt puts between a question and its answer.

With --place suffix, n rows stand between the question and the last token that asks for the answer,
so that this token and the answer stand n positions later. Here they do so without any row: the loss
then shows what the model loses by the distance, whatever the rows say.

    python benchmarks/suffix.py                                 # the bundled model
    python benchmarks/suffix.py --model smollm2 --text ""
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import llama
from lab.loss import answer_loss

BUNDLED = Path(__file__).resolve().parent.parent / "tiny"


@torch.no_grad()
def losses(model: llama.Llama, vocabulary: data.Vocabulary, examples: list[data.Example],
           distances: list[int], text: str = "") -> list[float]:
    """The loss in nats a token at each distance, in positions. text: in front of every question."""
    rows = [data.encode(e, vocabulary, 1024, text and f"{text}\n") for e in examples]
    batch = data.collate(rows, suffix=True)
    past = model.extend(batch.shared, model.empty())
    past = model.extend(batch.head, past.take(batch.parent))
    batch = batch._replace(parent=torch.arange(len(batch.tails)))
    at_distances = []
    for distance in distances:
        moved = past._replace(position=past.position + distance)
        summed, tokens = answer_loss(model, moved, batch)
        at_distances.append(float(summed) / tokens)
    return at_distances


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=BUNDLED)
    p.add_argument("--data", default=f"math:{BUNDLED / 'math' / 'interpolate'}")
    p.add_argument("--text", default="short answer")
    p.add_argument("--limit", type=int, default=64, help="questions")
    p.add_argument("--distances", type=int, nargs="+", default=[0, 1, 5, 10, 20, 40])
    a = p.parse_args()
    examples = data.read(*a.data.split(":", 1))[:a.limit]
    vocabulary = data.Vocabulary(a.model)
    for distance, loss in zip(a.distances, losses(llama.load(a.model), vocabulary, examples,
                                                  a.distances, a.text)):
        print(f"{distance:3d} positions later: loss {loss:.3f}")


if __name__ == "__main__":
    main()
