"""A frozen LLaMA that takes prompts as entries of its KV cache. Needs torch and safetensors.

A prompt reaches the text only through attention, as additional keys and values. The model
therefore needs no hooks: its forward takes a `Past`, which is an ordinary KV cache, and gradients
flow through the cache back to the prompt.

    model = load("folder", dtype="bfloat16")               # any HF folder with model_type llama
    past = Prompt({0: rows}, cut=False).past(model)        # rows (n, D): prompt tuning
    answers = generate(model, [[1, 5, 7]], past, max_new=20, stop={2})

This module knows weights, positions and caches. It knows nothing of text, data and priors, and it
writes no files.

B batch, T tokens, n prompt rows, S cached columns, D width, V vocabulary, H heads, G key/value
heads, hd head width, L layers. Names of weights and configuration are Hugging Face's.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAD = -1  # marks the empty places at the right end of a row of token ids


class ModelError(ValueError):
    """A model folder or a prompt that cannot be used: what, where, and the remedy, in one line."""


class FileError(ModelError):
    """A file of a model folder that is missing, or is not what its name says. A caller who knows
    other layouts of folders can look at `path` and say more."""

    def __init__(self, path: Path, fault: str):
        super().__init__(f"{path}: {fault}")
        self.path, self.fault = path, fault

    def __reduce__(self):  # by default it would be made again of its message alone
        return FileError, (self.path, self.fault)


# --------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face config.json that the model uses."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # such as {"rope_type": "linear", "factor": 2.0}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # a text ends with any of these


# field -> default, type, minimum, maximum. The maxima stop an absurd size early: a model is built
# before its weights are read, and building a billion empty layers takes hours.
FIELDS = {
    "hidden_size": (None, int, 1, 2**17),
    "intermediate_size": (None, int, 1, 2**20),
    "num_hidden_layers": (None, int, 1, 2**10),
    "num_attention_heads": (None, int, 1, 2**12),
    "num_key_value_heads": (None, int, 1, 2**12),
    "head_dim": (None, int, 1, 2**12),
    "vocab_size": (32000, int, 1, 2**24),
    "max_position_embeddings": (2048, int, 1, 2**30),
    "rope_theta": (10000.0, float, 1.001, 1e15),
    "rms_norm_eps": (1e-6, float, 1e-30, 1),
    "tie_word_embeddings": (False, bool, False, True),
    "attention_bias": (False, bool, False, True),
    "mlp_bias": (False, bool, False, True),
}

# rope type -> the numbers that it needs, each between 1e-6 and 1e9
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings"),
}


def read_config(path: Path) -> Config:
    """Read a Hugging Face config.json, in the form of transformers 4 or of 5 (rope_parameters).

    Raises ModelError for another architecture or rope type, a missing or impossible size."""
    c = read_json(path)
    if c.get("model_type") != "llama":
        raise ModelError(f"{path}: model_type is {c.get('model_type')!r}, and only 'llama' is "
                         "known here: choose a folder of Llama, TinyLlama, SmolLM or another "
                         "LLaMA-architecture model")
    if c.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise ModelError(f"{path}: hidden_act is {c['hidden_act']!r}, a LLaMA has 'silu': "
                         "choose another folder")

    rope = _read_rope(path, c)
    if rope.get("rope_theta") is not None:
        c["rope_theta"] = rope["rope_theta"]
    # longer texts change the frequencies of longrope, also those of their first tokens
    if rope["rope_type"] == "longrope":
        c["max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    values = {"rope_scaling": None if rope["rope_type"] == "default" else rope}

    # a field that is absent or null takes its default, which for two of them follows from others
    heads, width = c.get("num_attention_heads"), c.get("hidden_size")
    defaults = {"num_key_value_heads": heads}
    if type(heads) is int and type(width) is int and heads > 0:
        defaults["head_dim"] = width // heads
    values |= read_fields(path, c, FIELDS, defaults)

    values["bos_token_id"] = c.get("bos_token_id")
    if values["bos_token_id"] is not None:
        _check(path, "bos_token_id", values["bos_token_id"], int, 0, values["vocab_size"] - 1)
    values["eos_token_id"] = read_eos(path, c)

    head_dim, kv_heads = values["head_dim"], values["num_key_value_heads"]
    if rope["rope_type"] == "longrope":
        _check_short_factor(path, rope.get("short_factor"), head_dim // 2)
    if heads % kv_heads or head_dim % 2:
        raise ModelError(f"{path}: {heads} heads of width {head_dim} over {kv_heads} key/value "
                         "heads: the heads must divide evenly and their width be even: repair the "
                         "file")
    return Config(**values)


def read_fields(path: Path, c: dict, known: dict[str, tuple], defaults: dict) -> dict:
    """The values of the known fields of config.json, c. known: as FIELDS. defaults: those that
    differ from known's. Raises ModelError for a value of another type or out of its range."""
    values = {}
    for field, (default, kind, minimum, maximum) in known.items():
        value = c.get(field)
        if value is None:
            value = defaults.get(field, default)
        _check(path, field, value, kind, minimum, maximum)
        values[field] = value
    return values


def _read_rope(path: Path, c: dict) -> dict:
    """The rope settings of config.json, checked, with their "rope_type"; what they leave out is
    filled in as transformers does."""
    rope = _rope_settings(path, c)
    rope_type = rope["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"{path}: rope type {rope_type!r:.80} is not known, only "
                         f"{', '.join(ROPE_TYPES)}: choose another model")
    if any(settings.get("partial_rotary_factor") not in (None, 1) for settings in (c, rope)):
        raise ModelError(f"{path}: partial_rotary_factor is not 1, and a LLaMA rotates whole "
                         "heads: choose another model")

    longest = c.get("max_position_embeddings") or FIELDS["max_position_embeddings"][0]
    if rope_type in ("llama3", "yarn", "longrope"):
        original = (c.get("original_max_position_embeddings")
                    or rope.get("original_max_position_embeddings") or longest)
        _check(path, "original_max_position_embeddings", original, float, 2, 1e9)
        _check(path, "max_position_embeddings", longest, float, 1, 1e9)
        rope["original_max_position_embeddings"] = original
    if rope_type == "yarn":
        rope = {"beta_fast": 32, "beta_slow": 1} | rope
    elif rope_type == "longrope":
        rope = {"factor": longest / original} | rope

    for key in ROPE_TYPES[rope_type]:
        _check(path, f"{key!r} of rope type {rope_type!r}", rope.get(key), float, 1e-6, 1e9)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            _check(path, f"{key!r} of the rope settings", rope[key], float, 1e-6, 1e9)
    if rope_type == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ModelError(f"{path}: llama3 rope needs low_freq_factor below high_freq_factor: "
                         "repair the file")
    return rope


def _check_short_factor(path: Path, short, length: int) -> None:
    if not isinstance(short, list) or len(short) != length:
        raise ModelError(f"{path}: 'short_factor' of rope type 'longrope' is {short!r:.80}, "
                         f"expected a list of {length} numbers: repair the file")
    for value in short:
        _check(path, "a number of 'short_factor'", value, float, 1e-6, 1e9)


