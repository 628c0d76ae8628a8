"""Teachers: what a text or worked steps make the frozen model say, learned by a prompt."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_data import SHAPES, random_rows

import data
import llama
import promptprior
import small
from forked import Pair
from lab import beginning, distil, inputs, loss, train
from lab.adapters import from_peft
from lab.console import UserError
from lab.evaluation import examined
from lab.folder import Run
from lab.settings import Settings

FEW = ["--steps", "4", "--eval-every", "2", "--eval-limit", "12", "--batch-size", "4",
       "--max-new", "6", "--tokens", "4", "--train-examples", "24"]
SMALL = [*FEW, "--model", small.MODEL, "--max-length", "150"]  # where nothing needs to be known
TEACHER = [31, 17, 5, 90, 44]  # tokens that stand after BOS


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of fp64. Nobody changes it."""
    folder = small.make(tmp_path_factory.mktemp("models") / "model", vocab_size=97, hidden_size=48,
                        num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
                        head_dim=10)
    return llama.load(folder, torch.float64)


def prompt_of(method):
    generator = torch.Generator().manual_seed(0)
    shape = (4, 2, 2, 10) if method == "prefix" else (4, 48)
    numbers = {i: torch.randn(shape, generator=generator).double().requires_grad_()
               for i in (0, 3)}
    return llama.Prompt(numbers)


def with_teacher(rows):
    return [row._replace(ids=[0, *TEACHER, *row.ids[1:]], start=row.start + len(TEACHER),
                         question=[0, *TEACHER, *row.question[1:]]) for row in rows]


def states_of(model, text, rows):
    """The teacher's hidden states at the answers' tokens, by the trie."""
    ids = torch.tensor(text)
    batch = data.collate(rows)
    past, batch = loss.begin(model, batch, loss.Text(ids, model.extend(ids[None])))
    return model.states(batch.tails, past, batch.parent, batch.labels != data.NO_LABEL)


def plain_divergences(model, prompt, rows):
    """(KL, cross-entropy) of each row, from whole rows, all logits, in fp64."""
    found = []
    for row, taught in zip(rows, with_teacher(rows)):
        log_q, log_p = (model.logits(model(torch.tensor([r.ids[:-1]]), past)[0][0, r.start - 1:])
                        .log_softmax(dim=-1)
                        for r, past in ((row, prompt.past(model)), (taught, None)))
        kl = (log_p.exp() * (log_p - log_q)).sum()
        answer = torch.tensor(row.ids[row.start:])
        found.append((kl, -log_q[torch.arange(len(answer)), answer].sum()))
    return found


@pytest.mark.parametrize("name, method, end", [  # any two of them together
    ("many", "prompt", []), ("many", "prefix", [7, 8]), ("many", "prompt", TEACHER[:2]),
    ("ragged", "prefix", []), ("ragged", "prompt", [7, 8]), ("ragged", "prefix", TEACHER[:2]),
    ("no context", "prompt", [7, 8]), ("no context", "prefix", []),
    ("no context", "prefix", TEACHER[:2])])
def test_the_divergence_is_that_of_plain_batches(model, monkeypatch, name, method, end):
    """In value and gradient, whatever is made at a time. The text may have tokens at its end that
    the rows do not have, because they merge there with what follows."""
    rows, prompt = random_rows(random.Random(3), SHAPES[name]), prompt_of(method)
    parameters = list(prompt.layers.values())
    plain = plain_divergences(model, prompt, rows)
    kl, cross_entropy = (sum(values) for values in zip(*plain))
    states = states_of(model, [0, *TEACHER, *end], with_teacher(rows))
    for mix, chunk in ((0.0, 2**24), (0.3, 97 * 2), (1.0, 1)):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        past, batch = loss.begin(model, data.collate(rows), prompt)
        summed, *parts = loss.taught_loss(model, past, batch, states, mix)
        assert parts == pytest.approx([cross_entropy.item(), kl.item()], rel=1e-9)
        expected = (1 - mix) * kl + mix * cross_entropy
        assert summed.item() == pytest.approx(expected.item(), rel=1e-9)
        gradients = [torch.autograd.grad(x, parameters, retain_graph=True)
                     for x in (summed, expected)]
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
        start, asked = loss.begin(model, data.collate(rows), prompt)
        result = loss.answers(model, [start], asked, 3, set(), states)
        assert result.kl == pytest.approx([x.item() for x, _ in plain], rel=1e-6)


