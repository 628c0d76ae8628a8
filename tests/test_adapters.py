"""Prompts as PEFT's adapters and back, against peft itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import data
import llama
import promptprior
from lab import page
from lab.adapters import from_peft, to_csv, to_peft
from lab.console import UserError
from lab.evaluation import open_run
from lab.files import Folder
from lab.settings import TINY
from small import MODEL

N = 5


def rows(*layers, width=48, n=N):
    g = torch.Generator().manual_seed(3)
    return {i: torch.randn(n, width, generator=g) for i in layers}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def ours(model, past, ids):
    return model.logits(model(ids, past)[0]).float()


def theirs(base, folder, ids):
    peft = PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        out = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out[:, -ids.shape[1]:].float()


def close(found, expected):
    """Whether keys were only rotated and rotated back."""
    return (found - expected).abs().max() <= 1e-4 * expected.abs().max()


PROMPTS = {"tokens": ([0], False), "tokens and deep, kept": ([0, 2, 3], False),
           "tokens and deep, cut": ([0, 1, 2, 3], True), "VPT-deep": ([0, 1, 2, 3], False)}


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6, "head_dim": 8},
                                     {"num_key_value_heads": 1, "tie_word_embeddings": False}])
@pytest.mark.parametrize("layers, cut", PROMPTS.values(), ids=PROMPTS)
def test_peft_gives_our_logits(hf, tmp_path, token_ids, changes, layers, cut):
    base, folder = hf(**changes)
    model, ids = llama.load(folder), token_ids(3, 9)
    prompt = llama.Prompt(rows(*layers), cut)
    past = prompt.past(model)
    form = prompt.layers[0] if layers == [0] else past
    out = write(tmp_path / "out", to_peft(model, form, "base"))
    expected = ours(model, past, ids)
    assert (theirs(base, out, ids) - expected).abs().max() < 1e-4
    assert (ours(model, model.empty(), ids) - expected).abs().max() > 0.1  # it matters
    back = from_peft(out, model)
    assert back.is_prefix == (layers != [0])
    assert close(ours(model, back.past(model), ids), expected)
    if layers == [0]:
        assert torch.equal(back.layers[0], prompt.layers[0])
        # the same prompt has a second exact form
        write(tmp_path / "out", to_peft(model, past, "base"))
        assert (theirs(base, out, ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layers", [[0], [0, 1, 2, 3]])
def test_peft_continues_token_by_token_as_we_do(hf, tmp_path, token_ids, layers):
    base, folder = hf()
    model, ids = llama.load(folder), token_ids(1, 7)
    prompt = llama.Prompt(rows(*layers), cut=len(layers) > 1)
    past = prompt.past(model)
    form = prompt.layers[0] if layers == [0] else past
    out = write(tmp_path / "out", to_peft(model, form, "base"))
    peft = PeftModel.from_pretrained(base, out)
    made = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=16, eos_token_id=None, pad_token_id=0)
    expected = llama.generate(model, ids.tolist(), past, 16)[0]
    assert made[0, -16:].tolist() == expected
    assert expected != llama.generate(model, ids.tolist(), None, 16)[0]


def test_a_bfloat16_base(hf, tmp_path, token_ids):
    base, folder = hf(dtype=torch.bfloat16)
    model, ids = llama.load(folder), token_ids(2, 9)
    assert model.embeddings.dtype == torch.bfloat16
    for layers in ([0], [0, 3]):
        prompt = llama.Prompt(rows(*layers), cut=False)
        past = prompt.past(model)
        out = write(tmp_path / "out", to_peft(
            model, prompt.layers[0] if layers == [0] else past, "base"))
        stored = load_file(out / "adapter_model.safetensors")["prompt_embeddings"]
        assert stored.dtype == torch.float32
        expected = ours(model, past, ids)
        # two digits is what bfloat16 has
        for logits in (theirs(base, out, ids), ours(model, from_peft(out, model).past(model), ids)):
            assert (logits - expected).norm() < 2e-2 * expected.norm()


def peft_trained(base, folder, kind, **options):
    """An adapter that peft itself makes and saves, its numbers drawn at random."""
    from peft import CartridgeConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
    configs = {"PROMPT_TUNING": PromptTuningConfig, "PREFIX_TUNING": PrefixTuningConfig,
               "P_TUNING": PromptEncoderConfig, "CARTRIDGE": CartridgeConfig}
    torch.manual_seed(1)
    peft = get_peft_model(base, configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=N,
                                              **options))
    peft.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, options", [
    ("PROMPT_TUNING", {}), ("PREFIX_TUNING", {}), ("P_TUNING", {"encoder_hidden_size": 16}),
    ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 16}),
    ("CARTRIDGE", {"num_frozen_tokens": 2})])
def test_we_give_pefts_logits_and_its_tensors_back(hf, tmp_path, token_ids, kind, options):
    base, folder = hf()
    made = peft_trained(base, tmp_path / "peft", kind, **options)
    base, _ = hf()  # without what peft hangs on a model
    model, ids = llama.load(folder), token_ids(2, 8)
    prompt = from_peft(made, model)
    past = prompt.past(model)
    assert (theirs(base, made, ids) - ours(model, past, ids)).abs().max() < 1e-4
    back = write(tmp_path / "back", to_peft(
        model, past if prompt.is_prefix else prompt.layers[0], "base"))
    tensors, expected = (load_file(f / "adapter_model.safetensors") for f in (back, made))
    assert tensors.keys() == expected.keys()
    assert close(tensors["prompt_embeddings"], expected["prompt_embeddings"])
    written, original = (PeftConfig.from_pretrained(f).to_dict() for f in (back, made))
    for key in ("num_layers", "token_dim", "num_attention_heads", "num_virtual_tokens",
                "num_transformer_submodules", "task_type", "inference_mode"):
        assert written[key] == original[key], key
    assert written["peft_type"] == {"P_TUNING": "PROMPT_TUNING",
                                    "CARTRIDGE": "PREFIX_TUNING"}.get(kind, kind)


def test_what_pefts_form_cannot_say_is_refused(hf):
    _, folder = hf()
    model = llama.load(folder)
    for layers in ([0], [0, 3], [2, 3]):
        with pytest.raises(UserError, match="--keep"):
            to_peft(model, llama.Prompt(rows(*layers), cut=True).past(model), "base")
    with pytest.raises(UserError, match="layers 0, 1 have no part"):
        to_peft(model, llama.Prompt(rows(2, 3), cut=False).past(model), "base")
    # all layers own rows: nothing is missing
    to_peft(model, llama.Prompt(rows(0, 1, 2, 3), cut=True).past(model), "base")


def test_rows_in_numpys_format(hf, tmp_path):
    _, folder = hf()
    model, x = llama.load(folder), rows(0)[0]
    for dtype in (np.float32, np.float64, np.float16):
        with open(tmp_path / "encoder.prompt.prompt.prompt", "wb") as f:
            np.save(f, x.numpy().astype(dtype))
        prompt = from_peft(tmp_path / "encoder.prompt.prompt.prompt", model)
        torch.testing.assert_close(prompt.layers[0], x, rtol=1e-3, atol=1e-3)
    for bad, message in ((x.numpy()[0], "its shape is"),
                         (x.numpy()[:, :7], "another model"),
                         (np.array([["a"]]), "<U1 numbers"), (x.numpy() * np.nan, "not finite"),
                         (np.array([[object()]]), "object numbers"),
                         (np.ones((2, 48), np.int64), "int64")):
        np.save(tmp_path / "bad.npy", bad, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            from_peft(tmp_path / "bad.npy", model)
    def with_header(text, version=2, length=None):
        length = len(text) if length is None else length
        return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(4, "little") + text

    about = b"{'descr': %s'<f4', 'fortran_order': False, 'shape': (%s, 16)}\n"
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'descr'", b"\x80\x04.",
                    with_header(b"", length=2**32 - 1), with_header(about % (b"-" * 9000, b"3")),
                    with_header(about % (b"(" * 300, b"3")), with_header(about % (b"", b"3"), 3),
                    with_header(about % (b"", b"2000000000")) + bytes(64)):
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(UserError, match="not floating-point rows") as e:
            from_peft(tmp_path / "bad.npy", model)
        assert "\n" not in str(e.value)


@pytest.mark.filterwarnings("error")
def test_numpys_rows_raise_no_warning(hf, tmp_path):
    """Of Python 2's files, of rows in columns' order, and of numbers that overflow."""
    model, path, x = llama.load(hf()[1]), tmp_path / "x.npy", np.ones((2, 48), np.float32)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 48L), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00v\x00" + header + x.tobytes())
    assert (from_peft(path, model).layers[0].numpy() == x).all()
    np.save(path, np.asfortranarray(x))
    assert (from_peft(path, model).layers[0].numpy() == x).all()
    np.save(path, np.full((2, 48), 1e300))
    with pytest.raises(UserError, match="not finite"):
        from_peft(path, model)


def test_bad_adapters_are_one_line_with_the_remedy(hf, tmp_path):
    model = llama.load(hf()[1])
    made = {kind: peft_trained(hf()[0], tmp_path / kind, kind)
            for kind in ("PROMPT_TUNING", "PREFIX_TUNING")}

    def refused(message, kind="PROMPT_TUNING", model=model, tensors=None, **changes):
        bad = tmp_path / "bad"
        bad.mkdir(exist_ok=True)
        config = json.loads((made[kind] / "adapter_config.json").read_text()) | changes
        (bad / "adapter_config.json").write_text(json.dumps(
            {k: v for k, v in config.items() if v is not Ellipsis}))
        x = load_file(made[kind] / "adapter_model.safetensors")
        save_file(x if tensors is None else tensors(x), bad / "adapter_model.safetensors")
        with pytest.raises((UserError, llama.ModelError)) as e:
            from_peft(bad, model)
        assert message in str(e.value) and "\n" not in str(e.value), str(e.value)

    def one(change):
        return lambda x: {"prompt_embeddings": change(x["prompt_embeddings"]).contiguous()}

    refused("PEFT loads the adapter and does not apply it", task_type=None)
    refused("PEFT loads the adapter and does not apply it", task_type=...)
    refused("not for a model that continues text", task_type="SEQ_2_SEQ_LM")
    refused("peft_type is 'LORA'", peft_type="LORA")
    refused("peft_type is []", peft_type=[])
    refused("peft_type is None", peft_type=...)
    refused("an encoder", num_transformer_submodules=2)
    refused("num_virtual_tokens 6", num_virtual_tokens=6)
    refused("num_virtual_tokens None", num_virtual_tokens=...)
    refused("num_layers 5, the model 4", num_layers=5)
    refused("num_layers 5, the model 4", "PREFIX_TUNING", num_layers=5)
    refused("num_attention_heads 1, the model 2", "PREFIX_TUNING", num_attention_heads=1)
    refused("give that by --model (org/base)", token_dim=64, base_model_name_or_path="org/base")
    refused("47 numbers a row, the model 48", tensors=one(lambda t: t[:, :47]))
    refused("2 x 4 layers x 2 x 10 = 160", "PREFIX_TUNING", tensors=one(lambda t: t[:, :80]))
    refused("num_virtual_tokens 5", tensors=one(lambda t: t[:4]))
    refused("of shape (5,)", tensors=one(lambda t: t[:, 0]))
    refused("torch.int64", tensors=one(lambda t: t.long()))
    refused("not finite", tensors=one(lambda t: t / 0))
    refused("merge or leave out", tensors=lambda x: x | {"lm_head.weight": torch.ones(2)})
    refused("prompt_embeddings alone", tensors=lambda x: {})
    # sizes of another model, with the same number of numbers a row
    other = hf(num_key_value_heads=1, head_dim=20)[1]
    refused("num_attention_heads 2, the model 1", "PREFIX_TUNING", model=llama.load(other))

    bad = tmp_path / "bad"
    for file, content, message in (
            ("adapter_model.safetensors", b"version https://git-lfs", "header is damaged"),
            ("adapter_model.safetensors", None, "No such file"),
            ("adapter_model.bin", b"\x80\x04.", "a pickle"),
            ("adapter_config.json", b"{", "adapter_config.json"),
            ("adapter_config.json", b"[1]", "expected dict"),
            ("adapter_config.json", None, "it is no adapter")):
        (bad / file).unlink(missing_ok=True) if content is None else (bad / file).write_bytes(
            content)
        with pytest.raises(ValueError) as e:
            from_peft(bad, model)
        assert message in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="give .*PREFIX_TUNING"):
        from_peft(tmp_path, model)  # one above
    with pytest.raises(UserError, match="no such folder"):
        from_peft(tmp_path / "nowhere", model)


def test_the_log_as_a_table():
    lines = [{"split": "baseline", "loss": 0.5, "f1": 10.0},
             {"step": 1, "split": "train", "loss": 0.25, "lr": 1e-3}]
    assert to_csv(lines) == ("step,split,loss,f1,lr\n,baseline,0.5,10.0,\n"
                                      "1,train,0.25,,0.001\n")
    assert to_csv([]) == "step,split\n"


# --------------------------------------------------------------------------------------------------
# the command line, on the bundled model

TEXT = "short answer\nBolu was born in Tarn.\nQuestion: Where was Bolu born?\nAnswer:"


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


@pytest.fixture
def made(tmp_path):
    """made(name, layers, **settings) -> the folder of a run with rows at these layers."""
    embeddings = load_file(TINY / "model.safetensors")["model.embed_tokens.weight"]

    def make(name, layers=(0,), **changes):
        g, folder = torch.Generator().manual_seed(len(layers)), tmp_path / name
        x = {f"layers.{i}": embeddings[torch.randperm(len(embeddings), generator=g)[:6]].float()
             for i in layers}
        np.save(tmp_path / "rows.npy", x[f"layers.{layers[0]}"].numpy())
        assert run("import", tmp_path / "rows.npy", "--model", "tiny", "--out", folder) == 0
        for file in ("prompt.safetensors", "prompts/000000.safetensors"):
            save_file(x, folder / file)
        change(folder, **changes)
        return folder

    return make


def change(folder, **changes):
    """Change a run's settings. Its prompts become those of an early version, which did not say
    whose they are."""
    config = json.loads((folder / "config.json").read_text())
    config["settings"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("prompt.safetensors", "prompts/000000.safetensors"):
        save_file(load_file(folder / file), folder / file)


def answers(folder, capsys):
    capsys.readouterr()
    assert run("generate", folder, TEXT) == 0
    return capsys.readouterr().out


def test_to_peft_and_back_by_the_command_line(made, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    first, vocabulary = made("first"), data.Vocabulary(TINY, (1,))
    assert run("export", first, "--to", tmp_path / "adapter") == 0
    printed = capsys.readouterr()
    assert "PROMPT_TUNING, 6 virtual tokens of 192 numbers" in printed.out
    assert "give PEFT texts as AutoTokenizer makes them, with BOS in front" in printed.err
    assert "call generate with use_cache=False" in printed.err
    about = json.loads((tmp_path / "adapter/promptprior.json").read_text())
    assert about["bos"] == "tokenizer"
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "promptprior.json"}
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([vocabulary.encode(TEXT)])
    out = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                        max_new_tokens=32, pad_token_id=0)[0, ids.shape[1]:].tolist()
    answer = answers(first, capsys)
    assert vocabulary.first_line(out) == answer.rstrip("\n") and answer.strip()

    assert run("import", tmp_path / "adapter", "--out", tmp_path / "back") == 0  # its own base
    for file in ("prompt.safetensors", "prompts/000000.safetensors"):
        assert torch.equal(load_file(tmp_path / "back" / file)["layers.0"],
                           load_file(first / file)["layers.0"])
    assert answers(tmp_path / "back", capsys) == answer
    assert run("export", tmp_path / "back", "--to", tmp_path / "exported") == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "exported" / file).read_bytes() == (
            tmp_path / "adapter" / file).read_bytes()
    capsys.readouterr()
    assert run("eval", tmp_path / "back", "--limit", 2, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert "imported prompt" in scores and not (tmp_path / "back/metrics.jsonl").exists()
    assert run("compare", tmp_path / "back", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["scores"] is None
    assert run("sample", "--prior", f"posterior:{tmp_path / 'back'},resample=1", "--tokens", 6) == 0
    assert run("plot", tmp_path / "back", "--text") == 0

    # what is there stays, unless --overwrite says so of what export or import made
    for command, target in ((("export", first, "--to"), tmp_path / "exported"),
                            (("import", tmp_path / "adapter", "--out"), tmp_path / "back")):
        capsys.readouterr()
        assert run(*command, target) == 2 and "--overwrite" in capsys.readouterr().err
        assert run(*command, target, "--overwrite") == 0
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "mine").write_text("")
        assert run(*command, tmp_path / "full", "--overwrite") == 2
    # nothing to go on with
    capsys.readouterr()
    assert run("train", "--out", tmp_path / "back", "--resume") == 2
    assert "posterior:" in capsys.readouterr().err


@pytest.mark.parametrize("layers, changes", [
    ((0, 4, 5), {"deep_layers": 2}), (tuple(range(6)), {"cut": True, "deep_layers": 6}),
    ((0,), {"place": "after-bos"})])
def test_other_prompts_travel_as_keys_and_values(made, tmp_path, monkeypatch, capsys, layers,
                                                 changes):
    from transformers import AutoModelForCausalLM

    first, vocabulary = made("first", layers, **changes), data.Vocabulary(TINY, (1,))
    after_bos = "place" in changes
    assert run("export", first, "--to", tmp_path / "adapter") == 0
    shown = capsys.readouterr()
    assert f"PREFIX_TUNING, {6 + after_bos} virtual tokens of 768" in shown.out
    assert ("give PEFT texts without BOS" in shown.err) == after_bos
    answer = answers(first, capsys)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([vocabulary.encode(TEXT)[after_bos:]])
    out = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                        max_new_tokens=32, pad_token_id=0)[0, ids.shape[1]:].tolist()
    assert vocabulary.first_line(out) == answer.rstrip("\n") and answer.strip()
    assert run("import", tmp_path / "adapter", "--out", tmp_path / "back") == 0
    assert answers(tmp_path / "back", capsys) == answer
    stored = load_file(tmp_path / "back/prompt.safetensors")
    assert {k: v.shape for k, v in stored.items()} == {
        f"layers.{i}": (6, 2, 2, 32) for i in range(6)}
    assert run("export", tmp_path / "back", "--to", tmp_path / "exported") == 0
    exported, expected = (load_file(tmp_path / f / "adapter_model.safetensors")["prompt_embeddings"]
                          for f in ("exported", "adapter"))
    assert close(exported, expected)

    # and the instruments are open to it: at layer 0 these are keys and values of real tokens
    change(tmp_path / "back", reference_rows=500)
    monkeypatch.setattr(page, "DEEP", 60)
    capsys.readouterr()
    assert run("compare", tmp_path / "back", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)[0]["measures"]
    assert numbers["layer 0 trained"]["collapse"] < 1e-4 < numbers["layer 5 trained"]["collapse"]
    assert run("plot", tmp_path / "back") == 0 and (tmp_path / "back/report.html").exists()
    prior = f"posterior:{tmp_path / 'back'},resample=1"
    assert run("train", "--method", "prefix", "--prior", prior, "--tokens", 6, "--steps", 0,
               "--place", changes.get("place", "before"), "--eval-limit", 2,
               "--out", tmp_path / "next") == 0
    drawn = load_file(tmp_path / "next/prompt.safetensors")
    for key, rows in stored.items():
        torch.testing.assert_close(drawn[key], rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pieces, flags, said", [
    ("<s> $A", [], "texts as AutoTokenizer makes them, with BOS in front\n"),
    ("<s> $A </s>", [],
     "texts as AutoTokenizer makes them, with BOS in front, and drop the EOS that it adds\n"),
    ("$A", [], "texts as AutoTokenizer makes them, without BOS\n"),
    ("$A", ["--bos", "always"], "texts with BOS, token 0, in front (--bos always), because "
     "AutoTokenizer puts none there\n")], ids=["BOS", "BOS and EOS", "neither", "always BOS"])
def test_how_texts_are_tokenised_is_said(tmp_path, capsys, pieces, flags, said):
    """Followed to the letter, the line turns AutoTokenizer's tokens into the run's."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(MODEL, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert run("train", "--model", folder, *flags, "--data", "math", "--tokens", 2, "--steps", 0,
               "--text", "", "--eval-limit", 2, "--out", tmp_path / "r") == 0
    capsys.readouterr()
    assert run("export", tmp_path / "r", "--to", tmp_path / "adapter") == 0
    assert f"give PEFT {said}" in capsys.readouterr().err
    ids = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(TEXT).input_ids
    ids = [0] * ("--bos always" in said) + ids[:-1 if "drop the EOS" in said else None]
    assert (ids[0] == 0) == ("without BOS" not in said)
    assert ids == open_run(tmp_path / "r", {}).vocabulary.encode(TEXT)


