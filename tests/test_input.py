"""Input that cannot hurt: damaged and hostile files, names and texts; fuzz.py tries others."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import calls
import damage
import data
import fuzz
import llama
import promptprior
from forked import Forked
from lab import activations, console, page, trial
from lab import folder as runs
from lab.console import UserError
from lab.inputs import load_model
from lab.settings import ModelSettings

HERE = Path(promptprior.__file__).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small real inputs of every kind. They are not changed."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.redirect_stdout(io.StringIO()):
        fuzz.world(folder)
    return folder


@pytest.fixture
def own(world, tmp_path):
    """own("model") -> a copy of that part of the world."""
    def copy(name):
        path = tmp_path / Path(name).name
        (shutil.copytree if (world / name).is_dir() else shutil.copy)(world / name, path)
        return path

    return copy


@pytest.fixture(autouse=True)
def no_hang():
    def late(*_):
        raise AssertionError("no end after 30 s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)


@pytest.fixture
def refused(capsys):
    """refused(*arguments) -> the one line of an error, the last on stderr; exit 2 or 1."""
    def call(*arguments):
        capsys.readouterr()
        try:
            status = promptprior.main([str(a) for a in arguments])
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        assert status and not fuzz.wrong([arguments[0]], status, out, err), err
        return err.splitlines()[-1]

    return call


def generate(world, model="model", run="runs/point"):
    return ("generate", world / run, "Who?", "--model", world / model, "--max-new", 2)


# --------------------------------------------------------------------------------------------------
# nothing is run that was only to be read


def test_no_pickle_in_the_source():
    forbidden = re.compile(r"\b(?:(?:import|from) (?:pickle|marshal|shelve|dill|joblib|yaml)\b"
                           r"|(?:pickle|marshal)\.)|torch\.load\("
                           r"|np\.load\((?!.*allow_pickle=False)"
                           r"|(?<![\w.])(eval|exec|__import__)\(|os\.system|shell=True"
                           r"|weights_only|allow_pickle=(?!False)|np\.fromfile|frombuffer")
    sources = sorted([*HERE.glob("*.py"), *HERE.glob("lab/*.py")])
    assert len(sources) > 10
    for path in sources:
        for i, line in enumerate(path.read_text().split("\n"), 1):
            assert not forbidden.search(line), f"{path.name} line {i}: {line.strip()}"


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_is_not_unpickled(world, own, tmp_path, refused):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Evil(marker))
    pickle.loads(evil).close()
    assert marker.exists()  # it would hurt
    marker.unlink()
    zipped = io.BytesIO()
    torch.save(Evil(marker), zipped)
    for content in (evil, zipped.getvalue()):
        for part, file in {"model": "model.safetensors", "runs/point": "prompt.safetensors",
                           "runs/sgld": "config.json"}.items():
            path = tmp_path / Path(part).name
            shutil.rmtree(path, ignore_errors=True)
            own(part)
            (path / file).write_bytes(content)
            if part == "model":
                refused(*generate(tmp_path, run=world / "runs/point"))
            else:
                refused(*generate(world, run=path))
        path = tmp_path / "acts.safetensors"
        path.write_bytes(content)
        assert "not a collection" in refused("compare", path)
    assert not marker.exists()


# --------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("name", [
    "../model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "..", ".", "",
    "C:x", "x\0", "\ud800", "x\n", "x" * 300, " ", "-x", "\u0661.safetensors", None, 5, ["x"], {}])
def test_shard_names(own, name):
    folder = own("sharded")
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**places, "model.norm.weight": name}}))
    with pytest.raises(llama.ModelError, match="not a file name in this folder"):
        llama.load(folder)


def test_links_as_in_the_hubs_cache(world, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    for i, path in enumerate((world / "sharded").iterdir()):
        shutil.copy(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    linked, plain = (llama.load(f).state_dict() for f in (snapshot, world / "model"))
    assert linked.keys() == plain.keys() and all(torch.equal(linked[k], plain[k]) for k in plain)


CONFIG = {
    "hidden_size": [0, -16, 10**30, 2**40, 16.0, "16", True, None, [16], {}],
    "intermediate_size": [0, 2**60, None], "num_hidden_layers": [0, 10**9, 10**400, 2.0, "x", None],
    "num_attention_heads": [0, 3.5, 2**31, None], "num_key_value_heads": [0, -1, 2**31, 3, "1"],
    "head_dim": [0, -8, 7, 2**40, "8"], "vocab_size": [0, -1, 2**60, 1.5],
    "max_position_embeddings": [0, -5, "256", 2**70], "rms_norm_eps": [0, -1, "1e-5", 1e999, 5],
    "rope_theta": [0, -1, float("nan"), float("inf"), "x", 1e300, []],
    "rope_scaling": [5, "llama3", [1], {"rope_type": "linear"}, {"rope_type": "yarn"},
                     {"rope_type": "linear", "factor": 0},
                     {"rope_type": "linear", "factor": 1e-300},
                     {"rope_type": "linear", "factor": float("nan")}, {"rope_type": {}},
                     {"rope_type": "linear", "factor": True}],
    "tie_word_embeddings": ["false", 0, 1], "attention_bias": [1, "x"], "mlp_bias": [[]],
    "bos_token_id": [-1, 512, "0", [0], 1.0, True],
    "eos_token_id": ["1", [[1]], {"a": 1}, 1.5, [None]],
    "model_type": ["gpt2", None, 5, ["llama"]], "hidden_act": ["gelu", 5],
}


@pytest.mark.parametrize("key", CONFIG)
def test_config(own, key):
    """Refused before anything of that size is made."""
    folder = own("model")
    path = folder / "config.json"
    right = json.loads(path.read_text())
    (folder / "generation_config.json").unlink()  # its ends would count
    for value in CONFIG[key]:
        path.write_text(json.dumps({**right, key: value}))
        began = time.monotonic()
        with pytest.raises(llama.ModelError) as e:
            llama.load(folder)
        assert str(path) in str(e.value) and len(str(e.value)) < 600, value
        assert time.monotonic() - began < 2, value
    path.write_text(json.dumps({k: v for k, v in right.items() if k != "head_dim"}))
    llama.load(folder)


def test_a_config_of_another_size_than_the_weights(own):
    folder = own("model")
    path = folder / "config.json"
    c = json.loads(path.read_text())
    path.write_text(json.dumps({**c, "vocab_size": 2**24, "hidden_size": 2**16, "head_dim": 2}))
    with pytest.raises(llama.ModelError, match="config.json asks for"):
        llama.load(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(own, number):
    folder = own("model")
    weights = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"][3] = number
    save_file(weights, folder / "model.safetensors")
    for dtype in (None, "float32", "bfloat16"):
        with pytest.raises(llama.ModelError, match="'model.norm.weight' holds numbers that are not "
                           "finite: fetch it again.*choose an earlier checkpoint"):
            llama.load(folder, dtype)
    weights["model.norm.weight"][3] = 1e38  # is, until it is made half
    save_file(weights, folder / "model.safetensors")
    llama.load(folder)
    with pytest.raises(llama.ModelError, match="in torch.float16: use --dtype bfloat16"):
        llama.load(folder, "float16")
    llama.load(folder, "bfloat16")


@pytest.mark.parametrize("part, name", [("model", "model.safetensors"),
                                        ("runs/sgld", "prompt.safetensors"),
                                        (".", "acts.safetensors")])
def test_mutated_safetensors(world, own, tmp_path, part, name):
    """300 each: an error of ours, in one line, or tensors of the right names, shapes and types."""
    folder = own(part) if part != "." else own("acts.safetensors").parent
    path, r, outcomes = folder / name, random.Random(0), [0, 0]
    content = path.read_bytes()
    for _ in range(300):
        how = r.choice([damage.damaged_safetensors, damage.damaged_bytes, damage.other_content])
        path.write_bytes(how(r, content))
        try:
            if part == "model":
                llama.load(folder)
            elif part == ".":
                file = activations.Collection(path)
                assert all(torch.isfinite(file.rows(i)).all() for i in file.layers)
            else:
                prompts = runs.Run(folder).prompts()
                assert {tuple(x.shape) for p in prompts for x in p.layers.values()} == {(3, 16)}
        except (llama.ModelError, UserError) as e:
            assert "\n" not in str(e) and name in str(e)
            outcomes[0] += 1
        else:
            outcomes[1] += 1
    assert outcomes[0] > 100 and outcomes[1] > 0  # both happen


@pytest.mark.parametrize("change", [
    {"post_processor": {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<gone>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {}}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "gone"}},
    {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}, {"model": None},
    {"added_tokens": 5}, {"decoder": {"type": "x"}}])
def test_tokenizers(own, capfd, change):
    """Of some the library panics: that is one line of ours, too."""
    folder = own("model")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(data.DataError, match="tokenizer.json"):
        load_model(ModelSettings(model=str(folder), device="cpu").complete())
    assert not "".join(capfd.readouterr())


def replaced(text, by):
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def test_a_trial_that_tells_nothing_is_made_again(own, tmp_path, monkeypatch):
    path = own("model") / "tokenizer.json"
    monkeypatch.setenv("PROMPTPRIOR_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as m:
        m.setattr(trial, "PROGRAM", "raise SystemExit(1)")
        trial.try_tokenizer(path)
    assert not (tmp_path / "cache").exists()
    trial.try_tokenizer(path)
    assert len(list((tmp_path / "cache").iterdir())) == 1

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "PROGRAM", "raise SystemExit(3)")
    for place in ("off", "x" * 5000):  # it is tried each time, and nothing is kept
        monkeypatch.setenv("PROMPTPRIOR_CACHE", place)
        with pytest.raises(UserError, match="many times more of a text"):
            trial.try_tokenizer(path)
    assert not Path("off").exists()


@pytest.mark.parametrize("change, message", [
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA/////w=="}}, "SIGABRT"),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 30000}}, "many times more of a text"),
    ({"decoder": replaced("a", "a" * 10**5)}, "many times more of a text"),
    ({"normalizer": {"type": "Sequence", "normalizers": [replaced("a", "aa")] * 60}},
     "busy for more than 2 seconds|SIGABRT")])
def test_a_tokenizer_that_breaks_its_library_is_tried_in_a_child(own, refused, monkeypatch, change,
                                                                 message):
    """Once: a file that has passed is known."""
    folder = own("model")
    path = folder / "tokenizer.json"
    whole = path.read_text()
    sample = ["sample", "--model", folder, "--tokens", "1", "--out", folder.parent / "x"]
    if "busy" in message:
        monkeypatch.setattr(trial, "SECONDS", 2)
    path.write_text(json.dumps({**json.loads(whole), **change}))
    assert re.search(message, refused(*sample))
    path.write_text(whole)
    assert promptprior.main([*map(str, sample)]) == 0
    monkeypatch.setattr(trial.subprocess, "run", None)
    trial.try_tokenizer(path)


# --------------------------------------------------------------------------------------------------
# text, JSON


DEEP = "[" * 10**5
JSON = {  # content -> what the one line says
    "empty": ("", "Expecting value"), "deep": (DEEP, "deep"),
    "deep objects": ('{"a":' * 10**5, "deep"),
    "deep inside": ('{"data": %s%s}' % (DEEP, "]" * 10**5), "deep"),
    "cut": ('{"data": [', "Expecting"), "UTF-16": ("{}".encode("utf-16"), "UTF-8"),
    "UTF-16 without its mark": ("{}".encode("utf-16-le"), "NUL"),
    "Latin-1": (b'{"a": "\xfc"}', "0xfc"), "NUL": (b'{"a": "\0"}', "NUL"),
    "surrogate": ('{"a": "\\ud83d"}', "surrogate"),
    "surrogate in UTF-8": (b'"\xed\xa0\xbd"', "UTF-8"),
    "surrogate key": ('{"\\uDE00": 1}', "surrogate"),
    "digits": ('{"a": %s}' % ("9" * 5000), "4300"),
    "two": ("{} {}", "Extra data"),
    "control": (b'{"a": "\x1b[2J"}', "Invalid control character")}


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path, name):
    content, cause = JSON[name]
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    readers = {"data": lambda: data.read_json(path), "run": lambda: runs.read_config(path),
               "llama": lambda: llama.read_config(path),
               **{kind: lambda kind=kind: data.read(kind, str(path))
                  for kind, reader in data.READERS.items() if ".json" in reader.suffixes}}
    for reader, call in readers.items():
        with pytest.raises(ValueError) as e:
            call()
        text = str(e.value)
        assert promptprior.exit_status(e.value) == 2 and "\n" not in text
        assert str(path) in text and len(text) < 800
        # of data, a number of any length is the text of an answer
        if reader in ("data", "run") or name not in ("empty", "two", "digits"):
            assert cause in text or reader in ("llama", "text"), (reader, text)


@pytest.mark.parametrize("name", ["squad.json", "flat.json", "flat.jsonl", "columns.json",
                                  "hub.json", "rows.jsonl", "named.json", "pandas.json",
                                  "table.csv", "excel.CSV", "sums.csv",
                                  "sums.txt", "export.json", "hendrycks.json", "c4.json",
                                  "prose.txt"])
def test_other_spellings_are_read_alike(world, tmp_path, name):
    kind = {"sums.txt": "math", "sums.csv": "math", "export.json": "math",
            "hendrycks.json": "hendrycks",
            "c4.json": "text", "prose.txt": "text"}.get(name, "squad")
    content, path = (world / name).read_bytes(), tmp_path / name
    bare = lambda found: [e._replace(id="", source="", context=e.context.strip())
                          for e in found]
    expected = bare(data.read(kind, str(world / name)))
    for other in (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"),
                  b"\xef\xbb\xbf" + content.rstrip(b"\n"), content.rstrip(b"\n") + b"\n"):
        path.write_bytes(other)
        assert bare(data.read(kind, str(path))) == expected
    path.write_bytes(content)


def test_what_json_may_say(tmp_path):
    """NUL, escapes and pairs are characters; of two keys the last counts, as always in Python."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\u0000b\\u001b[31m \\ud83d\\ude00", "text": "last"}\n'
                    '{"text": "a\\u0000b\\u001b[31m \\ud83d\\ude00"}\n')
    assert [e.context for e in data.read("text", str(path))] == [
        "last", "a\0b\x1b[31m \U0001f600"]


