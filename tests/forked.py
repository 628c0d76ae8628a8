"""`python SCRIPT ARGUMENTS`, forked from a process that has imported torch already, which saves the
three seconds that an import takes on a busy core.

    process = Forked(HERE / "promptprior.py", "train", "--out", folder)
    assert process.wait() == 0, process.err

It is killed, signalled and waited for as subprocess.Popen's.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")  # no threads of torch's to inherit
# The optimiser imports torch._dynamo. Nothing of ours: it reads the environment when imported.
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.nn.functional",
                                "safetensors.torch", "tokenizers"])


class Forked:
    def __init__(self, script, *arguments, **environment):
        self.folder = tempfile.TemporaryDirectory()
        self.process = CONTEXT.Process(target=_run, args=(
            str(script), [*map(str, arguments)], {**os.environ, **environment}, self.folder.name))
        self.process.start()

    def poll(self):
        """The exit status, minus the number of a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise TimeoutError(self.err)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.process.pid, number)

    @property
    def out(self):
        return (Path(self.folder.name) / "out").read_text()

    @property
    def err(self):
        return (Path(self.folder.name) / "err").read_text()


def _run(script, arguments, environment, folder):
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(HERE)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    atexit._clear()  # what the process before it registered; multiprocessing calls no function
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Pair:
    """Two processes that find each other as those of torchrun do."""

    def __init__(self, *arguments, script=HERE / "promptprior.py"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.both = [Forked(script, *arguments, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                            WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank),
                            LOCAL_RANK=str(rank)) for rank in (0, 1)]

    def wait(self):
        """The first exit status that is not 0, else 0. If one fails the other is ended."""
        while any(one.poll() is None for one in self.both):
            if any(one.poll() for one in self.both):
                time.sleep(1)  # the other may have a line to say
                for one in self.both:
                    one.process.terminate()
            time.sleep(0.05)
        return next((one.poll() for one in self.both if one.poll()), 0)

    def send_signal(self, number):
        for one in self.both:
            one.send_signal(number)

    @property
    def out(self):
        return "".join(one.out for one in self.both)

    @property
    def err(self):
        return "".join(one.err for one in self.both)
