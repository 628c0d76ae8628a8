"""The paper's thirteen figures, each with the numbers that say what the eye should see; the
command figures.

To add a figure, write a function that takes the World (and the names of the runs that it shows) and
returns a Drawing, and give it a line in FIGURES:

    def embeddings(world):
        plane = viz.pca(world.embeddings)
        cloud = viz.Cloud("vocabulary", viz.project(plane, world.embeddings))
        panel = viz.Panel([cloud], viz.axis_names(plane))
        return Drawing([panel], {"tokens": len(world.embeddings)}, "All token embeddings.")

    14: Figure("embeddings", "Token embeddings", embeddings),

What it needs is made by the command if it is not there: collections, see collection_flags, and
runs, see run_flags. The numbers stand in a table under the picture, in figures.json and on standard
output. `paper` is Exploring Embedding Priors in Prompt-Tuning (arXiv 2412.18582).

n prompt rows, N rows of a population, D width, V vocabulary, L layers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, cycle
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import priors
import viz
from lab import compare, geometry, statistics, two_samples
from lab.activations import Collection, command_collect
from lab.cache import POINT, kept_under
from lab.commands import FigureOptions
from lab.console import UserError, counted, progress, show
from lab.files import SMALL, check_folder, write_file
from lab.folder import Run
from lab.inputs import LoadedModel, check_same_model, load_model, parse_spec
from lab.locality import paths_of, walks
from lab.populations import Reference, vocabulary_part
from lab.sample import LEAST, LEAST_TEXTS, judge_prior
from lab.settings import (ModelSettings, absolute, differences, from_flags, prior_name,
                          spec_name)
from lab.train import command_train

PATHS, STEPS = 3, 12  # trajectories in a picture, and tokens of each
STEPS_BESIDE = ("the steps from token to token beside those of the same tokens in a random order "
                "within each text and between texts, and of random walks over all types (uniform)")
SIZE = 4000  # rows of a domain in a t-SNE map, and draws of a prior in a picture
MAP_WORK = 2e12  # multiplications of a t-SNE of token embeddings, to find neighbours: a minute
DOMAIN_COLOURS = {"text": viz.GREY, "squad": viz.BLUE, "math": viz.ORANGE}
MODULE_COLOURS = (viz.GREY, *(colour for colour in viz.PALETTE if colour != viz.BLACK),
                  "#003a5c", "#6e3000", "#00513a", "#6b3854", "#7a5300")
RUN_LOOKS = ((viz.VERMILION, "circle"), (viz.GREEN, "triangle"))


class World(NamedTuple):
    """What figures are drawn from."""

    options: FigureOptions
    loaded: LoadedModel
    collections: dict[str, Collection]  # by their names in collection_flags
    runs: dict[str, Run]  # by their names in run_flags; they are finished

    @property
    def L(self) -> int:
        return self.loaded.model.config.num_hidden_layers

    @property
    def vocabulary(self) -> Reference:
        """Every token that a text can have, once."""
        part = vocabulary_part(self.loaded)
        return Reference([part.rows], part.name, keep=part.keep)

    @property
    def embeddings(self) -> np.ndarray:
        """(V, D): the vocabulary's rows."""
        return self.vocabulary.rows.numpy()

    @property
    def tokens(self) -> Collection:
        return self.collections["tokens"]

    def activations(self, layer: int, domain: str) -> np.ndarray:
        """(N, D): a layer's inputs at the tokens of a domain."""
        return self.tokens.rows(layer, self.tokens.chosen(domain)).float().numpy()


class Drawing(NamedTuple):
    panels: list[viz.Panel]
    numbers: dict[str, float]  # what was measured
    caption: str  # what is shown, and of what it is made


TITLES = {"auc_least": "least AUC"}  # of numbers whose keys would say less


def title_of(key: str) -> str:
    """A number's key in words, for the table beneath a picture."""
    return TITLES.get(key, key.replace("_", " ").replace("auc", "AUC"))


