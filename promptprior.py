"""promptprior: tune the prompt of a frozen LLaMA from a chosen prior, and see where it ends up.

    python promptprior.py train --prior exclusion --deep-layers 3
    python promptprior.py plot runs/squad-exclusion-deep3-seed0

This file is the command line: it reads arguments, puts the modules together, prints and
draws. Modules that import torch are imported inside the functions that need them, so that
--help answers at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import data
import priors

TINY = Path(__file__).resolve().parent / "tiny"
# kind -> training and evaluation data under tiny/
BUNDLED = {"squad": ("squad/train.json", "squad/dev.json"),
           "math": ("math/train-easy", "math/interpolate"), "text": ("text", "text")}
TOKENS = 20  # rows a layer, as in the paper
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
    "reference": ("vocab", "what priors are fitted on: vocab (each token once) or a data SPEC "
                           "(tokens as the data uses them). Rows at deep layers are fitted on "
                           "activations, of that SPEC or of --data"),
    "reference_rows": (20000, "most rows of a reference taken from data"),
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
    "prior_weight": (0.0, "weight of the prior's log density in the loss; "
                          "1 gives the MAP estimate"),
    "eval_every": (None, "steps between evaluations and checkpoints (a quarter of --steps)"),
    "trunk_memory": (4.0, "GiB of the device's memory, per process, for the inputs of the first "
                          "layer with rows, worked out once for all epochs when no rows are at the "
                          "tokens; more goes to a file in the run's folder, removed at the end"),
    "out": (None, "the run's folder (runs/ and a name made of the settings)"),
}
SAMPLE = {"out": (None, "folder for the rows and a figure for every layer; "
                        "without it nothing is written")}
POSITIVE = {"batch_size", "max_new", "eval_every", "max_length", "reference_rows", "lr", "clip"}
NOT_NEGATIVE = {"steps", "tokens", "deep_layers", "eval_limit", "warmup", "seed", "prior_weight",
                "trunk_memory"}
SWITCHES = {"cut": "drop the rows' outputs at each layer, as in the paper's deep prompt tuning "
                   "(default with --deep-layers)",
            "keep": "let the rows' outputs go on through the layers, as in prompt tuning "
                    "(default without)"}

DEFAULT_SWITCHES = {"cut": None, "share": True, "trunk": True, "shard": False, "recompute": False,
                    "keep_unanswerable": False}

# of the processes that torchrun starts the first one speaks
FIRST = "MASTER_ADDR" not in os.environ or int(os.environ.get("RANK", 0)) == 0

# their own ValueErrors are the user's mistakes
MODULES = {"llama", "data", "priors", "viz", "train", __name__}


class UserError(ValueError):
    """A mistake on the command line: what, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# what a command works with


def say(text: str) -> None:
    if FIRST:
        print(text, file=sys.stderr, flush=True)


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
    name = priors.parse(a.prior)[0]
    a.cut = bool(a.deep_layers) if a.cut is None else a.cut
    a.eval_data = a.data if a.eval_data is None and a.data in BUNDLED else a.eval_data
    a.model = a.model if a.model == "tiny" else os.path.abspath(a.model)  # runs open from anywhere
    for key in ("data", "eval_data", "reference"):
        kind, colon, path = (getattr(a, key) or "").partition(":")
        if path:
            setattr(a, key, f"{kind}:{os.path.abspath(path)}")
    if groups[-1] is TRAIN:
        a.eval_every = a.eval_every or max(1, a.steps // 4)
        if a.prior_weight and not priors.PRIORS[name].has_density:
            raise UserError(f"--prior-weight: the prior {name} has no density to follow: use one "
                            f"of {', '.join(n for n, p in priors.PRIORS.items() if p.has_density)}")
    return a


def check_ranges(a: SimpleNamespace) -> None:
    for flag, value in vars(a).items():
        most = math.inf if isinstance(value, float) else 2**40  # a seed is a 64-bit number
        if flag in POSITIVE and value is not None and not 0 < value < most:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected more than 0, and less "
                            f"than {most}")
        if flag in NOT_NEGATIVE and not 0 <= value < most:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected 0 or more, and less "
                            f"than {most}")


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
        torch.zeros(0, device=a.device)
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


def text_name(a: SimpleNamespace) -> str:
    return f"text prompt {textwrap.shorten(a.text, 40)!r}"


