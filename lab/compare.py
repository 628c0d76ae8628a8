"""Runs and collections in numbers: the measures and tests of geometry.py, two_samples.py and
locality.py applied to what they hold, and the command compare.

    rows = measure_rows(start, end, reference, priors.Fitted.fit(reference))
    print(table(rows, TITLES))

Most functions return the rows of a table, (name, {key: number}); TITLES has the columns' headings.

n prompt rows, N rows of a population, D width, V vocabulary. `paper` is Exploring Embedding Priors
in Prompt-Tuning (arXiv 2412.18582).
"""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import priors
from lab import geometry, statistics, two_samples
from lab.activations import Collection
from lab.cache import kept
from lab.commands import CompareOptions
from lab.console import UserError, counted, say, show, table
from lab.evaluation import OpenRun, open_run, score_table
from lab.folder import FIRST_PROMPT
from lab.hub import model_folder
from lab.inputs import LoadedModel, check_same_model, load_model
from lab.locality import walks
from lab.populations import Reference, references_of
from lab.settings import ModelSettings, Settings, flat, from_flags, with_flags
from lab.words import SHARES, Mixtures, mixtures_of

MOST = 2000  # rows of a population in measures that compute the distances of all pairs

# Headings of the columns, in their order: key -> heading.
TITLES = {
    "moved": "moved", "distance": "distance", "norm_ratio": "norm ratio", "radius": "radius",
    "radius_percentile": "percentile",
    "particle_spread": "spread", "collapse": "collapse", "effective_rank": "rank",
    "variance_ratio": "variance",
    "frechet": "Frechet", "precision": "precision", "recall": "recall", "mmd": "MMD", "mmd_p": "p",
    "mean_shift": "mean shift", "mean_shift_p": "p",
    "knn": "kNN", "gap": "gap", "c2st": "C2ST", "auc": "AUC", "silhouette": "silhouette",
    "variance_between": "% between",
    "mass": "mass", "content": "content", "shift": "shift", "bias": "bias", "one": "one",
    "one_head": "one, head"}


def locality_titles(name: str) -> dict[str, str]:
    """The headings of a table of locality's numbers; name: step or spread."""
    return {"steps": "steps", "repeats": "repeats", name: name, f"within_{name}": "within",
            f"{name}_ratio": "ratio", f"p_within_{name}": "p", f"holm_within_{name}": "Holm's p",
            f"between_{name}": "between", f"p_between_{name}": "p",
            f"uniform_{name}": "uniform", f"p_uniform_{name}": "p"}


def sample(x: Tensor, count: int = MOST) -> np.ndarray:
    """At most `count` of the rows (N, D), drawn at random but always the same ones, as float32."""
    return x[sample_index(len(x), count)].float().cpu().numpy()


def sample_index(N: int, count: int = MOST) -> Tensor:
    """The numbers 0 to N - 1, or if they are more than `count`, as many of them, drawn at random
    but always the same ones."""
    if N <= count:
        return torch.arange(N)
    return torch.randperm(N, generator=torch.Generator().manual_seed(0))[:count]


def measure(keys: str, call: Callable, *arguments) -> dict[str, float]:
    """{key: number} of what the call returns, one number for each of the keys. Empty if the data
    are too few or too much alike: a single row, for example, has no spread."""
    try:
        values = call(*arguments)
    except (geometry.GeometryError, statistics.StatisticsError):
        return {}
    return dict(zip(keys.split(), map(float, np.atleast_1d(values))))


def spacing_of(tokens: Tensor) -> float:
    """geometry.spacing of the vocabulary (V, D); see cache.kept."""
    return float(kept(geometry.spacing, tokens.numpy())[0])


# --------------------------------------------------------------------------------------------------
# a run's rows


