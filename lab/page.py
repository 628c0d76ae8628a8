"""The page to explore, report.html: what it shows of finished runs; the command plot.

    data = gather([(opened, references_of(opened)), ...])
    write_file(path, viz.page(template, data).encode())      # the template is page.html

Every layer of the prompts has one map, which all runs share: at the token embeddings the
vocabulary, at a deeper layer a sample of the first run's reference there; of prefixes the keys and
values that attention makes of these. The principal plane is fitted on all rows of the layer, and
prompt rows are projected into it. In the t-SNE of a sample of the rows, prompt rows are placed
among their nearest neighbours, and the map stays as it is.

B rows of a map, S snapshots of a run, P prompt rows of a snapshot (of all particles), W width.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

import llama
import viz
from lab import geometry
from lab.activations import ROLES
from lab.cache import POINT, kept
from lab.commands import PlotOptions
from lab.console import SCORES, UserError, progress, say, show
from lab.evaluation import OpenRun, open_run
from lab.files import NotWritten, begins_with, free_place, write_file
from lab.folder import Run, snapshot
from lab.inputs import LoadedModel
from lab.pictures import curves, draw_run, text_picture
from lab.populations import (Labels, Part, Reference, plane_of, population, prefix_vectors,
                             references_of, vocabulary_part)
from lab.settings import ModelSettings, Settings, from_flags, spec_name

TEMPLATE = Path(__file__).with_name("page.html")
EMBEDDED = 10_000  # most rows of the vocabulary in a t-SNE
DEEP = 4_000  # most rows of a deeper layer's map
ALL_DEEP = 60_000  # and of all deeper layers' maps together, so that the page stays small
FEW = 50  # rows that are too few for a map
SNAPSHOTS = 24  # most of a run's
STATES = 30_000  # most prompt rows of a run, over all layers and snapshots
PARTICLES = 8  # most of a run's
NEAR = 5  # neighbours that are named
WORK = 3e11  # most multiplications for the neighbours of a map's rows
PREDICTIONS = 2000  # most of a run's
CURVE = 500  # most points of a training curve
LONGEST = 200  # characters of a token
SEED = 0  # of samples and maps
UNUSED = "in no reference"  # the domain of tokens that no reference uses


def gather(runs: Iterable[tuple[OpenRun, dict[int, Reference]]]) -> dict:
    """The page's data, for viz.page, of runs that check_one_space accepts, each with what its
    prompt lies among. The first run that has a layer makes that layer's map."""
    maps: dict[int, LayerMap] = {}
    records, tokens = [], []
    for opened, by_layer in runs:
        if not tokens:
            vocabulary = opened.vocabulary
            tokens = [vocabulary.token_text(i)[:LONGEST] for i in range(vocabulary.size)]
        steps = shown_steps(opened.run)

        # Maps of layers that no earlier run has; then this run's rows on all of its maps.
        missing = [i for i in by_layer if i not in maps]
        parts = backgrounds(opened, by_layer, missing, tokens)
        with ThreadPoolExecutor(geometry.THREADS) as pool:  # t-SNE takes one core
            made = pool.map(lambda i: layer_map(i, parts[i], by_layer[i], len(missing)), parts)
            maps |= zip(parts, made)
        records.append({**about_run(opened.run, opened.settings, steps),
                        "layers": trajectories(opened, steps, maps)})
    return {"title": ", ".join(run["name"] for run in records), "tokens": tokens, "runs": records,
            "scores": SCORES, "maps": [maps[i].content for i in sorted(maps)]}


