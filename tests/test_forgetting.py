"""What a prompt costs on prose, against transformers."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import promptprior
from lab import loss
from lab.forgetting import read_prose
from lab.inputs import load_model
from lab.settings import TINY, DataSettings, ModelSettings

PARAGRAPHS = ["Bolu was born in Tarn. She sings in the choir of Tarn.", "The river is long.",
              "Question marks are rare.\nIn prose they stand alone." * 3, "x",
              "Tarn lies by the river, and Bolu knows it well."]


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture
def prose(tmp_path):
    (tmp_path / "prose.txt").write_text("\n\n".join(PARAGRAPHS))
    return f"text:{tmp_path / 'prose.txt'}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = {}

    def make(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("runs") / "run"
            assert run("train", "--steps", 1, "--batch-size", 4, "--eval-limit", 6, "--tokens", 5,
                       "--max-length", 150, "--train-examples", 40, *flags,
                       "--out", made[flags]) == 0
        return made[flags]

    return make


def expected(folder, place):
    """Losses of transformers (texts,), without and with the rows of a run, and the tokens."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = load_file(folder / "prompt.safetensors")["layers.0"]
    numbers = []
    for text in PARAGRAPHS:
        ids = torch.tensor(data.Vocabulary(TINY, (1,)).encode(text))
        if len(ids) < 3:
            continue
        x = base.get_input_embeddings()(ids)
        first = 0 if place == "before" else 1  # rows stand before BOS, or behind it
        losses = []
        for embedded in (x, torch.cat([x[:first], rows, x[first:]])):
            with torch.no_grad():
                logits = base(inputs_embeds=embedded[None]).logits[0, 1 - len(ids):-1]
            losses.append(F.cross_entropy(logits, ids[2:], reduction="sum").item())
        numbers.append((*losses, len(ids) - 2))
    return np.array(numbers).T


@pytest.mark.parametrize("place", ["before", "after-bos", "suffix"])
def test_loss_on_prose_is_that_of_transformers(trained, prose, capsys, place, monkeypatch):
    """Token by token, in chunks that divide texts; with its error by text."""
    monkeypatch.setattr(loss, "CHUNK", 7)
    folder = trained("--place", place)
    capsys.readouterr()
    assert run("eval", folder, "--forget", prose, "--limit", 6, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    without, under, tokens = expected(folder, place)
    bare, text, own = scores.values()
    assert bare["prose"] == pytest.approx(without.sum() / tokens.sum(), rel=1e-4)
    assert own["prose"] == pytest.approx(under.sum() / tokens.sum(), rel=1e-4)
    assert own["forgotten"] == pytest.approx((under - without).sum() / tokens.sum(), abs=1e-5)
    residual = under - without - own["forgotten"] * tokens
    error = np.sqrt(len(tokens) / (len(tokens) - 1) * (residual**2).sum()) / tokens.sum()
    assert own["forgotten_se"] == pytest.approx(error, rel=1e-2)
    assert "forgotten" not in bare and text["forgotten"] == pytest.approx(
        text["prose"] - bare["prose"], abs=1e-5)


def test_a_text_prompt_stands_in_front_and_the_same_tokens_are_scored(prose):
    from lab.inputs import plain_prompts
    from lab.settings import PriorSettings

    loaded = load_model(ModelSettings().complete())
    texts = read_prose(DataSettings(forget=prose), loaded, 20)
    assert [e.context for e in texts.examples] == [p for p in PARAGRAPHS if p != "x"]
    plain, text = plain_prompts(loaded, PriorSettings(text=("short answer",)), texts)
    vocabulary = loaded.vocabulary
    for i, example in enumerate(texts.examples):
        row, under = plain.questions.row(i), text.questions.row(i)
        ids = vocabulary.encode(example.context)[:21]
        assert row.ids == ids and row.start == 2  # BOS and the first token are not scored
        assert under.ids[under.start:] == row.ids[row.start:]
        whole = vocabulary.encode(f"short answer\n{example.context}")
        assert under.ids == whole[:len(under.ids)]


def test_the_table_of_train_and_what_a_run_keeps(trained, prose, capsys):
    capsys.readouterr()
    folder = trained("--forget", prose)
    shown = capsys.readouterr().out
    assert "prose loss" in shown and "forgotten" in shown
    untrained, last = [line for line in shown.splitlines() if "vocab prior" in line]
    assert last.count("(") == untrained.count("(") + 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] == "forgetting"]
    assert len(kept) == 3 and "forgotten" not in kept[0] and kept[2]["step"] == 1
    # `eval` measures it anew without being asked, and comes to the same
    assert run("eval", folder, "--json") == 0
    scores = list(json.loads(capsys.readouterr().out)["scores"].values())
    for line, measured in zip(kept, scores):
        for key in line.keys() - {"split", "step"}:
            assert measured[key] == pytest.approx(line[key], rel=1e-5)
    before = (folder / "metrics.jsonl").read_bytes().splitlines()[-3:]
    assert run("train", "--out", folder, "--resume") == 0
    assert (folder / "metrics.jsonl").read_bytes().splitlines()[-3:] == before
    assert run("compare", folder) == 0 and "prose loss" in capsys.readouterr().out
    assert run("plot", folder) == 0


