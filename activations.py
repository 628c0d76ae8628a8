"""Activations of a frozen model as populations: to a file, with the role of every row, and back.

    about = collect(model, vocabulary, {"prose": prose, "math": sums}, [0, 8, 16], Path("a.st"))
    found = Collection(Path("a.st"))
    found.rows(8, "math", roles=("answer",))     # (N, D) fp32, without BOS and massive rows

A collection is one safetensors file: `layers.I` (N, D) for every layer, and for every row `role`,
`domain`, `example`, `position`, `token` and `massive`; `prompt.I` (n, D) where a prompt's own rows
pass; what it was made of is JSON in its metadata. Layer I's row is its input; I = L is what comes
after the final norm (transformers' hidden_states).

N rows, D width, n prompt rows, L layers.
"""

from __future__ import annotations

import heapq
import json
import random
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import data
import llama
from run import mapped, replacing
from train import progress

ROLES = ("prompt", "bos", "context", "question", "answer", "text")
POOLS = ("token", "mean", "last")
MASSIVE = 10  # times the median norm of its layer



def _number(x) -> bool:
    return type(x) is int and 0 <= x < 2**40


def _list_of(fits) -> Callable:
    """Of one member or more, none twice."""
    return lambda x: isinstance(x, list) and x and all(map(fits, x)) and len(set(x)) == len(x)


def _text(x) -> bool:
    return isinstance(x, str) and "\0" not in x


# what a collection's metadata must be
ABOUT = {"layers": _list_of(_number), "domains": _list_of(_text), "model": _text, "dtype": _text,
         "sha256": _text, "pool": POOLS.__contains__, "roles": lambda x: x == list(ROLES)}


class ActivationError(ValueError):
    """A collection that cannot be made or used: what, where, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# running texts


@torch.no_grad()
def stream(model: llama.Llama, rows: list[list[int]], wanted: list[list[int]], layers: list[int],
           past: llama.Past | None = None, mean: bool = False,
           size: int = 16) -> Iterator[dict[int, Tensor]]:
    """{layer: (m, D)} of token rows, `size` of them at a time: the inputs of layers at the wanted
    places of each row, in order, or with `mean` their mean, one a row. past is a prompt's."""
    device = model.embeddings.device
    for first in range(0, len(rows), size):
        some, places = rows[first:first + size], wanted[first:first + size]
        ids, found, before, index, owner = llama.pad(some).to(device), {}, 0, [], []
        for r, (row, here) in enumerate(zip(some, places)):
            index += [before + p for p in here]
            owner += [r] * len(here)
            before += len(row)
        index, owner = torch.tensor(index, device=device), torch.tensor(owner, device=device)

        def keep(i: int, x: Tensor) -> None:
            if i not in layers:
                return
            x = x.index_select(0, index)
            if mean:
                total = torch.zeros(len(some), x.shape[1], device=device)
                x = (total.index_add_(0, owner, x.float())
                     / owner.bincount(minlength=len(some))[:, None]).to(x.dtype)
            found[i] = x

        model(ids, past, keep)
        yield found


def massive(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) bool: rows of a norm that swamps all statistics. A text's first token gathers
    attention that has nowhere to go, and its norm is tens to hundreds of times the others' (Sun et
    al. 2024, Massive Activations)."""
    norms = torch.cat([block.float().norm(dim=1) for block in rows.split(8192)])
    return norms > MASSIVE * norms.median()


def roles_of(row: data.Row, bos: bool) -> list[str]:
    """The role of each of a row's tokens."""
    plain = "text" if row.body == row.start == len(row.ids) else "context"
    roles = [plain] * row.body + ["question"] * (row.start - row.body) \
        + ["answer"] * (len(row.ids) - row.start)
    return ["bos", *roles[1:]] if bos else roles


# --------------------------------------------------------------------------------------------------
# to a file


class Chosen(NamedTuple):
    """Tokens of one domain whose activations are wanted."""

    rows: list[data.Row]
    examples: list[int]  # their numbers in the data
    places: list[list[int]]  # wanted places of each


def sample(examples: Iterable[data.Example], count: int,
           seed: int) -> list[tuple[int, data.Example]]:
    """`count` examples (0: all) of a stream with their numbers, each as likely as any other; no
    more than these are held."""
    if not count:
        return list(enumerate(examples))
    r, held = random.Random(f"examples {seed}"), []
    for i, example in enumerate(examples):  # those with the greatest of random keys
        item = (r.random(), i, example)
        if len(held) < count:
            heapq.heappush(held, item)
        else:
            heapq.heappushpop(held, item)
    return sorted((i, example) for _, i, example in held)


