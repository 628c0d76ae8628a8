"""Questions under prompts, batch by batch: what a score function returns of each of them.

    by_question(model, [[prompt]], "before", data, False, questions, "step 0", score)[0]

Processes share the batches. Several prompts share them too: they have the questions one after the
other, as rows of one batch.
"""

from __future__ import annotations

from itertools import product
from typing import Callable, Iterable

import torch

import data
import llama
from lab.console import progress
from lab.inputs import Questions
from lab.loss import Text, answer_losses, begin
from lab.processes import all_gather, rank_and_size
from lab.settings import DataSettings

TOGETHER = 8  # prompts of one batch at most: each needs the memory of a batch


@torch.no_grad()
def by_question(model: llama.Llama, entries: list[list[llama.Prompt | llama.Past | Text]],
                place: str, settings: DataSettings, everywhere: bool, questions: Questions,
                name: str, score: Callable[[list[int], list[llama.Past], data.Batch], Iterable],
                finish: Callable[[], None] = lambda: None) -> list[list]:
    """What score(members, pasts, batch) returns of every question: a list for each of several
    entries, of as many prompts each. members: the questions of a batch, which goes on from the
    pasts. finish: called after the last batch, to complete in place what score returned.
    everywhere: all processes score all batches, because they share the model's weights.
    Raises ModelError for prompts that one batch cannot hold, see llama.stack."""
    # What a prompt before the text leaves in the cache is the same for every batch.
    if place == "before":
        entries = [[p.past(model) if isinstance(p, llama.Prompt) else p for p in prompts]
                   for prompts in entries]
    # Every process takes its share of the batches.
    rank, size = (0, 1) if everywhere else rank_and_size()
    indices = range(len(questions))
    batches = [indices[i:i + settings.batch_size] for i in indices[::settings.batch_size]]
    batches = batches[rank::size]

    scored = {}
    total = sum(map(len, batches))
    with progress(total=total, desc=name, unit=f" {questions.unit}", leave=False) as bar:
        for members in batches:
            batch = questions.batch(members, settings.share, place, model.embeddings.device)
            begun = [begin(model, batch, [*prompts], place) for prompts in zip(*entries)]
            results = score(members, [past for past, _ in begun], begun[0][1])
            scored.update(zip(product(range(len(entries)), members), results))
            bar.update(len(members))
        finish()
    if size > 1:
        for part in all_gather(scored):
            scored.update(part)
    return [[scored[k, i] for i in indices] for k in range(len(entries))]


def grouped(entries: dict[str, list[llama.Prompt]]) -> list[tuple[str, list[str]]]:
    """(name, labels) of entries {label: prompts} that share batches: single prompts, TOGETHER at
    most; an ensemble of several has its own."""
    single = [label for label, prompts in entries.items() if len(prompts) == 1]
    groups = [single[i:i + TOGETHER] for i in range(0, len(single), TOGETHER)]
    groups += [[label] for label in entries if label not in single]
    return [(labels[0] if len(labels) == 1 else f"{len(labels)} prompts", labels)
            for labels in groups]


def losses_and_tokens(model: llama.Llama, members: list[int], pasts: list[llama.Past],
                      batch: data.Batch) -> Iterable[tuple[float, int]]:
    """A score function: the loss of each right answer in nats, summed over its tokens, and their
    number."""
    counts = (batch.labels != data.NO_LABEL).sum(dim=1).tolist()
    return zip(answer_losses(model, pasts, batch), counts)
