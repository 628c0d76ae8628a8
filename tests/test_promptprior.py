"""The command line, on the bundled world and on small random models."""

import ast
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import priors
import promptprior
from forked import Forked
from lab import commands, evaluation, inputs, page, populations
from lab.console import Stopped
from lab.evaluation import evaluate, open_run
from lab.folder import Run
from lab.page import about_run, shown_steps
from lab.settings import TINY, DataSettings, ModelSettings, PriorSettings
from lab.train import command_train
from small import MODEL

HERE = Path(promptprior.__file__).parent
FEW = ["--steps", "4", "--eval-every", "2", "--eval-limit", "6", "--batch-size", "4",
       "--max-new", "6", "--train-examples", "60", "--reference-rows", "400"]
SMALL = [*FEW, "--model", str(MODEL)]  # where nothing needs to be known


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


def test_an_unknown_flag_names_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit) as e:
        run("eval", "x", "--eval-limit", 3)
    assert e.value.code == 2 and capsys.readouterr().err == (
        "promptprior: error: unrecognized arguments: --eval-limit 3: see `promptprior.py eval "
        "--help`\n")


@pytest.mark.parametrize("arguments, expected", [
    ("generate r --step best text", {"paths": ["r", "text"], "step": "best"}),
    ("generate r --step best s --max-new 5 -- -x", {"paths": ["r", "s", "-x"], "step": "best",
                                                    "max_new": 5}),
    ("generate --step best -- r -x", {"paths": ["r", "-x"], "step": "best"}),
    ("eval r --limit 3 s --words t", {"runs": ["r", "s", "t"], "eval_limit": 3, "words": True}),
    ("compare a --json b", {"paths": ["a", "b"], "json": True}),
    ("plot a --text b", {"runs": ["a", "b"], "in_characters": True}),
    ("interpolate --points 3 a --json b", {"run_a": "a", "run_b": "b", "points": 3, "json": True}),
    ("figures 3 --steps 2 5", {"numbers": [3, 5], "steps": 2})])
def test_flags_may_stand_between_paths(arguments, expected):
    assert commands.parse(arguments.split(), "") == (arguments.split()[0], expected)


@pytest.mark.parametrize("command, arguments, named", [
    ("eval", "eval r --eval-limit 3 s", "unrecognized arguments: --eval-limit 3 s"),
    ("eval", "--fast eval r", "unrecognized arguments: --fast"),
    ("sweep", "sweep r --jobs 2 s", "unrecognized arguments: s"),
    ("figures", "figures 3 --steps 2 five", "argument N: invalid int value: 'five'"),
    ("train", "train r", "unrecognized arguments: r")])
def test_what_no_order_makes_right_is_refused(capsys, command, arguments, named):
    with pytest.raises(SystemExit) as e:
        commands.parse(arguments.split(), "")
    assert e.value.code == 2 and capsys.readouterr().err == (
        f"promptprior: error: {named}: see `promptprior.py {command} --help`\n")


def test_a_flag_that_changes_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        run("sample", "--forget", "text")
    assert "unrecognized arguments: --forget text" in capsys.readouterr().err


def test_a_score_is_said_before_the_next_is_made(tmp_path, capsys):
    assert run("train", "--out", tmp_path / "run", *SMALL, "--text", "short answer") == 0
    stages = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()
              if line.startswith(("no prompt", "text prompt", "step "))]
    assert stages == [name for name in ("no prompt", "text prompt 'short answer'", "step 0",
                                        "step 2", "step 4") for _ in ("begins", "is scored")]


