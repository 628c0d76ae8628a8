"""What can be asked for: the settings of a run as frozen values, one dataclass a concern.

A field is a flag. Its default, its range and its help stand beside it, and the command line, the
checks, config.json and --help are made from the fields:

    asked = Settings.from_flags({"prior": "exclusion", "deep_layers": 3})   # what a user gave
    settings = asked.complete()                                             # what follows from it
    flat(settings)["cut"]                                                   # True

Values that are known only after loading (the model's commit, the longest text) are returned by
inputs.py. torch is imported where it is used, so that --help answers at once.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import priors
from lab.console import UserError, counted

TINY = Path(__file__).resolve().parent.parent / "tiny"
TINY_TEXT = "short answer"  # the header that the bundled model was pre-trained with
# kind of data -> the bundled training and evaluation data, under tiny/
BUNDLED = {"squad": ("squad/train.json", "squad/dev.json"),
           "math": ("math/train-easy", "math/interpolate"), "text": ("text", "text")}
FORGET = ("prose, text:PATH or text, to measure what the prompt costs there: the loss on the first "
          "--eval-limit texts with the prompt in front, less that without")
TOKENS = 20  # rows a layer, as in the paper
REFERENCE_ROWS = 20000


# --------------------------------------------------------------------------------------------------
# fields


def setting(default, help: str, *, above=None, least=None, below=None, most=None, choices=(),
            earlier=(), **about):
    """A field of settings. The value must be more than `above`, at least `least`, less than
    `below`, at most `most`, one of `choices`. earlier: choices of early versions, which their runs
    keep. about: how commands.py makes a flag of it."""
    return field(default=default, metadata={
        "help": help, "above": above, "least": least, "below": below, "most": most,
        "choices": choices, "earlier": earlier, **about})


# How a field of settings is annotated -> the type of its value. Other annotations are not known.
VALUE_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "tuple[str, ...]": tuple,
               "tuple[int, ...]": tuple}


def value_type(f) -> type:
    """The type of a field's value when it is not None."""
    return VALUE_TYPES[f.type.removesuffix(" | None")]


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def from_flags(cls, given: dict):
    """An instance of a dataclass of settings, of those given {flag: value} that it has. Raises
    UserError for a value outside of its field's range."""
    values = {f.name: given[f.name] for f in fields(cls) if f.name in given}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    settings = cls(**{**values, **lists})
    check_ranges(settings)
    return settings


def check_ranges(settings) -> None:
    """Raises UserError, which names the flag, for the first value outside of its range."""
    for f in fields(settings):
        value, about = getattr(settings, f.name), f.metadata
        flag = about.get("flag") or flag_name(f.name)
        if value is None or not about:
            continue
        if about["choices"] and value not in about["choices"] + about["earlier"]:
            raise UserError(f"{flag} {value}: use one of {', '.join(about['choices'])}")
        if value_type(f) not in (int, float):
            continue
        # A seed becomes a 64-bit number together with a layer's number.
        below = about["below"] or (2**40 if value_type(f) is int else math.inf)
        limit = f", and less than {below}" if about["below"] or value >= below else ""
        if about["most"] is not None and not about["least"] <= value <= about["most"]:
            raise UserError(f"{flag} {value}: expected {about['least']} to {about['most']}")
        if about["above"] is not None and not about["above"] < value < below:
            raise UserError(f"{flag} {value}: expected more than {about['above']}{limit}")
        if about["least"] is not None and not about["least"] <= value < below:
            raise UserError(f"{flag} {value}: expected {about['least']} or more{limit}")


# --------------------------------------------------------------------------------------------------
# one dataclass a concern