def provenance(world: World, domains: tuple[str, ...] = (), runs: tuple[str, ...] = ()) -> str:
    """The sentences of a caption that say which model, data and runs a figure is made of."""
    parts = [f"Model {Path(world.loaded.settings.model).name}, seed {world.options.seed}"]
    if domains:
        counts = [f"{len(world.tokens.chosen(domain))} of {domain}" for domain in domains]
        massive = int(world.tokens.field["massive"].sum())
        parts.append(f"rows: {', '.join(counts)}; BOS and {counted(massive, 'row')} of massive "
                     "norm are left out")
    for name in runs:
        settings = world.runs[name].settings()
        reference = " and ".join(map(spec_name, settings.prior.reference))
        parts.append(f"run {name}: prior {prior_name(settings.prior.prior)} of {reference}, seed "
                     f"{settings.seed}, {counted(settings.train.steps, 'step')} on "
                     f"{spec_name(settings.data.data)}")
    return "; ".join(parts) + "."


def tsne_map(x: np.ndarray, seed: int) -> viz.Embedding:
    """viz.tsne with a bar; see cache.kept_under."""
    def embed() -> viz.Embedding:
        with progress(desc="t-SNE", leave=False, unit=" steps") as bar:

            def update(step: int, steps: int, kl: float | None) -> None:
                bar.total = steps
                bar.update(step - bar.n)

            return viz.tsne(x, seed=seed, progress=update)

    points, kl, perplexity = kept_under("tsne", (x, seed), POINT * len(x), embed)
    return viz.Embedding(points.numpy(), float(kl), float(perplexity))


def map_frame(points: np.ndarray) -> np.ndarray:
    """The corners (2, 2) of a frame for a t-SNE map (N, 2). Points that drifted far away, at most
    four of a thousand, lie outside: they would make the map small, and their distance means
    nothing."""
    low, high = np.quantile(points, (0.001, 0.999), axis=0)
    room = 0.1 * (high - low)
    return np.stack([np.maximum(points.min(axis=0), low - room),
                     np.minimum(points.max(axis=0), high + room)])


def tsne_numbers(embedding: viz.Embedding) -> str:
    return f"t-SNE, perplexity {embedding.perplexity:.0f}, KL {embedding.kl:.3f}"


# --------------------------------------------------------------------------------------------------
# figures 1 to 3: trajectories


def trajectories(world: World, domain: str, roles: tuple[str, ...] = ()) -> list[Tensor]:
    """The beginnings of the first texts of a domain, in these roles, as indices of the collection's
    rows. Texts that are long enough come first."""
    paths, _ = paths_of(world.tokens, domain, 10**9, roles)
    if not paths:
        raise UserError(f"{world.tokens.path}: no {' or '.join(roles) or 'text'} of two tokens or "
                        f"more in {domain}: choose another --out and a larger --limit, or other "
                        "data")
    long_enough = 4 if roles else STEPS
    paths.sort(key=lambda path: len(path) < long_enough)  # stable
    return [path[:STEPS] for path in paths[:PATHS]]


def trajectory_marks(world: World, paths: list[Tensor], points: list[np.ndarray],
                     kind: str) -> list:
    """Trajectories, and the words of the first one. points: (T, 2) of each path."""
    ids = world.tokens.field["token"][paths[0]].tolist()
    words = tuple(viz.visible(world.loaded.vocabulary.token_text(i)) for i in ids)
    return [viz.Trails(f"{len(paths)} {kind}, from dark to light", points),
            viz.Points("", points[0], viz.BLACK, labels=words, size=0.5)]


