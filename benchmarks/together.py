"""Several prompts in one batch against one after the other: seconds, and whether the answers are
the same.

    python benchmarks/together.py [--model DIR] [--data SPEC] [--prompts 4] [--questions 16]

Prompts are 20 tokens' embeddings each, drawn at random. The model is loaded once for both, and no
prompt is scored twice; the two take turns. `generate` writes 32 tokens after one text, `eval`
scores questions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama  # noqa: E402
from lab.evaluation import evaluate_each  # noqa: E402
from lab.inputs import encode, load_model, read_questions, sample_topics  # noqa: E402
from lab.settings import DataSettings, ModelSettings  # noqa: E402


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="tiny")
    p.add_argument("--data", default="squad", help="a SPEC")
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--questions", type=int, default=16)
    p.add_argument("--turns", type=int, default=5)
    a = p.parse_args()
    loaded = load_model(ModelSettings(a.model).complete())
    model = loaded.model
    examples = sample_topics(read_questions(a.data, 1, False), a.questions)
    questions = encode(examples, loaded.vocabulary, 400, a.data)
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.tensor(loaded.vocabulary.ordinary)
    prompts = []
    for _ in range(a.prompts):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)[:20]]
        prompts.append(llama.Prompt({0: model.embeddings[drawn]}))
    ids = questions.row(0).question

    @torch.no_grad()
    def generate(group: list[llama.Prompt]) -> list:
        past = llama.stack([prompt.past(model) for prompt in group])
        return llama.generate(model, [ids] * len(group), past, 32)

    def score(group: list[llama.Prompt]) -> list:
        results = evaluate_each(loaded, [[prompt] for prompt in group], questions, "before",
                                DataSettings(), "")
        return [[line["prediction"] for line in predictions] for _, predictions in results]

    print(f"{a.prompts} prompts, {len(questions)} questions, {a.turns} turns")
    for name, work in (("generate", generate), ("eval", score)):
        together, ratios = [], []
        for _ in range(a.turns):
            began = time.perf_counter()
            one_batch = work(prompts)
            between = time.perf_counter()
            alone = [answer for prompt in prompts for answer in work([prompt])]
            if one_batch != alone:
                raise SystemExit(f"together: {name} answers otherwise in one batch")
            together.append(between - began)
            ratios.append((time.perf_counter() - between) / together[-1])
        print(f"{name}: {statistics.median(together):.2f} s in one batch; one after the other "
              f"{statistics.median(ratios):.2f} times that ({min(ratios):.2f} to "
              f"{max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
