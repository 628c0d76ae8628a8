"""Seconds that a taught prompt saves an answer, beside the text that taught it.

    OMP_NUM_THREADS=1 python benchmarks/saved.py RUN [RUN ...]     # of train --teacher TEXT

Answers of --length tokens, whatever they say, to --questions of the first run's evaluation data:
without a prompt, after the teacher's text, and under the prompt of each run. *anew*: the text or
the prompt is run through the model for each question. *kept*: its keys and values are there
already, as a server keeps them that answers many questions under one prompt. *first*: the seconds
to an answer's first token; *whole*: to its last. Questions are asked alone, and in *batches* that
share their contexts.

Seconds are CPU seconds of all threads, for a question. The prompts take turns. Printed are medians
over --turns, and how many times as long the teacher's text takes, with the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import llama  # noqa: E402
from lab.console import show, table  # noqa: E402
from lab.distil import as_taught, teacher_text  # noqa: E402
from lab.evaluation import OpenRun, evaluation_examples, open_run  # noqa: E402
from lab.inputs import encode, sample_topics  # noqa: E402
from lab.loss import begin  # noqa: E402

TITLES = {"first anew": "first, anew", "first kept": "first, kept", "whole kept": "whole, kept",
          "batches": "whole, kept, in batches"}
TEACHER = "teacher's text"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+")
    p.add_argument("--questions", type=int, default=32)
    p.add_argument("--length", type=int, default=6, help="tokens of every answer")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=16)
    a = p.parse_args()
    models: dict = {}
    runs = [open_run(run, {}, models) for run in a.runs]
    settings, loaded = runs[0].settings, runs[0].loaded
    if not settings.teacher.teacher or settings.teacher.teacher_reasons \
            or settings.prompt.place != "before" or len({common(run) for run in runs}) > 1:
        raise SystemExit("saved: give runs of one model, --dtype, --teacher TEXT and --separator, "
                         "without --teacher-reasons, and with their prompts before the texts")
    examples = sample_topics(evaluation_examples(settings.data), a.questions)
    questions = encode(examples, loaded.vocabulary, runs[0].max_length, "questions")
    model, text = loaded.model, teacher_text(loaded, settings)
    with torch.no_grad():
        # What is kept, what is run anew, and the questions.
        starts = {"no prompt": (model.empty(), model.empty(), questions),
                  TEACHER: (text, model.empty(), as_taught(questions, settings))}
        for path, run in zip(a.runs, runs):
            starts[path] = run.prompt.past(model), run.prompt, questions
        columns = {TEACHER: len(text.ids)} | {path: run.prompt.n for path, run in zip(a.runs, runs)}
        measured: dict = {name: {key: [] for key in TITLES} for name in starts}
        for start in starts.values():  # the first forwards of a process take longer
            one_turn(loaded, *start, 2, a.batch_size, {key: [] for key in TITLES})
        names = list(starts)
        for turn in range(a.turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                one_turn(loaded, *starts[name], a.length, a.batch_size, measured[name])

    show(f"{len(questions)} questions, {settings.model.dtype}, {torch.get_num_threads()} threads; "
         "columns of keys and values: "
         + ", ".join(f"{name} {n}" for name, n in columns.items()))
    rows = [(name, {key: statistics.median(turns) for key, turns in times.items()})
            for name, times in measured.items()]
    show(f"\nseconds a question\n{table(rows, TITLES)}")
    rows = [(name, ratios_to(measured[TEACHER], times)) for name, times in measured.items()
            if name != TEACHER]
    show(f"\nhow many times as long the teacher's text takes\n{table(rows, TITLES)}")


def common(run: OpenRun) -> tuple:
    """What all runs must have the same."""
    settings = run.settings
    return settings.model, settings.teacher.exam, settings.prior.separator, settings.prompt.place


def ratios_to(teacher: dict[str, list[float]], own: dict[str, list[float]]) -> dict[str, float]:
    """The teacher's seconds over one's own: {KEY, KEY_low, KEY_high}, the median, least and most
    of the turns."""
    numbers = {}
    for key in TITLES:
        ratios = [x / y for x, y in zip(teacher[key], own[key])]
        numbers |= {key: statistics.median(ratios), f"{key}_low": min(ratios),
                    f"{key}_high": max(ratios)}
    return numbers


def one_turn(loaded, kept, anew, questions, length: int, batch_size: int, times: dict) -> None:
    """Ask all questions in every way, and append the seconds of a question to times. kept, anew:
    what `begin` takes for a prompt, as keys and values that are there, and still to be made."""
    model = loaded.model
    rows = [questions.row(i) for i in range(len(questions))]
    ways = {"first anew": (anew, 1, 1), "first kept": (kept, 1, 1),
            "whole kept": (kept, 1, length), "batches": (kept, batch_size, length)}
    for key, (start, size, most) in ways.items():
        began = time.process_time()
        for i in range(0, len(rows), size):
            past, batch = begin(model, data.collate(rows[i:i + size]).to(loaded.device), start)
            llama.generate(model, batch.asked, past, most, parent=batch.parent)
        times[key].append((time.process_time() - began) / len(rows))


if __name__ == "__main__":
    main()