def sentences_over_vocabulary(world: World) -> Drawing:
    """t-SNE."""
    vocabulary, ids = world.embeddings, world.loaded.vocabulary.ordinary

    # Special tokens are not on the map, and are left out of the paths.
    row_of = {token: k for k, token in enumerate(ids)}
    tokens = world.tokens.field["token"]
    paths, rows = [], []
    for path in trajectories(world, "text"):
        paths.append(path[[token in row_of for token in tokens[path].tolist()]])
        rows.append([row_of[token] for token in tokens[paths[-1]].tolist()])

    # Neighbours take V^2 D multiplications: of large vocabularies a sample is on the map.
    V, D = vocabulary.shape
    order = np.random.default_rng(world.options.seed).permutation(V)
    shown = np.unique(np.concatenate([order[:int((MAP_WORK / D) ** 0.5)], *rows]).astype(int))
    embedding = tsne_map(vocabulary[shown], world.options.seed)
    points = [embedding.points[np.searchsorted(shown, row)] for row in rows]
    of_all = "" if len(shown) == V else f" of {V}"
    marks = [viz.Cloud(f"vocabulary, {len(shown)}{of_all} tokens", embedding.points),
             *trajectory_marks(world, paths, points, "sentences")]
    corners = map_frame(embedding.points)
    is_outside = (embedding.points < corners[0]) | (embedding.points > corners[1])
    panel = viz.Panel(marks, ("t-SNE, distances mean nothing", ""), ticks=False, frame=corners)

    numbers = walks(world.tokens, 0, "text", torch.from_numpy(vocabulary))
    which = f"all {V} token embeddings" if len(shown) == V else (
        f"{len(shown)} of {V} token embeddings, the sentences' own and others drawn at random")
    return Drawing([panel], numbers, (
        f"Sentences over {which} ({tsne_numbers(embedding)}; tokens that drifted off the map: "
        f"{is_outside.any(axis=1).sum()}); below, {STEPS_BESIDE}. {provenance(world)}"))


def sentences_over_activations(world: World) -> Drawing:
    """PCA, after the final norm."""
    rows, paths = world.activations(world.L, "text"), trajectories(world, "text")
    plane = viz.pca(rows)
    points = [viz.project(plane, world.tokens.rows(world.L, path).float().numpy())
              for path in paths]
    marks = [viz.Cloud(f"text, {len(rows)} tokens", viz.project(plane, rows)),
             *trajectory_marks(world, paths, points, "sentences")]
    numbers = walks(world.tokens, world.L, "text")
    return Drawing([viz.Panel(marks, viz.axis_names(plane))], numbers, (
        f"Sentences over activations after the final norm; below, {STEPS_BESIDE}. "
        f"{provenance(world, ('text',))}"))


def answers_over_activations(world: World) -> Drawing:
    """PCA, after the final norm."""
    text, squad = world.activations(world.L, "text"), world.activations(world.L, "squad")
    plane = viz.pca(np.concatenate([text, squad]))
    paths = trajectories(world, "squad", ("answer",))
    points = [viz.project(plane, world.tokens.rows(world.L, path).float().numpy())
              for path in paths]
    marks = [viz.Cloud("text", viz.project(plane, text)),
             viz.Cloud("squad", viz.project(plane, squad), viz.BLUE),
             *trajectory_marks(world, paths, points, "answers")]
    numbers = {**domain_auc(world, world.L, ("text", "squad")),
               **walks(world.tokens, world.L, "squad", None, ("answer",))}
    return Drawing([viz.Panel(marks, viz.axis_names(plane))], numbers, (
        "Answers over activations after the final norm; below, how well a linear probe tells the "
        f"domains apart, and of the answers {STEPS_BESIDE}. "
        f"{provenance(world, ('text', 'squad'))}"))


# --------------------------------------------------------------------------------------------------
# figures 4 and 5: clouds


def domain_auc(world: World, layer: int, domains: tuple[str, ...]) -> dict[str, float]:
    """Area under the ROC curve of a linear probe with its interval, domain by domain. Articles and
    modules are the independent units."""
    samples = {domain: compare.sample_with_units(world.tokens, layer, domain)
               for domain in domains}
    numbers = {}
    for one, other in combinations(domains, 2):
        (x, x_units), (y, y_units) = samples[one], samples[other]
        try:
            areas = two_samples.probe_auc(x, y, x_units, y_units)
        except (geometry.GeometryError, statistics.StatisticsError) as e:
            raise UserError(f"{world.tokens.path}: {one} and {other}: {e} (another --out, with a "
                            "larger --limit or --examples)") from None
        for end, area in zip(("", "_low", "_high"), areas):
            numbers[f"auc_{one}_{other}{end}"] = area
    return numbers


