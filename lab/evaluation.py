"""A finished run, opened; the scores of prompts; the commands eval and generate.

    opened = open_run("runs/first", {})
    scores, predictions = evaluate(opened.loaded, [opened.prompt], questions, "before", data, "")
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch

import data
import llama
from lab import statistics
from lab.batches import by_question, grouped
from lab.commands import EvalOptions, GenerateOptions
from lab.console import (CALIBRATION, FORGETTING, SCORES, SPREADS, Diverged, UserError, counted,
                         say, show, table)
from lab.distil import Teacher, longest_steps, teacher_text, with_steps, without_steps
from lab.files import checksum
from lab.folder import FIRST_PROMPT, Run, best_evaluation
from lab.foreign_data import not_foreign
from lab.forgetting import SPLIT, check_separator, forgetting, read_prose
from lab.inputs import (LoadedModel, Questions, Shared, check_place, encode, evaluation_examples,
                        load_model, longest_text, model_files, plain_prompts, read_questions,
                        room_for_text, rows_per_layer, sample_topics)
from lab.loss import Text, answer_losses, answers, begin
from lab.settings import (DataSettings, ModelSettings, Settings, flag_name, flat, from_flags,
                          text_names, with_flags)
from lab.words import EFFECTS, controls, discrete, effects, paired_differences, without_each

MAJORITY = "always the commonest answer"  # what multiple choice is compared with


class OpenRun(NamedTuple):
    run: Run
    settings: Settings  # the run's, and over them the flags that were given now
    loaded: LoadedModel
    prompt: llama.Prompt  # of a posterior the one that stands for it; on its device

    @property
    def model(self) -> llama.Llama:
        return self.loaded.model

    @property
    def vocabulary(self) -> data.Vocabulary:
        return self.loaded.vocabulary

    @property
    def max_length(self) -> int:
        settings = self.settings
        return longest_text(self.loaded, settings.data, settings.prior, settings.teacher)


# Flags of other commands that replace a run's settings, besides the model's.
REPLACED = ("eval_limit", "max_length", "max_new", "keep_unanswerable", "text", "separator",
            "forget")


def open_run(path: str | Path | Run, given: dict,
             models: dict[ModelSettings, LoadedModel] | None = None,
             any_weights: bool = True) -> OpenRun:
    """A run with its model and prompt, the last or that of given["step"]. path: its folder, or the
    Run itself, whose log may be read already. Flags of the model and of evaluation in `given`
    replace the run's settings. models: those that are loaded already; runs of one model share it.
    any_weights: --model may name other weights than the run's. Raises UserError or ModelError if
    the prompt does not fit the model."""
    run = path if isinstance(path, Run) else Run(Path(path))
    models = {} if models is None else models
    settings = settings_now(run, given)
    if "step" in given:
        run.show_step(given["step"])
    prompt = run.prompt()
    if settings.model not in models:
        models[settings.model] = load_model(settings.model)
    loaded = models[settings.model]
    check_weights(run, settings.model, any_weights and "model" in given)
    if run.config().get("sha256", {}).get("tokenizer") not in (None, loaded.vocabulary.sha256):
        say(f"{run.path}: trained with other tokens than the files beside {settings.model.model}'s "
            "tokenizer.json make now, so that its prompt meets other texts: put them back")
    if "text" in given and "max_length" not in given:
        settings = replace(settings, data=_with_room(settings, loaded))
    check_place(settings.prompt, loaded, settings.model.model)
    prompt = prompt.to(loaded.device)
    prompt.past(loaded.model)  # refuses rows that do not fit
    return OpenRun(run, settings, loaded, prompt)


def settings_now(run: Run, given: dict) -> Settings:
    """A run's settings, and over them the flags of the model and of evaluation that are given."""
    names = {*vars(ModelSettings()), *REPLACED}
    settings = with_flags(run.settings(), {name: given[name] for name in names & given.keys()})
    return replace(settings, model=settings.model.complete())