def test_the_last_virtual_token_is_bos_or_not(made, tmp_path, capsys):
    """What promptprior.json says is not believed."""
    for name, keep in (("other", 6), ("one", 1)):
        folder = tmp_path / f"{name}-adapter"
        assert run("export", made(name, (0,), place="after-bos"), "--to", folder) == 0
        x = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"][:keep].clone()
        save_file({"prompt_embeddings": x}, folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(
            config | {"num_virtual_tokens": keep}))
        capsys.readouterr()
        assert run("import", folder, "--out", tmp_path / "back") == 2
        assert "its last virtual token is BOS, and it is not" in capsys.readouterr().err
        assert not (tmp_path / "back").exists()


def test_mistakes_are_one_line(made, tmp_path, capsys):
    first = made("first")
    assert run("export", first, "--to", tmp_path / "adapter") == 0
    deep = made("deep", (0, 5), cut=True, deep_layers=1)
    suffix = made("suffix", place="suffix")
    other = tmp_path / "other"
    shutil.copytree(TINY, other, ignore=shutil.ignore_patterns("squad", "math", "text"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors")
    lost = tmp_path / "lost"
    shutil.copytree(tmp_path / "adapter", lost)
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {
        "base_model_name_or_path": "/nowhere"}))
    unnamed = tmp_path / "rows.npy"
    out = "--out", tmp_path / "new"
    for arguments, message in (
            (("export", first), "--to DIR"), (("export", tmp_path, "--to", "x"), "no run is here"),
            (("export", deep, "--to", out[1]), "layers 1, 2, 3, 4 have no part"),
            (("export", suffix, "--to", out[1]), "--place before"),
            (("export", first, "--to", out[1], "--model", other), "other weights"),
            (("import", tmp_path / "adapter", "--model", other, *out), "other weights"),
            (("import", lost, *out), "no such folder"), (("import", unnamed, *out), "give --model"),
            (("import", tmp_path / "nowhere", *out), "no such folder"),
            (("import", tmp_path / "adapter"), "--out")):
        capsys.readouterr()
        try:
            assert run(*arguments) == 2
        except SystemExit as e:
            assert e.code == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
        assert not out[1].exists()


