"""From settings to what a command works with: the model, its tokenizer, questions, checksums.

    loaded = load_model(settings.model)                       # a folder, or a model of the hub
    evals = evaluation_examples(settings.data)
    questions = encode(evals, loaded.vocabulary, max_length, "evaluation")

What a user got wrong is refused here in one line, before anything is written.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import data
import llama
import priors
from lab import t5
from lab.console import UserError, counted, say, silent_stderr
from lab.files import checksum
from lab.folder import Run
from lab.foreign_data import check_data
from lab.foreign_models import architecture, check_tokenizer, explained
from lab.hub import GENERATION, from_hub, model_folder, needed_files
from lab.loss import Text
from lab.processes import shard_model
from lab.settings import (BUNDLED, TINY, TOKENS, DataSettings, ModelSettings, PriorSettings,
                          PromptSettings, Settings, TeacherSettings, on_hub, text_names)
from lab.trial import try_tokenizer


class Shared:
    """What the runs that a process trains one after the other have in common, made once. Of every
    kind the last one is kept; a kind may have a prior's name in it, and then there are several."""

    def __init__(self):
        self.kept: dict = {}  # by kind: the key, and what was made

    def once(self, kind, key, make: Callable):
        """What make() returns, or returned last time if the key is the same. A key has to tell all
        that the result depends on, and nobody may change the result."""
        if kind not in self.kept or self.kept[kind][0] != key:
            # What goes is freed first. Whatever was made with another model may hold it.
            if kind == "model":
                self.kept.clear()
            self.kept.pop(kind, None)
            self.kept[kind] = key, make()
        return self.kept[kind][1]


# --------------------------------------------------------------------------------------------------
# the model


class LoadedModel(NamedTuple):
    settings: ModelSettings
    model: llama.Llama | t5.Encoder
    vocabulary: data.Vocabulary
    folder: Path
    revision: str | None  # the commit of a model of the hub

    @property
    def device(self) -> torch.device:
        return self.model.embeddings.device

    @property
    def is_encoder(self) -> bool:
        return isinstance(self.model, t5.Encoder)

    @property
    def end(self) -> list[int]:
        """What stands behind every text: of an encoder, all of whose tokens see it, that which its
        tokenizer puts there; of a LLaMA nothing, since a text may go on."""
        return self.vocabulary.behind if self.is_encoder else []


def load_model(settings: ModelSettings, shard: bool = False, encoders: bool = False) -> LoadedModel:
    """The frozen model and its tokenizer. shard: divide it among the processes of torchrun.
    encoders: take an encoder, too, which can be read, and not prompted."""
    is_on_hub = on_hub(settings.model)
    folder = from_hub(settings.model, settings.revision, encoders) if is_on_hub else \
        model_folder(settings)
    if folder.is_file():
        raise UserError(f"--model {settings.model}: a file: give the folder that it is in, "
                        f"{folder.parent}")
    if not folder.is_dir():
        raise UserError(f"--model {settings.model}: no such folder: download a model with "
                        "`hf download NAME --local-dir DIR` and give DIR")
    if settings.revision is not None and not is_on_hub:
        raise UserError(f"--revision {settings.revision}: {settings.model} is a folder, and only a "
                        "model of the hub has revisions: leave it out; or if the hub's is meant, "
                        "as a run may mean it, do this where no folder has its name")
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {settings.dtype}: use float32, bfloat16 or float16")
    check_device(settings.device)

    # A model that is divided among devices may be too large for one of them.
    with explained():
        module = architecture(folder, encoders)
        model = module.load(folder, settings.dtype, "cpu" if shard else settings.device, say)
    if shard:
        shard_model(model, settings.device)
    c = model.config
    check_tokenizer(folder)
    if folder != TINY and (folder / "tokenizer.json").is_file():
        try_tokenizer(folder / "tokenizer.json")
    bos = c.bos_token_id if settings.bos == "always" else None
    with silent_stderr():
        vocabulary = data.Vocabulary(folder, c.eos_token_id, bos, c.vocab_size, c.bos_token_id)
    # The name of a snapshot's folder is its commit, because a branch may move.
    revision = folder.name if is_on_hub else None
    loaded = LoadedModel(settings, model, vocabulary, folder, revision)
    check_vocabulary(loaded)
    return loaded


