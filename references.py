"""The populations that priors are fitted on, and the draw of a prompt from a prior.

At the token embeddings a reference is the vocabulary or the tokens of a text, at a deeper layer
activations at its input; it may be a collection's file, or the rows of finished runs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import llama
import priors
from activations import ROLES, Collection, massive, roles_of, stream
from loading import (check_same_model, collection_of, parse_spec, rows_per_layer, topic,
                     training_and_evaluation)
from run import Run
from settings import REFERENCE_ROWS, UserError, prior_name, say, spec_name, stored_settings
from train import progress


class Labels(NamedTuple):
    """What the rows of a population (N, D) are."""

    token: Tensor  # (N,) ids
    role: list[str]  # of activations.ROLES; "token" in the vocabulary
    domain: list[str]  # the data they come from

    def take(self, index: Tensor) -> Labels:
        return Labels(self.token[index], *([values[i] for i in index.tolist()]
                                           for values in self[1:]))


class Reference(NamedTuple):
    """The population that a layer's prior is fitted on: inputs of the layer, or what its attention
    makes of them, keys of no position and values side by side (N, 2 G hd)."""

    parts: list[Tensor]  # (N, D) fp32 each: one for every --reference, or every run
    name: str
    labels: list[Labels] | None = None  # one for each part; rows of runs are no tokens
    columns: bool = False  # keys and values

    @property
    def rows(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


def references(a: SimpleNamespace, model, vocabulary, layers: list[int],
               examples: list[data.Example] | None = None) -> dict[int, Reference]:
    """The population of each layer. examples are the training data, if they are read already."""
    name, _, sources = priors.parse(a.prior)
    if name == "text":
        ids = vocabulary.encode_plain(a.text)
        if not ids:
            raise UserError("--prior text needs --text, the text whose tokens the rows begin as")
        x = inputs(model, [ids], [list(range(len(ids)))], layers)
        labels = Labels(torch.tensor(ids), ["text"] * len(ids), ["text"] * len(ids))
        found = [{i: (x[i], f"tokens of {a.text!r}", labels) for i in layers}]
    elif sources:
        methods = {method_of(run): run for run in sources}
        if len(methods) > 1:
            raise UserError(f"{' and '.join(methods.values())}: one trained rows and the other "
                            "keys and values: give runs of one --method")
        if "prefix" in methods and getattr(a, "method", "prompt") != "prefix":
            raise UserError(f"{sources[0]}: it trained keys and values, which are a prior of keys "
                            "and values alone: train --method prefix from it, or give runs of rows")
        found = [rows for run in sources for rows in posterior_rows(a, model, run, layers)]
    else:
        if len(set(map(spec_name, a.reference))) < len(a.reference):
            raise UserError(f"--reference {' '.join(a.reference)}: two of one name: give each once")
        if priors.PRIORS[name].several and len(a.reference) != 2:
            raise UserError(f"--prior {name} goes between two references: give two, as in "
                            "--reference text math")
        found = [population(a, model, vocabulary, layers, spec, examples) for spec in a.reference]
    prefixes = "prefix" in map(method_of, sources)
    if not prefixes and any(f[i][0].shape[1] != model.config.hidden_size
                            for f in found for i in layers):
        raise UserError(f"the reference is not of width {model.config.hidden_size} as the model "
                        "is: it was made with another one")
    return {i: Reference([f[i][0] for f in found], " and ".join(dict.fromkeys(
        f[i][1] for f in found)), None if sources else [f[i][2] for f in found], prefixes)
        for i in layers}


def as_prefix(a: SimpleNamespace, model, layer: int, x: Tensor, is_columns: bool) -> Tensor:
    """A prior's draw (n, D), or (n, 2 G hd) of a prior over columns, as a prefix (n, 2 G hd): its
    keys as the positions turn them where it stands."""
    keys, values = llama.split(x if is_columns else columns(model, layer, x), model.config)
    return llama.join(model.turn(keys, first_position(a.place)), values)


def first_position(place: str) -> int:
    """Of a prefix's keys. Before the last token that asks they stand everywhere, and count from 0
    as at the beginning."""
    return int(place == "after-bos")


def measured(run: Run, model) -> Run:
    """The run as instruments read it: a prefix's keys are of no position."""
    a, seen = stored_settings(run.config()), Run(run.path)
    if a["method"] == "prefix":
        seen.turn = functools.partial(model.turn, first=first_position(a["place"]), back=True)
    return seen


