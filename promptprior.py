"""promptprior: tune the prompt of a frozen LLaMA from a chosen prior, and see where it ends up.

    python promptprior.py train --prior exclusion --deep-layers 3
    python promptprior.py plot runs/squad-exclusion-deep3-seed0

This file is the command line: it reads arguments, puts the modules together, prints and
draws. Modules that import torch are imported inside the functions that need them, so that
--help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
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
from settings import (COLLECT, DATA, FIGURE, FIRST, MODEL, PRIOR, SAMPLE, SWITCHES, TRAIN,
                      UserError, absolute, check_ranges, check_same_model, checksum, checksums,
                      encode, free_name, imported, kind_of, layers_with_rows, load_model, model_files, model_folder,
                      on_hub, one_line, over, plain_pasts, parse_spec, prior_name, read_questions, rows_per_layer,
                      say, settings_of, show, some_of, spec_name, stored_settings, text_name,
                      training_and_evaluation)

# their own ValueErrors are the user's mistakes
MODULES = {"activations", "adapters", "compare", "data", "figures", "geometry", "llama", "posteriors", "priors",
           "references", "report", "run", "settings", "train", "viz"}


# --------------------------------------------------------------------------------------------------
# tables and figures

TITLES = {"loss": "loss", "exact_match": "exact match", "precision": "precision",
          "recall": "recall", "f1": "F1", "accuracy": "accuracy", "accuracy_value": "same value",
          "calibration_error": "ECE"}


def table(rows: list[tuple[str, dict[str, float]]], titles: dict[str, str] = TITLES) -> str:
    """Names and numbers as aligned columns, those of titles {key: heading} that any row has. A
    score has one decimal, anything else three digits."""
    keys = [k for k in titles if any(k in numbers for _, numbers in rows)]

    def cell(key: str, numbers: dict[str, float]) -> str:
        if key not in numbers:
            return ""
        if key in TITLES:
            return f"{numbers[key]:.3f}" if key == "loss" else f"{numbers[key]:.1f}"
        return f"{numbers[key]:#.3g}".rstrip(".")

    lines = [["", *(titles[k] for k in keys)]]
    lines += [[name, *(cell(k, numbers) for k in keys)] for name, numbers in rows]
    wide = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(f"{first:<{wide[0]}}" + "".join(
        f"  {text:>{max(w, 6)}}" for text, w in zip(rest, wide[1:])) for first, *rest in lines)


def final_table(a: SimpleNamespace, metrics: list[dict]) -> str:
    names = {"baseline": "no prompt", "text": text_name(a.text)}
    evals = [m for m in metrics if m["split"] == "eval"]
    if not evals and imported(a):
        return "imported: `eval` scores it"
    if not evals:
        raise UserError("the run has no evaluation in its metrics.jsonl: go on with it by "
                        "train --out RUN --resume")
    together = f", {a.particles} particles together" if a.posterior == "svgd" else ""
    end = f"{prior_name(a)} prior, {evals[-1]['step']} steps{together}"
    return table([(names[m["split"]], m) for m in metrics if m["split"] in names]
                 + [(f"{prior_name(a)} prior, untrained", evals[0])]
                 + [(end, m) for m in evals[-1:] if m["step"]],
                 {k: title for k, title in TITLES.items() if k != "calibration_error"})


def layer_figure(i: int, reference: "Reference", series: list[tuple[str, "Tensor"]],
                 caption: str) -> str:
    """The principal plane of a layer's reference, the draw and, if there is a second series,
    where its rows went."""
    import numpy as np

    import viz

    points = [rows.numpy() for _, rows in series]
    name, reference = reference.name, reference.rows.numpy()
    # a text prompt of a token or two spans no plane of its own
    plane = viz.pca(reference if len(reference) > 2 else np.concatenate([reference, *points]))
    flat = [viz.project(plane, rows) for rows in points]
    looks = ((viz.BLUE, True), (viz.VERMILION, False))
    marks = [viz.Points(label, xy, *look) for (label, _), xy, look in zip(series, flat, looks)]
    if len(flat) == 2:
        marks.insert(0, viz.Arrows("from start to end", *flat))
    return viz.figure([viz.Panel([viz.Cloud(name, viz.project(plane, reference)), *marks],
                                 viz.axis_names(plane))],
                      f"Layer {i}, its input" if i else "Token embeddings", caption)


def draw_run(run, a: SimpleNamespace, found: dict) -> list[str]:
    """figures/layer-NN.svg for every layer that owns rows."""
    (start, end), names = run.start_and_end(), []
    steps = max((m["step"] for m in run.metrics() if "step" in m), default=0)
    for i, reference in found.items():
        count, norm = len(reference.rows), reference.rows.norm(dim=1).mean()
        moved = (end[i] - start[i]).norm(dim=1).mean().item()
        caption = (f"{run.path.name}: prior {prior_name(a)}, seed {a.seed}, {steps} steps on "
                   f"{spec_name(a.data)}, model {Path(a.model).name}. {len(end[i])} rows in the "
                   f"principal plane of the reference ({reference.name}, {count} rows), fitted "
                   f"without them. A row moved {moved:.3g} on average; mean norms: reference "
                   f"{norm:.3g}, draw {start[i].norm(dim=1).mean():.3g}, "
                   f"trained {end[i].norm(dim=1).mean():.3g}.")
        svg = layer_figure(i, reference,
                           [("prior draw", start[i]), ("trained rows", end[i])], caption)
        names.append(f"figures/layer-{i:02d}.svg")
        run.write(names[-1], svg.encode())
    return names


def text_picture(run, a: SimpleNamespace, found: dict) -> str:
    """The same in characters, for a terminal."""
    import shutil

    import viz

    columns, lines = shutil.get_terminal_size((80, 30))
    (start, end), out = run.start_and_end(), []
    for i, reference in found.items():
        plane = viz.pca(reference.rows.numpy())
        out += [f"{run.path}, layer {i}: . {reference.name} ({len(reference.rows)} rows), o prior "
                f"draw, # trained; {', '.join(viz.axis_names(plane))}",
                viz.braille(viz.project(plane, reference.rows.numpy()),
                            [(letter, viz.project(plane, rows[i].numpy()))
                             for letter, rows in (("o", start), ("#", end))],
                            min(columns, 120) - 1, min(lines - 4, 40))]
    return "\n".join(out)


# --------------------------------------------------------------------------------------------------
# commands


def command_train(given: dict) -> None:
    from run import Run, RunError, read_config
    from train import agree, join_world, meet, world

    def join(a: SimpleNamespace) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) > a.batch_size:
            raise UserError(f"--batch-size {a.batch_size}: fewer than the "
                            f"{os.environ['WORLD_SIZE']} processes, which share a batch: raise it")
        join_world(a.device)
        if a.shard and world()[1] == 1:
            raise UserError("--shard divides a model among processes: start them by `torchrun "
                            "--nproc-per-node N promptprior.py train ...`, or leave it out")

    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    source = given.pop("config", None)
    if resume and source:
        raise UserError("--resume goes on with a run's own config.json, --config begins another "
                        "run like it: give one of the two")
    if resume and "out" not in given:
        raise UserError("--resume needs --out, the folder of the run to go on with")
    run = Run(Path(given["out"])) if resume else None
    if run and not (run.path.exists() and run.empty):
        config = run.config()
        stored = stored_settings(config)
        other = differences(run, {k: v for k, v in given.items() if k not in MAY_CHANGE})
        if other:
            raise UserError(f"{run.path}: a run goes on with its own settings, not with "
                            f"{'; '.join(other)}: leave them out, or start another run; only "
                            f"{', '.join('--' + k.replace('_', '-') for k in MAY_CHANGE)} may "
                            "change")
        if imported(SimpleNamespace(**stored)):
            raise RunError(f"{run.path}: an imported prompt has no training to go on with: start "
                           f"one from it by --prior posterior:{run.path},resample=1")
        a = SimpleNamespace(**{**stored, **given})
        check_ranges(a)
        join(a)
        if config.get("processes", 1) != world()[1]:
            raise RunError(f"{run.path}: begun by {config.get('processes', 1)} processes, and sums "
                           f"of {world()[1]} are others in the last digits: start as many by "
                           "torchrun")
        with alone(run):
            return train_run(run, a, config, resume=True)
    config = read_config(Path(source)) if source else None
    if config:
        given = over({k: v for k, v in stored_settings(config).items()
                      if k not in ("out", "imported")}, given)
    a = settings_of(given, MODEL, PRIOR, DATA, TRAIN)
    join(a)
    a.out = agree(a.out or free_name(a))
    run = Run(Path(a.out))
    if not run.empty:
        run.config()  # what is not a run is never overwritten
        if not overwrite:
            raise UserError(f"{run.path} exists: go on with it by --resume, replace it by "
                            "--overwrite, or choose another --out")
    meet()  # nothing is written before all have looked
    with alone(run):
        train_run(run, a, config, resume=False)


# what a run may go on with otherwise than it began
MAY_CHANGE = ("out", "steps", "eval_every", "snapshot_every", "skip_bad_steps", "device")


@contextlib.contextmanager
def alone(run):
    """The run's lock, held by the first process; where it is refused, all stop."""
    from train import agree

    with contextlib.ExitStack() as stack:
        refused = None
        try:
            word = stack.enter_context(run.lock()) if FIRST else ""
        except (ValueError, OSError) as e:
            refused = e
        refused = agree(refused)
        if refused:
            raise refused
        if word:
            say(word)
        yield


