"""A process's memory and signals, and processes that torchrun starts: each takes its share of every
batch. A process alone is a group of one, so the callers need not ask."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import re
import signal
import sys
import threading
import warnings
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

import llama
from lab.console import Stopped, UserError, rank_and_count

# that ask to stop
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory. By default it returns every freed activation to the system
    and asks for it again, which takes a tenth to a quarter of a step on the CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def use_threads(count: int) -> None:
    """Make torch work with as many threads as a run began with. Raises UserError if the system has
    no room for them: OpenMP would end the process."""
    if count > (os.cpu_count() or 1):
        go_on, started = threading.Event(), []
        try:
            for _ in range(2 * count):  # torch and MKL have their own
                started.append(threading.Thread(target=go_on.wait))
                started[-1].start()
        except RuntimeError:
            raise UserError(f"{count} threads, as this run began with, cannot be started here: go "
                            "on where they can, or begin another run") from None
        finally:
            go_on.set()
            for thread in started:
                if thread.ident:  # it was started
                    thread.join()
    torch.set_num_threads(count)


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect signals that ask to stop, so that the step can finish. A second signal of a kind acts
    at once. Signals that are ignored stay so, as nohup asks."""
    received: list[int] = []
    current = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: h for number, h in current.items() if h is not signal.SIG_IGN}

    def on_signal(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, on_signal)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raise_signals(how_to_go_on: str) -> Iterator[None]:
    """Raise Stopped from here on a signal that would end the process at once, so that what is
    inside is cleaned up first."""
    received: list[int] = []
    ending = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]

    def on_signal(number, frame):
        received.append(number)
        raise KeyboardInterrupt  # which nothing takes for a failure of its own

    for number in ending:
        signal.signal(number, on_signal)
    try:
        yield
    except KeyboardInterrupt:
        if not received:
            raise
        raise Stopped(f"stopped by {signal.Signals(received[0]).name}; {how_to_go_on}",
                      -received[0]) from None
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def init_processes(device: str, batch_size: int, shard: bool) -> None:
    """Meet the other processes, if torchrun started any. Raises UserError for settings that do not
    suit their number."""
    _, count = rank_and_count()
    if count > batch_size:
        raise UserError(f"--batch-size {batch_size}: fewer than the {count} processes, which share "
                        "a batch: raise it")
    if count > 1:
        _init_group(device)
    if shard and rank_and_size()[1] == 1:
        raise UserError("--shard divides a model among processes: start them by `torchrun "
                        "--nproc-per-node N promptprior.py train ...`, or leave it out")


def _init_group(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: of several processes each takes its own: use cuda")
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no device: there are "
                            f"{torch.cuda.device_count()}: lower --nproc-per-node")
        torch.cuda.set_device(local)
    # torch.optim imports this module, whose functions keep the group of that moment as their
    # default argument. Imported before there is a group, they keep none.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    atexit.register(_leave_group)


def _leave_group() -> None:
    """End gloo's threads: one that still runs when Python has ended aborts the process. They end
    with the group, once nothing refers to it."""
    if "torch.distributed.fsdp" in sys.modules:
        # Sharded tensors refer to it, and a cache of their layouts.
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        gc.collect()
        _clear_sharding_prop_cache()
    dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def has_lost_others(e: Exception) -> bool:
    """Whether an exchange failed because another process has ended."""
    return (isinstance(e, RuntimeError) and rank_and_size()[1] > 1
            and re.search("gloo|nccl|connection (closed|reset)", str(e), re.I) is not None)


def barrier() -> None:
    """No process passes this line before all have come to it."""
    if rank_and_size()[1] > 1:
        dist.barrier()


def broadcast(value):
    """The first process's value, on every process."""
    values = [value]
    if rank_and_size()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def only_first(work: Callable):
    """What work() returns in the first process, or the error that it raises, on every process."""
    if rank_and_size()[1] == 1:
        return work()
    value, error = None, None
    if rank_and_size()[0] == 0:
        try:
            value = work()
        except (ValueError, OSError) as e:
            error = e
    value, error = broadcast((value, error))
    if error:
        raise error
    return value


def all_gather(value) -> list:
    """Every process's value, by rank, on every process."""
    rank, size = rank_and_size()
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce_sum(*numbers: float, device: str) -> list[float]:
    """Each number's sum over the processes."""
    if rank_and_size()[1] == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def all_reduce_gradients(parameters: list[Tensor]) -> None:
    """Replace each parameter's gradient by its sum over the processes."""
    if rank_and_size()[1] == 1:
        return
    # One exchange of a long vector is faster than one for each parameter.
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    for p, gradient in zip(parameters, flat.split(sizes)):
        p.grad.copy_(gradient.view_as(p))


def shard_model(model: llama.Llama, device: str) -> None:
    """Divide the blocks' weights among the processes, which gather a block's weights when its turn
    comes (FSDP2). Embeddings and head stay whole."""
    from torch.distributed.fsdp import fully_shard

    # A block returns its keys as views. FSDP2 warns that writes to them are lost; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = dist.init_device_mesh(device.split(":")[0], (rank_and_size()[1],))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    for module in (model.model.embed_tokens, model.model.norm, getattr(model, "lm_head", None)):
        if module is not None:
            module.to(device)
