"""What a folder that cannot be loaded is: doing what the line says makes it load."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import data
import llama
from lab.console import UserError
from lab.foreign_models import check_tokenizer, explained
from lab.hub import needed_files
from lab.inputs import load_model
from lab.settings import TINY, ModelSettings

WEIGHTS = "model.safetensors"


def told(folder) -> str:
    with pytest.raises(UserError) as e, explained():
        llama.load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)
    return str(e.value)


def given(line) -> str:
    """The folder that a line says to give."""
    return re.search(r"give (\S+?)(,|$)", line)[1]


def run_command(line, tmp_path):
    """The command of a line, typed at a shell, and the folder NEW that it makes."""
    command = re.search(r"`(python -c .*?)`", line)[1]
    subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True,
                   cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "NEW"


def test_a_folder_of_the_hubs_cache(hf, tmp_path):
    """That of the branch main; of several without it, the newest."""
    _, folder = hf()
    cache = tmp_path / "models--org--name"
    for age, commit in enumerate(("bbb", "aaa", "ccc")):
        shutil.copytree(folder, cache / "snapshots" / commit)
        os.utime(cache / "snapshots" / commit, (1e9 - age, 1e9 - age))
    for path in (cache, cache / "snapshots"):
        assert given(told(path)) == str(cache / "snapshots/bbb")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("aaa")
    for path in (cache, cache / "snapshots"):
        assert f"{path}/config.json: no such file: this is a model's root in the" in told(path)
        assert given(told(path)) == str(cache / "snapshots/aaa")
    assert llama.load(given(told(cache)))


def test_a_folder_of_the_hubs_cache_that_lacks_files(hf, tmp_path):
    """With the name that fetches them, and another line once they are there."""
    cache = tmp_path / "models--org--name"
    for path in (cache / "blobs", cache / "snapshots/abc"):
        path.mkdir(parents=True)
    for path in (cache, cache / "blobs", cache / "snapshots"):
        assert told(path).endswith("run `hf download org/name`, and give org/name")
    (cache / "snapshots/abc/config.json").symlink_to(cache / "blobs/gone")
    assert given(told(cache)) == "org/name"
    (cache / "snapshots/abc/config.json").unlink()
    shutil.copy(hf()[1] / "config.json", cache / "snapshots/abc")
    assert "run `hf download org/name --revision abc`" in told(cache / "snapshots/abc")
    assert given(told(cache)) == str(cache / "snapshots/abc")


def test_a_file_or_a_folder_above_is_answered_with_the_folder(hf, tmp_path):
    _, folder = hf()
    shutil.copytree(folder, tmp_path / "run/final")
    assert given(told(tmp_path / "run")) == str(tmp_path / "run/final")
    with pytest.raises(UserError, match="a file: give the folder that it is in") as e:
        load_model(ModelSettings(model=str(folder / WEIGHTS), device="cpu").complete())
    assert str(e.value).endswith(f", {folder}")


def test_checkpoints_of_a_trainer(hf, tmp_path):
    _, folder = hf()
    output = tmp_path / "output"
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-90", "checkpoint-last"):
        shutil.copytree(folder, output / name)
    line = told(output)
    assert "the model is in its checkpoints" in line
    assert line.endswith("after you have copied the tokenizer's files there")
    assert given(line) == str(output / "checkpoint-1000")
    shutil.copy(folder / "config.json", output)  # some trainers leave it beside
    shutil.copy(TINY / "tokenizer.json", output / "checkpoint-1000")
    assert told(output).endswith(f"give {output / 'checkpoint-1000'}")
    assert llama.load(output / "checkpoint-1000")


def test_pickled_weights(hf, tmp_path):
    theirs, folder = hf()
    folder = folder.rename(tmp_path / "it's a $HOME")
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    (folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    (folder / "pytorch_model-2.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "pytorch_model-2.bin: a git-lfs pointer" in told(folder)
    (folder / "pytorch_model-2.bin").unlink()
    shutil.copy(tmp_path / WEIGHTS, folder / "weights.safetensors")
    assert "weights.safetensors: rename it to model.safetensors" in told(folder)
    (folder / "weights.safetensors").unlink()
    new = run_command(told(folder), tmp_path)
    assert load_file(new / WEIGHTS).keys() == load_file(tmp_path / WEIGHTS).keys()
    torch.testing.assert_close(llama.load(new).embeddings, theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore")
def test_weights_of_bitsandbytes(hf, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    _, folder = hf(hidden_size=64, intermediate_size=128, num_attention_heads=2,
                   num_key_value_heads=2, head_dim=32)
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}": True})
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu")
    quantised.save_pretrained(tmp_path / "it's")
    with pytest.raises(llama.ModelError, match="quantised by bitsandbytes") as e:
        llama.load(tmp_path / "it's")
    new = run_command(str(e.value), tmp_path)
    torch.testing.assert_close(llama.load(new).embeddings, llama.load(folder).embeddings.to(
        llama.load(new).embeddings.dtype))


def test_pickled_shards(hf, tmp_path):
    """A part of them is no model; the whole is converted."""
    theirs, folder = hf()
    (folder / WEIGHTS).unlink()
    places = {}
    for i, name in enumerate(theirs.state_dict()):
        places[name] = f"pytorch_model-0000{i % 2 + 1}-of-00002.bin"
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "pickled, and 2 of the 2 files" in told(folder)
    for file in sorted(set(places.values())):
        assert f"names are missing, first '{file}': fetch them" in told(folder)
        torch.save({k: t for k, t in theirs.state_dict().items() if places[k] == file},
                   folder / file)
    new = run_command(told(folder), tmp_path)
    torch.testing.assert_close(llama.load(new).embeddings, theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("name, text", [
    ("consolidated.00.pth", "hf download"), ("consolidated.safetensors", "Meta's own layout"),
    ("original/consolidated.00.pth", "Meta's own layout"), ("q4.gguf", " q4.gguf`, copy"),
    ("adapter_config.json", "base_model_name_or_path"),
    ("checkpoint-5/adapter_config.json", "base_model_name_or_path")])
def test_other_kinds_of_folders(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"{}")
    assert text in told(tmp_path)


@pytest.mark.parametrize("content, text", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("<html>" * 99, "a web page, not the file")])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, f"{WEIGHTS}.index.json"])
def test_files_that_are_others(hf, name, content, text):
    _, folder = hf()
    if name.endswith("index.json"):
        (folder / WEIGHTS).unlink()
    (folder / name).write_text(content)
    assert text in told(folder) and f"{name}: a " in told(folder)
    if name.endswith("index.json"):
        with pytest.raises(UserError, match=text):
            needed_files(folder)


def test_what_is_not_known_is_said_as_the_model_says_it(hf, tmp_path):
    _, folder = hf()
    (folder / WEIGHTS).write_bytes(b"x" * 99)
    with pytest.raises(llama.ModelError, match="not a readable safetensors file"), explained():
        llama.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(llama.ModelError, match="no such file: expected a Hugging"), explained():
        llama.load(tmp_path / "empty")


def test_a_command_explains_too(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="which is quantised"):
        load_model(ModelSettings(model=str(tmp_path), device="cpu").complete())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_tokenizers_file_that_is_another(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("squad", "math", "text"))
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=f"{name}: a git-lfs pointer, not the file: run `git lfs"):
        load_model(ModelSettings(model=str(folder), device="cpu").complete())


def test_a_folder_with_another_tokenizer_file(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("squad", "math", "text"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(data.DataError, match="no such file: a model folder needs its tokenizer"):
        load_model(ModelSettings(model=str(folder), device="cpu").complete())
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match="has tokenizer.model, from which `python -c"):
        load_model(ModelSettings(model=str(folder), device="cpu").complete())


def converted(folder, tmp_path) -> data.Vocabulary:
    """The tokenizer that the command of the refusal makes."""
    with pytest.raises(UserError, match="from which `python -c") as e:
        check_tokenizer(folder)
    run_command(str(e.value), tmp_path)
    check_tokenizer(folder)
    return data.Vocabulary(folder)


@pytest.mark.parametrize("beside", [{}, {"tokenizer_class": "LlamaTokenizer"}])
def test_a_tokenizer_of_sentencepiece(tmp_path, beside):
    """Also where no file beside names its class."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "it's").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=f"{TINY.parent}/README.md", model_prefix=str(tmp_path / "x"), vocab_size=400,
        model_type="bpe", byte_fallback=True, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity")
    (tmp_path / "x.model").rename(tmp_path / "it's/spiece.model")
    with pytest.raises(UserError, match="spiece.model: rename it to tokenizer.model"):
        check_tokenizer(tmp_path / "it's")
    (tmp_path / "it's/spiece.model").rename(tmp_path / "it's/tokenizer.model")
    (tmp_path / "it's/config.json").write_text('{"model_type": "llama"}')
    if beside:
        (tmp_path / "it's/tokenizer_config.json").write_text(json.dumps(beside))
    theirs = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "it's/tokenizer.model"))
    text = "Where is the prompt? Of the prior, 12  rows \u732b"
    assert converted(tmp_path / "it's", tmp_path).encode(text) == theirs.encode(text)


def test_a_t5s_tokenizer(tmp_path):
    """Pieces of a unigram model, and </s> behind a text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        input=f"{TINY.parent}/README.md", model_prefix=str(tmp_path / "x"), vocab_size=400,
        model_type="unigram", minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    folder = tmp_path / "t5"
    folder.mkdir()
    (tmp_path / "x.model").rename(folder / "spiece.model")
    (folder / "config.json").write_text('{"model_type": "t5"}')
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    text = "Where is the prompt? Of the prior, 12 rows"
    vocabulary = converted(folder, tmp_path)
    assert vocabulary.encode(text) == theirs.encode(text) and vocabulary.behind == [1]


def test_a_tokenizer_of_two_files(tmp_path):
    pytest.importorskip("transformers")
    content = json.loads((TINY / "tokenizer.json").read_text())
    words = content["model"]["vocab"] | {t["content"]: t["id"] for t in content["added_tokens"]}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    text = "Bolu was born in Tarn.\nQuestion"
    assert converted(tmp_path, tmp_path).encode(text) == data.Vocabulary(TINY).encode_plain(text)
