"""A run's folder: every file whole or not at all, and all that resuming needs.

    run = Run(Path("runs/first"))
    with run.lock():                                   # one process at a time
        with run.beginning():                          # an earlier run goes when this is whole
            run.write_json("config.json", config)
        run.write_prompt("prompt.safetensors", rows, settings, step)
        run.save_checkpoint(step, tensors, False, settings)
    checkpoint, damaged = run.load_checkpoint()        # the newest that is whole
    run.cut_back(checkpoint)                           # as if nothing had come after it

docs/runs.md says what is in the folder: safetensors and JSON only. Every file is replaced whole;
metrics.jsonl alone grows, by whole lines, and is cut back to a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

import data
import llama
from lab import posteriors
from lab.console import UserError
from lab.files import (LONG, SMALL, Folder, NotWritten, check_folder, digest_of, is_unfinished,
                       locked, named, only_begun, read_tensors, reading, settled_state)
from lab.foreign_data import not_foreign
from lab.hub import model_folder
from lab.processes import rank_and_size
from lab.settings import Settings, flat, from_config

CHECKPOINTS = 2  # that are kept: the newest, and one more in case it turns out to be damaged
CONFIG, LOG, WRITTEN = "config.json", "metrics.jsonl", "teacher.jsonl"
LAST_PROMPT = "prompt.safetensors"
NUMBERED = re.compile(r"[0-9]{6,}\.safetensors")  # a file that is named by its step
# What the program writes into a run's folder, all that an overwritten run loses.
OURS = re.compile(r"config\.json|metrics\.jsonl|prompt\.safetensors|predictions\.jsonl|"
                  r"teacher\.jsonl|report\.html|(prompts|checkpoints)/[0-9]{6,}\.safetensors|"
                  r"figures/(layer-[0-9]+|curves|attention)\.svg")
FOLDERS = ("prompts", "checkpoints", "figures")
RESTORE = "restore the file"
ABOUT = "promptprior"  # the metadata of a prompt, in JSON: its run's settings, step and checksum


def snapshot(step: int) -> str:
    """The file of a step's prompt."""
    return f"prompts/{step:06d}.safetensors"


FIRST_PROMPT = snapshot(0)  # the prior's draw


def layer_picture(layer: int) -> str:
    """The figure of a layer's rows."""
    return f"figures/layer-{layer:02d}.svg"


class Checkpoint(NamedTuple):
    """Where training stood."""

    step: int
    tensors: dict[str, Tensor]
    due: bool  # whether the evaluation of this step is still to come
    metrics_bytes: int  # the length of metrics.jsonl
    metrics_sha256: str = ""  # of that length; of early versions neither this
    settings: dict | None = None  # nor these, which say whose it is


