"""Activations of a frozen model as populations: to a file, with the role of every row, and back.

    collect(loaded, {"prose": prose, "math": sums}, [0, 8, 16], Path("a.safetensors"), "token", {})
    file = Collection(Path("a.safetensors"))
    file.rows(8, file.chosen("math", roles=("answer",)))     # (N, D), without BOS and massive rows

A collection is one safetensors file: `layers.I` (N, D) for every layer, and for every row `role`,
`domain`, `source`, `text`, `example`, `position`, `token` and `massive`; `prompt.I` (n, D) where a
prompt's own rows pass. What it was made of is JSON in its metadata. Layer I's row is its input;
I = L is what comes after the final norm (transformers' hidden_states).

Rows of one text depend on each other, and so do texts of one source: `text` numbers paragraphs,
which several questions (`example`) may have in common, and `source` articles and arithmetic
modules. Both numbers differ between domains.

N rows, D width, n prompt rows, L layers.
"""

from __future__ import annotations

import heapq
import json
import os
import random
from itertools import accumulate
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

import data
import llama
from lab import t5
from lab.commands import CollectOptions
from lab.console import UserError, counted, progress, show
from lab.evaluation import open_run
from lab.files import checksum, free_place, mapped, reading, replacing
from lab.inputs import (LoadedModel, load_model, longest_text, model_files, parse_spec, say_files,
                        topic, unit)
from lab.settings import (DataSettings, ModelSettings, PriorSettings, absolute, from_flags,
                          spec_name)

ROLES = ("prompt", "bos", "context", "question", "answer", "text")
MASSIVE = 10  # a massive row is this many times as long as the median row of its layer
FIELDS = ("domain", "source", "text", "example", "position", "token")  # int64, one number a row
BATCH = 16  # token rows that are run at a time
DOMAINS = 256  # the most of a collection; `compare` measures every pair of them


# --------------------------------------------------------------------------------------------------
# running texts


@torch.no_grad()
def stream(model: llama.Llama | t5.Encoder, rows: list[list[int]], positions: list[list[int]],
           layers: list[int], past: llama.Past | None = None, mean: bool = False
           ) -> Iterator[dict[int, Tensor]]:
    """{layer: (m, D)} of token rows, a batch at a time: the inputs of layers at these positions of
    each row, in order, or with `mean` their mean, one a row. past: of a prompt."""
    device, dtype = model.embeddings.device, model.embeddings.dtype
    for start in range(0, len(rows), BATCH):
        batch, wanted = rows[start:start + BATCH], positions[start:start + BATCH]
        beginnings, parent = [], []
        # Of an encoder a token depends on all that follow. Beginnings go through all layers.
        if isinstance(model, llama.Llama) and max(layers) > model.config.num_hidden_layers / 2:
            beginnings, parent = shared_beginnings(batch)
        *of_beginnings, of_tails = _passes(batch, wanted, beginnings, parent, mean)
        taken: dict[int, Tensor] = {}

        def tap(chosen: Tensor) -> Callable[[int, Tensor], None]:
            """Takes the tokens chosen (2, m) of a pass, because those of all tokens of all layers
            would not fit: chosen[0] of them, each added to the row chosen[1] of what is taken."""
            index, into = chosen.to(device)

            def take(i: int, x: Tensor) -> None:
                if i in layers:
                    count = len(batch) if mean else sum(map(len, wanted))
                    zeros = x.new_zeros(count, x.shape[1], dtype=torch.float32 if mean else dtype)
                    taken.setdefault(i, zeros).index_add_(0, into, x[index].to(zeros.dtype))
            return take

        begun, tails = past, batch
        if beginnings:
            ids = llama.pad(beginnings).to(device)
            _, begun = model(ids, past, tap(of_beginnings[0]))
            tails = [row[len(beginnings[k]):] for row, k in zip(batch, parent)]
        owners = torch.tensor(parent, device=device) if beginnings else None
        model.inputs(llama.pad(tails).to(device), begun, tap(of_tails), max(layers), owners)
        if mean:
            count = torch.tensor([[len(of_row)] for of_row in wanted], device=device)
            taken = {i: (total / count).to(dtype) for i, total in taken.items()}
        yield taken


