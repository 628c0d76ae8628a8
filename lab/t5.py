"""The frozen encoder of a T5, for the paper's figure 5: T5, T5 1.1 and Flan-T5.

    encoder = load("t5-base")                            # any HF folder with model_type t5
    encoder.inputs(ids, None, tap, last=12)              # tap(i, x (N, D)) for layers 0 to 12

Its tokens see each other in both directions, so a text has no cache that could go on, and no prompt
can be an entry of it: an encoder is only read. Names of weights are Hugging Face's, names of the
configuration those of llama.Config where that has the same thing.

B batch, T tokens, N real tokens of the batch, D width, H heads, hd head width, L layers.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llama
from llama import PAD, ModelError

MODEL_CLASS = "T5EncoderModel"  # what transformers calls it


# --------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class Config:
    """The fields of a config.json that the encoder uses."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    buckets: int  # of distances between tokens
    max_distance: int  # all that are as far or farther have one bucket
    layer_norm_epsilon: float
    max_position_embeddings: int  # the length that it was trained on; longer texts work too
    feed_forward: str  # a key of FEED_FORWARDS
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None  # a T5 has none


# field of config.json -> default, type, minimum, maximum; and what Config calls it
FIELDS = {
    "vocab_size": (32128, int, 1, 2**24),
    "d_model": (512, int, 1, 2**17),
    "d_ff": (2048, int, 1, 2**20),
    "num_layers": (6, int, 1, 2**10),
    "num_heads": (8, int, 1, 2**12),
    "d_kv": (64, int, 1, 2**12),
    "relative_attention_num_buckets": (32, int, 4, 2**16),
    "relative_attention_max_distance": (128, int, 2, 2**30),
    "layer_norm_epsilon": (1e-6, float, 1e-30, 1),
    "n_positions": (512, int, 1, 2**30),
}
NAMES = dict(zip(FIELDS, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "head_dim", "buckets", "max_distance",
                          "layer_norm_epsilon", "max_position_embeddings")))

# feed_forward_proj -> its function; a gated one has two projections
FEED_FORWARDS = {"relu": F.relu, "gated-gelu": partial(F.gelu, approximate="tanh"),
                 "gated-silu": F.silu}


def read_config(path: Path) -> Config:
    """Read a T5's config.json. Raises ModelError for an unknown feed-forward layer, and for a
    missing or impossible size."""
    c = llama.read_json(path)
    fields = llama.read_fields(path, c, FIELDS, {})
    values = {NAMES[field]: value for field, value in fields.items()}
    feed_forward = c.get("feed_forward_proj") or "relu"
    if feed_forward not in [*FEED_FORWARDS]:  # a value of JSON need not be a key of any dict
        raise ModelError(f"{path}: feed_forward_proj is {feed_forward!r:.80}, and only "
                         f"{', '.join(FEED_FORWARDS)} are known here: choose another folder")
    if values["max_distance"] <= values["buckets"] // 4:  # those have a bucket each
        raise ModelError(f"{path}: relative_attention_max_distance is {values['max_distance']}, "
                         f"expected more than a quarter of the {values['buckets']} buckets: repair "
                         "the file")
    return Config(**values, feed_forward=feed_forward, eos_token_id=llama.read_eos(path, c))


# --------------------------------------------------------------------------------------------------
# the model


def position_buckets(T: int, count: int, max_distance: int) -> Tensor:
    """(T, T) int64: the bucket of the distance from query i to key j. Half of the buckets are for
    keys that come later. Of each half, half are for one distance each, and the others for ranges
    that grow by a constant factor up to max_distance."""
    place = torch.arange(T)
    difference = place[None, :] - place[:, None]
    distance, half = difference.abs(), count // 2
    exact = half // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (difference > 0)