def _rope_settings(path: Path, c: dict) -> dict:
    """config.json's rope_parameters, or rope_scaling, its older name. Files that were edited by
    hand have both."""
    spellings = []
    for field in ("rope_parameters", "rope_scaling"):
        rope = c.get(field) or {}
        if not isinstance(rope, dict):
            raise ModelError(f"{path}: the rope settings are {rope!r:.80}, not an object: repair "
                             "the file")
        if rope:
            rope = {key: value for key, value in rope.items()
                    if value is not None or key == "truncate"}  # where null is false
            old_type = str(rope.pop("type", "default"))
            spellings.append({"rope_theta": c.get("rope_theta"), "rope_type": old_type} | rope)
            spellings[-1]["rope_type"] = str(spellings[-1]["rope_type"])
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        raise ModelError(f"{path}: rope_parameters and rope_scaling say different things, and "
                         "transformers believes rope_scaling: delete the one that is not the "
                         "model's")
    return spellings[0] if spellings else {"rope_type": "default"}


def read_eos(path: Path, c: dict) -> tuple[int, ...]:
    """The tokens that end a text, of the config.json c at path. Chat models name further ones in
    generation_config.json."""
    generation = path.with_name("generation_config.json")
    eos = None
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
    if eos is None:
        eos = c.get("eos_token_id")

    # null, one token or a list of tokens
    tokens = eos if isinstance(eos, list) else [eos]
    if eos is None:
        tokens = []
    for token in tokens:
        _check(path, "eos_token_id", token, int, -1, 2**40)
    return tuple(tokens)


