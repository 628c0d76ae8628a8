"""From settings to what a command works with: the model, its tokenizer, questions, checksums.

    loaded = load_model(settings.model)                       # a folder, or a model of the hub
    examples, evals = training_and_evaluation(settings.data)
    questions = encode(examples, loaded.vocabulary, max_length, "training")

What a user got wrong is refused here in one line, before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

import data
import llama
import priors
from lab.console import UserError, progress, say
from lab.files import checksum
from lab.folder import Run
from lab.hub import GENERATION, from_hub, model_folder, needed_files
from lab.processes import shard_model
from lab.settings import (BUNDLED, TINY, TOKENS, DataSettings, ModelSettings, PriorSettings,
                          PromptSettings, Settings, on_hub, text_name)

# --------------------------------------------------------------------------------------------------
# the model


class LoadedModel(NamedTuple):
    settings: ModelSettings
    model: llama.Llama
    vocabulary: data.Vocabulary
    folder: Path
    revision: str | None  # the commit of a model of the hub

    @property
    def device(self) -> torch.device:
        return self.model.embeddings.device


def load_model(settings: ModelSettings, shard: bool = False) -> LoadedModel:
    """The frozen model and its tokenizer. shard: divide it among the processes of torchrun."""
    is_on_hub = on_hub(settings.model)
    folder = from_hub(settings.model, settings.revision) if is_on_hub else model_folder(settings)
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
    model = llama.load(folder, settings.dtype, "cpu" if shard else settings.device)
    if shard:
        shard_model(model, settings.device)
    c = model.config
    vocabulary = data.Vocabulary(folder, c.bos_token_id, c.eos_token_id)
    if vocabulary.size > c.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {vocabulary.size} tokens and the model "
                        f"embeds {c.vocab_size}: the two are not of one model; fetch both again")
    # The name of a snapshot's folder is its commit, because a branch may move.
    revision = folder.name if is_on_hub else None
    return LoadedModel(settings, model, vocabulary, folder, revision)


def check_device(device: str) -> None:
    try:
        torch.zeros(0, device=device).cpu()  # the device "meta" has nothing to copy back
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device}: {str(e).splitlines()[0]}: use cpu") from None


def longest_text(loaded: LoadedModel, settings: DataSettings, prior: PriorSettings) -> int:
    """The most tokens of context, question and answer: --max-length, or 1024 or what fits the
    model's positions. Raises UserError if --max-length does not fit."""
    text_tokens = len(loaded.vocabulary.encode_plain(prior.text))
    taken = max(rows_per_layer(prior), text_tokens) + settings.max_new
    positions = loaded.model.config.max_position_embeddings
    room = max(positions - taken, 0)
    longest = settings.max_length or min(1024, room)
    if not 0 < longest <= room:
        raise UserError(f"--max-length {longest}: the model has {positions} positions, and "
                        f"--tokens or --text with --max-new takes {taken} of them, which leaves "
                        f"{room}")
    return longest


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
                        "on: use it with --reference, and questions here")
    examples = data.read(kind, path)
    answerable = [e for e in examples if e.answers]
    if keep_unanswerable or len(answerable) == len(examples):
        return examples
    if not answerable:
        raise UserError(f"{path}: no answerable question in it: use --keep-unanswerable, or other "
                        "data")
    say(f"{path}: {len(examples) - len(answerable)} of {len(examples)} questions are unanswerable "
        "and dropped (--keep-unanswerable keeps them)")
    return answerable


def topic(example: data.Example) -> str:
    """Examples of one topic are never divided between training and evaluation."""
    return example.context or example.question


def sample_topics(examples: list[data.Example], count: int) -> list[data.Example]:
    """`count` examples (0: all) in the order of the data, always the same ones. Whole topics are
    drawn as far as they fit."""
    order = data.Order(list(map(topic, examples)), 1, seed=0).epoch(0)
    if count:
        order = order[:count]
    return [examples[i] for i in sorted(order)]