def plain_pasts(a: SimpleNamespace, model, vocabulary) -> dict[str, tuple[str, object]]:
    """What a trained prompt stands beside, {split: (name, Past)}: no prompt, and a text prompt if
    there is a text."""
    import torch

    pasts = {"baseline": ("no prompt", model.empty())}
    if a.text:
        ids = torch.tensor([vocabulary.encode_plain(a.text)], device=a.device)
        pasts["text"] = (text_name(a), model.extend(ids))
    return pasts


# --------------------------------------------------------------------------------------------------
# references and priors


def collect(model, rows: list[list[int]], layers: list[int], limit: int,
            first: int = 1) -> dict[int, "Tensor"]:
    """The inputs of layers for token rows, {layer: (N, D)} fp32 on the CPU, N at most
    `limit`. Every row counts from its token `first` on: a row's BOS has an enormous norm that
    would swamp any statistics."""
    import torch
    import llama
    from train import progress

    found, count = {i: [] for i in layers}, 0
    for start in progress(range(0, len(rows), 8), desc="activations", leave=False):
        if count >= limit:
            break
        ids = llama.pad(rows[start:start + 8]).to(model.embeddings.device)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        taken = place[ids != llama.PAD] >= first
        with torch.no_grad():
            model(ids, tap=lambda i, x: i in found and found[i].append(x[taken].float().cpu()))
        count += int(taken.sum())
    return {i: torch.cat(parts)[:limit] for i, parts in found.items()}


def reference_rows(a: SimpleNamespace, examples: list[data.Example], vocabulary) -> list[list[int]]:
    """Token rows in an order made from the seed, one question a context, of a.reference_rows tokens
    or a little more."""
    rows, count, seen = [], 0, set()
    for i in data.Order([e.context for e in examples], 1, a.seed).epoch(0):
        if count >= a.reference_rows:
            break
        if topic(examples[i]) not in seen:
            seen.add(topic(examples[i]))
            row = data.encode(examples[i], vocabulary, a.max_length)
            rows += [row.ids] * (row is not None)
            count += len(row.ids) - 1 if row else 0
    return rows


def references(a: SimpleNamespace, model, vocabulary, layers: list[int],
               examples: list[data.Example] | None = None):
    """The population that each layer's prior is fitted on, {layer: ((N, D) fp32, its name)}.
    examples are the training data, if they are read already: of those activations are taken,
    unless --reference names others."""
    import torch

    if priors.parse(a.prior)[0] == "text":
        ids = vocabulary.encode_plain(a.text)
        if not ids:
            raise UserError("--prior text needs --text, the text whose tokens the rows begin as")
        return {i: (x, f"tokens of {a.text!r}")
                for i, x in collect(model, [ids], layers, len(ids), first=0).items()}
    found, spec = {}, a.data if a.reference == "vocab" else a.reference
    if a.reference == "vocab" and 0 in layers:
        ordinary = sorted(set(range(vocabulary.size)) - vocabulary.special)
        found[0] = (model.embeddings[ordinary].float().cpu(), "vocabulary")
    rest = [i for i in layers if i not in found]
    if rest:
        if spec != a.data:
            examples = data.read(*parse_spec(spec, 0), limit=a.reference_rows)
        rows = reference_rows(a, examples or training_and_evaluation(a)[0], vocabulary)
        for i, x in collect(model, rows, rest, a.reference_rows).items():
            found[i] = (x, f"{f'layer {i} inputs' if i else 'token embeddings'} of "
                           f"{spec_name(spec)}")
    return dict(sorted(found.items()))


def spec_name(spec: str) -> str:
    """A SPEC without its folders, for captions."""
    kind, colon, path = spec.partition(":")
    return kind + colon + Path(path).name


