"""Measures of finished runs, of priors and of collections: geometry.py on what the others hold.

Most return rows of a table, (name, {key: number}); TITLES has the headings.

    rows = measure_rows(start, end, reference, priors.Fitted.fit(reference))

n prompt rows, N rows of a population, D width. `paper` is Exploring Embedding Priors in
Prompt-Tuning (arXiv 2412.18582).
"""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import data
import geometry
import llama
import priors
from activations import Collection
from references import Reference
from settings import UserError, imported, prior_name, text_name

MOST = 2000  # rows of a population in measures that want all pairs

TITLES = {
    "moved": "moved", "distance": "distance", "norm_ratio": "norm ratio", "radius": "radius",
    "radius_z": "radius z",
    "collapse": "collapse", "effective_rank": "rank", "variance_ratio": "variance",
    "frechet": "Frechet", "precision": "precision", "recall": "recall", "mmd": "MMD", "mmd_p": "p",
    "knn": "kNN", "auc": "AUC", "silhouette": "silhouette",
    "mass": "mass", "content": "content", "shift": "shift", "bias": "bias", "one": "one",
    "one_head": "one, head",
    "step": "step", "matched_step": "matched", "p_matched_step": "p", "uniform_step": "uniform",
    "p_uniform_step": "p", "spread": "spread", "matched_spread": "matched",
    "p_matched_spread": "p", "uniform_spread": "uniform", "p_uniform_spread": "p"}


SCORES = {"loss": "loss", "exact_match": "exact match", "precision": "precision",
          "recall": "recall", "f1": "F1", "accuracy": "accuracy", "accuracy_value": "same value",
          "calibration_error": "ECE"}


def table(rows: list[tuple[str, dict[str, float]]], titles: dict[str, str] = SCORES) -> str:
    """Names and numbers as aligned columns, those of titles {key: heading} that any row has. A
    score has one decimal, anything else three digits."""
    keys = [k for k in titles if any(k in numbers for _, numbers in rows)]

    def cell(key: str, numbers: dict[str, float]) -> str:
        if key not in numbers:
            return ""
        if key in SCORES:
            return f"{numbers[key]:.3f}" if key == "loss" else f"{numbers[key]:.1f}"
        return f"{numbers[key]:#.3g}".rstrip(".")

    lines = [["", *(titles[k] for k in keys)]]
    lines += [[name, *(cell(k, numbers) for k in keys)] for name, numbers in rows]
    wide = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(f"{first:<{wide[0]}}" + "".join(
        f"  {text:>{max(w, 6)}}" for text, w in zip(rest, wide[1:])) for first, *rest in lines)


def final_table(a: SimpleNamespace, metrics: list[dict]) -> str:
    names = {"baseline": "no prompt", "text": text_name(a.text)}
    evals = [m for m in metrics if m["split"] == "eval"]
    if not evals and imported(a):
        return "imported: `eval` scores it"
    if not evals:
        raise UserError("the run has no evaluation in its metrics.jsonl: go on with it by "
                        "train --out RUN --resume")
    together = f", {a.particles} particles together" if a.posterior == "svgd" else ""
    end = f"{prior_name(a)} prior, {evals[-1]['step']} steps{together}"
    return table([(names[m["split"]], m) for m in metrics if m["split"] in names]
                 + [(f"{prior_name(a)} prior, untrained", evals[0])]
                 + [(end, m) for m in evals[-1:] if m["step"]],
                 {k: title for k, title in SCORES.items() if k != "calibration_error"})


def some(x: Tensor, count: int = MOST) -> np.ndarray:
    """At most `count` of the rows (N, D), always the same ones, as float32."""
    if len(x) > count:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]]
    return x.float().cpu().numpy()


def measure(keys: str, call: Callable, *arguments, **options) -> dict[str, float]:
    """{key: number}; empty if the data are too few or too much alike to be measured, as one row has
    no spread and copies no distance."""
    try:
        values = call(*arguments, **options)
    except geometry.GeometryError:
        return {}
    return dict(zip(keys.split(), map(float, np.atleast_1d(values))))


# --------------------------------------------------------------------------------------------------
# a prior against what it was fitted on


