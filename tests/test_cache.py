"""What is kept for later commands: the same bit for bit with the folder and without."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import priors
import viz
from forked import Forked
from lab import cache, geometry
from lab.populations import Reference

ROWS = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 25)
KEPT = (priors.Spectrum.of, viz.pca, geometry.spacing)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WORTH", 0)
    monkeypatch.setenv("PROMPTPRIOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def given(function):
    return ROWS if function == priors.Spectrum.of else ROWS.numpy()


def same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)
        for x, y in zip(a, b))


@pytest.mark.parametrize("function", KEPT)
def test_kept_results_are_those_of_the_function_bit_for_bit(folder, monkeypatch, function):
    first = cache.kept(function, given(function))
    [file] = folder.iterdir()
    calls = []
    monkeypatch.setattr(cache, "_results", lambda *a: calls.append(a))
    again = cache.kept(function, given(function))
    assert same(first, again) and not calls
    assert oct(folder.stat().st_mode)[-3:] == "700"  # of texts that others may not read

    monkeypatch.undo()
    monkeypatch.setenv("PROMPTPRIOR_CACHE", "off")
    assert same(first, cache.kept(function, given(function)))
    returned = function(given(function))
    for t, value in zip(first, returned if isinstance(returned, tuple) else (returned,)):
        np.testing.assert_array_equal(t.numpy(), np.asarray(value))


def test_what_a_result_depends_on_tells_it_apart(folder, monkeypatch):
    rows = ROWS.numpy()
    cache.kept(viz.pca, rows)
    other = rows.copy()
    other[7, 3] = np.nextafter(other[7, 3], 9)
    for arguments in ((other,), (rows, 3), (rows[:, ::-1],), (rows.T,)):
        cache.kept(viz.pca, *arguments)
    assert len(list(folder.iterdir())) == 5
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # sums round differently
    cache.kept(viz.pca, rows)
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize("limit", ["MOST", "BYTES"])
def test_the_folder_does_not_grow_for_ever(folder, monkeypatch, limit):
    """What nobody asked for longest goes first."""
    times = iter(range(1, 100))

    def ask(k):
        cache.kept(geometry.spacing, ROWS.numpy()[:100 + k])
        newest = max(folder.glob("spacing-*"), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (next(times),) * 2)
        return newest

    folder.mkdir()
    (folder / "tokenizer-mark").touch()
    (folder / "model.safetensors").write_bytes(bytes(10**5))  # a file that is not ours
    (folder / "gone.safetensors").symlink_to("nowhere")
    first, second, third = map(ask, range(3))
    size = first.stat().st_size
    monkeypatch.setattr(cache, limit, {"MOST": 3, "BYTES": 3.5 * size}[limit])
    assert ask(0) == first
    fourth = ask(3)
    ours = f"spacing-{'?' * 64}.safetensors"
    left = {*folder.glob(ours)}
    assert left == {first, third, fourth} and (folder / "tokenizer-mark").exists()
    assert (folder / "model.safetensors").exists() and (folder / "gone.safetensors").is_symlink()

    monkeypatch.setattr(cache, "BYTES", 2.0)  # too large to be kept at all
    cache.kept(geometry.spacing, ROWS.numpy()[:200])
    assert {*folder.glob(ours)} == left


def test_what_no_other_command_asks_for_or_takes_no_time_is_not_kept(folder, monkeypatch):
    cache.kept(viz.pca, ROWS.numpy(), keep=False)
    assert Reference([ROWS], "squad").plane and not folder.exists()
    monkeypatch.setattr(cache, "WORTH", 300 * 24**2 + 1)
    assert Reference([ROWS], "vocabulary", keep=True).plane and not folder.exists()
    monkeypatch.setattr(cache, "WORTH", 300 * 24**2)
    assert Reference([ROWS], "vocabulary", keep=True).plane and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "folder", "pipe", "link"])
def test_a_damaged_or_foreign_file_is_as_good_as_none(folder, tmp_path, monkeypatch, damage):
    rows = ROWS.numpy()
    first = cache.kept(viz.pca, rows)
    [file] = folder.iterdir()
    content = file.read_bytes()
    cache.kept(viz.pca, rows[:200])
    [other] = set(folder.iterdir()) - {file}
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "pipe":
        os.mkfifo(file)
    elif damage == "link":
        (tmp_path / "theirs").write_bytes(b"theirs")
        file.symlink_to(tmp_path / "theirs")
    else:
        file.write_bytes({"cut": content[:-1], "flipped": content[:-9] + b"\xff" + content[-8:],
                          "empty": b"", "foreign": other.read_bytes()}[damage])
    assert same(first, cache.kept(viz.pca, rows))
    if damage in ("folder", "pipe", "link"):  # what is no file of ours is left alone
        assert not file.is_file() or (tmp_path / "theirs").read_bytes() == b"theirs"
    else:  # it was written anew
        monkeypatch.delattr(cache, "_results")
        assert same(first, cache.kept(viz.pca, rows))


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WORTH", 0)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "/proc/nowhere", tmp_path / ("x" * 5000)):
        monkeypatch.setenv("PROMPTPRIOR_CACHE", str(place))
        alone = cache.kept(viz.pca, ROWS.numpy(), keep=False)
        assert same(cache.kept(viz.pca, ROWS.numpy()), alone)

    monkeypatch.setenv("PROMPTPRIOR_CACHE", str(tmp_path / "full"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_file", full)
    assert len(cache.kept(viz.pca, ROWS.numpy())) == 3


def test_what_is_refused_is_refused_before_anything_is_worked_out(folder):
    with pytest.raises(priors.PriorError, match="dim 25"):
        Reference([ROWS], "vocabulary", keep=True).fit(priors.Sparse, {"dim": 25})
    assert not folder.exists()


def test_where_the_folder_is(monkeypatch):
    monkeypatch.delenv("PROMPTPRIOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/promptprior")
    monkeypatch.setenv("PROMPTPRIOR_CACHE", "/y/z")
    assert cache.cache_folder() == Path("/y/z")
    monkeypatch.setenv("PROMPTPRIOR_CACHE", "off")
    assert cache.cache_folder() is None


RACE = """  # of several processes
import os, sys
sys.path.insert(0, os.getcwd())
import torch, viz
from lab import cache
cache.WORTH = 0
rows = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)).numpy()
for i in range(20):
    print(cache.kept(viz.pca, rows + i)[1].numpy().tobytes().hex())
