"""Adapters: a prompt as Hugging Face's PEFT loads it, PEFT's prompts back, and a run's log as a
table; the commands export and import. Rows for other programs are serving.py's.

    files = to_peft(model, rows, "meta-llama/Llama-3.2-1B")             # {name: bytes}
    files = to_peft(model, prompt.past(model), "meta-llama/Llama-3.2-1B")
    prompt = from_peft(Path("adapter"), model)                          # llama.Prompt

PEFT has two forms that are exact. Rows at the token embeddings whose outputs go on are
PROMPT_TUNING. Any other prompt in front of the text never sees the text, so the keys and values
that it leaves in the layers are constants, and PREFIX_TUNING is a table of them. Formats as peft
0.21 writes and reads them. PEFT keeps keys rotated, as they are in the cache; a Prompt has them
before rotation.

n prompt rows, D width, L layers, G key/value heads, hd head width.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import data
import llama
from lab.commands import ExportOptions, ImportOptions
from lab.console import UserError, counted, say, show
from lab.evaluation import OpenRun, open_run
from lab.files import (SMALL, begins_with, free_folder, free_place, new_folder, read_tensors,
                       reading, write_file)
from lab.folder import CONFIG as RUN_CONFIG
from lab.folder import FIRST_PROMPT, LAST_PROMPT, Run, versions
from lab.foreign_data import not_foreign
from lab.hub import cached, model_folder
from lab.inputs import check_place, check_same_model, checksums, load_model, longest_text
from lab.serving import export_rows, free_file
from lab.settings import ModelSettings, Settings, flat, from_flags, on_hub, spec_name
from lab.train import check_new

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ABOUT = "promptprior.json"  # what only adapters of our making have: the run that it is of
# PEFT's names of the two forms. A trained encoder is not in the file, only what it encodes.
ROWS, PREFIX = ("PROMPT_TUNING", "P_TUNING"), ("PREFIX_TUNING", "CARTRIDGE")
# The largest difference between logits before and after, as a share of the largest logit: the
# numbers are the same, but a device may add them up in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
# Of rows in numpy's format: bytes of the header, which has a shape and a type, and all numbers.
LONGEST_HEADER, MOST_NUMBERS = 1000, 2**28


# --------------------------------------------------------------------------------------------------
# to PEFT


@torch.no_grad()
def to_peft(model: llama.Llama, prompt: Tensor | llama.Past, base: str,
            revision: str | None = None) -> dict[str, bytes]:
    """The files of a PEFT adapter, in fp32 as PEFT writes them. prompt: rows (n, D) at the token
    embeddings whose outputs go on, or what any prompt leaves in the layers, of batch 1. base and
    revision: the model's name on the hub, or its folder.

    Raises UserError for a prompt that not all layers have. PEFT's prefix is in every layer, and
    no key has zero weight for every query."""
    c = model.config
    if isinstance(prompt, Tensor):
        numbers = prompt
        form = {"peft_type": "PROMPT_TUNING", "num_attention_heads": c.num_attention_heads,
                "token_dim": c.hidden_size, "prompt_tuning_init": "RANDOM",
                "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
                "tokenizer_kwargs": None}
    else:
        check_in_all_layers(prompt)
        numbers = prefix_numbers(prompt)
        form = {"peft_type": "PREFIX_TUNING", "num_attention_heads": c.num_key_value_heads,
                "token_dim": c.num_key_value_heads * c.head_dim, "prefix_projection": False,
                "encoder_hidden_size": None, "init_weights": None}

    # Without a task_type PEFT loads an adapter and does not apply it.
    config = {**form, "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "revision": revision, "inference_mode": True, "num_virtual_tokens": len(numbers),
              "num_layers": c.num_hidden_layers, "num_transformer_submodules": 1,
              "auto_mapping": None, "modules_to_save": None}
    tensors = {"prompt_embeddings": numbers.float().cpu().contiguous()}
    return {WEIGHTS: save(tensors, {"format": "pt"}),
            CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def check_in_all_layers(past: llama.Past) -> None:
    """Raises UserError if a layer has fewer columns than the prompt has positions."""
    n = int(past.position)
    bare = [str(i) for i, keys in enumerate(past.keys) if keys is None or keys.shape[2] != n]
    if bare:
        raise UserError(f"layers {', '.join(bare)} have no part of this prompt, and a PEFT adapter "
                        "cannot say so, for its prefix is in every layer: train with --keep and "
                        f"rows at the tokens, or with --deep-layers {len(past.keys)}; of --method "
                        "prefix, without --prefix-layers")


def prefix_numbers(past: llama.Past) -> Tensor:
    """What a prompt of batch 1 leaves in the layers, as PEFT keeps it: (n, L 2 G hd)."""
    layers = [torch.cat(columns) for columns in zip(past.keys, past.values)]  # (2, G, n, hd)
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)


@torch.no_grad()
def difference(model: llama.Llama, first: llama.Past, second: llama.Past) -> tuple[float, float]:
    """The largest difference between the logits that two prompts give on a batch of random tokens,
    and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 16), generator=generator)
    ids = ids.to(model.embeddings.device)
    a, b = (model.logits(model(ids, past)[0]).float() for past in (first, second))
    return (a - b).abs().max().item(), a.abs().max().item()