def shared_beginnings(rows: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The beginnings that rows one after the other have in common, as questions of a paragraph do,
    and which of these each row continues by a token or more; nothing if no two rows share half of
    one. A row that shares none has its first token as its beginning."""
    groups: list[list[list[int]]] = []
    for row in rows:
        if groups:
            common = len(data.common_beginning([*groups[-1], row]))
            if common >= len(row) / 2 and common >= len(groups[-1][0]) / 2:
                groups[-1].append(row)
                continue
        groups.append([row])
    if len(groups) == len(rows) or min(map(len, rows)) < 2:
        return [], []
    beginnings = [data.common_beginning([row[:-1] for row in group])[:None if group[1:] else 1]
                  for group in groups]
    return beginnings, [k for k, group in enumerate(groups) for _ in group]


def _passes(batch: list[list[int]], positions: list[list[int]], beginnings: list[list[int]],
            parent: list[int], mean: bool) -> list[Tensor]:
    """The tokens at positions in each row, as (2, m) of each pass through the model: that through
    the beginnings, if there are any, and that through what follows in each row. [0]: their places
    among the pass's tokens; [1]: their numbers among all of the batch, or with `mean` their
    rows'."""
    starts = [0, *accumulate(map(len, beginnings))]
    begun: list[tuple[int, int]] = []
    follows: list[tuple[int, int]] = []
    tokens = 0
    for i, (row, row_positions) in enumerate(zip(batch, positions)):
        first, length = (starts[parent[i]], len(beginnings[parent[i]])) if beginnings else (0, 0)
        for p in row_positions:
            into = i if mean else len(begun) + len(follows)
            if p < length:
                begun.append((first + p, into))
            else:
                follows.append((tokens + p - length, into))
        tokens += len(row) - length
    return [torch.tensor(chosen, dtype=torch.int64).view(-1, 2).T
            for chosen in ([begun, follows] if beginnings else [follows])]


def is_massive(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) bool: rows whose norm swamps all statistics. A text's first token gathers
    attention that has nowhere to go, and its norm is tens to hundreds of times the others' (Sun et
    al. 2024, Massive Activations)."""
    norms = torch.cat([block.float().norm(dim=1) for block in rows.split(8192)])
    return norms > MASSIVE * norms.median()


def roles_of(row: data.Row, bos_ids: set[int]) -> list[str]:
    """The role of each of a row's tokens. A text may hold BOS itself, too."""
    is_text = row.body == row.start == len(row.ids)  # no question and no answer
    roles = ["text" if is_text else "context"] * row.body
    roles += ["question"] * (row.start - row.body)
    roles += ["answer"] * (len(row.ids) - row.start)
    return ["bos" if token in bos_ids else role for token, role in zip(row.ids, roles)]


# --------------------------------------------------------------------------------------------------
# what is collected


class Chosen(NamedTuple):
    """Tokens of one domain whose activations are wanted, by example."""

    rows: list[data.Row]
    examples: list[tuple[int, data.Example]]  # with their numbers in the data
    positions: list[list[int]]  # of each row


def sample_stream(examples: Iterable[data.Example], count: int,
                  seed: int) -> list[tuple[int, data.Example]]:
    """`count` examples (0: all) of a stream with their numbers, each as likely as any other. No
    more than these are held."""
    if not count:
        return list(enumerate(examples))
    rng, heap = random.Random(f"examples {seed}"), []
    for i, example in enumerate(examples):  # the examples with the largest random keys remain
        item = (rng.random(), i, example)
        if len(heap) < count:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)
    return sorted((i, example) for _, i, example in heap)


def choose(examples: list[tuple[int, data.Example]], vocabulary: data.Vocabulary, max_length: int,
           roles: tuple[str, ...], pool: str, limit: int, seed: int) -> Chosen:
    """The tokens of these roles; at most `limit` (0: all) of them, or of pooled rows, of examples
    drawn at random. What the questions of one context have in common is taken once."""
    chosen, previous = Chosen([], [], []), None
    for i, example in examples:
        row = data.encode(example, vocabulary, max_length)
        if row is None:
            continue
        common = 0
        if previous and pool == "token" and row.context and previous.context == row.context:
            common = len(data.common_beginning([previous.ids, row.ids]))
        previous = row
        positions = _wanted(row, roles, pool, common, vocabulary.bos_ids)
        if positions:
            chosen.rows.append(row)
            chosen.examples.append((i, example))
            chosen.positions.append(positions)
    return _limited(chosen, pool, limit, seed)