@dataclass(frozen=True)
class ModelSettings:
    model: str = setting("tiny", "model folder in Hugging Face's layout, or NAME/MODEL of the hub, "
                         "from the cache or fetched; tiny is the bundled one")
    revision: str | None = setting(None, "branch, tag or commit of a model of the hub (main; a run "
                                   "keeps the commit)")
    device: str | None = setting(None, "cpu, cuda, cuda:1 ... (cuda when there is one)")
    dtype: str | None = setting(None, "float32, bfloat16 or float16 of the frozen weights "
                                "(bfloat16 on cuda, else float32)")
    bos: str = setting("tokenizer", "BOS in front of a text: tokenizer, if the model's own "
                       "tokenizer puts it there; always, if config.json names one",
                       choices=("tokenizer", "always"))

    def complete(self) -> ModelSettings:
        device = self.device
        if device is None:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        model = self.model
        if model != "tiny" and not on_hub(model):
            model = os.path.abspath(model)  # so that a run opens from any working directory
        return replace(self, model=model, device=device, dtype=dtype)


@dataclass(frozen=True)
class PriorSettings:
    prior: str = setting("vocab", "prior of the rows, NAME or NAME:option=value,...; see below")
    reference: tuple[str, ...] = setting(
        (), "what priors are fitted on, one or more of: vocab (each token once), a data SPEC "
        "(tokens as the data uses them), collection:FILE or collection:FILE#DOMAIN. At deep layers "
        "it is activations, for vocab those of --data. Several are one population, but for "
        "interpolation two (vocab; text math for interpolation, as in the paper)")
    reference_rows: int | None = setting(
        None, "how many rows are drawn of each reference, which must have as many; of vocab all "
        "tokens are taken (20000, or all where there are fewer)", above=0)
    text: tuple[str, ...] | None = setting(
        None, "text prompts to score too, as the first line of every text; the rows of the prior "
        "text begin as the first of them ('short answer' for tiny, else none)")
    separator: str | None = setting("\n", "what stands between a text prompt and the text (a line "
                                    "break)", show_default=False)
    tokens: int = setting(TOKENS, "rows, the vectors that are trained, at the token embeddings and "
                          "at each deep layer; 0: none at the token embeddings, and 20 at each "
                          "deep layer", least=0)
    deep_layers: int = setting(0, "how many of the last layers own rows too", least=0)
    seed: int = setting(0, "seed of the prior's draw and of the data's order", least=0)

    def complete(self, model: str) -> PriorSettings:
        """model: its name, because the bundled one has a text prompt of its own."""
        prior = _absolute_runs(self.prior)
        name = priors.parse(prior)[0]
        usual = ("text", "math") if name == "interpolation" else ("vocab",)
        text = ((TINY_TEXT,) if model == "tiny" else ()) if self.text is None else self.text
        return replace(self, prior=prior, text=text,
                       reference=tuple(map(absolute, self.reference or usual)))


@dataclass(frozen=True)
class PromptSettings:
    cut: bool | None = setting(None, "", switches={
        "cut": (True, "drop the rows' outputs at each layer, as in the paper's deep prompt tuning "
                      "(default with --deep-layers)"),
        "keep": (False, "let the rows' outputs go on through the layers, as in prompt tuning "
                        "(default without)")})
    method: str = setting(
        "prompt", "prompt: rows at layers' inputs; prefix: keys and values, given directly, which "
        "begin as those of the prior's rows (prefix tuning)", choices=("prompt", "prefix"))
    prefix_layers: int | None = setting(None, "how many of the last layers --method prefix gives "
                                        "keys and values (all)", least=0)
    reparam: str = setting(
        "none", "none; mlp: rows come from one vector each, through a network common to all "
        "layers; shared: a key and its value come from one vector (prefix)",
        choices=("none", "shared", "mlp"))
    subspace: int = setting(0, "directions of the reference in which rows move from the prior's "
                            "draw, at every layer; 0 for all", least=0, below=2**17)
    directions: str = setting(
        "principal", "which these are: principal, those in which the reference varies most; "
        "random, drawn uniformly", choices=("principal", "random"))
    frozen_tokens: int = setting(0, "how many of the first rows, or columns of a prefix, of each "
                                    "layer are not trained and stay as the prior drew them",
                                 least=0, below=2**17)
    place: str = setting(
        "before", "where the prompt stands: before, in front of BOS and the text; after-bos, "
        "between BOS and the text; suffix, in front of the text's last token, the colon of "
        "\"Answer:\"", choices=("before", "after-bos", "suffix"))

    def complete(self, deep_layers: int) -> PromptSettings:
        return replace(self, cut=deep_layers > 0 if self.cut is None else self.cut)