def test_logits_are_made_in_chunks(model, monkeypatch):
    """Never those of all tokens of the answers at once."""
    rows = random_rows(random.Random(3), SHAPES["many"])
    states, made = states_of(model, [0, *TEACHER], with_teacher(rows)), []
    logits = llama.Llama.logits
    monkeypatch.setattr(loss, "CHUNK", 97 * 3)
    monkeypatch.setattr(llama.Llama, "logits", lambda self, h: made.append(len(h))
                        or logits(self, h))
    summed, _, _ = loss.taught_loss(model, *loss.begin(model, data.collate(rows),
                                                       prompt_of("prompt")), states, 0.5)
    summed.backward()
    assert max(made) == 3 and sum(made) == 2 * 2 * len(states) > 100


def test_a_student_of_itself_has_nothing_to_learn(model):
    """A prompt that is the teacher's own tokens, where they stand, has no divergence."""
    rows = random_rows(random.Random(3), SHAPES["ragged"])
    states = states_of(model, [0, *TEACHER], with_teacher(rows))
    prompt = llama.Prompt({0: model.embeddings[TEACHER]})
    past, batch = loss.begin(model, data.collate(rows), prompt, "after-bos")
    summed, cross_entropy, kl = loss.taught_loss(model, past, batch, states, 0.0)
    assert abs(kl) < 1e-12 < cross_entropy and summed.item() == kl


# --------------------------------------------------------------------------------------------------
# runs


def test_a_taught_prompt_answers_as_its_teacher(tmp_path, capsys):
    """The bundled model's style text, without any label: the answers are the teacher's own."""
    out = tmp_path / "run"
    assert run("train", "--teacher", "short answer", "--teacher-answers", "--steps", 50, "--text",
               "", "--eval-every", 50, "--eval-limit", 30, "--train-examples", 60, "--max-new",
               10, "--batch-size", 6, "--out", out) == 0
    log = lines(out / "metrics.jsonl")
    teacher = next(line for line in log if line["split"] == "teacher")
    before, after = [line for line in log if line["split"] == "eval"]
    assert before["f1"] < 25 and before["agreement"] < 25 and before["teacher_kl"] > 0.4
    assert after["f1"] > teacher["f1"] - 12 and after["agreement"] > 80
    assert after["teacher_kl"] < before["teacher_kl"] / 5
    trained = [line for line in log if line["split"] == "train"]
    assert trained[-1]["teacher_kl"] < trained[0]["teacher_kl"] / 5
    shown = capsys.readouterr().out
    assert "teacher 'short answer'" in shown and "teacher KL" in shown and "as teacher" in shown
    assert [set(line) for line in lines(out / "teacher.jsonl")] == [
        {"id", "question", "answer"}] * 60
    # eval says the same of the run
    assert run("eval", out, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["teacher 'short answer'"]["f1"] == pytest.approx(teacher["f1"])
    for key in ("teacher_kl", "agreement", "f1"):
        assert scores["vocab prior, trained"][key] == pytest.approx(after[key], rel=1e-4)


def test_the_labels_alone_are_the_other_end_of_the_mix(tmp_path):
    """With --teacher-mix 1 a run is that of the labels: tokens weigh the same in both losses."""
    for name, flags in (("labels", []), ("mix", ["--teacher", "short answer", "--teacher-mix", 1])):
        assert run("train", "--out", tmp_path / name, *SMALL, *flags) == 0
    logs = [[line for line in lines(tmp_path / name / "metrics.jsonl") if line["split"] == "train"]
            for name in ("labels", "mix")]
    for labels, mix in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert mix[key] == pytest.approx(labels[key], rel=1e-4)
    rows = [load_file(tmp_path / name / "prompt.safetensors") for name in ("labels", "mix")]
    assert all((rows[1][key] - x).norm() < 1e-3 * x.norm() for key, x in rows[0].items())


GSM8K = [{"question": f"What is {a} + {b}?", "answer":
          f"{a} + {b} = {a + b}\nSo it is {a + b}.\n#### {a + b}"}
         for a in range(1, 7) for b in range(11, 17)]
KINDS = {
    "mixed, rows of a posterior": ["--teacher-mix", 0.3, "--prior", "fitted", "--posterior", "sgld",
                                   "--particles", 2],
    "drawn answers, prefix": ["--teacher-answers", 0.8, "--method", "prefix", "--place", "suffix",
                              "--prefix-layers", 3],
    "written steps": ["--teacher-reasons", "--teacher-steps", 7, "--teacher-answers", "--place",
                      "after-bos", "--deep-layers", 1],
    "worked steps": ["--teacher-reasons", "data", "--data", "GSM8K", "--prior", "text"],
    "gaussian": ["--posterior", "gaussian", "--prior", "fitted", "--no-share"]}


def flags_of(kind, tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in GSM8K))
    flags = [f"gsm8k:{path}" if flag == "GSM8K" else flag for flag in KINDS[kind]]
    return [*SMALL, "--teacher", "short answer", "--text", "a b c", *flags]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_resume_to_the_same_bytes(tmp_path, monkeypatch, kind):
    few, whole, parts = flags_of(kind, tmp_path), tmp_path / "whole", tmp_path / "parts"
    assert run("train", "--out", whole, *few) == 0
    calls, original = [], train.taught_loss

    def fails(*arguments):
        calls.append(1)
        if len(calls) == (6 if "sgld" in few else 3):  # at the third step
            raise ZeroDivisionError
        return original(*arguments)

    with monkeypatch.context() as m:
        m.setattr(train, "taught_loss", fails)
        with pytest.raises(ZeroDivisionError):
            run("train", "--out", parts, *few)
    kept = [name for name in ("teacher.jsonl",) if (whole / name).exists()]
    assert bool(kept) == ("--teacher-answers" in few)
    with monkeypatch.context() as m:  # what was drawn is not drawn again
        if "drawn" in kind:
            m.setattr(distil, "_drawn", None)
        assert run("train", "--out", parts, "--resume") == 0
    for name in ("prompt.safetensors", "predictions.jsonl", "prompts/000000.safetensors", *kept):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    clocks = ("seconds", "examples_per_second")
    logs = [[{k: v for k, v in line.items() if k not in clocks}
             for line in lines(folder / "metrics.jsonl")] for folder in (whole, parts)]
    assert logs[0] == logs[1]
    rows = load_file(whole / "prompt.safetensors")
    first = load_file(whole / "prompts/000000.safetensors")
    assert all((rows[k] != first[k]).any() for k in rows)
    # the same again, by its config.json
    assert run("train", "--config", whole / "config.json", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again/predictions.jsonl").read_bytes() == (
        whole / "predictions.jsonl").read_bytes()


