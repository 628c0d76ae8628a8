"""Measures of finished runs, of priors and of collections: geometry.py on what the others hold.

Most return rows of a table, (name, {key: number}); TITLES has the headings.

    rows = measure_rows(start, end, reference, priors.Fitted.fit(reference))

n prompt rows, N rows of a population, D width. `paper` is Exploring Embedding Priors in
Prompt-Tuning (arXiv 2412.18582).
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

import data
import geometry
import llama
import priors
from activations import Collection

MOST = 2000  # rows of a population in measures that want all pairs

TITLES = {
    "moved": "moved", "norm_ratio": "norm ratio", "radius": "radius", "radius_z": "radius z",
    "collapse": "collapse", "effective_rank": "rank", "variance_ratio": "variance",
    "frechet": "Frechet", "precision": "precision", "recall": "recall", "mmd": "MMD", "mmd_p": "p",
    "knn": "kNN", "auc": "AUC", "silhouette": "silhouette",
    "step": "step", "matched_step": "matched", "p_matched_step": "p", "uniform_step": "uniform",
    "p_uniform_step": "p", "spread": "spread", "matched_spread": "matched",
    "p_matched_spread": "p", "uniform_spread": "uniform", "p_uniform_spread": "p"}


def some(x: Tensor, count: int = MOST) -> np.ndarray:
    """At most `count` of the rows (N, D), always the same ones, as float32."""
    if len(x) > count:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]]
    return x.float().cpu().numpy()


# --------------------------------------------------------------------------------------------------
# a prior against what it was fitted on


def held_out(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> the rows to fit on, and a fifth of all, always the same one, to judge by. At
    random, for texts have rhythm: every fifth token of a list of sums is no fair sample."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    return x[order[len(x) // 5:]], x[order[:len(x) // 5]]


def judge_prior(prior: type, parts: list[Tensor], options: dict, seed: int
                ) -> list[tuple[str, dict[str, float]]]:
    """Draws of a prior against a fifth of the reference that it was not fitted on; beside them the
    fitted Gaussian's draws, and rows of the reference itself, than which no prior can be nearer.

    variance: total variance over the held-out rows'; rank at 95 % of the variance; Frechet
    distance; precision and recall (Kynkaanniemi et al. 2019); MMD^2 and its p; kNN: median distance
    to the third nearest held-out row."""
    divided = [held_out(x) for x in parts]
    fit, held = [x for x, _ in divided], some(torch.cat([x for _, x in divided]))
    count, rows = len(held), []

    def draws(kind, references, options):
        fitted = kind.fit(*references, **options)
        n = min(count, len(references[0])) if issubclass(kind, priors.Vocab) else count
        return fitted.sample(n, torch.Generator().manual_seed(seed)).float().numpy()

    sets = {"prior's draws": draws(prior, fit if prior.several else [torch.cat(fit)], options)}
    if prior is not priors.Fitted:
        sets["fitted Gaussian's"] = draws(priors.Fitted, [torch.cat(fit)], {})
    sets["reference rows"] = some(torch.cat(fit), count)
    rows.append(("held-out rows", {"effective_rank": geometry.effective_rank(held)}))
    for name, x in sets.items():
        precision, recall = geometry.precision_recall(x, held)
        mmd, p = geometry.mmd(x, held)
        rows.append((name, {
            "variance_ratio": geometry.total_variance_ratio(x, held),
            "effective_rank": geometry.effective_rank(x), "frechet": geometry.frechet(x, held),
            "precision": 100 * precision, "recall": 100 * recall, "mmd": mmd, "mmd_p": p}))
    return rows


# --------------------------------------------------------------------------------------------------
# a run's rows


def measure_rows(start: Tensor, end: Tensor, reference: Tensor, fitted: priors.Fitted,
                 tokens: Tensor | None = None) -> list[tuple[str, dict[str, float]]]:
    """A layer's prior draw (n, D) and trained rows (n, D) in its reference (N, D), and fitted, the
    reference's Gaussian.

    moved: mean distance from the draw; radius: mean Mahalanobis radius, and how many standard
    deviations of the chi law it lies from that law's mean; collapse: median collapse index among
    tokens (V, D), without them among the reference's distinct rows; Frechet and MMD^2 with its p:
    to the reference, and in the last row between draw and trained rows."""
    population, rows = some(reference), []
    tokens = np.unique(reference.numpy(), axis=0) if tokens is None else tokens.numpy()
    mean, deviation = geometry.chi_law(reference.shape[1])
    for name, x in (("prior draw", start), ("trained", end)):
        radius = fitted.whiten(x).norm(dim=1).mean().item()
        mmd, p = geometry.mmd(x.numpy(), population)
        rows.append((name, {
            "moved": geometry.displacement(start.numpy(), x.numpy()).mean(),
            "norm_ratio": float(x.norm(dim=1).mean() / reference.norm(dim=1).mean()),
            "radius": radius, "radius_z": (radius - mean) / deviation,
            "collapse": float(np.median(geometry.collapse_index(x.numpy(), tokens))),
            "effective_rank": geometry.effective_rank(x.numpy()),
            "frechet": geometry.frechet(x.numpy(), population), "mmd": mmd, "mmd_p": p}))
    if not torch.equal(start, end):
        mmd, p = geometry.mmd(start.numpy(), end.numpy())
        rows.append(("draw to trained", {"frechet": geometry.frechet(start.numpy(), end.numpy()),
                                         "mmd": mmd, "mmd_p": p}))
    return rows


@torch.no_grad()
def what_rows_say(rows: Tensor, layer: int, model: llama.Llama,
                  vocabulary: data.Vocabulary) -> dict[str, list[str]]:
    """The token of each row (n, D), by every reading: at the embeddings the nearest by cosine and
    by L2 distance, at a deeper layer the likeliest through the final norm and the head (the logit
    lens, nostalgebraist 2020)."""
    if layer > 0:
        h = rows.to(model.embeddings)
        ids = {"logit lens": model.logits(model.model.norm(h)).argmax(dim=-1).tolist()}
    else:
        ids, embeddings = vocabulary.ordinary, model.embeddings[vocabulary.ordinary]
        ids = {metric: [ids[i] for i in geometry.nearest(
            rows.numpy(), embeddings.float().cpu().numpy(), metric=metric)[0][:, 0]]
            for metric in ("cosine", "l2")}
    return {reading: [vocabulary.decode([i]) for i in tokens] for reading, tokens in ids.items()}


# --------------------------------------------------------------------------------------------------
# a collection's domains


def separation(file: Collection, layer: int) -> list[tuple[str, dict[str, float]]]:
    """How far apart the domains lie at a layer, pair by pair: area under the ROC of a linear probe,
    silhouette, Frechet distance, MMD^2 and its p (paper 4.4 and 4.5, the cluster
    claim)."""
    rows = {name: some(file.rows(layer, file.chosen(name))) for name in file.domains}
    out = []
    for a, b in combinations(file.domains, 2):
        x, y = rows[a], rows[b]
        mmd, p = geometry.mmd(x, y)
        out.append((f"{a} - {b}", {
            "auc": geometry.probe_auc(x, y), "silhouette": geometry.silhouette(
                np.concatenate([x, y]), np.repeat([0, 1], [len(x), len(y)])),
            "frechet": geometry.frechet(x, y), "mmd": mmd, "mmd_p": p}))
    return out


def paths_of(file: Collection, domain: str, most: int = MOST) -> tuple[list[Tensor], Tensor]:
    """The domain's unbroken stretches of text, as indices of the collection's rows, until they are
    `most` points; and the indices of all its rows."""
    index = file.chosen(domain)
    example, position = file.field["example"][index], file.field["position"][index]
    breaks = (example.diff() != 0) | (position.diff() != 1)
    paths = [p for p in index.tensor_split((breaks.nonzero()[:, 0] + 1).tolist()) if len(p) > 1]
    kept, count = [], 0
    for path in paths:
        if count >= most:
            break
        kept.append(path[:most])
        count += len(kept[-1])
    return kept, index


def walks(file: Collection, layer: int, domain: str,
          embeddings: Tensor | None = None) -> dict[str, float]:
    """Are a domain's texts local at a layer: their steps' mean length and spread against random
    walks over their own tokens, and over all token types alike; at the embeddings, given here
    (V, D), over the vocabulary (paper 4.1)."""
    paths, index = paths_of(file, domain)
    rows = file.rows(layer, index).float()
    place = torch.full((len(file.field["role"]),), -1)
    place[index] = torch.arange(len(index))
    if embeddings is not None and layer == 0:
        population, weights = embeddings.numpy(), None
    else:
        _, kind, count = file.field["token"][index].unique(return_inverse=True, return_counts=True)
        population, weights = rows.numpy(), (1.0 / count[kind]).numpy()
    return geometry.locality([rows[place[p]].numpy() for p in paths], population, weights)
