"""A run's folder: every file whole or not at all, and all that resuming needs.

    run = Run(Path("runs/first"))
    with run.lock():                                   # one process at a time
        run.write("prompt.safetensors", content)
        run.save_checkpoint(step, tensors, due=False)
    checkpoint, wrong = run.load_checkpoint()          # the newest that is whole
    run.cut_back(checkpoint)                           # as if nothing had come after it

The README says what is in the folder. safetensors and JSON only. Whatever is written goes through
`replacing`; metrics.jsonl alone grows, by whole lines, and is cut back to a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import data
import posteriors
from llama import cause, join, regular
from settings import stored_settings

KEPT = 2  # checkpoints: the newest, and one more should it be found damaged


class RunError(ValueError):
    """A run's folder that cannot be used: what, where, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when it is whole: a temporary in the same
    folder, fsync, rename, fsync of the folder, so that after a power cut there is the old file or
    the new one. A link stays, and what it leads to is replaced. An OSError names the file."""
    try:
        path = Path(os.path.realpath(path, strict=False))
        if path.exists() and not path.is_file():
            raise OSError(None, "not a regular file, which alone is replaced")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise OSError(f"{path}: cannot be written: {e.strerror or e}") from e


def write_file(path: Path, content: bytes) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(content)


def mapped(path: Path, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
           about: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors {name: (shape, dtype)} of a new safetensors file, zero until they are written, and
    written through the page cache."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
             torch.int64: "I64", torch.uint8: "U8"}
    header, end, places = {"__metadata__": about or {}}, 0, {}
    # as safetensors lays them out: the widest first, so that each begins at a multiple of its width
    for name, (shape, dtype) in sorted(shapes.items(), key=lambda i: (-i[1][1].itemsize, i[0])):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        places[name] = start, end
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    size = 8 + len(header) + end
    try:
        with open(path, "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            f.flush()
            # all of it now: a full disk is an error here and a dead process later
            reserve = getattr(os, "posix_fallocate", lambda f, start, n: os.ftruncate(f, n))
            reserve(f.fileno(), 0, size)
    except OSError as e:
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: no room for {size / 2**30:.1f} GiB ({e.strerror})") from None
    whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)[-end:]
    return {name: whole[start:stop].view(shapes[name][1]).view(shapes[name][0])
            for name, (start, stop) in places.items()}


def rows_to_bytes(rows: dict[int, Tensor], about: dict[str, str]) -> bytes:
    return save({f"layers.{i}": r.detach().float().cpu().contiguous() for i, r in rows.items()},
                about)


# --------------------------------------------------------------------------------------------------
# the folder


class Checkpoint(NamedTuple):
    """Where training stood: the step reached, the state's tensors, whether the evaluation of that
    step is still to come, and the length of metrics.jsonl then."""

    step: int
    tensors: dict[str, Tensor]
    due: bool
    metrics_bytes: int


class Run:
    """A run's folder. Of several processes only the first writes."""

    def __init__(self, path: Path):
        self.path = Path(path)
        # what a prefix's keys become as they are read, see references.measured
        self.turn: Callable[[Tensor], Tensor] = lambda keys: keys

    @property
    def writes(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    @property
    def empty(self) -> bool:
        """Whether nothing is there yet, or only what a start that was cut short leaves."""
        return not self.path.exists() or self.path.is_dir() and all(
            p.name == LOCK or re.fullmatch(r"\..+\.\d+\.tmp", p.name) for p in self.path.iterdir())

    @contextlib.contextmanager
    def lock(self) -> Iterator[str]:
        """No other process trains this run meanwhile; what one that died left half-written is
        removed. Gives a word on whose lock was taken over, or "". Raises RunError if another has
        it."""
        path, made = self.path / LOCK, [p for p in (self.path, *self.path.parents)
                                        if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file, before = _locked(path)
        except OSError as e:
            raise OSError(f"{path}: cannot be written: {e.strerror or e}") from e
        try:
            for old in (p for p in self.path.rglob(".*.tmp") if re.search(r"\.\d+\.tmp$", p.name)):
                old.unlink(missing_ok=True)
            yield before and f"{path}: taken over from {before}, which is gone"
        finally:
            path.unlink(missing_ok=True)
            file.close()
            with contextlib.suppress(OSError):
                for folder in made:  # if nothing came of it, it leaves nothing
                    folder.rmdir()

    def write(self, name: str, content: bytes) -> None:
        if self.writes:
            write_file(self.path / name, content)

    def write_json(self, name: str, value) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def config(self) -> dict:
        return read_config(self.path / "config.json")

    def clear(self) -> None:
        """Remove what an earlier run left here, and nothing else."""
        if not self.writes:
            return
        for pattern in ("metrics.jsonl", "prompt.safetensors", "checkpoint.safetensors",
                        "checkpoints/??????.safetensors", "predictions.jsonl",
                        "trunk*.safetensors", "prompts/??????.safetensors", "figures/*.svg",
                        "report.html"):
            for old in self.path.glob(pattern):
                old.unlink()

    def snapshots(self) -> list[int]:
        """The steps whose rows are in prompts/, 0 the prior's draw."""
        steps = sorted(int(path.stem) for path in self.path.glob("prompts/??????.safetensors")
                       if path.stem.isdigit())
        if not steps or steps[0] != 0:
            raise RunError(f"{self.path}: no snapshot of the prior's draw in prompts/: restore "
                           "it, or train again with --overwrite")
        return steps

    def rows(self, name: str) -> dict[int, Tensor]:
        """Prompt rows {layer: (n, D)} of prompt.safetensors or prompts/NNNNNN.safetensors; of a
        posterior the mean; of a prefix {layer: (n, 2 G hd)}, keys and values side by side."""
        tensors = self._tensors(name)
        return {i: tensors[f"layers.{i}"] for i in sorted(
            int(key.split(".")[1]) for key in tensors if key.count(".") == 1)}

    def particles(self, name: str = "prompt.safetensors") -> list[dict[int, Tensor]]:
        """The prompts that stand for the run's posterior: its particles, draws of its Gaussian, or
        its one prompt."""
        settings = self.config()["settings"]
        return posteriors.particles(self._tensors(name), settings.get("particles", 1),
                                    settings["seed"])

    def start_and_end(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Rows {layer: (K n, D)} of all prompts that stand for the posterior, as the prior drew
        them, and as they are now."""
        first, end = "prompts/000000.safetensors", self.particles()
        drawn = self.particles(first) if any(
            key.endswith(".particles") for key in self._tensors(first)) \
            else [self.rows(first)] * len(end)
        return tuple({i: torch.cat([rows[i] for rows in each]) for i in end[0]}
                     for each in (drawn, end))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path, last = self.path / name, "prompt.safetensors"
        try:
            with safe_open(regular(path), framework="pt") as f:
                tensors = {key: f.get_tensor(key) for key in f.keys()}
        except FileNotFoundError:
            raise RunError(f"{path}: no such file; training has not come that far: "
                           "train it with --resume") from None
        except (SafetensorError, OSError) as e:
            raise RunError(f"{path}: not prompt rows ({cause(e)}): restore the file") from None
        _check_rows(tensors, path)
        for layer in [key.removesuffix(".keys") for key in tensors if key.endswith(".keys")]:
            keys, values = (tensors.pop(f"{layer}.{kind}") for kind in ("keys", "values"))
            tensors[layer] = join(self.turn(keys), values)
        shapes = lambda found: {key: t.shape for key, t in found.items()}
        if name != last and (self.path / last).exists() \
                and shapes(tensors) != shapes(self._tensors(last)):
            raise RunError(f"{path}: rows of other layers or shapes than {last} has, so the two "
                           "are not of one run: restore the file")
        return tensors

    def log(self, record: dict) -> None:
        """A whole line at the end of metrics.jsonl, in one write."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "ab", buffering=0) as f:
                line = (json.dumps(record) + "\n").encode()
                if f.write(line) < len(line):
                    raise OSError(None, "the disk is full")
        except OSError as e:
            raise OSError(f"{path}: cannot be written: {e.strerror or e}") from e

    def metrics(self) -> list[dict]:
        """The log, without a last line that a killed run left unfinished."""
        path, lines = self.path / "metrics.jsonl", []
        text = data.read_text(path) if path.exists() else ""
        for where, line in data.json_lines(text[:text.rfind("\n") + 1], path):
            split = line.get("split")
            numbers = {"train": ("step", "loss"), "skipped": ("step",), "eval": line,
                       "baseline": line, "text": line}.get(split if isinstance(split, str) else "")
            if numbers is None or any(type(line.get(k)) not in (int, float) for k in numbers
                                      if k != "split") \
                    or split in ("train", "skipped", "eval") and type(line.get("step")) is not int:
                raise RunError(f"{where}: not a line that training logs: restore the file")
            lines.append(line)
        return lines

    def predictions(self) -> list[dict]:
        """Those of the last evaluation."""
        path, lines = self.path / "predictions.jsonl", []
        for where, line in data.json_lines(data.read_text(path) if path.exists() else "", path):
            if not all(isinstance(line.get(k), str) for k in ("id", "question", "prediction")) \
                    or not isinstance(line.get("answers"), list) \
                    or not all(isinstance(x, str) for x in line["answers"]) \
                    or not all(type(x) in (int, float) for k, x in line.items() if k not in (
                        "id", "question", "prediction", "answers")):
                raise RunError(f"{where}: not a prediction: restore the file")
            lines.append(line)
        return lines

    # the state: a checkpoint holds all of it, its step and its checksum in its metadata, so that no
    # two files can disagree

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], due: bool) -> None:
        """due: whether the evaluation at this step is still to come. Older checkpoints go when
        the new one is durable."""
        if not self.writes:
            return
        log = self.path / "metrics.jsonl"
        with open(log, "ab") as f:
            os.fsync(f.fileno())
        state = {"step": step, "metrics_bytes": log.stat().st_size, "due": due}
        self.write(f"checkpoints/{step:06d}.safetensors",
                   save(tensors, {"state": json.dumps(state), "sha256": _digest(tensors, state)}))
        for old in self.checkpoints()[:-KEPT]:
            old.unlink()

    def checkpoints(self) -> list[Path]:
        """Their files, the oldest first."""
        return sorted(self.path.glob("checkpoints/??????.safetensors"))

    def load_checkpoint(self) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with newer ones. Nothing is
        changed: see cut_back."""
        wrong, log = [], self.path / "metrics.jsonl"
        for path in reversed(self.checkpoints()):
            try:
                checkpoint = _read_checkpoint(path)
                if log.stat().st_size < checkpoint.metrics_bytes:
                    raise RunError(f"{log}: shorter than at {path.name}: its end is lost")
            except (RunError, OSError) as e:
                wrong.append(str(e))
                continue
            return checkpoint, wrong
        raise RunError(f"{'; '.join(wrong) or f'{self.path}: no checkpoint'}: train again with "
                       "--overwrite")

    def cut_back(self, checkpoint: Checkpoint) -> None:
        """Take the folder back to a checkpoint: what was logged and kept after it goes."""
        if not self.writes:
            return
        os.truncate(self.path / "metrics.jsonl", checkpoint.metrics_bytes)
        for later in [*self.checkpoints(), *self.path.glob("prompts/??????.safetensors")]:
            if later.name > f"{checkpoint.step:06d}.safetensors":
                later.unlink()


LOCK = "run.lock"


def read_config(path: Path) -> dict:
    """A run's config.json."""
    if not path.exists():
        raise RunError(f"{path.parent}: no {path.name}, so no run is here: give the folder that "
                       "train made")
    config = data.read_json(path, dict)
    settings = config.get("settings")
    if not isinstance(settings, dict) or not {
            "model", "prior", "data", "tokens", "cut", "seed"} <= settings.keys():
        raise RunError(f"{path}: no settings of a run in it, so this is not a run's folder")
    stored_settings(config, path)  # refuses what no run can have
    for key, fits, expected in (
            ("threads", lambda x: type(x) is int and 0 < x <= 2**10, "a number of threads"),
            ("processes", lambda x: x is None or type(x) is int and 0 < x < 2**20,
             "a number of processes"),
            ("changes", lambda x: x is None or isinstance(x, list), "a list"),
            ("given", lambda x: "given" not in config or isinstance(x, list) and all(
                isinstance(v, str) for v in x), "names of settings"),
            ("sha256", lambda x: isinstance(x, dict) and all(isinstance(v, str)
                                                             for v in x.values()), "checksums")):
        if not fits(config.get(key)):
            raise RunError(f"{path}: {key} is {config.get(key)!r:.80}, expected {expected}: "
                           "restore the file")
    return config


def _check_rows(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises RunError for what is no prompt: rows layers.I (n, D) fp32 with one n and D, with some
    posteriors layers.I.sd (n, D) or layers.I.particles (K, n, D) at all layers; or of a prefix
    layers.I.keys and layers.I.values (n, G, hd)."""
    shapes, kinds = {key: tuple(t.shape) for key, t in tensors.items()}, {}
    for key, t in tensors.items():
        named = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,5})(\.particles|\.sd|\.keys|\.values|)", key)
        if not named or t.dtype != torch.float32 or 0 in t.shape \
                or t.dim() != 2 + (named[2] in (".particles", ".keys", ".values")):
            raise RunError(f"{path}: {key!r:.80} of shape {shapes[key]} is no prompt rows, which "
                           "are layers.0 (rows, width) and so on: restore the file")
        if not torch.isfinite(t).all():
            raise RunError(f"{path}: {key} holds numbers that are not finite: restore the file")
        kinds.setdefault(named[2], {})[named[1]] = shapes[key]
    prefix = kinds.keys() == {".keys", ".values"}
    layers = kinds.get(".keys" if prefix else "", {})
    if any(each.keys() != layers.keys() or len({*each.values()}) > 1 or {
            s if prefix else s[-2:] for s in each.values()} != {*layers.values()}
            for each in kinds.values()) or not layers:
        raise RunError(f"{path}: its rows {shapes!s:.200} are not of one prompt: restore the file")


def _locked(path: Path):
    """An open file with an exclusive lock, and who held it before without giving it back."""
    import fcntl

    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise RunError(f"{path.parent}: {who} is training it: wait for its end, or choose "
                           "another --out") from None
        try:  # what was locked may have been removed by its owner meanwhile
            if os.fstat(file.fileno()).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()
    file.seek(0)
    before = file.read().strip()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file, before


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        with safe_open(regular(path), framework="pt") as f:
            about = f.metadata() or {}
            # not mapped: the file is replaced
            tensors = {key: f.get_tensor(key).clone() for key in f.keys()}
        state = data.parse_json(about["state"], "its state")
        if not isinstance(state, dict) or {k: type(v) for k, v in state.items()} != {
                "step": int, "metrics_bytes": int, "due": bool}:
            raise ValueError("its state is not that of a run")
        if about.get("sha256") != _digest(tensors, state):
            raise RunError(f"{path}: its contents do not match their checksum, the file is damaged")
        return Checkpoint(tensors=tensors, **state)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as e:
        if isinstance(e, RunError):
            raise
        raise RunError(f"{path}: not a checkpoint ({cause(e)})") from None


def _digest(tensors: dict[str, Tensor], state: dict) -> str:
    h = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode()
                 + t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
