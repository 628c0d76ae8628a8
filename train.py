"""Training the prompt of a frozen model: the run's folder, the loop, the evaluation.

    run = Run(Path("runs/first"))
    # writes all of the run's folder but its figures
    train(run, settings, model, prompt, rates, batch_of, penalty, evaluate, resume=False)

A run's folder is described in the README. Its files are replaced whole or not at all,
and what resuming needs is in one of them, checkpoint.safetensors, together with the
checksum of its contents.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import data
import geometry
import llama
import posteriors


class RunError(ValueError):
    """A run's folder that cannot be used: what, where, and the remedy, in one line."""


class Stopped(Exception):
    """Training ended early; the folder is whole. status: the exit status, or minus the signal."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


# --------------------------------------------------------------------------------------------------
# processes: with torchrun each takes its share of every batch; alone, a process is a world of one


def join_world(device: str) -> None:
    """Meet the other processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_ADDR" not in os.environ:
        return
    if device not in ("cpu", "cuda"):
        raise RunError(f"--device {device}: of several processes each takes its own: use cuda")
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise RunError(f"process {local} of this machine has no device: there are "
                           f"{torch.cuda.device_count()}: lower --nproc-per-node")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def meet() -> None:
    """No process goes on before all have come to this place."""
    if world()[1] > 1:
        dist.barrier()


def agree(value):
    """Rank 0's value, on every process."""
    values = [value]
    if world()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def progress(iterable=None, **options) -> tqdm:
    """A bar at a terminal, of one process."""
    return tqdm(iterable, disable=None if world()[0] == 0 else True, **options)


def sum_up(*numbers: float, device: str) -> list[float]:
    """Each number's sum over the processes."""
    if world()[1] == 1:
        return list(numbers)
    t = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(t)
    return t.tolist()


def sum_gradients(parameters: list[Tensor]) -> None:
    if world()[1] > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))


def shard(model: llama.Llama, device: str) -> None:
    """Divide the blocks' weights among the processes, which gather a block's when its turn comes
    (FSDP2). Embeddings and head stay whole."""
    from torch.distributed.fsdp import fully_shard

    # keys leave a block as views, and nobody writes to them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = dist.init_device_mesh(device.split(":")[0], (world()[1],))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for module in (model.model.embed_tokens, model.model.norm, getattr(model, "lm_head", None)):
        if module is not None:
            module.to(device)


# --------------------------------------------------------------------------------------------------
# files


def write_file(path: Path, content: bytes) -> None:
    """Replace a file whole: temporary in the same folder, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
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


def keep_freed_memory() -> None:
    """Tell glibc not to hand every freed activation back to the system, only to ask for it again:
    a tenth to a quarter of a step on the CPU. Elsewhere nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def rows_to_bytes(rows: dict[int, Tensor], about: dict[str, str]) -> bytes:
    return save({f"layers.{i}": r.detach().float().cpu().contiguous() for i, r in rows.items()},
                about)