def test_a_taught_run_is_scored_on_data_without_steps(tmp_path, capsys):
    assert run("train", "--out", tmp_path / "run", *flags_of("worked steps", tmp_path)) == 0
    capsys.readouterr()
    assert run("eval", tmp_path / "run") == 0
    assert "teacher 'short answer', with worked steps" in capsys.readouterr().out
    assert run("eval", tmp_path / "run", "--data", "math", "--limit", 4) == 0
    printed = capsys.readouterr()
    assert "math: no worked steps in it for the teacher to read" in printed.err
    assert "text prior, trained" in printed.out and "worked steps" not in printed.out


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with answers of its teacher. It is not changed by the tests."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run("train", "--out", out, *SMALL, "--teacher", "short answer",
               "--teacher-answers") == 0
    return out


def test_what_the_teacher_wrote_is_kept(written, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(written, out)
    content = (out / "teacher.jsonl").read_bytes()
    (out / "teacher.jsonl").write_bytes(content.replace(b'"answer": "', b'"answer": "no ', 1))
    resume = ["train", "--out", out, "--resume", "--steps", 5]
    assert run(*resume) == 2
    assert "not what the teacher wrote when the run began: restore" in capsys.readouterr().err
    (out / "teacher.jsonl").unlink()  # one that is lost is written again
    assert run(*resume) == 0 and (out / "teacher.jsonl").read_bytes() == content
    # an overwritten run loses it
    assert run("train", "--out", out, "--overwrite", *SMALL) == 0
    assert not (out / "teacher.jsonl").exists()
    assert not any("teacher_kl" in line for line in lines(out / "metrics.jsonl"))


def test_a_run_goes_on_with_its_teacher_alone(written, tmp_path, capsys):
    for flags in (["--teacher", "another"], ["--teacher-mix", 0.5], ["--teacher-answers", 1.5]):
        assert run("train", "--out", written, "--resume", *flags) == 2
        assert f"not with {flags[0]} {flags[1]}" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("short answer\n")
    assert run("train", "--out", written, "--resume", "--teacher-file", tmp_path / "t.txt") == 0


def test_no_labels_are_needed(tmp_path):
    """Questions without answers are answered by the teacher, as they are with other labels."""
    asked = [{"context": f"Bolu {i} was born in Tarn. Mira {i} was born in Lod.",
              "question": f"Where was {name} {i} born?"} for i in range(12)
             for name in ("Bolu", "Mira")]
    for name, answers in (("none", []), ("wrong", ["qqq"])):
        records = [{**record, "answers": answers} for record in asked]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        assert run("train", "--data", f"squad:{tmp_path / name}.json", "--eval-data", "squad",
                   "--keep-unanswerable", "--teacher", "short answer", "--teacher-answers", *FEW,
                   "--out", tmp_path / name) == 0
    files = [(tmp_path / name / "prompt.safetensors", tmp_path / name / "teacher.jsonl")
             for name in ("none", "wrong")]
    none, wrong = (load_file(rows) for rows, _ in files)
    assert all(torch.equal(none[key], wrong[key]) for key in none)
    assert {line["answer"] for line in lines(files[0][1])} & {"Tarn", "Lod"}


@pytest.mark.parametrize("flags, message", [
    (["--teacher", " \n"], "the teacher's text is empty: give a --teacher with words"),
    (["--teacher-mix", 0.5], "--teacher-mix is about a teacher: give --teacher too"),
    (["--teacher-answers"], "--teacher-answers is about a teacher: give --teacher too"),
    (["--teacher", "x", "--teacher-mix", 1.5], "--teacher-mix 1.5: expected 0 to 1"),
    (["--teacher", "x", "--teacher-mix", "nan"], "--teacher-mix nan: expected 0 to 1"),
    (["--teacher", "x", "--teacher-answers", -1], "--teacher-answers -1.0: expected 0 or more"),
    (["--teacher", "x", "--teacher-reasons", "y"], "use one of written, data"),
    (["--teacher", "word " * 300], "tokens and --max-new 6 leave none of the model's 512"),
    (["--teacher", "x", "--teacher-reasons", "--teacher-steps", 600], "shorten the teacher, or"),
    (["--teacher", "word " * 90, "--max-length", 400],
     "and the teacher of 272 tokens and --max-new 6 leave 234 of them: lower --max-length"),
    (["--teacher", "x", "--teacher-file", "FILE"], "a run has one teacher: give one of the two"),
    (["--teacher-file", "missing"], "missing: cannot be read"),
    (["--teacher-reasons", "data"], "no worked steps with"),
    (["--teacher-reasons", "data", "--data", "GSM8K", "--teacher-steps", 3],
     "--teacher-steps 3: the worked steps of gsm8k-")])
def test_a_mistake_is_one_line(tmp_path, capsys, flags, message):
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in GSM8K))
    files = {"FILE": tmp_path / "t.txt", "GSM8K": f"gsm8k:{tmp_path / 'gsm8k.jsonl'}"}
    flags = [files.get(flag, flag) for flag in flags]
    assert run("train", "--out", tmp_path / "run", *FEW, *flags) == 2
    err = capsys.readouterr().err
    assert err.count("promptprior: error: ") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_the_remedy_for_long_steps_works(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in GSM8K))
    flags = ["train", "--out", tmp_path / "run", *FEW, "--data", f"gsm8k:{tmp_path / 'x.jsonl'}",
             "--teacher-reasons", "data", "--teacher-steps"]
    assert run(*flags, 3) == 2
    assert run(*flags, capsys.readouterr().err.rpartition("give --teacher-steps ")[2].strip()) == 0


