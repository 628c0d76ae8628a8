"""Runs of every posterior, and the commands that measure: eval, compare, interpolate, sample,
attention."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from scipy.spatial.distance import pdist
from test_statistics import at_most_level

import data
import llama
import priors
import promptprior
from lab import console, locality
from lab.activations import Collection
from lab.attention import measure_attention
from lab.compare import measure_rows
from lab.folder import Run
from lab.inputs import load_model
from lab.populations import Reference
from lab.sample import held_out, judge_prior
from lab.settings import TINY, ModelSettings

FEW = ["--steps", "3", "--eval-every", "3", "--eval-limit", "6", "--batch-size", "4",
       "--max-new", "6"]


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run of every posterior, on two tasks."""
    folder = tmp_path_factory.mktemp("runs")
    for name, arguments in {
            "squad": ["--data", "squad"], "math": ["--data", "math", "--seed", 1],
            "sgld": ["--data", "math", "--posterior", "sgld", "--particles", 3],
            "gaussian": ["--data", "math", "--posterior", "gaussian", "--particles", 2,
                         "--deep-layers", 1, "--reference-rows", 300]}.items():
        assert run("train", "--prior", "fitted", "--out", folder / name, *FEW, *arguments) == 0
    return folder


def test_posteriors_are_written_and_scored(runs, capsys):
    capsys.readouterr()
    particles = load_file(runs / "sgld/prompt.safetensors")
    assert {k: v.shape for k, v in particles.items()} == {
        "layers.0": (20, 192), "layers.0.particles": (3, 20, 192)}
    # chains may be in different modes, between which their mean is no prompt
    torch.testing.assert_close(particles["layers.0"], particles["layers.0.particles"][0])
    gaussian = load_file(runs / "gaussian/prompt.safetensors")
    assert {k: v.shape for k, v in gaussian.items()} == {
        f"layers.{i}{k}": shape for i in (0, 5)
        for k, shape in (("", (20, 192)), (".particles", (2, 20, 192)))}
    start, end = Run(runs / "sgld").start_and_end()
    assert start[0].shape == end[0].shape == (60, 192)  # particles, not their mean
    assert torch.equal(end[0], particles["layers.0.particles"].flatten(0, 1))
    drawn = load_file(runs / "sgld/prompts/000000.safetensors")["layers.0.particles"]
    assert torch.equal(start[0], drawn.flatten(0, 1)) and not torch.equal(drawn[0], drawn[1])
    scores = {}
    for name, one, count in (("sgld", "particle", 3), ("gaussian", "draw", 2)):
        assert run("eval", runs / name, "--json") == 0
        scores[name] = json.loads(capsys.readouterr().out)["scores"]
        assert list(scores[name])[2:] == [f"fitted prior, trained: {x}" for x in (
            *["mean prompt"] * (name == "gaussian"), *(f"{one} {k}" for k in range(1, count + 1)),
            f"ensemble of {count}")]
        for numbers in scores[name].values():
            assert 0 <= numbers["calibration_error"] <= 100
            low, mean, high = (numbers[f"calibrated{end}"] for end in ("_low", "", "_high"))
            assert 0 <= low <= mean + 1e-9 <= high + 2e-9
    # the spread over the prior's, beside the scores of all together
    for name, titles in (("sgld", ["spread"]), ("gaussian", [*console.SPREADS.values()])):
        [together] = [numbers for key, numbers in scores[name].items() if "ensemble" in key]
        assert {title.lower() for title in titles} <= together.keys()
        assert run("eval", runs / name) == 0
        assert capsys.readouterr().out.split("\n")[2].split()[-len(titles):] == titles
    assert 0.7 < scores["sgld"]["fitted prior, trained: ensemble of 3"]["spread"] < 1.3
    # the log of an average is at least the average of logs
    for name, count in (("sgld", 3), ("gaussian", 2)):
        ensemble = scores[name][f"fitted prior, trained: ensemble of {count}"]["loss"]
        members = [numbers["loss"] for key, numbers in scores[name].items()
                   if "particle" in key or "draw" in key]
        assert len(members) == count and ensemble <= np.mean(members) + 1e-6
    # training scored the ensemble of particles
    last = [json.loads(x) for x in (runs / "sgld/metrics.jsonl").read_text().splitlines()][-1]
    assert last["loss"] == pytest.approx(
        scores["sgld"]["fitted prior, trained: ensemble of 3"]["loss"], rel=1e-5)