# --------------------------------------------------------------------------------------------------
# from PEFT


class Adapter(NamedTuple):
    """What an adapter's files hold, before it is known to fit a model."""

    path: Path
    kind: str  # of ROWS or PREFIX
    numbers: Tensor  # (n, D), or (n, L 2 G hd) with keys, rotated, before values; fp32
    config: dict  # adapter_config.json; empty for rows in numpy's format
    about: dict  # promptprior.json; empty for adapters that were not exported here

    @property
    def has_bos(self) -> bool:
        """Whether its last virtual token is the BOS that the prompt stands after."""
        return self.about.get("place") == "after-bos"


def from_peft(path: Path, model: llama.Llama) -> llama.Prompt:
    """The prompt of a PEFT adapter's folder, or of rows (n, D) in numpy's format, as PEFT applies
    it: in front of everything."""
    return fit(read(path), model)


def read(path: Path) -> Adapter:
    """Raises UserError for what PEFT itself would not apply, for what is no prompt of a causal
    model, and for pickles."""
    path = Path(path)
    if path.is_file():
        return Adapter(path, "PROMPT_TUNING", _checked(_numpy_rows(path), path), {}, {})
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give one that PEFT's save_pretrained made, or a "
                        ".npy file of rows (n, width)")
    if not (path / CONFIG).exists():
        inside = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
        remedy = str(inside[0]) if inside else "a folder that PEFT's save_pretrained made"
        raise UserError(f"{path}: no {CONFIG} in it, so it is no adapter: give {remedy}")

    config = data.read_json(not_foreign(path / CONFIG), dict, SMALL)
    kind = config.get("peft_type")
    if kind not in ROWS + PREFIX:
        raise UserError(f"{path}: peft_type is {kind!r:.80}, which is no prompt that can stand "
                        f"alone: only {', '.join(ROWS + PREFIX)} can be read")
    check_applied(config, path / CONFIG)
    about = data.read_json(path / ABOUT, dict, SMALL) if (path / ABOUT).exists() else {}
    numbers = _checked(_embeddings(path), path)
    n = config.get("num_virtual_tokens")
    if n != len(numbers):
        raise UserError(f"{path}: {CONFIG} says num_virtual_tokens {n!r:.80}, and {WEIGHTS} holds "
                        f"{len(numbers)}: the two are not of one adapter; fetch both again")
    return Adapter(path, kind, numbers, config, about)