def test_a_sweep_varies_teachers(tmp_path, monkeypatch, capsys):
    """A grid's run has the bytes that train gives, and the table says how near it came. The teacher
    of all is examined once."""
    exams = []
    monkeypatch.setattr(beginning, "examined", lambda *a: exams.append(a) or examined(*a))
    (tmp_path / "long.txt").write_text("short answer\nA: b\nand more of this kind of text: " * 3)
    grid = ["--teacher-mix", 0, 0.5, "--teacher-answers", 0, "--teacher-file",
            tmp_path / "long.txt", "--out", tmp_path / "sweep", *SMALL]
    assert run("sweep", *grid) == 0
    assert len(exams) == 1
    shown = capsys.readouterr().out
    assert "teacher KL" in shown and "as teacher" in shown and "and more of this" not in shown
    # They have one teacher, which eval scores beside both.
    folders = sorted((tmp_path / "sweep/runs").iterdir())
    assert run("eval", *folders, "--limit", 3) == 0
    out, err = capsys.readouterr()
    assert "teacher KL" in out and "different teachers" not in err
    assert [folder.name for folder in folders] == ["teacher-mix0.0", "teacher-mix0.5"]
    assert run("train", "--config", folders[1] / "config.json", "--out", tmp_path / "alone") == 0
    for name in ("prompt.safetensors", "teacher.jsonl"):
        ours = [tmp_path / "alone" / name, folders[1] / name]
        assert ours[0].read_bytes() == ours[1].read_bytes()


