"""What a user waits for beside training: seconds and memory of the commands at a real model's size.

    python benchmarks/waits.py --model DIR
    python benchmarks/waits.py --random          # LLaMA 3.2 1B's width and vocabulary, few layers

Each command is a process of its own, on runs of one step that are trained first. Seconds are from
its start to its end, imports and all, by the clock and of processors, which count the same beside
other work; of training, to its beginning, when all is read and the prior is drawn, and to each line
of its log. Memory is the most that the process held: all of it, and what is above the model's
weights, which are mapped from their file. The cache folder is empty before each command, but
for plot of a run of deep layers, which has what its training left there; with --again each is run
once more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.settings import TINY  # noqa: E402

STEPS = 200_000  # of a long log
SHAPE = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
         "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1}


class Command(NamedTuple):
    name: str
    arguments: list
    log: Path | None = None  # of the run that it trains, whose lines are waits of their own
    needs: str = "train"  # the command whose files it reads
    goes_on: bool = False  # with what that command, just before it, left in the cache folder


def commands(model: list, questions: list, limit: int, layers: int, out: Path) -> list[Command]:
    """All that is measured, in an order in which each finds what it needs."""
    run, deep = out / "run", out / "deep"
    short = ["--steps", 1, "--eval-limit", limit, "--batch-size", limit]
    train = ["train", *model, *questions, *short, "--max-new", 4, "--overwrite", "--out"]
    chosen = ",".join(map(str, sorted({round(i * layers / 4) for i in range(5)})))
    collected = f"collect, 20000 rows, layers {chosen}"
    figures = ["figures", *model, *short, "--examples", 200, "--limit", 2000, "--out"]
    return [
        Command("train", [*train, run], run / "metrics.jsonl"),
        Command("of deep layers: train", [*train, deep, "--deep-layers", 1],
                deep / "metrics.jsonl"),
        Command("of deep layers: plot", ["plot", deep], needs="of deep layers: train",
                goes_on=True),
        Command("of a prefix: train", [*train, out / "prefix", "--method", "prefix"],
                out / "prefix/metrics.jsonl"),
        *(Command(f"sample --prior {name}", ["sample", *model, *questions[:2], "--prior", name])
          for name in ("fitted", "exclusion", "sparse", "vae")),
        Command("plot", ["plot", run]),
        Command(f"plot, a log of {STEPS} steps", ["plot", out / "long"]),
        Command("plot --text", ["plot", run, "--text"]),
        Command("plot, three runs", ["plot", *(out / f"copy{i}" for i in range(3))]),
        Command("compare", ["compare", run]),
        Command("compare, four runs", ["compare", *(out / f"copy{i}" for i in range(4))]),
        Command("interpolate", ["interpolate", run, out / "copy0", "--limit", limit]),
        Command("attention", ["attention", run, "--limit", 4]),
        Command(collected,
                ["collect", *model, *questions[:2], "--layers", chosen, "--overwrite", "--out",
                 out / "acts.safetensors"]),
        Command("compare, of that file", ["compare", out / "acts.safetensors"], needs=collected),
        # What figures are made from is made with the first of them, and kept.
        Command("figures, their runs and collections",
                [*figures, out / "figures", 1, 5, 6, 7, 8, 10, 12]),
        *(Command(f"figures {i}", [*figures, out / "figures", i]) for i in range(1, 14)),
        Command("export, PEFT", ["export", run, "--overwrite", "--to", out / "adapter"]),
        Command("import, PEFT", ["import", out / "adapter", *model, "--overwrite", "--out",
                                 out / "imported"], needs="export, PEFT"),
        Command("export --for numpy",
                ["export", run, "--overwrite", "--for", "numpy", "--to", out / "rows.npy"]),
        Command("export --csv", ["export", run, "--csv", out / "log.csv"])]


def prepare(out: Path) -> None:
    """Copies of the run that some commands are about: four, and one with a long log."""
    for i in range(4):
        shutil.copytree(out / "run", out / f"copy{i}")
    shutil.copytree(out / "run", out / "long")
    log = out / "long/metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    step = next(line for line in lines if line["split"] == "train")
    lines = [line for line in lines if line["split"] != "train"]
    lines[-1:-1] = [{**step, "step": i + 1} for i in range(STEPS)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Wait(NamedTuple):
    name: str
    clock: float  # seconds since the start
    processors: float  # seconds, of all threads
    held: int  # bytes, the most until then


def waits(command: Command, cache: Path) -> Iterator[Wait]:
    """Run a command -> what was waited for."""
    environment = {**os.environ, "PROMPTPRIOR_CACHE": str(cache)}
    with tempfile.TemporaryFile() as errors:
        start, seen, done = time.perf_counter(), 0, 0
        process = subprocess.Popen(
            [sys.executable, ROOT / "promptprior.py", *map(str, command.arguments)],
            env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while not done:
            time.sleep(0.02 if command.log else 0)
            done, status, usage = os.wait4(process.pid, os.WNOHANG if command.log else 0)
            seconds = time.perf_counter() - start
            reached = stages(command.log) if command.log else []
            spent = (usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss) if done else \
                so_far(process.pid)
            for stage in reached[seen:]:
                yield Wait(f"{command.name}: {stage}", seconds, *spent)
            seen = len(reached)
        if status:
            errors.seek(0)
            raise SystemExit(f"{command.name}: {errors.read().decode()}")
        yield Wait(f"{command.name}{': ends' if command.log else ''}", seconds, *spent)


def stages(log: Path) -> list[str]:
    """What training has come to."""
    lines = log.read_text().splitlines() if log.exists() else []
    names = [f"{line['split']}, step {line.get('step', 0)}" for line in map(json.loads, lines)]
    return ["begins", *names] if (log.parent / "config.json").exists() else []


def so_far(process: int) -> tuple[float, int]:
    """Of a running process, the processors' seconds and the most bytes that it held so far."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    held = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), 1024 * held


