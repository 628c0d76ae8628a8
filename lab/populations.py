"""The populations that priors are fitted on, and the draw of a prompt from a prior.

    by_layer = references(settings.prior, settings.data, loaded, layers)     # {layer: Reference}
    drawn = draw(settings.prior, by_layer)                                   # rows, priors, reports

At the token embeddings a reference is the vocabulary or the tokens of a text, at a deeper layer
activations at its input. It may also be a collection's file, or the prompts of finished runs.

n prompt rows, N rows of a population, D width, G key/value heads, hd head width.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import llama
import priors
import viz
from lab import cache, posteriors
from lab.activations import BATCH, ROLES, Collection, is_massive, roles_of, stream
from lab.cache import kept, kept_under
from lab.console import UserError, counted, progress, say
from lab.evaluation import OpenRun
from lab.files import checksum
from lab.folder import Run
from lab.inputs import (LoadedModel, check_same_model, collection_of, divided, model_files,
                        parse_spec, rows_per_layer, say_files, topic)
from lab.processes import rank_and_size
from lab.settings import (REFERENCE_ROWS, DataSettings, PriorSettings, PromptSettings, Settings,
                          prior_name, spec_name)


class Labels(NamedTuple):
    """What the rows of a population (N, D) are."""

    token: Tensor  # (N,) ids
    role: list[str]  # of activations.ROLES; "token" in the vocabulary
    domain: list[str]  # the data that they come from
    text: Tensor  # (N,) a part's texts, numbered; rows of one text depend on each other

    def take(self, index: Tensor) -> Labels:
        chosen = index.tolist()
        return Labels(self.token[index], [self.role[i] for i in chosen],
                      [self.domain[i] for i in chosen], self.text[index])


@dataclass(frozen=True)
class Reference:
    """The population that a layer's prior is fitted on, or that a prompt lies among."""

    parts: list[Tensor]  # (N, W) fp32 each, one for every --reference or every run
    name: str
    labels: list[Labels] | None = None  # one for each part; None: the rows of runs are no tokens
    is_prefix: bool = False  # keys (before rotation) and values, W = 2 G hd; else W = D
    keep: bool = False  # as of its parts
    whole: Whole | None = None  # what these are the rest of

    @property
    def rows(self) -> Tensor:
        return joined(self.parts)

    @functools.cached_property
    def plane(self) -> viz.Plane:
        """The principal plane of the rows."""
        mean, variance, basis, _ = (t.numpy() for t in self.spectrum)
        return viz.Plane.of(mean, variance, basis)

    @functools.cached_property
    def spectrum(self) -> priors.Spectrum:
        """What a Gaussian takes of the rows."""
        if self.whole and "spectrum" in vars(self.whole.reference):  # that is worked out already
            held = joined(self.whole.held)
            return priors.Spectrum(*kept(
                priors.Spectrum.of_rest, self.rows, held, *self.whole.reference.spectrum,
                keep=self.keep, work=len(held) * held.shape[1]**2))
        return priors.Spectrum(*kept(priors.Spectrum.of, self.rows, keep=self.keep))

    def fit(self, kind: type, options: dict) -> priors.Prior:
        """A prior of this kind, fitted on the population."""
        if kind.several:
            return kind.fit(*self.parts, **options)
        if issubclass(kind, priors.Fitted):
            return kind.fit(self.rows, spectrum=lambda: self.spectrum, **options)
        return kind.fit(self.rows, **options)

    @property
    def gaussian(self) -> priors.Fitted:
        return self.fit(priors.Fitted, {})


class Whole(NamedTuple):
    """A population of which a part was taken off."""

    reference: Reference
    held: list[Tensor]  # (n, W): the rows that were, of each of its parts


