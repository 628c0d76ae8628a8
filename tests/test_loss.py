"""The loss and greedy answers of a batch. Whole runs are in test_promptprior.py."""

import random

import pytest
import torch

import data
import llama
from lab import loss
from test_data import SHAPES, random_rows


@pytest.fixture
def model(hf):
    return llama.load(hf()[1], torch.float64)


def prompt_of(*layers, cut=True):
    rows = {i: torch.randn(4, 48, generator=torch.Generator().manual_seed(i)).double()
            for i in layers}
    return llama.Prompt({i: r.requires_grad_() for i, r in rows.items()}, cut)


@pytest.mark.parametrize("right", [0, 1, 2, 99])
@pytest.mark.parametrize("max_new", [1, 4, 9])
@pytest.mark.parametrize("call", [0, 10**9])
def test_answers_are_those_of_plain_decoding(model, monkeypatch, right, max_new, call):
    """However many tokens of the right answer the model would have said itself."""
    monkeypatch.setattr(llama.Layout, "CALL", call)
    past, stop = prompt_of(0, 3).past(model), set(range(60, 97))
    rows = random_rows(random.Random(1), SHAPES["ragged"] + SHAPES["no context"])
    rows = [row._replace(ids=row.question + (said[:right] + [2 + said[right] % 50, 5, 7, 11]
                                             if right < len(said) else said))
            for row in rows for said in [llama.generate(model, [row.question], past, 6, stop)[0]]]
    batch = data.collate(rows)
    start = model.extend(batch.shared, past)
    result = loss.answers(model, [start], batch, max_new, stop)
    assert result.ids == llama.generate(model, [r.question for r in rows], past, max_new, stop)
    summed, count = loss.answer_loss(model, start, batch)
    assert sum(result.tokens) == count and len(result.tokens) == len(rows)
    assert sum(result.loss) == pytest.approx(summed.item(), rel=1e-12)
    for row, confidence, correct in zip(rows, result.confidence, result.is_right):
        h, _ = model(torch.tensor([row.ids[:row.start]]), past)
        p = model.logits(h[0, -1]).softmax(dim=-1)
        assert confidence == pytest.approx(p.max().item(), rel=1e-5)
        assert correct == (p.argmax().item() == row.ids[row.start])


def test_an_ensemble_averages_probabilities(model):
    """Of one prompt twice it is that prompt; of several, decoding step by step by averaged
    probabilities finds the same answers, and the loss is of the averages."""
    pasts = [prompt_of(0, 3).past(model), prompt_of(1, 3).past(model), prompt_of(2, 3).past(model)]
    rows = random_rows(random.Random(1), SHAPES["ragged"] + SHAPES["no context"])
    batch, stop = data.collate(rows), set(range(60, 97))
    starts = [model.extend(batch.shared, p) for p in pasts]
    one, two = (loss.answers(model, starts[:1] * k, batch, 4, stop) for k in (1, 2))
    assert one.ids == two.ids and sum(one.loss) == pytest.approx(sum(two.loss), rel=1e-6)
    result = loss.answers(model, starts, batch, 4, stop)

    def average(ids):
        return torch.stack([model.logits(model(torch.tensor([ids]), p)[0][0]).softmax(dim=-1)
                            for p in pasts]).mean(dim=0)

    total, differ = 0.0, 0
    for i, row in enumerate(rows):
        p = average(row.ids)
        total -= sum(p[t - 1, row.ids[t]].log().item() for t in range(row.start, len(row.ids)))
        assert result.confidence[i] == pytest.approx(p[row.start - 1].max().item(), rel=1e-5)
        said = []
        while len(said) < 4 and (not said or said[-1] not in stop):
            said.append(average(row.question + said)[-1].argmax().item())
        assert result.ids[i] == said
        differ += said != llama.generate(model, [row.question], pasts[0], 4, stop)[0]
    assert sum(result.loss) == pytest.approx(total, rel=1e-5) and differ


@pytest.mark.parametrize("prompt", [prompt_of(0, 3), prompt_of(0, cut=False), None])
def test_answers_of_several_batches_are_decoded_together(model, monkeypatch, prompt):
    """Those that are long wait for the next batch's, and are what each batch alone is answered.
    Fewer forwards are made, and the cache does not grow with the number of batches."""
    past = prompt.past(model) if prompt else model.empty()
    rows = random_rows(random.Random(4), SHAPES["ragged"] + SHAPES["no context"] * 4)
    batches = [data.collate(rows[i:i + 3]) for i in range(0, len(rows), 3)]
    calls, columns, forward = [], [], llama.Llama.forward

    def counted(self, ids, past, *args, **kwargs):
        calls.append(ids.shape)
        columns.append(past.real.shape[1])
        return forward(self, ids, past, *args, **kwargs)

    monkeypatch.setattr(llama.Llama, "forward", counted)
    results = {}
    for decoding in (None, llama.Decoding(model, 12, set(range(90, 97)))):
        calls.clear()
        columns.clear()
        found = [loss.answers(model, [model.extend(batch.shared, past)], batch, 12,
                              set(range(90, 97)), decoding=decoding) for batch in batches]
        assert not decoding or len(decoding.rows) > 0  # some wait for a batch that does not come
        if decoding:
            decoding.run()
        results[bool(decoding)] = len(calls), [r.ids for r in found], max(columns)
    assert results[True][1] == results[False][1]
    assert results[True][0] < 0.8 * results[False][0]
    longest = max(len(row.ids) for row in rows)
    assert results[True][2] <= longest + 2 * 12


def test_a_question_that_merges_with_its_answer_is_asked_without_it(model):
    past = prompt_of(0).past(model)
    row = data.Row([0, 11, 12, 50, 21, 22], 3, [0, 11, 12, 13, 14], "c", 0)  # 13 14 21 -> 50 21
    batch = data.collate([row, data.Row([0, 11, 15, 23, 24], 3, [0, 11, 15], "c", 0)])
    result = loss.answers(model, [model.extend(batch.shared, past)], batch, 5, set())
    assert result.ids == llama.generate(model, [[0, 11, 12, 13, 14], [0, 11, 15]], past, 5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cut", [True, False])
def test_attention_by_groups_is_that_of_the_padded_batch(model, monkeypatch, name, cut):
    """The CPU may take either; other devices take the padded batch."""
    batch = data.collate(random_rows(random.Random(2), SHAPES[name]))
    prompt, results = prompt_of(0, 2, cut=cut), []
    for cost_of_a_call in (0, 10**9):
        monkeypatch.setattr(llama.Layout, "CALL", cost_of_a_call)
        summed, _ = loss.answer_loss(model, *loss.begin(model, batch, prompt))
        gradients = torch.autograd.grad(summed, list(prompt.layers.values()))
        results.append((summed.detach(), *gradients))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_recomputing_gives_the_same_gradient(model):
    """And keeps fewer activations for the backward pass."""
    rows = random_rows(random.Random(3), SHAPES["ragged"])
    batch, prompt = data.collate(rows), prompt_of(0, 2, cut=False)
    gradients, kept = [], []
    for model.recompute in (False, True):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            start, tails = loss.begin(model, batch, prompt)
            summed, _ = loss.answer_loss(model, start, tails)
        gradients.append(torch.autograd.grad(summed, list(prompt.layers.values())))
        kept.append(sum(sizes))
    assert all(torch.equal(*pair) for pair in zip(*gradients))
    assert kept[1] < kept[0] / 2
