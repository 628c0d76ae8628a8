"""The encoder of a T5 against transformers' T5EncoderModel, and the commands that take it."""

import json
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import data
import llama
import promptprior
from lab import t5
from lab.activations import Collection
from lab.console import UserError
from lab.foreign_models import explained

ROOT = Path(promptprior.__file__).parent
WEIGHTS = "model.safetensors"
SHAPES = {
    "t5": {"feed_forward_proj": "relu"},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    # of flan-t5-small the heads together are not as wide as the model
    "flan": {"feed_forward_proj": "gated-gelu", "num_heads": 6, "d_kv": 4, "num_layers": 3,
             "tie_word_embeddings": False},
    "silu": {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 8,
             "relative_attention_max_distance": 20},
}


def tokenizer() -> Tokenizer:
    """As those of published T5s, but for the vocabulary."""
    pieces = [(c, -5.0 - i / 100) for i, c in enumerate(string.printable[:94])]
    pieces += [("▁", -2.0), ("▁the", -1.0), ("▁Question", -1.5), ("er", -2.5)]
    extra = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces,
                  *((token, 0.0) for token in extra)]
    t = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    t.decoder = decoders.Metaspace()
    t.post_processor = processors.TemplateProcessing(single="$A </s>",
                                                     special_tokens=[("</s>", 1)])
    t.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    return t


@pytest.fixture
def made(tmp_path):
    """made(shape, **changes) -> (transformers' encoder, the folder of the whole model)."""
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    def make(shape="t5", **changes):
        torch.manual_seed(0)
        small = {"vocab_size": 240, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_heads": 4,
                 "num_layers": 2}
        config = T5Config(**{**small, **SHAPES[shape], **changes})
        folder = tmp_path / f"a {shape}{len(list(tmp_path.iterdir()))}"
        T5ForConditionalGeneration(config).save_pretrained(folder)
        tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}))
        return T5EncoderModel.from_pretrained(folder).eval(), folder

    return make


def run(*arguments):
    return promptprior.main([str(a) for a in arguments])


def refused(capsys, *arguments):
    """The one line of an error."""
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --------------------------------------------------------------------------------------------------
# the encoder


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_are_transformers(made, shape):
    """Of texts of several lengths in one batch, longer than the farthest distance with a bucket of
    its own."""
    theirs, folder = made(shape)
    encoder = t5.load(folder)
    ids = torch.randint(3, 240, (3, 300), generator=torch.Generator().manual_seed(1))
    real = torch.arange(300) < torch.tensor([[300], [1], [170]])
    with torch.no_grad():
        states = theirs(ids, attention_mask=real.long(), output_hidden_states=True).hidden_states
    taken = {}
    encoder.inputs(ids.masked_fill(~real, llama.PAD), None, taken.__setitem__, len(states) - 1)
    assert list(taken) == list(range(len(states)))
    for i, x in taken.items():
        torch.testing.assert_close(x, states[i][real], atol=1e-5, rtol=1e-5)
    first = {}
    encoder.inputs(ids, None, first.__setitem__, 1)
    assert list(first) == [0, 1]
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("count, most", [(32, 128), (8, 20), (4, 2), (64, 1000)])
def test_buckets_are_transformers(count, most):
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(700)
    theirs = T5Attention._relative_position_bucket(place[None] - place[:, None], True, count, most)
    assert torch.equal(t5.position_buckets(700, count, most), theirs)


def test_folders_of_the_encoder_alone_and_under_a_prefix(made, tmp_path):
    theirs, folder = made()
    theirs.save_pretrained(tmp_path / "alone")
    expected = t5.load(folder).state_dict()
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    (wrapped / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({f"transformer.{k}": t for k, t in load_file(folder / WEIGHTS).items()},
              wrapped / WEIGHTS)
    for other in (tmp_path / "alone", wrapped):
        state = t5.load(other).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k]) for k in state)


def test_embeddings_of_the_encoders_own(made):
    """Two matrices in the file: the encoder has its own, as in transformers."""
    from transformers import T5EncoderModel

    _, folder = made()
    tensors = load_file(folder / WEIGHTS)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    theirs = T5EncoderModel.from_pretrained(folder).encoder.embed_tokens.weight
    assert torch.equal(t5.load(folder).embeddings, theirs)


def test_the_tokenizer_is_transformers(made):
    from transformers import AutoTokenizer

    _, folder = made()
    ours, theirs = data.Vocabulary(folder, (1,)), AutoTokenizer.from_pretrained(folder)
    assert not ours.remarks and ours.behind == [1]
    for text in ("", "the cat", " Question:\n\n the  other?", "<extra_id_3> the", "ö </s> x"):
        assert ours.encode(text) + ours.behind == theirs(text).input_ids


# --------------------------------------------------------------------------------------------------
# commands


