"""The paper's thirteen figures, each from runs and collections, and beside each the numbers that
say what the eye should see: a claim is never a picture alone.

    svg, numbers = draw(4, world)

World holds what figures are drawn from; FIGURES says what each needs, RUNS and COLLECTIONS how that
is made (the command line makes it). `paper` is Exploring Embedding Priors in Prompt-Tuning (arXiv
2412.18582). n prompt rows, N rows of a population, D width, L layers.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch

import compare
import geometry
import priors
import viz
from activations import Collection
from data import Vocabulary
from llama import Llama
from run import Run
from settings import prior_name, spec_name, stored_settings
from train import progress

PATHS, STEPS = 3, 12  # trajectories in a picture, and tokens of each
SIZE = 4000  # rows of a domain in a t-SNE map, and draws of a prior in a picture
COLOURS = {"text": viz.GREY, "squad": viz.BLUE, "math": viz.ORANGE}


class World(NamedTuple):
    """What the figures show: a model, its activations (`tokens` token by token at all layers,
    `means` an example a row), and finished runs by their names in RUNS."""

    a: SimpleNamespace  # settings
    model: Llama
    vocabulary: Vocabulary
    collections: dict[str, Collection]
    runs: dict[str, Run]

    @property
    def L(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def embeddings(self) -> np.ndarray:
        """(V, D): every token that text can have, once."""
        return self.model.embeddings[self.vocabulary.ordinary].float().cpu().numpy()

    def rows(self, layer: int, domain: str) -> np.ndarray:
        """(N, D): activations of a domain's tokens at a layer."""
        file = self.collections["tokens"]
        return file.rows(layer, file.chosen(domain)).float().numpy()


def made_of(world: World, *runs: str) -> str:
    """Where a figure's data come from."""
    model = world.a.model if world.a.model == "tiny" else Path(world.a.model).name
    parts = [f"Model {model}"]
    for name in runs:
        run, c = world.runs[name], stored_settings(world.runs[name].config())
        score = [m for m in run.metrics() if m["split"] == "eval"][-1]
        key = "accuracy" if "accuracy" in score else "f1"
        parts.append(f"run {name}: prior {prior_name(SimpleNamespace(**c))} of "
                     f"{' and '.join(map(spec_name, c['reference']))}, seed {c['seed']}, "
                     f"{c['steps']} steps on {spec_name(c['data'])}, "
                     f"{'F1' if key == 'f1' else key} {score[key]:.1f}")
    return "; ".join(parts) + "."


def bar(name: str) -> Callable:
    """A bar at a terminal for a map under way."""
    shown = progress(desc=name, leave=False, unit=" steps")

    def update(step: int, steps: int, kl: float | None) -> None:
        shown.total = steps
        shown.update(step - shown.n)
        if step >= steps:
            shown.close()

    return update


def counts(world: World, *domains: str) -> str:
    file = world.collections["tokens"]
    each = ", ".join(f"{len(file.chosen(d))} of {d}" for d in domains)
    return (f"Rows: {each}; BOS and {int(file.field['massive'].sum())} rows of massive norm left "
            f"out. Seed {file.about['seed']}.")


# --------------------------------------------------------------------------------------------------
# trajectories, figures 1 to 3


def paths(world: World, domain: str, roles: tuple[str, ...] = ()) -> list[torch.Tensor]:
    """The first stretches of a domain's text of some length, as rows of the collection."""
    found, _ = compare.paths_of(world.collections["tokens"], domain, 10**9, roles)
    long = sorted(found, key=lambda p: len(p) < (4 if roles else STEPS))  # stable: long ones first
    return [p[:STEPS] for p in long[:PATHS]]


def words(world: World, path: torch.Tensor) -> tuple[str, ...]:
    ids = world.collections["tokens"].field["token"][path].tolist()
    return tuple(viz.visible(world.vocabulary.decode([i])) for i in ids)


def trails(world: World, found: list[torch.Tensor], places: list[np.ndarray],
           name: str) -> list:
    """Paths, and the first one's words."""
    return [viz.Trails(name, places),
            viz.Points("", places[0], viz.BLACK, labels=words(world, found[0]), size=0.5)]