def differences(run, given: dict) -> list[str]:
    """What was asked for otherwise than the run was made."""
    stored = stored_settings(run.config())
    return [f"--{k.replace('_', '-')} {v} (the run has {stored.get(k)})" for k, v in given.items()
            if k != "out" and stored.get(k) != v]


def train_run(run, a: SimpleNamespace, config: dict | None, resume: bool) -> None:
    """Everything is read and checked before the first byte of the run is written. config: the
    config.json of the run to go on with, or to do again; None for a new one."""
    import torch

    import posteriors
    from references import draw, norm_ratio, references
    from run import RunError
    from train import evaluate, keep_freed_memory, prompt_of, train, trunk, world

    began, (rank, size) = time.time(), world()
    keep_freed_memory()
    model, vocabulary = load_model(a)
    model.recompute = a.recompute
    layers = layers_with_rows(a, model)
    examples, evals = training_and_evaluation(a)
    sums = checksums(a)
    for old in run.path.glob("trunk*.safetensors") if FIRST else ():
        old.unlink()  # of a run that was killed
    if config:
        torch.set_num_threads(config["threads"])  # the same sums in the same order
        stored = stored_settings(config)
        changed = [key for key, value in sums.items() if config["sha256"].get(key, value) != value
                   and all(getattr(a, flag, None) == stored[flag] for flag in (
                       "model", "data", "eval_data", "reference", "prior"))]
        if changed:
            raise RunError(f"{run.path}: the {' and the '.join(changed)} changed since the run "
                           "began, so it cannot come to the same end: restore the files, or start "
                           "another run")
    checkpoint = None
    if resume and run.checkpoints():  # else it was stopped before its first: from the start
        *checkpoint, wrong = run.load_checkpoint()
        if checkpoint[0] > a.steps:
            raise RunError(f"{run.path}: it is at step {checkpoint[0]} already: give --steps of at "
                           "least that")
        for what in wrong:
            say(f"{what}: going on from step {checkpoint[0]}")
    questions = encode(examples, vocabulary, a.max_length, "training")
    evals = encode(evals, vocabulary, a.max_length, "evaluation")
    say(f"model {Path(a.model).name}: {model.config.num_hidden_layers} layers of width "
        f"{model.config.hidden_size}, {a.dtype} on {a.device}; {len(questions.rows)} questions to "
        f"train on, {len(evals.rows)} to evaluate")
    found = references(a, model, vocabulary, layers, examples)
    start, fitted, reports = draw(a, found, a.particles if a.posterior == "svgd" else 1)
    scales = {i: float(r.rows.square().mean().sqrt()) for i, r in found.items()}
    rates = {i: a.lr or scale / 20 for i, scale in scales.items()}
    answer_tokens = sum(len(r.ids) - r.start for r in questions.rows)
    if a.method == "prefix":  # what the prior's rows give as keys and values
        with torch.no_grad():
            past = model.prompt_past({i: r[0].to(a.device) for i, r in start.items()}, cut=True)
        start = {i: torch.stack([t[0].transpose(0, 1) for t in kv], dim=1).flatten(1)[None].cpu()
                 for i, *kv in zip(range(len(past.keys)), past.keys, past.values) if i in start}
        scales = {i: float(r.float().square().mean().sqrt()) for i, r in start.items()}
        rates = {i: a.lr or scale / 20 for i, scale in scales.items()}
    arguments = start, scales, 1 / answer_tokens, a.seed
    posterior = (posteriors.POSTERIORS[a.posterior](*arguments) if a.reparam == "none"
                 else posteriors.Encoded(*arguments, a.reparam)).to(a.device)

    def scores(past, name):
        return evaluate(model, vocabulary, past, evals, a, name)

    if checkpoint:
        now = {k: getattr(a, k) for k in MAY_CHANGE if k != "out" and getattr(a, k) != stored[k]}
        if now:
            say(f"{run.path}: from step {checkpoint[0]} on with " + ", ".join(
                f"--{k.replace('_', '-')} {v} instead of {stored[k]}" for k, v in now.items())
                + ": not the end that it would have come to")
            run.write_json("config.json", {**config, "settings": vars(a), "changes": [
                *config.get("changes", []), {"step": checkpoint[0], **now}]})
    else:
        run.clear()
        run.write_json("config.json", {
            "settings": vars(a), "priors": reports, "learning_rates": rates,
            "threads": torch.get_num_threads(), "processes": size,
            "versions": {"python": sys.version.split()[0], **{p: version(p) for p in (
                "torch", "safetensors", "tokenizers", "numpy")}}, "sha256": sums})
        for split, (name, past) in plain_pasts(a, model, vocabulary).items():
            run.log({"split": split, **scores(past, name)[0]})

    order = data.Order([r.context for r in questions.rows], a.batch_size, a.seed, a.share)

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
        if a.trunk and layers[0] > 0 and a.place == "before" \
                and a.steps * a.batch_size > len(questions.rows):
            top, placed = trunk(model, questions.rows, layers[0], rows_per_layer(a), a, file)
            questions = questions._replace(placed=placed)
            say(f"layers 0 to {layers[0] - 1} are worked out once for all epochs: inputs of layer "
                f"{layers[0]} for {len(top.inputs)} tokens, {top.inputs.nbytes / 2**30:.2f} GiB "
                f"{f'in {file}, removed at the end' if file.exists() else 'in memory'}")
        train(run, a, top, posterior, rates, batch_of,
              lambda step: [questions.examples[i].id for i in order[step]],
              penalty if a.prior_weight else None, lambda step: scores(
                  [prompt_of(model, rows, a) for rows in posterior.scored()], f"step {step}"),
              checkpoint)
    finally:
        file.unlink(missing_ok=True)

    if not FIRST:
        return
    start, end = run.start_and_end()
    show(f"\n{len(evals.rows)} questions of "
          f"{spec_name(a.eval_data) if a.eval_data else 'the training data, held out'}; scores in "
          f"percent, loss in nats a token\n\n{final_table(a, run.metrics())}\n")
    for i in layers:
        moved = (end[i] - start[i]).norm(dim=1).mean()
        if a.method == "prefix":
            show(f"layer {i}: keys and values moved {moved:.3g} on average; their norm grew "
                 f"{norm_ratio(end[i], start[i]):.3g} times")
        else:
            show(f"layer {i}: rows moved {moved:.3g} on average; their norm over the reference's "
                 f"{norm_ratio(start[i], found[i].rows):.3g} -> "
                 f"{norm_ratio(end[i], found[i].rows):.3g}")
    # keys and values have no reference to be drawn in
    drawn = draw_run(run, a, found) if a.method == "prompt" else []
    show(f"{time.time() - began:.0f} s; {run.path}: "
         f"{', '.join(['prompt.safetensors', 'predictions.jsonl', 'metrics.jsonl', *drawn])}")


