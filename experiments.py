"""The commands that make prompts and use them: train, eval, generate, export, import."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save

import adapters
import data
import llama
import posteriors
from compare import final_table, table
from loading import (check_same_model, checksums, encode, layers_with_rows, load_model,
                     model_folder, plain_pasts, read_questions, rows_per_layer, some_of,
                     training_and_evaluation)
from pictures import draw_run
from references import as_prefix, beside, draw, measured, norm_ratio, references
from run import Run, RunError, read_config, write_file
from settings import (DATA, FIRST, MODEL, PRIOR, TRAIN, UserError, again, check_ranges, flags_of,
                      free_name, imported, on_hub, over, prior_name, say, settings_of, show,
                      spec_name, stored_settings)
from train import (agree, begin, check_fits, evaluate, join_world, keep_freed_memory, meet, placed,
                   prompt_of, train, trunk, world)


def command_train(given: dict) -> None:
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
    # what a start that was cut short left is begun again
    if run and not (run.empty and run.path.exists() and any(run.path.iterdir())):
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
            return train_run(run, a, config)
    config = read_config(Path(source)) if source else None
    asked = {*given} - {"out"}
    if config:
        given, asked = again(config, given), asked | {*flags_of(config)}
    a = settings_of(given, MODEL, PRIOR, DATA, TRAIN)
    join(a)
    a.out = agree(a.out or free_name(a))
    run = new_run(a.out, overwrite, "go on with it by --resume, ")
    meet()  # nothing is written before all have looked
    with alone(run):
        train_run(run, a, config, sorted(asked))


def new_run(path: str, overwrite: bool, remedy: str = "") -> Run:
    """A folder for a run that begins: none yet, or a run's that may be overwritten."""
    run = Run(Path(path))
    if not run.empty:
        run.config()  # what is not a run is never overwritten
        if not overwrite:
            raise UserError(f"{run.path} exists: {remedy}replace it by --overwrite, or choose "
                            "another --out")
    return run


# what a run may go on with otherwise than it began
MAY_CHANGE = ("out", "steps", "eval_every", "snapshot_every", "skip_bad_steps", "device")


@contextlib.contextmanager
def alone(run):
    """The run's lock, held by the first process; where it is refused, all stop."""
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