def check_applied(config: dict, path: Path) -> None:
    """Raises UserError for an adapter that PEFT does not apply to a LLaMA."""
    task, submodules = config.get("task_type"), config.get("num_transformer_submodules")
    if task != "CAUSAL_LM":
        why = "it is not for a model that continues text"
        if task is None:
            why = "PEFT loads the adapter and does not apply it"
        raise UserError(f"{path}: task_type is {task!r:.80}, so {why}: if it was trained with a "
                        'causal model, write "task_type": "CAUSAL_LM" there')
    if submodules not in (None, 1):
        raise UserError(f"{path}: num_transformer_submodules is {submodules!r:.80}, so it is of an "
                        "encoder and a decoder: give an adapter of a LLaMA")


def _embeddings(path: Path) -> Tensor:
    """prompt_embeddings of an adapter's folder, as they are stored."""
    pickled = path / "adapter_model.bin"
    if pickled.exists() and not (path / WEIGHTS).exists():
        raise UserError(f"{pickled}: a pickle, which can run anything when it is read: load it "
                        "with PEFT where you trust it, and save it again by "
                        "model.save_pretrained(DIR), which writes safetensors")
    tensors, _ = read_tensors(path / WEIGHTS, "a readable safetensors file", "fetch it again")
    if tensors.keys() != {"prompt_embeddings"}:
        raise UserError(f"{path / WEIGHTS}: it holds {', '.join(sorted(tensors))!s:.200}, and a "
                        "prompt is prompt_embeddings alone: merge or leave out what else was "
                        "trained")
    return tensors["prompt_embeddings"]


def _numpy_rows(path: Path) -> Tensor:
    """The rows of a file in numpy's format, whatever its name (the files of google-research's
    prompt-tuning have no ending)."""
    with reading(path, "floating-point rows (n, width) that numpy.save wrote",
                 "give such a file, or a PEFT adapter's folder"):
        with open(llama.regular(path), "rb") as file:
            start = io.BytesIO(file.read(LONGEST_HEADER))  # numpy would believe any length
        with warnings.catch_warnings(action="ignore"):  # of Python 2's files, and of overflows
            read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                           (2, 0): np.lib.format.read_array_header_2_0}.get(
                np.lib.format.read_magic(start))
            if read_header is None:
                raise ValueError("it has field names, as only tables have")
            shape, is_transposed, dtype = read_header(start)
            if dtype.kind != "f":
                raise ValueError(f"it holds {dtype} numbers")
            if len(shape) != 2 or not 0 < math.prod(shape) <= MOST_NUMBERS:
                raise ValueError(f"its shape is {shape!s:.80}")
            x = np.memmap(path, dtype, "r", start.tell(), shape, "F" if is_transposed else "C")
            return torch.from_numpy(x.astype(np.float32, "C"))


def _checked(x: Tensor, path: Path) -> Tensor:
    """The numbers in fp32. Raises UserError for what is no finite (rows, width)."""
    if x.dim() != 2 or 0 in x.shape or not x.is_floating_point():
        raise UserError(f"{path}: its prompt is {x.dtype} of shape {tuple(x.shape)}, expected "
                        "floating-point (rows, width): fetch it again")
    x = x.float()
    if not torch.isfinite(x).all():
        raise UserError(f"{path}: its prompt holds numbers that are not finite: fetch it again")
    return x


