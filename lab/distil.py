"""Teachers: the frozen model with a text in front of it, or with worked steps after the question,
whose answers a prompt learns to give without them.

    text = teacher_text(loaded, settings)                        # run through the model once
    lessons = learn(run, loaded, settings, text, questions, None, Shared())
    states = lessons.teacher.states([3, 8], batch.labels)        # (M, D), of loss.taught_loss

The teacher reads a question as a text prompt does: its text is the beginning of the question's
text. What it writes for training, steps and answers, is made once; a run keeps it in teacher.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from functools import partial
from typing import Callable, NamedTuple

import torch
from torch import Tensor

import data
import llama
from lab.batches import by_question
from lab.console import UserError
from lab.files import reading
from lab.folder import WRITTEN, Run
from lab.inputs import STEPS, LoadedModel, Questions, Shared, encode, run_text
from lab.loss import Text, begin
from lab.processes import only_first
from lab.settings import DataSettings, Settings, TeacherSettings


class Teacher:
    """What the frozen model says to questions after the teacher's text. Their worked steps, if it
    reads any, are the examples' rationales."""

    def __init__(self, loaded: LoadedModel, text: Text, questions: Questions, settings: Settings,
                 keep: bool = False):
        """questions: the student's. keep: the states of every batch, which are asked for again."""
        self.loaded, self.text, self.settings = loaded, text, settings
        self.questions = as_taught(questions, settings)
        self.kept: dict[tuple, Tensor] | None = {} if keep else None
        self.scores: dict[str, float] = {}  # its own, and its answers, once it was examined
        self.said: list[str] = []

    def states(self, indices: list[int], labels: Tensor) -> Tensor:
        """The hidden states (M, D) at the answers' tokens of a batch's questions, in the order of
        its labels (Q, T). Raises UserError if the teacher reads other tokens there."""
        key = tuple(indices)
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        states = self._run(indices, labels[labels != data.NO_LABEL])
        if self.kept is not None:
            self.kept[key] = states
        return states

    @torch.no_grad()
    def _run(self, indices: list[int], answers: Tensor) -> Tensor:
        model, share = self.loaded.model, self.settings.data.share
        batch = self.questions.batch(indices, share, "before", self.loaded.device)
        past, batch = begin(model, batch, self.text)
        is_scored = batch.labels != data.NO_LABEL
        if not torch.equal(batch.labels[is_scored], answers):
            ids = ", ".join(self.questions.examples[i].id for i in indices[:4])
            raise UserError(f"the teacher's text changes the tokens of answers, among {ids}: end "
                            "it otherwise, or choose another --separator")
        return model.states(batch.tails, past, batch.parent, is_scored)


# --------------------------------------------------------------------------------------------------
# what the teacher reads


def beginning(settings: Settings) -> str:
    """What stands in front of a question's text."""
    text, separator = settings.teacher.teacher, settings.prior.separator
    if text is None:
        return ""
    return text + ("\n" if separator is None else separator)  # None is of early runs


def teacher_text(loaded: LoadedModel, settings: Settings) -> Text:
    return run_text(loaded, beginning(settings))


def as_taught(questions: Questions, settings: Settings, asking: str = "") -> Questions:
    """The questions as the teacher reads them. asking: in place of what asks for the answer."""
    texts = None
    if asking:
        texts = [asking] * len(questions)
    elif settings.teacher.teacher_reasons:
        texts = [f"{STEPS} {data.one_line(e.rationale)}{data.ASKING}" for e in questions.examples]
    return Questions(questions.examples, questions.vocabulary, questions.max_length,
                     questions.name, beginning(settings), texts)


def check_reasons(teacher: TeacherSettings, of_splits: list[Questions]) -> None:
    """Raises UserError if the teacher is to read the data's worked steps, and a question has none
    or longer ones than --teacher-steps."""
    if teacher.teacher_reasons != "data":
        return
    for questions in of_splits:
        if lacking := without_steps(questions):
            raise UserError(f"--teacher-reasons data: {questions.name}: no worked steps with "
                            f"question {lacking}: give gsm8k or hendrycks data, or "
                            "--teacher-reasons written")
    longest, name = max(map(longest_steps, of_splits))
    if longest > teacher.teacher_steps:
        raise UserError(f"--teacher-steps {teacher.teacher_steps}: the worked steps of {name} have "
                        f"{longest} tokens: give --teacher-steps {longest}")


def without_steps(questions: Questions) -> str | None:
    """The id of the first question without worked steps, if there is one."""
    return next((e.id for e in questions.examples if not e.rationale), None)


def longest_steps(questions: Questions) -> tuple[int, str]:
    """The tokens of the longest worked steps, and the id of their question."""
    texts = [data.one_line(e.rationale) for e in questions.examples]
    counts = map(len, questions.vocabulary.encode_batch(texts))
    return max(zip(counts, (e.id for e in questions.examples)))


# --------------------------------------------------------------------------------------------------
# what the teacher writes