def choose(examples: list[tuple[int, data.Example]], vocabulary: data.Vocabulary, max_length: int,
           roles: tuple[str, ...], pool: str, limit: int, seed: int) -> Chosen:
    """The tokens of these roles; at most `limit` (0: all) of them, or of pooled rows, those of
    examples drawn at random. What the questions of one context have in common is taken once."""
    rows_of = len if pool == "token" else lambda places: 1
    bos, chosen, before = vocabulary.bos is not None, Chosen([], [], []), None
    for i, example in examples:
        row = data.encode(example, vocabulary, max_length)
        if row is None:
            continue
        known = len(data.common_beginning([before.ids, row.ids])) \
            if before and pool == "token" and row.context and before.context == row.context else 0
        of = roles_of(row, bos)
        places = [p for p in range(known, len(row.ids)) if of[p] in roles]
        if pool != "token":
            places = [p for p in places if of[p] != "bos"]
        if pool == "last":
            places = places[-1:]
        before = row
        if places:
            for part, value in zip(chosen, (row, i, places)):
                part.append(value)
    if not limit or sum(rows_of(p) for p in chosen.places) <= limit:
        return chosen
    # whole examples, for a text's tokens are wanted one after the other; the last is cut
    count, kept = len(chosen.rows), {}
    for k in random.Random(f"rows {seed}").sample(range(count), count):
        if limit < 1:
            break
        kept[k] = chosen.places[k][:limit] if pool == "token" else chosen.places[k]
        limit -= rows_of(kept[k])
    return Chosen(*([part[k] for k in sorted(kept)] for part in chosen[:2]),
                  [kept[k] for k in sorted(kept)])


def collect(model: llama.Llama, vocabulary: data.Vocabulary, domains: dict[str, Chosen],
            layers: list[int], path: Path, pool: str, about: dict,
            past: llama.Past | None = None, own: dict[int, Tensor] | None = None) -> None:
    """Write the activations of each domain's tokens to a new file, every row straight to its place,
    so that no more than a batch is held. about goes into the file's metadata.

    past: a prompt in front of every text; own: its own rows {layer: (n, D)}, if it has any."""
    L, D, own = model.config.num_hidden_layers, model.config.hidden_size, own or {}
    roles, fields = [], {k: [] for k in ("domain", "example", "position", "token")}
    for d, chosen in enumerate(domains.values()):
        for row, example, places in zip(*chosen):
            of = roles_of(row, vocabulary.bos is not None)
            if pool == "mean":  # one role if all have it; the last token's place
                names = {of[p] for p in places}
                roles.append(names.pop() if len(names) == 1 else "text")
            else:
                roles += [of[p] for p in places]
            for p in places if pool != "mean" else places[-1:]:
                for key, value in zip(fields, (d, example, p, row.ids[p])):
                    fields[key].append(value)
    N, dtype = len(roles), model.embeddings.dtype
    shapes = {f"layers.{i}": ((N, D), dtype) for i in layers}
    shapes |= {f"prompt.{i}": (tuple(own[i].shape), dtype) for i in layers if i in own}
    shapes |= {key: ((N,), torch.int64) for key in fields}
    shapes |= {key: ((N,), torch.uint8) for key in ("role", "massive")}
    about = {**about, "layers": layers, "num_hidden_layers": L, "pool": pool, "roles": list(ROLES),
             "domains": list(domains)}
    with replacing(path) as temporary:
        out = mapped(temporary, shapes, {"promptprior": json.dumps(about)})
        for key, values in fields.items():
            out[key].copy_(torch.tensor(values))
        out["role"].copy_(torch.tensor([ROLES.index(r) for r in roles], dtype=torch.uint8))
        for name in shapes.keys() & {f"prompt.{i}" for i in own}:
            out[name].copy_(own[int(name.removeprefix("prompt."))])
        done = 0
        with progress(total=N, desc="activations", unit=" rows", leave=False) as bar:
            for chosen in domains.values():
                tokens = [row.ids for row in chosen.rows]
                for found in stream(model, tokens, chosen.places, layers, past, pool == "mean"):
                    m = len(found[layers[0]])
                    for i, x in found.items():
                        if not torch.isfinite(x).all():
                            raise ActivationError(f"layer {i}: activations that are not finite, "
                                                  f"after {done} rows: use --dtype float32 or "
                                                  "bfloat16")
                        out[f"layers.{i}"][done:done + m].copy_(x)
                    done += m
                    bar.update(m)
        for i in layers:
            out["massive"] |= massive(out[f"layers.{i}"])
        del out


