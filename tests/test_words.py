"""A prompt read in words: mixtures, the discrete prompt, what each row does, and controls."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import llama
import promptprior
from lab import inputs
from lab.evaluation import standard_errors
from lab.inputs import load_model
from lab.settings import TINY, ModelSettings
from lab.words import controls, discrete, mixtures_of, paired_differences, without_each


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def loaded():
    return load_model(ModelSettings().complete())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = {}

    def make(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("runs") / "run"
            assert run("train", "--steps", 1, "--batch-size", 4, "--eval-limit", 8, "--max-length",
                       120, "--max-new", 8, "--text", "", "--train-examples", 40,
                       "--reference-rows", 300, *flags, "--out", made[flags]) == 0
        return made[flags]

    return make


def test_a_mixture_names_its_tokens(loaded):
    vocabulary = loaded.vocabulary
    tokens = loaded.model.embeddings[vocabulary.ordinary].float()
    first, second = (vocabulary.encode(word)[-1] for word in (" born", " river"))
    places = [vocabulary.ordinary.index(i) for i in (first, second)]
    rows = torch.stack([2 * tokens[places[0]] + tokens[places[1]], 0.5 * tokens[places[1]]])
    found = mixtures_of({"none": tokens[:2], "some": rows}, tokens, vocabulary)["some"]
    assert set(found.tokens[0][:2]) == {vocabulary.decode([i]) for i in (first, second)}
    assert found.tokens[1] == [vocabulary.decode([second])] and found.texts()[1].startswith("0.5 ")
    spaced = found._replace(tokens=[[" k", "k"]], weights=[[0.5, 0.25]])
    assert spaced.texts() == ['0.5 " k" + 0.25 "k"']
    weights = dict(zip(found.tokens[0], found.weights[0]))
    assert weights[vocabulary.decode([first])] == pytest.approx(2, rel=1e-3)
    assert found.shares[:, -1] == pytest.approx([1, 1], abs=1e-6)
    assert found.shares.shape == (2, 8) and found.numbers()["share_1"] < 100
    assert found.numbers()["share_8"] == pytest.approx(100)


def test_compare_shows_mixtures_of_token_rows_alone(trained, capsys):
    folder = trained("--tokens", 5, "--prior", "fitted")
    capsys.readouterr()
    assert run("compare", folder, "--json") == 0
    mixtures = json.loads(capsys.readouterr().out)[0]["mixtures"]
    assert list(mixtures) == ["prior draw", "trained", "as far at random"]
    assert np.shape(mixtures["trained"]["shares"]) == (5, 8)
    assert (np.diff(mixtures["trained"]["shares"], axis=1) >= -1e-9).all()
    assert run("compare", folder) == 0
    shown = capsys.readouterr().out
    assert "1 token  2 tokens  4 tokens  8 tokens" in shown
    _, mixed = shown.split("\nthe first three tokens of each trained row's mixture at layer 0\n")
    first = [f"row {i}  {weights[0]:.2g} {json.dumps(tokens[0])}" for i, (weights, tokens) in
             enumerate(zip(mixtures["trained"]["weights"], mixtures["trained"]["tokens"]), 1)]
    lines = mixed.strip().split("\n")
    assert [line.split(" + ")[0] for line in lines] == first and max(map(len, lines)) <= 100
    prefix = trained("--method", "prefix", "--tokens", 3)
    capsys.readouterr()
    assert run("compare", prefix, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["mixtures"] == {}


def test_the_discrete_prompt_is_one_of_tokens(loaded):
    tokens = loaded.model.embeddings[loaded.vocabulary.ordinary].float()
    generator = torch.Generator().manual_seed(0)
    deep, noise = torch.randn(2, 3, 192, generator=generator)
    rows = tokens[[100, 200, 300]] + 0.01 * noise
    prompts = discrete(llama.Prompt({0: rows, 5: deep}, cut=True), loaded)
    for metric in ("cosine", "l2"):
        assert torch.equal(prompts[metric].layers[0], tokens[[100, 200, 300]])
        assert torch.equal(prompts[metric].layers[5], deep) and prompts[metric].cut
    # by distance a short row is near to short tokens, by cosine to those of its direction
    far = discrete(llama.Prompt({0: 0.01 * rows}), loaded)
    assert torch.equal(far["cosine"].layers[0], tokens[[100, 200, 300]])
    assert not torch.equal(far["l2"].layers[0], tokens[[100, 200, 300]])


def test_without_each_row():
    prompt = llama.Prompt({0: torch.arange(6.0).view(3, 2), 4: torch.arange(6.0, 12).view(3, 2)})
    one, two, three = without_each(prompt)
    assert two.layers[0].tolist() == [[0, 1], [4, 5]] and two.layers[4].tolist() == [[6, 7],
                                                                                     [10, 11]]
    assert one.n == three.n == 2 and three.layers[0].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("flags", [("--tokens", 10), ("--tokens", 3, "--deep-layers", 2),
                                   ("--tokens", 3, "--place", "suffix")])
def test_eval_scores_words_and_each_row_as_a_run_of_them_would_be(trained, tmp_path, capsys, flags):
    """Prompts of more rows than one batch takes, cut ones, and a place inside the text."""
    folder = trained(*flags)
    capsys.readouterr()
    assert run("eval", folder, "--words", "--ablate", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    scores, without = told["scores"], told["without"][str(folder)]
    stored = load_file(folder / "prompt.safetensors")
    n = len(stored["layers.0"])
    assert list(without) == [f"row {i + 1}" for i in range(n)]

    vocabulary = data.Vocabulary(TINY, (1,))
    embeddings = llama.load(TINY, "float32").embeddings[vocabulary.ordinary]
    near = embeddings[torch.cdist(stored["layers.0"], embeddings).argmin(dim=1)]
    last = {key: t.clone() for key, t in stored.items()} | {"layers.0": near}
    cases = [(last, scores["its nearest tokens, l2"])]
    for i in (0, n - 1):
        kept = [k for k in range(n) if k != i]
        cases.append(({key: t[kept] for key, t in stored.items()}, without[f"row {i + 1}"]))
    whole = scores["vocab prior, trained"]["loss"]
    for tensors, told_scores in cases:
        loss = loss_of(folder, tensors)
        assert told_scores["loss"] == pytest.approx(loss, rel=1e-3)
        if "change" in told_scores:
            assert told_scores["change"] == pytest.approx(loss - whole, abs=1e-4)


def loss_of(folder, tensors):
    """The loss of other rows on a run's evaluation data."""
    from lab.evaluation import evaluate, open_run, questions_of
    from lab.commands import EvalOptions

    opened = open_run(folder, {})
    prompt = llama.Prompt.from_tensors(tensors, opened.settings.prompt.cut)
    metrics, _ = evaluate(opened.loaded, [prompt], questions_of([opened], EvalOptions()),
                          opened.settings.prompt.place, opened.settings.data, "")
    return metrics["loss"]


