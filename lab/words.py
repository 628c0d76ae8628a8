"""A prompt read in words: rows as mixtures of tokens, the discrete prompt that says the same, what
each row does, and which property of the rows does the work.

    found = mixtures_of({"trained": rows}, tokens, vocabulary)["trained"]    # found.shares (n, 8)
    prompts = discrete(prompt, loaded)                                       # {metric: Prompt}
    prompts = controls(drawn, prompt, seed)                                  # {property: Prompt}
    print(table(effects(loaded, settings, prompt, questions), EFFECTS))

n prompt rows, D width, V vocabulary.
"""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import llama
from lab import geometry, statistics
from lab.batches import TOGETHER, by_question, losses_and_tokens
from lab.console import UserError
from lab.inputs import LoadedModel, Questions
from lab.settings import Settings

MOST = 8  # tokens of a mixture
DRAWS = 3  # of what is random in a control
SHARES = {f"share_{k}": f"{k} token{'s' * (k > 1)}" for k in (1, 2, 4, MOST)}  # of a table
EFFECTS = {"loss": "loss", "change": "change"}  # of a table of what each row does


class Mixtures(NamedTuple):
    """Rows as sums of few tokens, with weights from 0 up."""

    tokens: list[list[str]]  # of each row, the one that explains most first
    weights: list[list[float]]
    shares: np.ndarray  # (n, MOST): of |row|^2, that the first 1, 2, ... tokens explain

    def numbers(self) -> dict[str, float]:
        """The mean shares in percent, of SHARES."""
        return {key: float(100 * self.shares[:, int(key.split("_")[1]) - 1].mean())
                for key in SHARES}

    def texts(self) -> list[str]:
        """Each row's first three tokens with their weights, as '0.8 " red" + 0.3 "blue"'."""
        return [" + ".join(f"{w:.2g} {json.dumps(token)}" for w, token in zip(row, tokens[:3]))
                for row, tokens in zip(self.weights, self.tokens)]


def mixtures_of(sets: dict[str, Tensor], tokens: Tensor, vocabulary: data.Vocabulary
                ) -> dict[str, Mixtures]:
    """Sets of rows {name: (n, D)} as mixtures, all at once, because the vocabulary is read again
    for every token of a mixture. tokens (V, D): the embeddings of its ordinary tokens."""
    rows, most = torch.cat([*sets.values()]), min(MOST, len(tokens))
    index, weight, share = geometry.mixtures(rows.numpy(), tokens.numpy(), most)
    share = np.pad(share, ((0, 0), (0, MOST - most)), "edge")
    found, first = {}, 0
    for name, x in sets.items():
        part = slice(first, first := first + len(x))
        used = [row[row >= 0].tolist() for row in index[part]]
        words = [[vocabulary.token_text(vocabulary.ordinary[j]) for j in row] for row in used]
        weights = [row[:len(members)].tolist() for row, members in zip(weight[part], used)]
        found[name] = Mixtures(words, weights, share[part])
    return found


# --------------------------------------------------------------------------------------------------
# prompts that say less


def discrete(prompt: llama.Prompt, loaded: LoadedModel) -> dict[str, llama.Prompt]:
    """{metric: prompt} with each row at the token embeddings replaced by the nearest token's. Rows
    at deeper layers stay. Raises UserError for a prompt without rows at the token embeddings."""
    if prompt.is_prefix or 0 not in prompt.layers:
        what = "keys and values" if prompt.is_prefix else "rows at deep layers"
        raise UserError(f"--words puts tokens in the place of rows, and this prompt has {what} "
                        "alone: leave it out; --ablate tells what each of them does")
    ordinary = torch.tensor(loaded.vocabulary.ordinary)
    tokens = loaded.model.embeddings[ordinary.to(loaded.device)].float().cpu()
    prompts = {}
    for metric in ("cosine", "l2"):
        index, _ = geometry.nearest(prompt.layers[0].float().cpu().numpy(), tokens.numpy(),
                                    metric=metric)
        rows = tokens[torch.from_numpy(index[:, 0])].to(prompt.layers[0])
        prompts[metric] = prompt._replace(layers={**prompt.layers, 0: rows})
    return prompts