def measure_rows(start: Tensor, end: Tensor, reference: Tensor, fitted: priors.Fitted,
                 tokens: Tensor | None = None, spacing: float | None = None, particles: int = 1,
                 copies: bool = False) -> list[tuple[str, dict[str, float]]]:
    """Where a layer's prior draw (n, D) and trained rows (n, D) lie in its reference (N, D).
    fitted: the reference's Gaussian. tokens (V, D): the vocabulary; None: the distinct rows of the
    reference take its place. spacing: the tokens', if it is known already. particles: how many
    prompts of a posterior the rows are, one after the other; copies: whether these are draws around
    one prompt, and not chains of their own.

    moved: mean distance from the draw, which for a Gaussian posterior has its widening in it, as
    its prompts are draws of it before and after. distance: mean distance to 1000 random rows of the
    reference; the table's first row has that of rows of the reference itself (paper 4.2). radius:
    mean Mahalanobis distance from the Gaussian's mean. radius_percentile: the percentage of the
    reference's rows with a smaller radius, mean over the rows; the reference's own have 50. The chi
    law is no measure for it, because real rows are not Gaussian. particle_spread: the variance
    between the particles over the Gaussian's, a mean over its whitened coordinates. collapse:
    median collapse index among the tokens. frechet, mmd with its p: to the reference; copies of a
    row are one unit.

    The last row is of the pairs of a drawn and a trained row: frechet between the two sets,
    mean_shift, the length of the mean difference, and its p by sign flips. A row's difference is
    its mean over the particles, because all of them learn from the same batches."""
    population, nearby = sample(reference), sample(reference, 1000)
    n, D = len(start) // particles, start.shape[1]
    unit = np.arange(len(start)) % (n if copies else len(start))
    vocabulary = np.unique(reference.numpy(), axis=0) if tokens is None else tokens.numpy()
    radii = fitted.whiten(torch.from_numpy(population)).norm(dim=1).numpy()

    # Rows of the reference itself show what an ordinary row has, to others than themselves.
    drawn = population[np.random.default_rng(0).permutation(len(population))[:20]]
    ordinary = {"distance": _mean_distance(drawn, nearby), "radius": radii.mean(),
                **measure("effective_rank", geometry.effective_rank, population)}
    rows = [("reference", ordinary)]

    # The prior's draw and the trained rows, each against the reference. Tokens are searched for
    # both at once, because the spacing of a large vocabulary takes seconds.
    collapse = measure("draw trained", _median_collapses, start, end, vocabulary, spacing)
    reference_norm = reference.norm(dim=1).mean()
    for key, name, vectors in (("draw", "prior draw", start), ("trained", "trained", end)):
        z = fitted.whiten(vectors)
        radius = z.norm(dim=1).numpy()
        between = z.view(particles, -1).var(dim=0).mean() if particles > 1 else None
        norm_ratio = vectors.norm(dim=1).mean() / reference_norm
        x = vectors.numpy()
        rows.append((name, {
            "moved": geometry.displacement(start.numpy(), x).mean(),
            "distance": _mean_distance(x, nearby),
            "norm_ratio": float(norm_ratio),
            "radius": radius.mean(),
            "radius_percentile": statistics.percentiles(radius, radii).mean(),
            **({} if between is None else {"particle_spread": float(between)}),
            **({"collapse": collapse[key]} if collapse else {}),
            **measure("effective_rank", geometry.effective_rank, x),
            **measure("frechet", geometry.frechet, x, population),
            **measure("mmd mmd_p", two_samples.mmd, x, population, unit)}))

    # How far training took the rows, pair by pair; without training both are the same set.
    if not torch.equal(start, end):
        difference = (end - start).view(particles, n, D).mean(dim=0).numpy()
        rows.append(("draw to trained", {
            **measure("frechet", geometry.frechet, start.numpy(), end.numpy()),
            "mean_shift": np.linalg.norm(difference.mean(axis=0)),
            **measure("mean_shift_p", statistics.sign_flip_p, difference)}))
    return [(name, {key: float(value) for key, value in numbers.items()})
            for name, numbers in rows]


def _mean_distance(x: np.ndarray, others: np.ndarray) -> float:
    """The mean distance between rows (n, D) and others (M, D); a row that is among the others is
    not compared with itself."""
    distances = [np.linalg.norm(others - row, axis=1) for row in x]
    return float(np.mean([d.sum() / max((d > 0).sum(), 1) for d in distances]))