@torch.no_grad()
def fit(adapter: Adapter, model: llama.Llama, first: int = 0) -> llama.Prompt:
    """The adapter as a prompt of this model. first: the position that the keys of its first virtual
    token were rotated to. Raises UserError if it was made for another model."""
    check_sizes(adapter, model.config)
    if adapter.kind in ROWS:
        return llama.Prompt({0: adapter.numbers})
    c = model.config
    columns = adapter.numbers.view(
        -1, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
    layers = {}
    for i in range(c.num_hidden_layers):
        keys, values = columns[:, i].unbind(dim=1)  # (n, G, hd)
        layers[i] = torch.stack((model.unrotated(keys, first), values), dim=1)
    return llama.Prompt(layers)


def check_sizes(adapter: Adapter, c: llama.Config) -> None:
    """Raises UserError for an adapter of other sizes than the model's."""
    L, G, hd = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    if adapter.kind in ROWS:
        heads, token_dim, width = c.num_attention_heads, c.hidden_size, c.hidden_size
        width_text = f"{width}"
    else:
        heads, token_dim, width = G, G * hd, 2 * L * G * hd
        width_text = f"2 x {L} layers x {G} x {hd} = {width}"

    config, wrong = adapter.config, []
    expected = {"num_layers": L, "num_attention_heads": heads, "token_dim": token_dim}
    for key, value in expected.items():
        if config.get(key) not in (None, value):
            wrong.append(f"{key} {config[key]!r:.80}, the model {value}")
    if adapter.numbers.shape[1] != width:
        wrong.append(f"{adapter.numbers.shape[1]} numbers a row, the model {width_text}")
    if wrong:
        base = config.get("base_model_name_or_path")
        name = f" ({base!s:.200})" if base else ""
        raise UserError(f"{adapter.path}: it has {'; '.join(wrong)}, so it was made for another "
                        f"model: give that by --model{name}")


@torch.no_grad()
def without_bos(adapter: Adapter, model: llama.Llama, bos: int | None) -> Adapter:
    """An adapter whose last virtual token is BOS, without it, because every text here brings its
    own. Raises UserError if the last one is not BOS."""
    last, expected = adapter.numbers[-1], None
    if bos is not None and adapter.kind in PREFIX and len(adapter.numbers) > 1:
        past = model.extend(torch.tensor([[bos]], device=model.embeddings.device))
        expected = prefix_numbers(past)[0].float().cpu()
    # The weights are the same, but the dtype may be another.
    if expected is None or expected.shape != last.shape \
            or not (expected - last).norm() <= 0.05 * last.norm():
        raise UserError(f"{adapter.path}: {ABOUT} says that its last virtual token is BOS, and it "
                        f"is not: export it again, or remove {ABOUT}")
    return adapter._replace(numbers=adapter.numbers[:-1])


# --------------------------------------------------------------------------------------------------
# the log as a table


COLUMNS = ("step", "split")  # the first two of every table


def to_csv(lines: list[dict], first: tuple[str, ...] = COLUMNS) -> str:
    """Records, such as a run's log, as a table with one of them a line: the `first` columns, and
    what any of the records has."""
    columns = dict.fromkeys([*first, *(key for line in lines for key in line)])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(line.get(key, "")) for key in columns] for line in lines)
    return text.getvalue()


