"""What a model's folder is that llama.py, t5.py or data.Vocabulary cannot read, and what helps.

They read good folders, and of others they say what these lack. Here the same error says what the
folder or the file is instead, with the path to give or the command that converts it.

    with explained():
        model = architecture(folder).load(folder)
    check_tokenizer(folder)
"""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Iterator

import data
import llama
from lab import t5
from lab.console import UserError
from lab.foreign_data import STAND_INS, not_foreign

# the line that makes a folder in Hugging Face's layout
SAVE = "`python -c \"import sys; from transformers import {{model_class}} as A; " \
       "A.from_pretrained(sys.argv[1]{}).save_pretrained('NEW')\" {{quoted_folder}}{}`"
THEN = ", copy the tokenizer's files there, and give NEW"

META = ("this is Meta's own layout: fetch the model in Hugging Face's layout (`hf download NAME "
        "--exclude 'original/*'`); or convert it with convert_llama_weights_to_hf.py of "
        "transformers 4")

# files that tell a folder's kind -> what it is, and what to do. {file} is the first such file.
KINDS = {
    "adapter_config.json": "this is an adapter, not a model: give --model the model that "
                           "{file} names as base_model_name_or_path",
    "checkpoint-*/adapter_config.json": "this holds checkpoints of an adapter, not a model: give "
                                        "--model the model that {file} names as "
                                        "base_model_name_or_path",
    "consolidated*": META, "original/consolidated*": META,
    "*.gguf": "{file.name} is GGUF, which is quantised: give the folder it was made from; or run "
              + SAVE.format(", gguf_file=sys.argv[2]", " {quoted_file}") + THEN,
    "pytorch_model*.bin": "the weights are pickled, and a pickle may run code: if you trust it, "
                          "run " + SAVE.format("", "") + THEN,
}
# A tokenizer in another form -> the class that reads it. AutoTokenizer takes another class where no
# tokenizer_config.json names one, and then other tokens.
TOKENIZERS = {"tokenizer.model": "LlamaTokenizer", "vocab.json": "GPT2Tokenizer"}
PICKLES = "pytorch_model.bin.index.json"  # names the files of pickled weights


def is_encoder(folder: Path) -> bool:
    """Whether config.json says T5. Of one that cannot be read the loader says what is wrong."""
    with contextlib.suppress(llama.ModelError):
        return llama.read_json(folder / "config.json").get("model_type") == "t5"
    return False


def architecture(folder: Path, encoders: bool = False) -> ModuleType:
    """The module that reads a model's folder, by read_config and load: llama, or if encoders are
    wanted, too, t5. Raises UserError for an encoder that is not."""
    if not is_encoder(folder):
        return llama
    if not encoders:
        raise UserError(f"{folder}: an encoder (model_type t5), which has no place for a prompt: "
                        f"read it by `collect --model {shlex.quote(str(folder))}`, draw it by "
                        f"`figures 5 --model {shlex.quote(str(folder))}`, and give a LLaMA here")
    return t5


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn llama's error of a file that is missing, or is not what its name says, into a UserError
    that says what is there instead, if this is known here."""
    try:
        yield
    except llama.FileError as e:
        not_foreign(e.path, STAND_INS)
        explanation = None if e.path.exists() else _other_folder(e.path)
        if not explanation:
            raise
        raise UserError(f"{e.path}: {explanation}") from None


def check_tokenizer(folder: Path) -> None:
    """Raise UserError if a model's folder has its tokenizer in another form than tokenizer.json, or
    if something else was saved as one of the tokenizer's files."""
    others = [name for name in (*TOKENIZERS, "spiece.model") if (folder / name).exists()]
    of_encoder = "spiece.model" in others and is_encoder(folder)
    if others == ["spiece.model"] and not of_encoder and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder / 'tokenizer.json'}: no such file: the folder has spiece.model: "
                        "rename it to tokenizer.model")
    if others and not (folder / "tokenizer.json").is_file():
        tokenizer_class = "T5Tokenizer" if of_encoder else TOKENIZERS[others[0]]
        raise UserError(f"{folder / 'tokenizer.json'}: no such file: the folder has {others[0]}, "
                        "from which `python -c \"import sys; from transformers import "
                        f"{tokenizer_class} as T; T.from_pretrained(sys.argv[1])"
                        f".save_pretrained(sys.argv[1])\" {shlex.quote(str(folder))}` makes it "
                        "(pip install transformers sentencepiece protobuf)")
    for path in sorted(folder.glob("*token*.json")):
        not_foreign(path)