def density_by_layer(world: World) -> Drawing:
    """PCA, a panel a layer."""
    index = world.tokens.chosen("text")
    units = world.tokens.units(index).numpy()
    planes, clouds = [], []
    for i in range(world.L + 1):
        rows = world.activations(i, "text")
        planes.append(viz.pca(rows))
        clouds.append(viz.project(planes[i], rows))
    # The line in the plane that best separates two heaps is the first component.
    draws = statistics.enough(len(clouds), 500)
    p = statistics.holm([statistics.unimodal_p(points[:, 0], units, draws) for points in clouds])

    panels, numbers = [], {}
    for i, (plane, points) in enumerate(zip(planes, clouds)):
        numbers[f"bimodality_{i}"] = statistics.bimodality(points[:, 0])
        numbers[f"unimodal_p_{i}"] = float(p[i])
        first, second = 100 * plane.explained
        name = f"layer {i}" if i < world.L else "final norm"
        panels.append(viz.Panel([viz.Cloud("log density of text's tokens", points, None)],
                                (f"PC1 {first:.0f} %, PC2 {second:.0f} %", ""),
                                f"{name}: p {p[i]:.2g}", ticks=False))
    return Drawing(panels, numbers, (
        "Inputs of every layer, with the p-value of one mode along the first component "
        "(Silverman's test, whole texts resampled, Holm's correction over layers). Sarle's "
        "coefficient is 0.33 for a Gaussian, and rises with skewness as with a second mode. "
        f"{provenance(world, ('text',))}"))


def mean_activations(world: World) -> Drawing:
    """t-SNE of text and of each arithmetic module (in the paper of T5-base's encoder)."""
    file = world.collections["means"]
    rows = [compare.sample(file.rows(world.L, file.chosen(domain)).float(), SIZE)
            for domain in file.domains]
    sizes = [len(x) for x in rows]
    everything = np.concatenate(rows)
    names = tuple(domain.removeprefix("arithmetic__").replace("_", " ") for domain in file.domains)

    # A cloud for each domain, named at the point that is nearest to its middle.
    embedding = tsne_map(everything, world.options.seed)
    marks, middles = [], []
    parts = np.split(embedding.points, np.cumsum(sizes)[:-1])
    for name, points, colour in zip(names, parts, cycle(MODULE_COLOURS)):
        marks.append(viz.Cloud(name, points, colour))
        squares = np.square(points - np.median(points, axis=0)).sum(axis=1)
        middles.append(points[squares.argmin()])
    marks.append(viz.Points("", np.stack(middles), viz.BLACK, labels=names, size=0.3))

    # How well a probe tells each pair of domains apart. A domain is one module, or prose, and its
    # examples are the units.
    auc = np.full((len(rows), len(rows)), np.nan)
    for i, j in combinations(range(len(rows)), 2):
        auc[i, j] = auc[j, i] = two_samples.probe_auc(rows[i], rows[j])[0]
    panels = [viz.Panel(marks, ("t-SNE, distances mean nothing", ""), ticks=False),
              viz.Panel([viz.Heat(auc, names, names, 0.5, 1.0)], title="probe AUC, pair by pair")]

    labels = np.repeat(range(len(rows)), sizes)
    numbers = {"auc_least": float(np.nanmin(auc)),
               "silhouette": geometry.silhouette(everything, labels)}
    return Drawing(panels, numbers, (
        f"Means over the tokens of {', '.join(map(str, sizes))} examples, after the final norm "
        f"({tsne_numbers(embedding)}); below, the least probe AUC of a pair, and the mean "
        f"silhouette, in all dimensions. {provenance(world)}"))


# --------------------------------------------------------------------------------------------------
# figures 6 to 13: prompts and draws


def prompt_marks(run: Run, layer: int, plane: viz.Plane, name: str, colour: str = viz.VERMILION,
                 shape: str = "circle") -> list:
    """A layer's prior draw (hollow), trained rows, and the arrows between them."""
    start, end = [viz.project(plane, vectors[layer].numpy()) for vectors in run.start_and_end()]
    return [viz.Arrows("from draw to trained", start, end),
            viz.Points(f"{name}: prior draw", start, colour, True, shape),
            viz.Points(f"{name}: trained", end, colour, False, shape)]


def percent_inside(x: np.ndarray, population: np.ndarray) -> float:
    """Percent of the rows x (n, D) that lie in the manifold of a population (N, D): precision with
    k = 3, against a sample of the population."""
    sampled = compare.sample(torch.from_numpy(population))
    return 100 * geometry.precision(x, sampled)


