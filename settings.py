"""From what the user asked for to settings, and how the program speaks.

Settings are one flat namespace, `a` everywhere: the flags of train and their defaults are the
tables below, and a run's config.json holds them resolved. torch is imported where it is used, so
that --help answers at once.
"""

from __future__ import annotations

import math
import os
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import priors

TINY = Path(__file__).resolve().parent / "tiny"
# kind -> training and evaluation data under tiny/
BUNDLED = {"squad": ("squad/train.json", "squad/dev.json"),
           "math": ("math/train-easy", "math/interpolate"), "text": ("text", "text")}
TOKENS = 20  # rows a layer, as in the paper
REFERENCE_ROWS = 20000
CHOICES = {"posterior": ("point", "svgd", "gaussian"), "method": ("prompt", "prefix"),
           "reparam": ("none", "shared", "mlp"), "place": ("before", "after-bos", "suffix")}
BUNDLED_TEXT = "short answer"  # the header that the bundled model was pre-trained with

# flag -> (default, help); a default of None is explained in the help
MODEL = {
    "model": ("tiny", "model folder in Hugging Face's layout, or NAME/MODEL of the hub, from the "
                      "cache or fetched; tiny is the bundled one"),
    "revision": (None, "branch, tag or commit of a model of the hub (main; a run keeps the "
                       "commit)"),
    "device": (None, "cpu, cuda, cuda:1 ... (cuda when there is one)"),
    "dtype": (None, "float32, bfloat16 or float16 of the frozen weights "
                    "(bfloat16 on cuda, else float32)"),
    "seed": (0, "seed of the prior's draw and of the data's order"),
}
PRIOR = {
    "prior": ("vocab", "prior of the rows, NAME or NAME:option=value,...; see below"),
    "reference": (None, "what priors are fitted on, one or more of: vocab (each token once), a "
                        "data SPEC (tokens as the data uses them), collection:FILE or "
                        "collection:FILE#DOMAIN. At deep layers it is activations, for vocab those "
                        "of --data. Several are one population, but for interpolation two "
                        "(vocab; text math for interpolation, as in the paper)"),
    "reference_rows": (None, "rows of each reference but vocab (at most 20000)"),
    "text": (None, "the text of the prior text, also scored as a plain text prompt "
                   "('short answer' for tiny)"),
    "tokens": (TOKENS, "rows at the token embeddings; 0 for none, then deep layers have 20"),
    "deep_layers": (0, "how many of the last layers own rows too"),
}
DATA = {
    "data": ("squad", "training data, a SPEC: squad:PATH, math:PATH, hendrycks:PATH or text:PATH, "
                      "a file, folder or pattern; squad, math and text alone are the bundled ones"),
    "eval_data": (None, "evaluation data, a SPEC "
                        "(the bundled one's, or a tenth of --data held out)"),
    "train_examples": (0, "training questions, drawn at random; 0 for all"),
    "eval_limit": (200, "most questions evaluated; 0 for all"),
    "max_length": (None, "most tokens of context, question and answer; longer contexts are cut "
                         "(1024, or what fits)"),
    "max_new": (32, "most tokens of a generated answer"),
    "batch_size": (16, "examples a step"),
}
TRAIN = {
    "steps": (200, "training steps"),
    "lr": (None, "peak learning rate of AdamW (at every layer a twentieth of its reference's root "
                 "mean square, which is 1e-3 at the token embeddings of LLaMA 3.2 1B; of --reparam "
                 "a fifth over the network's width)"),
    "warmup": (10, "steps of linear warm-up"),
    "clip": (1.0, "largest norm of the gradient"),
    "skip_bad_steps": (0, "steps whose loss or gradient is not finite that may be left out before "
                          "the run stops"),
    "prior_weight": (None, "weight of the prior's log density in the loss; 1 gives the MAP "
                           "estimate (0; 1 with --posterior svgd or gaussian)"),
    "method": ("prompt", "prompt: rows at layers' inputs; prefix: keys and values, given directly, "
                         "which begin as those of the prior's rows (prefix tuning)"),
    "prefix_layers": (None, "how many of the last layers --method prefix gives keys and values "
                            "(all)"),
    "reparam": ("none", "none; mlp: rows come from one vector each, through a network common to "
                        "all layers; shared: a key and its value come from one vector (prefix)"),
    "place": ("before", "where the prompt stands: before BOS and text, after-bos, or suffix, "
                        "before the last token that asks for the answer"),
    "posterior": ("point", "what is trained: point, one prompt; svgd, several that follow the "
                           "posterior's gradient and keep apart; gaussian, a mean and a standard "
                           "deviation for every number of the rows"),
    "particles": (8, "prompts of --posterior svgd; draws that stand for a gaussian in eval"),
    "eval_every": (None, "steps between evaluations and checkpoints (a quarter of --steps)"),
    "snapshot_every": (None, "steps between snapshots of the rows in prompts/, beside those at "
                             "evaluations (a twentieth of --steps)"),
    "trunk_memory": (4.0, "GiB of the device's memory, per process, for the inputs of the first "
                          "layer with rows, worked out once for all epochs when no rows are at the "
                          "tokens; more goes to a file in the run's folder, removed at the end"),
    "out": (None, "the run's folder (runs/ and a name made of the settings)"),
}
SAMPLE = {"out": (None, "folder for the rows and a figure for every layer; "
                        "without it nothing is written")}