def test_collect_reads_texts_as_their_tokenizer_ends_them(made, tmp_path, capsys):
    """</s> is seen by every token and is no row; texts are cut at the length of the training."""
    from transformers import AutoTokenizer

    theirs, folder = made()
    change(folder, n_positions=60)
    path = tmp_path / "c.safetensors"
    assert run("collect", "--model", folder, "--data", "text", "math", "--layers", "all",
               "--examples", 9, "--out", path) == 0
    assert "line break" not in capsys.readouterr().err
    file, tokenize = Collection(path), AutoTokenizer.from_pretrained(folder)
    texts, lengths = data.read("text", str(ROOT / "tiny/text")), set()
    index = file.chosen("text")
    for i in file.field["example"][index].unique().tolist():
        mine = index[file.field["example"][index] == i]
        ids = tokenize(texts[i].context, truncation=True, max_length=60).input_ids
        lengths.add(len(ids))
        assert file.field["token"][mine].tolist() == ids[:-1]
        with torch.no_grad():
            states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in range(3):
            torch.testing.assert_close(file.rows(layer, mine), states[layer][0, :-1], atol=2e-5,
                                       rtol=2e-5)
    assert 60 in lengths
    assert run("compare", path) == 0


def test_figure_5_is_drawn(made, tmp_path, capsys):
    _, folder = made("flan")
    command = "figures", "--model", folder, "--out", tmp_path / "F", "--examples", 12
    assert run(*command, 5) == 0
    svg = (tmp_path / "F/figure-05-mean-activations.svg").read_text()
    assert f"Model {folder.name}" in svg
    assert "an encoder" in refused(capsys, *command, 4, 5)


def test_other_commands_say_what_takes_an_encoder(made, tmp_path, capsys):
    """And what the line says, goes."""
    _, folder = made()
    trained = tmp_path / "run"
    assert run("train", "--steps", 0, "--eval-limit", 2, "--max-new", 2, "--out", trained) == 0
    new = tmp_path / "new"
    for command in (("train", "--out", new), ("sample",), ("figures", "--out", new),
                    ("eval", trained), ("generate", trained, "a"), ("compare", trained),
                    ("attention", trained), ("plot", trained), ("export", trained, "--to", new),
                    ("interpolate", trained, trained), ("collect", "--under", trained)):
        line = refused(capsys, *command, "--model", folder)
        assert "an encoder (model_type t5)" in line and not new.exists(), command
    commands = re.findall(r"`(.*?)`", line)
    for command, rest in zip(commands, (["--examples", 3, "--out", tmp_path / "c"],
                                        ["--examples", 12, "--out", tmp_path / "F"])):
        assert run(*shlex.split(command), *rest) == 0
    # a collection of it is compared, and the run after it is not opened with it
    assert "an encoder" in refused(capsys, "compare", tmp_path / "c", trained, "--model", folder)


# --------------------------------------------------------------------------------------------------
# folders that cannot be loaded


def test_bad_configurations(made, capsys):
    _, folder = made()
    for field, value, text in (("feed_forward_proj", "gated-swish", "relu, gated-gelu"),
                               ("feed_forward_proj", ["relu"], "is ['relu'], and only"),
                               ("d_model", "wide", "d_model is 'wide', expected a whole number"),
                               ("num_heads", 0, "num_heads is 0"),
                               ("relative_attention_max_distance", 8, "a quarter of the 32")):
        before = json.loads((folder / "config.json").read_text())[field]
        change(folder, **{field: value})
        assert text in refused(capsys, "collect", "--model", folder), field
        change(folder, **{field: before})
    t5.load(folder)


def test_bad_weights(made, capsys):
    _, folder = made()
    tensors, name = load_file(folder / WEIGHTS), "encoder.block.1.layer.1.DenseReluDense.wo.weight"

    def line(changed):
        save_file(changed, folder / WEIGHTS, {"format": "pt"})
        return refused(capsys, "collect", "--model", folder)

    assert f"lack 1 tensors that config.json asks for, first {name!r}" in line(
        {k: t for k, t in tensors.items() if k != name})
    codes = {name: tensors[name].to(torch.int8), name.replace("weight", "SCB"): torch.ones(1)}
    change(folder, quantization_config={"quant_method": "bitsandbytes"})
    quantised = line(tensors | codes)
    assert "quantised by bitsandbytes (2 of" in quantised
    assert "import T5EncoderModel as A" in quantised
    change(folder, quantization_config=None)
    assert "has shape (3, 3), config.json asks for" in line(tensors | {name: torch.ones(3, 3)})
    assert "not finite: fetch" in line(tensors | {name: tensors[name] / 0}).replace(
        "that are ", "")
    assert "merge_and_unload" in line(tensors | {
        name.replace("weight", "lora_A.default.weight"): torch.ones(1)})


def test_pickled_weights(made, tmp_path):
    theirs, folder = made()
    (folder / WEIGHTS).unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError) as e, explained():
        t5.load(folder)
    command = re.search(r"`(python -c .*?)`", str(e.value))[1]
    subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True,
                   cwd=tmp_path, check=True, capture_output=True)
    torch.testing.assert_close(t5.load(tmp_path / "NEW").embeddings, theirs.shared.weight)


def test_an_end_that_is_not_embedded(made, capsys):
    _, folder = made()
    tensors = load_file(folder / WEIGHTS)
    t = tokenizer()
    t.add_special_tokens([f"<more{i}>" for i in range(60)])
    t.post_processor = processors.TemplateProcessing(single="$A <more59>", special_tokens=[
        ("<more59>", t.token_to_id("<more59>"))])
    t.save(str(folder / "tokenizer.json"))
    assert t.token_to_id("<more59>") >= len(tensors["shared.weight"])
    assert "behind every text, and the model embeds 240" in refused(capsys, "collect", "--model",
                                                                    folder)
