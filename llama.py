"""A frozen LLaMA whose prompt is a KV cache that no token made. Needs torch and safetensors.

A prompt reaches the text only through attention, as extra keys and values. So there are no hooks
here: the forward takes a `Past`, the argument that any KV cache needs, and gradients flow through
it to the prompt.

    model = load("folder", dtype="bfloat16")               # any HF folder with model_type llama
    past = Prompt({0: rows}, cut=False).past(model)        # rows (n, D): prompt tuning
    answers = generate(model, [[1, 5, 7]], past, max_new=20, stop={2})

This module knows weights, positions and caches. It knows nothing of text, data, priors or files
it could write.

B batch, T tokens, n prompt rows, S cached columns, D width, V vocabulary, H heads, G key/value
heads, hd head width, L layers. Names of weights and configuration are Hugging Face's.
"""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAD = -1  # marks the empty places at the right end of a row of token ids


class ModelError(ValueError):
    """A model folder or a prompt that cannot be used: what, where, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # a text ends with any of these


def read_config(path: Path) -> Config:
    """Read a Hugging Face config.json, in the form of transformers 4 or of 5 (rope_parameters).

    Raises ModelError for another architecture or rope type, a missing or impossible size."""
    c = _read_json(path)
    if c.get("model_type") != "llama":
        raise ModelError(f"{path}: model_type is {c.get('model_type')!r}, and only 'llama' is "
                         "known here: choose a folder of Llama, TinyLlama, SmolLM or another "
                         "LLaMA-architecture model")
    if c.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act is {c['hidden_act']!r}, a LLaMA has 'silu': "
                         "choose another folder")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{path}: the rope settings are {rope!r:.80}, not an object: repair the "
                         "file")
    # "type" is the old spelling
    rope = {**rope, "rope_type": str(rope.get("rope_type", rope.get("type", "default")))}
    needs = {"default": (), "linear": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needs:
        raise ModelError(f"{path}: rope type {rope['rope_type']!r:.80} is not known, only "
                         f"{', '.join(needs)}: choose another model")
    for key in needs[rope["rope_type"]]:
        _check(path, f"{key!r} of rope type {rope['rope_type']!r}", rope.get(key), *ROPE)
    if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ModelError(f"{path}: llama3 rope needs low_freq_factor below high_freq_factor: "
                         "repair the file")
    heads, width = c.get("num_attention_heads"), c.get("hidden_size")
    several = type(heads) is type(width) is int and heads > 0
    if rope.get("rope_theta") is not None:
        c["rope_theta"] = rope["rope_theta"]
    defaults = {"head_dim": width // heads if several else None, "num_key_value_heads": heads}
    for key, (default, *allowed) in CONFIG.items():
        if c.get(key) is None:
            c[key] = defaults.get(key, default)
        _check(path, key, c[key], *allowed)
    c["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if c.get("bos_token_id") is not None:
        _check(path, "bos_token_id", c["bos_token_id"], int, 0, c["vocab_size"] - 1)
    generation = path.with_name("generation_config.json")  # chat models name further ends there
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = c.get("eos_token_id") if eos is None else eos
    c["eos_token_id"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    for token in c["eos_token_id"]:
        _check(path, "eos_token_id", token, int, -1, 2**40)
    if c["num_attention_heads"] % c["num_key_value_heads"] or c["head_dim"] % 2:
        raise ModelError(f"{path}: {heads} heads of width {c['head_dim']} over "
                         f"{c['num_key_value_heads']} key/value heads: the heads must divide "
                         "evenly and their width be even: repair the file")
    return Config(**{f.name: c[f.name] for f in fields(Config) if c.get(f.name) is not None})


# what config.json may say: key -> default, type, least, most. Nothing is allocated by these sizes,
# but an absurd one takes long to find out
CONFIG = {
    "hidden_size": (None, int, 1, 2**17), "intermediate_size": (None, int, 1, 2**20),
    "num_hidden_layers": (None, int, 1, 2**10), "num_attention_heads": (None, int, 1, 2**12),
    "num_key_value_heads": (None, int, 1, 2**12), "head_dim": (None, int, 1, 2**12),
    "vocab_size": (32000, int, 1, 2**24), "max_position_embeddings": (2048, int, 1, 2**30),
    "rope_theta": (10000.0, float, 1, 1e15), "rms_norm_eps": (1e-6, float, 1e-30, 1),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"),
                    (False, bool, False, True))}
ROPE = (float, 1e-6, 1e9)


def _check(path: Path, key: str, value, type_: type, least, most) -> None:
    """A bool is no number here, and a whole number is a float."""
    if type(value) not in ((int, float) if type_ is float else (type_,)) \
            or not least <= value <= most:  # as NaN is not
        expected = {bool: "true or false", int: f"a whole number from {least} to {most}",
                    float: f"a number from {least:g} to {most:g}"}[type_]
        raise ModelError(f"{path}: {key} is {value!r:.80}, expected {expected}: repair the file")


def _read_json(path: Path) -> dict:
    try:
        if regular(path).stat().st_size > 2**28:
            raise OSError("of a size that none has")
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a Hugging Face model folder with "
                         "config.json, tokenizer.json and safetensors weights") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{path}: cannot be read as JSON ({e}): fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, expected a JSON object: "
                         "fetch it again")
    return value


def regular(path: Path) -> Path:
    """path, if it is a file, a link to one, or nothing: opening a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError("a folder, a pipe or a device, not a file")
    return path


