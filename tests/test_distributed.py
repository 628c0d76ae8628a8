"""Two processes on the CPU train as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import promptprior
from forked import Forked, Pair
from small import MODEL

HERE = Path(promptprior.__file__).parent
FEW = ["--steps", "5", "--eval-every", "3", "--eval-limit", "20", "--batch-size", "7",
       "--max-new", "3", "--train-examples", "60", "--model", str(MODEL), "--max-length", "150"]


SPY = """  # promptprior.py, writing down the places in the data that every batch is made of
import os, sys
sys.path.insert(0, os.getcwd())
import promptprior
from lab import beginning, inputs
batch = inputs.Questions.batch
def spy(self, indices, *more):
    with open(os.path.join(sys.argv[-1], "batches" + os.environ.get("RANK", "")), "a") as f:
        f.write(f"{len(self.examples)} {list(indices)}\\n")
    return batch(self, indices, *more)
def noted(name, work):
    def note(*arguments, **more):
        open(os.path.join(sys.argv[-1], name + os.environ.get("RANK", "")), "w").close()
        return work(*arguments, **more)
    return note
inputs.Questions.batch = spy
beginning.references = noted("fits", beginning.references)
beginning.checksums = noted("sums", beginning.checksums)
sys.exit(promptprior.main(sys.argv[1:-1]))
"""


def torchrun(*arguments, program="promptprior.py"):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         program, *map(str, arguments)], cwd=HERE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arguments", [
    ["--prior", "fitted", "--posterior", "sgld", "--particles", "2", "--data", "math"],
    ["--shard", "--data", "math", "--tokens", "0", "--deep-layers", "2", "--steps", "3"],
    ["--shard", "--place", "suffix", "--reparam", "mlp", "--data", "math", "--steps", "2"],
    ["--shard", "--method", "prefix", "--prefix-layers", "2", "--reparam", "shared", "--place",
     "after-bos", "--steps", "2"],
    ["--shard", "--deep-layers", "1", "--subspace", "3", "--steps", "3"]],
    ids=["particles", "sharded, of deep rows alone", "sharded, a suffix of a network",
         "sharded, a prefix after BOS", "sharded, in a subspace"])
def test_two_processes_train_as_one(tmp_path, arguments):
    """The same losses and rows, to rounding; a batch of 7 divides unevenly. Only one speaks."""
    (tmp_path / "spy.py").write_text(SPY)
    two = Pair("train", "--out", tmp_path / "two", *FEW, *arguments, tmp_path,
               script=tmp_path / "spy.py")
    assert two.wait() == 0, two.err
    done = [(tmp_path / f"batches{rank}").read_text().splitlines() for rank in (0, 1)]
    # One fits the prior for both, unless a reference needs weights that are shared.
    assert (tmp_path / "fits0").exists()
    assert (tmp_path / "fits1").exists() == ("--shard" in arguments)
    assert (tmp_path / "sums0").exists() and not (tmp_path / "sums1").exists()
    size = 7
    evals = [[x for x in d if x.startswith("20 ")] for d in done]  # 20 questions are evaluated
    for first, second in zip(*([x for x in d if x not in e] for d, e in zip(done, evals))):
        mine, other = (json.loads(x.split(" ", 1)[1]) for x in (first, second))
        assert abs(len(mine) - len(other)) <= 1 and len(mine) + len(other) == size
    # those who share weights all evaluate everything
    assert evals[0] == evals[1] if "--shard" in arguments else not set(evals[0]) & set(evals[1])
    assert two.out.count(" moved ") == len({
        name.split(".")[1] for name in load_file(tmp_path / "two" / "prompt.safetensors")})
    alone = [a for a in arguments if a != "--shard"]
    assert promptprior.main(["train", "--out", str(tmp_path / "one"), *FEW, *alone]) == 0
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "two").iterdir()}
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two)
    for x, y in zip(one, two):
        assert x.keys() == y.keys() and x["split"] == y["split"]
        for key in x.keys() - {"seconds", "examples_per_second", "split"}:
            assert x[key] == pytest.approx(y[key], rel=2e-4, abs=1e-6), key
    rows = [load_file(tmp_path / name / "prompt.safetensors") for name in ("one", "two")]
    for key, x in rows[0].items():
        assert (x - rows[1][key]).norm() <= 1e-3 * x.norm()
    said = [[json.loads(line)["id"] for line in (tmp_path / name / "predictions.jsonl").open()]
            for name in ("one", "two")]
    assert said[0] == said[1]


APART = """  # promptprior.py, with another draw in every process; writes down what training begins
# from, and the threads that run when Python ends
import atexit, os, sys
sys.path.insert(0, os.getcwd())
import priors, promptprior
from lab import train
from safetensors.torch import save_file
rank, sample, make = int(os.environ["RANK"]), priors.Fitted.sample, train.make_posterior
priors.Fitted.sample = lambda *arguments: sample(*arguments) + rank
def spy(settings, begun, *more):
    start = {str(i): rows.contiguous() for i, rows in begun.start.items()}
    save_file(start, os.path.join(sys.argv[-1], f"start{rank}"))
    return make(settings, begun, *more)
