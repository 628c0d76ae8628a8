"""What the program prints, and the error that a user can mend.

Answers go to standard output by `show`, remarks to standard error by `say`. Data, vocabularies and
file names may hold anything, so every text is cleaned of what a terminal would obey.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
from typing import Iterator

LONGEST_LINE = 1000  # characters of an error message

# Scores of an answer, in the order of a table's columns: key -> heading.
SCORES = {"loss": "loss", "teacher_kl": "teacher KL", "exact_match": "exact match",
          "precision": "precision", "recall": "recall", "f1": "F1", "accuracy": "accuracy",
          "accuracy_value": "same value", "choice_accuracy": "likeliest",
          "agreement": "as teacher", "calibration_error": "ECE", "calibrated": "if calibrated"}
CALIBRATION = ("calibration_error", "calibrated")  # which `train` logs, and `eval` alone prints

# The loss on prose, and what of it is the prompt's: see forgetting.py.
FORGETTING = {"prose": "prose loss", "forgotten": "forgotten"}

# How a posterior lies in the prior, or if that is no Gaussian in the reference's, in whitened
# coordinates: see report() of posteriors.py.
SPREADS = {"spread": "spread", "kl": "KL", "narrowed": "narrowed", "narrowest": "narrowest"}


class UserError(ValueError):
    """What a user can mend: what is wrong, where, and the remedy, in one line."""


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of processes that torchrun started, by the environment;
    (0, 1) of a process alone. Raises UserError if these are no numbers that torchrun sets."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if "MASTER_ADDR" not in os.environ or given["WORLD_SIZE"] in (None, "1"):
        return 0, 1  # other tools set RANK alone
    try:
        rank, count = int(given["RANK"]), int(given["WORLD_SIZE"])
    except (TypeError, ValueError):
        rank, count = 0, 0
    if not 0 <= rank < count:
        raise UserError(f"MASTER_ADDR, RANK {given['RANK']} and WORLD_SIZE {given['WORLD_SIZE']} "
                        "are in the environment, which are not as torchrun sets them: start by "
                        "torchrun, or `unset MASTER_ADDR`")
    return rank, count


try:
    FIRST = rank_and_count()[0] == 0  # of several processes only the first one speaks
except UserError:
    FIRST = True  # and says it in `main`


class Stopped(Exception):
    """Work that stopped early; the files that it wrote are whole."""

    def __init__(self, message: str, status: int):
        """status: the exit status, or minus the number of the signal that stopped it."""
        super().__init__(message)
        self.status = status

    def __reduce__(self):  # by default it would be made again of its message alone
        return Stopped, (str(self), self.status)


class Diverged(Stopped):
    """Work that stopped because a loss or gradient was not finite."""

    def __init__(self, what: str, then: str = ""):
        """what: the problem and its remedy; then: how to go on with this very work."""
        super().__init__(f"{what}{then}", 1)
        self.what, self.then = what, then

    def __reduce__(self):
        return Diverged, (self.what, self.then)


# Escape sequences, control characters except line break and tab, and the marks that change the
# direction of writing.
CONTROL = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
                     r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
                     r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """The text without terminal control sequences."""
    return CONTROL.sub("", text)


def one_line(text: str) -> str:
    """The text, cleaned and on one line. A long one loses its middle, because what is wrong stands
    at its beginning and the remedy at its end."""
    text = " ".join(clean(text).split())
    return text if len(text) <= LONGEST_LINE else f"{text[:600]} ... {text[-300:]}"


def show(text: str, file=None) -> None:
    """Print a cleaned text. Characters that the terminal's encoding lacks are escaped."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    printable = clean(text).encode(encoding, "backslashreplace").decode(encoding)
    print(printable, file=file, flush=True)


def say(text: str) -> None:
    """Print a remark on standard error, in the first process only."""
    if not FIRST:
        return
    bars = sys.modules.get("tqdm")  # a bar at a terminal goes away for the time, and comes again
    with bars.tqdm.external_write_mode(sys.stderr) if bars else contextlib.nullcontext():
        show(text, sys.stderr)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr: a panic in Rust prints its own report there."""
    try:
        stderr = os.dup(2)
    except OSError:  # the process has no stderr
        yield
        return
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


SILENCE = 30  # seconds at most between two lines of a stage, where there is no terminal


def progress(iterable=None, **options):
    """The progress of a stage, shown by the first process: a tqdm bar at a terminal. Elsewhere, as
    in a job's log, it is a line when the stage begins, and one every SILENCE seconds."""
    from tqdm import tqdm

    options["desc"] = clean(options.get("desc") or "")
    if not FIRST or sys.stderr is None:
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    # tqdm writes its line ends to a file that nobody reads; the lines are shown by `say`.
    return _line_progress()(iterable, file=io.StringIO(), mininterval=SILENCE, miniters=1,
                            **options)


