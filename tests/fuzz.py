"""Damaged and hostile inputs of every kind that the program reads, and what it does with them.

    python tests/fuzz.py --seconds 60 --seed 0
    python tests/fuzz.py --seed 0 --case 123       # one again, with all that it prints

A case is a small real input, damaged, and a command that reads it: a pure function of the seed and
its number. Right are: exit 0, with the output of the undamaged input where the damage means
nothing; exit 2 or 1 and, as the last line on stderr, the one that says `promptprior: error: `. A
traceback, another error line, a warning, a control character, seconds without an end, memory out of
all proportion or a dead process are failures, and print the case's number.

Cases run in a process of their own, one after the other, until one fails.
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import importlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if "pytest" not in sys.modules:  # a process that is to be forked has one thread
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "COLUMNS": "80",
                   "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import promptprior  # noqa: E402
import small  # noqa: E402
from damage import damage  # noqa: E402
from lab import commands, trial  # noqa: E402

SLOW, DEAD = 20, 60  # seconds a case may take; seconds after which its process is killed
trial.SECONDS = 2  # by the clock six times as many, so that it ends before a case does
ROOM = 2 << 30  # bytes that the system gives a case
MEMORY = 500 << 20  # bytes that one case may add to the most that its process has held
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
FEW = ["--steps", "1", "--eval-limit", "1", "--max-new", "2", "--batch-size", "2", "--tokens", "3"]


# --------------------------------------------------------------------------------------------------
# undamaged inputs


def world(folder: Path) -> None:
    """Small real inputs of every kind, always the same bytes but for times and places."""
    model = small.make(folder / "model", max_position_embeddings=256, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})
    weights = load_file(model / "model.safetensors")
    shutil.copytree(model, folder / "named")  # with tokens that stand beside tokenizer.json
    shutil.copy(model / "tokenizer.json", folder / "named/tokenizer.4.0.json")
    for name, content in {
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "legacy": True,
                "bos_token": {"content": "<|begin_of_text|>", "special": True}, "pad_token": "[PAD]",
                "split_special_tokens": False, "extra_special_tokens": ["<tool>"],
                "fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]},
            "special_tokens_map.json": {"eos_token": {"content": "<|end_of_text|>", "lstrip": True},
                                        "additional_special_tokens": ["<x>", {"content": "<y>"}]},
            "added_tokens.json": {"<tool>": 512, "<z>": 513}}.items():
        (folder / "named" / name).write_text(json.dumps(content))
    shutil.copytree(model, folder / "sharded")
    (folder / "sharded/model.safetensors").unlink()
    names = sorted(weights)
    places = {k: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, k in enumerate(names)}
    for file in set(places.values()):
        save_file({k: weights[k] for k in names if places[k] == file}, folder / "sharded" / file)
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": places}))

    asked = [("Who lives in Tarn?", "Bolu"), ("Where does Bolu live?", "Tarn"), ("Why?", "")]
    squad = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [
        {"context": f"{where}: Bolu lives in Tarn, a t\u00f6wn \u2014 far away. " * 2, "qas": [
            {"id": f"{where}{i}", "question": q, "is_impossible": not a,
             "answers": [{"text": a, "answer_start": 0}] * bool(a)}
            for i, (q, a) in enumerate(asked)]} for where in "AB"]}]}
    flat = [{"id": q["id"], "context": p["context"], "question": q["question"], "answers": {
        "text": [x["text"] for x in q["answers"]], "answer_start": [0]}}
        for p in squad["data"][0]["paragraphs"] for q in p["qas"]]
    sums = [(f"What is {i} + 1?", str(i + 1)) for i in range(3)]
    texts = [{"text": f"The cat {i} sat on the mat. \u732b" * 2, "url": "u"} for i in range(4)]
    lines = lambda rows: "".join(json.dumps(r) + "\n" for r in rows)
    for name, content in {
            "squad.json": json.dumps(squad, ensure_ascii=False), "flat.json": json.dumps(flat),
            "flat.jsonl": lines(flat), "columns.json": json.dumps(
                {k: [r[k] for r in flat] for k in flat[0]}),
            "records.json": json.dumps({"data": [
                {**r, "answers": [{"text": a} for a in r["answers"]["text"]]} for r in flat]}),
            "hub.json": json.dumps({
                "features": [{"feature_idx": i, "name": k} for i, k in enumerate(flat[0])],
                "rows": [{"row_idx": i, "row": r} for i, r in enumerate(flat)], "partial": False}),
            "rows.jsonl": lines([{"row_idx": i, "row": r} for i, r in enumerate(flat)]),
            "named.json": json.dumps({"version": 1, "instances": flat}),
            "splits.json": json.dumps({"train": flat, "validation": flat[:1]}),
            "pandas.json": json.dumps(
                {k: {str(i): r[k] for i, r in enumerate(flat)} for k in flat[0]}),
            "index.json": json.dumps({str(i): {**r, "answers": [i, 1.5]}
                                      for i, r in enumerate(flat)}),
            "array.json": json.dumps(texts, indent=1),
            "letters.json": json.dumps([{"question": q, "options": {"A": "Bolu", "B": a or "me"},
                                         "answer": "AB"[i % 2]} for i, (q, a) in enumerate(asked)]),
            **{name: mark.join(("context", "question", "answers\n")) + "".join(
                mark.join(f'"{x}"' for x in (r["context"], r["question"], r["answers"]["text"]))
                + "\n" for r in flat) for name, mark in (
                    ("table.csv", ","), ("excel.CSV", ";"), ("pipes.csv", "|"))},
            "sums.csv": "question;answer\n" + "".join(f"b'{q}\\n';{a}\n" for q, a in sums),
            "gsm8k.jsonl": lines([{"question": q, "answer": f"so <<1+1=2>>\n#### {a}"}
                                  for q, a in sums]),
            "choice.json": json.dumps([{"question": q, "choices": ["Bolu", "Tarn", "me"],
                                        "answer": i} for i, (q, _) in enumerate(asked)]),
            "labels.csv": "text,label\n" + "".join(f"{q},{len(a)}\n" for q, a in asked),
            "sums.txt": "".join(f"{q}\n{a}\n" for q, a in sums),
            "export.json": json.dumps([{"question": f"b'{q}\\n'", "answer": f"b'{a}\\n'"}
                                       for q, a in sums]),
            "hendrycks.json": json.dumps({"problem": "1 + 1?", "level": "Level 1",
                                          "solution": "so \\boxed{\\frac{4}{2}}."}),
            "c4.json": lines(texts), "c4.json.gz": gzip.compress(lines(texts).encode(), mtime=0),
            "prose.txt": "\n\n".join(t["text"] for t in texts),
            "batch.jsonl": lines(texts), "prompt.txt": "Answer in a word. \u732b\n",
            "grid.json": json.dumps([{"prior": ["vocab", "fitted:shrinkage=0.5"], "seed": 0}, {
                "tokens": [2, 3], "text": [["a", "b"]], "lr": 0.01}])}.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, flags in {
            "point": ["--prior", "vocab"],
            "sgld": ["--prior", "fitted", "--posterior", "sgld", "--particles", "2"],
            "gaussian": ["--prior", "fitted", "--posterior", "gaussian", "--particles", "2"],
            "taught": ["--teacher", "say it", "--teacher-answers", "--teacher-reasons",
                       "--teacher-steps", "2"]}.items():
        spec = f"squad:{folder}/squad.json"
        assert promptprior.main([
            "train", "--model", str(model), "--data", spec, "--eval-data", spec, *FEW, "--steps",
            "2", "--eval-every", "1", "--deep-layers", "1", *flags, "--out",
            str(folder / "runs" / name)]) == 0
    for name, flags in {"rows": [], "prefix": ["--method", "prefix"]}.items():
        assert promptprior.main([
            "train", "--model", str(model), "--data", spec, "--eval-data", spec, *FEW, "--steps",
            "1", *flags, "--out", str(folder / "runs" / name)]) == 0
        assert promptprior.main(["export", str(folder / "runs" / name), "--to",
                                 str(folder / "adapters" / name)]) == 0
    assert promptprior.main([
        "sweep", "--out", str(folder / "sweep"), "--model", str(model), "--data", spec,
        "--eval-data", spec, *FEW, "--steps", "1", "--prior", "vocab", "fitted", "--seed", "0",
        "1", "--eval-limit", "4"]) == 0
    (folder / "sweep/failed").mkdir()
    (folder / "sweep/failed/fitted-seed1.txt").write_text("x: it failed: mend it\n")
    np.save(folder / "rows.npy", np.linspace(-1, 1, 48, dtype=np.float32).reshape(3, 16))
    (folder / "rows.json").write_text('{"file": "out", "for": "numpy"}')
    assert promptprior.main(["plot", str(folder / "runs/prefix")]) == 0
    shutil.copy(folder / "runs/prefix/report.html", folder / "page.html")
    assert promptprior.main(["export", str(folder / "runs/prefix"), "--csv",
                             str(folder / "log.csv")]) == 0
    shutil.copytree(folder / "runs/point", folder / "left")  # by a process that was killed
    (folder / "left/run.lock").write_text("process 1 on elsewhere\n")
    assert promptprior.main([
        "collect", "--model", str(model), "--data", f"a=squad:{folder}/squad.json",
        f"b=text:{folder}/c4.json", "--layers", "0,2", "--limit", "12", "--out",
        str(folder / "acts.safetensors")]) == 0


class Kind(NamedTuple):
    copied: str  # what a case has of its own: a file or a folder of the world
    files: str  # which of its files are damaged, a pattern below it; "" for itself
    commands: list[list[str]]  # COPY and WORLD stand for paths, OUT for a new one


MODEL = [["generate", "WORLD/runs/point", "Who?", "--model", "COPY", "--max-new", "2"],
         ["eval", "WORLD/runs/sgld", "--limit", "1", "--json", "--model", "COPY"],
         ["train", "--model", "COPY", "--data", "squad:WORLD/squad.json", "--eval-data",
          "squad:WORLD/squad.json", *FEW, "--out", "OUT"]]
RUN = [["eval", "COPY", "--json"], ["eval", "COPY"], ["generate", "COPY", "Who?"],
       ["compare", "COPY", "--json"], ["compare", "COPY"], ["plot", "COPY", "--text"],
       ["plot", "COPY"], ["train", "--out", "COPY", "--resume"],
       ["train", "--out", "COPY", "--resume", "--steps", "3"],
       ["train", "--config", "COPY/config.json", "--out", "OUT"],
       ["interpolate", "WORLD/runs/point", "COPY", "--points", "2", "--out", "OUT"],
       ["sample", "--model", "WORLD/model", "--prior", "posterior:COPY", "--tokens", "3",
        "--json"],
       ["collect", "--under", "COPY", "--data", "squad:WORLD/squad.json", "--limit", "5",
        "--out", "OUT"], ["attention", "COPY", "--limit", "2", "--json"],
       ["export", "COPY", "--to", "OUT"], ["export", "COPY", "--csv", "OUT"]]
PREFIX = ["train", "--model", "WORLD/model", "--data", "squad:WORLD/squad.json", "--eval-data",
          "squad:WORLD/squad.json", *FEW, "--method", "prefix", "--prior", "posterior:COPY",
          "--out", "OUT"]


def of_data(kind: str) -> list[list[str]]:
    spec = f"{kind}:COPY"
    if kind == "text":
        return [["sample", "--model", "WORLD/model", "--prior", "isotropic", "--tokens", "3",
                 "--reference", spec, "--json"],
                ["collect", "--model", "WORLD/model", "--data", spec, "--limit", "5", "--out",
                 "OUT"]]
    return [["eval", "WORLD/runs/point", "--data", spec, "--limit", "2", "--json"],
            ["train", "--model", "WORLD/model", "--data", spec, "--eval-data", spec, *FEW,
             "--out", "OUT"],
            ["train", "--model", "WORLD/model", "--data", spec, *FEW, "--out", "OUT"]]


ADAPTER = [["import", "COPY", "--model", "WORLD/model", "--data", "squad:WORLD/squad.json", "--out",
            "OUT"]]

KINDS = {
    **{f"adapter {name} {file}": Kind(f"adapters/{name}", file, ADAPTER)
       for name in ("rows", "prefix") for file in ("*.json", "*.safetensors")},
    "weights": Kind("model", "model.safetensors", MODEL),
    "shards": Kind("sharded", "*.safetensors", MODEL),
    "index": Kind("sharded", "*.index.json", MODEL),
    "config": Kind("model", "config.json", MODEL),
    "generation_config": Kind("model", "generation_config.json", MODEL),
    "tokenizer": Kind("model", "tokenizer.json", MODEL),
    "files beside the tokenizer": Kind("named", "[ast]*_*.json", MODEL),
    **{f"squad {name}": Kind(name, "", of_data("squad")) for name in (
        "squad.json", "flat.json", "flat.jsonl", "columns.json", "records.json", "hub.json",
        "rows.jsonl", "named.json", "splits.json", "pandas.json", "index.json", "table.csv",
        "excel.CSV", "pipes.csv")},
    "gsm8k": Kind("gsm8k.jsonl", "", of_data("gsm8k")),
    **{f"choice {name}": Kind(name, "", of_data("choice")) for name in (
        "choice.json", "letters.json", "labels.csv")},
    "math text": Kind("sums.txt", "", of_data("math")),
    "math export": Kind("export.json", "", of_data("math")),
    "math table": Kind("sums.csv", "", of_data("math")),
    "hendrycks": Kind("hendrycks.json", "", of_data("hendrycks")),
    **{f"text {name}": Kind(name, "", of_data("text")) for name in (
        "c4.json", "c4.json.gz", "array.json", "prose.txt")},
    **{f"run {file}, {name}": Kind(f"runs/{name}", file, [
        c for c in RUN if c[0] in readers or "--resume" in c and "resume" in readers]
        + [PREFIX] * ("sample" in readers and name == "prefix"))
       for name in ("point", "sgld", "gaussian", "prefix") for file, readers in {
           "config.json": {c[0] for c in RUN},
           "prompt.safetensors": {c[0] for c in RUN} - {"train"},
           "metrics.jsonl": {"compare", "plot", "resume", "export"},
           "prompts/*.safetensors": {"compare", "plot"},
           "checkpoints/*.safetensors": {"resume"}, "predictions.jsonl": {"plot"}}.items()},
    **{f"run {file}, taught": Kind("runs/taught", file, [
        c for c in RUN if c[0] == "eval" or "--resume" in c])
       for file in ("config.json", "teacher.jsonl")},
    **{f"sweep {file}": Kind("sweep", file, [["sweep", "COPY", "--table"]])
       for file in ("plan.json", "runs/*/config.json", "runs/*/metrics.jsonl",
                    "runs/*/predictions.jsonl", "runs/*/prompt.safetensors",
                    "runs/*/prompts/*.safetensors", "failed/*")},
    "grid": Kind("grid.json", "", [[
        "sweep", "--grid", "COPY", "--model", "WORLD/model", "--data", "squad:WORLD/squad.json",
        "--eval-data", "squad:WORLD/squad.json", *FEW, "--out", "OUT"]]),
    "rows.npy": Kind("rows.npy", "", [["import", "COPY", "--model", "WORLD/model", "--data",
                                       "squad:WORLD/squad.json", "--out", "OUT"]]),
    "text file": Kind("prompt.txt", "", [
        ["eval", "WORLD/runs/point", "--text-file", "COPY", "--limit", "1", "--json"],
        ["train", "--model", "WORLD/model", "--data", "squad:WORLD/squad.json", *FEW,
         "--text-file", "COPY", "--out", "OUT"]]),
    "batch": Kind("batch.jsonl", "", [["generate", "WORLD/runs/point", "--batch", "COPY",
                                       "--max-new", "2"]]),
    "page": Kind("page.html", "", [["plot", "WORLD/runs/prefix", "--out", "COPY", "--overwrite"]]),
    "table": Kind("log.csv", "", [["export", "WORLD/runs/prefix", "--csv", "COPY",
                                   "--overwrite"]]),
    "lock": Kind("left", "run.lock", [["train", "--out", "COPY", "--resume", "--steps", "3"],
                                      ["eval", "COPY", "--json"]]),
    "collection": Kind("acts.safetensors", "", [
        ["compare", "COPY"], ["compare", "COPY", "--json"],
        ["sample", "--model", "WORLD/model", "--prior", "isotropic", "--tokens", "3",
         "--reference", "collection:COPY", "--json"],
        ["sample", "--model", "WORLD/model", "--prior", "fitted", "--tokens", "3",
         "--reference", "collection:COPY#b"],
        ["collect", "--model", "WORLD/model", "--data", "squad:WORLD/squad.json", "--limit", "5",
         "--out", "COPY", "--overwrite"]]),
}


# --------------------------------------------------------------------------------------------------
# a case


class Hang(BaseException):
    pass


class Outcome(NamedTuple):
    kind: str
    command: str
    status: int | str
    problem: str  # "" if it is right
    output: str


def run_case(seed: int, number: int, base: Path, kinds: dict[str, Kind]) -> Outcome:
    r = random.Random(f"{seed} {number}")
    name = r.choice(sorted(kinds))
    kind, folder = kinds[name], base / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    own = folder / Path(kind.copied).name
    (shutil.copytree if (base / kind.copied).is_dir() else shutil.copy)(base / kind.copied, own)
    files = sorted(own.glob(kind.files)) if kind.files else [own]
    files = r.sample(files, min(len(files), r.choice([1, 1, 2])))
    command = r.choice(kind.commands)
    same = all([damage(r, file, like(base, file)) for file in files])
    for text, path in (("COPY", own), ("WORLD", base), ("OUT", folder / "out")):
        command = [part.replace(text, str(path)) for part in command]
    status, out, err, problem = captured(command, folder)
    problem = problem or wrong(command, status, out, err)
    if not problem and same:
        for path in (own, folder / "out"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (shutil.copytree if (base / kind.copied).is_dir() else shutil.copy)(base / kind.copied, own)
        expected = captured(command, folder)[:2]
        if status != expected[0] or "--json" in command and out != expected[1]:
            problem = "another outcome, though the damage means nothing"
    return Outcome(name, f"{' '.join(command)} [{files[0].name}]", status, problem, out + err)


def like(base: Path, file: Path) -> list[Path]:
    """The files of the world with this name, or else with this ending."""
    there = [p for p in sorted(base.rglob(f"*{file.suffix}")) if "case" not in p.parts
             and "cache" not in p.parts and p.is_file()]
    return [p for p in there if p.name == file.name] * 3 + there


def captured(command: list[str], folder: Path) -> tuple[int | str, str, str, str]:
    """Status, stdout, stderr and what went wrong, of the process's own descriptors, for libraries
    print too."""
    problem, before = "", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = [open(folder / f".{n}", "w+b") for n in (1, 2)]
    kept = [os.dup(n) for n in (1, 2)]
    for n, f in zip((1, 2), files):
        os.dup2(f.fileno(), n)

    def alarm(*_):
        faulthandler.dump_traceback()
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SLOW)
    try:
        status: int | str = promptprior.main(command)
    except SystemExit as e:
        status = e.code
    except Hang:
        status, problem = "hang", f"no end after {SLOW} s"
    except BaseException as e:
        import traceback

        status, problem = "raised", "".join(traceback.format_exception(e))
    finally:
        signal.alarm(0)
        sys.stdout.flush(), sys.stderr.flush()
        for n, k in zip((1, 2), kept):
            os.dup2(k, n)
            os.close(k)
    out, err = (Path(f.name).read_bytes().decode(errors="replace") for f in files)
    for f in files:
        f.close()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if not problem and grown > MEMORY:
        problem = f"held {grown >> 20} MiB more than before"
    return status, out, err, problem


def wrong(command: list[str], status: int | str, out: str, err: str) -> str:
    """Why this is no right outcome, or ""."""
    found = CONTROL.search(out + err)
    if found:
        return f"control character {found[0]!r}"
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("promptprior: ")]
    if "Traceback" in err or "panicked" in err or "Warning" in err:
        return "a traceback, a panic or a warning"
    if "memory does not suffice" in err:
        return "more memory wanted than there is"
    if status == 0:
        if errors:
            return "exit 0 and an error"
        if "--json" in command:
            try:
                json.loads(out, parse_constant=lambda name: int(name))  # NaN is no JSON
            except ValueError as e:
                return f"no JSON: {e}"
        return "" if out or command[0] == "sample" else "exit 0 and no output"
    if status not in (1, 2):
        return f"exit {status}"
    if len(errors) != 1 or errors != lines[-1:] or not errors[0].startswith("promptprior: error: "):
        return "not one line of error, the last"
    return "" if len(errors[0]) < 1100 else "an error of any length"


# --------------------------------------------------------------------------------------------------
# many cases


def limit_process() -> None:
    """A case ends by the system's hand where it takes much more than its like."""
    held = re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_DATA, ((int(held[1]) << 10) + ROOM, -1))
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + DEAD, -1))