def beside(a: SimpleNamespace, model, found: dict[int, Reference]) -> dict[int, Reference]:
    """The populations that a run's prompts lie among: references, or of a prefix what attention
    makes of these."""
    if a.method != "prefix":
        return found
    return {i: r if r.columns else Reference([columns(model, i, x) for x in r.parts],
                                             f"keys and values of {r.name}", r.labels, True)
            for i, r in found.items()}


@torch.no_grad()
def columns(model, layer: int, x: Tensor) -> Tensor:
    """Inputs (N, D) of a layer -> keys of no position and values, side by side (N, 2 G hd), fp32 on
    the CPU."""
    return torch.cat([llama.join(*model.keys_and_values(layer, some)).float().cpu()
                      for some in x.split(4096)])


def population(a: SimpleNamespace, model, vocabulary, layers: list[int], spec: str,
               examples: list[data.Example] | None = None
               ) -> dict[int, tuple[Tensor, str, Labels]]:
    """One reference at each layer, {layer: ((N, D) fp32 on the CPU, its name, its labels)}; of
    vocab at deep layers the activations of --data."""
    limit = a.reference_rows or REFERENCE_ROWS
    at = {i: f"layer {i} inputs" if i else "token embeddings" for i in layers}
    if spec == "vocab":
        deep = [i for i in layers if i > 0]
        found = population(a, model, vocabulary, deep, a.data, examples) if deep else {}
        if 0 in layers:
            ids = torch.tensor(vocabulary.ordinary)
            found[0] = (model.embeddings[ids].float().cpu(), "vocabulary",
                        Labels(ids, ["token"] * len(ids), ["vocabulary"] * len(ids)))
        return found
    if spec.startswith("collection:"):
        path, domain = collection_of(spec)
        file = Collection(path)
        check_same_model(a, file.about.get("sha256"), file.path)
        index = some_rows(file.chosen(domain), a.seed, limit)
        say(f"{file.path}: {int(file.left_out.sum())} rows of BOS or of massive norm left out")
        labels = Labels(file.field["token"][index],
                        [ROLES[r] for r in file.field["role"][index].tolist()],
                        [file.domains[d] for d in file.field["domain"][index].tolist()])
        found = {i: (file.rows(i, index).float(), labels) for i in layers}
        count = len(index)
    else:
        if spec != a.data:
            examples = data.read(*parse_spec(spec, 0), limit=limit)
        rows = reference_rows(a, examples or training_and_evaluation(a)[0], vocabulary, limit)
        bos, domain = vocabulary.bos is not None, spec_name(spec)
        # BOS, whose norm would swamp any statistics, is left out
        labels = Labels(torch.tensor([t for r in rows for t in r.ids[1:]])[:limit],
                        [role for r in rows for role in roles_of(r, bos)[1:]][:limit], [])
        count = len(labels.token)
        labels = labels._replace(domain=[domain] * count)
        found = inputs(model, [r.ids for r in rows], [list(range(1, len(r.ids))) for r in rows],
                       layers)
        for i, x in found.items():
            x = x[:limit]
            kept = (~massive(x)).nonzero()[:, 0]
            found[i] = (x[kept], labels.take(kept))
            if len(kept) < len(x):
                say(f"layer {i}: {len(x) - len(kept)} of {len(x)} rows of {domain} "
                    "have a massive norm and are left out")
    if count < (a.reference_rows or 1):
        raise UserError(f"--reference {spec_name(spec)} has {count} rows, and --reference-rows "
                        f"asks for {a.reference_rows or 1}: ask for at most that, or give more "
                        "data")
    return {i: (x, f"{at[i]} of {spec_name(spec)}", labels) for i, (x, labels) in found.items()}


