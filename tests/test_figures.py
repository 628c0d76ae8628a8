"""The figures command on the bundled world, and curves of several runs."""

import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import stats

import pictures
import promptprior
import viz
from train import Run

FEW = ["--steps", "2", "--eval-limit", "4", "--batch-size", "2", "--examples", "40", "--limit",
       "1200"]


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All thirteen, of runs of two steps."""
    folder = tmp_path_factory.mktemp("figures") / "F"
    assert run("figures", "--out", folder, *FEW) == 0
    return folder


def test_all_thirteen_are_drawn_and_measured(folder):
    files = sorted(p.name for p in folder.glob("*.svg"))
    assert [int(re.match(r"figure-(\d\d)-", f)[1]) for f in files] == list(range(1, 14))
    measured = json.loads((folder / "figures.json").read_text())
    assert list(measured) == [str(n) for n in range(1, 14)]
    for n, entry in measured.items():
        svg = (folder / entry["file"]).read_text()
        root = ET.fromstring(svg)
        text = " ".join(t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text"))
        assert f"Figure {n} of the paper." in text and "Model tiny" in text and len(svg) < 300_000
        numbers = [v for v in entry["measured"].values() if isinstance(v, float)]
        assert numbers and np.isfinite(numbers).all()
        # at least one of the numbers stands in the caption
        assert any(re.search(rf"(?<![\d.]){re.escape(form.format(v))}(?!\d)", text)
                   for v in numbers for form in ("{:.3g}", "{:.3f}", "{:.2f}", "{:.4g}"))
    assert len(ET.parse(folder / measured["4"]["file"]).getroot().findall(".//{*}image")) == 7
    domains = len(set(load_file(folder / "means.safetensors")["domain"].tolist()))
    cells = [t for t in ET.parse(folder / measured["5"]["file"]).getroot().iter(
        "{http://www.w3.org/2000/svg}text") if t.get("class") == "cell"]
    assert domains == 4 and len(cells) == domains * (domains - 1)


def test_what_is_there_is_used_again(folder, capsys):
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    first = (folder / "figure-12-last-layer-interpolation.svg").read_bytes()
    assert run("figures", 12, "--out", folder, *FEW) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == times
    assert (folder / "figure-12-last-layer-interpolation.svg").read_bytes() == first
    assert len(json.loads((folder / "figures.json").read_text())) == 13
    capsys.readouterr()
    for changed in (["--limit", 300], ["--steps", 3], ["--seed", 1]):
        assert run("figures", 10, "--out", folder, *FEW, *changed) == 2
        assert "choose another --out" in capsys.readouterr().err
    assert run("figures", 14, "--out", folder) == 2 and "1 to 13" in capsys.readouterr().err


def test_a_collection_without_the_layer(folder, tmp_path, capsys):
    copy = tmp_path / "F"
    copy.mkdir()
    assert run("collect", "--data", "text=text", "squad=squad", "math=math", "--layers", "0,1",
               "--examples", 40, "--limit", 1200, "--out", copy / "tokens.safetensors") == 0
    capsys.readouterr()
    assert run("figures", 4, "--out", copy, *FEW) == 2
    assert "layer 2 is not in it" in capsys.readouterr().err and not list(copy.glob("*.svg"))


def test_curves_of_seeds_have_a_band(folder, tmp_path):
    """Seeds of one setting are one curve: their mean, in Student's interval."""
    runs, losses = [], []
    for seed in range(3):
        path = tmp_path / f"seed{seed}"
        shutil.copytree(folder / "runs/xavier", path)
        config = json.loads((path / "config.json").read_text())
        config["settings"]["seed"] = seed
        (path / "config.json").write_text(json.dumps(config))
        log = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for m in log:
            if m["split"] == "eval":
                m["loss"] += seed
        losses.append([m["loss"] for m in log if m["split"] == "eval"])
        (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in log))
        runs.append(Run(path))
    steps, values = pictures.by_step([r.metrics() for r in runs], "eval", "loss")
    np.testing.assert_allclose(values, losses)
    band = pictures.banded("x", steps, values, viz.BLUE)
    low, high = stats.t.interval(0.95, 2, np.mean(losses, 0), stats.sem(losses, axis=0))
    np.testing.assert_allclose((band.low, band.high), (low, high), rtol=2e-3)
    for k in range(2, 14):
        draws = np.random.default_rng(k).normal(size=(k, 1))
        band = pictures.banded("x", np.zeros(1), draws, viz.BLUE)
        low, high = stats.t.interval(0.95, k - 1, draws.mean(), stats.sem(draws[:, 0]))
        # from eleven seeds on the normal's point: at most a seventh narrower
        assert (high - low) * (0.86 if k > 10 else 0.998) <= band.high - band.low <= 1.01 * (
            high - low)
    svg = pictures.curves([*runs, Run(folder / "runs/interpolation")])  # arithmetic beside SQuAD
    assert "F1 or accuracy, percent" in svg and "no prompt" not in svg
    together = ET.fromstring(pictures.curves(runs))
    alone = ET.fromstring(pictures.curves(runs[:1]))

    def bands(root):
        return len([p for p in root.iter("{http://www.w3.org/2000/svg}path")
                    if p.get("fill-opacity") == ".18"])

    assert bands(alone) == 0 and bands(together) == 3


def test_plot(folder, capsys):
    capsys.readouterr()
    assert run("plot", folder / "runs/fitted-squad", folder / "runs/xavier") == 0
    out = capsys.readouterr().out.split()
    assert out.pop().endswith("/runs/fitted-squad/report.html")
    assert [p.removeprefix(str(folder)) for p in out if p.endswith(".svg")] == [
        "/runs/fitted-squad/figures/layer-00.svg", "/runs/fitted-squad/figures/layer-05.svg",
        "/runs/xavier/figures/layer-00.svg", "/runs/xavier/figures/layer-05.svg",
        "/runs/fitted-squad/figures/curves.svg"]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run("plot", "--text", folder / "runs/xavier") == 0
    text = capsys.readouterr().out
    assert text.count("PC1") == 2 and "#" in text and re.search("[\u2801-\u28ff]", text)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_run_of_massive_loss_still_draws(tmp_path, folder):
    """Numbers beyond a plot's precision are an error of one line, or a plot."""
    path = tmp_path / "r"
    shutil.copytree(folder / "runs/xavier", path)
    rows = load_file(path / "prompt.safetensors")
    save_file({k: np.full_like(v, np.inf) for k, v in rows.items()}, path / "prompt.safetensors")
    assert run("plot", path) == 2