def open_runs(paths: list[str], given: dict, same: dict[str, str]) -> list[OpenRun]:
    """Runs that answer in one batch, which has one model, one place of the prompt, and one value of
    each of the settings `same` {name: the flag that gives it to all}. Raises UserError or
    ModelError for runs that one batch cannot hold, before any model is loaded if their settings
    tell."""
    first, *others = [flat(settings_now(Run(Path(path)), given)) for path in paths]
    for values in (first, *others):
        values["eval_data"] = values["eval_data"] or f"a part of {values['data']}"
    flags = {name: flag_name(name) for name in vars(ModelSettings())} | same
    for path, values in zip(paths[1:], others):
        for name in (*flags, "place"):
            if values[name] != first[name]:
                remedy = "ask it alone"
                if name in flags and name != "model":
                    remedy = f"give {flags[name]} for all, or {remedy}"
                raise UserError(f"{path}: its {flag_name(name)} is {values[name]!s:.200}, and that "
                                f"of {paths[0]} is {first[name]!s:.200}: one batch has one: "
                                f"{remedy}")
    models: dict[ModelSettings, LoadedModel] = {}
    runs = [open_run(path, given, models) for path in paths]
    try:
        with torch.no_grad():
            llama.stack([opened.prompt.past(opened.model) for opened in runs])
    except llama.ModelError as e:
        raise UserError(f"{', '.join(paths)}: {e}") from None
    return runs


def check_weights(run: Run, model: ModelSettings, is_asked_for: bool) -> None:
    """A prompt means nothing to other weights than it was trained with: say so where the user
    asked for them, else refuse them."""
    trained_with = run.config().get("sha256", {}).get("model")
    if trained_with in (None, checksum(model_files(model))):
        return
    differ = f"{run.path}: trained with other weights than {model.model} has now"
    if not is_asked_for:
        raise UserError(f"{differ}: put them back, or give --model a folder that has them; eval "
                        f"and others go on with these by --model {model.model}")
    say(f"{differ}, so that its prompt may mean nothing to them")


def _with_room(settings: Settings, loaded: LoadedModel) -> DataSettings:
    """A run's data settings, with shorter texts if its own leave no room for other text prompts."""
    stored = settings.data.max_length
    room, _, _ = room_for_text(loaded, settings.data, settings.prior, settings.teacher)
    if stored is None or stored <= room or not room:
        return settings.data
    say(f"contexts are cut to fit {room} tokens and not the run's {stored}, which leaves room for "
        "the text prompt")
    return replace(settings.data, max_length=room)


# --------------------------------------------------------------------------------------------------
# scores


def evaluate(loaded: LoadedModel, prompts: list[llama.Prompt | llama.Past | Text],
             questions: Questions, place: str, settings: DataSettings, name: str,
             everywhere: bool = False, teacher: Teacher | None = None
             ) -> tuple[dict[str, float], list[dict]]:
    """Loss (nats a token), scores (percent) of greedy answers, the standard error of each ("f1_se"
    and so on), the calibration error of first tokens (percent; one is right if the first accepted
    answer, whose loss this is, begins with it) and that of a perfectly calibrated model of the same
    confidences ("calibrated"; its central 95 % "calibrated_low" and "_high"), and the predictions.
    Of several prompts token probabilities are averaged.

    place: where a Prompt stands; a Past stands before everything. Processes share the batches,
    unless they share the weights and so must all do the same (everywhere). teacher: of the same
    questions, and examined: then scores have the divergence from it (nats a token, at the right
    answers), and the share of answers that are the same (percent)."""
    return evaluate_each(loaded, [prompts], questions, place, settings, name, everywhere,
                         teacher)[0]


@torch.no_grad()
def evaluate_each(loaded: LoadedModel, entries: list[list[llama.Prompt | llama.Past | Text]],
                  questions: Questions, place: str, settings: DataSettings, name: str,
                  everywhere: bool = False, teacher: Teacher | None = None
                  ) -> list[tuple[dict[str, float], list[dict]]]:
    """evaluate of each of several entries, of as many prompts each, in common batches. Raises
    ModelError for prompts that one batch cannot hold, see llama.stack."""
    scored = partial(by_question, loaded.model, entries, place, settings, everywhere)

    def answered(members: list[int], pasts: list[llama.Past], batch: data.Batch) -> Iterable[tuple]:
        states = None
        if teacher:  # every entry has all questions, one entry after the other
            states = teacher.states(members, batch.labels[:len(members)]).repeat(len(entries), 1)
        return zip(*answers(loaded.model, pasts, batch, settings.max_new, loaded.vocabulary.stop,
                            states, decoding))

    decoding = llama.Decoding(loaded.model, settings.max_new, loaded.vocabulary.stop)
    answered_each = scored(questions, name, answered, decoding.run)
    losses_of_choices = [[]] * len(entries)
    if choices := questions.each_choice():
        losses_of_choices = scored(
            choices, f"{name}, every choice",
            lambda members, pasts, batch: answer_losses(loaded.model, pasts, batch))
    return [_scored(loaded, questions, name, teacher, *of_entry)
            for of_entry in zip(answered_each, losses_of_choices)]