def check_vocabulary(loaded: LoadedModel) -> None:
    """Say what is unusual about a model's tokenizer. Raises UserError if it puts a token behind the
    texts of an encoder that this does not embed."""
    vocabulary, c, name = loaded.vocabulary, loaded.model.config, loaded.folder.name
    for remark in vocabulary.remarks:
        say(remark)
    if vocabulary.adds_bos and c.bos_token_id not in (None, vocabulary.bos):
        say(f"{name}: its tokenizer puts token {vocabulary.bos} in front of a text, as in "
            f"transformers, and config.json's bos_token_id is {c.bos_token_id}: both count as "
            "special")
    if vocabulary.unembedded:
        say(f"{name}: its tokenizer has {len(vocabulary.unembedded)} tokens that the model "
            f"does not embed, such as {next(iter(vocabulary.unembedded.values()))!r}; a text with "
            "one is refused")
    for i in vocabulary.unembedded.keys() & set(loaded.end):
        raise UserError(f"{vocabulary.path}: its post_processor puts token {i} behind every text, "
                        f"and the model embeds {c.vocab_size}: write the id there that "
                        "added_tokens gives to the same token, or fetch the tokenizer.json of this "
                        "model")
    if not loaded.is_encoder and not vocabulary.stop.intersection(vocabulary.encode_plain("a\n")):
        say(f"{name}: its tokenizer makes no token of a line break, so that an answer ends "
            "only by EOS or by its length")
    if vocabulary.bos is None and c.bos_token_id is not None:
        say(f"{name}: its tokenizer puts no BOS in front of a text, so there is none (--bos always "
            "puts one)")


def check_device(device: str) -> None:
    try:
        torch.zeros(0, device=device).cpu()  # the device "meta" has nothing to copy back
    except (RuntimeError, AssertionError, ImportError) as e:  # torch imports some kinds of device
        raise UserError(f"--device {device}: {str(e).splitlines()[0]}: use cpu") from None


def longest_text(loaded: LoadedModel, settings: DataSettings, prior: PriorSettings,
                 teacher: TeacherSettings = TeacherSettings()) -> int:
    """The most tokens of context, question and answer: --max-length, or 1024 or what fits the
    model's positions; of an encoder, whose positions are distances and have no end, --max-length or
    what it was trained on, with what stands behind. Raises UserError if --max-length does not
    fit."""
    if loaded.is_encoder:
        longest = settings.max_length or loaded.model.config.max_position_embeddings
        return longest - len(loaded.end)
    room, name, taken = room_for_text(loaded, settings, prior, teacher)
    longest = settings.max_length or min(1024, room)
    if not room:
        raise UserError(f"the {name} of {taken} tokens and --max-new {settings.max_new} leave none "
                        f"of the model's {loaded.model.config.max_position_embeddings} positions: "
                        f"shorten the {name}, or lower --max-new")
    if not 0 < longest <= room:
        raise UserError(f"--max-length {longest}: the model has "
                        f"{loaded.model.config.max_position_embeddings} positions, and the {name} "
                        f"of {taken} tokens and --max-new {settings.max_new} leave {room} of them: "
                        "lower --max-length, or shorten the others")
    return longest


def room_for_text(loaded: LoadedModel, settings: DataSettings, prior: PriorSettings,
                  teacher: TeacherSettings = TeacherSettings()) -> tuple[int, str, int]:
    """The positions that the longest prompt and the answer leave, and that prompt's name and
    tokens, with a teacher's steps. Raises UserError for a text without a token."""
    tokens = {"prompt": rows_per_layer(prior)}
    texts = dict(zip(text_names(prior.text or ()), prior.text or ()))
    if teacher.teacher is not None:
        texts["teacher"] = teacher.teacher
    for name, text in texts.items():
        beginning = loaded.vocabulary.encode_plain(text + (prior.separator or ""))
        if not beginning:
            raise UserError(f"the {name} has no token: leave it out")
        tokens[name] = len(beginning)
    if teacher.teacher_reasons:
        cue = len(loaded.vocabulary.encode_plain(STEPS))
        tokens["teacher"] = tokens.get("teacher", 0) + cue + teacher.teacher_steps
    name, taken = max(tokens.items(), key=lambda item: item[1])
    positions = loaded.model.config.max_position_embeddings
    return max(positions - taken - settings.max_new, 0), name, taken


