"""The n-th system call of a command: its process is killed before the call, or the call fails.

    python tests/calls.py --seconds 600 --seed 0          # calls of all commands, drawn at random
    python tests/calls.py --seed 0 --case 12              # one again

    stopped = run(work, folder, n=7)                      # killed before its 8th call there
    stopped = run(work, folder, n=7, error=errno.EIO)     # or that call fails

A child does the work, and this process stops it at its system calls by ptrace (Linux). Those that
concern files below a folder are counted: all that open, read, write, name, lock or close them.

A case is a command, one of its calls, and what happens there. Right are: a kill or a failure leaves
the folder as it was before or as the command leaves it, as the next command sees it; a failed call
ends in the command's right output, or in one line of error and status 1 or 2; the same command
again ends as if nothing had happened; and nothing outside of the command's own folder changes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import safetensors.torch

import fuzz
from lab import files

# --------------------------------------------------------------------------------------------------
# one call of a child

# Numbers of x86_64 -> name, and which of its arguments are the folder's descriptor and the path
# (None: there is no such argument), or the file's descriptor alone.
CALLS = {
    2: ("open", None, 0), 257: ("openat", 0, 1), 82: ("rename", None, 1), 264: ("renameat", 2, 3),
    316: ("renameat2", 2, 3), 83: ("mkdir", None, 0), 258: ("mkdirat", 0, 1),
    84: ("rmdir", None, 0), 87: ("unlink", None, 0), 263: ("unlinkat", 0, 1),
    86: ("link", None, 1), 265: ("linkat", 2, 3), 0: ("read", 0), 17: ("pread64", 0),
    1: ("write", 0), 18: ("pwrite64", 0), 20: ("writev", 0), 74: ("fsync", 0), 75: ("fdatasync", 0),
    77: ("ftruncate", 0), 285: ("fallocate", 0), 73: ("flock", 0), 217: ("getdents64", 0),
    9: ("mmap", 4), 40: ("sendfile", 0), 326: ("copy_file_range", 2)}
# Those that change nothing on a disk: a kill before one is a kill before the next.
READING = {"read", "pread64", "getdents64", "mmap"}
TRACEME, CONTINUE, POKEUSER, SETOPTIONS, GET_INFO = 0, 7, 6, 0x4200, 0x420e
# Threads and processes of the child are traced too, stop at these calls, and end with this process.
OPTIONS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 20
SECCOMP_STOP = signal.SIGTRAP | 7 << 8
WALL = 0x40000000  # waitpid: for threads too
ORIG_RAX, RAX = 15 * 8, 10 * 8
IS_KNOWN = sys.platform == "linux" and platform.machine() == "x86_64"
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


class Info(ctypes.Structure):
    """struct ptrace_syscall_info, at a call."""

    _fields_ = [("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32),
                ("ip", ctypes.c_uint64), ("sp", ctypes.c_uint64), ("nr", ctypes.c_uint64),
                ("args", ctypes.c_uint64 * 6), ("rest", ctypes.c_uint64 * 4)]


class Stopped(NamedTuple):
    status: int | None  # that the work returned; None if it was killed
    calls: list[str]  # that were counted, each with the name of its file
    hit: str | None  # the call at which it was stopped; None if there were fewer


def ptrace(request: int, pid: int, address: int = 0, value: int = 0) -> None:
    if libc.ptrace(request, pid, address, value) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def is_possible() -> bool:
    """Whether this system lets a process trace its child."""
    try:
        return IS_KNOWN and run(lambda: 0, Path("/none")).status == 0
    except OSError:
        return False


def stop_at_calls() -> None:
    """From now on this process and those that it starts stop at CALLS, for their tracer."""
    load, jump, end = 0x20, 0x15, 0x06
    program = [(load, 0, 0, 0)]
    program += [(jump, len(CALLS) - i, 0, number) for i, number in enumerate(CALLS)]
    program += [(end, 0, 0, 0x7fff0000), (end, 0, 0, 0x7ff00000)]  # go on; tell the tracer
    content = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(content, len(content))
    about = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    no_new_privileges, filter_calls = 38, 22
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(filter_calls, 2, about):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run(work: Callable[[], int], folder: Path, n: int | None = None, error: int | None = None,
        reads: bool | None = None) -> Stopped:
    """Do the work in a child that dies before its n-th call on files below a folder (from 0), or
    whose n-th call there fails with this error. reads: count calls that only read too, as failures
    do and kills do not."""
    reads = error is not None if reads is None else reads
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setpgid(0, 0)
            ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            stop_at_calls()
            status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:  # nothing of a test runs twice
            os._exit(status)
    os.waitpid(child, 0)
    ptrace(SETOPTIONS, child, 0, OPTIONS)
    ptrace(CONTINUE, child)
    calls: list[str] = []
    hit, status = None, None
    with contextlib.suppress(ChildProcessError):  # all have ended
        while True:
            pid, event = os.waitpid(-child, WALL)
            if not os.WIFSTOPPED(event):
                if pid == child:
                    status = os.WEXITSTATUS(event) if os.WIFEXITED(event) else None
                continue
            if event >> 8 == SECCOMP_STOP:
                call = _call(pid, folder)
                if call and (reads or call.split()[0] not in READING):
                    calls.append(call)
                    if len(calls) - 1 == n:
                        hit = call
                        if error is None:
                            os.killpg(child, signal.SIGKILL)
                            continue
                        ptrace(POKEUSER, pid, ORIG_RAX, -1)  # no call, and this is its answer
                        ptrace(POKEUSER, pid, RAX, -error)
            # Stops of ptrace itself are none for the child; other signals are passed on.
            signal_ = os.WSTOPSIG(event)
            is_own = signal_ in (signal.SIGTRAP, signal.SIGSTOP)
            with contextlib.suppress(ProcessLookupError):  # it was killed
                ptrace(CONTINUE, pid, 0, 0 if is_own else signal_)
    return Stopped(status, calls, hit)


def _call(pid: int, folder: Path) -> str | None:
    """The call that a process is about to make: its name and its file's, if that is below the
    folder."""
    info = Info()
    libc.ptrace(GET_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
    name, *places = CALLS[info.nr]
    try:
        if len(places) == 1:
            path = os.readlink(f"/proc/{pid}/fd/{ctypes.c_int(info.args[places[0]]).value}")
        else:
            path = _path(pid, info, *places)
    except OSError:  # no such descriptor: memory, or a mistake that the call itself tells
        return None
    return f"{name} {path}" if f"{path}/".startswith(f"{folder}/") else None


def _path(pid: int, info: Info, at: int | None, argument: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(info.args[argument])
        path = os.fsdecode(memory.read(4096).split(b"\0")[0])
    if path.startswith("/"):
        return path
    descriptor = -100 if at is None else ctypes.c_int(info.args[at]).value
    start = "cwd" if descriptor == -100 else f"fd/{descriptor}"
    return os.path.join(os.readlink(f"/proc/{pid}/{start}"), path)


# --------------------------------------------------------------------------------------------------
# commands

SPEC = ["--data", "squad:WORLD/squad.json", "--eval-data", "squad:WORLD/squad.json"]
TRAIN = ["train", "--model", "WORLD/model", *SPEC, *fuzz.FEW]
OUT = ["--out", "CASE/out"]


class Work(NamedTuple):
    command: list[str]  # CASE stands for its own folder, WORLD for that of all inputs
    begins: dict[str, str] = {}  # names in its own folder -> copies of what of the world
    more: list[str] = []  # flags with which it is given again
    swaps: bool = False  # whether it leaves the old or the new, and nothing between


WORKS = {
    "train": Work([*TRAIN, "--steps", "2", "--eval-every", "1", *OUT], more=["--resume"]),
    "train, particles": Work([*TRAIN, "--prior", "fitted", "--posterior", "sgld", "--particles",
                              "2", *OUT], more=["--resume"]),
    "resume": Work(["train", *OUT, "--resume", "--steps", "3"], {"out": "runs/point"}),
    "resume of a killed run": Work(["train", *OUT, "--resume", "--steps", "3"], {"out": "left"}),
    "train --overwrite": Work([*TRAIN, *OUT, "--overwrite"], {"out": "runs/point"}),
    "import": Work(["import", "WORLD/adapters/rows", "--model", "WORLD/model", *SPEC, *OUT]),
    "import --overwrite": Work(
        ["import", "WORLD/adapters/prefix", "--model", "WORLD/model", *SPEC, *OUT, "--overwrite"],
        {"out": "runs/point"}, swaps=True),
    "export": Work(["export", "WORLD/runs/prefix", "--to", "CASE/out"]),
    "export --overwrite": Work(["export", "WORLD/runs/rows", "--to", "CASE/out", "--overwrite"],
                               {"out": "adapters/prefix"}, swaps=True),
    "export --for": Work(["export", "WORLD/runs/rows", "--for", "numpy", "--to", "CASE/out"]),
    "export --for --overwrite": Work(
        ["export", "WORLD/runs/rows", "--for", "numpy", "--to", "CASE/out", "--overwrite"],
        {"out": "rows.npy", "out.json": "rows.json"}),
    "export --csv": Work(["export", "WORLD/runs/point", "--csv", "CASE/out.csv"]),
    "collect": Work(["collect", "--model", "WORLD/model", "--data", "squad:WORLD/squad.json",
                     "--limit", "5", "--out", "CASE/out.safetensors"]),
    "collect --overwrite": Work(
        ["collect", "--model", "WORLD/model", "--data", "squad:WORLD/squad.json", "--limit", "5",
         "--out", "CASE/out.safetensors", "--overwrite"], {"out.safetensors": "acts.safetensors"},
        swaps=True),
    "sample": Work(["sample", "--model", "WORLD/model", "--prior", "vocab", "--tokens", "3", *OUT]),
    "interpolate": Work(["interpolate", "WORLD/runs/point", "WORLD/runs/point", "--points", "2",
                         *OUT]),
    "plot": Work(["plot", "CASE/out"], {"out": "runs/prefix"}),
    "plot --out": Work(["plot", "CASE/out", "--out", "CASE/page.html", "--overwrite"],
                       {"out": "runs/prefix", "page.html": "page.html"}),
    "sweep": Work(["sweep", *OUT, *TRAIN[1:], "--prior", "vocab", "isotropic"], more=["--retry"]),
    "sweep --table": Work(["sweep", "CASE/out", "--table"], {"out": "sweep"}),
    **{name: Work(command, {"out": "runs/point"}) for name, command in {
        "eval": ["eval", "CASE/out", "--json"], "generate": ["generate", "CASE/out", "Who?"],
        "compare": ["compare", "CASE/out", "--json"],
        "attention": ["attention", "CASE/out", "--limit", "2", "--json"],
        "export --csv, printed": ["export", "CASE/out", "--csv"]}.items()},
    "compare, collection": Work(["compare", "CASE/acts.safetensors"],
                                {"acts.safetensors": "acts.safetensors"})}


class Outcome(NamedTuple):
    name: str
    hit: str | None  # the call
    act: str
    status: int | str | None
    problem: str  # "" if it is right


def everything(folder: Path) -> dict[str, object]:
    """All files below a folder and what they hold, but for clocks and what follows from them."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name, is_unfinished = str(path.relative_to(folder)), path.name.endswith(files.UNFINISHED)
        if path.name == files.LOCK or path.is_dir() and not is_unfinished:
            continue  # a lock that nobody holds means nothing
        content = path.read_bytes() if path.is_file() else b""
        if path.name == "metrics.jsonl":
            content = re.sub(rb'"(seconds|examples_per_second)": [0-9.e-]+', b"", content)
        elif path.parent.name == "checkpoints" and not is_unfinished:
            content = str(sorted(safetensors.torch.load(content).items())).encode()
        found[name] = content
    return found