COLLECT = {
    "out": ("activations.safetensors", "the file to write"),
    "layers": (None, "layers whose inputs are kept, as in 0,8,16, or all; the model's number of "
                     "layers is what comes after the final norm (the first, the middle, the end)"),
    "examples": (1000, "examples of each SPEC, drawn at random; 0 for all"),
    "limit": (20000, "rows of each SPEC, whole examples drawn at random; 0 for all"),
    "pool": ("token", "token: a row a token; mean: an example's mean; last: its last token"),
    "roles": (None, "tokens of these roles: some of bos,context,question,answer,text (all)"),
}
FIGURE = {
    "out": ("figures", "folder for the figures and for what they are made from, which is kept"),
    "text_data": ("text", "prose, as the paper's C4: a SPEC"),
    "squad_data": ("squad", "questions on texts: a SPEC"),
    "math_data": ("math", "arithmetic, a module a file: a SPEC"),
    "steps": (200, "training steps of each of the six runs"),
    "eval_limit": (200, "most questions evaluated; 0 for all"),
    "batch_size": (16, "examples a step"),
    "examples": (1000, "examples of each SPEC, drawn at random; 0 for all"),
    "limit": (5000, "activations of each SPEC and layer, whole examples drawn at random; 0 for "
                    "all"),
}
POSITIVE = {"particles", "batch_size", "max_new", "eval_every", "snapshot_every", "max_length",
            "reference_rows", "lr", "clip"}
NOT_NEGATIVE = {"prefix_layers", "train_examples", "steps", "skip_bad_steps", "tokens",
                "deep_layers", "eval_limit", "warmup", "seed", "prior_weight", "trunk_memory",
                "examples", "limit"}
# particles and rows are in memory, a rate is a number of 32 bits
MOST = {"particles": 1000, "batch_size": 2**16, "lr": 1e30}
FLOATS = {"lr", "clip", "prior_weight", "trunk_memory"}
# numbers that have no default
COUNTS = {"max_length", "eval_every", "snapshot_every", "reference_rows", "prefix_layers"}
SWITCHES = {"cut": "drop the rows' outputs at each layer, as in the paper's deep prompt tuning "
                   "(default with --deep-layers)",
            "keep": "let the rows' outputs go on through the layers, as in prompt tuning "
                    "(default without)"}

DEFAULT_SWITCHES = {"cut": None, "share": True, "trunk": True, "shard": False, "recompute": False,
                    "keep_unanswerable": False}

# of the processes that torchrun starts the first one speaks
FIRST = "MASTER_ADDR" not in os.environ or int(os.environ.get("RANK", 0)) == 0


class UserError(ValueError):
    """A mistake on the command line: what, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# settings


CONTROL = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
                     r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
                     r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text without what a terminal obeys: escape sequences, control characters but line break and
    tab, marks that turn the direction of writing. Data, vocabularies and names of files may hold
    any."""
    return CONTROL.sub("", text)


def one_line(text: str) -> str:
    """Clean, and no longer than can be read: what and where it says first, the remedy last."""
    text = " ".join(clean(text).split())
    return text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}"


