"""Training the prompt of a frozen model: the loop, and the command train.

    Training(run, settings, loaded, posterior, questions, penalty, evaluate).go(checkpoint)

The loop writes everything of the run's folder except config.json and the figures; the folder itself
is folder.py's.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor

import data
import llama
import priors
from lab import posteriors
from lab.beginning import Inputs, begin_run, make_posterior, read_inputs, with_teacher
from lab.commands import TrainOptions
from lab.console import (Diverged, Stopped, UserError, counted, file_list, out_of_memory, progress,
                         say, scores_line, show)
from lab.distil import Teacher
from lab.evaluation import beside, evaluate, score_table
from lab.folder import (CONFIG, FIRST_PROMPT, LAST_PROMPT, LOG, Checkpoint, Run, check_fits,
                        read_config, snapshot, versions)
from lab.forgetting import check_separator, log_forgetting, read_prose
from lab.inputs import LoadedModel, Questions, Shared, mean_answer_tokens
from lab.loss import answer_loss, begin, taught_loss
from lab.pictures import draw_run
from lab.populations import Reference, norm_ratio
from lab.processes import (SIGNALS, all_reduce_gradients, all_reduce_sum, barrier, broadcast,
                           collect_signals, init_processes, keep_freed_memory, only_first,
                           rank_and_size)
from lab.settings import (MAY_CHANGE, MAY_MOVE, Settings, differences, flag_name, flags_like,
                          flags_of, flat, free_name, from_config, from_flags, spec_name, with_flags)

# --------------------------------------------------------------------------------------------------
# the loop


def schedule(step: int, steps: int, warmup: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then half a cosine to a tenth."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Training:
    """The loop that trains a posterior, step by step, from any checkpoint on.

    Every member's objective is its loss on the batch / (questions of the batch * answer_tokens)
    + prior_weight * penalty(member), and that of a Gaussian has its extra_loss too; see
    docs/posteriors.md. The loss is the cross-entropy of the answers, or taught_loss. Divided by the
    batch's own number of answer tokens, as the loss that is logged, it would be biased: a token
    would weigh less in a batch of long answers. The batch of a step is a pure function of the seed
    and the step. Of several processes each has its share of the batch, and gradients are
    summed."""

    def __init__(self, run: Run, settings: Settings, loaded: LoadedModel,
                 posterior: posteriors.Point, questions: Questions,
                 penalty: Callable[[dict[int, Tensor]], Tensor] | None,
                 evaluate: Callable[[int], tuple[dict, list[dict]]], answer_tokens: float,
                 teacher: Teacher | None = None):
        """evaluate(step) scores the prompt as it is: metrics and predictions. penalty: -log p of a
        member's numbers over the answer tokens of the training data; None: no prior in the loss.
        answer_tokens: the mean number of a question's. teacher: of the same questions."""
        self.run, self.settings, self.loaded = run, settings, loaded
        self.posterior, self.questions = posterior, questions
        self.penalty, self.evaluate, self.answer_tokens = penalty, evaluate, answer_tokens
        self.teacher = teacher
        self.order = data.Order([e.context for e in questions.examples], settings.data.batch_size,
                                settings.seed, settings.data.share)
        self.parameters = [p for p in posterior.parameters() if p.requires_grad]
        self.optimiser = posterior.optimiser(settings.train.lr, settings.train.lr_factor)
        for group in self.optimiser.param_groups:
            group["peak"] = group["lr"]
        self.step = 0  # steps that were made
        self.evaluation_due = True  # whether the evaluation of this step is still to come
        self.saved_step: int | None = None  # the step of the newest checkpoint
        self.skipped = 0  # steps that were left out because a number was not finite
        self.progress = ""  # of the last step, for the progress line
        self.batch: data.Batch | None = None  # the last one, for a message about memory
        self.seconds: dict[str, list[float]] = {"steps": [], "evaluations": []}

    def go(self, checkpoint: Checkpoint | None = None) -> None:
        """Train to the last step, from a checkpoint if one is given; the run was cut back to it.

        Raises Stopped on SIGINT, SIGTERM and SIGHUP, after the step, and when a loss is not finite,
        a file cannot be written, the folder was moved or memory does not suffice. The checkpoints
        are whole then."""
        if checkpoint:
            self._restore(checkpoint)
        steps = self.settings.train.steps
        with self._explain_failures(), collect_signals() as received, progress(
                total=steps, initial=self.step, desc="train", unit=" steps") as bar:
            bar.seconds_left = self._seconds_left
            while self.evaluation_due or self.step < steps:
                started = time.perf_counter()
                if self.evaluation_due:
                    self._record()
                    self.seconds["evaluations"].append(time.perf_counter() - started)
                else:
                    self._train_step()
                    self._finish_step()
                    self.seconds["steps"].append(time.perf_counter() - started)
                    bar.set_postfix_str(self.progress, refresh=False)
                    bar.update()
                self._stop_if_signalled(received)

    def _seconds_left(self) -> float:
        """An estimate from the mean seconds of the steps and evaluations made so far."""
        train, means = self.settings.train, {}
        for kind, seconds in self.seconds.items():
            means[kind] = sum(seconds) / max(len(seconds), 1)
        past = self.step - 1 if self.evaluation_due else self.step
        made = past // train.eval_every  # without that of step 0: -1 while it is still to come
        evaluations = math.ceil(train.steps / train.eval_every) - made
        return (train.steps - self.step) * means["steps"] + evaluations * means["evaluations"]

    # ----------------------------------------------------------------------------------------------
    # a step

    def _train_step(self) -> None:
        """One step of the optimiser, or none if a number is not finite."""
        start, train, device = time.perf_counter(), self.settings.train, self.loaded.device
        share = schedule(self.step, train.steps, train.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * share
        self.batch = self._batch_of(self.step)
        tokens, examples = all_reduce_sum(int((self.batch.labels != data.NO_LABEL).sum()),
                                          len(self.batch.tails), device=device)

        # Leave the gradient of the posterior, summed over the processes, in the parameters.
        loss, kl, penalty = self._backward(examples)
        all_reduce_gradients(self.parameters)
        loss, kl = (total / tokens for total in all_reduce_sum(loss, kl, device=device))
        largest = train.clip if self.posterior.clips else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, largest).item()

        # Step only if all numbers are finite: one that is not would spoil every row for good.
        rate = self.optimiser.param_groups[0]["lr"]
        if math.isfinite(loss + kl + penalty + norm):
            self.optimiser.step()
            seconds = max(time.perf_counter() - start, 1e-9)  # some clocks stand still
            line = {"step": self.step + 1, "split": "train", "loss": loss, "lr": rate,
                    "grad_norm": norm, "examples_per_second": round(examples / seconds, 2),
                    "seconds": round(seconds, 4)}
            self.progress = f"loss {loss:.3f}, {examples / seconds:.1f} questions/s"
            if self.teacher:
                line["teacher_kl"] = kl
                self.progress = f"teacher KL {kl:.3f}, {self.progress}"
            if self.penalty:
                line["penalty"] = penalty
            self.run.log(line)
        else:
            self._skip(loss, norm, rate)
        self.optimiser.zero_grad()

    def _share_of(self, step: int) -> list[int]:
        """This process's share of the questions of a step."""
        indices, (rank, size) = self.order[step], rank_and_size()
        return indices[rank * len(indices) // size:(rank + 1) * len(indices) // size]

    def _batch_of(self, step: int) -> data.Batch:
        return self.questions.batch(self._share_of(step), self.settings.data.share,
                                    self.settings.prompt.place, self.loaded.device)

    def _backward(self, examples: float) -> tuple[float, float, float]:
        """Leave every member's gradient in the parameters -> the summed cross-entropy of this
        process's answers, their divergence from the teacher's (0 without one), and the weighted
        penalty, all means over the members. examples: the questions of all processes."""
        model, prompt = self.loaded.model, self.settings.prompt
        size, weight = rank_and_size()[1], self.settings.train.prior_weight
        members = self.posterior.members(self.step)
        extra = self.posterior.extra_loss()
        loss, kl, penalty, states = 0.0, 0.0, 0.0, None
        if self.teacher:
            states = self.teacher.states(self._share_of(self.step), self.batch.labels)
        for layers in members:
            past, batch = begin(model, self.batch, llama.Prompt(layers, prompt.cut), prompt.place)
            if states is None:
                summed, _ = answer_loss(model, past, batch)
                member_loss, member_kl = summed.item(), 0.0
            else:
                summed, member_loss, member_kl = taught_loss(
                    model, past, batch, states, self.settings.teacher.teacher_mix)
            objective = summed / (examples * self.answer_tokens)
            if self.penalty:
                member_penalty = self.penalty(layers)
                objective = objective + weight * member_penalty / size
                penalty += weight * member_penalty.item() / len(members)
            objective.backward()
            loss += member_loss / len(members)
            kl += member_kl / len(members)
        if extra is not None:
            (weight * extra / size).backward()
            penalty += weight * extra.item()
        return loss, kl, penalty

    def _skip(self, loss: float, norm: float, rate: float) -> None:
        """Leave out a step whose numbers are not finite, or stop if that happened too often."""
        self.skipped += 1
        ids = [self.questions.examples[i].id for i in self.order[self.step]]
        if self.skipped > self.settings.train.skip_bad_steps:
            listed = ", ".join(ids[:4]) + (" ..." if len(ids) > 4 else "")
            peak = max(group["peak"] for group in self.optimiser.param_groups)
            raise Diverged(
                f"loss {loss:.4g}, gradient norm {norm:.4g} at step {self.step + 1}, learning rate "
                f"{rate:.3g}, on {listed}: not finite, stopped before it could spoil the rows: "
                f"lower --lr (now at most {peak:.3g}), or leave such steps out by "
                f"--skip-bad-steps", f"; {self._how_to_go_on()}")
        self.run.log({"step": self.step + 1, "split": "skipped", "lr": rate, "ids": ids})

    def _finish_step(self) -> None:
        train = self.settings.train
        self.step += 1
        self.evaluation_due = self.step % train.eval_every == 0 or self.step == train.steps
        if self.evaluation_due:
            # The evaluation may take longer than the steps since the last one.
            self.save()
        elif train.snapshot_every and self.step % train.snapshot_every == 0:
            self._write_prompt(snapshot(self.step))

    # ----------------------------------------------------------------------------------------------
    # what is written

    def _record(self) -> None:
        """Score the prompt as it is, and write the prompt and the scores."""
        metrics, predictions = self.evaluate(self.step)
        self._write_prompt(snapshot(self.step))
        self._write_prompt(LAST_PROMPT)
        lines = [json.dumps(prediction) + "\n" for prediction in predictions]
        self.run.write("predictions.jsonl", "".join(lines).encode())
        # The log comes after what it scores: its last scores are never of a prompt to come.
        self.run.log({"step": self.step, "split": "eval", **metrics, **self.posterior.report()})
        say(f"step {self.step}: {scores_line(metrics)}")
        self.evaluation_due = False
        self.save()

    def _write_prompt(self, name: str) -> None:
        tensors = {key: t.float().cpu().contiguous() for key, t in self.posterior.tensors().items()}
        self.run.write_prompt(name, tensors, self.settings, self.step)

    def save(self) -> None:
        """Write a checkpoint: the parameters and the optimiser's state of each."""
        tensors = {}
        for name, p in self.posterior.named_parameters():
            tensors[f"rows.{name}"] = p
            for key, value in self.optimiser.state[p].items():
                tensors[f"{key}.{name}"] = value
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        self.run.save_checkpoint(self.step, tensors, self.evaluation_due, self.settings)
        self.saved_step = self.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        if not (self.run.path / FIRST_PROMPT).exists() and checkpoint.step:
            self._write_prompt(FIRST_PROMPT)  # the posterior is still as the prior drew it
        self.step = self.saved_step = checkpoint.step
        self.evaluation_due = checkpoint.due
        for name, p in self.posterior.named_parameters():
            p.data.copy_(checkpoint.tensors[f"rows.{name}"])
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in checkpoint.tensors:
                    t = checkpoint.tensors[f"{key}.{name}"].clone()
                    state[key] = t if key == "step" else t.to(p.device)
            if state:
                self.optimiser.state[p] = state
        if not checkpoint.due:
            self._write_prompt(LAST_PROMPT)  # it may be lost, or of a later step
        barrier()  # all processes read the same log
        self.skipped = sum(line["split"] == "skipped" for line in self.run.metrics())

    # ----------------------------------------------------------------------------------------------
    # what ends it early

    def _how_to_go_on(self) -> str:
        size = rank_and_size()[1]
        command = f"torchrun --nproc-per-node {size} promptprior.py " if size > 1 else ""
        place = self.run.place
        if place is None:
            return "its folder is gone, and with it the run: train it again"
        return (f"{place}/checkpoints holds step {self.saved_step}; go on with: {command}train "
                f"--out {place} --resume")

    def _stop_if_signalled(self, received: list[int]) -> None:
        # Processes may have received different signals. All stop by the same one.
        *counts, moved = all_reduce_sum(*map(received.count, SIGNALS), self.run.is_elsewhere,
                                        device=self.loaded.device)
        number = next((s for s, count in zip(SIGNALS, counts) if count), None)
        if number is None and not moved:
            return
        if self.saved_step != self.step:
            self.save()
        self._write_prompt(LAST_PROMPT)
        if moved:
            raise Stopped(f"{self.run.path}: its folder was moved or replaced while it trained; "
                          f"all is saved up to step {self.step}; {self._how_to_go_on()}", 1)
        raise Stopped(f"stopped by {signal.Signals(number).name} after step {self.step} of "
                      f"{self.settings.train.steps}, all is saved; {self._how_to_go_on()}", -number)

    @contextlib.contextmanager
    def _explain_failures(self) -> Iterator[None]:
        """Turn a disk or a memory that fails into Stopped, with how to go on."""
        try:
            yield
        except OSError as e:
            raise Stopped(f"{e}; {self._how_to_go_on()}", 1) from e
        except Exception as e:
            if not out_of_memory(e):
                raise
            where = f"in the evaluation at step {self.step}"
            if not self.evaluation_due:
                where = f"at step {self.step + 1}, in a batch{self._batch_description()}"
            settings = self.settings.data
            raise Stopped(f"out of memory {where}: begin again with a smaller --batch-size (now "
                          f"{settings.batch_size}) or --max-length (now {settings.max_length}), or "
                          f"with --recompute; {self._how_to_go_on()}", 1) from e

    def _batch_description(self) -> str:
        if self.batch is None:
            return ""
        parts = [t for t in (self.batch.shared, self.batch.head, self.batch.tails) if t is not None]
        longest = sum(t.shape[1] for t in parts)
        return f" of {counted(len(self.batch.tails), 'question')} with up to {longest} tokens"


# --------------------------------------------------------------------------------------------------
# the command


def command_train(given: dict) -> None:
    options = from_flags(TrainOptions, given)
    names = {f.name for f in fields(TrainOptions)}
    flags = {name: value for name, value in given.items() if name not in names}
    if options.resume and options.config:
        raise UserError("--resume goes on with a run's own config.json, --config begins another "
                        "run like it: give one of the two")
    if options.resume and "out" not in flags:
        raise UserError("--resume needs --out, the folder of the run to go on with")
    if options.resume:
        run = Run(Path(flags["out"]))
        # A start that was cut short left a folder and nothing of a run in it: it begins again.
        was_cut_short = run.empty and run.path.exists() and any(run.path.iterdir())
        if not was_cut_short:
            return resume(run, flags, options.any_processes)

    config = read_config(Path(options.config)) if options.config else None
    explicit = set(flags) - {"out"}
    if config:
        flags = flags_like(config, flags)
        explicit |= set(flags_of(config))
    settings = Settings.from_flags(flags).complete()
    init_processes(settings.model.device, settings.data.batch_size, settings.train.shard)
    out = broadcast(settings.train.out or free_name(settings))
    settings = replace(settings, train=replace(settings.train, out=out))
    run = Run(Path(out))
    remedy = "go on with it by --resume, "
    only_first(lambda: check_new(run, options.overwrite, remedy))
    with locked_together(run):
        # Another process may have begun it since.
        only_first(lambda: check_new(run, options.overwrite, remedy))
        train_run(run, settings, config, sorted(explicit))


def check_new(run: Run, overwrite: bool, remedy: str = "") -> None:
    """Raises UserError unless a run may begin here: where nothing is, or a run that may be
    overwritten."""
    if not run.empty:
        run.config()  # refuses what is not a run, which is never overwritten
        if not overwrite:
            raise UserError(f"{run.path} exists: {remedy}replace it by --overwrite, or choose "
                            "another --out")


def resume(run: Run, flags: dict, any_processes: bool) -> None:
    """Go on with a run from its newest checkpoint. any_processes: also with another number of them
    than it began with."""
    config, stored = run.config(), run.settings()
    kinds = [priors.parse(prior)[:2] for prior in (stored.prior.prior, flags.get("prior", "vocab"))]
    fixed = {name: value for name, value in flags.items() if name not in MAY_CHANGE + MAY_MOVE
             or name == "prior" and kinds[0] != kinds[1]
             or name == "forget" and stored.data.forget is None}
    conflicts = differences(stored, fixed)
    if conflicts:
        changeable = ", ".join(map(flag_name, MAY_CHANGE))
        raise UserError(f"{run.path}: a run goes on with its own settings, not with "
                        f"{'; '.join(conflicts)}: leave them out, or start another run; only "
                        f"{changeable} may change, and paths to the same files")
    if stored.imported:
        raise UserError(f"{run.path}: an imported prompt has no training to go on with: start one "
                        f"from it by --prior posterior:{run.path},resample=1")
    changes = {name: value for name, value in flags.items() if name in MAY_CHANGE + MAY_MOVE}
    settings = with_flags(stored, changes).complete()
    init_processes(settings.model.device, settings.data.batch_size, settings.train.shard)
    processes = config.get("processes", 1)
    size = rank_and_size()[1]
    if processes != size and not any_processes:
        raise UserError(f"{run.path}: begun by {processes} processes, and with {size} sums would "
                        f"round differently: start {processes} by torchrun, or give "
                        "--any-processes, and the run does not end in the same bytes")
    with locked_together(run):
        if run.config() != config:
            raise UserError(f"{run.path}: another process just replaced it: look, and try again")
        train_run(run, settings, config, None)


@contextlib.contextmanager
def locked_together(run: Run) -> Iterator[None]:
    """Hold the run's lock in the first process. If it is refused there, all processes stop."""
    with contextlib.ExitStack() as stack:
        remark = only_first(lambda: stack.enter_context(run.lock()))
        if remark:
            say(remark)
        yield


def train_run(run: Run, settings: Settings, config: dict | None, explicit: list[str] | None,
              shared: Shared | None = None) -> None:
    """Train a run. Everything is read and checked before the first byte of it is written.

    config: the config.json of the run that is resumed or repeated, else None. explicit: the flags
    that the user gave for a run that begins; None when a run is resumed. shared: what runs that
    this process trained before have left for others."""
    started = time.time()
    keep_freed_memory()
    checkpoint = checkpoint_of(run, settings) if explicit is None else None
    inputs = read_inputs(run, settings, config, explicit is None, shared)
    settings, loaded = inputs.settings, inputs.loaded
    if explicit is not None:
        check_separator(settings)
    prose = read_prose(settings.data, loaded, settings.data.max_length)

    # Fit the prior, and make the posterior from its draw.
    begun = begin_run(inputs)
    if settings.teacher.teaches:
        inputs = with_teacher(inputs, run, config if explicit is None else None)
    mean_tokens = only_first(lambda: mean_answer_tokens(inputs.questions))
    answers = mean_tokens * len(inputs.questions)
    posterior = make_posterior(settings, begun, answers).to(loaded.device)
    if checkpoint:
        check_fits(posterior, checkpoint, run.path)

    def evaluate_posterior(step: int, questions: Questions = inputs.evaluation,
                           exam: Teacher | None = inputs.exam):
        prompts = [llama.Prompt(layers, settings.prompt.cut) for layers in posterior.evaluated()]
        return evaluate(loaded, prompts, questions, settings.prompt.place, settings.data,
                        f"step {step}", settings.train.shard, exam)

    def penalty(layers: dict[int, Tensor]) -> Tensor:
        # The loss is a mean over answer tokens, so -log p is divided by their number: with weight 1
        # the sum is the negative log posterior, up to a factor. An estimate of the number will do,
        # because loss and penalty are divided by the same one.
        log_p = sum(begun.fitted[i].log_prob(rows.cpu()).sum() for i, rows in layers.items())
        return -log_p.to(loaded.device) / answers

    training = Training(run, settings, loaded, posterior, inputs.questions,
                        penalty if settings.train.prior_weight else None, evaluate_posterior,
                        mean_tokens, inputs.lessons.teacher)
    if checkpoint:
        record_changes(run, settings, config, checkpoint.step)
    begin_or_cut_back(training, checkpoint, inputs,
                      flags_of(config) if explicit is None else explicit, begun.reports)
    if not checkpoint or not checkpoint.metrics_bytes:
        # What the prompt is compared with.
        for split, name, scores in beside(loaded, settings, inputs.evaluation, inputs.exam,
                                          inputs.shared, settings.train.shard):
            run.log({"split": split, **scores})
            say(f"{name}: {scores_line(scores)}")
        inputs.evaluation.say_cut()
    training.go(checkpoint)
    if inputs.held_out:
        metrics, _ = evaluate_posterior(training.step, inputs.held_out, inputs.held_out_exam)
        run.log({"step": training.step, "split": "held_out", **metrics})
    if prose:
        prompts = [llama.Prompt(layers, settings.prompt.cut) for layers in posterior.evaluated()]
        log_forgetting(run, settings, loaded, prose, prompts, training.step)
    if rank_and_size()[0] == 0:
        inputs.questions.say_cut()
        report(run, settings, begun.by_layer, len(inputs.evaluation))
        show(f"{time.time() - started:.0f} s; {run.path}: prompt.safetensors, predictions.jsonl, "
             f"metrics.jsonl, {file_list(draw_run(run, settings, begun.by_layer))}")


def checkpoint_of(run: Run, settings: Settings) -> Checkpoint | None:
    """Where a run stood; None if it has neither a checkpoint nor anything that would be lost if it
    began anew. Says which newer checkpoints are damaged."""
    if not run.checkpoints() and not run.metrics() and not run.has_prompt:
        return None
    checkpoint, damaged = run.load_checkpoint()
    if checkpoint.step > settings.train.steps:
        raise UserError(f"{run.path}: it is at step {checkpoint.step} already: give --steps of at "
                        "least that")
    for problem in damaged:
        say(f"{problem}: going on from step {checkpoint.step}")
    return checkpoint


def begin_or_cut_back(training: Training, checkpoint: Checkpoint | None, inputs: Inputs,
                      flags: list[str], reports: list[dict]) -> None:
    """Take the run's folder back to a checkpoint. Without one it begins: with what the run is and
    its first checkpoint, so that there always is one."""
    if checkpoint:
        training.run.cut_back(checkpoint)
        inputs.lessons.keep(training.run)  # what the teacher wrote may be lost
        return
    with training.run.beginning():
        write_config(training.run, inputs, flags, reports, training.posterior)
        inputs.lessons.keep(training.run)
        training.run.write(LOG, b"")
        training.save()


def write_config(run: Run, inputs: Inputs, flags: list[str], reports: list[dict],
                 posterior: posteriors.Point) -> None:
    train = inputs.settings.train
    groups = posterior.groups(train.lr, train.lr_factor)
    run.write_json(CONFIG, {
        "settings": flat(inputs.settings), "given": flags, "priors": reports,
        "learning_rates": {group["name"]: group["lr"] for group in groups},
        "threads": torch.get_num_threads(), "processes": rank_and_size()[1], "versions": versions(),
        "sha256": inputs.sums, **inputs.lessons.record})


def record_changes(run: Run, settings: Settings, config: dict, step: int) -> None:
    """Write into config.json with which other settings a run goes on, if there are any."""
    stored, values = flat(from_config(config)), flat(settings)
    stored["processes"], values["processes"] = config.get("processes", 1), rank_and_size()[1]
    changes = {name: values[name] for name in (*MAY_CHANGE, *MAY_MOVE, "processes")
               if name != "out" and values[name] != stored[name]}
    if not changes:
        return
    listed = [f"{name if name == 'processes' else flag_name(name)} {value} instead of "
              f"{stored[name]}" for name, value in changes.items()]
    say(f"{run.path}: from step {step} on with {', '.join(listed)}"
        + (": not the end that it would have come to" if changes.keys() - set(MAY_MOVE) else ""))
    processes = values.pop("processes")
    run.write_json(CONFIG, {
        **config, "settings": values, "processes": processes,
        "given": sorted({*flags_of(config), *changes} - {"processes"}),
        "changes": [*config.get("changes", []), {"step": step, **changes}]})


def report(run: Run, settings: Settings, by_layer: dict[int, Reference], questions: int) -> None:
    """Show the final scores, and how far the prompt moved from the prior's draw."""
    start, end = run.start_and_end()  # first, because it may be refused
    name = "the training data, held out"
    if settings.data.eval_data:
        name = spec_name(settings.data.eval_data)
    show(f"\n{counted(questions, 'question')} of {name}; scores in percent, loss in nats a "
         f"token\n\n{score_table(settings, run.metrics())}\n")
    kind = "keys and values" if settings.prompt.method == "prefix" else "rows"
    for i, reference in by_layer.items():
        moved = (end[i] - start[i]).norm(dim=1).mean()
        ratios = [norm_ratio(vectors[i], reference.rows) for vectors in (start, end)]
        show(f"layer {i}: {kind} moved {moved:.3g} on average; norm ratio to the reference "
             f"{ratios[0]:.3g} -> {ratios[1]:.3g}")