def draw(a: SimpleNamespace, found: dict) -> tuple[dict[int, "Tensor"], dict[int, object],
                                                   list[dict]]:
    """Fit the prior on each layer's reference, draw the rows, and say how they stand to it."""
    import torch

    name, options = priors.parse(a.prior)
    rows, fitted, reports = {}, {}, []
    for i, (reference, reference_name) in found.items():
        fitted[i] = priors.PRIORS[name].fit(reference, **options)
        rows[i] = fitted[i].sample(rows_per_layer(a),
                                   torch.Generator().manual_seed(1000 * a.seed + i))
        if not torch.isfinite(rows[i]).all():
            raise priors.PriorError(f"{a.prior}: drew rows that are not finite: give its options "
                                    "smaller values")
        ratio, about = norm_ratio(rows[i], reference), fitted[i].report()
        reports.append({"layer": i, "reference": reference_name, "rows": len(reference),
                        "norm_ratio": ratio, **about})
        say(f"layer {i}: {a.prior} on {reference_name}, {len(reference)} rows: "
            + ", ".join(f"{key} {value:.4g}" for key, value in {
                "init-to-token norm ratio": ratio, **about}.items()))
        if ratio > 5:
            say(f"layer {i}: warning: the rows start {ratio:.0f} times as long as real ones and "
                "may train badly")
    return rows, fitted, reports


def norm_ratio(rows, reference) -> float:
    """Mean norm of the rows over mean norm of the reference: 1 is on scale, PEFT's random
    default is near 45."""
    return float(rows.norm(dim=1).mean() / reference.norm(dim=1).mean())


# --------------------------------------------------------------------------------------------------
# tables and figures

TITLES = {"loss": "loss", "exact_match": "exact match", "precision": "precision",
          "recall": "recall", "f1": "F1", "accuracy": "accuracy", "accuracy_value": "same value"}


def table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """Names and scores as aligned columns."""
    keys = [k for k in TITLES if any(k in scores for _, scores in rows)]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"  {TITLES[k]:>{max(len(TITLES[k]), 6)}}" for k in keys)]
    for name, scores in rows:
        cells = (f"{scores[k]:.3f}" if k == "loss" else f"{scores[k]:.1f}" for k in keys)
        lines.append(f"{name:<{width}}" + "".join(
            f"  {cell:>{max(len(TITLES[k]), 6)}}" for k, cell in zip(keys, cells)))
    return "\n".join(lines)


def final_table(a: SimpleNamespace, metrics: list[dict]) -> str:
    names = {"baseline": "no prompt", "text": text_name(a)}
    evals = [m for m in metrics if m["split"] == "eval"]
    return table([(names[m["split"]], m) for m in metrics if m["split"] in names]
                 + [(f"{a.prior} prior, untrained", evals[0])]
                 + [(f"{a.prior} prior, {m['step']} steps", m) for m in evals[-1:] if m["step"]])


def layer_figure(i: int, reference, name: str, series: list[tuple[str, "Tensor"]],
                 caption: str) -> str:
    """The principal plane of a layer's reference, the draw and, if there is a second series,
    where its rows went."""
    import numpy as np

    import viz

    points = [rows.numpy() for _, rows in series]
    reference = reference.numpy()
    # a text prompt of a token or two spans no plane of its own
    plane = viz.pca(reference if len(reference) > 2 else np.concatenate([reference, *points]))
    flat = [viz.project(plane, rows) for rows in points]
    looks = ((viz.BLUE, True), (viz.VERMILION, False))
    return viz.scatter(viz.project(plane, reference), name,
                       [viz.Series(label, xy, *look)
                        for (label, _), xy, look in zip(series, flat, looks)],
                       viz.axis_names(plane), tuple(flat) if len(flat) == 2 else None,
                       title=f"Layer {i}, its input" if i else "Token embeddings", caption=caption)


def draw_run(run, a: SimpleNamespace, found: dict, end: dict) -> list[str]:
    """figures/layer-NN.svg for every layer that owns rows."""
    start, names = run.rows("prompts/000000.safetensors"), []
    steps = max((m["step"] for m in run.metrics() if "step" in m), default=0)
    for i, (reference, name) in found.items():
        moved = (end[i] - start[i]).norm(dim=1).mean().item()
        caption = (f"{run.path.name}: prior {a.prior}, seed {a.seed}, {steps} steps on "
                   f"{spec_name(a.data)}, model {model_folder(a).name}. {len(end[i])} rows in the "
                   f"principal plane of the reference ({name}, {len(reference)} rows), fitted "
                   f"without them. A row moved {moved:.3g} on average; mean norms: reference "
                   f"{reference.norm(dim=1).mean():.3g}, draw {start[i].norm(dim=1).mean():.3g}, "
                   f"trained {end[i].norm(dim=1).mean():.3g}.")
        svg = layer_figure(i, reference, name,
                           [("prior draw", start[i]), ("trained rows", end[i])], caption)
        names.append(f"figures/layer-{i:02d}.svg")
        run.write(names[-1], svg.encode())
    return names