def rows_per_layer(prior: PriorSettings) -> int:
    return prior.tokens or TOKENS


def layers_with_rows(prior: PriorSettings, L: int, prompt: PromptSettings | None = None
                     ) -> list[int]:
    """The layers of L that own rows, or keys and values of a prefix."""
    if prompt is not None and prompt.method == "prefix":
        count = L if prompt.prefix_layers is None else prompt.prefix_layers
        if not 0 < count <= L or not prior.tokens:
            raise UserError(f"--prefix-layers {count}, --tokens {prior.tokens}: the model has {L} "
                            f"layers: give 1 to {L}, and at least one token")
        return list(range(L - count, L))
    if prior.deep_layers > L or not (prior.tokens or prior.deep_layers):
        raise UserError(f"--tokens {prior.tokens} --deep-layers {prior.deep_layers}: the model has "
                        f"{L} layers; give 0 to {L} deep layers, and rows at the tokens, at deep "
                        "layers, or both")
    layers = set(range(L - prior.deep_layers, L))
    if prior.tokens:
        layers.add(0)
    return sorted(layers)


def check_place(prompt: PromptSettings, loaded: LoadedModel, model: str) -> None:
    if prompt.place == "after-bos" and loaded.vocabulary.bos is None:
        raise UserError(f"--place after-bos: {model} has no BOS: use --place before or suffix")


# --------------------------------------------------------------------------------------------------
# questions

FEW_UNITS = 10  # fewer independent units give no error or interval worth printing
STEPS = "\nSteps:"  # what asks for worked steps, before the answer is asked for
ROWS_KEPT = 10000  # token rows of a data set that are kept, at some 10 KB each
SIZED = 1000  # questions whose answers' lengths are averaged, in a tenth of a second


def parse_spec(spec: str, split: int) -> tuple[str, str]:
    """"squad:PATH" -> ("squad", PATH); "squad" -> the bundled one's split 0 (train) or 1 (eval).
    Raises UserError for an unknown kind, and for files that are no data; DataError if there are
    none."""
    kind, _, path = spec.partition(":")
    if kind not in data.READERS:
        raise UserError(f"data {spec!r}: unknown kind {kind!r}: write KIND:PATH with KIND one of "
                        f"{', '.join(data.READERS)}")
    if not path and kind not in BUNDLED:
        raise UserError(f"data {spec!r}: there is no bundled {kind} data: write {kind}:PATH")
    path = path or str(TINY / BUNDLED[kind][split])
    check_data(kind, path)
    return kind, path


def read_questions(spec: str, split: int, keep_unanswerable: bool) -> list[data.Example]:
    kind, path = parse_spec(spec, split)
    if kind == "text":
        raise UserError(f"data {spec!r}: text has no questions and answers to train or evaluate "
                        "on: use it with --reference, and questions here")
    examples = data.read(kind, path)
    say_files(kind, path)
    several_lines = sum(any("\n" in answer for answer in e.answers) for e in examples)
    if several_lines:
        say(f"{path}: {several_lines} of {len(examples)} questions have answers of several lines, "
            "which are trained and scored as one line each")
    answerable = [e for e in examples if e.answers]
    if keep_unanswerable or len(answerable) == len(examples):
        return examples
    if not answerable:
        raise UserError(f"{path}: no answerable question in it: use --keep-unanswerable, or other "
                        "data")
    say(f"{path}: {len(examples) - len(answerable)} of {len(examples)} questions are unanswerable "
        "and dropped (--keep-unanswerable keeps them)")
    return answerable