def work(seed: int, number: int, base: Path, kinds: dict[str, Kind], end: float,
         pipe: int) -> None:
    """Cases from `number` on; before and after each a line of JSON into the pipe."""
    def tell(value) -> None:
        os.write(pipe, (json.dumps(value) + "\n").encode())

    own_threads()
    for n in range(number, number + 2000):
        if time.monotonic() > end:
            break
        tell(n)
        limit_process()
        outcome = run_case(seed, n, base, kinds)
        tell(outcome)
        if outcome.status == "hang":
            break


def fuzz(seed: int, seconds: float, base: Path, kinds: dict[str, Kind], most: int = 20
         ) -> tuple[Counter, list[tuple[int, Outcome]]]:
    """Outcomes counted by (kind, status), and at most so many failures with their numbers."""
    counts, failures, number = Counter(), [], 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(failures) < most:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                work(seed, number, base, kinds, end, writer)
            finally:
                os._exit(0)
        os.close(writer)
        rest, running = b"", False
        while len(failures) < most:
            if not select.select([reader], [], [], DEAD)[0]:
                failures.append((number, Outcome("", "", "dead", f"no end after {DEAD} s", "")))
                break
            got = os.read(reader, 1 << 16)
            if not got:  # its end
                if running:
                    failures.append((number, Outcome("", "", "dead", "the process died", "")))
                break
            *lines, rest = (rest + got).split(b"\n")
            for line in map(json.loads, lines):
                running = isinstance(line, int)
                if running:
                    number = line
                else:
                    outcome = Outcome(*line)
                    counts[outcome.kind, str(outcome.status)] += 1
                    if outcome.problem:
                        failures.append((number, outcome))
                        print(f"--case {number}: {outcome.command}: {outcome.problem[-300:]!r}",
                              file=sys.stderr, flush=True)
        number += 1
        os.close(reader)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(child, 0)
    return counts, failures


