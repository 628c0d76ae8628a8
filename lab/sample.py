"""A prior drawn from and judged by data that it was not fitted on, and the command sample.

    rows = judge_prior(priors.VAE, Reference([activations], "squad"), {}, n=20, seed=0)
    print(table(rows, TITLES))

n prompt rows, N rows of a population, D width.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import llama
import priors
from lab import gaps, geometry, pictures, two_samples
from lab.commands import SampleOptions
from lab.compare import TITLES, measure, sample, sample_index
from lab.console import counted, file_list, say, show, table
from lab.files import free_folder, new_folder
from lab.inputs import layers_with_rows, load_model, longest_text, rows_per_layer
from lab.populations import Reference, Whole, draw, joined, references
from lab.settings import Settings, from_flags

LEAST = 100  # rows that a reference must have for a fifth of it to judge a prior
LEAST_TEXTS = 10  # and texts


def held_out(texts: Tensor) -> tuple[Tensor, Tensor]:
    """The texts (N,) of rows -> indices of the rows to fit on, and of about a fifth to judge by:
    whole texts, drawn at random but always the same. A row of a text that was fitted on would
    judge too kindly."""
    _, text, sizes = texts.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(1))
    # The texts that begin within the first fifth of the rows, in the random order, and two at least
    begin = sizes[order].cumsum(0) - sizes[order]
    count = max(int((begin < len(texts) // 5).sum()), 2)
    is_held = torch.isin(text, order[:count])
    return (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]


def judge_prior(prior: type, reference: Reference, options: dict, n: int, seed: int,
                texts: list[Tensor] | None = None) -> list[tuple[str, dict[str, float]]]:
    """Fit a prior on four fifths of each part of its reference, draw prompts of n rows, and compare
    the draws with the remaining fifth. texts: of each part the numbers (N,) of the texts that its
    rows are of, which are held out whole; None: every row is a text.

    Draws of a Gaussian fitted on the same rows, and these rows themselves, are compared too. The
    rows come from the reference's own distribution, so no prior can be expected to do better.

    variance_ratio: total variance over that of the held-out rows. effective_rank: at 95 % of the
    variance. frechet: Frechet distance. precision and recall in percent (Kynkaanniemi et al. 2019).
    mmd: MMD^2, with its p. knn: median distance to the third nearest of the rows that were fitted
    on, of which 2000 are taken at most. gap: percent in the gap along the direction in which those
    rows are most bimodal. c2st: AUC of a classifier."""
    sets, reference_text, held, held_text, neighbours = _to_judge(prior, reference, options, n,
                                                                  seed, texts)

    # Compare every set with the held-out rows. The rows that were fitted on are no nearest
    # neighbours of themselves.
    among_neighbours = ["reference rows"] + ["prior's draws"] * (prior is priors.Vocab)
    split = gaps.most_bimodal(neighbours)
    rows = [("held-out rows", {"effective_rank": geometry.effective_rank(held),
                               "knn": _third_neighbour(held, neighbours),
                               "gap": 100 * split.share_in_gap(held)})]

    def measured(name: str) -> tuple[str, dict[str, float]]:
        x = sets[name]
        precision, recall = geometry.precision_recall(x, held)
        # Rows are dealt into groups as large as the held-out texts, so that a permutation exchanges
        # like with like. Every row weighs the same, as in the law that the prior was fitted on
        mmd, p = two_samples.mmd(x, held, np.sort(held_text)[:len(x)], held_text, by_row=True)
        text = reference_text if name == "reference rows" else None  # a draw is a text of its own
        numbers = {"variance_ratio": geometry.total_variance_ratio(x, held),
                   "effective_rank": geometry.effective_rank(x),
                   "frechet": geometry.frechet(x, held), "precision": 100 * precision,
                   "recall": 100 * recall, "mmd": mmd, "mmd_p": p,
                   "gap": 100 * split.share_in_gap(x),
                   **measure("c2st", gaps.c2st, x, held, text, held_text)}
        if name not in among_neighbours:
            numbers["knn"] = _third_neighbour(x, neighbours)
        return name, numbers

    with ThreadPoolExecutor(geometry.THREADS) as pool:  # numpy decomposes on one core alone
        return [*rows, *pool.map(measured, sets)]


def _to_judge(prior: type, reference: Reference, options: dict, n: int, seed: int,
              texts: list[Tensor] | None
              ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of judge_prior's arguments the sets to compare, the texts of the reference rows among them,
    the held-out rows (m, D) and their texts (m,), and a sample of the rows that were fitted on.
    These themselves may be gigabytes, and are freed when it returns."""
    # Hold a fifth of every part out, so that all populations are judged by.
    texts = [torch.arange(len(x)) for x in reference.parts] if texts is None else texts
    fit_parts, fit_texts, held_parts, held_texts, first = [], [], [], [], 0
    for x, text in zip(reference.parts, texts):
        to_fit, to_judge = held_out(text)
        fit_parts.append(x[to_fit])
        fit_texts.append(text[to_fit] + first)
        held_parts.append(x[to_judge])
        held_texts.append(text[to_judge] + first)
        first += int(text.max()) + 1
    rest = Reference(fit_parts, "", keep=reference.keep, whole=Whole(reference, held_parts))
    fit, held_rows = rest.rows, joined(held_parts)
    held, held_text = sample(held_rows), torch.cat(held_texts)[sample_index(len(held_rows))].numpy()
    neighbours, count = sample(fit), len(held)

    # The measures depend on the number of rows, so every set has as many as are held out.
    fitted = rest.fit(prior, options)
    sets = {"prior's draws": _draws(fitted, len(fit), n, count, seed)}
    if prior is not priors.Fitted:
        sets["fitted Gaussian's"] = _draws(rest.gaussian, len(fit), n, count, seed)
    # Reference rows of one text stand together, so that they are dealt into one group or two.
    index = sample_index(len(fit), count)
    reference_text, order = torch.cat(fit_texts)[index].sort(stable=True)
    sets["reference rows"] = sample(fit[index[order]])
    return sets, reference_text.numpy(), held, held_text, neighbours


