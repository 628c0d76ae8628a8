"""What the studies of whole runs share: the program as a user calls it, and what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def promptprior(*arguments) -> str:
    """Run a command in a process of its own; its standard output."""
    done = subprocess.run([sys.executable, ROOT / "promptprior.py", *map(str, arguments)],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def evaluations(run: Path) -> list[dict]:
    return [m for m in metrics(run) if m["split"] == "eval"]