def test_the_runs_folder(trained):
    files = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert files == {"config.json", "metrics.jsonl", "predictions.jsonl", "prompt.safetensors",
                     "checkpoints/000002.safetensors", "checkpoints/000004.safetensors",
                     *(f"prompts/{step:06d}.safetensors" for step in range(5)),
                     *(f"figures/layer-{i:02d}.svg" for i in (0, 3, 4, 5))}
    m = metrics(trained)
    assert [x["split"] for x in m] == ["baseline", "text", "eval", "train", "train", "eval",
                                       "train", "train", "eval"]
    for x in m:
        assert set(x) >= ({"loss", "lr", "grad_norm", "examples_per_second", "step"}
                          if x["split"] == "train" else
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
    assert len(predictions) == 6 and {"id", "question", "prediction", "answers", "exact_match",
                                      "f1"} <= set(predictions[0])
    for figure in (trained / "figures").iterdir():
        ET.fromstring(figure.read_text())


def test_eval_gives_the_scores_of_training(trained, capsys):
    assert run("eval", trained, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    last = [m for m in metrics(trained) if m["split"] == "eval"][-1]
    assert out["scores"]["exclusion prior, trained"] == pytest.approx(
        {k: v for k, v in last.items() if k not in ("step", "split")})
    assert out["questions"] == 6 and list(out["scores"]) == [
        "no prompt", "text prompt 'short answer'", "exclusion prior, trained"]
    assert run("eval", trained, "--data", "math", "--limit", 5) == 0
    assert "accuracy" in capsys.readouterr().out


def test_generate_and_plot(trained, monkeypatch, capsys):
    assert run("generate", trained, "Question: What is 1 + 1?\nAnswer:") == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert run("generate", trained, "word " * 500) == 2 and "shorten it" in capsys.readouterr().err
    assert run("eval", trained, "--limit", -1) == 2
    before = (trained / "figures/layer-03.svg").read_bytes()
    (trained / "figures/layer-03.svg").unlink()
    monkeypatch.setattr(page, "DEEP", 100)
    assert run("plot", trained) == 0
    assert (trained / "figures/layer-03.svg").read_bytes() == before


class Killed(BaseException):
    """Stands for SIGKILL: nothing is caught, nothing is tidied up."""


@pytest.mark.parametrize("arguments", [
    ["--prior", "vocab"], ["--prior", "fitted", "--prior-weight", "1", "--deep-layers", "1"],
    ["--prior", "isotropic", "--dtype", "bfloat16", "--data", "math"],
    ["--data", "math", "--tokens", "0", "--deep-layers", "2"],
    ["--prior", "fitted", "--posterior", "sgld", "--particles", "3", "--data", "math"],
    ["--prior", "fitted", "--posterior", "gaussian", "--deep-layers", "1", "--data", "math"]])
def test_resume_ends_in_the_same_bytes(tmp_path, monkeypatch, arguments):
    """Stopped by signals and killed between checkpoints, with lines in the log that no checkpoint
    knows of."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    few = [*SMALL, "--steps", "7", "--eval-every", "3"]
    assert run("train", "--out", whole, *few, *arguments) == 0
    original, stops = data.Order.__getitem__, []

    def getitem(self, step):
        if stops and stops[0][0] == step:
            _, how = stops.pop()
            if how is Killed:
                raise Killed
            os.kill(os.getpid(), how)
        return original(self, step)

    monkeypatch.setattr(data.Order, "__getitem__", getitem)
    given = {"out": str(parts), **commands.parse(["train", *few, *arguments], "")[1]}
    for step, how in ((0, Killed), (2, Killed), (1, signal.SIGINT), (4, Killed),
                      (5, signal.SIGTERM)):
        stops.append((step, how))
        with pytest.raises((Killed, Stopped)) as e:
            command_train(dict(given))
        assert not stops and (
            how is Killed or e.value.status == -how and "--resume" in str(e.value))
        given = {"out": str(parts), "resume": True}
    assert run("train", "--out", parts, "--resume") == 0
    names = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    assert names == {p.relative_to(parts) for p in parts.rglob("*") if p.is_file()}
    for name in names - {Path("config.json"), Path("metrics.jsonl")}:
        if name.suffix != ".svg" and name.parent.name != "checkpoints":  # its run, or log's length
            assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    clock = ("seconds", "examples_per_second")
    strip = lambda folder: [{k: v for k, v in m.items() if k not in clock} for m in metrics(folder)]
    assert strip(whole) == strip(parts)
    ends = [Run(folder).load_checkpoint()[0] for folder in (whole, parts)]
    assert ends[0].step == ends[1].step == 7 and not ends[0].due and all(
        torch.equal(t, ends[1].tensors[k]) for k, t in ends[0].tensors.items())


def test_resume_where_the_files_moved(tmp_path, capsys):
    """Files with the same checksums are the same, wherever they are; others are refused."""
    model, out = tmp_path / "model", tmp_path / "o"
    shutil.copytree(MODEL, model)
    (tmp_path / "sums.txt").write_text("1 + 1\n2\n2 + 2\n4\n3 + 3\n6\n")
    assert run("train", "--model", model, "--data", f"math:{tmp_path / 'sums.txt'}", "--out", out,
               *FEW) == 0
    end = load_file(out / "prompt.safetensors")
    (out / "prompt.safetensors").unlink()
    (out / "checkpoints/000004.safetensors").unlink()

    (tmp_path / "new").mkdir()
    model.rename(tmp_path / "new/model")
    (tmp_path / "sums.txt").rename(tmp_path / "new/sums.txt")
    (tmp_path / "new/other.txt").write_text("1 + 1\n2\n2 + 2\n4\n3 + 3\n7\n")
    before = (out / "config.json").read_bytes()
    resumed = ["train", "--resume", "--out", out, "--model", tmp_path / "new/model", "--data"]
    assert run(*resumed, f"math:{tmp_path / 'new/other.txt'}") == 2
    assert "the data changed" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before
    assert run(*resumed, f"math:{tmp_path / 'new/sums.txt'}") == 0
    assert "not the end" not in capsys.readouterr().err
    torch.testing.assert_close(load_file(out / "prompt.safetensors"), end, rtol=0, atol=0)
    assert run("eval", out) == 0  # from where the files are now


def test_resume_where_the_priors_run_moved(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "first")
    out = tmp_path / "o"
    assert run("train", "--prior", f"posterior:{tmp_path / 'first'}", "--out", out, *FEW) == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    resumed = ["train", "--resume", "--out", out, "--steps", 5]
    assert run(*resumed) == 2
    moved = f"posterior:{tmp_path / 'moved'}"
    for other in ("fitted", f"{moved},resample=1"):
        assert run(*resumed, "--prior", other) == 2
        assert "goes on with its own settings" in capsys.readouterr().err
    assert run(*resumed, "--prior", f"{moved},{moved[10:]}") == 2
    assert "the reference changed" in capsys.readouterr().err
    assert run(*resumed, "--prior", moved) == 0
    (out / "checkpoints/000005.safetensors").unlink()
    assert run(*resumed) == 0  # from where the run is now


def test_a_run_of_two_processes_goes_on_in_one_only_if_asked_to(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "o")
    path = tmp_path / "o/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    assert run("train", "--resume", "--out", tmp_path / "o") == 2
    assert "start 2 by torchrun, or give --any-processes" in capsys.readouterr().err
    assert run("train", "--resume", "--out", tmp_path / "o", "--any-processes") == 0
    assert "processes 1 instead of 2: not the end" in capsys.readouterr().err
    assert json.loads(path.read_text())["processes"] == 1


def test_resume_refuses_changed_data(tmp_path, capsys):
    path = tmp_path / "sums.txt"
    path.write_text("1 + 1\n2\n2 + 2\n4\n3 + 3\n6\n")
    out = tmp_path / "o"
    assert run("train", "--data", f"math:{path}", "--out", out, *SMALL) == 0
    path.write_text(path.read_text().replace("6", "7"))
    assert run("train", "--out", out, "--resume") == 2
    assert "the data changed" in capsys.readouterr().err


def test_resume_refuses_other_settings_and_a_damaged_checkpoint(trained, tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    assert run("train", "--out", folder, "--resume", "--lr", 0.5, "--tokens", 20) == 2
    error = capsys.readouterr().err
    assert "--lr 0.5 (the run has None)" in error and "tokens" not in error
    newest = folder / "checkpoints/000004.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    for name in ("prompt.safetensors", "predictions.jsonl", "prompts/000004.safetensors"):
        (folder / name).unlink()
    assert run("train", "--out", folder, "--resume") == 0  # from the one before
    error = capsys.readouterr().err
    assert "000004.safetensors" in error and "checksum" in error and "from step 2" in error
    for name in ("prompt.safetensors", "predictions.jsonl", "prompts/000004.safetensors"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(bytes(content))
    assert run("train", "--out", folder, "--resume") == 2
    assert "checksum" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(trained, tmp_path, capsys):
    before = (trained / "config.json").read_bytes()
    assert run("train", "--out", trained, *FEW) == 2
    assert "--resume" in capsys.readouterr().err \
        and (trained / "config.json").read_bytes() == before


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "o"
    assert run("train", "--out", out, *SMALL, "--deep-layers", 1) == 0
    (out / "notes.txt").write_text("mine")
    assert run("train", "--out", out, *SMALL, "--steps", 2, "--overwrite") == 0
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert "notes.txt" in names and "prompts/000004.safetensors" not in names \
        and "figures/layer-02.svg" not in names
    other = tmp_path / "model"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (other / "model.safetensors").write_bytes(b"precious")
    for path in (other, other / "model.safetensors"):
        assert run("train", "--out", path, *SMALL, "--overwrite") == 2
        assert "promptprior: error" in capsys.readouterr().err
    assert (other / "model.safetensors").read_bytes() == b"precious" \
        and len(list(other.iterdir())) == 2


def test_sharing_and_keeping(tmp_path, capsys):
    """--no-share meets other examples in a batch, but scores alike; --keep and --cut differ, and
    what to expect of cut rows is said."""
    losses = {}
    for flags in (("--cut",), ("--keep",), ("--keep", "--no-share")):
        out = tmp_path / "".join(flags)
        assert run("train", "--out", out, *SMALL, *flags, "--deep-layers", 1) == 0
        assert ("learned far less" in capsys.readouterr().err) == ("--cut" in flags)
        m = metrics(out)
        losses[flags] = [x["loss"] for x in m if x["split"] in ("baseline", "eval")][:2]
    assert losses[("--keep",)] == pytest.approx(losses[("--keep", "--no-share")], rel=1e-5)
    assert losses[("--keep",)][1] != pytest.approx(losses[("--cut",)][1], rel=1e-4)


def test_map_keeps_rows_near_the_prior(tmp_path):
    """A heavy prior weight pulls rows up its density; without it they go where the loss leads."""
    density = {}
    for weight in (0, 1000):
        out = tmp_path / f"w{weight}"
        assert run("train", "--prior", "fitted", "--prior-weight", weight, "--out", out,
                   "--steps", 20, "--eval-every", 20, "--eval-limit", 2, "--batch-size", 2,
                   "--max-new", 2, "--lr", 0.02) == 0
        loaded = inputs.load_model(ModelSettings().complete())
        prior = PriorSettings(prior="fitted").complete("tiny")
        reference = populations.references(prior, DataSettings(), loaded, [0])[0].rows
        fitted = priors.Fitted.fit(reference)
        density[weight] = fitted.log_prob(
            load_file(out / "prompt.safetensors")["layers.0"]).mean().item()
        start = fitted.log_prob(
            load_file(out / "prompts/000000.safetensors")["layers.0"]).mean().item()
    assert density[1000] > start + 5 > density[0]


def test_sample(tmp_path, capsys):
    assert run("sample", "--prior", "exclusion:k=2", "--deep-layers", 1, "--out", tmp_path / "s",
               "--reference-rows", 500, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert [r["layer"] for r in out] == [0, 5] \
        and out[0]["radius_drawn"] == pytest.approx(3.84, abs=0.01)
    assert load_file(tmp_path / "s/rows.safetensors")["layers.5"].shape == (20, 192)
    assert {p.name for p in (tmp_path / "s/figures").iterdir()} == {"layer-00.svg", "layer-05.svg"}


def test_text_prior_is_the_text_prompt(tmp_path):
    """Rows that begin as a text's tokens, in its place, score what the text itself scores."""
    loaded, text = inputs.load_model(ModelSettings().complete()), "short answer\n"
    ids = loaded.vocabulary.encode_plain(text)
    assert run("train", "--prior", "text", "--tokens", len(ids), "--steps", 0, "--text", text,
               "--separator", "", "--place", "after-bos", "--out", tmp_path / "t",
               "--eval-limit", 8) == 0
    scores = {m["split"]: m for m in metrics(tmp_path / "t")}
    assert scores["eval"]["loss"] == pytest.approx(scores["text"]["loss"], rel=1e-5) \
        != scores["baseline"]["loss"]
    rows = load_file(tmp_path / "t/prompts/000000.safetensors")["layers.0"]
    assert torch.equal(rows, loaded.model.embeddings[ids].float())


def test_held_out_questions_share_no_context(tmp_path, monkeypatch, capsys):
    """A tenth of a real path is held out, and eval and plot find the same tenth
    again, from another folder."""
    monkeypatch.chdir(HERE)
    out = tmp_path / "o"
    for spec in ("squad:tiny/squad/train.json", "math:tiny/math/train-easy/*_mul.txt"):
        settings = DataSettings(data=spec).complete()
        train_side, eval_side, _ = inputs.divided(settings)
        total = len(data.read(*inputs.parse_spec(settings.data, 0)))
        assert len(train_side) + len(eval_side) == total \
            and total // 10 <= len(eval_side) < total // 10 + 6
        assert not set(map(inputs.topic, train_side)) & set(map(inputs.topic, eval_side))
    assert run("train", "--data", "math:tiny/math/train-easy/*_mul.txt", "--out", out,
               "--deep-layers", 1, *FEW) == 0
    assert len(json.loads((out / "config.json").read_text())["sha256"]["data"]) == 64
    figure = (out / "figures/layer-05.svg").read_bytes()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run("eval", out, "--json") == 0 and run("plot", out) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[0])["scores"]
    assert scores["vocab prior, trained"]["loss"] == pytest.approx(metrics(out)[-1]["loss"])
    assert (out / "figures/layer-05.svg").read_bytes() == figure


def test_help_without_torch():
    code = ("import sys, promptprior\n"
            "for c in ([], *([name] for name in promptprior.COMMANDS)):\n"
            "    try: promptprior.main([*c, '--help'])\n"
            "    except SystemExit as e: assert e.code == 0\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                         check=True).stdout
    assert all(name in out for name in priors.PRIORS)


# --------------------------------------------------------------------------------------------------
# the house


@functools.cache
def ours() -> dict[str, Path]:
    """Our modules by the names that they are imported by."""
    root = {path.stem: path for path in HERE.glob("*.py")}
    return root | {f"lab.{path.stem}": path for path in HERE.glob("lab/*.py")
                   if path.stem != "__init__"}


def imports_of(path: Path) -> list[tuple[str, str | None]]:
    """(module, name) of everything that a file imports, also inside functions; the name is None if
    the module itself is imported. Imports for type checkers alone do not count."""
    pairs = []
    tree = ast.parse(path.read_text())
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If)
             and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in hints for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            pairs += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                pairs.append((inner, None) if inner in ours() else (node.module, alias.name))
    return pairs


def test_the_root_shows_the_five():
    assert {path.name for path in HERE.glob("*.py")} == {
        "promptprior.py", "llama.py", "data.py", "priors.py", "viz.py"}


def test_imports_go_one_way():
    """The four that are copied import nothing of ours, and lab's modules form no circle."""
    graph = {name: {module for module, _ in imports_of(path) if module in ours()}
             for name, path in ours().items()}
    for name in ("llama", "data", "priors", "viz"):
        assert not graph[name], f"{name}.py imports {graph[name]}"
    assert not any("promptprior" in modules for modules in graph.values())
    assert graph["lab.loss"] == {"llama", "data"}
    for name in ("lab.geometry", "lab.posteriors", "lab.statistics"):
        assert not graph[name], f"{name} imports {graph[name]}"
    while graph:
        leaves = [name for name, modules in graph.items() if not modules & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_every_name_that_is_imported_is_there():
    """In every file, benchmarks among them: nothing else runs them all."""
    folders = [HERE, *(HERE / name for name in ("lab", "benchmarks", "tests", "tiny"))]
    missing, asked = [], set()
    for path in (path for folder in folders for path in folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    if inner in ours():
                        modules[alias.asname or alias.name] = inner
        asked |= {(path.name, module, name) for module, name in imports_of(path) if name}
        asked |= {(path.name, modules[node.value.id], node.attr) for node in ast.walk(tree)
                  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                  and node.value.id in modules}
    for file, module, name in asked:
        if module in ours() and not hasattr(importlib.import_module(module), name):
            missing.append(f"{file}: {module}.{name}")
    assert not missing


def test_functions_are_short():
    """No function over 70 lines; no file of lab over 700."""
    long = []
    for name, path in ours().items():
        text = path.read_text()
        if name.startswith("lab.") and text.count("\n") > 700:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 70:
                long.append(f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not long


def test_every_command_is_where_the_table_says():
    for name, command in commands.COMMANDS.items():
        module = importlib.import_module(f"lab.{command.module}")
        assert callable(getattr(module, f"command_{name}"))


def test_the_docs_list_the_registry():
    text = (HERE / "docs/priors.md").read_text()
    for name, prior in priors.PRIORS.items():
        rows = [line for line in text.split("\n") if re.match(rf"\| `{name}[`:]", line)]
        assert rows, f"docs/priors.md has no row for {name}"
        row = rows[0]
        assert all(f"{k}={v:g}" in row for k, v in priors.options(name).items())
        assert row.endswith("| yes |") == prior.has_density


@pytest.mark.parametrize("path", ["llama.py", "data.py", "priors.py", "viz.py",
                                  "lab/posteriors.py", "lab/geometry.py", "lab/statistics.py"])
def test_modules_stand_alone(tmp_path, path):
    """Each is copied into an empty folder, imported there, and what docs/copying.md says of it
    runs."""
    shutil.copy(HERE / path, tmp_path)
    (tmp_path / "tiny").symlink_to(HERE / "tiny")
    name = Path(path).stem
    text = (HERE / "docs/copying.md").read_text()
    snippet = re.search(rf"<!-- copied: {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert snippet
    (tmp_path / "script.py").write_text(
        ALONE + f"sys.modules.pop({name!r}, None)  # Python's own\n" + snippet[1])
    process = Forked(tmp_path / "script.py")
    assert process.wait() == 0, process.err


@pytest.mark.parametrize("name", ["llama", "data", "priors", "viz"])
def test_a_copy_imports_all_that_it_needs(tmp_path, name):
    """In an interpreter that has imported nothing yet."""
    shutil.copy(HERE / f"{name}.py", tmp_path)
    code = f"import sys; sys.path.insert(0, '.'); import {name}"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


ALONE = """  # with no folder of ours to import from
import os, sys
os.chdir(os.path.dirname(sys.argv[0]))
sys.path[:] = [".", *(path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix)))]
"""


@pytest.mark.parametrize("name", ["a prior of your own", "training from Python"])
def test_the_pages_python_runs(tmp_path, name):
    text = (HERE / "docs/copying.md").read_text()
    snippet = re.search(rf"<!-- python: {name} -->\n```python\n(.*?)```", text, re.DOTALL)[1]
    snippet = snippet.replace("range(25)", "range(5)")  # steps
    (tmp_path / "script.py").write_text("import sys; sys.path.insert(0, '.')\n" + snippet)
    process = Forked(tmp_path / "script.py")
    assert process.wait() == 0 and process.out.strip(), process.err


def test_other_weights_than_the_runs_are_refused_unless_asked_for(tmp_path, capsys):
    model, run_folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(MODEL, model)
    flags = ["--data", f"math:{TINY / 'math/interpolate'}", *FEW]
    assert run("train", "--model", model, "--out", run_folder, *flags) == 0
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 1.1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for command in (["eval"], ["generate"], ["compare"], ["plot"], ["attention"]):
        command += [run_folder, *(["What is 1 + 1?"] if command == ["generate"] else [])]
        capsys.readouterr()
        assert run(*command) == 2
        assert "other weights" in capsys.readouterr().err
    assert run("eval", run_folder, "--model", model) == 0
    assert "may mean nothing to them" in capsys.readouterr().err


def test_what_changes_the_tokenizer_is_noticed(tmp_path, capsys):
    """By eval, and when a run is resumed; early runs did not keep its checksum."""
    model, run_folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(MODEL, model)
    flags = ["--data", f"math:{TINY / 'math/interpolate'}", *FEW]
    assert run("train", "--model", model, "--out", run_folder, *flags) == 0
    resume = ["train", "--out", run_folder, "--resume", "--steps", 9]
    (model / "tokenizer_config.json").write_text("{}")
    assert run("eval", run_folder, "--limit", 2) == 0
    assert "other tokens" not in capsys.readouterr().err
    (model / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    capsys.readouterr()
    assert run("eval", run_folder, "--limit", 2) == 0
    assert "trained with other tokens than the files beside" in capsys.readouterr().err
    assert run(*resume) == 2
    assert "the tokenizer changed since the run began" in capsys.readouterr().err
    config = json.loads((run_folder / "config.json").read_text())
    del config["sha256"]["tokenizer"]
    (run_folder / "config.json").write_text(json.dumps(config))
    assert run("eval", run_folder, "--limit", 2) == 0 and run(*resume) == 0
    assert "other tokens" not in capsys.readouterr().err


def test_steps_of_seven_digits_follow_those_of_six(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("000000", "1000000", "999999", "notes", "12"):
        (tmp_path / f"prompts/{name}.safetensors").touch()
    assert Run(tmp_path).snapshots() == [0, 999999, 1000000]


def test_what_of_a_folder_is_not_read_is_said(tmp_path, capsys):
    for split in ("interpolate", "train-easy"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "arithmetic__mul.txt").write_text("What is 2 * 3?\n6\n")
    for name in ("train-readme.txt", "._hidden.txt", "notes.md"):
        (tmp_path / name).write_text("one\ntwo\n")
    math, small = f"math:{tmp_path}", ("--tokens", 3, "--out", tmp_path / "out")
    command = {"sample": ("--reference", math, *small), "collect": ("--data", math, *small[2:])}
    for read in (lambda: inputs.read_questions(math, 0, False),
                 lambda: inputs.read_questions(f"{math}/**/*.txt", 0, False),
                 lambda: run("sample", *command["sample"]),
                 lambda: run("collect", *command["collect"], "--overwrite")):
        read()
        err = capsys.readouterr().err
        assert "1 of 3 files left out, because their names are no module's: train-readme.txt\n" \
            in err
        assert "its splits are mixed: interpolate, train-easy" in err
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_eval_scores_several_texts(trained, capsys):
    assert run("eval", trained, "--json", "--text", "short answer", "story") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [*scores][:3] == ["no prompt", "text prompt 'short answer'", "text prompt 'story'"]
    assert scores["text prompt 'short answer'"]["loss"] < scores["text prompt 'story'"]["loss"]
    assert run("eval", trained, "--text", "a " * 600) == 2
    assert "text prompt 'a a a" in capsys.readouterr().err


def test_a_text_prompt_is_scored_as_the_beginning_of_the_text(trained, tmp_path, monkeypatch,
                                                              capsys):
    """As if each context began with it; from files, and with another separator, too."""
    monkeypatch.setattr(inputs, "FEW_UNITS", 5)
    (tmp_path / "shots.txt").write_text("short answer\nA cat sat.\nQuestion: Who?\nAnswer: cat\n")
    flags = ["--json", "--limit", 30, "--max-length", 400, "--data",
             f"squad:{TINY / 'squad/dev.json'}"]
    assert run("eval", trained, *flags, "--text", "short answer", "--text-file",
               tmp_path / "shots.txt", "--separator", " \\n") == 0
    names = ["text prompt 'short answer'", "text prompt 'short answer A cat sat. Question:...'"]
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [*scores][1:3] == names

    squad = json.loads((TINY / "squad/dev.json").read_text())
    shots = (tmp_path / "shots.txt").read_text().rstrip("\n")
    for name, text in zip(names, ("short answer", shots)):
        changed = json.loads(json.dumps(squad))
        for article in changed["data"]:
            for paragraph in article["paragraphs"]:
                paragraph["context"] = f"{text} \n{paragraph['context']}"
        (tmp_path / "dev.json").write_text(json.dumps(changed))
        assert run("eval", trained, *flags[:5], "--data", f"squad:{tmp_path / 'dev.json'}") == 0
        plain = json.loads(capsys.readouterr().out)["scores"]["no prompt"]
        assert {k: plain[k] for k in ("loss", "f1", "f1_se")} == pytest.approx(
            {k: scores[name][k] for k in ("loss", "f1", "f1_se")}, rel=1e-4)


def test_an_early_run_keeps_its_meaning(trained, tmp_path, capsys):
    """Its text prompt stands before BOS, and BOS in front of every text."""
    shutil.copytree(trained, tmp_path / "early")
    config = json.loads((trained / "config.json").read_text())
    for key in ("separator", "bos"):
        del config["settings"][key]
    config["settings"]["text"] = "short answer"
    (tmp_path / "early/config.json").write_text(json.dumps(config))
    path = tmp_path / "early/prompt.safetensors"
    save_file(load_file(path), path)  # it did not say whose it is
    assert run("eval", tmp_path / "early", "--json", "--limit", 6) == 0
    early = json.loads(capsys.readouterr().out)["scores"]["text prompt 'short answer'"]

    settings = Run(tmp_path / "early").settings()
    assert settings.prior.separator is None and settings.model.bos == "always"
    loaded = inputs.load_model(settings.model)
    ids = loaded.vocabulary.encode_plain("short answer")
    total = tokens = 0
    for example in inputs.evaluation_examples(replace(settings.data, eval_limit=6)):
        row = data.encode(example, loaded.vocabulary, 400)
        with torch.no_grad():
            h, _ = loaded.model(torch.tensor([ids + row.ids]))
        start = len(ids) + row.start
        log_p = loaded.model.logits(h[0, start - 1:-1]).log_softmax(dim=-1)
        total -= log_p.gather(1, torch.tensor(row.ids[row.start:])[:, None]).sum().item()
        tokens += len(row.ids) - row.start
    assert early["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_text_prompts_of_files_are_settings_as_others(tmp_path, capsys):
    """A run from the config has them too; resuming with other ones is refused."""
    (tmp_path / "t.txt").write_text("story\n\n")
    (tmp_path / "o.txt").write_text("other")
    flags = ["--text", "a b", "--text-file", tmp_path / "t.txt", "--separator", "\\n\\t"]
    assert run("train", "--out", tmp_path / "r", *SMALL, *flags) == 0
    assert run("train", "--config", tmp_path / "r/config.json", "--out", tmp_path / "s") == 0
    (tmp_path / "t.txt").unlink()
    for folder in ("r", "s"):
        prior = Run(tmp_path / folder).settings().prior
        assert (prior.text, prior.separator) == (("a b", "story"), "\n\t")
    assert run("train", "--out", tmp_path / "r", "--resume", "--text-file", tmp_path / "o.txt") == 2
    assert "--text ['other'] (the run has" in capsys.readouterr().err
    assert run("train", "--out", tmp_path / "n", "--text-file", tmp_path / "t.txt") == 2
    assert "t.txt" in capsys.readouterr().err and not (tmp_path / "n").exists()
    # Texts that begin alike keep a row each.
    long = "one two three four five six seven eight nine ten "
    assert run("eval", tmp_path / "r", "--limit", 4, "--json", "--text", long + "x", long) == 0
    names = [*json.loads(capsys.readouterr().out)["scores"]]
    assert names[1].endswith("...' (1)") and names[2].endswith("...' (2)")


def test_a_text_prompt_that_is_longer_than_the_runs(trained, capsys):
    """Other texts give way, unless --max-length says otherwise."""
    assert run("eval", trained, "--limit", 4, "--json", "--text", "word " * 40) == 0
    assert "contexts are cut to fit" in capsys.readouterr().err
    assert run("eval", trained, "--text", "word " * 40, "--max-length", 486) == 2
    assert "lower --max-length" in capsys.readouterr().err
    # An empty text is none.
    assert run("eval", trained, "--limit", 4, "--json", "--text", "") == 0
    assert [*json.loads(capsys.readouterr().out)["scores"]][1].startswith("exclusion prior")


def test_a_text_prompt_leaves_a_longer_max_length_alone(hf, tmp_path, capsys):
    """A run with more than the usual 1024 tokens, on a model that has room for them."""
    _, folder = hf(vocab_size=512, num_hidden_layers=1, max_position_embeddings=4096)
    shutil.copy(TINY / "tokenizer.json", folder)
    assert run("train", "--model", folder, "--out", tmp_path / "r", *FEW, "--max-length", 2000,
               "--steps", 0) == 0
    opened = open_run(tmp_path / "r", {"text": ["a few words"]})
    assert opened.max_length == 2000 and "contexts are cut" not in capsys.readouterr().err


def test_the_step_that_is_wanted(tmp_path, monkeypatch, capsys):
    """best is the lowest evaluation loss among the snapshots; every command that reads a run's
    prompt takes it."""
    monkeypatch.setattr(inputs, "FEW_UNITS", 5)
    assert run("train", "--out", tmp_path / "r", *FEW, "--eval-limit", 30, "--text", "",
               "--max-length", 200) == 0
    run_of, log = Run(tmp_path / "r"), metrics(tmp_path / "r")
    evals = {m["step"]: m for m in log if m["split"] == "eval"}
    worst = 2
    log = [json.dumps({**m, "loss": 0.001} if m.get("step") == worst and m["split"] == "eval"
                      else m) for m in log]
    (tmp_path / "r/metrics.jsonl").write_text("\n".join(log) + "\n")
    capsys.readouterr()
    for step in ("best", str(worst)):
        assert run("eval", tmp_path / "r", "--step", step, "--json") == 0
        scores = json.loads(capsys.readouterr().out)["scores"][f"vocab prior, {worst} steps"]
        assert scores["loss"] == pytest.approx(evals[worst]["loss"], rel=1e-5)
        assert scores["f1_se"] == pytest.approx(evals[worst]["f1_se"], rel=1e-5)
    # as of a run that ended at that step
    shutil.copytree(tmp_path / "r", tmp_path / "there/r")
    (tmp_path / "there/r/metrics.jsonl").write_text("\n".join(
        line for line in log if json.loads(line).get("step", 0) <= worst) + "\n")
    (tmp_path / "there/r/prompt.safetensors").write_bytes(
        run_of.path.joinpath(f"prompts/{worst:06d}.safetensors").read_bytes())
    measured = []
    for folder, *step in ("there/r",), ("r", "--step", worst), ("r",):
        assert run("compare", tmp_path / folder, "--json", *step) == 0
        measured.append(json.loads(capsys.readouterr().out)[0]["measures"])
    expected, found, last = measured
    assert found == expected != last
    asked = []
    monkeypatch.setattr(evaluation, "_continued",
                        lambda runs, rows: asked.append(runs[0].prompt.layers[0]) or [["so"]])
    assert run("generate", tmp_path / "r", "Who?", "--step", worst) == 0
    assert torch.equal(asked[0], Run(tmp_path / "there/r").prompt().layers[0])
    for command in (["export", tmp_path / "r", "--to", tmp_path / "peft"],
                    ["plot", tmp_path / "r", "--text"]):
        assert run(*command, "--step", worst) == 0
    capsys.readouterr()
    rows = load_file(tmp_path / "peft/adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(rows, run_of.tensors(f"prompts/{worst:06d}.safetensors")["layers.0"])
    assert not torch.equal(rows, run_of.tensors()["layers.0"])
    opened = open_run(tmp_path / "r", {"step": str(worst)})
    assert shown_steps(opened.run) == [0, 1, 2]
    about = about_run(opened.run, opened.settings, [0, 1, 2])
    assert [line["step"] for line in about["evals"]] == [0, 2] and not about["predictions"]
    about = json.loads((tmp_path / "peft/promptprior.json").read_text())
    assert about["step"] == worst
    assert run("export", tmp_path / "r", "--csv", "--step", worst) == 2
    assert run("collect", "--step", worst) == 2
    capsys.readouterr()
    for step in ("7777", "-1", "worst", "9" * 5000):
        assert run("eval", tmp_path / "r", "--step", step) == 2
        assert "give best, or one of 0, " in capsys.readouterr().err
    (tmp_path / "r/metrics.jsonl").write_text("")
    assert run("eval", tmp_path / "r", "--step", "best") == 2
    assert "none of its prompts was evaluated" in capsys.readouterr().err


def squad_file(folder, **changes):
    path = folder / "x.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [
        {"id": "1", "question": "q", "answers": [], "is_impossible": True}]}]}], **changes}))
    return f"squad:{path}"


MISTAKES = {
    "unknown prior": (["--prior", "gauss"],
                      "'gauss' is not known: use one of isotropic, xavier, vocab"),
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
    "MAP without a density": (["--prior", "vocab", "--prior-weight", 1],
                              "isotropic, fitted, exclusion"),
    "wrong dtype": (["--dtype", "int8"], "float32, bfloat16 or float16"),
    "no such device": (["--device", "cuda:99"], "use cpu"),
    "resume nothing": (["--resume"], "--resume needs --out"),
    "no batch": (["--batch-size", 0], "--batch-size 0"),
    "negative": (["--steps", -1], "--steps -1"),
    "no learning rate": (["--lr", "nan"], "--lr nan"),
    "no clipping": (["--clip", 0], "--clip 0"),
    "prior of infinite width": (["--prior", "isotropic:std=inf"], "expected a number of at most"),
    "prior that overflows": (["--prior", "isotropic:std=1e300"], "expected a number of at most"),
    "seed": (["--seed", 10**20], "--seed 1000"),
    "a long text": (["--text", "word " * 400], "512 positions"),
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
    assert run("train", "--data", spec, "--eval-data", spec, "--keep-unanswerable", "--steps", 1,
               "--out", tmp_path / "o") == 0
    assert run("eval", tmp_path / "o", "--data", spec, "--keep-unanswerable") == 0


def test_a_run_that_is_none(tmp_path, capsys):
    for command in (["eval", tmp_path], ["plot", tmp_path], ["generate", tmp_path, "x"],
                    ["train", "--resume", "--out", tmp_path]):
        assert run(*command) == 2
        assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"settings": {}}')
    assert run("train", "--resume", "--out", tmp_path) == 2 \
        and "not a run" in capsys.readouterr().err


def test_a_log_that_was_cut_in_a_line(trained, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes()[:-20])
    assert Run(tmp_path).metrics() == metrics(trained)[:-1]


def test_a_text_prior_of_one_token(tmp_path):
    assert run("train", "--prior", "text", "--text", "a", "--out", tmp_path / "o", *SMALL) == 0
    ET.fromstring((tmp_path / "o/figures/layer-00.svg").read_text())


def test_a_model_smaller_than_its_tokenizer(hf, capsys, tmp_path):
    import shutil

    _, folder = hf()
    shutil.copy(HERE / "tiny/tokenizer.json", folder)
    assert run("train", "--model", folder, "--out", tmp_path / "o") == 2
    assert ("tokenizer.json: has 512 tokens, ids up to 511, and the model embeds 97"
            in capsys.readouterr().err)


def test_not_finite_stops_before_the_step(tmp_path, capsys):
    """A learning rate that overflows: the run stops, exit 1, and the last good rows stay."""
    out = tmp_path / "o"
    assert run("train", "--lr", 1e25, "--clip", 1e30, "--steps", 40, "--warmup", 0,
               "--eval-every", 1, "--eval-limit", 2, "--max-new", 2, "--batch-size", 2,
               "--prior", "isotropic", "--prior-weight", 1, "--out", out) == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "not finite" in error and "checkpoints holds step" in error \
        and "--lr" in error
    rows = {k: t for k, t in Run(out).load_checkpoint()[0].tensors.items()
            if k.startswith("rows")}
    assert rows and all(torch.isfinite(t).all() for t in rows.values())


def test_multiple_choice_is_scored_by_likelihood(tmp_path, capsys):
    """As plain forwards of the whole text with each choice do; of a text prompt too."""
    records = [{"text": f"Bolu has {i} {kind}.", "label_text": label} for i in range(6)
               for kind, label in (("cats", "an animal"), ("pans", "thing"), ("dogs", "an animal"))]
    (tmp_path / "x.json").write_text(json.dumps(records))
    spec, run = f"choice:{tmp_path}/x.json", tmp_path / "run"
    assert promptprior.main(["train", "--data", spec, "--eval-data", spec, "--steps", "2",
                             "--eval-every", "1", "--text", "a thing:", "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "always the commonest answer" in out and "likeliest" in out and "66.7" in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"split": "majority", "accuracy": pytest.approx(200 / 3),
                        "choice_accuracy": pytest.approx(200 / 3)}

    opened = open_run(run, {})
    questions = inputs.encode(data.read("choice", f"{tmp_path}/x.json"), opened.vocabulary,
                              opened.max_length, "")
    plain = inputs.plain_prompts(opened.loaded, opened.settings.prior, questions)
    starts = {"": (opened.prompt, questions), "a thing:\n": (plain[1].past, plain[1].questions)}
    for beginning, (prompt, asked) in starts.items():
        scores, said = evaluate(opened.loaded, [prompt], asked, "before", opened.settings.data, "")
        for example, line in zip(questions.examples, said):
            losses = {}
            for choice in example.choices:
                text = beginning + data.question_text("", example.question)
                row = opened.vocabulary.encode(text + f" {choice}\n")
                start = len(opened.vocabulary.encode(text))
                past = opened.prompt.past(opened.model) if not beginning else None
                with torch.no_grad():
                    h, _ = opened.model(torch.tensor([row[:-1]]), past)
                    log_p = opened.model.logits(h)[0].log_softmax(-1)
                losses[choice] = -sum(log_p[k - 1, row[k]] for k in range(start, len(row)))
            assert line["choice"] == min(losses, key=losses.get)
            assert line["choice_accuracy"] == 100 * (line["choice"] == example.answers[0])
        assert scores["choice_accuracy"] == pytest.approx(
            sum(line["choice_accuracy"] for line in said) / len(said))
