"""Reading files from anywhere through one guard, and writing files whole or not at all.

    with reading(path, "a run's log", "restore the file"):       # any failure is one line
        lines = parse(path)
    write_file(path, content)                                    # the old file, or the new one
    with new_folder(path, "--out") as folder:                    # nothing, or all of its files
        folder.write("curve.svg", content)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import socket
import stat
import time
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import data
import llama
from lab.console import UserError, out_of_memory

# --------------------------------------------------------------------------------------------------
# reading

# The most bytes that are read at once of a file that says what something is, and of a log.
SMALL, LONG = 2**26, 2**29


@contextlib.contextmanager
def reading(path: str | Path, expected: str, remedy: str = "") -> Iterator[None]:
    """Turn any failure inside into a UserError, "PATH: not EXPECTED (cause): REMEDY"; without a
    remedy if the caller has one. Errors that already are one line for the user pass unchanged, and
    so does a lack of memory."""
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
        with reading(path, "readable", "restore it"):
            state = settled_state(llama.regular(path))
            total.update(_sum_of(path, state) if state else _sum_of.__wrapped__(path, state))
    return total.hexdigest()


@functools.lru_cache(maxsize=256)  # of runs that are opened one after the other most have one model
def _sum_of(path: Path, state: tuple | None) -> bytes:
    """SHA-256 of a file in a state."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def settled_state(path: Path) -> tuple | None:
    """What a file's next change changes; None if the last one was within two seconds, when the
    clock of its disk may not tell the two apart."""
    about = os.stat(path)
    is_new = time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < 2 * 10**9
    return None if is_new else (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns,
                                about.st_ctime_ns)


def digest_of(tensors: dict[str, Tensor], state: dict) -> str:
    """SHA-256 of the state and of every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        content = t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + content)
    return total.hexdigest()


def begins_with(path: Path, beginning: bytes) -> bool:
    """Whether a file, if there is one, begins with these bytes. Raises UserError if it cannot be
    read."""
    if not path.is_file():
        return False
    with reading(path, "readable", "check its disk, and who may use it"), path.open("rb") as f:
        return f.read(len(beginning)) == beginning


# --------------------------------------------------------------------------------------------------
# writing: a folder that is held by its descriptor

LOCK = "run.lock"
UNFINISHED = ".promptprior.tmp"  # ends the names of what is not finished; nobody else's end so
# New files that are whole and wait for the old ones to go, and those that wait no more.
MADE, MOVING = ".made" + UNFINISHED, ".moving" + UNFINISHED
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # and a pipe is not waited for


class Locked(UserError):
    """Another process is at work in the folder."""


class NotWritten(OSError):
    """A file that cannot be written. The message names it."""

    def __init__(self, path: Path, e: OSError):
        super().__init__(f"{path}: cannot be written: {e.strerror}")
        self.path, self.reason, self.errno = path, e, e.errno

    def __reduce__(self):  # by default it would be made again of its message alone
        return NotWritten, (self.path, self.reason)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn an OSError inside, unless it is explained already, into NotWritten of this path."""
    try:
        yield
    except OSError as e:
        if not e.strerror:
            raise
        raise NotWritten(path, e) from e


def refuse_link(path: Path) -> None:
    """Raises UserError for a link: what it leads to is another's."""
    if path.is_symlink():
        raise UserError(f"{path}: a link, through which nothing is written: put what it leads to "
                        "in its place, or remove it")


