"""A run's own pictures: its layers at a page's or a terminal's width, and its curves.

    names = draw_run(run, a, found)             # figures/layer-NN.svg, found {layer: Reference}
    print(text_picture(run, a, found))          # the same in characters
    svg = curves([run, other])                  # what runs logged, of one setting as one line

A plane is always fitted on the reference alone, and rows are put into it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from torch import Tensor

import viz
from references import Reference
from run import Run
from settings import prior_name, spec_name, stored_settings


def layer_figure(i: int, reference: Reference, series: list[tuple[str, Tensor]],
                 caption: str) -> str:
    """The principal plane of a layer's reference, the draw and, if there is a second series,
    where its rows went."""
    points = [rows.numpy() for _, rows in series]
    name, columns, reference = reference.name, reference.columns, reference.rows.numpy()
    # a text prompt of a token or two spans no plane of its own
    plane = viz.pca(reference if len(reference) > 2 else np.concatenate([reference, *points]))
    flat = [viz.project(plane, rows) for rows in points]
    looks = ((viz.BLUE, True), (viz.VERMILION, False))
    marks = [viz.Points(label, xy, *look) for (label, _), xy, look in zip(series, flat, looks)]
    if len(flat) == 2:
        marks.insert(0, viz.Arrows("from start to end", *flat))
    return viz.figure([viz.Panel([viz.Cloud(name, viz.project(plane, reference)), *marks],
                                 viz.axis_names(plane))],
                      f"Layer {i}, {'keys and values' if columns else 'its input'}"
                      if i or columns else "Token embeddings", caption)


def draw_run(run: Run, a: SimpleNamespace, found: dict[int, Reference]) -> list[str]:
    """figures/layer-NN.svg for every layer that owns rows."""
    (start, end), names = run.start_and_end(), []
    steps = max((m["step"] for m in run.metrics() if "step" in m), default=0)
    for i, reference in found.items():
        count, norm = len(reference.rows), reference.rows.norm(dim=1).mean()
        moved = (end[i] - start[i]).norm(dim=1).mean().item()
        caption = (f"{run.path.name}: prior {prior_name(a)}, seed {a.seed}, {steps} steps on "
                   f"{spec_name(a.data)}, model {Path(a.model).name}. {len(end[i])} rows in the "
                   f"principal plane of the reference ({reference.name}, {count} rows), fitted "
                   f"without them. A row moved {moved:.3g} on average; mean norms: reference "
                   f"{norm:.3g}, draw {start[i].norm(dim=1).mean():.3g}, "
                   f"trained {end[i].norm(dim=1).mean():.3g}.")
        svg = layer_figure(i, reference,
                           [("prior draw", start[i]), ("trained rows", end[i])], caption)
        names.append(f"figures/layer-{i:02d}.svg")
        run.write(names[-1], svg.encode())
    return names


def text_picture(run: Run, a: SimpleNamespace, found: dict[int, Reference]) -> str:
    """The same in characters, for a terminal."""
    columns, lines = shutil.get_terminal_size((80, 30))
    (start, end), out = run.start_and_end(), []
    for i, reference in found.items():
        plane = viz.pca(reference.rows.numpy())
        out += [f"{run.path}, layer {i}: . {reference.name} ({len(reference.rows)} rows), o prior "
                f"draw, # trained; {', '.join(viz.axis_names(plane))}",
                viz.braille(viz.project(plane, reference.rows.numpy()),
                            [(letter, viz.project(plane, rows[i].numpy()))
                             for letter, rows in (("o", start), ("#", end))],
                            min(columns, 120) - 1, min(lines - 4, 40))]
    return "\n".join(out)


def curves(runs: list[Run]) -> str:
    """Training's and evaluation's loss and the score, step by step. Runs that differ in their seed
    alone are one curve, the mean, in a band of 95 % confidence."""
    groups: dict[str, list[tuple[Run, SimpleNamespace]]] = {}
    for run in runs:
        a = SimpleNamespace(**stored_settings(run.config()))
        kind = repr({k: v for k, v in sorted(vars(a).items()) if k not in ("seed", "out")})
        groups.setdefault(kind, []).append((run, a))
    losses, scores, plain, said, kinds = [], [], [], [], []
    for (_, group), colour in zip(groups.items(), 99 * PALETTE):
        a, logs = group[0][1], [run.metrics() for run, _ in group]
        seeds = ", ".join(str(b.seed) for _, b in group)
        name = f"{prior_name(a)} on {spec_name(a.data)}"
        if any(name == mark.name for mark in scores):
            name = group[0][0].path.name
        score = "accuracy" if any("accuracy" in m for m in logs[0]) else "f1"
        kinds.append("F1" if score == "f1" else score)
        steps, train = by_step(logs, "train", "loss")
        if len(steps):
            width = max(1, len(steps) // 40)  # a batch's loss is noise: its mean over as many steps
            kept = len(steps) // width * width
            steps = steps[:kept].reshape(-1, width).mean(1)
            train = train[:, :kept].reshape(len(train), -1, width).mean(2)
            losses.append(banded(f"{name}, training", steps, train, colour))
        steps, held = by_step(logs, "eval", "loss")
        losses.append(banded(name, steps, held, colour, dots=True))
        steps, value = by_step(logs, "eval", score)
        scores.append(banded(name, steps, value, colour, dots=True))
        base = [m[score] for log in logs for m in log if m["split"] == "baseline" and score in m]
        plain += [viz.Curve("no prompt", np.array([0, max(steps[-1], 1)]),
                            np.full(2, np.mean(base)), None, None, viz.GREY)] if base else []
        said.append(f"{name}: seed{'s' * (len(group) > 1)} {seeds}, "
                    f"{', '.join(run.path.name for run, _ in group)}")
    losses = [m._replace(name="") if m.name.endswith(", training") else m for m in losses]
    band = "Bands: 95 % confidence of the mean over seeds. " * any(
        len(g) > 1 for g in groups.values())
    return viz.figure([
        viz.Panel(losses, ("step", "loss, nats a token"), equal=False),
        viz.Panel([*plain[:1] * (len(set(kinds)) == 1), *scores],
                  ("step", f"{' or '.join(dict.fromkeys(kinds))}, percent"), equal=False)],
        "Loss and score",
        f"Dots: evaluation; lines without dots: training, averaged over a fortieth of the steps. "
        f"{band}{'; '.join(said)}.")


PALETTE = (viz.VERMILION, viz.BLUE, viz.GREEN, viz.PURPLE, viz.ORANGE, viz.SKY)


def by_step(logs: list[list[dict]], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) that all logs have, and a log's values in each row (logs, T)."""
    found = [{m["step"]: m[key] for m in log if m["split"] == split and key in m} for log in logs]
    steps = sorted(set.intersection(*map(set, found)))
    return np.array(steps, float), np.array([[f[s] for s in steps] for f in found], float)