def _cell(value):
    """A value as a spreadsheet shows it. A text that it would execute becomes one by a quote."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value


def is_table(path: Path) -> bool:
    """Whether to_csv made the file."""
    return begins_with(path, ",".join(COLUMNS).encode())


# --------------------------------------------------------------------------------------------------
# the command export


def command_export(given: dict) -> None:
    options = from_flags(ExportOptions, given)
    if options.to is None and options.csv is None:
        raise UserError("export: give --to DIR for a PEFT adapter, --to FILE with --for for rows, "
                        "--csv for the log, or several")
    place = None
    if options.to is not None and options.form == "peft":
        place = free_folder(options.to, "--to", options.overwrite, **OVERWRITTEN)
    elif options.to is not None:
        place = free_file(options.to, options.overwrite)
    for name, flag in (("step", "--step"), ("form", "--for")):
        if name in given and options.to is None:
            raise UserError(f"{flag} {given[name]} is for --to: give that too, or leave it out")
    if options.csv is not None:
        export_log(Run(Path(options.run)), options)
    if place is None:
        return
    opened = open_run(options.run, given, any_weights=False)
    train = opened.settings.train
    if train.posterior != "point":
        say(f"{opened.run.path}: the {train.representative} of its {train.posterior} posterior")
    if options.form == "peft":
        export_adapter(opened, place, options.overwrite)
    else:
        export_rows(opened, origin(opened), place, options.form, options.overwrite)


def is_ours(folder: Path) -> bool:
    """Whether export made the adapter in a folder."""
    return (folder / ABOUT).is_file()


# What --overwrite replaces, see files.free_folder.
OVERWRITTEN = {"ours": is_ours, "kind": "an adapter that export made",
               "files": (ABOUT, CONFIG, WEIGHTS)}


def export_log(run: Run, options: ExportOptions) -> None:
    """Print the log of a run as a table, or write it."""
    run.config()  # refuses what is no run
    lines = run.metrics()
    if options.csv == "-":
        show(to_csv(lines).rstrip("\n"))
        return
    path = free_place(options.csv, "--csv", options.overwrite, is_table,
                      "a table that export made")
    write_file(path, to_csv(lines).encode(), is_new=not options.overwrite)
    show(f"{path}: {counted(len(lines), 'record')} of {run.path}")


@torch.no_grad()
def export_adapter(opened: OpenRun, folder: Path, overwrite: bool) -> None:
    """Write a run's prompt as an adapter, and read it back: its logits must be the run's."""
    settings, model = opened.settings, opened.model

    # Rows at the tokens alone travel as rows, any other prompt as keys and values.
    past = past_for_peft(opened)
    is_rows = not opened.prompt.is_prefix and not opened.prompt.cut \
        and [*opened.prompt.layers] == [0] and settings.prompt.place == "before"
    base = settings.model.model
    if base == "tiny":
        base = str(opened.loaded.folder)
    files = to_peft(model, opened.prompt.layers[0] if is_rows else past, base,
                    opened.loaded.revision)
    files = {ABOUT: (json.dumps(origin(opened), indent=2) + "\n").encode(), **files}

    # Write the files, read them back, and compare the logits.
    with new_folder(folder, "--to", overwrite, **OVERWRITTEN) as new:
        for name, content in files.items():
            new.write(name, content)
        adapter = read(new.path)
        prompt = fit(adapter, model).to(opened.loaded.device)
        change, largest = difference(model, past, prompt.past(model))
        if not change <= largest * TOLERANCE[settings.model.dtype]:  # nan is refused too
            raise OSError(f"{folder}: read back, the adapter's logits differ by {change:.3g}: "
                          "removed; is the disk sound?")

    say(f"give PEFT {texts_for_peft(opened)}")
    if adapter.kind == "PROMPT_TUNING":
        say("PEFT 0.21.2 with transformers 5.24 puts such a prompt in again at every generated "
            "token: call generate with use_cache=False there")
    n, width = adapter.numbers.shape
    show(f"{folder}: {adapter.kind}, {counted(n, 'virtual token')} of {width} numbers; read back, "
         f"its logits differ by at most {change:.2g} from the run's")


def texts_for_peft(opened: OpenRun) -> str:
    """How texts must be tokenised for an exported prompt."""
    vocabulary = opened.vocabulary
    if opened.settings.prompt.place == "after-bos":
        return ("texts without BOS, which is one of the adapter's virtual tokens: AutoTokenizer "
                "with add_special_tokens=False")
    if vocabulary.bos is not None and not vocabulary.adds_bos:
        return (f"texts with BOS, token {vocabulary.bos}, in front (--bos always), because "
                "AutoTokenizer puts none there")
    bos = "with BOS in front" if vocabulary.adds_bos else "without BOS"
    eos = ", and drop the EOS that it adds" if vocabulary.adds_eos else ""
    return f"texts as AutoTokenizer makes them, {bos}{eos}"


def past_for_peft(opened: OpenRun) -> llama.Past:
    """What a run's prompt leaves in the layers, and BOS too if it stands after BOS."""
    place = opened.settings.prompt.place
    if place == "suffix":
        raise UserError(f"{opened.run.path}: its prompt stands inside the text, and PEFT's before "
                        "it: train with --place before")
    if place == "before":
        return opened.prompt.past(opened.model)
    bos = torch.tensor([[opened.vocabulary.bos]], device=opened.loaded.device)
    return opened.prompt.past(opened.model, opened.model.extend(bos))


def origin(opened: OpenRun) -> dict:
    """What promptprior.json says of the run that an adapter is of."""
    values, run = flat(opened.settings), opened.run
    names = ("method", "place", "tokens", "deep_layers", "cut", "posterior", "seed", "dtype",
             "bos")
    return {"run": run.path.resolve().name, "step": run.step, "layers": [*opened.prompt.layers],
            "sha256": run.config()["sha256"]["model"], **{key: values[key] for key in names},
            "prior": opened.settings.prior_name, "data": spec_name(values["data"])}