def test_only_one_literal_is_unquoted(tmp_path):
    path = tmp_path / "x.json"
    hostile = ["b'' + " + "-" * 10**5 + "1 + b''", "b'" + "(" * 10**5 + "'", "b'a' 'b'", "b'\\'",
               "b'\\xff'", "b'" + "\\\\" * 10**5 + "'"]
    for text in hostile:
        path.write_text(json.dumps({"question": text, "answer": "1"}))
        data.read("math", str(path))
    assert data._unbyte("b'1\\n'") == "1" and data._unbyte('b"it\'s"') == "it's" \
        and data._unbyte("b'a' + b'b'") == "b'a' + b'b'" and data._unbyte("b'\\\\'") == "\\"


# --------------------------------------------------------------------------------------------------
# sizes


def bomb(path, piece, times):
    """A gzip file of `piece` many times over, made without holding it."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    with open(path, "wb") as f:
        for _ in range(times):
            f.write(pack.compress(piece))
        f.write(pack.flush())


@pytest.mark.parametrize("name, piece, message", [
    ("x.json.gz", b" " * 2**20, "longer than 65536"), ("x.txt.gz", b"x" * 2**20, "longer than"),
    ("x.txt.gz", b"word\n" * 2**17, "paragraph of more than 65536"),
    ("x.txt.gz", b"\n" * 2**20, "bytes have become"),
    ("x.json.gz", b'{"text": ""}\n' * 2**16, "bytes have become")])
def test_gzip_bombs(tmp_path, monkeypatch, name, piece, message):
    monkeypatch.setattr(data, "LONGEST", 2**16)
    monkeypatch.setattr(data, "EXPANDED", 5)
    bomb(tmp_path / name, piece, 16)
    assert (tmp_path / name).stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match=message):
            for _ in data.stream("text", str(tmp_path / name)):
                pass
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_lines_of_any_length(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST", 1000)
    for name, text in {"x.jsonl": '{"text": "%s"}', "x.txt": "%s"}.items():
        path = tmp_path / name
        path.write_text("ok\n\n" * (name == "x.txt") + text % ("y" * 980))
        assert len(data.read("text", str(path))[-1].context) == 980
        path.write_text(text % ("y" * 1100) + "\n")
        with pytest.raises(data.DataError, match="line 1: longer than 1000"):
            data.read("text", str(path))
    path = tmp_path / "squad.json"
    path.write_text(json.dumps([{"context": "c" * 1001, "question": "q",
                                 "answers": {"text": ["a"]}}]))
    with pytest.raises(data.DataError, match="'context' has 1001 characters"):
        data.read("squad", str(path))


def test_no_text_is_made_tokens_in_full(world, monkeypatch):
    vocabulary, lengths = data.Vocabulary(world / "model", (1,)), []
    real = vocabulary.tokenizer
    vocabulary.tokenizer = SimpleNamespace(encode=lambda text, **options: (
        lengths.append(len(text)), real.encode(text, **options))[1])
    monkeypatch.setattr(data, "LONGEST_TOKENISED", 100)
    for kind in ("text", "squad"):
        long, short = (data.Example("0", kind, "word " * n, "q" * (kind == "squad"), ("a",))
                       for n in (10**5, 20))
        assert data.encode(long, vocabulary, 40).ids == data.encode(short, vocabulary, 40).ids
    assert data.encode(data.Example("0", "squad", "c", "q" * 10**5, ("a",)), vocabulary, 40) is None
    assert 0 < max(lengths) < 200


@pytest.mark.parametrize("kind", data.READERS)
def test_files_of_a_terabyte(tmp_path, kind):
    path = tmp_path / "x.json"
    with open(path, "wb") as f:
        f.truncate(2**40)  # sparse
    with pytest.raises(data.DataError, match="1099511627776 bytes|longer than"):
        data.read(kind, str(path))


# --------------------------------------------------------------------------------------------------
# paths


PLACES = {
    "a folder": Path.mkdir, "a pipe": os.mkfifo,
    "a link to itself": lambda p: p.symlink_to(p.name),
    "a link to nowhere": lambda p: p.symlink_to("nowhere"),
    "a device": lambda p: p.symlink_to("/dev/zero"), "nothing": lambda p: None,
    "unreadable": lambda p: (p.write_bytes(b"{}"), p.chmod(0))}
FILES = {"model/config.json": generate, "model/model.safetensors": generate,
         "model/tokenizer.json": generate, "sharded/model-00002-of-00002.safetensors": generate,
         "sharded/model.safetensors.index.json": generate, "runs/point/config.json": generate,
         "runs/point/prompt.safetensors": generate, "runs/point/metrics.jsonl": "compare",
         "runs/point/prompts/000000.safetensors": "compare", "squad.json": "squad",
         "c4.json.gz": "text", "acts.safetensors": "collection"}


@pytest.mark.parametrize("place", PLACES)
def test_what_stands_in_a_files_place(world, own, tmp_path, refused, place):
    if place == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    for name, how in FILES.items():
        if place == "nothing" and name.endswith("index.json"):
            continue  # whole shards need none
        part = name if name.count("/") == 0 else "/".join(
            name.split("/")[:2 if name.startswith("runs") else 1])
        copy = own(part)
        path = copy if copy.is_file() else copy / Path(name).relative_to(part)
        path.unlink()
        PLACES[place](path)
        call = {"compare": ("compare", copy), "collection": ("compare", path),
                "squad": ("eval", world / "runs/point", "--data", f"squad:{path}"),
                "text": ("sample", "--model", world / "model", "--reference", f"text:{path}"),
                }.get(how) or ("generate", world / "runs/point", "x", "--model", copy)
        if name.startswith("runs/") and how is generate:
            call = ("generate", copy, "x")
        error = refused(*call)
        assert path.name in error or copy.name in error, (name, error)
        shutil.rmtree(copy) if copy.is_dir() and not copy.is_symlink() else path.unlink(
            missing_ok=True)


def test_patterns_do_not_follow_links_round(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.txt").write_text("1 + 1\n2\n")
    (tmp_path / "d/.hidden.txt").write_text("odd\n")
    for name in "abc":
        (tmp_path / "d" / name).symlink_to("..")
    for pattern in ("**/*.txt", "**", "d/*.txt", "d/[w-z].txt", "?/*"):
        assert len(data.read("math", str(tmp_path / pattern))) == 1, pattern
    (tmp_path / "d/.hidden.txt").unlink()
    assert len(data.read("math", str(tmp_path))) == 1
    for pattern in ("***", "[", "a**b/", "\0", "x" * 300, "/" + "y/" * 3000):
        with pytest.raises(data.DataError):
            data.read("math", str(tmp_path / pattern) if pattern != "\0" else pattern)


@pytest.mark.parametrize("name", [
    "\x1b[31mred a\nb \u202egnp \x9b2J \r\x1b[2K \x1b]0;title\x07", "x" * 300, "\udcff"])
def test_names_are_printed_clean(world, refused, name):
    for arguments in (("eval", world / "runs/point", "--data", f"squad:/nowhere/{name}"),
                      ("compare", f"/nowhere/{name}"), ("generate", name, "x"), ("eval", "a", name),
                      ("train", "--model", name), ("train", "--dtype", name),
                      ("train", "--device", name), ("train", "--posterior", name),
                      ("train", "--prior", name), ("train", "--reference", f"collection:{name}"),
                      ("train", "--steps", name), (name,)):
        refused(*arguments)


# --------------------------------------------------------------------------------------------------
# runs and collections


RUN_CONFIG = {
    "model": [None, 5, "\0", "/nowhere", []],
    "device": [None, "", "meta", "privateuseone", "cuda:99", "x\x1b[2J", 0],
    "dtype": [None, "int8", "float64", 5], "seed": [-1, 2**70, "0", 1.5, None, True],
    "prior": [None, "", "x", "fitted:c", "vocab:a=b", 5, "posterior:"],
    "reference": [None, [], [5], {}, "csv:x", ["vocab", None]], "reference_rows": [0, "5", -1],
    "text": [None, 5, "x " * 5000, "\0"], "tokens": [-1, "3", None, 2**50, [3]],
    "deep_layers": [-1, "1", None], "data": [None, "csv:x", "squad:\0", 5, "squad:/nowhere"],
    "eval_data": [5, "squad:\0", "text:/nowhere"], "eval_limit": [-1, "x", None],
    "max_length": [0, -5, 2**40, "x", 1000], "max_new": [0, 2**40, None, "x"],
    "batch_size": [0, 2**40, None], "posterior": [None, "x", 5], "particles": [0, 10**6, "2", None],
    "cut": [None, 0, "true", []], "lr": ["x", float("nan"), -1, float("inf")],
    "prior_weight": ["x", -1, float("nan"), None], "eval_every": [None, 0, 1.5],
    "steps": [-1, "x", 2**50], "clip": [None, 0],
    "keep_unanswerable": [None, "no"], "shard": [1]}


@pytest.mark.parametrize("key", RUN_CONFIG)
def test_a_runs_settings(own, refused, key):
    folder = own("runs/sgld")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for value in RUN_CONFIG[key]:
        path.write_text(json.dumps({**config, "settings": {**config["settings"], key: value}}))
        refused("eval" if key in ("data", "eval_data") or "limit" in key else "compare", folder)


@pytest.mark.parametrize("change", [
    {"settings": None}, {"settings": {}}, {"settings": []}, {"threads": "1"}, {"threads": 0},
    {"threads": 2**40}, {"threads": None}, {"sha256": None}, {"sha256": []},
    {"sha256": {"model": 1}},
    {"processes": "2"}, {"processes": 0}, {"changes": 5}, {"given": None}, {"given": [5]}])
def test_a_runs_config(own, refused, change):
    folder = own("runs/point")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for command in (["eval", folder], ["train", "--resume", "--out", folder]):
        assert "config.json" in refused(*command)


def test_threads_that_cannot_be_started(own, refused, monkeypatch):
    """OpenMP would end the process."""
    folder, started = own("runs/point"), []

    def start(thread):
        if len(started) > 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        original(thread)

    path, original = folder / "config.json", threading.Thread.start
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 1000}))
    monkeypatch.setattr(threading.Thread, "start", start)
    assert "1000 threads, as this run began with" in refused(
        "train", "--out", folder, "--resume", "--steps", 3)
    assert len(started) == 3 and not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "predictions.jsonl"])
def test_small_files_of_gigabytes(own, refused, name):
    folder = own("runs/point")
    os.truncate(folder / name, 2**31 - 1)  # sparse
    tracemalloc.start()
    assert f"{name}: {2**31 - 1} bytes, and no more than" in refused("plot", folder)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


@pytest.mark.parametrize("state", [
    "false", "[]", "{}", "", "null", DEEP, '{"step": "1", "metrics_bytes": 0, "due": true}'])
def test_a_checkpoints_state(own, refused, state):
    folder = own("runs/point")
    for path in (folder / "checkpoints").iterdir():
        save_file(load_file(path), path, {"state": state, "sha256": "0"})
    assert "not a checkpoint" in refused("train", "--resume", "--out", folder)


def test_a_priors_run_that_is_no_file(world, own, refused, tmp_path):
    folder = own("runs/point")
    path = folder / "prompt.safetensors"
    for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"),
                 lambda p: (p.touch(), os.truncate(p, 2**36))):  # whose sum would take a minute
        path.unlink()
        make(path)
        assert "prompt.safetensors" in refused(
            "train", "--model", world / "model", "--data", f"squad:{world}/squad.json", "--prior",
            f"posterior:{folder}", "--tokens", 3, "--out", tmp_path / "out")


@pytest.mark.parametrize("line", [
    "{", "[]", "5", "{}", '{"split": []}', '{"split": "other"}', '{"split": "eval"}',
    '{"split": "eval", "step": "1", "loss": 1}', '{"split": "eval", "step": 1, "loss": "x"}',
    '{"split": "baseline", "loss": null}', '{"split": "train", "step": 1}', "\0", DEEP,
    '{"split": "eval", "step": true, "loss": 1}', '{"split": "eval", "step": 1, "loss": 1e308}',
    '{"split": "train", "step": 1, "loss": -Infinity}',
    '{"split": "eval", "step": 1, "loss": 0.5, "f1": 1e400}',
    '{"split": "eval", "step": Infinity, "loss": 0.5}',
    '{"split": "train", "step": 1%s, "loss": 0.5}' % ("0" * 30)])
def test_a_runs_log(own, refused, line):
    folder = own("runs/point")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    error = refused("compare", folder)
    assert f"metrics.jsonl line {len(path.read_text().splitlines())}" in error
    # A last line that a killed run left unfinished, or zeros that a power cut did.
    path.write_bytes(path.read_bytes()[:-1])
    assert len(runs.Run(folder).metrics()) > 3 and runs.Run(folder).last_scored() > 0


@pytest.mark.parametrize("change, message", [
    ({"choice": "B", "choice_accuracy": 0.0}, ""), ({"choice": 5}, "no text"),
    ({"answers": "x"}, "no text"), ({"question": None}, "no text"), ({"f1": "1"}, "f1 is '1'"),
    ({"f1": float("-inf")}, "f1 is -inf"), ({"f1": 1e308}, "f1 is 1e"),
    ({"new": 10**400}, "new is")])
def test_a_runs_predictions(own, refused, change, message):
    """Those of multiple choice have a text more."""
    folder = own("runs/point")
    path = folder / "predictions.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(first), **change}) + "\n" + "".join(rest))
    if message:
        error = refused("plot", folder)
        assert "predictions.jsonl line 1: not a prediction" in error and message in error
    else:
        assert promptprior.main(["plot", str(folder)]) == 0


@pytest.mark.parametrize("change", [
    {"layers.0": None}, {"layers.1": None}, {"layers.0": (3, 15)}, {"layers.0": (0, 16)},
    {"layers.0": (4, 16)}, {"layers.0": (16,)}, {"layers.0": (1, 3, 16)}, {"layers.01": (3, 16)},
    {"layers.\u0661": (3, 16)}, {"layers." + "9" * 5000: (3, 16)}, {"layers.7": (3, 16)},
    {"layers.0.particles": None}, {"layers.0.particles": (3, 3, 16)},
    {"layers.0.particles": (3, 16)},
    {"layers.0.sd": (3, 16)}, {"layers.0.x": (3, 16)}, {"x": (3, 16)}, {"layers.0": torch.float16},
    {"layers.0": torch.int32}, {"layers.1.particles": float("nan")}])
def test_prompt_rows(own, refused, change):
    folder = own("runs/sgld")
    for name in ("prompt.safetensors", "prompts/000000.safetensors"):
        path = folder / name
        kept = path.read_bytes()
        tensors = {k: v.clone() for k, v in load_file(path).items()}
        for key, how in change.items():
            if how is None:
                del tensors[key]
            elif isinstance(how, tuple):
                tensors[key] = torch.zeros(how)
            elif isinstance(how, float):
                tensors[key][0, 0, 0] = how
            else:
                tensors[key] = tensors[key].to(how)
        save_file(tensors, path)
        assert name in refused("compare", folder)
        path.write_bytes(kept)
    runs.Run(folder).start_and_end()  # nothing else was wrong


COLLECTION = [
    {"layers": [0]}, {"layers": [0, 1]}, {"layers": []}, {"layers": [0, 0, 2]}, {"layers": "02"},
    {"layers": [-1]}, {"domains": ["a"]}, {"domains": []}, {"domains": ["a", "a"]},
    {"domains": [[]]},
    {"domains": None}, {"domains": [*map(str, range(10**5))]}, {"pool": "x"},
    {"pool": ["token"]}, {"roles": ["bos"]}, {"sha256": 5},
    {"model": None}, {"dtype": {}}, {"model": "\0"}, {"revision": {"a": 1}}]


@pytest.mark.parametrize("change", COLLECTION)
def test_a_collections_metadata(own, refused, change):
    from safetensors import safe_open

    path = own("acts.safetensors")
    with safe_open(path, "pt") as f:
        about, tensors = json.loads(f.metadata()["promptprior"]), {
            k: f.get_tensor(k).clone() for k in f.keys()}
    save_file(tensors, path, {"promptprior": json.dumps({**about, **change})})
    assert "not a collection" in refused("compare", path)


@pytest.mark.parametrize("key, number", [("role", 6), ("domain", 2), ("domain", -1),
                                         ("token", -5), ("example", -1),
                                         ("layers.0", float("nan"))])
def test_a_collections_fields(own, refused, key, number):
    from safetensors import safe_open

    path = own("acts.safetensors")
    with safe_open(path, "pt") as f:
        about, tensors = f.metadata(), {k: f.get_tensor(k).clone() for k in f.keys()}
    tensors[key][3] = number
    save_file(tensors, path, about)
    assert "acts.safetensors" in refused("compare", path)


# --------------------------------------------------------------------------------------------------
# what is printed


@pytest.mark.parametrize("text, clean", [
    ("\x1b[31mred\x1b[0m", "red"), ("\x1b]0;title\x07x", "x"), ("\x1b]8;;u\x1b\\x", "x"),
    ("\x9b2Jx", "x"), ("a\rb\bc\x7f", "abc"), ("\x1b[38;2;1;2;3mx", "x"), ("\x1b", ""),
    ("a\u202eb\u2066c", "abc"),
    ("a\tb\nc \u00fc\u732b\U0001f600", "a\tb\nc \u00fc\u732b\U0001f600"),
    ("\x1b]0;no end\nx", "\nx"), ("\x00\x85\x90", ""), ('{"a": "\x7f"}', '{"a": ""}')])
def test_clean(text, clean):
    assert console.clean(text) == clean


def test_every_control_character_is_stripped():
    kept = console.clean("".join(map(chr, range(0x3000))))
    assert set(kept) & {chr(i) for i in [*range(32), *range(127, 160)]} == {"\t", "\n"}
    assert not fuzz.CONTROL.search(kept)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal(encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console.show("\u732b \udcff \u2028 ok", file)
    assert file.buffer.getvalue().endswith(b" ok\n")


def test_an_answer_is_printed_clean(world, monkeypatch, capsys):
    vocabulary = data.Vocabulary(world / "model", (1,))
    hostile = "\x1b[31mred \x1b]0;owned\x07\x9b2J\rword"
    ids = vocabulary.encode_plain(hostile)
    assert "\x1b" in vocabulary.first_line(ids)
    monkeypatch.setattr(llama, "generate", lambda *a, **k: [ids])
    assert promptprior.main([str(a) for a in generate(world)]) == 0
    assert capsys.readouterr().out.strip() == "red word"


def test_a_runs_name_is_printed_clean(own, capsys):
    folder = own("runs/point")
    hostile = folder.with_name("\x1b[31mrun\x1b[0m\u202e")
    folder.rename(hostile)
    for command in ("compare", "eval", "plot"):
        for flags in ([], ["--json"] if command != "plot" else ["--text"]):
            assert promptprior.main([command, str(hostile), *flags]) == 0
            out, err = capsys.readouterr()
            assert not fuzz.CONTROL.search(out + err) and "run" in out


def test_a_closed_pipe_ends_quietly(world):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, HERE / "promptprior.py", "eval", world / "runs/point"],
                          stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


@pytest.mark.parametrize("e", [MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory"), PermissionError(13, "Permission denied", "x\ny"),
    RuntimeError("can't start new thread")])
def test_failures_under_way_are_one_line(monkeypatch, capsys, e):
    def fail(given):
        raise e

    monkeypatch.setattr(page, "command_plot", fail)
    assert promptprior.main(["plot", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("promptprior: error: ") and err.count("\n") == 1


def test_an_error_that_cannot_be_said_is_none_of_ours(world, monkeypatch):
    """Where stderr is on a full disk."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert promptprior.main(["eval", str(world / "nowhere")]) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_no_line_and_no_tokens(own, refused, world, tmp_path):
    (tmp_path / "batch.jsonl").write_text("\n")
    assert "no line in it" in refused("generate", world / "runs/point", "--batch",
                                      tmp_path / "batch.jsonl")
    model = own("model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    few = ["--data", f"squad:{world}/squad.json", *fuzz.FEW, "--out", tmp_path / "out"]
    for prior in ("vocab", "isotropic"):
        error = refused("train", "--model", model, "--prior", prior, *few)
        assert "tokens" in error and "tokenizer.json" in error


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def fail(given):
        raise ValueError("not the user's")

    monkeypatch.setattr(page, "command_plot", fail)
    with pytest.raises(ValueError):
        promptprior.main(["plot", "x"])


# --------------------------------------------------------------------------------------------------
# the fuzzer


@pytest.mark.parametrize("status, out, err, right", [
    (0, "x\n", "", True), (2, "", "promptprior: error: x: y\n", True),
    (1, "", "a\npromptprior: error: x\n", True), (0, "", "", False), (0, "x\x1b[1m", "", False),
    (0, "x", "promptprior: error: x\n", False), (2, "", "", False), (3, "", "", False),
    (2, "", "promptprior: error: x\nmore\n", False), (1, "", "Traceback (most recent\n", False),
    (2, "", "promptprior: error: x\npromptprior: error: x\n", False),
    (2, "", "promptprior: error: " + "x" * 2000 + "\n", False),
    (0, "x", "f.py:3: UserWarning: x\n", False), ("hang", "", "", False)])
def test_what_the_fuzzer_takes_for_right(status, out, err, right):
    assert (not fuzz.wrong(["eval"], status, out, err)) == right


def searched(script, *arguments):
    """What a search for failures prints, in a process that may be forked and finds none."""
    signal.alarm(0)
    done = Forked(HERE / "tests" / script, *arguments, COLUMNS="80",
                  TOKENIZERS_PARALLELISM="false")
    assert done.wait(None) == 0, done.out[-5000:] + done.err[-3000:]
    return done.out


def test_fuzz():
    seconds = os.environ.get("PROMPTPRIOR_FUZZ_SECONDS", "4")
    assert re.search(r"^all [1-9]", searched("fuzz.py", "--seconds", seconds), re.MULTILINE)


@pytest.mark.skipif(not calls.is_possible(), reason="no ptrace of x86_64 Linux here")
def test_killed_or_failing_at_any_system_call(world):
    said = searched("calls.py", "--world", world, "--seconds", "3", "--only", "import --overwrite")
    assert re.search(r"^[1-9][0-9]* of [0-9]+ cases, 0 failed", said, re.MULTILINE)