def say_files(kind: str, path: str) -> None:
    """Say which files of a folder or a glob are not read, and whether they are of several
    splits."""
    files = data.files_of(kind, path)
    matching = data.matching_files(kind, path)
    left_out = [file.name for file in matching if file not in files]
    if left_out:
        say(f"{path}: {len(left_out)} of {len(matching)} files left out, because their names are "
            f"no module's: {some_of(left_out)}")
    splits = sorted({file.parent.name for file in files})
    if len(splits) > 1:
        say(f"{path}: its splits are mixed: {', '.join(splits[:9])}")
    elif len(files) > 1 and not Path(path).is_relative_to(TINY):
        say(f"{path}: {len(files)} files are read together: "
            f"{some_of([file.name for file in files])}")


def some_of(names: list[str]) -> str:
    """Names with commas between them, the first four of more."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def topic(example: data.Example) -> str:
    """Examples of one topic are never divided between training and evaluation."""
    return example.context or example.question


def unit(example: data.Example) -> str:
    """The article or arithmetic module that an example is of; if its file names none, its topic.
    Statistics take examples of one unit as dependent, and those of others as independent."""
    return example.source or topic(example)


def independent_units(examples: list[data.Example]) -> np.ndarray:
    """The number (N,) of the unit that each example is of, or if they are of fewer than FEW_UNITS,
    of its topic. What is found then holds of these articles or modules, and not of others."""
    for kind in (unit, topic):
        names, numbers = np.unique(list(map(kind, examples)), return_inverse=True)
        if len(names) >= FEW_UNITS:
            break
    return numbers


def sample_topics(examples: list[data.Example], count: int) -> list[data.Example]:
    """`count` examples (0: all) in the order of the data, always the same ones. Whole topics are
    drawn as far as they fit."""
    order = data.Order(list(map(topic, examples)), 1, seed=0).epoch(0)
    if count:
        order = order[:count]
    return [examples[i] for i in sorted(order)]


class Examples(NamedTuple):
    """Data, divided by whole topics."""

    training: list[data.Example]
    evaluation: list[data.Example]
    held_out: list[data.Example]  # to choose settings by; none without --hold-out


def divided(settings: DataSettings) -> Examples:
    """The examples of --data and --eval-data. Without --eval-data a tenth of the training data is
    held out for evaluation; with --hold-out another tenth is held out, to choose settings by."""
    examples, held_out = read_questions(settings.data, 0, settings.keep_unanswerable), []
    if settings.eval_data is not None:
        evals = evaluation_examples(settings)
    else:
        examples, evals = _hold_out(examples, settings, "for evaluation (no --eval-data)",
                                    "give --eval-data")
        evals = sample_topics(evals, settings.eval_limit)  # a topic may have any number
    if settings.hold_out:
        examples, held_out = _hold_out(examples, settings, "to choose settings by (--hold-out)",
                                     "leave out --hold-out, or several --lr")
    return Examples(sample_topics(examples, settings.train_examples), evals, held_out)


def evaluation_examples(settings: DataSettings) -> list[data.Example]:
    """The examples to evaluate on. The training data are read only where these are a part of
    them."""
    if settings.eval_data is None:
        return divided(settings).evaluation
    evals = read_questions(settings.eval_data, 1, settings.keep_unanswerable)
    return sample_topics(evals, settings.eval_limit)


def _hold_out(examples: list[data.Example], settings: DataSettings, purpose: str, remedy: str
              ) -> tuple[list[data.Example], list[data.Example]]:
    """Examples without about a tenth of them, and these."""
    # Draw a tenth of the questions, and hold out all questions of their topics, so that no
    # paragraph that is scored was trained on.
    count = max(len(examples) // 10, 1)
    drawn = sample_topics(examples, min(count, settings.eval_limit or count))
    topics = set(map(topic, drawn))
    held_out = [e for e in examples if topic(e) in topics]
    if len(held_out) == len(examples):
        raise UserError(f"--data {settings.data}: all {len(examples)} questions share one context, "
                        f"so none can be held out: {remedy}")
    say(f"{len(held_out)} of {len(examples)} questions held out {purpose}")
    return [e for e in examples if topic(e) not in topics], held_out


class Questions:
    """What a prompt is trained or scored on: examples, and the same as token rows, which are made
    when they are first asked for.

    beginning: a text in front of every example's own. asking: what stands between each question
    and its answer; without it data.ASKING."""

    unit = "questions"  # what they are called where progress is shown

    def __init__(self, examples: list[data.Example], vocabulary: data.Vocabulary, max_length: int,
                 name: str, beginning: str = "", asking: list[str] | None = None):
        self.examples, self.vocabulary, self.max_length = examples, vocabulary, max_length
        self.name, self.beginning, self.asking = name, beginning, asking
        self.cut: dict[int, int] = {}  # tokens that contexts lost, of the rows made so far
        kept = ROWS_KEPT // (1 + len(beginning) // 500)
        self.row = functools.lru_cache(maxsize=kept)(self._make_row)

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: list[int], share: bool, place: str, device) -> data.Batch:
        """share: compute what questions of one context have in common once. place: the prompt's."""
        rows = [self.row(i) for i in indices]
        return data.collate(rows, share, place == "suffix").to(device)

    def clusters(self) -> np.ndarray | None:
        """The independent units (N,) of a standard error; None of fewer than FEW_UNITS, which tell
        too little."""
        numbers = independent_units(self.examples)
        return numbers if numbers.max() + 1 >= FEW_UNITS else None

    def each_choice(self) -> Questions:
        """Every choice of every question of multiple choice, as if it were the right answer; none
        of other questions."""
        examples = [choice for e in self.examples if e.choices for choice in each_choice(e)]
        asking = None
        if self.asking:
            asking = [text for e, text in zip(self.examples, self.asking) for _ in e.choices]
        return Choices(examples, self.vocabulary, self.max_length, self.name, self.beginning,
                       asking)

    def say_cut(self) -> None:
        """Say how many contexts were cut, of those that this process has read."""
        cut = [tokens for tokens in self.cut.values() if tokens]
        if cut:
            say(f"{self.name}: {len(cut)} of the {len(self.cut)} contexts read were cut at their "
                f"end to fit {self.max_length} tokens, by {sum(cut) / len(cut):.0f} tokens on "
                "average (--max-length)")

    def _make_row(self, i: int) -> data.Row:
        asking = self.asking[i] if self.asking else data.ASKING
        row = data.encode(self.examples[i], self.vocabulary, self.max_length, self.beginning,
                          asking)
        is_taught = self.beginning or self.asking  # and was said of the questions without these
        if row.cut and not any(self.cut.values()) and not is_taught:
            say(f"{self.name}: the context of {self.examples[i].id} is cut at its end to fit "
                f"{self.max_length} tokens, and so are others as long (--max-length)")
        self.cut[i] = row.cut
        return row