def _scored(loaded: LoadedModel, questions: Questions, name: str, teacher: Teacher | None,
            answered: list[tuple], choice_losses: list[float]
            ) -> tuple[dict[str, float], list[dict]]:
    """What evaluate returns, of the numbers of every question; choice_losses: of each choice."""
    losses, tokens, ids, confidence, is_right, kl = zip(*answered)
    if not math.isfinite(sum(losses)):
        dtype = str(loaded.model.embeddings.dtype).removeprefix("torch.")
        raise Diverged(f"{name}: its loss is {sum(losses)}, not finite in {dtype}: lower --lr, or "
                       "use --dtype float32 or bfloat16")

    # Score the answers, in the order of the questions.
    scores, predictions = [], []
    for example, answer in zip(questions.examples, ids):
        prediction = loaded.vocabulary.first_line(answer)
        scores.append(data.score(example, prediction))
        predictions.append({"id": example.id, "question": example.question,
                            "prediction": prediction, "answers": list(example.answers)})
    if choice_losses:
        _score_choices(questions, choice_losses, scores, predictions)
    sums = {"loss": losses}
    if teacher:
        sums["teacher_kl"] = kl
        for score, prediction, said in zip(scores, predictions, teacher.said, strict=True):
            score["agreement"] = float(prediction["prediction"] == said)
    for prediction, score in zip(predictions, scores):
        prediction |= {key: round(100 * value, 2) for key, value in score.items()}
    calibrated, low, high = statistics.calibrated_error(np.array(confidence))
    metrics = {**{key: sum(values) / sum(tokens) for key, values in sums.items()},
               **data.mean_scores(scores), **standard_errors(questions, sums, tokens, scores),
               "calibration_error": statistics.calibration_error(np.array(confidence),
                                                                 np.array(is_right)),
               "calibrated": calibrated, "calibrated_low": low, "calibrated_high": high}
    return metrics, predictions


def _score_choices(questions: Questions, losses: list[float], scores: list[dict],
                   predictions: list[dict]) -> None:
    """Add to scores and predictions which choice is the likeliest. losses: of every choice of every
    question, in nats."""
    left = iter(losses)
    for example, score, prediction in zip(questions.examples, scores, predictions):
        of_choices = dict(zip(example.choices, left))
        prediction["choice"] = min(of_choices, key=of_choices.get)
        score["choice_accuracy"] = float(prediction["choice"] in example.answers)


def majority(questions: Questions) -> dict[str, float]:
    """The scores of the answer that is right most often, whatever is asked; {} if the questions are
    no multiple choice."""
    right = Counter(e.answers[0] for e in questions.examples if e.choices)
    share = 100 * max(right.values(), default=0) / len(questions)
    return {"accuracy": share, "choice_accuracy": share} if right else {}


def standard_errors(questions: Questions, sums: dict[str, list[float]], tokens: list[int],
                    scores: list[dict[str, float]]) -> dict[str, float]:
    """{"loss_se": ...} in the units of the means, with articles or contexts as clusters, because
    questions of one are no independent sample; {} of too few. sums: over each answer's tokens."""
    clusters = questions.clusters()
    if clusters is None:
        return {}
    errors = {f"{key}_se": statistics.ratio_error(np.array(values), np.array(tokens), clusters)
              for key, values in sums.items()}
    ones = np.ones(len(scores))
    for key in scores[0]:
        values = np.array([score[key] for score in scores])
        errors[f"{key}_se"] = 100 * statistics.ratio_error(values, ones, clusters)
    return errors


def examined(loaded: LoadedModel, settings: Settings, text: Text, questions: Questions,
             everywhere: bool = False) -> Teacher:
    """The teacher of the settings, with its own scores and answers to these questions. text: see
    teacher_text."""
    questions = with_steps(loaded, settings, text, questions)
    teacher = Teacher(loaded, text, questions, settings, keep=True)
    teacher.scores, predictions = evaluate(
        loaded, [text], teacher.questions, "before", settings.data, settings.teacher.name,
        everywhere)
    teacher.said = [prediction["prediction"] for prediction in predictions]
    return teacher