def _other_folder(path: Path) -> str | None:
    """What a folder is that lacks the file at path, its configuration or its weights."""
    folder = path.parent
    model_class = t5.MODEL_CLASS if is_encoder(folder) else "AutoModelForCausalLM"
    explanation = (_renamed_weights(path) or _cache(folder) or _checkpoints(folder)
                   or _pickled_shards(folder))
    for pattern, text in KINDS.items():
        files = sorted(folder.glob(pattern))
        if files and not explanation:
            for file in files:
                not_foreign(file, STAND_INS)
            explanation = text.format(file=files[0], quoted_file=shlex.quote(files[0].name),
                                      quoted_folder=shlex.quote(str(folder)),
                                      model_class=model_class)
    explanation = explanation or _incomplete_cache(folder) or _subfolder(folder)
    return explanation and f"no such file: {explanation}"


def _renamed_weights(path: Path) -> str | None:
    others = [p.name for p in path.parent.glob("*.safetensors")
              if not re.match("adapter|consolidated", p.name)]
    if path.suffix == ".safetensors" and len(others) == 1:
        return f"the weights are in {others[0]}: rename it to model.safetensors"
    return None


def _cache(folder: Path) -> str | None:
    """A model's folder in the hub's cache, or the one of its versions: give the version that the
    branch main is, or else the newest."""
    snapshots = folder if folder.resolve().name == "snapshots" else folder / "snapshots"
    versions = {p.parent.name: p.parent for p in snapshots.glob("*/config.json")}
    if not versions:
        return None
    main = snapshots / "../refs/main"
    commit = data.read_text(main, most=1000).strip() if main.is_file() else ""
    newest = max(versions.values(), key=lambda version: version.stat().st_mtime)
    return f"this is a model's root in the hub's cache: give {versions.get(commit, newest)}"


def _incomplete_cache(folder: Path) -> str | None:
    """A folder in the hub's cache that lacks files."""
    place = folder.resolve()
    root = next((p for p in (place, *place.parents) if p.name.startswith("models--")), None)
    if not root:
        return None
    name = root.name.removeprefix("models--").replace("--", "/", 1)
    revision = f" --revision {place.name}" if place.parent.name == "snapshots" else ""
    return (f"this is in the hub's cache, where no download of it is whole: run `hf download {name}"
            f"{revision}`, and give {name}{revision}")


def _subfolder(folder: Path) -> str | None:
    configs = list(folder.glob("*/config.json"))
    return f"the model is in a folder here: give {configs[0].parent}" if len(configs) == 1 else None


def _checkpoints(folder: Path) -> str | None:
    """A trainer's output, whose subfolders hold the model as it was after so many steps."""
    steps = {int(p.parent.name.removeprefix("checkpoint-")): p.parent
             for p in folder.glob("checkpoint-*/config.json")
             if re.fullmatch(r"checkpoint-\d+", p.parent.name, re.A)}
    if not steps:
        return None
    newest = steps[max(steps)]
    lacks = "" if (newest / "tokenizer.json").exists() else (
        ", after you have copied the tokenizer's files there")
    return f"this is a trainer's output, and the model is in its checkpoints: give {newest}{lacks}"


def _pickled_shards(folder: Path) -> str | None:
    """Pickled weights of which files are missing. Of whole ones the kind is told by their names."""
    if not (folder / PICKLES).exists():
        return None
    places = data.read_json(folder / PICKLES, dict).get("weight_map")
    files = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    missing = [name for name in files if not (folder / name).exists()]
    if not missing:
        return None
    return (f"the weights are pickled, and {len(missing)} of the {len(files)} files that {PICKLES} "
            f"names are missing, first {missing[0]!r:.80}: fetch them, or the model with "
            "safetensors weights")