def test_a_posterior_needs_a_density(tmp_path, capsys):
    for arguments in (["--posterior", "sgld"], ["--posterior", "gaussian", "--prior", "xavier"]):
        assert run("train", *arguments, "--out", tmp_path / "x", *FEW) == 2
        assert "has no density" in capsys.readouterr().err
    assert run("train", "--posterior", "laplace", "--out", tmp_path / "x") == 2
    assert "use one of point, sgld, gaussian" in capsys.readouterr().err
    for kind in ("sgld", "gaussian"):
        assert run("train", "--prior", "fitted", "--posterior", kind, "--prior-weight", 0) == 2
        assert "give --prior-weight above 0" in capsys.readouterr().err
    assert run("train", "--prior", "fitted", "--posterior", "svgd", "--out", tmp_path / "x") == 2
    assert "train by --posterior sgld" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_runs_of_early_posteriors_open(runs, tmp_path, capsys):
    """The particles of SVGD, and of a Gaussian the standard deviation of every number. They are
    scored and compared, and do not go on."""
    for name, early in (("sgld", "svgd"), ("gaussian", "gaussian")):
        opened = Run(tmp_path / early)
        shutil.copytree(runs / name, opened.path)
        config = opened.config()
        config["settings"]["posterior"] = early
        opened.write_json("config.json", config)
        for file in (*opened.path.glob("prompts/*"), opened.path / "prompt.safetensors"):
            rows = load_file(file)
            if early == "gaussian":
                rows = {k: v for k, v in rows.items() if "particles" not in k}
                rows |= {f"{k}.sd": v.abs() / 100 for k, v in rows.items()}
            save_file(rows, file)  # early prompts have no metadata that is checked
        if early == "gaussian":
            tensors = opened.load_checkpoint()[0].tensors
            opened.save_checkpoint(3, {k.replace("log_ratio", "log_sd"): t
                                       for k, t in tensors.items()}, False, opened.settings())
        capsys.readouterr()
        assert run("eval", opened.path, "--json") == 0
        scores = json.loads(capsys.readouterr().out)["scores"]
        assert f"fitted prior, trained: ensemble of {3 if early == 'svgd' else 2}" in scores
        assert run("compare", opened.path, "--json") == 0
        measures = json.loads(capsys.readouterr().out)[0]["measures"]
        assert (0.7 < measures["layer 0 trained"]["particle_spread"] < 1.3) == (early == "svgd")
        assert run("train", "--out", opened.path, "--resume", "--steps", 4) == 2
        assert ("--posterior sgld" if early == "svgd" else "an early version") \
            in capsys.readouterr().err