def _check(path: Path, field: str, value, kind: type, minimum, maximum) -> None:
    """Raise ModelError unless value is of this kind and in this range. A whole number may stand
    for a float; true and false are not numbers."""
    kinds = (int, float) if kind is float else (kind,)
    if type(value) in kinds and minimum <= value <= maximum:  # NaN fails the comparison
        return
    expected = {bool: "true or false", int: f"a whole number from {minimum} to {maximum}",
                float: f"a number from {minimum:g} to {maximum:g}"}[kind]
    raise ModelError(f"{path}: {field} is {value!r:.80}, expected {expected}: repair the file")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ModelError for anything else."""
    try:
        if regular(path).stat().st_size > 2**28:
            raise OSError("larger than 256 MiB")
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileError(path, f"no such file: {EXPECTED}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise FileError(path, f"cannot be read as JSON ({e}): fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, expected a JSON object: "
                         "fetch it again")
    return value


EXPECTED = ("expected a Hugging Face model folder with config.json, tokenizer.json and safetensors "
            "weights")


def regular(path: Path) -> Path:
    """path, if it is a regular file that may be read, a link to one, or does not exist. Raises
    OSError otherwise: opening a pipe would block for ever, and safetensors calls a file missing
    that may not be read."""
    if path.exists():
        if not path.is_file():
            raise OSError("a folder, a pipe or a device, not a file")
        path.open("rb").close()
    return path


# --------------------------------------------------------------------------------------------------
# rotary positions


def rope_frequencies(c: Config) -> tuple[Tensor, float]:
    """(hd / 2,) fp32 angles per position, and the number by which cos and sin are multiplied, for
    texts of at most max_position_embeddings tokens. Up to there dynamic scaling changes nothing.

    Linear scaling (kaiokendev 2023); llama3 (Llama 3.1): long wavelengths are stretched by
    `factor`, short ones kept, those between blended; YaRN (arXiv 2309.00071); LongRoPE (arXiv
    2402.13753), whose short text it is."""
    exponents = torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim
    f = 1.0 / c.rope_theta ** exponents
    scaling = c.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return f / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        trained_length = scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / f
        blend = ((trained_length / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * f / scaling["factor"] + blend * f, 1.0
    if scaling["rope_type"] == "yarn":
        return _yarn(c, scaling, f)
    if scaling["rope_type"] == "longrope":
        short = torch.tensor(scaling["short_factor"], dtype=torch.float32)
        trained_length = scaling["original_max_position_embeddings"]
        growth = math.log(max(scaling["factor"], 1)) / math.log(trained_length)
        default = math.sqrt(1 + growth)
        return f / short, scaling.get("attention_factor", default)
    return f, 1.0


def _yarn(c: Config, scaling: dict, f: Tensor) -> tuple[Tensor, float]:
    """`rope_frequencies` of YaRN: dimensions that turn fewer than beta_slow times within the
    original length are stretched, those that turn more than beta_fast times are kept."""
    def dimension(turns: float) -> float:
        """The pair of dimensions that turns this many times within the original length."""
        wavelength = scaling["original_max_position_embeddings"] / (2 * math.pi * turns)
        return c.head_dim * math.log(wavelength) / (2 * math.log(c.rope_theta))

    first, last = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, c.head_dim - 1)
    span = last - first if last != first else 0.001
    stretched = ((torch.arange(len(f)) - first) / span).clamp(0, 1)

    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    default = growth(1)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        default = growth(scaling["mscale"]) / growth(scaling["mscale_all_dim"])
    return (stretched * f / scaling["factor"] + (1 - stretched) * f,
            scaling.get("attention_factor", default))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., heads, hd) by cos, sin (..., 1, hd / 2); HF's half-split layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --------------------------------------------------------------------------------------------------
# the cache


class Past(NamedTuple):
    """A KV cache: keys and values of a prompt, of the beginning of a text, or of both.

    Prompt columns come first and are always real. A layer has S content columns and its prompt
    columns, whose number differs between layers in cut mode; the keys and values of a layer
    without columns are None. A Past of batch 1 serves any batch."""

    keys: tuple[Tensor | None, ...]  # per layer (1 or B, G, S_l, hd), rotated
    values: tuple[Tensor | None, ...]  # per layer (1 or B, G, S_l, hd)
    real: Tensor  # (1 or B, S) bool: which content columns hold a token, not padding
    position: Tensor  # (1 or B,) int64: the position of each row's next token

    def take(self, parent: Tensor) -> Past:
        """parent (Q,) int64 -> the Past whose row i is row parent[i]."""
        return Past(tuple(pick(t, parent) for t in self.keys),
                    tuple(pick(t, parent) for t in self.values),
                    pick(self.real, parent), pick(self.position, parent))


def pick(t: Tensor | None, parent: Tensor | None) -> Tensor | None:
    """Rows parent of t (P, ...). None stays None, and a t of batch 1 serves any batch as it is."""
    if t is None or parent is None or len(t) == 1:
        return t
    # not t[parent]: on the CPU its backward sums the gradients of equal rows in a random order
    return t.index_select(0, parent)


def stack(pasts: list[Past]) -> Past:
    """Pasts as one, whose batch is theirs one after the other: the rows of a batch may go on from
    different prompts and texts. Shorter ones are padded in front of their content columns, and
    columns in front that no row uses are dropped.

    Either every layer has as many prompt columns in all of them. Or the layers of each past have
    equally many columns: then the prompt's become content columns, and `real` says which of them
    hold something. Raises ModelError for pasts that are neither."""
    if len(pasts) == 1:
        return pasts[0]
    counts = [[0 if k is None else k.shape[2] for k in past.keys] for past in pasts]
    real = [past.real for past in pasts]
    prompts = [[c - r.shape[1] for c in columns] for columns, r in zip(counts, real)]
    fronts = prompts[0]  # the prompt columns of every layer
    if any(p != fronts for p in prompts):
        uneven = [i for i, c in enumerate(counts) if len({*c}) > 1]
        if uneven:
            raise ModelError(f"prompt {uneven[0] + 1} of {len(pasts)} has {counts[uneven[0]]} "
                             "columns in its layers, and another has other numbers of them: one "
                             "batch takes prompts with columns at the same layers, or such as have "
                             "equally many at every layer: take each alone")
        real = [F.pad(r, (p[0], 0), value=True) for r, p in zip(real, prompts)]
        fronts = [0] * len(fronts)

    used = [r.shape[1] - int((~r).all(dim=0).cumprod(dim=0).sum()) for r in real]
    longest = max(used)
    real = [F.pad(r, (longest - r.shape[1], 0)) for r in real]  # drops columns where negative
    return Past(_stack_columns([past.keys for past in pasts], fronts, real),
                _stack_columns([past.values for past in pasts], fronts, real),
                torch.cat(real), torch.cat([past.position for past in pasts]))


def _stack_columns(caches: list[tuple[Tensor | None, ...]], fronts: list[int], real: list[Tensor]
                   ) -> tuple[Tensor | None, ...]:
    """The keys or the values of several pasts as those of one: in every layer its prompt columns
    and as many content columns as real (B, S) has of each past."""
    stacked, S = [], real[0].shape[1]
    for front, *tensors in zip(fronts, *caches):
        some = next((t for t in tensors if t is not None), None)
        padded = []
        for t, r in zip(tensors, real) if some is not None else ():
            if t is None:
                t = some.new_zeros(len(r), some.shape[1], front, some.shape[3])
            content = F.pad(t[:, :, front:], (0, 0, S - t.shape[2] + front, 0))
            padded.append(torch.cat((t[:, :, :front], content), dim=2) if front else content)
        stacked.append(torch.cat(padded) if padded else None)
    return tuple(stacked)


# --------------------------------------------------------------------------------------------------
# attention


class Group(NamedTuple):
    """Consecutive rows of a batch that continue the same row of the cache (CPU only)."""

    cached: int  # the row of the cache
    columns: int  # its content columns up to the last that holds a token
    tokens: int  # real tokens of these rows
    visible: Tensor  # (tokens, columns + tokens) bool: the keys that each token attends to


class Layout:
    """Where the N real tokens of a padded batch (B, T) stand, and attention over them.

    Norms, projections and the MLP work on the real tokens alone, (N, D). Only attention needs the
    rows of the batch: it pads its inputs to (B, T) and drops the padding from its output."""

    def __init__(self, real: Tensor, past_real: Tensor, parent: Tensor | None, queries: int,
                 dtype: torch.dtype):
        """real (B, T) and past_real (1 or P, S) bool: which places hold a token. parent (B,): the
        row of the cache that each row continues, None for its own. queries: heads per key/value
        head. dtype: of the model."""
        self.real, self.past_real, self.parent = real, past_real, parent
        self.queries, self.dtype = queries, dtype
        self.B, self.T = real.shape
        self.S = past_real.shape[1]
        self.masks: dict[int, Tensor] = {}  # number of prompt columns -> mask

        # where the real tokens stand in the flattened batch; None if nothing is padded
        self.index = None
        lengths = real.sum(dim=1).tolist()
        if min(lengths, default=0) < self.T:
            self.index = real.flatten().nonzero()[:, 0]

        self.groups = self._groups(lengths)
        self.group_masks: dict[int, list[Tensor]] = {}

    def select(self, t: Tensor) -> Tensor:
        """(B, T) -> (N,): the entries of the real tokens."""
        return t.flatten() if self.index is None else t.flatten().index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """(N, heads, hd) -> (B, heads, T, hd), with zeros in the empty places."""
        if self.index is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.index, x)
        return x.view(self.B, self.T, *x.shape[1:]).transpose(1, 2)

    def cache(self, new: Tensor, cached: Tensor | None) -> Tensor:
        """Append keys or values of these tokens (N, G, hd) to the cache (1 or P, G, S_l, hd)
        -> (B, G, S_l + T, hd)."""
        padded = self.pad(new)
        if cached is None:
            return padded
        return torch.cat((pick(cached, self.parent).expand(self.B, -1, -1, -1), padded), dim=2)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (N, H, hd), keys and values as `cache` returns them -> (N, H hd)."""
        a = attention(self.pad(q), keys, values, self.mask(keys))
        a = a.transpose(1, 2).flatten(0, 1)
        if self.index is not None:
            a = a.index_select(0, self.index)
        return a.flatten(1)

    def weights(self, q: Tensor, keys: Tensor) -> Tensor:
        """q (N, H, hd), keys as `cache` returns them -> attention weights (B, H, T, S_l + T), fp32,
        0 in the rows of padding."""
        padded = self.pad(q)
        B, H, T, hd = padded.shape
        stacked = padded.reshape(B, keys.shape[1], -1, hd)  # as in `attention`
        scores = stacked.float() @ keys.float().transpose(2, 3) * hd ** -0.5
        weights = (scores + self.mask(keys).float()).softmax(dim=-1).reshape(B, H, T, -1)
        return weights.masked_fill(~self.real[:, None, :, None], 0)

    def mask(self, keys: Tensor) -> Tensor:
        """The mask of `attention` for keys as `cache` returns them."""
        n = keys.shape[2] - self.S - self.T  # prompt columns of this layer
        if n not in self.masks:
            past = pick(self.past_real, self.parent)[:, None].expand(-1, self.T, -1)
            causal = torch.ones(self.T, self.T, dtype=torch.bool, device=past.device).tril()
            visible = torch.cat((past, causal.expand(len(past), -1, -1)), dim=2)
            self.masks[n] = self._additive(n, visible[:, None])
        return self.masks[n]

    def _additive(self, n: int, visible: Tensor) -> Tensor:
        """(B, 1, T, S) bool -> (B, 1, H / G T, n + S): 0 where a query attends to a key, -inf
        elsewhere. SDPA would convert a bool mask to this once a layer."""
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        mask = mask.masked_fill_(~visible, -math.inf)
        return F.pad(mask, (n, 0)).repeat(1, 1, self.queries, 1)

    # On the CPU, attention may instead run once for each group of rows that continue the same row
    # of the cache: nothing is padded, and the cached row is not copied for each of them.

    CALL = 2000  # the cost of one more call of attention, in pairs of query and key

    def _groups(self, lengths: list[int]) -> list[Group]:
        """The groups of rows, or none if attending to the whole padded batch costs less."""
        if self.past_real.device.type != "cpu" or self.T <= 1:
            return []
        parent = range(self.B) if self.parent is None else self.parent.tolist()
        columns = []
        for row in self.past_real.tolist():
            columns.append(max((i + 1 for i, r in enumerate(row) if r), default=0))

        groups = []
        for _, members in groupby(range(self.B), key=parent.__getitem__):
            rows = list(members)
            cached = parent[rows[0]] if len(columns) > 1 else 0
            repeats = torch.tensor([lengths[r] for r in rows])
            row_of_token = torch.tensor(rows).repeat_interleave(repeats)
            causal = (row_of_token[:, None] == row_of_token).tril()
            past = self.past_real[cached, :columns[cached]].expand(len(row_of_token), -1)
            groups.append(Group(cached, columns[cached], len(row_of_token),
                                torch.cat((past, causal), dim=1)))

        pairs = sum(g.tokens * g.visible.shape[1] + self.CALL for g in groups)
        return groups if pairs < self.B * self.T * (self.S + self.T) else []

    def attend_groups(self, q: Tensor, k: Tensor, v: Tensor, k0: Tensor | None,
                      v0: Tensor | None) -> Tensor:
        """q (N, H, hd), k and v (N, G, hd), the layer's cache k0 and v0 -> (N, H hd)."""
        n = 0 if k0 is None else k0.shape[2] - self.S
        if n not in self.group_masks:
            self.group_masks[n] = [self._additive(n, g.visible[None, None]) for g in self.groups]

        sizes = [g.tokens for g in self.groups]
        qs, ks, vs = (t.transpose(0, 1)[None].split(sizes, dim=2) for t in (q, k, v))
        if k0 is not None:
            ks = self._after_cached(k0, n, ks)
            vs = self._after_cached(v0, n, vs)
        outputs = [attention(*inputs) for inputs in zip(qs, ks, vs, self.group_masks[n])]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1)

    def _after_cached(self, cached: Tensor, n: int, new: list[Tensor]) -> list[Tensor]:
        """Append each group's new keys or values (1, G, tokens, hd) to its row of the cache."""
        # indexing cached[row] would allocate a gradient of the whole cache for each group
        rows = cached.split(1)
        return [torch.cat((rows[g.cached][:, :, :n + g.columns], x), dim=2)
                for g, x in zip(self.groups, new)]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, T, hd), k and v (B, G, S, hd), mask (1 or B, 1, H / G T, S) -> (B, H, T, hd).

    The queries of one key/value head are stacked along time. This way keys and values are not
    repeated, and every SDPA kernel accepts the mask (with enable_gqa and a mask, CUDA falls back
    to the slow math kernel)."""
    B, H, T, hd = q.shape
    stacked = q.reshape(B, k.shape[1], -1, hd)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # 2 to 3 times as fast as SDPA's kernel for bf16 on the CPU
        scores = torch.matmul(stacked * hd ** -0.5, k.transpose(2, 3)).add_(mask)
        a = scores.softmax(dim=-1) @ v
    else:
        a = F.scaled_dot_product_attention(stacked, k, v, mask)
    return a.reshape(B, H, T, hd)  # not view: a CUDA kernel returns heads and time transposed


# --------------------------------------------------------------------------------------------------
# the model


class Block(nn.Module):
    """One layer: attention and MLP, each after its norm and added to the residual stream."""

    def __init__(self, c: Config):
        super().__init__()
        D, hd, bias = c.hidden_size, c.head_dim, c.attention_bias
        H, G = c.num_attention_heads, c.num_key_value_heads
        self.hd = hd
        self.input_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(D, H * hd, bias=bias), k_proj=nn.Linear(D, G * hd, bias=bias),
            v_proj=nn.Linear(D, G * hd, bias=bias), o_proj=nn.Linear(H * hd, D, bias=bias)))
        self.post_attention_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.mlp = nn.ModuleDict(dict(
            gate_proj=nn.Linear(D, c.intermediate_size, bias=c.mlp_bias),
            up_proj=nn.Linear(D, c.intermediate_size, bias=c.mlp_bias),
            down_proj=nn.Linear(c.intermediate_size, D, bias=c.mlp_bias)))

    def forward(self, x: Tensor, k0: Tensor | None, v0: Tensor | None, layout: Layout, cos: Tensor,
                sin: Tensor, cache: bool, output: Tensor | bool = True,
                weights: Callable[[Tensor], None] | None = None):
        """x (N, D), the layer's cache k0, v0 (1 or P, G, S_l, hd) or None, cos and sin
        (N, 1, hd / 2) -> (output (N, D), keys, values (B, G, S_l + T, hd)).

        Keys and values are returned as None unless cache. output: True for all N tokens, an int64
        index of some of them, or False for none, and None is returned. weights, which needs cache,
        is called with the attention weights (B, H, T, S_l + T)."""
        h = self.input_layernorm(x)
        k = rotate(self._heads("k_proj", h), cos, sin)
        v = self._heads("v_proj", h)
        keys = values = None
        if cache or not layout.groups:
            keys, values = layout.cache(k, k0), layout.cache(v, v0)
        if output is False:
            return None, keys, values

        q = rotate(self._heads("q_proj", h), cos, sin)
        if weights:
            weights(layout.weights(q, keys))
        if layout.groups:
            a = layout.attend_groups(q, k, v, k0, v0)
        else:
            a = layout.attend(q, keys, values)

        if output is not True:
            x, a = x.index_select(0, output), a.index_select(0, output)
        x = x + self.self_attn.o_proj(a)
        h = self.post_attention_layernorm(x)
        x = x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))
        return (x, keys, values) if cache else (x, None, None)

    def _heads(self, projection: str, h: Tensor) -> Tensor:
        """(N, D) -> (N, heads, hd)."""
        return self.self_attn[projection](h).unflatten(-1, (-1, self.hd))


class Llama(nn.Module):
    """A LLaMA. `state_dict` has Hugging Face's tensor names; a tied model has no lm_head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.recompute = False  # keep only the blocks' inputs, run each block again in backward
        self.model = nn.ModuleDict(dict(
            # nn.Embedding(V, D) would draw its weights, and drawing on the meta device imports
            # torch._dynamo, which takes over a second
            embed_tokens=nn.Embedding.from_pretrained(
                torch.zeros(c.vocab_size, c.hidden_size), freeze=False),
            layers=nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            norm=nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)))
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    @property
    def embeddings(self) -> Tensor:
        """The vocabulary, (V, D)."""
        return self.model.embed_tokens.weight

    def empty(self) -> Past:
        """A Past without columns: no prompt, no text."""
        no_columns = (None,) * self.config.num_hidden_layers
        device = self.embeddings.device
        return Past(no_columns, no_columns, torch.ones(1, 0, dtype=torch.bool, device=device),
                    torch.zeros(1, dtype=torch.int64, device=device))

    # ---- text

    def forward(self, ids: Tensor, past: Past | None = None,
                tap: Callable[[int, Tensor], None] | None = None, parent: Tensor | None = None,
                weights: Callable[[int, Tensor], None] | None = None) -> tuple[Tensor, Past]:
        """ids (B, T), padded on the right with PAD -> hidden states (B, T, D) after the final norm,
        zero in the empty places, and the Past with these tokens in it.

        tap(i, x) is called with the input x (N, D) of every layer i at the N real tokens, row after
        row, and with i = L after the final norm (transformers' convention for hidden_states).
        parent (B,) int64: row i continues row parent[i] of past; as past.take(parent).
        weights(i, w) is called with every layer's attention weights w (B, H, T, S_l) in fp32,
        prompt columns first. The weights of a real token sum to 1, those of padding are 0. They are
        computed in addition to the usual attention, so the hidden states do not change by a bit."""
        x, past = self._run(ids, past, parent, tap, weights)
        x = self.model.norm(x)
        if tap:
            tap(self.config.num_hidden_layers, x)
        h = x.new_zeros(*ids.shape, x.shape[-1]).masked_scatter((ids != PAD)[..., None], x)
        return h, past

    def states(self, ids: Tensor, past: Past | None, parent: Tensor | None,
               wanted: Tensor) -> Tensor:
        """The hidden states of forward at the M tokens where wanted (B, T) is true -> (M, D).

        Makes no Past, and the last block computes these tokens alone."""
        x, _ = self._run(ids, past, parent, cache=False, wanted=wanted)
        return self.model.norm(x)

    def extend(self, ids: Tensor, past: Past | None = None,
               tap: Callable[[int, Tensor], None] | None = None) -> Past:
        """The Past of forward alone: the last block stops after its keys and values."""
        if ids.shape[1] == 0:
            return past or self.empty()
        return self._run(ids, past, tap=tap, output=False)[1]

    def inputs(self, ids: Tensor, past: Past | None, tap: Callable[[int, Tensor], None],
               last: int, parent: Tensor | None = None) -> None:
        """Run ids (B, T) as forward does, but only to call tap(i, x) with the inputs x (N, D) of
        layers 0 to `last` at the N real tokens; `last` L is after the final norm."""
        if last == self.config.num_hidden_layers:
            self(ids, past, tap, parent)
        else:
            self._run(ids, past, parent, tap, cache=False, last=last)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., D) -> (..., V). Pick positions first: (B, T, V) of 128k tokens is gigabytes."""
        tied = self.config.tie_word_embeddings
        return F.linear(h, self.embeddings if tied else self.lm_head.weight)

    # ---- prompts

    def prompt_past(self, rows: dict[int, Tensor], cut: bool,
                    tap: Callable[[int, Tensor], None] | None = None,
                    past: Past | None = None) -> Past:
        """Run prompt rows {layer: (n, D)} at the positions that follow past (None: 0..n-1) -> past
        with the prompt's columns in front.

        Rows at layer i replace the prompt's part of that layer's input. cut drops the layer's
        outputs there, so that only layers with rows have prompt columns (paper 3.2); otherwise they
        go on, as in prompt tuning. tap(i, x) is called with the prompt's part (B n, D) of every
        layer's input that has one and, if the outputs go on to the end, with i = L after the final
        norm. Raises ModelError for rows that do not fit the model."""
        L, D = self.config.num_hidden_layers, self.config.hidden_size
        n = self._common_length(rows, (D,))
        if n is None:
            shapes = {i: tuple(r.shape) for i, r in rows.items()}
            raise ModelError(f"prompt rows {shapes} do not fit a model of {L} layers and width "
                             f"{D}: every entry must be {{layer: (n, width)}} with one n")
        past = past or self.empty()
        position = self._next_positions(past, n)
        B = len(position)
        real = torch.ones(B, n, dtype=torch.bool, device=position.device)
        layout = self._layout(real, past.real, None)
        cos, sin = self._cos_sin(position.flatten(), self.embeddings.dtype)

        x, keys, values = None, [], []
        for i, layer in enumerate(self.model.layers):
            k, v = past.keys[i], past.values[i]
            if i in rows:
                x = rows[i].to(self.embeddings.dtype).repeat(B, 1)
            if x is not None:
                if tap:
                    tap(i, x)
                is_read = i + 1 not in rows and (i + 1 < L or tap is not None)
                x, k, v = layer(x, k, v, layout, cos, sin, cache=True, output=is_read and not cut)
                # the new columns go to the front; attention does not depend on their order
                k, v = k.roll(n, 2), v.roll(n, 2)
            keys.append(k)
            values.append(v)
        if tap and x is not None:
            tap(L, self.model.norm(x))
        return Past(tuple(keys), tuple(values), past.real, past.position + n)

    def prefix_past(self, layers: dict[int, Tensor], past: Past | None = None) -> Past:
        """Put a prefix {layer: (n, 2, G, hd)} of keys, before rotation, and values in front of
        past's columns. The keys are rotated to the n positions that each row of past has reached
        (past None: 0..n-1), and the text continues after these.

        Raises ModelError for a prefix that does not fit the model."""
        c = self.config
        n = self._common_length(layers, (2, c.num_key_value_heads, c.head_dim))
        if not n:
            shapes = {i: tuple(t.shape) for i, t in layers.items()}
            raise ModelError(f"a prefix {shapes} does not fit a model of {c.num_hidden_layers} "
                             f"layers, {c.num_key_value_heads} key heads of width {c.head_dim}: "
                             "every layer's keys and values must be (n, 2, heads, width) with one "
                             "n")
        past = past or self.empty()
        position = self._next_positions(past, n)
        cos, sin = self._cos_sin(position, torch.float32)  # (B, n, 1, hd / 2)

        keys, values = list(past.keys), list(past.values)
        for i, prefix in layers.items():
            k, v = prefix.to(position.device).unbind(dim=1)  # (n, G, hd)
            rotated = rotate(k, cos, sin)  # (B, n, G, hd)
            keys[i] = self._in_front(rotated, past.keys[i])
            values[i] = self._in_front(v.expand_as(rotated), past.values[i])
        return Past(tuple(keys), tuple(values), past.real, past.position + n)

    def keys_and_values(self, layer: int, x: Tensor) -> Tensor:
        """The keys, before rotation, and values (N, 2, G, hd) that a layer's attention computes
        from its inputs x (N, D)."""
        x = x.to(self.embeddings)
        real = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)  # N rows of one token
        cos = x.new_ones(len(x), 1, self.config.head_dim // 2)
        sin = torch.zeros_like(cos)
        # through the module's call, which gathers the weights if FSDP shards them
        _, k, v = self.model.layers[layer](
            x, None, None, self._layout(real, self.empty().real, None), cos, sin, cache=True,
            output=False)
        return torch.stack((k, v), dim=1).squeeze(3)  # (N, 2, G, 1, hd) before

    def unrotated(self, keys: Tensor, first: int) -> Tensor:
        """Keys (n, G, hd) of a cache at positions first..first + n - 1 -> the keys before rotation,
        in fp32 or fp64."""
        position = torch.arange(first, first + len(keys), device=keys.device)
        cos, sin = self._cos_sin(position, torch.float32)
        _, factor = rope_frequencies(self.config)  # of cos and of sin
        return rotate(keys, cos, -sin) / factor**2

    def _common_length(self, layers: dict[int, Tensor], shape: tuple[int, ...]) -> int | None:
        """n, if every tensor is (n, *shape) and belongs to a layer of this model; else None."""
        shapes = {tuple(t.shape) for t in layers.values()}
        if len(shapes) != 1 or not all(0 <= i < self.config.num_hidden_layers for i in layers):
            return None
        common = shapes.pop()
        return common[0] if common[1:] == shape else None

    def _next_positions(self, past: Past, n: int) -> Tensor:
        """(B, n): the positions of the n columns that follow each row of past."""
        return past.position[:, None] + torch.arange(n, device=past.position.device)

    def _in_front(self, columns: Tensor, cached: Tensor | None) -> Tensor:
        """columns (B, n, G, hd), a layer's cache (B, G, S_l, hd) -> (B, G, n + S_l, hd)."""
        columns = columns.transpose(1, 2).to(self.embeddings)
        return columns if cached is None else torch.cat((columns, cached), dim=2)

    # ---- both

    def _run(self, ids: Tensor, past: Past | None, parent: Tensor | None = None, tap=None,
             weights=None, cache: bool = True, output: bool = True, wanted: Tensor | None = None,
             last: int | None = None) -> tuple[Tensor | None, Past | None]:
        """Run the blocks on the N real tokens -> the last block's output (N, D), and the Past if
        cache. The last block computes only the tokens wanted (B, T), or nothing if not output.
        With `last` the run ends with the input of that block, which is returned."""
        past, real = past or self.empty(), ids != PAD
        layout, start = self._layout(real, past.real, parent), pick(past.position, parent)
        column = torch.arange(ids.shape[1], device=ids.device)
        position = layout.select((start[:, None] + column).expand_as(ids))
        cos, sin = self._cos_sin(position, self.embeddings.dtype)

        outputs: list[Tensor | bool] = [True] * len(self.model.layers)
        outputs[-1] = output if wanted is None else layout.select(wanted).nonzero()[:, 0]
        x = self.model.embed_tokens(layout.select(ids))
        keys, values = [], []
        for i, layer in enumerate(self.model.layers):
            if tap:
                tap(i, x)
            if i == last:
                return x, None
            inputs = (x, past.keys[i], past.values[i], layout, cos, sin, cache, outputs[i])
            if weights:
                x, k, v = layer(*inputs, partial(weights, i))
            elif self.recompute:
                x, k, v = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, k, v = layer(*inputs)
            keys.append(k)
            values.append(v)

        if not cache:
            return x, None
        past_real = pick(past.real, parent).expand(len(ids), -1)
        return x, Past(tuple(keys), tuple(values), torch.cat((past_real, real), dim=1),
                       start + real.sum(dim=1))

    def _layout(self, real: Tensor, past_real: Tensor, parent: Tensor | None) -> Layout:
        c = self.config
        return Layout(real, past_real, parent, c.num_attention_heads // c.num_key_value_heads,
                      self.embeddings.dtype)

    def _cos_sin(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position (...) -> cos, sin (..., 1, hd / 2), computed in fp32 as transformers does."""
        frequencies, factor = rope_frequencies(self.config)
        angle = position[..., None, None].float() * frequencies.to(position.device)
        return (factor * angle.cos()).to(dtype), (factor * angle.sin()).to(dtype)


# --------------------------------------------------------------------------------------------------
# prompts


class Prompt(NamedTuple):
    """A prompt: rows that enter layers as inputs, or a prefix of keys and values for attention.

    Rows (n, D) at 0, keep: prompt tuning (Lester et al. 2021). Rows at 0 and the last k, cut: deep
    prompt tuning as in the paper, 3.2. Rows at every layer, keep: VPT-deep. A prefix (n, 2, G, hd),
    keys before rotation and values: prefix tuning (Li and Liang 2021).

    The tensors may be trained in fp32 whatever the model's dtype: they are cast where they enter
    the model."""

    layers: dict[int, Tensor]  # {layer: (n, D)}, or {layer: (n, 2, G, hd)}
    cut: bool = False  # rows only: drop the rows' outputs at each layer

    @property
    def is_prefix(self) -> bool:
        return any(t.dim() == 4 for t in self.layers.values())

    @property
    def n(self) -> int:
        """The number of rows, or of columns of a prefix."""
        return len(next(iter(self.layers.values()), ()))

    def past(self, model: Llama, past: Past | None = None) -> Past:
        """The prompt as a Past, after what past holds (None: at the beginning)."""
        if self.is_prefix:
            return model.prefix_past(self.layers, past)
        return model.prompt_past(self.layers, self.cut, past=past)

    def tensors(self) -> dict[str, Tensor]:
        """{"layers.I": ...} as a file keeps them: fp32, contiguous, detached, on the CPU. They may
        share the prompt's memory."""
        return {f"layers.{i}": t.detach().float().cpu().contiguous()
                for i, t in sorted(self.layers.items())}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], cut: bool = False) -> Prompt:
        """The inverse of `tensors`. Other names, such as layers.0.sd, are ignored."""
        layers = {}
        for name, t in tensors.items():
            match = re.fullmatch(r"layers\.(\d+)", name)
            if match:
                layers[int(match[1])] = t
        return cls(dict(sorted(layers.items())), cut)

    def vectors(self) -> dict[int, Tensor]:
        """Flattened, {layer: (n, W)}: W is D of rows, and 2 G hd of a prefix."""
        return {i: t.flatten(1) for i, t in self.layers.items()}

    def to(self, device: str | torch.device) -> Prompt:
        return self._replace(layers={i: t.to(device) for i, t in self.layers.items()})