def beside(loaded: LoadedModel, settings: Settings, questions: Questions, teacher: Teacher | None,
           shared: Shared | None = None, everywhere: bool = False
           ) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(split in metrics.jsonl, name, scores) of what a prompt is compared with, each as soon as it
    is made."""
    once, prior = (shared or Shared()).once, settings.prior
    if scores := majority(questions):
        yield "majority", MAJORITY, scores
    key = (settings.model, settings.data, prior.text, prior.separator, settings.prompt.place,
           settings.teacher)
    for plain in once("plain", key, lambda: plain_prompts(loaded, prior, questions)):
        scores, _ = once(("untrained", plain.name), key, lambda: evaluate(
            loaded, [plain.past], plain.questions, settings.prompt.place, settings.data,
            plain.name, everywhere, teacher))
        yield plain.split, plain.name, scores
    if teacher:
        yield "teacher", settings.teacher.name, teacher.scores


def score_table(settings: Settings, metrics: list[dict]) -> str:
    """The scores that a run logged: without a prompt, of text prompts, of the prior's draw, at the
    last evaluation, and at the best one if that was another."""
    rows = [(MAJORITY, line) for line in metrics if line["split"] == "majority"]
    # What each prompt forgets was logged in the order of these rows.
    forgotten = [line for line in metrics if line["split"] == SPLIT]
    plain = [line for line in metrics if line["split"] in ("baseline", "text")]
    if forgotten:
        plain = [line | numbers for line, numbers in zip(plain, forgotten)]
    rows += zip(["no prompt", *text_names(settings.prior.text)], plain)
    rows += [(settings.teacher.name, line) for line in metrics if line["split"] == "teacher"]
    evals = [line for line in metrics if line["split"] == "eval"]
    if not evals and settings.imported:
        return "imported: `eval` scores it"
    if not evals:
        raise UserError("the run has no evaluation in its metrics.jsonl: go on with it by train "
                        "--out RUN --resume")
    if forgotten and forgotten[-1].get("step") == evals[-1]["step"]:
        evals[-1] = evals[-1] | forgotten[-1]
    prior, last = f"{settings.prior_name} prior", evals[-1]
    rows.append((f"{prior}, untrained", evals[0]))
    together = ""
    if settings.train.has_particles:
        together = f", {settings.train.particles} particles together"
    steps = [line["step"] for line in evals]
    best = best_evaluation(evals, steps, settings.teacher.teacher_mix)
    lowest = "objective" if "teacher_kl" in last else "loss"
    for line in [last] if best in (evals[0], last) else [best, last]:
        mark = f" (lowest {lowest})" if line is best and line is not last else ""
        if line["step"]:
            rows.append((f"{prior}, {counted(line['step'], 'step')}{together}{mark}", line))
    titles = {key: title for key, title in (SCORES | FORGETTING | SPREADS).items()
              if key not in CALIBRATION}
    return table(rows, titles)


# Settings of data that runs have in common where they are scored together, and their flags.
SAME_DATA = {"eval_limit": "--limit", "keep_unanswerable": "--keep-unanswerable",
             "max_new": "--max-new", "text": "--text", "separator": "--separator"}


def command_eval(given: dict) -> None:
    options = from_flags(EvalOptions, given)
    same = SAME_DATA if options.spec else {"eval_data": "--data", **SAME_DATA}
    runs = open_runs(options.runs, given, same)
    settings, loaded = runs[0].settings, runs[0].loaded
    questions = questions_of(runs, options)
    prose = None
    if len({opened.settings.data.forget for opened in runs}) > 1:
        say("the runs have different --forget, so prose is not scored: give --forget for all")
    else:
        check_separator(settings)
        prose = read_prose(settings.data, loaded, questions.max_length)

    # All prompts are made before the first is scored, as some may be refused.
    asked, compared = [], {}
    for opened in runs:
        run = f"{opened.run.path}: " if len(runs) > 1 else ""
        own, others = trained_prompts(opened), other_prompts(opened, options)
        asked += [(f"{run}{label}", prompts, opened.run) for label, prompts in (*own, *others)]
        compared |= {f"{run}{label}": f"{run}{own[0][0]}" for label, _ in others}

    # Score what the prompts are compared with, and then the prompts.
    teacher = teacher_of(runs, questions)
    rows = [(label, scores) for _, label, scores in beside(loaded, settings, questions, teacher)]
    entries = {label: prompts for label, prompts, _ in asked}
    scored = evaluate_all(loaded, entries, questions, settings.prompt.place, settings.data, teacher)
    for label, prompts, run in asked:
        spread = logged_spread(run) if len(prompts) > 1 else {}
        rows.append((label, scored[label][0] | spread))
    if prose:
        numbers = forgetting(loaded, settings, entries, prose)
        rows = [(label, scores | numbers.get(label, {})) for label, scores in rows]
    ablated = {}
    for opened in runs if options.ablate else ():
        ablated[str(opened.run.path)] = effects(loaded, settings, opened.prompt, questions)
    predictions = {label: of_questions for label, (_, of_questions) in scored.items()}
    differences = paired_differences(questions, predictions, compared)
    questions.say_cut()

    paths = [str(opened.run.path) for opened in runs]
    if options.json:
        record = {"run": paths[0]} if len(paths) == 1 else {"runs": paths}
        record |= {"data": questions.name, "questions": len(questions), "scores": dict(rows)}
        if differences:
            record["differences"] = dict(differences)
        if ablated:
            record["without"] = {path: dict(of_run) for path, of_run in ablated.items()}
        show(json.dumps(record))
        return
    show(f"{', '.join(paths)} on {counted(len(questions), 'question')} of {questions.name}; "
         f"scores in percent, loss in nats a token\n\n{table(rows)}")
    if differences:
        show("\npoints of difference from the trained prompt, paired by question\n"
             f"{table(differences)}")
    for path, of_run in ablated.items():
        show(f"\n{path} without each of its rows in turn\n{table(of_run, EFFECTS)}")


def other_prompts(opened: OpenRun, options: EvalOptions) -> list[tuple[str, list[llama.Prompt]]]:
    """What a run's prompt is compared with. Raises UserError where it has no such prompts."""
    others = {}
    if options.words:
        nearest = discrete(opened.prompt, opened.loaded)
        others |= {f"its nearest tokens, {metric}": prompt for metric, prompt in nearest.items()}
    if options.controls:
        if opened.settings.imported:
            raise UserError(f"{opened.run.path}: --controls compares a prompt with the draw that "
                            "it was trained from, and this one is imported: leave it out")
        drawn = opened.run.prompt(FIRST_PROMPT)
        others |= controls(drawn, opened.prompt, opened.settings.seed)
    if options.ablate:
        without_each(opened.prompt)
    return [(label, [prompt]) for label, prompt in others.items()]