def _wanted(row: data.Row, roles: tuple[str, ...], pool: str, first: int,
            bos_ids: set[int]) -> list[int]:
    """The positions of a row, from `first` on, whose activations are wanted."""
    token_roles = roles_of(row, bos_ids)
    positions = [p for p in range(first, len(row.ids)) if token_roles[p] in roles]
    if pool != "token":
        positions = [p for p in positions if token_roles[p] != "bos"]
    return positions[-1:] if pool == "last" else positions


def _limited(chosen: Chosen, pool: str, limit: int, seed: int) -> Chosen:
    """At most `limit` rows. Whole examples are kept, because the steps of a text are measured from
    one token to the next; only the last example is cut."""
    sizes = [len(positions) if pool == "token" else 1 for positions in chosen.positions]
    if not limit or sum(sizes) <= limit:
        return chosen
    kept = {}
    for k in random.Random(f"rows {seed}").sample(range(len(sizes)), len(sizes)):
        if limit < 1:
            break
        kept[k] = chosen.positions[k][:limit] if pool == "token" else chosen.positions[k]
        limit -= min(sizes[k], limit)
    order = sorted(kept)
    return Chosen([chosen.rows[k] for k in order], [chosen.examples[k] for k in order],
                  [kept[k] for k in order])


# --------------------------------------------------------------------------------------------------
# to a file


def collect(loaded: LoadedModel, domains: dict[str, Chosen], layers: list[int], path: Path,
            pool: str, about: dict, past: llama.Past | None = None,
            prompt_inputs: dict[int, Tensor] | None = None, overwrite: bool = False) -> None:
    """Write the activations of each domain's tokens to a new file, every batch straight to its
    place, so that no more than a batch is held. about goes into the file's metadata.

    past: of a prompt in front of every text. prompt_inputs {layer: (n, D)}: the prompt's own rows,
    if it has any. overwrite: else OSError if there is a file when all is written."""
    # Work out the labels of all rows, which give the number of rows and so the file's size.
    model, prompt_inputs = loaded.model, prompt_inputs or {}
    roles, fields = _row_fields(domains, pool, loaded.vocabulary.bos_ids)
    N, D, dtype = len(roles), model.config.hidden_size, model.embeddings.dtype
    prompt_layers = [i for i in layers if i in prompt_inputs]
    shapes = {f"layers.{i}": ((N, D), dtype) for i in layers}
    shapes |= {f"prompt.{i}": (tuple(prompt_inputs[i].shape), dtype) for i in prompt_layers}
    shapes |= {key: ((N,), torch.int64) for key in FIELDS}
    shapes |= {key: ((N,), torch.uint8) for key in ("role", "massive")}
    about = {**about, "layers": layers, "num_hidden_layers": model.config.num_hidden_layers,
             "pool": pool, "roles": list(ROLES), "domains": list(domains)}

    # The file is laid out first, and every batch then written to its place.
    with replacing(path, is_new=not overwrite) as file:
        out = mapped(file, shapes, {"promptprior": json.dumps(about)})
        for key, values in fields.items():
            out[key].copy_(torch.tensor(values))
        out["role"].copy_(torch.tensor([ROLES.index(role) for role in roles], dtype=torch.uint8))
        for i in prompt_layers:
            out[f"prompt.{i}"].copy_(prompt_inputs[i])
        _write_activations(loaded, domains, layers, pool, past, out)
        for i in layers:
            out["massive"] |= is_massive(out[f"layers.{i}"])
        del out


def _row_fields(domains: dict[str, Chosen], pool: str, bos_ids: set[int]
                ) -> tuple[list[str], dict[str, list[int]]]:
    """The role of every row, and the numbers of FIELDS."""
    roles: list[str] = []
    fields: dict[str, list[int]] = {key: [] for key in FIELDS}
    sources: dict[tuple[int, str], int] = {}  # numbers by domain and name
    texts: dict[tuple[int, str], int] = {}
    for d, chosen in enumerate(domains.values()):
        for row, (i, example), positions in zip(*chosen):
            source = sources.setdefault((d, unit(example)), len(sources))
            text = texts.setdefault((d, topic(example)), len(texts))
            token_roles = roles_of(row, bos_ids)
            if pool == "mean":  # of one role if all its tokens are, at the last one's position
                names = {token_roles[p] for p in positions}
                roles.append(names.pop() if len(names) == 1 else "text")
                positions = positions[-1:]
            else:
                roles += [token_roles[p] for p in positions]
            for p in positions:
                fields["domain"].append(d)
                fields["source"].append(source)
                fields["text"].append(text)
                fields["example"].append(i)
                fields["position"].append(p)
                fields["token"].append(row.ids[p])
    return roles, fields


