"""Adapters: a prompt as Hugging Face's PEFT loads it, and PEFT's prompts back.

    files = to_peft(model, rows, "meta-llama/Llama-3.2-1B")             # {name: bytes}
    files = to_peft(model, prompt.past(model), "meta-llama/Llama-3.2-1B")
    prompt = from_peft(Path("adapter"), model.config)                   # Prompt or Prefix of llama

PEFT knows two exact forms. Rows at the token embeddings whose outputs go on are PROMPT_TUNING. Any
other prompt that comes first never sees the text, so the keys and values that it leaves in the
layers are constants: run once and written down they are PREFIX_TUNING. Formats as peft 0.21 writes
and reads them. This module knows nothing of the command line, and writes nothing.

n prompt rows, D width, L layers, G key/value heads, hd head width.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import data
import llama
from llama import cause, regular

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "promptprior.json"
# what PEFT calls them, and what it does with the numbers: trained encoders are not in its files
ROWS, PREFIX = ("PROMPT_TUNING", "P_TUNING"), ("PREFIX_TUNING", "CARTRIDGE")


class AdapterError(ValueError):
    """An adapter that cannot be made or used: what, where, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# out


@torch.no_grad()
def to_peft(model: llama.Llama, prompt: Tensor | llama.Past, base: str,
            revision: str | None = None) -> dict[str, bytes]:
    """A prompt as the files of a PEFT adapter, in fp32 as PEFT writes them. prompt: rows (n, D) at
    the token embeddings whose outputs go on, or what any prompt leaves in the layers, of batch 1.
    base, revision: the model's name on the hub, or its folder.

    Raises AdapterError for a prompt that some layer has less of: PEFT's prefix is in all layers,
    and as the queries of x and -x are opposite but for biases, none of its keys is unseen by both.
    """
    c = model.config
    if isinstance(prompt, Tensor):
        numbers, own = prompt, {
            "peft_type": "PROMPT_TUNING", "num_attention_heads": c.num_attention_heads,
            "token_dim": c.hidden_size, "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None}
    else:
        columns, n = [0 if k is None else k.shape[2] for k in prompt.keys], int(prompt.position)
        bare = [str(i) for i, count in enumerate(columns) if count != n]
        if bare:
            raise AdapterError(f"layers {', '.join(bare)} have no part of this prompt, and a PEFT "
                               "adapter cannot say so, for its prefix is in every layer: train "
                               "with --keep and rows at the tokens, or with --deep-layers "
                               f"{c.num_hidden_layers}; of --method prefix, without "
                               "--prefix-layers")
        numbers, own = _columns(prompt), {
            "peft_type": "PREFIX_TUNING", "num_attention_heads": c.num_key_value_heads,
            "token_dim": c.num_key_value_heads * c.head_dim, "prefix_projection": False,
            "encoder_hidden_size": None, "init_weights": None}
    config = {**own, "task_type": "CAUSAL_LM",  # without it PEFT loads, and applies nothing
              "base_model_name_or_path": base, "revision": revision, "inference_mode": True,
              "num_virtual_tokens": len(numbers), "num_layers": c.num_hidden_layers,
              "num_transformer_submodules": 1, "auto_mapping": None, "modules_to_save": None}
    return {WEIGHTS: save({"prompt_embeddings": numbers.float().cpu().contiguous()},
                          {"format": "pt"}),
            CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


@torch.no_grad()
def difference(model: llama.Llama, one: llama.Past, other: llama.Past) -> tuple[float, float]:
    """The largest difference between the logits that two prompts give on a batch of tokens drawn at
    random, and the largest logit."""
    ids = torch.randint(0, model.config.vocab_size, (4, 16),
                        generator=torch.Generator().manual_seed(0)).to(model.embeddings.device)
    a, b = (model.logits(model(ids, past)[0]).float() for past in (one, other))
    return (a - b).abs().max().item(), a.abs().max().item()


def _columns(past: llama.Past) -> Tensor:
    """What a prompt of batch 1 leaves in the layers, as PEFT keeps it: (n, L 2 G hd)."""
    numbers = torch.stack([torch.stack(kv) for kv in zip(past.keys, past.values)])
    return numbers[:, :, 0].permute(3, 0, 1, 2, 4).flatten(1)  # (L, 2, G, n, hd) before


def tensors(prompt: llama.Prompt | llama.Prefix) -> dict[str, Tensor]:
    """A prompt as a run keeps it: layers.I, or layers.I.keys and layers.I.values, fp32."""
    if isinstance(prompt, llama.Prompt):
        return {f"layers.{i}": r.detach().cpu() for i, r in prompt.rows.items()}
    return {f"layers.{i}.{kind}": t.detach().cpu() for kind in ("keys", "values")
            for i, t in getattr(prompt, kind).items()}


# --------------------------------------------------------------------------------------------------
# in


class Adapter(NamedTuple):
    """What a file holds, not yet held to a model."""

    path: Path
    kind: str  # of ROWS or PREFIX
    numbers: Tensor  # (n, D), or (n, L 2 G hd) with keys before values; fp32
    config: dict  # adapter_config.json; of bare rows empty
    about: dict  # promptprior.json; of others' adapters empty


def from_peft(path: Path, c: llama.Config) -> llama.Prompt | llama.Prefix:
    """The prompt of a PEFT adapter's folder, or of rows (n, D) in numpy's format."""
    return fit(read(path), c)


def read(path: Path) -> Adapter:
    """Raises AdapterError for what PEFT itself would not apply, what is no prompt of a causal
    model, and pickles."""
    path = Path(path)
    if path.is_file():
        return Adapter(path, "PROMPT_TUNING", _checked(_numpy(path), path), {}, {})
    if not path.is_dir():
        raise AdapterError(f"{path}: no such folder: give one that PEFT's save_pretrained made, or "
                           "a .npy file of rows (n, width)")
    if not (path / CONFIG).exists():
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        raise AdapterError(f"{path}: no {CONFIG} in it, so it is no adapter: " + (
            f"give {path / inside[0]}" if inside else "give a folder that PEFT's "
            "save_pretrained made"))
    config = data.read_json(path / CONFIG, dict)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind not in ROWS + PREFIX:
        raise AdapterError(f"{path}: peft_type is {kind!r:.80}, which is no prompt that can stand "
                           f"alone: only {', '.join(ROWS + PREFIX)} can be read")
    if task != "CAUSAL_LM":
        raise AdapterError(f"{path / CONFIG}: task_type is {task!r:.80}, " + (
            "so PEFT loads the adapter and does not apply it" if task is None else
            "so it is not for a model that continues text") + ": if it was trained with a "
            'causal model, write "task_type": "CAUSAL_LM" there')
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(f"{path / CONFIG}: num_transformer_submodules is "
                           f"{config['num_transformer_submodules']!r:.80}, so it is of an encoder "
                           "and a decoder: give an adapter of a LLaMA")
    about = data.read_json(path / ABOUT, dict) if (path / ABOUT).exists() else {}
    adapter = Adapter(path, kind, _checked(_embeddings(path), path), config, about)
    n = config.get("num_virtual_tokens")
    if n != len(adapter.numbers):
        raise AdapterError(f"{path}: {CONFIG} says num_virtual_tokens {n!r:.80}, and {WEIGHTS} "
                           f"holds {len(adapter.numbers)}: the two are not of one adapter; fetch "
                           "both again")
    return adapter


def fit(adapter: Adapter, c: llama.Config) -> llama.Prompt | llama.Prefix:
    """The adapter as a prompt of this model. Raises AdapterError if it is another's."""
    path, kind, x, config, _ = adapter
    L, G, hd = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    rows = kind in ROWS
    fits = {"num_layers": L, "num_attention_heads": c.num_attention_heads,
            "token_dim": c.hidden_size} if rows else {
        "num_layers": L, "num_attention_heads": G, "token_dim": G * hd}
    wrong = [f"{key} {config[key]!r:.80}, the model {value}" for key, value in fits.items()
             if config.get(key) not in (None, value)]
    width = c.hidden_size if rows else 2 * L * G * hd
    if x.shape[1] != width:
        wrong.append(f"{x.shape[1]} numbers a row, the model "
                     + (f"{width}" if rows else f"2 x {L} layers x {G} x {hd} = {width}"))
    if wrong:
        base = config.get("base_model_name_or_path")
        raise AdapterError(f"{path}: it has {'; '.join(wrong)}, so it was made for another model: "
                           f"give that by --model{f' ({base!s:.200})' if base else ''}")
    if rows:
        return llama.Prompt({0: x}, cut=False)
    x = x.view(len(x), L, 2, G, hd)
    return llama.Prefix(*({i: x[:, i, j] for i in range(L)} for j in (0, 1)))


@torch.no_grad()
def without_bos(adapter: Adapter, model: llama.Llama, bos: int | None) -> Adapter:
    """An adapter of a prompt after BOS, whose last virtual token is BOS, without that one: texts
    here bring their own. Raises AdapterError if it is another."""
    own, last = None, adapter.numbers[-1]
    if bos is not None and adapter.kind in PREFIX and len(adapter.numbers) > 1:
        own = _columns(model.extend(torch.tensor([[bos]], device=model.embeddings.device)))[0]
    # of the same weights, in whatever dtype
    if own is None or own.shape != last.shape \
            or not (own.float().cpu() - last).norm() <= 0.05 * last.norm():
        raise AdapterError(f"{adapter.path}: {ABOUT} says that its last virtual token is BOS, and "
                           f"it is not: export it again, or remove {ABOUT}")
    return adapter._replace(numbers=adapter.numbers[:-1])


def _embeddings(path: Path) -> Tensor:
    """prompt_embeddings of an adapter's folder, as they are stored."""
    if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
        raise AdapterError(f"{path / 'adapter_model.bin'}: a pickle, which can run anything when "
                           "it is read: load it with PEFT where you trust it, and save it again "
                           "by model.save_pretrained(DIR), which writes safetensors")
    try:
        with safe_open(regular(path / WEIGHTS), framework="pt") as f:
            names = [*f.keys()]
            if names != ["prompt_embeddings"]:
                raise AdapterError(f"{path / WEIGHTS}: it holds {', '.join(sorted(names))!s:.200}, "
                                   "and a prompt is prompt_embeddings alone: merge or leave out "
                                   "what else was trained")
            return f.get_tensor("prompt_embeddings")
    except FileNotFoundError:
        raise AdapterError(f"{path / WEIGHTS}: no such file: fetch the adapter again") from None
    except (SafetensorError, OSError) as e:
        raise AdapterError(f"{path / WEIGHTS}: not a readable safetensors file ({cause(e)}): fetch "
                           "it again") from None


def _numpy(path: Path) -> Tensor:
    """Rows of a file in numpy's format, whatever its name (google-research/prompt-tuning's has no
    ending)."""
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            return torch.from_numpy(x.astype(np.float32))
        what = f"{x.dtype} numbers" if isinstance(x, np.ndarray) else "an archive"
    except (OSError, ValueError, EOFError) as e:
        what = cause(e) if isinstance(e, OSError) else "no array of numbers"
    raise AdapterError(f"{path}: holds {what}, expected floating-point rows (n, width) that "
                       "numpy.save wrote, or a PEFT adapter's folder")


def _checked(x: Tensor, path: Path) -> Tensor:
    if x.dim() != 2 or 0 in x.shape or not x.is_floating_point():
        raise AdapterError(f"{path}: its prompt is {x.dtype} of shape {tuple(x.shape)}, expected "
                           "floating-point (rows, width): fetch it again")
    x = x.float()
    if not torch.isfinite(x).all():
        raise AdapterError(f"{path}: its prompt holds numbers that are not finite: fetch it again")
    return x


# --------------------------------------------------------------------------------------------------
# the log


COLUMNS = ("step", "split")  # which every table begins with


def to_csv(lines: list[dict]) -> str:
    """A run's log as a table, a line a record: step, split, and what any of them measured."""
    columns = dict.fromkeys([*COLUMNS, *(key for line in lines for key in line)])
    text = io.StringIO()
    table = csv.DictWriter(text, [*columns], lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return text.getvalue()


def is_table(path: Path) -> bool:
    """Whether to_csv made the file."""
    begins = ",".join(COLUMNS).encode()
    if not path.is_file():
        return False
    with path.open("rb") as f:
        return f.read(len(begins)) == begins