def test_an_adapter_that_reads_back_otherwise_is_removed(made, tmp_path, monkeypatch, capsys):
    """A disk that keeps other numbers than were written."""
    first, write = made("first"), Folder.write

    def damaging(folder, name, content):
        if name == "adapter_model.safetensors":
            content = content[:-400] + bytes(400)  # 100 numbers become zeros
        write(folder, name, content)

    monkeypatch.setattr(Folder, "write", damaging)
    assert run("export", first, "--to", tmp_path / "adapter") == 1
    assert "removed" in capsys.readouterr().err and not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    assert run("export", first, "--to", tmp_path / "adapter") == 0


def test_the_log_by_the_command_line(made, tmp_path, capsys):
    first = made("first")
    log = {"split": "eval", "step": 0, "loss": 0.5}
    (first / "metrics.jsonl").write_text(json.dumps(log) + "\n")
    capsys.readouterr()
    assert run("export", first, "--csv") == 0
    assert capsys.readouterr().out == "step,split,loss\n0,eval,0.5\n"
    assert run("export", first, "--csv", tmp_path / "log.csv") == 0
    assert (tmp_path / "log.csv").read_text() == "step,split,loss\n0,eval,0.5\n"
    # only a table is overwritten, and that when it is asked for
    before = (first / "metrics.jsonl").read_bytes()
    for file, more in ((tmp_path / "log.csv", []), (first / "metrics.jsonl", ["--overwrite"])):
        assert run("export", first, "--csv", file, *more) == 2
        assert "exists" in capsys.readouterr().err
    assert (first / "metrics.jsonl").read_bytes() == before
    assert run("export", first, "--csv", tmp_path / "log.csv", "--overwrite") == 0
