"""From what the user asked for to what a command works with: settings, model, data.

Settings are one flat namespace, `a` everywhere: the flags of train and their defaults are the
tables below, and a run's config.json holds them resolved. Modules that import torch are imported
inside functions, so that --help answers at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import data
import priors

TINY = Path(__file__).resolve().parent / "tiny"
# kind -> training and evaluation data under tiny/
BUNDLED = {"squad": ("squad/train.json", "squad/dev.json"),
           "math": ("math/train-easy", "math/interpolate"), "text": ("text", "text")}
TOKENS = 20  # rows a layer, as in the paper
REFERENCE_ROWS = 20000
POSTERIORS = ("point", "svgd", "gaussian")
BUNDLED_TEXT = "short answer"  # the header that the bundled model was pre-trained with

# flag -> (default, help); a default of None is explained in the help
MODEL = {
    "model": ("tiny", "model folder in Hugging Face's layout; tiny is the bundled one"),
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
    "eval_limit": (200, "most questions evaluated; 0 for all"),
    "max_length": (None, "most tokens of context, question and answer; longer contexts are cut "
                         "(1024, or what fits)"),
    "max_new": (32, "most tokens of a generated answer"),
    "batch_size": (16, "examples a step"),
}
TRAIN = {
    "steps": (200, "training steps"),
    "lr": (None, "peak learning rate of AdamW (at every layer a twentieth of its reference's root "
                 "mean square, which is 1e-3 at the token embeddings of LLaMA 3.2 1B)"),
    "warmup": (10, "steps of linear warm-up"),
    "clip": (1.0, "largest norm of the gradient"),
    "skip_bad_steps": (0, "steps whose loss or gradient is not finite that may be left out before "
                          "the run stops"),
    "prior_weight": (None, "weight of the prior's log density in the loss; 1 gives the MAP "
                           "estimate (0; 1 with --posterior svgd or gaussian)"),
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
NOT_NEGATIVE = {"steps", "skip_bad_steps", "tokens", "deep_layers", "eval_limit", "warmup", "seed", "prior_weight",
                "trunk_memory", "examples", "limit"}
MOST = {"particles": 1000, "batch_size": 2**16}  # each is a prompt, or a row, in memory
FLOATS = {"lr", "clip", "prior_weight", "trunk_memory"}
COUNTS = {"max_length", "eval_every", "snapshot_every", "reference_rows"}  # without a default
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


CONTROL = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
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
    a.model = a.model if a.model == "tiny" else os.path.abspath(a.model)  # runs open from anywhere
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
        if a.posterior == "gaussian" and not a.prior_weight:
            raise UserError("--posterior gaussian needs the prior, or its deviations only shrink: "
                            "give --prior-weight above 0")
    return a


def absolute(spec: str | None) -> str | None:
    """A SPEC with its path from the root, so that a run opens from anywhere."""
    kind, colon, path = (spec or "").partition(":")
    return f"{kind}:{os.path.abspath(path)}" if path else spec


def check_ranges(a: SimpleNamespace) -> None:
    if getattr(a, "posterior", "point") not in POSTERIORS:
        raise UserError(f"--posterior {a.posterior}: use one of {', '.join(POSTERIORS)}")
    for flag, value in vars(a).items():
        # a seed is a 64-bit number
        most = math.inf if isinstance(value, float) else MOST.get(flag, 2**40 - 1) + 1
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
    text = lambda x: isinstance(x, str) and "\0" not in x
    fits = {str: text, int: lambda x: type(x) is int, float: lambda x: type(x) in (int, float)}
    for flag, value in stored.items():
        if flag == "reference":
            right = isinstance(value, list) and value and all(map(text, value))
        elif flag in DEFAULT_SWITCHES:
            right = type(value) is bool
        elif flag in groups:
            default = groups[flag][0]
            right = fits[kind_of(flag, default)](value) or value is None and default is None \
                and flag not in ("device", "dtype", "text")  # which are settled
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


# --------------------------------------------------------------------------------------------------
# names


def prior_name(a: SimpleNamespace) -> str:
    """The prior as it was asked for, its runs without their folders."""
    name, colon, rest = a.prior.partition(":")
    return name + colon + ",".join(Path(part).name if os.sep in part else part
                                   for part in rest.split(","))


def text_name(a: SimpleNamespace) -> str:
    return f"text prompt {textwrap.shorten(a.text, 40)!r}"


def spec_name(spec: str) -> str:
    """A SPEC without its folders, for captions."""
    kind, colon, path = spec.partition(":")
    return kind + colon + Path(path).name


def free_name(a: SimpleNamespace) -> str:
    """runs/ and the settings that tell runs apart, numbered if taken."""
    prior = "".join(c if c.isalnum() else "-" for c in prior_name(a))
    name = f"runs/{a.data.split(':')[0]}-{prior}" \
        f"{f'-deep{a.deep_layers}' if a.deep_layers else ''}" \
        f"{f'-{a.posterior}' if a.posterior != 'point' else ''}-seed{a.seed}"
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6)))
                if not Path(n).exists())


# --------------------------------------------------------------------------------------------------
# model and data


def model_folder(a: SimpleNamespace) -> Path:
    return TINY if a.model == "tiny" else Path(a.model)


def load_model(a: SimpleNamespace):
    """The frozen model and its tokenizer; settles a.max_length by the model's positions."""
    import torch

    import llama
    from train import shard

    folder = model_folder(a)
    if not folder.is_dir():
        raise UserError(f"--model {a.model}: no such folder: download a model with "
                        "`hf download NAME --local-dir DIR` and give DIR")
    if a.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {a.dtype}: use float32, bfloat16 or float16")
    try:
        torch.zeros(0, device=a.device).cpu()  # meta has nothing to give back
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {a.device}: {str(e).splitlines()[0]}: use cpu") from None
    model = llama.load(folder, a.dtype, "cpu" if a.shard else a.device)
    if a.shard:
        shard(model, a.device)
    c = model.config
    vocabulary = data.Vocabulary(folder, c.bos_token_id, c.eos_token_id)
    if vocabulary.size > c.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {vocabulary.size} tokens and the model "
                        f"embeds {c.vocab_size}: the two are not of one model; fetch both again")
    beside = max(rows_per_layer(a), len(vocabulary.encode_plain(a.text))) + a.max_new
    room = c.max_position_embeddings - beside
    a.max_length = a.max_length or min(1024, max(room, 0))
    if not 0 < a.max_length <= room:
        raise UserError(f"--max-length {a.max_length}: the model has {c.max_position_embeddings} "
                        f"positions, and --tokens or --text with --max-new takes {beside} of them, "
                        f"which leaves {max(room, 0)}")
    return model, vocabulary