train.make_posterior = spy
def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    with open(os.path.join(sys.argv[-1], f"threads{rank}"), "w") as f:
        f.writelines(names)
atexit.register(threads)  # what is registered first runs last
sys.exit(promptprior.main(sys.argv[1:-1]))
"""


@pytest.mark.parametrize("arguments", [[], ["--shard"]], ids=["whole", "sharded"])
def test_the_first_process_draws_for_all(tmp_path, arguments):
    """Whatever the others would have drawn: with unlike threads it may differ."""
    (tmp_path / "apart.py").write_text(APART)
    two = Pair("train", "--out", tmp_path / "run", *FEW, "--steps", "1", "--data", "math",
               "--prior", "fitted", *arguments, tmp_path, script=tmp_path / "apart.py")
    assert two.wait() == 0, two.err
    starts = [load_file(tmp_path / f"start{rank}") for rank in (0, 1)]
    first = load_file(tmp_path / "run" / "prompts" / "000000.safetensors")
    for i, rows in starts[0].items():
        assert (rows == starts[1][i]).all()
        assert (rows[0] == first[f"layers.{i}"]).all()
    for rank in (0, 1):  # a thread of gloo that outlives Python aborts the process, now and then
        assert "gloo" not in (tmp_path / f"threads{rank}").read_text()


def test_a_signal_stops_both_and_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    process = torchrun("train", "--out", run, *FEW, "--data", "math", "--tokens", "1", "--steps",
                       "2000", "--batch-size", "2")
    deadline = time.time() + 120
    while time.time() < deadline and not (run / "metrics.jsonl").exists() or '"train"' not in (
            run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("stopped by SIGTERM") == 1, err
    last = max(m["step"] for m in lines(run) if "step" in m) + 2
    both = Pair("train", "--out", run, "--resume", "--steps", last)
    assert both.wait() == 0, both.err
    steps = [m["step"] for m in lines(run) if m["split"] == "train"]
    assert steps == list(range(1, last + 1))


DIES = """  # promptprior.py, whose second process is killed at the third step
import os, signal, sys
sys.path.insert(0, os.getcwd())
import promptprior
from lab import train
schedule = train.schedule
def dies(step, *more):
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return schedule(step, *more)
train.schedule = dies
sys.exit(promptprior.main(sys.argv[1:]))
"""


def test_a_process_that_is_killed_leaves_the_others_a_line(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    # of the bundled model, in whose long steps torchrun's signal finds the other
    process = torchrun("train", "--out", tmp_path / "run", *FEW, "--model", "tiny", "--max-length",
                       400, program=tmp_path / "dies.py")
    _, err = process.communicate(timeout=300)
    ours = err.partition("torch/distributed/elastic")[0]
    assert process.returncode != 0 and "Traceback" not in ours and "gloo" not in err, err
    assert err.count("--resume") == 1


@pytest.mark.parametrize("environment, message", [
    ({"MASTER_ADDR": "x", "WORLD_SIZE": "2"}, "RANK None and WORLD_SIZE 2 are in the environment"),
    ({"MASTER_ADDR": "x", "WORLD_SIZE": "two", "RANK": "1"}, "start by torchrun"),
    ({"MASTER_ADDR": "x", "WORLD_SIZE": "2", "RANK": "2"}, "or `unset MASTER_ADDR`"),
    ({"RANK": "1"}, None), ({"RANK": "x"}, None),
    ({"MASTER_ADDR": "x", "WORLD_SIZE": "1", "RANK": "0"}, None)])
def test_an_environment_that_is_not_torchruns(tmp_path, environment, message):
    """Either one line, or a process alone, which speaks."""
    process = Forked(HERE / "promptprior.py", "sample", "--tokens", "1", "--out",
                     tmp_path / "x.safetensors", **environment)
    status = process.wait()
    if message:
        assert status == 2 and process.err.count("\n") == 1 and message in process.err
    else:
        assert status == 0 and "layer 0: " in process.err + process.out


def test_mistakes_are_said_once(tmp_path):
    process = torchrun("train", "--out", tmp_path, *FEW, "--batch-size", "1")
    _, err = process.communicate(timeout=60)
    assert err.count("promptprior: error: --batch-size 1") == 1 and process.returncode != 0
    assert promptprior.main(["train", "--out", str(tmp_path), "--shard"]) == 2