def _write_activations(loaded: LoadedModel, domains: dict[str, Chosen], layers: list[int],
                       pool: str, past: llama.Past | None, out: dict[str, Tensor]) -> None:
    written = 0
    with progress(total=len(out["role"]), desc="activations", unit=" rows", leave=False) as bar:
        for chosen in domains.values():
            tokens = [row.ids + loaded.end for row in chosen.rows]  # which is not collected
            for batch in stream(loaded.model, tokens, chosen.positions, layers, past,
                                pool == "mean"):
                for i, x in batch.items():
                    if not torch.isfinite(x).all():
                        raise UserError(f"layer {i}: activations that are not finite, after "
                                        f"{written} rows: use --dtype float32 or bfloat16")
                    out[f"layers.{i}"][written:written + len(x)].copy_(x)
                written += len(batch[layers[0]])
                bar.update(len(batch[layers[0]]))


# --------------------------------------------------------------------------------------------------
# from a file


class Collection:
    """A collection's file, mapped. about: what it was made of."""

    def __init__(self, path: Path):
        """Raises UserError for a file that is no collection."""
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file: make it by `collect --out {self.path}`")
        with reading(self.path, "a collection of activations", "make one by `collect`"):
            self.file = safe_open(llama.regular(self.path), framework="pt")
            about = json.loads((self.file.metadata() or {})["promptprior"])
            check_about(about)
            self.about, self.layers, self.domains = about, about["layers"], about["domains"]
            self.field = {key: self.file.get_tensor(key) for key in (*FIELDS, "role", "massive")}
            self._check_fields()
            self.width = self._checked_width()

    def _check_fields(self) -> None:
        """Raises ValueError for a number that names no role, domain or token."""
        N = len(self.field["role"])
        most = {"role": len(ROLES), "domain": len(self.domains)}
        for key, t in self.field.items():
            dtype = torch.int64 if key in FIELDS else torch.uint8
            if t.dtype != dtype or t.shape != (N,):
                raise ValueError(f"{key} has shape {tuple(t.shape)} of {t.dtype}")
            if N and not 0 <= int(t.min()) <= int(t.max()) < most.get(key, 2**40):
                raise ValueError(f"{key} has numbers out of its range")

    def _checked_width(self) -> int:
        """The width of all activations, without reading them. Raises ValueError if their shapes
        are not those of one model's layers."""
        slices = {key: self.file.get_slice(key) for key in self.file.keys()
                  if key not in self.field}
        layers = {f"layers.{i}" for i in self.layers}
        if {key for key in slices if not key.startswith("prompt.")} != layers:
            raise ValueError(f"it holds {', '.join(sorted(slices))} and not the layers it names")
        N, width = len(self.field["role"]), slices[f"layers.{self.layers[0]}"].get_shape()[-1]
        for key, tensor in slices.items():
            shape = tensor.get_shape()
            rows = shape[0] if key.startswith("prompt.") else N
            if shape != [rows, width] or tensor.get_dtype() not in ("F32", "BF16", "F16"):
                raise ValueError(f"{key} has shape {shape}")
        return width

    @property
    def left_out(self) -> Tensor:
        """(N,) bool: rows of BOS or of massive norm, which no fit and no picture takes."""
        return (self.field["role"] == ROLES.index("bos")) | (self.field["massive"] > 0)

    def chosen(self, domain: str | None = None, roles: tuple[str, ...] = (),
               massive: bool = False) -> Tensor:
        """Indices (N,) of the rows of a domain (None: of all) in these roles (none: all but
        bos); massive rows only if asked for."""
        if domain is not None and domain not in self.domains:
            raise UserError(f"{self.path}: no domain {domain!r} in it: it has "
                            f"{', '.join(self.domains)}")
        numbers = [ROLES.index(role) for role in roles or set(ROLES) - {"bos"}]
        is_chosen = torch.isin(self.field["role"], torch.tensor(numbers, dtype=torch.uint8))
        if domain is not None:
            is_chosen &= self.field["domain"] == self.domains.index(domain)
        if not massive:
            is_chosen &= self.field["massive"] == 0
        return is_chosen.nonzero()[:, 0]

    def units(self, index: Tensor, least: int = 2) -> Tensor:
        """The numbers (N,) of the independent units that these rows (N,) of one domain are of: its
        articles or modules, or if the rows are of fewer than `least` of them, its texts. What is
        found then holds of these articles or modules, and not of others like them."""
        sources = self.field["source"][index]
        return sources if len(sources.unique()) >= least else self.field["text"][index]

    def rows(self, layer: int, index: Tensor | None = None) -> Tensor:
        """A layer's activations (N, D) in the file's dtype, at these indices (None: chosen())."""
        if layer not in self.layers:
            raise UserError(f"{self.path}: layer {layer} is not in it, only "
                            f"{', '.join(map(str, self.layers))}: collect again with --layers "
                            f"{layer}")
        x = self.file.get_tensor(f"layers.{layer}")[self.chosen() if index is None else index]
        bad = (~torch.isfinite(x).all(dim=1)).nonzero()[:, 0]
        if len(bad):
            raise UserError(f"{self.path}: layer {layer} has {len(bad)} rows that are not finite, "
                            f"first row {int(bad[0])}: collect again")
        return x

    def prompt(self, layer: int) -> Tensor | None:
        """The prompt's own rows (n, D) at a layer, if it has any there."""
        name = f"prompt.{layer}"
        return self.file.get_tensor(name) if name in self.file.keys() else None


