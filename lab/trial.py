"""The trial of a tokenizer.json. A child process with limits of memory and time loads and uses it
before this one does, because the tokenizers library is native code: some files make it end the
process, fill the memory or never return, and no check in Python can stop that.

A file that has passed is known by its checksum in the cache folder, and is not tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import data
from lab.cache import cache_folder, make_folder
from lab.console import UserError

MEMORY = 4 * 2**30  # bytes of address space; a vocabulary of 128,000 tokens takes a tenth
SECONDS = 20  # of the processor; by the clock six times as many

# What the child runs. Failures that Python sees are left to the loader, which says them better.
PROGRAM = """
import resource, string, sys
path, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from tokenizers import Tokenizer
grown = False
try:
    with open(path, encoding="utf-8-sig") as file:
        tokenizer = Tokenizer.from_str(file.read())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in (string.printable + "\\u00fc\\u732b\\0", "Question: who? Answer: I, 12.\\n" * 500):
        size = len(text.encode())
        ids = tokenizer.encode(text).ids
        grown = grown or len(ids) > 8 * size + 1000 or len(tokenizer.decode(ids)) > 100 * size
except MemoryError:
    grown = True
except BaseException:
    pass
sys.exit(3 if grown else 0)
"""


def try_tokenizer(path: Path) -> None:
    """Raise UserError if a tokenizer.json cannot be used safely, DataError if it is no text."""
    content = data.read_text(path).encode()  # refuses a pipe, and more than memory has room for
    folder = cache_folder()
    mark = folder / f"tokenizer-{hashlib.sha256(content).hexdigest()}" if folder else None
    if mark and os.path.exists(mark):  # False too where no mark could be, as of too long a path
        return
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    # -P: no module of the working directory is imported.
    command = [sys.executable, "-P", "-c", PROGRAM, path, str(MEMORY), str(SECONDS)]
    try:
        status = subprocess.run(command, env=environment, capture_output=True,
                                timeout=6 * SECONDS).returncode
    except subprocess.TimeoutExpired:
        status = -signal.SIGXCPU
    if status == 3:
        fault = "makes many times more of a text than it has"
    elif status == -signal.SIGXCPU:
        fault = f"keeps the tokenizers library busy for more than {SECONDS} seconds"
    elif status < 0:
        fault = ("makes the tokenizers library end the process, or take more than "
                 f"{MEMORY / 2**30:.0f} GiB ({signal.Signals(-status).name})")
    else:
        if mark and status == 0:  # other ends tell nothing of the file
            with contextlib.suppress(OSError):  # a folder that is not written costs another trial
                make_folder(mark.parent)
                mark.touch()
        return
    raise UserError(f"{path}: {fault}: fetch it again, from where you trust")