def _median_collapses(start: Tensor, end: Tensor, tokens: np.ndarray, spacing: float | None
                      ) -> np.ndarray:
    index = geometry.collapse_index(torch.cat([start, end]).numpy(), tokens, spacing)
    return np.median(index.reshape(2, -1), axis=1)


@torch.no_grad()
def read_rows(rows: Tensor, layer: int, reference: Reference, loaded: LoadedModel,
              tokens: Tensor | None) -> dict[str, list[str]]:
    """The token that each row (n, W) of a layer stands for, by every way to read it {way: tokens}.

    At the embeddings it is the nearest of the ordinary tokens (V, D) by cosine and by L2 distance.
    At a deeper layer it is the likeliest token after the final norm and the head (the logit lens,
    nostalgebraist 2020). Of keys and values it is the token of the nearest row of the reference;
    there is none if the reference is made of other runs' prompts."""
    model, vocabulary = loaded.model, loaded.vocabulary
    if reference.is_prefix:
        ids = {}
        if reference.labels:
            row_tokens = torch.cat([part.token for part in reference.labels])
            ids = _nearest_tokens(rows, reference.rows, row_tokens)
    elif layer > 0:
        h = rows.to(model.embeddings)
        ids = {"logit lens": model.logits(model.model.norm(h)).argmax(dim=-1).tolist()}
    else:
        ids = _nearest_tokens(rows, tokens, torch.tensor(vocabulary.ordinary))

    texts = {}
    for way, row_ids in ids.items():
        texts[way] = [vocabulary.token_text(i) for i in row_ids]
    return texts


def _nearest_tokens(rows: Tensor, population: Tensor, tokens: Tensor) -> dict[str, list[int]]:
    """For every row (n, W) the token of the nearest member of a population (N, W), whose tokens
    are (N,): {metric: ids}."""
    ids = {}
    for metric in ("cosine", "l2"):
        index, _ = geometry.nearest(rows.numpy(), population.numpy(), metric=metric)
        ids[metric] = tokens[torch.from_numpy(index[:, 0])].tolist()
    return ids


# --------------------------------------------------------------------------------------------------
# a collection's domains


def separation(file: Collection, layer: int) -> list[tuple[str, dict[str, float]]]:
    """How far apart the domains lie at a layer, pair by pair (paper 4.4 and 4.5, the cluster
    claim).

    auc with its interval is the area under the ROC curve of a linear probe. It and mmd with its p
    take articles and modules as the independent units, see Collection.units. variance_between is
    the percent of variance that lies between the two means."""
    rows, units = {}, {}
    for name in file.domains:
        rows[name], units[name] = sample_with_units(file, layer, name)
    pairs = []
    for a, b in combinations(file.domains, 2):
        samples = rows[a], rows[b], units[a], units[b]
        pairs.append((f"{a} - {b}", {
            **measure("frechet", geometry.frechet, rows[a], rows[b]),
            **measure("mmd mmd_p", two_samples.mmd, *samples),
            **measure("auc auc_low auc_high", two_samples.probe_auc, *samples),
            **measure("silhouette", _silhouette_of_two, rows[a], rows[b]),
            **measure("variance_between", geometry.variance_between, rows[a], rows[b])}))
    return pairs