def steps_said(numbers: dict[str, float], whose: str) -> str:
    """What walks() measured, in words."""
    if not numbers:
        return f"{whose} have no two tokens side by side. "
    n = {k: f"{v:.3g}" for k, v in numbers.items()}
    return (f"{whose} steps are {n['step']} long on average; of the same tokens shuffled "
            f"{n['matched_step']} (p {n['p_matched_step']} that chance is as short), of random "
            f"walks over all types {n['uniform_step']} (p {n['p_uniform_step']}). Their standard "
            f"deviation is {n['spread']}; {n['matched_spread']} (p {n['p_matched_spread']}) and "
            f"{n['uniform_spread']} (p {n['p_uniform_spread']}). ")


def figure_1(world: World):
    """Sentence trajectories over the vocabulary, t-SNE."""
    vocabulary, ids = world.embeddings, world.vocabulary.ordinary
    place = {token: k for k, token in enumerate(ids)}
    token = world.collections["tokens"].field["token"]
    found = [p[[int(t) in place for t in token[p]]] for p in paths(world, "text")]
    map_ = viz.tsne(vocabulary, seed=world.a.seed, progress=bar("t-SNE"))
    at = [map_.points[[place[int(t)] for t in token[p]]] for p in found]
    numbers = compare.walks(world.collections["tokens"], 0, "text", torch.from_numpy(vocabulary))
    panel = viz.Panel([viz.Cloud(f"vocabulary, {len(ids)} tokens", map_.points),
                       *trails(world, found, at, f"{len(at)} sentences, from dark to light")],
                      ("t-SNE, distances mean nothing", ""), ticks=False)
    return [panel], numbers, (
        f"{steps_said(numbers, 'Sentences')}t-SNE of all token embeddings: perplexity "
        f"{map_.perplexity:.0f}, KL {map_.kl:.3f}, "
        f"seed {world.a.seed}. {made_of(world)}")


def figure_2(world: World):
    """Sentence trajectories over last-layer activations, PCA."""
    rows, L = world.rows(world.L, "text"), world.L
    plane, found = viz.pca(rows), paths(world, "text")
    at = [viz.project(plane, world.collections["tokens"].rows(L, p).float().numpy())
          for p in found]
    numbers = compare.walks(world.collections["tokens"], L, "text")
    panel = viz.Panel([viz.Cloud(f"text, {len(rows)} tokens", viz.project(plane, rows)),
                       *trails(world, found, at, f"{len(at)} sentences, from dark to light")],
                      viz.axis_names(plane))
    return [panel], numbers, (
        f"{steps_said(numbers, 'Sentences')}Activations after the final norm. "
        f"{counts(world, 'text')} {made_of(world)}")


def figure_3(world: World):
    """SQuAD answer trajectories over text and SQuAD last-layer activations, PCA."""
    L, file = world.L, world.collections["tokens"]
    text, squad = world.rows(L, "text"), world.rows(L, "squad")
    plane, found = viz.pca(np.concatenate([text, squad])), paths(world, "squad", ("answer",))
    if not found:
        raise viz.PictureError("figure 3: no answer of two tokens or more in the collection: "
                               "raise --limit, or give other --squad-data")
    at = [viz.project(plane, file.rows(L, p).float().numpy()) for p in found]
    panel = viz.Panel([viz.Cloud("text", viz.project(plane, text)),
                       viz.Cloud("squad", viz.project(plane, squad), viz.BLUE),
                       *trails(world, found, at, f"{len(at)} answers, from dark to light")],
                      viz.axis_names(plane))
    numbers, steps = auc(world, L, "text", "squad"), compare.walks(file, L, "squad", None,
                                                                   ("answer",))
    return [panel], numbers | steps, (
        f"{auc_said(numbers)}{steps_said(steps, 'Answers')}Activations after the final norm. "
        f"{counts(world, 'text', 'squad')} {made_of(world)}")