def show(text: str, file=None) -> None:
    """Print, clean, what comes from anywhere; a character that the terminal has not is escaped."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(clean(text).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def out_of_memory(e: Exception) -> bool:
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or isinstance(
        e, RuntimeError) and any(text in str(e) for text in (
            "not enough memory", "out of memory", "can't allocate memory"))


def say(text: str) -> None:
    if FIRST:
        show(text, sys.stderr)


def settings_of(given: dict, *groups: dict) -> SimpleNamespace:
    """What the user gave over the groups' defaults, and those that follow from other settings."""
    a = SimpleNamespace(**{flag: default for group in groups
                           for flag, (default, _) in group.items()},
                        **DEFAULT_SWITCHES)
    vars(a).update(given)
    check_ranges(a)
    if a.device is None:
        import torch

        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    a.dtype = a.dtype or ("bfloat16" if a.device.startswith("cuda") else "float32")
    if a.text is None:
        a.text = BUNDLED_TEXT if a.model == "tiny" else ""
    name, _, sources = priors.parse(a.prior)
    a.cut = bool(a.deep_layers) if a.cut is None else a.cut
    a.eval_data = a.data if a.eval_data is None and a.data in BUNDLED else a.eval_data
    if a.model != "tiny" and not on_hub(a.model):
        a.model = os.path.abspath(a.model)  # runs open from anywhere
    a.data, a.eval_data = absolute(a.data), absolute(a.eval_data)
    a.reference = [*map(absolute, a.reference or (
        ["text", "math"] if name == "interpolation" else ["vocab"]))]
    if sources:
        rest = a.prior.split(":", 1)[1].split(",")
        a.prior = f"{name}:{','.join(os.path.abspath(r) if r in sources else r for r in rest)}"
    if groups[-1] is TRAIN:
        a.eval_every = a.eval_every or max(1, a.steps // 4)
        a.snapshot_every = a.snapshot_every or max(1, a.steps // 20)
        if a.prior_weight is None:
            a.prior_weight = float(a.posterior != "point")
        if a.prior_weight and not priors.PRIORS[name].has_density:
            flag = "--prior-weight" if a.posterior == "point" else f"--posterior {a.posterior}"
            raise UserError(f"{flag}: the prior {name} has no density to follow: use one of "
                            f"{', '.join(n for n, p in priors.PRIORS.items() if p.has_density)}"
                            f"{', or --prior-weight 0' * (a.posterior == 'svgd')}")
        if a.method == "prefix":
            if a.prior_weight or a.posterior != "point":
                raise UserError("--method prefix trains keys and values, over which no prior has a "
                                "density: leave out --prior-weight and --posterior, or use "
                                "--method prompt")
            if a.deep_layers:
                raise UserError("--method prefix has keys and values at layers, not rows: give "
                                "--prefix-layers instead of --deep-layers")
            if a.cut:
                raise UserError("--method prefix has no rows, so no outputs to --cut: leave it out")
        elif a.prefix_layers or a.reparam == "shared":
            flag = "prefix-layers" if a.prefix_layers else "reparam shared"
            raise UserError(f"--{flag} is for --method prefix: give that too")
        if a.reparam != "none" and a.posterior != "point":
            raise UserError("--reparam trains one prompt: leave out --posterior")
        if a.posterior == "gaussian" and not a.prior_weight:
            raise UserError("--posterior gaussian needs the prior, or its deviations only shrink: "
                            "give --prior-weight above 0")
    return a


def absolute(spec: str | None) -> str | None:
    """A SPEC with its path from the root, so that a run opens from anywhere."""
    kind, colon, path = (spec or "").partition(":")
    return f"{kind}:{os.path.abspath(path)}" if path else spec


def check_ranges(a: SimpleNamespace) -> None:
    for flag, known in CHOICES.items():
        if getattr(a, flag, known[0]) not in known:
            raise UserError(f"--{flag} {getattr(a, flag)}: use one of {', '.join(known)}")
    for flag, value in vars(a).items():
        # a seed is a 64-bit number
        most = MOST.get(flag, math.inf if isinstance(value, float) else 2**40 - 1) + 1
        if flag in POSITIVE and value is not None and not 0 < value < most:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected more than 0, and less "
                            f"than {most}")
        if flag in NOT_NEGATIVE and value is not None and not 0 <= value < most:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected 0 or more, and less "
                            f"than {most}")


