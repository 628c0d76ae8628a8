"""The figures command on the bundled world, and curves of several runs."""

import json
import re
import shutil
import textwrap
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats

import promptprior
import viz
from lab import figures, pictures, populations
from lab.activations import Collection
from lab.folder import Run
from lab.settings import Settings

FEW = ["--steps", "2", "--eval-limit", "4", "--batch-size", "2", "--examples", "40", "--limit",
       "1200"]


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All thirteen, of runs of two steps."""
    folder = tmp_path_factory.mktemp("figures") / "F"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(populations, "REFERENCE_ROWS", 1000)
        assert run("figures", "--out", folder, *FEW) == 0
    return folder


SVG = "{http://www.w3.org/2000/svg}"


def texts(path):
    """What stands in a figure, by the class of its text."""
    elements = ET.parse(path).getroot().iter(f"{SVG}text")
    return [(t.get("class"), t.text or "") for t in elements]


def test_all_are_drawn_and_measured(folder):
    files = sorted(p.name for p in folder.glob("*.svg"))
    assert [int(re.match(r"figure-(\d\d)-", f)[1]) for f in files] == [*figures.FIGURES]
    measured = json.loads((folder / "figures.json").read_text())
    assert list(measured) == [str(n) for n in figures.FIGURES]
    for n, entry in measured.items():
        path = folder / entry["file"]
        words = texts(path)
        caption = " ".join(text for kind, text in words if kind == "note")
        assert f"Figure {n} of the paper." in caption and "Model tiny, seed 0" in caption
        assert path.stat().st_size < 300_000
        numbers = entry["measured"]
        assert numbers and np.isfinite(list(numbers.values())).all()
        # the table under the picture: every name, and its number right after it
        following = {name: value for (_, name), (_, value) in zip(words, words[1:])}
        for name, value in numbers.items():
            shown = float(following[figures.title_of(name)].replace("\u2212", "-"))
            assert shown == pytest.approx(value, rel=6e-3)
        assert not any(re.search("_[a-z]", text) for _, text in words)  # all in words
    assert all(0 < measured["4"]["measured"][f"unimodal_p_{i}"] <= 1 for i in range(7))
    assert len(ET.parse(folder / measured["4"]["file"]).getroot().findall(".//{*}image")) == 7
    domains = len(set(load_file(folder / "means.safetensors")["domain"].tolist()))
    cells = [text for kind, text in texts(folder / measured["5"]["file"]) if kind == "cell"]
    assert "least AUC" in dict(map(reversed, texts(folder / measured["5"]["file"])))
    assert domains == 4 and len(cells) == domains * (domains - 1)
    for name in ("fitted-squad", "xavier"):
        run = f"run {name}: prior {name.split('-')[0]} of"
        assert run in " ".join(text for _, text in texts(folder / measured["10"]["file"]))


def test_a_figure_is_a_function_and_a_line(folder, monkeypatch, capsys):
    """As the module's first lines say, word by word."""
    example = figures.__doc__.split("FIGURES:\n")[1].split("What it needs")[0]
    function, line = textwrap.dedent(example).strip().split("\n\n")
    names = dict(vars(figures))
    exec(function, names)
    [(number, figure)] = eval("{" + line.strip() + "}", names).items()
    monkeypatch.setitem(figures.FIGURES, number, figure)
    assert run("figures", number, "--out", folder, *FEW) == 0
    assert re.search(r"figure-14-embeddings\.svg\n    tokens \d+\n", capsys.readouterr().out)
    (folder / "figure-14-embeddings.svg").unlink()
    results = json.loads((folder / "figures.json").read_text())
    assert results.pop("14")["title"] == "Token embeddings"
    (folder / "figures.json").write_text(json.dumps(results))


def test_what_is_there_is_used_again(folder, capsys):
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    first = (folder / "figure-12-last-layer-interpolation.svg").read_bytes()
    assert run("figures", 12, "--out", folder, *FEW) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == times
    assert (folder / "figure-12-last-layer-interpolation.svg").read_bytes() == first
    assert len(json.loads((folder / "figures.json").read_text())) == len(figures.FIGURES)
    capsys.readouterr()
    for changed in (["--limit", 300], ["--steps", 3], ["--seed", 1]):
        assert run("figures", 10, "--out", folder, *FEW, *changed) == 2
        assert "choose another --out" in capsys.readouterr().err
    assert run("figures", 99, "--out", folder) == 2 and "figures 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("kind, message", [("link", "a link"), ("file", "not a folder")])