@dataclass(frozen=True)
class DataSettings:
    data: str = setting("squad", "training data, a SPEC: KIND:PATH with KIND squad, math or "
                        "another of docs/data.md, PATH a file, folder or pattern; squad, math and "
                        "text alone are the bundled ones")
    eval_data: str | None = setting(None, "evaluation data, a SPEC (the bundled one's, or a tenth "
                                    "of --data held out)")
    train_examples: int = setting(0, "training questions, drawn at random; 0 for all", least=0)
    eval_limit: int = setting(200, "most questions evaluated; 0 for all", least=0)
    hold_out: bool = setting(False, "train without a tenth of the questions (at most --eval-limit, "
                             "and all of their contexts), and score these at the end: settings are "
                             "chosen by them, and not by the evaluation data")
    max_length: int | None = setting(None, "most tokens of context, question and answer; longer "
                                     "contexts are cut (1024, or what fits)", above=0)
    max_new: int = setting(32, "most tokens of a generated answer", above=0)
    batch_size: int = setting(16, "examples a step", above=0, below=2**16 + 1)
    share: bool = setting(True, "", switches={"no-share": (
        False, "shuffle single questions and compute every context anew; the same loss, only "
               "slower")})
    keep_unanswerable: bool = setting(False, "keep unanswerable questions; their answer is empty")
    forget: str | None = setting(None, FORGET, flag_metavar="SPEC")

    def complete(self) -> DataSettings:
        eval_data = self.eval_data
        if eval_data is None and self.data in BUNDLED:
            eval_data = self.data
        return replace(self, data=absolute(self.data), eval_data=absolute(eval_data),
                       forget=absolute(self.forget))