class Block(nn.Module):
    """One layer: attention and feed-forward, each after its norm and added to the residual
    stream."""

    def __init__(self, c: Config, has_positions: bool):
        """has_positions: whether it owns the bias of every bucket, which all layers use."""
        super().__init__()
        D, width = c.hidden_size, c.num_attention_heads * c.head_dim
        self.heads, self.function = c.num_attention_heads, FEED_FORWARDS[c.feed_forward]
        attention = {name: nn.Linear(D, width, bias=False) for name in "qkv"}
        attention["o"] = nn.Linear(width, D, bias=False)
        if has_positions:
            attention["relative_attention_bias"] = _embedding(c.buckets, c.num_attention_heads)
        inner = ("wi_0", "wi_1") if c.feed_forward.startswith("gated-") else ("wi",)
        feed_forward = {name: nn.Linear(D, c.intermediate_size, bias=False) for name in inner}
        feed_forward["wo"] = nn.Linear(c.intermediate_size, D, bias=False)
        parts = {"SelfAttention": attention}, {"DenseReluDense": feed_forward}
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: nn.ModuleDict(part) for name, part in named.items()}
                          | {"layer_norm": nn.RMSNorm(D, eps=c.layer_norm_epsilon)})
            for named in parts)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D), bias (B, H, T, T) -> (B, T, D)."""
        attention, feed_forward = self.layer
        h = attention.layer_norm(x)
        q, k, v = (attention.SelfAttention[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in "qkv")
        # a T5's scores are not divided by the root of the head width; its weights are that small
        a = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
        x = x + attention.SelfAttention.o(a.transpose(1, 2).flatten(2))

        h, dense = feed_forward.layer_norm(x), feed_forward.DenseReluDense
        if "wi" in dense:
            return x + dense.wo(self.function(dense.wi(h)))
        return x + dense.wo(self.function(dense.wi_0(h)) * dense.wi_1(h))


class Encoder(nn.Module):
    """The encoder of a T5. `state_dict` has Hugging Face's tensor names."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.shared = _embedding(c.vocab_size, c.hidden_size)
        self.encoder = nn.ModuleDict(dict(
            block=nn.ModuleList(Block(c, i == 0) for i in range(c.num_hidden_layers)),
            final_layer_norm=nn.RMSNorm(c.hidden_size, eps=c.layer_norm_epsilon)))

    @property
    def embeddings(self) -> Tensor:
        """The vocabulary, (V, D)."""
        return self.shared.weight

    def inputs(self, ids: Tensor, past: None, tap: Callable[[int, Tensor], None],
               last: int, parent: None = None) -> None:
        """Run ids (B, T), padded on the right with PAD, to call tap(i, x) with the inputs x (N, D)
        of layers 0 to `last` at the N real tokens, row after row; `last` L is after the final norm
        (transformers' hidden_states). past, parent: None; llama.Llama.inputs takes them."""
        real, blocks = ids != PAD, self.encoder.block
        x, bias = self.shared(ids.clamp(min=0)), self._bias(real)
        for i, block in enumerate(blocks):
            tap(i, x[real])
            if i == last:
                return
            x = block(x, bias)
        tap(len(blocks), self.encoder.final_layer_norm(x)[real])

    def _bias(self, real: Tensor) -> Tensor:
        """real (B, T) bool -> (B, H, T, T): what is added to the score of each query and key; -inf
        where the key is padding."""
        c, T = self.config, real.shape[1]
        buckets = position_buckets(T, c.buckets, c.max_distance).to(real.device)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(buckets).permute(2, 0, 1)[None]  # (1, H, T, T)
        return bias.masked_fill(~real[:, None, None, :], -math.inf)


def _embedding(count: int, width: int) -> nn.Embedding:
    # as in llama.Llama: drawing weights on the meta device would import torch._dynamo
    return nn.Embedding.from_pretrained(torch.zeros(count, width), freeze=False)


# --------------------------------------------------------------------------------------------------
# loading

ANCHOR = "encoder.final_layer_norm.weight"  # every T5 has it once


def load(folder: str | Path, dtype: str | torch.dtype | None = None, device: str = "cpu",
         report: Callable[[str], object] = warnings.warn) -> Encoder:
    """A frozen encoder from a Hugging Face folder, also one of a whole T5, whose decoder is left
    out. Takes and refuses files as llama.load does."""
    folder = Path(folder)
    config = read_config(folder / "config.json")
    weights = _named(llama.stored_tensors(folder))
    llama.refuse_quantised(folder, weights, report, MODEL_CLASS)
    with torch.device("meta"):
        encoder = Encoder(config)
    return llama.filled(encoder, weights, folder, dtype, device)


def _named(stored: dict[str, llama.Stored]) -> dict[str, llama.Stored]:
    """The encoder's tensors of a folder, under the names that they have in it, without what a
    trainer put in front of all. The decoder, heads and what else stands beside it are left out."""
    anchors = [name for name in stored if name.endswith(ANCHOR)]
    wrapper = anchors[0].removesuffix(ANCHOR) if len(anchors) == 1 else ""
    named = {name.removeprefix(wrapper): tensor for name, tensor in stored.items()
             if name.removeprefix(wrapper).startswith(("shared.", "encoder."))}
    # Usually this is another name of the same matrix. If it is not, the encoder has this one.
    own = named.pop("encoder.embed_tokens.weight", None)
    return named | ({"shared.weight": own} if own else {})
