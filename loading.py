"""From settings to what a command works with: the model, from a folder or the hub, and the data.

Settings are the flat namespace `a` of settings.py. What comes from a user is refused here in one
line, before anything is written.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import llama
import priors
from run import Run
from settings import BUNDLED, TINY, TOKENS, UserError, on_hub, one_line, say, text_name
from train import Questions, progress, shard


def model_folder(a: SimpleNamespace) -> Path:
    """Where the model is, or for one of the hub that is not in the cache would be if it was none:
    nothing is fetched."""
    if a.model == "tiny":
        return TINY
    return on_hub(a.model) and cached(a.model, a.revision) or Path(a.model)


ENDS = "generation_config.json"
HUB_FILES = ["config.json", ENDS, "tokenizer.json", "model.safetensors.index.json", "*.safetensors"]
NOT_HUB_FILES = ["*/*", "consolidated*"]  # the same weights once more, in another layout


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


def from_hub(name: str, revision: str | None) -> Path:
    """The folder of a model of the hub: the cache's, and no network is asked, if all of it is there
    that a model cannot be loaded without."""
    from huggingface_hub import try_to_load_from_cache

    folder = cached(name, revision)
    if folder is None:
        return fetch(name, revision)
    # None: not there, and nobody has asked the hub yet
    if try_to_load_from_cache(name, ENDS, revision=folder.name) is None:
        say(f"{name}: no {ENDS} in the cache, so config.json alone says which tokens end an "
            f"answer: `hf download {name} {ENDS} --revision {folder.name}` fetches it, if there is "
            "one")
    return folder


def needed_files(folder: Path) -> list[str]:
    """What a model's folder must have to be loaded: its configuration, tokenizer and weights."""
    weights, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        shards = data.read_json(index, dict).get("weight_map")
        weights = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    return sorted({"config.json", "tokenizer.json", *weights})


def missing_files(folder: Path) -> list[str]:
    return [name for name in needed_files(folder) if not (folder / name).exists()]


def fetch(name: str, revision: str | None) -> Path:
    """A model of the hub, from the hub into its cache: what is needed of it and no more, the
    weights only after the configuration was found to be a LLaMA's."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError,
                                        RepositoryNotFoundError, RevisionNotFoundError)

    page = f"{constants.ENDPOINT}/{name}"
    command = f"hf download {name}{f' --revision {revision}' if revision else ''}"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
        if (folder / "config.json").exists():
            llama.read_config(folder / "config.json")
        folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=HUB_FILES,
                                        ignore_patterns=NOT_HUB_FILES))
        if not (folder / ENDS).exists():
            with contextlib.suppress(EntryNotFoundError):  # from now on the cache knows that too
                hf_hub_download(name, ENDS, revision=folder.name)
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
        raise UserError(f"--model {name}: no {', '.join(missing)} came from the hub or its cache: "
                        f"run `{command}` where there is a network, or choose a model that has a "
                        "tokenizer.json and safetensors weights")
    return folder


def load_model(a: SimpleNamespace):
    """The frozen model and its tokenizer; settles a.max_length by the model's positions."""
    folder, hub = model_folder(a), on_hub(a.model)
    if hub:
        folder = from_hub(a.model, a.revision)
    if not folder.is_dir():
        raise UserError(f"--model {a.model}: no such folder: download a model with "
                        "`hf download NAME --local-dir DIR` and give DIR")
    if a.revision is not None and not hub:
        raise UserError(f"--revision {a.revision}: {a.model} is a folder, and only a model of the "
                        "hub has revisions: leave it out; or if the hub's is meant, as a run may "
                        "mean it, do this where no folder has its name")
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
    """The files that make the model what it is, whatever else lies in its folder."""
    folder = model_folder(a)
    return [folder / name for name in needed_files(folder) if (folder / name).is_file()]


def checksums(a: SimpleNamespace) -> dict[str, str]:
    """The sums of the model, of the tokens that end its answers, the training data, the evaluation
    data, and what the prior is fitted on if that is none of these."""
    ends = model_folder(a) / ENDS
    files = {"model": model_files(a), ENDS: [ends] * ends.is_file(),
             "data": data.files_of(*parse_spec(a.data, 0))}
    if a.eval_data:
        files["eval_data"] = data.files_of(*parse_spec(a.eval_data, 1))
    files["reference"] = reference_files(a)
    return {key: checksum(paths) for key, paths in files.items() if paths}


def reference_files(a: SimpleNamespace) -> list[Path]:
    """The files of collections, data and runs that a prior is fitted on."""
    found = []
    for run in map(Run, priors.parse(a.prior)[2]):
        run.config(), run.rows("prompt.safetensors")  # refuses what is none before it is summed up
        found.append(run.path / "prompt.safetensors")
    for spec in a.reference:
        if spec.startswith("collection:"):
            found.append(collection_of(spec)[0])
        elif spec != "vocab":
            found += data.files_of(*parse_spec(spec, 0))
    return found


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
        try:
            with open(llama.regular(path), "rb") as f:
                h.update(hashlib.file_digest(f, "sha256").digest())
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({llama.cause(e)}): restore it") from None
    return h.hexdigest()


def check_same_model(a: SimpleNamespace, sha256: str | None, path: Path) -> None:
    if sha256 != checksum(model_files(a)):
        raise UserError(f"{path}: made with other weights than {a.model}: its vectors mean "
                        "nothing here; give the --model it was made with")