# --------------------------------------------------------------------------------------------------
# rotary positions


def rope_frequencies(c: Config) -> Tensor:
    """(hd / 2,) fp32 angles per position. llama3 scaling as in Llama 3.1: long wavelengths are
    stretched by `factor`, short ones kept, those between blended."""
    f = 1.0 / c.rope_theta ** (
        torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim)
    s = c.rope_scaling or {"rope_type": "default"}
    if s["rope_type"] == "linear":
        return f / s["factor"]
    if s["rope_type"] == "llama3":
        low, high, old = (s["low_freq_factor"], s["high_freq_factor"],
                          s["original_max_position_embeddings"])
        wavelength = 2 * math.pi / f
        blend = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * f / s["factor"] + blend * f
    return f


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (N, heads, hd) by cos, sin (N, 1, hd / 2); HF's half-split layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --------------------------------------------------------------------------------------------------
# the cache


class Past(NamedTuple):
    """What the layers have seen: a prompt's rows, a text's beginning, or one after the other.

    Prompt columns come first and are always real. A layer's column count is S plus its prompt
    rows, which differ between layers in cut mode; a layer that has seen nothing holds None. A
    batch of 1 serves any batch."""

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
    """Rows of t (1 or P, ...); a batch of 1 serves any."""
    # index_select, not t[parent]: on the CPU that one's gradient is summed by threads in any order
    return t if t is None or parent is None or len(t) == 1 else t.index_select(0, parent)


# --------------------------------------------------------------------------------------------------
# the model


class Group(NamedTuple):
    """Rows, one after the other, that go on from one cached row and are attended in one call."""

    cached: int  # the row of the cache
    columns: int  # its content columns up to the last that holds a token
    tokens: int  # real tokens of these rows
    seen: Tensor  # (tokens, columns + tokens) bool: what each of them may look at