@pytest.mark.parametrize("arguments", [[], ["--shard", "--teacher-reasons", "--teacher-steps", 5]],
                         ids=["whole", "sharded"])
def test_two_processes_have_one_teacher(tmp_path, arguments):
    """The same answers, drawn or not, the same losses and rows, to rounding."""
    common = [*SMALL, "--steps", 2, "--teacher", "short answer", "--teacher-answers", 0.7,
              "--teacher-mix", 0.2]
    two = Pair("train", "--out", tmp_path / "two", *common, *arguments)
    assert two.wait() == 0, two.err
    alone = [flag for flag in arguments if flag != "--shard"]
    assert run("train", "--out", tmp_path / "one", *common, *alone) == 0
    ours, theirs = tmp_path / "one", tmp_path / "two"
    assert (ours / "teacher.jsonl").read_bytes() == (theirs / "teacher.jsonl").read_bytes()
    for x, y in zip(*(lines(folder / "metrics.jsonl") for folder in (ours, theirs)), strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"seconds", "examples_per_second", "split"}:
            assert x[key] == pytest.approx(y[key], rel=2e-4, abs=1e-5), key


# --------------------------------------------------------------------------------------------------
# what a teacher reads and writes


@pytest.fixture(scope="module")
def loaded():
    settings = Settings.from_flags({"device": "cpu"}).complete()
    return inputs.load_model(settings.model)


def gsm8k(count, rationale="{a} + 1 = {b}, and\nthat is {b}."):
    return [data.Example(str(a), "gsm8k", "It rains in Tarn. " * (a % 3), f"What is {a} + 1?",
                         (str(a + 1),), rationale=rationale.format(a=a, b=a + 1))
            for a in range(count)]


@pytest.mark.parametrize("text", ["short answer", None])
def test_worked_steps_are_the_teachers_alone(loaded, text):
    """Its states are those of the whole text with the steps, at the answer's tokens; the student's
    question has none of them."""
    given = {"teacher_reasons": "data", "device": "cpu"} | ({"teacher": text} if text else {})
    settings = Settings.from_flags(given).complete()
    questions = inputs.encode(gsm8k(6), loaded.vocabulary, 60, "x")
    teacher = distil.Teacher(loaded, distil.teacher_text(loaded, settings), questions, settings)
    batch = questions.batch([4, 1, 2], True, "before", "cpu")
    states = iter(teacher.states([4, 1, 2], batch.labels))
    for i in (4, 1, 2):
        e, row = questions.examples[i], questions.row(i)
        assert "that is" not in loaded.vocabulary.decode(row.ids)
        asked = (f"{text}\n" if text else "") + (f"{e.context}\n" if e.context else "") + (
            f"Question: {e.question}\nSteps: {i} + 1 = {i + 1}, and that is {i + 1}.\nAnswer:")
        ids = loaded.vocabulary.encode(f"{asked} {e.answers[0]}\n")
        start = len(loaded.vocabulary.encode(asked))
        assert ids[start:] == row.ids[row.start:]
        with torch.no_grad():
            h, _ = loaded.model(torch.tensor([ids[:-1]]))
        for expected in h[0, start - 1:]:
            torch.testing.assert_close(next(states), expected, rtol=1e-4, atol=1e-4)
    assert next(states, None) is None