def ensemble(logits: list[Tensor]) -> Tensor:
    """Logits (..., V) of several prompts -> the log of their averaged token probabilities. The
    logits of a single prompt are returned as they are."""
    if len(logits) == 1:
        return logits[0]
    log_probs = torch.stack([x.float().log_softmax(dim=-1) for x in logits])
    return log_probs.logsumexp(dim=0) - math.log(len(logits))


@torch.no_grad()
def generate(model: Llama, ids: list[list[int]], past: Past | list[Past] | None, max_new: int,
             stop: set[int] = frozenset(), parent: Tensor | None = None,
             choose: Callable[[list[int], Tensor], Tensor] | None = None) -> list[list[int]]:
    """Continuations of ragged beginnings, each up to and including its first token of stop. They
    are greedy, or choose(rows, logits (R, V)) -> (R,) names the next token of these beginnings.

    past has batch 1 (a prompt) or one row for each beginning; with parent, beginning i continues
    row parent[i] of past. The token probabilities of a list of pasts are averaged. No beginning may
    be empty. A finished row leaves the batch."""
    if not all(ids) or max_new < 1:
        raise ModelError("generate needs max_new of at least 1, and a token in every beginning: "
                         "put BOS first")
    answers = [[] for _ in ids]
    if not ids:
        return answers
    device = model.embeddings.device
    outputs = [model(pad(ids).to(device), p, parent=parent)
               for p in (past if isinstance(past, list) else [past])]
    rows = torch.arange(len(ids), device=device)
    last = torch.tensor([len(r) - 1 for r in ids], device=device)
    logits = ensemble([model.logits(h[rows, last]) for h, _ in outputs])
    decoding = Decoding(model, max_new, stop, choose)
    decoding.append([*enumerate(answers)], logits, [p for _, p in outputs])
    decoding.run()
    return answers