def banded(name: str, x: np.ndarray, values: np.ndarray, colour: str,
           dots: bool = False) -> viz.Curve:
    """The mean of curves (k, T) and, of two or more, its interval of 95 % (Student's)."""
    mean, k = values.mean(0), len(values)
    if k == 1:
        return viz.Curve(name, x, mean, None, None, colour, dots)
    # 97.5 % points of Student's t for 1 to 9 degrees of freedom, then the normal's
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[k - 2] if k <= 10 else 1.96
    half = t * values.std(0, ddof=1) / np.sqrt(k)
    return viz.Curve(name, x, mean, mean - half, mean + half, colour, dots)


def line(curve: list[dict], caption: str) -> str:
    """Scores along the line between two prompts, a curve a task."""
    panels = []
    for keys, label in ((("loss",), "loss, nats a token"),
                        (("accuracy", "f1"), "accuracy or F1, percent")):
        marks = []
        for task, colour in zip(dict.fromkeys(m["data"] for m in curve), 99 * PALETTE):
            mine = [m for m in curve if m["data"] == task]
            key = next(k for k in keys if k in mine[0])
            x, y = (np.array([m[k] for m in mine]) for k in ("t", key))
            marks.append(viz.Curve(task, x, y, None, None, colour, True))
        panels.append(viz.Panel(marks, ("t", label), equal=False))
    return viz.figure(panels, "From one prompt to another", caption)


def attention(rows: list[tuple[str, dict[str, float]]], caption: str) -> str:
    """What a prompt does to attention, layer by layer."""
    x = np.array([int(name.split()[1]) for name, _ in rows], float)
    curve = lambda name, key, colour: viz.Curve(
        name, x, np.array([numbers[key] for _, numbers in rows]), None, None, colour, True)
    panels = [[curve("share of attention to the prompt", "mass", viz.VERMILION),
               curve("shift of attention among content", "shift", viz.BLUE)],
              [curve("one direction's share of the bias", "one", viz.GREEN),
               curve("the same, of a head's", "one_head", viz.PURPLE),
               curve("bias over all that attention adds", "bias", viz.ORANGE)]]
    return viz.figure([viz.Panel(marks, ("layer", ""), equal=False, frame=np.array([
        (x.min(), 0.0), (max(x.max(), x.min() + 1), 1.0)])) for marks in panels],
        "What the prompt does to attention", caption)