class Collection:
    """A collection's file, mapped. about: what it was made of."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self.file = safe_open(llama.regular(self.path), framework="pt")
            about = (self.file.metadata() or {})["promptprior"]
            self.about = data.parse_json(about, "its metadata")
            self._check()
        except FileNotFoundError:
            raise ActivationError(f"{self.path}: no such file: make it by `collect --out "
                                  f"{self.path}`") from None
        except (SafetensorError, OSError, ValueError, KeyError) as e:
            raise ActivationError(f"{self.path}: not a collection of activations "
                                  f"({llama.cause(e)}): make one by `collect`") from None

    def _check(self) -> None:
        """Everything but the activations themselves, which rows() checks. Raises ValueError,
        KeyError or SafetensorError."""
        for key, fits in ABOUT.items():
            if not fits(self.about[key]):
                raise ValueError(f"{key} is {self.about[key]!r:.80}")
        self.layers, self.domains = self.about["layers"], self.about["domains"]
        dtypes = {"role": torch.uint8, "massive": torch.uint8}
        self.field = {}
        for key in ("role", "domain", "example", "position", "token", "massive"):
            t = self.field[key] = self.file.get_tensor(key)
            if t.dtype != dtypes.get(key, torch.int64) or t.shape != self.field["role"].shape[:1]:
                raise ValueError(f"{key} has shape {tuple(t.shape)} of {t.dtype}")
            most = {"role": len(ROLES), "domain": len(self.domains)}.get(key, 2**40)
            if len(t) and not 0 <= int(t.min()) <= int(t.max()) < most:
                raise ValueError(f"{key} has numbers out of its range")
        shapes = {key: self.file.get_slice(key).get_shape() for key in self.file.keys()
                  if key not in self.field}
        if {key for key in shapes if not key.startswith("prompt.")} != {
                f"layers.{i}" for i in self.layers}:
            raise ValueError(f"it holds {', '.join(sorted(shapes))} and not the layers it names")
        self.width = shapes[f"layers.{self.layers[0]}"][-1]
        for key, shape in shapes.items():
            rows = shape[:1] if key.startswith("prompt.") else [len(self.field["role"])]
            if shape != [*rows, self.width] or not self.file.get_slice(key).get_dtype() in (
                    "F32", "BF16", "F16"):
                raise ValueError(f"{key} has shape {shape}")

    @property
    def left_out(self) -> Tensor:
        """(N,) bool: rows of BOS or of massive norm, which no fit and no picture takes."""
        return (self.field["role"] == ROLES.index("bos")) | (self.field["massive"] > 0)

    def chosen(self, domain: str | None = None, roles: tuple[str, ...] = (),
               massive: bool = False) -> Tensor:
        """Indices (N,) of the rows of a domain (None: of all) in these roles (none: all but
        bos); massive rows only if asked for."""
        if domain is not None and domain not in self.domains:
            raise ActivationError(f"{self.path}: no domain {domain!r} in it: it has "
                                  f"{', '.join(self.domains)}")
        roles = [ROLES.index(r) for r in roles or set(ROLES) - {"bos"}]
        kept = torch.isin(self.field["role"], torch.tensor(roles, dtype=torch.uint8))
        if domain is not None:
            kept &= self.field["domain"] == self.domains.index(domain)
        if not massive:
            kept &= self.field["massive"] == 0
        return kept.nonzero()[:, 0]

    def rows(self, layer: int, index: Tensor | None = None) -> Tensor:
        """A layer's activations (N, D) in the file's dtype, at these indices (None: chosen())."""
        if layer not in self.layers:
            raise ActivationError(f"{self.path}: layer {layer} is not in it, only "
                                  f"{', '.join(map(str, self.layers))}: collect again with "
                                  f"--layers {layer}")
        x = self.file.get_tensor(f"layers.{layer}")[self.chosen() if index is None else index]
        bad = (~torch.isfinite(x).all(dim=1)).nonzero()[:, 0]
        if len(bad):
            raise ActivationError(f"{self.path}: layer {layer} has {len(bad)} rows that are not "
                                  f"finite, first row {int(bad[0])}: collect again")
        return x

    def prompt(self, layer: int) -> Tensor | None:
        """The prompt's own rows (n, D) at a layer, if it has any there."""
        name = f"prompt.{layer}"
        return self.file.get_tensor(name) if name in self.file.keys() else None