class Layout:
    """Where the N real tokens of a padded batch (B, T) stand, and what each of them may see.

    Norms, projections and the MLP work on the real tokens alone, (N, D); only attention knows rows.
    It is done for the whole padded batch at once or group by group, where nothing is padded and
    what rows have in common is not copied for each: whichever means less work."""

    CALL = 2000  # what one more attention call costs, in pairs of query and key

    def __init__(self, real: Tensor, past: Tensor, parent: Tensor | None, queries: int,
                 dtype: torch.dtype):
        """real (B, T) and past (1 or P, S) bool: which places hold a token. parent (B,): the row of
        past that each row goes on from, None for its own. queries: heads to a key/value head."""
        self.past, self.parent, self.queries, self.dtype = past, parent, queries, dtype
        (self.B, self.T), self.S, self.masks = real.shape, past.shape[1], {}
        lengths = real.sum(dim=1).tolist()
        self.index = None if min(lengths, default=0) == self.T else real.flatten().nonzero()[:, 0]
        self.groups = []
        if real.device.type == "cpu" and self.T > 1:  # a GPU wants few launches
            groups = self._groups(lengths)
            pairs = sum(g.tokens * g.seen.shape[1] + self.CALL for g in groups)
            if pairs < self.B * self.T * (self.S + self.T):
                self.groups = groups

    def _groups(self, lengths: list[int]) -> list[Group]:
        parent = range(self.B) if self.parent is None else self.parent.tolist()
        columns = [max((i + 1 for i, r in enumerate(row) if r), default=0)
                   for row in self.past.tolist()]
        groups = []
        for _, rows in groupby(range(self.B), key=parent.__getitem__):
            rows = list(rows)
            p = parent[rows[0]] if len(columns) > 1 else 0
            row = torch.tensor(rows).repeat_interleave(torch.tensor([lengths[r] for r in rows]))
            own = (row[:, None] == row).tril()
            groups.append(Group(p, columns[p], len(row), torch.cat(
                (self.past[p, :columns[p]].expand(len(row), -1), own), dim=1)))
        return groups

    def real(self, t: Tensor) -> Tensor:
        """(B, T) -> (N,), what stands at the real tokens."""
        return t.flatten() if self.index is None else t.flatten().index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """(N, heads, hd) -> (B, heads, T, hd), with zeros in the empty places."""
        if self.index is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.index, x)
        return x.view(self.B, self.T, *x.shape[1:]).transpose(1, 2)

    def cache(self, new: Tensor, old: Tensor | None) -> Tensor:
        """Keys or values of these tokens (N, G, hd) after those of the cache (1 or P, G, S_l, hd)
        -> (B, G, S_l + T, hd)."""
        new = self.pad(new)
        if old is None:
            return new
        return torch.cat((pick(old, self.parent).expand(self.B, -1, -1, -1), new), dim=2)

    def attend_batch(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (N, H, hd), keys and values as `cache` makes them -> (N, H hd)."""
        n = keys.shape[2] - self.S - self.T  # prompt columns of this layer
        if n not in self.masks:
            past = pick(self.past, self.parent)[:, None].expand(-1, self.T, -1)
            own = torch.ones(self.T, self.T, dtype=torch.bool, device=past.device).tril()
            self.masks[n] = self._mask(n, torch.cat(
                (past, own.expand(len(past), -1, -1)), dim=2)[:, None])
        a = attention(self.pad(q), keys, values, self.masks[n]).transpose(1, 2).flatten(0, 1)
        return (a if self.index is None else a.index_select(0, self.index)).flatten(1)

    def attend_groups(self, q: Tensor, k: Tensor, v: Tensor, k0: Tensor | None,
                      v0: Tensor | None) -> Tensor:
        """q (N, H, hd), k and v (N, G, hd), the cache k0 and v0 -> (N, H hd)."""
        n = 0 if k0 is None else k0.shape[2] - self.S
        if n not in self.masks:
            self.masks[n] = [self._mask(n, g.seen[None, None]) for g in self.groups]
        sizes = [g.tokens for g in self.groups]
        qs, ks, vs = (t.transpose(0, 1)[None].split(sizes, dim=2) for t in (q, k, v))
        if k0 is not None:
            k0, v0 = k0.split(1), v0.split(1)  # the gradient of indexing would be a whole cache
            ks, vs = ([torch.cat((old[g.cached][:, :, :n + g.columns], x), dim=2)
                       for g, x in zip(self.groups, new)] for old, new in ((k0, ks), (v0, vs)))
        a = torch.cat([attention(*each) for each in zip(qs, ks, vs, self.masks[n])], dim=2)
        return a[0].transpose(0, 1).flatten(1)

    def _mask(self, n: int, seen: Tensor) -> Tensor:
        """(B, 1, T, S) bool -> (B, 1, R T, n + S), 0 where a query sees a key and -inf elsewhere;
        SDPA would make that of a bool mask in every layer."""
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return F.pad(mask.masked_fill_(~seen, -math.inf), (n, 0)).repeat(1, 1, self.queries, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, T, hd), k and v (B, G, S, hd), mask (1 or B, 1, H / G T, S) -> (B, H, T, hd).

    The queries of one key/value head are stacked along time: keys and values are never repeated,
    and every kernel takes the mask (enable_gqa with a mask falls to the slow one on CUDA)."""
    B, H, T, hd = q.shape
    q = q.reshape(B, k.shape[1], -1, hd)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # 2 to 3 times the fused kernel there
        a = torch.matmul(q * hd ** -0.5, k.transpose(2, 3)).add_(mask).softmax(dim=-1) @ v
    else:
        a = F.scaled_dot_product_attention(q, k, v, mask)
    return a.reshape(B, H, T, hd)  # a CUDA kernel returns it transposed


class Block(nn.Module):
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
                sin: Tensor, cache: bool, output: Tensor | bool = True):
        """x (N, D), the layer's cache k0, v0 (1 or P, G, S_l, hd) or None, cos and sin
        (N, 1, hd / 2) -> (output (N, D), keys, values (B, G, S_l + T, hd)).

        Keys and values are None unless cache. output int64: of these of the N tokens alone; False:
        of none, it is None."""
        h = self.input_layernorm(x)
        heads = lambda name: self.self_attn[name](h).unflatten(-1, (-1, self.hd))
        k, v, keys, values = rotate(heads("k_proj"), cos, sin), heads("v_proj"), None, None
        if cache or not layout.groups:
            keys, values = layout.cache(k, k0), layout.cache(v, v0)
        if output is False:
            return None, keys, values
        q = rotate(heads("q_proj"), cos, sin)
        a = layout.attend_groups(q, k, v, k0, v0) if layout.groups \
            else layout.attend_batch(q, keys, values)
        if output is not True:
            x, a = x.index_select(0, output), a.index_select(0, output)
        x = x + self.self_attn.o_proj(a)
        h = self.post_attention_layernorm(x)
        x = x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))
        return (x, keys, values) if cache else (x, None, None)


