"""Pictures of embeddings: arrays and labels in, coordinates and SVG text out. Needs numpy alone.

    plane = pca(vocabulary)                                   # fitted on the reference only
    a, b = project(plane, start), project(plane, end)
    svg = figure([Panel([Cloud("vocabulary", project(plane, vocabulary)), Arrows("moved", a, b),
                         Points("prior draw", a, hollow=True), Points("trained", b)],
                        axis_names(plane))], title="Layer 0")

It returns strings and writes nothing. All text is escaped. Pictures can be read on paper, on a
light and on a dark page, and in grey: colours are Okabe and Ito's, and marks also differ in shape.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import os
import re
import struct
import textwrap
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

# Okabe and Ito's colours, which people with any colour vision can tell apart
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
GREY = "#7a8799"  # for backgrounds, visible on a light and on a dark page
THREADS = min(os.cpu_count() or 1, 4)  # numpy holds no lock while it computes


class PictureError(ValueError):
    """Data that cannot be drawn. The message is one line: the problem and the remedy."""


# --------------------------------------------------------------------------------------------------
# coordinates


class Plane(NamedTuple):
    mean: np.ndarray  # (D,)
    components: np.ndarray  # (k, D), orthonormal, in descending order of variance
    explained: np.ndarray  # (k,) share of the total variance

    @classmethod
    def of(cls, mean: np.ndarray, variance: np.ndarray, vectors: np.ndarray, k: int = 2) -> Plane:
        """The first k of a covariance's eigenvectors (D, D), its columns, by falling variance (D,).
        The sign of a component makes its largest entry positive, so that the same data give the
        same picture."""
        components = vectors[:, :k].T
        largest = np.abs(components).argmax(1)
        sign = np.where(components[np.arange(k), largest] < 0, -1.0, 1.0)
        # Where all points are equal, no component explains anything
        total = max(variance.sum(), 0.0) or 1.0
        return cls(mean, components * sign[:, None], variance[:k].clip(0) / total)


def pca(x: np.ndarray, k: int = 2, block: int = 8192) -> Plane:
    """The first k principal components of x (N, D): eigenvectors of the covariance, which is summed
    in float64 over blocks of rows."""
    N, D = x.shape
    if N < 2 or not 1 <= k <= D:
        raise PictureError(f"{k} principal components of {N} points of width {D}: "
                           "give at least 2 points and k <= width")
    mean = sum(rows.sum(0, dtype=np.float64) for rows in _blocks(x, block)) / N
    if not np.isfinite(mean).all():
        raise PictureError("points with values that are not finite: leave them out")

    def products(rows):
        centred = rows.astype(np.float64)
        centred -= mean
        return centred.T @ centred

    # A few threads share the blocks, whose products are added in order: the same sum every time
    with ThreadPoolExecutor(THREADS) as pool:
        covariance = sum(pool.map(products, _blocks(x, block))) / N

    # eigh sorts by ascending variance
    variance, vectors = np.linalg.eigh(covariance)
    return Plane.of(mean, variance[::-1], vectors[:, ::-1], k)


def project(plane: Plane, x: np.ndarray) -> np.ndarray:
    """x (N, D) -> coordinates (N, k)."""
    return np.concatenate([(rows.astype(np.float64) - plane.mean) @ plane.components.T
                           for rows in _blocks(x, 8192)])


def _blocks(x, size):
    """Consecutive rows of x, size at a time; of an empty x one empty block."""
    return (x[first:first + size] for first in range(0, max(len(x), 1), size))


def axis_names(plane: Plane) -> tuple[str, ...]:
    return tuple(f"PC{i} ({100 * share:.1f} % of the variance)"
                 for i, share in enumerate(plane.explained, 1))


# --------------------------------------------------------------------------------------------------
# t-SNE (van der Maaten and Hinton 2008): a map on which neighbours in the data are neighbours


class Embedding(NamedTuple):
    """A map, and the numbers for its caption."""

    points: np.ndarray  # (N, 2) float64
    kl: float  # the objective: the KL divergence from the data's affinities to the map's, in nats;
               # of LARGE data the affinities to the nearer neighbours, whose divergence is higher
    perplexity: float  # the perplexity in use, which may be lower than the one asked for


# Stages of (steps, exaggeration, learning rate in N / 4, momentum). The first gathers clusters, the
# second lets them spread, the third travels at a high rate, and the last removes the third's noise.
# Fewer steps cost 1 % in KL on data without clusters. Ending at the high rate lowers KL by 1 % on
# clustered data and raises it by as much on other data.
SCHEDULE = ((80, 12, 1 / 12, 0.9), (60, 1, 1, 0.8), (100, 1, 2, 0.95), (80, 1, 1, 0.8))
LONGEST_STEP = 5  # of a point at a time, as in openTSNE; the kernel is 2 wide
EXACT = 1500  # up to this many points, summing over all pairs is faster than the mesh
SPACING = 0.35  # of the mesh

# From LARGE points on, maps are as good as openTSNE's by less work: a shorter schedule, a mesh of
# twice the spacing, and attraction to the nearer half of the neighbours, which carries 9/10 of it
LARGE = 5000
SHORT_SCHEDULE = ((80, 12, 1 / 12, 0.9), (60, 1, 1, 0.8), (80, 1, 2, 0.95), (20, 1, 1, 0.8))
APPROXIMATE = 20_000  # up to this many points, all pairs are compared
RECALL = 0.98  # the share of the neighbours that is found among more
SPARE = 16  # candidates beyond the neighbours: with fewer, more rows are searched twice
CHUNK = 2**16  # array entries to work on at a time, which fit the processor's cache


def tsne(x: np.ndarray, perplexity: float = 30.0, seed: int = 0, exact: bool | None = None,
         progress: Callable[[int, int, float | None], None] | None = None,
         recall: float = RECALL) -> Embedding:
    """A map of x (N, D). The perplexity is about the number of neighbours that count; above
    (N - 1) / 3 it is lowered to that. Neighbours are searched in all dimensions, among all rows up
    to 20,000, which takes N^2 D multiplications; among more rows, this share of them is found
    (recall; 1 compares all). project(pca(x, 50), x) as x is quicker and less true.

    exact: repulsion is summed over all pairs (True) or on a mesh, with an error of about 1 %
    (False); None takes the faster. progress(step, steps, kl) is called at every step, with kl a
    number at every 50th and None otherwise. The same seed gives the same map, bit by bit; seeds
    change the initial map by 1 % of its width."""
    x = _rows(x, "points", 4)
    if all((rows == x[0]).all() for rows in _blocks(x, 8192)):
        raise PictureError(f"all {len(x)} points are equal: a map needs points that differ")
    N = len(x)
    used = min(float(perplexity), (N - 1) / 3)
    if not used >= 1:
        raise PictureError(f"perplexity {perplexity}: ask for 1 or more")

    initial = _initial_map(x, seed)

    # Attraction is between neighbours, and is the same at every step
    k = int(3 * used)
    parts = _near_cells(x, k, recall) if N > APPROXIMATE and recall < 1 else None
    index, squares = _neighbours(x, x, k, itself=True, parts=parts)
    p = _affinities(squares, used)
    if N >= LARGE:
        index, p = index[:, :(k + 1) // 2], p[:, :(k + 1) // 2]
        p *= N / p.sum(dtype=np.float64)
    order, edges = _symmetric(index, p)

    # Points move in the order of the edges, and are then returned to the order of the data
    if exact is None:
        exact = N <= EXACT
    repulsion = _all_pairs if exact else _on_mesh
    y, kl = _descend(edges, initial[order], repulsion, progress)
    points = np.empty_like(y)
    points[order] = y
    return Embedding(points, kl, used)


def _initial_map(data, seed):
    """(N, 2): the first two principal components, with a standard deviation of 1e-4 along the
    first, and noise of 1 % of that, which separates duplicates."""
    N, D = data.shape
    coordinates = project(pca(data, min(2, D)), data)
    scale = 1e-4 / coordinates[:, 0].std()
    missing = 2 - coordinates.shape[1]
    y = np.pad(coordinates, ((0, 0), (0, missing))) * scale
    y += np.random.default_rng(seed).normal(scale=1e-6, size=y.shape)

    # Rounding drops the last bits, which depend on the order in which threads add
    return y.astype(np.float32).astype(np.float64)


def embed(new: np.ndarray, reference: np.ndarray, points: np.ndarray, k: int = 25) -> np.ndarray:
    """Coordinates (m, 2) of new rows (m, D) on the map points (N, 2) of reference (N, D). The map
    does not change.

    A row starts at the median of its k nearest reference rows on the map and moves to where their
    attractions, of perplexity k / 3, balance. It does not depend on the other new rows. Repulsion
    is left out, because with it fewer neighbours are preserved."""
    reference = _rows(reference, "the reference", 1)
    new = _rows(new, "new rows", 0)
    points = np.asarray(points, np.float64)
    if points.shape != (len(reference), 2) or new.shape[1] != reference.shape[1]:
        raise PictureError(f"new rows {new.shape}, reference {reference.shape} and its points "
                           f"{points.shape}: give (m, D), (N, D) and (N, 2)")
    index, squares = _neighbours(new, reference, min(k, len(reference)))
    p = _affinities(squares, max(1.0, index.shape[1] / 3))
    neighbours = points[index]  # (m, k, 2)
    y = np.median(neighbours, axis=1)

    # At balance y is the mean of its neighbours, weighted by their attractions at y
    for _ in range(50):
        square_distances = np.square(neighbours - y[:, None]).sum(2)
        weights = p / (1 + square_distances)
        y = (weights[:, :, None] * neighbours).sum(1) / weights.sum(1, keepdims=True)
    return y


def _rows(x, name, least):
    """x as an array (N, D) of numbers, after checking its shape, its range and for at least `least`
    rows."""
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype.kind not in "biuf" or not x.shape[1]:
        raise PictureError(f"{name}: {x.dtype} of shape {x.shape}: give numbers (rows, width)")
    if len(x) < least:
        raise PictureError(f"{name}: {len(x)} rows: give at least {least}")
    # A comparison with nan is false, so nan is refused with the large values
    if not all((np.abs(rows, dtype=np.float64) < 1e15).all() for rows in _blocks(x, 8192)):
        raise PictureError(f"{name}: values that are not finite, or beyond 1e15: leave them out")
    return x


# --------------------------------------------------------------------------------------------------
# t-SNE's affinities in the data


def _neighbours(rows, population, k, itself=False, parts=None):
    """The k members of population (N, D) nearest to every one of rows (n, D), of all members in all
    dimensions: index (n, k), nearest first, and squared distances (n, k) float64. itself: the rows
    are the population, and no row is its own neighbour. parts: pairs of the places of rows and
    lists of the members, more than k, among which these are searched, from _near_cells; None: all.

    Products of float32 matrices select candidates, and differences in float64 measure these. Where
    the products' rounding may have hidden a neighbour, as in tight clusters far apart, products of
    float64 select again. Those are exact if clusters are at most a million widths apart."""
    index = np.empty((len(rows), k), np.int64)
    squares = np.empty((len(rows), k))
    uncertain = np.ones(len(rows), bool)
    if parts is None:
        parts = [(block, None) for block in _blocks(np.arange(len(rows)), 1024)]

    def search(part, scores):
        """Enters the neighbours of a part's uncertain rows, and which of them remain uncertain."""
        places, members = part
        places = places[uncertain[places]]
        if not len(places):
            return
        numbers, near = np.arange(len(population)), scores
        if members is not None:
            numbers = np.sort(np.concatenate(members))
            near = scores._replace(columns=scores.columns.take(numbers, axis=1))
        count = min(k + SPARE, len(numbers) - itself)
        memory = np.empty((128, len(numbers)), scores.columns.dtype)
        for block in _blocks(places, len(memory)):
            own = np.searchsorted(numbers, block) if itself else None
            candidates, least = _candidates(rows[block], own, near, count, memory)
            candidates = numbers[candidates]
            distances = _square_distances(rows[block], population, candidates)
            nearest = np.argsort(distances, axis=1)[:, :k]
            index[block] = np.take_along_axis(candidates, nearest, 1)
            squares[block] = np.take_along_axis(distances, nearest, 1)
            uncertain[block] = squares[block, -1] > least

    for dtype in (np.float32, np.float64):
        scores = _scores(population, dtype)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda part: search(part, scores), parts))
        if not uncertain.any():
            break
    return index, squares


