"""promptprior: tune the prompt of a frozen LLaMA from a chosen prior, and see where it ends up.

    python promptprior.py train --prior exclusion --deep-layers 3
    python promptprior.py plot runs/squad-exclusion-deep3-seed0

This file is the command line: it reads arguments, and turns what goes wrong into one line. The
commands are in experiments.py and analysis.py, imported when they are called, so that --help
answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import textwrap

import priors
from settings import (COLLECT, DATA, FIGURE, FIRST, MODEL, PRIOR, SAMPLE, SWITCHES, TRAIN, kind_of,
                      one_line, out_of_memory, say, show)

# their own ValueErrors are the user's mistakes
MODULES = {"activations", "adapters", "analysis", "compare", "data", "experiments", "figures",
           "geometry", "llama", "loading", "pictures", "posteriors", "priors", "references",
           "report", "run", "settings", "train", "viz"}
# where each command is, in a function of its name: command_train and so on
COMMANDS = {**dict.fromkeys(("train", "eval", "generate", "export", "import"), "experiments"),
            **dict.fromkeys(("sample", "collect", "compare", "interpolate", "attention", "figures",
                             "plot"), "analysis")}


def prior_help() -> str:
    lines = ["priors and their options:"]
    for name, prior in priors.PRIORS.items():
        shown = ",".join(["RUN"] * prior.sources
                         + [f"{k}={v:g}" for k, v in priors.options(name).items()])
        about = " ".join(prior.__doc__.split("\n\n")[0].split())
        lines.append(f"  {name}{':' * bool(shown)}{shown}\n" + textwrap.fill(
            about, 76, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        say(f"promptprior: error: {one_line(message)}: see `{self.prog} --help`")
        self.exit(2)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="promptprior.py", description=__doc__.splitlines()[0], allow_abbrev=False,
               epilog="`promptprior.py COMMAND --help` lists a command's options.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, groups: list[dict], epilog: str = ""):
        c = commands.add_parser(name, help=help, description=help,
                                argument_default=argparse.SUPPRESS, epilog=epilog,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
        for flag, (default, text) in (item for group in groups for item in group.items()):
            shown = f"{text} ({default})" if default is not None else text
            c.add_argument("--" + flag.replace("_", "-"), type=kind_of(flag, default),
                           nargs="+" if flag == "reference" else None,
                           metavar=flag.upper().split("_")[-1], help=shown.replace("%", "%%"))
        return c

    unanswerable = {"action": "store_true",
                    "help": "keep unanswerable questions; their answer is empty"}
    c = command("train", "Tune a prompt, starting from a draw of a prior.",
                [MODEL, PRIOR, DATA, TRAIN], prior_help())
    which = c.add_mutually_exclusive_group()
    which.add_argument("--cut", action="store_true", help=SWITCHES["cut"])
    which.add_argument("--keep", dest="cut", action="store_false", help=SWITCHES["keep"])
    c.add_argument("--no-share", dest="share", action="store_false",
                   help="shuffle single questions and compute every context anew; the same loss, "
                        "only slower")
    c.add_argument("--no-trunk", dest="trunk", action="store_false",
                   help="with --tokens 0, work out the layers below the rows anew in every epoch")
    c.add_argument("--shard", action="store_true",
                   help="under torchrun, divide the model's weights among the processes (FSDP2)")
    c.add_argument("--recompute", action="store_true",
                   help="keep no activations inside a layer for the backward pass: less memory, "
                        "a third more work")
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--resume", action="store_true",
                   help="go on with the run in --out, to the same bytes")
    c.add_argument("--config", metavar="FILE", help="begin with the settings of a run's "
                   "config.json, for the same bytes again; other flags change them")
    c.add_argument("--overwrite", action="store_true", help="replace the run in --out")

    some = {k: (None, text) for k, (_, text) in MODEL.items() if k in (
        "model", "revision", "device", "dtype")}
    c = command("eval", "Score a run's prompt beside no prompt and a text prompt.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("--data", help="data to evaluate on, a SPEC (the run's evaluation data)")
    c.add_argument("--limit", dest="eval_limit", type=int,
                   help="most questions, 0 for all (the run's)")
    c.add_argument("--text", dest="texts", nargs="+", metavar="TEXT",
                   help="text prompts to score beside it (the run's)")
    c.add_argument("--max-length", type=int, help="most tokens of a question's text (the run's)")
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("generate", "Continue a text under a run's prompt, to the end of the line.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("prompt_text", metavar="TEXT", nargs="?", help="the text to go on from")
    c.add_argument("--batch", metavar="FILE", help='JSON lines, {"text": "..."} each, in place of '
                   "TEXT; they come back with an answer each")
    c.add_argument("--max-new", type=int, help="most tokens (the run's)")

    c = command("sample", "Draw rows from a prior, report on them and picture them.",
                [MODEL, PRIOR, DATA, SAMPLE], prior_help())
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("collect", "Keep activations of data at chosen layers, with the role of every row, "
                "in one safetensors file.", [MODEL, COLLECT])
    c.add_argument("--data", dest="domains", nargs="+", metavar="SPEC",
                   help="data, SPECs or NAME=SPEC, each a domain of its own (squad)")
    c.add_argument("--under", metavar="RUN", help="with a run's prompt in front of every text, and "
                   "its rows collected too")
    c.add_argument("--max-length", type=int, help="most tokens of an example (1024, or what fits)")
    c.add_argument("--overwrite", action="store_true", help="replace the file")

    c = command("compare", "Measure the geometry of runs (where rows started and ended, and what "
                "they say), or of collections (are domains apart, are texts local).", [some])
    c.add_argument("paths", metavar="RUN|FILE", nargs="+", help="runs' folders, collections' files")
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("interpolate", "Score the prompts on the straight line between two runs' prompts, "
                "on the tasks of both.", [some])
    c.add_argument("run_a", metavar="RUN_A", help="where t is 0")
    c.add_argument("run_b", metavar="RUN_B", help="where t is 1")
    c.add_argument("--points", type=int, help="prompts, the two ends among them (11)")
    c.add_argument("--limit", dest="eval_limit", type=int,
                   help="most questions, 0 for all (theirs)")
    c.add_argument("--out", help="folder for curve.jsonl (RUN_A-to-RUN_B)")
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("attention", "Measure what a run's prompt does to attention: the share it takes, "
                "what it changes among content, the directions it adds.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("--limit", type=int, help="questions (32)")
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("figures", "Draw the paper's figures, and measure what each shows.",
                [MODEL, FIGURE])
    c.add_argument("numbers", metavar="N", nargs="*", type=int, help="figures, 1 to 13 (all)")

    c = command("plot", "Draw runs: a page to explore, report.html, and for every layer the "
                "reference, the prior's draw and the trained rows.", [some])
    c.add_argument("runs", metavar="RUN", nargs="+", help="runs' folders")
    c.add_argument("--out", metavar="FILE", help="where the page goes (report.html in the first "
                   "RUN's folder)")
    c.add_argument("--text", action="store_true",
                   help="print each layer's plane in characters, and write nothing")

    c = command("export", "Write a run's prompt as an adapter that PEFT loads, or its log as a "
                "table.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("--to", metavar="DIR", help="the adapter's folder")
    c.add_argument("--csv", metavar="FILE", nargs="?", const="-",
                   help="metrics.jsonl as CSV, a line a record (printed)")
    c.add_argument("--overwrite", action="store_true",
                   help="replace an adapter or a table that export made")

    c = command("import", "Make a run's folder of a prompt that PEFT trained, or of rows in "
                "numpy's format, for eval, generate, compare, plot and --prior posterior:RUN.",
                [{**MODEL, "model": (None, MODEL["model"][1] + " (the adapter's own)")}, DATA])
    c.add_argument("adapter", metavar="DIR", help="the adapter's folder, or a .npy file of rows "
                   "(n, width)")
    c.add_argument("--out", metavar="RUN", required=True, help="the run's folder")
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    given = vars(p.parse_args(argv))
    for text in sys.argv[1:] if argv is None else argv:
        if any("\ud800" <= c <= "\udfff" for c in text):  # so Python stands for other bytes
            p.error(f"{ascii(text)}: not UTF-8: rename the file, or convert the text")
    if given["command"] != "train" and not FIRST:
        return 0  # no other command has work for several processes
    try:
        command = given.pop("command")
        getattr(importlib.import_module(COMMANDS[command]), f"command_{command}")(given)
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at the end
        status = -signal.SIGPIPE
    except KeyboardInterrupt:
        say("promptprior: stopped; a run that has begun goes on with train --out RUN --resume")
        status = -signal.SIGINT
    except Exception as e:
        status = exit_status(e)
        if status is None:
            raise
        text = f"{'error: ' * (status > 0)}{one_line(message(e))}"
        say(f"promptprior: {text}")
        if not FIRST and status > 0 and joined():  # it may be this one's alone
            show(f"promptprior: process {os.environ['RANK']}: {text}", sys.stderr)
    else:
        return 0
    if status < 0:  # end by the signal itself, so that a calling shell or scheduler sees it
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def joined() -> bool:
    """Whether the processes have met: what one says until then, all say."""
    from train import world

    return world()[1] > 1


def exit_status(e: Exception) -> int | None:
    """2 for a user's mistake, 1 for what failed under way, minus a signal's number; None for
    a fault of ours."""
    if isinstance(e, ValueError) and type(e).__module__ in MODULES:
        return 2
    # train.Stopped brings its own
    return getattr(e, "status", 1 if isinstance(e, OSError) or out_of_memory(e) else None)


def message(e: Exception) -> str:
    """What, where, and the remedy."""
    if isinstance(e, OSError) and e.strerror and e.filename:
        return f"{e.filename}: {e.strerror}: check the path, and who may use it"
    if out_of_memory(e) and not hasattr(e, "status"):
        return (f"memory does not suffice ({e or 'no more of it'}): lower --batch-size, "
                "--max-length or --limit, or use a smaller model")
    return str(e) or type(e).__name__


if __name__ == "__main__":
    sys.exit(main())