def without_each(prompt: llama.Prompt) -> list[llama.Prompt]:
    """The prompt without each of its rows (or columns of a prefix) in turn; later ones move up.
    Raises UserError for a prompt of one row."""
    if prompt.n < 2:
        raise UserError("--ablate takes rows out one by one, and this prompt has one: leave it "
                        "out; the table says what no prompt scores")
    return [prompt._replace(layers={layer: torch.cat((t[:i], t[i + 1:]))
                                    for layer, t in prompt.layers.items()})
            for i in range(prompt.n)]


def controls(drawn: llama.Prompt, trained: llama.Prompt, seed: int) -> dict[str, llama.Prompt]:
    """{name: prompt} that share all but one property with a trained prompt, which is the prior's
    draw and a step of each row (or column of a prefix, keys and values together). What is random is
    drawn DRAWS times from the seed; the rows' order is the same at all layers. Of one row there is
    no other order."""
    generator = torch.Generator().manual_seed(seed)
    start = {i: drawn.layers[i].to(end) for i, end in trained.layers.items()}
    steps = {i: end - start[i] for i, end in trained.layers.items()}
    made = {"its draw": start,
            "half of the way from its draw": {i: start[i] + steps[i] / 2 for i in steps},
            "steps without the draw": steps}
    if trained.n > 1:
        made["the mean row in every place"] = {
            i: end.mean(dim=0).expand_as(end).contiguous() for i, end in trained.layers.items()}
    for k in range(1, DRAWS + 1):
        noise = {i: _of_lengths(x, generator) for i, x in steps.items()}
        made[f"as far in random directions, {k}"] = {i: start[i] + noise[i] for i in steps}
        cycle = torch.randperm(trained.n, generator=generator)
        order = torch.empty_like(cycle)
        order[cycle] = cycle.roll(1)  # in which no row stays where it is
        if trained.n > 1:
            made[f"steps of other rows, {k}"] = {i: start[i] + steps[i][order] for i in steps}
            made[f"rows in another order, {k}"] = {
                i: end[order] for i, end in trained.layers.items()}
    return {name: trained._replace(layers=made[name]) for name in sorted(made)}


def _of_lengths(steps: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions of the same lengths as steps (n, ...)."""
    noise = torch.randn(steps.shape, generator=generator).to(steps)
    length = steps.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    return noise * length.view(-1, *[1] * (steps.dim() - 1))


def paired_differences(questions: Questions, predictions: dict[str, list[dict]],
                       of: dict[str, str]) -> list[tuple[str, dict[str, float]]]:
    """(name, difference in points) of the scores of entries from those of others, with its standard
    error, paired by question. predictions: as evaluate gives them, by the entry's name. of: {name:
    that of the other}."""
    clusters, ones, rows = questions.clusters(), np.ones(len(questions)), []
    for name, other in of.items():
        key = "f1" if "f1" in predictions[name][0] else "accuracy"
        change = np.array([a[key] - b[key] for a, b in zip(predictions[name], predictions[other])])
        numbers = {key: float(change.mean())}
        if clusters is not None:
            numbers[f"{key}_se"] = statistics.ratio_error(change, ones, clusters)
        rows.append((name, numbers))
    return rows


def effects(loaded: LoadedModel, settings: Settings, prompt: llama.Prompt,
            questions: Questions) -> list[tuple[str, dict[str, float]]]:
    """(name, numbers) of every row: the loss (nats a token) without it, and the change that makes,
    with the standard error of this difference, paired by question."""
    prompts = without_each(prompt)
    groups = [[prompt], *(prompts[i:i + TOGETHER] for i in range(0, len(prompts), TOGETHER))]
    losses = []
    for number, group in enumerate(groups):
        name = f"rows taken out, part {number} of {len(groups) - 1}" if number else "all rows"
        losses += by_question(loaded.model, [[p] for p in group], settings.prompt.place,
                              settings.data, False, questions, name,
                              partial(losses_and_tokens, loaded.model))
    whole, *others = np.array(losses)  # (questions, 2) each
    tokens, clusters, rows = whole[:, 1], questions.clusters(), []
    for i, x in enumerate(others):
        change = x[:, 0] - whole[:, 0]
        numbers = {"loss": float(x[:, 0].sum() / tokens.sum()),
                   "change": float(change.sum() / tokens.sum())}
        if clusters is not None:
            numbers["change_se"] = statistics.ratio_error(change, tokens, clusters)
        rows.append((f"row {i + 1}", numbers))
    return rows
