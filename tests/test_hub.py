"""Models by their name on the hub: from the cache on disk, or from a server that stands in for the
hub."""

import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import promptprior
from forked import Forked
from lab import inputs, settings
from lab.hub import model_folder
from lab.settings import ModelSettings

COMMIT, OLDER = "a" * 40, "b" * 40
TOKENS = {"tokenizer_config.json": b"{}", "special_tokens_map.json": b"{ }",
          "added_tokens.json": b"{}\n"}


def lay_out(cache, name, commit, files, ref="main"):
    """A model in the hub's cache, as huggingface_hub lays it out: links into blobs."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    if ref:
        (home / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bundled model, and the same in two shards."""
    whole = {name: (settings.TINY / name).read_bytes() for name in (
        "config.json", "generation_config.json", "tokenizer.json", "model.safetensors")}
    tensors, parts = load_file(settings.TINY / "model.safetensors"), {}
    folder, places = tmp_path_factory.mktemp("shards"), {}
    for k in range(2):
        name = f"model-0000{k + 1}-of-00002.safetensors"
        save_file({t: x for i, (t, x) in enumerate(tensors.items()) if i % 2 == k}, folder / name,
                  {"format": "pt"})
        parts[name] = (folder / name).read_bytes()
        places |= {t: name for i, t in enumerate(tensors) if i % 2 == k}
    parts["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    return whole, {k: v for k, v in whole.items() if k != "model.safetensors"} | parts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


def test_a_model_in_the_cache_and_the_run_that_keeps_its_commit(cache, files, tmp_path, capsys):
    lay_out(cache, "org/little", COMMIT, files[0])
    np.save(tmp_path / "rows.npy", torch.randn(4, 192, generator=torch.Generator()).numpy())
    made, text = tmp_path / "run", "Question: What is 1 + 1?\nAnswer:"
    assert run("import", tmp_path / "rows.npy", "--model", "org/little", "--out", made) == 0
    config = json.loads((made / "config.json").read_text())
    assert config["settings"]["model"] == "org/little"
    assert config["settings"]["revision"] == COMMIT
    # main moves on, and other tools put more files beside: the run opens all the same; and so it
    # does with the same files as a folder
    beside = tmp_path / "beside"
    shutil.copytree(settings.TINY, beside, ignore=lambda *_: ["squad", "math", "text"])
    (beside / "tokenizer_config.json").write_text("{}")
    assert run("generate", made, "a", "--model", beside) == 0
    assert run("export", made, "--to", tmp_path / "of-folder", "--model", beside) == 0
    moved = dict(files[0], **{"config.json": files[0]["config.json"] + b" "})
    lay_out(cache, "org/little", OLDER, moved)
    lay_out(cache, "org/little", COMMIT, {"special_tokens_map.json": b"{}",
                                          "consolidated.safetensors": b"0"}, ref=None)
    assert inputs.checksums(settings.from_config(config)) == config["sha256"]
    capsys.readouterr()
    assert run("generate", made, text) == 0
    said = capsys.readouterr().out
    assert run("export", made, "--to", tmp_path / "adapter") == 0  # and so does its adapter
    adapter = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/little" and adapter["revision"] == COMMIT
    assert run("import", tmp_path / "adapter", "--out", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/config.json").read_text())["sha256"] == config["sha256"]
    capsys.readouterr()
    # with another model a run's revision means nothing
    assert run("generate", made, text, "--model", "tiny") == 0
    assert capsys.readouterr().out == said
    prior = "--prior", f"posterior:{made}", "--model", "org/little", "--tokens", 4
    assert run("sample", *prior, "--revision", COMMIT) == 0
    assert run("sample", *prior) == 2
    assert "other weights" in capsys.readouterr().err


def test_what_the_cache_has_in_part_is_not_there(cache, files, capsys):
    a = lambda revision=None: ModelSettings(model="org/parts", revision=revision)
    snapshot = lay_out(cache, "org/parts", COMMIT, files[1])
    lay_out(cache, "org/parts", OLDER, files[0], "v1")
    assert model_folder(a()) == snapshot
    assert len(inputs.model_files(a())) == 4
    assert model_folder(a("v1")).name == model_folder(a(OLDER)).name == OLDER
    for name in ("model-00002-of-00002.safetensors", "tokenizer.json", "config.json"):
        (snapshot / name).rename(snapshot / "away")
        assert not model_folder(a()).is_dir()
        (snapshot / "away").rename(snapshot / name)
    (snapshot / "tokenizer.json").unlink()
    assert run("sample", "--model", "org/parts") == 2
    said = capsys.readouterr().err
    assert "no tokenizer.json came from the hub or its cache: run `hf download org/parts`" in said
    assert said.count("\n") == 1
    assert run("sample", "--model", "org/parts", "--revision", "v2") == 2
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set: run `hf download org/parts --revision v2`" in said


@pytest.mark.parametrize("name, said", [
    ("no/where/at/all", "no such folder"), ("nowhere", "no such folder"),
    ("../a", "no such folder"), ("a--b/c..d", "no such folder"), ("org/x", "not in the cache")])
def test_a_name_that_is_nothing(cache, name, said, capsys):
    assert run("sample", "--model", name) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_folder_has_no_revision(cache, capsys):
    assert run("sample", "--revision", "main") == 2
    assert "tiny is a folder" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for. models: {name: {file: content}}."""

    models, asked = {}, []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/(org/\w+)(/revision|/tree)?(/[^/]+)?(?:/.*)?", path)
        file = re.fullmatch(r"/(org/\w+)/resolve/([^/]+)/(.+)", path)
        name = (api or file)[1]
        if name == "org/broken":
            return self.reply(500, b"", {}, body)
        if name not in self.models:
            return self.reply(401 if name == "org/private" else 404, b"",
                              {"X-Error-Code": "RepoNotFound"}, body)
        held = self.models[name]
        revision = (api[3] or "/main")[1:] if api else file[2]
        if revision not in ("main", COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if api and api[2] == "/tree":
            content = [{"type": "file", "path": f, "size": len(c),
                        "oid": hashlib.sha1(c).hexdigest()} for f, c in held.items()]
            return self.reply(200, json.dumps(content).encode(), {}, body)
        if api:
            content = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [],
                       "downloads": 0, "likes": 0, "siblings": [{"rfilename": f} for f in held]}
            return self.reply(200, json.dumps(content).encode(), {}, body)
        if file[3] not in held:
            self.asked.append((name, f"no {file[3]}"))
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound",
                                         "X-Repo-Commit": COMMIT}, body)
        if name == "org/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if body:
            self.asked.append((name, file[3]))
        return self.reply(200, held[file[3]], {
            "ETag": f'"{hashlib.sha1(held[file[3]]).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)

    def reply(self, status, content, headers, body):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


CALL = """  # with the hub that the environment names
import os, sys
sys.path.insert(0, os.getcwd())
from lab import hub
for arguments in sys.argv[1:]:
    name, _, revision = arguments.removeprefix("encoder:").partition("@")
    try:
        print(hub.from_hub(name, revision or None, arguments.startswith("encoder:")))
    except ValueError as e:
        print(type(e).__name__, e)
"""


def fetched(server, home, *names):
    """What hub.from_hub gives for each name, in a process of its own, whose hub is the server."""
    home.mkdir(exist_ok=True)
    (home / "call.py").write_text(CALL)
    done = Forked(home / "call.py", *names, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
                  HF_HOME=str(home), HF_HUB_CACHE=str(home / "hub"), HF_TOKEN="",
                  HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    assert done.wait(120) == 0, done.err
    return done.out.splitlines(), done.err


@pytest.fixture
def hub(files):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked = []
    Hub.models = {
        "org/whole": files[0] | {
            "README.md": b"#", "pytorch_model.bin": b"\x80", "consolidated.safetensors": b"0",
            "original/consolidated.00.pth": b"\x80", "onnx/model.safetensors": b"0",
            **TOKENS},
        "org/shards": files[1] | TOKENS,
        "org/bare": {k: v for k, v in files[0].items() if k != "generation_config.json"},
        "org/gated": files[0],
        "org/bert": files[0] | {"config.json": b'{"model_type": "bert"}'},
        "org/t5": files[0] | {"config.json": b'{"model_type": "t5"}'},
        "org/pickle": {k: v for k, v in files[0].items() if k != "model.safetensors"} | {
            "pytorch_model.bin": b"\x80"}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_takes_what_is_needed_and_a_mistake_is_one_line(hub, tmp_path, files):
    page = f"http://127.0.0.1:{hub.server_port}"
    out, err = fetched(hub, tmp_path, "org/whole", "org/shards", "org/bert", "org/pickle",
                       "org/gated", "org/private", "org/none", "org/whole@v9", "org/broken")
    assert len(out) == 9, (out, err)
    assert Path(out[0]).name == COMMIT
    for k in range(2):
        assert {p.name: p.read_bytes() for p in Path(out[k]).iterdir()} == files[k] | TOKENS
    assert "model_type is 'bert'" in out[2]
    assert [f for name, f in Hub.asked if name == "org/bert"] == ["config.json"]
    assert ("no model.safetensors came from the hub or its cache: run `hf download org/pickle`"
            in out[3])
    assert f"accepted first: do so at {page}/org/gated, then run `hf auth login`" in out[4]
    assert "no such folder, and no such model" in out[5] and "no such model" in out[6]
    assert "--revision v9: org/whole has none" in out[7]
    assert "UserError" in out[8] and "`hf download org/broken`" in out[8]
    assert "model.safetensors" in err or "%" in err  # a bar
    # an encoder's weights are fetched only for a command that takes it
    out_t5, _ = fetched(hub, tmp_path, "org/t5")
    assert "an encoder (model_type t5)" in out_t5[0]
    assert [f for name, f in Hub.asked if name == "org/t5"] == ["config.json"]
    out_t5, _ = fetched(hub, tmp_path, "encoder:org/t5")
    assert (Path(out_t5[0]) / "model.safetensors").exists()
    # what is there is not asked for again; without a server it is still there
    count = len(Hub.asked)
    from huggingface_hub import constants
    with pytest.MonkeyPatch.context() as m:
        m.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        folder = model_folder(ModelSettings(model="org/whole"))
    assert str(folder) == out[0] and len(Hub.asked) == count
    # and what tells a chat model's ends, or names tokens, is missed, unless it is known that there
    # is none
    missed = "generation_config.json", "tokenizer_config.json"
    for file in missed:
        (folder / file).unlink()
    out, err = fetched(hub, tmp_path, "org/whole", "org/bare", "org/bare")
    assert not any("Error" in line for line in out)
    assert not [f for name, f in Hub.asked[count:] if name == "org/whole"]
    for file in missed:
        assert err.count(f"no {file} in the cache") == 1
        assert f"`hf download org/whole {file} --revision {COMMIT}`" in err
        assert Hub.asked.count(("org/bare", f"no {file}")) == 1
    hub.shutdown(), hub.server_close()
    out, _ = fetched(hub, tmp_path, "org/other")
    assert "the hub does not answer: run `hf download org/other`" in out[0]