def joined(parts: list[Tensor]) -> Tensor:
    """Parts (N, W) of a population as one; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def plane_of(rows: Tensor, keep: bool) -> viz.Plane:
    """The principal plane of rows (N, W); see cache.kept."""
    return viz.Plane(*(t.numpy() for t in kept(viz.pca, rows.numpy(), keep=keep)))


class Part(NamedTuple):
    """One --reference at one layer."""

    rows: Tensor  # (N, W) fp32 on the CPU
    name: str
    labels: Labels | None
    keep: bool = False  # what is worked out of the rows, because later commands have them again


# --------------------------------------------------------------------------------------------------
# references


def references(prior: PriorSettings, settings: DataSettings, loaded: LoadedModel, layers: list[int],
               method: str = "prompt", examples: list[data.Example] | None = None
               ) -> dict[int, Reference]:
    """The population of each layer that the prior is fitted on. settings: the data that an
    arithmetic or SQuAD reference may be, its max_length known. method: of the prompt that will be
    drawn. examples: the training data, if they are read already."""
    # Every part is one --reference, or one run, at all layers.
    name, _, runs = priors.parse(prior.prior)
    is_prefix = False
    if name == "text":
        parts = [text_population(prior.text[0], loaded, layers)]
    elif runs:
        is_prefix = check_methods(runs, method)
        parts = [part for run in runs for part in run_populations(run, loaded, layers)]
    else:
        parts = [population(spec, prior, settings, loaded, layers, examples)
                 for spec in prior.reference]

    # Gather the parts of each layer.
    D = loaded.model.config.hidden_size
    by_layer = {}
    for i in layers:
        layer_parts = [part[i] for part in parts]
        if not is_prefix and any(part.rows.shape[1] != D for part in layer_parts):
            raise UserError(f"the reference is not of width {D} as the model is: it was made with "
                            "another one")
        names = dict.fromkeys(part.name for part in layer_parts)
        labels = None if runs else [part.labels for part in layer_parts]
        by_layer[i] = Reference([part.rows for part in layer_parts], " and ".join(names), labels,
                                is_prefix, all(part.keep for part in layer_parts))
    return by_layer


def population_key(settings: Settings, layers: list[int]) -> tuple:
    """What tells the references of a run from those of another run: see Shared."""
    prior = settings.prior
    name, _, runs = priors.parse(prior.prior)
    # The vocabulary is taken whole; of other populations rows are drawn by the seed.
    seed = None if layers == [0] and prior.reference == ("vocab",) else prior.seed
    return (settings.model, settings.data, priors.PRIORS[name].several, tuple(runs),
            prior.text if name == "text" else None, prior.reference, prior.reference_rows, seed,
            tuple(layers), settings.prompt.method)


def check_methods(runs: list[str], method: str) -> bool:
    """Whether the runs, whose prompts are a prior of a prompt of this method, trained prefixes.
    Raises UserError for runs that do not suit each other or the method."""
    methods = {Run(Path(run)).settings().prompt.method: run for run in runs}
    if len(methods) > 1:
        raise UserError(f"{' and '.join(methods.values())}: one trained rows and the other keys "
                        "and values: give runs of one --method")
    if "prefix" in methods and method != "prefix":
        raise UserError(f"{runs[0]}: it trained keys and values, which are a prior of keys and "
                        "values alone: train --method prefix from it, or give runs of rows")
    return "prefix" in methods


def text_population(text: str, loaded: LoadedModel, layers: list[int]) -> dict[int, Part]:
    """The tokens of a text, for the prior text."""
    ids = loaded.vocabulary.encode_plain(text)
    if not ids:
        raise UserError(f"--text {text!r} has no token that a row could begin as: give another")
    rows = inputs_of(loaded.model, [ids], [list(range(len(ids)))], layers)
    one_text = torch.zeros(len(ids), dtype=torch.int64)
    labels = Labels(torch.tensor(ids), ["text"] * len(ids), ["text"] * len(ids), one_text)
    return {i: Part(rows[i].float(), f"tokens of {text!r}", labels) for i in layers}


def run_populations(path: str, loaded: LoadedModel, layers: list[int]) -> list[dict[int, Part]]:
    """The prompts that a run ended with: one, or one for each particle."""
    run = Run(Path(path))
    check_same_model(loaded.settings, run.config()["sha256"].get("model"), run.path)
    each = [prompt.vectors() for prompt in run.prompts()]
    missing = [i for i in layers if i not in each[0]]
    if missing:
        raise UserError(f"{run.path}: has rows at layers {', '.join(map(str, each[0]))} and none "
                        f"at {', '.join(map(str, missing))}: give runs with as many --deep-layers, "
                        "or of prefixes as many --prefix-layers")
    kind = "keys and values" if run.settings().prompt.method == "prefix" else "rows"
    name = f"{kind} of {run.path.name}"
    return [{i: Part(vectors[i], name, None) for i in layers} for vectors in each]


def population(spec: str, prior: PriorSettings, settings: DataSettings, loaded: LoadedModel,
               layers: list[int], examples: list[data.Example] | None = None) -> dict[int, Part]:
    """One reference at each layer: vocab (at deep layers the activations of --data), a collection,
    or data."""
    if spec == "vocab":
        deep = [i for i in layers if i > 0]
        parts = {}
        if deep:
            parts = population(settings.data, prior, settings, loaded, deep, examples)
        if 0 in layers:
            parts[0] = vocabulary_part(loaded)
        return parts
    if spec.startswith("collection:"):
        parts, count = collection_population(spec, prior, loaded, layers)
    else:
        parts, count = data_population(spec, prior, settings, loaded, layers, examples)
    if count < (prior.reference_rows or 1):
        raise UserError(f"--reference {spec_name(spec)} has {count} rows, and --reference-rows "
                        f"asks for {prior.reference_rows or 1}: ask for at most that, or give more "
                        "data")
    return parts


def vocabulary_part(loaded: LoadedModel) -> Part:
    """Every token that a text can have, once."""
    ids = torch.tensor(loaded.vocabulary.ordinary)
    labels = Labels(ids, ["token"] * len(ids), ["vocabulary"] * len(ids), torch.arange(len(ids)))
    return Part(loaded.model.embeddings[ids].float().cpu(), "vocabulary", labels, keep=True)


def collection_population(spec: str, prior: PriorSettings, loaded: LoadedModel, layers: list[int]
                          ) -> tuple[dict[int, Part], int]:
    path, domain = collection_of(spec)
    file = Collection(path)
    check_same_model(loaded.settings, file.about.get("sha256"), file.path)
    index = sample_rows(file.chosen(domain), prior.seed, prior.reference_rows or REFERENCE_ROWS)
    left_out = int(file.left_out.sum())
    say(f"{file.path}: {counted(left_out, 'row')} of BOS or of massive norm left out")
    roles = [ROLES[role] for role in file.field["role"][index].tolist()]
    domains = [file.domains[d] for d in file.field["domain"][index].tolist()]
    labels = Labels(file.field["token"][index], roles, domains, file.field["text"][index])
    parts = {i: Part(file.rows(i, index).float(), population_name(i, spec), labels)
             for i in layers}
    return parts, len(index)


def data_population(spec: str, prior: PriorSettings, settings: DataSettings, loaded: LoadedModel,
                    layers: list[int], examples: list[data.Example] | None
                    ) -> tuple[dict[int, Part], int]:
    """Tokens as the data uses them, and their number. BOS, whose norm would swamp any statistics,
    and rows of massive norm are left out."""
    limit = prior.reference_rows or REFERENCE_ROWS
    if spec != settings.data:
        kind, path = parse_spec(spec, 0)
        examples = data.read(kind, path, limit)
        say_files(kind, path)
    elif examples is None:
        examples = divided(settings).training
    rows = reference_rows(examples, loaded.vocabulary, settings.max_length, prior.seed, limit)

    # Label every token but BOS and the first of each row, whose norm is massive even if it is no
    # BOS, up to the limit.
    bos_ids, name = loaded.vocabulary.bos_ids, spec_name(spec)
    positions = [[p for p in range(1, len(row.ids)) if row.ids[p] not in bos_ids] for row in rows]
    tokens, roles, texts = [], [], []
    for number, (row, wanted) in enumerate(zip(rows, positions)):
        token_roles = roles_of(row, bos_ids)
        tokens += [row.ids[p] for p in wanted]
        roles += [token_roles[p] for p in wanted]
        texts += [number] * len(wanted)
    if not tokens:
        raise UserError(f"{spec}: no text of it fits --max-length {settings.max_length} with more "
                        "than its first token: raise --max-length, or give other data")
    labels = Labels(torch.tensor(tokens[:limit]), roles[:limit], [name] * len(tokens[:limit]),
                    torch.tensor(texts[:limit]))
    by_layer = kept_inputs(loaded, [row.ids for row in rows], positions, layers)

    # Leave out rows of massive norm, which differ from layer to layer.
    parts = {}
    for i in layers:
        x = by_layer.pop(i)[:limit].float()  # one layer at a time: fp32 of all would double memory
        ordinary = (~is_massive(x)).nonzero()[:, 0]
        parts[i] = Part(x[ordinary], population_name(i, spec), labels.take(ordinary), keep=True)
        if len(ordinary) < len(x):
            say(f"layer {i}: {len(x) - len(ordinary)} of {len(x)} rows of {name} have a massive "
                "norm and are left out")
    return parts, len(tokens)


def population_name(layer: int, spec: str) -> str:
    where = f"layer {layer} inputs" if layer else "token embeddings"
    return f"{where} of {spec_name(spec)}"


def inputs_of(model: llama.Llama, rows: list[list[int]], positions: list[list[int]],
              layers: list[int]) -> dict[int, Tensor]:
    """The inputs of layers at these positions of token rows, {layer: (N, D)} on the CPU, in the
    model's type."""
    parts: dict[int, list[Tensor]] = {i: [] for i in layers}
    batches = stream(model, rows, positions, layers)
    for batch in progress(batches, total=math.ceil(len(rows) / BATCH), desc="activations",
                          unit=" batches", leave=False):
        for i, x in batch.items():
            parts[i].append(x.cpu())
    return {i: torch.cat(parts.pop(i)) for i in layers}