class Decoding:
    """Answers that grow together, a token each at a time, though they may have begun at different
    times: the fewer rows a product has, the more each of them costs. A finished row leaves."""

    def __init__(self, model: Llama, max_new: int, stop: set[int] = frozenset(),
                 choose: Callable[[list[int], Tensor], Tensor] | None = None):
        """See generate."""
        self.model, self.max_new, self.stop, self.choose = model, max_new, stop, choose
        self.rows: list[tuple[int, list[int]]] = []  # numbers for choose, and answers
        self.pasts: list[Past] = []  # what the rows have read, all but their answers' last tokens

    @torch.no_grad()
    def add(self, rows: list[tuple[int, list[int]]], pasts: list[Past]) -> None:
        """Let the answers of rows (number, answer) grow in place, those that are not finished.
        pasts: one for each of the prompts whose probabilities are averaged, with as many rows."""
        unfinished = [i for i, (_, answer) in enumerate(rows)
                      if answer[-1] not in self.stop and len(answer) < self.max_new]
        if not unfinished:
            return
        if len(unfinished) < len(rows):
            index = torch.tensor(unfinished, device=pasts[0].real.device)
            pasts = [p.take(index) for p in pasts]
        if self.rows:
            pasts = [stack([*pair]) for pair in zip(self.pasts, pasts)]
        self.rows, self.pasts = self.rows + [rows[i] for i in unfinished], pasts

    def append(self, rows: list[tuple[int, list[int]]], logits: Tensor, pasts: list[Past]) -> None:
        """Append the next token to every answer, given its logits (R, V), and add the R rows."""
        numbers = [number for number, _ in rows]
        tokens = self.choose(numbers, logits) if self.choose else logits.argmax(dim=-1)
        for (_, answer), token in zip(rows, tokens.tolist()):
            answer.append(token)
        self.add(rows, pasts)

    @torch.no_grad()
    def run(self, left: int = 0) -> None:
        """Decode until at most so many rows are left."""
        while len(self.rows) > left:
            last = torch.tensor([answer[-1:] for _, answer in self.rows],
                                device=self.pasts[0].real.device)
            outputs = [self.model(last, p) for p in self.pasts]
            logits = ensemble([self.model.logits(h[:, 0]) for h, _ in outputs])
            rows, self.rows = self.rows, []
            self.append(rows, logits, [p for _, p in outputs])


