"""A folder's tokenizer with the files beside it: the ids of transformers' AutoTokenizer."""

import json
import shutil

import pytest
import torch
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors)

import data
import promptprior
from lab import activations, inputs, populations
from lab.settings import TINY, DataSettings, ModelSettings, PriorSettings

TEXTS = ["", "ab", " ab 12 ab", "  two", "Question: 12 or 1212?\nAnswer: 12\n", "Öl 猫",
         "ab<s>ab</s> ab", "x<pad>ab <|im_start|> y[PAD]  <image>z<tool>hello ab", "a<unk>b<eos>"]


def byte_level(special=("<s>", "<eos>")) -> Tokenizer:
    merges = [("r", ":"), ("?", "Ċ"), ("e", "r:"), ("Ġ", "x"), ("1", "2"), ("a", "b")]
    tokens = ["<s>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()),
              *(a + b for a, b in merges)]
    t = Tokenizer(models.BPE({piece: i for i, piece in enumerate(tokens)}, merges))
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    t.add_special_tokens([*special])
    return t


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it."""
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁"), ("1", "2"), ("▁a", "b")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)),
              *"abcdefghijklmnopqrstuvwxyzQA0123456789?:▁", *(a + b for a, b in merges)]
    t = Tokenizer(models.BPE({piece: i for i, piece in enumerate(tokens)}, merges,
                             unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return t


def lay_out(folder, tokenizer, files):
    """A model's folder, without the model. files: {name: JSON value}"""
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in ({"config.json": {}} | files).items():
        value = {"model_type": "llama"} | value if name == "config.json" else value
        (folder / name).write_text(json.dumps(value))


def ids_of_both(folder, **options):
    """The ids of every text: ours and AutoTokenizer's, with BOS and without."""
    from transformers import AutoTokenizer

    ours, theirs = data.Vocabulary(folder, **options), AutoTokenizer.from_pretrained(folder)
    return ([ours.encode(x) for x in TEXTS] + [ours.encode_plain(x) for x in TEXTS],
            [theirs(x).input_ids for x in TEXTS]
            + [theirs(x, add_special_tokens=False).input_ids for x in TEXTS])


def described(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, "special": True} | flags


def typed(content, **flags):
    """As it stands in a field such as pad_token."""
    return {"__type": "AddedToken"} | {
        k: v for k, v in described(content, **flags).items() if k != "special"}


SETTINGS = {  # what tokenizer_config.json may say of tokens
    "by number": {"added_tokens_decoder": {
        "900": described("<tool>", special=False), "901": described("<image>")}},
    "numbers out of order": {"added_tokens_decoder": {
        "905": described("<tool>"), "20": described("<image>"), "1000": described("[PAD]")}},
    "with other flags": {"added_tokens_decoder": {
        "900": described("<image>", lstrip=True, rstrip=True)}},
    "named": {"pad_token": "<pad>", "eos_token": "<|im_start|>", "bos_token": "<s>"},
    "named and described": {"pad_token": typed("[PAD]", rstrip=True), "unk_token": typed("<unk>")},
    "named twice": {"eos_token": "<|im_start|>", "pad_token": typed("<|im_start|>", lstrip=True)},
    "of the vocabulary": {"pad_token": "12"},
    "additional": {"additional_special_tokens": ["<tool>", typed("<image>", lstrip=True)]},
    "extra": {"extra_special_tokens": ["<image>", "<tool>"],
              "additional_special_tokens": ["<pad>"]},
    "extra with names": {"extra_special_tokens": {"image_token": "<image>"},
                         "tool_token": "<tool>", "additional_special_tokens": ["<pad>"]},
    "special tokens are divided": {"split_special_tokens": True},
}
OLDER = {  # and what older files beside it say
    "added_tokens.json": {"added_tokens.json": {"<tool>": 901, "<image>": 900},
                          "tokenizer_config.json": {"pad_token": "<tool>"}},
    "special_tokens_map.json": {"special_tokens_map.json": {
        "pad_token": "<pad>", "eos_token": described("<|im_start|>", lstrip=True),
        "additional_special_tokens": ["<image>"]}},
    "both, and settings that replace them": {
        "added_tokens.json": {"<tool>": 900}, "special_tokens_map.json": {"pad_token": "<pad>"},
        "tokenizer_config.json": {"added_tokens_decoder": {"900": described("<image>")}}},
}
FILES = {name: {"tokenizer_config.json": c} for name, c in SETTINGS.items()} | OLDER


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("declared", [None, "PreTrainedTokenizerFast"])
def test_tokens_of_the_files_beside(tmp_path, make, name, declared):
    files = dict(FILES[name])
    if declared:
        c = files.get("tokenizer_config.json", {})
        files["tokenizer_config.json"] = {"tokenizer_class": declared} | c
    lay_out(tmp_path, make(), files)
    ours, theirs = ids_of_both(tmp_path)
    assert ours == theirs
    assert not data.Vocabulary(tmp_path).remarks
    for file in files:
        if file != "config.json":
            (tmp_path / file).unlink()
    assert ids_of_both(tmp_path)[0] != ours  # so that the files matter