def open_run(path: str, given: dict):
    """A trained run: its folder, settings, model, tokenizer and prompt."""
    import llama
    from run import Run

    run = Run(Path(path))
    a = SimpleNamespace(**{**over(stored_settings(run.config()), given), "shard": False})
    check_ranges(a)
    rows = run.rows("prompt.safetensors")
    model, vocabulary = load_model(a)
    if a.method == "prefix":
        heads = model.config.num_key_value_heads
        if any(r.shape[1] % (2 * heads) for r in rows.values()):
            raise UserError(f"{run.path}: keys and values of another model than {a.model}")
        prompt = llama.Prefix(*({i: r.view(len(r), 2, heads, -1)[:, k] for i, r in rows.items()}
                                for k in (0, 1))).to(a.device)
    else:
        prompt = llama.Prompt(rows, a.cut).to(a.device)
    prompt.past(model)  # refuses rows that do not fit
    return run, a, model, vocabulary, prompt


def open_rows(path: str, given: dict):
    """open_run, for what needs rows in the space of a layer's inputs."""
    opened = open_run(path, given)
    if opened[1].method == "prefix":
        raise UserError(f"{path}: it trained keys and values, which lie among no embeddings or "
                        "activations: eval, generate, attention and export take it")
    return opened


def command_eval(given: dict) -> None:
    from train import evaluate

    as_json, spec, texts = (given.pop(k, None) for k in ("json", "data", "texts"))
    run, a, model, vocabulary, prompt = open_run(given.pop("run"), given)
    if spec is None:
        evals = training_and_evaluation(a)[1]
    else:
        evals = some_of(read_questions(spec, 1, a.keep_unanswerable), a.eval_limit)
    spec = spec or a.eval_data or f"{a.data}, held out"
    evals = encode(evals, vocabulary, a.max_length, spec)
    pasts = [*plain_pasts(a, model, vocabulary, texts).values(), *trained_pasts(run, a, model, prompt)]
    rows = [(name, evaluate(model, vocabulary, past, evals, a, name)[0]) for name, past in pasts]
    if as_json:
        show(json.dumps({"run": str(run.path), "data": spec, "questions": len(evals.rows),
                          "scores": dict(rows)}))
    else:
        show(f"{run.path} on {len(evals.rows)} questions of {spec}; scores in percent, loss in "
              f"nats a token\n\n{table(rows)}")


def trained_pasts(run, a: SimpleNamespace, model, prompt) -> list[tuple[str, object]]:
    """A run's prompt as a Past; of a posterior its mean, each of its prompts, and all together."""
    import torch

    from train import placed, prompt_of

    with torch.no_grad():
        name = f"{prior_name(a)} {'prompt' if imported(a) else 'prior, trained'}"
        mean = placed(functools.partial(prompt.past, model), a)
        if a.posterior == "point":
            return [(name, mean)]
        each = [prompt_of(model, {i: r.to(a.device) for i, r in rows.items()}, a)
                for rows in run.particles()]
    one = "particle" if a.posterior == "svgd" else "draw"
    return [(f"{name}: mean prompt", mean),
            *((f"{name}: {one} {k}", past) for k, past in enumerate(each, 1)),
            (f"{name}: ensemble of {len(each)}", each)]