# --------------------------------------------------------------------------------------------------
# clouds, figures 4 and 5


def auc(world: World, layer: int, *domains: str) -> dict[str, float]:
    """Area under the ROC of a linear probe, pair by pair, of one row an example."""
    file = world.collections["tokens"]
    apart = {d: compare.some(file.rows(layer, compare.one_an_example(file, d))) for d in domains}
    for d, x in apart.items():
        if len(x) < 4:
            raise viz.PictureError(f"{file.path}: {len(x)} examples of {d}, and a probe needs 4: "
                                   "choose another --out and a larger --limit or --examples")
    return {f"auc_{a}_{b}": geometry.probe_auc(apart[a], apart[b])
            for a, b in combinations(domains, 2)}


def auc_said(numbers: dict[str, float]) -> str:
    pairs = ", ".join(f"{' from '.join(k.split('_')[1:])} with AUC {v:.3f}"
                      for k, v in numbers.items() if k.startswith("auc_"))
    return f"A linear probe tells {pairs} (0.5 is chance). "


def figure_4(world: World):
    """Density of activations, a panel a layer, PCA."""
    panels, numbers = [], {}
    for i in range(world.L + 1):
        rows = world.rows(i, "text")
        plane = viz.pca(rows)
        flat = viz.project(plane, rows)
        # the plane's best line through two heaps is its first axis
        numbers[f"bimodality_{i}"] = geometry.bimodality(flat[:, 0])
        one, two = 100 * plane.explained
        name = f"layer {i}" if i < world.L else "final norm"
        panels.append(viz.Panel([viz.Cloud("log density of text's tokens", flat, None)],
                                (f"PC1 {one:.0f} %, PC2 {two:.0f} %", ""),
                                f"{name}: {numbers[f'bimodality_{i}']:.2f}", ticks=False))
    return panels, numbers, (
        "Above each panel Sarle's bimodality coefficient along the first component: 0.33 for a "
        f"Gaussian, 0.56 if uniform, towards 1 for two heaps. {counts(world, 'text')} "
        f"{made_of(world)}")


def figure_5(world: World):
    """Mean activations of text and of each arithmetic module, t-SNE (the paper: of T5-base)."""
    file = world.collections["means"]
    layer = file.layers[-1]
    rows = [compare.some(file.rows(layer, file.chosen(d)).float(), SIZE) for d in file.domains]
    short = [d.removeprefix("arithmetic__").replace("_", " ") for d in file.domains]
    map_ = viz.tsne(np.concatenate(rows), seed=world.a.seed, progress=bar("t-SNE"))
    parts = np.split(map_.points, np.cumsum([len(x) for x in rows])[:-1])
    looks = [viz.GREY, *(c for c in viz.PALETTE if c != viz.BLACK), "#003a5c", "#6e3000", "#00513a",
             "#6b3854", "#7a5300"]
    clouds = [viz.Cloud(d, xy, look) for d, xy, look in zip(short, parts, 99 * looks)]
    middles = np.stack([xy[np.square(xy - np.median(xy, 0)).sum(1).argmin()] for xy in parts])
    clouds.append(viz.Points("", middles, viz.BLACK, labels=tuple(short), size=0.3))
    table = np.full((len(rows),) * 2, np.nan)
    for i, j in combinations(range(len(rows)), 2):
        table[i, j] = table[j, i] = geometry.probe_auc(rows[i], rows[j])
    labels = np.repeat(range(len(rows)), [len(x) for x in rows])
    panels = [viz.Panel(clouds, ("t-SNE, distances mean nothing", ""), ticks=False),
              viz.Panel([viz.Heat(table, tuple(short), tuple(short), 0.5, 1.0)],
                        title="probe AUC, pair by pair")]
    least, apart = float(np.nanmin(table)), geometry.silhouette(np.concatenate(rows), labels)
    return panels, {"auc_least": least, "silhouette": apart}, (
        f"The least probe AUC of a pair is {least:.3f}, the mean silhouette {apart:.2f} (1: far "
        "apart, 0: overlapping), both in all dimensions. "
        "Means over an example's tokens after the final norm, "
        f"{', '.join(str(len(x)) for x in rows)} examples. t-SNE: perplexity "
        f"{map_.perplexity:.0f}, KL {map_.kl:.3f}, seed {world.a.seed}. {made_of(world)}")