class Lessons(NamedTuple):
    """What a teacher has for a run."""

    questions: Questions | None = None  # with the answers that are learned, and the steps
    teacher: Teacher | None = None
    written: bytes = b""  # of teacher.jsonl, if the teacher wrote anything

    @property
    def record(self) -> dict[str, str]:
        """What config.json says of teacher.jsonl."""
        return {"teacher_sha256": digest(self.written)} if self.written else {}

    def keep(self, run: Run) -> None:
        if self.written:
            run.write(WRITTEN, self.written)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def learn(run: Run, loaded: LoadedModel, settings: Settings, text: Text, questions: Questions,
          config: dict | None, shared: Shared) -> Lessons:
    """What the teacher teaches with these questions. config: of the run that is resumed, which
    keeps what the teacher wrote. Raises UserError if that was changed since."""
    path, kept, temperature = run.path / WRITTEN, "", settings.teacher.teacher_answers
    sha256 = (config or {}).get("teacher_sha256")
    if sha256:
        kept = only_first(lambda: data.read_text(path) if path.exists() else "")
    key = (settings.model, settings.data, replace(settings.teacher, teacher_mix=0.0),
           settings.prior.separator, settings.seed if temperature else None)
    if not kept:
        lines = shared.once("written", key, lambda: write(loaded, settings, text, questions,
                                                          temperature))
        if len(lines[0]) > 2:  # more than id and question
            kept = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if sha256 and sha256 != digest(kept.encode()):
        raise UserError(f"{path}: not what the teacher wrote when the run began: restore the file, "
                        f"or train again by {run.again}")
    with reading(path, "what a teacher wrote", f"train again by {run.again}"):
        lines = [line for _, line in data.json_lines(kept, path)]
        examples = as_written(questions.examples, lines) if lines else questions.examples
    if examples != questions.examples:  # the teacher's answers may be longer
        questions = encode(examples, loaded.vocabulary, questions.max_length, questions.name)
    return Lessons(questions, Teacher(loaded, text, questions, settings), kept.encode())


def with_steps(loaded: LoadedModel, settings: Settings, text: Text, questions: Questions
               ) -> Questions:
    """Questions to evaluate on, with the steps that the teacher reads, always the likeliest."""
    lines = write(loaded, settings, text, questions, None)
    return Questions(as_written(questions.examples, lines), questions.vocabulary,
                     questions.max_length, questions.name)


def as_written(examples: list[data.Example], lines: list[dict]) -> list[data.Example]:
    """The examples with the steps and answers that the teacher wrote, in the place of their own."""
    written = []
    for example, line in zip(examples, lines, strict=True):
        if example.id != line["id"]:
            raise ValueError(f"{line['id']!r:.80} where {example.id!r:.80} is expected")
        answers = (line["answer"],) if "answer" in line else example.answers
        written.append(example._replace(rationale=line.get("steps", example.rationale),
                                        answers=answers))
    return written


def write(loaded: LoadedModel, settings: Settings, text: Text, questions: Questions,
          temperature: float | None) -> list[dict]:
    """A line a question, {"id", "question"}, and as far as they are asked for the "steps" and the
    "answer" that the teacher writes, which is none without a temperature."""
    lines = [{"id": e.id, "question": e.question} for e in questions.examples]
    parts = []
    if settings.teacher.teacher_reasons == "written":
        parts = [("steps", STEPS, settings.teacher.teacher_steps)]
    if temperature is not None:
        parts.append(("answer", "", settings.data.max_new))
    for key, asking, most in parts:
        answered = Questions(as_written(questions.examples, lines), questions.vocabulary,
                             questions.max_length, questions.name)
        asked = as_taught(answered, settings, asking)
        said = continued(loaded, text, asked, settings.data, settings.train.shard, most,
                         f"{questions.name}, the teacher's {key}", temperature or 0.0,
                         f"{settings.seed} {key}")
        lines = [{**line, key: answer} for line, answer in zip(lines, said)]
    return lines


def continued(loaded: LoadedModel, text: Text, questions: Questions, settings: DataSettings,
              everywhere: bool, most: int, name: str, temperature: float, seed: str) -> list[str]:
    """What the model says to each question, in at most so many tokens, to the end of the line."""
    def said(members: list[int], pasts: list[llama.Past], batch: data.Batch) -> list[str]:
        generated = llama.generate(loaded.model, batch.asked, pasts[0], most,
                                   loaded.vocabulary.stop, batch.parent,
                                   sampler(temperature, seed, members))
        return [loaded.vocabulary.first_line(ids) for ids in generated]

    return by_question(loaded.model, [[text]], "before", settings, everywhere, questions, name,
                       said)[0]


def sampler(temperature: float, seed: str, members: list[int]
            ) -> Callable[[list[int], Tensor], Tensor] | None:
    """`choose` of llama.generate for the questions `members`: a draw is a function of the seed and
    the question, whatever else is in the batch. None at temperature 0."""
    if not temperature:
        return None
    seeds = [random.Random(f"{seed} {i}").getrandbits(63) for i in members]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return partial(_drawn, temperature, generators)


def _drawn(temperature: float, generators: list[torch.Generator], rows: list[int],
           logits: Tensor) -> Tensor:
    # The largest of p_i / E_i, E_i exponential, is a draw of p.
    waits = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=generators[row])
                         for row in rows])
    return (logits.float() / temperature - waits.log().to(logits.device)).argmax(dim=-1)