def kept_inputs(loaded: LoadedModel, rows: list[list[int]], positions: list[list[int]],
                layers: list[int]) -> dict[int, Tensor]:
    """inputs_of a model; see cache.kept_under."""
    model = loaded.model
    work = sum(map(len, rows)) * sum(p.numel() for layer in model.model.layers[:max(layers)]
                                     for p in layer.parameters())
    # Processes that share a model run it together, though one may have the file and one not.
    if (model.embeddings.device.type != "cpu" or rank_and_size()[1] > 1 or work < cache.WORTH
            or cache.cache_folder() is None):
        return inputs_of(model, rows, positions, layers)

    def inputs() -> tuple[Tensor, ...]:
        by_layer = inputs_of(model, rows, positions, layers)
        return tuple(by_layer[i] for i in layers)

    given = (checksum(model_files(loaded.settings)), loaded.settings.dtype, layers, *rows,
             *positions)
    return dict(zip(layers, kept_under("inputs", given, work, inputs)))


def reference_rows(examples: list[data.Example], vocabulary: data.Vocabulary, max_length: int,
                   seed: int, limit: int) -> list[data.Row]:
    """Token rows of `limit` tokens or a little more, one question a context, in an order made from
    the seed."""
    rows, count, topics = [], 0, set()
    for i in data.Order([e.context for e in examples], 1, seed).epoch(0):
        if count >= limit:
            break
        if topic(examples[i]) in topics:
            continue
        topics.add(topic(examples[i]))
        row = data.encode(examples[i], vocabulary, max_length)
        if row is not None:
            rows.append(row)
            count += len(row.ids) - 1
    return rows


