"""What is measured of every question, batch by batch; processes share the batches.

    losses = by_question(model, [past], "before", settings.data, False, questions, "eval", score)
"""

from __future__ import annotations

from typing import Callable, Iterable

import torch

import data
import llama
from lab.console import progress
from lab.inputs import Questions
from lab.loss import Text, begin
from lab.processes import all_gather, rank_and_size
from lab.settings import DataSettings


@torch.no_grad()
def by_question(model: llama.Llama, prompts: list[llama.Prompt | llama.Past | Text], place: str,
                settings: DataSettings, everywhere: bool, questions: Questions, name: str,
                score: Callable[[list[int], list[llama.Past], data.Batch], Iterable]) -> list:
    """score(members, pasts, batch) of each question, on every process: members are the questions of
    a batch, which goes on from the pasts, one of each prompt.

    everywhere: every process scores all batches, because they share the model's weights."""
    rank, size = (0, 1) if everywhere else rank_and_size()
    indices = range(len(questions))
    batches = [indices[i:i + settings.batch_size] for i in indices[::settings.batch_size]]
    batches = batches[rank::size]

    scored = {}
    with progress(total=sum(map(len, batches)), desc=name, unit=" questions", leave=False) as bar:
        for members in batches:
            batch = questions.batch(members, settings.share, place, model.embeddings.device)
            begun = [begin(model, batch, prompt, place) for prompt in prompts]
            pasts = [past for past, _ in begun]
            scored.update(zip(members, score(members, pasts, begun[0][1])))
            bar.update(len(members))
    if size > 1:
        for part in all_gather(scored):
            scored.update(part)
    return [scored[i] for i in indices]
