"""What the explorable page shows of finished runs: folders in, one dict of arrays and texts out.

    data = report.gather([(run, a, model, vocabulary, found), ...])     # found: references(...)
    run.write("report.html", viz.page(template, data).encode())

Every layer with rows has one map, which all runs share: at the token embeddings the vocabulary, at
a deeper layer a sample of the first run's reference there; of prefixes the keys and values that
attention makes of these. The principal plane is fitted on the
whole of it and rows are projected linearly; in the t-SNE of a sample every logged row is placed
among its nearest neighbours and the map stays as it is.

B rows of a map, M of them in its t-SNE, S snapshots of a run, P rows a snapshot (those of all
particles), D width.
"""

from __future__ import annotations

import re
from collections import defaultdict
from types import SimpleNamespace
from typing import Iterable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import geometry
import viz
from activations import ROLES
from references import Labels, Reference, columns, method_of, population
from settings import prior_name
from train import progress

EMBEDDED = 10_000  # rows of the vocabulary in a t-SNE
DEEP = 4_000  # rows of a deeper layer's map
ALL_DEEP = 60_000  # and of all deeper layers' maps together, so that the page stays small
SNAPSHOTS = 24
STATES = 30_000  # rows of all layers and snapshots of a run
PARTICLES = 8
NEAR = 5  # neighbours named of every row
WORK = 1e12  # multiplications spent on the neighbours of a map's own rows
PREDICTIONS = 2000
CURVE = 500  # points of a training curve
LONGEST = 200  # characters of a token
FEW = 50  # rows that are too few for a map
UNUSED = "in no reference"


class ReportError(ValueError):
    """Runs that cannot stand on one page: what, and the remedy, in one line."""


def gather(opened: Iterable[tuple]) -> dict:
    """The page's data of one or more runs. opened: (Run, settings, model, vocabulary,
    {layer: Reference}) of each, as a list or one after the other; the first one's model and
    references make the maps."""
    maps, runs, folders, tokens = {}, [], [], None
    for run, a, model, vocabulary, found in opened:
        folders.append(run)
        check(folders)
        config = run.config()
        tokens = tokens or [text_of(vocabulary, i) for i in range(vocabulary.size)]
        steps = shown_steps(run, a)
        missing = [i for i in found if i not in maps]
        for i, reference in backgrounds(a, model, vocabulary, found, missing).items():
            maps[i] = layer_map(i, *reference, model, len(missing)) | {
                "columns": found[i].columns}
        runs.append(about_run(run, a, config, steps)
                    | {"layers": paths(run, a, model, steps, maps)})
    return {"title": ", ".join(r["name"] for r in runs), "tokens": tokens, "runs": runs,
            "maps": [{k: v for k, v in maps[i].items() if k[0] != "_"} for i in sorted(maps)]}


def check(runs: list) -> None:
    """Can these stand on one page? Asks of their folders alone, before any model is loaded."""
    first = None
    for run in runs:
        weights, method = run.config().get("sha256", {}).get("model"), method_of(run.path)
        run.snapshots()
        width = next(iter(run.rows("prompt.safetensors").values())).shape[1]
        first = first or (run.path, width, weights, method)
        if method != first[3]:
            raise ReportError(f"{run.path} and {first[0]}: one trained rows and the other keys and "
                              "values, which lie in no common space: plot them apart")
        if width != first[1]:
            raise ReportError(f"{run.path} is of width {width} and {first[0]} of width {first[1]}: "
                              "one page shows runs of one model; plot them apart")
        if weights != first[2]:
            raise ReportError(f"{run.path} and {first[0]} were trained on other weights, whose "
                              "spaces are not the same: plot them apart")


def prompts(run, a: SimpleNamespace, step: int) -> list[dict[int, Tensor]]:
    """The rows {layer: (n, D)} shown of a snapshot: the first particles', or the mean's."""
    name = f"prompts/{step:06d}.safetensors"
    return run.particles(name)[:PARTICLES] if a.posterior == "svgd" else [run.rows(name)]