def command_generate(given: dict) -> None:
    import torch

    import llama
    from train import begin, placed

    text, path, file = given.pop("prompt_text", None), given.pop("run"), given.pop("batch", None)
    if (text is None) == (file is None):
        raise UserError("generate: give a TEXT, or --batch FILE of JSON lines with a text each")
    _, a, model, vocabulary, prompt = open_run(path, given)
    lines = [("the text", {"text": text})] if file is None else [
        *data.json_lines(data.read_text(Path(file)), file)]
    room, rows = model.config.max_position_embeddings - rows_per_layer(a) - a.max_new, []
    for where, line in lines:
        if not isinstance(line.get("text"), str):
            raise UserError(f'{where}: no text in it: expected {{"text": "..."}}')
        ids = vocabulary.encode(line["text"])
        if len(ids) > room:
            raise UserError(f"{where} has {len(ids)} tokens, and {room} fit beside the prompt and "
                            "--max-new: shorten it")
        rows.append(data.Row([*ids, 0], len(ids), ids, "", 0))  # an answer to come
    with torch.no_grad():
        where = placed(functools.partial(prompt.past, model), a)
        for at in range(0, len(rows), a.batch_size):
            batch = data.collate(rows[at:at + a.batch_size], a.share, a.place == "suffix")
            past, batch = begin(model, batch.to(a.device), where)
            said = llama.generate(model, batch.asked, past, a.max_new, vocabulary.stop,
                                  batch.parent)
            for (_, line), ids in zip(lines[at:], said):
                answer = vocabulary.first_line(ids)
                show(json.dumps({**line, "answer": answer}) if file else answer)


def command_sample(given: dict) -> None:
    from compare import TITLES, judge_prior
    from references import draw, references
    from run import Run, rows_to_bytes

    as_json = given.pop("json", False)
    a = settings_of(given, MODEL, PRIOR, DATA, SAMPLE)
    run = Run(Path(a.out)) if a.out else None
    if run and run.path.exists():
        raise UserError(f"{run.path} exists: choose another --out")
    model, vocabulary = load_model(a)
    found = references(a, model, vocabulary, layers_with_rows(a, model))
    rows, _, reports = draw(a, found)
    rows = {i: r[0] for i, r in rows.items()}
    name, options, sources = priors.parse(a.prior)
    for report, (i, reference) in zip(reports, found.items()):
        if name == "text" or sources or min(map(len, reference.parts)) < 100:
            continue  # too few rows to hold some out
        judged = judge_prior(priors.PRIORS[name], reference.parts, options,
                             rows_per_layer(a), a.seed)
        report["judged"] = dict(judged)
        say(f"\nlayer {i}, fitted without a fifth of the reference and judged by it:\n"
            f"{table(judged, TITLES)}\n")
    if run:
        run.write("rows.safetensors", rows_to_bytes(rows, {"settings": json.dumps(vars(a))}))
        for i, reference in found.items():
            caption = (f"{len(rows[i])} draws of the prior {prior_name(a)}, seed {a.seed}, model "
                       f"{Path(a.model).name}; on {reference.name}.")
            svg = layer_figure(i, reference, [(f"draws of {prior_name(a)}", rows[i])], caption)
            run.write(f"figures/layer-{i:02d}.svg", svg.encode())
        say(f"{run.path}: rows.safetensors, "
            f"{', '.join(f'figures/layer-{i:02d}.svg' for i in found)}")
    else:
        say("nothing written (--out DIR keeps the rows and a figure for every layer)")
    if as_json:
        show(json.dumps(reports))


def command_collect(given: dict) -> None:
    import activations
    from train import progress

    specs, under = given.pop("domains", ["squad"]), given.pop("under", None)
    overwrite = given.pop("overwrite", False)
    if under:
        flags = {flag: default for flag, (default, _) in COLLECT.items()}
        _, a, model, vocabulary, prompt = open_rows(under, {**flags, **given})
        if a.place != "before":
            raise UserError(f"{under}: its prompt stands inside the texts (--place {a.place}), and "
                            "activations are collected under one that stands before them")
        prompt = ({i: r.detach() for i, r in prompt.rows.items()}, a.cut)
    else:
        a = settings_of(given, MODEL, PRIOR, DATA, COLLECT)
        model, vocabulary = load_model(a)
        prompt = None
    path, layers = Path(a.out), chosen_layers(a.layers, model.config.num_hidden_layers)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another --out, or replace it by --overwrite")
    if path.exists():
        activations.Collection(path)  # what is not a collection is never overwritten
    path.parent.mkdir(parents=True, exist_ok=True)
    if a.pool not in activations.POOLS:
        raise UserError(f"--pool {a.pool}: use one of {', '.join(activations.POOLS)}")
    known = [role for role in activations.ROLES if role != "prompt"]  # its rows stand apart
    roles = tuple(a.roles.split(",") if a.roles else known)
    if not set(roles) <= set(known):
        raise UserError(f"--roles {a.roles}: use some of {', '.join(known)}")
    domains = {}
    for given_name, spec in map(named_spec, specs):
        name = given_name or spec_name(spec)
        if name in domains:
            raise UserError(f"--data: two are named {name!r}: name one yourself, as in "
                            f"other={spec}")
        examples = activations.sample(progress(data.stream(*parse_spec(spec, 0)), desc=name,
                                               unit=" examples", leave=False), a.examples, a.seed)
        domains[name] = activations.choose(examples, vocabulary, a.max_length, roles, a.pool,
                                           a.limit, a.seed)
        if not domains[name].rows:
            raise UserError(f"{spec}: no token of the roles {', '.join(roles)} in examples of at "
                            f"most {a.max_length} tokens: ask for others by --roles, or raise "
                            "--max-length")
    activations.collect(model, vocabulary, domains, layers, path, a.pool, {
        "model": a.model, "revision": a.revision, "dtype": a.dtype, "sha256": checksum(model_files(a)),
        "data": [absolute(named_spec(s)[1]) for s in specs], "under": under and os.path.abspath(
            under), "examples": a.examples, "limit": a.limit, "seed": a.seed}, prompt)
    file = activations.Collection(path)
    for d, name in enumerate(domains):
        mine = file.field["domain"] == d
        bos = mine & (file.field["role"] == activations.ROLES.index("bos"))
        large = mine & file.left_out & ~bos
        show(f"{name}: {int(mine.sum())} rows of {len(domains[name].rows)} examples; "
              f"{int(bos.sum())} of BOS and {int(large.sum())} others of massive norm, marked and "
              "left out of fits and pictures")
    show(f"{path}: layers {', '.join(map(str, layers))} of width {file.width}, "
          f"{path.stat().st_size / 2**20:.1f} MiB")


def command_compare(given: dict) -> None:
    as_json, out = given.pop("json", False), []
    for path in given.pop("paths"):
        out.append((compare_collection if Path(path).is_file() else compare_run)(path, dict(given)))
        if not as_json:
            show(out[-1].pop("text") + "\n")
        out[-1].pop("text", None)
    if as_json:
        show(json.dumps(out))


