"""What takes long to work out, kept for later commands in a folder of the user's.

    spectrum = priors.Spectrum(*kept(priors.Spectrum.of, rows))     # of a large set of vectors
    [h] = kept_under("inputs", [weights_sha256, token_ids], work, lambda: run(model, token_ids))

A result is kept under a checksum of all that it depends on: what was given, the program's source
and versions, and the threads, on which its last bits depend. So it is the same bit for bit
with the folder and without. A file that is damaged, or another's, is as good as none; a folder that
cannot be written costs time alone. Files are written whole or not at all, so that processes share
them, and any may be removed at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lab.console import UserError
from lab.files import digest_of, read_tensors, write_file

OFF = "off"  # the value of PROMPTPRIOR_CACHE without a folder
WORTH = 5e9  # multiplications that take longer than to read their results and to check the sums
POINT = 3e7  # multiplications that take as long as a point of a t-SNE
MOST = 100  # results that are kept; each version of the program makes its own
BYTES = 2e9  # of all of them; a result of more than half is not kept


def cache_folder() -> Path | None:
    """Where what was learned of files is kept, for all runs; None where PROMPTPRIOR_CACHE=off."""
    named = os.environ.get("PROMPTPRIOR_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if named == OFF else Path(named or f"{caches}/promptprior")


def make_folder(folder: Path) -> None:
    """The cache folder is its user's alone: activations are of texts that others may not read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def kept(function: Callable, rows: Tensor | np.ndarray, *arguments, keep: bool = True,
         work: float | None = None) -> list[Tensor]:
    """What function(rows, *arguments) returns, an array, number or tuple of them, as tensors; from
    the cache folder if it was worked out before. rows: (N, D). arguments: arrays and numbers. keep:
    whether other commands will ask for it. work: what it takes, N D^2 multiplications if None."""
    def make():
        return function(rows, *arguments)

    if not keep:
        return _results(make)
    work = len(rows) * rows.shape[1]**2 if work is None else work
    return kept_under(function.__qualname__, (rows, *arguments), work, make)


def kept_under(name: str, given: Iterable, work: float, make: Callable) -> list[Tensor]:
    """What make() returns, an array, number or tuple of them, as tensors; from the cache folder if
    it was made before. given: arrays, numbers and strings that tell all that the result depends on,
    beside the program. work: the multiplications that make() takes."""
    folder = cache_folder()
    if folder is None or work < WORTH:
        return _results(make)
    about = {"of": _checksum(name, given)}
    path = folder / f"{name}-{about['of']}.safetensors"
    # Any failure to read it is one of the file's, which is then written anew.
    with contextlib.suppress(UserError, OSError):
        tensors, found = read_tensors(path, "kept results")
        results = [tensors[name] for name in sorted(tensors)]
        if found == about | {"sha256": digest_of(tensors, about)}:
            with contextlib.suppress(OSError):
                os.utime(path)  # those that nobody asked for longest go first
            return results
    results = _results(make)
    if sum(t.nbytes for t in results) <= BYTES / 2:
        tensors = {f"{i:02d}": t for i, t in enumerate(results)}
        with contextlib.suppress(UserError, OSError):
            make_folder(folder)
            write_file(path, save(tensors, about | {"sha256": digest_of(tensors, about)}))
            _remove_oldest(folder)
    return results


def _remove_oldest(folder: Path) -> None:
    """Leave the results that were asked for last, at most MOST and of BYTES."""
    files = [(file.lstat(), file) for file in folder.glob(f"*-{'?' * 64}.safetensors")]
    total = 0
    for i, (state, file) in enumerate(sorted(files, key=lambda f: f[0].st_mtime_ns, reverse=True)):
        total += state.st_size
        if i >= MOST or total > BYTES:
            file.unlink(missing_ok=True)


def _results(make: Callable) -> list[Tensor]:
    """The results in the layout that a file gives back, on which the last bits of what is computed
    with them depend."""
    returned = make()
    values = returned if isinstance(returned, tuple) else (returned,)
    return [value.contiguous() if isinstance(value, Tensor)
            else torch.from_numpy(np.ascontiguousarray(value).reshape(np.shape(value)).copy())
            for value in values]


@functools.cache
def _program() -> bytes:
    """A checksum of the program's source, whose next version may compute something else."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("lab/*.py")]):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.digest()


def _checksum(name: str, given: Iterable) -> str:
    """Of all that the results depend on, to the last bit."""
    circumstances = (torch.__version__, np.__version__, torch.get_num_threads(), os.cpu_count(),
                     os.environ.get("OPENBLAS_NUM_THREADS"),
                     torch.backends.cpu.get_cpu_capability())
    total = hashlib.sha256(repr((name, circumstances)).encode())
    total.update(_program())
    for value in given:
        array = np.ascontiguousarray(value)
        total.update(f"{array.dtype} {array.shape} ".encode())
        total.update(array.data if array.size else b"")
    return total.hexdigest()