def questions_of(runs: list[OpenRun], options: EvalOptions) -> Questions:
    """What runs are scored on: --data, or their own evaluation data."""
    settings, loaded = runs[0].settings, runs[0].loaded
    if options.spec is None:
        evals = evaluation_examples(settings.data)
        name = settings.data.eval_data or f"{settings.data.data}, held out"
    else:
        examples = read_questions(options.spec, 1, settings.data.keep_unanswerable)
        evals, name = sample_topics(examples, settings.data.eval_limit), options.spec
    lengths = [opened.max_length for opened in runs]
    if len({*lengths}) > 1:
        say(f"texts have at most {min(lengths)} tokens, the least of the runs' --max-length")
    return encode(evals, loaded.vocabulary, min(lengths), name)


def teacher_of(runs: list[OpenRun], questions: Questions) -> Teacher | None:
    """The teacher that all the runs have, examined; None if they have none in common, or if it
    cannot read the worked steps of these questions."""
    settings = runs[0].settings
    if len({run.settings.teacher.exam for run in runs}) > 1:
        say("the runs have different teachers, or some none, so none is scored: eval them one by "
            "one")
        return None
    if not settings.teacher.teaches:
        return None
    if settings.teacher.teacher_reasons == "data":
        if without_steps(questions):
            say(f"{questions.name}: no worked steps in it for the teacher to read, so it is not "
                "scored")
            return None
        longest, name = longest_steps(questions)
        if longest > settings.teacher.teacher_steps:
            say(f"the worked steps of {name} have {longest} tokens, more than the run's "
                f"--teacher-steps {settings.teacher.teacher_steps}: its teacher is not scored")
            return None
    text = teacher_text(runs[0].loaded, settings)
    return examined(runs[0].loaded, settings, text, questions)


def evaluate_all(loaded: LoadedModel, entries: dict[str, list[llama.Prompt]], questions: Questions,
                 place: str, settings: DataSettings, teacher: Teacher | None
                 ) -> dict[str, tuple[dict[str, float], list[dict]]]:
    """The scores and predictions of entries {label: prompts}, as evaluate gives them."""
    scores = {}
    for name, labels in grouped(entries):
        results = evaluate_each(loaded, [entries[label] for label in labels], questions, place,
                                settings, name, teacher=teacher)
        scores |= zip(labels, results)
    return scores