def compare_run(path: str, given: dict) -> dict:
    """A run's scores, and where its rows started and ended in each layer's reference."""
    import compare
    from references import references

    run, a, model, vocabulary, prompt = open_rows(path, given)
    found = references(a, model, vocabulary, list(prompt.rows))
    start, end = run.start_and_end()
    spoken = [run.particles(f)[0] if a.posterior == "svgd" else run.rows(f)
              for f in ("prompts/000000.safetensors", "prompt.safetensors")]
    measured, said = [], {}
    tokens = model.embeddings[vocabulary.ordinary].float().cpu()
    for i, reference in found.items():
        rows = compare.measure_rows(start[i], end[i], reference.rows,
                                    priors.Fitted.fit(reference.rows), None if i else tokens)
        measured += [(f"layer {i} {name}", numbers) for name, numbers in rows]
        said[i] = {name: compare.what_rows_say(r[i], i, model, vocabulary)
                   for name, r in zip(("prior draw", "trained"), spoken)}
    lines = [f"{run.path}: prior {prior_name(a)}, {a.posterior} posterior, seed {a.seed}",
             final_table(a, run.metrics()), "", table(measured, compare.TITLES), "",
             f"the token of each row{' of particle 1' * (a.posterior == 'svgd')}:"]
    for i, each in said.items():
        lines += [f"layer {i} {name}, {reading}: {' '.join(map(json.dumps, tokens))}"
                  for name, readings in each.items() for reading, tokens in readings.items()]
    scores = [None, *(m for m in run.metrics() if m["split"] == "eval")][-1]
    return {"run": str(run.path), "settings": vars(a), "scores": scores,
            "measures": dict(measured), "tokens": said, "text": "\n".join(lines)}


def compare_collection(path: str, given: dict) -> dict:
    """A collection's domains at each layer: are they apart, and are their texts local?"""
    import activations
    import compare

    file, embeddings = activations.Collection(Path(path)), None
    made = {k: file.about.get(k) for k in ("model", "revision", "dtype")}
    a = settings_of(over(made, given), MODEL, PRIOR, DATA, SAMPLE)
    if 0 in file.layers and ("model" in given or model_folder(a).is_dir()):
        model, vocabulary = load_model(a)
        check_same_model(a, file.about["sha256"], file.path)
        embeddings = model.embeddings[vocabulary.ordinary].float().cpu()
    elif 0 in file.layers:
        say(f"{a.model}: no such folder, so the uniform walks at layer 0 are over the tokens in "
            f"{file.path}, not over the vocabulary (--model DIR)")
    apart, local = [], []
    for i in file.layers:
        apart += [(f"layer {i}: {name}", numbers) for name, numbers in compare.separation(file, i)]
        if file.about["pool"] == "token":
            local += [(f"layer {i}: {name}", compare.walks(file, i, name, embeddings))
                      for name in file.domains]
    lines = [f"{file.path}: {len(file.chosen())} rows, without BOS and rows of massive norm"]
    if apart:
        lines += ["", "domains, pair by pair", table(apart, compare.TITLES)]
    if local:
        lines += ["", "steps from token to token, against random walks over the text's own tokens "
                  "(matched) and over all types (uniform)", table(local, compare.TITLES)]
    return {"collection": str(file.path), "separation": dict(apart), "locality": dict(local),
            "text": "\n".join(lines)}


def command_interpolate(given: dict) -> None:
    """Prompts on the straight line between two trained ones, on the tasks of both."""
    import figures
    from run import Run
    from train import evaluate, prompt_of

    as_json, points = given.pop("json", False), given.pop("points", 11)
    paths = given.pop("run_a"), given.pop("run_b")
    if points < 2:
        raise UserError(f"--points {points}: expected at least 2, the two runs")
    out = given.pop("out", None) or f"{paths[0].rstrip('/')}-to-{Path(paths[1]).name}"
    folder = Run(Path(out))
    if folder.path.exists():
        raise UserError(f"{folder.path} exists: choose another --out")
    (one, a, model, vocabulary, first), (other, b, _, _, second) = (
        open_rows(p, dict(given)) for p in paths)
    if checksum(model_files(a)) != checksum(model_files(b)):
        raise UserError(f"{one.path} and {other.path} are of different models: give two of one")
    shapes = [{i: tuple(r.shape) for i, r in p.rows.items()} for p in (first, second)]
    if shapes[0] != shapes[1] or (a.cut, a.place) != (b.cut, b.place):
        raise UserError(f"{one.path} and {other.path} have other rows ({shapes[0]} and "
                        f"{shapes[1]}, cut {a.cut} and {b.cut}), and no line joins them: give two "
                        "of one --tokens, --deep-layers and --cut or --keep")
    folder.path.mkdir(parents=True)  # now, not when all is worked out
    tasks = {}
    for run, settings in ((one, a), (other, b)):
        name = spec_name(settings.eval_data or settings.data)
        questions = encode(training_and_evaluation(settings)[1], vocabulary, settings.max_length,
                           name)
        if name in tasks and tasks[name][1].rows != questions.rows:  # others of the same name
            name = f"{name} of {run.path.name}"
        tasks.setdefault(name, (settings, questions))
    curve = []
    for step in range(points):
        t = step / (points - 1)
        rows = {i: (1 - t) * first.rows[i].detach() + t * second.rows[i].detach()
                for i in first.rows}
        for name, (settings, questions) in tasks.items():
            scores, _ = evaluate(model, vocabulary, prompt_of(model, rows, settings), questions,
                                 settings, f"{t:.2f} {name}")
            curve.append({"t": t, "data": name, **scores})
    rows = [(f"{line['t']:.2f} on {line['data']}", line) for line in curve]
    if as_json:
        show(json.dumps(curve))
    else:
        show(f"(1 - t) {one.path} + t {other.path}; scores in percent, loss in nats a token\n\n"
              f"{table(sorted(rows, key=lambda r: r[1]['data']))}\n")
    folder.write("curve.jsonl", b"".join((json.dumps(line) + "\n").encode() for line in curve))
    folder.write("curve.svg", figures.line(
        curve, f"(1 - t) {one.path.name} + t {other.path.name}, model {Path(a.model).name}, "
        f"seeds {a.seed} and {b.seed}; {points} prompts.").encode())
    say(f"{folder.path}: curve.jsonl, curve.svg")


def command_attention(given: dict) -> None:
    """What the theory says of a prompt before the text, and what happens."""
    import torch

    import compare
    import figures

    as_json, limit = given.pop("json", False), given.pop("limit", 32)
    if limit < 1:
        raise UserError(f"--limit {limit}: ask for at least one question")
    run, a, model, vocabulary, prompt = open_run(given.pop("run"), given)
    if a.place != "before":
        raise UserError(f"{run.path}: its prompt stands inside the texts (--place {a.place}), and "
                        "what is measured is one before them")
    questions = encode(some_of(training_and_evaluation(a)[1], limit), vocabulary, a.max_length,
                       "evaluation")
    with torch.no_grad():
        rows = compare.attention(model, prompt.past(model), [r.question for r in questions.rows])
    caption = (f"{run.path.name}: {a.method}, prior {prior_name(a)}, seed {a.seed}, {a.steps} "
               f"steps on {spec_name(a.data)}, model {model_folder(a).name}; "
               f"{len(questions.rows)} questions. At the first layer with prompt columns the "
               f"content's own shares differ by at most {rows[0][1]['content']:.1g}.")
    run.write("figures/attention.svg", figures.attention(rows, caption).encode())
    if as_json:
        show(json.dumps({"run": str(run.path), "attention": dict(rows)}))
    else:
        show(f"{run.path}, {len(questions.rows)} questions\n\n{table(rows, compare.TITLES)}")
    say(f"{run.path / 'figures/attention.svg'}")