def test_a_context_is_cut_alike_for_the_teacher(loaded):
    """Neither its text nor its steps count for --max-length."""
    example = data.Example("x", "squad", "Bolu was born in Tarn. " * 30, "Where?", ("Tarn",))
    plain = data.encode(example, loaded.vocabulary, 50)
    taught = data.encode(example, loaded.vocabulary, 50, "say it\n",
                         "\nSteps: Bolu, Tarn.\nAnswer:")
    assert plain.cut and plain.cut == taught.cut
    text, other = (loaded.vocabulary.decode(row.ids) for row in (plain, taught))
    assert other == "say it\n" + text.replace("\nAnswer:", "\nSteps: Bolu, Tarn.\nAnswer:")


def test_the_teacher_writes_its_steps_and_then_answers(loaded):
    """As greedy decoding of the plain text does; the steps it wrote are read again."""
    settings = Settings.from_flags({"teacher": "short answer", "teacher_reasons": "written",
                                    "teacher_steps": 9, "teacher_answers": 0.0, "max_new": 5,
                                    "batch_size": 4, "device": "cpu"}).complete()
    questions = inputs.encode(gsm8k(6, ""), loaded.vocabulary, 80, "x")
    text = distil.teacher_text(loaded, settings)
    wrote = distil.write(loaded, settings, text, questions, 0.0)
    vocabulary = loaded.vocabulary

    def said(beginning, most):
        ids = vocabulary.encode(beginning)
        [answer] = llama.generate(loaded.model, [ids], None, most, vocabulary.stop)
        return vocabulary.first_line(answer)

    for e, line in zip(questions.examples, wrote):
        asked = "short answer\n" + data.question_text(e.context, e.question, "\nSteps:")
        assert line["steps"] == said(asked, 9)
        assert line["answer"] == said(f"{asked} {line['steps']}\nAnswer:", 5)
    assert len({line["steps"] for line in wrote}) > 1
    # of the evaluation's questions too; their labels stay
    exam = examined(loaded, settings, text, questions)
    assert [e.rationale for e in exam.questions.examples] == [line["steps"] for line in wrote]
    assert exam.said == [line["answer"] for line in wrote]
    assert [e.answers for e in exam.questions.examples] == [e.answers for e in questions.examples]


