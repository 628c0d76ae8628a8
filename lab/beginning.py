"""What a run begins with: files that are read and checked, priors that are fitted, rows that are
drawn.

    inputs = read_inputs(run, settings, None, False)       # the model and the questions
    begun = begin_run(inputs)                              # the prior's draw
    posterior = make_posterior(settings, begun, answers)   # what training moves

Nothing is written here. What several runs of a process have in common is made once (inputs.Shared).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

import data
import priors
from lab import posteriors
from lab.console import UserError, counted, say
from lab.distil import Lessons, Teacher, check_reasons, learn, teacher_text
from lab.evaluation import examined
from lab.folder import Run
from lab.inputs import (LoadedModel, Questions, Shared, check_place, checksums, divided, encode,
                        layers_with_rows, load_model, longest_text)
from lab.populations import (Reference, directions, draw, fit, gaussian_like, population_key,
                             prefix_of, prefix_references, references)
from lab.processes import broadcast, only_first, use_threads
from lab.settings import Settings, from_config


class Inputs(NamedTuple):
    """What a run is trained with, read and checked."""

    settings: Settings  # with what loading found out: the commit, the longest text
    loaded: LoadedModel
    layers: list[int]  # that own rows
    examples: list[data.Example]  # to train on
    questions: Questions  # the same, those that fit
    evaluation: Questions
    held_out: Questions | None  # to choose settings by, with --hold-out
    sums: dict[str, str]  # checksums of the files
    shared: Shared  # what runs of one process have in common
    lessons: Lessons = Lessons()  # of a teacher, if there is one
    exam: Teacher | None = None  # the teacher of the evaluation's questions
    held_out_exam: Teacher | None = None


def read_inputs(run: Run, settings: Settings, config: dict | None, is_resumed: bool,
                shared: Shared | None = None) -> Inputs:
    """Load the model and the questions. config: that of the run to go on with or to repeat, whose
    files must be the same."""
    shared = shared or Shared()
    once, shard = shared.once, settings.train.shard
    loaded = once("model", (settings.model, shard), lambda: load_model(settings.model, shard))
    loaded.model.recompute = settings.train.recompute  # all that a run sets of a shared model
    check_place(settings.prompt, loaded, settings.model.model)
    # Everything that can be wrong with the settings is found before the data is tokenised.
    L = loaded.model.config.num_hidden_layers
    layers = layers_with_rows(settings.prior, L, settings.prompt)
    max_length = longest_text(loaded, settings.data, settings.prior, settings.teacher)
    examples, evals, held_out = once("examples", settings.data, lambda: divided(settings.data))
    sums = only_first(lambda: {**checksums(settings, shared),
                               "tokenizer": loaded.vocabulary.sha256})
    if config:
        use_threads(config["threads"])  # sums are then added in the same order
        check_unchanged(run, settings, config, sums, is_resumed)

    # The run records the commit and the longest text with its settings.
    settings = replace(settings, model=replace(settings.model, revision=loaded.revision),
                       data=replace(settings.data, max_length=max_length))

    fitting = partial(encode, vocabulary=loaded.vocabulary, max_length=max_length)
    encoded = once("questions", (settings.model, settings.data), lambda: (
        fitting(examples, name="training"), fitting(evals, name="evaluation"),
        fitting(held_out, name="held-out") if held_out else None))
    questions, evaluation, _ = encoded
    check_reasons(settings.teacher, [part for part in encoded if part])
    say(f"{run.path}: model {Path(settings.model.model).name}, {counted(L, 'layer')} of width "
        f"{loaded.model.config.hidden_size}, {settings.model.dtype} on {settings.model.device}; "
        f"{counted(len(questions), 'question')} to train on, {len(evaluation)} to evaluate")
    if settings.prompt.cut and 0 in layers:
        say("the outputs of rows at the tokens are cut after their layer (--cut): a real model "
            "learned far less from such rows than with --keep (docs/prefixes.md)")
    return Inputs(settings, loaded, layers, examples, *encoded, sums, shared)


def with_teacher(inputs: Inputs, run: Run, config: dict | None) -> Inputs:
    """The inputs with what a teacher teaches. config: of the run that is resumed."""
    settings, once = inputs.settings, inputs.shared.once
    key = settings.model, settings.data, settings.teacher.exam, settings.prior.separator
    text = once("teacher's text", key, lambda: teacher_text(inputs.loaded, settings))
    exam, held_out_exam = once("exam", key, lambda: [
        examined(inputs.loaded, settings, text, questions, settings.train.shard)
        if questions else None for questions in (inputs.evaluation, inputs.held_out)])
    lessons = learn(run, inputs.loaded, settings, text, inputs.questions, config, inputs.shared)
    return inputs._replace(questions=lessons.questions, lessons=lessons, exam=exam,
                           held_out_exam=held_out_exam)


def check_unchanged(run: Run, settings: Settings, config: dict, sums: dict[str, str],
                    is_resumed: bool) -> None:
    """Raises UserError if files are not those that the run of config.json began with. A run like
    it may name other files, whose checksums differ; a run that is resumed may only name other
    places of the same."""
    names = [(s.model.model, s.prior.prior, s.prior.reference, s.data.data, s.data.eval_data,
              s.data.forget) for s in (settings, from_config(config))]
    names_the_same = names[0] == names[1]
    earlier = config["sha256"]
    changed = [key for key in {**earlier, **sums} if earlier.get(key) != sums.get(key)
               and (key in earlier or key != "tokenizer")]  # which early runs lack
    if changed and (names_the_same or is_resumed):
        raise UserError(f"{run.path}: the {' and the '.join(changed)} changed since the run began, "
                        "so it cannot come to the same end: restore the files, or start another "
                        "run")


class Beginning(NamedTuple):
    """What training begins from."""

    by_layer: dict[int, Reference]  # the first process alone has it, unless --shard
    start: dict[int, Tensor]  # {layer: (K, n, ...)}: the prior's draws
    scales: dict[int, float]  # the root mean square of each layer's reference
    fitted: dict[int, priors.Prior]  # {} if their density is not asked for
    gaussians: dict[int, posteriors.Gaussian]  # of gaussian_like; {} if one prompt is trained
    reports: list[dict]  # what the prior of each layer says of itself
    bases: dict[int, Tensor]  # the directions of --subspace


def begin_run(inputs: Inputs) -> Beginning:
    """Fit the prior and draw from it. The first process does it for all, so that they begin from
    the same rows to the bit."""
    settings, model = inputs.settings, inputs.loaded.model
    kept: dict[int, Reference] = {}  # too large to be sent to the others

    def work() -> Beginning:
        prior, key = settings.prior, population_key(settings, inputs.layers)
        by_layer = inputs.shared.once("references", key, lambda: references(
            prior, settings.data, inputs.loaded, inputs.layers, settings.prompt.method,
            inputs.examples))
        # One of every prior is kept, because the next seed asks for all of them again.
        fitted = inputs.shared.once(("fitted", prior.prior), key, lambda: fit(prior, by_layer))
        is_point = settings.train.posterior == "point"
        drawn = draw(prior, by_layer, 1 if is_point else settings.train.particles, fitted)
        start, gaussians = drawn.rows, {}
        if not is_point:
            gaussians = {i: gaussian_like(prior, by_layer[i]) for i, prior in drawn.fitted.items()}
        if settings.prompt.method == "prefix":
            start = {i: prefix_of(model, i, draws[0], by_layer[i])[None]
                     for i, draws in start.items()}
            by_layer = prefix_references(model, by_layer)
        kept.update(by_layer)
        scales = {i: float(r.rows.square().mean().sqrt()) for i, r in by_layer.items()}
        fitted = drawn.fitted if settings.train.prior_weight else {}
        for i, prior in fitted.items():
            prior.log_prob(drawn.rows[i][0])  # of too few rows there is none: refused before a step
        return Beginning({}, start, scales, fitted, gaussians, drawn.reports,
                         directions(settings.prompt, by_layer, settings.seed))

    if settings.train.shard:  # a reference may need the weights, which all hold together
        begun = work()
        begun = begun._replace(start=broadcast(begun.start), bases=broadcast(begun.bases))
    else:
        begun = only_first(work)
    return begun._replace(by_layer=kept)


def make_posterior(settings: Settings, begun: Beginning, answers: float) -> posteriors.Point:
    """answers: the tokens of all answers to train on."""
    start, scales, reparam = begun.start, begun.scales, settings.prompt.reparam
    if frozen := settings.prompt.frozen_tokens:
        return posteriors.PartlyFrozen(start, scales, 1 / answers, settings.seed, frozen)
    if begun.bases:
        return posteriors.Confined(start, scales, 1 / answers, settings.seed, begun.bases)
    if reparam != "none":
        return posteriors.Encoded(start, scales, 1 / answers, settings.seed, reparam)
    kind = posteriors.POSTERIORS[settings.train.posterior]
    units = begun.gaussians or scales
    return kind(start, units, 1 / answers, settings.seed)