def kind_of(flag: str, default) -> type:
    """The type of a flag's value."""
    return float if flag in FLOATS else int if flag in COUNTS or isinstance(default, int) else str


def stored_settings(config: dict, path: str | Path = "config.json") -> dict:
    """A run's settings, with what later versions ask for as it was then. Raises UserError for what
    no flag can have given."""
    groups = {**MODEL, **PRIOR, **DATA, **TRAIN}
    stored = {**{flag: default for flag, (default, _) in groups.items()}, **DEFAULT_SWITCHES,
              "trunk": False, **config["settings"]}
    if isinstance(stored["reference"], str):  # one, of at most so many rows
        stored |= {"reference": [stored["reference"]], "reference_rows": None}
    text = lambda x: isinstance(x, str) and "\0" not in x and len(x) < 2**20
    fits = {str: text, int: lambda x: type(x) is int, float: lambda x: type(x) in (int, float)}
    for flag, value in stored.items():
        if flag == "reference":
            right = isinstance(value, list) and value and all(map(text, value))
        elif flag in DEFAULT_SWITCHES:
            right = type(value) is bool
        elif flag in groups:
            default = groups[flag][0]
            right = fits[kind_of(flag, default)](value) or value is None and default is None \
                and flag not in ("device", "dtype", "text", "eval_every", "prior_weight")  # settled
        else:
            right = True  # of another version
        if not right:
            raise UserError(f"{path}: the setting {flag} is {value!r:.80}, which no run has: "
                            "restore the file")
    try:
        check_ranges(SimpleNamespace(**stored))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return stored


def over(stored: dict, given: dict) -> dict:
    """A run's settings, and over them what is given now; a revision is one model's."""
    return {**stored, **({"revision": None} if "model" in given else {}), **given}


def flags_of(config: dict) -> list[str]:
    """The settings of a config.json that somebody gave; runs of old do not say, and all may be."""
    return config.get("given", [*config["settings"]])


def again(config: dict, given: dict) -> dict:
    """What begins another run like that of a config.json with other flags: its settings, but for
    those that nobody gave and that followed from others, for now they may follow from other ones.
    The device, the dtype and the model's commit stay."""
    stored = stored_settings(config)
    kept = {"device", "dtype", "revision", *flags_of(config)}
    free = {flag for group in (MODEL, PRIOR, DATA, TRAIN) for flag, (default, _) in group.items()
            if default is None} | {"cut"}
    return over({k: v for k, v in stored.items()
                 if k not in ("out", "imported") and (k in kept or k not in free)}, given)


# --------------------------------------------------------------------------------------------------
# names


def on_hub(model: str) -> bool:
    """Whether this is no folder and could be the hub's name of a model."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII)) \
        and not os.path.exists(model)


def imported(a: SimpleNamespace) -> bool:
    """Whether the run's prompt comes from elsewhere and has seen no training here."""
    return bool(getattr(a, "imported", None))


def prior_name(a: SimpleNamespace) -> str:
    """The prior as it was asked for, its runs without their folders; an imported prompt has
    none."""
    if imported(a):
        return "imported"
    name, colon, rest = a.prior.partition(":")
    return name + colon + ",".join(Path(part).name if os.sep in part else part
                                   for part in rest.split(","))


def text_name(text: str) -> str:
    return f"text prompt {textwrap.shorten(text, 40, placeholder='...')!r}"


def spec_name(spec: str) -> str:
    """A SPEC without its folders, for captions."""
    kind, colon, path = spec.partition(":")
    return kind + colon + Path(path).name


def free_name(a: SimpleNamespace) -> str:
    """runs/ and the settings that tell runs apart, numbered if taken."""
    prior = "".join(c if c.isalnum() else "-" for c in prior_name(a))
    name = f"runs/{a.data.split(':')[0]}-{prior}" \
        f"{f'-deep{a.deep_layers}' if a.deep_layers else ''}" \
        f"{''.join(f'-{v}' for k in CHOICES if (v := getattr(a, k)) != CHOICES[k][0])}-seed{a.seed}"
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6)))
                if not Path(n).exists())