class Run:
    """A run's folder. Of several processes only the first writes."""

    def __init__(self, path: Path):
        self.path = Path(path)

    @property
    def writes(self) -> bool:
        return world()[0] == 0

    def write(self, name: str, content: bytes) -> None:
        if self.writes:
            write_file(self.path / name, content)

    def write_json(self, name: str, value) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def config(self) -> dict:
        try:
            config = json.loads((self.path / "config.json").read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path}: no config.json, so no run is here: give the folder that "
                           "train made") from None
        except (OSError, ValueError) as e:
            raise RunError(f"{self.path / 'config.json'}: cannot be read ({e})") from None
        settings = config.get("settings") if isinstance(config, dict) else None
        if not isinstance(settings, dict) or not {
                "model", "prior", "data", "tokens", "cut"} <= settings.keys():
            raise RunError(f"{self.path / 'config.json'}: no settings of a run in it, "
                           "so this is not a run's folder")
        return config

    def clear(self) -> None:
        """Remove what an earlier run left here, and nothing else."""
        if not self.writes:
            return
        for pattern in ("metrics.jsonl", "prompt.safetensors", "checkpoint.safetensors",
                        "predictions.jsonl", "trunk*.safetensors", "prompts/??????.safetensors", "figures/layer-*.svg"):
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
        posterior the mean."""
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
        path = self.path / name
        try:
            with safe_open(path, framework="pt") as f:
                tensors = {key: f.get_tensor(key) for key in f.keys()}
        except FileNotFoundError:
            raise RunError(f"{path}: no such file; training has not come that far: "
                           "train it with --resume") from None
        except (SafetensorError, OSError) as e:
            raise RunError(f"{path}: not prompt rows ({str(e).splitlines()[0]})") from None
        if not tensors or not all(re.fullmatch(r"layers\.\d+(\.particles|\.sd)?", key)
                                  for key in tensors):
            raise RunError(f"{path}: not prompt rows, which are named layers.0 and so on")
        return tensors

    def log(self, record: dict) -> None:
        if not self.writes:
            return
        with open(self.path / "metrics.jsonl", "ab") as f:
            f.write((json.dumps(record) + "\n").encode())

    def metrics(self) -> list[dict]:
        """The log, without a last line that a killed run left unfinished."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor]) -> None:
        """All that resuming needs in one file, so that no two files can disagree: the state
        is in its metadata."""
        if not self.writes:
            return
        log = self.path / "metrics.jsonl"
        with open(log, "ab") as f:
            os.fsync(f.fileno())
        state = {"step": step, "metrics_bytes": log.stat().st_size}
        content = save(tensors, {"state": json.dumps(state), "sha256": _digest(tensors, state)})
        self.write("checkpoint.safetensors", content)

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor]]:
        """The step reached and its tensors; metrics.jsonl is cut back to that step."""
        path = self.path / "checkpoint.safetensors"
        try:
            with safe_open(path, framework="pt") as f:
                about = f.metadata() or {}
                # not mapped: the file is replaced
                tensors = {key: f.get_tensor(key).clone() for key in f.keys()}
            state = json.loads(about["state"])
        except (SafetensorError, OSError, ValueError, KeyError) as e:
            raise RunError(f"{path}: not a checkpoint ({str(e).splitlines()[0]}): "
                           "train again with --overwrite") from None
        if about.get("sha256") != _digest(tensors, state):
            raise RunError(f"{path}: its contents do not match their checksum, the file is "
                           "damaged: train again with --overwrite")
        if self.writes:
            os.truncate(self.path / "metrics.jsonl", state["metrics_bytes"])
        return state["step"], tensors


def _digest(tensors: dict[str, Tensor], state: dict) -> str:
    h = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].cpu().contiguous().view(-1).view(
            torch.uint8).numpy().tobytes())
    return h.hexdigest()


# --------------------------------------------------------------------------------------------------
# loss and scores