def test_several_runs_and_standard_errors(trained, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "FEW_UNITS", 5)
    runs = [trained("--tokens", 5), trained("--method", "prefix", "--tokens", 3)]
    capsys.readouterr()
    assert run("eval", *runs, "--ablate", "--limit", 25) == 0
    shown = capsys.readouterr().out
    assert f"{runs[1]} without each of its rows in turn" in shown
    table = shown.split("in turn\n")[2].splitlines()
    assert table[0].split() == ["loss", "change"] and len(table) == 4
    assert all(line.endswith(")") for line in table[1:])


def test_what_has_no_words_is_refused_before_anything_is_scored(trained, capsys):
    prefix, deep = trained("--method", "prefix", "--tokens", 3), trained("--tokens", 0,
                                                                         "--deep-layers", 1)
    one = trained("--tokens", 1)
    for folder, flag, message in ((prefix, "--words", "has keys and values alone"),
                                  (deep, "--words", "has rows at deep layers alone"),
                                  (one, "--ablate", "this prompt has one")):
        capsys.readouterr()
        assert run("eval", folder, flag) == 2
        error = capsys.readouterr().err
        assert message in error and "leave it out" in error and error.count("\n") == 1, error
        other = "--ablate" if flag == "--words" else "--words"
        assert run("eval", folder, other, "--limit", 3) == 0


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 5)])
def test_controls_share_all_but_one_property(shape):
    g = torch.Generator().manual_seed(1)
    drawn, trained = (llama.Prompt({i: torch.randn(shape, generator=g) for i in (0, 3)})
                      for _ in range(2))
    made = controls(drawn, trained, 5)
    assert made["its draw"].layers[3].equal(drawn.layers[3])
    for i, end in trained.layers.items():
        start, steps = drawn.layers[i], end - drawn.layers[i]
        of = {name: prompt.layers[i] for name, prompt in made.items()}
        torch.testing.assert_close(of["half of the way from its draw"], (start + end) / 2)
        torch.testing.assert_close(of["steps without the draw"], steps)
        assert all(row.equal(end.mean(dim=0)) for row in of["the mean row in every place"])
        moved = of["as far in random directions, 1"] - start
        assert not torch.allclose(of["as far in random directions, 2"] - start, moved)
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), steps.flatten(1).norm(dim=1))
        assert torch.cosine_similarity(moved.flatten(), steps.flatten(), dim=0).abs() < 0.6
        # The same order at every layer, or rows that belong together were parted.
        order = [next(k for k in range(4) if row.equal(end[k]))
                 for row in of["rows in another order, 3"]]
        assert sorted(order) == [0, 1, 2, 3] and all(k != place for place, k in enumerate(order))
        torch.testing.assert_close(of["steps of other rows, 3"], start + steps[order])
        assert torch.equal(made["rows in another order, 3"].layers[0], trained.layers[0][order])


