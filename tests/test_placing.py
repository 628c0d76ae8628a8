"""Prompts inside the text, prefixes, and rows that a network makes."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import llama
import posteriors
import promptprior
import settings
import train
from run import Run
from test_data import SHAPES, random_rows

FEW = ["--steps", "4", "--eval-every", "1", "--eval-limit", "6", "--batch-size", "4",
       "--max-new", "6", "--tokens", "4", "--reference-rows", "300"]


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture
def model(hf):
    return llama.load(hf()[1], torch.float64)


TOKENS = torch.tensor([7, 11, 13])


@pytest.mark.parametrize("shape", ["ragged", "no context"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("place", ["before", "after-bos", "suffix"])
def test_rows_that_are_tokens_stand_where_the_tokens_would(model, place, share, shape):
    """Rows that are a text's embeddings, kept, are that text: in the loss, its gradient, and in
    what is generated. test_llama.py holds the text itself to transformers."""
    rows = random_rows(random.Random(1), SHAPES[shape])
    rows = [r._replace(ids=[0, *r.ids], start=r.start + 1, question=[0, *r.question])
            for r in rows]  # BOS
    a = SimpleNamespace(method="prompt", cut=False, place=place)
    given = {0: model.embeddings[TOKENS].clone().requires_grad_()}

    def inserted(ids, start):
        at = {"before": 0, "after-bos": 1, "suffix": start - 1}[place]
        return ids[:at] + TOKENS.tolist() + ids[at:]

    plain = data.collate([r._replace(ids=inserted(r.ids, r.start), start=r.start + 3,
                                     question=inserted(r.question, len(r.question)))
                          for r in rows], share=False)
    expected, count = train.answer_loss(model, model.extend(plain.shared, model.empty()), plain)
    batch = data.collate(rows, share, place == "suffix")
    past, onward = train.begin(model, batch, train.prompt_of(model, given, a))
    loss, tokens = train.answer_loss(model, past, onward)
    assert tokens == count
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradient, = torch.autograd.grad(loss, given[0])
    step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()

    def moved(h):
        past, onward = train.begin(model, batch, train.prompt_of(
            model, {0: (given[0] + h * step).detach()}, a))
        return train.answer_loss(model, past, onward)[0].item()

    assert (gradient * step).sum().item() == pytest.approx(
        (moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-5)
    stop = set(range(60, 97))
    said = train.answers(model, past, onward, 5, stop)[2]
    assert said == llama.generate(model, plain.asked, model.extend(plain.shared, model.empty()),
                                  5, stop, plain.parent)


@pytest.mark.parametrize("place", ["before", "after-bos", "suffix"])
@pytest.mark.parametrize("cut, layers", [(True, (0, 2)), (True, (1, 3)), (False, (0, 2))])
def test_a_trie_is_plain_computation_wherever_the_prompt_stands(model, place, cut, layers):
    rows = random_rows(random.Random(1), SHAPES["ragged"])
    rows = [r._replace(ids=[0, *r.ids], start=r.start + 1, question=[0, *r.question])
            for r in rows]
    g = torch.Generator().manual_seed(0)
    given = {i: torch.randn(4, 48, generator=g).double() for i in layers}
    a = SimpleNamespace(method="prompt", cut=cut, place=place)
    losses = []
    for parts, share in (([rows], True), ([[r] for r in rows], False)):
        losses.append(sum(train.answer_loss(model, *train.begin(model, data.collate(
            part, share, place == "suffix"), train.prompt_of(model, given, a)))[0].item()
            for part in parts))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_a_prefix_of_what_rows_give_is_those_rows(model):
    """Keys and values of cut rows at all layers, given directly, are the same prompt."""
    g = torch.Generator().manual_seed(0)
    past = model.prompt_past({i: torch.randn(4, 48, generator=g).double() for i in range(4)}, True)
    keys, values = ({i: t[0].transpose(0, 1) for i, t in enumerate(kv)}
                    for kv in (past.keys, past.values))
    ids = torch.randint(2, 97, (2, 9), generator=g)
    expected = model(ids, past)[0]
    torch.testing.assert_close(model(ids, llama.Prefix(keys, values).past(model))[0], expected,
                               atol=1e-5, rtol=1e-4)  # parameters are fp32
    flat = {i: torch.stack((keys[i], values[i]), 1).flatten(1) for i in keys}
    a = SimpleNamespace(method="prefix", place="before")
    torch.testing.assert_close(model(ids, train.prompt_of(model, flat, a))[0], expected)
    for bad in ({0: keys[0][:, :1]}, {9: keys[0]}):
        with pytest.raises(llama.ModelError, match="does not fit"):
            model.prefix_past(bad, bad)


@pytest.mark.parametrize("kind", ["mlp", "shared"])
def test_rows_of_a_network_begin_as_drawn_and_share(kind):
    g = torch.Generator().manual_seed(0)
    start = {i: torch.randn(1, 5, 16, generator=g) for i in (0, 3)}
    scales = {0: 0.5, 3: 2.0}
    made = posteriors.Encoded(start, scales, 1.0, 0, kind)
    assert all(torch.equal(made.rows[i], start[i][0]) for i in start)
    (made.rows[0][2] * torch.randn(16, generator=g)).sum().backward()
    # one row's loss moves what is common: the maps of its layer, and of mlp the vectors' network
    assert made.last["0"].grad.abs().sum() > 0 and made.last["3"].grad is None
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=g)
    change = {i: (made.rows[i] - start[i][0]) / scales[i] for i in start}
    if kind == "shared":  # key and value of one row from one vector of half their width
        hidden = torch.tanh(made.common["3"])
        assert hidden.shape == (5, 8)
        torch.testing.assert_close(change[3][:, :8], hidden @ made.last["3"][:, :8])
        torch.testing.assert_close(change[3][:, 8:], hidden @ made.last["3"][:, 8:])
    else:  # all layers from one vector a row
        hidden = torch.tanh(made.common["all"] @ made.first)
        for i in start:
            torch.testing.assert_close(change[i], hidden @ made.last[str(i)])
    group, = made.groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in made.parameters() if p.requires_grad}
    # a fifth over the network's width, unless one is asked for
    assert group["lr"] == pytest.approx(0.2 / {"mlp": 16, "shared": 8}[kind])
    assert made.groups(0.1)[0]["lr"] == 0.1


KINDS = {"prefix": ["--method", "prefix"],
         "last two": ["--method", "prefix", "--prefix-layers", 2, "--reparam", "shared"],
         "P-tuning v2": ["--method", "prefix", "--reparam", "mlp", "--dtype", "bfloat16"],
         "mlp of rows": ["--reparam", "mlp", "--deep-layers", 1, "--dtype", "bfloat16"],
         "after BOS": ["--place", "after-bos"], "suffix": ["--place", "suffix", "--posterior",
                                                           "svgd", "--particles", 2,
                                                           "--prior", "fitted"],
         "suffix of a prefix": ["--method", "prefix", "--place", "suffix", "--prefix-layers", 3]}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_train_resume_and_score(tmp_path, monkeypatch, capsys, kind):
    few = [*FEW, *KINDS[kind]]
    assert run("train", "--out", tmp_path / "a", *few) == 0
    calls, original = [], train.answer_loss

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 4:  # there are checkpoints with moments by then
            raise ZeroDivisionError
        return original(*arguments)

    with monkeypatch.context() as m:
        m.setattr(train, "answer_loss", loss)
        with pytest.raises(ZeroDivisionError):
            run("train", "--out", tmp_path / "b", *few)
    assert run("train", "--out", tmp_path / "b", "--resume") == 0
    for name in ("prompt.safetensors", "predictions.jsonl", "prompts/000000.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = load_file(tmp_path / "a/prompt.safetensors")
    first = load_file(tmp_path / "a/prompts/000000.safetensors")
    assert all((rows[k] != first[k]).any() for k in rows)
    if "prefix" in KINDS[kind]:
        assert {t.shape for t in rows.values()} == {(4, 2, 32)} and {
            k.split(".")[2] for k in rows} == {"keys", "values"}
    capsys.readouterr()
    assert run("eval", tmp_path / "a", "--json") == 0
    scores = [*json.loads(capsys.readouterr().out)["scores"].values()]
    last = [m for m in Run(tmp_path / "a").metrics() if m["split"] == "eval"][-1]
    assert scores[-1]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    # one at a time or together, the same answers
    texts = [f"{'Bolu was born in Tarn. ' * i}Question: Where was Bolu born?\nAnswer:"
             for i in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t, "id": i}) + "\n"
                                              for i, t in enumerate(texts)))
    assert run("generate", tmp_path / "a", "--batch", tmp_path / "t.jsonl") == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    alone = []
    for text in texts:
        assert run("generate", tmp_path / "a", text) == 0
        alone.append(capsys.readouterr().out.rstrip("\n"))
    if "svgd" not in KINDS[kind]:
        assert [line["answer"] for line in together] == alone
    assert [line["id"] for line in together] == [0, 1, 2]


def test_a_prefix_begins_as_the_rows_keys_and_values(tmp_path):
    """And its learning rate follows them."""
    few = [*FEW[:-4], "--tokens", 4, "--steps", 0, "--prior", "fitted", "--reference-rows", 300]
    assert run("train", "--out", tmp_path / "rows", *few, "--deep-layers", 6) == 0
    assert run("train", "--out", tmp_path / "prefix", *few, "--method", "prefix") == 0
    first = load_file(tmp_path / "prefix/prompts/000000.safetensors")
    past = llama.load(settings.TINY, "float32").prompt_past(Run(tmp_path / "rows").rows(
        "prompts/000000.safetensors"), cut=True)
    rates = Run(tmp_path / "prefix").config()["learning_rates"]
    for i, (keys, values) in enumerate(zip(past.keys, past.values)):
        together = torch.stack([t[0].transpose(0, 1) for t in (keys, values)])
        torch.testing.assert_close(first[f"layers.{i}.keys"], together[0])
        torch.testing.assert_close(first[f"layers.{i}.values"], together[1])
        assert rates[f"layer {i}"] == pytest.approx(
            together.square().mean().sqrt().item() / 20, rel=1e-5)


@pytest.mark.parametrize("kind", ["suffix of a prefix", "last two"])
def test_what_lies_below_a_prompt_may_be_kept(tmp_path, kind):
    """For several epochs: where the prompt stands before the text, and nowhere else."""
    ends = []
    for name, more in (("kept", []), ("anew", ["--no-trunk"])):
        assert run("train", "--out", tmp_path / name, *FEW, *KINDS[kind], "--train-examples", 6,
                   "--reference-rows", 200,
                   *more) == 0
        ends.append(load_file(tmp_path / name / "prompt.safetensors"))
    for key, rows in ends[0].items():
        torch.testing.assert_close(rows, ends[1][key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments, message", [
    (["--method", "prefix", "--cut"], "no outputs to --cut"),
    (["--method", "prefix", "--prior", "fitted", "--prior-weight", 1], "no prior has a density"),
    (["--method", "prefix", "--deep-layers", 1], "--prefix-layers"),
    (["--method", "prefix", "--prefix-layers", 9], "6 layers"),
    (["--prefix-layers", 2], "--method prefix"), (["--reparam", "shared"], "--method prefix"),
    (["--reparam", "mlp", "--prior", "fitted", "--posterior", "svgd"], "leave out --posterior"),
    (["--place", "middle"], "before, after-bos, suffix"), (["--method", "lora"], "prompt, prefix")])
def test_mistakes(tmp_path, capsys, arguments, message):
    assert run("train", "--out", tmp_path / "a", *FEW, *arguments) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("promptprior: error: ") and message in error
    assert not (tmp_path / "a").exists()


def test_after_bos_needs_one(hf, tmp_path, capsys):
    import shutil
    from pathlib import Path

    _, folder = hf(vocab_size=512, bos_token_id=None, num_hidden_layers=1)
    shutil.copy(Path(promptprior.__file__).parent / "tiny/tokenizer.json", folder)
    assert run("train", "--model", folder, "--place", "after-bos", "--out", tmp_path / "a",
               *FEW) == 2
    assert "has no BOS" in capsys.readouterr().err


def test_a_prefix_has_no_place_among_embeddings(tmp_path, capsys):
    out = tmp_path / "a"
    assert run("train", "--out", out, *FEW, "--method", "prefix") == 0
    capsys.readouterr()
    for command in (["plot", out], ["compare", out], ["interpolate", out, out],
                    ["train", "--prior", f"posterior:{out}", "--out", tmp_path / "b"]):
        assert run(*command) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert "keys and values" in error and "Traceback" not in error