def training_and_evaluation(settings: DataSettings
                            ) -> tuple[list[data.Example], list[data.Example]]:
    """The examples to train and to evaluate on. Without --eval-data a tenth of the training data is
    held out, by whole topics."""
    examples = read_questions(settings.data, 0, settings.keep_unanswerable)
    if settings.eval_data is not None:
        evals = read_questions(settings.eval_data, 1, settings.keep_unanswerable)
        return (sample_topics(examples, settings.train_examples),
                sample_topics(evals, settings.eval_limit))

    # Draw a tenth of the questions, and hold out all questions of their topics, so that no
    # evaluated paragraph was trained on.
    count = max(len(examples) // 10, 1)
    held_out = sample_topics(examples, min(count, settings.eval_limit or count))
    topics = set(map(topic, held_out))
    evals = [e for e in examples if topic(e) in topics]
    if len(evals) == len(examples):
        raise UserError(f"--data {settings.data}: all {len(examples)} questions share one context, "
                        "so none can be held out: give --eval-data")
    say(f"{len(evals)} of {len(examples)} questions held out for evaluation (no --eval-data)")
    others = [e for e in examples if topic(e) not in topics]
    return sample_topics(others, settings.train_examples), evals


class Questions(NamedTuple):
    """What a prompt is trained or scored on: examples, and the same as token rows."""

    examples: list[data.Example]
    rows: list[data.Row]

    def batch(self, indices: list[int], share: bool, place: str, device) -> data.Batch:
        """share: compute what questions of one context have in common once. place: the prompt's."""
        rows = [self.rows[i] for i in indices]
        return data.collate(rows, share, place == "suffix").to(device)


def encode(examples: list[data.Example], vocabulary: data.Vocabulary, max_length: int,
           name: str) -> Questions:
    """Examples with their token rows, without those that do not fit. Says what was cut."""
    rows = [data.encode(example, vocabulary, max_length)
            for example in progress(examples, desc=f"{name} tokens",
                                    unit=" questions", leave=False)]
    cut = [row.cut for row in rows if row and row.cut]
    if cut:
        say(f"{name}: {len(cut)} of {len(rows)} contexts cut at their end to fit {max_length} "
            f"tokens, {sum(cut) / len(cut):.0f} tokens on average (--max-length)")
    if None in rows:
        say(f"{name}: {rows.count(None)} questions dropped, longer than {max_length} tokens "
            "without any context")
    fitting = [i for i, row in enumerate(rows) if row]
    if not fitting:
        raise UserError(f"{name}: no question fits {max_length} tokens: raise --max-length")
    return Questions([examples[i] for i in fitting], [rows[i] for i in fitting])


def plain_pasts(loaded: LoadedModel, texts: tuple[str, ...], settings: DataSettings,
                max_length: int) -> dict[str, tuple[str, list[llama.Past]]]:
    """What a trained prompt is compared with, {split: (name, [Past])}: no prompt, and text
    prompts."""
    pasts = {"baseline": ("no prompt", [loaded.model.empty()])}
    room = loaded.model.config.max_position_embeddings - max_length - settings.max_new
    for i, text in enumerate(texts, 1):
        ids = loaded.vocabulary.encode_plain(text)
        if not 0 < len(ids) <= room:
            raise UserError(f"the {text_name(text)} has {len(ids)} tokens: give 1 to {room}, or "
                            f"less --max-length (now {max_length})")
        split = "text" if i == 1 else f"text {i}"
        past = loaded.model.extend(torch.tensor([ids], device=loaded.device))
        pasts[split] = (text_name(text), [past])
    return pasts


# --------------------------------------------------------------------------------------------------
# checksums


def model_files(settings: ModelSettings) -> list[Path]:
    """The files that make the model what it is; its folder may hold others."""
    folder = model_folder(settings)
    return [folder / name for name in needed_files(folder) if (folder / name).is_file()]


def checksums(settings: Settings) -> dict[str, str]:
    """SHA-256 of each input: the model, its generation config, the training data, the evaluation
    data, and the references that are none of these."""
    generation = model_folder(settings.model) / GENERATION
    files = {"model": model_files(settings.model),
             GENERATION: [generation] if generation.is_file() else [],
             "data": data.files_of(*parse_spec(settings.data.data, 0))}
    if settings.data.eval_data:
        files["eval_data"] = data.files_of(*parse_spec(settings.data.eval_data, 1))
    files["reference"] = reference_files(settings.prior)
    return {name: checksum(paths) for name, paths in files.items() if paths}


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