def named_spec(text: str) -> tuple[str, str]:
    """"prose=text:PATH" -> ("prose", "text:PATH"); without a name it is "".  """
    name, equals, spec = text.partition("=")
    return (name, spec) if equals and ":" not in name else ("", text)


def chosen_layers(text: str | None, L: int) -> list[int]:
    """"0,8,16" or "all" -> layers; None: the first, the middle and the end."""
    if text is None:
        return sorted({0, L // 2, L})
    try:
        layers = list(range(L + 1)) if text == "all" else sorted({int(i) for i in text.split(",")})
    except ValueError:
        layers = [-1]
    if not layers or not 0 <= layers[0] <= layers[-1] <= L:
        raise UserError(f"--layers {text}: expected numbers from 0 to {L} with commas between, or "
                        f"all; {L} is what comes after the final norm")
    return layers


def command_figures(given: dict) -> None:
    """Make what the figures are drawn from, as far as it is not there yet, and draw them."""
    import activations
    import figures
    from run import Run, write_file

    numbers = sorted(set(given.pop("numbers", None) or figures.FIGURES))
    unknown = [n for n in numbers if n not in figures.FIGURES]
    if unknown:
        raise UserError(f"figure {unknown[0]}: the paper has 1 to {max(figures.FIGURES)}")
    a = settings_of(given, MODEL, PRIOR, DATA, FIGURE)
    a.text_data, a.squad_data, a.math_data = map(absolute, (a.text_data, a.squad_data,
                                                            a.math_data))
    model, vocabulary = load_model(a)
    folder, needed = Path(a.out), [figures.FIGURES[n] for n in numbers]
    same = {k: getattr(a, k) for k in ("model", "revision", "device", "dtype", "seed")}
    domains = {"text": a.text_data, "squad": a.squad_data, "math": a.math_data}
    modules = {f.stem: f"math:{f}" for f in data.files_of("math", parse_spec(a.math_data, 0)[1])}
    asked = {"tokens": ("token", "all", domains), "means": (
        "mean", str(model.config.num_hidden_layers), {"text": a.text_data, **modules})}
    collections = {}
    for name in dict.fromkeys(c for f in needed for c in f.collections):
        path, (pool, layers, specs) = folder / f"{name}.safetensors", asked[name]
        if not path.exists():
            command_collect({**same, "domains": [f"{k}={v}" for k, v in specs.items()],
                             "pool": pool, "layers": layers, "examples": a.examples,
                             "limit": a.limit, "out": str(path)})
        file = collections[name] = activations.Collection(path)
        check_same_model(a, file.about["sha256"], path)
        made = {"data": [*specs.values()], "examples": a.examples, "limit": a.limit,
                "seed": a.seed}
        if {k: file.about.get(k) for k in made} != made:
            raise UserError(f"{path}: collected from other data or with other limits: choose "
                            "another --out, or remove it")
    scale, runs = float(model.embeddings.float().square().mean().sqrt()), {}
    recipes = figures.recipes(a, scale)
    for name in dict.fromkeys(r for f in needed for r in f.runs):
        run = runs[name] = Run(folder / "runs" / name)
        wanted = {**same, **recipes[name], **{k: getattr(a, k) for k in (
            "steps", "eval_limit", "batch_size")}}
        there = not run.empty
        if there and differences(run, wanted):
            raise UserError(f"{run.path}: trained otherwise, with {differences(run, wanted)[0]}: "
                            "choose another --out, or remove it")
        if not there or not any(m["split"] == "eval" and m["step"] == a.steps
                                for m in run.metrics()):
            command_train({**wanted, "out": str(run.path), **({"resume": True} if there else {})})
    world = figures.World(a, model, vocabulary, collections, runs)
    results = {}
    for n in numbers:
        figure = figures.FIGURES[n]
        svg, measured = figures.draw(n, world)
        name = f"figure-{n:02d}-{figure.name}.svg"
        write_file(folder / name, svg.encode())
        results[n] = {"file": name, "title": figure.title, "measured": measured}
        show(f"{folder / name}\n    " + ", ".join(
            f"{k} {v:.3g}" for k, v in measured.items() if not isinstance(v, list)))
    path = folder / "figures.json"
    if path.exists():
        results = {**{int(k): v for k, v in data.read_json(path, dict).items()
                      if k.isascii() and k.isdecimal()}, **results}
    write_file(path, (json.dumps(dict(sorted(results.items())), indent=1) + "\n").encode())


def command_plot(given: dict) -> None:
    import figures
    import report
    import viz
    from references import references
    from run import Run, write_file

    text, out, folders = given.pop("text", False), given.pop("out", None), given.pop("runs")
    runs = [Run(Path(path)) for path in folders]
    if not text:
        report.check(runs)  # width, weights, snapshots: before a model is loaded or a file written

    def opened():
        """Each run with what the page wants of it; its own figures are drawn on the way."""
        for path in folders:
            run, a, model, vocabulary, prompt = open_rows(path, dict(given))
            found = references(a, model, vocabulary, list(prompt.rows))
            show(text_picture(run, a, found) if text else "\n".join(
                str(run.path / name) for name in draw_run(run, a, found)))
            yield run, a, model, vocabulary, found

    if text:
        for _ in opened():
            pass
        return
    template = (Path(__file__).resolve().parent / "report.html").read_text(encoding="utf-8")
    page = viz.page(template, report.gather(opened())).encode()
    target = Path(out) if out else runs[0].path / "report.html"
    write_file(target, page)
    scored = [run for run in runs if any(m["split"] == "eval" for m in run.metrics())]
    if scored:  # an imported prompt is not
        runs[0].write("figures/curves.svg", figures.curves(scored).encode())
        show(str(runs[0].path / "figures/curves.svg"))
    show(str(target))


def command_export(given: dict) -> None:
    """A run's prompt as a PEFT adapter, read back and held to its logits; its log as a table."""
    import torch

    import adapters
    from run import Run, write_file
    from train import placed

    path, to, log = given.pop("run"), given.pop("to", None), given.pop("csv", None)
    overwrite = given.pop("overwrite", False)
    if to is None and log is None:
        raise UserError("export: give --to DIR for a PEFT adapter, --csv for the log, or both")
    if log is not None:
        run = Run(Path(path))
        run.config()  # is it a run's folder?
        text = adapters.to_csv(run.metrics())
        show(text.rstrip("\n")) if log == "-" else write_file(Path(log), text.encode())
    if to is None:
        return
    folder = Path(to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (
            overwrite and (folder / adapters.ABOUT).is_file()):
        raise UserError(f"{folder} exists: choose another --to" + (
            "; only an adapter that export made is overwritten" if overwrite else
            ", or replace an adapter that export made by --overwrite"))
    run, a, model, vocabulary, prompt = open_run(path, given)
    check_same_model(a, run.config()["sha256"].get("model"), run.path)
    with torch.no_grad():
        past = placed(functools.partial(prompt.past, model), a)
        if a.place == "suffix":
            raise UserError(f"{run.path}: its prompt stands inside the text, and PEFT's before it: "
                            "train with --place before")
        if a.place == "after-bos" and vocabulary.bos is None:
            raise UserError(f"{run.path}: {a.model} has no BOS, so no prompt is after it: train "
                            "with --place before")
        if a.place == "after-bos":
            past = past.put(model.extend(torch.tensor([[vocabulary.bos]], device=a.device)))
        rows = a.method == "prompt" and a.place == "before" and [*prompt.rows] == [0] and not a.cut
        files = adapters.to_peft(model, prompt.rows[0] if rows else past,
                                 str(model_folder(a)) if a.model == "tiny" else a.model, a.revision)
    about = {"run": run.path.resolve().name, "layers": [*run.rows("prompt.safetensors")],
             "sha256": run.config()["sha256"]["model"], **{k: getattr(a, k) for k in (
                 "method", "place", "tokens", "deep_layers", "cut", "posterior", "seed", "dtype")},
             "prior": prior_name(a), "data": spec_name(a.data)}
    (folder / adapters.CONFIG).unlink(missing_ok=True)  # last: without it there is no adapter
    for name, content in ({adapters.ABOUT: (json.dumps(about, indent=2) + "\n").encode()}
                          | files).items():
        write_file(folder / name, content)
    with torch.no_grad():
        apart, scale = adapters.difference(
            model, past, adapters.from_peft(folder, model.config).to(a.device).past(model))
    # the same numbers, so but for what a device adds up in another order the same logits
    if not apart <= scale * (1e-4 if a.dtype == "float32" else 2e-2):
        for name in (*files, adapters.ABOUT):
            (folder / name).unlink()
        raise OSError(f"{folder}: read back, the adapter's logits differ by {apart:.3g}: removed; "
                      "is the disk sound?")
    kind, (n, width) = adapters.read(folder).kind, adapters.read(folder).numbers.shape
    if a.posterior != "point":
        say(f"{run.path}: the mean prompt of its {a.posterior} posterior")
    if a.place == "after-bos":
        say("BOS is one of the adapter's virtual tokens: give PEFT texts without it")
    show(f"{folder}: {kind}, {n} virtual tokens of {width} numbers; read back, its logits differ "
         f"by at most {apart:.2g} from the run's")


def command_import(given: dict) -> None:
    """A run's folder of somebody else's prompt: one that has seen no training here."""
    import torch
    from safetensors.torch import save

    import adapters
    import llama
    from run import Run

    adapter, overwrite = adapters.read(Path(given.pop("adapter"))), given.pop("overwrite", False)
    base = adapter.config.get("base_model_name_or_path")
    if "model" not in given:
        if not isinstance(base, str) or not base:
            raise UserError(f"{adapter.path}: it does not name the model it was trained on: give "
                            "--model")
        given["model"] = "tiny" if Path(base) == model_folder(SimpleNamespace(
            model="tiny")) else base
        revision = adapter.config.get("revision")
        if isinstance(revision, str) and "revision" not in given and on_hub(base):
            given["revision"] = revision
    a = settings_of({**given, "steps": 0}, MODEL, PRIOR, DATA, TRAIN)
    a.tokens, a.method = len(adapter.numbers), "prompt"
    a.imported = adapter.path.resolve().name
    if adapter.about.get("place") == "after-bos":  # its last position is BOS, which texts bring
        a.place, a.tokens = "after-bos", a.tokens - 1
        adapter = adapter._replace(numbers=adapter.numbers[:-1])
    run = Run(Path(a.out))
    if not run.empty:
        run.config()  # what is not a run is never overwritten
        if not overwrite:
            raise UserError(f"{run.path} exists: replace it by --overwrite, or choose another "
                            "--out")
    model, vocabulary = load_model(a)
    prompt = adapters.fit(adapter, model.config)
    if "sha256" in adapter.about:
        check_same_model(a, adapter.about["sha256"], adapter.path)
    if isinstance(prompt, llama.Prefix):
        a.method = "prefix"
    content = save(adapters.tensors(prompt))
    sums = checksums(a)
    with run.lock():
        run.clear()
        run.write("prompts/000000.safetensors", content)
        run.write("prompt.safetensors", content)
        run.write_json("config.json", {
            "settings": vars(a), "imported_from": {
                "path": str(adapter.path.resolve()), "config": adapter.config,
                "about": adapter.about},
            "priors": [], "learning_rates": {}, "threads": torch.get_num_threads(), "processes": 1,
            "versions": {"python": sys.version.split()[0], **{p: version(p) for p in (
                "torch", "safetensors", "tokenizers", "numpy")}}, "sha256": sums})
    show(f"{run.path}: {a.tokens} {'keys and values a layer' if a.method == 'prefix' else 'rows'} "
         f"of {adapter.kind}, for {a.model}; `eval {run.path}` scores them on {spec_name(a.data)}")


# --------------------------------------------------------------------------------------------------
# the command line


def prior_help() -> str:
    lines = ["priors and their options:"]
    for name, prior in priors.PRIORS.items():
        shown = ",".join(["RUN"] * prior.sources
                         + [f"{k}={v:g}" for k, v in priors.options(name).items()])
        about = " ".join(prior.__doc__.split("\n\n")[0].split())
        lines.append(f"  {name}{':' * bool(shown)}{shown}\n" + textwrap.fill(
            about, 76, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        say(f"promptprior: error: {one_line(message)}: see `{self.prog} --help`")
        self.exit(2)


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
            shown = f"{text} ({default})" if default is not None else text
            c.add_argument("--" + flag.replace("_", "-"), type=kind_of(flag, default),
                           nargs="+" if flag == "reference" else None,
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
    c.add_argument("--config", metavar="FILE", help="begin with the settings of a run's "
                   "config.json, for the same bytes again; other flags change them")
    c.add_argument("--overwrite", action="store_true", help="replace the run in --out")

    some = {k: (None, text) for k, (_, text) in MODEL.items() if k in (
        "model", "revision", "device", "dtype")}
    c = command("eval", "Score a run's prompt beside no prompt and a text prompt.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("--data", help="data to evaluate on, a SPEC (the run's evaluation data)")
    c.add_argument("--limit", dest="eval_limit", type=int,
                   help="most questions, 0 for all (the run's)")
    c.add_argument("--text", dest="texts", nargs="+", metavar="TEXT",
                   help="text prompts to score beside it (the run's)")
    c.add_argument("--max-length", type=int, help="most tokens of a question's text (the run's)")
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("generate", "Continue a text under a run's prompt, to the end of the line.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("prompt_text", metavar="TEXT", nargs="?", help="the text to go on from")
    c.add_argument("--batch", metavar="FILE", help='JSON lines, {"text": "..."} each, in place of '
                   "TEXT; they come back with an answer each")
    c.add_argument("--max-new", type=int, help="most tokens (the run's)")

    c = command("sample", "Draw rows from a prior, report on them and picture them.",
                [MODEL, PRIOR, DATA, SAMPLE], prior_help())
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("collect", "Keep activations of data at chosen layers, with the role of every row, "
                "in one safetensors file.", [MODEL, COLLECT])
    c.add_argument("--data", dest="domains", nargs="+", metavar="SPEC",
                   help="data, SPECs or NAME=SPEC, each a domain of its own (squad)")
    c.add_argument("--under", metavar="RUN", help="with a run's prompt in front of every text, and "
                   "its rows collected too")
    c.add_argument("--max-length", type=int, help="most tokens of an example (1024, or what fits)")
    c.add_argument("--overwrite", action="store_true", help="replace the file")

    c = command("compare", "Measure the geometry of runs (where rows started and ended, and what "
                "they say), or of collections (are domains apart, are texts local).", [some])
    c.add_argument("paths", metavar="RUN|FILE", nargs="+", help="runs' folders, collections' files")
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("interpolate", "Score the prompts on the straight line between two runs' prompts, "
                "on the tasks of both.", [some])
    c.add_argument("run_a", metavar="RUN_A", help="where t is 0")
    c.add_argument("run_b", metavar="RUN_B", help="where t is 1")
    c.add_argument("--points", type=int, help="prompts, the two ends among them (11)")
    c.add_argument("--limit", dest="eval_limit", type=int,
                   help="most questions, 0 for all (theirs)")
    c.add_argument("--out", help="folder for curve.jsonl (RUN_A-to-RUN_B)")
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("attention", "Measure what a run's prompt does to attention: the share it takes, "
                "what it changes among content, the directions it adds.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("--limit", type=int, help="questions (32)")
    c.add_argument("--json", action="store_true", help="print JSON")

    c = command("figures", "Draw the paper's figures, and measure what each shows.",
                [MODEL, FIGURE])
    c.add_argument("numbers", metavar="N", nargs="*", type=int, help="figures, 1 to 13 (all)")

    c = command("plot", "Draw runs: a page to explore, report.html, and for every layer the "
                "reference, the prior's draw and the trained rows.", [some])
    c.add_argument("runs", metavar="RUN", nargs="+", help="runs' folders")
    c.add_argument("--out", metavar="FILE", help="where the page goes (report.html in the first "
                   "RUN's folder)")
    c.add_argument("--text", action="store_true",
                   help="print each layer's plane in characters, and write nothing")

    c = command("export", "Write a run's prompt as an adapter that PEFT loads, or its log as a "
                "table.", [some])
    c.add_argument("run", metavar="RUN", help="a run's folder")
    c.add_argument("--to", metavar="DIR", help="the adapter's folder")
    c.add_argument("--csv", metavar="FILE", nargs="?", const="-",
                   help="metrics.jsonl as CSV, a line a record (printed)")
    c.add_argument("--overwrite", action="store_true", help="replace an adapter that export made")

    c = command("import", "Make a run's folder of a prompt that PEFT trained, or of rows in "
                "numpy's format, for eval, generate, compare, plot and --prior posterior:RUN.",
                [{**MODEL, "model": (None, MODEL["model"][1] + " (the adapter's own)")}, DATA])
    c.add_argument("adapter", metavar="DIR", help="the adapter's folder, or a .npy file of rows "
                   "(n, width)")
    c.add_argument("--out", metavar="RUN", required=True, help="the run's folder")
    c.add_argument("--keep-unanswerable", **unanswerable)
    c.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return p


COMMANDS = {"train": command_train, "eval": command_eval, "generate": command_generate,
            "sample": command_sample, "collect": command_collect,
            "compare": command_compare, "interpolate": command_interpolate,
            "attention": command_attention, "figures": command_figures, "plot": command_plot,
            "export": command_export, "import": command_import}


def main(argv: list[str] | None = None) -> int:
    p = parser()
    given = vars(p.parse_args(argv))
    for text in sys.argv[1:] if argv is None else argv:
        if any("\ud800" <= c <= "\udfff" for c in text):  # so Python stands for other bytes
            p.error(f"{ascii(text)}: not UTF-8: rename the file, or convert the text")
    if given["command"] != "train" and not FIRST:
        return 0  # no other command has work for several processes
    try:
        COMMANDS[given.pop("command")](given)
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at the end
        status = -signal.SIGPIPE
    except KeyboardInterrupt:
        say("promptprior: stopped; a run that has begun goes on with train --out RUN --resume")
        status = -signal.SIGINT
    except Exception as e:
        status = exit_status(e)
        if status is None:
            raise
        text = f"{'error: ' * (status > 0)}{one_line(message(e))}"
        say(f"promptprior: {text}")
        if not FIRST and status > 0 and joined():  # it may be this one's alone
            show(f"promptprior: process {os.environ['RANK']}: {text}", sys.stderr)
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
    return getattr(e, "status", 1 if isinstance(e, OSError) or out_of_memory(e) else None)


def out_of_memory(e: Exception) -> bool:
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" \
        or isinstance(e, RuntimeError) and "not enough memory" in str(e) \
        or isinstance(e, RuntimeError) and "can't allocate memory" in str(e)


def message(e: Exception) -> str:
    """What, where, and the remedy."""
    if isinstance(e, OSError) and e.strerror and e.filename:
        return f"{e.filename}: {e.strerror}: check the path, and who may use it"
    if out_of_memory(e) and not hasattr(e, "status"):
        return (f"memory does not suffice ({e or 'no more of it'}): lower --batch-size, "
                "--max-length or --limit, or use a smaller model")
    return str(e) or type(e).__name__


if __name__ == "__main__":
    sys.exit(main())