def held_out(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> the rows to fit on, and a fifth of all, always the same one, to judge by. At
    random, for texts have rhythm: every fifth token of a list of sums is no fair sample."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    return x[order[len(x) // 5:]], x[order[:len(x) // 5]]


def judge_prior(prior: type, parts: list[Tensor], options: dict, n: int,
                seed: int) -> list[tuple[str, dict[str, float]]]:
    """Draws of a prior, n rows at a time, against a fifth of the reference that it was not fitted
    on; beside them the fitted Gaussian's draws, and rows of the reference itself, than which no
    prior can be nearer.

    variance: total variance over the held-out rows'; rank at 95 % of the variance; Frechet
    distance; precision and recall (Kynkaanniemi et al. 2019); MMD^2 and its p; kNN: median distance
    to the third nearest row that was fitted on, of at most 2000."""
    divided = [held_out(x) for x in parts]
    fit, held = [x for x, _ in divided], some(torch.cat([x for _, x in divided]))
    count, rows, fitted_on = len(held), [], some(torch.cat(fit))

    def far(x):
        return float(np.median(geometry.nearest(x, fitted_on, 3)[1][:, 2]))

    def draws(kind, references, options):
        fitted, generator = kind.fit(*references, **options), torch.Generator().manual_seed(seed)
        if kind is priors.Vocab:  # without replacement
            return fitted.sample(min(count, len(references[0])), generator).float().numpy()
        return torch.cat([fitted.sample(n, generator)
                          for _ in range(-(-count // n))])[:count].float().numpy()

    sets = {"prior's draws": draws(prior, fit if prior.several else [torch.cat(fit)], options)}
    if prior is not priors.Fitted:
        sets["fitted Gaussian's"] = draws(priors.Fitted, [torch.cat(fit)], {})
    sets["reference rows"] = some(torch.cat(fit), count)
    rows.append(("held-out rows", {"effective_rank": geometry.effective_rank(held),
                                   "knn": far(held)}))
    for name, x in sets.items():
        precision, recall = geometry.precision_recall(x, held)
        mmd, p = geometry.mmd(x, held)
        rows.append((name, {
            "variance_ratio": geometry.total_variance_ratio(x, held),
            "effective_rank": geometry.effective_rank(x), "frechet": geometry.frechet(x, held),
            "precision": 100 * precision, "recall": 100 * recall, "mmd": mmd, "mmd_p": p,
            **({} if name == "reference rows" else {"knn": far(x)})}))
    return rows


# --------------------------------------------------------------------------------------------------
# a run's rows


def measure_rows(start: Tensor, end: Tensor, reference: Tensor, fitted: priors.Fitted,
                 tokens: Tensor | None = None) -> list[tuple[str, dict[str, float]]]:
    """A layer's prior draw (n, D) and trained rows (n, D) in its reference (N, D), and fitted, the
    reference's Gaussian.

    moved: mean distance from the draw; distance: mean distance to 1000 random rows of the
    reference, which the first row has of the reference itself (paper 4.2); radius: mean Mahalanobis
    radius, and how many standard deviations of the chi law it lies from that law's mean; collapse:
    median collapse index among tokens (V, D), without them among the reference's distinct rows;
    Frechet and MMD^2 with its p: to the reference, and in the last row between draw and trained
    rows."""
    population, rows = some(reference), []
    tokens = np.unique(reference.numpy(), axis=0) if tokens is None else tokens.numpy()
    mean, deviation = geometry.chi_law(reference.shape[1])
    others = some(reference, 1000)

    def distance(x):
        return float(np.mean([np.linalg.norm(others - row, axis=1).mean() for row in x]))

    rows.append(("reference", {"distance": distance(population[-20:]), **measure(
        "effective_rank", geometry.effective_rank, population)}))
    for name, x in (("prior draw", start), ("trained", end)):
        radius, norms = fitted.whiten(x).norm(dim=1).mean().item(), x.norm(dim=1).mean()
        rows.append((name, {
            "moved": geometry.displacement(start.numpy(), x.numpy()).mean(),
            "distance": distance(x.numpy()),
            "norm_ratio": float(norms / reference.norm(dim=1).mean()),
            "radius": radius, "radius_z": (radius - mean) / deviation,
            **measure("collapse", lambda: np.median(geometry.collapse_index(x.numpy(), tokens))),
            **measure("effective_rank", geometry.effective_rank, x.numpy()),
            **measure("frechet", geometry.frechet, x.numpy(), population),
            **measure("mmd mmd_p", geometry.mmd, x.numpy(), population)}))
    if not torch.equal(start, end):
        rows.append(("draw to trained", {
            **measure("frechet", geometry.frechet, start.numpy(), end.numpy()),
            **measure("mmd mmd_p", geometry.mmd, start.numpy(), end.numpy())}))
    return rows


@torch.no_grad()
def what_rows_say(rows: Tensor, layer: int, reference: Reference, model: llama.Llama,
                  vocabulary: data.Vocabulary) -> dict[str, list[str]]:
    """The token of each row (n, D), by every reading: at the embeddings the nearest by cosine and
    by L2 distance, at a deeper layer the likeliest through the final norm and the head (the logit
    lens, nostalgebraist 2020). Of keys and values the tokens of the nearest in the reference, if
    its rows are tokens'."""
    if reference.columns:
        tokens = torch.cat([part.token for part in reference.labels or []] or [rows[:0]])
        ids = {metric: tokens[geometry.nearest(rows.numpy(), reference.rows.numpy(), metric=metric
                                               )[0][:, 0]].tolist()
               for metric in ("cosine", "l2") if len(tokens)}
    elif layer > 0:
        h = rows.to(model.embeddings)
        ids = {"logit lens": model.logits(model.model.norm(h)).argmax(dim=-1).tolist()}
    else:
        ids, embeddings = vocabulary.ordinary, model.embeddings[vocabulary.ordinary]
        ids = {metric: [ids[i] for i in geometry.nearest(
            rows.numpy(), embeddings.float().cpu().numpy(), metric=metric)[0][:, 0]]
            for metric in ("cosine", "l2")}
    return {reading: [vocabulary.decode([i]) for i in tokens] for reading, tokens in ids.items()}


@torch.no_grad()
def attention(model: llama.Llama, past: llama.Past, texts: list[list[int]]
              ) -> list[tuple[str, dict[str, float]]]:
    """What a prompt before token rows does to attention, at each layer where it has columns: a
    prefix can only scale what content pays to content, and add a bias of few directions (Petrov
    et al. 2024, arXiv 2310.19698).

    mass: the share that goes to the prompt, mean over heads and tokens. content: the largest
    difference that the prompt makes to what a token pays to each other, renormalised over content:
    0 at the first such layer, whose input is the same with and without. shift: mean total
    variation between the two. bias: mean norm of what the prompt's values add, over that of all
    that attention adds. one: the share of that bias's square over positions that lies in one
    direction, of the layer's output and, mean over heads, of a head's."""
    found: dict[int, list[dict]] = {}
    for ids in texts:
        inputs = [{}, {}]
        for start, x in zip((None, past), inputs):
            model(torch.tensor([ids], device=model.embeddings.device), start, tap=x.__setitem__)
        for i, layer in enumerate(model.model.layers):
            if past.keys[i] is None:
                continue
            (plain, _), (scores, v) = (_scores(model, layer, x[i], k, n) for x, k, n in zip(
                inputs, (None, past.keys[i]), (0, int(past.position))))
            n = past.keys[i].shape[2]
            w, w0 = scores.softmax(dim=-1), plain.softmax(dim=-1)  # (H, T, n + T), (H, T, T)
            mass = w[..., :n].sum(dim=-1)
            content = w[..., n:] / w[..., n:].sum(dim=-1, keepdim=True)
            group = len(w) // past.values[i].shape[1]
            prompt = past.values[i][0].repeat_interleave(group, 0).float()  # (H, n, hd)
            value = v.transpose(0, 1).repeat_interleave(group, 0)  # (H, T, hd)
            heads = w[..., :n] @ prompt
            out = layer.self_attn.o_proj.weight.float()
            add = lambda h: h.transpose(0, 1).flatten(1) @ out.T  # (H, T, hd) -> (T, D)
            found.setdefault(i, []).append({
                "mass": mass.mean(), "content": (content - w0).abs().max(),
                "shift": (content - w0).abs().sum(dim=-1).mean() / 2,
                "bias": add(heads).norm(dim=1).mean()
                / (add(heads + w[..., n:] @ value)).norm(dim=1).mean(),
                "add": add(heads), "heads": heads})
    rows = []
    for i, each in found.items():
        whole = torch.cat([e.pop("add") for e in each])
        heads = torch.cat([e.pop("heads") for e in each], dim=1)
        one = lambda x: (s := torch.linalg.svdvals(x) ** 2)[..., 0] / s.sum(dim=-1)
        numbers = {k: float((torch.stack([e[k] for e in each])).max() if k == "content" else
                            torch.stack([e[k] for e in each]).mean()) for k in each[0]}
        rows.append((f"layer {i}", {**numbers, "one": float(one(whole)),
                                    "one_head": float(one(heads).mean())}))
    return rows


def _scores(model, layer, x: Tensor, k0: Tensor | None, position: int):
    """Attention's logits (H, T, n + T) of a layer with input x (T, D), and its values (T, G, hd),
    in fp32."""
    T, hd = len(x), layer.hd
    cos, sin = model._angles(position + torch.arange(T, device=x.device))
    h = layer.input_layernorm(x)
    q, k, v = (layer.self_attn[name](h).unflatten(-1, (-1, hd)) for name in (
        "q_proj", "k_proj", "v_proj"))
    q, k = (llama.rotate(t, cos, sin).transpose(0, 1).float() for t in (q, k))
    k = k if k0 is None else torch.cat((k0[0].float(), k), dim=1)
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * hd**-0.5
    hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    hidden = torch.nn.functional.pad(hidden, (k.shape[1] - T, 0))
    return scores.masked_fill_(hidden, -torch.inf), v.float()


# --------------------------------------------------------------------------------------------------
# a collection's domains


def separation(file: Collection, layer: int) -> list[tuple[str, dict[str, float]]]:
    """How far apart the domains lie at a layer, pair by pair: Frechet distance and silhouette of
    all rows, area under the ROC of a linear probe and MMD^2 with its p of one row an example, for
    tokens of one text are no independent sample (paper 4.4 and 4.5, the cluster claim)."""
    rows = {name: some(file.rows(layer, file.chosen(name))) for name in file.domains}
    apart = {name: some(file.rows(layer, one_an_example(file, name))) for name in file.domains}
    return [(f"{a} - {b}", {
        **measure("frechet", geometry.frechet, rows[a], rows[b]),
        **measure("mmd mmd_p", geometry.mmd, apart[a], apart[b]),
        **measure("auc", geometry.probe_auc, apart[a], apart[b]),
        **measure("silhouette", lambda: geometry.silhouette(
            np.concatenate([rows[a], rows[b]]),
            np.repeat([0, 1], [len(rows[a]), len(rows[b])])))})
        for a, b in combinations(file.domains, 2)]


def one_an_example(file: Collection, domain: str) -> Tensor:
    """Indices of one row of each of a domain's examples, drawn at random, the same ones always."""
    index = file.chosen(domain)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    _, kind = file.field["example"][index].unique(return_inverse=True)
    first = torch.full((int(kind.max()) + 1 if len(kind) else 0,), len(kind))
    return index[first.scatter_reduce(0, kind, torch.arange(len(kind)), "amin")]


def paths_of(file: Collection, domain: str, most: int = MOST,
             roles: tuple[str, ...] = ()) -> tuple[list[Tensor], Tensor]:
    """The domain's unbroken stretches of text in these roles (none: all), as indices of the
    collection's rows, until they are `most` points; and the indices of all its rows."""
    index = file.chosen(domain, roles)
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


def walks(file: Collection, layer: int, domain: str, embeddings: Tensor | None = None,
          roles: tuple[str, ...] = ()) -> dict[str, float]:
    """Are a domain's texts (in these roles; none: all) local at a layer: their steps' mean length
    and spread against random walks over their own tokens, and over all token types alike; at the
    embeddings, given here (V, D), over the vocabulary (paper 4.1)."""
    paths, index = paths_of(file, domain, roles=roles)
    rows = file.rows(layer, index).float()
    place = torch.full((len(file.field["role"]),), -1)
    place[index] = torch.arange(len(index))
    if embeddings is not None and layer == 0:
        population, weights = embeddings.numpy(), None
    else:
        _, kind, count = file.field["token"][index].unique(return_inverse=True, return_counts=True)
        population, weights = rows.numpy(), (1.0 / count[kind]).numpy()
    try:
        return geometry.locality([rows[place[p]].numpy() for p in paths], population, weights)
    except geometry.GeometryError:  # no two tokens stand side by side
        return {}
