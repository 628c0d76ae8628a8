"""The benchmark of what a user waits for."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import waits  # noqa: E402


def test_the_random_model_is_one_that_commands_take(tmp_path, monkeypatch, capsys):
    import promptprior

    monkeypatch.setitem(waits.SHAPE, "vocab_size", 700)
    monkeypatch.setitem(waits.SHAPE, "hidden_size", 64)
    monkeypatch.setitem(waits.SHAPE, "intermediate_size", 64)
    waits.random_model(tmp_path, 1)
    assert promptprior.main(["sample", "--model", str(tmp_path), "--json"]) == 0
    [report] = json.loads(capsys.readouterr().out)
    assert report["rows"] == 698  # but for BOS and EOS


def test_what_is_waited_for(tmp_path):
    """Of a run its beginning and every line of its log, in order; then its end."""
    train = waits.commands(["--model", "tiny"], ["--data", "math"], 2, 6, tmp_path)[0]
    found = list(waits.waits(train, tmp_path / "cache"))
    assert [wait.name for wait in found] == [f"train: {stage}" for stage in (
        "begins", "baseline, step 0", "text, step 0", "eval, step 0", "train, step 1",
        "eval, step 1", "ends")]
    for one, other in zip(found, found[1:]):
        assert 0 < one.clock <= other.clock and 0 < one.processors <= other.processors + 0.02
    assert all(2**26 < wait.held < 2**33 for wait in found)
    with pytest.raises(SystemExit, match="error: "):
        list(waits.waits(waits.Command("plot", ["plot", tmp_path / "none"]), tmp_path / "cache"))


def test_a_long_log_is_one_that_plot_reads(tmp_path, monkeypatch):
    from lab.folder import Run

    monkeypatch.setattr(waits, "STEPS", 50)
    train, *_ = waits.commands(["--model", "tiny"], ["--data", "math"], 2, 6, tmp_path)
    list(waits.waits(train, tmp_path / "cache"))
    waits.prepare(tmp_path)
    steps = [line["step"] for line in Run(tmp_path / "long").metrics() if line["split"] == "train"]
    assert steps == [*range(1, 51)]
    assert all((tmp_path / f"copy{i}/config.json").exists() for i in range(4))
