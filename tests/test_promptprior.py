"""The command line, on the bundled world and on small random models."""

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import promptprior
import train

HERE = Path(promptprior.__file__).parent
FEW = ["--steps", "4", "--eval-every", "2", "--eval-limit", "6", "--batch-size", "4", "--max-new", "6"]


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the user's own command, used by several tests. It is not changed by them."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert run("train", "--prior", "exclusion", "--deep-layers", 3, "--out", folder, *FEW) == 0
    return folder


def test_the_runs_folder(trained):
    files = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert files == {"config.json", "metrics.jsonl", "predictions.jsonl", "prompt.safetensors", "checkpoint.safetensors",
                     *(f"prompts/{step:06d}.safetensors" for step in (0, 2, 4)),
                     *(f"figures/layer-{i:02d}.svg" for i in (0, 3, 4, 5))}
    m = metrics(trained)
    assert [x["split"] for x in m] == ["baseline", "text", "eval", "train", "train", "eval", "train", "train", "eval"]
    for x in m:
        assert set(x) >= ({"loss", "lr", "grad_norm", "examples_per_second", "step"} if x["split"] == "train" else
                          {"loss", "exact_match", "precision", "recall", "f1"})
    rows = load_file(trained / "prompt.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in rows.items()} == {
        f"layers.{i}": ((20, 192), torch.float32) for i in (0, 3, 4, 5)}
    start = load_file(trained / "prompts/000000.safetensors")
    assert all((rows[k] - start[k]).norm(dim=1).min() > 0 for k in rows)
    config = json.loads((trained / "config.json").read_text())
    assert config["settings"]["cut"] is True and config["settings"]["prior"] == "exclusion"
    assert len(config["sha256"]["model"]) == 64 and config["priors"][0]["c_dim"] > 1
    predictions = [json.loads(x) for x in (trained / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 6 and {"id", "question", "prediction", "answers", "exact_match", "f1"} <= set(predictions[0])
    for figure in (trained / "figures").iterdir():
        ET.fromstring(figure.read_text())


def test_eval_gives_the_scores_of_training(trained, capsys):
    assert run("eval", trained, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    last = [m for m in metrics(trained) if m["split"] == "eval"][-1]
    assert out["scores"]["exclusion prior, trained"] == pytest.approx({k: v for k, v in last.items() if k not in ("step", "split")})
    assert out["questions"] == 6 and list(out["scores"]) == ["no prompt", "text prompt 'short answer'", "exclusion prior, trained"]
    assert run("eval", trained, "--data", "math", "--limit", 5) == 0
    assert "accuracy" in capsys.readouterr().out


def test_generate_and_plot(trained, capsys):
    assert run("generate", trained, "Question: What is 1 + 1?\nAnswer:") == 0
    assert capsys.readouterr().out.count("\n") == 1
    before = (trained / "figures/layer-03.svg").read_bytes()
    (trained / "figures/layer-03.svg").unlink()
    assert run("plot", trained) == 0
    assert (trained / "figures/layer-03.svg").read_bytes() == before


def interrupt_at(step, monkeypatch, number):
    """Send this process a signal while step's batch is being made."""
    original, calls = data.Order.__getitem__, []

    def getitem(self, at):
        if at == step and not calls:
            calls.append(at)
            os.kill(os.getpid(), number)
        return original(self, at)

    monkeypatch.setattr(data.Order, "__getitem__", getitem)


@pytest.mark.parametrize("arguments", [["--prior", "vocab"], ["--prior", "fitted", "--prior-weight", "1", "--deep-layers", "1"],
                                       ["--prior", "isotropic", "--dtype", "bfloat16", "--data", "math"]])
def test_resume_ends_in_the_same_bytes(tmp_path, monkeypatch, arguments):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", "--out", whole, *FEW, *arguments) == 0
    given = vars(promptprior.parser().parse_args(["train", "--out", str(parts), *FEW, *arguments]))
    for step, number in ((2, signal.SIGTERM), (1, signal.SIGINT), (3, signal.SIGINT)):  # the second is never reached again
        with monkeypatch.context() as m:
            interrupt_at(step, m, number)
            try:
                promptprior.command_train({k: v for k, v in given.items() if k != "command"})
            except train.Stopped as e:
                assert e.status == -number and "--resume" in str(e)
        given = {"command": "train", "out": str(parts), "resume": True}
    assert run("train", "--out", parts, "--resume") == 0
    names = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    assert names == {p.relative_to(parts) for p in parts.rglob("*") if p.is_file()}
    for name in names - {Path("config.json"), Path("metrics.jsonl")}:
        if name.suffix != ".svg" and name.name != "checkpoint.safetensors":  # they hold the folder's name, byte counts
            assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    clock = ("seconds", "examples_per_second")
    strip = lambda folder: [{k: v for k, v in m.items() if k not in clock} for m in metrics(folder)]
    assert strip(whole) == strip(parts)


def test_resume_refuses_other_settings_and_a_damaged_checkpoint(trained, tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    assert run("train", "--out", folder, "--resume", "--lr", 0.5, "--tokens", 20) == 2
    error = capsys.readouterr().err
    assert "--lr 0.5 (the run has 0.01)" in error and "tokens" not in error
    content = bytearray((folder / "checkpoint.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "checkpoint.safetensors").write_bytes(content)
    assert run("train", "--out", folder, "--resume") == 2
    assert "checksum" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(trained, tmp_path, capsys):
    before = (trained / "config.json").read_bytes()
    assert run("train", "--out", trained, *FEW) == 2
    assert "--resume" in capsys.readouterr().err and (trained / "config.json").read_bytes() == before


def test_map_keeps_rows_near_the_prior(tmp_path):
    """A heavy prior weight pulls the rows up the prior's density; without it they go where the loss leads."""
    import priors

    density = {}
    for weight in (0, 1000):
        out = tmp_path / f"w{weight}"
        assert run("train", "--prior", "fitted", "--prior-weight", weight, "--out", out, "--steps", 20, "--eval-every", 20,
                   "--eval-limit", 2, "--batch-size", 2, "--max-new", 2, "--lr", 0.02) == 0
        a = promptprior.settings_of({"prior": "fitted"}, promptprior.MODEL, promptprior.PRIOR, promptprior.SAMPLE)
        model, vocabulary = promptprior.load_model(a)
        reference = promptprior.references(a, model, vocabulary, [0])[0][0]
        fitted = priors.Fitted.fit(reference)
        density[weight] = fitted.log_prob(load_file(out / "prompt.safetensors")["layers.0"]).mean().item()
        start = fitted.log_prob(load_file(out / "prompts/000000.safetensors")["layers.0"]).mean().item()
    assert density[1000] > start + 5 > density[0]


def test_sample(tmp_path, capsys):
    assert run("sample", "--prior", "exclusion:k=2", "--deep-layers", 1, "--out", tmp_path / "s", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert [r["layer"] for r in out] == [0, 5] and out[0]["radius_drawn"] == pytest.approx(3.84, abs=0.01)
    assert load_file(tmp_path / "s/rows.safetensors")["layers.5"].shape == (20, 192)
    assert {p.name for p in (tmp_path / "s/figures").iterdir()} == {"layer-00.svg", "layer-05.svg"}


def test_text_prior_is_the_text_prompt(tmp_path):
    """Rows that begin as a text's tokens score, untrained, exactly what the text itself scores."""
    a = promptprior.settings_of({}, promptprior.MODEL, promptprior.PRIOR, promptprior.SAMPLE)
    model, vocabulary = promptprior.load_model(a)
    ids = vocabulary.encode_plain("short answer")
    assert run("train", "--prior", "text", "--tokens", len(ids), "--steps", 0, "--out", tmp_path / "t", "--eval-limit", 8) == 0
    scores = {m["split"]: m for m in metrics(tmp_path / "t")}
    assert scores["eval"]["loss"] == pytest.approx(scores["text"]["loss"], rel=1e-5) != scores["baseline"]["loss"]
    rows = load_file(tmp_path / "t/prompts/000000.safetensors")["layers.0"]
    assert torch.equal(rows, model.embeddings[ids].float())


def test_activations_leave_out_bos_and_padding():
    a = promptprior.settings_of({}, promptprior.MODEL, promptprior.PRIOR, promptprior.SAMPLE)
    model, vocabulary = promptprior.load_model(a)
    rows = [vocabulary.encode("one two"), vocabulary.encode("a much longer text than that")]
    found = promptprior.collect(model, rows, [0, 2], limit=10**6)
    assert len(found[2]) == sum(len(r) - 1 for r in rows)
    assert torch.equal(found[0], model.embeddings[[i for r in rows for i in r[1:]]])
    seen = {}
    model(torch.tensor([rows[0]]), tap=seen.__setitem__)
    torch.testing.assert_close(found[2][:len(rows[0]) - 1], seen[2][0, 1:], atol=1e-5, rtol=1e-4)
    assert len(promptprior.collect(model, rows, [0, 2], limit=7)[2]) == 7


def test_held_out_questions_share_no_context():
    examples = data.read("squad", str(HERE / "tiny/squad/train.json"))
    train_side, eval_side = promptprior.held_out(examples, len(examples) // 10)
    assert len(train_side) + len(eval_side) == len(examples) and len(eval_side) >= len(examples) // 10
    assert not {e.context for e in train_side} & {e.context for e in eval_side}
    sums = data.read("math", str(HERE / "tiny/math/train-easy"))
    assert len(promptprior.held_out(sums, 50)[1]) == 50


def test_help_without_torch():
    code = ("import sys, promptprior\n"
            "for c in ([], ['train'], ['eval'], ['generate'], ['sample'], ['plot']):\n"
            "    try: promptprior.main([*c, '--help'])\n"
            "    except SystemExit as e: assert e.code == 0\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in promptprior.priors.PRIORS)


def test_modules_stand_alone(tmp_path):
    """Each of the four is copied into an empty folder and imported there."""
    import shutil

    for name in ("llama", "data", "priors", "viz"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(HERE / f"{name}.py", folder)
        subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); import {name}"], cwd=folder, check=True)


def squad_file(folder, **changes):
    path = folder / "x.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [
        {"id": "1", "question": "q", "answers": [], "is_impossible": True}]}]}], **changes}))
    return f"squad:{path}"


MISTAKES = {
    "unknown prior": (["--prior", "gauss"], "'gauss' is not known: use one of isotropic, xavier, vocab"),
    "unknown option": (["--prior", "fitted:c=3"], "no option 'c'"),
    "too many layers": (["--deep-layers", 7], "the model has 6 layers"),
    "no rows": (["--tokens", 0], "rows at the tokens"),
    "too many rows": (["--tokens", 511], "512 positions"),
    "more rows than tokens": (["--tokens", 5000], "512 positions"),
    "no such model": (["--model", "nobody/nothing"], "hf download"),
    "no such data": (["--data", "squad:/nowhere"], "nothing found"),
    "no such kind": (["--data", "csv:x"], "unknown kind 'csv'"),
    "text to train on": (["--data", "text"], "no questions and answers"),
    "not bundled": (["--data", "hendrycks"], "no bundled hendrycks"),
    "MAP without a density": (["--prior", "vocab", "--prior-weight", 1], "isotropic, fitted, exclusion"),
    "wrong dtype": (["--dtype", "int8"], "float32, bfloat16 or float16"),
    "no such device": (["--device", "cuda:99"], "use cpu"),
    "resume nothing": (["--resume"], "--resume needs --out"),
    "no batch": (["--batch-size", 0], "--batch-size 0"),
    "negative": (["--steps", -1], "--steps -1"),
    "too long": (["--max-length", 600], "512 positions"),
    "text prior without text": (["--prior", "text", "--text", ""], "needs --text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, monkeypatch, name):
    arguments, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    assert run("train", *arguments) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("promptprior: error: ") and message in error
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_mistyped_flag_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as e:
        run("train", "--pior", "vocab")
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and "--pior" in error and "--help" in error


def test_only_unanswerable(tmp_path, capsys):
    spec = squad_file(tmp_path)
    assert run("train", "--data", spec, "--eval-data", spec) == 2
    assert "--keep-unanswerable" in capsys.readouterr().err
    assert run("train", "--data", spec, "--eval-data", spec, "--keep-unanswerable", "--steps", 1, "--out", tmp_path / "o") == 0


def test_a_run_that_is_none(tmp_path, capsys):
    for command in (["eval", tmp_path], ["plot", tmp_path], ["generate", tmp_path, "x"]):
        assert run(*command) == 2
        assert "no config.json" in capsys.readouterr().err


def test_a_model_smaller_than_its_tokenizer(hf, capsys, tmp_path):
    import shutil

    _, folder = hf()
    shutil.copy(HERE / "tiny/tokenizer.json", folder)
    assert run("train", "--model", folder, "--out", tmp_path / "o") == 2
    assert "tokenizer.json has 512 tokens and the model embeds 97" in capsys.readouterr().err


def test_not_finite_stops_before_the_step(tmp_path, capsys):
    """A learning rate that overflows: the run stops, exit 1, and the last good rows stay."""
    out = tmp_path / "o"
    assert run("train", "--lr", 1e25, "--clip", 1e30, "--steps", 40, "--warmup", 0, "--eval-every", 1, "--eval-limit", 2,
               "--max-new", 2, "--batch-size", 2, "--prior", "isotropic", "--prior-weight", 1, "--out", out) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "not finite" in error and "checkpoint.safetensors holds step" in error and "--lr" in error
    _, tensors = train.Run(out).load_checkpoint()
    assert all(torch.isfinite(t).all() for k, t in tensors.items() if k.startswith("rows"))
