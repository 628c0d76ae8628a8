"""Many runs on one machine: steps an hour by processes and threads, and their memory.

    python benchmarks/many.py [--jobs 1 2] [--turns 2] [--runs 4] -- --model DIR [FLAG of train ...]

A sweep of --runs short runs (seeds) is made with each number of --jobs, that is processes, which
share the machine's processors as threads. Turns are taken. *seconds a step*: median over all runs.
*steps an hour*: of all processes. *held*: the sum of what the processes hold in memory, each with
all of its mapped pages, at its most. *really*: at that moment, with pages that several processes
map divided among them (Linux: proportional set size), so that what they share is counted once.
*shared*: the difference, such as weights that are mapped from their file; with a --dtype that the
file does not have they are converted, and each process has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Measured(NamedTuple):
    step: float  # seconds
    held: float  # GB, the most at a time, as all that follow
    really: float


def processes_of(first: int) -> list[int]:
    """A process and those that it started, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass  # it has just ended
    found = [first]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def memory(processes: list[int]) -> tuple[float, float]:
    """GB that the processes hold: with all of their pages, and with shared pages divided."""
    totals = {"Rss": 0, "Pss": 0}
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        for line in lines:
            name = line.partition(":")[0]
            if name in totals:
                totals[name] += int(line.split()[1]) * 1024
    return totals["Rss"] / 1e9, totals["Pss"] / 1e9


def measure(jobs: int, runs: int, flags: list[str]) -> Measured:
    """A sweep in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        out, most = Path(folder) / "sweep", (0.0, 0.0)
        process = subprocess.Popen(
            [sys.executable, ROOT / "promptprior.py", "sweep", "--out", out, "--jobs", str(jobs),
             "--seed", *map(str, range(runs)), *flags],
            stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            time.sleep(0.5)
            most = max(most, memory(processes_of(process.pid)))
        if process.returncode:
            errors.seek(0)
            raise SystemExit(errors.read())
        folders = [*(out / "runs").iterdir()]
        lines = [json.loads(line) for run in folders for line in (run / "metrics.jsonl").open()]
        step = statistics.median(line["seconds"] for line in lines if line["split"] == "train")
        return Measured(step, *most)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--runs", type=int, default=4, help="of a sweep")
    p.add_argument("flags", nargs="*", help="of train, after --")
    a = p.parse_args()
    measured: dict[int, list[Measured]] = {jobs: [] for jobs in a.jobs}
    for turn in range(a.turns):
        for jobs in a.jobs[::1 if turn % 2 else -1]:  # none is always the first
            measured[jobs].append(measure(jobs, a.runs, a.flags))
    print(f"{os.cpu_count()} processors, {a.runs} runs, medians of {a.turns} turns (range)\n"
          "processes  seconds a step           steps an hour  GB held  really  shared")
    for jobs, turns in measured.items():
        step, held, really = map(statistics.median, zip(*turns))
        steps = [turn.step for turn in turns]
        print(f"{jobs:>9}{step:>8.2f} ({min(steps):.2f} to {max(steps):.2f})"
              f"{3600 * jobs / step:>16.0f}{held:>17.2f}{really:>8.2f}{held - really:>8.2f}")


if __name__ == "__main__":
    main()