class Choices(Questions):
    """Questions of multiple choice with each of their choices."""

    def _make_row(self, i: int) -> data.Row:
        # The choices of one question share not only its context but the question itself.
        row = super()._make_row(i)
        return row._replace(context=f"{row.context}\n{self.examples[i].question}")


def each_choice(example: data.Example) -> list[data.Example]:
    """An example with each of its choices as its answer; itself if it has none."""
    return [example._replace(answers=(choice,)) for choice in example.choices] or [example]


def encode(examples: list[data.Example], vocabulary: data.Vocabulary, max_length: int,
           name: str) -> Questions:
    """The questions of those examples that fit max_length with a shortened context. Says how many
    do not."""
    unsure = [(i, answered) for i, e in enumerate(examples) for answered in each_choice(e)
              if not data.surely_fits(answered, vocabulary, max_length)]
    lengths = data.sizes([answered for _, answered in unsure], vocabulary)
    too_long = {i for (i, _), (tokens, _) in zip(unsure, lengths) if tokens > max_length}
    if too_long:
        say(f"{name}: {counted(len(too_long), 'question')} dropped, longer than {max_length} "
            "tokens without any context")
    fitting = [e for i, e in enumerate(examples) if i not in too_long]
    if not fitting:
        raise UserError(f"{name}: no question fits {max_length} tokens: raise --max-length")
    return Questions(fitting, vocabulary, max_length, name)