def rows_over_vocabulary(world: World, run: str) -> Drawing:
    """PCA of the vocabulary. The run's name ends with the paper's learning rate, as in
    fitted-5e-3."""
    reference = world.vocabulary
    population, plane = reference.rows, reference.plane
    marks = [viz.Cloud(f"vocabulary, {len(population)} tokens",
                       viz.project(plane, population.numpy())),
             *prompt_marks(world.runs[run], 0, plane, "rows")]

    # Where the rows lie among the tokens, as compare measures it.
    start, end = world.runs[run].start_and_end()
    spacing = compare.measure("spacing", compare.spacing_of, population)
    measures = dict(compare.measure_rows(start[0], end[0], population, reference.gaussian,
                                         population, **spacing))
    numbers = {"token_distance": measures["reference"]["distance"]}
    for prefix, rows in (("prior", measures["prior draw"]), ("trained", measures["trained"])):
        for key in ("distance", "norm_ratio", "moved", "collapse", "effective_rank"):
            if key in rows:
                numbers[f"{prefix}_{key}"] = rows[key]

    rate, paper_rate = world.runs[run].settings().train.lr, run.partition("-")[2]
    return Drawing([viz.Panel(marks, viz.axis_names(plane))], numbers, (
        f"Prompt rows over the token embeddings, trained with a learning rate of {rate:.3g}, which "
        f"is {paper_rate} for embeddings of root mean square 0.02, as LLaMA 3.2 1B has. "
        f"{provenance(world, runs=(run,))}"))