def pad(rows: list[list[int]], value: int = PAD) -> Tensor:
    """Ragged rows -> (B, T) int64, filled on the right."""
    T = max(map(len, rows), default=0)
    padded = [r + [value] * (T - len(r)) for r in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), T)


# --------------------------------------------------------------------------------------------------
# loading


def load(folder: str | Path, dtype: str | torch.dtype | None = None, device: str = "cpu",
         report: Callable[[str], object] = warnings.warn) -> Llama:
    """A frozen model from a Hugging Face folder: config.json and model.safetensors, or shards.

    dtype None keeps the file's. Weights are mapped from the file and converted one tensor at
    a time, so no second copy of them is made. report is given a line for each thing in which the
    folder is not as usual. Raises ModelError for anything missing, damaged, misshapen or
    quantised."""
    folder = Path(folder)
    config = read_config(folder / "config.json")
    weights = _named(folder, stored_tensors(folder), report)
    refuse_quantised(folder, weights, report)
    config = _with_head(folder, config, weights, report)
    with torch.device("meta"):
        model = Llama(config)
    return filled(model, weights, folder, dtype, device)


def filled(model: nn.Module, weights: dict[str, Stored], folder: Path,
           dtype: str | torch.dtype | None, device: str) -> nn.Module:
    """A model without numbers, which was made on the meta device -> the same, frozen, with the
    weights of a folder {name in the model: tensor of a file}. Raises ModelError unless these are
    all that the model has, of its shapes and finite."""
    _check_shapes(folder, {name: tuple(t.shape) for name, t in model.state_dict().items()}, weights)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    tensors = {}
    for path in sorted({w.path for w in weights.values()}):
        with _open(path) as file:
            for name, w in weights.items():
                if w.path == path:
                    own = file.get_tensor(w.name)
                    tensors[name] = _checked(w, own.to(device, dtype), own)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