def test_nothing_is_written_through_a_link(tmp_path, capsys, kind, message):
    outside, runs = tmp_path / "outside", tmp_path / "F/runs"
    runs.parent.mkdir()
    outside.mkdir()
    {"link": lambda: runs.symlink_to(outside), "file": runs.touch}[kind]()
    assert run("figures", 6, "--out", tmp_path / "F", *FEW) == 2
    assert f"{runs}: {message}" in capsys.readouterr().err
    assert [*runs.parent.iterdir()] == [runs] and not [*outside.iterdir()]


def test_a_collection_without_the_layer(folder, tmp_path, capsys):
    copy = tmp_path / "F"
    copy.mkdir()
    assert run("collect", "--data", "text=text", "squad=squad", "math=math", "--layers", "0,1",
               "--examples", 40, "--limit", 1200, "--out", copy / "tokens.safetensors") == 0
    capsys.readouterr()
    assert run("figures", 4, "--out", copy, *FEW) == 2
    assert "layer 2 is not in it" in capsys.readouterr().err and not list(copy.glob("*.svg"))


@pytest.mark.parametrize("number, limits, message", [
    (4, ["--limit", 3], r"2 rows of 1 text in text, .*'Density of .* needs 4 of 2"),
    (5, ["--examples", 3], r"means.* 3 rows of 3 texts in text, .*'Mean .* needs 4 of 2"),
    (11, ["--limit", 40], r" 39 rows of 1 text in text, .*'Prompts among .* needs 4 of 2"),
    (13, ["--limit", 40], r" \d+ rows of \d texts? in squad, .*'VAE .* needs 100 of 10")])
def test_too_few_points_are_named_before_anything_is_trained(tmp_path, capsys, number, limits,
                                                            message):
    assert run("figures", number, "--out", tmp_path / "F", *FEW, *limits) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and "larger --limit or --examples" in error
    assert not (tmp_path / "F/runs").exists()


def test_the_fewest_points_can_be_drawn(folder, tmp_path, monkeypatch):
    """Four rows of two texts in every domain, as FEW's larger --limit gives more."""
    shutil.copytree(folder, tmp_path / "F")
    chosen = Collection.chosen

    def few(file, domain=None, *rest):
        index = chosen(file, domain, *rest)
        if domain is None or rest:
            return index
        texts = file.field["text"][index]
        return torch.cat([index[texts == text][:2] for text in texts.unique()[:2]]) \
            if len(texts.unique()) < len(texts) else index[:4]

    monkeypatch.setattr(Collection, "chosen", few)
    assert run("figures", 4, 5, 10, 11, 12, "--out", tmp_path / "F", *FEW) == 0