def shown_steps(run, a: SimpleNamespace) -> list[int]:
    """At most SNAPSHOTS of a run's, ends included, and fewer if each has very many rows."""
    steps = run.snapshots()
    rows = sum(len(x) for each in prompts(run, a, steps[0]) for x in each.values())
    most = min(len(steps), SNAPSHOTS, max(STATES // rows, 2))
    return [steps[i] for i in np.linspace(0, len(steps) - 1, most).round().astype(int)]


# --------------------------------------------------------------------------------------------------
# maps


def backgrounds(a: SimpleNamespace, model, vocabulary, found: dict[int, Reference],
                layers: list[int]) -> dict[int, tuple[Tensor, Labels, str]]:
    """Rows (N, D) of each layer's map, what they are, and their name. Tokens are the vocabulary's,
    with the data of the reference that use them as their domain."""
    out = {}
    few = [i for i in layers if i and (found[i].labels is None or len(found[i].rows) < FEW)]
    instead = population(a, model, vocabulary, few, "vocab") if few else {}
    for i in layers:
        labels = found[i].labels
        if i == 0:
            ids = torch.tensor(vocabulary.ordinary)
            used = defaultdict(set)
            for part in labels or []:
                for token, domain in set(zip(part.token.tolist(), part.domain)):
                    used[token].add(domain)
            kinds = [kind_of(text_of(vocabulary, t)) for t in ids.tolist()]
            domain = [" and ".join(sorted(used[t])) or UNUSED if used else "vocabulary"
                      for t in ids.tolist()]
            out[0] = (model.embeddings[ids].float().cpu(), Labels(ids, kinds, domain),
                      "token embeddings of the vocabulary")
        elif i in instead:
            rows, name, labels = instead[i]
            out[i] = (rows, labels, name)
        else:
            out[i] = (found[i].rows, Labels(torch.cat([part.token for part in labels]), *(
                [v for part in labels for v in part[k]] for k in (1, 2))), found[i].name)
        if found[i].columns and (i == 0 or i in instead):
            rows, labels, name = out[i]
            out[i] = (columns(model, i, rows), labels, f"keys and values of {name}")
    return out


def layer_map(i: int, rows: Tensor, labels: Labels, name: str, model, layers: int) -> dict:
    """Coordinates and neighbours of a layer's rows (N, D), of the sample's if they are many; keys
    that begin with _ are for placing other rows on it and not for the page."""
    seed = 0
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    plane = viz.pca(rows.numpy())
    norm = rows.norm(dim=1).mean().item()
    total = len(rows)
    if i:  # a sample is enough of activations; every token counts
        kept = order[:min(DEEP, ALL_DEEP // layers)].sort().values
        rows, labels = rows[kept], labels.take(kept)
        sample = np.arange(len(rows))
    else:
        sample = order[:EMBEDDED].sort().values.numpy()
    x, out = rows.numpy(), {}
    if len(sample) >= 12 and np.ptp(x[sample], axis=0).max() > 0:
        flat = viz.tsne(x[sample], seed=seed)
        out["tsne"] = {"points": flat.points, "perplexity": float(flat.perplexity),
                       "kl": float(flat.kl), "seed": seed, "recall": recall(x[sample], flat.points)}
        if len(sample) < len(x):
            out["tsne"]["sample"] = sample
    # of as many as time and the page's size allow
    asked = sample[:max(int(WORK / x.size), 1)]
    near, cosine = neighbours(rows.to(model.embeddings.device), torch.from_numpy(asked))
    (roles, role), (domains, domain) = numbered(labels.role), numbered(labels.domain)
    return out | {
        "layer": i, "name": name, "rows": total, "width": x.shape[1],
        "token": labels.token.numpy(), "roles": roles, "role": role, "domains": domains,
        "domain": domain, "pca": viz.project(plane, x), "explained": plane.explained.tolist(),
        "norm": np.linalg.norm(x, axis=1) / norm, "asked": asked, "near": near, "cosine": cosine,
        "_x": x, "_plane": plane, "_sample": sample, "_norm": norm}


def neighbours(rows: Tensor, asked: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The NEAR others of rows (N, D) nearest by cosine to those asked for (m,): indices and cosines
    (m, NEAR). In float32, for they are many."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    found = []
    for some in asked.to(rows.device).split(256):
        cosine = unit[some] @ unit.T
        cosine[torch.arange(len(some)), some] = -2.0  # no row is its own neighbour
        found.append(cosine.topk(min(NEAR, len(rows) - 1)))
    return (torch.cat([f.indices for f in found]).cpu().numpy(),
            torch.cat([f.values for f in found]).cpu().numpy())


def recall(x: np.ndarray, points: np.ndarray, k: int = 10, queries: int = 1000) -> float:
    """The share of the k nearest rows (N, D) that are also among the k nearest points (N, 2)."""
    k = min(k, len(x) - 1)
    some = np.linspace(0, len(x) - 1, min(queries, len(x))).astype(int)
    a, b = (geometry.nearest(v[some], v, k + 1)[0] for v in (x, points.astype(np.float32)))
    return float(np.mean([len(set(p) & set(q) - {i}) / k for p, q, i in zip(a, b, some)]))


def numbered(names: list[str]) -> tuple[list[str], np.ndarray]:
    """Each name once, in the order of a legend, and where among them all are."""
    order = {name: i for i, name in enumerate((*ROLES, *KINDS))} | {UNUSED: 99}
    unique = sorted(set(names), key=lambda n: (order.get(n, 0), n))
    place = {name: i for i, name in enumerate(unique)}
    return unique, np.array([place[n] for n in names])


# --------------------------------------------------------------------------------------------------
# runs


def paths(run, a: SimpleNamespace, model, steps: list[int], maps: dict[int, dict]) -> dict:
    """Where the rows of each layer are at each step: (S, P, ...) arrays by layer."""
    states, out = [prompts(run, a, step) for step in steps], {}
    for i in progress(sorted(states[0][0]), desc="layers", leave=False):
        x = torch.stack([torch.cat([rows[i] for rows in each]) for each in states])  # (S, P, D)
        S, P, D = x.shape
        m, flat = maps[i], x.reshape(S * P, D).numpy()
        near, cosine = geometry.nearest(flat, m["_x"], min(NEAR, len(m["_x"])), metric="cosine")
        found = {"pca": viz.project(m["_plane"], flat), "near": near, "cosine": cosine,
                 "norm": np.linalg.norm(flat, axis=1) / m["_norm"],
                 "moved": (x - x[0]).norm(dim=2).flatten().numpy()}
        if "tsne" in m:
            found["tsne"] = viz.embed(flat, m["_x"][m["_sample"]], m["tsne"]["points"])
        if i and not m["columns"]:
            found["lens"] = lens(model, torch.from_numpy(flat))
        if a.posterior == "gaussian":
            sd = torch.stack([load_file(run.path / f"prompts/{step:06d}.safetensors")[
                f"layers.{i}.sd"] for step in steps])
            c = torch.from_numpy(m["_plane"].components).float()  # (2, D)
            found["spread"] = torch.stack([(sd.square() * c[j] * c[k]).sum(2) for j, k in (
                (0, 0), (0, 1), (1, 1))], dim=2).reshape(S * P, 3).numpy()
        out[str(i)] = {k: v.reshape(S, P, *v.shape[1:]) for k, v in found.items()}
    return out


@torch.no_grad()
def lens(model, rows: Tensor, k: int = 3) -> np.ndarray:
    """The k likeliest tokens (n, k) of rows (n, D) read through the final norm and the head."""
    return torch.cat([model.logits(model.model.norm(x.to(model.embeddings))).topk(k).indices.cpu()
                      for x in rows.split(64)]).numpy()


def about_run(run, a: SimpleNamespace, config: dict, steps: list[int]) -> dict:
    """Settings, scores and predictions of a run, and its training curve, thinned by means."""
    metrics = run.metrics()
    train = [(m["step"], m["loss"]) for m in metrics if m["split"] == "train"]
    parts = np.array_split(np.array(train, dtype=float).reshape(-1, 2), min(CURVE, len(train) or 1))
    curve = [p.mean(axis=0).round(5).tolist() for p in parts if len(p)]
    predictions = run.predictions()
    count = a.particles if a.posterior == "svgd" else 1
    return {"name": run.path.resolve().name, "prior": prior_name(a), "posterior": a.posterior,
            "steps": steps, "particles": min(count, PARTICLES), "all_particles": count,
            "curve": curve, "evals": [m for m in metrics if m["split"] == "eval"],
            "beside": {m["split"]: m for m in metrics if m["split"] in ("baseline", "text")},
            "text": a.text, "predictions": predictions[:PREDICTIONS],
            "all_predictions": len(predictions), "config": config}


# --------------------------------------------------------------------------------------------------
# tokens


def text_of(vocabulary, i: int) -> str:
    """A token as a text has it, its space in front included; bytes that are no character as
    <0xE2>."""
    piece = vocabulary.tokenizer.id_to_token(i)
    if piece is None:
        return f"<{i}>"
    text = piece.replace("\u2581", " ") if "\u2581" in piece else vocabulary.decode([i])
    if "\ufffd" in text and all(c in BYTES for c in piece):
        text = "".join(f"<0x{BYTES[c]:02X}>" for c in piece)
    return (text or piece)[:LONGEST]


def byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTES = byte_letters()


KINDS = ("word", "part of a word", "number", "sign", "white space", "bytes")


def kind_of(text: str) -> str:
    """What part of a text a token is, one of KINDS."""
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
