"""Training the prompt of a frozen model: the loop, the loss, the evaluation, many processes.

    # writes all of the run's folder but config.json and its figures
    train(run, settings, model, posterior, batch_of, ids_of, penalty, evaluate)

The run's folder is run.py's.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
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
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import data
import geometry
import llama
import posteriors
from run import Checkpoint, Run, RunError, mapped
from settings import clean, out_of_memory


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


def keep_freed_memory() -> None:
    """Tell glibc not to hand every freed activation back to the system, only to ask for it again:
    a tenth to a quarter of a step on the CPU. Elsewhere nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def progress(iterable=None, **options) -> tqdm:
    """A bar at a terminal, of one process."""
    options["desc"] = clean(options.get("desc") or "")
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
# loss and scores


def begin(model: llama.Llama, batch: data.Batch,
          prompt: llama.Past | llama.Placed) -> tuple[llama.Past, data.Batch]:
    """The prompt in its place among a batch's beginnings -> what its tails go on from, and the
    batch that says so."""
    past = prompt if isinstance(prompt, llama.Past) else model.empty()
    shared = batch.shared
    if isinstance(prompt, llama.Placed) and prompt.place == "after-bos":
        past, shared = prompt.put(model.extend(shared[:1, :1], past)), shared[:, 1:]
    past = model.extend(shared, past)
    if batch.head is not None:
        past = model.extend(batch.head, past.take(batch.parent))
        batch = batch._replace(parent=torch.arange(len(batch.tails), device=shared.device))
    if isinstance(prompt, llama.Placed) and prompt.place == "suffix":
        past = prompt.put(past.take(batch.parent))
        batch = batch._replace(parent=torch.arange(len(batch.tails), device=shared.device))
    return past, batch