def test_of_a_large_vocabulary_a_sample_is_on_the_map(folder, tmp_path, monkeypatch):
    """And every token of the sentences; with the map replaced by two coordinates of the rows, each
    stands at its own."""
    shutil.copytree(folder, tmp_path / "F")
    marks, maps = [], []

    def flat(x, seed):
        maps.append(x)
        return viz.Embedding(x[:, :2].astype(float), 1.0, 30.0)

    monkeypatch.setattr(figures, "tsne_map", flat)
    monkeypatch.setattr(figures, "MAP_WORK", 192.0 * 100**2)  # for 100 of the 512 tokens
    monkeypatch.setattr(figures, "trajectory_marks",
                        lambda world, paths, points, kind: marks.append((world, paths, points))
                        or [])
    assert run("figures", 1, "--out", tmp_path / "F", *FEW) == 0
    [(world, paths, points)] = marks
    tokens = world.tokens.field["token"]
    for path, places in zip(paths, points):
        rows = world.loaded.model.embeddings[tokens[path]].numpy()
        np.testing.assert_array_equal(places, rows[:, :2].astype(float))
    assert 100 <= len(maps[0]) <= 100 + sum(map(len, paths)) < 300
    assert len(np.unique(maps[0], axis=0)) == len(maps[0])
    said = " ".join(text for _, text in texts(tmp_path / "F/figure-01-trajectories-vocabulary.svg"))
    assert f"{len(maps[0])} of {len(world.embeddings)} token embeddings, the" in said


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
    cut = pictures.banded("x", steps, values, viz.BLUE, values.mean(), values.mean())
    assert (cut.low >= values.mean()).all() and (cut.high <= values.mean()).all()
    band = pictures.banded("x", steps, values, viz.BLUE)
    low, high = stats.t.interval(0.95, 2, np.mean(losses, 0), stats.sem(losses, axis=0))
    np.testing.assert_allclose((band.low, band.high), (low, high), rtol=2e-3)
    for k in (2, 5, 13, 40):
        draws = np.random.default_rng(k).normal(size=(k, 1))
        band = pictures.banded("x", np.zeros(1), draws, viz.BLUE)
        low, high = stats.t.interval(0.95, k - 1, draws.mean(), stats.sem(draws[:, 0]))
        np.testing.assert_allclose((band.low, band.high), ([low], [high]), rtol=1e-5)
    svg = pictures.curves([*runs, Run(folder / "runs/interpolation")])  # arithmetic beside SQuAD
    assert "F1 or accuracy, percent" in svg and "no prompt" not in svg
    together = ET.fromstring(pictures.curves(runs))
    alone = ET.fromstring(pictures.curves(runs[:1]))

    def bands(root):
        return len([p for p in root.iter(f"{SVG}path")
                    if p.get("fill-opacity") == ".18"])

    assert bands(alone) == 0 and bands(together) == 3


def test_curves_have_shapes_and_levels_that_reach_the_longest_runs_end(tmp_path):
    class Logged(Run):
        def __init__(self, prior, steps, baseline=4.0):
            super().__init__(tmp_path / prior)
            self.prior, self.steps, self.baseline = prior, steps, baseline

        def settings(self):
            return Settings.from_flags({"prior": self.prior})

        def metrics(self):
            line = {"step": 0, "split": "baseline", "loss": 3.0, "f1": self.baseline}
            text = [{**line, "split": "text", "f1": 28.0}] * (self.prior == "vocab")
            return [line, *text, *({"step": s, "split": split, "loss": 1.0, "f1": 50.0}
                            for s in range(0, self.steps + 1, 10) for split in ("eval", "train"))]

    svg = ET.fromstring(pictures.curves([Logged("vocab", 20), Logged("fitted", 40)]))
    losses, scores = svg.findall("{*}g")
    assert len(scores.findall("{*}circle")) == 3  # evaluations of the shorter run
    pale = [p for p in losses.findall("{*}path") if p.get("stroke-opacity")]
    assert [p.get("stroke") for p in pale] == [viz.VERMILION, viz.BLUE]  # training
    level = next(p for p in scores.findall("{*}path") if p.get("stroke") == viz.GREY)
    ends = [float(point.split()[0]) for point in level.get("d")[1:].split("L")]
    squares = [p for p in scores.findall("{*}path") if p.get("d") == viz.SHAPES["square"]]
    assert len(squares) == 5
    assert ends == [float(s.get("transform")[10:].split()[0]) for s in (squares[0], squares[-1])]
    # a level is of all runs, and those of other questions have another one
    for baseline, is_level in ((4.5, True), (6.0, False)):
        svg = pictures.curves([Logged("vocab", 20), Logged("fitted", 40, baseline)])
        assert ("no prompt" in svg) == ("text prompt" in svg) == is_level


def test_a_point_that_drifted_away_does_not_make_a_map_small():
    points = np.random.default_rng(0).uniform(size=(2000, 2))
    corners = figures.map_frame(points)
    np.testing.assert_array_equal(corners, [points.min(axis=0), points.max(axis=0)])
    points[7], points[8] = (0.5, 40), (-40, 0.5)
    low, high = figures.map_frame(points)
    assert (low > -0.2).all() and (low < 0.01).all() and (high < 1.2).all() and (high > 0.99).all()
