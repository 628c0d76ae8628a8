"""Several prompts in one batch, against each of them alone."""

import json

import pytest
import torch

import data
import llama
import promptprior
from lab import evaluation
from lab.loss import answer_losses, answers, begin
from lab.settings import TINY

TEXT = "Bolu was born in Tarn.\nQuestion: Where was Bolu born?\nAnswer:"


def rows(n, *layers, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {i: torch.randn(n, 48, generator=g) for i in layers}


def prefix(n, layers, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {i: torch.randn(n, 2, 2, 10, generator=g) for i in layers}


MIXED = [llama.Prompt(rows(5, 0)), llama.Prompt(rows(3, 0, 2, seed=1)),
         llama.Prompt(prefix(4, range(4))), llama.Prompt(rows(5, 0, seed=2)),
         llama.Prompt(rows(2, 0, 1, 2, 3), cut=True)]
CUT = [llama.Prompt(rows(5, 0, 3, seed=k), cut=True) for k in range(3)]
LAST = [llama.Prompt(prefix(3, (2, 3), seed=k)) for k in range(2)]


@pytest.mark.parametrize("prompts", [MIXED, CUT, LAST], ids=["mixed", "cut", "last layers"])
@torch.no_grad()
def test_rows_of_a_stack_are_what_each_past_gives_alone(hf, token_ids, prompts):
    model, ids = llama.load(hf()[1]), token_ids(2, 9)
    ids[1, 6:] = llama.PAD
    pasts = [prompt.past(model) for prompt in prompts]
    if prompts is MIXED:
        pasts += [model.empty(), model.extend(token_ids(1, 7, seed=4))]
    K, which = len(pasts), torch.arange(len(pasts)).repeat_interleave(2)
    together, past = model(ids.repeat(K, 1), llama.stack(pasts).take(which))
    beginnings = [row[row != llama.PAD].tolist() for row in ids]
    generated = llama.generate(model, beginnings * K, llama.stack(pasts), 12, parent=which)
    for k, alone in enumerate(pasts):
        h, after = model(ids, alone)
        torch.testing.assert_close(together[2 * k:2 * k + 2], h, atol=1e-5, rtol=1e-5)
        assert torch.equal(past.position[2 * k:2 * k + 2], after.position)
        assert generated[2 * k:2 * k + 2] == llama.generate(model, beginnings, alone, 12)
    assert generated[:2] != generated[2:4]


def test_what_one_batch_cannot_hold_is_refused(hf):
    model = llama.load(hf()[1])
    with pytest.raises(llama.ModelError, match=r"prompt 2 of 2 has \[5, 0, 0, 5\] columns"):
        llama.stack([MIXED[0].past(model), CUT[0].past(model)])
    with pytest.raises(llama.ModelError, match="take each alone"):
        llama.stack([LAST[0].past(model), CUT[0].past(model)])


@pytest.mark.parametrize("place", ["before", "after-bos", "suffix"])
@torch.no_grad()
def test_a_batch_under_each_prompt_is_answered_as_under_one(place):
    model, vocabulary = llama.load(TINY, "float32"), data.Vocabulary(TINY, (1,))
    examples = data.read("squad", str(TINY / "squad/dev.json"))[:6]
    batch = data.collate([data.encode(e, vocabulary, 256) for e in examples],
                         suffix=place == "suffix")
    assert len(batch.shared) < 6  # some share their context
    g = torch.Generator().manual_seed(0)
    prompts = [llama.Prompt({0: model.embeddings[torch.randperm(500, generator=g)[:n]]})
               for n in (4, 7)]
    prompts.append(llama.Prompt({i: torch.randn(5, 2, 2, 32, generator=g) for i in range(6)}))
    past, each = begin(model, batch, prompts, place)
    together = answers(model, [past], each, 8, vocabulary.stop)
    losses = answer_losses(model, [past], each)
    for k, prompt in enumerate(prompts):
        past, own = begin(model, batch, prompt, place)
        alone = answers(model, [past], own, 8, vocabulary.stop)
        of_prompt = slice(6 * k, 6 * k + 6)
        assert together.ids[of_prompt] == alone.ids and together.tokens[of_prompt] == alone.tokens
        assert together.loss[of_prompt] == pytest.approx(alone.loss, rel=1e-4)
        assert losses[of_prompt] == pytest.approx(alone.loss, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# the command line, on the bundled model


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(*flags) -> the folder of a run of the bundled model; of the same flags it is one."""
    made = {}

    def make(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("runs") / f"run{len(made)}"
            assert run("train", "--steps", 1, "--batch-size", 4, "--eval-limit", 12, "--text", "",
                       "--max-length", 150, "--train-examples", 40, "--reference-rows", 300,
                       "--seed", len(made), *flags, "--out", made[flags]) == 0
        return made[flags]

    return make


@pytest.fixture
def runs(trained):
    """Rows, other rows with a longest text of their own, a prefix."""
    return [trained("--tokens", 6), trained("--tokens", 9, "--prior", "fitted"),
            trained("--method", "prefix", "--tokens", 4)]


def test_eval_of_several_runs_is_that_of_each(runs, capsys, monkeypatch):
    loads, load = [], evaluation.load_model
    monkeypatch.setattr(evaluation, "load_model", lambda s: loads.append(s) or load(s))
    capsys.readouterr()
    assert run("eval", *runs, "--json") == 0
    together = json.loads(capsys.readouterr().out)
    assert len(loads) == 1 and together["runs"] == list(map(str, runs))
    for folder in runs:
        assert run("eval", folder, "--json") == 0
        alone = json.loads(capsys.readouterr().out)["scores"]
        for label, scores in alone.items():
            name = f"{folder}: {label}" if "prior" in label else label
            assert together["scores"][name] == pytest.approx(scores, rel=1e-4), name
    assert run("eval", *runs, "--limit", 2) == 0
    assert f"{runs[2]}: vocab prior, trained" in capsys.readouterr().out


def test_generate_of_several_runs_is_that_of_each(runs, tmp_path, capsys):
    texts = [TEXT, "Question: What is 3 + 4?\nAnswer:"]
    alone = {}
    for folder in runs:
        for text in texts:
            capsys.readouterr()
            assert run("generate", folder, text) == 0
            alone[folder, text] = capsys.readouterr().out.rstrip("\n")
    assert run("generate", *runs, TEXT) == 0
    assert capsys.readouterr().out.splitlines() == [f"{f}: {alone[f, TEXT]}" for f in runs]
    (tmp_path / "texts").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert run("generate", *runs, "--batch", tmp_path / "texts") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"text": text, "run": str(f), "answer": alone[f, text]} for text in texts for f in runs]


def test_runs_that_cannot_share_a_batch_are_refused_with_what_works(runs, trained, capsys):
    first, suffix = runs[0], trained("--place", "suffix")
    cut, short = trained("--deep-layers", 1), trained("--max-new", 8)
    sums, more = trained("--data", "math"), trained("--eval-limit", 3)
    part = trained("--data", f"squad:{TINY / 'squad/train.json'}")
    low = trained("--dtype", "bfloat16")
    for other, message, remedy in (
            (suffix, "its --place is suffix, and that of", None),
            (cut, "columns in its layers", None), (short, "--max-new is 8", ("--max-new", 8)),
            (sums, "its --eval-data is math", ("--data", "squad")),
            (part, "its --eval-data is a part of squad:", ("--data", "squad")),
            (more, "its --eval-limit is 3", ("--limit", 3)),
            (low, "its --dtype is bfloat16", ("--dtype", "float32"))):
        capsys.readouterr()
        assert run("eval", first, other) == 2
        error = capsys.readouterr().err
        assert message in error and "alone" in error and error.count("\n") == 1, error
        if remedy:
            assert f"give {remedy[0]} for all" in error
            assert run("eval", first, other, "--limit", 3, *remedy) == 0
        else:
            assert run("eval", other, "--limit", 3) == 0
    for arguments in ((TEXT,), (first,)):
        capsys.readouterr()
        assert run("generate", *arguments) == 2
        assert "give a RUN and a TEXT" in capsys.readouterr().err
