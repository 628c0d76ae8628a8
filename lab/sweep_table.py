"""What a sweep's runs came to: cells of runs that differ in rate and seed alone, compared.

    show_table(plan, finished, margin=2)     # prints, and writes DIR/table.csv and DIR/table.html

A cell's learning rate is the one with the lowest loss on questions that were held out of the
training data; the evaluation data has no say in it. Other cells are compared with the first one
that answered the same questions, seed by seed and question by question.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab import geometry, pictures, statistics
from lab.adapters import to_csv
from lab.console import SCORES, UserError, say, show, table
from lab.files import reading, write_file
from lab.folder import Run, objective
from lab.inputs import evaluation_examples, independent_units
from lab.plan import (DIVERGED, RATES, Plan, cell_key, rate_of, setting_name,
                      varied_settings)
from lab.settings import DataSettings, Settings, numbered

LEVEL, POWER = 0.05, 0.8
ROUNDING = 1e-9  # points: a narrower interval is one of differences that are all alike
SHOWN = 5  # layers of a cell, in a printed table
SCORE_TITLES = {"lr": "lr", "lr_factor": "lr factor", "seeds": "seeds",
                "held_out": "held-out loss", **SCORES, "steps": "steps"}
DIFFERENCE_TITLES = {
    "difference": "by seed", "wide": "other questions too", "equivalence_p": "p, equal",
    "holm_equal": "Holm's", "difference_p": "p, no difference", "holm_different": "Holm's"}
END_TITLES = {"start_norm": "norm ratio, drawn", "norm": "trained", "moved": "moved", "own": "own",
              "chance": "by chance"}
ABOUT = """\
In brackets: 95 % intervals, of Student's t over seeds. steps: until the loss was within a tenth of
the last one, at an evaluation."""
ABOUT_HELD_OUT = """\
held-out loss: on questions of the training data that no run was trained on, by which the rate was
chosen."""
ABOUT_TAUGHT = """\
steps and held-out loss of taught prompts: of the divergence from the teacher, or --teacher-mix of
both."""
ABOUT_DIFFERENCES = """\
by seed: the difference, paired by seed, on these questions; other questions too: as it may be of
other seeds and other questions (whole articles or paragraphs). p, equal: of two one-sided tests
that it is {margin:g} points or more; Holm's: corrected for the number of rows."""
ABOUT_ENDS = """\
norm ratio: mean norm of rows over the reference's. moved: mean distance from the draw. own: percent
of rows to which no other draw, of any run here, is nearer than their own; by chance: the same of
rows that moved as far in random directions."""
ABOUT_LAYERS = "Layers between these are in table.csv."