def prepare() -> None:
    """What a process needs that is forked many times: one thread, and all modules. An optimiser
    imports torch._dynamo, which takes longer than any case."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")
    for command in commands.COMMANDS.values():
        importlib.import_module(f"lab.{command.module}")


def own_threads() -> None:
    """In a process that was forked: torch makes its pool of threads anew when it is first asked
    for, and fails if two threads ask at once."""
    torch.set_num_threads(1)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--case", type=int, help="one case again")
    p.add_argument("--only", default="", help="kinds with this in their name")
    p.add_argument("--most", type=int, default=20, help="failures to stop at")
    a = p.parse_args()
    kinds = {name: kind for name, kind in KINDS.items() if a.only in name}
    base, counter = Path(tempfile.mkdtemp(prefix="fuzz-")), iter(range(10**9))
    os.environ["PROMPTPRIOR_CACHE"] = str(base / "cache")  # damaged tokenizers are no user's
    prepare()
    try:
        clock, time.perf_counter = time.perf_counter, lambda: next(counter)  # the same bytes always
        world(base)
        time.perf_counter = clock
        if a.case is not None:
            outcome = run_case(a.seed, a.case, base, kinds)
            print(f"{outcome.kind}: {outcome.command}\nstatus {outcome.status}\n{outcome.output!r}"
                  f"\n{outcome.problem or 'right'}")
            return bool(outcome.problem)
        counts, failures = fuzz(a.seed, a.seconds, base, kinds, a.most)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    statuses = sorted({status for _, status in counts})
    print(f"{'':32}" + "".join(f"{status:>8}" for status in statuses))
    for name in [*kinds, ""]:
        each = [sum(n for (k, s), n in counts.items() if s == status and (k == name or not name))
                for status in statuses]
        print(f"{name or 'all ' + str(sum(counts.values())):32}" + "".join(f"{n:8}" for n in each))
    only = f" --only {a.only!r}" * bool(a.only)
    for number, outcome in failures:
        print(f"\nFAILED --seed {a.seed} --case {number}{only}: {outcome.kind}: {outcome.command}\n"
              f"status {outcome.status}: {outcome.problem[-3000:]}\n{outcome.output[-1500:]!r}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
