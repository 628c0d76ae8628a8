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

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

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
        raise ModelError(f"{path}: the rope settings are {rope!r}, not an object: repair the file")
    # "type" is the old spelling
    rope = {**rope, "rope_type": str(rope.get("rope_type", rope.get("type", "default")))}
    needs = {"default": (), "linear": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needs:
        raise ModelError(f"{path}: rope type {rope['rope_type']!r} is not known, only "
                         f"{', '.join(needs)}: choose another model")
    for key in needs[rope["rope_type"]]:
        if not isinstance(rope.get(key), (int, float)) or not rope[key] > 0:
            raise ModelError(f"{path}: rope type {rope['rope_type']!r} needs a positive number "
                             f"{key!r}, found {rope.get(key)!r}: repair the file")
    if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ModelError(f"{path}: llama3 rope needs low_freq_factor below high_freq_factor: "
                         "repair the file")
    heads, width = c.get("num_attention_heads"), c.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        c["head_dim"] = c.get("head_dim") or width // heads
    c["num_key_value_heads"] = c.get("num_key_value_heads") or heads
    c["rope_theta"] = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    c["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    c.setdefault("vocab_size", 32000)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"):
        if type(c.setdefault(key, 2048 if key == "max_position_embeddings" else None)) is not int \
                or c[key] < 1:
            raise ModelError(f"{path}: {key} is {c[key]!r}, expected a positive whole number: "
                             "repair the file")
    for key in ("rope_theta", "rms_norm_eps"):
        if type(c.setdefault(key, 1e-6)) not in (int, float) or not c[key] > 0:
            raise ModelError(f"{path}: {key} is {c[key]!r}, expected a positive number: "
                             "repair the file")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if type(c.setdefault(key, False)) is not bool:
            raise ModelError(f"{path}: {key} is {c[key]!r}, expected true or false: "
                             "repair the file")
    if c.get("bos_token_id") is not None and (
            type(c["bos_token_id"]) is not int or not 0 <= c["bos_token_id"] < c["vocab_size"]):
        raise ModelError(f"{path}: bos_token_id is {c['bos_token_id']!r}, expected a token below "
                         f"{c['vocab_size']}")
    generation = path.with_name("generation_config.json")  # chat models name further ends there
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = c.get("eos_token_id") if eos is None else eos
    c["eos_token_id"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if c["num_attention_heads"] % c["num_key_value_heads"] or c["head_dim"] % 2:
        raise ModelError(f"{path}: {heads} heads of width {c['head_dim']} over "
                         f"{c['num_key_value_heads']} key/value heads: the heads must divide "
                         "evenly and their width be even: repair the file")
    return Config(**{f.name: c[f.name] for f in fields(Config) if c.get(f.name) is not None})


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected a Hugging Face model folder with "
                         "config.json, tokenizer.json and safetensors weights") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{path}: cannot be read as JSON ({e}): fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, expected a JSON object: "
                         "fetch it again")
    return value


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
    """Rotate x (B, heads, T, hd) by cos, sin (B or 1, 1, T, hd / 2); HF's half-split layout."""
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
        # index_select, not t[parent]: the gradient of that is summed by threads in any order
        pick = lambda t: t if t is None or t.shape[0] == 1 else t.index_select(0, parent)
        return Past(tuple(map(pick, self.keys)), tuple(map(pick, self.values)), pick(self.real),
                    pick(self.position))