def answer_loss(model: llama.Llama, past: llama.Past, batch: data.Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy in nats over the answers' tokens, and their number. Logits are made
    there only.

    past holds the prompt and the batch's beginnings, see begin."""
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


def prompt_of(model: llama.Llama, rows: dict[int, Tensor],
              a: SimpleNamespace) -> llama.Past | llama.Placed:
    """Rows {layer: (n, D)}, or of prefix tuning {layer: (n, 2 G hd)}, rotated keys and values side
    by side, as what the model goes on from, or where it is to be put."""
    if a.method == "prefix":
        parts = {i: llama.split(r, model.config) for i, r in rows.items()}
        put = functools.partial(model.prefix_past, {i: k for i, (k, _) in parts.items()},
                                {i: v for i, (_, v) in parts.items()})
    else:
        put = functools.partial(model.prompt_past, rows, a.cut, None)
    return placed(put, a)


def placed(put: Callable[[llama.Past | None], llama.Past],
           a: SimpleNamespace) -> llama.Past | llama.Placed:
    """A prompt in its place: before everything it is what the model goes on from."""
    return put(None) if a.place == "before" else llama.Placed(put, a.place)


class Questions(NamedTuple):
    """What a prompt is trained or scored on: examples and the same as token rows."""

    examples: list[data.Example]
    rows: list[data.Row]
    placed: list[data.Row] | None = None  # rows whose ids are a trunk's

    def batch(self, places: list[int], a: SimpleNamespace) -> data.Batch:
        suffix = a.place == "suffix"
        batch = data.collate([self.rows[i] for i in places], a.share, suffix)
        if self.placed:  # the labels are tokens all the same
            batch = data.collate([self.placed[i] for i in places], a.share, suffix)._replace(
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
            begun, onward = zip(*(begin(model, batch, p) for p in pasts))
            loss, tokens, found, sure = answers(model, list(begun), onward[0], a.max_new,
                                                vocabulary.stop)
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
    if not math.isfinite(total):
        raise Stopped(f"{name}: its loss is {total}, not finite in {a.dtype}: lower --lr, or use "
                      "--dtype float32 or bfloat16", 1)
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
          batch_of: Callable[[int], data.Batch], ids_of: Callable[[int], list[str]],
          penalty: Callable[[dict[int, Tensor]], Tensor] | None,
          evaluate: Callable[[int], tuple[dict, list[dict]]],
          checkpoint: Checkpoint | None = None) -> None:
    """AdamW on the posterior's groups, whose learning rates are the peaks. Every member's
    objective is its loss per answer token + prior_weight * penalty(rows); see
    README, MAP, and posteriors.py.

    batch_of(step) must be a pure function of the step, and ids_of(step) its examples; of several
    processes each has its share of the batch, and gradients are summed. evaluate(step) scores the
    prompt as it is. checkpoint: where to go on from; the run is cut back to it.
    Raises Stopped on SIGINT, SIGTERM and SIGHUP, after the step, and when the loss is not finite, a
    file cannot be written or memory does not suffice: the checkpoints are whole."""
    a = settings
    # without its folder: the same bytes anywhere
    about = {"settings": json.dumps({k: v for k, v in vars(a).items() if k not in (
        "out", "device")}, sort_keys=True)}
    optimiser = torch.optim.AdamW([{**g, "peak": g["lr"]} for g in posterior.groups(a.lr)],
                                  weight_decay=0.0)
    size, signals, batch, saved = world()[1], [], None, None
    parameters = [p for p in posterior.parameters() if p.requires_grad]
    command = f"torchrun --nproc-per-node {size} promptprior.py " if size > 1 else ""

    def keep(due: bool) -> None:
        nonlocal saved
        run.save_checkpoint(done, _state(posterior, optimiser), due)
        saved = done

    def record() -> None:
        """Score the rows as they are and write them down."""
        metrics, predictions = evaluate(done)
        run.log({"step": done, "split": "eval", **metrics})
        write_rows(f"prompts/{done:06d}.safetensors")
        write_rows("prompt.safetensors")
        run.write("predictions.jsonl",
                  b"".join((json.dumps(p) + "\n").encode() for p in predictions))
        keep(due=False)

    def write_rows(name: str) -> None:
        tensors = posterior.tensors()
        if a.method == "prefix":
            tensors = {f"{key}.{kind}": t for key, r in tensors.items()
                       for kind, t in zip(("keys", "values"), llama.split(r, model.config))}
        run.write(name, save({key: t.float().cpu().contiguous() for key, t in tensors.items()},
                             about))

    def go_on() -> str:
        if saved is None:
            return f"begin again with: {command}train --out {run.path} --resume"
        return (f"{run.path}/checkpoints holds step {saved}; go on with: {command}train --out "
                f"{run.path} --resume")

    def heed(number, frame):
        signals.append(number)
        signal.signal(number, handlers[number])  # a second acts at once; the checkpoint is whole

    def step() -> None:
        """One step of the optimiser, or of none if a number is not finite."""
        nonlocal batch, skipped
        start = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * schedule(done, a.steps, a.warmup)
        batch = batch_of(done)
        members = posterior.members(done)
        loss, extra, cost = 0.0, 0.0, posterior.cost()
        tokens, examples = sum_up(int((batch.labels != data.NO_LABEL).sum()), len(batch.tails),
                                  device=a.device)
        for rows in members:
            summed, _ = answer_loss(model, *begin(model, batch, prompt_of(model, rows, a)))
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
            parameters, a.clip if posterior.clips else math.inf).item()
        rate = optimiser.param_groups[0]["lr"]
        if math.isfinite(loss + extra + norm):
            optimiser.step()
            seconds = time.perf_counter() - start
            line = {"step": done + 1, "split": "train", "loss": loss, "lr": rate,
                    "grad_norm": norm, "examples_per_second": round(examples / seconds, 2),
                    "seconds": round(seconds, 4)}
            run.log({**line, "penalty": extra} if penalty else line)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        else:
            skipped += 1
            ids = ids_of(done)
            if skipped > a.skip_bad_steps:
                raise Stopped(
                    f"loss {loss:.4g}, gradient norm {norm:.4g} at step {done + 1}, learning rate "
                    f"{rate:.3g}, on {', '.join(ids[:4])}{' ...' * (len(ids) > 4)}: not finite, "
                    f"stopped before it could spoil the rows: lower --lr (now at most "
                    f"{max(g['peak'] for g in optimiser.param_groups):.3g}), or leave such steps "
                    f"out by --skip-bad-steps; {go_on()}", 1)
            run.log({"step": done + 1, "split": "skipped", "lr": rate, "ids": ids})
        optimiser.zero_grad()
        bar.update()

    done, due = 0, True
    if checkpoint:
        done = saved = checkpoint.step
        due = checkpoint.due
        _restore(posterior, optimiser, checkpoint.tensors)
        run.cut_back(checkpoint)
        meet()  # all of them read the same log
    skipped = sum(m["split"] == "skipped" for m in run.metrics()) if checkpoint else 0
    handlers = {number: before for number in SIGNALS  # what is ignored stays so, as nohup asks
                if (before := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, heed)
    bar = progress(total=a.steps, initial=done, desc="train", unit=" steps")
    try:
        if not checkpoint:
            keep(due)
        while due or done < a.steps:
            if due:
                record()
                due = False
            else:
                step()
                done += 1
                due = done % a.eval_every == 0 or done == a.steps
                if due:
                    keep(due)  # the evaluation may take longer than the steps since the last one
                elif a.snapshot_every and done % a.snapshot_every == 0:  # runs of old have none
                    write_rows(f"prompts/{done:06d}.safetensors")
            came = sum_up(*map(signals.count, SIGNALS), device=a.device)
            signal_number = next((s for s, n in zip(SIGNALS, came) if n), None)
            if signal_number:
                if saved != done:
                    keep(due)
                write_rows("prompt.safetensors")
                raise Stopped(f"stopped by {signal.Signals(signal_number).name} after step {done} "
                              f"of {a.steps}, all is saved; {go_on()}", -signal_number)
    except OSError as e:
        raise Stopped(f"{e}; {go_on()}", 1) from e
    except Exception as e:
        if not out_of_memory(e):
            raise
        longest = ""
        if batch is not None and not due:
            parts = [t for t in (batch.shared, batch.head, batch.tails) if t is not None]
            longest = (f" of {len(batch.tails)} questions with up to "
                       f"{sum(t.shape[1] for t in parts)} tokens")
        what = f"in the evaluation at step {done}" if due else f"at step {done + 1}, in a batch"
        raise Stopped(f"out of memory {what}{longest}: begin again with a "
                      f"smaller --batch-size (now {a.batch_size}) or --max-length (now "
                      f"{a.max_length}), or with --recompute; {go_on()}", 1) from e
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


def _state(posterior: posteriors.Point, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"rows.{name}": p.detach() for name, p in posterior.named_parameters()}
    for name, p in posterior.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimiser.state[p].items()}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def check_fits(posterior: posteriors.Point, checkpoint: Checkpoint, path: Path) -> None:
    """Raises RunError for another run's checkpoint."""
    for name, p in posterior.named_parameters():
        rows = checkpoint.tensors.get(f"rows.{name}")
        if rows is None or rows.shape != p.shape:
            raise RunError(f"{path}/checkpoints: rows {name!r} are missing or of another shape "
                           f"than {tuple(p.shape)}: this checkpoint is of another run")


def _restore(posterior: posteriors.Point, optimiser: torch.optim.Optimizer,
             tensors: dict[str, Tensor]) -> None:
    for name, p in posterior.named_parameters():
        p.data.copy_(tensors[f"rows.{name}"])
        moments = {key: tensors[f"{key}.{name}"].clone()
                   for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
        if moments:
            optimiser.state[p] = {key: t if key == "step" else t.to(p.device)
                                  for key, t in moments.items()}
