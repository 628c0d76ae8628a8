"""Activations against transformers' hidden states; roles, counts and choices against the text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import llama
import promptprior
from lab import activations, settings

TINY = Path(settings.TINY)


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The user's own command on two domains, all of each."""
    path = tmp_path_factory.mktemp("c") / "a.safetensors"
    assert run("collect", "--data", "squad", "sums=math", "--layers", "all", "--examples", 20,
               "--limit", 0, "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def vocabulary():
    return data.Vocabulary(TINY, (1,))


def test_rows_are_transformers_hidden_states(collected):
    """Every row, at every layer, of its example and position; BOS too, padding never."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    file, t = activations.Collection(collected), load_file(collected)
    vocabulary = data.Vocabulary(TINY)
    sources = [data.read("squad", str(TINY / "squad/train.json")),
               data.read("math", str(TINY / "math/train-easy"))]
    assert file.domains == ["squad", "sums"] and file.layers == list(range(7))
    seen = 0
    for d, examples in enumerate(sources):
        mine = t["domain"] == d
        assert len(t["example"][mine].unique()) == 20
        for i in t["example"][mine].unique().tolist():
            row = data.encode(examples[i], vocabulary, 1024)
            with torch.no_grad():
                states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            here = mine & (t["example"] == i)
            places = t["position"][here]
            seen += len(places)
            assert t["token"][here].tolist() == [row.ids[p] for p in places]
            for layer in range(7):
                torch.testing.assert_close(t[f"layers.{layer}"][here], states[layer][0, places],
                                           atol=2e-4, rtol=2e-4)
    assert seen == len(t["role"])


@pytest.mark.parametrize("last", [4, 6])
@pytest.mark.parametrize("prompt", [False, True])
def test_rows_that_begin_alike_share_their_beginnings(last, prompt):
    """As each row alone; every shared token goes through the model once."""
    model = llama.load(TINY, "float32")
    generator = torch.Generator().manual_seed(3)

    def tokens(n):
        return torch.randint(5, 500, (n,), generator=generator).tolist()

    paragraph, other = tokens(30), tokens(25)
    rows = [tokens(9), [*paragraph, *tokens(4)], [*paragraph, *tokens(7)], paragraph, tokens(2),
            [*other, *tokens(3)], [*other, *tokens(3)], [*paragraph[:3], *tokens(30)]]
    positions = [[0, 8], [0, 29, 30, 33], [31, 2], [29], [], [*range(28)], [27], [0, 1, 32]]
    past = None
    if prompt:
        drawn = torch.randn(5, model.config.hidden_size, generator=generator)
        past = llama.Prompt({0: drawn}, cut=False).past(model)
    layers, seen = [0, 2, last], []
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda module, ids, x: seen.append(len(x)))
    for mean in (False, True):
        kept = [(row, p) for row, p in zip(rows, positions) if p or not mean]
        seen.clear()
        [together] = activations.stream(model, *zip(*kept), layers, past, mean)
        assert sum(seen) == sum(map(len, rows)) - (2 if mean else 0) - 2 * 29 - 25
        alone = [next(activations.stream(model, [row], [p], layers, past, mean)) for row, p in kept]
        for i in layers:
            torch.testing.assert_close(together[i], torch.cat([x[i] for x in alone]), atol=2e-5,
                                       rtol=2e-4)


def test_roles_spell_the_examples(vocabulary):
    """What the questions of one context have in common is taken once."""
    examples = data.read("squad", str(TINY / "squad/train.json"))[:9]
    chosen = activations.choose(list(enumerate(examples)), vocabulary, 1024, activations.ROLES,
                                "token", 0, 0)
    contexts = set()
    for row, (_, e), places in zip(*chosen):
        text, roles = {}, activations.roles_of(row, vocabulary.bos_ids)
        for p in places:
            text.setdefault(roles[p], []).append(row.ids[p])
        text = {role: vocabulary.decode(ids) for role, ids in text.items()}
        assert text["answer"] == f" {e.answers[0]}\n"
        question = f"\nQuestion: {e.question}\nAnswer:"
        if e.context in contexts:
            assert "bos" not in text and "context" not in text
            assert question.endswith(text["question"]) and question != text["question"]
        else:
            assert text["context"] == e.context and roles[0] == "bos" and 0 in places
            assert text["question"] == question
        contexts.add(e.context)
    assert 1 < len(contexts) < 9 == len(chosen.rows)


def test_merged_seams_and_texts_have_roles(vocabulary):
    """A context without a question is text; a sum has no context; cut contexts stay contexts."""
    row = data.encode(data.Example("t", "text", "one two", "", ()), vocabulary, 100)
    assert activations.roles_of(row, vocabulary.bos_ids) == ["bos"] + ["text"] * (len(row.ids) - 1)
    e = data.Example("t", "text", "one<|begin_of_text|> two", "", ())
    row = data.encode(e, vocabulary, 100)
    roles = activations.roles_of(row, vocabulary.bos_ids)
    assert roles.count("bos") == 2 and roles[row.ids.index(vocabulary.bos, 1)] == "bos"
    e = data.Example("m", "math", "", "What is 1 + 1?", ("2",))
    roles = activations.roles_of(data.encode(e, vocabulary, 100), vocabulary.bos_ids)
    assert "context" not in roles and roles[:2] == ["bos", "question"] and roles[-1] == "answer"
    e = data.Example("s", "squad", "a long context of many words " * 9, "Why?", ("so",))
    row = data.encode(e, vocabulary, 60)
    assert row.cut and activations.roles_of(row, vocabulary.bos_ids).count("context") > 9
    at = row.body
    assert vocabulary.decode(row.ids[at:]).startswith("\nQuestion: Why?\nAnswer:")


def test_pooling_is_the_mean_and_the_last(tmp_path, collected):
    token = load_file(collected)
    for pool in ("mean", "last"):
        path = tmp_path / f"{pool}.safetensors"
        assert run("collect", "--data", "sums=math", "--layers", "0,6", "--examples", 20, "--limit",
                   0, "--pool", pool, "--out", path) == 0
        pooled = load_file(path)
        assert len(pooled["role"]) == 20 and not (pooled["role"] == 1).any()
        for i, row in zip(pooled["example"], pooled["layers.6"]):
            here = (token["domain"] == 1) & (token["example"] == i) & (token["role"] != 1)
            x = token["layers.6"][here]
            torch.testing.assert_close(row, x.mean(dim=0) if pool == "mean" else x[-1],
                                       atol=2e-4, rtol=2e-4)


def test_a_sample_is_uniform_and_seeded(tmp_path, collected):
    stream = [data.Example(str(i), "math", "", "q", ("a",)) for i in range(40)]
    hits = np.zeros(40)
    for seed in range(500):
        hits[[i for i, _ in activations.sample_stream(iter(stream), 10, seed)]] += 1
    # each is in a sample with probability 1/4: chi-square of 39 degrees
    assert ((hits - 125) ** 2 / (125 * 0.75)).sum() < 80
    assert activations.sample_stream(iter(stream), 0, 1) == list(enumerate(stream))
    files = []
    for seed in (0, 0, 1):
        files.append(tmp_path / f"{len(files)}.safetensors")
        assert run("collect", "--data", "math", "--layers", 0, "--examples", 12, "--limit", 30,
                   "--seed", seed, "--out", files[-1]) == 0
    one, two, other = (load_file(f) for f in files)
    assert len(one["role"]) == 30 and files[0].read_bytes() == files[1].read_bytes()
    assert not torch.equal(one["example"], other["example"])


def test_roles_can_be_chosen(tmp_path):
    path = tmp_path / "a.safetensors"
    assert run("collect", "--data", "squad", "--layers", 3, "--examples", 5, "--roles", "answer",
               "--out", path) == 0
    assert set(load_file(path)["role"].tolist()) == {activations.ROLES.index("answer")}


def test_under_a_prompt(tmp_path, vocabulary):
    """A run's prompt changes what the text's activations are, and its own rows are kept where it
    has any."""
    run_dir, path = tmp_path / "r", tmp_path / "a.safetensors"
    for keep in ("--keep", "--cut"):
        assert run("train", "--steps", 0, "--eval-limit", 2, "--max-new", 2, "--deep-layers", 1,
                   "--reference-rows", 100, keep, "--out", run_dir, "--overwrite") == 0
        assert run("collect", "--data", "math", "--under", run_dir, "--layers", "all",
                   "--examples", 3, "--out", path, "--overwrite") == 0
        file, rows = activations.Collection(path), load_file(run_dir / "prompt.safetensors")
        torch.testing.assert_close(file.prompt(0), rows["layers.0"])
        torch.testing.assert_close(file.prompt(5), rows["layers.5"])
        assert (file.prompt(6) is None) == (file.prompt(2) is None) == (keep == "--cut")
        model = llama.load(TINY, torch.float32)
        t, example = load_file(path), int(load_file(path)["example"][0])
        row = data.encode(data.read("math", str(TINY / "math/train-easy"))[example], vocabulary,
                          1024)
        past = model.prompt_past({0: rows["layers.0"], 5: rows["layers.5"]}, keep == "--cut")
        seen = {}
        model(torch.tensor([row.ids]), past, seen.__setitem__)
        here = t["example"] == example
        torch.testing.assert_close(t["layers.6"][here], seen[6], atol=2e-4, rtol=2e-4)
        plain = {}
        model(torch.tensor([row.ids]), None, plain.__setitem__)
        assert not torch.allclose(plain[6], seen[6], atol=0.1)


def test_massive_rows_are_marked_and_left_out(tmp_path, monkeypatch, capsys):
    x = torch.randn(200, 16)
    x[[3, 77]] *= 60
    assert activations.is_massive(x).nonzero()[:, 0].tolist() == [3, 77]
    original = activations.stream

    def stream(model, rows, wanted, layers, *rest):
        for found in original(model, rows, wanted, layers, *rest):
            found[3][0] *= 1e4  # one row of every batch
            yield found

    monkeypatch.setattr(activations, "stream", stream)
    path = tmp_path / "a.safetensors"
    assert run("collect", "--data", "math", "--layers", 0, 3, "--examples", 30,
               "--roles", "question,answer", "--out", path) == 0
    assert "0 of BOS and 2 others of massive norm" in capsys.readouterr().out
    file = activations.Collection(path)
    assert len(file.chosen()) == len(file.field["role"]) - 2 == len(file.chosen(massive=True)) - 2
    assert run("sample", "--prior", "fitted", "--tokens", 0, "--deep-layers", 3,
               "--reference", f"collection:{path}") == 2
    assert "layer 4 is not in it" in capsys.readouterr().err


def test_a_collection_is_a_reference(tmp_path, collected, capsys):
    assert run("sample", "--prior", "fitted", "--deep-layers", 2, "--tokens", 4, "--json",
               "--reference", f"collection:{collected}#sums", "--out", tmp_path / "s") == 0
    reports = json.loads(capsys.readouterr().out)
    file = activations.Collection(collected)
    assert [r["rows"] for r in reports] == [len(file.chosen("sums"))] * 3
    assert reports[1]["reference"].startswith("layer 4 inputs of collection:")


def test_bad_input_is_one_line(tmp_path, collected, capsys):
    def refused(*arguments):
        assert run(*arguments) == 2
        out = capsys.readouterr().err.strip().splitlines()[-1]
        assert out.startswith("promptprior: error: ")
        return out

    new = tmp_path / "new.safetensors"
    assert "two are named" in refused("collect", "--data", "math", "math", "--out", new)
    assert "--layers 7" in refused("collect", "--layers", 7, "--out", new)
    assert "--layers 0 x" in refused("collect", "--layers", "0", "x", "--out", new)
    assert "--roles" in refused("collect", "--roles", "verb", "--out", new)
    assert "--pool" in refused("collect", "--pool", "max", "--out", new)
    assert "no token of the roles" in refused("collect", "--data", "text", "--roles", "answer",
                                              "--out", new)
    assert "exists" in refused("collect", "--out", collected) and not new.exists()
    sample = ("sample", "--prior", "fitted", "--reference")
    assert "no domain" in refused(*sample, f"collection:{collected}#verse")
    assert "no such file" in refused(*sample, f"collection:{new}")
    new.write_bytes(b"nothing")
    assert "not a collection" in refused(*sample, f"collection:{new}")
    assert "asks for 99999" in refused(*sample, f"collection:{collected}",
                                       "--reference-rows", 99999)
    assert "asks for 99999" in refused(*sample, "math", "--reference-rows", 99999)
    assert "two of one name" in refused(*sample, "math", "math")
    tensors = load_file(collected)
    with safe_open(collected, "pt") as f:
        about = f.metadata()
    other = json.loads(about["promptprior"]) | {"sha256": "0" * 64}
    save_file(tensors, new, {"promptprior": json.dumps(other)})
    assert "other weights" in refused(*sample, f"collection:{new}")
    tensors["layers.0"][40] = torch.nan
    save_file(tensors, new, about)
    assert "not finite" in refused(*sample, f"collection:{new}")


def test_a_failed_collection_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "stream",
                        lambda *a: iter([{0: torch.full((1, 192), torch.inf)}]))
    assert run("collect", "--data", "math", "--layers", 0, "--out", tmp_path / "a.st") == 2
    assert not list(tmp_path.iterdir())