def test_every_row_of_another_order_is_elsewhere():
    for n, seed in ((2, 0), (2, 1), (3, 0), (5, 7)):
        rows = llama.Prompt({0: torch.arange(n).float().view(n, 1)})
        order = controls(rows, rows, seed)["rows in another order, 2"].layers[0][:, 0].tolist()
        assert sorted(order) == [*range(n)] and all(k != i for i, k in enumerate(order))
    one = llama.Prompt({0: torch.ones(1, 3)})
    assert not [name for name in controls(one, one, 0) if "other" in name or "mean" in name]


def jackknife_of_mean(values, groups):
    G = groups.max() + 1
    without = np.array([values[groups != g].mean() for g in range(G)])
    return np.sqrt((G - 1) / G * ((without - without.mean())**2).sum())


@pytest.mark.parametrize("of_articles, of_contexts, kind", [
    (12, 36, "article"), (9, 36, "context"), (1, 9, None)])
def test_standard_errors_are_of_articles_or_contexts(loaded, of_articles, of_contexts, kind):
    """Those of scores and of differences that are paired by question are of means over articles; of
    fewer than ten of these over contexts, as a jackknife finds them; and there are none of fewer
    than ten."""
    groups = {"article": np.arange(72) % of_articles, "context": np.arange(72) % of_contexts}
    examples = [data.Example(str(i), "squad", f"text {c}", f"question {i}", ("yes",), f"title {a}")
                for i, (a, c) in enumerate(zip(*groups.values()))]
    questions = inputs.encode(examples, loaded.vocabulary, 100, "")
    f1 = np.random.default_rng(0).random((2, 72)) + np.outer([1, 3], groups["article"] / 9)
    scores = {name: [{"f1": 100 * x} for x in values] for name, values in zip(("one", "two"), f1)}
    (name, numbers), = paired_differences(questions, scores, {"one": "two"})
    assert name == "one" and numbers["f1"] == pytest.approx(100 * (f1[0] - f1[1]).mean())
    errors = standard_errors(questions, {"loss": f1[1]}, np.ones(72), [{"f1": x} for x in f1[0]])
    if kind is None:
        assert errors == {} and "f1_se" not in numbers
        return
    difference, score, loss = (jackknife_of_mean(values, groups[kind])
                               for values in (f1[0] - f1[1], *f1))
    assert numbers["f1_se"] == pytest.approx(100 * difference, rel=1e-6)
    assert errors == pytest.approx({"loss_se": loss, "f1_se": 100 * score}, rel=1e-6)


def test_eval_scores_controls_as_runs_of_them_would_be(trained, capsys):
    folder = trained("--tokens", 10, "--steps", 20, "--lr", 0.03)
    capsys.readouterr()
    assert run("eval", folder, "--controls", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    stored, drawn = (load_file(folder / name)["layers.0"] for name in
                     ("prompt.safetensors", "prompts/000000.safetensors"))
    whole = told["scores"]["vocab prior, trained"]
    for name, rows in (("its draw", drawn), ("steps without the draw", stored - drawn)):
        assert told["scores"][name]["loss"] == pytest.approx(loss_of(folder, {"layers.0": rows}),
                                                             rel=1e-3)
        assert told["differences"][name]["f1"] == pytest.approx(
            told["scores"][name]["f1"] - whole["f1"], abs=0.01)
    assert any(difference["f1"] for difference in told["differences"].values())
    assert run("eval", folder, "--controls", "--words") == 0
    lines = capsys.readouterr().out.split("paired by question\n")[1].splitlines()
    assert lines[0].split() == ["F1"] and len(lines) == 1 + 2 + 4 + 3 * 3

    assert run("export", folder, "--to", folder.parent / "adapter") == 0
    assert run("import", folder.parent / "adapter", "--model", "tiny", "--out",
               folder.parent / "imported") == 0
    capsys.readouterr()
    assert run("eval", folder.parent / "imported", "--controls") == 2
    assert "this one is imported: leave it out" in capsys.readouterr().err