def _near_cells(x, k, recall):
    """Parts for _neighbours in which about this share of the k neighbours of a row of x (N, D) is
    found: the rows of a cell, and the members of the cells nearest to it. None, which is all pairs,
    if these are half of all, as in hundreds of dimensions, where every cell is near.

    Cells are those of k-means, about 128 rows each. How many members are near enough is measured:
    about 1000 rows are compared with all."""
    N = len(x)
    centres, cell = _cells(x)
    order, count, before = _by_cell(cell, len(centres))
    distance = np.vecdot(centres, centres) / 2 - centres @ centres.T
    np.fill_diagonal(distance, -np.inf)  # a cell is the nearest to itself
    nearest = np.argsort(distance, axis=1, kind="stable")
    held = count[nearest].cumsum(1)  # members of the nearest cells, up to each

    asked = np.arange(0, N, max(1, N // 1000))
    index, _ = _neighbours(x[asked], x, k + 1)  # of which the first is the row itself
    own = cell[asked, None]
    needed = held[own, np.argsort(nearest, axis=1)[own, cell[index]]]
    reach = max(np.quantile(needed, recall), 2 * k)
    if reach > N / 2:
        return None
    members = np.split(order, before[1:])
    return [(members[c], [members[a] for a in nearest[c, :np.searchsorted(held[c], reach) + 1]])
            for c in np.flatnonzero(count)]


def _cells(x):
    """Centres (C, D) of k-means, fitted to every fourth row of x (N, D), and the rows' cells (N,).

    Products are of float64: their rounding, which depends on threads, is too small to move a row
    to another cell."""
    sample = x[::4]
    centres = np.unique(sample[::32].astype(np.float64), axis=0)

    def assign(rows):
        half = np.vecdot(centres, centres) / 2
        return np.concatenate([(block.astype(np.float64) @ centres.T - half).argmax(1)
                               for block in _blocks(rows, 1024)])

    for _ in range(5):
        order, count, before = _by_cell(assign(sample), len(centres))
        filled = count > 0
        sums = np.add.reduceat(sample[order], before[filled], dtype=np.float64)
        centres[filled] = sums / count[filled, None]
    return centres, assign(x)


def _by_cell(cell, C):
    """The rows by cell, for the cells (N,) of rows; how many each of the C cells has; and how many
    the cells before it have."""
    count = np.bincount(cell, minlength=C)
    return np.argsort(cell, kind="stable"), count, np.cumsum(count) - count


class Scores(NamedTuple):
    """What a matrix product needs to compare members (N, D) by their distance from a row."""

    origin: np.ndarray  # (D,) float64
    scale: float
    columns: np.ndarray  # (D + 1, N), the members less the origin, divided by the scale, and a row
    error: float  # of a product of D terms, as a share of the sum of their sizes


def _scores(population, dtype):
    """The Scores of population (N, D), for products in this precision.

    The score x.y - |y|^2 / 2 of a row x and a member y grows as their distance falls. It is the
    product of (x, 1) and (y, -|y|^2 / 2), so that one matrix product gives all scores.

    Rounding changes a score by up to error (|x|^2 / 2 + |y|^2). The second term is added to the
    last row in advance, so that no score comes out smaller than it is by more than the first."""
    N, D = population.shape
    error = (D + 16) * float(np.finfo(dtype).eps) / 2

    # Floats have the smallest steps near zero: move the population there and scale it to at most 1.
    # The median is the origin, because far outliers do not move it
    sample = population[::N // 4096 + 1].astype(np.float64)
    origin = np.median(sample, axis=0)
    scale = float(max(np.abs(rows - origin).max() for rows in _blocks(population, 1024))) or 1.0

    columns = np.empty((D + 1, N), dtype)
    first = 0
    for rows in _blocks(population, 1024):
        y = (rows - origin) / scale
        block = slice(first, first + len(y))
        columns[:D, block] = y.T
        columns[D, block] = (error - 0.5) * np.vecdot(y, y)
        first += len(y)
    return Scores(origin, scale, columns, error)


def _candidates(rows, own, scores, count, memory):
    """The members with the largest scores for every one of rows (n, D): index (n, count), in no
    order; and squared distances (n,) that no other member is below. own: the members (n,) that the
    rows are, which are left out, or None. memory: n rows for the scores, as allocating is slow."""
    x = (rows - scores.origin) / scores.scale
    x_and_one = np.pad(x, ((0, 0), (0, 1)), constant_values=1).astype(memory.dtype)
    score = np.matmul(x_and_one, scores.columns, out=memory[:len(x)])
    if own is not None:
        score[np.arange(len(x)), own] = -np.inf
    index = _largest(score, count)

    # The others score at most as much as the last candidate. The square of a distance is |x|^2 less
    # twice the score; what is taken off besides covers rounding, and numbers too small for float32
    last = np.take_along_axis(score, index, 1).min(1)
    least = (1 - scores.error) * np.vecdot(x, x) - 2 * last - np.finfo(np.float32).tiny
    return index, least * scores.scale**2


def _square_distances(rows, population, index):
    """Squared distances (n, k), in float64, from rows (n, D) to the members of population (N, D)
    that are listed in index (n, k): sums of squared differences, which do not cancel."""
    squares = np.empty(index.shape)
    size = max(1, CHUNK // (index.shape[1] * rows.shape[1]))
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        differences = population.take(index[part], axis=0).astype(np.float64)
        differences -= rows[part, None]
        np.vecdot(differences, differences, out=squares[part])
    return squares


def _largest(score, k):
    """Columns (n, k) of the k largest numbers in every row of score (n, N), in no order.

    Of 4 k groups of columns (j, j + 4 k, j + 8 k, ...) k have a maximum that reaches the k-th
    largest maximum, so k numbers at least do. About a sixth more do, and only these are sorted."""
    n, N = score.shape
    groups = 4 * k
    if N < 4 * groups:
        return np.argpartition(score, N - k, axis=1)[:, N - k:]

    each = N // groups
    maxima = score[:, :each * groups].reshape(n, each, groups).max(1)
    threshold = np.partition(maxima, groups - k, axis=1)[:, groups - k]
    places = np.flatnonzero(score >= threshold[:, None])

    # Rows of as many places as the fullest has. Others end in a place of the number -infinity
    row = places // N
    count = np.bincount(row, minlength=n)
    column = np.arange(len(places)) - np.repeat(np.cumsum(count) - count, count)
    index = np.zeros((n, count.max()), np.int64)
    values = np.full(index.shape, -np.inf, score.dtype)
    index[row, column] = places % N
    values[row, column] = score.ravel()[places]
    best = np.argpartition(values, -k, axis=1)[:, -k:]
    return np.take_along_axis(index, best, 1)


def _affinities(squares, perplexity):
    """Affinities (n, k), float64, of rows to their neighbours at squared distances (n, k): in every
    row proportional to exp(-beta square), with the beta that gives the row the perplexity."""
    blocks = _blocks(squares, 1024)
    return np.concatenate([_with_entropy(block, math.log(perplexity)) for block in blocks])


def _with_entropy(squares, entropy):
    """p (n, k) proportional to exp(-beta squares), where every row's beta gives it the entropy (in
    nats). Solves for log beta by Newton's method, and by bisection where a Newton step leaves the
    bracket."""
    # A shift changes no p. With a mean of 1 all betas have the same order of magnitude, and float32
    # is precise enough
    d = squares.astype(np.float64) - squares.min(1, keepdims=True)
    d /= np.maximum(d.mean(1, keepdims=True), 1e-300)
    d = d.astype(np.float32)

    log_beta = np.zeros(len(d))
    low, high = log_beta - 30, log_beta + 30
    p = np.empty_like(d)
    for _ in range(50):
        beta = np.exp(log_beta)
        np.multiply(d, -beta[:, None].astype(np.float32), out=p)
        np.exp(p, out=p)
        total = p.sum(1, keepdims=True)
        p /= total

        # -sum p log p = log sum exp(-beta d) + beta sum p d
        mean = np.vecdot(p, d)
        excess = np.log(total[:, 0]) + beta * mean - entropy
        if np.abs(excess).max(initial=0) < 2e-6:
            break

        # Entropy falls as beta grows, at the rate beta^2 Var(d) in log beta
        low = np.where(excess > 0, log_beta, low)
        high = np.where(excess > 0, high, log_beta)
        variance = np.vecdot(p * d, d) - mean**2
        newton = log_beta + excess / np.maximum(beta**2 * variance, 1e-300)
        inside = (low < newton) & (newton < high)
        log_beta = np.where(inside, newton, (low + high) / 2)
    return p


def _symmetric(index, p):
    """The symmetric affinities (p + p^T) / 2N, of sum 1, for neighbours index (N, k) with
    affinities p (N, k).

    Returns the order (N,) of points by falling number of neighbours, and the affinities as blocks
    of consecutive points in that order. A block of r points is a pair of arrays (w, r): a column
    lists a point's neighbours, as places in the order, and their affinities, 0 where the point
    has fewer than w."""
    N, k = index.shape

    # Pairs i < j, each as the number i N + j. Those that occur twice become neighbours in the
    # sorted list, and their values are added
    i = np.repeat(np.arange(N), k)
    j = index.ravel()
    pairs = np.minimum(i, j) * N + np.maximum(i, j)
    by_pair = np.argsort(pairs, kind="stable")
    pairs = pairs[by_pair]
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    value = (np.add.reduceat(p.ravel()[by_pair], first) / (2 * N)).astype(np.float32)
    i, j = np.divmod(pairs[first], N)

    # The neighbours of point i are the entries from start[i] on, count[i] of them
    point = np.concatenate([i, j])
    by_point = np.argsort(point, kind="stable")
    neighbour = np.concatenate([j, i])[by_point]
    affinity = np.concatenate([value, value])[by_point]
    count = np.bincount(point, minlength=N)
    start = np.cumsum(count) - count

    # Points with similar numbers of neighbours stand together, so that blocks need little padding
    order = np.argsort(-count, kind="stable")
    place = np.empty(N, np.int64)
    place[order] = np.arange(N)

    blocks = []
    at = 0
    while at < N:
        width = count[order[at]]  # the first point of a block has the most neighbours
        points = order[at:at + max(1, CHUNK // width)]
        offset = np.arange(width)[:, None]
        entry = np.minimum(start[points] + offset, len(neighbour) - 1)
        weights = np.where(offset < count[points], affinity[entry], np.float32(0))
        blocks.append((place[neighbour[entry]], weights))
        at += len(points)
    return order, blocks


# --------------------------------------------------------------------------------------------------
# t-SNE's gradient, in the precision of y


def _attraction(edges, y, cost=False):
    """The sum over j of p_ij (y_i - y_j) / (1 + d_ij^2), (N, 2), for the blocks of _symmetric and y
    in their order; and, if cost, the sum over pairs of p_ij log(p_ij (1 + d_ij^2)), else 0."""
    # Points as complex numbers: one take fetches both coordinates, and abs is the distance
    z = y.view(np.result_type(y, 1j))[:, 0]
    force = np.empty_like(z)
    total = 0.0
    first = 0
    for index, p in edges:
        block = slice(first, first + p.shape[1])
        differences = z.take(index)
        np.subtract(z[block], differences, out=differences)

        # Every operation writes into an existing array, because allocating takes as long
        weights = np.abs(differences)
        weights *= weights
        weights += 1
        if cost:
            logarithms = np.log(np.where(p > 0, p, 1) * weights)
            total += float((p * logarithms).sum(dtype=np.float64))
        np.divide(p, weights, out=weights)
        differences *= weights
        differences.sum(0, out=force[block])
        first += p.shape[1]
    return force.view(y.dtype).reshape(-1, 2), total


def _all_pairs(y, mesh=None):
    """Repulsion, the sum over j of (y_i - y_j) / (1 + d_ij^2)^2, (N, 2); the normaliser Z, the sum
    over pairs of 1 / (1 + d_ij^2); and the mesh that was given, which is not used."""
    N = len(y)
    square = np.square(y).sum(1, keepdims=True)
    one = np.ones_like(square)

    # 1 + d_ij^2 = y_i . (-2 y_j) + (|y_i|^2 + 1) 1 + 1 |y_j|^2: the product of two matrices
    left = np.concatenate([y, square + 1, one], 1)  # (N, 4)
    right = np.concatenate([-2 * y, one, square], 1).T  # (4, N)
    y_and_one = np.concatenate([y, one], 1)

    force = np.empty_like(y)
    Z = -float(N)  # pairs of a point and itself, which are 1, do not count
    rows = max(1, CHUNK // N)
    for first in range(0, N, rows):
        block = slice(first, first + rows)
        kernel = left[block] @ right
        np.reciprocal(kernel, out=kernel)
        Z += float(kernel.sum(dtype=np.float64))

        # With weights K_ij = kernel^2: y_i sum_j K_ij - sum_j K_ij y_j
        kernel *= kernel
        sums = kernel @ y_and_one
        force[block] = y[block] * sums[:, 2:] - sums[:, :2]
    return force, Z, mesh


class Mesh(NamedTuple):
    h: float  # spacing of the nodes
    size: np.ndarray  # (2,) nodes along x and along y
    kernel: np.ndarray  # (2 size[0], size[1] + 1), its Fourier transform on twice as many nodes
    offset: float  # a constant that was taken off the kernel
    grid: np.ndarray  # (size[0], 2 size[1]) memory for charges and potentials
    wave: np.ndarray  # of the kernel's shape, memory for transforms; allocating takes as long


def _mesh(span, spacing, dtype):
    """A mesh for maps of extent up to span (2,)."""
    h = min(spacing, span.max() / 128)
    a, b = size = np.array([_fast(math.ceil(s / h) + 5) for s in span])

    # The kernel 1 / (1 + d^2). On a small map it is nearly 1 everywhere, and float32 does not
    # resolve how it falls off: there 1 is taken off, which leaves -d^2 / (1 + d^2)
    x = h * np.arange(a + 1)
    y = h * np.arange(b + 1)
    square = np.square(x)[:, None] + np.square(y)
    small = span.max() < 4
    kernel = (-square if small else 1) / (1 + square)
    transform = np.fft.hfft(np.fft.hfft(kernel)[:, :b + 1], axis=0)

    # Charges pass through a spline twice, when spread and when read: divide by its transform twice
    spline_x, spline_y = ((2 + np.cos(np.pi / s * np.arange(2 * s))) / 3 for s in size)
    transform /= np.square(spline_x[:, None] * spline_y[:b + 1])

    grid = np.empty((a, 2 * b), dtype)
    wave = np.empty((2 * a, b + 1), np.result_type(dtype, 1j))
    return Mesh(h, size, transform.astype(dtype), float(small), grid, wave)


def _fast(n):
    """The next even number from n on without prime factors beyond 2, 3 and 5, of which Fourier
    transforms are fast."""
    even = range(n + n % 2, 2 * n + 2, 2)
    return next(m for m in even if 2**20 * 3**9 * 5**6 % m == 0)


def _on_mesh(y, mesh=None, spacing=None):
    """An approximation of _all_pairs: the force, Z, and the mesh in use, for the next call.

    Repulsion is half the slope of a potential, the sum over j of 1 / (1 + |y - y_j|^2). Every point
    spreads a charge to 4 x 4 nodes by cubic B-splines, the charges are convolved with the kernel,
    and the potential and its slope are read at the points by the same splines. (FIt-SNE, Linderman
    et al. 2019, needs four potentials.)"""
    low = y.min(0)
    high = y.max(0)
    span = high - low
    if mesh is None or not _fits(mesh, span):
        if spacing is None:
            spacing = SPACING if len(y) < LARGE else 2 * SPACING
        mesh = _mesh(1.1 * span, spacing, y.dtype)

    # Places of points in units of the spacing, with the map's middle in the mesh's middle
    middle = (low + high) / 2
    places = (y - middle) / y.dtype.type(mesh.h) + (mesh.size / 2 - 2).astype(y.dtype)
    stride = mesh.grid.shape[1]
    splines = [_splines(block, stride) for block in _blocks(places, CHUNK // 16)]

    mesh.grid[:] = 0
    for nodes, (wx, wy), _ in splines:
        charges = wx[:, None] * wy
        np.add.at(mesh.grid.ravel(), nodes.ravel(), charges.ravel())
    _convolve(mesh)

    # Take off a point's potential at itself, 1, and give back the constant taken off the kernel
    N = len(y)
    Z = N * (N * mesh.offset - 1)
    force = np.empty_like(y)
    first = 0
    for nodes, (wx, wy), (dx, dy) in splines:
        potential = mesh.grid.take(nodes)  # (4, 4, n)
        along_x = (potential * wy).sum(1)
        along_y_slope = (potential * dy).sum(1)
        Z += float((along_x * wx).sum(dtype=np.float64))
        block = slice(first, first + nodes.shape[2])
        force[block, 0] = (along_x * dx).sum(0)
        force[block, 1] = (along_y_slope * wx).sum(0)
        first += nodes.shape[2]
    force /= -2 * mesh.h
    return force, Z, mesh


def _fits(mesh, span):
    """Does the mesh hold a map of this extent (2,), without being more than twice as large?"""
    room = (mesh.size - 5) * mesh.h
    return (span <= room).all() and span.max() >= room.max() / 2


def _convolve(mesh):
    """Replaces the charges in mesh.grid by their potentials.

    numpy transforms in single precision only if it has a factor to apply, hence norm="ortho"."""
    grid, wave = mesh.grid, mesh.wave
    a = len(grid)
    np.fft.rfft(grid, norm="ortho", out=wave[:a])
    wave[a:] = 0  # padding, so that the convolution does not wrap around
    np.fft.fft(wave, axis=0, norm="ortho", out=wave)
    wave *= mesh.kernel
    np.fft.ifft(wave, axis=0, norm="ortho", out=wave)
    np.fft.irfft(wave[:a], norm="ortho", out=grid)


def _splines(places, stride):
    """Cubic B-splines at places (n, 2) in units of the spacing: the 4 x 4 nodes of every point as
    indices (4, 4, n) of a grid with `stride` nodes a row, the weights (2, 4, n) along x and along
    y, and the weights' slopes (2, 4, n)."""
    cell = np.floor(places)
    t = np.ascontiguousarray((places - cell).T)[:, None]  # (2, 1, n), from 0 to 1
    s = 1 - t
    weights = [s * s * s, 4 - 3 * t * t * (1 + s), 4 - 3 * s * s * (1 + t), t * t * t]
    slopes = [-s * s, t * (3 * t - 4), s * (4 - 3 * s), t * t]
    offsets = (stride * np.arange(4)[:, None] + np.arange(4))[:, :, None]
    corner = cell.astype(np.int64) @ [stride, 1]
    return offsets + corner, np.concatenate(weights, 1) / 6, np.concatenate(slopes, 1) / 2


def _gradient(edges, y, repulsion, mesh=None, exaggeration=1.0, cost=False):
    """The gradient (N, 2) of the divergence by y (N, 2); the divergence if cost, else None; and the
    mesh for the next call. repulsion: _all_pairs or _on_mesh."""
    pull, weighted_logs = _attraction(edges, y, cost)
    push, Z, mesh = repulsion(y, mesh)
    slope = 4 * (exaggeration * pull - push / y.dtype.type(Z))
    kl = weighted_logs + math.log(Z) if cost else None
    return slope, kl, mesh


# --------------------------------------------------------------------------------------------------
# t-SNE's optimiser


def _descend(edges, y, repulsion, progress):
    """The map (N, 2) that SCHEDULE makes of y (N, 2), and its divergence: gradient descent with
    momentum, a gain for every coordinate (Jacobs 1988) and steps of limited length."""
    N = len(y)
    schedule = SCHEDULE if N < LARGE else SHORT_SCHEDULE
    steps = sum(stage[0] for stage in schedule)
    velocity = np.zeros_like(y)
    gain = np.ones_like(y)
    mesh = None
    step = 0
    for count, exaggeration, rate, momentum in schedule:
        for _ in range(count):
            step += 1
            report = progress is not None and step % 50 == 0
            slope, kl, mesh = _gradient(edges, y.astype(np.float32), repulsion, mesh, exaggeration,
                                        report)

            # A coordinate's gain grows while it goes downhill and shrinks where it overshoots
            downhill = (slope < 0) == (velocity > 0)
            gain = np.where(downhill, gain + 0.2, gain * 0.8 + 0.01)
            velocity = momentum * velocity - rate * N / 4 * gain * slope

            # A hub, a neighbour of thousands of points, would leap across the map and widen it
            length = np.sqrt(np.vecdot(velocity, velocity))[:, None]
            y = y + velocity * (LONGEST_STEP / np.maximum(length, LONGEST_STEP))
            y -= y.mean(0)
            if progress:
                progress(step, steps, kl)
    _, kl, _ = _gradient(edges, y.astype(np.float32), repulsion, mesh, cost=True)
    return y, kl


# --------------------------------------------------------------------------------------------------
# what a figure shows: marks. Every mark has a name for the legend, extent() -> the points (m, 2)
# that it covers in the data's units, draw(frame) -> lines of SVG, and key(x, y) -> the SVG of its
# symbol in the legend, centred at the pixel (x, y)


class Frame(NamedTuple):
    """A plot's rectangle on the page in pixels, and its limits in the data's units."""

    left: float
    top: float
    width: float
    height: float
    low: np.ndarray  # (2,)
    high: np.ndarray  # (2,)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Data (m, 2) -> pixels (m, 2), where y grows downwards."""
        points = np.asarray(points, np.float64).reshape(-1, 2)
        share = (points - self.low) / (self.high - self.low)
        x = self.left + share[:, 0] * self.width
        y = self.top + (1 - share[:, 1]) * self.height
        return np.stack([x, y], 1)


class Cloud(NamedTuple):
    """Many points, as a raster of their log density; clouds that overlap both remain visible.
    Without a colour the density is coloured in viridis."""

    name: str
    points: np.ndarray  # (m, 2)
    colour: str | None = GREY

    def extent(self) -> np.ndarray:
        return self.points

    def draw(self, frame: Frame) -> list[str]:
        x, y = (frame.place(self.points) - (frame.left, frame.top)).T
        content = density_png(x, y, round(frame.width), round(frame.height), self.colour)
        uri = base64.b64encode(content).decode()
        return [f'<image x="{frame.left:.2f}" y="{frame.top:.2f}" width="{frame.width:.2f}" '
                f'height="{frame.height:.2f}" xlink:href="data:image/png;base64,{uri}"/>']

    def key(self, x: float, y: float) -> str:
        if self.colour:
            return (f'<rect x="{x - 6}" y="{y - 6}" width="12" height="12" rx="2" '
                    f'fill="{self.colour}" fill-opacity=".55"/>')
        stripes = [f'<rect x="{x - 7 + 2 * i}" y="{y - 6}" width="2.2" height="12" '
                   f'fill="{viridis(i / 6)}"/>' for i in range(7)]
        return "".join(stripes)


class Points(NamedTuple):
    """Few points, each a marker. Sets differ in shape and filling, so that grey paper tells them
    apart."""

    name: str
    points: np.ndarray  # (m, 2)
    colour: str = VERMILION
    hollow: bool = False
    shape: str = "circle"  # or square, diamond, triangle
    labels: tuple[str, ...] = ()  # texts next to the points
    size: float = 1.0

    def extent(self) -> np.ndarray:
        return self.points

    def draw(self, frame: Frame) -> list[str]:
        pixels = frame.place(self.points)
        markers = [_marker(x, y, self) for x, y in pixels]
        return markers + _labels(frame, pixels, self.labels)

    def key(self, x: float, y: float) -> str:
        return _marker(x, y, self)


RIM = 5.0  # pixels from the middle of a marker to outside of it


class Arrows(NamedTuple):
    """A thin arrow from every row of start (m, 2) to the same row of end, from the rim of the
    marker at the one to that at the other, which would hide its head. Markers that touch need
    none."""

    name: str
    start: np.ndarray
    end: np.ndarray

    def extent(self) -> np.ndarray:
        return np.concatenate([self.start, self.end])

    def draw(self, frame: Frame) -> list[str]:
        lines = []
        for start, end in zip(frame.place(self.start), frame.place(self.end)):
            length = math.hypot(*(end - start))
            if length > 2 * RIM:
                rim = RIM * (end - start) / length
                lines.append(_arrow(np.stack([start + rim, end - rim]), "path"))
        return lines

    def key(self, x: float, y: float) -> str:
        return _arrow(np.array([(x - 8.0, y), (x + 8.0, y)]), "path")


class Trails(NamedTuple):
    """Paths, each (T, 2), whose steps are coloured from dark to light and end in an arrow."""

    name: str
    paths: list[np.ndarray]

    def extent(self) -> np.ndarray:
        return np.concatenate(self.paths)

    def draw(self, frame: Frame) -> list[str]:
        lines = []
        for path in self.paths:
            pixels = frame.place(path)
            last = len(pixels) - 2
            for i in range(last + 1):
                step = pixels[i:i + 2]
                colour = viridis(0.25 + 0.6 * i / max(last, 1))
                stroke = f' stroke="{colour}"'
                if i == last:
                    lines.append(_arrow(step, "trail", stroke, colour))
                else:
                    lines.append(_line(step, "trail", stroke))
        return lines

    def key(self, x: float, y: float) -> str:
        steps = [f'<path class="trail" stroke="{viridis(0.25 + 0.2 * i)}" '
                 f'd="M{x - 8 + 4 * i} {y}h4"/>' for i in range(4)]
        return "".join(steps)


class Curve(NamedTuple):
    """y over x, both (m,), with a band from low to high (m,) if those are given. Dots of different
    shapes tell curves apart without colours; a faint curve stands back behind the others."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: str = BLUE
    dots: bool = False
    shape: str = "circle"  # of the dots
    faint: bool = False

    def extent(self) -> np.ndarray:
        heights = [v for v in (self.y, self.low, self.high) if v is not None]
        return np.concatenate([np.stack([self.x, v], 1) for v in heights])

    def draw(self, frame: Frame) -> list[str]:
        lines = []
        if self.low is not None:
            # The band's outline: along its upper edge and back along the lower one
            upper = np.stack([self.x, self.high], 1)
            lower = np.stack([self.x, self.low], 1)
            outline = frame.place(np.concatenate([upper, lower[::-1]]))
            lines.append(f'<path fill="{self.colour}" fill-opacity=".18" d="{_path(outline)}Z"/>')

        pixels = frame.place(np.stack([self.x, self.y], 1))
        faint = ' stroke-opacity=".45"' if self.faint else ""
        lines.append(_line(pixels, "curve", f' stroke="{self.colour}"{faint}'))
        if self.dots:
            dot = Points("", pixels, self.colour, shape=self.shape)
            lines += [_marker(x, y, dot) for x, y in pixels]
        return lines

    def key(self, x: float, y: float) -> str:
        line = f'<path class="curve" stroke="{self.colour}" d="M{x - 8} {y}h16"/>'
        if self.dots:
            line += _marker(x, y, Points("", None, self.colour, shape=self.shape))
        return line


class Heat(NamedTuple):
    """A matrix (rows, columns) of numbers as coloured cells, with the numbers in them if there is
    room: with two decimals, or one if they are percents or larger. The cell of a nan is empty."""

    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    name: str = ""

    def extent(self) -> np.ndarray:
        return np.array([(0, 0), self.values.shape[::-1]])

    def draw(self, frame: Frame) -> list[str]:
        R, C = self.values.shape
        width = frame.width / C
        height = frame.height / R
        lines = []
        for r, c in np.ndindex(R, C):
            if np.isfinite(self.values[r, c]):
                lines += self._cell(self.values[r, c], frame.left + c * width,
                                    frame.top + r * height, width, height)

        for r, name in enumerate(self.rows):
            y = frame.top + (r + .5) * height + 4
            lines.append(f'<text class="small" text-anchor="end" x="{frame.left - 6:.2f}" '
                         f'y="{y:.2f}">{_xml(name)}</text>')

        # Columns' names that are too long to stand side by side are slanted, and end at theirs
        y = frame.top + frame.height + 12
        for c, name in enumerate(self.columns):
            x = frame.left + (c + .5) * width + 4
            if not self.slanted(frame):
                lines.append(f'<text class="small" text-anchor="middle" x="{x - 4:.2f}" '
                             f'y="{y + 4:.2f}">{_xml(name)}</text>')
                continue
            lines.append(f'<text class="small" text-anchor="end" transform="translate({x:.2f} '
                         f'{y:.2f}) rotate(-40)">{_xml(name)}</text>')
        return lines

    def slanted(self, frame: Frame) -> bool:
        return 6.2 * max(map(len, self.columns)) + 4 > frame.width / self.values.shape[1]

    def _cell(self, value, x, y, width, height):
        share = float(np.clip((value - self.low) / (self.high - self.low), 0, 1))
        ink = "#fff" if share < 0.45 else "#111"  # on viridis' dark half, and on its light one
        text = ""
        if width >= 27:
            text = f"{value:.{1 if self.high - self.low > 10 else 2}f}"
        elif width >= 20:
            text = f"{value:.1f}"
        return [f'<rect x="{x:.2f}" y="{y:.2f}" width="{width + .3:.2f}" '
                f'height="{height + .3:.2f}" fill="{viridis(share)}"/>',
                f'<text class="cell" style="fill:{ink}" x="{x + width / 2:.2f}" '
                f'y="{y + height / 2 + 4:.2f}">{text}</text>']

    def key(self, x: float, y: float) -> str:
        return ""


# --------------------------------------------------------------------------------------------------
# a figure: panels of marks, a legend to their right, a table and a caption below


class Panel(NamedTuple):
    """One plot. Marks are drawn in their order. Marks with one name share an entry in the legend,
    which shows the last one's symbol."""

    marks: list  # Cloud, Points, Arrows, Trails, Curve, Heat
    axes: tuple[str, str] = ("", "")
    title: str = ""
    equal: bool = True  # one scale for both axes
    ticks: bool = True  # False where the units mean nothing, as in a t-SNE map
    places: tuple[tuple[float, str], ...] = ()  # of the x axis's ticks, and their texts
    frame: np.ndarray | None = None  # (m, 2): the points that set the limits; None: all


WIDTH, LEGEND = 720, 190  # pixels; 178 mm, a double column
LEGEND_LINES = textwrap.TextWrapper(22)  # characters
LEGEND_LINES.wordsep_re = re.compile(r"(\s+)|(?<=[:/_-])(?=\S)")  # files' names break there too
MARGIN = 20  # left and right of everything
STYLE = """text{font-family:Helvetica,Arial,sans-serif;fill:#222;font-size:13px}
.paper,.halo{fill:#fff}.frame,.tick{stroke:#888;fill:none}.grid{stroke:#888;stroke-opacity:.15}
.path{stroke:#555;stroke-opacity:.6;stroke-width:1;fill:none}
.head{fill:#555;fill-opacity:.75}.trail{stroke-width:1.5;fill:none}
.curve{stroke-width:1.6;fill:none;stroke-linejoin:round}
.small{font-size:11px}.note{font-size:11px;fill:#555}.title{font-size:16px;font-weight:bold}
.panel{font-size:12px;font-weight:bold}.cell{font-size:11px;text-anchor:middle}
.label{font-size:10.5px;paint-order:stroke;stroke:#fff;stroke-width:2.5px;stroke-linejoin:round}
@media (prefers-color-scheme:dark){text{fill:#ddd}.paper,.halo{fill:#16181c}.note{fill:#aaa}
.path{stroke:#ccc}.head{fill:#ccc}.label{stroke:#16181c}
[stroke="#0072B2"]{stroke:#56B4E9}[fill="#0072B2"]{fill:#56B4E9}
[stroke="#000000"]{stroke:#ddd}[fill="#000000"]{fill:#ddd}}"""


def figure(panels: list[Panel], title: str = "", caption: str = "", columns: int | None = None,
           table: dict[str, float | str] | None = None) -> str:
    """An SVG figure: panels in a grid of so many columns (at most 4 by default), their legend, a
    table of names and values, and a caption, which carries the provenance. The same data give the
    same bytes.

    The table's numbers have three significant digits, but whole numbers and those from 1000 to a
    million are written without decimals."""
    if not panels or not all(panel.marks for panel in panels):
        raise PictureError("nothing to draw: give at least one panel, and each a mark")
    entries = {}
    for panel in panels:
        for mark in panel.marks:
            if mark.name:
                entries[mark.name] = mark

    top = 44 if title else 16
    width = WIDTH - 34 - (LEGEND if entries else 0)
    drawing, grid_height = _draw_grid(panels, min(columns or 4, len(panels)), width, top)

    # The legend stands to the right of the panels, where it covers nothing
    legend, legend_bottom = _draw_legend(entries, WIDTH - LEGEND + 6, top + 12)
    bottom = max(top + grid_height, legend_bottom) + 10
    table_lines, bottom = _draw_table(table or {}, bottom)
    notes = []
    for i, line in enumerate(textwrap.wrap(_clean(caption), 116)):
        notes.append(f'<text class="note" x="{MARGIN}" y="{bottom + 8 + 15 * i:.2f}">'
                     f'{_xml(line)}</text>')

    height = round(bottom + 15 * len(notes) + 8)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {WIDTH} {height}" width="178mm" height="{178 * height / WIDTH:.2f}mm" '
        f'role="img" aria-label="{_attribute(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{MARGIN}" y="26">{_xml(title)}</text>']
    return "\n".join([*head, *drawing, *legend, *table_lines, *notes]) + "\n</svg>\n"


def _draw_grid(panels, columns, width, top):
    """Lines of SVG of panels in rows of so many columns, within a width, below top; and the
    height that they take."""
    gap = 12
    left = []  # room left of the panels of every column
    for c in range(columns):
        left.append(max(_left(panel) for panel in panels[c::columns]))
    side = (width - gap * (columns - 1) - sum(left)) / columns

    # Panels next to one another have one shape, that of the tallest
    aspect = None
    if columns > 1 and all(panel.equal for panel in panels):
        aspect = max(_frame(panel, 1).height for panel in panels)

    lines = []
    height = 0.0
    for first in range(0, len(panels), columns):
        row = panels[first:first + columns]
        frames = [_frame(panel, side, aspect) for panel in row]
        above = 18 if any(panel.title for panel in row) else 0
        below = max(_below(panel, frame) for panel, frame in zip(row, frames))
        for c, (panel, frame) in enumerate(zip(row, frames)):
            x = MARGIN + sum(left[:c + 1]) + c * (side + gap)
            lines += _draw_panel(panel, frame._replace(left=x, top=top + height + above))
        height += above + max(frame.height for frame in frames) + below
    return lines, height


def _draw_legend(entries, x, y):
    """Lines of SVG of a legend of marks {name: mark}, the first symbol at the pixel (x, y); and
    where the next would be."""
    lines = []
    for name, mark in entries.items():
        wrapped = LEGEND_LINES.wrap(_clean(name)) or [""]
        lines.append(mark.key(x, y))
        for i, text in enumerate(wrapped):
            lines.append(f'<text class="small" x="{x + 15}" y="{y + 4 + 14 * i}">'
                         f'{_xml(text)}</text>')
        y += 14 * len(wrapped) + 8
    return lines, y


def _draw_table(table, top):
    """Lines of SVG of a table {name: value} below top, between two rules; and where it ends. Pairs
    run down the first column, then down the next."""
    if not table:
        return [], top
    names = [_cut(_clean(name), 60) for name in table]
    values = [_cut(_number(value), 40) for value in table.values()]

    # A character is about 6 pixels wide. As many columns as there is room for, filled evenly
    gap = 28
    pair = 6 * max(map(len, names)) + 10 + 6 * max(map(len, values))
    columns = max(1, int((WIDTH - 2 * MARGIN + gap) // (pair + gap)))
    rows = math.ceil(len(names) / columns)
    columns = math.ceil(len(names) / rows)

    width = columns * (pair + gap) - gap
    bottom = top + 15 * rows + 10
    lines = [f'<path class="tick" d="M{MARGIN} {y:.2f}h{width}"/>' for y in (top, bottom)]
    for i, (name, value) in enumerate(zip(names, values)):
        column, row = divmod(i, rows)
        x = MARGIN + column * (pair + gap)
        y = top + 15 * row + 16
        lines.append(f'<text class="note" x="{x}" y="{y:.2f}">{_xml(name)}</text>')
        lines.append(f'<text class="small" x="{x + pair}" y="{y:.2f}" text-anchor="end">'
                     f'{_xml(value)}</text>')
    return lines, bottom + 10


def _cut(text, most):
    """text, or as much of it as fits into so many characters, with an ellipsis."""
    return text if len(text) <= most else text[:most - 1] + "\u2026"


def _number(value):
    """A table's value as text: a text as it is, a whole number, or one from 1000 to a million,
    without decimals, and any other number to three significant digits."""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, (int, np.integer)) or 999.5 <= abs(value) < 1e6:
        digits = f"{value:.0f}"
    else:
        digits = f"{value:#.3g}".removesuffix(".")  # "#" writes 5.50 and 0.900, but also 123.
    return digits.replace("-", "\u2212")


def _left(panel: Panel) -> float:
    """Room for what stands left of a panel: ticks and the axis's name, or a matrix's row names."""
    name = 18 if panel.axes[1] else 0
    if isinstance(panel.marks[0], Heat):
        between = 8 if panel.axes[1] else 0  # short names have wide letters, such as an m
        return 6.2 * max(map(len, panel.marks[0].rows)) - 2 + between + name
    return (40 if panel.ticks else 0) + name


def _below(panel: Panel, frame: Frame) -> float:
    """Room for what stands under a panel: ticks and the axis's name, or a matrix's column names."""
    name = 18 if panel.axes[0] else 0
    heat = panel.marks[0]
    if isinstance(heat, Heat):
        slant = 4.4 * max(map(len, heat.columns)) if heat.slanted(frame) else 5
        return 24 + slant + name
    return 12 + (16 if panel.ticks else 0) + name


def _frame(panel: Panel, side: float, aspect: float | None = None) -> Frame:
    """A panel's limits, and its size for a width of side; left and top are 0 for the caller to set.
    aspect is height over width; None lets the data choose it."""
    extents = [mark.extent() for mark in panel.marks]
    points = np.concatenate(extents) if panel.frame is None else panel.frame
    if not len(points) or not all(np.isfinite(extent).all() for extent in extents):
        raise PictureError("no points, or points that are not finite: leave those out")
    low = points.min(0).astype(np.float64)
    high = points.max(0).astype(np.float64)
    if isinstance(panel.marks[0], Heat):
        return Frame(0, 0, side, side * high[1] / high[0], low, high)

    # Around all points, with a margin of 6 % of half the range
    middle = (low + high) / 2
    half = np.maximum((high - low) / 2 * 1.06, 1e-12)
    if not panel.equal:
        flat = np.maximum(np.abs(high), 1) / 2  # where all points agree in a coordinate
        half = np.where(high > low, half, flat)
        return Frame(0, 0, side, 0.75 * side, middle - half, middle + half)

    # With one scale for both axes: from half as tall as wide to a tenth taller than wide
    half[0] = max(half[0], half[1] / (aspect or 1.1))
    half[1] = max(half[1], half[0] * (aspect or 0.5))
    return Frame(0, 0, side, side * half[1] / half[0], middle - half, middle + half)


def _draw_panel(panel: Panel, frame: Frame) -> list[str]:
    heat = isinstance(panel.marks[0], Heat)
    lines = []
    if panel.title:
        lines.append(f'<text class="panel" x="{frame.left:.2f}" y="{frame.top - 6:.2f}">'
                     f'{_xml(panel.title)}</text>')
    if panel.ticks and not heat:
        lines += _draw_ticks(frame, panel.places)

    # What lies beyond the limits is clipped, except a matrix, whose names lie outside
    name = f"c{zlib.crc32(repr((frame.left, frame.top)).encode()):08x}"
    rectangle = (f'x="{frame.left:.2f}" y="{frame.top:.2f}" width="{frame.width:.2f}" '
                 f'height="{frame.height:.2f}"')
    lines.append(f'<clipPath id="{name}"><rect {rectangle}/></clipPath>')
    marks = []
    for mark in panel.marks:
        marks += mark.draw(frame)
    lines += marks if heat else [f'<g clip-path="url(#{name})">', *marks, "</g>"]
    lines.append(f'<rect class="frame" {rectangle}/>')
    return lines + _draw_axis_names(panel, frame)


def _draw_ticks(frame: Frame, places: tuple[tuple[float, str], ...] = ()) -> list[str]:
    """Ticks with their numbers and grid lines: those of the x axis, at places if given, then those
    of the y axis."""
    about = 5 if frame.width > 250 else 4
    bottom = frame.top + frame.height
    lines = []
    round_ones = [(tick, _tick_label(tick)) for tick in _ticks(frame.low[0], frame.high[0], about)]
    for tick, text in places or round_ones:
        x, _ = frame.place(np.array([tick, frame.low[1]]))[0]
        lines.append(f'<path class="grid" d="M{x:.2f} {frame.top:.2f}v{frame.height:.2f}"/>'
                     f'<path class="tick" d="M{x:.2f} {bottom:.2f}v4"/><text class="small" '
                     f'x="{x:.2f}" y="{bottom + 16:.2f}" text-anchor="middle">'
                     f'{_xml(text)}</text>')
    for tick in _ticks(frame.low[1], frame.high[1], about):
        _, y = frame.place(np.array([frame.low[0], tick]))[0]
        lines.append(f'<path class="grid" d="M{frame.left:.2f} {y:.2f}h{frame.width:.2f}"/>'
                     f'<path class="tick" d="M{frame.left - 4:.2f} {y:.2f}h4"/>'
                     f'<text class="small" x="{frame.left - 7:.2f}" y="{y + 4:.2f}" '
                     f'text-anchor="end">{_tick_label(tick)}</text>')
    return lines


def _tick_label(tick: float) -> str:
    return f"{tick:.6g}".replace("-", "\u2212")


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, about so many: multiples of 1, 2, 2.5 or 5 times a power of
    ten."""
    smallest = (high - low) / about
    power = 10.0 ** math.floor(math.log10(smallest))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= smallest)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _draw_axis_names(panel: Panel, frame: Frame) -> list[str]:
    """The names of the axes, outside of what stands at the ticks or at a matrix's cells."""
    lines = []
    if panel.axes[0]:
        x = frame.left + frame.width / 2
        y = frame.top + frame.height + _below(panel, frame) - 14
        lines.append(f'<text class="small" x="{x:.2f}" y="{y:.2f}" text-anchor="middle">'
                     f'{_xml(panel.axes[0])}</text>')
    if panel.axes[1]:
        x = frame.left - _left(panel) + 11
        y = frame.top + frame.height / 2
        lines.append(f'<text class="small" transform="translate({x:.2f} {y:.2f}) rotate(-90)" '
                     f'text-anchor="middle">{_xml(panel.axes[1])}</text>')
    return lines


def _path(pixels: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in pixels)


def _line(pixels: np.ndarray, kind: str, attributes: str = "") -> str:
    return f'<path class="{kind}"{attributes} d="{_path(pixels)}"/>'


def _arrow(pixels: np.ndarray, kind: str, attributes: str = "", colour: str = "") -> str:
    """A line between two pixels (2, 2) with a head at the second; nothing if they coincide."""
    start, end = pixels
    length = math.hypot(*(end - start))
    if length < 1:
        return ""

    # The head is a triangle whose tip is the end
    direction = (end - start) / length
    normal = np.array([-direction[1], direction[0]])
    size = min(6.0, length)
    base = end - size * direction
    half_width = normal * size * 0.42
    head = np.stack([end, base + half_width, base - half_width])
    fill = f' style="fill:{colour};fill-opacity:1"' if colour else ""
    line = _line(pixels, kind, attributes)
    return f'{line}<path class="head"{fill} d="{_path(head)}Z"/>'


SHAPES = {"square": "M-3.8 -3.8h7.6v7.6h-7.6Z", "diamond": "M0 -5.2L5.2 0L0 5.2L-5.2 0Z",
          "triangle": "M0 -5L4.8 3.6H-4.8Z"}


def _marker(x: float, y: float, style: Points) -> str:
    """A marker at the pixel (x, y), of the shape, colour, filling and size of these Points."""
    if style.hollow:
        look = f'class="halo" fill-opacity=".75" stroke="{style.colour}" stroke-width="1.6"'
    else:
        look = f'fill="{style.colour}" stroke="#fff" stroke-width=".7"'
    if style.shape == "circle":
        return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{4.2 * style.size:.2f}" {look}/>'
    return (f'<path transform="translate({x:.2f} {y:.2f}) scale({style.size:g})" '
            f'd="{SHAPES[style.shape]}" {look}/>')


def _labels(frame: Frame, pixels: np.ndarray, texts: tuple[str, ...]) -> list[str]:
    """The texts of points (m, 2) within the frame. A text stands right or left of its point, above
    or below; where it would cover another text in all four places it is left out."""
    lines = []
    taken = []  # (left, baseline, width) of the texts so far
    for (x, y), text in zip(pixels, texts):
        width = 6 * len(text)
        left = x - 6 - width
        for u, v in ((x + 6, y - 4), (x + 6, y + 11), (left, y - 4), (left, y + 11)):
            inside = frame.left < u and u + width < frame.left + frame.width
            if inside and not _covers((u, v, width), taken):
                lines.append(f'<text class="label" x="{u:.2f}" y="{v:.2f}">{_xml(text)}</text>')
                taken.append((u, v, width))
                break
    return lines


def _covers(box: tuple, boxes: list[tuple]) -> bool:
    """Does a text of 10 pixels height, (left, baseline, width), overlap one of the others?"""
    left, baseline, width = box
    return any(left < x + w and x < left + width and abs(baseline - y) < 10 for x, y, w in boxes)


# --------------------------------------------------------------------------------------------------
# rasters


# matplotlib's viridis at nine places (Smith and van der Walt, CC0)
VIRIDIS = np.array([(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
                    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)], float)


def viridis(share: float) -> str:
    """From 0, dark violet, to 1, yellow, as #rrggbb."""
    return "#%02x%02x%02x" % tuple(_viridis(share))


def _viridis(share: float) -> list[int]:
    """Red, green and blue, from 0 to 255."""
    position = np.clip(share, 0, 1) * (len(VIRIDIS) - 1)
    stops = np.arange(len(VIRIDIS))
    return [round(float(np.interp(position, stops, channel))) for channel in VIRIDIS.T]


def density_png(x: np.ndarray, y: np.ndarray, width: int, height: int,
                colour: str | None = GREY) -> bytes:
    """A palette PNG of the log density of points at the pixels x and y (N,) of a plot of width by
    height pixels, drawn at twice that resolution. Every point is a small disc. Without a colour the
    density is coloured in viridis. Points outside of the plot are left out.

    It is transparent where there are no points, so it suits a light and a dark page."""
    scale = 2

    # How many points are in every pixel
    count = np.zeros((height * scale, width * scale), np.int32)
    inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    column = np.clip((x[inside] * scale).astype(np.int64), 0, width * scale - 1)
    row = np.clip((y[inside] * scale).astype(np.int64), 0, height * scale - 1)
    np.add.at(count, (row, column), 1)

    # The more points, the smaller their discs; a small panel fills with fewer points
    crowd = len(x) * (500 / max(width, 1)) ** 2
    if crowd < 20_000:
        radius = 3
    elif crowd < 60_000:
        radius = 2
    else:
        radius = 1
    spread = np.zeros_like(count)
    padded = np.pad(count, radius)
    H, W = count.shape
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dx * dx + dy * dy <= radius * radius + 1:
                spread += padded[radius + dy:radius + dy + H, radius + dx:radius + dx + W]

    # Level 0 is empty, 1 to 15 are shades
    density = np.log1p(spread)
    level = np.ceil(15 * density / max(density.max(), 1e-9)).astype(np.uint8)
    shares = np.arange(16) / 15
    if colour:
        # One colour, the more opaque the denser
        red_green_blue = bytes(int(colour[i:i + 2], 16) for i in (1, 3, 5))
        palette = red_green_blue * 16
        alpha = bytes([0] + [int(80 + 140 * share) for share in shares[1:]])
    else:
        palette = b"".join(bytes(_viridis(share)) for share in shares)
        alpha = bytes([0] + [255] * 15)
    return png(level, palette, alpha)


def png(index: np.ndarray, palette: bytes, alpha: bytes) -> bytes:
    """A palette PNG of four bits a pixel: index (height, width) below 16, palette 3 bytes and alpha
    1 byte a colour."""
    height, width = index.shape

    # Two pixels a byte, the left one in the high bits; a byte 0, no filter, begins every row
    even = np.pad(index, ((0, 0), (0, width % 2)))
    packed = (even[:, ::2] << 4 | even[:, 1::2]).astype(np.uint8)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), packed], axis=1)

    bit_depth, palette_colours = 4, 3
    header = struct.pack(">IIBBBBB", width, height, bit_depth, palette_colours, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"PLTE", palette)
            + _chunk(b"tRNS", alpha) + _chunk(b"IDAT", zlib.compress(rows.tobytes()))
            + _chunk(b"IEND", b""))


def _chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk: length, kind, data, checksum."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


# --------------------------------------------------------------------------------------------------
# a terminal


# The bits of a braille character's dots, (4, 2)
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def braille(background: np.ndarray, series: list[tuple[str, np.ndarray]], columns: int = 76,
            rows: int = 24) -> str:
    """A picture in characters: background (N, 2) as braille dots, eight a character, and on it the
    points (m, 2) of each series as its letter. Both axes have one scale, if a character is twice
    as tall as wide."""
    # A plot whose pixels are dots: 4 rows and 2 columns of them a character
    height, width = 4 * rows, 2 * columns
    points = np.concatenate([background, *(x for _, x in series)])
    frame = _frame(Panel([Points("", points)]), float(width), 2 * rows / columns)
    last = (width - 1, height - 1)

    dots = np.zeros((height, width), bool)
    x, y = frame.place(background).astype(np.int64).clip(0, last).T
    dots[y, x] = True
    codes = (dots.reshape(rows, 4, columns, 2) * BRAILLE[:, None]).sum((1, 3))
    characters = np.where(codes > 0, codes + 0x2800, ord(" "))
    text = [[chr(code) for code in row] for row in characters]

    for letter, letter_points in series:
        x, y = frame.place(letter_points).astype(np.int64).clip(0, last).T
        for row, column in zip(y // 4, x // 2):
            text[row][column] = letter
    return "\n".join("".join(row).rstrip() for row in text).strip("\n")


# --------------------------------------------------------------------------------------------------
# hostile text


def _clean(text: str) -> str:
    """text with U+FFFD for what XML forbids (control characters, surrogates, U+FFFE, U+FFFF), and
    for changes of direction, which make a name look like another."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff"
                  "\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def _xml(text: str) -> str:
    return escape(_clean(text))


def _attribute(text: str) -> str:
    return escape(_clean(text), {'"': "&quot;"})


# Unicode categories of characters that are not seen: controls, formats (among them changes of
# direction), surrogates, private use, unassigned, and separators of lines and paragraphs
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def visible(text: str) -> str:
    """A token's text for reading: a space at its start or end as U+2423, and line breaks, controls,
    changes of direction and invisible characters as escapes."""
    spaces_shown = re.sub("^ | $", "\u2423", text)
    return "".join(_escaped(character) for character in spaces_shown)


def _escaped(character: str) -> str:
    if unicodedata.category(character) in INVISIBLE:
        return character.encode("unicode_escape").decode()
    return character


# --------------------------------------------------------------------------------------------------
# an explorable page


def page(template: str, data: dict) -> str:
    """One self-contained HTML page: a template that contains @TITLE@, @CSP@ and @DATA@, filled.

    data is made of dicts, lists, texts, numbers and arrays, and has a "title". Arrays of floats are
    quantised to 16 bits between their least and greatest value; arrays of whole numbers, which may
    not be negative, are stored exactly. Everything is one gzipped block in base64, whose alphabet
    cannot end a script:

        4 bytes, the length of the JSON | JSON | arrays, each at a multiple of 4 bytes

    In the JSON an array is {"$array": [place, shape, bytes a number, least, step]}, and a number
    that is not finite is null. The content security policy allows the page's script and style by
    their hashes, and nothing else."""
    arrays = []
    plain = _without_arrays(data, arrays)
    text = json.dumps(plain, separators=(",", ":"), default=str).encode()
    text += b" " * (-len(text) % 4)
    content = len(text).to_bytes(4, "little") + text + b"".join(arrays)
    block = gzip.compress(content, 9, mtime=0)

    template = template.replace("\r\n", "\n")  # a browser does so before it computes a hash
    printable = [c if c.isprintable() else "\ufffd" for c in str(data.get("title", ""))]
    filled = {"TITLE": html.escape("".join(printable)),
              "CSP": _security_policy(template),
              "DATA": base64.b64encode(block).decode()}
    return re.sub("@(TITLE|CSP|DATA)@", lambda match: filled[match[1]], template)


def _without_arrays(value, arrays: list[bytes]):
    """value with every array replaced by its description in JSON; the arrays' bytes, padded to a
    multiple of 4, are appended to arrays."""
    if isinstance(value, dict):
        if "$array" in value:
            raise PictureError("data with a key '$array', which stands for arrays: rename it")
        return {str(key): _without_arrays(item, arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(item, arrays) for item in value]
    if isinstance(value, np.ndarray):
        place = sum(map(len, arrays))
        numbers, least, step = _quantised(value)
        padding = bytes(-numbers.nbytes % 4)
        arrays.append(numbers.tobytes() + padding)
        return {"$array": [place, list(value.shape), numbers.itemsize, least, step]}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _security_policy(template: str) -> str:
    rules = ["default-src 'none'", "img-src data: blob:", "base-uri 'none'", "form-action 'none'"]
    for kind in ("script", "style"):
        content = re.search(f"<{kind}>(.*?)</{kind}>", template, re.DOTALL)[1]
        digest = hashlib.sha256(content.encode()).digest()
        rules.append(f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'")
    return "; ".join(rules)


def _quantised(x: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Numbers of 1, 2 or 4 bytes, and the least value and the step with which
    x = least + step * numbers."""
    if not x.size:
        return x.astype("<u2"), 0.0, 1.0
    if x.dtype.kind in "bui":
        if x.min() < 0 or x.max() >= 2**32:
            raise PictureError("whole numbers below 0 or from 2**32 on cannot go into a page")
        smallest = next(size for size in (1, 2, 4) if x.max() < 2**(8 * size))
        return x.astype(f"<u{smallest}"), 0.0, 1.0
    if not np.isfinite(x).all():
        raise PictureError("values that are not finite cannot go into a page: leave them out")
    low, high = float(x.min()), float(x.max())
    step = (high - low) / 65535 or 1.0
    return np.rint((x.astype(np.float64) - low) / step).astype("<u2"), low, step