def random_model(folder: Path, layers: int) -> None:
    """Write a LLaMA of random weights in bf16, with the bundled tokenizer and words that no text
    has."""
    import torch
    from safetensors.torch import save_file

    import llama

    config = {**SHAPE, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = llama.Llama(llama.read_config(folder / "config.json")).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, t in shapes.items():
        w = torch.ones(t.shape) if t.dim() == 1 else \
            0.02 * torch.randn(t.shape, generator=generator)
        weights[name] = w.bfloat16()
    weights.pop("lm_head.weight", None)  # the embeddings
    save_file(weights, folder / "model.safetensors")

    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"\u0120word{i}": i for i in range(len(words), SHAPE["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", help="a model's folder")
    p.add_argument("--random", action="store_true", help="a random model, made for this")
    p.add_argument("--layers", type=int, default=2, help="of the random model")
    p.add_argument("--dtype", help="of weights and activations (bfloat16 if random)")
    p.add_argument("--data", default="squad", help="SPEC of the questions, as for train")
    p.add_argument("--limit", type=int, default=4, help="questions of a step and of an evaluation")
    p.add_argument("--only", nargs="+", metavar="NAME", help="commands, as the table names them")
    p.add_argument("--again", action="store_true", help="each command twice, the cache kept")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder), Path(folder) / "cache"
        model = Path(a.model or out / "model")
        if a.random:
            model.mkdir()
            # In a process of its own: the peak memory of a child counts from that of its parent.
            with ProcessPoolExecutor(1) as other:
                other.submit(random_model, model, a.layers).result()
        dtype = a.dtype or ("bfloat16" if a.random else "float32")
        layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{model.name}: {layers} layers, {dtype}, weights of {size / 1e9:.2f} GB\n"
              f"{'seconds':>8} {'processor':>9} {'GB':>5} {'above':>5}")
        asked = ["--model", model, "--dtype", dtype], ["--data", a.data]
        every = commands(*asked, a.limit, layers, out)
        if unknown := {*(a.only or ())} - {command.name for command in every}:
            p.error(f"--only: there is no {', '.join(unknown)}; there are "
                    f"{'; '.join(command.name for command in every)}")
        for command in every:
            needed = {"train", *(c.needs for c in every if c.name in (a.only or ()))}
            if a.only and command.name not in {*needed, *a.only}:
                continue
            if not command.goes_on:
                shutil.rmtree(cache, ignore_errors=True)
            for turn in range(1 + (a.again and not command.log)):  # a run is not trained again
                for name, clock, processors, held in waits(command, cache):
                    print(f"{clock:>8.1f} {processors:>9.1f} {held / 1e9:>5.1f} "
                          f"{(held - size) / 1e9:>5.1f}  {name}{', again' * turn}", flush=True)
            if command.name == "train":
                prepare(out)


if __name__ == "__main__":
    main()