def test_draws_follow_the_distribution_and_stand_alone(model):
    """Tokens are drawn by their probabilities at a temperature, and each question's draw does not
    depend on the batch."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    choose = distil.sampler(0.5, "a", list(range(20000)))
    tokens = choose(list(range(20000)), logits.expand(20000, -1))
    shares = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(shares, (logits / 0.5).softmax(dim=-1), atol=0.012, rtol=0)
    assert distil.sampler(0.0, "a", [1]) is None

    ids = [[0, 5 + i, 9] for i in range(4)]

    def drawn(members, seed="s"):
        return llama.generate(model, [ids[i] for i in members], None, 6, {1},
                              choose=distil.sampler(2.0, seed, members))

    together = drawn([0, 1, 2, 3])
    assert together == [drawn([i])[0] for i in range(4)] != drawn([0, 1, 2, 3], "t")


def test_the_seconds_that_a_prompt_saves_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(promptprior.__file__).parent / "benchmarks")
    import saved

    runs = [tmp_path / mix for mix in ("0", "0.5", "other")]
    for path in runs[:2]:
        assert run("train", "--out", path, *SMALL, "--teacher", "short answer", "--teacher-mix",
                   path.name) == 0
    assert run("train", "--out", runs[2], *SMALL, "--teacher", "long answer") == 0
    capsys.readouterr()
    few = ["--questions", "2", "--turns", "1"]
    monkeypatch.setattr("sys.argv", ["saved", *map(str, runs[:2]), *few])
    saved.main()
    seconds, ratios = capsys.readouterr().out.split("how many times as long")
    for path in runs[:2]:
        [line] = [line for line in seconds.splitlines() if line.startswith(f"{path} ")]
        _, *cells = line.split()
        assert len(cells) == 4 and all(float(cell) > 0 for cell in cells) and str(path) in ratios
    monkeypatch.setattr("sys.argv", ["saved", *map(str, runs)])
    with pytest.raises(SystemExit, match="give runs of one model"):
        saved.main()


def test_pefts_cartridge_is_trained_and_scored_beside_a_prefix(tmp_path, monkeypatch):
    """At rate 0 it is the prefix that a run began with. After one step at the run's rate its values
    are the run's; keys are not, as it trains them after rotation. Its loss is the divergence from
    the teacher, whichever of the two says what the teacher's answers are."""
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(Path(promptprior.__file__).parent / "benchmarks")
    import cartridge

    text = "short answer\n" + "Bolu was born in Tarn and never went to Lod. " * 2
    path = tmp_path / "run"
    taught = [*SMALL, "--teacher", text, "--prior", "text", "--text", text, "--tokens", 6]
    prefix = [*taught, "--method", "prefix", "--dtype", "float32", "--frozen-tokens", 1]
    assert run("train", "--out", path, *prefix, "--hold-out", "--steps", 1, "--lr", 0.1) == 0
    begun = next(line for line in map(json.loads, (path / "metrics.jsonl").open())
                 if line["split"] == "eval")
    made, losses, step = [], [], cartridge.Theirs.step

    def both(theirs, indices, target=None):
        losses.append([step(theirs, indices, target), step(theirs, indices)])
        return losses[-1][1]

    def kept(folder, model):
        made.append(from_peft(folder, model))
        return made[-1]

    monkeypatch.setattr(cartridge.Theirs, "step", both)
    monkeypatch.setattr(cartridge, "from_peft", kept)
    for scores in cartridge.trained_like(path, 0.0, timed=2).values():
        for key in ("loss", "teacher_kl", "f1", "agreement"):
            assert scores[key] == pytest.approx(begun[key], rel=1e-4)
        assert scores["held_out_kl"] > 0
    assert len(losses) >= 4 and all(a == pytest.approx(b, rel=1e-4) for a, b in losses)

    assert cartridge.trained_like(path, 0.1, timed=2)["equal steps"]["steps"] == 1
    drawn, ours, theirs = made[0].layers, Run(path).prompt().layers, made[2].layers
    for i in ours:
        torch.testing.assert_close(theirs[i][:, 1], ours[i][:, 1], atol=1e-4, rtol=1e-4)
        assert (theirs[i][1:, 1] - drawn[i][1:, 1]).abs().mean() > 0.005
        torch.testing.assert_close(theirs[i][0], drawn[i][0])

    assert run("train", "--out", tmp_path / "rows", *taught) == 0
    with pytest.raises(SystemExit, match="give a run of train --teacher TEXT --method prefix"):
        cartridge.trained_like(tmp_path / "rows", 0.1)


def test_a_teacher_that_reads_other_answers_is_refused(loaded):
    settings = Settings.from_flags({"teacher": "short answer", "device": "cpu"}).complete()
    questions = inputs.encode(gsm8k(4), loaded.vocabulary, 60, "x")
    teacher = distil.Teacher(loaded, distil.teacher_text(loaded, settings), questions, settings)
    labels = questions.batch([0, 1], True, "before", "cpu").labels
    labels[labels != data.NO_LABEL] += 1
    with pytest.raises(UserError, match="changes the tokens of answers, among 0, 1: end it"):
        teacher.states([0, 1], labels)


def test_the_teachers_text_is_run_once(tmp_path, monkeypatch):
    """Its tokens are given to the model once a run, however many batches follow."""
    text, seen = "Bolu was born in Tarn and never went to Lod. " * 2, []
    run_blocks = llama.Llama._run
    ids = inputs.load_model(Settings.from_flags({"device": "cpu"}).complete().model
                            ).vocabulary.encode(text)[1:-4]

    def spy(self, tokens, *arguments, **named):
        rows = tokens.tolist()
        seen.extend(1 for row in rows for k in range(len(row)) if row[k:k + len(ids)] == ids)
        return run_blocks(self, tokens, *arguments, **named)

    monkeypatch.setattr(llama.Llama, "_run", spy)
    assert run("train", "--out", tmp_path / "run", *SMALL, "--teacher", text, "--text", "",
               "--hold-out") == 0
    assert len(seen) == 1