def logged_spread(run: Run) -> dict[str, float]:
    """How the posterior shown lay in its prior, as training logged it; {} if it was not logged, as
    by early versions."""
    evals = [line for line in run.metrics() if line["split"] == "eval"
             and run.step in (None, line["step"])]
    return {key: evals[-1][key] for key in SPREADS if evals and key in evals[-1]}


def trained_prompts(opened: OpenRun) -> list[tuple[str, list[llama.Prompt]]]:
    """A run's prompt; of a posterior its mean if it keeps one, each of its prompts, and all of them
    together."""
    settings = opened.settings
    kind = "prompt" if settings.imported else "prior, trained"
    if opened.run.step is not None and not settings.imported:
        kind = "prior, untrained"
        if opened.run.step:
            kind = f"prior, {counted(opened.run.step, 'step')}"
    name = f"{settings.prior_name} {kind}"
    if settings.train.posterior == "point":
        return [(name, [opened.prompt])]
    prompts = [prompt.to(opened.loaded.device) for prompt in opened.run.prompts()]
    member = "particle" if settings.train.has_particles else "draw"
    entries = []
    if settings.train.representative == "mean prompt":
        entries = [(f"{name}: mean prompt", [opened.prompt])]
    entries += [(f"{name}: {member} {k}", [prompt]) for k, prompt in enumerate(prompts, 1)]
    return [*entries, (f"{name}: ensemble of {len(prompts)}", prompts)]


# --------------------------------------------------------------------------------------------------
# generate


def command_generate(given: dict) -> None:
    options = from_flags(GenerateOptions, given)
    paths, lines = [*options.paths], []
    if options.batch is not None:
        text = data.read_text(not_foreign(options.batch))
        lines = list(data.json_lines(text, options.batch))
        if not lines:
            raise UserError(f"{options.batch}: no line in it: give JSON lines with a text each")
    else:  # one text is a batch of one line
        lines = [("the text", {"text": paths.pop()})]
    if not paths:
        [alone] = options.paths
        what = "a RUN without a TEXT" if Path(alone).is_dir() else "a TEXT without a RUN before it"
        raise UserError(f"generate {alone}: this is {what}: give a RUN and a TEXT, or a RUN and "
                        "--batch FILE of JSON lines with a text each")
    runs = open_runs(paths, given, {"max_new": "--max-new"})
    # All are checked before the first is answered.
    rows = [_asked(runs, where, line) for where, line in lines]

    size = runs[0].settings.data.batch_size
    for start in range(0, len(rows), size):
        for (_, line), *of_runs in zip(lines[start:], *_continued(runs, rows[start:start + size])):
            for path, answer in zip(paths, of_runs):
                about = {"run": path} if len(paths) > 1 else {}
                if options.batch is not None:
                    show(json.dumps({**line, **about, "answer": answer}))
                else:
                    show(f"{path}: {answer}" if about else answer)


def _asked(runs: list[OpenRun], where: str, line: dict) -> data.Row:
    """The text of a line as a row whose answer is still to come."""
    settings, text = runs[0].settings, line.get("text")
    if not isinstance(text, str):
        raise UserError(f'{where}: no text in it: expected {{"text": "..."}}')
    ids = runs[0].vocabulary.encode(text)
    if len(ids) < (2 if settings.prompt.place == "after-bos" else 1):
        raise UserError(f"{where}: an empty text has nothing to go on from: give one with words")
    longest = max(rows_per_layer(opened.settings.prior) for opened in runs)
    room = runs[0].model.config.max_position_embeddings - longest - settings.data.max_new
    if len(ids) > room:
        raise UserError(f"{where} has {len(ids)} tokens, and {room} fit beside the prompt and "
                        "--max-new: shorten it")
    return data.Row([*ids, 0], len(ids), ids, "", 0)


@torch.no_grad()
def _continued(runs: list[OpenRun], rows: list[data.Row]) -> list[list[str]]:
    """What the model says after each row under the prompt of each run, to the end of the line: a
    list for each run."""
    settings, loaded = runs[0].settings, runs[0].loaded
    batch = data.collate(rows, settings.data.share, settings.prompt.place == "suffix")
    past, batch = begin(loaded.model, batch.to(loaded.device), [opened.prompt for opened in runs],
                        settings.prompt.place)
    generated = llama.generate(loaded.model, batch.asked, past, settings.data.max_new,
                               loaded.vocabulary.stop, batch.parent)
    lines = [loaded.vocabulary.first_line(ids) for ids in generated]
    return [lines[i:i + len(rows)] for i in range(0, len(lines), len(rows))]