def check_one_space(runs: list[Run]) -> None:
    """Raises UserError for runs whose prompts lie in different spaces, or that have no snapshots.
    Reads their folders alone, so that nothing is loaded in vain."""
    first = None
    for run in runs:
        weights = run.config()["sha256"].get("model")  # first, because it refuses what is no run
        # Each refuses what is damaged.
        run.snapshots()
        run.metrics()
        run.predictions()
        method = run.settings().prompt.method
        width = next(iter(run.prompt().vectors().values())).shape[1]
        if first is None:
            first, first_weights, first_method, first_width = run, weights, method, width
        if method != first_method:
            raise UserError(f"{run.path} and {first.path}: one trained rows and the other keys and "
                            "values, which lie in no common space: plot them apart")
        if width != first_width:
            raise UserError(f"{run.path} is of width {width} and {first.path} of width "
                            f"{first_width}: one page shows runs of one model; plot them apart")
        if weights != first_weights:
            raise UserError(f"{run.path} and {first.path} were trained on other weights, whose "
                            "spaces are not the same: plot them apart")


# --------------------------------------------------------------------------------------------------
# maps


class LayerMap(NamedTuple):
    """The map of a layer: what the page gets, and what is needed to place prompt rows on it."""

    content: dict
    rows: np.ndarray  # (B, W)
    plane: viz.Plane
    mean_norm: float  # of all rows of the layer
    sample: np.ndarray  # indices of the rows in the t-SNE
    is_prefix: bool


def backgrounds(opened: OpenRun, by_layer: dict[int, Reference], layers: list[int],
                texts: list[str]) -> dict[int, Part]:
    """The rows of each layer's map: the vocabulary, or the reference. Where that is made of few
    rows, or of runs, whose rows are no tokens, it is the activations of the training data. texts:
    of all tokens."""
    replaced = [i for i in layers
                if i > 0 and (by_layer[i].labels is None or len(by_layer[i].rows) < FEW)]
    parts = {}
    # Inputs of layers that stand in for the reference.
    if replaced:
        settings = replace(opened.settings.data, max_length=opened.max_length)
        parts = population("vocab", opened.settings.prior, settings, opened.loaded, replaced)
    if 0 in layers:
        parts[0] = vocabulary_with_domains(opened.loaded, by_layer[0], texts)

    # References as they are; of a prefix, what attention makes of those inputs.
    for i in layers:
        reference = by_layer[i]
        if i not in parts:
            parts[i] = Part(reference.rows, reference.name, join_labels(reference.labels))
        elif reference.is_prefix:
            part = parts[i]
            vectors = prefix_vectors(opened.model, i, part.rows)
            parts[i] = Part(vectors, f"keys and values of {part.name}", part.labels)
    return parts


def vocabulary_with_domains(loaded: LoadedModel, reference: Reference, texts: list[str]) -> Part:
    """The vocabulary. A token's role is what it is in a text, its domain the data of the reference
    that use it. texts: of all tokens."""
    # Which data use a token.
    domains_of = defaultdict(set)
    for part in reference.labels or []:
        for token, domain in zip(part.token.tolist(), part.domain):
            domains_of[token].add(domain)

    rows = reference.rows
    if reference.name != "vocabulary":
        rows = vocabulary_part(loaded).rows
    kinds, domains = [], []
    for token in loaded.vocabulary.ordinary:
        kinds.append(kind_of(texts[token]))
        used_by = " and ".join(sorted(domains_of[token])) or UNUSED
        domains.append(used_by if reference.labels else "vocabulary")
    labels = Labels(torch.tensor(loaded.vocabulary.ordinary), kinds, domains,
                    torch.arange(len(kinds)))
    return Part(rows, "token embeddings of the vocabulary", labels, keep=True)


def join_labels(parts: list[Labels]) -> Labels:
    return Labels(torch.cat([part.token for part in parts]),
                  [role for part in parts for role in part.role],
                  [domain for part in parts for domain in part.domain],
                  torch.cat([part.text for part in parts]))