@dataclass(frozen=True)
class TrainSettings:
    steps: int = setting(200, "training steps", least=0)
    lr: float | None = setting(
        None, "peak learning rate of AdamW (at every layer a twentieth of its reference's root "
        "mean square, which is 1e-3 at the token embeddings of LLaMA 3.2 1B; of --reparam a fifth "
        "over the network's width); of --posterior sgld and gaussian in standard deviations of the "
        "prior (a twentieth)", above=0, below=1e30)  # AdamW multiplies in float32
    lr_factor: float = setting(1.0, "multiplies the learning rates of all layers, each of which "
                               "has its own without --lr", above=0, below=1e8)
    warmup: int = setting(10, "steps of linear warm-up", least=0)
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    skip_bad_steps: int = setting(0, "steps whose loss or gradient is not finite that may be left "
                                  "out before the run stops", least=0)
    prior_weight: float | None = setting(
        None, "weight of the prior's log density in the loss; 1 gives the MAP estimate (0; 1 with "
        "--posterior sgld or gaussian)", least=0)
    posterior: str = setting(
        "point", "what is trained: point, one prompt; sgld, samples of the posterior, by Langevin "
        "dynamics; gaussian, the nearest Gaussian whose whitened coordinates are independent",
        choices=("point", "sgld", "gaussian"), earlier=("svgd",))
    # All particles are in memory at once.
    particles: int = setting(8, "prompts that stand for a posterior: chains of sgld, draws of a "
                             "gaussian", above=0, below=1001)
    eval_every: int | None = setting(None, "steps between evaluations and checkpoints (a quarter "
                                     "of --steps)", above=0)
    snapshot_every: int | None = setting(
        None, "steps between snapshots of the rows in prompts/, in addition to those at "
        "evaluations (a twentieth of --steps)", above=0)
    recompute: bool = setting(False, "keep no activations inside a layer for the backward pass: "
                              "less memory, a third more work")
    shard: bool = setting(False, "under torchrun, divide the model's weights among the processes "
                          "(FSDP2)")
    out: str | None = setting(None, "the run's folder (runs/ and a name made of the settings)")

    @property
    def has_particles(self) -> bool:
        """Whether several prompts are trained, and scored together."""
        return self.posterior in ("sgld", "svgd")

    @property
    def representative(self) -> str:
        """What stands for a posterior where one prompt is asked for."""
        return "first particle" if self.posterior == "sgld" else "mean prompt"

    def complete(self) -> TrainSettings:
        weight = self.prior_weight
        if weight is None:
            weight = 0.0 if self.posterior == "point" else 1.0
        return replace(self, prior_weight=weight,
                       eval_every=self.eval_every or max(1, self.steps // 4),
                       snapshot_every=self.snapshot_every or max(1, self.steps // 20))


@dataclass(frozen=True)
class TeacherSettings:
    teacher: str | None = setting(
        None, "a text, such as worked examples or a document, in front of every question as --text "
        "puts it: the prompt learns to say what the frozen model says after this text. The loss is "
        "the divergence of next-token distributions at the answers' tokens (none: learn the "
        "answers of --data)")
    teacher_mix: float = setting(0.0, "share of the answers' own cross-entropy in the loss, 0 to 1",
                                 least=0, most=1)
    teacher_answers: float | None = setting(
        None, "train on answers that the teacher gives, greedily or drawn at this temperature, and "
        "not on those of --data, which may then lack them (\"answers\": [] with "
        "--keep-unanswerable)", least=0, nargs="?", const=0.0, flag_metavar="TEMPERATURE")
    teacher_reasons: str | None = setting(
        None, "the teacher reads worked steps after the question, as \"Steps: 12 + 35 = 47\", and "
        "then answers; the prompt learns to answer without: written, by the teacher (as without a "
        "word); data, the worked solutions of gsm8k and hendrycks data",
        choices=("written", "data"), nargs="?", const="written")
    teacher_steps: int = setting(128, "most tokens of a question's steps", above=0)

    @property
    def teaches(self) -> bool:
        return self.teacher is not None or self.teacher_reasons is not None

    @property
    def exam(self) -> tuple[str | None, str | None, int]:
        """All that the teacher's own answers depend on, besides the model, the questions and the
        separator; what a prompt learns from them is left out."""
        return self.teacher, self.teacher_reasons, self.teacher_steps

    @property
    def name(self) -> str:
        """In tables."""
        reasons = {None: "", "written": ", with its steps", "data": ", with worked steps"}
        text = "" if self.teacher is None else f" {shortened(self.teacher)!r}"
        return f"teacher{text}{reasons[self.teacher_reasons]}"


# --------------------------------------------------------------------------------------------------
# all of a run's settings


@dataclass(frozen=True)
class Settings:
    model: ModelSettings = ModelSettings()
    prior: PriorSettings = PriorSettings()
    prompt: PromptSettings = PromptSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    teacher: TeacherSettings = TeacherSettings()
    imported: str | None = None  # the name of an adapter, of a prompt that was not trained here

    @classmethod
    def from_flags(cls, given: dict) -> Settings:
        """The defaults, and over them the flags that a user gave."""
        return cls(**{part: from_flags(kind, given) for part, kind in PARTS.items()},
                   imported=given.get("imported"))

    def complete(self) -> Settings:
        """These settings with the defaults that follow from other settings filled in. Raises
        UserError for settings that contradict each other."""
        model = self.model.complete()
        settings = replace(self, model=model, prior=self.prior.complete(model.model),
                           prompt=self.prompt.complete(self.prior.deep_layers),
                           data=self.data.complete(), train=self.train.complete())
        check_together(settings)
        return settings

    @property
    def seed(self) -> int:
        return self.prior.seed

    @property
    def prior_name(self) -> str:
        return "imported" if self.imported else prior_name(self.prior.prior)


PARTS = {"model": ModelSettings, "prior": PriorSettings, "prompt": PromptSettings,
         "data": DataSettings, "train": TrainSettings, "teacher": TeacherSettings}
FIELDS = {f.name: f for part in PARTS.values() for f in fields(part)}


def flat(settings: Settings) -> dict:
    """All settings by the names of their flags, as config.json keeps them."""
    values = {}
    for part in PARTS:
        values.update(vars(getattr(settings, part)))
    values = {name: list(value) if isinstance(value, tuple) else value
              for name, value in values.items()}
    if settings.imported:
        values["imported"] = settings.imported
    return values


def with_flags(settings: Settings, given: dict) -> Settings:
    """Settings, and over them the flags that are given now."""
    values = {**flat(settings), **given}
    if "model" in given and "revision" not in given:
        values["revision"] = None  # a revision is one model's
    return Settings.from_flags(values)


# Settings that a run may go on with otherwise than it began. The first name files, which must be
# the same in another place; a prior's, earlier runs.
MAY_MOVE = ("model", "data", "eval_data", "forget", "reference", "prior")
MAY_CHANGE = ("out", "steps", "eval_every", "snapshot_every", "skip_bad_steps", "device")


def differences(stored: Settings, given: dict) -> list[str]:
    """The flags whose values differ from the run's, as a user reads them."""
    values, requested = flat(stored), flat(with_flags(stored, given).complete())
    return [f"{flag_name(name)} {given[name]} (the run has {values.get(name)!r})"
            for name in given if name != "out" and requested.get(name) != values.get(name)]


def check_together(settings: Settings) -> None:
    """Raises UserError for settings that contradict each other."""
    prior, prompt, train = settings.prior, settings.prompt, settings.train
    name = priors.parse(prior.prior)[0]
    if train.posterior not in FIELDS["posterior"].metadata["choices"]:
        raise UserError(f"--posterior {train.posterior} was taken out, because its prompts become "
                        "copies of one: its runs can be evaluated; train by --posterior sgld")
    if train.prior_weight and not priors.PRIORS[name].has_density:
        flag = "--prior-weight" if train.posterior == "point" else f"--posterior {train.posterior}"
        dense = [other for other, kind in priors.PRIORS.items() if kind.has_density]
        raise UserError(f"{flag}: the prior {name} has no density to follow: use one of "
                        f"{', '.join(dense)}")
    if prompt.method == "prefix":
        if train.prior_weight or train.posterior != "point":
            raise UserError("--method prefix trains keys and values, over which no prior has a "
                            "density: leave out --prior-weight and --posterior, or use --method "
                            "prompt")
        if prior.deep_layers:
            raise UserError("--method prefix has keys and values at layers, not rows: give "
                            "--prefix-layers instead of --deep-layers")
        if prompt.cut:
            raise UserError("--method prefix has no rows, so no outputs to --cut: leave it out")
    elif prompt.prefix_layers or prompt.reparam == "shared":
        flag = "prefix-layers" if prompt.prefix_layers else "reparam shared"
        raise UserError(f"--{flag} is for --method prefix: give that too")
    if prompt.directions != "principal" and not prompt.subspace:
        raise UserError(f"--directions {prompt.directions} is for --subspace K: give that too")
    if prompt.subspace and (prompt.reparam != "none" or train.posterior != "point"):
        raise UserError("--subspace trains one prompt, in coordinates of its own: leave out "
                        "--reparam and --posterior")
    if frozen := prompt.frozen_tokens:
        rows = prior.tokens or TOKENS
        if frozen >= rows:
            noun = "column" if prompt.method == "prefix" else "row"
            raise UserError(f"--frozen-tokens {frozen}: a layer has {counted(rows, noun)}: give "
                            "fewer, so that one is left to train")
        if prompt.reparam != "none" or prompt.subspace or train.posterior != "point":
            raise UserError("--frozen-tokens cannot be combined with --reparam, --subspace or "
                            "--posterior: leave them out")
    if prompt.reparam != "none" and train.posterior != "point":
        raise UserError("--reparam trains one prompt: leave out --posterior")
    if train.posterior != "point" and not train.prior_weight:
        raise UserError(f"--posterior {train.posterior} needs the prior, without which there is no "
                        "posterior: give --prior-weight above 0")
    check_prior(prior)
    check_teacher(settings.teacher)


def check_prior(prior: PriorSettings) -> None:
    """Raises UserError for a prior without what it is fitted on."""
    name, _, runs = priors.parse(prior.prior)
    if name == "text" and not (prior.text and prior.text[0]):
        raise UserError("--prior text needs --text, the text whose tokens the rows begin as")
    if runs or name == "text":
        return
    if len(set(map(spec_name, prior.reference))) < len(prior.reference):
        raise UserError(f"--reference {' '.join(prior.reference)}: two of one name: give each once")
    if priors.PRIORS[name].several and len(prior.reference) != 2:
        raise UserError(f"--prior {name} goes between two references: give two, as in --reference "
                        "text math")


def check_teacher(teacher: TeacherSettings) -> None:
    """Raises UserError for settings of a teacher that contradict each other."""
    if teacher.teacher is not None and not teacher.teacher.strip():
        raise UserError("the teacher's text is empty: give a --teacher with words, or leave it out")
    for name in ("teacher_mix", "teacher_answers"):
        if not teacher.teaches and getattr(teacher, name) != FIELDS[name].default:
            raise UserError(f"{flag_name(name)} is about a teacher: give --teacher too, or leave "
                            "it out")
    if teacher.teacher_reasons is None and teacher.teacher_steps != FIELDS["teacher_steps"].default:
        raise UserError("--teacher-steps is about steps that a teacher reads: give "
                        "--teacher-reasons too, or leave it out")


# --------------------------------------------------------------------------------------------------
# settings that a run keeps

# Flags whose default follows from other settings; a run keeps the value, never None.
COMPLETED = ("device", "dtype", "text", "cut", "eval_every", "prior_weight")
# Of runs from before these could be set: text prompts stood before BOS, and every text had BOS.
EARLY = {"separator": None, "bos": "always", "text": []}


def from_config(config: dict, path: str | Path = "config.json") -> Settings:
    """The settings of a run's config.json, also of one that an earlier version wrote: settings that
    it lacks say what that version did. Raises UserError for a value that no flag can have given."""
    stored = {**EARLY, **config["settings"]}
    if isinstance(stored.get("text"), str):
        stored["text"] = [stored["text"]] if stored["text"] else []
    if isinstance(stored.get("reference"), str):  # one reference, of a limited number of rows
        stored |= {"reference": [stored["reference"]], "reference_rows": None}
    if str(stored.get("prior")).startswith("vae:"):  # of a version whose vae was a network
        stored["prior"] = re.sub(r"(?<=[:,])(hidden|steps|free_bits)=[^,]*,?", "", stored["prior"])
    for name, f in FIELDS.items():
        if name in stored and not is_value(f, stored[name]):
            raise UserError(f"{path}: the setting {name} is {stored[name]!r:.80}, which no run "
                            "has: restore the file")
    imported = stored.get("imported")
    if imported is not None and not _is_text(imported):
        raise UserError(f"{path}: the setting imported is {imported!r:.80}, which no run has: "
                        "restore the file")
    try:
        return Settings.from_flags(stored)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def is_value(f, value) -> bool:
    """Whether a run can have this value of a setting."""
    if value is None:
        return (f.default is None and f.name not in COMPLETED) or EARLY.get(f.name, "") is None
    kind = value_type(f)
    if kind is tuple:
        return isinstance(value, list) and all(map(_is_text, value)) \
            and (bool(value) or f.name != "reference")
    if kind is str:
        return _is_text(value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _is_text(value) -> bool:
    return isinstance(value, str) and "\0" not in value and len(value) < 2**20


def flags_of(config: dict) -> list[str]:
    """The settings of a config.json that a user gave. Early runs do not say which; all may be."""
    return config.get("given", [*config["settings"]])


def flags_like(config: dict, given: dict) -> dict:
    """The flags that begin another run like that of a config.json, with other flags given now.
    Settings that nobody gave and that followed from others are left out, so that they follow from
    the new ones. The device, the dtype and the model's commit stay."""
    stored = flat(from_config(config))
    explicit = {"device", "dtype", "revision", *flags_of(config)}
    derived = {name for name, f in FIELDS.items() if f.default is None or f.default == ()}
    flags = {name: value for name, value in stored.items()
             if name not in ("out", "imported") and (name in explicit or name not in derived)}
    if "model" in given:
        flags.pop("revision", None)  # a revision is one model's
    return {**flags, **given}


# --------------------------------------------------------------------------------------------------
# names


def absolute(spec: str | None) -> str | None:
    """A SPEC with an absolute path, so that a run opens from any working directory."""
    kind, _, path = (spec or "").partition(":")
    return f"{kind}:{os.path.abspath(path)}" if path else spec


def _absolute_runs(prior: str) -> str:
    """"posterior:a,resample=1" with the runs' folders made absolute. A comma in the name of a
    folder that is there is written as priors.parse reads it."""
    name, _, rest = prior.partition(":")
    if not priors.parse(prior)[2]:
        return prior
    parts, paths = re.split(r"(?<!\\),", rest), []
    while parts:
        counts = [n for n in range(1, len(parts) + 1) if os.path.isdir(",".join(parts[:n]))]
        count = counts[0] if counts else 1
        paths.append("\\,".join(parts[:count]))
        del parts[:count]
    runs = priors.parse(f"{name}:{','.join(paths)}")[2]
    for i, part in enumerate(paths):
        path = part.replace("\\,", ",")
        if path in runs:
            paths[i] = os.path.abspath(path).replace(",", "\\,")
    return f"{name}:{','.join(paths)}"


def on_hub(model: str) -> bool:
    """Whether this is no folder, and could be the hub's name of a model."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII)) \
        and not os.path.exists(model)


def prior_name(prior: str) -> str:
    """The prior as a user asks for it, its runs without their folders."""
    name, colon, rest = prior.partition(":")
    parts = [Path(part).name if os.sep in part else part for part in rest.split(",")]
    return name + colon + ",".join(parts)


def shortened(text: str) -> str:
    return textwrap.shorten(text, 40, placeholder="...")


def text_name(text: str) -> str:
    return f"text prompt {shortened(text)!r}"


def text_names(texts: tuple[str, ...]) -> list[str]:
    """A name for each text prompt; those of texts that begin alike have numbers."""
    return numbered(list(map(text_name, texts)))


def numbered(names: list[str]) -> list[str]:
    """The names, with numbers behind those that are there more than once."""
    return [name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})"
            for i, name in enumerate(names)]


def spec_name(spec: str) -> str:
    """A SPEC without its folders, for captions."""
    kind, colon, path = spec.partition(":")
    return kind + colon + Path(path).name


def in_a_name(text: str) -> str:
    """The text with a dash for each character that is no letter or digit, as in a file's name."""
    return "".join(c if c.isalnum() else "-" for c in text)


def free_name(settings: Settings) -> str:
    """runs/ and the settings that tell runs apart, with a number if that folder exists."""
    model = Path(settings.model.model).name  # of a folder, or of NAME/MODEL
    parts = [] if settings.model.model == "tiny" else [in_a_name(model)]
    parts += [settings.data.data.split(":")[0], in_a_name(settings.prior_name)]
    if settings.prior.deep_layers:
        parts.append(f"deep{settings.prior.deep_layers}")
    if settings.prompt.subspace:
        parts.append(f"subspace{settings.prompt.subspace}")
    if settings.prompt.frozen_tokens:
        parts.append(f"frozen{settings.prompt.frozen_tokens}")
    for name in ("posterior", "method", "reparam", "directions", "place"):
        value = flat(settings)[name]
        if value != FIELDS[name].default:
            parts.append(value)
    if settings.teacher.teaches:
        parts.append("taught")
    name = "runs/" + "-".join([*parts, f"seed{settings.seed}"])
    others = (f"{name}-{i}" for i in range(2, 10**6))
    return next(path for path in (name, *others) if not Path(path).exists())
