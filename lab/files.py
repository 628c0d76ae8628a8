"""Reading files from anywhere through one guard, and writing files whole or not at all.

    with reading(path, "a run's log", "restore the file"):       # any failure is one line
        lines = parse(path)
    write_file(path, content)                                    # the old file, or the new one
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Callable, Iterator

import torch
from safetensors import safe_open
from torch import Tensor

import data
import llama
from lab.console import UserError, out_of_memory

# --------------------------------------------------------------------------------------------------
# reading


@contextlib.contextmanager
def reading(path: str | Path, expected: str, remedy: str = "") -> Iterator[None]:
    """Turn any failure inside into a UserError, "PATH: not EXPECTED (cause): REMEDY"; without a
    remedy if the caller has one. Errors that
    already are one line for the user pass unchanged, and so does a lack of memory."""
    try:
        yield
    except (UserError, data.DataError, llama.ModelError):
        raise
    except Exception as e:
        if out_of_memory(e):
            raise
        line = f"{path}: not {expected} ({llama.cause(e)})"
        raise UserError(f"{line}: {remedy}" if remedy else line) from None


def read_tensors(path: Path, expected: str, remedy: str = "") -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of a safetensors file. Raises UserError."""
    with reading(path, expected, remedy), safe_open(llama.regular(path), framework="pt") as f:
        # Copies, because a mapped file may be replaced while its tensors are in use.
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
        return tensors, f.metadata() or {}


def checksum(paths: list[Path]) -> str:
    """SHA-256 over the SHA-256 of all files, as hexadecimal digits."""
    total = hashlib.sha256()
    for path in paths:
        with reading(path, "readable", "restore it"), open(llama.regular(path), "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


# --------------------------------------------------------------------------------------------------
# writing


def free_place(path: str | Path, flag: str, overwrite: bool = False,
               ours: Callable[[Path], bool] | None = None, kind: str = "",
               is_folder: bool = False) -> Path:
    """A path that a command may write. Raises UserError if something is there, unless `overwrite`
    was asked for and `ours` recognises it as `kind`, of the program's own making. is_folder: an
    empty folder is free too."""
    path = Path(path)
    is_empty = is_folder and path.is_dir() and not any(path.iterdir())
    if not path.exists() or is_empty or overwrite and ours and ours(path):
        return path
    remedy = f"choose another {flag}"
    if ours and overwrite:
        remedy += f"; only {kind} is overwritten"
    elif ours:
        remedy += f", or replace {kind} by --overwrite"
    raise UserError(f"{path} exists: {remedy}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder, which replaces `path` when the block ends well.

    The temporary is synchronised to the disk, renamed, and its folder synchronised too, so that
    after a power cut there is the old file or the new one. If path is a link, the link stays and
    the file that it leads to is replaced. An OSError names the file."""
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
        _synchronise_folder(path.parent)
    except OSError as e:
        raise OSError(f"{path}: cannot be written: {e.strerror or e}") from e


def _synchronise_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as f:
        f.write(content)


DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.int64: "I64", torch.uint8: "U8"}


def mapped(path: Path, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
           about: dict[str, str]) -> dict[str, Tensor]:
    """Tensors {name: (shape, dtype)} of a new safetensors file. They are zero, and what is written
    to them goes to the file through the page cache. about is the file's metadata."""
    # The widest come first, as safetensors itself lays them out, so that each tensor begins at a
    # multiple of its element's width.
    ordered = sorted(shapes.items(), key=lambda item: (-item[1][1].itemsize, item[0]))
    header, ranges, end = {"__metadata__": about}, {}, 0
    for name, (shape, dtype) in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        ranges[name] = start, end
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape),
                        "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    size = 8 + len(encoded) + end

    # All of the file is reserved now: a full disk is an error here, and would kill the process by
    # SIGBUS at a later write.
    try:
        with open(path, "wb") as f:
            f.write(len(encoded).to_bytes(8, "little") + encoded)
            f.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, size)
            else:
                os.ftruncate(f.fileno(), size)
    except OSError as e:
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: no room for {size / 2**30:.1f} GiB ({e.strerror})") from None

    content = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)[-end:]
    tensors = {}
    for name, (start, stop) in ranges.items():
        shape, dtype = shapes[name]
        tensors[name] = content[start:stop].view(dtype).view(shape)
    return tensors