"""


def test_processes_share_the_folder(folder, tmp_path):
    (tmp_path / "race.py").write_text(RACE)
    processes = [Forked(tmp_path / "race.py") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    said = {process.out for process in processes}
    assert len(said) == 1 and said.pop().count("\n") == 20
    assert len(list(folder.iterdir())) == 20  # and nothing unfinished


def test_commands_say_the_same_with_the_folder_and_without(folder, tmp_path, monkeypatch, capsys):
    import promptprior

    run = tmp_path / "run"
    shared = ["--steps", "0", "--eval-limit", "1", "--max-new", "1"]
    outputs, pictures = [], []
    for place in (str(folder), str(folder), "off"):
        monkeypatch.setenv("PROMPTPRIOR_CACHE", place)
        assert promptprior.main(["train", *shared, "--prior", "fitted", "--overwrite", "--out",
                                 str(run)]) == 0
        assert promptprior.main(["plot", str(run)]) == 0
        pictures.append([(run / name).read_bytes() for name in
                         ("figures/layer-00.svg", "prompt.safetensors", "report.html")])
        capsys.readouterr()
        for command in (["compare", str(run)], ["sample", "--prior", "exclusion"]):
            assert promptprior.main([*command, "--json"]) == 0
            outputs.append(json.loads(capsys.readouterr().out))
        kept = sorted(file.name.partition("-")[0] for file in folder.iterdir())
        # The Gaussian and plane of all tokens, and that of those that a prior is judged without.
        assert kept == ["Spectrum.of", "Spectrum.of_rest", "map_of", "neighbours", "spacing"]
    assert pictures[0] == pictures[1] == pictures[2]
    assert outputs[:2] == outputs[2:4] == outputs[4:]


def test_the_inputs_of_deep_layers_are_kept(folder, tmp_path, monkeypatch):
    import promptprior
    from lab import populations

    run = tmp_path / "run"
    train = ["train", "--dtype", "bfloat16", "--steps", "0", "--eval-limit", "1", "--max-new", "1",
             "--deep-layers", "2", "--reference-rows", "300", "--overwrite", "--out", str(run)]
    monkeypatch.setenv("PROMPTPRIOR_CACHE", "off")
    assert promptprior.main([*train, "--prior", "fitted"]) == 0
    prompt = (run / "prompt.safetensors").read_bytes()
    monkeypatch.setenv("PROMPTPRIOR_CACHE", str(folder))
    assert promptprior.main([*train, "--prior", "fitted"]) == 0
    assert (run / "prompt.safetensors").read_bytes() == prompt

    # Later commands have them; other seeds draw other questions.
    monkeypatch.delattr(populations, "inputs_of")
    assert promptprior.main([*train, "--prior", "fitted"]) == 0
    assert (run / "prompt.safetensors").read_bytes() == prompt
    assert promptprior.main(["plot", str(run)]) == 0
    with pytest.raises(NameError, match="inputs_of"):
        promptprior.main([*train, "--prior", "fitted", "--seed", "1"])


def test_what_inputs_depend_on_tells_them_apart(folder, tmp_path):
    """Other weights, types, tokens, positions or layers are other inputs."""
    import small
    from lab import populations
    from lab.inputs import load_model
    from lab.settings import ModelSettings

    other = small.make(tmp_path / "other", num_hidden_layers=3)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "model.norm.weight": 2 * weights["model.norm.weight"]},
              other / "model.safetensors", {"format": "pt"})
    tokens, places, layers = [[5, 6, 7], [8, 9, 4]], [[1, 2], [1]], [0, 2]
    cases = [(small.MODEL, "float32", tokens, places, layers),
             (other, "float32", tokens, places, layers),
             (small.MODEL, "bfloat16", tokens, places, layers),
             (small.MODEL, "float32", [[5, 6, 7], [8, 3, 4]], places, layers),
             (small.MODEL, "float32", tokens, [[1, 2], [2]], layers),
             (small.MODEL, "float32", tokens, places, [0, 1])]
    for count, (model, dtype, *given) in enumerate(cases, 1):
        loaded = load_model(ModelSettings(model=str(model), dtype=dtype).complete())
        for _ in range(2):
            kept = populations.kept_inputs(loaded, *given)
            made = populations.inputs_of(loaded.model, *given)
            assert [*kept] == [*made] and all(torch.equal(kept[i], made[i]) for i in made)
        assert len([*folder.glob("inputs-*")]) == count


def test_processes_that_share_a_model_run_it_together(folder, monkeypatch):
    """One may have the file and another not, who would wait for it for ever."""
    from lab import populations
    from lab.inputs import load_model
    from lab.settings import ModelSettings

    loaded = load_model(ModelSettings().complete())
    rows = [[5, 6, 7], [8, 9]], [[1, 2], [1]], [0, 2]
    alone = populations.kept_inputs(loaded, *rows)
    assert len([*folder.glob("inputs-*")]) == 1
    monkeypatch.setattr(populations, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(populations, "kept_under", None)
    together = populations.kept_inputs(loaded, *rows)
    assert [*alone] == [*together] and all(torch.equal(alone[i], together[i]) for i in alone)


def test_the_maps_of_figures_are_kept(folder, monkeypatch):
    from lab import figures

    x = ROWS.numpy()
    monkeypatch.setenv("PROMPTPRIOR_CACHE", "off")
    alone = figures.tsne_map(x, 0)
    monkeypatch.setenv("PROMPTPRIOR_CACHE", str(folder))
    first = figures.tsne_map(x, 0)
    monkeypatch.delattr(viz, "tsne")
    again = figures.tsne_map(x, 0)
    for embedding in (first, again):
        assert np.array_equal(embedding.points, alone.points)
        assert embedding[1:] == alone[1:] and embedding.points.dtype == np.float64
    with pytest.raises(AttributeError, match="tsne"):
        figures.tsne_map(x, 1)
