"""Pictures of finished runs: each layer for a page or a terminal, and curves of what was logged.

    names = draw_run(run, settings, by_layer)      # writes figures/layer-NN.svg
    print(text_picture(run, by_layer))             # the same in characters
    svg = curves([run, other])                     # runs that differ in their seed alone: one curve

by_layer {layer: Reference} is what a run's prompt lies among. A plane is fitted on the reference
alone and the prompt's rows are projected into it, so that they cannot bend it.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

import viz
from lab.console import SCORES, counted
from lab.folder import Run, layer_picture
from lab.populations import Reference
from lab.settings import Settings, spec_name
from lab.statistics import interval

PALETTE = (viz.VERMILION, viz.BLUE, viz.GREEN, viz.PURPLE, viz.ORANGE, viz.SKY)
LOOKS = tuple(zip(PALETTE, cycle(("circle", *viz.SHAPES))))  # colour and shape of a curve's dots


# --------------------------------------------------------------------------------------------------
# layers


def draw_run(run: Run, settings: Settings, by_layer: dict[int, Reference]) -> list[str]:
    """Write figures/layer-NN.svg for every layer of a run's prompt -> the files' names."""
    start, end = run.start_and_end()
    steps = run.last_step() if run.step is None else run.step
    names = []
    for i, reference in by_layer.items():
        count = len(reference.rows)
        caption = (f"{counted(len(end[i]), 'row')} of {run.path.name} in the principal plane of "
                   f"the reference ({reference.name}, {counted(count, 'row')}), which is fitted "
                   f"without them. Prior {settings.prior_name}, seed {settings.seed}, "
                   f"{counted(steps, 'step')} on "
                   f"{spec_name(settings.data.data)}, model {Path(settings.model.model).name}.")
        numbers = {"distance moved, mean": float((end[i] - start[i]).norm(dim=1).mean()),
                   "norm of the reference, mean": _mean_norm(reference.rows),
                   "norm of the draw, mean": _mean_norm(start[i]),
                   "norm of the trained rows, mean": _mean_norm(end[i])}
        series = [("prior draw", start[i]), ("trained rows", end[i])]
        name = layer_picture(i)
        run.write(name, layer_figure(i, reference, series, caption, numbers).encode())
        names.append(name)
    return names


def _mean_norm(rows: Tensor) -> float:
    return float(rows.norm(dim=1).mean())


def layer_figure(i: int, reference: Reference, series: list[tuple[str, Tensor]], caption: str,
                 table: dict[str, float] | None = None) -> str:
    """SVG of one or two sets of rows, (name, (n, W)) each, in the principal plane of layer i's
    reference. The first set is hollow; arrows lead from its rows to those of the second."""
    points = [rows.numpy() for _, rows in series]
    population = reference.rows.numpy()
    plane = _plane(reference, points)
    projected = [viz.project(plane, rows) for rows in points]

    # The population, arrows, and the rows on top.
    marks: list = [viz.Cloud(reference.name, viz.project(plane, population))]
    if len(projected) == 2:
        marks.append(viz.Arrows("from start to end", *projected))
    looks = ((viz.BLUE, True), (viz.VERMILION, False))  # colour, whether hollow
    for (name, _), xy, (colour, hollow) in zip(series, projected, looks):
        marks.append(viz.Points(name, xy, colour, hollow))

    title = "Token embeddings"
    if reference.is_prefix:
        title = f"Layer {i}, keys and values"
    elif i > 0:
        title = f"Layer {i}, its input"
    return viz.figure([viz.Panel(marks, viz.axis_names(plane))], title, caption, table=table)


def _plane(reference: Reference, points: list[np.ndarray]) -> viz.Plane:
    """The principal plane of a reference, or of everything if it is a text prompt of one or two
    tokens, which span no plane."""
    rows = reference.rows
    if len(rows) > 2:
        return reference.plane
    return viz.pca(np.concatenate([rows.numpy(), *points]))


def text_picture(run: Run, by_layer: dict[int, Reference]) -> str:
    """The layers of a run in characters, as large as the terminal allows."""
    start, end = run.start_and_end()
    columns, lines = shutil.get_terminal_size((80, 30))
    columns, lines = min(columns, 120) - 1, min(lines - 4, 40)
    blocks = []
    for i, reference in by_layer.items():
        population = reference.rows.numpy()
        plane = _plane(reference, [start[i].numpy(), end[i].numpy()])
        series = [("o", viz.project(plane, start[i].numpy())),
                  ("#", viz.project(plane, end[i].numpy()))]
        blocks.append(f"{run.path}, layer {i}: . {reference.name} ("
                      f"{counted(len(population), 'row')}), o prior draw, # trained; "
                      f"{', '.join(viz.axis_names(plane))}")
        blocks.append(viz.braille(viz.project(plane, population), series, columns, lines))
    return "\n".join(blocks)


# --------------------------------------------------------------------------------------------------
# curves of runs


class Group(NamedTuple):
    """Runs that differ in their seed alone; they are drawn as one curve."""

    name: str  # in the legend
    runs: list[Run]
    seeds: list[int]
    logs: list[list[dict]]  # metrics.jsonl of each
    score: str  # the key of the score that is drawn
    colour: str
    shape: str  # of the dots


def curves(runs: list[Run]) -> str:
    """SVG of the loss in training and in evaluation, and of the score, over the steps."""
    groups = _groups(runs)
    losses, scores = [], []
    for group in groups:
        # The training loss has no entry of its own in the legend: it has the group's colour.
        steps, values = by_step(group.logs, "train", "loss")
        if len(steps):
            steps, values = _smoothed(steps, values)
            losses.append(banded("", steps, values, group.colour, 0)._replace(faint=True))
        for curves_of, key, most in ((losses, "loss", math.inf), (scores, group.score, 100)):
            steps, values = by_step(group.logs, "eval", key)
            curve = banded(group.name, steps, values, group.colour, 0, most, dots=True)
            curves_of.append(curve._replace(shape=group.shape))

    kinds = list(dict.fromkeys(group.score for group in groups))
    if len(kinds) == 1:  # a level is of one score
        scores = _levels(groups) + scores
    names = " or ".join(SCORES[kind] for kind in kinds)
    panels = [viz.Panel(losses, ("step", "loss, nats a token"), equal=False),
              viz.Panel(scores, ("step", f"{names}, percent"), equal=False)]
    title = f"Loss and {names} while a prompt is trained"
    return viz.figure(panels, title, _curves_caption(groups))


def _groups(runs: list[Run]) -> list[Group]:
    by_settings: dict[Settings, list[Run]] = {}
    # Settings without seed and folder tell groups apart.
    for run in runs:
        settings = run.settings()
        without_seed = replace(settings, prior=replace(settings.prior, seed=0),
                               train=replace(settings.train, out=None))
        by_settings.setdefault(without_seed, []).append(run)

    groups: list[Group] = []
    for (settings, members), look in zip(by_settings.items(), cycle(LOOKS)):
        name = f"{settings.prior_name} on {spec_name(settings.data.data)}"
        # Groups that differ in other settings are named after a run.
        if any(group.name == name for group in groups):
            name = members[0].path.name
        logs = [run.metrics() for run in members]
        score = "accuracy" if any("accuracy" in line for line in logs[0]) else "f1"
        seeds = [run.settings().seed for run in members]
        groups.append(Group(name, members, seeds, logs, score, *look))
    return groups


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbouring steps, about 40 of them, because a batch's loss is noise: steps (T,)
    and values (k, T)."""
    width = max(1, len(steps) // 40)
    length = len(steps) // width * width
    means = values[:, :length].reshape(len(values), -1, width).mean(axis=2)
    return steps[:length].reshape(-1, width).mean(axis=1), means


def _levels(groups: list[Group]) -> list[viz.Curve]:
    """Level lines of the scores without a prompt and with the first text prompt, which are of all
    groups. Scores without a prompt that differ by a point or more are of other data or models, and
    then there are none: rounding changes an answer here and there, and no more. Of other texts
    there is no text's."""
    levels = []
    last = max(line["step"] for group in groups for log in group.logs for line in log
               if line["split"] == "eval")
    for split, name, colour in (("baseline", "no prompt", viz.GREY),
                                ("text", "text prompt", viz.BLACK)):
        firsts = [next((line[group.score] for line in log if line["split"] == split), None)
                  for group in groups for log in group.logs]
        logged = [score for score in firsts if score is not None]
        if not logged:
            continue
        if max(logged) - min(logged) >= 1:
            break
        x = np.array([0, max(last, 1)])
        levels.append(viz.Curve(name, x, np.full(2, np.mean(logged)), colour=colour))
    return levels


def _curves_caption(groups: list[Group]) -> str:
    parts = ["Dots: evaluation; pale lines: training, averaged over a fortieth of the steps."]
    if any(len(group.runs) > 1 for group in groups):
        parts.append("Bands: 95 % confidence of the mean over seeds.")
    sources = []
    for group in groups:
        word = "seeds" if len(group.seeds) > 1 else "seed"
        names = ", ".join(run.path.name for run in group.runs)
        sources.append(f"{group.name}: {word} {', '.join(map(str, group.seeds))}, {names}")
    return f"{' '.join(parts)} {'; '.join(sources)}."


def by_step(logs: list[list[dict]], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (T,) that all logs have a value of, and the values (logs, T)."""
    values = []
    for log in logs:
        lines = [line for line in log if line["split"] == split and key in line]
        values.append({line["step"]: line[key] for line in lines})
    steps = sorted(set.intersection(*map(set, values)))
    table = [[of_log[step] for step in steps] for of_log in values]
    return np.array(steps, float), np.array(table, float)


def banded(name: str, x: np.ndarray, values: np.ndarray, colour: str, least: float = -math.inf,
           most: float = math.inf, dots: bool = False) -> viz.Curve:
    """The mean of k curves, values (k, T), in its 95 % confidence interval by Student's t, as far
    as that is between the least and the most that a value can be. One has no interval."""
    mean, k = values.mean(axis=0), len(values)
    if k == 1:
        return viz.Curve(name, x, mean, colour=colour, dots=dots)
    low, high = interval(mean, values.std(axis=0, ddof=1) / np.sqrt(k), k)
    return viz.Curve(name, x, mean, low.clip(min=least), high.clip(max=most), colour, dots)


# --------------------------------------------------------------------------------------------------
# curves of measures


def line(curve: list[dict], caption: str) -> str:
    """SVG of the scores along the line between two prompts. curve: {"t", "data", "loss", a
    score, ...} of every point and task; each task is a curve."""
    panels = []
    for keys, label in ((("loss",), "loss, nats a token"),
                        (("accuracy", "f1"), "accuracy or F1, percent")):
        # A curve for each task, of the first score that it has.
        marks = []
        tasks = dict.fromkeys(point["data"] for point in curve)
        for task, (colour, shape) in zip(tasks, cycle(LOOKS)):
            points = [point for point in curve if point["data"] == task]
            key = next(key for key in keys if key in points[0])
            x = np.array([point["t"] for point in points])
            y = np.array([point[key] for point in points])
            marks.append(viz.Curve(task, x, y, colour=colour, dots=True, shape=shape))
        panels.append(viz.Panel(marks, ("t", label), equal=False))
    return viz.figure(panels, "From one prompt to another", caption)


def attention(rows: list[tuple[str, dict[str, float]]], caption: str) -> str:
    """SVG of what a prompt does to attention. rows: ("layer I", measures) of every layer."""
    x = np.array([int(name.split()[1]) for name, _ in rows], float)
    looks = iter(LOOKS)
    shares = [("share of attention to the prompt", "mass", *next(looks)),
              ("shift of attention among content", "shift", *next(looks))]
    bias = [("one direction's share of the bias", "one", *next(looks)),
            ("the same, of a head's", "one_head", *next(looks)),
            ("bias over all that attention adds", "bias", *next(looks))]

    # All are shares, so both panels reach from 0 to 1.
    frame = np.array([(x.min(), 0.0), (max(x.max(), x.min() + 1), 1.0)])
    panels = []
    for measures in (shares, bias):
        marks = []
        for name, key, colour, shape in measures:
            y = np.array([numbers[key] for _, numbers in rows])
            marks.append(viz.Curve(name, x, y, colour=colour, dots=True, shape=shape))
        panels.append(viz.Panel(marks, ("layer", ""), equal=False, frame=frame))
    return viz.figure(panels, "What the prompt does to attention", caption)