# --------------------------------------------------------------------------------------------------
# the model


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        D, hd, bias = c.hidden_size, c.head_dim, c.attention_bias
        H, G = c.num_attention_heads, c.num_key_value_heads
        self.hd, self.G = hd, G
        self.input_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(D, H * hd, bias=bias), k_proj=nn.Linear(D, G * hd, bias=bias),
            v_proj=nn.Linear(D, G * hd, bias=bias), o_proj=nn.Linear(H * hd, D, bias=bias)))
        self.post_attention_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.mlp = nn.ModuleDict(dict(
            gate_proj=nn.Linear(D, c.intermediate_size, bias=c.mlp_bias),
            up_proj=nn.Linear(D, c.intermediate_size, bias=c.mlp_bias),
            down_proj=nn.Linear(c.intermediate_size, D, bias=c.mlp_bias)))

    def key_value(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normed input h (B, T, D) -> keys (rotated) and values, (B, G, T, hd)."""
        B, T, _ = h.shape
        k = self.self_attn.k_proj(h).view(B, T, self.G, self.hd).transpose(1, 2)
        v = self.self_attn.v_proj(h).view(B, T, self.G, self.hd).transpose(1, 2)
        return rotate(k, cos, sin), v

    def forward(self, x: Tensor, h: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                cos: Tensor, sin: Tensor):
        """x (B, T, D), h its norm, k and v (B, G, S_l + T, hd), mask (B or 1, 1, T, S_l + T) or
        None, which is plain causal attention with nothing before -> (B, T, D)."""
        B, T, _ = x.shape
        q = rotate(self.self_attn.q_proj(h).view(B, T, -1, self.hd).transpose(1, 2),
                   cos, sin)  # (B, H, T, hd)
        R = q.shape[1] // self.G
        if mask is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=R > 1)
        else:
            # The R queries of one key/value head are stacked along time: keys and values are never
            # repeated, and every kernel takes the mask (enable_gqa with a mask falls to the slow
            # one on CUDA).
            a = F.scaled_dot_product_attention(q.reshape(B, self.G, R * T, self.hd), k, v,
                                               mask.repeat(1, 1, R, 1))
            a = a.reshape(B, -1, T, self.hd)
        a = a.transpose(1, 2).reshape(B, T, -1)
        x = x + self.self_attn.o_proj(a)
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


class Llama(nn.Module):
    """A LLaMA. `state_dict` has Hugging Face's tensor names; a tied model has no lm_head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
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
        nothing, device = (None,) * self.config.num_hidden_layers, self.embeddings.device
        return Past(nothing, nothing, torch.ones(1, 0, dtype=torch.bool, device=device),
                    torch.zeros(1, dtype=torch.int64, device=device))

    def forward(self, ids: Tensor, past: Past | None = None,
                tap: Callable[[int, Tensor], None] | None = None) -> tuple[Tensor, Past]:
        """ids (B, T), padded on the right with PAD -> hidden states (B, T, D) after the
        final norm, and the Past with these tokens in it. tap(i, x) is shown the input x
        (B, T, D) of every layer i, and of i = L what comes after the final norm
        (transformers' convention for hidden_states)."""
        x, past = self._run(ids, past, tap, last=True)
        x = self.model.norm(x)
        if tap:
            tap(self.config.num_hidden_layers, x)
        return x, past

    def extend(self, ids: Tensor, past: Past | None = None) -> Past:
        """The Past alone: the last block stops at its keys and values, no more is wanted."""
        if ids.shape[1] == 0:
            return past or self.empty()
        return self._run(ids, past, None, last=False)[1]

    def logits(self, h: Tensor) -> Tensor:
        """h (..., D) -> (..., V). Pick positions first: (B, T, V) of 128k tokens is gigabytes."""
        return F.linear(h, self.embeddings if self.config.tie_word_embeddings
                        else self.lm_head.weight)

    def prompt_past(self, rows: dict[int, Tensor], cut: bool) -> Past:
        """Run prompt rows {layer: (n, D)} alone, at positions 0..n-1 -> Past of batch 1.

        Rows at layer i replace the prompt's part of that layer's input. cut drops the layer's
        outputs there, so that only layers with rows have prompt columns (paper 3.2); otherwise they
        go on, as in prompt tuning."""
        L, D = self.config.num_hidden_layers, self.config.hidden_size
        shapes = {layer: tuple(r.shape) for layer, r in rows.items()}
        n = next(iter(shapes.values()), (0,))[0]
        if not rows or any(not 0 <= layer < L for layer in rows) or any(
                s != (n, D) for s in shapes.values()):
            raise ModelError(f"prompt rows {shapes} do not fit a model of {L} layers and width "
                             f"{D}: every entry must be {{layer: (n, width)}} with one n")
        position = torch.arange(n, device=self.embeddings.device)[None]
        cos, sin = self._angles(position)
        x, keys, values = None, [], []
        for i, layer in enumerate(self.model.layers):
            x = rows[i][None].to(self.embeddings.dtype) if i in rows else x
            if x is None:
                keys.append(None), values.append(None)
                continue
            h = layer.input_layernorm(x)
            k, v = layer.key_value(h, cos, sin)
            keys.append(k), values.append(v)
            goes_on = not cut and i + 1 < L and i + 1 not in rows
            x = layer(x, h, k, v, None, cos, sin) if goes_on else None
        return Past(tuple(keys), tuple(values), position.new_empty(1, 0, dtype=torch.bool),
                    position.new_tensor([n]))

    def _run(self, ids: Tensor, past: Past | None, tap, last: bool) -> tuple[Tensor | None, Past]:
        """The blocks; with last=False the last one only makes keys and values."""
        B, T = ids.shape
        real = ids != PAD
        past = past or self.empty()
        position = past.position[:, None] + torch.arange(T, device=ids.device)  # (1 or B, T)
        cos, sin = self._angles(position)
        S = past.real.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril().expand(B, T, T)
        seen = torch.cat((past.real[:, None].expand(B, T, S), causal),
                         dim=2)[:, None]  # (B, 1, T, S + T)
        masks = {0: seen if S else None}  # by the number of prompt columns
        x = self.model.embed_tokens(ids.clamp(min=0))
        keys, values = [], []
        for i, layer in enumerate(self.model.layers):
            if tap:
                tap(i, x)
            h = layer.input_layernorm(x)
            k, v = layer.key_value(h, cos, sin)
            n = 0
            if past.keys[i] is not None:
                n = past.keys[i].shape[2] - S
                k = torch.cat((past.keys[i].expand(B, -1, -1, -1), k), dim=2)
                v = torch.cat((past.values[i].expand(B, -1, -1, -1), v), dim=2)
            keys.append(k), values.append(v)
            if last or i + 1 < len(self.model.layers):
                if n not in masks:
                    masks[n] = F.pad(seen, (n, 0), value=True)
                x = layer(x, h, k, v, masks[n], cos, sin)
        past = Past(tuple(keys), tuple(values), torch.cat((past.real.expand(B, S), real), dim=1),
                    past.position + real.sum(dim=1))
        return x, past

    def _angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position (B, T) -> cos, sin (B, 1, T, hd / 2), made in fp32 as transformers does."""
        angle = position[:, None, :, None].float() * rope_frequencies(self.config).to(
            position.device)
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

    def past(self, model: Llama) -> Past:
        return model.prompt_past(self.rows, self.cut)


@torch.no_grad()
def generate(model: Llama, ids: list[list[int]], past: Past | None, max_new: int,
             stop: set[int] = frozenset()) -> list[list[int]]:
    """Greedy continuations of ragged beginnings, each up to and with its first token of `stop`.

    past has batch 1 (a prompt) or one row a beginning; no beginning may be empty. A finished
    row leaves the batch."""
    if not all(ids) or max_new < 1:
        raise ModelError("generate needs max_new of at least 1, and a token in every beginning: "
                         "put BOS first")
    device = model.embeddings.device
    out = [[] for _ in ids]
    if not ids:
        return out
    h, past = model(pad(ids).to(device), past)
    h = h[torch.arange(len(ids), device=device),
          torch.tensor([len(r) - 1 for r in ids], device=device)]
    alive = list(range(len(ids)))
    while True:
        token = model.logits(h).argmax(dim=-1)
        for row, t in zip(alive, token.tolist()):
            out[row].append(t)
        going = [i for i, row in enumerate(alive)
                 if out[row][-1] not in stop and len(out[row]) < max_new]
        if not going:
            return out
        if len(going) < len(alive):
            pick = torch.tensor(going, device=device)
            alive, token, past = [alive[i] for i in going], token[pick], past.take(pick)
        h, past = model(token[:, None], past)
        h = h[:, 0]


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
            with safe_open(path, framework="pt") as f:
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
                    if not tensor.is_floating_point():
                        raise ModelError(f"{path}: tensor {name!r} is {tensor.dtype}, expected "
                                         "floating point: choose a folder that is not quantised")
                    found[name] = tensor.to(device, dtype)
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file, though the folder's index or layout asks for "
                             "it: fetch it again") from None
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path}: not a readable safetensors file ({_cause(e)}): "
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
        if not isinstance(file, str) or not file or "/" in file or "\\" in file or "\0" in file \
                or file in (".", ".."):
            raise ModelError(f"{index}: {name!r} is said to be in {file!r}, which is not "
                             "a file name in this folder: do not use this folder unless you "
                             "trust its maker")
        shards.setdefault(folder / file, []).append(name)
    return shards


def _cause(e: Exception) -> str:
    """The plain cause behind safetensors' wording."""
    text = str(e)
    if "incomplete" in text.lower():  # first: "incomplete metadata, file not fully covered"
        return "it is cut short"
    if "header" in text.lower():
        return "its header is damaged, or this is a git-lfs pointer or a web page"
    return text.splitlines()[0] if text else type(e).__name__