class Bench:
    """The world of inputs, and a place for one command at a time."""

    def __init__(self, base: Path, world: Path | None = None):
        """world: inputs that are there already, which are copied."""
        self.world, self.case, self.said = base / "world", base / "case", base / "said"
        for path in (self.world, self.said):
            path.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if world:
                shutil.copytree(world, self.world, dirs_exist_ok=True)
            else:
                fuzz.world(self.world)
        self.inputs = self._marks()
        self.after: dict[str, dict] = {}  # by work, what it leaves undisturbed
        self.before: dict[str, dict] = {}

    def _marks(self) -> list:
        return [(str(p), s.st_size, s.st_mtime_ns) for p in sorted(self.world.rglob("*"))
                for s in [p.lstat()]]

    def begin(self, name: str) -> None:
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        for own, of_world in WORKS[name].begins.items():
            path = self.world / of_world
            (shutil.copytree if path.is_dir() else shutil.copy)(path, self.case / own)

    def command(self, name: str, again: bool = False) -> Callable[[], int]:
        words = [*WORKS[name].command, *(WORKS[name].more if again else [])]
        words = [word.replace("CASE", str(self.case)).replace("WORLD", str(self.world))
                 for word in words]

        def work() -> int:
            fuzz.own_threads()
            said = fuzz.captured(words, self.said)
            (self.said / "result.json").write_text(json.dumps([words, *said]))
            return 0

        return work

    def result(self) -> tuple[int | str, str, str]:
        """Status, stderr and what is wrong, of the command that was done last."""
        words, status, out, err, problem = json.loads((self.said / "result.json").read_text())
        return status, err, problem or fuzz.wrong(words, status, out, err)

    def plain(self, name: str, again: bool = False) -> tuple[int | str, str, str]:
        child = os.fork()
        if child == 0:
            try:
                self.command(name, again)()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return self.result()

    def counts(self, name: str) -> tuple[int, int]:
        """How many calls a work makes at which it can be killed, and which can fail. Done twice it
        leaves the same."""
        numbers = []
        for reads in (False, True):
            self.begin(name)
            self.before[name] = everything(self.case)
            stopped = run(self.command(name), self.case, reads=reads)
            status, err, problem = self.result()
            assert status == 0 and not problem, (name, status, problem, err)
            left = everything(self.case)
            assert self.after.setdefault(name, left) == left, (name, different(
                left, self.after[name]))
            numbers.append(len(stopped.calls))
        return numbers[0], numbers[1]

    def try_at(self, name: str, n: int, error: int | None) -> Outcome:
        self.begin(name)
        stopped = run(self.command(name), self.case, n, error)
        status: int | str | None = None
        problem = ""
        if error is not None and stopped.status == 0:
            status, err, problem = self.result()
            if "going on from step" in err and not problem:
                # A checkpoint that cannot be read is left out, and said to be.
                return Outcome(name, stopped.hit, errno.errorcode[error], status, "")
            if not problem and status and str(self.case) not in err and str(self.world) not in err:
                problem = f"an error that names no file: {err[-300:]}"
        elif error is not None:
            problem = f"the process ended by {stopped.status}"
        act = "killed" if error is None else errno.errorcode[error]
        return Outcome(name, stopped.hit, act, status, problem or self._left(name, status))

    def _left(self, name: str, status: int | str | None) -> str:
        """What is wrong with what was left, or ""."""
        before, after = self.before[name], self.after[name]
        if (marks := self._marks()) != self.inputs:
            changed, self.inputs = set(marks) ^ set(self.inputs), marks
            return f"inputs have changed: {changed!s:.500}"
        left = everything(self.case)
        if status == 0 and left != after:
            return f"exit 0, but {different(left, after)}"
        if WORKS[name].swaps and not files.is_unfinished(self.case / "out"):
            shown = {file: content for file, content in left.items() if not any(
                part.endswith(files.UNFINISHED) for part in Path(file).parts)}
            if shown not in (before, after):
                return f"neither the old nor the new: {different(shown, before)}"
        begun = (self.case / "out/config.json").exists() or files.is_unfinished(self.case / "out")
        again, err, problem = self.plain(name, again=begun or name == "sweep")
        if problem:
            return f"again: {problem}"
        there = everything(self.case)
        if again == 0 or again == 2 and " exists: " in err:
            return "" if there == after else f"again, status {again}: {different(there, after)}"
        return f"again, status {again}: {err[-300:]}"


