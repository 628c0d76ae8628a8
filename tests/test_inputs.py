"""What a command works with: questions whose tokens are made when they are needed."""

import json

import pytest
import torch

import data
import llama
import promptprior
from lab import inputs
from lab.populations import references
from lab.settings import TINY, DataSettings, ModelSettings, PriorSettings


@pytest.fixture(scope="module")
def loaded():
    return inputs.load_model(ModelSettings(device="cpu").complete())


def examples_of(count: int) -> list[data.Example]:
    """Five questions a paragraph."""
    context = "Paragraph {} says that Bolu was born in Tarn. " * 3
    return [data.Example(str(i), "squad", context.replace("{}", str(i // 5)),
                         f"Where was Bolu born, number {i}?", (f"Tarn {i % 7}",))
            for i in range(count)]


def test_tokens_are_made_when_a_batch_needs_them(loaded, monkeypatch):
    made, encode = [], data.encode
    monkeypatch.setattr(data, "encode", lambda example, *rest: made.append(example.id)
                        or encode(example, *rest))
    questions = inputs.encode(examples_of(5000), loaded.vocabulary, 400, "training")
    assert len(questions) == 5000 and not made
    batch = questions.batch([7, 8, 400], True, "before", "cpu")
    assert made == ["7", "8", "400"] and len(batch.tails) == 3
    questions.batch([8, 400, 7], True, "before", "cpu")
    assert made == ["7", "8", "400"]  # once


def test_another_model_takes_the_place_of_all_that_was_made_with_the_last():
    """So that no two are in memory, as a teacher's states hold theirs."""
    shared, made = inputs.Shared(), []
    for model in ("a", "a", "b"):
        shared.once("model", model, lambda: made.append(model))
        shared.once("exam", "x", lambda: made.append("exam"))
    assert made == ["a", "exam", "b", "exam"]


def test_what_does_not_fit_is_known_before(loaded, capsys):
    """The same examples are dropped and cut as if all were tokenised at once."""
    examples = examples_of(40) + [data.Example("long", "squad", "c", "why " * 90, ("x",))]
    rows = [data.encode(e, loaded.vocabulary, 100) for e in examples]
    questions = inputs.encode(examples, loaded.vocabulary, 100, "training")
    assert questions.examples == [e for e, row in zip(examples, rows) if row] != examples
    assert "training: 1 question dropped, longer than 100 tokens" in capsys.readouterr().err
    assert [questions.row(i) for i in range(40)] == [row for row in rows if row]
    err = capsys.readouterr().err
    assert err.count("is cut at its end to fit 100 tokens") == 1
    questions.say_cut()
    cut = [row.cut for row in rows if row and row.cut]
    assert f"{len(cut)} of the 40 contexts read were cut at their end" in capsys.readouterr().err
    lengths = [len(r.ids) - r.start for r in rows if r]
    assert inputs.mean_answer_tokens(questions) == sum(lengths) / len(lengths)


def test_answers_lengths_are_averaged_over_a_sample(loaded, monkeypatch):
    """The same one each time, of a size that does not grow with the data."""
    questions = inputs.encode(examples_of(400), loaded.vocabulary, 400, "training")
    mean, sizes, counts = inputs.mean_answer_tokens(questions), data.sizes, []
    monkeypatch.setattr(data, "sizes", lambda examples, v: counts.append(len(examples))
                        or sizes(examples, v))
    monkeypatch.setattr(inputs, "SIZED", 200)
    one, two = (inputs.mean_answer_tokens(questions) for _ in range(2))
    assert one == two == pytest.approx(mean, rel=0.15) and counts == [200, 200]


def test_a_text_prompt_is_run_once(loaded, monkeypatch):
    """The Past holds the text, and rows begin with its tokens, but for those that merge."""
    examples = examples_of(12)
    questions = inputs.Questions(examples, loaded.vocabulary, 400, "evaluation")
    prior = PriorSettings(text=("say it shortly:", "a\nb")).complete("tiny")
    ran, extend = [], llama.Llama.extend
    monkeypatch.setattr(llama.Llama, "extend", lambda self, ids, *rest: ran.append(ids)
                        or extend(self, ids, *rest))
    plain = inputs.plain_prompts(loaded, prior, questions)
    assert len(ran) == 2
    assert [p.split for p in plain] == ["baseline", "text", "text"]
    assert plain[0].past.position.item() == 0 and plain[0].questions is questions
    for p, text, (begun,) in zip(plain[1:], prior.text, ran):
        assert begun.tolist() == p.past.ids.tolist() == loaded.vocabulary.encode(f"{text}\n")
        assert p.past.past.position.item() == len(begun)
        for i, example in enumerate(examples):
            whole = loaded.vocabulary.encode(f"{text}\n" + data.question_text(
                example.context, example.question) + data.answer_text(example))
            row = p.questions.row(i)
            assert row.ids == whole and row.ids[:len(begun) - 1] == begun.tolist()[:-1]
            assert loaded.vocabulary.decode(row.ids[row.start:]) == data.answer_text(example)


def test_bos_is_said_to_be_missing(tmp_path, capsys):
    for path in TINY.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    settings = ModelSettings(model=str(tmp_path), device="cpu").complete()
    assert inputs.load_model(settings).vocabulary.bos is None
    assert "puts no BOS in front of a text" in capsys.readouterr().err
    always = ModelSettings(model=str(tmp_path), device="cpu", bos="always").complete()
    assert inputs.load_model(always).vocabulary.encode("a")[0] == 0
    assert not capsys.readouterr().err
    # A run on it works without BOS, and its prompt can stand at the beginning or before the answer.
    for place in ("before", "suffix"):
        assert promptprior.main([
            "train", "--model", str(tmp_path), "--data", "squad", "--steps", "1", "--eval-limit",
            "4", "--train-examples", "20", "--place", place, "--text", "short answer", "--out",
            str(tmp_path / place)]) == 0
    assert promptprior.main(["generate", str(tmp_path / "before"), ""]) == 2
    assert "nothing to go on from" in capsys.readouterr().err


def test_token_embeddings_of_texts_are_looked_up(loaded, monkeypatch):
    """Without running the model; and of a layer, none that comes after it."""
    ran, forward = [], llama.Block.forward

    def counted(self, *arguments, **more):
        ran.append(self)
        return forward(self, *arguments, **more)

    monkeypatch.setattr(llama.Block, "forward", counted)
    prior = PriorSettings(reference=("squad",), reference_rows=200)
    of_data = DataSettings(data="math", max_length=100)
    at_0 = references(prior, of_data, loaded, [0])
    assert not ran
    both = references(prior, of_data, loaded, [0, 2])
    assert len(set(ran)) == 2
    assert torch.equal(at_0[0].rows, both[0].rows) and len(at_0[0].rows) == 200


def test_a_reference_of_which_nothing_fits_is_one_line(tmp_path, capsys):
    asked = {"question": "Where was Bolu born? " * 20, "answers": ["Tarn"], "context": "Here."}
    (tmp_path / "long.jsonl").write_text(json.dumps(asked) + "\n")
    spec = f"squad:{tmp_path}/long.jsonl"
    assert promptprior.main(["train", "--steps", "0", "--out", str(tmp_path / "a"), "--text", "",
                             "--max-length", "60", "--eval-limit", "2", "--train-examples", "2",
                             "--reference", spec]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert spec in error and "--max-length 60" in error
    assert not (tmp_path / "a").exists()


def test_no_more_is_evaluated_than_asked_for(tmp_path):
    """Whole topics are held out, however many questions they have."""
    path = tmp_path / "sums.txt"
    path.write_text("What is 1 + 1?\n2\n" * 30 + "What is 2 + 2?\n4\n" * 30)
    examples = inputs.divided(DataSettings(data=f"math:{path}", eval_limit=3))
    assert len(examples.training) == 30 and len(examples.evaluation) == 3
    assert examples.training[0].question != examples.evaluation[0].question
