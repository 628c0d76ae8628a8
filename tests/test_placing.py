"""Prompts inside the text, prefixes, and rows that a network makes."""

import dataclasses
import importlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import llama
import promptprior
from lab import activations, loss, page, populations, posteriors, settings, train
from lab.console import clean
from lab.evaluation import open_run
from lab.folder import Run
from small import MODEL
from test_data import SHAPES, random_rows

FEW = ["--steps", "4", "--eval-every", "1", "--eval-limit", "6", "--batch-size", "4",
       "--max-new", "6", "--tokens", "4", "--reference-rows", "300", "--train-examples", "60"]


TINY = Path(settings.TINY)


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture
def model(hf):
    return llama.load(hf()[1], torch.float64)


def test_the_distance_of_a_suffix_alone_destroys_the_bundled_models_sums(monkeypatch):
    """Twenty rows between question and answer need not say anything for that: docs/prefixes.md."""
    monkeypatch.syspath_prepend(TINY.parent / "benchmarks")
    suffix = importlib.import_module("suffix")
    examples = data.read("math", str(TINY / "math/interpolate"))[:16]
    near, few, far = suffix.losses(llama.load(TINY), data.Vocabulary(TINY), examples, [0, 5, 20],
                                   "short answer")
    assert near < few < 0.3 and far > 3


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
    embedded = model.embeddings[TOKENS].clone().requires_grad_()

    def inserted(ids, start):
        at = {"before": 0, "after-bos": 1, "suffix": start - 1}[place]
        return ids[:at] + TOKENS.tolist() + ids[at:]

    plain = data.collate([r._replace(ids=inserted(r.ids, r.start), start=r.start + 3,
                                     question=inserted(r.question, len(r.question)))
                          for r in rows], share=False)
    expected, count = loss.answer_loss(model, model.extend(plain.shared, model.empty()), plain)
    batch = data.collate(rows, share, place == "suffix")
    past, tails = loss.begin(model, batch, llama.Prompt({0: embedded}), place)
    summed, tokens = loss.answer_loss(model, past, tails)
    assert tokens == count
    assert summed.item() == pytest.approx(expected.item(), rel=1e-12)
    gradient, = torch.autograd.grad(summed, embedded)
    step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()

    def loss_at(h):
        shifted = llama.Prompt({0: (embedded + h * step).detach()})
        return loss.answer_loss(model, *loss.begin(model, batch, shifted, place))[0].item()

    assert (gradient * step).sum().item() == pytest.approx(
        (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-5)
    stop = set(range(60, 97))
    answers = loss.answers(model, [past], tails, 5, stop).ids
    assert answers == llama.generate(model, plain.asked, model.extend(plain.shared, model.empty()),
                                  5, stop, plain.parent)


@pytest.mark.parametrize("place", ["before", "after-bos", "suffix"])
@pytest.mark.parametrize("cut, layers", [(True, (0, 2)), (True, (1, 3)), (False, (0, 2))])
def test_a_trie_is_plain_computation_wherever_the_prompt_stands(model, place, cut, layers):
    rows = random_rows(random.Random(1), SHAPES["ragged"])
    rows = [r._replace(ids=[0, *r.ids], start=r.start + 1, question=[0, *r.question])
            for r in rows]
    g = torch.Generator().manual_seed(0)
    prompt = llama.Prompt({i: torch.randn(4, 48, generator=g).double() for i in layers}, cut)
    assert_trie_is_plain(model, rows, prompt, place)


def assert_trie_is_plain(model, rows, prompt, place):
    """The loss of all rows as a trie is the sum of those of each row alone."""
    losses = []
    for parts, share in (([rows], True), ([[r] for r in rows], False)):
        total = 0.0
        for part in parts:
            batch = data.collate(part, share, place == "suffix")
            total += loss.answer_loss(model, *loss.begin(model, batch, prompt, place))[0].item()
        losses.append(total)
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def keys_and_values_of(past):
    """A cache of batch 1 -> {layer: (n, 2, G, hd)}, keys as they stand in it."""
    return {i: torch.stack((k[0], v[0])).permute(2, 0, 1, 3)
            for i, (k, v) in enumerate(zip(past.keys, past.values))}


def test_a_prefix_of_what_rows_give_is_those_rows(model):
    """Keys and values of cut rows at all layers, taken out of their positions and given directly,
    are the same prompt."""
    g = torch.Generator().manual_seed(0)
    past = model.prompt_past({i: torch.randn(4, 48, generator=g).double() for i in range(4)}, True)
    layers = {}
    for i, cached in keys_and_values_of(past).items():
        layers[i] = torch.stack((model.unrotated(cached[:, 0], 0), cached[:, 1]), dim=1)
    ids = torch.randint(2, 97, (2, 9), generator=g)
    prefix = llama.Prompt(layers)
    assert prefix.is_prefix and prefix.n == 4
    torch.testing.assert_close(model(ids, prefix.past(model))[0], model(ids, past)[0], atol=1e-5,
                               rtol=1e-4)  # angles are fp32
    for bad in ({0: layers[0][:, :, :1]}, {9: layers[0]}):
        with pytest.raises(llama.ModelError, match="does not fit"):
            llama.Prompt(bad).past(model)


@pytest.mark.parametrize("place", ["before", "after-bos", "suffix"])
def test_a_prefix_stands_at_its_positions(model, place):
    """A prefix whose keys and values are those of tokens at the first layer of a model of one layer
    is these tokens, wherever it stands: its keys are rotated to the positions there."""
    one = model_of_one_layer(model)
    prefix = llama.Prompt({0: one.keys_and_values(0, one.embeddings[TOKENS])})
    rows = random_rows(random.Random(1), SHAPES["ragged"])
    rows = [r._replace(ids=[0, *r.ids], start=r.start + 1, question=[0, *r.question]) for r in rows]
    batch = data.collate(rows, True, place == "suffix")
    losses = [loss.answer_loss(one, *loss.begin(one, batch, prompt, place))[0].item()
              for prompt in (prefix, llama.Prompt({0: one.embeddings[TOKENS]}))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # angles are fp32
    assert_trie_is_plain(one, rows, prefix, place)


def model_of_one_layer(model):
    config = dataclasses.replace(model.config, num_hidden_layers=1)
    one = llama.Llama(config).double()
    one.load_state_dict({k: t for k, t in model.state_dict().items() if k in one.state_dict()})
    return one.requires_grad_(False)


@pytest.mark.parametrize("kind", ["mlp", "shared"])
def test_rows_of_a_network_begin_as_drawn_and_share(kind):
    g = torch.Generator().manual_seed(0)
    start = {i: torch.randn(1, 5, 16, generator=g) for i in (0, 3)}
    scales = {0: 0.5, 3: 2.0}
    made = posteriors.Encoded(start, scales, 1.0, 0, kind)
    assert all(torch.equal(made.numbers()[i], start[i][0]) for i in start)
    (made.numbers()[0][2] * torch.randn(16, generator=g)).sum().backward()
    # one row's loss moves what is common: the maps of its layer, and of mlp the vectors' network
    assert made.last["0"].grad.abs().sum() > 0 and made.last["3"].grad is None
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=g)
    change = {i: (made.numbers()[i] - start[i][0]) / scales[i] for i in start}
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
         "in a subspace": ["--subspace", 3, "--deep-layers", 1, "--prior", "fitted",
                           "--prior-weight", 1],
         "a prefix in a subspace": ["--method", "prefix", "--subspace", 5, "--directions",
                                    "random"],
         "first column frozen": ["--method", "prefix", "--frozen-tokens", 1],
         "after BOS": ["--place", "after-bos"], "suffix": ["--place", "suffix", "--posterior",
                                                           "sgld", "--particles", 2,
                                                           "--prior", "fitted"],
         "suffix of a prefix": ["--method", "prefix", "--place", "suffix", "--prefix-layers", 3]}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_train_resume_and_score(tmp_path, monkeypatch, capsys, kind):
    few = [*FEW, "--model", MODEL, "--eval-every", 2, "--eval-limit", 4, *KINDS[kind]]
    assert run("train", "--out", tmp_path / "a", *few) == 0
    calls, original = [], train.answer_loss

    def fail_later(*arguments):
        calls.append(1)
        if len(calls) == 4:  # there are checkpoints with moments by then
            raise ZeroDivisionError
        return original(*arguments)

    with monkeypatch.context() as m:
        m.setattr(train, "answer_loss", fail_later)
        with pytest.raises(ZeroDivisionError):
            run("train", "--out", tmp_path / "b", *few)
    assert run("train", "--out", tmp_path / "b", "--resume") == 0
    for name in ("prompt.safetensors", "predictions.jsonl", "prompts/000000.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = load_file(tmp_path / "a/prompt.safetensors")
    first = load_file(tmp_path / "a/prompts/000000.safetensors")
    assert all((rows[k] != first[k]).any() for k in rows)
    if "--frozen-tokens" in KINDS[kind]:
        assert all(torch.equal(rows[k][0], first[k][0]) for k in rows)
    if "prefix" in KINDS[kind]:
        assert {t.shape for t in rows.values()} == {(4, 2, 1, 8)}
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
    if "sgld" not in KINDS[kind]:
        assert [clean(line["answer"]) for line in together] == alone
    assert [line["id"] for line in together] == [0, 1, 2]


def test_a_prefix_begins_as_the_rows_keys_and_values(tmp_path):
    """And its learning rate follows the size of real ones."""
    few = [*FEW[:-4], "--tokens", 4, "--steps", 0, "--prior", "fitted", "--reference-rows", 300]
    assert run("train", "--out", tmp_path / "rows", *few, "--deep-layers", 6) == 0
    assert run("train", "--out", tmp_path / "prefix", *few, "--method", "prefix") == 0
    model = load()
    past = Run(tmp_path / "rows").prompt("prompts/000000.safetensors").past(model)
    from_prefix = Run(tmp_path / "prefix").prompt("prompts/000000.safetensors").past(model)
    for i, (rows, prefix) in enumerate(zip(past.keys + past.values,
                                           from_prefix.keys + from_prefix.values)):
        torch.testing.assert_close(prefix, rows, atol=1e-5, rtol=1e-5)
    rates = Run(tmp_path / "prefix").config()["learning_rates"]
    real = model.keys_and_values(0, model.embeddings[vocabulary().ordinary])
    assert rates["layer 0"] == pytest.approx(real.square().mean().sqrt().item() / 20, rel=1e-5)


def test_an_early_runs_prefix_still_opens(tmp_path, capsys):
    """Early runs kept keys rotated to their positions, in tensors of their own."""
    for place in ("before", "after-bos"):
        out, old = tmp_path / place, tmp_path / f"{place}-old"
        assert run("train", "--out", out, *FEW, "--model", MODEL, "--method", "prefix", "--place",
                   place) == 0
        shutil.copytree(out, old)
        prompt, model = Run(out).prompt(), llama.load(MODEL, torch.float32)
        start = model.empty()
        if place == "after-bos":
            start = model.extend(torch.tensor([[0]]))
        cached = keys_and_values_of(prompt.past(model, start))
        tensors = {}
        for i in prompt.layers:
            tensors[f"layers.{i}.keys"] = cached[i][:4, 0].contiguous()
            tensors[f"layers.{i}.values"] = cached[i][:4, 1].contiguous()
        save_file(tensors, old / "prompt.safetensors")
        for i, numbers in Run(old).prompt().layers.items():
            torch.testing.assert_close(numbers, prompt.layers[i], atol=1e-5, rtol=1e-5)
        scores = []
        for folder in (out, old):
            capsys.readouterr()
            assert run("eval", folder, "--json") == 0
            scores.append([*json.loads(capsys.readouterr().out)["scores"].values()][-1]["loss"])
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("arguments, message", [
    (["--method", "prefix", "--cut"], "no outputs to --cut"),
    (["--method", "prefix", "--prior", "fitted", "--prior-weight", 1], "no prior has a density"),
    (["--method", "prefix", "--deep-layers", 1], "--prefix-layers"),
    (["--method", "prefix", "--prefix-layers", 9], "6 layers"),
    (["--prefix-layers", 2], "--method prefix"), (["--reparam", "shared"], "--method prefix"),
    (["--reparam", "mlp", "--prior", "fitted", "--posterior", "sgld"], "leave out --posterior"),
    (["--subspace", 193], "a row has 192 numbers"), (["--directions", "random"], "--subspace K"),
    (["--subspace", 2, "--method", "prefix", "--reparam", "shared"], "leave out --reparam"),
    (["--subspace", 2, "--prior", "fitted", "--posterior", "sgld"], "and --posterior"),
    (["--frozen-tokens", 4], "a layer has 4 rows: give fewer"),
    (["--frozen-tokens", 1, "--subspace", 2], "with --reparam, --subspace or"),
    (["--place", "middle"], "before, after-bos, suffix"), (["--method", "lora"], "prompt, prefix")])
def test_mistakes(tmp_path, capsys, arguments, message):
    assert run("train", "--out", tmp_path / "a", *FEW, *arguments) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("promptprior: error: ") and message in error
    assert not (tmp_path / "a").exists()


def test_after_bos_needs_one(hf, tmp_path, capsys):
    _, folder = hf(vocab_size=512, num_hidden_layers=1)
    tokenizer = json.loads((settings.TINY / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    assert run("train", "--model", folder, "--place", "after-bos", "--out", tmp_path / "a",
               *FEW) == 2
    assert "has no BOS" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A prefix at every layer, drawn from real tokens and activations."""
    out = tmp_path_factory.mktemp("prefix") / "run"
    assert run("train", "--out", out, *FEW, "--method", "prefix", "--prefix-layers", 6) == 0
    return out


def test_a_prefix_lies_among_keys_and_values(prefix, tmp_path, capsys):
    """Of what its prior was fitted on. The draw is of the reference itself, so it is where real
    tokens' keys and values are, once its positions are taken out of the keys."""
    capsys.readouterr()
    assert run("compare", prefix, "--json") == 0
    found = json.loads(capsys.readouterr().out)[0]
    for i in range(6):
        draw, end = (found["measures"][f"layer {i} {name}"] for name in ("prior draw", "trained"))
        assert draw["moved"] == 0 < end["moved"] and draw["collapse"] < 1e-4 < end["collapse"]
        assert [len(r) for r in found["tokens"][str(i)]["trained"].values()] == [4, 4]
    ids = vocabulary().ordinary
    drawn, _ = Run(prefix).start_and_end()
    real = load().keys_and_values(0, load().embeddings[ids]).flatten(1)
    near = torch.cdist(drawn[0], real).argmin(dim=1)
    nearest = [vocabulary().token_text(ids[k]) for k in near]
    assert found["tokens"]["0"]["prior draw"]["l2"] == nearest
    assert run("plot", prefix) == 0 and run("plot", "--text", prefix) == 0
    said = capsys.readouterr().out
    assert "layer 5: . keys and values of layer 5 inputs of squad (300 rows)" in said.replace(
        f"{prefix}, layer 5", "layer 5")
    assert "Layer 0, keys and values" in (prefix / "figures/layer-00.svg").read_text()
    opened = open_run(prefix, {})
    shown = page.gather([(opened, populations.references_of(opened))])
    assert [m["columns"] for m in shown["maps"]] == [True] * 6
    assert shown["maps"][0]["rows"] == len(ids)
    for i, layer in shown["runs"][0]["layers"].items():
        assert "lens" not in layer and (layer["cosine"][0, :, 0] > 0.9999).all()


def test_a_prefix_goes_on(prefix, tmp_path, capsys):
    """As the next task's prior, to another prefix, under texts that are collected."""
    last = load_file(prefix / "prompt.safetensors")
    prior = "--prior", f"posterior:{prefix},resample=1"
    few = [*FEW, "--data", "math", "--method", "prefix"]
    assert run("train", "--out", tmp_path / "same", *few, *prior) == 0
    first = load_file(tmp_path / "same/prompts/000000.safetensors")
    for key, rows in last.items():
        torch.testing.assert_close(first[key], rows, atol=1e-5, rtol=1e-5)
    assert run("train", "--out", tmp_path / "two", *few, "--prefix-layers", 2, "--prior",
               f"posterior:{prefix}") == 0
    assert {key.split(".")[1] for key in load_file(tmp_path / "two/prompt.safetensors")} == {
        "4", "5"}
    capsys.readouterr()
    assert run("interpolate", prefix, tmp_path / "same", "--points", 2, "--json", "--limit", 6,
               "--out", tmp_path / "line") == 0
    ends = [line["loss"] for line in json.loads(capsys.readouterr().out)]
    logged = [m["loss"] for out in (prefix, tmp_path / "same") for m in Run(out).metrics()
              if m["split"] == "eval"]
    assert ends[0] == pytest.approx(logged[4], rel=1e-4)  # its own task, t 0
    assert ends[-1] == pytest.approx(logged[-1], rel=1e-4)  # the other's, t 1
    assert run("collect", "--under", prefix, "--data", "math", "--examples", 3, "--layers", "2",
               "--out", tmp_path / "acts") == 0
    file = activations.Collection(tmp_path / "acts")
    assert file.prompt(2) is None
    row = file.field["token"][file.field["example"] == file.field["example"][0]]
    inputs = {}
    load().extend(row[None], llama.Prompt.from_tensors(last).past(load()), inputs.__setitem__)
    torch.testing.assert_close(file.rows(2, torch.arange(len(row))), inputs[2], atol=1e-4,
                               rtol=1e-4)


def test_prefixes_and_rows_do_not_mix(prefix, tmp_path, capsys):
    rows = tmp_path / "rows"
    assert run("train", "--out", rows, *FEW) == 0
    few = ["--out", tmp_path / "no", *FEW]
    for command, said in (
            (["plot", prefix, rows], "no common space"),
            (["interpolate", prefix, rows], "other rows"),
            (["train", "--prior", f"posterior:{prefix}", *few], "of keys and values alone"),
            (["train", "--prior", f"posterior:{prefix},{rows}", "--method", "prefix", *few],
             "runs of one --method"),
            (["sample", "--prior", f"posterior:{prefix}"], "of keys and values alone")):
        capsys.readouterr()
        assert run(*command) == 2
        assert said in capsys.readouterr().err.strip().split("\n")[-1]
    assert not (tmp_path / "no").exists()


def load():
    return llama.load(settings.TINY, "float32")


def vocabulary():
    return data.Vocabulary(settings.TINY, (1,))