@functools.cache
def _line_progress() -> type:
    """A tqdm whose displays are whole lines. tqdm is imported when it is needed."""
    from tqdm import tqdm

    class LineProgress(tqdm):
        updates = 0
        seconds_left = None  # a function that knows better than the mean of all updates

        def __del__(self):
            with contextlib.suppress(AttributeError):  # a signal came while it was made
                super().__del__()

        def update(self, n: float = 1) -> bool | None:
            shown = super().update(n)
            self.updates += 1
            # An early estimate of the time, unless the stage will be over in a moment.
            if self.updates == 3 and self.format_dict["elapsed"] > 2:
                self.refresh()
            return shown

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            # tqdm clears a bar by an empty text. A stage of nothing has nothing to tell.
            if msg != "" and self.total != 0:
                say(self.line())
            return True

        def line(self) -> str:
            """Such as "train: 40 of 200 steps, loss 0.123, 12 s, 48 s left"."""
            name = self.desc.removesuffix(": ")
            noun = re.sub("(?<=ch)es$|s$", "", self.unit.strip())
            total = counted(self.total or 0, noun)
            done = self.n - self.initial
            if not done:
                return f"{name}: {total}" if self.total else name
            parts = [f"{self.n} of {total}" if self.total else counted(self.n, noun)]
            if self.postfix:
                parts.append(self.postfix)
            elapsed = self.format_dict["elapsed"]
            parts.append(f"{elapsed:.0f} s")
            if self.total and self.n < self.total:
                mean = elapsed / done
                left = self.seconds_left() if self.seconds_left else (self.total - self.n) * mean
                parts.append(f"{left:.0f} s left")
            return f"{name}: {', '.join(parts)}"

    return LineProgress


def table(rows: list[tuple[str, dict[str, float]]],
          titles: dict[str, str] = SCORES | FORGETTING | SPREADS) -> str:
    """Names and numbers in aligned columns. titles {key: heading} gives the columns' order; a key
    that no row has gets no column. Scores have one decimal, other numbers three digits, counts
    (int) all of theirs. In brackets stands a number's standard error (KEY_se), or its interval
    (KEY_low, KEY_high)."""
    keys = [key for key in titles if any(key in numbers for _, numbers in rows)]
    lines = [["", *(titles[key] for key in keys)]]
    for name, numbers in rows:
        lines.append([name, *(_cell(key, numbers) for key in keys)])

    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for name, *cells in lines:
        aligned = [f"  {cell:>{max(width, 6)}}" for cell, width in zip(cells, widths[1:])]
        text.append(f"{name:<{widths[0]}}" + "".join(aligned))
    return "\n".join(text)


def counted(n: int, noun: str) -> str:
    """Such as "1 row", "2 rows" or "2 batches"."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"


def file_list(names: list[str]) -> str:
    """Names of files with commas between; of more than four, which are numbered, the ends."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"


def scores_line(scores: dict[str, float]) -> str:
    """Such as "loss 0.599, exact match 6.5, F1 17.6"."""
    return ", ".join(f"{title} {_cell(key, scores)}" for key, title in SCORES.items()
                     if key in scores and key not in ("precision", "recall", *CALIBRATION))


def _cell(key: str, numbers: dict[str, float]) -> str:
    if key not in numbers:
        return ""
    if key in ("loss", "teacher_kl", "change", *FORGETTING):
        form = ".3f"
    elif key in SCORES:
        form = ".1f"
    else:
        form = "d" if isinstance(numbers[key], int) else "#.3g"
    brackets = ""
    if f"{key}_se" in numbers:
        brackets = f" ({_number(numbers[f'{key}_se'], form)})"
    elif f"{key}_low" in numbers:
        low, high = (_number(numbers[f"{key}_{end}"], form) for end in ("low", "high"))
        brackets = f" ({low} to {high})"
    return _number(numbers[key], form) + brackets


def _number(value: float, form: str) -> str:
    text = format(value, form).rstrip(".")
    return text if float(text) else text.lstrip("-")  # no -0.0


def out_of_memory(e: BaseException) -> bool:
    """Whether memory did not suffice, on the CPU or on a device."""
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return True
    causes = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(e, RuntimeError) and any(cause in str(e) for cause in causes)