def sample_rows(index: Tensor, seed: int, limit: int) -> Tensor:
    """At most `limit` of the indices (N,), drawn by the seed, in their order."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    return index[order[:limit].sort().values]


# --------------------------------------------------------------------------------------------------
# prefixes


@torch.no_grad()
def prefix_vectors(model: llama.Llama, layer: int, x: Tensor) -> Tensor:
    """Inputs (N, D) of a layer -> what its attention makes of them, keys before rotation and values
    (N, 2 G hd), fp32 on the CPU."""
    return torch.cat([model.keys_and_values(layer, block).flatten(1).float().cpu()
                      for block in x.split(4096)])


def prefix_of(model: llama.Llama, layer: int, rows: Tensor, reference: Reference) -> Tensor:
    """A prior's draw (n, W) -> keys before rotation and values (n, 2, G, hd) of a prefix. A draw of
    rows becomes the keys and values that attention makes of them."""
    vectors = rows if reference.is_prefix else prefix_vectors(model, layer, rows)
    c = model.config
    if vectors.shape[1] != 2 * c.num_key_value_heads * c.head_dim:
        raise UserError(f"keys and values of {vectors.shape[1]} numbers do not fit a model of "
                        f"{c.num_key_value_heads} key heads of width {c.head_dim}")
    return vectors.view(len(rows), 2, c.num_key_value_heads, c.head_dim)


def prefix_references(model: llama.Llama, by_layer: dict[int, Reference]) -> dict[int, Reference]:
    """References of rows -> references of a prefix: the keys and values that attention makes of
    their rows."""
    prefixes = {}
    for i, reference in by_layer.items():
        if reference.is_prefix:
            prefixes[i] = reference
            continue
        parts = [prefix_vectors(model, i, rows) for rows in reference.parts]
        prefixes[i] = Reference(parts, f"keys and values of {reference.name}", reference.labels,
                                is_prefix=True, keep=reference.keep)
    return prefixes


def references_of(opened: OpenRun) -> dict[int, Reference]:
    """The reference population of a run's prompts, at each layer that it has."""
    settings = opened.settings
    by_layer = references(settings.prior, replace(settings.data, max_length=opened.max_length),
                          opened.loaded, [*opened.prompt.layers], settings.prompt.method)
    return prefix_references(opened.model, by_layer) if opened.prompt.is_prefix else by_layer


