"""From the name of a model to the folder that holds it: a folder, the hub's cache, or the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

import llama
from lab.console import UserError, one_line, say
from lab.foreign_models import architecture, explained
from lab.settings import TINY, ModelSettings, on_hub

GENERATION = "generation_config.json"  # names the tokens that end an answer, beside config.json
SETTINGS = "tokenizer_config.json"  # may name tokens that tokenizer.json has not
# Files that not every model has -> what is not known without them.
OPTIONAL = {GENERATION: "config.json alone says which tokens end an answer",
            SETTINGS: "tokenizer.json alone says which tokens there are"}
WANTED = ["config.json", "tokenizer.json", "tokenizer.*.json", "model.safetensors.index.json",
          "*.safetensors", *OPTIONAL, "special_tokens_map.json", "added_tokens.json"]
UNWANTED = ["*/*", "consolidated*"]  # the same weights again, in another layout


def model_folder(settings: ModelSettings) -> Path:
    """The folder of a model, without asking the hub. For a model of the hub that is not in the
    cache, this is the path that its name would be as a folder; nothing is there then."""
    if settings.model == "tiny":
        return TINY
    if on_hub(settings.model):
        folder = cached(settings.model, settings.revision)
        if folder:
            return folder
    return Path(settings.model)


def needed_files(folder: Path) -> list[str]:
    """What a model's folder must have to be loaded: its configuration, tokenizer and weights."""
    with explained():
        weights = llama.weight_files(folder)
    return sorted({"config.json", "tokenizer.json", *weights})


def missing_files(folder: Path) -> list[str]:
    return [name for name in needed_files(folder) if not (folder / name).exists()]


def cached(name: str, revision: str | None) -> Path | None:
    """The folder of the hub's model in the cache on this disk, if all of it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as e:
        raise UserError(f"--model {name}: no such folder, and {one_line(str(e))}: give a folder, "
                        "or NAME/MODEL of the hub") from None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and not missing_files(folder) else None


def from_hub(name: str, revision: str | None, encoders: bool = False) -> Path:
    """The folder of a model of the hub. If the cache has all that loading needs, no network is
    used. encoders: see foreign_models.architecture."""
    from huggingface_hub import try_to_load_from_cache

    folder = cached(name, revision)
    if folder is None:
        return fetch(name, revision, encoders)
    # None means that the file is not there and that nobody has asked the hub for it yet.
    for file, consequence in OPTIONAL.items():
        if try_to_load_from_cache(name, file, revision=folder.name) is None:
            say(f"{name}: no {file} in the cache, so {consequence}: `hf download {name} {file} "
                f"--revision {folder.name}` fetches it, if there is one")
    return folder


def fetch(name: str, revision: str | None, encoders: bool = False) -> Path:
    """Download a model into the hub's cache -> its folder there. Only files that loading needs are
    fetched, and the weights only after the configuration turned out to be of a known model."""
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    with _download_errors(name, revision, command):
        folder = _download(name, revision, encoders)
    missing = missing_files(folder)
    if missing:  # also of a cache that was filled in part, when the hub does not answer
        raise UserError(f"--model {name}: no {', '.join(missing)} came from the hub or its cache: "
                        f"run `{command}` where there is a network, or choose a model that has a "
                        "tokenizer.json and safetensors weights")
    return folder


def _download(name: str, revision: str | None, encoders: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    # The configuration is small, and tells whether the weights are worth fetching.
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
    if (folder / "config.json").exists():
        architecture(folder, encoders).read_config(folder / "config.json")
    # The name of the snapshot's folder is the commit, so that both downloads are of one version.
    folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=WANTED,
                                    ignore_patterns=UNWANTED))
    for file in OPTIONAL:
        if not (folder / file).exists():
            # Asking once writes into the cache that the hub has none.
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(name, file, revision=folder.name)
    return folder


@contextlib.contextmanager
def _download_errors(name: str, revision: str | None, command: str):
    """Turn what a download raises into a UserError with the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (GatedRepoError, LocalEntryNotFoundError,
                                        RepositoryNotFoundError, RevisionNotFoundError)

    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except (llama.ModelError, UserError):
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
    except Exception as e:  # errors of the network's library and of the disk have no common class
        raise UserError(f"--model {name}: the download failed ({one_line(str(e))[:300]}): run "
                        f"`{command}`, which goes on where it stopped") from e