def check_folder(path: Path) -> None:
    """Raises UserError for what stands in the place of a folder of ours: a link, or a file."""
    refuse_link(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: not a folder, which alone may stand here: move it away")


class Folder:
    """A folder that stays the same one wherever its path leads later, because it is held by its
    descriptor. Names of files have one step, or two as prompts/000000.safetensors. A step that is a
    link is never followed: UserError. Other failures are NotWritten."""

    def __init__(self, path: Path, inside: Folder | None = None):
        """inside: the folder that it is directly in. Without it, path may be a link."""
        self.path = path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if inside:
            self.descriptor = os.open(path.name, flags | NO_LINK, dir_fd=inside.descriptor)
        else:
            self.descriptor = os.open(path, flags)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error) -> None:
        os.close(self.descriptor)

    @property
    def place(self) -> Path | None:
        """Where the folder is now; None if it was removed, or if the system does not tell."""
        for find in (lambda: self.path, lambda: os.readlink(f"/proc/self/fd/{self.descriptor}")):
            with contextlib.suppress(OSError):
                path = find()
                if os.path.samestat(os.stat(path), os.fstat(self.descriptor)):
                    return Path(path)
        return None

    @contextlib.contextmanager
    def _holder(self, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The descriptor of the folder that a file is directly in, made if asked for, and the last
        step of its name. An OSError inside is about this file."""
        path = self.path / name
        step, _, last = name.rpartition("/")
        try:
            if not step:
                yield self.descriptor, last
                return
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(step, dir_fd=self.descriptor)
                    os.fsync(self.descriptor)
            with Folder(self.path / step, inside=self) as inner:
                yield inner.descriptor, last
        except OSError as e:
            if not e.strerror:  # it is explained already
                raise
            if step:
                check_folder(path.parent)
            refuse_link(path)
            raise NotWritten(path, e) from e

    # ----------------------------------------------------------------------------------------------
    # one file

    @contextlib.contextmanager
    def replacing(self, name: str, is_new: bool = False) -> Iterator[BinaryIO]:
        """Yield a file under a temporary name, which replaces the file of this name when the block
        ends well. It is synchronised to the disk, renamed, and its folder synchronised too, so that
        after a power cut there is the old file or the new one. is_new: NotWritten if there is a
        file by then."""
        with self._holder(name, make=True) as (at, last):
            _check_replaceable(last, at)
            clear_dead(at)
            temporary = f".{last}.{os.getpid()}{UNFINISHED}"
            try:
                with _created(temporary, at) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    if not (is_new and _linked(temporary, last, at)):
                        os.replace(temporary, last, src_dir_fd=at, dst_dir_fd=at)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=at)
            os.fsync(at)

    def write(self, name: str, content: bytes, is_new: bool = False) -> None:
        with self.replacing(name, is_new) as file:
            file.write(content)

    def open(self, name: str, flags: int) -> BinaryIO:
        """A regular file, unbuffered. flags: of os.open."""
        with self._holder(name) as (at, last):
            file = open(os.open(last, flags | NO_LINK, 0o666, dir_fd=at),
                        "r+b" if flags & os.O_RDWR else "wb", buffering=0)
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.close()
                raise OSError(None, "not a regular file")
            return file

    def remove(self, name: str) -> None:
        with self._holder(name) as (at, last):
            os.unlink(last, dir_fd=at)

    # ----------------------------------------------------------------------------------------------
    # all files

    def folders(self) -> Iterator[Folder]:
        """The folders in it, but for links and unfinished ones."""
        names = [entry.name for entry in os.scandir(self.descriptor)
                 if entry.is_dir(follow_symlinks=False) and not entry.name.endswith(UNFINISHED)]
        for name in names:
            # It may have gone meanwhile, or be another's. That a disk fails is told: what is not
            # listed would be taken for what is not there.
            try:
                inner = Folder(self.path / name, inside=self)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            with inner, named(inner.path):
                yield inner

    def _entries(self) -> Iterator[tuple[str, os.DirEntry]]:
        """What is in it and in its folders, by its name from here, but for what is unfinished."""
        for folder in chain([self], self.folders()):
            prefix = "" if folder is self else f"{folder.path.name}/"
            for entry in os.scandir(folder.descriptor):
                if not entry.name.endswith(UNFINISHED):
                    yield prefix + entry.name, entry

    def names(self) -> list[str]:
        """The regular files in it and in its folders, but for links and unfinished ones."""
        return sorted(name for name, entry in self._entries()
                      if entry.is_file(follow_symlinks=False))

    def check_ours(self, is_ours: Callable[[str], bool]) -> None:
        """Raises NotWritten or UserError if what has a name of ours is no regular file, so that it
        could not be replaced later."""
        self._check_places([name for name, _ in self._entries() if is_ours(name)])

    def synchronise(self) -> None:
        """Make durable what was renamed and removed."""
        for folder in self.folders():
            os.fsync(folder.descriptor)
        os.fsync(self.descriptor)

    def clear_unfinished(self) -> None:
        """Remove what killed processes left in a folder that is locked."""
        for folder in self.folders():
            clear_dead(folder.descriptor)
        clear_dead(self.descriptor)
        for name in os.listdir(self.descriptor):
            if not name.endswith(UNFINISHED):
                continue
            # A folder, of one who had the lock before; or what would stand in the next one's way.
            shutil.rmtree(name, ignore_errors=True, dir_fd=self.descriptor)
            with contextlib.suppress(FileNotFoundError):
                kind = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode
                if not stat.S_ISREG(kind):
                    _unlink(name, self.descriptor)

    @contextlib.contextmanager
    def making(self, is_ours: Callable[[str], bool]) -> Iterator[Folder]:
        """Yield a folder inside this one, which is locked. When the block ends well, the new files
        take the place of those that is_ours knows by their names. Nothing old goes before all of
        the new is durable; whoever is killed leaves the old, or what `finish` goes on with."""
        name = f".{os.getpid()}{UNFINISHED}"
        try:
            with named(self.path / name):
                os.mkdir(name, dir_fd=self.descriptor)
                with Folder(self.path / name, inside=self) as inner:
                    yield inner
                    inner.synchronise()
                    self._check_places(inner.names())
                os.rename(name, MADE, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
                os.fsync(self.descriptor)
        except BaseException:
            shutil.rmtree(name, ignore_errors=True, dir_fd=self.descriptor)
            raise
        with named(self.path):
            self.finish(is_ours)

    def _check_places(self, names: list[str]) -> None:
        """Raises NotWritten or UserError if a file cannot come to one of these places."""
        for name in names:
            try:
                with self._holder(name) as (at, last):
                    _check_replaceable(last, at)
            except NotWritten as e:
                if e.errno != errno.ENOENT:  # its folder is made when it comes
                    raise

    def finish(self, is_ours: Callable[[str], bool]) -> None:
        """Put what `making` made in its place. It may be cut short anywhere and called again."""
        there = [entry.name for entry in os.scandir(self.descriptor)
                 if entry.is_dir(follow_symlinks=False)]
        is_made = False
        if MADE in there:
            old = [*filter(is_ours, self.names())]
            with Folder(self.path / MADE, inside=self) as inner:
                # Nothing goes for a folder that holds nothing of the kind, which is another's.
                is_made = not old or any(map(is_ours, inner.names()))
        if is_made:
            for name in old:
                self.remove(name)
            self.synchronise()
            os.rename(MADE, MOVING, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            os.fsync(self.descriptor)
        if is_made or MOVING in there:
            with Folder(self.path / MOVING, inside=self) as inner:
                # The configuration comes last, because readers take its folder for whole.
                for name in sorted(inner.names(), key=lambda name: name.endswith("config.json")):
                    with inner._holder(name) as (start, last), \
                            self._holder(name, make=True) as (end, _):
                        os.replace(last, last, src_dir_fd=start, dst_dir_fd=end)
                self.synchronise()
            shutil.rmtree(MOVING, dir_fd=self.descriptor)


def _check_replaceable(name: str, at: int) -> None:
    """Raises OSError for what is neither missing nor a regular file. A link is none."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            raise OSError(None, "not a regular file, which alone is replaced: move it away")


def _created(name: str, at: int) -> BinaryIO:
    """A new file, locked so that others see that its writer lives."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK
        file = open(os.open(name, flags, 0o666, dir_fd=at), "w+b")
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # before it was locked, it was taken for one of a dead process


def _linked(temporary: str, name: str, at: int) -> bool:
    """Give a file this name too, if nothing has it, which a rename would not notice. False where
    the file system has no hard links."""
    try:
        os.link(temporary, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
        return True
    except FileExistsError:
        raise
    except OSError:
        if name in os.listdir(at):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        return False


def clear_dead(at: int) -> None:
    """Remove the unfinished files in a folder whose writers are gone."""
    for name in os.listdir(at):
        if not name.endswith(UNFINISHED):
            continue
        with contextlib.suppress(OSError):  # its writer lives, or it is a folder
            file = os.open(name, os.O_RDWR | NO_LINK, dir_fd=at)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=at)
            finally:
                os.close(file)


def write_file(path: Path, content: bytes, is_new: bool = False) -> None:
    """Write a file whole or not at all, and its folder if there is none."""
    with replacing(path, is_new) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, is_new: bool = False) -> Iterator[BinaryIO]:
    """See Folder.replacing. The file's folder is made if there is none."""
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Folder(path.parent)
    with folder, folder.replacing(path.name, is_new) as file:
        yield file


# --------------------------------------------------------------------------------------------------
# writing: one process at a time


def only_begun(path: Path) -> bool:
    """Whether a folder holds nothing, or only what interrupted commands left in it before they had
    anything whole."""
    return path.is_dir() and not is_unfinished(path) and all(
        name == LOCK or name.endswith(UNFINISHED) for name in os.listdir(path))


def is_unfinished(path: Path) -> bool:
    """Whether there are new files that are whole and not in their places yet."""
    return any((path / name).is_dir() and not (path / name).is_symlink()
               for name in (MADE, MOVING))


@contextlib.contextmanager
def locked(path: Path, is_ours: Callable[[str], bool], flag: str = "--out"
           ) -> Iterator[tuple[Folder, str]]:
    """Hold a folder, made if there is none, and keep other processes from it -> the folder, and who
    held it earlier without giving it back, or "". What killed processes left in it is finished, see
    Folder.making, or removed. Raises UserError if another process has it."""
    new_folders = [p for p in (path, *path.parents) if not p.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, new_folders)
        with named(path / LOCK):
            folder, file, earlier_owner = _lock(path, flag)
        stack.enter_context(folder)
        stack.enter_context(file)
        stack.callback(_unlink, LOCK, folder.descriptor)
        with named(path):
            folder.finish(is_ours)
            folder.clear_unfinished()
        yield folder, earlier_owner


def _lock(path: Path, flag: str) -> tuple[Folder, BinaryIO, str]:
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(Folder(path))
            try:
                file = stack.enter_context(folder.open(LOCK, os.O_RDWR | os.O_CREAT))
            except NotWritten as e:
                if e.errno == errno.ENOENT and folder.place is None:
                    continue  # its owner removed the folder
                raise
            owner = file.read(200).decode(errors="replace").partition("\n")[0].strip()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Locked(f"{path}: {owner or 'another process'} is at work in it: wait for "
                                f"its end, or choose another {flag}") from None
            if not os.fstat(file.fileno()).st_nlink:
                continue  # between opening and locking, its owner removed the file
            file.seek(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            file.truncate()  # last, so that a process which is killed here has left its name
            stack.pop_all()
            return folder, file, owner


def _unlink(name: str, at: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=at)


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # a folder with files in it stays
        for folder in folders:
            folder.rmdir()


# --------------------------------------------------------------------------------------------------
# writing: where nothing is, or what may be overwritten


def free_place(path: str | Path, flag: str, overwrite: bool = False,
               ours: Callable[[Path], bool] | None = None, kind: str = "") -> Path:
    """A path that a command may write a file to. Raises UserError if something is there, unless
    `overwrite` was asked for and `ours` recognises it as `kind`, of the program's own making."""
    path = Path(path)
    if path.is_symlink():
        raise UserError(f"{path}: a link, through which nothing is written: choose another {flag}, "
                        "as what it leads to")
    if path.exists() and not (overwrite and ours and ours(path)):
        # A command that was killed at its end leaves its file and the temporary one.
        with contextlib.suppress(OSError), Folder(path.parent) as folder:
            clear_dead(folder.descriptor)
        raise UserError(_exists(path, flag, overwrite, kind))
    return path


def free_folder(path: str | Path, flag: str, overwrite: bool = False,
                ours: Callable[[Path], bool] | None = None, kind: str = "",
                files: tuple[str, ...] = ()) -> Path:
    """A path that a command may make a folder at, or that holds nothing but what interrupted
    commands began. As free_place; files: the names of those that are ours in it."""
    path = Path(path)
    if is_unfinished(path):
        with locked(path, files.__contains__, flag):
            pass  # it is finished
    if path.exists() and not only_begun(path) and not (overwrite and ours and ours(path)):
        raise UserError(_exists(path, flag, overwrite, kind))
    return path


def _exists(path: Path, flag: str, overwrite: bool, kind: str) -> str:
    remedy = f"choose another {flag}"
    if kind:
        remedy += f"; only {kind} is overwritten" if overwrite else \
            f", or replace {kind} by --overwrite"
    return f"{path} exists: {remedy}"


@contextlib.contextmanager
def new_folder(path: str | Path, flag: str, overwrite: bool = False,
               ours: Callable[[Path], bool] | None = None, kind: str = "",
               files: tuple[str, ...] = ()) -> Iterator[Folder]:
    """Yield a folder whose files are at path, all of them, when the block ends well. Arguments and
    errors as of free_folder."""
    asked = flag, overwrite, ours, kind, files
    with locked(free_folder(path, *asked), files.__contains__, flag) as (folder, _):
        free_folder(path, *asked)  # another process may have been there before the lock
        with folder.making(files.__contains__) as inner:
            yield inner


DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
               torch.int64: "I64", torch.uint8: "U8"}


def mapped(file: BinaryIO, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
           about: dict[str, str]) -> dict[str, Tensor]:
    """Tensors {name: (shape, dtype)} of an empty file, which becomes a safetensors file. They are
    zero, and what is written to them goes to the file through the page cache. about is the file's
    metadata."""
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
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            os.ftruncate(file.fileno(), size)
    except OSError as e:
        raise OSError(e.errno, f"no room for {size / 2**30:.1f} GiB ({e.strerror})") from None

    content = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,)))[-end:]
    tensors = {}
    for name, (start, stop) in ranges.items():
        shape, dtype = shapes[name]
        tensors[name] = content[start:stop].view(dtype).view(shape)
    return tensors
