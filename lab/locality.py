"""Is text local: are the steps of a text's tokens shorter, or more even, than in another order?

    numbers = locality(paths, vocabulary, groups=articles)    # of arrays
    numbers["step_ratio"], numbers["p_within_step"]           # below 1: shorter than shuffled
    walks(file, layer, "squad")                               # of a collection's domain

A path is the row of points (T, D) that a text's tokens have at a layer. `paper` is Exploring
Embedding Priors in Prompt-Tuning (arXiv 2412.18582).

M points of all paths together, N members of a population, D width, G groups.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lab import statistics
from lab.activations import Collection
from lab.geometry import GeometryError, checked, squared_distances
from lab.inputs import FEW_UNITS

MOST = 2000  # points of a domain's paths, of which all distances are held
REPEAT = 1e-6  # a step this short, in units of the longest distance, is of a token to itself


def locality(paths: list[np.ndarray], population: np.ndarray, weights: np.ndarray | None = None,
             groups: np.ndarray | None = None, permutations: int = 1000, walks: int = 200,
             seed: int = 0) -> dict[str, float]:
    """Compare the steps of paths, each (T, D), with those of random walks of the same lengths
    (paper, trajectories).

    `step` and `spread` are the mean and the standard deviation of all step lengths, of which
    `steps` counts those that were measured and `repeats` those of length 0: a token that follows
    itself says nothing of distances, so such steps are left out here and in every walk.

    The walks have the same lengths as the paths:
    within: every path's own points in a random order. Its test asks whether order matters.
    between: the points of all paths in a random order. It also differs if the texts do, in subject
        for example, with no order in any of them.
    uniform: members of population (N, D), with probabilities proportional to weights (N,) if they
        are given: among activations they let every token type count the same.

    within_step and so on are means over `permutations` orders or `walks` uniform walks, and
    p_within_step and so on two-sided p-values, which are exact for the first two. step_ratio is
    `step` over within_step, with step_ratio_low and _high, the bounds of its 95 % interval: of its
    logarithm, by the jackknife over groups (one label a path; None: every path is one), if there
    are two or more. The same of spread.

    Holds a float64 matrix (M, M)."""
    population = checked(population, "the population")
    N, D = population.shape
    paths = [checked(path, "a path", width=D) for path in paths]
    probabilities = None if weights is None else _probabilities(weights, N)
    group = statistics.group_numbers(groups, len(paths))

    # All paths end to end, less the steps that lead from one path to the next
    points = np.concatenate(paths) if paths else np.empty((0, D))
    path_of = np.repeat(np.arange(len(paths)), [len(path) for path in paths])
    inside = path_of[1:] == path_of[:-1]
    if not inside.any():
        raise GeometryError("no path has a step: give one of at least 2 points")
    distance = _distances(points)
    M = len(points)
    observed = distance.diagonal(1)[inside]
    if not observed.any():
        raise GeometryError("no path has a step to another token: give longer texts")

    # Sums over the steps: of the paths, and of every walk
    rng = np.random.default_rng(seed)
    within, expected = _shuffled(distance, inside, path_of, permutations, rng)
    between, _ = _shuffled(distance, inside, np.zeros(M), permutations, rng)
    uniform = np.empty((walks, 3))
    for k in range(walks):
        drawn = rng.choice(N, M, p=probabilities)
        uniform[k] = _powers(_walk_steps(population, drawn)[inside]).sum(1)
    nulls = {"within": _moments(within), "between": _moments(between),
             "uniform": _moments(uniform)}

    # Sums over each group's steps: as they are, and as they are expected in a random order
    group_of_step = statistics.group_numbers(group[path_of[1:]][inside], len(observed))
    columns = [*_powers(observed), *expected]
    totals = np.stack([np.bincount(group_of_step, column) for column in columns], axis=1)

    steps = int(np.count_nonzero(observed))
    result = {"steps": steps, "repeats": len(observed) - steps}
    for k, name in enumerate(("step", "spread")):
        result[name] = value = float(_moments(totals[:, :3].sum(0))[k])
        if permutations:
            result |= _effect(totals, name, k)
        for kind, moments in nulls.items():
            null = moments[:, k]
            result[f"{kind}_{name}"] = float(null.mean()) if len(null) else math.nan
            result[f"p_{kind}_{name}"] = statistics.p_value(null, value, two_sided=True)
    return result


def _probabilities(weights, N):
    """weights (N,), checked, divided by their sum."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != (N,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise GeometryError(f"weights must be {N} numbers from 0 up, not all 0: "
                            "give one a member of the population")
    return weights / weights.sum()


def _distances(points):
    """Distances (M, M) in float64 between points (M, D); exactly 0 between points that differ by no
    more than rounding, as those of one token at the embeddings."""
    square = squared_distances(points, points)
    square[square <= REPEAT**2 * square.max()] = 0
    return np.sqrt(square)