def train_run(run: Run, a: SimpleNamespace, config: dict | None,
              asked: list[str] | None = None) -> None:
    """Everything is read and checked before the first byte of the run is written. config: the
    config.json of the run to go on with, or to do again; None for a new one. asked: the flags that
    were given for a run that begins; None to go on."""
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
        before = config["sha256"]
        changed = [key for key in {**before, **sums} if before.get(key) != sums.get(key)
                   and all(getattr(a, flag, None) == stored[flag] for flag in (
                       "model", "data", "eval_data", "reference", "prior"))]
        if changed:
            raise RunError(f"{run.path}: the {' and the '.join(changed)} changed since the run "
                           "began, so it cannot come to the same end: restore the files, or start "
                           "another run")
    checkpoint = None
    if asked is None and run.checkpoints():  # else it was stopped before its first: from the start
        checkpoint, wrong = run.load_checkpoint()
        if checkpoint.step > a.steps:
            raise RunError(f"{run.path}: it is at step {checkpoint.step} already: give --steps of "
                           "at least that")
        for what in wrong:
            say(f"{what}: going on from step {checkpoint.step}")
    questions = encode(examples, vocabulary, a.max_length, "training")
    evals = encode(evals, vocabulary, a.max_length, "evaluation")
    say(f"model {Path(a.model).name}: {model.config.num_hidden_layers} layers of width "
        f"{model.config.hidden_size}, {a.dtype} on {a.device}; {len(questions.rows)} questions to "
        f"train on, {len(evals.rows)} to evaluate")
    found = references(a, model, vocabulary, layers, examples)
    start, fitted, reports = draw(a, found, a.particles if a.posterior == "svgd" else 1)
    if a.method == "prefix":
        start = {i: as_prefix(a, model, i, r[0], found[i].columns)[None] for i, r in start.items()}
        found = beside(a, model, found)
    scales = {i: float(r.rows.square().mean().sqrt()) for i, r in found.items()}
    answer_tokens = sum(len(r.ids) - r.start for r in questions.rows)
    arguments = start, scales, 1 / answer_tokens, a.seed
    posterior = (posteriors.POSTERIORS[a.posterior](*arguments) if a.reparam == "none"
                 else posteriors.Encoded(*arguments, a.reparam)).to(a.device)
    if checkpoint:
        check_fits(posterior, checkpoint, run.path)

    def scores(past, name):
        return evaluate(model, vocabulary, past, evals, a, name)

    if checkpoint:
        now = {k: getattr(a, k) for k in MAY_CHANGE if k != "out" and getattr(a, k) != stored[k]}
        if now:
            say(f"{run.path}: from step {checkpoint.step} on with " + ", ".join(
                f"--{k.replace('_', '-')} {v} instead of {stored[k]}" for k, v in now.items())
                + ": not the end that it would have come to")
            run.write_json("config.json", {**config, "settings": vars(a), "changes": [
                *config.get("changes", []), {"step": checkpoint.step, **now}],
                "given": sorted({*flags_of(config), *now})})
    else:
        run.clear()
        run.write_json("config.json", {
            "settings": vars(a), "given": flags_of(config) if asked is None else asked,
            "priors": reports,
            "learning_rates": {g["name"]: g["lr"] for g in posterior.groups(a.lr)},
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
        train(run, a, top, posterior, batch_of,
              lambda step: [questions.examples[i].id for i in order[step]],
              penalty if a.prior_weight else None, lambda step: scores(
                  [prompt_of(model, rows, a) for rows in posterior.scored()], f"step {step}"),
              checkpoint)
    finally:
        file.unlink(missing_ok=True)

    if not FIRST:
        return
    seen = measured(run, model)
    start, end = seen.start_and_end()
    show(f"\n{len(evals.rows)} questions of "
          f"{spec_name(a.eval_data) if a.eval_data else 'the training data, held out'}; scores in "
          f"percent, loss in nats a token\n\n{final_table(a, run.metrics())}\n")
    what = "keys and values" if a.method == "prefix" else "rows"
    for i in layers:
        before, after = (norm_ratio(rows[i], found[i].rows) for rows in (start, end))
        show(f"layer {i}: {what} moved {(end[i] - start[i]).norm(dim=1).mean():.3g} on average; "
             f"their norm over the reference's {before:.3g} -> {after:.3g}")
    drawn = ["prompt.safetensors", "predictions.jsonl", "metrics.jsonl", *draw_run(seen, a, found)]
    show(f"{time.time() - began:.0f} s; {run.path}: {', '.join(drawn)}")


def open_run(path: str, given: dict):
    """A trained run: its folder, settings, model, tokenizer and prompt."""
    run = Run(Path(path))
    a = SimpleNamespace(**{**over(stored_settings(run.config()), given), "shard": False})
    check_ranges(a)
    rows = run.rows("prompt.safetensors")
    model, vocabulary = load_model(a)
    if a.method == "prefix":
        parts = {i: llama.split(r, model.config) for i, r in rows.items()}
        prompt = llama.Prefix(*({i: kv[j] for i, kv in parts.items()} for j in (0, 1))).to(a.device)
    else:
        prompt = llama.Prompt(rows, a.cut).to(a.device)
    prompt.past(model)  # refuses rows that do not fit
    return run, a, model, vocabulary, prompt


def command_eval(given: dict) -> None:
    as_json, spec, texts = (given.pop(k, None) for k in ("json", "data", "texts"))
    run, a, model, vocabulary, prompt = open_run(given.pop("run"), given)
    if spec is None:
        evals = training_and_evaluation(a)[1]
    else:
        evals = some_of(read_questions(spec, 1, a.keep_unanswerable), a.eval_limit)
    spec = spec or a.eval_data or f"{a.data}, held out"
    evals = encode(evals, vocabulary, a.max_length, spec)
    pasts = [*plain_pasts(a, model, vocabulary, texts).values(),
             *trained_pasts(run, a, model, prompt)]
    rows = [(name, evaluate(model, vocabulary, past, evals, a, name)[0]) for name, past in pasts]
    if as_json:
        show(json.dumps({"run": str(run.path), "data": spec, "questions": len(evals.rows),
                          "scores": dict(rows)}))
    else:
        show(f"{run.path} on {len(evals.rows)} questions of {spec}; scores in percent, loss in "
              f"nats a token\n\n{table(rows)}")


def trained_pasts(run, a: SimpleNamespace, model, prompt) -> list[tuple[str, object]]:
    """A run's prompt as a Past; of a posterior its mean, each of its prompts, and all together."""
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
    text, path, file = given.pop("prompt_text", None), given.pop("run"), given.pop("batch", None)
    if (text is None) == (file is None):
        raise UserError("generate: give a TEXT, or --batch FILE of JSON lines with a text each")
    # the run's --max-length was made for its own --max-new
    _, a, model, vocabulary, prompt = open_run(path, {**given, "max_length": None})
    lines = [("the text", {"text": text})] if file is None else [
        *data.json_lines(data.read_text(Path(file)), file)]
    room, rows = model.config.max_position_embeddings - rows_per_layer(a) - a.max_new, []
    for where, line in lines:
        if not isinstance(line.get("text"), str):
            raise UserError(f'{where}: no text in it: expected {{"text": "..."}}')
        ids = vocabulary.encode(line["text"])
        if a.place == "after-bos" and len(ids) < 2:
            raise UserError(f"{where}: an empty text has nothing after BOS: give one with words")
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


def command_export(given: dict) -> None:
    """A run's prompt as a PEFT adapter, read back and held to its logits; its log as a table."""
    path, to, log = given.pop("run"), given.pop("to", None), given.pop("csv", None)
    overwrite = given.pop("overwrite", False)
    if to is None and log is None:
        raise UserError("export: give --to DIR for a PEFT adapter, --csv for the log, or both")
    folder = Path(to) if to else None
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (
            overwrite and (folder / adapters.ABOUT).is_file()):
        raise UserError(f"{folder} exists: choose another --to" + (
            "; only an adapter that export made is overwritten" if overwrite else
            ", or replace an adapter that export made by --overwrite"))
    if log is not None:
        run = Run(Path(path))
        run.config()  # is it a run's folder?
        lines = run.metrics()
        text = adapters.to_csv(lines)
        if log == "-":
            show(text.rstrip("\n"))
        elif Path(log).exists() and not (overwrite and adapters.is_table(Path(log))):
            raise UserError(f"{log} exists: choose another --csv" + (
                "; only a table that export made is overwritten" if overwrite else
                ", or replace a table that export made by --overwrite"))
        else:
            write_file(Path(log), text.encode())
            show(f"{log}: {len(lines)} records of {run.path}")
    if folder is None:
        return
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
    if adapter.about.get("place") == "after-bos":
        a.place, a.tokens = "after-bos", a.tokens - 1
    run = new_run(a.out, overwrite)
    model, vocabulary = load_model(a)
    prompt = adapters.fit(adapter, model.config)
    if "sha256" in adapter.about:
        check_same_model(a, adapter.about["sha256"], adapter.path)
    if a.place == "after-bos":
        prompt = adapters.fit(adapters.without_bos(adapter, model, vocabulary.bos), model.config)
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