def test_what_is_no_prose_is_one_line(trained, tmp_path, prose, capsys):
    (tmp_path / "one.txt").write_text("Only one text.")
    (tmp_path / "words.txt").write_text("a\n\nb\n\nc")
    folder = trained()
    for spec, message in (("squad", "give text:PATH"), (f"text:{tmp_path}/no.txt", "nothing found"),
                          (f"text:{tmp_path}/one.txt", "texts of several tokens in it: 1"),
                          (f"text:{tmp_path}/words.txt", "texts of several tokens in it: 0"),
                          ("prose:x", "unknown kind")):
        for command in (("eval", folder), ("train", "--steps", 0, "--out", tmp_path / "new")):
            capsys.readouterr()
            assert run(*command, "--forget", spec) == 2
            error = capsys.readouterr().err
            # train has said by then what it trains
            assert message in error.splitlines()[-1], error
    assert not (tmp_path / "new").exists()
    assert run("eval", folder, "--forget", "text", "--limit", 3) == 0


def test_texts_that_a_text_prompt_would_change_are_refused(trained, prose, tmp_path, capsys):
    """Behind ": " the bundled tokenizer merges the space with the text's first word, which is
    another token; a line break keeps all tokens."""
    folder, flags = trained(), ("--forget", prose, "--separator", ": ")
    for command in (("eval", folder, "--limit", 6, "--text", "short answer"),
                    ("train", "--steps", 0, "--eval-limit", 6, "--out", tmp_path / "new")):
        capsys.readouterr()
        assert run(*command, *flags) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "--separator ': '" in error and "line break" in error
    assert not (tmp_path / "new").exists()
    assert run("eval", folder, "--limit", 6, "--text", "", *flags) == 0  # there is no text prompt
    with pytest.MonkeyPatch.context() as early:  # as runs were that began before this was refused
        early.setattr("lab.train.check_separator", lambda settings: None)
        begun = ("--steps", 1, "--eval-limit", 6, "--tokens", 2, "--out", tmp_path / "early")
        assert run("train", *begun, *flags) == 0
    assert run("train", "--out", tmp_path / "early", "--resume") == 0
    assert run("eval", folder, "--limit", 6, "--text", "short answer", "--forget", prose,
               "--separator", ":\\n") == 0


def test_forgetting_is_asked_for_before_a_run_begins(trained, prose, capsys):
    """Or of eval; a line of the log keeps its split where a table has both."""
    folder = trained()
    capsys.readouterr()
    assert run("train", "--out", folder, "--resume", "--forget", prose) == 2
    assert "--forget" in capsys.readouterr().err
    forgets = trained("--forget", prose)
    capsys.readouterr()
    assert run("compare", forgets, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["scores"]["split"] == "eval"
    assert run("eval", forgets, folder, "--limit", 3, "--json") == 0
    assert "different --forget" in capsys.readouterr().err