# --------------------------------------------------------------------------------------------------
# the command import


def command_import(given: dict) -> None:
    options = from_flags(ImportOptions, given)
    adapter = read(Path(options.adapter))
    settings = settings_for(adapter, given)
    run = Run(Path(options.out))
    check_new(run, options.overwrite)
    loaded = load_model(settings.model)
    check_place(settings.prompt, loaded, settings.model.model)
    max_length = longest_text(loaded, settings.data, settings.prior)
    settings = replace(settings, model=replace(settings.model, revision=loaded.revision),
                       data=replace(settings.data, max_length=max_length))

    # Refuse an adapter of another model before anything is written.
    check_sizes(adapter, loaded.model.config)
    if "sha256" in adapter.about:
        check_same_model(settings.model, adapter.about["sha256"], adapter.path)

    # A prompt after BOS had its keys rotated to the positions 1 to n.
    if adapter.has_bos:
        columns = without_bos(adapter, loaded.model, loaded.vocabulary.bos)
        prompt = fit(columns, loaded.model, first=1)
    else:
        prompt = fit(adapter, loaded.model)
    write_imported(run, options.overwrite, settings, adapter, prompt)
    count = f"{prompt.n} keys and values a layer" if prompt.is_prefix else counted(prompt.n, "row")
    show(f"{run.path}: {count} of {adapter.kind}, for {settings.model.model}; "
         f"`eval {run.path}` scores them on {spec_name(settings.data.data)}")


def settings_for(adapter: Adapter, given: dict) -> Settings:
    """The settings of an adapter's run, one that has seen no training here. The model is the
    adapter's own unless another is given."""
    flags = {**given, **model_of(adapter, given), "steps": 0, "tokens": len(adapter.numbers),
             "imported": adapter.path.resolve().name}
    if adapter.kind in PREFIX:
        flags["method"] = "prefix"
    if adapter.about:  # of an export; early ones put BOS in front of every text
        flags.setdefault("bos", adapter.about.get("bos") or "always")
    if adapter.has_bos:
        flags |= {"place": "after-bos", "tokens": len(adapter.numbers) - 1}
    return Settings.from_flags(flags).complete()


def model_of(adapter: Adapter, given: dict) -> dict[str, str]:
    """The flags of the model that an adapter names; none if one is given."""
    if "model" in given:
        return {}
    base, revision = (adapter.config.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(base, str) or not base:
        raise UserError(f"{adapter.path}: it does not name the model it was trained on: give "
                        "--model")
    if Path(base) == model_folder(ModelSettings("tiny")):
        return {"model": "tiny"}
    if not on_hub(base):
        return {"model": base}
    # The hub, and with the user's token, is asked for nothing that only a stranger's file names.
    revision = given.get("revision", revision if isinstance(revision, str) else None)
    if not cached(base, revision):
        raise UserError(f"{adapter.path}: it names the hub's model {base}, which is not in the "
                        f"cache: if you trust who made the adapter, fetch it by --model {base}")
    return {"model": base, "revision": revision}


def write_imported(run: Run, overwrite: bool, settings: Settings, adapter: Adapter,
                   prompt: llama.Prompt) -> None:
    """The run's folder of a prompt that was not trained here."""
    config = {
        "settings": flat(settings), "imported_from": {
            "path": str(adapter.path.resolve()), "config": adapter.config,
            "about": adapter.about},
        "priors": [], "learning_rates": {}, "threads": torch.get_num_threads(), "processes": 1,
        "versions": versions(), "sha256": checksums(settings)}
    with run.lock():
        check_new(run, overwrite)  # another process may have made one since
        with run.beginning():
            for name in (FIRST_PROMPT, LAST_PROMPT):
                run.write_prompt(name, prompt.tensors(), settings, 0)
            run.write_json(RUN_CONFIG, config)