def test_the_token_of_padding_is_one(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_padding(length=50)
    lay_out(tmp_path, tokenizer, {})
    ours, theirs = ids_of_both(tmp_path)
    assert ours == [ids[:len(own)] for ids, own in zip(theirs, ours)]  # theirs are padded
    assert data.Vocabulary(tmp_path).encode_plain("[PAD]") == [tokenizer.get_vocab_size()]


CLASSES = [
    {"tokenizer_class": "LlamaTokenizer"},
    {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False},
    {"tokenizer_class": "LlamaTokenizer", "bos_token": None, "eos_token": "ab",
     "pad_token": "<pad>"},
    {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True},
    {"tokenizer_class": "GPT2Tokenizer"},
    {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "add_bos_token": True},
    {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True, "legacy": True,
     "add_bos_token": False, "add_eos_token": True},
    {"tokenizer_class": "TokenizersBackend"}, {"add_prefix_space": True}]


@pytest.mark.parametrize("settings", CLASSES)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_classes(tmp_path, make, settings):
    """Two of them put another pre-tokenizer in the place of tokenizer.json's."""
    lay_out(tmp_path, make(), {"tokenizer_config.json": settings})
    ours, theirs = ids_of_both(tmp_path)
    assert ours == theirs
    if "tokenizer_class" in settings and len(settings) == 1:  # config.json may say it, too
        lay_out(tmp_path, make(), {"tokenizer_config.json": {}, "config.json": settings})
        assert ids_of_both(tmp_path) == (ours, ours)


def test_what_the_class_of_llama_2_changes_is_small(tmp_path):
    """A text that begins with a space, and what follows a special token: nothing is said."""
    lay_out(tmp_path, sentencepiece(), {"tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer", "legacy": False}})
    own = data.Vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    alone = data.Vocabulary(tmp_path)
    changed = [x for x in TEXTS if own.encode(x) != alone.encode(x)]
    assert changed and all(x[:1] == " " or "<" in x for x in changed) and not own.remarks


@pytest.mark.parametrize("make, settings, said", [
    (byte_level, {"tokenizer_class": "GPT2Tokenizer"},
     "GPT2Tokenizer makes other tokens of some texts"),
    (sentencepiece, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
     "LlamaTokenizer makes other tokens of some texts"),
    (byte_level, {"tokenizer_class": "Qwen2TokenizerFast"}, "Qwen2TokenizerFast may make other"),
    (sentencepiece, {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {}},
     "LlamaTokenizer knows 3 tokens of tokenizer.json only if")])
def test_a_class_that_changes_texts_is_said_and_the_remedy_is_one(tmp_path, make, settings, said):
    tokenizer = make()
    tokenizer.add_tokens(["<tool>", AddedToken("<image>", special=True)])
    if "added_tokens_decoder" in settings:
        known = tokenizer.get_added_tokens_decoder()
        settings = settings | {"added_tokens_decoder": {
            str(i): described(t.content) for i, t in known.items() if t.content == "<tool>"}}
        tokenizer.add_tokens(["[PAD]", "<pad>"])
    lay_out(tmp_path, tokenizer, {"tokenizer_config.json": settings})
    ours, theirs = ids_of_both(tmp_path)
    (remark,) = data.Vocabulary(tmp_path).remarks
    assert f"{tmp_path}/tokenizer_config.json: transformers' {said}" in remark
    assert (ours == theirs) == ("makes" in said)
    assert 'write "tokenizer_class": "PreTrainedTokenizerFast" there' in remark
    lay_out(tmp_path, tokenizer, {"tokenizer_config.json": settings | {
        "tokenizer_class": "PreTrainedTokenizerFast"}})
    after, theirs = ids_of_both(tmp_path)
    assert after == theirs and not data.Vocabulary(tmp_path).remarks
    assert (after == ours) == ("may make" in said)


def test_a_new_token_is_refused_only_in_a_text_that_has_it(tmp_path):
    """The model embeds what tokenizer.json has, as one does whose tokens nobody trained."""
    tokenizer = byte_level()
    lay_out(tmp_path, tokenizer, {"tokenizer_config.json": {"pad_token": "<pad>"}})
    N = tokenizer.get_vocab_size()
    vocabulary = data.Vocabulary(tmp_path, embedded=N)
    assert vocabulary.unembedded == {N: "<pad>"} and N not in vocabulary.ordinary
    assert vocabulary.encode("ab") == data.Vocabulary(tmp_path).encode("ab")
    with pytest.raises(data.DataError, match=f"a text has the token '<pad>', number {N}"):
        vocabulary.encode("a<pad>b")