class Stored(NamedTuple):
    """A tensor of a weights file, as the file's header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it, such as BF16


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold a folder's weights, whether they are there or not: a single
    file, else those of the index, else all model-00001-of-00002.safetensors."""
    single, index = "model.safetensors", folder / "model.safetensors.index.json"
    shards = [re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", p.name)
              for p in sorted(folder.glob("model-*-of-*.safetensors"))]
    counts = {match[2] for match in shards if match}
    has_index = index.exists() or index.is_symlink()  # a broken link is not passed over
    if (folder / single).exists() or not has_index and not counts:
        return [single]
    if not has_index:
        if len(counts) > 1:
            raise ModelError(f"{folder}: holds shards of {len(counts)} saves (of "
                             f"{', '.join(sorted(counts))} files): delete those that are not meant")
        count = counts.pop()
        return [f"model-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map of tensor names to files: fetch it again")
    for name, file in weight_map.items():
        # a path from the index could reach any file of this machine, so only plain file names are
        # accepted; symbolic links are followed, because the hub's cache consists of them
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]{0,200}", file, re.A):
            raise ModelError(f"{index}: {name!r:.80} is said to be in {file!r:.200}, which is not "
                             "a file name in this folder: if you trust the folder's maker, put "
                             "the file there, and write its name alone")
    return sorted(set(weight_map.values()))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder, by their names. Raises ModelError for an adapter that is not
    merged."""
    files = weight_files(folder)
    if (folder / files[0]).exists() and (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: an adapter (adapter_config.json) beside the weights, which "
                         "transformers would add to them: merge it with PEFT's "
                         "merge_and_unload(), or delete the adapter's files")
    if not any((folder / name).exists() for name in files):
        raise FileError(folder / files[0], f"no such file: {EXPECTED}")
    stored: dict[str, Stored] = {}
    for file_name in files:
        path = folder / file_name
        with _open(path) as file:
            for name in file.keys():
                if ADAPTERS.search(name):
                    raise ModelError(
                        f"{path}: tensor {name!r:.120} is of an adapter that is not merged: merge "
                        "it with PEFT's merge_and_unload(), save the model, and give that folder")
                if name in stored:
                    raise ModelError(
                        f"{path}: tensor {name!r:.120} is in {stored[name].path.name} too: delete "
                        "it from the file in which it is not meant: `python -c \"import sys; from "
                        "safetensors.torch import load_file as l, save_file as s; f, n = "
                        "sys.argv[1:]; s({k: t.clone() for k, t in l(f).items() if k != n}, f, "
                        f"dict(format='pt'))\" {shlex.quote(str(path))} {shlex.quote(name)}`")
                piece = file.get_slice(name)
                stored[name] = Stored(path, name, tuple(piece.get_shape()), piece.get_dtype())
    return stored


@contextmanager
def _open(path: Path) -> Iterator:
    """The safetensors file at path."""
    try:
        with safe_open(regular(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file, though the folder's index or layout asks for "
                         "it: fetch it again") from None
    except (SafetensorError, OSError) as e:
        raise FileError(path, f"not a readable safetensors file ({cause(e)}): fetch it "
                              "again") from None


# The types of weights that are numbers themselves. Everything else is a code for numbers.
FLOATS = ("F64", "F32", "BF16", "F16")
# Names of quantised weights, and of the scales that their codes are multiplied by.
CODES = re.compile(r"(weight_scale\w*|input_scale|[kv]_scale|absmax|SCB|qweight|qzeros|scales|"
                   r"g_idx)$")
# What old files and other libraries keep beside the weights, and what follows from config.json.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|causal_mask|masked_bias|attn\.bias|position_ids)$")
# Weights of an adapter that stands beside the layers that it changes.
ADAPTERS = re.compile(r"\.(lora_|ia3_|hada_|lokr_|base_layer\.|modules_to_save\.|ln_tuning_)")


def refuse_quantised(folder: Path, weights: dict[str, Stored], report,
                     model_class: str = "AutoModelForCausalLM") -> None:
    """Raise ModelError if weights, under the names that they have in the model, are codes for
    numbers. Report a config.json that only says so. model_class: of transformers, for the
    remedy."""
    codes = [t for name, t in weights.items()
             if t.dtype not in FLOATS or CODES.search(name)]
    c = read_json(folder / "config.json")
    about = c.get("quantization_config") or c.get("quantization") or {}
    if not isinstance(about, dict):
        about = {}
    method = about.get("quant_method") or ("mlx" if "group_size" in about else "a quantiser")
    if codes or method == "bitnet":  # whose layers compute otherwise, whatever they are stored as
        first = codes[0] if codes else next(iter(weights.values()))
        raise ModelError(
            f"{first.path}: quantised by {method!s:.40} ({len(codes)} of {len(weights)} "
            f"tensors, first {first.name!r:.80}, {first.dtype}): give the folder it "
            f"was made from; or dequantise it {_dequantised(folder, method, model_class)}")
    if about:
        report(f"{folder}: config.json says quantised by {method!s:.40}, and the weights are plain "
               "numbers: they are used as they are")


def _dequantised(folder: Path, method: str, model_class: str) -> str:
    """How a quantised folder becomes one of plain numbers."""
    if method != "bitsandbytes":
        return "with the tool that made it, and give the folder that it writes"
    # without save_original_format transformers 5 would quantise again, which raises
    return (f"by `python -c \"import sys; from transformers import {model_class} as A; "
            "A.from_pretrained(sys.argv[1]).dequantize().save_pretrained('NEW', "
            f"save_original_format=False)\" {shlex.quote(str(folder))}`, copy the tokenizer's "
            "files there, and give NEW")


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
PARTS = ("model", "layers", "embed_tokens", "norm", "lm_head")  # what a name in a LLaMA begins with
ANCHOR = "layers.0.input_layernorm.weight"  # every LLaMA has it once


def _named(folder: Path, stored: dict[str, Stored], report) -> dict[str, Stored]:
    """The tensors under the names that they have in a LLaMA, whatever a trainer wrapped around it.
    Buffers are skipped, and what stands beside the decoder, such as a reward model's head, is left
    out. Raises ModelError for two tensors of one name."""
    anchors = [name for name in stored if name.endswith(ANCHOR)]
    wrapper = anchors[0].removesuffix(ANCHOR).removesuffix("model.") if len(anchors) == 1 else ""

    named: dict[str, Stored] = {}
    left_out = []
    for name, tensor in stored.items():
        plain = name.removeprefix(wrapper)
        if BUFFERS.search(plain):
            continue
        if name.endswith(HEAD):
            plain = HEAD
        first = plain.split(".")[0]
        if first not in PARTS:
            left_out.append(name)
            continue
        if first not in ("model", "lm_head"):
            plain = f"model.{plain}"
        if plain in named:
            raise ModelError(f"{tensor.path}: tensor {name!r:.120} is there twice, as "
                             f"{named[plain].name!r:.120} too: delete the one that is not meant")
        named[plain] = tensor
    if left_out:
        report(f"{folder}: {len(left_out)} tensors beside the decoder are left out, such as "
               f"{left_out[0]!r:.120}")
    return named


def _with_head(folder: Path, config: Config, weights: dict[str, Stored], report) -> Config:
    """config with the head that the weights have. A tied model's file may hold its matrix under
    either name, or a copy; merged and fine-tuned models have another head and still say tied."""
    head, embeddings = weights.get(HEAD), weights.get(EMBEDDINGS)
    if not config.tie_word_embeddings or not head:
        return config
    if not embeddings:
        weights[EMBEDDINGS] = weights.pop(HEAD)
        return config
    with _open(head.path) as one, _open(embeddings.path) as other:
        if torch.equal(one.get_tensor(head.name), other.get_tensor(embeddings.name)):
            del weights[HEAD]
            return config
    report(f"{folder}: config.json says that head and embeddings are tied, but the file's "
           f"{HEAD} is another matrix: it is used, as transformers does")
    return replace(config, tie_word_embeddings=False)


def _check_shapes(folder: Path, shapes: dict[str, tuple], weights: dict[str, Stored]) -> None:
    """Raise ModelError unless weights are those of a model with these tensors and shapes."""
    for name, w in weights.items():
        if name not in shapes:
            raise ModelError(f"{w.path}: tensor {w.name!r:.120} has no place in the model that "
                             "config.json describes: the two are not of one model, or it is no "
                             "plain model of its type; choose another folder")
        if w.shape == shapes[name]:
            continue
        if name in (HEAD, EMBEDDINGS) and w.shape[1:] == shapes[name][1:]:
            raise ModelError(f"{w.path}: tensor {w.name!r} has {w.shape[0]} rows, config.json a "
                             f"vocab_size of {shapes[name][0]}: if the tokenizer has "
                             f"{w.shape[0]} tokens, write \"vocab_size\": {w.shape[0]} there")
        raise ModelError(f"{w.path}: tensor {w.name!r:.120} has shape {w.shape}, config.json "
                         f"asks for {shapes[name]}: the two are not of one model; "
                         "fetch both again")
    missing = sorted(shapes.keys() - weights.keys())
    if missing == [HEAD]:
        raise ModelError(f"{folder}: the weights lack {HEAD!r}: if head and embeddings are one "
                         "matrix, write \"tie_word_embeddings\": true in config.json; else fetch "
                         "the whole folder again")
    if missing:
        raise ModelError(f"{folder}: the weights lack {len(missing)} tensors that config.json asks "
                         f"for, first {missing[0]!r}{_home(folder, missing[0])}: fetch the whole "
                         "folder again")


def _home(folder: Path, name: str) -> str:
    """Which file an index says that a tensor is in."""
    index = folder / "model.safetensors.index.json"
    file = read_json(index)["weight_map"].get(name) if index.exists() else None
    return f", which {index.name} says is in {file}" if file else ""


def _checked(stored: Stored, weight: Tensor, own: Tensor) -> Tensor:
    """weight, if it is finite. own: the same as the file has it."""
    if _is_finite(weight):
        return weight
    fault = f"{stored.path}: tensor {stored.name!r:.120} holds numbers that are not finite"
    if _is_finite(own.to(torch.bfloat16)):
        raise ModelError(f"{fault} in {weight.dtype}: use --dtype bfloat16")
    raise ModelError(f"{fault}: fetch it again; if its maker's file has them too, choose an "
                     "earlier checkpoint or another model, for no dtype helps")


def _is_finite(t: Tensor) -> bool:
    # torch.isfinite would allocate another tensor of this size
    return all(map(math.isfinite, torch.stack(t.aminmax()).tolist()))


def cause(e: Exception) -> str:
    """A plain description of an error that safetensors or the system raised."""
    text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
    # checked first: for a truncated file safetensors reports an incomplete header
    if "incomplete" in text.lower():
        return "it is cut short"
    if "header" in text.lower():
        return "its header is damaged"
    return text.splitlines()[0] if text else type(e).__name__