def layer_map(i: int, part: Part, reference: Reference, layers: int) -> LayerMap:
    """Coordinates and neighbours of a layer's rows (N, W), of a sample if they are many. layers:
    how many maps share the room on the page."""
    rows, labels = part.rows, part.labels
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    # The run's picture may have the plane already.
    plane = reference.plane if rows is reference.rows else plane_of(rows, part.keep)
    mean_norm = rows.norm(dim=1).mean().item()
    if i > 0:  # a sample is enough of activations; of the vocabulary every token is shown
        index = order[:min(DEEP, ALL_DEEP // layers)].sort().values
        rows, labels = rows[index], labels.take(index)
        sample = np.arange(len(rows))
    else:
        sample = order[:EMBEDDED].sort().values.numpy()
    x = rows.numpy()

    # Neighbours of as many rows as time allows.
    asked = sample[:max(int(WORK / x.size), 1)]
    near, cosine = (t.numpy() for t in kept(neighbours, x, asked, keep=part.keep))
    roles, role = categories(labels.role)
    domains, domain = categories(labels.domain)
    content = {
        "layer": i, "columns": reference.is_prefix, "name": part.name, "rows": len(part.rows),
        "width": x.shape[1], "token": labels.token.numpy(), "roles": roles, "role": role,
        "domains": domains, "domain": domain, "pca": viz.project(plane, x),
        "explained": plane.explained.tolist(), "norm": np.linalg.norm(x, axis=1) / mean_norm,
        "asked": asked, "near": near, "cosine": cosine}
    if len(sample) >= 12 and np.ptp(x[sample], axis=0).max() > 0:
        content["tsne"] = tsne_content(x, sample, part.keep)
    return LayerMap(content, x, plane, mean_norm, sample, reference.is_prefix)


def neighbours(x: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The NEAR most similar others of some rows of x (B, W), and their cosines."""
    return geometry.similar(x[asked], x, min(NEAR, len(x) - 1), members=asked)


def map_of(x: np.ndarray, sample: np.ndarray) -> tuple:
    """The t-SNE of some rows of x (B, W): points, perplexity, KL and recall."""
    embedding = viz.tsne(x[sample], seed=SEED)
    return (embedding.points, embedding.kl, embedding.perplexity,
            recall(x[sample], embedding.points))


def tsne_content(x: np.ndarray, sample: np.ndarray, keep: bool) -> dict:
    """The t-SNE of a sample of the rows x (B, W), which are given by their indices."""
    points, kl, perplexity, found = kept(map_of, x, sample, keep=keep,
                                         work=POINT * len(sample))
    content = {"points": points.numpy(), "perplexity": float(perplexity), "kl": float(kl),
               "seed": SEED, "recall": float(found)}
    if len(sample) < len(x):
        content["sample"] = sample
    return content


def recall(x: np.ndarray, points: np.ndarray) -> float:
    """The share of the ten nearest rows (N, W) that are also among the ten nearest points (N, 2);
    the mean over a thousand rows."""
    k = min(10, len(x) - 1)
    index = np.linspace(0, len(x) - 1, min(1000, len(x))).astype(int)
    near_rows, _ = geometry.nearest(x[index], x, k + 1)
    flat = points.astype(np.float32)
    near_points, _ = geometry.nearest(flat[index], flat, k + 1)
    shares = []
    for i, in_space, on_map in zip(index, near_rows, near_points):
        common = set(in_space) & set(on_map) - {i}
        shares.append(len(common) / k)
    return float(np.mean(shares))


def categories(names: list[str]) -> tuple[list[str], np.ndarray]:
    """The different names in the order of a legend, and each name's number among them."""
    order = {name: i for i, name in enumerate((*ROLES, *KINDS))} | {UNUSED: 99}
    unique = sorted(set(names), key=lambda name: (order.get(name, 0), name))
    numbers = {name: i for i, name in enumerate(unique)}
    return unique, np.array([numbers[name] for name in names])


# --------------------------------------------------------------------------------------------------
# runs


def shown_prompts(run: Run, step: int) -> list[dict[int, Tensor]]:
    """Vectors {layer: (n, W)} of the prompts shown of a snapshot: the first of a posterior's, or
    the one."""
    prompts = run.particles(snapshot(step))[:PARTICLES] or [run.prompt(snapshot(step))]
    return [prompt.vectors() for prompt in prompts]


def shown_steps(run: Run) -> list[int]:
    """The steps of at most SNAPSHOTS of a run's snapshots, the first and the last among them, and
    of fewer if each has very many rows."""
    steps = [step for step in run.snapshots() if run.step is None or step <= run.step]
    prompts = shown_prompts(run, steps[0])
    rows = sum(len(vectors) for prompt in prompts for vectors in prompt.values())
    count = min(len(steps), SNAPSHOTS, max(STATES // rows, 2))
    chosen = np.linspace(0, len(steps) - 1, count).round().astype(int)
    return [steps[i] for i in chosen]


def trajectories(opened: OpenRun, steps: list[int], maps: dict[int, LayerMap]) -> dict[str, dict]:
    """Where the prompt rows of each layer are at each step: arrays (S, P, ...) by layer."""
    run = opened.run
    states = [shown_prompts(run, step) for step in steps]
    by_layer = {}
    for i in progress(sorted(states[0][0]), desc="paths of rows", unit=" layers", leave=False):
        at_steps = [torch.cat([vectors[i] for vectors in prompts]) for prompts in states]
        x = torch.stack(at_steps)  # (S, P, W)
        S, P, W = x.shape

        # Everything is computed for all steps at once, and divided into steps at the end.
        rows = x.view(S * P, W)
        arrays = positions_on_map(rows.numpy(), maps[i])
        arrays["moved"] = (x - x[0]).norm(dim=2).view(S * P).numpy()
        if i > 0 and not maps[i].is_prefix:  # keys and values cannot be read by the head
            arrays["lens"] = lens(opened.model, rows)
        if f"layers.{i}.sd" in run.tensors():  # a Gaussian of an early version
            deviations = [run.tensors(snapshot(step))[f"layers.{i}.sd"] for step in steps]
            arrays["spread"] = spread(torch.cat(deviations), maps[i].plane)
        by_layer[str(i)] = {key: array.reshape(S, P, *array.shape[1:])
                            for key, array in arrays.items()}
    return by_layer


def positions_on_map(rows: np.ndarray, layer: LayerMap) -> dict[str, np.ndarray]:
    """Coordinates, neighbours and norms of prompt rows (m, W)."""
    k = min(NEAR, len(layer.rows))
    near, cosine = geometry.nearest(rows, layer.rows, k, metric="cosine")
    arrays = {"pca": viz.project(layer.plane, rows), "near": near, "cosine": cosine,
              "norm": np.linalg.norm(rows, axis=1) / layer.mean_norm}
    if "tsne" in layer.content:
        points = layer.content["tsne"]["points"]
        arrays["tsne"] = viz.embed(rows, layer.rows[layer.sample], points)
    return arrays


@torch.no_grad()
def lens(model: llama.Llama, rows: Tensor) -> np.ndarray:
    """The three likeliest tokens (m, 3) of rows (m, D), read through the final norm and the head
    (the logit lens, nostalgebraist 2020)."""
    tokens = []
    for block in rows.split(64):
        h = model.model.norm(block.to(model.embeddings))
        tokens.append(model.logits(h).topk(3).indices.cpu())
    return torch.cat(tokens).numpy()


def spread(sd: Tensor, plane: viz.Plane) -> np.ndarray:
    """The covariance in a plane, (m, 3) for xx, xy and yy, of Gaussians whose numbers are
    independent, with standard deviations sd (m, W)."""
    x, y = torch.from_numpy(plane.components).float()
    variance = sd.square()
    covariance = [(variance * one * other).sum(dim=1) for one, other in ((x, x), (x, y), (y, y))]
    return torch.stack(covariance, dim=1).numpy()


def about_run(run: Run, settings: Settings, steps: list[int]) -> dict:
    """Settings, scores and predictions of a run, and its training curve, thinned by means."""
    metrics, predictions = run.metrics(), run.predictions()
    if run.step is not None:  # what is known of that step, and of those before it
        if any(line.get("step", 0) > run.step for line in metrics if line["split"] == "eval"):
            predictions = []  # they are of the last evaluation
        metrics = [line for line in metrics if line.get("step", 0) <= run.step]

    # The loss of every step, or means over neighbouring steps.
    losses = [(line["step"], line["loss"]) for line in metrics if line["split"] == "train"]
    table = np.array(losses, dtype=float).reshape(-1, 2)
    curve = [part.mean(axis=0).round(5).tolist()
             for part in np.array_split(table, min(CURVE, max(len(table), 1))) if len(part)]
    particles = len(run.particles()) or 1
    return {"name": run.path.resolve().name, "prior": settings.prior_name,
            "data": spec_name(settings.data.data),
            "posterior": settings.train.posterior, "steps": steps,
            "particles": min(particles, PARTICLES), "all_particles": particles, "curve": curve,
            "evals": [line for line in metrics if line["split"] == "eval"],
            # Reversed, so that of several text prompts the first one stays.
            "beside": {line["split"]: line for line in reversed(metrics)
                       if line["split"] in ("baseline", "text")},
            "text": (settings.prior.text or ("",))[0], "predictions": predictions[:PREDICTIONS],
            "all_predictions": len(predictions), "config": run.config()}


# --------------------------------------------------------------------------------------------------
# tokens


KINDS = ("word", "part of a word", "number", "sign", "white space", "bytes")


def kind_of(text: str) -> str:
    """What a token is in a text, one of KINDS."""
    bare = text.strip()
    if not bare:
        return "white space"
    if re.match(r"<0x[0-9A-F]{2}>", bare):
        return "bytes"
    if bare[0].isdigit():
        return "number"
    if not bare[0].isalpha():
        return "sign"
    return "word" if text[0] == " " else "part of a word"


# --------------------------------------------------------------------------------------------------
# the command


def command_plot(given: dict) -> None:
    options = from_flags(PlotOptions, given)
    models: dict[ModelSettings, LoadedModel] = {}  # runs of one model share it
    if options.in_characters:
        for path in options.runs:
            opened = open_run(path, given, models)
            show(text_picture(opened.run, references_of(opened)))
        return
    runs = [Run(Path(path)) for path in options.runs]
    check_one_space(runs)  # before a model is loaded or a file is written
    target = None
    if options.out:
        target = free_place(options.out, "--out", options.overwrite, is_page, "a page of plot")

    # The runs' own pictures, and the page.
    content = gather(drawn_runs(runs, options, given, models))
    page = viz.page(TEMPLATE.read_text(encoding="utf-8"), content).encode()
    if target:
        write_file(target, page, is_new=not options.overwrite)
    else:
        target = runs[0].path / "report.html"
        runs[0].write("report.html", page)
    # Loss and scores of all runs in one picture, in the first one's folder.
    scored = [run for run in runs if any(line["split"] == "eval" for line in run.metrics())]
    if scored:  # an imported prompt is not
        with left_out_if_read_only(options):
            runs[0].write("figures/curves.svg", curves(scored).encode())
            show(str(runs[0].path / "figures/curves.svg"))
    show(str(target))


def is_page(path: Path) -> bool:
    """Whether plot made the page."""
    return begins_with(path, TEMPLATE.read_bytes()[:80])


@contextlib.contextmanager
def left_out_if_read_only(options: PlotOptions) -> Iterator[None]:
    """A run that may only be read has its page elsewhere, and no figures."""
    try:
        yield
    except NotWritten as e:
        if not options.out or e.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        say(f"{e}: left out")


def drawn_runs(runs: list[Run], options: PlotOptions, given: dict,
               models: dict[ModelSettings, LoadedModel]
               ) -> Iterator[tuple[OpenRun, dict[int, Reference]]]:
    """Runs with what their prompts lie among, one after the other; the pictures of each are drawn
    when it is opened."""
    for run in runs:
        opened = open_run(run, given, models)
        by_layer = references_of(opened)
        with left_out_if_read_only(options):
            names = draw_run(opened.run, opened.settings, by_layer)
            show("\n".join(str(opened.run.path / name) for name in names))
        yield opened, by_layer
