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
                 "mean square, which is 1e-3 at the token embeddings of LLaMA 3.2 1B)"),
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
        elif a.prefix_layers is not None or a.reparam == "shared":
            flag = "prefix-layers" if a.prefix_layers is not None else "reparam shared"
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


def over(stored: dict, given: dict) -> dict:
    """A run's settings, and over them what is given now; a revision is one model's."""
    return {**stored, **({"revision": None} if "model" in given else {}), **given}


# --------------------------------------------------------------------------------------------------
# names


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


# --------------------------------------------------------------------------------------------------
# model and data


def model_folder(a: SimpleNamespace) -> Path:
    """Where the model is, or for one of the hub that is not in the cache would be if it was none:
    nothing is fetched."""
    if a.model == "tiny":
        return TINY
    return on_hub(a.model) and cached(a.model, a.revision) or Path(a.model)


HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json",
             "model.safetensors.index.json", "*.safetensors"]
NOT_HUB_FILES = ["*/*", "consolidated*"]  # the same weights once more, in another layout


def on_hub(model: str) -> bool:
    """Whether this is no folder and could be the hub's name of a model."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII)) \
        and not os.path.exists(model)


def cached(name: str, revision: str | None) -> Path | None:
    """The folder of a model of the hub in the cache on this disk, if all of it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as e:
        raise UserError(f"--model {name}: no such folder, and {one_line(str(e))}: give a folder, "
                        "or NAME/MODEL of the hub") from None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and not missing_files(folder) else None


def missing_files(folder: Path) -> list[str]:
    """What a model's folder lacks to be loaded."""
    wanted, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        shards = data.read_json(index, dict).get("weight_map")
        wanted = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    return sorted(name for name in {"config.json", "tokenizer.json", *wanted}
                  if not (folder / name).exists())


def fetch(name: str, revision: str | None) -> Path:
    """A model of the hub, from the hub into its cache: what is needed of it and no more, the
    weights only after the configuration was found to be a LLaMA's."""
    import llama
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (GatedRepoError, LocalEntryNotFoundError,
                                        RepositoryNotFoundError, RevisionNotFoundError)

    page = f"{constants.ENDPOINT}/{name}"
    command = f"hf download {name}{f' --revision {revision}' if revision else ''}"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
        if (folder / "config.json").exists():
            llama.read_config(folder / "config.json")
        folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=HUB_FILES,
                                        ignore_patterns=NOT_HUB_FILES))
    except llama.ModelError:
        raise
    except GatedRepoError:
        raise UserError(f"--model {name}: its makers want their licence accepted first: do so at "
                        f"{page}, then run `hf auth login`, and this again") from None
    except RepositoryNotFoundError:
        raise UserError(f"--model {name}: no such folder, and no such model at {page}: check the "
                        "name; for a private model run `hf auth login`") from None
    except RevisionNotFoundError:
        raise UserError(f"--revision {revision}: {name} has none of that name: give a branch, tag "
                        f"or commit that {page} shows") from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        raise UserError(f"--model {name}: no such folder, not in the cache "
                        f"({constants.HF_HUB_CACHE}), and {why}: run `{command}` where there is a "
                        "network") from None
    except Exception as e:  # of whichever library carries it, and of the disk
        raise UserError(f"--model {name}: the download failed ({one_line(str(e))[:300]}): run "
                        f"`{command}`, which goes on where it stopped") from e
    missing = missing_files(folder)
    if missing:  # of a cache filled in part too, when the hub does not answer
        raise UserError(f"--model {name}: the hub gave no {', '.join(missing)}: run `{command}` "
                        "where there is a network, or choose a model that has a tokenizer.json and "
                        "safetensors weights")
    return folder


def load_model(a: SimpleNamespace):
    """The frozen model and its tokenizer; settles a.max_length by the model's positions."""
    import torch

    import llama
    from train import shard

    folder, hub = model_folder(a), on_hub(a.model)
    if hub and not folder.is_dir():
        folder = fetch(a.model, a.revision)
    if not folder.is_dir():
        raise UserError(f"--model {a.model}: no such folder: download a model with "
                        "`hf download NAME --local-dir DIR` and give DIR")
    if a.revision is not None and not hub:
        raise UserError(f"--revision {a.revision}: {a.model} is a folder, and only a model of the "
                        "hub has revisions: leave it out")
    a.revision = folder.name if hub else None  # the commit: a branch may move on
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
    if getattr(a, "place", "before") == "after-bos" and vocabulary.bos is None:
        raise UserError(f"--place after-bos: {a.model} has no BOS: use --place before or suffix")
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
    if getattr(a, "method", "prompt") == "prefix":
        k = L if a.prefix_layers is None else a.prefix_layers
        if not 0 < k <= L or not a.tokens:
            raise UserError(f"--prefix-layers {k}, --tokens {a.tokens}: the model has {L} layers: "
                            f"give 1 to {L}, and at least one token")
        return list(range(L - k, L))
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
        return some_of(examples, a.train_examples), some_of(
            read_questions(a.eval_data, 1, a.keep_unanswerable), a.eval_limit)
    count = max(len(examples) // 10, 1)
    held = set(map(topic, some_of(examples, min(count, a.eval_limit or count))))
    evals = [e for e in examples if topic(e) in held]
    if len(evals) == len(examples):
        raise UserError(f"--data {a.data}: all {len(examples)} questions share one context, so "
                        "none can be held out: give --eval-data")
    say(f"{len(evals)} of {len(examples)} questions held out for evaluation (no --eval-data)")
    return some_of([e for e in examples if topic(e) not in held], a.train_examples), evals


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


def plain_pasts(a: SimpleNamespace, model, vocabulary,
                texts: list[str] | None = None) -> dict[str, tuple[str, object]]:
    """What a trained prompt stands beside, {split: (name, Past)}: no prompt, and text prompts
    (None: the run's own, if it has one)."""
    import torch

    pasts = {"baseline": ("no prompt", model.empty())}
    room = model.config.max_position_embeddings - a.max_length - a.max_new
    for i, text in enumerate(texts or [a.text] * bool(a.text)):
        ids = vocabulary.encode_plain(text)
        if not 0 < len(ids) <= room:
            raise UserError(f"the {text_name(text)} has {len(ids)} tokens: give 1 to {room}, or "
                            f"less --max-length (now {a.max_length})")
        pasts[f"text{f' {i + 1}' * (i > 0)}"] = (text_name(text), model.extend(
            torch.tensor([ids], device=a.device)))
    return pasts


def model_files(a: SimpleNamespace) -> list[Path]:
    folder = model_folder(a)
    # of a cache, which others fill too, what is fetched for this
    found = HUB_FILES if on_hub(a.model) else ["*.safetensors", "*.json"]
    return sorted(f for f in {f for pattern in found for f in folder.glob(pattern)}
                  if f.is_file() and not (on_hub(a.model) and f.match(NOT_HUB_FILES[1])))


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