class Llama(nn.Module):
    """A LLaMA. `state_dict` has Hugging Face's tensor names; a tied model has no lm_head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.first, self.inputs = 0, None  # see part
        self.recompute = False  # blocks keep their inputs alone for the backward, and run twice
        self.model = nn.ModuleDict(dict(
            # its own normal_ would, for a model without memory yet, import a second of torch
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
        """The Past of nothing at all, for a model without a prompt."""
        nothing, device = (None,) * len(self.model.layers), self.embeddings.device
        return Past(nothing, nothing, torch.ones(1, 0, dtype=torch.bool, device=device),
                    torch.zeros(1, dtype=torch.int64, device=device))

    def forward(self, ids: Tensor, past: Past | None = None,
                tap: Callable[[int, Tensor], None] | None = None,
                parent: Tensor | None = None) -> tuple[Tensor, Past]:
        """ids (B, T), padded on the right with PAD -> hidden states (B, T, D) after the final norm,
        zero in the empty places, and the Past with these tokens in it.

        tap(i, x) is shown the input x (N, D) of every layer i at the N real tokens, row after row,
        and of i = L what comes after the final norm (transformers' convention for hidden_states).
        parent (B,) int64: row i goes on from row parent[i] of past; as past.take(parent)."""
        x, past = self._run(ids, past, parent, tap)
        x = self.model.norm(x)
        if tap:
            tap(self.config.num_hidden_layers, x)
        x = x.new_zeros(*ids.shape, x.shape[-1]).masked_scatter((ids != PAD)[..., None], x)
        return x, past

    def states(self, ids: Tensor, past: Past | None, parent: Tensor | None,
               wanted: Tensor) -> Tensor:
        """wanted (B, T) bool -> (number wanted, D): as forward, but of these tokens alone. No Past
        is made, and the last block works out no others."""
        return self.model.norm(self._run(ids, past, parent, cache=False, wanted=wanted)[0])

    def extend(self, ids: Tensor, past: Past | None = None,
               tap: Callable[[int, Tensor], None] | None = None) -> Past:
        """The Past alone: the last block stops at its keys and values, no more is wanted."""
        if ids.shape[1] == 0:
            return past or self.empty()
        return self._run(ids, past, tap=tap, output=False)[1]

    def part(self, first: int, last: int, inputs: Tensor | None = None) -> Llama:
        """Blocks first..last - 1 as a model of their own, with the same weights; layers keep their
        numbers. inputs (M, D) are the inputs of block first as a tap shows them, and are this
        model's vocabulary: its token ids are their row numbers."""
        part = copy.copy(self)
        part._modules = {**self._modules, "model": nn.ModuleDict({
            **self.model, "layers": self.model.layers[first - self.first:last - self.first]})}
        part.first, part.inputs = first, inputs
        return part

    def logits(self, h: Tensor) -> Tensor:
        """h (..., D) -> (..., V). Pick positions first: (B, T, V) of 128k tokens is gigabytes."""
        return F.linear(h, self.embeddings if self.config.tie_word_embeddings
                        else self.lm_head.weight)

    def prompt_past(self, rows: dict[int, Tensor], cut: bool,
                    tap: Callable[[int, Tensor], None] | None = None,
                    past: Past | None = None) -> Past:
        """Run prompt rows {layer: (n, D)} after what past has seen (None: nothing, so at positions
        0..n-1) -> the Past of both, of past's batch.

        Rows at layer i replace the prompt's part of that layer's input. cut drops the layer's
        outputs there, so that only layers with rows have prompt columns (paper 3.2); otherwise they
        go on, as in prompt tuning. tap(i, x) is shown the prompt's part (B n, D) of every layer's
        input that has one, and, if it goes on to the end, what comes after the final norm."""
        first, L, D = self.first, self.config.num_hidden_layers, self.config.hidden_size
        shapes = {layer: tuple(r.shape) for layer, r in rows.items()}
        n = next(iter(shapes.values()), (0,))[0]
        if not rows or any(not first <= layer < L for layer in rows) or any(
                s != (n, D) for s in shapes.values()):
            raise ModelError(f"prompt rows {shapes} do not fit a model of {L} layers and width "
                             f"{D}: every entry must be {{layer: (n, width)}} with one n")
        past = past or self.empty()
        B = len(past.position)
        position = past.position[:, None] + torch.arange(n, device=self.embeddings.device)
        real = torch.ones(B, n, dtype=torch.bool, device=position.device)
        layout, (cos, sin) = self._layout(real, past.real, None), self._angles(position.flatten())
        x, keys, values = None, [], []
        for i, layer, *seen in zip(range(first, L), self.model.layers, past.keys, past.values):
            x = rows[i].to(self.embeddings.dtype).repeat(B, 1) if i in rows else x
            if x is None:
                keys.append(seen[0]), values.append(seen[1])
                continue
            if tap:
                tap(i, x)
            x, k, v = layer(x, *seen, layout, cos, sin, cache=True, output=not cut
                            and i + 1 not in rows and (i + 1 < L or tap is not None))
            # prompt columns stand first: an order means nothing to attention, positions are rotated
            keys.append(k.roll(n, 2)), values.append(v.roll(n, 2))
        if tap and x is not None:
            tap(L, self.model.norm(x))
        return Past(tuple(keys), tuple(values), past.real, past.position + n)

    def prefix_past(self, keys: dict[int, Tensor], values: dict[int, Tensor],
                    past: Past | None = None) -> Past:
        """Keys, rotated, and values {layer: (n, G, hd)} of prompt columns, beside what past has
        seen (None: nothing) -> Past; the text goes on n positions later. Layers without have no
        prompt columns."""
        c, first = self.config, self.first
        shapes = {i: tuple(t.shape) for given in (keys, values) for i, t in given.items()}
        n = next(iter(shapes.values()), (0,))[0]
        fits = (n, c.num_key_value_heads, c.head_dim)
        if not n or keys.keys() != values.keys() or any(
                tuple(t.shape) != fits for given in (keys, values) for t in given.values()) or any(
                not first <= i < c.num_hidden_layers for i in keys):
            raise ModelError(f"a prefix {shapes} does not fit a model of {c.num_hidden_layers} "
                             f"layers, {c.num_key_value_heads} key heads of width {c.head_dim}: "
                             "every layer's keys and values must be (n, heads, width) with one n")
        past = past or self.empty()

        def beside(given, seen):
            """(n, G, hd) in front of (B, G, S, hd), either of which may be missing."""
            if given is None:
                return seen
            given = given.transpose(0, 1)[None].to(self.embeddings)
            return given if seen is None else torch.cat(
                (given.expand(len(seen), -1, -1, -1), seen), dim=2)

        place = range(first, c.num_hidden_layers)
        return Past(tuple(beside(keys.get(i), s) for i, s in zip(place, past.keys)),
                    tuple(beside(values.get(i), s) for i, s in zip(place, past.values)),
                    past.real, past.position + n)

    def keys_and_values(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The keys, not rotated by any position, and values (N, G, hd) that a layer's attention
        makes of its inputs x (N, D)."""
        x, past = x.to(self.embeddings), self.empty()
        real = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
        still = x.new_ones(len(x), 1, self.config.head_dim // 2)
        _, k, v = self.model.layers[layer - self.first](
            x, None, None, self._layout(real, past.real, None), still, 0 * still, cache=True,
            output=False)
        return k[0].transpose(0, 1), v[0].transpose(0, 1)

    def turn(self, keys: Tensor, first: int = 0, back: bool = False) -> Tensor:
        """Keys (n, G, hd) of no position, as columns first..first + n - 1 of a cache have them; or
        back."""
        place = torch.arange(first, first + len(keys), device=keys.device)[:, None, None]
        angle = place * rope_frequencies(self.config).to(keys.device)
        return rotate(keys, angle.cos().to(keys), (-angle if back else angle).sin().to(keys))

    def _run(self, ids: Tensor, past: Past | None, parent: Tensor | None = None, tap=None,
             cache: bool = True, output: bool = True,
             wanted: Tensor | None = None) -> tuple[Tensor | None, Past | None]:
        """The blocks on the real tokens; output and wanted are for the last one."""
        past, real = past or self.empty(), ids != PAD
        layout, start = self._layout(real, past.real, parent), pick(past.position, parent)
        place = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = self._angles(layout.real((start[:, None] + place).expand_as(ids)))
        last = output if wanted is None else layout.real(wanted).nonzero()[:, 0]
        x, keys, values = self._embed(layout.real(ids)), [], []
        for i, layer in enumerate(self.model.layers):
            if tap:
                tap(self.first + i, x)
            given = (x, past.keys[i], past.values[i], layout, cos, sin, cache,
                     last if i + 1 == len(self.model.layers) else True)
            x, k, v = checkpoint(layer, *given, use_reentrant=False) if self.recompute else \
                layer(*given)
            keys.append(k), values.append(v)
        if not cache:
            return x, None
        seen = pick(past.real, parent).expand(len(ids), -1)
        return x, Past(tuple(keys), tuple(values), torch.cat((seen, real), dim=1),
                       start + real.sum(dim=1))

    def _embed(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, D), the first block's input."""
        if self.inputs is None:
            return self.model.embed_tokens(ids)
        return self.inputs[ids.to(self.inputs.device)].to(ids.device)

    def _layout(self, real: Tensor, past: Tensor, parent: Tensor | None) -> Layout:
        c = self.config
        return Layout(real, past, parent, c.num_attention_heads // c.num_key_value_heads,
                      self.embeddings.dtype)

    def _angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position (N,) -> cos, sin (N, 1, hd / 2), made in fp32 as transformers does."""
        angle = position[:, None, None].float() * rope_frequencies(self.config).to(position.device)
        return angle.cos().to(self.embeddings.dtype), angle.sin().to(self.embeddings.dtype)


# --------------------------------------------------------------------------------------------------
# prompts


class Prompt(nn.Module):
    """Trainable rows {layer: (n, D)}, kept in fp32 whatever the model's dtype and cast
    where they enter it.

    rows at 0, keep: prompt tuning (Lester et al. 2021). Rows at 0 and the last k, cut: deep prompt
    tuning as in the paper, 3.2. Rows at every layer, keep: VPT-deep."""

    def __init__(self, rows: dict[int, Tensor], cut: bool):
        super().__init__()
        self.cut = cut
        self.layers = nn.ParameterDict({str(i): nn.Parameter(r.detach().float().clone())
                                        for i, r in sorted(rows.items())})

    @property
    def rows(self) -> dict[int, Tensor]:
        return {int(i): r for i, r in self.layers.items()}

    def past(self, model: Llama, past: Past | None = None) -> Past:
        return model.prompt_past(self.rows, self.cut, past=past)


class Prefix(nn.Module):
    """Trainable keys and values {layer: (n, G, hd)} given directly, the keys as they stand in the
    cache, rotated: prefix tuning (Li and Liang 2021). fp32, cast where they enter the model."""

    def __init__(self, keys: dict[int, Tensor], values: dict[int, Tensor]):
        super().__init__()
        self.keys, self.values = (nn.ParameterDict({
            str(i): nn.Parameter(t.detach().float().clone()) for i, t in sorted(given.items())})
            for given in (keys, values))

    @property
    def rows(self) -> dict[int, Tensor]:
        """Keys and values side by side, {layer: (n, 2 G hd)}."""
        return {int(i): join(k, self.values[i]) for i, k in self.keys.items()}

    def past(self, model: Llama, past: Past | None = None) -> Past:
        return model.prefix_past(*({int(i): t for i, t in given.items()}
                                   for given in (self.keys, self.values)), past)


def join(keys: Tensor, values: Tensor) -> Tensor:
    """Keys and values (n, G, hd) -> side by side, (n, 2 G hd)."""
    return torch.cat((keys.flatten(1), values.flatten(1)), dim=1)


def split(rows: Tensor, c: Config) -> tuple[Tensor, Tensor]:
    """(n, 2 G hd) -> keys and values (n, G, hd). Raises ModelError for another model's."""
    heads, hd = c.num_key_value_heads, c.head_dim
    if rows.shape[1] != 2 * heads * hd:
        raise ModelError(f"keys and values of {rows.shape[1]} numbers do not fit a model of "
                         f"{heads} key heads of width {hd}")
    return rows.view(len(rows), 2, heads, hd).unbind(1)


class Placed(NamedTuple):
    """A prompt that stands inside the text: after BOS, or before the last token that asks."""

    put: Callable[[Past], Past]  # what was seen before it -> that and the prompt
    place: str  # after-bos or suffix


def ensemble(logits: list[Tensor]) -> Tensor:
    """Logits (..., V) of several prompts -> the log of their averaged token probabilities; of one
    prompt, its logits."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([x.float().log_softmax(dim=-1) for x in logits]
                       ).logsumexp(dim=0) - math.log(len(logits))


@torch.no_grad()
def generate(model: Llama, ids: list[list[int]], past: Past | list[Past] | None, max_new: int,
             stop: set[int] = frozenset(), parent: Tensor | None = None) -> list[list[int]]:
    """Greedy continuations of ragged beginnings, each up to and with its first token of `stop`.

    past has batch 1 (a prompt) or one row a beginning, or beginning i goes on from its row
    parent[i]; of a list of pasts the token probabilities are averaged. No beginning may be empty.
    A finished row leaves the batch."""
    if not all(ids) or max_new < 1:
        raise ModelError("generate needs max_new of at least 1, and a token in every beginning: "
                         "put BOS first")
    device = model.embeddings.device
    out = [[] for _ in ids]
    if not ids:
        return out
    step, parents = pad(ids).to(device), parent
    pasts = past if isinstance(past, list) else [past]
    last = torch.tensor([len(r) - 1 for r in ids], device=device)
    alive = list(range(len(ids)))
    while True:
        read = [model(step, p, parent=parents) for p in pasts]
        token = ensemble([model.logits(h[torch.arange(len(alive), device=device), last])
                          for h, _ in read]).argmax(dim=-1)
        for row, t in zip(alive, token.tolist()):
            out[row].append(t)
        going = [i for i, row in enumerate(alive)
                 if out[row][-1] not in stop and len(out[row]) < max_new]
        if not going:
            return out
        pasts = [p for _, p in read]
        if len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            alive, token, pasts = [alive[i] for i in going], token[kept], [
                p.take(kept) for p in pasts]
        step, parents, last = token[:, None], None, token.new_zeros(len(token))


def pad(rows: list[list[int]], value: int = PAD) -> Tensor:
    """Ragged rows -> (B, T) int64, filled on the right."""
    T = max(map(len, rows), default=0)
    return torch.tensor([r + [value] * (T - len(r)) for r in rows],
                        dtype=torch.int64).view(len(rows), T)


# --------------------------------------------------------------------------------------------------
# loading


def load(folder: str | Path, dtype: str | torch.dtype | None = None, device: str = "cpu") -> Llama:
    """A frozen model from a Hugging Face folder: config.json and model.safetensors, or
    shards with their index.

    dtype None keeps the file's. Weights are mapped from the file and converted one tensor at
    a time, so nothing is held twice. Raises ModelError for anything missing, damaged,
    misshapen or left over."""
    folder = Path(folder)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    config = read_config(folder / "config.json")
    with torch.device("meta"):
        model = Llama(config)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    # a tied model may carry a copy
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = {}
    for path, names in _shards(folder).items():
        try:
            with safe_open(regular(path), framework="pt") as f:
                for name in f.keys() if names is None else names:
                    if name in ignored or name.endswith("rotary_emb.inv_freq"):
                        continue
                    if name not in wanted:
                        raise ModelError(f"{path}: tensor {name!r} has no place in the model that "
                                         "config.json describes (quantised, or another "
                                         "architecture?): choose another folder")
                    shape = tuple(f.get_slice(name).get_shape())
                    if shape != wanted[name]:
                        raise ModelError(f"{path}: tensor {name!r} has shape {shape}, config.json "
                                         f"asks for {wanted[name]}: the two are not of one model; "
                                         "fetch both again")
                    tensor = f.get_tensor(name)
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16,
                                            torch.float64):
                        raise ModelError(f"{path}: tensor {name!r} is {tensor.dtype}, expected "
                                         "floating point: choose a folder that is not quantised")
                    found[name] = tensor.to(device, dtype)
                    # not isfinite, which makes a copy
                    if not all(map(math.isfinite, torch.stack(found[name].aminmax()).tolist())):
                        raise ModelError(f"{path}: tensor {name!r} holds numbers that are not "
                                         f"finite in {found[name].dtype}: fetch it again, or use "
                                         "--dtype bfloat16")
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file, though the folder's index or layout asks for "
                             "it: fetch it again") from None
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path}: not a readable safetensors file ({cause(e)}): "
                             "fetch it again") from None
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ModelError(f"{folder}: the weights lack {len(missing)} tensors that config.json asks "
                         f"for, first {missing[0]!r}: fetch the whole folder again")
    model.load_state_dict(found, assign=True)
    return model.requires_grad_(False)


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """File -> tensor names in it; None stands for all that it holds."""
    index = folder / "model.safetensors.index.json"
    if not index.exists() or (folder / "model.safetensors").exists():
        return {folder / "model.safetensors": None}
    shards: dict[Path, list[str]] = {}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map of tensor names to files: fetch it again")
    for name, file in weight_map.items():
        # links may lead anywhere, as the hub's cache is made of them; names may not
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]{0,200}", file, re.A):
            raise ModelError(f"{index}: {name!r:.80} is said to be in {file!r:.80}, which is not "
                             "a file name in this folder: do not use this folder unless you "
                             "trust its maker")
        shards.setdefault(folder / file, []).append(name)
    return shards


def cause(e: Exception) -> str:
    """The plain cause behind safetensors' wording."""
    text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
    if "incomplete" in text.lower():  # first: "incomplete metadata, file not fully covered"
        return "it is cut short"
    if "header" in text.lower():
        return "its header is damaged, or this is a git-lfs pointer or a web page"
    return text.splitlines()[0] if text else type(e).__name__
