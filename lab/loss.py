"""The loss of answers and greedy answers, on batches that share their beginnings (tries).

    past, batch = begin(model, batch, prompt, "before")
    summed, tokens = answer_loss(model, past, batch)            # the gradient reaches the prompt

This module knows llama.py and data.py alone. B batch, T tokens, Q tails of a batch, M tokens of
their answers, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import data
import llama

CHUNK = 2**24  # logits that are in memory at once where an answer's tokens are not needed together


class Text(NamedTuple):
    """A text that batches begin with, and its keys and values, which are computed once."""

    ids: Tensor  # (K,) int64
    past: llama.Past  # of batch 1, without a prompt

    def first(self, k: int) -> llama.Past:
        """The Past of the first k tokens alone."""
        keys, values = (tuple(None if t is None else t[:, :, :k] for t in cached)
                        for cached in (self.past.keys, self.past.values))
        return llama.Past(keys, values, self.past.real[:, :k],
                          self.past.position - len(self.ids) + k)


def begin(model: llama.Llama, batch: data.Batch,
          prompt: llama.Prompt | llama.Past | Text | list[llama.Prompt | llama.Past | Text],
          place: str = "before") -> tuple[llama.Past, data.Batch]:
    """Run what stands before the batch's tails: its beginnings, and the prompt in its place. Of
    several prompts each has all of the batch, one after the other: K Q tails.

    place: where a Prompt stands: before, after-bos, or suffix, before the last token that asks for
    the answer. A Past of batch 1 stands before everything. A Text, always alone, is part of the
    beginnings, and spares their first tokens. Returns the Past that the tails go on from, and the
    batch whose parent names each tail's row of it. Raises ModelError for prompts that one batch
    cannot hold, see llama.stack."""
    prompts, past = prompt if isinstance(prompt, list) else [prompt], model.empty()
    if isinstance(prompts[0], Text):
        # The text's last tokens may merge with what follows in some row, and then are run anew.
        [text], shared = prompts, batch.shared
        k = min(len(text.ids), shared.shape[1])
        same = (shared[:, :k] == text.ids[:k]).all(dim=0)
        k = int(same.cumprod(dim=0).sum())
        prompts, batch = [text.first(k)], batch._replace(shared=shared[:, k:])
    if isinstance(prompts[0], llama.Past):
        place = "before"
    if place != "suffix":
        if place == "after-bos":
            past = model.extend(batch.shared[:1, :1], past)
            batch = batch._replace(shared=batch.shared[:, 1:])
        past = llama.stack([p if isinstance(p, llama.Past) else p.past(model, past)
                            for p in prompts])
        which = torch.arange(len(prompts), device=batch.shared.device)
        past = past.take(which.repeat_interleave(len(batch.shared)))
        batch = _under_each(batch, len(prompts), len(batch.shared))
    past = model.extend(batch.shared, past)

    if batch.head is not None:  # tokens between a beginning and the prompt before its tail
        past = model.extend(batch.head, past.take(batch.parent))
        batch = _each_its_own_parent(batch)
    if place == "suffix":
        past = past.take(batch.parent)
        batch = _under_each(_each_its_own_parent(batch), len(prompts), len(past.position))
        past = llama.stack([p.past(model, past) for p in prompts])
    return past, batch


def _under_each(batch: data.Batch, prompts: int, rows: int) -> data.Batch:
    """The batch once for each of several prompts, one after the other. rows: of a prompt's Past;
    one row serves all tails."""
    if prompts == 1:
        return batch
    which = torch.arange(prompts, device=batch.parent.device)
    parent = (batch.parent if rows > 1 else batch.parent * 0).repeat(prompts)
    head = None if batch.head is None else batch.head.repeat(prompts, 1)
    return data.Batch(batch.shared.repeat(prompts, 1), batch.tails.repeat(prompts, 1),
                      parent + rows * which.repeat_interleave(len(batch.tails)),
                      batch.labels.repeat(prompts, 1), batch.asked * prompts, head)


def _each_its_own_parent(batch: data.Batch) -> data.Batch:
    """The batch after its Past has one row a tail."""
    rows = torch.arange(len(batch.tails), device=batch.tails.device)
    return batch._replace(parent=rows)


def answer_loss(model: llama.Llama, past: llama.Past, batch: data.Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy in nats over the answers' tokens, and their number. past: see begin.
    Logits are made at those tokens only."""
    is_scored = batch.labels != data.NO_LABEL
    logits = model.logits(model.states(batch.tails, past, batch.parent, is_scored))
    return _cross_entropy(logits, batch.labels[is_scored]), len(logits)


