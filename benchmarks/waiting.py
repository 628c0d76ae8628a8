"""Do runs beside each other stall, if threads that wait spin, and if they sleep?

    python benchmarks/waiting.py

Every turn trains alone, beside one other run and beside two, each time once with waiting threads
that sleep (OMP_WAIT_POLICY=passive, which promptprior.py sets) and once with threads that spin
(active). Printed are the seconds of a step, medians over the steps of all runs of a turn, and the
median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "promptprior.py"
POLICIES = ("passive", "active")
WARM_UP = 3  # steps that are not counted


def seconds_a_step(policy: str, runs: int, arguments: list[str]) -> float:
    """Train so many runs at once -> the median seconds of their steps."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(i) for i in range(runs)]
        processes = [subprocess.Popen(
            [sys.executable, PROGRAM, "train", "--out", out, *arguments],
            env={**os.environ, "OMP_WAIT_POLICY": policy}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True) for out in outs]
        for process in processes:
            _, err = process.communicate()
            if process.returncode:
                raise SystemExit(f"waiting: {err.strip().splitlines()[-1]}")
        steps = []
        for out in outs:
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            steps += [line["seconds"] for line in lines if line["split"] == "train"][WARM_UP:]
    return statistics.median(steps)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--others", type=int, nargs="+", default=[0, 1, 2], help="runs beside it")
    a, more = p.parse_known_args()  # what is not known goes to train
    arguments = ["--steps", str(a.steps), "--eval-every", str(a.steps), "--eval-limit", "1",
                 "--max-new", "1", *more]
    measured = {(policy, n): [] for n in a.others for policy in POLICIES}
    for turn in range(a.turns):
        for n in a.others:
            for policy in POLICIES[::1 if turn % 2 else -1]:  # neither is always the first
                measured[policy, n].append(seconds_a_step(policy, n + 1, arguments))
    print(f"{os.cpu_count()} processors, seconds a step, medians of {a.turns} turns\n"
          "others  sleeping  spinning  spinning / sleeping (range)")
    for n in a.others:
        asleep, spinning = measured["passive", n], measured["active", n]
        ratios = [s / p for s, p in zip(spinning, asleep)]
        print(f"{n:>6}  {statistics.median(asleep):>8.3f}  {statistics.median(spinning):>8.3f}  "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