class Run:
    """A run's folder. Of several processes only the first writes.

    self.step is the step whose prompt commands are about; None is the last. show_step sets it."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.step: int | None = None
        self.folder: Folder | None = None  # while it is locked: what is written goes there
        # The log and its file's state: a long one takes seconds to read, and is asked for often.
        self._log: tuple[tuple | None, list[dict]] = None, []

    @property
    def writes(self) -> bool:
        return rank_and_size()[0] == 0

    @property
    def empty(self) -> bool:
        """Whether nothing is there, or only what an interrupted start began."""
        return not self.path.exists() or only_begun(self.path)

    # ----------------------------------------------------------------------------------------------
    # the lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[str]:
        """Keep other processes from training this run, and finish or remove what one that died
        left. Yields a remark on whose lock was taken over, or "". Raises Locked if another process
        has it, and NotWritten or UserError for what stands in the place of a file or a folder of
        the run, as a link: what it leads to is another's."""
        with locked(self.path, OURS.fullmatch) as (self.folder, owner):
            try:
                for name in FOLDERS:
                    check_folder(self.path / name)
                with named(self.path):
                    self.folder.check_ours(OURS.fullmatch)
                yield f"{self.path}: taken over from {owner}, which is gone" if owner else ""
            finally:
                self.folder = None

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """What is written inside the block takes the place of all that an earlier run left here,
        and of nothing else, when the block ends well. The run is locked."""
        if not self.writes:
            yield
            return
        outer = self.folder
        with outer.making(OURS.fullmatch) as self.folder:
            try:
                yield
            finally:
                self.folder = outer

    @property
    def place(self) -> Path | None:
        """Where the run's folder is now, wherever it was moved to while it is locked; None if it
        was removed."""
        return self.folder.place if self.folder else self.path

    @property
    def is_elsewhere(self) -> bool:
        """Whether its path leads elsewhere than when it was locked."""
        return self.place != self.path

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Folder]:
        if self.folder:
            yield self.folder
        else:
            with Folder(self.path) as folder:
                yield folder

    # ----------------------------------------------------------------------------------------------
    # files

    def write(self, name: str, content: bytes) -> None:
        if self.writes:
            with self._opened() as folder:
                folder.write(name, content)

    def write_json(self, name: str, value) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def config(self) -> dict:
        if self.folder is None and is_unfinished(self.path):
            with self.lock():
                pass  # a run that was made whole, and killed before it was in its place
        return read_config(self.path / CONFIG)

    def settings(self) -> Settings:
        return from_config(self.config(), self.path / CONFIG)

    # ----------------------------------------------------------------------------------------------
    # prompts

    @property
    def has_prompt(self) -> bool:
        return os.path.lexists(self.path / LAST_PROMPT) or bool(self.numbered("prompts"))

    def snapshots(self) -> list[int]:
        """The steps whose prompts are in prompts/; 0 is the prior's draw."""
        steps = [int(path.stem) for path in self.numbered("prompts")]
        if not steps or steps[0] != 0:
            raise UserError(f"{self.path}: no snapshot of the prior's draw in prompts/: "
                            f"{self._how_to_restore()}")
        return steps

    def _how_to_restore(self) -> str:
        """The remedy for a prompt that is lost."""
        if self.settings().imported:
            return f"import it again with --out {self.path} --overwrite"
        if self.checkpoints():
            return f"train --out {self.path} --resume writes it"
        return f"restore it, or train again by {self.again}"

    @property
    def again(self) -> str:
        """The command that trains the same anew."""
        return f"train --config {self.path / CONFIG} --out {self.path} --overwrite"

    @property
    def title(self) -> str:
        """The folder's name, and the step that was asked for, for captions."""
        return self.path.name + (f" at step {self.step}" if self.step is not None else "")

    @property
    def shown(self) -> str:
        """The file of the prompt that commands are about."""
        return LAST_PROMPT if self.step is None else snapshot(self.step)

    def show_step(self, step: str) -> None:
        """Make commands be about the prompt of this step. best: that of the lowest objective at an
        evaluation."""
        steps = {str(number): number for number in self.snapshots()}
        if step == "best":
            mix = self.settings().teacher.teacher_mix
            best = best_evaluation(self.metrics(), [*steps.values()], mix)
            if best is None:
                raise UserError(f"{self.path}: --step best: none of its prompts was evaluated: "
                                "give a number, or leave it out")
            self.step = best["step"]
        elif step not in steps:
            raise UserError(f"{self.path}: --step {step}: no prompt of that step: give best, or "
                            f"one of {', '.join(steps)}")
        else:
            self.step = steps[step]

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """What prompt.safetensors or prompts/NNNNNN.safetensors holds (None: what is shown):
        layers.I (n, D), or of a prefix (n, 2, G, hd), keys before rotation; of a posterior
        layers.I.particles (K, n, D) too, or of early versions layers.I.sd (n, D)."""
        name = name or self.shown
        path = self.path / name
        config = self.config()  # refuses a folder that is no run
        if not os.path.lexists(path):
            raise UserError(f"{path}: no such file; it is lost, or training has not come that far: "
                            f"{self._how_to_restore()}")
        tensors, about = read_prompt(path)
        if about:
            self._check_whose(path, about, config)
        if name != LAST_PROMPT and (self.path / LAST_PROMPT).exists():
            # They are compared layer by layer; and of an early version nothing else tells.
            if shapes_of(tensors) != shapes_of(read_prompt(self.path / LAST_PROMPT)[0]):
                raise UserError(f"{path}: rows of other layers or shapes than {LAST_PROMPT} has, "
                                "so the two are not of one run: restore the file")
        if any(key.endswith(".keys") for key in tensors):
            tensors = from_rotated(tensors, self.settings())
        return tensors

    def _check_whose(self, path: Path, about: dict, config: dict) -> None:
        """Raises UserError for a prompt of another run than config.json and the log are of, or of
        another step than its name says."""
        check_same_run(path, about["settings"], config)
        step = about["step"]
        if path.name == LAST_PROMPT:
            scored = self.last_scored()
            if step < scored:
                raise UserError(f"{path}: the prompt of step {step}, while {LOG} has scored step "
                                f"{scored}: {self._how_to_restore()}")
        elif step != int(path.stem):
            raise UserError(f"{path}: the prompt of step {step}: {RESTORE}")

    def last_scored(self) -> int:
        """The last step that the log has an evaluation of; -1 if it has none."""
        path = self.path / LOG
        text = data.read_text(path, LONG, whole_lines=True) if path.exists() else ""
        for line in reversed(text.split("\n")):
            if '"eval"' in line:
                # What else is wrong with the log is told by those who read all of it.
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    step = json.loads(line)["step"]
                    if type(step) is int:
                        return step
        return -1

    def last_step(self) -> int:
        """The step of prompt.safetensors, -1 if there is none; of early versions the last step in
        the log."""
        if not os.path.lexists(self.path / LAST_PROMPT):
            return -1
        _, about = read_prompt(self.path / LAST_PROMPT)
        if about:
            return about["step"]
        return max((line["step"] for line in self.metrics() if "step" in line), default=0)

    def write_prompt(self, name: str, tensors: dict[str, Tensor], settings: Settings, step: int
                     ) -> None:
        """Write tensors as `tensors` reads them, with what tells whose they are."""
        about = {"settings": identity(settings), "step": step}
        about["sha256"] = digest_of(tensors, about)
        self.write(name, save(tensors, {ABOUT: json.dumps(about, sort_keys=True)}))

    def prompt(self, name: str | None = None) -> llama.Prompt:
        """The prompt, of a posterior the one that stands for it."""
        return llama.Prompt.from_tensors(self.tensors(name), self.settings().prompt.cut)

    def prompts(self, name: str | None = None) -> list[llama.Prompt]:
        """The prompts that stand for the run's posterior, or its one prompt."""
        settings = self.settings()
        members = posteriors.particles(self.tensors(name), settings.train.particles, settings.seed)
        return [llama.Prompt(layers, settings.prompt.cut) for layers in members]

    def particles(self, name: str | None = None) -> list[llama.Prompt]:
        """The prompts of a posterior that the file holds; [] if it holds one, or that one and the
        standard deviations of its numbers, as a Gaussian of an early version did."""
        is_kept = any(key.endswith(".particles") for key in self.tensors(name))
        return self.prompts(name) if is_kept else []

    def start_and_end(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Vectors {layer: (K n, W)} of all prompts that stand for the posterior, as the prior drew
        them and as they are shown."""
        end = self.prompts()
        start = self.particles(FIRST_PROMPT) or [self.prompt(FIRST_PROMPT)] * len(end)
        return _vectors(start), _vectors(end)

    # ----------------------------------------------------------------------------------------------
    # logs

    def log(self, record: dict) -> None:
        """Append a whole line to metrics.jsonl, in one write."""
        if not self.writes:
            return
        line = (json.dumps(record) + "\n").encode()
        try:
            with self._opened() as folder, folder.open(LOG, os.O_WRONLY | os.O_APPEND) as f:
                if f.write(line) < len(line):
                    raise OSError(None, "the disk is full")
        except OSError as e:
            raise NotWritten(self.path / LOG, e) if e.strerror else e

    def metrics(self) -> list[dict]:
        """The log, without a last line that is not whole."""
        path = self.path / LOG
        state = settled_state(path) if path.exists() else None
        if state is None or state != self._log[0]:
            self._log = state, self._read_log(path)
        return [*self._log[1]]

    def _read_log(self, path: Path) -> list[dict]:
        text = data.read_text(path, LONG, whole_lines=True) if path.exists() else ""
        lines = []
        for where, line in data.json_lines(text, path):
            with reading(where, "a line that training logs", RESTORE):
                _check_metric(line)
            lines.append(line)
        return lines

    def predictions(self) -> list[dict]:
        """The answers of the last evaluation."""
        path = self.path / "predictions.jsonl"
        lines = []
        text = data.read_text(path, LONG) if path.exists() else ""
        for where, line in data.json_lines(text, path):
            with reading(where, "a prediction", RESTORE):
                _check_prediction(line)
            lines.append(line)
        return lines

    # ----------------------------------------------------------------------------------------------
    # checkpoints: a checkpoint is one file with its step and its checksum in the metadata, so that
    # no two files can disagree

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], due: bool,
                        settings: Settings) -> None:
        """due: whether the evaluation at this step is still to come. Older checkpoints are removed
        when the new one is durable."""
        if not self.writes:
            return
        with self._opened() as folder:
            with folder.open(LOG, os.O_RDWR) as f:
                os.fsync(f.fileno())
                log = hashlib.file_digest(f, "sha256").hexdigest()
                state = {"step": step, "metrics_bytes": f.tell(), "metrics_sha256": log,
                         "due": due, "settings": identity(settings)}
            about = {"state": json.dumps(state), "sha256": digest_of(tensors, state)}
            folder.write(f"checkpoints/{step:06d}.safetensors", save(tensors, about))
            for name in numbered(folder.names(), "checkpoints")[:-CHECKPOINTS]:
                folder.remove(name)

    def checkpoints(self) -> list[Path]:
        """Their files, the oldest first."""
        return self.numbered("checkpoints")

    def numbered(self, folder: str) -> list[Path]:
        """The files in a folder of the run that are named by their steps, in the steps' order."""
        names = [f"{folder}/{path.name}" for path in (self.path / folder).glob("*.safetensors")]
        return [self.path / name for name in numbered(names, folder)]

    def load_checkpoint(self) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with newer ones. Raises UserError
        for one of another run. Changes nothing: see cut_back."""
        problems = []
        for path in reversed(self.checkpoints()):
            try:
                checkpoint = read_checkpoint(path)
            except (UserError, OSError) as e:
                problems.append(str(e))
                continue
            if checkpoint.settings:
                check_same_run(path, checkpoint.settings, self.config())
            problem = self._problem_of_log(checkpoint, path)
            if not problem:
                return checkpoint, problems
            problems.append(problem)
        raise UserError(f"{'; '.join(problems) or f'{self.path}: no checkpoint'}: "
                        f"{self.how_to_begin()}")

    def how_to_begin(self) -> str:
        """The remedy where no checkpoint is left to go on from."""
        from_prompt = ""
        if os.path.lexists(self.path / LAST_PROMPT):
            from_prompt = (f"start a run from its prompt by --prior posterior:{self.path},"
                           "resample=1 and another --out, or ")
        return f"{from_prompt}train again by {self.again}"

    def _problem_of_log(self, checkpoint: Checkpoint, path: Path) -> str:
        """What is wrong with the log if it is not the one that a checkpoint was saved beside.
        Raises UserError for one that cannot be read, which an earlier checkpoint does not mend."""
        log, length = self.path / LOG, checkpoint.metrics_bytes
        try:
            with open(llama.regular(log), "rb") as f:
                if os.fstat(f.fileno()).st_size < length:
                    return f"{log}: shorter than at {path.name}: its end is lost"
                beginning = f.read(length)
        except OSError as e:
            raise UserError(f"{log}: {llama.cause(e)}: {self.how_to_begin()}") from None
        digest = hashlib.sha256(beginning).hexdigest()
        if beginning[-1:] not in (b"", b"\n") or checkpoint.metrics_sha256 not in ("", digest):
            return f"{log}: not the log that {path.name} was saved beside"
        return ""

    def cut_back(self, checkpoint: Checkpoint) -> None:
        """Take the folder back to a checkpoint: what was logged and written after it is removed."""
        if not self.writes:
            return
        with self._opened() as folder:
            with folder.open(LOG, os.O_RDWR) as f:
                f.truncate(checkpoint.metrics_bytes)
            names = folder.names()
            for name in [*numbered(names, "checkpoints"), *numbered(names, "prompts")]:
                if int(Path(name).stem) > checkpoint.step:
                    folder.remove(name)


def numbered(names: list[str], folder: str) -> list[str]:
    """Those of a run's files that are named by their steps, in a folder, in the steps' order."""
    files = [name for name in names
             if name.startswith(f"{folder}/") and NUMBERED.fullmatch(name.partition("/")[2])]
    return sorted(files, key=lambda name: int(Path(name).stem))


def objective(line: dict, mix: float) -> float:
    """The loss of a line of the log as the run's training takes it: cross-entropy, or with a
    teacher its mixture with the divergence; mix: --teacher-mix."""
    if "teacher_kl" not in line:
        return line["loss"]
    return (1 - mix) * line["teacher_kl"] + mix * line["loss"]


def best_evaluation(metrics: list[dict], steps: list[int], mix: float) -> dict | None:
    """The logged evaluation with the lowest objective among these steps; None if there is none."""
    scored = [line for line in metrics if line["split"] == "eval" and line["step"] in steps]
    return min(scored, key=lambda line: objective(line, mix), default=None)


def _vectors(prompts: list[llama.Prompt]) -> dict[int, Tensor]:
    """{layer: (K n, W)} of K prompts of n columns."""
    by_prompt = [prompt.vectors() for prompt in prompts]
    return {i: torch.cat([vectors[i] for vectors in by_prompt]) for i in by_prompt[0]}


# --------------------------------------------------------------------------------------------------
# what a folder may hold


def versions() -> dict[str, str]:
    """Of Python and the packages, for config.json."""
    packages = {name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")}
    return {"python": sys.version.split()[0], **packages}


def read_config(path: Path) -> dict:
    """A run's config.json. Raises UserError for what no run writes."""
    if not os.path.lexists(path):
        what = "no such file or folder"
        if path.parent.exists():
            what = f"no {path.name}, so no run is here"
        raise UserError(f"{path.parent}: {what}: give the folder that train made")
    config = data.read_json(not_foreign(path), dict, SMALL)
    settings = config.get("settings")
    if not isinstance(settings, dict) or not {
            "model", "prior", "data", "tokens", "cut", "seed"} <= settings.keys():
        raise UserError(f"{path}: no settings of a run in it, so this is not a run's folder")
    from_config(config, path)

    threads, processes = config.get("threads"), config.get("processes", 1)
    flags, sums, changes = config.get("given", []), config.get("sha256"), config.get("changes", [])
    expected = {
        "threads": type(threads) is int and 0 < threads <= 2**10,
        "processes": type(processes) is int and 0 < processes < 2**20,
        "given": isinstance(flags, list) and all(isinstance(flag, str) for flag in flags),
        "teacher_sha256": isinstance(config.get("teacher_sha256", ""), str),
        "changes": isinstance(changes, list) and all(isinstance(c, dict) for c in changes),
        "sha256": isinstance(sums, dict) and all(isinstance(s, str) for s in sums.values())}
    for key, is_right in expected.items():
        if not is_right:
            raise UserError(f"{path}: {key} is {config.get(key)!r:.80}, which no run has: restore "
                            "the file")
    return config


def identity(settings: Settings) -> dict:
    """The settings that make a run what it is, as JSON holds them: without the folder and the
    device, so that a run has the same bytes anywhere."""
    values = {key: value for key, value in flat(settings).items() if key not in ("out", "device")}
    return json.loads(json.dumps(values))


def check_same_run(path: Path, settings: dict, config: dict) -> None:
    """Raises UserError for a file with the identity of another run than that of a config.json.
    Settings with which the run went on later may differ."""
    # Each may be of a version that lacked some settings.
    own, there = (identity(from_config({"settings": values}, file)) for values, file in (
        (settings, path), (config["settings"], CONFIG)))
    changed = set().union(*config.get("changes", []))
    other = [key for key in sorted({**own, **there}.keys() - changed)
             if own.get(key) != there.get(key)]
    if other:
        differences = [f"{key} {own.get(key)!r:.60}, there {there.get(key)!r:.60}"
                       for key in other[:3]]
        raise UserError(f"{path}: of another run than {CONFIG} beside it ({'; '.join(differences)})"
                        ": put back the file that belongs there, or take this one away")


def read_prompt(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a prompt's file, checked, and what it says of itself: settings, step; {} of
    early versions."""
    tensors, metadata = read_tensors(path, "prompt rows", RESTORE)
    check_prompt(tensors, path)
    if ABOUT not in metadata:
        return tensors, {}
    with reading(path, "prompt rows", RESTORE):
        about = json.loads(metadata[ABOUT])
        sha256 = about.pop("sha256")
        if {key: type(value) for key, value in about.items()} != {"settings": dict, "step": int}:
            raise ValueError("its metadata is not that of a run")
        if sha256 != digest_of(tensors, about):
            raise ValueError("its contents do not match their checksum, the file is damaged")
    return tensors, about


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in tensors.items()}


# What follows a layer's number in a tensor's name -> the dimensions that it has.
DIMENSIONS = {"": (2, 4), ".sd": (2,), ".particles": (3,), ".keys": (3,), ".values": (3,)}


def check_prompt(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises UserError for tensors that are no prompt of one shape in every layer. A wrong shape or
    a number that is not finite would be measured without any sign."""
    shapes: dict[str, dict[str, tuple]] = {}
    for name, t in tensors.items():
        match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,5})(\.[a-z]+|)", name)
        if not match or t.dtype != torch.float32 or 0 in t.shape \
                or t.dim() not in DIMENSIONS.get(match[2], ()):
            raise UserError(f"{path}: {name!r:.80} of shape {tuple(t.shape)} is no prompt rows, "
                            "which are layers.0 (rows, width) and so on: restore the file")
        if not torch.isfinite(t).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite: restore the file")
        shapes.setdefault(match[2], {})[match[1]] = tuple(t.shape)

    is_old_prefix = shapes.keys() == {".keys", ".values"}
    main = shapes.get(".keys" if is_old_prefix else "", {})
    wrong = not main or len(set(main.values())) > 1
    for kind, layers in shapes.items():
        expected = {layer: shape for layer, shape in main.items()}
        if kind == ".particles":  # (K, n, D), of any K that all layers share
            K = next(iter(layers.values()))[:1]
            expected = {layer: K + shape for layer, shape in main.items()}
        wrong = wrong or layers != expected
    if wrong:
        raise UserError(f"{path}: its rows {shapes!s:.200} are not of one prompt: restore the file")