# --------------------------------------------------------------------------------------------------
# commands


def command_train(given: dict) -> None:
    from train import Run, RunError, agree, join_world, meet, world

    def join(a: SimpleNamespace) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) > a.batch_size:
            raise UserError(f"--batch-size {a.batch_size}: fewer than the "
                            f"{os.environ['WORLD_SIZE']} processes, which share a batch: raise it")
        join_world(a.device)
        if a.shard and world()[1] == 1:
            raise UserError("--shard divides a model among processes: start them by `torchrun "
                            "--nproc-per-node N promptprior.py train ...`, or leave it out")

    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    if not resume:
        a = settings_of(given, MODEL, PRIOR, DATA, TRAIN)
        join(a)
        a.out = agree(a.out or free_name(a))
        run = Run(Path(a.out))
        if run.path.exists() and not (run.path.is_dir() and not any(run.path.iterdir())):
            run.config()  # what is not a run is never overwritten
            if not overwrite:
                raise UserError(f"{run.path} exists: go on with it by --resume, replace it by "
                                "--overwrite, or choose another --out")
        meet()  # nothing is written before all have looked
        return train_run(run, a, None)
    if "out" not in given:
        raise UserError("--resume needs --out, the folder of the run to go on with")
    run = Run(Path(given["out"]))
    config = run.config()
    stored = stored_settings(config)
    other = [f"--{k.replace('_', '-')} {v} (the run has {stored.get(k)})" for k, v in given.items()
             if k != "out" and stored.get(k) != v]
    if other:
        raise UserError(f"{run.path}: a run goes on with its own settings, not with "
                        f"{'; '.join(other)}: leave them out, or start another run")
    if not (run.path / "checkpoint.safetensors").exists():
        config = None  # it was stopped before its first checkpoint: from the start
    a = SimpleNamespace(**{**stored, "out": given["out"]})
    join(a)
    if config and config.get("processes", 1) != world()[1]:
        raise RunError(f"{run.path}: begun by {config.get('processes', 1)} processes, and sums of "
                       f"{world()[1]} are others in the last digits: start as many by torchrun")
    meet()
    train_run(run, a, config)


def stored_settings(config: dict) -> dict:
    """A run's settings, with what later versions ask for as it was then."""
    return {**{flag: default for flag, (default, _) in TRAIN.items()}, **DEFAULT_SWITCHES,
            "trunk": False, **config["settings"]}


def free_name(a: SimpleNamespace) -> str:
    """runs/ and the settings that tell runs apart, numbered if taken."""
    prior = "".join(c if c.isalnum() else "-" for c in a.prior)
    name = f"runs/{a.data.split(':')[0]}-{prior}" \
        f"{f'-deep{a.deep_layers}' if a.deep_layers else ''}-seed{a.seed}"
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6)))
                if not Path(n).exists())