def rows_per_layer(a: SimpleNamespace) -> int:
    return a.tokens or TOKENS


def layers_with_rows(a: SimpleNamespace, model) -> list[int]:
    L = model.config.num_hidden_layers
    if a.deep_layers > L or not (a.tokens or a.deep_layers):
        raise UserError(f"--tokens {a.tokens} --deep-layers {a.deep_layers}: the model has {L} "
                        f"layers; give 0 to {L} deep layers, and rows at the tokens, at deep "
                        "layers, or both")
    return sorted({*([0] if a.tokens else []), *range(L - a.deep_layers, L)})


def parse_spec(spec: str, split: int) -> tuple[str, str]:
    """"squad:PATH" -> ("squad", PATH); "squad" -> the bundled one's split 0 (train) or 1 (eval)."""
    kind, _, path = spec.partition(":")
    if kind not in data.READERS:
        raise UserError(f"data {spec!r}: unknown kind {kind!r}: write KIND:PATH with KIND one of "
                        f"{', '.join(data.READERS)}")
    if not path and kind not in BUNDLED:
        raise UserError(f"data {spec!r}: there is no bundled {kind} data: write {kind}:PATH")
    return kind, path or str(TINY / BUNDLED[kind][split])


def read_questions(spec: str, split: int, keep_unanswerable: bool) -> list[data.Example]:
    kind, path = parse_spec(spec, split)
    if kind == "text":
        raise UserError(f"data {spec!r}: text has no questions and answers to train or evaluate "
                        "on: use it with --reference, and squad, math or hendrycks here")
    examples = data.read(kind, path)
    kept = examples if keep_unanswerable else [e for e in examples if e.answers]
    if not kept:
        raise UserError(f"{path}: no answerable question in it: use --keep-unanswerable, or other "
                        "data")
    if len(kept) < len(examples):
        say(f"{path}: {len(examples) - len(kept)} of {len(examples)} questions are unanswerable "
            "and dropped (--keep-unanswerable keeps them)")
    return kept


def topic(e: data.Example) -> str:
    """Examples of one topic are never divided between training and evaluation."""
    return e.context or e.question


