"""train.py: what the loop is made of. Whole runs are in test_promptprior.py."""

import random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import data
import llama
import train
from test_data import SHAPES, random_rows


@pytest.fixture
def model(hf):
    return llama.load(hf()[1], torch.float64)


def prompt_of(*layers, cut=True):
    return llama.Prompt({i: torch.randn(4, 48, generator=torch.Generator().manual_seed(i))
                         for i in layers}, cut).double()


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
    before = model.extend(batch.shared, past)
    loss, count, found, sure = train.answers(model, before, batch, max_new, stop)
    assert found == llama.generate(model, [r.question for r in rows], past, max_new, stop)
    expected = train.answer_loss(model, before, batch)
    assert count == expected[1] and loss.item() == pytest.approx(expected[0].item(), rel=1e-12)
    for row, (confidence, correct) in zip(rows, sure):
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
    begun = [model.extend(batch.shared, p) for p in pasts]
    one, two = (train.answers(model, p, batch, 4, stop) for p in (begun[0], [begun[0]] * 2))
    assert one[2] == two[2] and one[0].item() == pytest.approx(two[0].item(), rel=1e-6)
    loss, _, found, sure = train.answers(model, begun, batch, 4, stop)

    def average(ids):
        return torch.stack([model.logits(model(torch.tensor([ids]), p)[0][0]).softmax(dim=-1)
                            for p in pasts]).mean(dim=0)

    total, differ = 0.0, 0
    for i, row in enumerate(rows):
        p = average(row.ids)
        total -= sum(p[t - 1, row.ids[t]].log().item() for t in range(row.start, len(row.ids)))
        assert sure[i][0] == pytest.approx(p[row.start - 1].max().item(), rel=1e-5)
        said = []
        while len(said) < 4 and (not said or said[-1] not in stop):
            said.append(average(row.question + said)[-1].argmax().item())
        assert found[i] == said
        differ += said != llama.generate(model, [row.question], pasts[0], 4, stop)[0]
    assert loss.item() == pytest.approx(total, rel=1e-5) and differ


def test_a_question_that_merges_with_its_answer_is_asked_without_it(model):
    past = prompt_of(0).past(model)
    row = data.Row([0, 11, 12, 50, 21, 22], 3, [0, 11, 12, 13, 14], "c", 0)  # 13 14 21 -> 50 21
    batch = data.collate([row, data.Row([0, 11, 15, 23, 24], 3, [0, 11, 15], "c", 0)])
    found = train.answers(model, model.extend(batch.shared, past), batch, 5, set())[2]
    assert found == llama.generate(model, [[0, 11, 12, 13, 14], [0, 11, 15]], past, 5)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_a_trunk_gives_the_same_loss_and_gradient(model, tmp_path, cut, memory):
    rows = random_rows(random.Random(3), SHAPES["ragged"] + SHAPES["no context"])
    prompt, layer = prompt_of(2, 3, cut=cut), 2
    if not memory:
        model, prompt = model.float(), prompt.float()
    a = SimpleNamespace(trunk_memory=memory, batch_size=4, device="cpu", share=True,
                        place="before")
    file = tmp_path / "trunk.safetensors"
    top, placed = train.trunk(model, rows, layer, 4, a, file)
    assert len(top.inputs) < sum(len(r.ids) for r in rows)
    assert [len(r.ids) for r in placed] == [len(r.ids) for r in rows]
    questions = train.Questions([], rows)
    found = []
    for m, q in ((model, questions), (top, questions._replace(placed=placed))):
        prompt.zero_grad()
        batch = q.batch([5, 1, 0, 7, 6, 8], a)
        loss, _ = train.answer_loss(m, m.extend(batch.shared, prompt.past(m)), batch)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad for p in prompt.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5 if not memory else 1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3 if not memory else 1e-9,
                               atol=1e-4 if not memory else 1e-12)
    if memory:
        assert not file.exists()
    else:
        with safe_open(file, "pt") as f:  # a real safetensors file, and the one that is read
            torch.testing.assert_close(f.get_tensor("inputs"), top.inputs)


def test_recomputing_gives_the_same_gradient(model, monkeypatch):
    rows = random_rows(random.Random(3), SHAPES["ragged"])
    prompt, found, calls = prompt_of(0, 2, cut=False), [], []
    original = llama.Block.forward
    monkeypatch.setattr(llama.Block, "forward",
                        lambda *a, **k: calls.append(1) or original(*a, **k))
    for model.recompute in (False, True):
        prompt.zero_grad()
        calls.append(0)
        batch = data.collate(rows)
        before = model.extend(batch.shared, prompt.past(model))
        train.answer_loss(model, before, batch)[0].backward()
        found.append(torch.cat([p.grad for p in prompt.parameters()]))
    assert torch.equal(*found)
    once, twice = calls.index(0, 1) - 1, len(calls) - calls.index(0, 1) - 1
    assert twice > 1.5 * once  # the prompt's own blocks are not worth it