def check_about(about: dict) -> None:
    """Raises ValueError, KeyError or TypeError for metadata that no collection has."""
    named = {key: about[key] for key in ("model", "dtype", "sha256")}
    named["revision"] = about.get("revision") or ""  # of a model on the hub alone
    for key, text in named.items():
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{key} is {text!r:.80}")
    layers, domains = about["layers"], about["domains"]
    are_numbers = all(type(i) is int and 0 <= i < 2**20 for i in layers)
    are_names = all(isinstance(name, str) and "\0" not in name for name in domains)
    if len(domains) > DOMAINS:
        raise ValueError(f"{len(domains)} domains, and no more than {DOMAINS} are compared")
    for key, values, is_right in (("layers", layers, are_numbers), ("domains", domains, are_names)):
        if not isinstance(values, list) or not values or len(set(values)) < len(values) \
                or not is_right:
            raise ValueError(f"{key} is {values!r:.80}")
    if about["roles"] != list(ROLES) or about["pool"] not in ("token", "mean", "last"):
        raise ValueError(f"its roles are {about['roles']!r:.80}, its pool {about['pool']!r:.80}")


# --------------------------------------------------------------------------------------------------
# the command


def command_collect(given: dict) -> None:
    options = from_flags(CollectOptions, given)
    past, prompt_inputs, step = None, {}, None
    if "step" in given and not options.under:
        raise UserError(f"--step {given['step']} is for --under RUN: give that too, or leave it "
                        "out")
    if options.under:
        opened = open_run(options.under, given)
        step = opened.run.step
        past, prompt_inputs = under_prompt(opened)
        loaded, max_length = opened.loaded, options.max_length or opened.max_length
    else:
        loaded = load_model(from_flags(ModelSettings, given).complete(), encoders=True)
        max_length = longest_text(loaded, DataSettings(max_length=options.max_length),
                                  PriorSettings())
    # Check all that was asked for before the data is read, which may take long.
    L = loaded.model.config.num_hidden_layers
    layers, roles = chosen_layers(options.layers, L), chosen_roles(options.roles)
    path = free_place(options.out, "--out", options.overwrite, is_collection, "a collection")
    path.parent.mkdir(parents=True, exist_ok=True)

    if len(options.specs) > DOMAINS:
        raise UserError(f"--data: {len(options.specs)} domains, and a file has no more than "
                        f"{DOMAINS}: make several files")
    domains = {}
    for spec in options.specs:
        name, chosen = read_domain(spec, loaded, max_length, roles, options)
        if name in domains:
            raise UserError(f"--data: two are named {name!r}: name one yourself, as in "
                            f"other={spec}")
        domains[name] = chosen
    settings = loaded.settings
    collect(loaded, domains, layers, path, options.pool, {
        "model": settings.model, "revision": loaded.revision, "dtype": settings.dtype,
        "sha256": checksum(model_files(settings)),
        "data": [absolute(named_spec(spec)[1]) for spec in options.specs],
        "under": os.path.abspath(options.under) if options.under else None, "step": step,
        "examples": options.examples, "limit": options.limit, "seed": options.seed},
        past, prompt_inputs, options.overwrite)
    report(Collection(path), domains)


