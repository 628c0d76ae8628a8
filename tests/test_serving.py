"""Rows for other programs: their files, the order in which they stand, and what cannot be said."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import llama
import promptprior
from lab.settings import TINY

TEXT = "Bolu was born in Tarn.\nQuestion: Where was Bolu born?\nAnswer:"


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(*flags) -> the folder of a run of the bundled model; runs of the same flags are
    one."""
    made = {}

    def make(*flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("runs") / "a run"
            assert run("train", "--steps", 1, "--batch-size", 4, "--eval-limit", 2, "--text", "",
                       "--max-length", 150, "--train-examples", 40, "--reference-rows", 300,
                       "--prior", "fitted", *flags,
                       *(("--tokens", 6) if "--tokens" not in flags else ()), "--out", folder) == 0
            made[flags] = folder
        return made[flags]

    return make


def read(path, form):
    if form == "vllm":
        return torch.load(path, weights_only=True)
    x = np.load(path) if form == "numpy" else np.fromfile(path, "<f4").reshape(6, -1)
    return torch.from_numpy(x)


@pytest.mark.parametrize("place", ["before", "after-bos"])
@pytest.mark.parametrize("form", ["vllm", "llama.cpp", "numpy"])
def test_rows_as_input_embeddings_give_our_logits(trained, tmp_path, capsys, form, place):
    """In the order that the sidecar tells, in transformers."""
    from transformers import AutoModelForCausalLM

    folder = trained("--place", place)
    assert run("export", folder, "--to", tmp_path / "rows", "--for", form) == 0
    about = json.loads((tmp_path / "rows.json").read_text())
    expected = load_file(folder / "prompt.safetensors")["layers.0"]
    rows = read(tmp_path / "rows", form)
    assert torch.equal(rows, expected) and about["shape"] == [6, 192] == [*rows.shape]
    assert rows.dtype == torch.float32 and about["dtype"] == "float32"

    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model, vocabulary = llama.load(TINY, "float32"), data.Vocabulary(TINY, (1,))
    ids = torch.tensor(vocabulary.encode(TEXT))
    assert ids[0] == about["bos_token_id"] == 0
    embedded = base.get_input_embeddings()(ids)
    parts = {"rows": rows, "bos": embedded[:1], "text": embedded[1:]}
    x = torch.cat([parts[part] for part in about["order"]])[None]
    with torch.no_grad():
        theirs = base(inputs_embeds=x).logits[0, -1]
    prompt, past = llama.Prompt({0: expected}), None
    if place == "after-bos":
        past, ids = model.extend(ids[None, :1]), ids[1:]
    h, _ = model(ids[None], prompt.past(model, past))
    ours = model.logits(h[0, -1])
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max()
    # in another order they say something else
    other = torch.cat([parts[part] for part in ("bos", "text", "rows")])[None]
    with torch.no_grad():
        assert (base(inputs_embeds=other).logits[0, -1] - ours).abs().max() > 0.1


def test_vllms_rows_are_in_the_models_dtype_and_the_others_in_float32(trained, tmp_path):
    folder = trained()
    for form, dtype in (("vllm", torch.bfloat16), ("numpy", torch.float32)):
        path = tmp_path / form
        assert run("export", folder, "--to", path, "--for", form, "--dtype", "bfloat16") == 0
        rows = read(path, form)
        assert rows.dtype == dtype
        expected = load_file(folder / "prompt.safetensors")["layers.0"].bfloat16()
        assert torch.equal(rows.bfloat16(), expected)  # as they enter the model
        assert len(path.read_bytes()) < 3000 + rows.numel() * rows.element_size()


def test_numpys_rows_come_back_by_import(trained, tmp_path):
    folder, path = trained(), tmp_path / "rows.npy"
    assert run("export", folder, "--to", path, "--for", "numpy") == 0
    assert run("import", path, "--model", "tiny", "--out", tmp_path / "back") == 0
    assert torch.equal(load_file(tmp_path / "back/prompt.safetensors")["layers.0"],
                       load_file(folder / "prompt.safetensors")["layers.0"])


@pytest.mark.parametrize("flags, message", [
    (("--deep-layers", 2), "has rows at layers 0, 4, 5 and drops its rows' outputs"),
    (("--tokens", 0, "--deep-layers", 1, "--keep"), "has rows at layers 5"),
    (("--cut",), "prompt drops its rows' outputs"),
    (("--place", "suffix"), "stands inside the text"),
    (("--method", "prefix", "--prefix-layers", 2, "--reparam", "shared"), "has keys and values")])
def test_what_is_no_kept_row_in_front_is_refused_with_what_works(trained, tmp_path, capsys, flags,
                                                                 message):
    folder = trained(*flags)
    capsys.readouterr()
    assert run("export", folder, "--to", tmp_path / "rows.pt", "--for", "vllm") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not [*tmp_path.iterdir()]
    command = error.split("such rows by ")[1].split(", and export")[0]
    words = [str(tmp_path / "new") if word == "NEW" else word for word in shlex.split(command)]
    assert run(*words, "--steps", 0) == 0
    assert run("export", tmp_path / "new", "--to", tmp_path / "rows.pt", "--for", "vllm") == 0


def test_mistakes_are_one_line_and_nothing_is_half_written(trained, tmp_path, capsys, monkeypatch):
    folder, path = trained(), tmp_path / "rows.pt"
    command = "export", folder, "--to", path, "--for", "vllm"
    assert run(*command) == 0
    before = path.read_bytes()
    foreign = tmp_path / "foreign.pt"
    foreign.write_text("mine")
    alone = tmp_path / "alone.pt"
    (tmp_path / "alone.pt.json").write_text("{}")
    for arguments, message in (
            (command, "rows.pt exists: choose another --to, or replace rows that export made by "
                      "--overwrite"),
            (("export", folder, "--to", foreign, "--for", "vllm", "--overwrite"),
             "only rows that export made is overwritten"),
            (("export", folder, "--to", alone, "--for", "vllm"), "alone.pt.json exists"),
            (("export", folder, "--to", path, "--for", "onnx"), "--for onnx: use one of peft"),
            (("export", folder, "--csv", "--for", "vllm"), "--for vllm is for --to"),
            (("export", folder, "--for", "vllm"), "--to FILE with --for")):
        capsys.readouterr()
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert path.read_bytes() == before and foreign.read_text() == "mine" and not alone.exists()
    assert run(*command, "--overwrite", "--step", 0) == 0 and path.read_bytes() != before
    path.unlink()  # as if it was killed before it had written them
    assert run(*command) == 0 and path.read_bytes() == before
    (tmp_path / "rows.pt.json").write_text('{"file": "rows.pt", "for": ["vllm"]}')
    assert run(*command, "--overwrite") == 2 and path.read_bytes() == before

    monkeypatch.setattr("lab.serving.json", SimpleNamespace(dumps=lambda *a, **k: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run("export", folder, "--to", tmp_path / "new.pt", "--for", "vllm")
    assert not [*tmp_path.glob("new*")] and not [*tmp_path.glob(".*")]


# --------------------------------------------------------------------------------------------------
# what docs/serving.md shows


def shown_code(name, page="serving"):
    page = (Path(__file__).resolve().parent.parent / f"docs/{page}.md").read_text()
    return re.search(rf"<!-- python: {name} -->\n```python\n(.*?)```", page, re.DOTALL)[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of a run of twenty fitted rows, beside the files that it is exported to."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "tiny").symlink_to(TINY)
    assert run("train", "--steps", 25, "--batch-size", 8, "--eval-limit", 2, "--text", "", "--out",
               folder / "run") == 0
    for name, form in (("rows.npy", "numpy"), ("rows.pt", "vllm"), ("rows.f32", "llama.cpp")):
        assert run("export", folder / "run", "--to", folder / name, "--for", form) == 0
    return folder


@pytest.fixture
def exported(files, monkeypatch, capsys):
    """Answer of the run, whose files are in the working directory."""
    monkeypatch.chdir(files)
    capsys.readouterr()
    assert run("generate", "run", TEXT) == 0
    answer = capsys.readouterr().out.rstrip("\n")
    assert run("generate", "run", "x") == 0 and capsys.readouterr().out.rstrip("\n") != answer
    return answer


def test_the_pages_lines_for_transformers(exported, capsys):
    exec(shown_code("transformers"), {})
    assert capsys.readouterr().out.split("\n")[0].strip() == exported


def test_the_lines_for_a_copied_module(exported, capsys):
    """docs/copying.md: the rows of a trained run."""
    exec(shown_code("a trained run", "copying").replace("runs/squad-vocab-seed0", "run"), {})
    assert capsys.readouterr().out.split("\n")[0].strip() == exported


def test_the_pages_lines_for_vllm(exported, capsys, monkeypatch):
    """vLLM itself is not here: what it is given has to be what its documentation asks for, and say
    in transformers what the run says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class LLM:
        def __init__(self, model, enable_prompt_embeds):
            assert enable_prompt_embeds
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            self.tokenizer = AutoTokenizer.from_pretrained(model)

        def generate(self, prompt, params):
            x = prompt["prompt_embeds"]
            assert x.dim() == 2 and x.shape[1] == 192 and not x.requires_grad
            out = self.model.generate(inputs_embeds=x[None].float(), do_sample=False,
                                      attention_mask=torch.ones(1, len(x)), pad_token_id=1,
                                      max_new_tokens=params["max_tokens"])
            text = self.tokenizer.decode(out[0]).split(params["stop"])[0]
            return [SimpleNamespace(outputs=[SimpleNamespace(text=text)])]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    exec(shown_code("vllm"), {})
    assert capsys.readouterr().out.strip() == exported
