"""What the studies of whole runs share: the program as a user calls it, what it wrote, and scores
of prompts that no run ended with."""

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


def sweep(out: Path, grid: Path, flags: list[str], **options) -> str | None:
    """Run the sweep of a grid's file in a process of its own; its standard output, if the options
    of subprocess.Popen ask for it. Raises SystemExit as the sweep ends, if it does not end well."""
    process = subprocess.Popen([sys.executable, ROOT / "promptprior.py", "sweep", "--out", out,
                                "--grid", grid, *flags], text=True, **options)
    try:
        table, _ = process.communicate()
    except KeyboardInterrupt:  # a terminal sends it to the sweep too, which says how to go on
        process.communicate()
        raise
    status = process.returncode
    if status:  # a shell sees 128 and the number of the signal that ended a process
        raise SystemExit(status if status > 0 else 128 - status)
    return table


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def evaluations(run: Path) -> list[dict]:
    return [m for m in metrics(run) if m["split"] == "eval"]


def swept(folder: Path, *grids: dict) -> list[Path]:
    """The runs of grids of settings {name: value, or list of values}. Those that are there already
    are used again, and the same command goes on with those that are not."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = folder / "grid.json"
    grid.write_text(json.dumps(grids))
    promptprior("sweep", "--out", folder / "sweep", "--grid", grid)
    return sorted((folder / "sweep/runs").iterdir())


class Scorer:
    """Scores prompts, as {layer: tensor}, on the evaluation data of a run."""

    def __init__(self, run: Path):
        sys.path.insert(0, str(ROOT))
        from lab.evaluation import open_run
        from lab.interpolate import tasks_of

        self.opened = open_run(run, {})
        [(self.data, self.questions)] = tasks_of(self.opened, self.opened).values()

    def __call__(self, layers: dict) -> float:
        """F1 or accuracy, percent."""
        from lab.evaluation import evaluate

        o = self.opened
        scores, _ = evaluate(o.loaded, [o.prompt._replace(layers=layers)], self.questions,
                             o.settings.prompt.place, self.data, "prompt")
        return scores["accuracy" if "accuracy" in scores else "f1"]
