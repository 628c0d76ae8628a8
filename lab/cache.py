"""What was worked out of large sets of vectors, kept for later commands in a folder of the user's.

    spectrum = priors.Spectrum(*kept(priors.Spectrum.of, rows))

A result is kept under a checksum of all that it depends on: the vectors' bytes, the program's
source and versions, and the threads, on which its last bits depend. So it is the same bit for bit
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
from typing import Callable

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lab.console import UserError
from lab.files import digest_of, read_tensors, write_file

OFF = "off"  # the value of PROMPTPRIOR_CACHE without a folder
WORTH = 5e9  # multiplications (rows width^2) that take longer than a checksum of the rows
MOST = 40  # results that are kept, some 1 GB of the largest; each version makes its own


def cache_folder() -> Path | None:
    """Where what was learned of files is kept, for all runs; None where PROMPTPRIOR_CACHE=off."""
    named = os.environ.get("PROMPTPRIOR_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if named == OFF else Path(named or f"{caches}/promptprior")


def kept(function: Callable, rows: Tensor | np.ndarray, *arguments, keep: bool = True
         ) -> list[Tensor]:
    """What function(rows, *arguments) returns, an array, number or tuple of them, as tensors; from
    the cache folder if it was worked out before. rows: (N, D). arguments: arrays and numbers. keep:
    whether other commands will ask for it."""
    folder = cache_folder()
    if folder is None or not keep or len(rows) * rows.shape[1]**2 < WORTH:
        return _results(function, rows, arguments)
    about = {"of": _checksum(function, rows, arguments)}
    path = folder / f"{function.__qualname__}-{about['of']}.safetensors"
    # Any failure to read it is one of the file's, which is then written anew.
    with contextlib.suppress(UserError, OSError):
        tensors, found = read_tensors(path, "kept results")
        results = [tensors[name] for name in sorted(tensors)]
        if found == about | {"sha256": digest_of(tensors, about)}:
            return results
    results = _results(function, rows, arguments)
    tensors = {f"{i:02d}": t for i, t in enumerate(results)}
    with contextlib.suppress(UserError, OSError):
        write_file(path, save(tensors, about | {"sha256": digest_of(tensors, about)}))
        _remove_oldest(folder)
    return results


def _remove_oldest(folder: Path) -> None:
    """Leave the MOST results that were written last."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MOST]:
        file.unlink(missing_ok=True)


def _results(function: Callable, rows: Tensor | np.ndarray, arguments: tuple) -> list[Tensor]:
    """The results in the layout that a file gives back, on which the last bits of what is computed
    with them depend."""
    returned = function(rows, *arguments)
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


def _checksum(function: Callable, rows: Tensor | np.ndarray, arguments: tuple) -> str:
    """Of all that the results depend on, to the last bit."""
    circumstances = (torch.__version__, np.__version__, torch.get_num_threads(), os.cpu_count(),
                     os.environ.get("OPENBLAS_NUM_THREADS"),
                     torch.backends.cpu.get_cpu_capability())
    total = hashlib.sha256(repr((function.__qualname__, circumstances)).encode())
    total.update(_program())
    for value in (rows, *arguments):
        array = np.ascontiguousarray(value)
        total.update(f"{array.dtype} {array.shape} ".encode())
        total.update(array.data if array.size else b"")
    return total.hexdigest()
