"""The commands: what each takes, and the module that does it. The parser is made from this table.

A new command is a function `command_NAME(given)` in a module of lab, where `given` holds the flags
that the user gave {flag: value}, and an entry in COMMANDS. This module imports no torch, so that
--help answers at once.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from dataclasses import dataclass, fields
from typing import NamedTuple

import data
import priors
from lab.console import UserError, one_line, say
from lab.foreign_data import not_foreign
from lab.settings import (FIELDS, FORGET, DataSettings, ModelSettings, PriorSettings,
                          PromptSettings, TeacherSettings, TrainSettings, flag_name, setting,
                          value_type)


# --------------------------------------------------------------------------------------------------
# options of single commands; a positional argument is a field with a metavar


def argument(metavar: str, help: str, **about):
    """A field that is given by its place and not by a flag."""
    return setting(None, help, metavar=metavar, **about)


@dataclass(frozen=True)
class StepOptions:
    step: str | None = setting(None, "the number of a step, whose prompt is taken, or best: the "
                               "step with the lowest evaluation loss, of taught prompts the one "
                               "that training minimises; without it the last")


TEXT_FILE = setting((), "text prompts from files, one each, such as worked examples",
                    flag_metavar="FILE")
TEACHER_FILE = setting(None, "the teacher's text from a file", flag_metavar="FILE")
UNANSWERABLE = "keep unanswerable questions; their answer is empty"
JSON = "print JSON"


@dataclass(frozen=True)
class TrainOptions:
    resume: bool = setting(False, "go on with the run in --out, to the same bytes")
    config: str | None = setting(None, "begin with the settings of a run's config.json, for the "
                                 "same bytes again; other flags change them", flag_metavar="FILE")
    any_processes: bool = setting(False, "with --resume: go on with another number of processes "
                                  "than the run began with, not to the same bytes")
    overwrite: bool = setting(False, "replace the run in --out")
    text_file: tuple[str, ...] = TEXT_FILE
    teacher_file: str | None = TEACHER_FILE


@dataclass(frozen=True)
class SweepOptions:
    folder: str | None = argument("DIR", "a sweep's folder, to go on with it or to show it",
                                  nargs="?")
    out: str | None = setting(None, "the folder of a sweep to begin, or that this command began",
                              flag_metavar="DIR")
    grid: str | None = setting(
        None, "begin with the settings of a JSON file, {name of a flag: value, or list of values}, "
        "or a list of such grids; other flags replace them", flag_metavar="FILE")
    jobs: int = setting(1, "processes that share the runs, here", above=0, below=257)
    table: bool = setting(False, "show and write the table of the runs that have ended, and train "
                          "nothing")
    margin: float | None = setting(
        None, "points of F1 or accuracy: settings whose difference is shown to be smaller are "
        "called equal; chosen when the sweep begins, before scores are seen (2)", above=0)
    retry: bool = setting(False, "train again the runs that failed")


@dataclass(frozen=True)
class GridOptions:
    text_file: tuple[str, ...] = TEXT_FILE
    teacher_file: str | None = TEACHER_FILE


@dataclass(frozen=True)
class EvalOptions:
    runs: tuple[str, ...] = argument("RUN", "runs' folders; those of one model share batches",
                                     nargs="+")
    spec: str | None = setting(None, "data to evaluate on, a SPEC (the run's evaluation data)",
                               flag="--data", flag_metavar="DATA")
    eval_limit: int | None = setting(None, "most questions, 0 for all (the run's)", least=0,
                                     flag="--limit", flag_metavar="LIMIT")
    text: tuple[str, ...] = setting((), "text prompts to score too (the run's)")
    text_file: tuple[str, ...] = TEXT_FILE
    separator: str | None = setting(None, "what stands between a text prompt and the text (the "
                                    "run's)")
    max_length: int | None = setting(None, "most tokens of a question's text (the run's)", above=0)
    max_new: int | None = setting(None, "most tokens of an answer (the run's)", above=0)
    keep_unanswerable: bool = setting(False, UNANSWERABLE)
    forget: str | None = setting(None, FORGET.replace("--eval-limit", "--limit"),
                                 flag_metavar="SPEC")
    words: bool = setting(False, "score each prompt too with its rows at the token embeddings "
                          "replaced by the nearest tokens: what no token says is the difference")
    ablate: bool = setting(False, "score each prompt too without each of its rows in turn")
    controls: bool = setting(False, "score prompts too that share with each prompt all but one "
                             "property: its draw, steps in random directions, rows in another "
                             "order, ...")
    json: bool = setting(False, JSON)


@dataclass(frozen=True)
class GenerateOptions:
    paths: tuple[str, ...] = argument("RUN|TEXT", "runs' folders, and after them the text to go on "
                                      "from, under the prompt of each", nargs="+")
    batch: str | None = setting(None, 'JSON lines, {"text": "..."} each, in place of TEXT; they '
                                "come back with an answer of each run", flag_metavar="FILE")
    max_new: int | None = setting(None, "most tokens (the run's)", above=0)


@dataclass(frozen=True)
class SampleOptions:
    out: str | None = setting(None, "folder for the rows and a figure for every layer; without it "
                              "nothing is written")
    json: bool = setting(False, JSON)


@dataclass(frozen=True)
class CollectOptions:
    specs: tuple[str, ...] = setting(("squad",), "data, SPECs or NAME=SPEC, each a domain of its "
                                     "own", flag="--data", flag_metavar="SPEC")
    under: str | None = setting(None, "with a run's prompt in front of every text, and its rows "
                                "collected too", flag_metavar="RUN")
    out: str = setting("activations.safetensors", "the file to write")
    layers: tuple[str, ...] = setting(
        (), "layers whose inputs are kept, as in 0 8 16 or 0,8,16, or all; the model's number of "
        "layers is what comes after the final norm (the first, the middle, the end)")
    examples: int = setting(1000, "examples of each SPEC, drawn at random; 0 for all", least=0)
    limit: int = setting(20000, "rows of each SPEC, whole examples drawn at random; 0 for all",
                         least=0)
    pool: str = setting("token", "token: a row a token; mean: an example's mean; last: its last "
                        "token", choices=("token", "mean", "last"))
    roles: tuple[str, ...] = setting((), "tokens of these roles: some of bos context question "
                                     "answer text (all)")
    max_length: int | None = setting(None, "most tokens of an example (1024, or what fits)",
                                     above=0)
    seed: int = setting(0, "seed of what is drawn at random", least=0)
    overwrite: bool = setting(False, "replace the file")


@dataclass(frozen=True)
class CompareOptions:
    paths: tuple[str, ...] = argument("RUN|FILE", "runs' folders, collections' files", nargs="+")
    json: bool = setting(False, JSON)


@dataclass(frozen=True)
class InterpolateOptions:
    run_a: str | None = argument("RUN_A", "where t is 0")
    run_b: str | None = argument("RUN_B", "where t is 1")
    points: int = setting(11, "prompts, the two ends among them", above=1, below=10**4 + 1)
    eval_limit: int | None = setting(None, "most questions, 0 for all (theirs)", least=0,
                                     flag="--limit", flag_metavar="LIMIT")
    out: str | None = setting(None, "folder for curve.jsonl (RUN_A-to-RUN_B)")
    json: bool = setting(False, JSON)


@dataclass(frozen=True)
class AttentionOptions:
    run: str | None = argument("RUN", "a run's folder")
    limit: int = setting(32, "questions", above=0)
    json: bool = setting(False, JSON)


@dataclass(frozen=True)
class FigureOptions:
    numbers: tuple[int, ...] = argument("N", "figures, by their numbers (all)", nargs="*",
                                        number=True)
    out: str = setting("figures", "folder for the figures and for what they are made from, which "
                       "is kept")
    text_data: str = setting("text", "prose, as the paper's C4: a SPEC")
    squad_data: str = setting("squad", "questions on texts: a SPEC")
    math_data: str = setting("math", "arithmetic, a module a file: a SPEC")
    steps: int = setting(200, "training steps of each of the six runs", least=0)
    eval_limit: int = setting(200, "most questions evaluated; 0 for all", least=0)
    batch_size: int = setting(16, "examples a step", above=0, below=2**16 + 1)
    examples: int = setting(1000, "examples of each SPEC, drawn at random; 0 for all", least=0)
    limit: int = setting(5000, "activations of each SPEC and layer, whole examples drawn at "
                         "random; 0 for all", least=0)
    seed: int = setting(0, "seed of runs and of what is drawn at random", least=0)


@dataclass(frozen=True)
class PlotOptions:
    runs: tuple[str, ...] = argument("RUN", "runs' folders", nargs="+")
    out: str | None = setting(None, "where the page goes (report.html in the first RUN's folder)",
                              flag_metavar="FILE")
    in_characters: bool = setting(False, "print each layer's plane in characters, and write "
                                  "nothing", flag="--text")
    overwrite: bool = setting(False, "replace the page in --out")


@dataclass(frozen=True)
class ExportOptions:
    run: str | None = argument("RUN", "a run's folder")
    to: str | None = setting(None, "the adapter's folder; with --for, the file of rows",
                             flag_metavar="PATH")
    form: str = setting("peft", "the program that is to load it: peft, any prompt in front of the "
                        "text; vllm, llama.cpp or numpy, rows at the token embeddings alone "
                        "(docs/serving.md)", flag="--for", flag_metavar="PROGRAM",
                        choices=("peft", "vllm", "llama.cpp", "numpy"))
    csv: str | None = setting(None, "metrics.jsonl as CSV, a line a record (printed)", nargs="?",
                              const="-", flag_metavar="FILE")
    overwrite: bool = setting(False, "replace what export made")


@dataclass(frozen=True)
class ImportOptions:
    adapter: str | None = argument("DIR", "the adapter's folder, or a .npy file of rows "
                                   "(n, width)")
    out: str | None = setting(None, "the run's folder", flag_metavar="RUN", required=True)
    overwrite: bool = setting(False, "replace the run in --out")


# --------------------------------------------------------------------------------------------------
# the table


NOT_IN_GRIDS = ("out", "shard")  # flags of train that a sweep gives itself, or cannot give


class Command(NamedTuple):
    module: str  # of lab; it has a function command_NAME
    help: str
    options: tuple[type, ...]  # dataclasses whose fields are the command's flags
    stored: tuple[type, ...] = ()  # the same, whose defaults are those of a run
    stored_default: str = "(the run's)"  # in their help
    lists_priors: bool = False  # --help ends with the priors
    every_process: bool = False  # all processes of torchrun run it, not the first alone
    grid: tuple[type, ...] = ()  # the same; each flag takes several values, given as "grid.FLAG"
    unused: tuple[str, ...] = ()  # fields of options that the command has no use for


COMMANDS = {
    "train": Command(
        "train", "Tune a prompt, starting from a draw of a prior.",
        (ModelSettings, PriorSettings, PromptSettings, DataSettings, TrainSettings,
         TeacherSettings, TrainOptions),
        lists_priors=True, every_process=True),
    "sweep": Command(
        "sweep", "Train a grid of runs, every combination of the values of train's flags, in any "
        "number of processes; then tell with intervals which differ, and which are equal. A flag "
        "that takes several values, as --reference, is given again for the next of them.",
        (SweepOptions,), lists_priors=True, every_process=True,
        grid=(ModelSettings, PriorSettings, PromptSettings, DataSettings, TrainSettings,
              TeacherSettings, GridOptions)),
    "eval": Command(
        "evaluation", "Score the prompts of runs beside no prompt and a text prompt.",
        (EvalOptions, StepOptions), (ModelSettings,)),
    "generate": Command(
        "evaluation", "Continue a text under the prompts of runs, to the end of the line.",
        (GenerateOptions, StepOptions), (ModelSettings,)),
    "sample": Command(
        "sample", "Draw rows from a prior, report on them and picture them.",
        (ModelSettings, PriorSettings, DataSettings, SampleOptions),
        unused=("separator", "max_new", "batch_size", "share", "forget"), lists_priors=True),
    "collect": Command(
        "activations", "Keep activations of data at chosen layers, with the role of every row, in "
        "one safetensors file. The model may be the encoder of a T5, too.",
        (ModelSettings, CollectOptions, StepOptions)),
    "compare": Command(
        "compare", "Measure the geometry of runs (where rows started and ended, and what they "
        "say), or of collections (are domains apart, are texts local).",
        (CompareOptions, StepOptions), (ModelSettings,)),
    "interpolate": Command(
        "interpolate", "Score the prompts on the straight line between two runs' prompts, on the "
        "tasks of both.", (InterpolateOptions, StepOptions), (ModelSettings,)),
    "attention": Command(
        "attention", "Measure what a run's prompt does to attention: the share it takes, what it "
        "changes among content, the directions it adds.", (AttentionOptions, StepOptions),
        (ModelSettings,)),
    "figures": Command(
        "figures", "Draw the paper's figures, and measure what each shows. For figure 5 the model "
        "may be the encoder of a T5, as in the paper.",
        (ModelSettings, FigureOptions)),
    "plot": Command(
        "page", "Draw runs: a page to explore, report.html, and for every layer the reference, the "
        "prior's draw and the trained rows.", (PlotOptions, StepOptions), (ModelSettings,)),
    "export": Command(
        "adapters", "Write a run's prompt as an adapter that PEFT loads, or as rows for vLLM, "
        "llama.cpp or numpy; or its log as a table.",
        (ExportOptions, StepOptions), (ModelSettings,)),
    "import": Command(
        "adapters", "Make a run's folder of a prompt that PEFT trained, or of rows in numpy's "
        "format, for eval, generate, compare, plot and --prior posterior:RUN.",
        (DataSettings, ImportOptions), (ModelSettings,), unused=("train_examples", "hold_out"),
        stored_default="(the adapter's, or that of train)"),
}


# --------------------------------------------------------------------------------------------------
# the parser


class Parser(argparse.ArgumentParser):
    lists_priors = False  # whether --help ends with the priors
    commands: dict[str, Parser]  # of the whole program's parser, by their names

    def format_help(self) -> str:
        if self.lists_priors:
            self.epilog = prior_help()
        return super().format_help()

    def error(self, message: str):
        say(f"promptprior: error: {one_line(message)}: see `{self.prog} --help`")
        self.exit(2)


def parse(arguments: list[str], description: str) -> tuple[str, dict]:
    """The command's name, and the flags that were given {name: value}."""
    top = parser(description, arguments)
    known, unknown = top.parse_known_args(arguments)
    given = vars(known)
    command = given.pop("command")
    if unknown:  # a mistake, or more paths after a flag, at which a list of paths ends for argparse
        rest = [*arguments]
        rest.remove(command)
        given = vars(top.commands[command].parse_intermixed_args(rest))
    for text in arguments:
        if any("\ud800" <= c <= "\udfff" for c in text):  # Python's stand-in for bytes not UTF-8
            top.error(f"{ascii(text)}: not UTF-8: rename the file, or convert the text")
    # In a grid a flag that may stand without a value has this one then.
    for name, value in given.items():
        if name.startswith("grid.") and value == []:
            given[name] = [FIELDS[name.removeprefix("grid.")].metadata["const"]]
    return command, given


