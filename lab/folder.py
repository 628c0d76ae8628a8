"""A run's folder: every file whole or not at all, and all that resuming needs.

    run = Run(Path("runs/first"))
    with run.lock():                                   # one process at a time
        run.write("prompt.safetensors", content)
        run.save_checkpoint(step, tensors, due=False)
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
import socket
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
from lab.files import read_tensors, reading, write_file
from lab.hub import model_folder
from lab.processes import rank_and_size
from lab.settings import Settings, from_config

CHECKPOINTS = 2  # that are kept: the newest, and one more in case it turns out to be damaged
LOCK = "run.lock"
FIRST_PROMPT, LAST_PROMPT = "prompts/000000.safetensors", "prompt.safetensors"
NUMBERED = re.compile(r"[0-9]{6,}\.safetensors")  # a file that is named by its step
RESTORE = "restore the file"
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # what a killed writer leaves


class Locked(UserError):
    """Another process is training the run."""


class Checkpoint(NamedTuple):
    """Where training stood."""

    step: int
    tensors: dict[str, Tensor]
    due: bool  # whether the evaluation of this step is still to come
    metrics_bytes: int  # the length of metrics.jsonl


class Run:
    """A run's folder. Of several processes only the first writes.

    self.step is the step whose prompt commands are about; None is the last. show_step sets it."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.step: int | None = None

    @property
    def writes(self) -> bool:
        return rank_and_size()[0] == 0

    @property
    def empty(self) -> bool:
        """Whether nothing is there, or only leftovers of an interrupted start."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(
            p.name == LOCK or TEMPORARY.fullmatch(p.name) for p in self.path.iterdir())

    # ----------------------------------------------------------------------------------------------
    # the lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[str]:
        """Keep other processes from training this run, and remove what one that died left
        half-written. Yields a remark on whose lock was taken over, or "". Raises Locked if another
        process has it."""
        path = self.path / LOCK
        new_folders = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file, owner = _locked(path)
        except OSError as e:
            raise OSError(f"{path}: cannot be written: {e.strerror or e}") from e
        try:
            for leftover in self.path.rglob(".*.tmp"):
                if TEMPORARY.fullmatch(leftover.name):
                    leftover.unlink(missing_ok=True)
            yield f"{path}: taken over from {owner}, which is gone" if owner else ""
        finally:
            path.unlink(missing_ok=True)
            file.close()
            with contextlib.suppress(OSError):  # a folder with files in it stays
                for folder in new_folders:
                    folder.rmdir()

    # ----------------------------------------------------------------------------------------------
    # files

    def write(self, name: str, content: bytes) -> None:
        if self.writes:
            write_file(self.path / name, content)

    def write_json(self, name: str, value) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def clear(self) -> None:
        """Remove what an earlier run left here, and nothing else."""
        if not self.writes:
            return
        files = [*self.checkpoints(), *self.numbered("prompts")]
        for pattern in ("metrics.jsonl", "prompt.safetensors", "predictions.jsonl", "figures/*.svg",
                        "report.html"):
            files += self.path.glob(pattern)
        for path in files:
            path.unlink()

    def config(self) -> dict:
        return read_config(self.path / "config.json")

    def settings(self) -> Settings:
        return from_config(self.config(), self.path / "config.json")

    # ----------------------------------------------------------------------------------------------
    # prompts

    def snapshots(self) -> list[int]:
        """The steps whose prompts are in prompts/; 0 is the prior's draw."""
        steps = [int(path.stem) for path in self.numbered("prompts")]
        if not steps or steps[0] != 0:
            raise UserError(f"{self.path}: no snapshot of the prior's draw in prompts/: restore "
                            "it, or train again with --overwrite")
        return steps

    @property
    def title(self) -> str:
        """The folder's name, and the step that was asked for, for captions."""
        return self.path.name + (f" at step {self.step}" if self.step is not None else "")

    @property
    def shown(self) -> str:
        """The file of the prompt that commands are about."""
        return LAST_PROMPT if self.step is None else f"prompts/{self.step:06d}.safetensors"

    def show_step(self, step: str) -> None:
        """Make commands be about the prompt of this step. best: that of the lowest evaluation
        loss."""
        steps = {str(number): number for number in self.snapshots()}
        if step == "best":
            best = best_evaluation(self.metrics(), [*steps.values()])
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
        if not path.exists():
            self.config()  # refuses a folder that is no run
            raise UserError(f"{path}: no such file; training has not come that far: train it with "
                            "--resume")
        tensors, _ = read_tensors(path, "prompt rows", RESTORE)
        check_prompt(tensors, path)
        if any(key.endswith(".keys") for key in tensors):
            tensors = from_rotated(tensors, self.settings())
        # A snapshot of another run, in this one's place, would be silently wrong.
        if name != LAST_PROMPT and (self.path / LAST_PROMPT).exists():
            if shapes_of(tensors) != shapes_of(self.tensors(LAST_PROMPT)):
                raise UserError(f"{path}: rows of other layers or shapes than {LAST_PROMPT} has, "
                                "so the two are not of one run: restore the file")
        return tensors

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
        path, line = self.path / "metrics.jsonl", (json.dumps(record) + "\n").encode()
        try:
            with open(path, "ab", buffering=0) as f:
                if f.write(line) < len(line):
                    raise OSError(None, "the disk is full")
        except OSError as e:
            raise OSError(f"{path}: cannot be written: {e.strerror or e}") from e

    def metrics(self) -> list[dict]:
        """The log, without a last line that a killed run left unfinished."""
        path = self.path / "metrics.jsonl"
        text = data.read_text(path) if path.exists() else ""
        lines = []
        for where, line in data.json_lines(text[:text.rfind("\n") + 1], path):
            with reading(where, "a line that training logs", RESTORE):
                _check_metric(line)
            lines.append(line)
        return lines

    def predictions(self) -> list[dict]:
        """The answers of the last evaluation."""
        path = self.path / "predictions.jsonl"
        lines = []
        for where, line in data.json_lines(data.read_text(path) if path.exists() else "", path):
            with reading(where, "a prediction", RESTORE):
                _check_prediction(line)
            lines.append(line)
        return lines

    # ----------------------------------------------------------------------------------------------
    # checkpoints: a checkpoint is one file with its step and its checksum in the metadata, so that
    # no two files can disagree

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], due: bool) -> None:
        """due: whether the evaluation at this step is still to come. Older checkpoints are removed
        when the new one is durable."""
        if not self.writes:
            return
        log = self.path / "metrics.jsonl"
        with open(log, "ab") as f:
            os.fsync(f.fileno())
        state = {"step": step, "metrics_bytes": log.stat().st_size, "due": due}
        about = {"state": json.dumps(state), "sha256": _digest(tensors, state)}
        self.write(f"checkpoints/{step:06d}.safetensors", save(tensors, about))
        for path in self.checkpoints()[:-CHECKPOINTS]:
            path.unlink()

    def checkpoints(self) -> list[Path]:
        """Their files, the oldest first."""
        return self.numbered("checkpoints")

    def numbered(self, folder: str) -> list[Path]:
        """The files in a folder of the run that are named by their steps, in the steps' order."""
        files = [path for path in (self.path / folder).glob("*.safetensors")
                 if NUMBERED.fullmatch(path.name)]
        return sorted(files, key=lambda path: int(path.stem))

    def load_checkpoint(self) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with newer ones. Changes nothing:
        see cut_back."""
        problems, log = [], self.path / "metrics.jsonl"
        for path in reversed(self.checkpoints()):
            try:
                checkpoint = read_checkpoint(path)
                if log.stat().st_size < checkpoint.metrics_bytes:
                    raise UserError(f"{log}: shorter than at {path.name}: its end is lost")
                return checkpoint, problems
            except (UserError, OSError) as e:
                problems.append(str(e))
        raise UserError(f"{'; '.join(problems) or f'{self.path}: no checkpoint'}: train again with "
                        "--overwrite")

    def cut_back(self, checkpoint: Checkpoint) -> None:
        """Take the folder back to a checkpoint: what was logged and written after it is removed."""
        if not self.writes:
            return
        os.truncate(self.path / "metrics.jsonl", checkpoint.metrics_bytes)
        for path in [*self.checkpoints(), *self.numbered("prompts")]:
            if int(path.stem) > checkpoint.step:
                path.unlink()


def best_evaluation(metrics: list[dict], steps: list[int]) -> dict | None:
    """The logged evaluation with the lowest loss among these steps; None if there is none."""
    scored = [line for line in metrics if line["split"] == "eval" and line["step"] in steps]
    return min(scored, key=lambda line: line["loss"], default=None)


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
    if not path.exists():
        raise UserError(f"{path.parent}: no {path.name}, so no run is here: give the folder that "
                        "train made")
    config = data.read_json(path, dict)
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
        "changes": isinstance(changes, list),
        "sha256": isinstance(sums, dict) and all(isinstance(s, str) for s in sums.values())}
    for key, is_right in expected.items():
        if not is_right:
            raise UserError(f"{path}: {key} is {config.get(key)!r:.80}, which no run has: restore "
                            "the file")
    return config


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
           "majority": ("accuracy",)}


def _check_metric(line: dict) -> None:
    for key in NUMBERS[line["split"]]:
        float(line[key])
    for key, value in line.items():
        if isinstance(value, float) and not abs(value) < 1e30:  # no picture has room for it
            raise ValueError(f"{key} is {value}")
    if "step" in NUMBERS[line["split"]] and not (type(line["step"]) is int
                                                 and 0 <= line["step"] < 2**53):
        raise ValueError(f"step is {line['step']!r:.80}")
    # Scores are drawn and compared; ids and the split alone are no numbers.
    for key, value in line.items():
        if type(value) not in (int, float) and key not in ("split", "ids"):
            raise ValueError(f"{key} is {value!r:.80}")


def _check_prediction(line: dict) -> None:
    texts = [line["id"], line["question"], line["prediction"], *line["answers"]]
    scores = [value for key, value in line.items()
              if key not in ("id", "question", "prediction", "answers")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(line["answers"], list):
        raise ValueError("an answer that is no text")
    if not all(type(score) in (int, float) for score in scores):
        raise ValueError("a score that is no number")


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises UserError, without a remedy, for a file that is damaged or no checkpoint."""
    expected = "a checkpoint"
    tensors, about = read_tensors(path, expected)
    with reading(path, expected):
        state = json.loads(about["state"])
        kinds = {key: type(value) for key, value in state.items()}
        if kinds != {"step": int, "metrics_bytes": int, "due": bool}:
            raise ValueError("its state is not that of a run")
        if about.get("sha256") != _digest(tensors, state):
            raise ValueError("its contents do not match their checksum, the file is damaged")
    return Checkpoint(tensors=tensors, **state)


def _digest(tensors: dict[str, Tensor], state: dict) -> str:
    """SHA-256 of the state and of every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        content = t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + content)
    return total.hexdigest()


def _locked(path: Path):
    """The open file with an exclusive lock, and who held it earlier without giving it back."""
    import fcntl

    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise Locked(f"{path.parent}: {owner} is training it: wait for its end, or choose "
                         "another --out") from None
        # Between opening and locking, the file may have been removed by its owner.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == os.stat(path).st_ino:
                break
        file.close()
    file.seek(0)
    earlier_owner = file.read().strip()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file, earlier_owner