@pytest.mark.parametrize("files, chosen", [
    (["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.5.1.json", "tokenizer.9.9.json"],
     "tokenizer.5.1.json"),
    (["tokenizer.json"], None), (["tokenizer.9.9.json"], None)])
@pytest.mark.filterwarnings("ignore")
def test_a_file_for_a_version_of_transformers_is_said(tmp_path, files, chosen):
    """And may be copied."""
    transformers = pytest.importorskip("transformers")
    byte_level().save(str(tmp_path / "tokenizer.json"))
    other = byte_level()
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for name in ("tokenizer.4.0.0.json", "tokenizer.5.1.json", "tokenizer.9.9.json"):
        other.save(str(tmp_path / name))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "fast_tokenizer_files": files}))
    vocabulary = data.Vocabulary(tmp_path)
    assert [chosen in remark for remark in vocabulary.remarks] == [True] * bool(chosen)
    expected = transformers.AutoTokenizer.from_pretrained(str(tmp_path))("ab 12").input_ids
    assert (vocabulary.encode("ab 12") == expected) == (not chosen)
    if chosen:
        shutil.copy(tmp_path / chosen, tmp_path / "tokenizer.json")
        vocabulary = data.Vocabulary(tmp_path)
        assert not vocabulary.remarks and vocabulary.encode("ab 12") == expected


@pytest.mark.parametrize("name, content", [
    ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"contents": "a"}}}'),
    ("tokenizer_config.json", '{"additional_special_tokens": 5}'),
    ("tokenizer_config.json", '{"additional_special_tokens": [5]}'),
    ("tokenizer_config.json", '{"pad_token": {"content": 5}}'),
    ("added_tokens.json", '{"a": "x", "b": 4}'), ("added_tokens.json", '{"\\ud800": 4}'),
    ("special_tokens_map.json", '{"pad_token": {"content": []}}')])
def test_files_that_are_none(tmp_path, capfd, name, content):
    lay_out(tmp_path, byte_level(), {})
    (tmp_path / name).write_text(content)
    with pytest.raises(data.DataError) as e:
        data.Vocabulary(tmp_path)
    assert str(tmp_path) in str(e.value) and "fetch" in str(e.value) and "\n" not in str(e.value)
    assert not "".join(capfd.readouterr())


def test_two_tokens_that_are_bos_are_both_special(tmp_path, capsys):
    """Texts begin with the tokenizer's own."""
    for path in TINY.glob("*.*"):
        shutil.copy(path, tmp_path)
    ordinary = data.Vocabulary(TINY).ordinary
    other = ordinary[7]
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": other}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    loaded = inputs.load_model(ModelSettings(model=str(tmp_path), device="cpu").complete())
    said = capsys.readouterr().err
    assert "puts token 0 in front of a text, as in transformers, and config.json's bos_token_id " \
        f"is {other}: both count as special" in said and said.count("\n") == 2
    assert "transformers' Qwen2Tokenizer may make other tokens of some texts" in said
    assert loaded.vocabulary.encode("a")[0] == 0 and {0, other} < loaded.vocabulary.special
    assert loaded.vocabulary.ordinary == [i for i in ordinary if i != other]
    assert promptprior.main(["sample", "--model", str(tmp_path), "--tokens", "4"]) == 0
    assert capsys.readouterr().err.count("both count as special") == 1


@pytest.mark.parametrize("other, left_out", [("<|end_of_text|>", 3), ("a", 2)])
def test_every_bos_inside_a_text_is_left_out_of_fits(tmp_path, other, left_out):
    """The tokenizer's own, and config.json's, unless that is an ordinary token."""
    for path in TINY.glob("*.*"):
        shutil.copy(path, tmp_path)
    config = json.loads((TINY / "config.json").read_text())
    bos = data.Vocabulary(TINY).tokenizer.token_to_id(other)
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": bos}))
    (tmp_path / "x.json").write_text(json.dumps(
        {"text": "a cat<|begin_of_text|> a<|end_of_text|> dog"}))
    model, spec = ["--model", str(tmp_path)], f"text:{tmp_path / 'x.json'}"
    path = tmp_path / "acts.safetensors"
    assert promptprior.main(["collect", *model, "--data", spec, "--out", str(path)]) == 0
    file = activations.Collection(path)
    assert int((file.field["role"] == activations.ROLES.index("bos")).sum()) == left_out
    loaded = inputs.load_model(ModelSettings(model=str(tmp_path), device="cpu").complete())
    parts, count = populations.data_population(
        spec, PriorSettings(), DataSettings(max_length=99), loaded, [0, 6], None)
    kept = file.chosen()
    for layer in (0, 6):
        assert torch.equal(parts[layer].rows, file.rows(layer, kept).float())
    assert count == len(file.field["role"]) - left_out
