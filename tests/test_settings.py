"""Settings: the fields that the command line, the checks and config.json are made from."""

import dataclasses
import json

import pytest

import priors
from lab import commands, settings
from lab.console import UserError
from lab.settings import Settings, flat, from_config, with_flags


def test_settings_are_values():
    asked = Settings.from_flags({"prior": "exclusion", "deep_layers": 3})
    complete = asked.complete()
    assert asked.prompt.cut is None and complete.prompt.cut is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        complete.prior.seed = 1
    assert complete.complete() == complete


def test_folders_of_runs_may_have_any_name(tmp_path, monkeypatch):
    """An option is what has an option's name; a comma in a folder's name is escaped, unless the
    folder is there."""
    monkeypatch.chdir(tmp_path)
    spec = Settings.from_flags({"prior": r"posterior:lr=1\,2,b,resample=1"}).complete().prior.prior
    name, given, runs = priors.parse(spec)
    assert runs == [str(tmp_path / "lr=1,2"), str(tmp_path / "b")] and given == {"resample": 1}
    for name in ("lr=1,2,resample=0", "b"):
        (tmp_path / name).mkdir()
    asked = Settings.from_flags({"prior": "posterior:b,lr=1,2,resample=0,resample=1"}).complete()
    name, given, runs = priors.parse(asked.prior.prior)
    assert runs == [str(tmp_path / "b"), str(tmp_path / "lr=1,2,resample=0")]
    assert given == {"resample": 1} and asked.complete() == asked


def test_an_early_run_with_options_of_a_prior_that_are_gone_opens():
    for early, now in (("vae:hidden=9,latent=4,steps=20", "vae:latent=4,"), ("vae:steps=9", "vae:"),
                       ("vae:latent=4", "vae:latent=4")):
        prior = from_config({"settings": {**flat(Settings().complete()), "prior": early}}).prior.prior
        assert prior == now and priors.parse(prior)[0] == "vae"


def test_every_flag_is_a_field():
    """What the parser takes for train is what Settings and its options have, with one name each."""
    given = commands.parse(["train", "--prior", "fitted", "--reference", "squad", "text", "--keep",
                            "--no-share", "--lr", "0.5", "--tokens", "3"], "")[1]
    assert given == {"prior": "fitted", "reference": ["squad", "text"], "cut": False,
                     "share": False, "lr": 0.5, "tokens": 3}
    asked = Settings.from_flags(given)
    assert asked.prior.reference == ("squad", "text") and asked.train.lr == 0.5
    assert asked.prompt.cut is False and asked.data.share is False
    names = [f.name for part in settings.PARTS.values() for f in dataclasses.fields(part)]
    assert len(names) == len(set(names)) and set(names) == set(flat(asked))


@pytest.mark.parametrize("flags, message", [
    ({"batch_size": 0}, "--batch-size 0: expected more than 0"),
    ({"batch_size": 2**16 + 1}, "less than 65537"), ({"lr": float("nan")}, "--lr nan"),
    ({"lr": 1e30}, "--lr 1e+30"), ({"steps": -1}, "--steps -1: expected 0 or more"),
    ({"seed": 2**40}, "--seed"), ({"particles": 1001}, "--particles 1001"),
    ({"place": "middle"}, "--place middle: use one of before, after-bos, suffix")])
def test_ranges(flags, message):
    with pytest.raises(UserError) as e:
        Settings.from_flags(flags)
    assert message in str(e.value)


def test_a_config_is_the_settings():
    """As JSON and back, with every setting, whatever was given."""
    for flags in ({}, {"reference": ["squad", "text"], "prior": "interpolation"},
                  {"posterior": "sgld", "prior": "fitted", "prior_weight": 2.0},
                  {"method": "prefix", "place": "after-bos", "prefix_layers": 2},
                  {"imported": "somebody's", "steps": 0}):
        complete = Settings.from_flags(flags).complete()
        config = {"settings": json.loads(json.dumps(flat(complete)))}
        assert from_config(config) == complete


def test_a_config_of_an_early_version():
    """Of settings that it did not know a run has the defaults; what is gone is ignored."""
    stored = flat(Settings().complete())
    for name in ("method", "place", "reparam", "share", "keep_unanswerable", "snapshot_every"):
        del stored[name]
    stored |= {"reference": "vocab", "reference_rows": 20000, "trunk": True, "trunk_memory": 4.0}
    read = from_config({"settings": stored})
    assert read.prior.reference == ("vocab",) and read.prior.reference_rows is None
    assert read.prompt.method == "prompt" and read.prompt.place == "before" and read.data.share
    assert read.train.snapshot_every is None


@pytest.mark.parametrize("name, value", [
    ("steps", "many"), ("steps", True), ("cut", None), ("cut", 1), ("reference", []),
    ("reference", [3]), ("lr", "x"), ("dtype", None), ("data", "a\0b"), ("tokens", -1),
    ("method", "lora"), ("imported", 5)])
def test_a_config_that_no_run_has(name, value):
    stored = {**flat(Settings().complete()), name: value}
    with pytest.raises(UserError) as e:
        from_config({"settings": stored}, "there/config.json")
    assert "there/config.json" in str(e.value) and "\n" not in str(e.value)


def test_another_model_has_another_revision():
    run = Settings.from_flags({"model": "org/name", "revision": "abc"})
    assert with_flags(run, {"dtype": "float16"}).model.revision == "abc"
    assert with_flags(run, {"model": "elsewhere"}).model.revision is None
    assert with_flags(run, {"model": "other/name", "revision": "x"}).model.revision == "x"


def test_names():
    assert settings.prior_name("posterior:/a/b/run,/c/other,resample=1") == \
        "posterior:run,other,resample=1"
    assert settings.spec_name("squad:/a/b/train.json") == "squad:train.json"
    run = Settings.from_flags({"prior": "exclusion:k=2", "deep_layers": 3, "method": "prompt",
                       "posterior": "sgld", "seed": 4})
    assert settings.free_name(run) == "runs/squad-exclusion-k-2-deep3-sgld-seed4"
    run = Settings.from_flags({"frozen_tokens": 2})
    assert settings.free_name(run) == "runs/squad-vocab-frozen2-seed0"
    run = Settings.from_flags({"subspace": 8, "directions": "random"})
    assert settings.free_name(run) == "runs/squad-vocab-subspace8-random-seed0"
    for model in ("there/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B"):  # a folder, one of the hub
        run = Settings.from_flags({"model": model})
        assert settings.free_name(run) == "runs/SmolLM2-1-7B-squad-vocab-seed0"