def _walk_steps(source, order):
    """The lengths (M - 1,) of the steps of the walk source[order], order (M,). In blocks that fit
    the processor's cache."""
    steps = len(order) - 1
    block = 2**17 // source.shape[1] + 1
    length = np.empty(steps)
    for first in range(0, steps, block):
        walk = source[order[first:first + block + 1]].astype(np.float64)
        length[first:first + block] = np.sqrt(np.square(np.diff(walk, axis=0)).sum(1))
    return length


def _shuffled(distance, inside, path_of, permutations, rng):
    """The sums of steps (permutations, 3) of random orders in which every point stays in its path;
    and the _powers of every step (3, steps) as means over the orders. distance (M, M); inside
    (M - 1,): which steps count; path_of (M,)."""
    sums = np.empty((permutations, 3))
    mean = np.zeros((3, int(inside.sum())))
    for k in range(permutations):
        order = np.argsort(path_of + rng.random(len(path_of)))
        powers = _powers(distance[order[:-1], order[1:]][inside])
        sums[k] = powers.sum(1)
        mean += powers / permutations
    return sums, mean


def _powers(steps):
    """Of every step (steps,): whether it is one, its length, and the square of that: (3, steps)."""
    return np.stack([steps > 0, steps, np.square(steps)])


def _moments(sums):
    """Mean and standard deviation (..., 2) of steps from the sums of their _powers (..., 3); 0 if
    there are none."""
    count, length, square = np.moveaxis(sums, -1, 0)
    count = np.maximum(count, 1e-300)
    mean = length / count
    return np.stack([mean, np.sqrt((square / count - mean**2).clip(0))], axis=-1)


def _effect(totals, name, k):
    """The ratio of the mean (k = 0) or the standard deviation (1) of steps to that in a random
    order, with its interval, from the sums (G, 6) of groups; without what is not finite."""

    def log_ratio(sums):
        return np.log(_moments(sums[..., :3])[..., k] / _moments(sums[..., 3:])[..., k])

    with np.errstate(divide="ignore", invalid="ignore"):
        value = log_ratio(totals.sum(0))
        error = statistics.jackknife_error(totals, log_ratio) if len(totals) > 1 else math.nan
    result = {f"{name}_ratio": math.exp(value)} if math.isfinite(value) else {}
    if result and math.isfinite(error):
        low, high = statistics.interval(value, error, len(totals))
        result |= {f"{name}_ratio_low": math.exp(low), f"{name}_ratio_high": math.exp(high)}
    return result


# --------------------------------------------------------------------------------------------------
# of a collection


def paths_of(file: Collection, domain: str, most: int = MOST,
             roles: tuple[str, ...] = ()) -> tuple[list[Tensor], Tensor]:
    """The domain's unbroken stretches of text in these roles (none: all), as indices of the
    collection's rows, `most` points together at most; and the indices of all its rows."""
    index = file.chosen(domain, roles)
    example, position = file.field["example"][index], file.field["position"][index]
    # A stretch ends where the example changes, or a position is left out.
    is_break = (example.diff() != 0) | (position.diff() != 1)
    starts = is_break.nonzero()[:, 0] + 1

    # Drawn at random but always the same ones, because texts of one article follow each other.
    stretches = [path for path in index.tensor_split(starts.tolist()) if len(path) > 1]
    paths, count = {}, 0
    for k in np.random.default_rng(0).permutation(len(stretches)):
        path = stretches[k][:most - count]
        if len(path) > 1:
            paths[k] = path
            count += len(path)
    return [paths[k] for k in sorted(paths)], index


def walks(file: Collection, layer: int, domain: str, embeddings: Tensor | None = None,
          roles: tuple[str, ...] = (), tests: int = 1) -> dict[str, float]:
    """The locality of a domain's texts, in these roles (none: all), at a layer; the groups are
    articles or modules, and if there are fewer than FEW_UNITS, texts. tests: how many such there
    are, over which its p-values will be corrected.

    Uniform walks are over all token types with equal probability (paper 4.1). embeddings (V, D): at
    layer 0 the vocabulary takes the place of the token types. Empty if no two tokens follow each
    other."""
    paths, index = paths_of(file, domain, roles=roles)
    rows = file.rows(layer, index).float()
    points = []
    for path in paths:
        # index is ascending, so a path's rows are found by bisection
        points.append(rows[torch.searchsorted(index, path)].numpy())
    firsts = index[:0] if not paths else torch.stack([path[0] for path in paths])
    units = file.units(firsts, FEW_UNITS).numpy()

    # A token type counts once, however often the texts have it.
    if embeddings is not None and layer == 0:
        population, weights = embeddings.numpy(), None
    else:
        tokens = file.field["token"][index]
        _, kind, count = tokens.unique(return_inverse=True, return_counts=True)
        population, weights = rows.numpy(), (1.0 / count[kind]).numpy()
    try:
        return locality(points, population, weights, units,
                        permutations=statistics.enough(tests, 1000, two_sided=True))
    except GeometryError:
        return {}
