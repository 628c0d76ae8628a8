"""The commands that measure and draw: sample, collect, compare, interpolate, attention, figures,
plot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

import activations
import compare
import data
import figures
import pictures
import priors
import report
import viz
from compare import TITLES, final_table, judge_prior, table
from experiments import command_train, differences, open_run
from loading import (check_same_model, checksum, encode, layers_with_rows, load_model,
                     model_files, model_folder, parse_spec, rows_per_layer, some_of,
                     training_and_evaluation)
from references import beside, draw, measured, references
from run import Run, rows_to_bytes, write_file
from settings import (COLLECT, DATA, FIGURE, MODEL, PRIOR, SAMPLE, UserError, absolute, over,
                      prior_name, say, settings_of, show, spec_name)
from train import evaluate, progress, prompt_of


def command_sample(given: dict) -> None:
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
    for said, (i, reference) in zip(reports, found.items()):
        if name == "text" or sources or min(map(len, reference.parts)) < 100:
            continue  # too few rows to hold some out
        judged = judge_prior(priors.PRIORS[name], reference.parts, options,
                             rows_per_layer(a), a.seed)
        said["judged"] = dict(judged)
        say(f"\nlayer {i}, fitted without a fifth of the reference and judged by it:\n"
            f"{table(judged, TITLES)}\n")
    if run:
        run.write("rows.safetensors", rows_to_bytes(rows, {"settings": json.dumps(vars(a))}))
        for i, reference in found.items():
            caption = (f"{len(rows[i])} draws of the prior {prior_name(a)}, seed {a.seed}, model "
                       f"{Path(a.model).name}; on {reference.name}.")
            drawn = [(f"draws of {prior_name(a)}", rows[i])]
            svg = pictures.layer_figure(i, reference, drawn, caption)
            run.write(f"figures/layer-{i:02d}.svg", svg.encode())
        say(f"{run.path}: rows.safetensors, "
            f"{', '.join(f'figures/layer-{i:02d}.svg' for i in found)}")
    else:
        say("nothing written (--out DIR keeps the rows and a figure for every layer)")
    if as_json:
        show(json.dumps(reports))


def command_collect(given: dict) -> None:
    specs, under = given.pop("domains", ["squad"]), given.pop("under", None)
    overwrite = given.pop("overwrite", False)
    if under:
        flags = {flag: default for flag, (default, _) in COLLECT.items()}
        _, a, model, vocabulary, prompt = open_run(under, {**flags, **given})
        if a.place != "before":
            raise UserError(f"{under}: its prompt stands inside the texts (--place {a.place}), and "
                            "activations are collected under one that stands before them")
        own = {}
        with torch.no_grad():
            past = prompt.past(model) if a.method == "prefix" else model.prompt_past(
                prompt.rows, a.cut, own.__setitem__)
    else:
        a = settings_of(given, MODEL, PRIOR, DATA, COLLECT)
        model, vocabulary = load_model(a)
        past = own = None
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
        "model": a.model, "revision": a.revision, "dtype": a.dtype,
        "sha256": checksum(model_files(a)),
        "data": [absolute(named_spec(s)[1]) for s in specs], "under": under and os.path.abspath(
            under), "examples": a.examples, "limit": a.limit, "seed": a.seed}, past, own)
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
    run, a, model, vocabulary, prompt = open_run(path, given)
    found = beside(a, model, references(a, model, vocabulary, list(prompt.rows)))
    run = measured(run, model)
    start, end = run.start_and_end()
    spoken = [run.particles(f)[0] if a.posterior == "svgd" else run.rows(f)
              for f in ("prompts/000000.safetensors", "prompt.safetensors")]
    numbers, said = [], {}
    tokens = None if a.method == "prefix" else \
        model.embeddings[vocabulary.ordinary].float().cpu()
    for i, reference in found.items():
        rows = compare.measure_rows(start[i], end[i], reference.rows,
                                    priors.Fitted.fit(reference.rows), None if i else tokens)
        numbers += [(f"layer {i} {name}", values) for name, values in rows]
        said[i] = {name: compare.what_rows_say(r[i], i, reference, model, vocabulary)
                   for name, r in zip(("prior draw", "trained"), spoken)}
    lines = [f"{run.path}: prior {prior_name(a)}, {a.posterior} posterior, seed {a.seed}",
             final_table(a, run.metrics()), "", table(numbers, compare.TITLES)]
    if any(any(each.values()) for each in said.values()):  # rows of runs are no tokens
        lines += ["", f"the token of each row{' of particle 1' * (a.posterior == 'svgd')}:"]
    for i, each in said.items():
        lines += [f"layer {i} {name}, {reading}: {' '.join(map(json.dumps, tokens))}"
                  for name, readings in each.items() for reading, tokens in readings.items()]
    scores = [None, *(m for m in run.metrics() if m["split"] == "eval")][-1]
    return {"run": str(run.path), "settings": vars(a), "scores": scores,
            "measures": dict(numbers), "tokens": said, "text": "\n".join(lines)}


def compare_collection(path: str, given: dict) -> dict:
    """A collection's domains at each layer: are they apart, and are their texts local?"""
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
    as_json, points = given.pop("json", False), given.pop("points", 11)
    paths = given.pop("run_a"), given.pop("run_b")
    if points < 2:
        raise UserError(f"--points {points}: expected at least 2, the two runs")
    out = given.pop("out", None) or f"{paths[0].rstrip('/')}-to-{Path(paths[1]).name}"
    folder = Run(Path(out))
    if folder.path.exists():
        raise UserError(f"{folder.path} exists: choose another --out")
    (one, a, model, vocabulary, first), (other, b, _, _, second) = (
        open_run(p, dict(given)) for p in paths)
    if checksum(model_files(a)) != checksum(model_files(b)):
        raise UserError(f"{one.path} and {other.path} are of different models: give two of one")
    shapes = [{i: tuple(r.shape) for i, r in p.rows.items()} for p in (first, second)]
    kinds = [f"{s}, {c.method}, cut {c.cut}, place {c.place}" for s, c in zip(shapes, (a, b))]
    if kinds[0] != kinds[1]:
        raise UserError(f"{one.path} and {other.path} have other rows ({' and '.join(kinds)}), and "
                        "no line joins them: give two of one --method, --tokens, --deep-layers, "
                        "--place and --cut or --keep")
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
    folder.write("curve.svg", pictures.line(
        curve, f"(1 - t) {one.path.name} + t {other.path.name}, model {Path(a.model).name}, "
        f"seeds {a.seed} and {b.seed}; {points} prompts.").encode())
    say(f"{folder.path}: curve.jsonl, curve.svg")