# --------------------------------------------------------------------------------------------------
# prompts: figures 6 to 13


def before_and_after(run: Run, layer: int, plane: viz.Plane, name: str, colour=viz.VERMILION,
                     shape: str = "circle") -> list:
    """A run's prior draw, trained rows, and the arrows between them."""
    start, end = (viz.project(plane, rows[layer].numpy()) for rows in run.start_and_end())
    return [viz.Arrows("from draw to trained", start, end),
            viz.Points(f"{name}: prior draw", start, colour, True, shape),
            viz.Points(f"{name}: trained", end, colour, False, shape)]


def inside(x: np.ndarray, reference: np.ndarray) -> float:
    """Percent of the rows in the manifold of the reference (precision, k = 3)."""
    return 100 * geometry.precision_recall(x, reference)[0]


def over_vocabulary(run: str) -> Callable:
    """Figures 6 to 8: a run's rows in the principal plane of the vocabulary."""

    def draw(world: World):
        vocabulary = world.embeddings
        plane = viz.pca(vocabulary)
        start, end = (rows[0] for rows in world.runs[run].start_and_end())
        population = torch.from_numpy(vocabulary)
        measured = dict(compare.measure_rows(start, end, population,
                                             priors.Fitted.fit(population), population))
        keys = ("distance", "norm_ratio", "moved", "collapse", "effective_rank")
        numbers = {"token_distance": measured["reference"]["distance"], **{
            f"{what.split()[0]}_{k}": measured[what][k] for what in ("prior draw", "trained")
            for k in keys if k in measured[what]}}
        panel = viz.Panel([viz.Cloud(f"vocabulary, {len(vocabulary)} tokens",
                                     viz.project(plane, vocabulary)),
                           *before_and_after(world.runs[run], 0, plane, "rows")],
                          viz.axis_names(plane))
        rate = stored_settings(world.runs[run].config())["lr"]
        n = {k: f"{v:.3g}" for k, v in numbers.items()}
        return [panel], numbers, (
            f"Mean distance to 1000 random tokens: of a token {n['token_distance']}, of a prior "
            f"draw {n['prior_distance']}, of a trained row {n['trained_distance']}. Rows moved "
            f"{n['trained_moved']}; norm over a token's {n['prior_norm_ratio']} and "
            f"{n['trained_norm_ratio']}; a trained row's distance to its nearest token over a "
            f"token's own {n.get('trained_collapse', '-')}; effective rank of the trained rows "
            f"{n.get('trained_effective_rank', '-')}. Learning rate {rate:.3g}, as "
            f"{'5e-3' if run.endswith('5e-3') else '5e-4'} at LLaMA 3.2 1B's embeddings of root "
            f"mean square 0.02. {made_of(world, run)}")

    return draw


