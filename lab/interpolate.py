"""The prompts on the straight line between those of two runs, and the command interpolate.

The line goes from one trained prompt (t = 0) to another (t = 1), and every prompt on it is scored
on the evaluation data of both runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import llama
from lab import pictures
from lab.commands import InterpolateOptions
from lab.console import UserError, say, show, table
from lab.evaluation import OpenRun, evaluate, open_run
from lab.files import checksum, free_folder, new_folder
from lab.inputs import LoadedModel, Questions, encode, evaluation_examples, model_files
from lab.settings import DataSettings, ModelSettings, from_flags, spec_name

Tasks = dict[str, tuple[DataSettings, Questions]]


def command_interpolate(given: dict) -> None:
    options = from_flags(InterpolateOptions, given)
    out = options.out or f"{options.run_a.rstrip('/')}-to-{Path(options.run_b).name}"
    free_folder(out, "--out")

    # Everything is checked before the folder is made, and that before the work, which takes long.
    models: dict[ModelSettings, LoadedModel] = {}
    first = open_run(options.run_a, given, models)
    last = open_run(options.run_b, given, models)
    check_one_model(first, last)
    check_same_shape(first, last)
    tasks = tasks_of(first, last)
    with new_folder(out, "--out") as folder:
        curve = scored_line(first, last, tasks, options.points)
        lines = [json.dumps(line) + "\n" for line in curve]
        folder.write("curve.jsonl", "".join(lines).encode())
        caption = (f"(1 - t) {first.run.title} + t {last.run.title}, model "
                   f"{Path(first.settings.model.model).name}, seeds {first.settings.seed} and "
                   f"{last.settings.seed}; {options.points} prompts.")
        folder.write("curve.svg", pictures.line(curve, caption).encode())

    # Show the curve task by task, and keep it in the order of t.
    if options.json:
        show(json.dumps(curve))
    else:
        by_task = sorted(curve, key=lambda line: line["data"])
        rows = [(f"{line['t']:.2f} on {line['data']}", line) for line in by_task]
        show(f"(1 - t) {first.run.title} + t {last.run.title}; scores in percent, loss in nats a "
             f"token\n\n{table(rows)}\n")
    say(f"{out}: curve.jsonl, curve.svg")


def scored_line(first: OpenRun, last: OpenRun, tasks: Tasks, points: int) -> list[dict]:
    """The scores of every prompt of the line on both tasks."""
    curve = []
    for step in range(points):
        t = step / (points - 1)
        prompt = point_between(first.prompt, last.prompt, t)
        for name, (data_settings, questions) in tasks.items():
            scores, _ = evaluate(first.loaded, [prompt], questions, first.settings.prompt.place,
                                 data_settings, f"{t:.2f} {name}")
            curve.append({"t": t, "data": name, **scores})
    return curve


def check_one_model(first: OpenRun, last: OpenRun) -> None:
    """Raises UserError for runs of different models. Two names may lead to the same weights."""
    sums = {checksum(model_files(opened.settings.model)) for opened in (first, last)}
    if len(sums) > 1:
        raise UserError(f"{first.run.path} and {last.run.path} are of different models: give two "
                        "of one")


def check_same_shape(first: OpenRun, last: OpenRun) -> None:
    """Raises UserError for prompts that no straight line joins."""
    kinds = []
    for opened in (first, last):
        shapes = {i: tuple(t.shape) for i, t in opened.prompt.layers.items()}
        prompt = opened.settings.prompt
        kinds.append(f"{shapes}, {prompt.method}, cut {prompt.cut}, place {prompt.place}")
    if kinds[0] != kinds[1]:
        raise UserError(f"{first.run.path} and {last.run.path} have other rows "
                        f"({' and '.join(kinds)}), and no line joins them: give two of one "
                        "--method, --tokens, --deep-layers, --place and --cut or --keep")


def tasks_of(first: OpenRun, last: OpenRun) -> Tasks:
    """The evaluation questions of both runs by their data's name; one entry if both have the same
    questions."""
    tasks: Tasks = {}
    for opened in (first, last):
        settings = opened.settings.data
        name = spec_name(settings.eval_data or settings.data)
        examples = evaluation_examples(settings)
        questions = encode(examples, opened.vocabulary, opened.max_length, name)
        same = tasks.get(name, (None, questions))[1]
        if (same.examples, same.max_length) != (questions.examples, questions.max_length):
            name = f"{name} of {opened.run.path.name}"  # other questions of the same name
        tasks.setdefault(name, (settings, questions))
    return tasks


def point_between(first: llama.Prompt, last: llama.Prompt, t: float) -> llama.Prompt:
    """(1 - t) first + t last. Of prefixes this is also a line in the cache, because rotation is
    linear."""
    layers = {i: (1 - t) * rows + t * last.layers[i] for i, rows in first.layers.items()}
    return first._replace(layers=layers)
