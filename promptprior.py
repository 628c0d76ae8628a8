"""promptprior: tune the prompt of a frozen LLaMA from a chosen prior, and see where it ends up.

    python promptprior.py train --prior exclusion --deep-layers 3
    python promptprior.py plot runs/squad-exclusion-deep3-seed0

This file is the entry: it finds the command that was asked for (lab/commands.py lists them), and
turns what goes wrong into one line. A command's module is imported when it is called.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time

from lab.commands import COMMANDS, parse, resolved
from lab.console import FIRST, Stopped, one_line, out_of_memory, rank_and_count, say, show

# A ValueError of these modules, or of lab, is the user's mistake; any other is a fault of ours.
ROOT_MODULES = ("data", "llama", "priors", "viz")
NO_THREAD = "can't start new thread"  # what Python says of a system's limit


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    # Threads that wait for each other sleep. By default they spin, which stalls runs that share the
    # processor. It counts when torch is loaded, so before any command.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # numpy's OpenBLAS can only spin, and its decompositions wait at every column.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    name, given = parse(arguments, __doc__.splitlines()[0])
    try:
        rank_and_count()
        if not (FIRST or COMMANDS[name].every_process):
            return 0
        module = importlib.import_module(f"lab.{COMMANDS[name].module}")
        getattr(module, f"command_{name}")(resolved(given))
        return 0
    except BrokenPipeError:  # as in `| head`
        # Python would complain at its end that it cannot write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = -signal.SIGPIPE
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C ends it without a traceback
        say("promptprior: stopped; a run that has begun goes on with train --out RUN --resume")
        status = -signal.SIGINT
    except Exception as e:
        status = exit_status(e)
        if status is None:
            raise
        if status < 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as above
        with contextlib.suppress(OSError):  # nobody reads stderr, or its disk is full
            report(e, status)
    if status < 0:
        # The process ends by the signal itself, so that a shell or a scheduler sees which it was.
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def exit_status(e: Exception) -> int | None:
    """2 for a user's mistake, 1 for what failed while working, minus the number of a signal that
    stopped the work; None for a fault of ours."""
    module = type(e).__module__
    if isinstance(e, ValueError) and (module in ROOT_MODULES or module.startswith("lab.")):
        return 2
    if isinstance(e, Stopped):
        return e.status
    is_of_system = isinstance(e, OSError) or out_of_memory(e) or NO_THREAD in str(e)
    return 1 if is_of_system or has_lost_others(e) else None


def report(e: Exception, status: int) -> None:
    """Say in one line what went wrong."""
    text = one_line(message(e))
    if status > 0:
        text = f"error: {text}"
    say(f"promptprior: {text}")
    if FIRST or status < 0:
        return
    if not in_a_group():
        # If the first process has the same error, it says so, and then torchrun ends this one.
        time.sleep(10)
    # Of an error in one process alone the first one knows nothing.
    show(f"promptprior: process {os.environ['RANK']}: {text}", sys.stderr)


def in_a_group() -> bool:
    """Whether torchrun's processes have met. What one says until then, all say."""
    from lab.processes import rank_and_size

    return rank_and_size()[1] > 1


def has_lost_others(e: Exception) -> bool:
    if not isinstance(e, RuntimeError):
        return False
    from lab import processes

    return processes.has_lost_others(e)


def message(e: Exception) -> str:
    """What, where, and the remedy."""
    if isinstance(e, OSError) and e.strerror and e.filename:
        return f"{e.filename}: {e.strerror}: check the path, and who may use it"
    if out_of_memory(e):
        return (f"memory does not suffice ({e or 'no more of it'}): lower --batch-size, "
                "--max-length or --limit, or use a smaller model")
    if NO_THREAD in str(e):
        return ("the system lets this process start no more threads: raise its limit (ulimit -u), "
                "or end other programs")
    if has_lost_others(e):
        return ("another of the processes has ended, and this one cannot go on alone: start all of "
                "them again with train --out RUN --resume, which goes on from the last checkpoint")
    return str(e) or type(e).__name__


if __name__ == "__main__":
    sys.exit(main())