def train_run(run, a: SimpleNamespace, resumed: dict | None) -> None:
    """Everything is read and checked before the first byte of the run is written. resumed is the
    config.json of the run to go on with, None for a new one."""
    import torch

    import llama
    from train import RunError, evaluate, keep_freed_memory, train, trunk, world

    began, (rank, size) = time.time(), world()
    keep_freed_memory()
    model, vocabulary = load_model(a)
    model.recompute = a.recompute
    layers = layers_with_rows(a, model)
    examples, evals = training_and_evaluation(a)
    sums = checksums(a)
    for old in run.path.glob("trunk*.safetensors") if FIRST else ():
        old.unlink()  # of a run that was killed
    if resumed:
        torch.set_num_threads(resumed["threads"])  # the same sums in the same order
        changed = [key for key, value in sums.items() if resumed["sha256"].get(key) != value]
        if changed:
            raise RunError(f"{run.path}: the {' and the '.join(changed)} changed since the run "
                           "began, so it cannot go on to the same end: restore the files, or start "
                           "another run")
    questions = encode(examples, vocabulary, a.max_length, "training")
    evals = encode(evals, vocabulary, a.max_length, "evaluation")
    say(f"model {model_folder(a).name}: {model.config.num_hidden_layers} layers of width "
        f"{model.config.hidden_size}, {a.dtype} on {a.device}; {len(questions.rows)} questions to "
        f"train on, {len(evals.rows)} to evaluate")
    found = references(a, model, vocabulary, layers, examples)
    start, fitted, reports = draw(a, found)
    rates = {i: a.lr or float(x.square().mean().sqrt()) / 20 for i, (x, _) in found.items()}
    prompt = llama.Prompt(start, a.cut).to(a.device)

    def scores(past, name):
        return evaluate(model, vocabulary, past, evals, a, name)

    if not resumed:
        run.clear()
        run.write_json("config.json", {
            "settings": vars(a), "priors": reports, "learning_rates": rates,
            "threads": torch.get_num_threads(), "processes": size,
            "versions": {"python": sys.version.split()[0], **{p: version(p) for p in (
                "torch", "safetensors", "tokenizers", "numpy")}}, "sha256": sums})
        for split, (name, past) in plain_pasts(a, model, vocabulary).items():
            run.log({"split": split, **scores(past, name)[0]})

    order = data.Order([r.context for r in questions.rows], a.batch_size, a.seed, a.share)
    answer_tokens = sum(len(r.ids) - r.start for r in questions.rows)

    # the loss is a mean over answer tokens, so -log p is divided by their number: weight 1 is MAP
    def penalty(rows):
        return -sum(fitted[i].log_prob(r.cpu()).sum() for i, r in rows.items()
                    ).to(a.device) / answer_tokens

    def batch_of(step: int) -> data.Batch:
        places = order[step]
        return questions.batch(places[rank * len(places) // size:
                                      (rank + 1) * len(places) // size], a)

    top, file = model, run.path / f"trunk{rank or ''}.safetensors"
    try:
        # what every text passes through unchanged is worth keeping if a text comes twice
        if a.trunk and layers[0] > 0 and a.steps * a.batch_size > len(questions.rows):
            top, placed = trunk(model, questions.rows, layers[0], rows_per_layer(a), a, file)
            questions = questions._replace(placed=placed)
            say(f"layers 0 to {layers[0] - 1} are worked out once for all epochs: inputs of layer "
                f"{layers[0]} for {len(top.inputs)} tokens, {top.inputs.nbytes / 2**30:.2f} GiB "
                f"{f'in {file}, removed at the end' if file.exists() else 'in memory'}")
        train(run, a, top, prompt, rates, batch_of,
              penalty if a.prior_weight else None,
              lambda step: scores(prompt.past(model), f"step {step}"), bool(resumed))
    finally:
        file.unlink(missing_ok=True)

    if not FIRST:
        return
    end = {i: r.detach().cpu() for i, r in prompt.rows.items()}
    print(f"\n{len(evals.rows)} questions of "
          f"{spec_name(a.eval_data) if a.eval_data else 'the training data, held out'}; scores in "
          f"percent, loss in nats a token\n\n{final_table(a, run.metrics())}\n")
    for i in layers:
        print(f"layer {i}: rows moved {(end[i] - start[i]).norm(dim=1).mean():.3g} on average; "
              f"their norm over the reference's {norm_ratio(start[i], found[i][0]):.3g} -> "
              f"{norm_ratio(end[i], found[i][0]):.3g}")
    print(f"{time.time() - began:.0f} s; {run.path}: prompt.safetensors, predictions.jsonl, "
          f"metrics.jsonl, {', '.join(draw_run(run, a, found, end))}")


def checksums(a: SimpleNamespace) -> dict[str, str]:
    """sha256 over the checksums of all files read: of the model, the training data and the
    evaluation data."""
    folder = model_folder(a)
    files = {"model": sorted({*folder.glob("*.safetensors"), *folder.glob("*.json")})}
    files |= {key: data.files_of(*parse_spec(spec, split)) for key, spec, split in (
        ("data", a.data, 0), ("eval_data", a.eval_data, 1)) if spec}
    out = {}
    for key, paths in files.items():
        h = hashlib.sha256()
        for path in paths:
            with open(path, "rb") as f:
                h.update(hashlib.file_digest(f, "sha256").digest())
        out[key] = h.hexdigest()
    return out


def open_run(path: str, given: dict):
    """A trained run: its folder, settings, model, tokenizer and prompt."""
    import llama
    from train import Run

    run = Run(Path(path))
    a = SimpleNamespace(**{**stored_settings(run.config()), **given, "shard": False})
    check_ranges(a)
    rows = run.rows("prompt.safetensors")
    model, vocabulary = load_model(a)
    prompt = llama.Prompt(rows, a.cut).to(a.device)
    prompt.past(model)  # refuses rows that do not fit
    return run, a, model, vocabulary, prompt


def command_eval(given: dict) -> None:
    from train import evaluate

    as_json, spec = given.pop("json", False), given.pop("data", None)
    run, a, model, vocabulary, prompt = open_run(given.pop("run"), given)
    if spec is None:
        evals = training_and_evaluation(a)[1]
    else:
        evals = some_of(read_questions(spec, 1, a.keep_unanswerable), a.eval_limit)
    spec = spec or a.eval_data or f"{a.data}, held out"
    evals = encode(evals, vocabulary, a.max_length, spec)
    pasts = [*plain_pasts(a, model, vocabulary).values(),
             (f"{a.prior} prior, trained", prompt.past(model))]
    rows = [(name, evaluate(model, vocabulary, past, evals, a, name)[0]) for name, past in pasts]
    if as_json:
        print(json.dumps({"run": str(run.path), "data": spec, "questions": len(evals.rows),
                          "scores": dict(rows)}))
    else:
        print(f"{run.path} on {len(evals.rows)} questions of {spec}; scores in percent, loss in "
              f"nats a token\n\n{table(rows)}")


def command_generate(given: dict) -> None:
    import torch

    import llama

    text, path = given.pop("prompt_text"), given.pop("run")
    _, a, model, vocabulary, prompt = open_run(path, given)
    with torch.no_grad():
        past = prompt.past(model)
    ids = vocabulary.encode(text)
    room = model.config.max_position_embeddings - rows_per_layer(a) - a.max_new
    if len(ids) > room:
        raise UserError(f"the text has {len(ids)} tokens, and {room} fit beside the prompt and "
                        "--max-new: shorten it")
    print(vocabulary.first_line(llama.generate(model, [ids], past, a.max_new, vocabulary.stop)[0]))


def command_sample(given: dict) -> None:
    from train import Run, rows_to_bytes

    as_json = given.pop("json", False)
    a = settings_of(given, MODEL, PRIOR, DATA, SAMPLE)
    run = Run(Path(a.out)) if a.out else None
    if run and run.path.exists():
        raise UserError(f"{run.path} exists: choose another --out")
    model, vocabulary = load_model(a)
    found = references(a, model, vocabulary, layers_with_rows(a, model))
    rows, _, reports = draw(a, found)
    if run:
        run.write("rows.safetensors", rows_to_bytes(rows, {"settings": json.dumps(vars(a))}))
        for i, (reference, name) in found.items():
            caption = (f"{len(rows[i])} draws of the prior {a.prior}, seed {a.seed}, model "
                       f"{model_folder(a).name}; on {name}.")
            svg = layer_figure(i, reference, name, [(f"draws of {a.prior}", rows[i])], caption)
            run.write(f"figures/layer-{i:02d}.svg", svg.encode())
        say(f"{run.path}: rows.safetensors, "
            f"{', '.join(f'figures/layer-{i:02d}.svg' for i in found)}")
    else:
        say("nothing written (--out DIR keeps the rows and a figure for every layer)")
    if as_json:
        print(json.dumps(reports))


def command_plot(given: dict) -> None:
    for path in given.pop("runs"):
        run, a, model, vocabulary, prompt = open_run(path, given)
        found = references(a, model, vocabulary, list(prompt.rows))
        for name in draw_run(run, a, found, {i: r.detach().cpu() for i, r in prompt.rows.items()}):
            print(run.path / name)


# --------------------------------------------------------------------------------------------------
# the command line


def prior_help() -> str:
    lines = ["priors and their options:"]
    for name, prior in priors.PRIORS.items():
        shown = name + "".join(f"{',:'[i == 0]}{k}={v:g}"
                               for i, (k, v) in enumerate(priors.options(name).items()))
        about = " ".join(prior.__doc__.split("\n\n")[0].split())
        lines.append(f"  {shown}\n" + textwrap.fill(
            about, 76, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"promptprior: error: {message}: see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="promptprior.py", description=__doc__.splitlines()[0], allow_abbrev=False,
               epilog="`promptprior.py COMMAND --help` lists a command's options.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, groups: list[dict], epilog: str = ""):
        c = commands.add_parser(name, help=help, description=help,
                                argument_default=argparse.SUPPRESS, epilog=epilog,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
        for flag, (default, text) in (item for group in groups for item in group.items()):
            kind = float if flag in (
                "lr", "clip", "prior_weight", "trunk_memory") else int if flag in (
                "max_length", "eval_every") or isinstance(default, int) else str
            shown = f"{text} ({default})" if default is not None else text
            c.add_argument("--" + flag.replace("_", "-"), type=kind,
                           metavar=flag.upper().split("_")[-1], help=shown.replace("%", "%%"))
        return c

    unanswerable = {"action": "store_true",
                    "help": "keep unanswerable questions; their answer is empty"}
    c = command("train", "Tune a prompt, starting from a draw of a prior.",
                [MODEL, PRIOR, DATA, TRAIN], prior_help())
    which = c.add_mutually_exclusive_group()
    which.add_argument("--cut", action="store_true", help=SWITCHES["cut"])
    which.add_argument("--keep", dest="cut", action="store_false", help=SWITCHES["keep"])
    c.add_argument("--no-share", dest="share", action="store_false",
                   help="shuffle single questions and compute every context anew; the same loss, "
                        "only slower")
    c.add_argument("--no-trunk", dest="trunk", action="store_false",
                   help="with --tokens 0, work out the layers below the rows anew in every epoch")
    c.add_argument("--shard", action="store_true",
                   help="under torchrun, divide the model's weights among the processes (FSDP2)")
    c.add_argument("--recompute", action="store_true",
                   help="keep no activations inside a layer for the backward pass: less memory, "
                        "a third more work")
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--resume", action="store_true",
                   help="go on with the run in --out, to the same bytes")
    c.add_argument("--overwrite", action="store_true", help="replace the run in --out")

    some = {k: (None, text) for k, (_, text) in MODEL.items() if k in ("model", "device", "dtype")}
    c = command("eval", "Score a run's prompt beside no prompt and a text prompt.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("--data", help="data to evaluate on, a SPEC (the run's evaluation data)")
    c.add_argument("--limit", dest="eval_limit", type=int,
                   help="most questions, 0 for all (the run's)")
    c.add_argument("--max-length", type=int, help="most tokens of a question's text (the run's)")
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("generate", "Continue a text under a run's prompt, to the end of the line.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("prompt_text", metavar="TEXT", help="the text to go on from")
    c.add_argument("--max-new", type=int, help="most tokens (the run's)")

    c = command("sample", "Draw rows from a prior, report on them and picture them.",
                [MODEL, PRIOR, DATA, SAMPLE], prior_help())
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("plot", "Draw a run: the reference, the prior's draw and the trained rows, per "
                "layer.", [some])
    c.add_argument("runs", metavar="RUN", nargs="+", help="runs' folders")
    return p


COMMANDS = {"train": command_train, "eval": command_eval, "generate": command_generate,
            "sample": command_sample, "plot": command_plot}


def main(argv: list[str] | None = None) -> int:
    given = vars(parser().parse_args(argv))
    if given["command"] != "train" and not FIRST:
        return 0  # no other command has work for several processes
    try:
        COMMANDS[given.pop("command")](given)
    except KeyboardInterrupt:
        say("promptprior: stopped; a run that has begun goes on with train --out RUN --resume")
        status = -signal.SIGINT
    except Exception as e:
        status = exit_status(e)
        if status is None:
            raise
        text = f"{'error: ' * (status > 0)}{' '.join(str(e).split())}"
        say(f"promptprior: {text}")
        if not FIRST and status > 0 and joined():  # it may be this one's alone
            print(f"promptprior: process {os.environ['RANK']}: {text}", file=sys.stderr, flush=True)
    else:
        return 0
    if status < 0:  # end by the signal itself, so that a calling shell or scheduler sees it
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def joined() -> bool:
    """Whether the processes have met: what one says until then, all say."""
    from train import world

    return world()[1] > 1


def exit_status(e: Exception) -> int | None:
    """2 for a user's mistake, 1 for what failed under way, minus a signal's number; None for
    a fault of ours."""
    if isinstance(e, ValueError) and type(e).__module__ in MODULES:
        return 2
    # train.Stopped brings its own
    return getattr(e, "status", 1 if isinstance(e, OSError) else None)


if __name__ == "__main__":
    sys.exit(main())