def taught_loss(model: llama.Llama, past: llama.Past, batch: data.Batch, states: Tensor,
                mix: float) -> tuple[Tensor, float, float]:
    """Summed over the answers' tokens, in nats: (1 - mix) KL + mix cross-entropy, with its
    gradient; the cross-entropy of the labels; the Kullback-Leibler divergence of the next token's
    distribution from the teacher's, whose hidden states (M, D) at these tokens are states.

    Logits of CHUNK numbers are made at a time, and made again for the backward pass."""
    is_scored = batch.labels != data.NO_LABEL
    h = model.states(batch.tails, past, batch.parent, is_scored)

    def sums(h: Tensor, states: Tensor, labels: Tensor) -> Tensor:
        logits = model.logits(h)
        kl = _divergence(logits, model.logits(states)).sum()
        return torch.stack((_cross_entropy(logits, labels), kl))

    size = max(1, CHUNK // model.config.vocab_size)
    chunks = zip(h.split(size), states.split(size), batch.labels[is_scored].split(size))
    parts = [checkpoint(sums, *chunk, use_reentrant=False, preserve_rng_state=False)
             for chunk in chunks]
    cross_entropy, kl = torch.stack(parts).sum(dim=0)
    return (1 - mix) * kl + mix * cross_entropy, cross_entropy.item(), kl.item()


def _divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || logits) of each of N distributions over the vocabulary, logits (N, V) each."""
    log_q, log_p = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(dim=-1)
                    for x in (logits, teacher))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction=reduction)


# --------------------------------------------------------------------------------------------------
# greedy answers


class Answers(NamedTuple):
    """What a batch was answered."""

    loss: list[float]  # cross-entropy of each right answer, in nats, summed over its tokens
    tokens: list[int]  # of each right answer
    ids: list[list[int]]  # greedy answers, each up to and with its first token of `stop`
    confidence: list[float]  # the probability of the likeliest first token of every answer
    is_right: list[bool]  # whether the right answer, whose loss this is, begins with that token
    kl: list[float]  # from the teacher, in nats, summed over the right answer's tokens; 0 without


@torch.no_grad()
def answers(model: llama.Llama, pasts: list[llama.Past], batch: data.Batch, max_new: int,
            stop: set[int], states: Tensor | None = None,
            decoding: llama.Decoding | None = None) -> Answers:
    """The loss of the right answers and the greedy answers, of one forward. Of several pasts (see
    begin), which must have the batch's parents in common, token probabilities are averaged. states:
    of a teacher, see taught_loss. decoding: of the same max_new and stop, where up to as many
    answers as the batch has may wait for those of the next; they grow in place until its run().

    Where a right answer's tokens are also the likeliest ones, greedy decoding would have taken
    them. So decoding goes on only from the token at which the two part."""
    is_scored = batch.labels != data.NO_LABEL
    runs = [model(batch.tails, past, parent=batch.parent) for past in pasts]
    logits = llama.ensemble([model.logits(h[is_scored]) for h, _ in runs])
    labels, counts = batch.labels[is_scored], is_scored.sum(dim=1)
    first = counts.cumsum(dim=0) - counts  # each answer's first token among all that are scored
    confidence, likeliest = logits[first].float().softmax(dim=-1).max(dim=-1)

    # Take of every answer the tokens that the right answer confirms, and the first that differs.
    ids = _confirmed(logits.argmax(dim=-1), labels, counts, max_new, stop)
    tails = batch.tails.tolist()
    merged, unfinished = [], []
    for i, asked in enumerate(batch.asked):
        if tails[i][:len(asked)] != asked:
            merged.append(i)
        elif len(ids[i]) < max_new and ids[i][-1] not in stop:
            unfinished.append(i)

    # Go on from the caches that the forward left, cut back to what each answer has confirmed.
    if unfinished:
        rows = torch.tensor(unfinished, device=labels.device)
        # The last token of an answer was predicted and not yet read.
        read = torch.tensor([len(batch.asked[i]) + len(ids[i]) - 1 for i in unfinished],
                            device=labels.device)
        caches = [_cut_back(past.take(rows), batch.tails.shape[1], read) for _, past in runs]
        together = decoding or llama.Decoding(model, max_new, stop)
        together.add([(i, ids[i]) for i in unfinished], caches)
        together.run(left=len(batch.tails) if decoding else 0)

    # The answer changed the question's last token, so the question is asked as it is without it.
    if merged:
        questions = [batch.asked[i] for i in merged]
        generated = llama.generate(model, questions, pasts, max_new, stop, batch.parent[merged])
        for i, answer in zip(merged, generated):
            ids[i] = answer
    losses = _per_answer(_cross_entropy(logits, labels, "none"), counts)
    is_right = (likeliest == labels[first]).tolist()
    return Answers(losses, counts.tolist(), ids, confidence.tolist(), is_right,
                   _divergences(model, logits, states, counts))


@torch.no_grad()
def answer_losses(model: llama.Llama, pasts: list[llama.Past], batch: data.Batch) -> list[float]:
    """Cross-entropy of each right answer in nats, summed over its tokens; of several pasts as in
    answers."""
    is_scored = batch.labels != data.NO_LABEL
    states = [model.states(batch.tails, past, batch.parent, is_scored) for past in pasts]
    size, losses = max(1, CHUNK // model.config.vocab_size), []
    # Answers may be whole texts, and the logits of all their tokens would be gigabytes.
    for labels, *parts in zip(batch.labels[is_scored].split(size),
                              *(h.split(size) for h in states)):
        logits = llama.ensemble([model.logits(h) for h in parts])
        losses.append(_cross_entropy(logits, labels, "none"))
    return _per_answer(torch.cat(losses), is_scored.sum(dim=1))


def _divergences(model: llama.Llama, logits: Tensor, states: Tensor | None, counts: Tensor
                 ) -> list[float]:
    """The summed divergence of each answer from the teacher's; zeros if there is none."""
    if states is None:
        return [0.0] * len(counts)
    size = max(1, CHUNK // model.config.vocab_size)
    parts = [_divergence(x, model.logits(h)) for x, h in zip(logits.split(size),
                                                             states.split(size))]
    return _per_answer(torch.cat(parts), counts)


def _per_answer(values: Tensor, counts: Tensor) -> list[float]:
    """Sums of values (N,), of which counts (Q,) follow each other for each answer."""
    return torch.stack([part.sum() for part in values.split(counts.tolist())]).tolist()


def _confirmed(likeliest: Tensor, labels: Tensor, counts: Tensor, max_new: int,
               stop: set[int]) -> list[list[int]]:
    """Of every answer the likeliest tokens as long as they are the right ones, and the first that
    is not; at most max_new, up to and with the first token of stop. likeliest and labels (N,) hold
    the answers one after the other, counts (Q,) their tokens."""
    sizes, confirmed = counts.tolist(), []
    for tokens, right in zip(likeliest.split(sizes), labels.split(sizes)):
        tokens, right = tokens.tolist(), right.tolist()
        same = next((k for k, pair in enumerate(zip(tokens, right)) if pair[0] != pair[1]),
                    len(tokens))
        answer = tokens[:min(same + 1, max_new)]
        end = next((k + 1 for k, token in enumerate(answer) if token in stop), None)
        confirmed.append(answer[:end])
    return confirmed


def _cut_back(past: llama.Past, columns: int, read: Tensor) -> llama.Past:
    """past as it would be if of its last `columns` tokens only the first read (B,) were read."""
    earlier, last = past.real[:, :-columns], past.real[:, -columns:]
    is_read = last & (torch.arange(columns, device=read.device) < read[:, None])
    return past._replace(real=torch.cat((earlier, is_read), dim=1),
                         position=past.position - last.sum(dim=1) + read)