def from_rotated(tensors: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The tensors of a prefix of an early version, which kept layers.I.keys (n, G, hd) rotated to
    their positions and layers.I.values apart -> layers.I (n, 2, G, hd), keys before rotation."""
    config = llama.read_config(model_folder(settings.model) / "config.json")
    with torch.device("meta"):
        model = llama.Llama(config)  # only its positions are asked for
    first = 1 if settings.prompt.place == "after-bos" else 0
    layers = [name.removesuffix(".keys") for name in tensors if name.endswith(".keys")]
    stacked = {}
    for layer in layers:
        keys = model.unrotated(tensors[f"{layer}.keys"], first)
        stacked[layer] = torch.stack((keys, tensors[f"{layer}.values"]), dim=1)
    return stacked


# The numbers that a line of metrics.jsonl must have, by its split.
NUMBERS = {"train": ("step", "loss"), "skipped": ("step",), "eval": ("step", "loss"),
           "held_out": ("step", "loss"), "baseline": ("loss",), "text": ("loss",),
           "teacher": ("loss",), "majority": ("accuracy",), "forgetting": ("prose",)}


def _check_metric(line: dict) -> None:
    for key in NUMBERS[line["split"]]:
        float(line[key])
    if "step" in NUMBERS[line["split"]] and not (type(line["step"]) is int
                                                 and 0 <= line["step"] < 2**53):
        raise ValueError(f"step is {line['step']!r:.80}")
    _check_scores(line, ("split", "ids"))


def _check_prediction(line: dict) -> None:
    texts = [line["id"], line["question"], line["prediction"], *line["answers"],
             line.get("choice", "")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(line["answers"], list):
        raise ValueError("an answer that is no text")
    _check_scores(line, ("id", "question", "prediction", "answers", "choice"))


def _check_scores(line: dict, others: tuple[str, ...]) -> None:
    """Raises ValueError for what is no number, of all but `others`. Scores are drawn and compared,
    and no picture has room for numbers of hundreds of digits."""
    for key in line.keys() - set(others):
        if type(line[key]) not in (int, float) or not abs(line[key]) < 1e30:
            raise ValueError(f"{key} is {line[key]!r:.80}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises UserError, without a remedy, for a file that is damaged or no checkpoint."""
    expected = "a checkpoint"
    tensors, about = read_tensors(path, expected)
    with reading(path, expected):
        state = json.loads(about["state"])
        kinds = {key: type(value) for key, value in state.items()}
        early = {"step": int, "metrics_bytes": int, "due": bool}
        if kinds not in (early, {**early, "metrics_sha256": str, "settings": dict}):
            raise ValueError("its state is not that of a run")
        if about.get("sha256") != digest_of(tensors, state):
            raise ValueError("its contents do not match their checksum, the file is damaged")
        if not all(t.isfinite().all() for t in tensors.values()):
            raise ValueError("it holds numbers that are not finite")
    return Checkpoint(tensors=tensors, **state)


def check_fits(posterior: posteriors.Point, checkpoint: Checkpoint, path: Path) -> None:
    """Raises UserError for another run's checkpoint."""
    for name, p in posterior.named_parameters():
        rows = checkpoint.tensors.get(f"rows.{name}")
        if p.dim() == 4 and rows is not None and rows.dim() == 2:
            raise UserError(f"{path}: a prefix of an early version, which trained its keys after "
                            "rotation, so it cannot come to the same end: start a run from it by "
                            f"--prior posterior:{path},resample=1")
        shapes = {key: t.shape for key in ("step", "exp_avg", "exp_avg_sq")
                  if (t := checkpoint.tensors.get(f"{key}.{name}")) is not None}
        wanted = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        if isinstance(posterior, posteriors.Langevin):
            wanted = {"step": (), "exp_avg_sq": p.shape[1:]}
        if rows is None or rows.shape != p.shape or shapes not in ({}, wanted):
            raise UserError(f"{path}/checkpoints: rows {name!r}, or what the optimiser keeps of "
                            f"them, are missing or of another shape than {tuple(p.shape)}: this "
                            "checkpoint is of another run, or of an early version: start a run "
                            "anew")