def command_attention(given: dict) -> None:
    """What the theory says of a prompt before the text, and what happens."""
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
    mean = "" if a.posterior == "point" else f" The mean prompt of the {a.posterior} posterior."
    caption = (f"{run.path.name}: {a.method}, prior {prior_name(a)}, seed {a.seed}, {a.steps} "
               f"steps on {spec_name(a.data)}, model {Path(a.model).name}; "
               f"{len(questions.rows)} questions. At the first layer with prompt columns the "
               f"content's own shares differ by at most {rows[0][1]['content']:.1g}.{mean}")
    run.write("figures/attention.svg", pictures.attention(rows, caption).encode())
    if as_json:
        show(json.dumps({"run": str(run.path), "attention": dict(rows)}))
    else:
        show(f"{run.path}, {len(questions.rows)} questions.{mean}\n\n"
             f"{table(rows, compare.TITLES)}")
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
    files = data.files_of("math", parse_spec(a.math_data, 0)[1])
    stems = [f.stem for f in files]
    modules = {f.stem if stems.count(f.stem) == 1 else f"{f.parent.name} {f.stem}": f"math:{f}"
               for f in files}
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
        svg, shown = figures.draw(n, world)
        name = f"figure-{n:02d}-{figure.name}.svg"
        write_file(folder / name, svg.encode())
        results[n] = {"file": name, "title": figure.title, "measured": shown}
        show(f"{folder / name}\n    " + ", ".join(
            f"{k} {v:.3g}" for k, v in shown.items() if not isinstance(v, list)))
    path = folder / "figures.json"
    if path.exists():
        results = {**{int(k): v for k, v in data.read_json(path, dict).items()
                      if k.isascii() and k.isdecimal()}, **results}
    write_file(path, (json.dumps(dict(sorted(results.items())), indent=1) + "\n").encode())


def command_plot(given: dict) -> None:
    text, out, folders = given.pop("text", False), given.pop("out", None), given.pop("runs")
    runs = [Run(Path(path)) for path in folders]
    if not text:
        report.check(runs)  # width, weights, snapshots: before a model is loaded or a file written

    def opened():
        """Each run with what the page wants of it; its own figures are drawn on the way."""
        for path in folders:
            run, a, model, vocabulary, prompt = open_run(path, dict(given))
            found = beside(a, model, references(a, model, vocabulary, list(prompt.rows)))
            run = measured(run, model)
            show(pictures.text_picture(run, a, found) if text else "\n".join(
                str(run.path / name) for name in pictures.draw_run(run, a, found)))
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
        runs[0].write("figures/curves.svg", pictures.curves(scored).encode())
        show(str(runs[0].path / "figures/curves.svg"))
    show(str(target))