def some_of(examples: list[data.Example], count: int) -> list[data.Example]:
    """`count` examples (0: all), whole topics as far as may be, always the same ones, in the
    order of the data."""
    return [examples[i] for i in sorted(
        data.Order(list(map(topic, examples)), 1, seed=0).epoch(0)[:count or None])]


def training_and_evaluation(a: SimpleNamespace) -> tuple[list[data.Example], list[data.Example]]:
    """The examples of a run. Without --eval-data a tenth of the training data is held
    out, by whole topics."""
    examples = read_questions(a.data, 0, a.keep_unanswerable)
    if a.eval_data is not None:
        return examples, some_of(read_questions(a.eval_data, 1, a.keep_unanswerable), a.eval_limit)
    count = max(len(examples) // 10, 1)
    held = set(map(topic, some_of(examples, min(count, a.eval_limit or count))))
    evals = [e for e in examples if topic(e) in held]
    if len(evals) == len(examples):
        raise UserError(f"--data {a.data}: all {len(examples)} questions share one context, so "
                        "none can be held out: give --eval-data")
    say(f"{len(evals)} of {len(examples)} questions held out for evaluation (no --eval-data)")
    return [e for e in examples if topic(e) not in held], evals


def encode(examples: list[data.Example], vocabulary: data.Vocabulary, max_length: int, what: str):
    """Examples with their token rows, without those that do not fit; says what was cut."""
    from train import Questions, progress

    rows = [data.encode(e, vocabulary, max_length)
            for e in progress(examples, desc=f"{what} tokens", leave=False)]
    cut = [r.cut for r in rows if r and r.cut]
    if cut:
        say(f"{what}: {len(cut)} of {len(rows)} contexts cut at their end to fit {max_length} "
            f"tokens, {sum(cut) / len(cut):.0f} tokens on average (--max-length)")
    if None in rows:
        say(f"{what}: {rows.count(None)} questions dropped, longer than {max_length} tokens "
            "without any context")
    pairs = [(e, r) for e, r in zip(examples, rows) if r]
    if not pairs:
        raise UserError(f"{what}: no question fits {max_length} tokens: raise --max-length")
    return Questions(*map(list, zip(*pairs)))


def plain_pasts(a: SimpleNamespace, model, vocabulary) -> dict[str, tuple[str, object]]:
    """What a trained prompt stands beside, {split: (name, Past)}: no prompt, and a text prompt if
    there is a text."""
    import torch

    pasts = {"baseline": ("no prompt", model.empty())}
    if a.text:
        ids = torch.tensor([vocabulary.encode_plain(a.text)], device=a.device)
        pasts["text"] = (text_name(a), model.extend(ids))
    return pasts


def model_files(a: SimpleNamespace) -> list[Path]:
    folder = model_folder(a)
    return sorted(f for f in {*folder.glob("*.safetensors"), *folder.glob("*.json")}
                  if f.is_file())


def checksums(a: SimpleNamespace) -> dict[str, str]:
    """The sums of the model, the training data, the evaluation data, and what the prior is fitted
    on if that is none of these."""
    files = {"model": model_files(a), "data": data.files_of(*parse_spec(a.data, 0))}
    if a.eval_data:
        files["eval_data"] = data.files_of(*parse_spec(a.eval_data, 1))
    files["reference"] = reference_files(a)
    return {key: checksum(paths) for key, paths in files.items() if paths}


def reference_files(a: SimpleNamespace) -> list[Path]:
    """The files of collections, data and runs that a prior is fitted on."""
    found = [Path(run) / "prompt.safetensors" for run in priors.parse(a.prior)[2]]
    for spec in a.reference:
        if spec.startswith("collection:"):
            found.append(collection_of(spec)[0])
        elif spec != "vocab":
            found += data.files_of(*parse_spec(spec, 0))
    return [path for path in found if path.exists()]


def collection_of(spec: str) -> tuple[Path, str | None]:
    """"collection:FILE#DOMAIN" -> the file, and the domain or None."""
    path, _, domain = spec.removeprefix("collection:").partition("#")
    if not Path(path).is_file():
        raise UserError(f"reference {spec!r}: no such file: write collection:FILE with a file that "
                        "collect made")
    return Path(path), domain or None


def checksum(paths: list[Path]) -> str:
    """sha256 over the sha256 of all files."""
    h = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()


def check_same_model(a: SimpleNamespace, sha256: str | None, path: Path) -> None:
    if sha256 != checksum(model_files(a)):
        raise UserError(f"{path}: made with other weights than {a.model}: its vectors mean "
                        "nothing here; give the --model it was made with")
