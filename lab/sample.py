"""A prior drawn from and judged by data that it was not fitted on, and the command sample.

    rows = judge_prior(priors.VAE, [activations], {}, n=20, seed=0)
    print(table(rows, TITLES))

n prompt rows, N rows of a population, D width.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import llama
import priors
from lab import geometry, pictures, two_samples
from lab.commands import SampleOptions
from lab.compare import TITLES, sample
from lab.console import say, show, table
from lab.files import free_place, write_file
from lab.inputs import layers_with_rows, load_model, longest_text, rows_per_layer
from lab.populations import Reference, draw, references
from lab.settings import Settings, from_flags

LEAST = 100  # rows that a reference must have for a fifth of it to judge a prior


def held_out(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> the rows to fit on, and a fifth of all to judge by, drawn at random but always the
    same. Every fifth row in order would be no fair sample: in a list of sums, every fifth token may
    be an equals sign."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    count = len(x) // 5
    return x[order[count:]], x[order[:count]]


def judge_prior(prior: type, parts: list[Tensor], options: dict, n: int, seed: int
                ) -> list[tuple[str, dict[str, float]]]:
    """Fit a prior on four fifths of its reference, one part (N, D) for each population, draw
    prompts of n rows, and compare the draws with the remaining fifth.

    Draws of a Gaussian fitted on the same rows, and these rows themselves, are compared too. The
    rows come from the reference's own distribution, so no prior can be expected to do better.

    variance_ratio: total variance over that of the held-out rows. effective_rank: at 95 % of the
    variance. frechet: Frechet distance. precision and recall in percent (Kynkaanniemi et al. 2019).
    mmd: MMD^2, with its p. knn: median distance to the third nearest of the rows that were fitted
    on, of which 2000 are taken at most. gap: percent in the gap along the direction in which those
    rows are most bimodal. c2st: AUC of a classifier."""
    # Hold a fifth of every part out, so that all populations are judged by.
    divided = [held_out(x) for x in parts]
    fit_parts = [fit for fit, _ in divided]
    fit = torch.cat(fit_parts)
    held = sample(torch.cat([rows for _, rows in divided]))
    neighbours, count = sample(fit), len(held)

    # The measures depend on the number of rows, so every set has as many as are held out.
    sets = {"prior's draws": _draws(prior, fit_parts if prior.several else [fit], options, n,
                                    count, seed)}
    if prior is not priors.Fitted:
        sets["fitted Gaussian's"] = _draws(priors.Fitted, [fit], {}, n, count, seed)
    sets["reference rows"] = sample(fit, count)

    # Compare every set with the held-out rows.
    split = two_samples.most_bimodal(neighbours)
    rows = [("held-out rows", {"effective_rank": geometry.effective_rank(held),
                               "knn": _third_neighbour(held, neighbours),
                               "gap": 100 * split.share_in_gap(held)})]
    for name, x in sets.items():
        precision, recall = geometry.precision_recall(x, held)
        mmd, p = geometry.mmd(x, held)
        numbers = {"variance_ratio": geometry.total_variance_ratio(x, held),
                   "effective_rank": geometry.effective_rank(x),
                   "frechet": geometry.frechet(x, held), "precision": 100 * precision,
                   "recall": 100 * recall, "mmd": mmd, "mmd_p": p,
                   "gap": 100 * split.share_in_gap(x), "c2st": two_samples.c2st(x, held)}
        if name != "reference rows":  # these are among the neighbours
            numbers["knn"] = _third_neighbour(x, neighbours)
        rows.append((name, numbers))
    return rows


def _draws(prior: type, parts: list[Tensor], options: dict, n: int, count: int, seed: int
           ) -> np.ndarray:
    """(count, D) rows of a prior fitted on these parts, in prompts of n rows."""
    fitted = prior.fit(*parts, **options)
    generator = torch.Generator().manual_seed(seed)
    if prior is priors.Vocab:
        # It draws without replacement, and in prompts of n rows it would draw some rows twice.
        return fitted.sample(min(count, len(parts[0])), generator).float().numpy()
    prompts = [fitted.sample(n, generator) for _ in range(-(-count // n))]
    return torch.cat(prompts)[:count].float().numpy()


def _third_neighbour(x: np.ndarray, population: np.ndarray) -> float:
    """The median distance of rows (n, D) to their third nearest member of a population (N, D)."""
    _, distance = geometry.nearest(x, population, 3)
    return float(np.median(distance[:, 2]))


# --------------------------------------------------------------------------------------------------
# the command


def command_sample(given: dict) -> None:
    options = from_flags(SampleOptions, given)
    settings = Settings.from_flags(given).complete()
    folder = free_place(options.out, "--out") if options.out else None

    # Find the population of every layer that owns rows.
    loaded = load_model(settings.model)
    layers = layers_with_rows(settings.prior, loaded.model.config.num_hidden_layers)
    max_length = longest_text(loaded, settings.data, settings.prior)
    by_layer = references(settings.prior, replace(settings.data, max_length=max_length), loaded,
                          layers)

    # Draw the prompt, and judge the prior of each layer where rows can be held out.
    drawn = draw(settings.prior, by_layer)
    for report, (i, reference) in zip(drawn.reports, by_layer.items()):
        judged = judge_reference(settings, reference)
        if judged:
            report["judged"] = dict(judged)
            say(f"\nlayer {i}, fitted without a fifth of the reference and judged by it:\n"
                f"{table(judged, TITLES)}\n")

    if folder:
        names = write_draw(folder, settings, {i: rows[0] for i, rows in drawn.rows.items()},
                           by_layer)
        say(f"{folder}: {', '.join(names)}")
    else:
        say("nothing written (--out DIR keeps the rows and a figure for every layer)")
    if options.json:
        show(json.dumps(drawn.reports))


def judge_reference(settings: Settings, reference: Reference
                    ) -> list[tuple[str, dict[str, float]]]:
    """The settings' prior judged on a layer's reference; empty where no rows can be held out: of a
    text, of runs' prompts, and of few rows."""
    name, options, runs = priors.parse(settings.prior.prior)
    if name == "text" or runs or min(map(len, reference.parts)) < LEAST:
        return []
    return judge_prior(priors.PRIORS[name], reference.parts, options,
                       rows_per_layer(settings.prior), settings.seed)


def write_draw(folder: Path, settings: Settings, rows: dict[int, Tensor],
               by_layer: dict[int, Reference]) -> list[str]:
    """Write a draw {layer: (n, D)}, and a figure of it in each layer's reference -> the files'
    names."""
    asked = {**vars(settings.model), **vars(settings.prior), **vars(settings.data)}
    content = save(llama.Prompt(rows).tensors(), {"settings": json.dumps(asked)})
    names = ["rows.safetensors"]
    write_file(folder / names[0], content)

    for i, reference in by_layer.items():
        caption = (f"{len(rows[i])} draws of the prior {settings.prior_name}, seed "
                   f"{settings.seed}, model {Path(settings.model.model).name}; on "
                   f"{reference.name}.")
        series = [(f"draws of {settings.prior_name}", rows[i])]
        svg = pictures.layer_figure(i, reference, series, caption)
        names.append(f"figures/layer-{i:02d}.svg")
        write_file(folder / names[-1], svg.encode())
    return names