def mean_answer_tokens(questions: Questions) -> float:
    """The mean number of an answer's tokens, of at most SIZED questions, drawn at random but always
    the same ones. An answer is tokenised without its context, from which a line break parts it.
    Raises UserError if they have none."""
    count = min(len(questions), SIZED)
    drawn = random.Random(0).sample(questions.examples, count)
    mean = sum(tokens for _, tokens in data.sizes(drawn, questions.vocabulary)) / count
    if not mean:
        raise UserError(f"{questions.vocabulary.path}: it makes no tokens of the answers, so there "
                        "is nothing to train on: fetch the tokenizer.json of this model")
    return mean


class Plain(NamedTuple):
    """What a trained prompt is compared with: no prompt, or a text prompt."""

    split: str  # in metrics.jsonl
    name: str
    past: llama.Past | Text
    questions: Questions  # what follows a Past, or begins with a Text


def run_text(loaded: LoadedModel, text: str) -> Text:
    """A text that others begin with, run through the model after BOS."""
    ids = torch.tensor(loaded.vocabulary.encode(text), dtype=torch.int64, device=loaded.device)
    return Text(ids, loaded.model.extend(ids[None]))


def plain_prompts(loaded: LoadedModel, prior: PriorSettings, questions: Questions) -> list[Plain]:
    """No prompt, and the text prompts of the settings, each with the questions as it asks them."""
    plain = [Plain("baseline", "no prompt", loaded.model.empty(), questions)]
    for name, text in zip(text_names(prior.text), prior.text):
        if prior.separator is None:  # before BOS, as in early runs
            ids = loaded.vocabulary.encode_plain(text)
            past = loaded.model.extend(torch.tensor([ids], device=loaded.device))
            plain.append(Plain("text", name, past, questions))
            continue
        beginning = text + prior.separator
        asked = type(questions)(questions.examples, loaded.vocabulary, questions.max_length,
                                questions.name, beginning)
        plain.append(Plain("text", name, run_text(loaded, beginning), asked))
    return plain


# --------------------------------------------------------------------------------------------------
# checksums


def model_files(settings: ModelSettings) -> list[Path]:
    """The files that make the model what it is; its folder may hold others."""
    folder = model_folder(settings)
    return [folder / name for name in needed_files(folder) if (folder / name).is_file()]


def checksums(settings: Settings, shared: Shared | None = None) -> dict[str, str]:
    """SHA-256 of each input: the model, its generation config, the training data, the evaluation
    data, and the references that are none of these."""
    shared = shared or Shared()
    generation = model_folder(settings.model) / GENERATION
    files = {"model": model_files(settings.model),
             GENERATION: [generation] if generation.is_file() else [],
             "data": data.files_of(*parse_spec(settings.data.data, 0))}
    if settings.data.eval_data:
        files["eval_data"] = data.files_of(*parse_spec(settings.data.eval_data, 1))
    if settings.data.forget:
        files["forget"] = data.files_of(*parse_spec(settings.data.forget, 1))
    files["reference"] = reference_files(settings.prior)
    return {name: shared.once(("checksum", name), paths, lambda: checksum(paths))
            for name, paths in files.items() if paths}


def reference_files(prior: PriorSettings) -> list[Path]:
    """The files of collections, data and runs that a prior is fitted on."""
    files = []
    for path in priors.parse(prior.prior)[2]:
        run = Run(Path(path))
        run.tensors()  # refuses what is no run
        files.append(run.path / "prompt.safetensors")
    for spec in prior.reference:
        if spec.startswith("collection:"):
            files.append(collection_of(spec)[0])
        elif spec != "vocab":
            files += data.files_of(*parse_spec(spec, 0))
    return files


def collection_of(spec: str) -> tuple[Path, str | None]:
    """"collection:FILE#DOMAIN" -> the file, and the domain or None."""
    path, _, domain = spec.removeprefix("collection:").partition("#")
    if not Path(path).is_file():
        raise UserError(f"reference {spec!r}: no such file: write collection:FILE with a file that "
                        "collect made")
    return Path(path), domain or None


def check_same_model(settings: ModelSettings, sha256: str | None, path: Path) -> None:
    if sha256 != checksum(model_files(settings)):
        raise UserError(f"{path}: made with other weights than {settings.model}: its vectors mean "
                        "nothing here; give the --model it was made with")