def figure_9(world: World):
    """Draws of the exclusion prior over the vocabulary, PCA."""
    vocabulary, seed = world.embeddings, world.a.seed
    prior = priors.Exclusion.fit(torch.from_numpy(vocabulary))
    draws = prior.sample(SIZE // 4, torch.Generator().manual_seed(seed)).numpy()
    plane = viz.pca(vocabulary)
    panel = viz.Panel([viz.Cloud(f"exclusion, {len(draws)} draws", viz.project(plane, draws),
                                 viz.SKY),
                       viz.Cloud(f"vocabulary, {len(vocabulary)} tokens",
                                 viz.project(plane, vocabulary))],
                      viz.axis_names(plane))
    report = {**prior.report(), "draws_inside": inside(draws, compare.some(
        torch.from_numpy(vocabulary)))}
    return [panel], report, (
        f"c = 5 in all {report['dim']:.0f} dimensions accepts {100 * report['acceptance']:.2g} % "
        f"of the wide Gaussian's draws and moves the mean radius from {report['radius_fitted']:.4g}"
        f" to {report['radius_drawn']:.4g}; {100 * report['reference_inside']:.0f} % of the tokens "
        f"are within what it excludes, {report['draws_inside']:.0f} % of the draws in the tokens' "
        f"manifold. Seed {seed}. {made_of(world)}")


def over_domains(layer: Callable[[World], int], domains: tuple[str, ...],
                 runs: dict[str, str]) -> Callable:
    """Figures 10 to 12: runs' rows, {run: its name in the legend}, among domains' activations."""

    def draw(world: World):
        i = layer(world)
        clouds = {d: world.rows(i, d) for d in domains}
        plane = viz.pca(np.concatenate(list(clouds.values())))
        numbers, said = auc(world, i, *domains), []
        marks = [viz.Cloud(d, viz.project(plane, x), COLOURS[d]) for d, x in clouds.items()]
        looks = ((viz.VERMILION, "circle"), (viz.GREEN, "triangle"))
        for (run, name), look in zip(runs.items(), looks):
            marks += before_and_after(world.runs[run], i, plane, name, *look)
            said.append(f"{name} rows:")
            for kind, rows in zip(("drawn", "trained"), world.runs[run].start_and_end()):
                x = rows[i].numpy()
                numbers |= {f"{run}_{kind}_in_{d}": inside(x, compare.some(torch.from_numpy(y)))
                            for d, y in clouds.items()}
                numbers[f"{run}_{kind}_norm_ratio"] = ratio = float(
                    np.linalg.norm(x, axis=1).mean()
                    / np.linalg.norm(np.concatenate(list(clouds.values())), axis=1).mean())
                shares = ", ".join(f"{numbers[f'{run}_{kind}_in_{d}']:.0f} % in {d}'s manifold"
                                   for d in clouds)
                said.append(f"{kind} {ratio:.3g} times as long as activations, {shares}"
                            + (";" if kind == "drawn" else "."))
        where = f"Inputs of layer {i}" if i else "Token embeddings as texts use them"
        return [viz.Panel(marks, viz.axis_names(plane))], numbers, (
            f"{auc_said(numbers)}{' '.join(said)} {where}; the plane is fitted without the rows. "
            f"{counts(world, *domains)} {made_of(world, *runs)}")

    return draw


def figure_13(world: World):
    """Draws of the VAE prior against SQuAD activations at the last layer, PCA."""
    i, seed = world.L - 1, world.a.seed
    squad = torch.from_numpy(world.rows(i, "squad"))
    judged = dict(compare.judge_prior(priors.VAE, [squad], {}, 20, seed))
    prior = priors.VAE.fit(squad)
    draws = prior.sample(min(len(squad), SIZE), torch.Generator().manual_seed(seed)).numpy()
    plane = viz.pca(squad.numpy())
    panels = [viz.Panel([viz.Cloud(name, viz.project(plane, x), colour)],
                        viz.axis_names(plane), frame=viz.project(plane, squad.numpy()))
              for name, x, colour in ((f"squad, {len(squad)} tokens", squad.numpy(), viz.BLUE),
                                      (f"VAE, {len(draws)} draws", draws, viz.VERMILION))]
    mine, gaussian = judged["prior's draws"], judged["fitted Gaussian's"]
    return panels, {**{f"vae_{k}": v for k, v in mine.items()},
                    **{f"gaussian_{k}": gaussian[k] for k in ("frechet", "mmd")},
                    "rows_effective_rank": judged["held-out rows"]["effective_rank"]}, (
        f"Draws have {mine['variance_ratio']:.3g} of the rows' variance and effective rank "
        f"{mine['effective_rank']:.0f} (rows {judged['held-out rows']['effective_rank']:.0f}); "
        f"MMD^2 to the rows {mine['mmd']:.2g} (fitted Gaussian {gaussian['mmd']:.2g}), Frechet "
        f"{mine['frechet']:.3g} ({gaussian['frechet']:.3g}), precision {mine['precision']:.0f} %, "
        f"recall {mine['recall']:.0f} %. Inputs of layer {i}, one plane. The numbers judge a VAE "
        f"fitted without a fifth of the rows by that fifth. {counts(world, 'squad')} "
        f"{made_of(world)}")


# --------------------------------------------------------------------------------------------------
# what each figure needs, and how that is made


class Figure(NamedTuple):
    name: str  # of its file
    title: str
    draw: Callable
    collections: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


def first(world: World) -> int:
    return 0


def last(world: World) -> int:
    """The last layer, whose input rows of deep prompts share."""
    return world.L - 1


TOKENS = ("tokens",)
FIGURES = {
    1: Figure("trajectories-vocabulary", "Sentences over the vocabulary", figure_1, TOKENS),
    2: Figure("trajectories-last-layer", "Sentences over last-layer activations", figure_2,
              TOKENS),
    3: Figure("answers-last-layer", "SQuAD answers over last-layer activations", figure_3, TOKENS),
    4: Figure("density-by-layer", "Density of activations by layer", figure_4, TOKENS),
    5: Figure("mean-activations", "Mean activations of prose and arithmetic", figure_5,
              ("means",)),
    6: Figure("isotropic-5e-3", "Isotropic prior, high learning rate",
              over_vocabulary("isotropic-5e-3"), (), ("isotropic-5e-3",)),
    7: Figure("isotropic-5e-4", "Isotropic prior, low learning rate",
              over_vocabulary("isotropic-5e-4"), (), ("isotropic-5e-4",)),
    8: Figure("fitted-5e-3", "Prior fitted on the vocabulary", over_vocabulary("fitted-5e-3"), (),
              ("fitted-5e-3",)),
    9: Figure("exclusion", "Exclusion prior over the vocabulary", figure_9),
    10: Figure("tokens-squad", "Prompts among token embeddings", over_domains(
        first, ("text", "squad"), {"fitted-squad": "fitted", "xavier": "Xavier"}), TOKENS,
        ("fitted-squad", "xavier")),
    11: Figure("last-layer-squad", "Prompts among last-layer activations", over_domains(
        last, ("text", "squad"), {"fitted-squad": "fitted", "xavier": "Xavier"}), TOKENS,
        ("fitted-squad", "xavier")),
    12: Figure("last-layer-interpolation", "A prior between prose and arithmetic", over_domains(
        last, ("text", "squad", "math"), {"interpolation": "interpolation"}), TOKENS,
        ("interpolation",)),
    13: Figure("vae-last-layer", "VAE draws beside SQuAD activations", figure_13, TOKENS),
}


def recipes(a: SimpleNamespace, scale: float) -> dict[str, dict]:
    """Settings of the runs that figures show. scale: root mean square of the token embeddings, by
    which the paper's learning rates and deviation, made for 0.02, are stretched."""
    high, low = (float(f"{rate * scale / 0.02:.3g}") for rate in (5e-3, 5e-4))
    isotropic = f"isotropic:std={scale:.3g}"
    return {
        "isotropic-5e-3": {"prior": isotropic, "lr": high, "data": a.squad_data},
        "isotropic-5e-4": {"prior": isotropic, "lr": low, "data": a.squad_data},
        "fitted-5e-3": {"prior": "fitted", "lr": high, "data": a.squad_data},
        "fitted-squad": {"prior": "fitted", "reference": [a.squad_data], "deep_layers": 1,
                         "data": a.squad_data},
        "xavier": {"prior": "xavier", "deep_layers": 1, "data": a.squad_data},
        "interpolation": {"prior": "interpolation", "reference": [a.text_data, a.math_data],
                          "deep_layers": 1, "data": a.math_data},
    }


def draw(number: int, world: World) -> tuple[str, dict[str, float]]:
    """Figure `number` of the paper as SVG, and what was measured for it."""
    what = FIGURES[number]
    panels, numbers, caption = what.draw(world)
    return viz.figure(panels, what.title, f"Figure {number} of the paper. {caption}"), numbers