def test_the_posterior_of_runs_is_a_prior(runs, tmp_path, capsys):
    """Resampled from one run it is that run's prompt; of several prompts a Gaussian."""
    assert run("train", "--prior", f"posterior:{runs / 'squad'},resample=1", "--data", "math",
               "--out", tmp_path / "warm", *FEW) == 0
    torch.testing.assert_close(load_file(tmp_path / "warm/prompts/000000.safetensors"),
                               load_file(runs / "squad/prompt.safetensors"))
    assert run("plot", tmp_path / "warm") == 0
    # one row alone has no density, which is found before training
    assert run("train", *FEW, "--tokens", 1, "--out", tmp_path / "one") == 0
    again = "train", *FEW, "--tokens", 1, "--prior", f"posterior:{tmp_path / 'one'},resample=1"
    assert run(*again, "--out", tmp_path / "more") == 0
    capsys.readouterr()
    assert run("compare", tmp_path / "more") == 2
    assert "more: its reference is a single row" in capsys.readouterr().err
    assert run(*again, "--prior-weight", 1, "--out", tmp_path / "map") == 2
    assert "cannot be fitted on 1" in capsys.readouterr().err and not (tmp_path / "map").exists()
    assert run("sample", "--json", "--prior", f"posterior:{runs / 'squad'},{runs / 'sgld'}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["rows"] == 20 + 3 * 20
    assert run("sample", "--prior", f"posterior:{runs / 'squad'}", "--deep-layers", 1) == 2
    assert "none at 5" in capsys.readouterr().err
    assert run("sample", "--prior", f"posterior:{tmp_path}") == 2
    assert "no run is here" in capsys.readouterr().err


def test_compare_runs(runs, capsys):
    capsys.readouterr()
    assert run("compare", runs / "squad", runs / "gaussian", "--json") == 0
    squad, gaussian = json.loads(capsys.readouterr().out)
    start, end = (load_file(runs / f"squad/{name}.safetensors")["layers.0"].numpy()
                  for name in ("prompts/000000", "prompt"))
    loaded = load_model(ModelSettings().complete())
    model, vocabulary = loaded.model, loaded.vocabulary
    tokens = model.embeddings[vocabulary.ordinary].numpy()

    drawn, trained = (squad["measures"][f"layer 0 {name}"] for name in ("prior draw", "trained"))
    assert trained["moved"] == pytest.approx(np.linalg.norm(end - start, axis=1).mean(), rel=1e-5)
    assert trained["distance"] == pytest.approx(
        np.linalg.norm(end[:, None] - tokens, axis=2).mean(), rel=1e-4)
    assert drawn["distance"] == pytest.approx(
        np.linalg.norm(start[:, None] - tokens, axis=2).mean(), rel=1e-4)

    # the radius, and its place among the tokens' own
    fitted = priors.Fitted.fit(torch.tensor(tokens))
    precision = fitted.basis / fitted.scale.square() @ fitted.basis.T

    def radii(x):
        apart = torch.tensor(x).double() - fitted.mean
        return torch.einsum("ni,ij,nj->n", apart, precision, apart).sqrt().numpy()

    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    own = radii(tokens[order[:2000]])
    assert squad["measures"]["layer 0 reference"]["radius"] == pytest.approx(own.mean(), rel=1e-5)
    for numbers, x in ((drawn, start), (trained, end)):
        assert numbers["radius"] == pytest.approx(radii(x).mean(), rel=1e-5)
        percentiles = [stats.percentileofscore(own, radius) for radius in radii(x)]
        assert numbers["radius_percentile"] == pytest.approx(np.mean(percentiles), abs=0.1)

    # the pairs of a drawn and a trained row
    pairs = squad["measures"]["layer 0 draw to trained"]
    assert pairs["mean_shift"] == pytest.approx(np.linalg.norm((end - start).mean(0)), rel=1e-5)
    assert 0 < pairs["mean_shift_p"] <= 1 and "mmd" not in pairs

    # of a posterior too, mixtures are of one prompt and of what moved as far as that
    assert len(squad["mixtures"]) == 3 and {
        np.shape(mixed["shares"]) for mixed in [*squad["mixtures"].values(),
                                                *gaussian["mixtures"].values()]} == {(20, 8)}

    # what the rows say
    readings = squad["tokens"]["0"]["trained"]
    nearest = np.linalg.norm(tokens[None] - end[:, None], axis=2).argmin(axis=1)
    assert readings["l2"] == [vocabulary.decode([vocabulary.ordinary[i]]) for i in nearest]
    assert len(readings["cosine"]) == 20 and "layer 5 trained" in gaussian["measures"]
    deep = load_file(runs / "gaussian/prompt.safetensors")["layers.5"]
    lens = model.logits(model.model.norm(deep)).argmax(dim=1).tolist()
    assert gaussian["tokens"]["5"]["trained"]["logit lens"] == [
        vocabulary.decode([t]) for t in lens]
    assert run("compare", runs / "squad") == 0
    out = capsys.readouterr().out
    assert "collapse" in out and "no prompt" in out and "layer 0 trained, l2: " in out
    assert run("compare", runs / "sgld") == 0
    assert "the token of each row of particle 1:" in capsys.readouterr().out
    assert run("compare", runs / "squad", "nope.safetensors") == 2
    out, error = capsys.readouterr()
    assert not out and "nope.safetensors: no such file or folder" in error and "collect" in error


def test_compare_collections(tmp_path, monkeypatch, capsys):
    """The cluster claim holds of arithmetic, and fails of one half of SQuAD's articles against the
    other; the steps of texts are those of the collected rows."""
    tests = []  # how many there are, as each is told
    monkeypatch.setattr(locality.statistics, "enough",
                        lambda count, least, two_sided: tests.append(count) or 100)
    monkeypatch.setattr(locality, "locality", functools.partial(locality.locality, walks=50))
    path = tmp_path / "c.safetensors"
    articles = json.loads((TINY / "squad/train.json").read_text())
    for k, name in enumerate(("squad", "again")):
        half = {**articles, "data": articles["data"][k::2]}
        (tmp_path / f"{name}.json").write_text(json.dumps(half))
    assert run("collect", "--data", f"squad=squad:{tmp_path / 'squad.json'}",
               f"again=squad:{tmp_path / 'again.json'}", "math", "--examples", 30, "--layers",
               "0,3", "--out", path) == 0
    capsys.readouterr()
    assert run("compare", path, "--json") == 0
    assert tests == [6] * 6
    apart = json.loads(capsys.readouterr().out)[0]["separation"]
    assert apart["layer 3: squad - math"]["auc"] > 0.95
    for layer in (0, 3):
        same = apart[f"layer {layer}: squad - again"]
        assert same["auc_low"] <= 0.5 <= same["auc_high"]
        assert apart[f"layer {layer}: squad - math"]["mmd_p"] < 0.05 < same["mmd_p"]
        assert apart[f"layer {layer}: squad - math"]["variance_between"] > 2 * same[
            "variance_between"] > 0
    file = Collection(path)
    paths, index = locality.paths_of(file, "squad")
    for p in paths:
        assert (file.field["position"][p].diff() == 1).all()
        assert len(file.field["example"][p].unique()) == 1
        assert torch.isin(p, index).all()
    assert sum(map(len, paths)) <= 2000 and len(file.field["source"][torch.cat(paths)].unique()) > 6
    local = locality.walks(file, 0, "squad")
    steps = torch.cat([file.rows(0, p).float().diff(dim=0).norm(dim=1) for p in paths])
    assert local["repeats"] == (steps == 0).sum()
    steps = steps[steps > 0]
    assert local["step"] == pytest.approx(steps.mean().item(), rel=1e-5)
    assert local["spread"] == pytest.approx(steps.std(correction=0).item(), rel=1e-4)
    assert local["p_uniform_spread"] < 0.05
    assert run("collect", "--data", "squad", "math", "--examples", 20, "--layers", 0, "--out",
               tmp_path / "few.safetensors") == 0
    capsys.readouterr()
    assert run("compare", tmp_path / "few.safetensors") == 0
    out = capsys.readouterr().out
    assert "random walks" in out and "Holm's p" in out


def test_rows_know_their_units(tmp_path):
    """Of SQuAD articles and paragraphs, of arithmetic modules; of one module its questions."""
    path = tmp_path / "c.safetensors"
    module = TINY / "math/train-easy/arithmetic__mul.txt"
    assert run("collect", "--data", "squad", "math", f"one=math:{module}", "--examples", 60,
               "--layers", 0, "--out", path) == 0
    file = Collection(path)
    examples = {"squad": data.read("squad", str(TINY / "squad/train.json")),
                "math": data.read("math", str(TINY / "math/train-easy")),
                "one": data.read("math", str(module))}
    source_numbers = []
    for domain, read in examples.items():
        index = file.chosen(domain)
        number, source, text = (file.field[key][index].tolist()
                                for key in ("example", "source", "text"))
        for key, numbers in (("source", source), ("context", text)):
            names = [getattr(read[i], key) or read[i].question for i in number]
            assert len(set(names)) == len(set(numbers)) == len(set(zip(names, numbers)))
        source_numbers += set(source)
        units = file.units(index)
        assert units.tolist() == (text if domain == "one" else source)
        assert file.units(index, 10**6).tolist() == text
    assert len(set(source_numbers)) == len(source_numbers)  # domains share none


def test_interpolate(runs, tmp_path, capsys):
    """Its ends are the two runs on their own tasks."""
    capsys.readouterr()
    assert run("interpolate", runs / "squad", runs / "math", "--points", 3,
               "--out", tmp_path / "line", "--json") == 0
    curve = json.loads(capsys.readouterr().out)
    assert curve == [json.loads(x) for x in
                     (tmp_path / "line/curve.jsonl").read_text().splitlines()]
    assert [(line["t"], line["data"]) for line in curve] == [
        (t, d) for t in (0, 0.5, 1) for d in ("squad", "math")]
    for name, t in (("squad", 0), ("math", 1)):
        assert run("eval", runs / name, "--json") == 0
        alone = json.loads(capsys.readouterr().out)["scores"]["fitted prior, trained"]
        end = next(x for x in curve if x["t"] == t and x["data"] == name)
        assert end["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert run("interpolate", runs / "squad", runs / "gaussian", "--out", tmp_path / "no") == 2
    assert "no line joins them" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert run("interpolate", runs / "squad", runs / "math", "--points", 1) == 2
    assert run("interpolate", runs / "squad", runs / "math", "--points", 10**9) == 2
    assert run("interpolate", runs / "squad", runs / "math", "--out", tmp_path / "line") == 2
    assert "exists" in capsys.readouterr().err


def test_interpolate_between_models(runs, tmp_path, capsys):
    """A copy of the model is the same one; with other weights no line leads there."""
    for name, factor in (("copy", 1), ("other", 2)):
        folder = tmp_path / name
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("squad", "math", "text"))
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] *= factor
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    few = ["--prior", "fitted", "--data", "math", *FEW[2:], "--steps", 0]
    assert run("train", "--model", tmp_path / "other", "--out", tmp_path / "run", *few) == 0
    capsys.readouterr()
    assert run("interpolate", runs / "math", tmp_path / "run", "--out", tmp_path / "no") == 2
    assert "different models" in capsys.readouterr().err and not (tmp_path / "no").exists()

    config = json.loads((tmp_path / "run/config.json").read_text())
    config["settings"]["model"] = str(tmp_path / "copy")
    config["sha256"]["model"] = json.loads(
        (runs / "math/config.json").read_text())["sha256"]["model"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    path = tmp_path / "run/prompt.safetensors"
    save_file(load_file(path), path)  # of no run, for it was of another
    (tmp_path / "line").mkdir()
    (tmp_path / "line/run.lock").write_text("process 1 on elsewhere")  # as a killed try leaves it
    assert run("interpolate", runs / "math", tmp_path / "run", "--points", 2, "--limit", 2,
               "--out", tmp_path / "line") == 0
    assert {p.name for p in (tmp_path / "line").iterdir()} == {"curve.jsonl", "curve.svg"}


def test_what_cannot_be_measured_is_left_empty(tmp_path, capsys):
    """One row has no spread, the last tokens of sums are all one, BOS rows are left out."""
    few = ["--data", "math", "--steps", 1, *FEW[2:]]
    assert run("train", "--tokens", 1, "--out", tmp_path / "one", *few) == 0
    path = tmp_path / "a.safetensors"
    capsys.readouterr()
    assert run("compare", tmp_path / "one", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)[0]["measures"]["layer 0 trained"]
    assert "mmd" not in numbers and numbers["moved"] > 0
    for arguments in (["--pool", "last"], ["--roles", "bos"], ["--limit", 1]):
        assert run("collect", "--data", "math", "also=math", "--examples", 3, "--layers", "0,3",
                   "--out", path, "--overwrite", *arguments) == 0
        assert run("compare", path, "--json") == 0
    (tmp_path / "one/metrics.jsonl").write_text("")
    assert run("compare", tmp_path / "one") == 2
    assert "no evaluation" in capsys.readouterr().err


def test_nothing_else_is_overwritten(runs, capsys):
    before = (runs / "squad/prompt.safetensors").read_bytes()
    assert run("collect", "--data", "math", "--overwrite", "--out",
               runs / "squad/prompt.safetensors") == 2
    assert "not a collection" in capsys.readouterr().err
    assert (runs / "squad/prompt.safetensors").read_bytes() == before
    assert run("collect", "--overwrite", "--out", runs / "squad") == 2


def test_interpolate_between_data_of_one_name(tmp_path, capsys):
    for name, text in (("a", "1 + 1\n2\n2 + 1\n3\n"), ("b", "7 + 1\n8\n6 + 3\n9\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
        assert run("train", "--data", f"math:{tmp_path / name}/x.txt", "--out",
                   tmp_path / f"run-{name}", *FEW) == 0
    capsys.readouterr()
    assert run("interpolate", tmp_path / "run-a", tmp_path / "run-b", "--points", 2, "--out",
               tmp_path / "line", "--json") == 0
    assert {x["data"] for x in json.loads(capsys.readouterr().out)} == {
        "math:x.txt", "math:x.txt of run-b"}


def test_sample_judges_a_prior(capsys):
    """The reference's own rows are as good as it gets; isotropic draws are told apart; a Gaussian
    fitted on a Gaussian is not."""
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    judged = dict(judge_prior(priors.Isotropic, Reference([x], ""), {"std": 0.02}, 20, 0))
    assert judged["prior's draws"]["variance_ratio"] < 1e-3
    assert judged["prior's draws"]["mmd_p"] < 0.01 < judged["fitted Gaussian's"]["mmd_p"]
    uniform = dict(judge_prior(priors.Xavier, Reference([x], ""), {}, 20, 0))["prior's draws"]
    fit, held = held_out(torch.arange(2000))
    assert len(held) == 400 and sorted([*fit.tolist(), *held.tolist()]) == [*range(2000)]
    held = x[held]  # its bound is that of 20 rows, not of all that are judged
    assert uniform["variance_ratio"] == pytest.approx(
        12 * 2 / (20 + 12) / float(held.var(dim=0).sum()), rel=0.05)
    assert judged["held-out rows"]["knn"] < judged["fitted Gaussian's"]["knn"] * 1.2
    assert judged["reference rows"]["variance_ratio"] == pytest.approx(1, abs=0.15)
    assert run("sample", "--prior", "fitted", "--json") == 0
    out = capsys.readouterr()
    report = json.loads(out.out)[0]["judged"]
    assert set(report) == {"held-out rows", "prior's draws", "reference rows"}
    assert "judged by it" in out.err


def test_an_ordinary_rows_distance_is_to_others():
    """By all pairs of a small reference, in which rows come sorted by length."""
    x = torch.randn(19, 3, generator=torch.Generator().manual_seed(0))
    numbers = dict(measure_rows(x[:4], x[:4], x, priors.Fitted.fit(x)))
    assert numbers["reference"]["distance"] == pytest.approx(pdist(x.numpy()).mean(), rel=1e-5)
    x = torch.arange(1500.0)[:, None].sqrt() * torch.eye(3)[torch.arange(1500) % 3]
    distance = dict(measure_rows(x[:4], x[:4], x, priors.Fitted.fit(x)))["reference"]["distance"]
    assert distance == pytest.approx(pdist(x.numpy()).mean(), rel=0.15)


def test_draws_of_a_posterior_are_copies_of_the_same_rows():
    """Rows of the reference's law, which move in directions of their own, are not told from it
    more often than 5 % allows, nor called moved all one way, however many copies there are. Chains
    are no copies: a shift that a single prompt of 20 rows is too few for is found in eight."""
    def normal(*shape):
        return torch.randn(shape, generator=generator)

    levels = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        reference, drawn = normal(200, 4), (1 - 0.1**2)**0.5 * normal(20, 4)
        start = drawn + 0.1 * normal(8, 20, 4)
        end = drawn + 0.5 * normal(20, 4) + 0.3 * normal(8, 20, 4)
        numbers = dict(measure_rows(start.flatten(0, 1), end.flatten(0, 1), reference,
                                    priors.Fitted.fit(reference), particles=8, copies=True))
        levels.append((numbers["prior draw"]["mmd_p"], numbers["draw to trained"]["mean_shift_p"]))
    for p in zip(*levels):
        at_most_level(p)
        assert 0.3 < np.median(p) < 0.7  # exact, not merely careful

    found = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        reference, chains = normal(200, 4), normal(160, 4) + 0.3
        numbers = dict(measure_rows(chains, chains, reference, priors.Fitted.fit(reference),
                                    particles=8))
        found.append(numbers["trained"]["mmd_p"] <= 0.05)
    assert sum(found) >= 9


def test_rows_of_one_law_are_not_told_apart_where_long_texts_differ_from_short_ones():
    """Six populations of 20 long texts and 200 short ones of another mean: the reference's rows and
    the draws of a prior that knows it all. Were each text to weigh the same, the rows of the long
    ones would count for little among those held out."""
    text = torch.cat([torch.arange(20).repeat_interleave(100),
                      20 + torch.arange(200).repeat_interleave(10)])
    levels, areas = [], []
    for seed in range(6):
        x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(seed))
        x = x + 3 * (text >= 20)[:, None]
        judged = dict(judge_prior(priors.Vocab, Reference([x], ""), {}, 20, seed, [text]))
        for name in ("reference rows", "prior's draws"):
            assert "knn" not in judged[name]  # they are among the rows that it would compare with
            levels.append(judged[name]["mmd_p"])
            areas.append(judged[name]["c2st"])
    assert np.mean(np.array(levels) <= 0.05) <= 0.25
    assert np.mean(areas) == pytest.approx(0.5, abs=0.04)


def test_held_out_rows_are_held_out_texts():
    """About a fifth of the rows, of texts that nothing was fitted on: real rows of other texts are
    no nearer than a Gaussian's draws, where rows of the same texts would be."""
    g = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 40, (2000,), generator=g)
    fit, held = held_out(texts)
    assert not set(texts[fit].tolist()) & set(texts[held].tolist())
    assert 400 <= len(held) < 400 + texts.bincount().max()
    assert sorted([*fit.tolist(), *held.tolist()]) == [*range(2000)]
    two = torch.tensor([0] * 50 + [1] * 50 + [2] * 50)
    assert len(two[held_out(two)[1]].unique()) == 2
    # rows of a text differ by little
    x = torch.randn(40, 12, generator=g)[texts] + 0.1 * torch.randn(2000, 12, generator=g)
    judged = dict(judge_prior(priors.Fitted, Reference([x], ""), {}, 20, 0, [texts]))
    assert judged["held-out rows"]["knn"] > 1
    judged = dict(judge_prior(priors.Fitted, Reference([x], ""), {}, 20, 0))
    assert judged["held-out rows"]["knn"] < 0.5


@pytest.mark.parametrize("kind", [priors.Fitted, priors.Sparse, priors.VAE])
def test_a_prior_is_judged_alike_where_the_gaussian_of_the_whole_is_known(kind):
    parts = [torch.randn(N, 12, generator=torch.Generator().manual_seed(N)) + 3 for N in (700, 400)]
    first, second = Reference(parts, ""), Reference(parts, "")
    assert second.gaussian  # works out the spectrum of all rows
    pairs = zip(judge_prior(kind, first, {}, 20, 0), judge_prior(kind, second, {}, 20, 0))
    for (name, numbers), (_, others) in pairs:
        assert others == pytest.approx(numbers, rel=1e-6, abs=1e-9), name


def share(x):
    """Of a matrix's sum of squares, the share that lies in one direction."""
    squares = torch.linalg.svdvals(x).square()
    return squares[0] / squares.sum()


@pytest.mark.parametrize("cut, layers", [(True, (1, 3)), (False, (0,))])
def test_attention_of_a_prompt_is_what_theory_says(hf, cut, layers):
    """At the first layer with columns the content's own shares stay as they were; of one row a
    head's bias has one direction; the weights are those of transformers."""
    from transformers import AutoModelForCausalLM

    _, folder = hf()
    model, g = llama.load(folder, torch.float32), torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 97, (t,), generator=g).tolist() for t in (9, 14)]
    past = model.prompt_past({i: torch.randn(3, 48, generator=g) for i in layers}, cut)
    rows = dict(measure_attention(model, past, texts))
    assert [*rows] == [f"layer {i}" for i in (layers if cut else range(4))]
    first, *later = rows.values()
    assert first["content"] < 1e-5 and first["shift"] < 1e-6 and 0 < first["mass"] < 1
    assert all(n["content"] > 1e-3 for n in later)
    assert all(0 < n["one"] <= 1 and 0 < n["bias"] for n in rows.values())
    one = dict(measure_attention(model, model.prompt_past(
        {i: torch.randn(1, 48, generator=g) for i in layers}, cut), texts))
    assert [*one.values()][0]["one_head"] == pytest.approx(1, abs=1e-5)
    # a prompt of tokens, kept, is a text: transformers tells what it takes of attention, and adds
    ids = [5, 6, 7]
    past = model.extend(torch.tensor([ids]))
    past = llama.Past(past.keys, past.values, past.real[:, :0], past.position)
    rows = measure_attention(model, past, texts)
    oracle = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        read = [oracle(torch.tensor([ids + text]), output_attentions=True, use_cache=True)
                for text in texts]
    for i, (_, numbers) in enumerate(rows):
        mass, bias, added, heads = [], [], [], []
        for out in read:
            w = out.attentions[i][0, :, 3:]  # (6, T, 3 + T), of 2 heads of values
            v = out.past_key_values.layers[i].values[0].repeat_interleave(3, 0)
            part = w[..., :3] @ v[:, :3]
            add, whole = (oracle.model.layers[i].self_attn.o_proj(x.transpose(0, 1).flatten(1))
                          for x in (part, w @ v))
            mass.append(w[..., :3].sum(-1).mean())
            bias.append(add.norm(dim=1).mean() / whole.norm(dim=1).mean())
            added.append(add)
            heads.append(part)
        expected = {"mass": torch.stack(mass).mean(), "bias": torch.stack(bias).mean(),
                    "one": share(torch.cat(added)),
                    "one_head": torch.stack([share(h) for h in torch.cat(heads, 1)]).mean()}
        assert {k: numbers[k] for k in expected} == pytest.approx(
            {k: x.item() for k, x in expected.items()}, rel=1e-4)


def test_attention_command(runs, capsys):
    assert run("attention", runs / "squad", "--limit", 3, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["attention"]
    assert [*rows] == [f"layer {i}" for i in range(6)] and rows["layer 0"]["content"] < 1e-5
    assert (runs / "squad/figures/attention.svg").exists()
    assert run("attention", runs / "squad", "--limit", 0) == 2