def inputs(model, rows: list[list[int]], wanted: list[list[int]],
           layers: list[int]) -> dict[int, Tensor]:
    """The inputs of layers at the wanted places of token rows, {layer: (N, D)} fp32 on the CPU."""
    found = {i: [] for i in layers}
    for some in progress(stream(model, rows, wanted, layers), total=-(-len(rows) // 16),
                         desc="activations", leave=False):
        for i, x in some.items():
            found[i].append(x.float().cpu())
    return {i: torch.cat(parts) for i, parts in found.items()}


def reference_rows(a: SimpleNamespace, examples: list[data.Example], vocabulary,
                   limit: int) -> list[data.Row]:
    """Token rows in an order made from the seed, one question a context, of `limit` tokens or a
    little more."""
    rows, count, seen = [], 0, set()
    for i in data.Order([e.context for e in examples], 1, a.seed).epoch(0):
        if count >= limit:
            break
        if topic(examples[i]) not in seen:
            seen.add(topic(examples[i]))
            row = data.encode(examples[i], vocabulary, a.max_length)
            rows += [row] * (row is not None)
            count += len(row.ids) - 1 if row else 0
    return rows


def some_rows(index: Tensor, seed: int, limit: int) -> Tensor:
    """At most `limit` of the indices (N,), in their order."""
    chosen = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:limit]
    return index[chosen.sort().values]


def method_of(path: str | Path) -> str:
    return stored_settings(Run(Path(path)).config())["method"]


def posterior_rows(a: SimpleNamespace, model, path: str,
                   layers: list[int]) -> list[dict[int, tuple[Tensor, str]]]:
    """The prompts that a run ended with, of the layers asked for: one, or one for each particle."""
    run = Run(Path(path))
    check_same_model(a, run.config().get("sha256", {}).get("model"), run.path)
    prompts = measured(run, model).particles()
    missing = [i for i in layers if i not in prompts[0]]
    if missing:
        raise UserError(f"{run.path}: has rows at layers {', '.join(map(str, prompts[0]))} and "
                        f"none at {', '.join(map(str, missing))}: give runs with as many "
                        "--deep-layers, or of prefixes as many --prefix-layers")
    what = "keys and values" if method_of(path) == "prefix" else "rows"
    return [{i: (rows[i], f"{what} of {run.path.name}") for i in layers} for rows in prompts]


def draw(a: SimpleNamespace, found: dict[int, Reference],
         prompts: int = 1) -> tuple[dict[int, Tensor], dict[int, object], list[dict]]:
    """Fit the prior on each layer's reference, draw rows (prompts, n, D), and say how they stand to
    it -> the rows, the fitted priors and the reports."""
    name, options, _ = priors.parse(a.prior)
    prior = priors.PRIORS[name]
    rows, fitted, reports = {}, {}, []
    for i, reference in found.items():
        fitted[i] = prior.fit(*(reference.parts if prior.several else [reference.rows]), **options)
        generator = torch.Generator().manual_seed(1000 * a.seed + i)
        rows[i] = torch.stack([fitted[i].sample(rows_per_layer(a), generator)
                               for _ in range(prompts)])
        if not torch.isfinite(rows[i]).all():
            raise priors.PriorError(f"{a.prior}: drew rows that are not finite: give its options "
                                    "smaller values")
        count = len(reference.rows)
        ratio, about = norm_ratio(rows[i], reference.rows), fitted[i].report()
        reports.append({"layer": i, "reference": reference.name, "rows": count,
                        "norm_ratio": ratio, **about})
        say(f"layer {i}: {prior_name(a)} on {reference.name}, {count} rows: "
            + ", ".join(f"{key} {' '.join(f'{x:.4g}' for x in np.atleast_1d(value))}"
                        for key, value in {"init-to-token norm ratio": ratio, **about}.items()))
        if ratio > 5:
            say(f"layer {i}: warning: the rows start {ratio:.0f} times as long as real ones and "
                "may train badly")
    return rows, fitted, reports


def norm_ratio(rows, reference) -> float:
    """Mean norm of the rows over mean norm of the reference: 1 is on scale, PEFT's random
    default is near 45."""
    return float(rows.norm(dim=-1).mean() / reference.norm(dim=-1).mean())