def exclusion_draws(world: World) -> Drawing:
    """PCA of the vocabulary."""
    reference, seed = world.vocabulary, world.options.seed
    prior = reference.fit(priors.Exclusion, {})
    draws = prior.sample(SIZE // 4, torch.Generator().manual_seed(seed)).numpy()
    vocabulary, plane = reference.rows.numpy(), reference.plane
    marks = [viz.Cloud(f"exclusion, {len(draws)} draws", viz.project(plane, draws), viz.SKY),
             viz.Cloud(f"vocabulary, {len(vocabulary)} tokens", viz.project(plane, vocabulary))]
    numbers = {**prior.report(), "draws_inside": percent_inside(draws, vocabulary)}
    return Drawing([viz.Panel(marks, viz.axis_names(plane))], numbers, (
        "Draws of the exclusion prior with c = 5 over the token embeddings that it is fitted on; "
        f"below, its mean radius without and with what it excludes. {provenance(world)}"))


def rows_among_domains(world: World, layer: int, domains: tuple[str, ...],
                       runs: tuple[str, ...]) -> Drawing:
    """PCA of a layer's inputs."""
    clouds = {domain: world.activations(layer, domain) for domain in domains}
    everything = np.concatenate(list(clouds.values()))
    plane = viz.pca(everything)
    marks = [viz.Cloud(domain, viz.project(plane, rows), DOMAIN_COLOURS[domain])
             for domain, rows in clouds.items()]

    # Where each run's rows lie among the domains, as drawn and as trained.
    numbers = domain_auc(world, layer, domains)
    mean_norm = np.linalg.norm(everything, axis=1).mean()
    for run, (colour, shape) in zip(runs, RUN_LOOKS):
        prior = world.runs[run].settings().prior.prior
        marks += prompt_marks(world.runs[run], layer, plane, prior, colour, shape)
        for kind, vectors in zip(("drawn", "trained"), world.runs[run].start_and_end()):
            rows = vectors[layer].numpy()
            for domain, population in clouds.items():
                numbers[f"{run}_{kind}_in_{domain}"] = percent_inside(rows, population)
            ratio = np.linalg.norm(rows, axis=1).mean() / mean_norm
            numbers[f"{run}_{kind}_norm_ratio"] = float(ratio)

    where = f"inputs of layer {layer}" if layer else "token embeddings as texts use them"
    return Drawing([viz.Panel(marks, viz.axis_names(plane))], numbers, (
        f"Prompt rows among {where}; the plane is fitted without them. Below, how well a linear "
        "probe tells the domains apart, the percentage of rows in each domain's manifold, and "
        f"their norm over that of activations. {provenance(world, domains, runs)}"))


def rows_among_tokens(world: World, *runs: str) -> Drawing:
    return rows_among_domains(world, 0, ("text", "squad"), runs)


def rows_among_activations(world: World, *runs: str) -> Drawing:
    return rows_among_domains(world, world.L - 1, ("text", "squad"), runs)


def rows_between_domains(world: World, *runs: str) -> Drawing:
    return rows_among_domains(world, world.L - 1, ("text", "squad", "math"), runs)


def vae_draws(world: World) -> Drawing:
    """PCA of the last layer's inputs at SQuAD's tokens."""
    layer, seed = world.L - 1, world.options.seed
    squad = world.activations(layer, "squad")
    reference = Reference([torch.from_numpy(squad)], "squad")
    # A VAE fitted on all of the rows is drawn from; one fitted on a part of them is judged.
    prior = reference.fit(priors.VAE, {})
    texts = world.tokens.field["text"][world.tokens.chosen("squad")]
    judgement = dict(judge_prior(priors.VAE, reference, {}, 20, seed, [texts]))
    draws = prior.sample(min(len(squad), SIZE), torch.Generator().manual_seed(seed)).numpy()

    plane = viz.pca(squad)
    frame = viz.project(plane, squad)
    panels = []
    for name, x, colour in ((f"squad, {len(squad)} tokens", squad, viz.BLUE),
                            (f"VAE, {len(draws)} draws", draws, viz.VERMILION)):
        cloud = viz.Cloud(name, viz.project(plane, x), colour)
        panels.append(viz.Panel([cloud], viz.axis_names(plane), frame=frame))

    gaussian = judgement["fitted Gaussian's"]
    numbers = {f"vae_{key}": value for key, value in judgement["prior's draws"].items()}
    numbers |= {f"gaussian_{key}": gaussian[key] for key in ("frechet", "mmd")}
    numbers["rows_effective_rank"] = judgement["held-out rows"]["effective_rank"]
    return Drawing(panels, numbers, (
        f"Inputs of layer {layer} and draws of the VAE prior, in one plane. The numbers judge a "
        "VAE that is fitted without a fifth of the rows, by that fifth. "
        f"{provenance(world, ('squad',))}"))


# --------------------------------------------------------------------------------------------------
# the figures, and what each needs


class Figure(NamedTuple):
    file: str  # its name, without number and ending
    title: str
    draw: Callable[..., Drawing]  # draw(world, *runs)
    collections: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    least: dict[str, tuple[int, int]] = {}  # rows and texts that it needs of a domain; "" is any
    encoders: bool = False  # whether it can be of an encoder, too


PAPER_FIGURES = 13  # the paper's own; figures with larger numbers are ours
TOKENS = ("tokens",)
SQUAD_RUNS = ("fitted-squad", "xavier")
FEWEST = 4, 2  # rows and texts: a row has three neighbours, and a probe is judged by other texts
OF_TEXT, OF_SQUAD, OF_ANY = {"text": FEWEST}, {"text": FEWEST, "squad": FEWEST}, {"": FEWEST}
FIGURES = {
    1: Figure("trajectories-vocabulary", "Sentences over the vocabulary",
              sentences_over_vocabulary, TOKENS),
    2: Figure("trajectories-last-layer", "Sentences over last-layer activations",
              sentences_over_activations, TOKENS),
    3: Figure("answers-last-layer", "SQuAD answers over last-layer activations",
              answers_over_activations, TOKENS, least=OF_SQUAD),
    4: Figure("density-by-layer", "Density of activations by layer", density_by_layer, TOKENS,
              least=OF_TEXT),
    5: Figure("mean-activations", "Mean activations of prose and arithmetic", mean_activations,
              ("means",), least=OF_ANY, encoders=True),
    6: Figure("isotropic-5e-3", "Isotropic prior, high learning rate", rows_over_vocabulary,
              runs=("isotropic-5e-3",)),
    7: Figure("isotropic-5e-4", "Isotropic prior, low learning rate", rows_over_vocabulary,
              runs=("isotropic-5e-4",)),
    8: Figure("fitted-5e-3", "Prior fitted on the vocabulary", rows_over_vocabulary,
              runs=("fitted-5e-3",)),
    9: Figure("exclusion", "Exclusion prior over the vocabulary", exclusion_draws),
    10: Figure("tokens-squad", "Prompts among token embeddings", rows_among_tokens, TOKENS,
               SQUAD_RUNS, OF_SQUAD),
    11: Figure("last-layer-squad", "Prompts among last-layer activations", rows_among_activations,
               TOKENS, SQUAD_RUNS, OF_SQUAD),
    12: Figure("last-layer-interpolation", "A prior between prose and arithmetic",
               rows_between_domains, TOKENS, ("interpolation",), OF_ANY),
    13: Figure("vae-last-layer", "VAE draws beside SQuAD activations", vae_draws, TOKENS,
               least={"squad": (LEAST, LEAST_TEXTS)}),
}


def collection_flags(options: FigureOptions, L: int) -> dict[str, dict]:
    """Flags of collect for every collection that figures show. specs: a domain each."""
    files = data.files_of("math", parse_spec(options.math_data, 0)[1])
    stems = [file.stem for file in files]
    modules = []
    for file in files:
        name = file.stem if stems.count(file.stem) == 1 else f"{file.parent.name} {file.stem}"
        modules.append(f"{name}=math:{file}")
    text = f"text={options.text_data}"
    return {
        "tokens": {"pool": "token", "layers": ("all",), "specs": (
            text, f"squad={options.squad_data}", f"math={options.math_data}")},
        "means": {"pool": "mean", "layers": (str(L),), "specs": (text, *modules)},
    }


def run_flags(options: FigureOptions, scale: float) -> dict[str, dict]:
    """Flags of train for every run that figures show. scale: the root mean square of the token
    embeddings. The paper's learning rates and deviation are for 0.02, and grow with it."""
    high, low = [float(f"{rate * scale / 0.02:.3g}") for rate in (5e-3, 5e-4)]
    isotropic = f"isotropic:std={scale:.3g}"
    squad, math = {"data": options.squad_data}, {"data": options.math_data}
    return {
        "isotropic-5e-3": {**squad, "prior": isotropic, "lr": high},
        "isotropic-5e-4": {**squad, "prior": isotropic, "lr": low},
        "fitted-5e-3": {**squad, "prior": "fitted", "lr": high},
        "fitted-squad": {**squad, "prior": "fitted", "reference": (options.squad_data,),
                         "deep_layers": 1},
        "xavier": {**squad, "prior": "xavier", "deep_layers": 1},
        "interpolation": {**math, "prior": "interpolation",
                          "reference": (options.text_data, options.math_data), "deep_layers": 1},
    }


# --------------------------------------------------------------------------------------------------
# the command


def command_figures(given: dict) -> None:
    """Make what the figures are drawn from, as far as it is not there yet, and draw them."""
    options = from_flags(FigureOptions, given)
    numbers = sorted(set(options.numbers or FIGURES))
    unknown = [number for number in numbers if number not in FIGURES]
    if unknown:
        raise UserError(f"figure {unknown[0]}: there are figures 1 to {max(FIGURES)}")
    options = replace(options, text_data=absolute(options.text_data),
                      squad_data=absolute(options.squad_data),
                      math_data=absolute(options.math_data))
    check_folder(Path(options.out) / "runs")
    figures = [FIGURES[number] for number in numbers]
    loaded = load_model(from_flags(ModelSettings, given).complete(),
                        encoders=all(figure.encoders for figure in figures))
    collections = needed_collections(figures, options, loaded)
    runs = needed_runs(figures, options, loaded)
    draw_figures(numbers, World(options, loaded, collections, runs))


def common_flags(options: FigureOptions, loaded: LoadedModel) -> dict:
    """The flags that collections and runs have in common."""
    return {**vars(loaded.settings), "revision": loaded.revision, "seed": options.seed}


def needed_collections(figures: list[Figure], options: FigureOptions, loaded: LoadedModel
                       ) -> dict[str, Collection]:
    """The collections that figures show, made if they are not there."""
    recipes = collection_flags(options, loaded.model.config.num_hidden_layers)
    names = [name for figure in figures for name in figure.collections]
    collections = {}
    for name in dict.fromkeys(names):
        path = Path(options.out) / f"{name}.safetensors"
        if not path.exists():
            command_collect({**common_flags(options, loaded), **recipes[name], "out": str(path),
                             "examples": options.examples, "limit": options.limit})
        # A file from an earlier call may be of another model or of other data.
        file = Collection(path)
        check_same_model(loaded.settings, file.about["sha256"], path)
        specs = [named.partition("=")[2] for named in recipes[name]["specs"]]
        wanted = {"data": specs, "examples": options.examples, "limit": options.limit,
                  "seed": options.seed}
        if any(file.about.get(key) != value for key, value in wanted.items()):
            raise UserError(f"{path}: collected from other data or with other limits: choose "
                            "another --out, or remove it")
        collections[name] = file
    for figure in figures:
        for name in figure.collections:
            check_enough(figure, collections[name])
    return collections


def check_enough(figure: Figure, file: Collection) -> None:
    """Raise UserError if a domain of the collection has too few rows or texts for the figure."""
    for domain in file.domains:
        index = file.chosen(domain)
        rows, texts = len(index), len(file.field["text"][index].unique())
        least_rows, least_texts = figure.least.get(domain) or figure.least.get("", (0, 0))
        if rows < least_rows or texts < least_texts:
            raise UserError(f"{file.path}: {counted(rows, 'row')} of {counted(texts, 'text')} in "
                            f"{domain}, and figure {figure.title!r} needs {least_rows} of "
                            f"{least_texts}: choose another --out and a larger --limit or "
                            "--examples, or data of more texts")


def needed_runs(figures: list[Figure], options: FigureOptions, loaded: LoadedModel
                ) -> dict[str, Run]:
    """The runs that figures show, trained to their end if they are not."""
    scale = float(loaded.model.embeddings.float().square().mean().sqrt())
    recipes = run_flags(options, scale)
    names = [name for figure in figures for name in figure.runs]
    runs = {}
    for name in dict.fromkeys(names):
        run = Run(Path(options.out) / "runs" / name)
        flags = {**common_flags(options, loaded), **recipes[name], "steps": options.steps,
                 "eval_limit": options.eval_limit, "batch_size": options.batch_size}
        # A run that was stopped is resumed, and a finished one is used as it is.
        if run.empty:
            command_train({**flags, "out": str(run.path)})
        else:
            different = differences(run.settings(), flags)
            if different:
                raise UserError(f"{run.path}: trained otherwise, with {different[0]}: choose "
                                "another --out, or remove it")
            if not is_finished(run, options.steps):
                command_train({**flags, "out": str(run.path), "resume": True})
        runs[name] = run
    return runs


def is_finished(run: Run, steps: int) -> bool:
    """Whether the last step's prompt is there, and scored."""
    return steps == run.last_scored() == run.last_step()


def draw_figures(numbers: list[int], world: World) -> None:
    """Write the figures' files, and add what was measured to figures.json."""
    folder, results = Path(world.options.out), {}
    path = folder / "figures.json"
    if path.exists():
        earlier = data.read_json(path, dict, SMALL)
        results = {int(key): entry for key, entry in earlier.items()
                   if key.isascii() and key.isdecimal()}
    # Figures that are drawn now replace their entries of an earlier call.
    for number in numbers:
        figure = FIGURES[number]
        drawing = figure.draw(world, *figure.runs)
        caption = drawing.caption
        if number <= PAPER_FIGURES:
            caption = f"Figure {number} of the paper. {caption}"
        table = {title_of(key): value for key, value in drawing.numbers.items()}
        svg = viz.figure(drawing.panels, figure.title, caption, table=table)
        name = f"figure-{number:02d}-{figure.file}.svg"
        write_file(folder / name, svg.encode())
        results[number] = {"file": name, "title": figure.title, "measured": drawing.numbers}
        listed = [f"{key} {value:.3g}" for key, value in drawing.numbers.items()]
        show(f"{folder / name}\n    {', '.join(listed)}")
    content = json.dumps(dict(sorted(results.items())), indent=1) + "\n"
    write_file(path, content.encode())