def sample_with_units(file: Collection, layer: int, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST of a domain's rows (N, D), as `sample` draws them, and the numbers (N,) of their
    independent units."""
    index = file.chosen(domain)
    index = index[sample_index(len(index))]
    return sample(file.rows(layer, index)), file.units(index).numpy()


def _silhouette_of_two(x: np.ndarray, y: np.ndarray) -> float:
    labels = np.repeat([0, 1], [len(x), len(y)])
    return geometry.silhouette(np.concatenate([x, y]), labels)


# --------------------------------------------------------------------------------------------------
# the command


def command_compare(given: dict) -> None:
    options = from_flags(CompareOptions, given)
    for path in options.paths:
        if not os.path.lexists(path):
            raise UserError(f"{path}: no such file or folder: give the folder that train made, or "
                            "the file that collect wrote")
    records, models, spacings = [], {}, {}  # runs and collections of one model share it
    for path in options.paths:
        if Path(path).is_file():
            if "step" in given:
                raise UserError(f"{path}: --step {given['step']} is a run's, and this is a file: "
                                "leave it out")
            record, text = compare_collection(path, given, models)
        else:
            record, text = compare_run(path, given, models, spacings)
        records.append(record)
        if not options.json:
            show(text + "\n")
    if options.json:
        show(json.dumps(records))


def compare_run(path: str, given: dict, models: dict[ModelSettings, LoadedModel],
                spacings: dict[ModelSettings, dict[str, float]]) -> tuple[dict, str]:
    """A run's scores, and where its rows started and ended in each layer's reference: what --json
    prints, and the text. models: see open_run. spacings: of the tokens of models, as measure gives
    it; both grow by what this run needs."""
    opened = open_run(path, given, models)
    run, settings = opened.run, opened.settings
    metrics = run.metrics()  # first, because it may be refused
    start, end = run.start_and_end()
    drawn, trained = prompt_to_read(opened, FIRST_PROMPT), prompt_to_read(opened, run.shown)
    tokens, at_tokens = None, {}
    if 0 in start and not opened.prompt.is_prefix:
        tokens = opened.model.embeddings[opened.vocabulary.ordinary].float().cpu()
        if settings.model not in spacings:
            spacings[settings.model] = measure("spacing", spacing_of, tokens)
        at_tokens = {"tokens": tokens, **spacings[settings.model]}

    # Measure each layer's rows, and read what they say.
    rows, readings, mixed = [], {}, {}
    if tokens is not None:
        at_random = geometry.moved_at_random(trained[0].numpy(), drawn[0].numpy())
        mixed = mixtures_of({"prior draw": drawn[0], "trained": trained[0],
                             "as far at random": torch.from_numpy(at_random).float()},
                            tokens, opened.vocabulary)
    for i, reference in references_of(opened).items():
        if len(reference.rows) < 2:
            raise UserError(f"{run.path}: its reference is a single row, and nothing tells how "
                            "rows lie in that: eval and plot show this run")
        for name, numbers in measure_rows(start[i], end[i], reference.rows,
                                          reference.gaussian,
                                          particles=len(run.prompts()),
                                          copies=not settings.train.has_particles,
                                          **(at_tokens if i == 0 else {})):
            rows.append((f"layer {i} {name}", numbers))
        read = read_rows(torch.cat([drawn[i], trained[i]]), i, reference, opened.loaded, tokens)
        n = len(drawn[i])
        readings[i] = {"prior draw": {way: texts[:n] for way, texts in read.items()},
                       "trained": {way: texts[n:] for way, texts in read.items()}}

    # The numbers for --json, and the same as text beneath the scores of training.
    evaluations = [line for line in metrics if line["split"] == "eval"]
    record = {"run": str(run.path), "settings": flat(settings),
              "scores": evaluations[-1] if evaluations else None,
              "measures": dict(rows), "tokens": readings,
              "mixtures": {name: {**found._asdict(), "shares": found.shares.tolist()}
                           for name, found in mixed.items()}}
    title = (f"{run.path}: prior {settings.prior_name}, {settings.train.posterior} posterior, "
             f"seed {settings.seed}")
    if run.step is not None:
        title += f"; its prompt at step {run.step}"
    whose = " of particle 1" if settings.train.has_particles else ""
    lines = [title, score_table(settings, metrics), "", table(rows, TITLES),
             *reading_lines(readings, whose), *mixture_lines(mixed, whose)]
    return record, "\n".join(lines)


def prompt_to_read(opened: OpenRun, name: str) -> dict[int, Tensor]:
    """Vectors {layer: (n, W)} of the prompt whose tokens are shown: of particles the first one, of
    any other posterior the mean."""
    if opened.settings.train.has_particles:
        return opened.run.prompts(name)[0].vectors()
    return opened.run.prompt(name).vectors()


def reading_lines(readings: dict[int, dict[str, dict[str, list[str]]]], whose: str) -> list[str]:
    """The tokens of rows {layer: {prior draw or trained: {way to read: tokens}}} as lines; none if
    the rows stand for no tokens. whose: which of several prompts they are of."""
    lines = []
    for i, by_name in readings.items():
        for name, by_way in by_name.items():
            for way, tokens in by_way.items():
                quoted = " ".join(map(json.dumps, tokens))
                lines.append(f"layer {i} {name}, {way}: {quoted}")
    if not lines:
        return []
    return ["", f"the token of each row{whose}:", *lines]


def mixture_lines(mixed: dict[str, Mixtures], whose: str) -> list[str]:
    """What mixtures of tokens {whose rows: mixtures} explain of the rows at layer 0, and the first
    tokens of each trained row; none without rows there."""
    if not mixed:
        return []
    shares = [(name, found.numbers()) for name, found in mixed.items()]
    texts = mixed["trained"].texts()
    width = len(f"row {len(texts)}")
    return ["", f"percent of each row at layer 0{whose} that a mixture explains, a sum of tokens "
            "with weights from 0 up", table(shares, SHARES),
            "", f"the first three tokens of each trained row's mixture at layer 0{whose}",
            *(f"{f'row {i}':<{width}}  {text}" for i, text in enumerate(texts, 1))]


def compare_collection(path: str, given: dict, models: dict[ModelSettings, LoadedModel]
                       ) -> tuple[dict, str]:
    """A collection's domains at each layer, whether they are apart and whether their texts are
    local: what --json prints, and the text. models: see open_run."""
    file = Collection(Path(path))
    embeddings = vocabulary_of(file, given, models) if 0 in file.layers else None

    pairs, steps, tests = [], [], len(file.layers) * len(file.domains)
    for i in file.layers:
        pairs += [(f"layer {i}: {name}", numbers) for name, numbers in separation(file, i)]
        if file.about["pool"] == "token":
            steps += [(f"layer {i}: {name}", walks(file, i, name, embeddings, tests=tests))
                      for name in file.domains]
    adjust(steps)

    lines = [f"{file.path}: {counted(len(file.chosen()), 'row')}, without BOS and rows of massive "
             "norm"]
    if pairs:
        lines += ["", "domains, pair by pair", table(pairs, TITLES)]
    if steps:
        lines += ["", "steps from token to token, beside those of the same tokens in a random "
                  "order within each text and between\ntexts, and of random walks over all types "
                  "(uniform); ratio: to within, with 95 % confidence",
                  table(steps, locality_titles("step")), "",
                  "the steps' standard deviation, likewise",
                  table(steps, locality_titles("spread"))]
    record = {"collection": str(file.path), "separation": dict(pairs), "locality": dict(steps)}
    return record, "\n".join(lines)


def adjust(steps: list[tuple[str, dict[str, float]]]) -> None:
    """Add to the numbers of `walks` Holm's p-values over all layers and domains."""
    measured = [numbers for _, numbers in steps if numbers]
    for name in ("step", "spread"):
        adjusted = statistics.holm([numbers[f"p_within_{name}"] for numbers in measured])
        for numbers, p in zip(measured, adjusted):
            numbers[f"holm_within_{name}"] = float(p)


def vocabulary_of(file: Collection, given: dict, models: dict[ModelSettings, LoadedModel]
                  ) -> Tensor | None:
    """The embeddings (V, D) of all ordinary tokens of the model that a collection was made with;
    None, and a remark, if the model is not there."""
    stored = {key: file.about.get(key) for key in ("model", "revision", "dtype")}
    settings = with_flags(Settings.from_flags(stored), given).model.complete()
    if "model" not in given and not model_folder(settings).is_dir():
        say(f"{settings.model}: no such folder, so the uniform walks at layer 0 are over the "
            f"tokens in {file.path}, not over the vocabulary (--model DIR)")
        return None
    loaded = models.get(settings) or load_model(settings, encoders=True)
    if not loaded.is_encoder:  # which runs cannot share
        models[settings] = loaded
    check_same_model(settings, file.about["sha256"], file.path)
    return loaded.model.embeddings[loaded.vocabulary.ordinary].float().cpu()