def _draws(prior: priors.Prior, N: int, n: int, count: int, seed: int) -> np.ndarray:
    """(count, D) rows of a prior that is fitted on N, as prompts of n rows have them."""
    generator = torch.Generator().manual_seed(seed)
    if type(prior) is priors.Vocab:
        # It draws without replacement, and in prompts of n rows it would draw some rows twice.
        return prior.sample(min(count, N), generator).float().numpy()
    if type(prior) is not priors.Xavier:
        n = count  # a row's law does not depend on how many are drawn with it, and one draw is fast
    prompts = [prior.sample(n, generator) for _ in range(-(-count // n))]
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
    folder = free_folder(options.out, "--out") if options.out else None

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
        say(f"{folder}: {names[0]}, {file_list(names[1:])}")
    else:
        say("nothing written (--out DIR keeps the rows and a figure for every layer)")
    if options.json:
        show(json.dumps(drawn.reports))


def judge_reference(settings: Settings, reference: Reference
                    ) -> list[tuple[str, dict[str, float]]]:
    """The settings' prior judged on a layer's reference; empty where no rows can be held out: of a
    text, of runs' prompts, and of few rows or texts."""
    name, options, runs = priors.parse(settings.prior.prior)
    if name == "text" or runs or min(map(len, reference.parts)) < LEAST:
        return []
    texts = [labels.text for labels in reference.labels]
    if min(len(text.unique()) for text in texts) < LEAST_TEXTS:
        return []
    return judge_prior(priors.PRIORS[name], reference, options, rows_per_layer(settings.prior),
                       settings.seed, texts)


def write_draw(folder: Path, settings: Settings, rows: dict[int, Tensor],
               by_layer: dict[int, Reference]) -> list[str]:
    """Write a draw {layer: (n, D)}, and a figure of it in each layer's reference -> the files'
    names."""
    asked = {**vars(settings.model), **vars(settings.prior), **vars(settings.data)}
    content = save(llama.Prompt(rows).tensors(), {"settings": json.dumps(asked)})
    files = {"rows.safetensors": content}
    for i, reference in by_layer.items():
        caption = (f"{counted(len(rows[i]), 'draw')} of the prior {settings.prior_name}, seed "
                   f"{settings.seed}, model {Path(settings.model.model).name}; on "
                   f"{reference.name}.")
        series = [(f"draws of {settings.prior_name}", rows[i])]
        svg = pictures.layer_figure(i, reference, series, caption)
        files[f"figures/layer-{i:02d}.svg"] = svg.encode()
    with new_folder(folder, "--out") as new:
        for name, content in files.items():
            new.write(name, content)
    return [*files]