# --------------------------------------------------------------------------------------------------
# the draw


class Draw(NamedTuple):
    rows: dict[int, Tensor]  # {layer: (prompts, n, W)}
    fitted: dict[int, priors.Prior]  # the prior of each layer
    reports: list[dict]  # what each says of itself


def fit(settings: PriorSettings, by_layer: dict[int, Reference]) -> dict[int, priors.Prior]:
    """The prior of each layer, fitted on its reference."""
    name, options, _ = priors.parse(settings.prior)
    return {i: reference.fit(priors.PRIORS[name], options) for i, reference in by_layer.items()}


def directions(prompt: PromptSettings, by_layer: dict[int, Reference], seed: int
               ) -> dict[int, Tensor]:
    """The orthonormal columns {layer: (W, k)} in which --subspace lets rows move; {} without it.
    Raises UserError for more directions than a row has."""
    k, bases = prompt.subspace, {}
    for i, reference in by_layer.items() if k else ():
        W = reference.rows.shape[1]
        if k > W:
            raise UserError(f"--subspace {k}: at layer {i} a row has {W} numbers: give at most as "
                            "many directions")
        if prompt.directions == "principal":
            bases[i] = reference.gaussian.basis[:, :k].contiguous()
        else:
            number = random.Random(f"directions {seed} {i}").getrandbits(63)
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(W, k, generator=generator, dtype=torch.float64)
            bases[i] = torch.linalg.qr(noise)[0]
    return bases


def gaussian_like(prior: priors.Prior, reference: Reference) -> posteriors.Gaussian:
    """The Gaussian that a prior is. Of a prior that is none: that of the reference which it was
    fitted on."""
    if isinstance(prior, priors.Isotropic):
        scale = torch.full((prior.width,), prior.std)
        return posteriors.Gaussian(torch.zeros(prior.width), torch.eye(prior.width), scale)
    if isinstance(prior, priors.Posterior):
        prior = prior.gaussian
    elif not isinstance(prior, priors.Fitted):
        prior = reference.gaussian
    return posteriors.Gaussian(prior.mean, prior.basis, prior.scale)


def draw(settings: PriorSettings, by_layer: dict[int, Reference], prompts: int = 1,
         fitted: dict[int, priors.Prior] | None = None) -> Draw:
    """Draw prompts from the prior of each layer, which is fitted on its reference if it is not
    given. Says how their norms compare with the reference's."""
    fitted = fitted or fit(settings, by_layer)
    rows, reports = {}, []
    for i, reference in by_layer.items():
        # A layer's draw is a function of the seed and the layer, and not of how many layers there
        # are.
        generator = torch.Generator().manual_seed(1000 * settings.seed + i)
        draws = [fitted[i].sample(rows_per_layer(settings), generator) for _ in range(prompts)]
        rows[i] = torch.stack(draws)
        if not torch.isfinite(rows[i]).all():
            raise priors.PriorError(f"{settings.prior}: drew rows that are not finite: give its "
                                    "options smaller values")

        count, ratio = len(reference.rows), norm_ratio(rows[i], reference.rows)
        about = fitted[i].report()
        reports.append({"layer": i, "reference": reference.name, "rows": count,
                        "norm_ratio": ratio, **about})
        say(f"layer {i}: {prior_name(settings.prior)} on {reference.name}, "
            f"{counted(count, 'row')}: " + _listed({"norm ratio": ratio, **about}))
        if ratio > 5:
            say(f"layer {i}: warning: the rows start {ratio:.0f} times as long as real ones and "
                "may train badly")
    return Draw(rows, fitted, reports)


def _listed(numbers: dict) -> str:
    """Names with their numbers, or with a list of numbers each."""
    parts = []
    for key, value in numbers.items():
        digits = " ".join(f"{x:.4g}" for x in np.atleast_1d(value))
        parts.append(f"{key} {digits}")
    return ", ".join(parts)


def norm_ratio(rows: Tensor, reference: Tensor) -> float:
    """Mean norm of the rows over mean norm of the reference. 1 is on scale; PEFT's random default
    is near 45."""
    return float(rows.norm(dim=-1).mean() / reference.norm(dim=-1).mean())