class Cell(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    runs: dict[int, Run]  # by seed, those at the chosen rate
    logs: dict[int, dict]  # the last evaluation of each
    steps: dict[int, int]  # the first step of each at which the loss was within a tenth of the last
    settings: Settings  # of one of them
    rate: tuple  # the values of RATES
    held_out: dict[tuple, float]  # of every rate, the mean loss by which it was chosen
    left_out: dict[tuple, str]  # of every other rate, why it was not compared

    @property
    def key(self) -> str:
        """The score that counts."""
        return "accuracy" if "accuracy" in next(iter(self.logs.values())) else "f1"


def last(metrics: list[dict], split: str) -> dict | None:
    return next((line for line in reversed(metrics) if line["split"] == split), None)


def steps_to_loss(metrics: list[dict], mix: float) -> int:
    """The first step whose evaluation has a loss at most a tenth above the last one's; mix:
    --teacher-mix."""
    losses = {line["step"]: objective(line, mix) for line in metrics if line["split"] == "eval"}
    *_, last_loss = losses.values()
    return next(step for step, loss in losses.items() if loss <= 1.1 * last_loss)


def cells_of(plan: Plan, finished: set[str]) -> list[Cell]:
    """The cells of the runs that have ended, each at its best rate."""
    varied = [name for name in varied_settings([*plan.runs.values()])
              if name not in (*RATES, "seed")]
    # The name of every cell, and by rate {seed: run} of those that have ended
    grouped: dict[str, tuple[str, dict]] = {}
    planned: Counter = Counter()
    diverged = set()
    for name, flags in plan.runs.items():
        key, rate = cell_key(flags), rate_of(flags)
        words = [setting_name(setting, flags[setting]) for setting in varied if setting in flags]
        cell = ", ".join(words) or plan.settings(name).prior_name
        _, by_rate = grouped.setdefault(key, (cell, {}))
        planned[key, rate] += 1
        runs = by_rate.setdefault(rate, {})
        if name in finished:
            runs[flags.get("seed", 0)] = name
        elif plan.has_diverged(name):
            diverged.add((key, rate))
    grouped = {key: cell for key, cell in grouped.items() if any(cell[1].values())}

    cells = []
    names = numbered([name for name, _ in grouped.values()])
    for name, (key, (_, by_rate)) in zip(names, grouped.items()):
        logs = {run: plan.run(run).metrics() for runs in by_rate.values() for run in runs.values()}
        # Of a rate with other seeds than that with most runs, a failed one among them, nobody knows
        # how good it is.
        most = max((runs.keys() for runs in by_rate.values()), key=len)
        losses = {}
        mix = plan.settings(next(iter(logs))).teacher.teacher_mix  # one in a cell
        for rate, runs in by_rate.items():
            lines = [last(logs[run], "held_out") for run in runs.values()]
            if runs.keys() == most and None not in lines:
                losses[rate] = float(np.mean([objective(line, mix) for line in lines]))
        rate = min(losses, key=losses.get) if losses else next(filter(by_rate.get, by_rate))
        left_out = {other: DIVERGED if (key, other) in diverged else
                    f"{len(runs)} of {planned[key, other]} runs ended"
                    for other, runs in by_rate.items() if other not in losses and other != rate}
        runs = dict(sorted(by_rate[rate].items()))
        cells.append(Cell(name, {seed: plan.run(run) for seed, run in runs.items()},
                          {seed: last(logs[run], "eval") for seed, run in runs.items()},
                          {seed: steps_to_loss(logs[run], mix) for seed, run in runs.items()},
                          plan.settings(next(iter(runs.values()))), rate, losses, left_out))
    return cells


def with_interval(key: str, values: list[float]) -> dict[str, float]:
    """{KEY, KEY_low, KEY_high}: the mean and its interval; of one value the value alone."""
    if len(values) < 2:
        return {key: float(values[0])}
    mean, low, high = statistics.mean_interval(values)
    if key != "difference":  # nothing else can be below 0, and no percentage above 100
        is_percentage = key in SCORES and key not in ("loss", "teacher_kl")
        low, high = max(low, 0.0), min(high, 100.0 if is_percentage else math.inf)
    return {key: mean, f"{key}_low": low, f"{key}_high": high}


def scores_of(cell: Cell) -> dict[str, float]:
    numbers: dict[str, float] = {"seeds": len(cell.runs)}
    numbers |= {name: value for name, value in zip(RATES, cell.rate) if value is not None}
    if cell.held_out:
        numbers["held_out"] = cell.held_out[cell.rate]
    for key in dict.fromkeys(("loss", "teacher_kl", "exact_match", cell.key, "choice_accuracy",
                              "agreement")):
        if all(key in line for line in cell.logs.values()):
            numbers |= with_interval(key, [line[key] for line in cell.logs.values()])
    return numbers | with_interval("steps", [*cell.steps.values()])


# --------------------------------------------------------------------------------------------------
# differences


def compare_cells(cells: list[Cell], margin: float
                  ) -> tuple[list[tuple[str, str, dict[str, float]]], list[str]]:
    """(cell, the cell that it is compared with, numbers), of cells with a seed in common, and with
    questions of two articles or more; and why the others that answered the same are left out."""
    asked = [questions_of(cell) for cell in cells]
    units: dict[int, np.ndarray] = {}  # of the cells that others are compared with
    rows, effects, left_out = [], [], []
    for i, cell in enumerate(cells):
        j = asked.index(asked[i])
        seeds = [seed for seed in cell.runs if seed in cells[j].runs]
        first = cells[j]
        if i == j:
            continue
        if not seeds:
            left_out.append(f"{cell.name} and {first.name}: not compared: no seed of both has "
                            "ended")
            continue
        if j not in units:
            units[j] = question_units(first.settings.data, asked[j])
        if not units[j].any():
            left_out.append(f"{cell.name} and {first.name}: not compared: all questions are about "
                            "one paragraph: evaluate others too")
            continue
        numbers = with_interval("difference", [
            cell.logs[seed][cell.key] - first.logs[seed][cell.key] for seed in seeds])
        answers = np.array([[scores_by_question(c.runs[seed], cell.key) for seed in seeds]
                            for c in (cell, first)])
        effect = statistics.paired(answers[0] - answers[1], units[j])
        half = effect.half_width()
        half = half if half > ROUNDING else 0.0
        rows.append((cell.name, first.name, {
            **numbers, "wide": effect.mean, "wide_low": effect.mean - half,
            "wide_high": effect.mean + half,
            # Of differences that are all alike nothing tells how they vary.
            "equivalence_p": effect.equivalence_p(margin) if half else 1.0,
            "difference_p": effect.difference_p() if half else 1.0,
            **({"only_seed": seeds[0]} if len(seeds) == 1 else {})}))
        effects.append(effect)
    # Of the tests that Holm's correction orders, the first one has the strictest level.
    for effect, (_, _, numbers) in zip(effects, rows):
        level = LEVEL / len(rows)
        numbers["detectable"] = effect.detectable(level, POWER)
        numbers["detectable_any_seeds"] = effect.with_any_seeds().detectable(level, POWER)
    for holm, key in (("holm_equal", "equivalence_p"), ("holm_different", "difference_p")):
        adjusted = statistics.holm([numbers[key] for _, _, numbers in rows])
        for (_, _, numbers), p in zip(rows, adjusted):
            numbers[holm] = float(p)
    return rows, left_out


def questions_of(cell: Cell) -> list[tuple[str, str]]:
    """(id, question) of all that the runs of a cell answered. Raises UserError if they differ."""
    first, *others = cell.runs.values()
    asked = [(p["id"], p["question"]) for p in first.predictions()]
    for run in others:
        if [(p["id"], p["question"]) for p in run.predictions()] != asked:
            raise UserError(f"{run.path}: predictions.jsonl has other questions than that of "
                            f"{first.path}: restore it, or remove the run and train it again")
    return asked


def scores_by_question(run: Run, key: str) -> list[float]:
    return [prediction[key] for prediction in run.predictions()]


def question_units(settings: DataSettings, asked: list[tuple[str, str]]) -> np.ndarray:
    """The independent unit of every question asked, (id, question) each."""
    examples = {(e.id, e.question): e for e in evaluation_examples(settings)}
    return independent_units([examples[question] for question in asked])


def verdict(name: str, first: str, numbers: dict[str, float], margin: float) -> str:
    """What the tests tell of a cell, after Holm's correction, in words."""
    is_near, is_other = (numbers[key] <= LEVEL for key in ("holm_equal", "holm_different"))
    if numbers["wide_low"] == numbers["wide_high"]:
        words = (f"cannot be told: the difference is {numbers['wide_low']:.3g} in all articles or "
                 "paragraphs, so nothing tells how much it varies over others")
    elif is_near and is_other:
        words = f"different, but by less than {margin:g} points"
    elif is_near:
        words = f"equal within {margin:g} points"
    elif is_other:
        words = "different"
    else:
        found = f"a true difference of {numbers['detectable']:.1f} points"
        if numbers["detectable"] > 100:  # scores are percentages
            found = "not even a true difference of 100 points"
        words = (f"cannot be told: neither different, nor equal within {margin:g} points; {found} "
                 f"would be found in {POWER:.0%} of such sweeps")
        if numbers["detectable_any_seeds"] >= 0.05:  # else the scatter of few seeds hides it
            words += (f"; one smaller than {numbers['detectable_any_seeds']:.1f} would not, with "
                      "any number of seeds")
    alone = f", for seed {numbers['only_seed']} alone" if "only_seed" in numbers else ""
    return f"{name} and {first}{alone}: {words}"


# --------------------------------------------------------------------------------------------------
# where rows ended


def ends_of(cells: list[Cell]) -> list[tuple[str, dict[str, float]]]:
    """Where the rows of every cell and layer began and ended, means over its runs."""
    drawn: dict[tuple, list[np.ndarray]] = {}  # by layer, method and width, of all cells
    ended: dict[tuple, list[np.ndarray]] = {}
    measured: list[tuple[Cell, int, tuple, list]] = []
    for cell in cells:
        pairs = [run.start_and_end() for run in cell.runs.values()]
        for i in pairs[0][0]:
            space = (i, cell.settings.prompt.method, pairs[0][0][i].shape[1])
            measured.append((cell, i, space, [(start[i], end[i]) for start, end in pairs]))
            drawn.setdefault(space, []).append(np.concatenate([s[i].numpy() for s, _ in pairs]))
            ended.setdefault(space, []).append(np.concatenate([e[i].numpy() for _, e in pairs]))

    shares: dict[tuple, list] = {}  # of each space, what keeps its own draw in each cell
    for space, starts in drawn.items():
        draws, rows = np.concatenate(starts), np.concatenate(ended[space])
        cuts = np.cumsum(list(map(len, starts)))[:-1]
        kept = [np.split(geometry.keep_their_own(x, draws), cuts)
                for x in (rows, geometry.moved_at_random(rows, draws))]
        shares[space] = [(100 * own.mean(), 100 * chance.mean()) for own, chance in zip(*kept)]

    table_rows = []
    for cell, i, space, pairs in measured:
        own, chance = shares[space].pop(0)
        numbers = {"moved": np.mean([(end - start).norm(dim=1).mean() for start, end in pairs]),
                   "own": own, "chance": chance}
        if cell.settings.prompt.method == "prompt":
            ratios = [norm_ratios(run, i, *pair) for run, pair in zip(cell.runs.values(), pairs)]
            numbers["start_norm"], numbers["norm"] = np.mean(ratios, axis=0)
        name = f"{cell.name}, layer {i}"
        table_rows.append((name, {key: float(value) for key, value in numbers.items()}))
    return table_rows


def some_layers(ends: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Of every cell SHOWN layers at most: the first, the last, and others between them."""
    shown = []
    for _, layers in groupby(ends, key=lambda row: row[0].rpartition(", ")[0]):
        rows = [*layers]
        places = np.linspace(0, len(rows) - 1, SHOWN).round().astype(int)
        shown += [rows[i] for i in np.unique(places)]
    return shown


def norm_ratios(run: Run, layer: int, start, end) -> tuple[float, float]:
    """Mean norms of the draw (n, D) and of the trained rows over the reference's, whose norm the
    run's record of the draw tells."""
    report = next(r for r in run.config()["priors"] if r["layer"] == layer)
    growth = float(end.norm(dim=1).mean() / start.norm(dim=1).mean())
    return report["norm_ratio"], report["norm_ratio"] * growth


# --------------------------------------------------------------------------------------------------
# the table


def show_table(plan: Plan, finished: list[str], margin: float) -> None:
    """Print what the finished runs came to, and write it as table.csv and table.html."""
    with reading(plan.folder / "runs", "runs as this sweep made them", "restore them"):
        cells = cells_of(plan, {*finished})
        scores = [(cell.name, scores_of(cell)) for cell in cells]
        differences, left_out = compare_cells(cells, margin)
        ends = ends_of(cells)
        curves = pictures.curves([run for cell in cells for run in cell.runs.values()])

    about = ABOUT
    if any(cell.held_out for cell in cells):
        about += f"\n{ABOUT_HELD_OUT}"
    if any("teacher_kl" in line for cell in cells for line in cell.logs.values()):
        about += f"\n{ABOUT_TAUGHT}"
    text = [f"{plan.folder.resolve().name}: {len(finished)} of {len(plan.runs)} runs; scores in "
            f"percent, loss in nats a token\n\n{table(scores, SCORE_TITLES)}\n\n{about}"]
    text += rates_of(cells)
    if differences:
        kinds = " or ".join(dict.fromkeys(SCORES[cell.key] for cell in cells))
        rows = [(f"{name} against {first}", numbers) for name, first, numbers in differences]
        text.append(f"points of {kinds}\n{table(rows, DIFFERENCE_TITLES)}\n\n"
                    f"{ABOUT_DIFFERENCES.format(margin=margin)}")
        text += ["\n".join(textwrap.fill(verdict(*row, margin), 100, subsequent_indent="    ")
                           for row in differences)]
    if left_out:
        text.append("\n".join(left_out))
    shown = some_layers(ends)
    more = f"\n{ABOUT_LAYERS}" if len(shown) < len(ends) else ""
    text.append(f"{table(shown, END_TITLES)}\n\n{ABOUT_ENDS}{more}")
    show("\n\n".join(text))

    write_file(plan.folder / "table.csv", as_csv(scores, differences, ends).encode())
    write_file(plan.folder / "table.html", as_page(plan.folder, text, curves).encode())
    say(f"\n{plan.folder}: table.csv, table.html")


def rates_of(cells: list[Cell]) -> list[str]:
    """The held-out loss of every rate, and whether better ones may lie beyond those tried."""
    lines = []
    for cell in cells:
        if len(cell.held_out) + len(cell.left_out) > 1:
            words = [f"{rate_name(rate)} {loss:.3f}" for rate, loss in cell.held_out.items()]
            words += [f"{rate_name(rate)} not compared ({why})"
                      for rate, why in cell.left_out.items()]
            edge = ""
            diverged = [rate for rate, why in cell.left_out.items() if why == DIVERGED]
            for chosen, *tried in zip(cell.rate, *cell.held_out, *diverged):
                values = {value for value in tried if value is not None}
                if len(values) > 1 and chosen in (min(values), max(values)):
                    end = "lowest" if chosen == min(values) else "highest"
                    edge = f": the best is the {end} one tried, so that better ones may lie beyond"
            lines.append(f"{cell.name}: {', '.join(words)}{edge}")
    return ["held-out loss by learning rate\n" + "\n".join(lines)] if lines else []


def rate_name(rate: tuple) -> str:
    """Such as "0.003", "factor 3" or "default"."""
    words = [f"{kind}{value:g}" for kind, value in zip(("", "factor "), rate) if value is not None]
    return ", ".join(words) or "default"


def as_csv(scores: list, differences: list, ends: list) -> str:
    """A row for every cell."""
    rows = {name: {"cell": name, **numbers} for name, numbers in scores}
    for name, first, numbers in differences:
        rows[name] |= {"against": first, **numbers}
    for name, numbers in ends:
        cell, _, layer = name.rpartition(", ")
        rows[cell] |= {f"{layer} {key}": value for key, value in numbers.items()}
    return to_csv([*rows.values()], ("cell",))


def as_page(folder: Path, text: list[str], svg: str) -> str:
    """The tables, and the curves, as one page without scripts."""
    title = html.escape(f"Sweep {folder.resolve().name}")
    blocks = "".join(f"<pre>{html.escape(part)}</pre>\n" for part in text)
    return (f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
            "<style>body{max-width:72em;margin:2em auto;padding:0 1em;font-family:sans-serif;"
            "color-scheme:light dark}pre{overflow-x:auto}</style>\n"
            f"<h1>{title}</h1>\n{blocks}{svg}</html>\n")