def different(one: dict, other: dict) -> str:
    names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    return f"it differs in {', '.join(names)}"


# --------------------------------------------------------------------------------------------------
# many cases


def cases(bench: Bench, names: list[str]) -> list[tuple[str, int, int | None]]:
    """All of these works: (work, call, error, or None for a kill)."""
    found: list[tuple[str, int, int | None]] = []
    for name in names:
        kills, failures = bench.counts(name)
        found += [(name, n, None) for n in range(kills)]
        found += [(name, n, (errno.EIO, errno.ENOSPC)[n % 2]) for n in range(failures)]
    return found


def attack(seconds: float, seed: int, bench: Bench, names: list[str], number: int | None = None
           ) -> tuple[int, list[tuple[int, Outcome]]]:
    """How many cases there are, and the outcomes of those tried, with their numbers."""
    found, outcomes = cases(bench, names), []
    end = time.monotonic() + seconds
    order = random.Random(seed).sample(range(len(found)), len(found))
    for i in order if number is None else [number]:
        if time.monotonic() > end:
            break
        outcomes.append((i, bench.try_at(*found[i])))
        if outcomes[-1][1].problem:
            print(f"\nFAILED --case {i}: {outcomes[-1][1]!s:.3000}", flush=True)
    return len(found), outcomes


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--seed", type=int, default=0, help="of the order of the cases")
    p.add_argument("--case", type=int, help="one case again, of the same works")
    p.add_argument("--only", default="", help="works with this in their name")
    p.add_argument("--world", type=Path, help="a folder of inputs as fuzz.py makes them")
    a = p.parse_args()
    names = [name for name in WORKS if a.only in name]
    base = Path(tempfile.mkdtemp(prefix="calls-"))
    os.environ["PROMPTPRIOR_CACHE"] = str(base / "cache")
    fuzz.prepare()
    try:
        count, outcomes = attack(a.seconds, a.seed, Bench(base, a.world), names, a.case)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    acts = Counter((o.name, o.act) for _, o in outcomes)
    for name in names:
        tried = ", ".join(f"{act} {n}" for (work, act), n in sorted(acts.items()) if work == name)
        print(f"{name}: {tried}")
    bad = sum(bool(o.problem) for _, o in outcomes)
    print(f"{len(outcomes)} of {count} cases, {bad} failed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