def resolved(given: dict) -> dict:
    """Flags {name: value} with the text prompts and the teacher of files among the others, without
    empty text prompts, and with the line breaks and tabs that a separator names. Raises DataError
    or UserError for a file that cannot be read, and for two teachers."""
    given = dict(given)
    if "text_file" in given:
        texts = [_text_of(path) for path in given.pop("text_file")]
        given["text"] = [*given.get("text", []), *texts]
    if "teacher_file" in given:
        if "teacher" in given:
            raise UserError("--teacher and --teacher-file: a run has one teacher: give one of the "
                            "two")
        given["teacher"] = _text_of(given.pop("teacher_file"))
    if "text" in given:
        given["text"] = [text for text in given["text"] if text]
    if "separator" in given:
        given["separator"] = given["separator"].replace("\\n", "\n").replace("\\t", "\t")
    return given


def _text_of(path: str) -> str:
    return data.read_text(not_foreign(path), most=2**20).rstrip("\n")


def parser(description: str, arguments: list[str]) -> Parser:
    """The parser of these arguments. Only commands that are among them have their flags, because
    those of all take ten milliseconds."""
    top = Parser(prog="promptprior.py", description=description, allow_abbrev=False,
                 epilog="`promptprior.py COMMAND --help` lists a command's options.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    top.commands = commands.choices
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        if name not in arguments:
            continue
        sub.lists_priors = command.lists_priors
        for kind in command.stored:
            for f in fields(kind):
                add_field(sub, f, default=command.stored_default)
        for kind in command.options:
            for f in fields(kind):
                if f.name not in command.unused:
                    add_field(sub, f)
        for kind in command.grid:
            for f in fields(kind):
                if f.name not in NOT_IN_GRIDS:
                    add_field(sub, f, several=True)
    return top


def add_field(sub: argparse.ArgumentParser, f, default: str = "", several: bool = False) -> None:
    """Add the argument or the flags of one field of settings. default: what the help says of it,
    other than the field's own. several: they make a list of values, and are given as
    "grid.FLAG"."""
    about, dest = f.metadata, f"grid.{f.name}" if several else f.name
    kind = int if about.get("number") else value_type(f)
    help = about["help"].replace("%", "%%")
    if "metavar" in about:
        sub.add_argument(f.name, metavar=about["metavar"], help=help, nargs=about.get("nargs"),
                         type=int if kind is int else str)
        return
    if "switches" in about:
        group = sub if several else sub.add_mutually_exclusive_group()
        for switch, (value, text) in about["switches"].items():
            group.add_argument(f"--{switch}", dest=dest, const=value, help=text.replace("%", "%%"),
                               action="append_const" if several else "store_const")
        return
    flag = about.get("flag") or flag_name(f.name)
    if kind is bool:
        sub.add_argument(flag, dest=dest, const=True, help=help,
                         action="append_const" if several else "store_const")
        return
    if default:  # the help of what follows from other settings ends with its own
        help = f"{re.sub(r' [(][^()]*[)]$', '', help)} {default}"
    elif about.get("show_default", True) and f.default not in (None, ()):
        help = f"{help} ({' '.join(f.default) if kind is tuple else f.default})"
    is_list = several or kind is tuple
    sub.add_argument(flag, dest=dest, type=str if kind is tuple else kind,
                     nargs=about.get("nargs") if not is_list else "*" if "const" in about else "+",
                     action="append" if several and kind is tuple else "store",
                     const=None if is_list else about.get("const"),
                     required=about.get("required", False), help=help,
                     metavar=about.get("flag_metavar") or f.name.upper().split("_")[-1])


def prior_help() -> str:
    """Every prior, its options with their defaults, and the first paragraph of its docstring."""
    lines = ["priors and their options:"]
    for name, prior in priors.PRIORS.items():
        options = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                   for key, value in priors.options(name).items()]
        if prior.sources:
            options.insert(0, "RUN")
        lines.append(f"  {name}:{','.join(options)}" if options else f"  {name}")
        about = " ".join((prior.__doc__ or "").split("\n\n")[0].split())
        lines.append(textwrap.fill(about, 76, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)