def answer_loss(model: llama.Llama, past: llama.Past, batch: data.Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy in nats over the answers' tokens, and their number. Logits are made
    there only.

    past holds the prompt and the batch's shared beginnings:
    model.extend(batch.shared, prompt.past(model))."""
    scored = batch.labels != data.NO_LABEL
    logits = model.logits(model.states(batch.tails, past, batch.parent, scored))
    return _cross_entropy(logits, batch.labels[scored]), len(logits)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels,
                           reduction="sum")


@torch.no_grad()
def answers(model: llama.Llama, past: llama.Past | list[llama.Past], batch: data.Batch,
            max_new: int, stop: set[int]
            ) -> tuple[Tensor, int, list[list[int]], list[tuple[float, bool]]]:
    """answer_loss's two, greedy answers, each up to and with its first token of stop, and how sure
    the model was of every answer's first token, and whether that was right. Of a list of pasts the
    token probabilities are averaged.

    One forward does both: where the right answer's tokens are also the likeliest ones, greedy
    decoding would have taken them, so it goes on only from where they part."""
    scored = batch.labels != data.NO_LABEL
    pasts = past if isinstance(past, list) else [past]
    seen = [model(batch.tails, p, parent=batch.parent) for p in pasts]
    logits = llama.ensemble([model.logits(h[scored]) for h, _ in seen])
    labels, counts = batch.labels[scored], scored.sum(dim=1)
    begin = counts.cumsum(dim=0) - counts
    sure = logits[begin].float().softmax(dim=-1).max(dim=-1)
    said, right, tails = (t.tolist() for t in (logits.argmax(dim=-1), labels, batch.tails))
    out, going, read, merged, first = [], [], [], [], 0
    for i, (count, asked) in enumerate(zip(counts.tolist(), batch.asked)):
        same = 0  # tokens of the right answer, from its first on, that the model says too
        while same < count and said[first + same] == right[first + same]:
            same += 1
        answer = said[first:first + min(same + 1, count)][:max_new]
        first += count
        end = next((j + 1 for j, t in enumerate(answer) if t in stop), None)
        out.append(answer[:end])
        if tails[i][:len(asked)] != asked:
            merged.append(i)  # with the answer, the question's last token is another
        elif end is None and len(answer) < max_new:
            going.append(i)
            read.append(len(asked) + len(answer) - 1)  # the answer's last token is not in after yet
    if going:
        ids = [out[i][-1:] for i in going]
        kept, read = (torch.tensor(t, device=labels.device) for t in (going, read))
        after = [_reread(after.take(kept), batch.tails.shape[1], read) for _, after in seen]
        for i, more in zip(going, llama.generate(model, ids, after, max_new - 1, stop)):
            out[i] = (out[i] + more)[:max_new]
    if merged:
        parent = batch.parent[merged]
        for i, ids in zip(merged, llama.generate(model, [batch.asked[i] for i in merged], pasts,
                                                 max_new, stop, parent)):
            out[i] = ids
    return _cross_entropy(logits, labels), len(logits), out, list(zip(
        sure.values.tolist(), (sure.indices == labels[begin]).tolist()))


def _reread(past: llama.Past, columns: int, read: Tensor) -> llama.Past:
    """past as if only the first read (B,) of its last columns had been read."""
    before, last = past.real[:, :-columns], past.real[:, -columns:]
    kept = last & (torch.arange(columns, device=read.device) < read[:, None])
    return past._replace(real=torch.cat((before, kept), dim=1),
                         position=past.position - last.sum(dim=1) + read)


class Questions(NamedTuple):
    """What a prompt is trained or scored on: examples and the same as token rows."""

    examples: list[data.Example]
    rows: list[data.Row]
    placed: list[data.Row] | None = None  # rows whose ids are a trunk's

    def batch(self, places: list[int], a: SimpleNamespace) -> data.Batch:
        batch = data.collate([self.rows[i] for i in places], a.share)
        if self.placed:  # the labels are tokens all the same
            batch = data.collate([self.placed[i] for i in places], a.share)._replace(
                labels=batch.labels)
        return batch.to(a.device)


@torch.no_grad()
def trunk(model: llama.Llama, rows: list[data.Row], layer: int, n: int, a: SimpleNamespace,
          file: Path) -> tuple[llama.Llama, list[data.Row]]:
    """What lies below a prompt's first layer is a frozen function of the text, so it is computed
    once for all epochs -> the model from `layer` on, and rows whose ids are that model's.

    n prompt rows stand before every text. Tokens after the same beginning are one. Batches are
    made of the rows in lexicographic order, so that the numbers do not depend on the order of
    training. Up to a.trunk_memory GiB is held on the model's device, more in a mapped file."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].ids)
    placed, before, places, count = list(rows), [], [], 0
    for i in order:
        ids = rows[i].ids
        same = len(data.common_beginning([before, ids])) if before else 0
        places = places[:same] + list(range(count, count + len(ids) - same))
        count += len(ids) - same
        placed[i], before = rows[i]._replace(ids=places), ids
    D, dtype, device = model.config.hidden_size, model.embeddings.dtype, model.embeddings.device
    size = count * D * dtype.itemsize
    if size <= a.trunk_memory * 2**30:
        inputs = torch.empty(count, D, dtype=dtype, device=device)
    else:
        try:
            inputs = mapped(file, {"inputs": ((count, D), dtype)})["inputs"]
        except OSError as e:
            raise OSError(f"{e}, the inputs of the first layer with rows: free the disk, raise "
                          "--trunk-memory or give --no-trunk") from None
    below = model.part(model.first, layer + 1)
    start = below.empty()
    start = start._replace(position=start.position + n)

    def keep(ids: Tensor):
        ids = ids[ids != llama.PAD].to(inputs.device)
        return lambda i, x: inputs.index_copy_(0, ids, x.to(inputs.device)) if i == layer else None

    with progress(total=len(rows), desc="layers below the rows", unit=" questions",
                  leave=False) as bar:
        for some in (order[i:i + a.batch_size] for i in range(0, len(rows), a.batch_size)):
            batch, where = (data.collate([r[i] for i in some]).to(device) for r in (rows, placed))
            past = below.extend(batch.shared, start, keep(where.shared))
            below.extend(batch.tails, past.take(batch.parent), keep(where.tails))
            bar.update(len(some))
    return model.part(layer, model.config.num_hidden_layers, inputs), placed


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
    path.parent.mkdir(parents=True, exist_ok=True)
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


@torch.no_grad()
def evaluate(model: llama.Llama, vocabulary: data.Vocabulary, past: llama.Past | list[llama.Past],
             questions: Questions, a: SimpleNamespace,
             name: str) -> tuple[dict[str, float], list[dict]]:
    """Loss (nats a token), scores (percent) of greedy answers, the calibration error of their first
    tokens (percent), and the predictions. Of a list of pasts the token probabilities are averaged.
    Processes share the batches out, unless they share the weights and so must all do the same."""
    total, count, found_by_place = 0.0, 0, {}
    pasts = past if isinstance(past, list) else [past]
    places = range(len(questions.rows))
    rank, size = (0, 1) if a.shard else world()
    mine = [places[i:i + a.batch_size] for i in places[::a.batch_size]][rank::size]
    with progress(total=sum(map(len, mine)), desc=name, unit=" questions", leave=False) as bar:
        for some in mine:
            batch = questions.batch(some, a)
            begun = [model.extend(batch.shared, p) for p in pasts]
            loss, tokens, found, sure = answers(model, begun, batch, a.max_new, vocabulary.stop)
            total, count = total + loss.item(), count + tokens
            found_by_place |= dict(zip(some, zip(found, sure)))
            bar.update(len(some))
    if size > 1:
        total, count = sum_up(total, count, device=a.device)
        parts = [None] * size
        dist.all_gather_object(parts, found_by_place)
        found_by_place = {i: found for part in parts for i, found in part.items()}
    scores, predictions = [], []
    for i in places:
        example, prediction = questions.examples[i], vocabulary.first_line(found_by_place[i][0])
        scores.append(data.score(example, prediction))
        predictions.append({"id": example.id, "question": example.question,
                            "prediction": prediction, "answers": list(example.answers),
                            **{key: round(100 * s, 2) for key, s in scores[-1].items()}})
    error = geometry.calibration_error(*map(np.array, zip(*(
        found_by_place[i][1] for i in places))))
    return {"loss": total / count, **data.mean_scores(scores),
            "calibration_error": error}, predictions


# --------------------------------------------------------------------------------------------------
# the loop


def schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the peak: linear warm-up, then half a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(run: Run, settings: SimpleNamespace, model: llama.Llama, posterior: posteriors.Point,
          rates: dict[int, float], batch_of: Callable[[int], data.Batch],
          penalty: Callable[[dict[int, Tensor]], Tensor] | None,
          evaluate: Callable[[int], tuple[dict, list[dict]]], resume: bool) -> None:
    """AdamW on the posterior's rows, with a peak learning rate {layer: rate} for each layer's.
    Every member's objective is its loss per answer token + prior_weight * penalty(rows); see
    README, MAP, and posteriors.py.

    batch_of(step) must be a pure function of the step; of several processes each has its share of
    the batch, and gradients are summed. evaluate(step) scores the prompt as it is.
    Raises Stopped on SIGINT and SIGTERM, after the step, and when the loss is not finite."""
    a = settings
    # without its folder: the same bytes anywhere
    about = {"settings": json.dumps({k: v for k, v in vars(a).items() if k != "out"},
                                    sort_keys=True)}
    optimiser = torch.optim.AdamW([{**g, "peak": g["lr"]} for g in posterior.groups(rates)],
                                  weight_decay=0.0)

    def record(step: int) -> None:
        """Score the rows as they are and write them down."""
        metrics, predictions = evaluate(step)
        run.log({"step": step, "split": "eval", **metrics})
        write_rows(f"prompts/{step:06d}.safetensors")
        write_rows("prompt.safetensors")
        run.write("predictions.jsonl",
                  b"".join((json.dumps(p) + "\n").encode() for p in predictions))

    def write_rows(name: str) -> None:
        run.write(name, save({key: t.float().cpu().contiguous()
                              for key, t in posterior.tensors().items()}, about))

    if resume:
        first, tensors = run.load_checkpoint()
        _restore(posterior, optimiser, tensors, run.path)
    else:
        first = 0
        record(0)
        run.save_checkpoint(0, _state(posterior, optimiser))

    size, signals = world()[1], []
    parameters = list(posterior.parameters())
    command = f"torchrun --nproc-per-node {size} promptprior.py " if size > 1 else ""

    def heed(number, frame):
        signals.append(number)
        signal.signal(number, handlers[number])  # a second acts at once; the checkpoint is whole

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, heed)
    bar = progress(total=a.steps, initial=first, desc="train", unit=" steps")
    try:
        saved = first
        for step in range(first, a.steps):
            start = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule(step, a.steps, a.warmup)
            batch = batch_of(step)
            members = posterior.members(step)
            loss, extra, cost = 0.0, 0.0, posterior.cost()
            tokens, examples = sum_up(int((batch.labels != data.NO_LABEL).sum()),
                                      len(batch.tails), device=a.device)
            for rows in members:
                past = model.extend(batch.shared, model.prompt_past(rows, a.cut))
                summed, _ = answer_loss(model, past, batch)
                own = penalty(rows) if penalty else torch.zeros(())
                (summed / tokens + a.prior_weight * own / size).backward()
                loss += summed.item() / len(members)
                extra += a.prior_weight * own.item() / len(members)
            if torch.is_tensor(cost):
                (a.prior_weight * cost / size).backward()
                extra += a.prior_weight * cost.item()
            sum_gradients(parameters)
            posterior.settle()
            loss = sum_up(loss, device=a.device)[0] / tokens
            norm = torch.nn.utils.clip_grad_norm_(
                parameters, a.clip if posterior.clips else math.inf)
            if not math.isfinite(loss + extra + norm.item()):
                raise Stopped(f"loss {loss:.4g}, gradient norm {norm.item():.4g} at step "
                              f"{step + 1}: not finite, stopped before it could spoil the rows; "
                              f"{run.path}/checkpoint.safetensors holds step {saved}: lower --lr "
                              f"(now {max(rates.values()):.3g})", 1)
            optimiser.step()
            optimiser.zero_grad()
            seconds = time.perf_counter() - start
            line = {"step": step + 1, "split": "train", "loss": loss,
                    "lr": optimiser.param_groups[0]["lr"], "grad_norm": norm.item(),
                    "examples_per_second": round(examples / seconds, 2),
                    "seconds": round(seconds, 4)}
            run.log({**line, "penalty": extra} if penalty else line)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            done = step + 1
            scored = done % a.eval_every == 0 or done == a.steps
            if scored:
                record(done)
            elif a.snapshot_every and done % a.snapshot_every == 0:  # runs of old have none
                write_rows(f"prompts/{done:06d}.safetensors")
            came = sum_up(*(signals.count(s) for s in handlers), device=a.device)
            signal_number = next((s for s, n in zip(handlers, came) if n), None)
            if scored or signal_number:
                run.save_checkpoint(done, _state(posterior, optimiser))
                saved = done
            if signal_number:
                write_rows("prompt.safetensors")
                raise Stopped(f"stopped by {signal.Signals(signal_number).name} after step {done} "
                              f"of {a.steps}, all is saved; go on with: {command}train --out "
                              f"{run.path} --resume", -signal_number)
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _state(posterior: posteriors.Point, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"rows.{name}": p.detach() for name, p in posterior.named_parameters()}
    for name, p in posterior.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimiser.state[p].items()}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _restore(posterior: posteriors.Point, optimiser: torch.optim.Optimizer,
             tensors: dict[str, Tensor], path: Path) -> None:
    for name, p in posterior.named_parameters():
        rows = tensors.get(f"rows.{name}")
        if rows is None or rows.shape != p.shape:
            raise RunError(f"{path}/checkpoint.safetensors: rows {name!r} are missing or of "
                           f"another shape than {tuple(p.shape)}: "
                           "this checkpoint is of another run")
        p.data.copy_(rows)
        moments = {key: tensors[f"{key}.{name}"].clone()
                   for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
        if moments:
            optimiser.state[p] = {key: t if key == "step" else t.to(p.device)
                                  for key, t in moments.items()}