def under_prompt(opened) -> tuple[llama.Past, dict[int, Tensor]]:
    """A run's prompt as a Past, and its own rows {layer: (n, D)} at the layers that they pass."""
    if opened.settings.prompt.place != "before":
        raise UserError(f"{opened.run.path}: its prompt stands inside the texts (--place "
                        f"{opened.settings.prompt.place}), and activations are collected under one "
                        "that stands before them")
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        if opened.prompt.is_prefix:
            return opened.prompt.past(opened.model), rows
        past = opened.model.prompt_past(opened.prompt.layers, opened.prompt.cut, rows.__setitem__)
    return past, rows


def read_domain(spec: str, loaded: LoadedModel, max_length: int, roles: tuple[str, ...],
                options: CollectOptions) -> tuple[str, Chosen]:
    """The name of a domain, and its tokens whose activations are wanted."""
    given_name, plain_spec = named_spec(spec)
    name = given_name or spec_name(plain_spec)
    kind, path = parse_spec(plain_spec, 0)
    say_files(kind, path)
    examples = progress(data.stream(kind, path), desc=name, unit=" examples", leave=False)
    chosen = choose(sample_stream(examples, options.examples, options.seed), loaded.vocabulary,
                    max_length, roles, options.pool, options.limit, options.seed)
    if not chosen.rows:
        raise UserError(f"{plain_spec}: no token of the roles {', '.join(roles)} in examples of at "
                        f"most {max_length} tokens: ask for others by --roles, or raise "
                        "--max-length")
    return name, chosen


def named_spec(text: str) -> tuple[str, str]:
    """"prose=text:PATH" -> ("prose", "text:PATH"); without a name it is ""."""
    name, equals, spec = text.partition("=")
    return (name, spec) if equals and ":" not in name else ("", text)


def chosen_layers(words: tuple[str, ...], L: int) -> list[int]:
    """("0", "8,16") or ("all",) -> layers; (): the first, the middle and the end."""
    if not words:
        return sorted({0, L // 2, L})
    if words == ("all",):
        return list(range(L + 1))
    try:
        layers = sorted({int(i) for i in ",".join(words).split(",")})
    except ValueError:
        layers = [-1]
    if not 0 <= layers[0] <= layers[-1] <= L:
        raise UserError(f"--layers {' '.join(words)}: expected numbers from 0 to {L}, or all; {L} "
                        "is what comes after the final norm")
    return layers


def chosen_roles(words: tuple[str, ...]) -> tuple[str, ...]:
    known = [role for role in ROLES if role != "prompt"]  # its rows are kept apart
    roles = tuple(",".join(words).split(",") if words else known)
    if not set(roles) <= set(known):
        raise UserError(f"--roles {' '.join(words)}: use some of {' '.join(known)}")
    return roles


def is_collection(path: Path) -> bool:
    Collection(path)  # raises UserError for what is none, which is never overwritten
    return True


def report(file: Collection, domains: dict[str, Chosen]) -> None:
    """Show how many rows of each domain a collection has, and of which size it is."""
    is_bos = file.field["role"] == ROLES.index("bos")
    for d, (name, chosen) in enumerate(domains.items()):
        of_domain = file.field["domain"] == d
        bos = int((of_domain & is_bos).sum())
        massive = int((of_domain & file.left_out & ~is_bos).sum())
        rows, examples = int(of_domain.sum()), len(chosen.rows)
        show(f"{name}: {counted(rows, 'row')} of {counted(examples, 'example')}; {bos} of BOS and "
             f"{counted(massive, 'other')} of massive norm, marked and left out of fits and "
             "pictures")
    size = file.path.stat().st_size / 2**20
    layers = "layer" if len(file.layers) == 1 else "layers"
    show(f"{file.path}: {layers} {', '.join(map(str, file.layers))} of width {file.width}, "
         f"{size:.1f} MiB")
