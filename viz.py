"""Pictures of embeddings: arrays and labels in, coordinates and SVG text out. Needs numpy alone.

    plane = pca(vocabulary)                                   # fitted on the reference only
    a, b = project(plane, start), project(plane, end)
    svg = figure([Panel([Cloud("vocabulary", project(plane, vocabulary)), Arrows("moved", a, b),
                         Points("prior draw", a, hollow=True), Points("trained", b)],
                        axis_names(plane))], title="Layer 0")

It returns strings and writes nothing; every text is escaped. The picture is readable on paper, on a
light and on a dark page, and in grey: colours are Okabe and Ito's, kinds also differ by shape.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
import struct
import textwrap
import unicodedata
import zlib
from typing import Callable, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

# Okabe and Ito's, told apart by everybody; in grey shapes tell
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
GREY = "#7a8799"  # a background's, on light and on dark


class PictureError(ValueError):
    """Data that cannot be drawn: what, and the remedy, in one line."""


# --------------------------------------------------------------------------------------------------
# coordinates


class Plane(NamedTuple):
    mean: np.ndarray  # (D,)
    components: np.ndarray  # (k, D), orthonormal, by falling variance
    explained: np.ndarray  # (k,) share of the total variance


def pca(x: np.ndarray, k: int = 2, block: int = 8192) -> Plane:
    """Exact principal components of x (N, D): eigenvectors of the covariance, summed
    in float64 by blocks.

    A component's largest entry is positive, so that the same data give the same picture."""
    N, D = x.shape
    if N < 2 or not 1 <= k <= D:
        raise PictureError(f"{k} principal components of {N} points of width {D}: "
                           "give at least 2 points and k <= width")
    mean = sum(b.sum(0, dtype=np.float64) for b in _blocks(x, block)) / N
    if not np.isfinite(mean).all():
        raise PictureError("points with values that are not finite: leave them out")
    covariance = np.zeros((D, D))
    for b in _blocks(x, block):
        centred = b.astype(np.float64) - mean
        covariance += centred.T @ centred / N
    variance, vectors = np.linalg.eigh(covariance)
    components = vectors[:, ::-1][:, :k].T
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    components = components * np.where(largest < 0, -1.0, 1.0)
    total = covariance.trace()
    return Plane(mean, components, variance[::-1][:k].clip(0) / (total if total > 0 else 1.0))


def project(plane: Plane, x: np.ndarray) -> np.ndarray:
    """x (N, D) -> coordinates (N, k)."""
    return np.concatenate([(b.astype(np.float64) - plane.mean) @ plane.components.T
                           for b in _blocks(x, 8192)])


def _blocks(x, size):
    return (x[i:i + size] for i in range(0, max(len(x), 1), size))


def axis_names(plane: Plane) -> tuple[str, ...]:
    return tuple(f"PC{i} ({100 * share:.1f} % of the variance)"
                 for i, share in enumerate(plane.explained, 1))


# --------------------------------------------------------------------------------------------------
# t-SNE (van der Maaten and Hinton 2008): neighbours in the data stay neighbours in the plane


class Embedding(NamedTuple):
    """A map, and what its caption has to say."""

    points: np.ndarray  # (N, 2) float64
    kl: float  # what was minimised: the divergence of the two sets of affinities, in nats
    perplexity: float  # the one used


# (steps, exaggeration, rate in N / 4, momentum): gather, let go, travel fast, settle. Fewer steps
# cost 1 % on data without clusters; to end fast gains 1 % on clusters and loses as much without.
SCHEDULE = ((80, 12, 1 / 12, 0.9), (60, 1, 1, 0.8), (100, 1, 2, 0.95), (80, 1, 1, 0.8))
EXACT = 1500  # the N up to which summing all pairs is the faster way
SPACING = 0.35  # of the mesh, half as much again from 20,000 points; the kernel is 2 wide
CHUNK = 2**16  # entries that are worked on at a time, within the processor's cache


def tsne(x: np.ndarray, perplexity: float = 30.0, seed: int = 0, exact: bool | None = None,
         progress: Callable[[int, int, float | None], None] | None = None) -> Embedding:
    """A map of x (N, D). The perplexity, about how many neighbours count, is lowered to (N - 1) / 3
    if it is more; beyond a width of 64 the data are their first 50 principal components.

    Repulsion is summed over all pairs (exact) or on a mesh, to about 1 %; None takes the faster.
    progress(step, steps, kl) is called at every step, kl a number at every 50th. The same seed
    gives the same map, bit by bit; seeds differ by 1e-2 of the start."""
    x = _rows(x, "points", 4)
    if all((b == x[0]).all() for b in _blocks(x, 8192)):
        raise PictureError(f"all {len(x)} points are equal: a map needs points that differ")
    N, D = x.shape
    used = min(float(perplexity), (N - 1) / 3)
    if not used >= 1:
        raise PictureError(f"perplexity {perplexity}: ask for 1 or more")
    # single precision hides in which order threads have added
    if D > 64:
        x = project(pca(x, 50), x).astype(np.float32)
    start = project(pca(x, min(2, D)), x)
    start = np.pad(start, ((0, 0), (0, 2 - start.shape[1]))) * (1e-4 / start[:, 0].std())
    start += np.random.default_rng(seed).normal(scale=1e-6, size=start.shape)  # parts duplicates
    start = start.astype(np.float32).astype(np.float64)
    index, square = _neighbours(x, x, int(3 * used), itself=True)
    order, edges = _symmetric(index, _affinities(square, used))
    exact = N <= EXACT if exact is None else exact
    y, kl = _descend(edges, start[order], _all_pairs if exact else _on_mesh, progress)
    points = np.empty_like(y)
    points[order] = y
    return Embedding(points, kl, used)


def embed(new: np.ndarray, reference: np.ndarray, points: np.ndarray, k: int = 25) -> np.ndarray:
    """Places (m, 2) for new rows (m, D) on the map points (N, 2) of reference (N, D), which stays.

    Each row by itself: from the median of its k nearest reference rows' places to where their
    pulls, of perplexity k / 3, balance. The others' push is left out: with it fewer neighbours are
    kept."""
    reference = _rows(reference, "the reference", 1)
    new = _rows(new, "new rows", 0)
    points = np.asarray(points, np.float64)
    if points.shape != (len(reference), 2) or new.shape[1] != reference.shape[1]:
        raise PictureError(f"new rows {new.shape}, reference {reference.shape} and its points "
                           f"{points.shape}: give (m, D), (N, D) and (N, 2)")
    index, square = _neighbours(new, reference, min(k, len(reference)))
    p, near = _affinities(square, max(1.0, index.shape[1] / 3)), points[index]
    y = np.median(near, axis=1)
    for _ in range(50):
        pull = p / (1 + np.square(near - y[:, None]).sum(2))
        y = (pull[:, :, None] * near).sum(1) / pull.sum(1, keepdims=True)
    return y


def _rows(x, name, least):
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype.kind not in "biuf" or not x.shape[1]:
        raise PictureError(f"{name}: {x.dtype} of shape {x.shape}: give numbers (rows, width)")
    if len(x) < least:
        raise PictureError(f"{name}: {len(x)} rows: give at least {least}")
    if not all((np.abs(b, dtype=np.float64) < 1e15).all() for b in _blocks(x, 8192)):
        raise PictureError(f"{name}: values that are not finite, or beyond 1e15: leave them out")
    return x


# --------------------------------------------------------------------------------------------------
# t-SNE's affinities in the data


def _neighbours(rows, population, k, itself=False):
    """The k members of population (N, D) nearest to each of rows (n, D), in no order, and squared
    distances in one unit or another: (n, k) each. itself: the rows are the population, and none is
    its own neighbour."""
    N, D = population.shape
    # far outliers do not move the median; near the origin float32 is finest
    centre = np.median(population[::N // 4096 + 1], axis=0)
    x = np.subtract(population, centre, dtype=np.float64, casting="unsafe").astype(np.float32)
    scale = max(x.max(), -x.min()) or 1
    x /= scale
    columns = np.full((D + 1, -(-N // 128) * 128), -np.inf, np.float32)
    columns[:D, :N], columns[:D, N:] = x.T, 0
    columns[D, :N] = np.vecdot(x, x) / -2  # a product with (x, 1) is x . y - |y|^2 / 2
    index = np.empty((len(rows), k), np.int64)
    square = np.empty((len(rows), k), np.float32)
    memory = np.empty((64, columns.shape[1]), np.float32)
    for at in range(0, len(rows), 64):
        a = ((rows[at:at + 64] - centre) / scale).astype(np.float32)
        score = np.matmul(np.pad(a, ((0, 0), (0, 1)), constant_values=1), columns,
                          out=memory[:len(a)])
        if itself:
            score[np.arange(len(a)), np.arange(at, at + len(a))] = -np.inf
        index[at:at + 64] = found = _largest(score, k)
        apart = x.take(found, axis=0)
        apart -= a[:, None]
        np.vecdot(apart, apart, out=square[at:at + 64])
    return index, square


def _largest(score, k):
    """Columns (n, k) of the k largest in every row of score (n, N). They are in the k slices with
    the largest maxima, a slice being every N / 8-th column."""
    n, N = score.shape
    if N < 16 * k or N % 8:
        return np.argpartition(score, N - k, axis=1)[:, N - k:]
    slices = _largest(score.reshape(n, 8, N // 8).max(1), k)
    inside = (slices[:, None] + N // 8 * np.arange(8)[:, None]).reshape(n, -1)
    best = np.argpartition(np.take_along_axis(score, inside, 1), 7 * k, axis=1)[:, 7 * k:]
    return np.take_along_axis(inside, best, 1)


def _affinities(square, perplexity):
    """Rows p (n, k) in proportion to exp(-beta square), of entropy log(perplexity): by Newton's
    method for log beta, and by bisection where that leaves the bracket."""
    parts = [np.zeros((0, square.shape[1]))]
    for d in _blocks(square, 1024):
        d = d.astype(np.float64) - d.min(1, keepdims=True)
        d /= np.maximum(d.mean(1, keepdims=True), 1e-300)
        u = np.zeros((len(d), 1))
        low, high = u - 30, u + 30
        for _ in range(50):
            p = np.exp(-np.exp(u) * d)
            total = p.sum(1, keepdims=True)
            p /= total
            mean = (p * d).sum(1, keepdims=True)
            excess = np.log(total) + np.exp(u) * mean - math.log(perplexity)
            if np.abs(excess).max(initial=0) < 1e-7:
                break
            low, high = np.where(excess > 0, u, low), np.where(excess > 0, high, u)
            slope = np.exp(2 * u) * ((p * d * d).sum(1, keepdims=True) - mean**2)
            u = u + excess / np.maximum(slope, 1e-300)
            u = np.where((low < u) & (u < high), u, (low + high) / 2)
        parts.append(p)
    return np.concatenate(parts)


def _symmetric(index, p):
    """(p + p^T) / 2N of neighbours (N, k), which sum to 1: the order (N,) of points by falling
    number of neighbours, and blocks of consecutive points in that order, each as columns (w, r) of
    neighbours, padded by affinity 0."""
    N, k = index.shape
    i, j = np.repeat(np.arange(N), k), index.ravel()
    pair = np.concatenate([i * N + j, j * N + i])
    order = np.argsort(pair)
    pair = pair[order]
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    p = np.add.reduceat(np.tile(p.ravel(), 2)[order], first) / (2 * N)
    i, j = np.divmod(pair[first], N)
    length = np.bincount(i, minlength=N)
    begin = np.cumsum(length) - length
    order = np.argsort(-length, kind="stable")
    place = np.empty(N, np.int64)
    place[order] = np.arange(N)
    blocks, at = [], 0
    while at < N:
        w = np.arange(length[order[at]])[:, None]
        rows = order[at:(at := at + max(1, CHUNK // len(w)))]
        entry = np.minimum(begin[rows] + w, len(j) - 1)
        blocks.append((place[j[entry]],
                       np.where(w < length[rows], p[entry], 0).astype(np.float32)))
    return order, blocks


# --------------------------------------------------------------------------------------------------
# t-SNE's gradient, in the precision of y


def _attraction(edges, y, cost=False):
    """sum_j p_ij (y_i - y_j) / (1 + d_ij^2): (N, 2); and the sum of p_ij log(p_ij (1 + d_ij^2))."""
    z = y.view(np.result_type(y, 1j))[:, 0]
    force, total, at = np.empty_like(z), 0.0, 0
    for index, p in edges:
        here = slice(at, at := at + p.shape[1])
        apart = z.take(index)
        np.subtract(z[here], apart, out=apart)
        near = np.abs(apart)
        near *= near
        near += 1
        if cost:
            total += float((p * np.log(np.where(p > 0, p, 1) * near)).sum(dtype=np.float64))
        np.divide(p, near, out=near)
        apart *= near
        apart.sum(0, out=force[here])
    return force.view(y.dtype).reshape(-1, 2), total


def _all_pairs(y, mesh=None):
    """Repulsion sum_j (y_i - y_j) / (1 + d_ij^2)^2: (N, 2); and Z, the sum of 1 / (1 + d_ij^2)."""
    N, square = len(y), np.square(y).sum(1, keepdims=True)
    one = np.ones_like(square)
    force, Z = np.empty_like(y), -float(N)
    columns, moments = np.concatenate([-2 * y, one, square], 1).T, np.concatenate([y, one], 1)
    left = np.concatenate([y, square + 1, one], 1)
    for at in range(0, N, step := max(1, CHUNK // N)):
        near = left[at:at + step] @ columns
        np.reciprocal(near, out=near)
        Z += float(near.sum(dtype=np.float64))
        near *= near
        m = near @ moments
        force[at:at + step] = y[at:at + step] * m[:, 2:] - m[:, :2]
    return force, Z, mesh


class Mesh(NamedTuple):
    h: float  # spacing
    size: np.ndarray  # (2,) nodes along x and along y
    kernel: np.ndarray  # (2 size[0], size[1] + 1) its transform on twice as many nodes
    offset: float  # the constant that was taken off the kernel
    grid: np.ndarray  # (size[0], 2 size[1]) and
    wave: np.ndarray  # as kernel: to work in, for fresh memory takes as long as the arithmetic


def _mesh(span, spacing, dtype):
    """A mesh for maps up to span (2,), with what cubic B-splines lose made up for in the kernel."""
    h = min(spacing, span.max() / 128)
    a, b = size = np.array([_fast(math.ceil(s / h) + 5) for s in span])
    square = np.square(h * np.arange(a + 1))[:, None] + np.square(h * np.arange(b + 1))
    offset = float(span.max() < 4)  # float32 does not see how a small map's kernel falls off from 1
    kernel = (-square if offset else 1) / (1 + square)
    kernel = np.fft.hfft(np.fft.hfft(kernel)[:, :b + 1], axis=0)
    spline = [(2 + np.cos(np.pi / s * np.arange(2 * s))) / 3 for s in size]
    kernel /= np.square(spline[0][:, None] * spline[1][:b + 1])
    return Mesh(h, size, kernel.astype(dtype), offset, np.empty((a, 2 * b), dtype),
                np.empty((2 * a, b + 1), np.result_type(dtype, 1j)))


def _fast(n):
    """The next even number of which Fourier transforms are fast."""
    return next(m for m in range(n + n % 2, 2 * n + 2, 2) if 2**20 * 3**9 * 5**6 % m == 0)


def _on_mesh(y, mesh=None):
    """As _all_pairs, by one potential, sum_j 1 / (1 + |y - y_j|^2), of which the force is half the
    slope: charges are spread to 4 x 4 nodes by cubic B-splines, convolved, and read by the same.
    The mesh is one that fits. (FIt-SNE, Linderman et al. 2019, needs four potentials.)"""
    low, high = y.min(0), y.max(0)
    room = 0 if mesh is None else (mesh.size - 5) * mesh.h
    if (high - low > room).any() or (high - low).max() < np.max(room) / 2:
        mesh = _mesh(1.1 * (high - low), SPACING * (1 if len(y) < 20_000 else 1.5), y.dtype)
    h, (a, b), kernel, offset, grid, wave = mesh
    place = (y - (low + high) / 2) / y.dtype.type(h) + (mesh.size / 2 - 2).astype(y.dtype)
    parts = [_splines(p, 2 * b) for p in _blocks(place, CHUNK // 16)]
    grid[:] = 0
    for node, (wx, wy), _ in parts:
        np.add.at(grid.ravel(), node.ravel(), (wx[:, None] * wy).ravel())
    # numpy transforms in single precision only where there is a factor to apply: hence "ortho"
    np.fft.rfft(grid, norm="ortho", out=wave[:a])
    wave[a:] = 0
    np.fft.fft(wave, axis=0, norm="ortho", out=wave)
    wave *= kernel
    np.fft.ifft(wave, axis=0, norm="ortho", out=wave)
    np.fft.irfft(wave[:a], norm="ortho", out=grid)
    Z, force, at = len(y) * (len(y) * offset - 1), np.empty_like(y), 0
    for node, (wx, wy), (dx, dy) in parts:
        phi = grid.take(node)
        along = (phi * wy).sum(1)
        Z += float((along * wx).sum(dtype=np.float64))
        here = slice(at, at := at + node.shape[2])
        force[here, 0] = (along * dx).sum(0)
        force[here, 1] = ((phi * dy).sum(1) * wx).sum(0)
    force /= -2 * h
    return force, Z, mesh


def _splines(place, stride):
    """Nodes (4, 4, n) that carry points at place (n, 2), weights (2, 4, n) and their slopes."""
    cell = np.floor(place)
    t = np.ascontiguousarray((place - cell).T)[:, None]
    s = 1 - t
    w = [s * s * s, 4 - 3 * t * t * (1 + s), 4 - 3 * s * s * (1 + t), t * t * t]
    d = [-s * s, t * (3 * t - 4), s * (4 - 3 * s), t * t]
    node = (stride * np.arange(4)[:, None] + np.arange(4))[:, :, None]
    return (node + cell.astype(np.int64) @ [stride, 1], np.concatenate(w, 1) / 6,
            np.concatenate(d, 1) / 2)


def _gradient(edges, y, repulsion, mesh=None, exaggeration=1.0, cost=False):
    """Of the divergence by y, (N, 2); the divergence if cost; and the mesh, to be given again."""
    pull, kl = _attraction(edges, y, cost)
    push, Z, mesh = repulsion(y, mesh)
    slope = 4 * (exaggeration * pull - push / y.dtype.type(Z))
    return slope, kl + math.log(Z) if cost else None, mesh


# --------------------------------------------------------------------------------------------------
# t-SNE's optimiser


def _descend(edges, y, repulsion, progress):
    """Places (N, 2) after SCHEDULE from y, and the divergence: gradient descent with momentum and
    a gain for every coordinate (Jacobs 1988)."""
    N, step, steps = len(y), 0, sum(stage[0] for stage in SCHEDULE)
    velocity, gain, mesh = np.zeros_like(y), np.ones_like(y), None
    for count, exaggeration, rate, momentum in SCHEDULE:
        for step in range(step + 1, step + count + 1):
            slope, kl, mesh = _gradient(edges, y.astype(np.float32), repulsion, mesh, exaggeration,
                                        progress is not None and step % 50 == 0)
            gain = np.where((slope < 0) == (velocity > 0), gain + 0.2, gain * 0.8 + 0.01)
            velocity = momentum * velocity - rate * N / 4 * gain * slope
            y = y + velocity
            y -= y.mean(0)
            if progress:
                progress(step, steps, kl)
    return y, _gradient(edges, y.astype(np.float32), repulsion, mesh, cost=True)[1]


# --------------------------------------------------------------------------------------------------
# what a figure shows: marks, each with the points it covers, its SVG, and its entry in the legend


class Frame(NamedTuple):
    """A plot's place on the page in pixels, and its limits in the data's units."""

    left: float
    top: float
    width: float
    height: float
    low: np.ndarray  # (2,)
    high: np.ndarray  # (2,)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Data (m, 2) -> page (m, 2), where y grows downwards."""
        share = (np.asarray(points, np.float64).reshape(-1, 2) - self.low) / (self.high - self.low)
        return np.stack([self.left + share[:, 0] * self.width,
                         self.top + (1 - share[:, 1]) * self.height], 1)


class Cloud(NamedTuple):
    """Many points, as a raster of their log density; several clouds shine through one another. With
    no colour the density itself is coloured, in viridis."""

    name: str
    points: np.ndarray  # (m, 2)
    colour: str | None = GREY

    def extent(self) -> np.ndarray:
        return self.points

    def draw(self, frame: Frame) -> list[str]:
        at = frame.place(self.points) - (frame.left, frame.top)
        content = density_png(at[:, 0], at[:, 1], round(frame.width), round(frame.height),
                              self.colour)
        uri = base64.b64encode(content).decode()
        return [f'<image x="{frame.left:.2f}" y="{frame.top:.2f}" width="{frame.width:.2f}" '
                f'height="{frame.height:.2f}" xlink:href="data:image/png;base64,{uri}"/>']

    def key(self, x: float, y: float) -> str:
        if self.colour:
            return (f'<rect x="{x - 6}" y="{y - 6}" width="12" height="12" rx="2" '
                    f'fill="{self.colour}" fill-opacity=".55"/>')
        return "".join(f'<rect x="{x - 7 + 2 * i}" y="{y - 6}" width="2.2" height="12" '
                       f'fill="{viridis(i / 6)}"/>' for i in range(7))


class Points(NamedTuple):
    """Few points, each a marker, told apart in grey too: by shape, filled or hollow."""

    name: str
    points: np.ndarray  # (m, 2)
    colour: str = VERMILION
    hollow: bool = False
    shape: str = "circle"  # or square, diamond, triangle
    labels: tuple[str, ...] = ()  # beside the points
    size: float = 1.0

    def extent(self) -> np.ndarray:
        return self.points

    def draw(self, frame: Frame) -> list[str]:
        at, out, taken = frame.place(self.points), [], []
        for (x, y), text in zip(at, self.labels):
            wide, text = 6 * len(text), _clean(text)
            # right or left of its point, above or below, wherever there is room; else nowhere
            for u, v in ((x + 6, y - 4), (x + 6, y + 11), (x - 6 - wide, y - 4),
                         (x - 6 - wide, y + 11)):
                if frame.left < u and u + wide < frame.left + frame.width and not any(
                        u < b + w and b < u + wide and abs(v - c) < 10 for b, c, w in taken):
                    out.append(f'<text class="label" x="{u:.2f}" y="{v:.2f}">{_xml(text)}</text>')
                    taken.append((u, v, wide))
                    break
        return [_marker(x, y, self) for x, y in at] + out

    def key(self, x: float, y: float) -> str:
        return _marker(x, y, self)


class Arrows(NamedTuple):
    """A thin arrow from every row of start (m, 2) to the same row of end."""

    name: str
    start: np.ndarray
    end: np.ndarray

    def extent(self) -> np.ndarray:
        return np.concatenate([self.start, self.end])

    def draw(self, frame: Frame) -> list[str]:
        return [_arrow(np.stack(pair), "path") for pair in zip(frame.place(self.start),
                                                               frame.place(self.end))]

    def key(self, x: float, y: float) -> str:
        return _arrow(np.array([(x - 8.0, y), (x + 8.0, y)]), "path")


class Trails(NamedTuple):
    """Paths (T, 2) from place to place, from dark to light, with an arrow at their ends."""

    name: str
    paths: list[np.ndarray]

    def extent(self) -> np.ndarray:
        return np.concatenate(self.paths)

    def draw(self, frame: Frame) -> list[str]:
        out = []
        for path in self.paths:
            at = frame.place(path)
            for i in range(len(at) - 1):
                colour = viridis(0.25 + 0.6 * i / max(len(at) - 2, 1))
                out.append(_arrow(at[i:i + 2], "trail", f' stroke="{colour}"', colour)
                           if i == len(at) - 2 else _line(at[i:i + 2], "trail",
                                                          f' stroke="{colour}"'))
        return out

    def key(self, x: float, y: float) -> str:
        return "".join(f'<path class="trail" stroke="{viridis(0.25 + 0.2 * i)}" '
                       f'd="M{x - 8 + 4 * i} {y}h4"/>' for i in range(4))


class Curve(NamedTuple):
    """y over x, both (m,), and a band from low to high if they are given."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: str = BLUE
    dots: bool = False

    def extent(self) -> np.ndarray:
        return np.concatenate([np.stack([self.x, v], 1) for v in (self.y, self.low, self.high)
                               if v is not None])

    def draw(self, frame: Frame) -> list[str]:
        at, out = frame.place(np.stack([self.x, self.y], 1)), []
        if self.low is not None:
            edge = np.concatenate([np.stack([self.x, self.high], 1),
                                   np.stack([self.x, self.low], 1)[::-1]])
            out.append(f'<path fill="{self.colour}" fill-opacity=".18" '
                       f'd="{_path(frame.place(edge))}Z"/>')
        out.append(_line(at, "curve", f' stroke="{self.colour}"'))
        return out + [_marker(x, y, Points("", at, self.colour)) for x, y in at if self.dots]

    def key(self, x: float, y: float) -> str:
        line = f'<path class="curve" stroke="{self.colour}" d="M{x - 8} {y}h16"/>'
        return line + (_marker(x, y, Points("", None, self.colour)) if self.dots else "")


class Heat(NamedTuple):
    """A matrix (rows, columns) of numbers, each a coloured cell, written out where there is room;
    nan is an empty one."""

    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    name: str = ""

    def extent(self) -> np.ndarray:
        return np.array([(0, 0), self.values.shape[::-1]])

    def draw(self, frame: Frame) -> list[str]:
        (R, C), out = self.values.shape, []
        wide, tall = frame.width / C, frame.height / R
        for r, c in np.ndindex(R, C):
            x, y, value = frame.left + c * wide, frame.top + r * tall, self.values[r, c]
            if np.isfinite(value):
                share = float(np.clip((value - self.low) / (self.high - self.low), 0, 1))
                out.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide + .3:.2f}" '
                           f'height="{tall + .3:.2f}" fill="{viridis(share)}"/>')
                ink = "#fff" if share < 0.6 else "#111"
                text = f"{value:.2f}" if wide >= 27 else f"{value:.1f}" if wide >= 20 else ""
                out.append(f'<text class="cell" style="fill:{ink}" x="{x + wide / 2:.2f}" '
                           f'y="{y + tall / 2 + 4:.2f}">{text}</text>')
        out += [f'<text class="small" text-anchor="end" x="{frame.left - 6:.2f}" '
                f'y="{frame.top + (r + .5) * tall + 4:.2f}">{_xml(name)}</text>'
                for r, name in enumerate(self.rows)]
        for c, name in enumerate(self.columns):
            x, y = frame.left + (c + .5) * wide, frame.top + frame.height + 12
            out.append(f'<text class="small" text-anchor="end" transform="translate({x + 4:.2f} '
                       f'{y:.2f}) rotate(-40)">{_xml(name)}</text>')
        return out

    def key(self, x: float, y: float) -> str:
        return ""


# --------------------------------------------------------------------------------------------------
# a figure: panels of marks, a legend beside them, a caption below


class Panel(NamedTuple):
    """One plot. Marks are drawn in their order, and of equal names one is in the legend."""

    marks: list  # Cloud, Points, Arrows, Trails, Curve, Heat
    axes: tuple[str, str] = ("", "")
    title: str = ""
    equal: bool = True  # one scale for both axes
    ticks: bool = True  # False where the units mean nothing, as in a t-SNE map
    frame: np.ndarray | None = None  # (m, 2): the points that set the limits; None: all


WIDTH, LEGEND = 720, 190  # pixels; 178 mm, a double column
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


def figure(panels: list[Panel], title: str = "", caption: str = "",
           columns: int | None = None) -> str:
    """An SVG figure of panels in a grid. The caption carries the provenance. The same data give the
    same bytes."""
    if not panels or not all(panel.marks for panel in panels):
        raise PictureError("nothing to draw: give at least one panel, and each a mark")
    columns = columns or min(len(panels), 4)
    keys = {mark.name: mark for panel in panels for mark in panel.marks if mark.name}
    left = [max(map(_left, panels[c::columns])) for c in range(columns)]
    side = (WIDTH - 34 - (LEGEND if keys else 0) - 12 * (columns - 1) - sum(left)) / columns
    # panels side by side have one shape
    aspect = max(_frame(p, 1).height for p in panels) if columns > 1 and all(
        p.equal for p in panels) else None
    head, top, body = (44 if title else 16), 0.0, []
    for first in range(0, len(panels), columns):
        row = panels[first:first + columns]
        frames = [_frame(p, side, aspect) for p in row]
        above = 18 if any(p.title for p in row) else 0
        for c, (panel, frame) in enumerate(zip(row, frames)):
            body += _draw_panel(panel, frame._replace(
                left=20 + sum(left[:c + 1]) + c * (side + 12), top=head + top + above))
        top += above + max(f.height for f in frames) + max(map(_below, row))
    # the legend stands to the right, where it covers nothing
    x, y = WIDTH - LEGEND + 6, head + 12
    for name, mark in keys.items():
        rows = textwrap.wrap(_clean(name), 22) or [""]
        body.append(mark.key(x, y))
        body += [f'<text class="small" x="{x + 15}" y="{y + 4 + 14 * i}">{_xml(line)}</text>'
                 for i, line in enumerate(rows)]
        y += 14 * len(rows) + 8
    bottom = max(head + top, y) + 10
    notes = textwrap.wrap(_clean(caption), 116)
    body += [f'<text class="note" x="20" y="{bottom + 8 + 15 * i:.2f}">{_xml(note)}</text>'
             for i, note in enumerate(notes)]
    height = round(bottom + 15 * len(notes) + 8)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {WIDTH} {height}" width="178mm" height="{178 * height / WIDTH:.2f}mm" '
        f'role="img" aria-label="{_attribute(title)}">', f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="20" y="26">{_xml(title)}</text>', *body]) + "\n</svg>\n"


def _left(panel: Panel) -> float:
    """Room for what stands left of a panel: ticks, its axis's name, a matrix's rows."""
    if isinstance(panel.marks[0], Heat):
        return 6.2 * max(map(len, panel.marks[0].rows)) - 2
    return 40 * panel.ticks + 18 * bool(panel.axes[1])


def _below(panel: Panel) -> float:
    """Room for what stands under it."""
    if isinstance(panel.marks[0], Heat):
        return 24 + 4.4 * max(map(len, panel.marks[0].columns))
    return 12 + 16 * panel.ticks + 18 * bool(panel.axes[0])


def _frame(panel: Panel, side: float, aspect: float | None = None) -> Frame:
    """The panel's limits and size, its place left open. aspect: height over width."""
    points = np.concatenate([m.extent() for m in panel.marks]) \
        if panel.frame is None else panel.frame
    if not len(points) or not all(np.isfinite(m.extent()).all() for m in panel.marks):
        raise PictureError("no points, or points that are not finite: leave those out")
    low, high = points.min(0).astype(np.float64), points.max(0).astype(np.float64)
    if isinstance(panel.marks[0], Heat):
        return Frame(0, 0, side, side * high[1] / high[0], low, high)
    half = np.maximum((high - low) / 2 * 1.06, 1e-12)
    if not panel.equal:
        half = np.where(high > low, half, np.maximum(np.abs(high), 1) / 2)
        return Frame(0, 0, side, 0.75 * side, (low + high) / 2 - half, (low + high) / 2 + half)
    # around all points with a margin, from half as tall as wide to square and a tenth
    half[0] = max(half[0], half[1] / (aspect or 1.1))
    half[1] = max(half[1], half[0] * (aspect or 0.5))
    middle = (low + high) / 2
    return Frame(0, 0, side, side * half[1] / half[0], middle - half, middle + half)


def _draw_panel(panel: Panel, f: Frame) -> list[str]:
    out, middle, end = [], f.left + f.width / 2, f.top + f.height
    heat = isinstance(panel.marks[0], Heat)
    if panel.title:
        out.append(f'<text class="panel" x="{f.left:.2f}" y="{f.top - 6:.2f}">'
                   f'{_xml(panel.title)}</text>')
    for axis in range(2) if panel.ticks and not heat else ():
        for tick in _ticks(f.low[axis], f.high[axis], 5 if f.width > 250 else 4):
            x, y = f.place(np.where(np.arange(2) == axis, tick, f.low))[0]
            label = f"{tick:.6g}".replace("-", "\u2212")
            out.append(f'<path class="grid" d="M{x:.2f} {f.top:.2f}v{f.height:.2f}"/>'
                       f'<path class="tick" d="M{x:.2f} {end:.2f}v4"/><text class="small" '
                       f'x="{x:.2f}" y="{end + 16:.2f}" text-anchor="middle">{label}</text>'
                       if axis == 0 else
                       f'<path class="grid" d="M{f.left:.2f} {y:.2f}h{f.width:.2f}"/>'
                       f'<path class="tick" d="M{f.left - 4:.2f} {y:.2f}h4"/><text class="small" '
                       f'x="{f.left - 7:.2f}" y="{y + 4:.2f}" text-anchor="end">{label}</text>')
    # what lies beyond the limits is cut off at them
    name = f"c{zlib.crc32(repr((f.left, f.top)).encode()):08x}"
    out.append(f'<clipPath id="{name}"><rect x="{f.left:.2f}" y="{f.top:.2f}" '
               f'width="{f.width:.2f}" height="{f.height:.2f}"/></clipPath>')
    drawn = [line for mark in panel.marks for line in mark.draw(f)]
    out += drawn if heat else [f'<g clip-path="url(#{name})">', *drawn, "</g>"]
    out.append(f'<rect class="frame" x="{f.left:.2f}" y="{f.top:.2f}" width="{f.width:.2f}" '
               f'height="{f.height:.2f}"/>')
    for text, where in ((panel.axes[0], f'x="{middle:.2f}" '
                         f'y="{end + 14 + 18 * panel.ticks:.2f}"'),
                        (panel.axes[1], f'transform="translate('
                         f'{f.left - 8 - 39 * panel.ticks:.2f} {f.top + f.height / 2:.2f}) '
                         'rotate(-90)"')):
        if text:
            out.append(f'<text class="small" {where} text-anchor="middle">{_xml(text)}</text>')
    return out


def _path(at: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in at)


def _line(at: np.ndarray, kind: str, more: str = "") -> str:
    return f'<path class="{kind}"{more} d="{_path(at)}"/>'


def _arrow(at: np.ndarray, kind: str, more: str = "", colour: str = "") -> str:
    """A line between two places with a head at the second; where they meet there is none."""
    step = at[1] - at[0]
    length = math.hypot(*step)
    if length < 1:
        return ""
    along, size = step / length, min(6.0, length)
    base, across = at[1] - size * along, np.array([-along[1], along[0]]) * size * 0.42
    fill = f' style="fill:{colour};fill-opacity:1"' if colour else ""
    return _line(at, kind, more) + f'<path class="head"{fill} ' \
        f'd="{_path(np.stack([at[1], base + across, base - across]))}Z"/>'


SHAPES = {"square": "M-3.8 -3.8h7.6v7.6h-7.6Z", "diamond": "M0 -5.2L5.2 0L0 5.2L-5.2 0Z",
          "triangle": "M0 -5L4.8 3.6H-4.8Z"}


def _marker(x: float, y: float, s: Points) -> str:
    look = f'class="halo" fill-opacity=".75" stroke="{s.colour}" stroke-width="1.6"' \
        if s.hollow else f'fill="{s.colour}" stroke="#fff" stroke-width=".7"'
    if s.shape == "circle":
        return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{4.2 * s.size:.2f}" {look}/>'
    return f'<path transform="translate({x:.2f} {y:.2f}) scale({s.size:g})" ' \
        f'd="{SHAPES[s.shape]}" {look}/>'


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# --------------------------------------------------------------------------------------------------
# rasters


# matplotlib's viridis at nine places (Smith and van der Walt, CC0)
VIRIDIS = np.array([(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
                    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)], float)


def viridis(share: float) -> str:
    """From 0, dark violet, to 1, yellow, as #rrggbb."""
    return "#%02x%02x%02x" % tuple(_viridis(share))


def _viridis(share: float) -> list[int]:
    at = np.clip(share, 0, 1) * (len(VIRIDIS) - 1)
    return [round(float(np.interp(at, np.arange(len(VIRIDIS)), channel))) for channel in VIRIDIS.T]


def density_png(x: np.ndarray, y: np.ndarray, width: int, height: int,
                colour: str | None = GREY, scale: int = 2) -> bytes:
    """Points at pixels (x, y) of a plot -> a palette PNG of their log density, each point a small
    disc; with no colour in viridis. Points outside of the plot are left out.

    Transparent where nothing is, so it stands on a light and on a dark page alike."""
    inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    count = np.zeros((height * scale, width * scale))
    row, column = (np.clip((v[inside] * scale).astype(np.int64), 0, n - 1)
                   for v, n in zip((y, x), count.shape))
    np.add.at(count, (row, column), 1)
    crowd = len(x) * (500 / max(width, 1)) ** 2  # small panels fill earlier
    radius = 3 if crowd < 20_000 else 2 if crowd < 60_000 else 1
    spread = np.zeros_like(count)
    padded = np.pad(count, radius)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dx * dx + dy * dy <= radius * radius + 1:
                spread += padded[radius + dy:radius + dy + len(count),
                                 radius + dx:radius + dx + count.shape[1]]
    level = np.log1p(spread)
    level = np.ceil(15 * level / max(level.max(), 1e-9)).astype(np.uint8)  # 0 is empty, 1 to 15
    shares = np.arange(16) / 15
    if colour:
        palette = bytes(int(colour[i:i + 2], 16) for i in (1, 3, 5)) * 16
        alpha = bytes([0] + [int(80 + 140 * s) for s in shares[1:]])
    else:
        palette = bytes(channel for s in shares for channel in _viridis(s))
        alpha = bytes([0] + [255] * 15)
    return png(level, palette, alpha)


def png(index: np.ndarray, palette: bytes, alpha: bytes) -> bytes:
    """A palette PNG of four bits a pixel: index (height, width) below 16, palette 3 bytes and alpha
    1 byte a colour."""
    height, width = index.shape
    index = np.pad(index, ((0, 0), (0, width % 2)))
    rows = (index[:, ::2] << 4 | index[:, 1::2]).astype(np.uint8)
    # filter 0 before every row
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette)
            + chunk(b"tRNS", alpha) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))


# --------------------------------------------------------------------------------------------------
# a terminal


def braille(background: np.ndarray, series: list[tuple[str, np.ndarray]], columns: int = 76,
            rows: int = 24) -> str:
    """A picture in characters: background (N, 2) as braille dots, eight a character, and on it the
    points (m, 2) of each series as its letter. Both axes have one scale, if a character is twice
    as tall as wide."""
    points = np.concatenate([background, *(p for _, p in series)])
    frame = _frame(Panel([Points("", points)]), 2.0 * columns, 2 * rows / columns)
    cells = np.zeros((4 * rows, 2 * columns), bool)

    def place(x):
        at = frame.place(x).astype(np.int64)
        return at[:, 1].clip(0, 4 * rows - 1), at[:, 0].clip(0, 2 * columns - 1)

    cells[place(background)] = True
    # the dots' bits: down the left column, down the right one, then the two of the last row
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    codes = (cells.reshape(rows, 4, columns, 2) * bits[:, None]).sum((1, 3))
    text = [[chr(0x2800 + c) if c else " " for c in row] for row in codes]
    for letter, x in series:
        y, x = place(x)
        for r, c in zip(y // 4, x // 2):
            text[r][c] = letter
    return "\n".join("".join(row).rstrip() for row in text).strip("\n")


# --------------------------------------------------------------------------------------------------
# hostile text


def _clean(text: str) -> str:
    """Without what XML forbids: control characters, surrogates, U+FFFE and U+FFFF. They
    are shown as U+FFFD."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def _xml(text: str) -> str:
    return escape(_clean(text))


def visible(text: str) -> str:
    """A token's text as it is read: a space in front as U+2423, line breaks, controls, directions
    and invisible characters as escapes."""
    def escape_(c: str) -> str:
        return c.encode("unicode_escape").decode() if unicodedata.category(c) in (
            "Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else c
    return "".join(map(escape_, re.sub("^ | $", "\u2423", text)))


def _attribute(text: str) -> str:
    return escape(_clean(text), {'"': "&quot;"})


# --------------------------------------------------------------------------------------------------
# an explorable page


def page(template: str, data: dict) -> str:
    """One self-contained HTML page: a template with @TITLE@, @CSP@ and @DATA@ in it, filled.

    data: dicts, lists, texts, numbers and arrays, and its "title". Arrays of floats are quantised
    to 16 bits between their least and greatest value, those of whole numbers, which may not be
    negative, are kept; with the rest as JSON they are one gzipped block in base64, whose alphabet
    can end no script:

        4 bytes, the length of the JSON | JSON | arrays, each at a multiple of 4 bytes

    An array is {"$array": [place, shape, bytes a number, least, step]} in the JSON, a value that is
    not finite null. The page's script and style are allowed by their hashes and nothing else is."""
    blocks, place = [], 0

    def plain(value):
        nonlocal place
        if isinstance(value, dict):
            if "$array" in value:
                raise PictureError("data with a key '$array', which stands for arrays: rename it")
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, np.ndarray):
            at, (number, low, step) = place, _quantised(value)
            blocks.append(number.tobytes() + bytes(-number.nbytes % 4))
            place += len(blocks[-1])
            return {"$array": [at, list(value.shape), number.itemsize, low, step]}
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(data), separators=(",", ":"), default=str).encode()
    text += b" " * (-len(text) % 4)
    block = gzip.compress(len(text).to_bytes(4, "little") + text + b"".join(blocks), 9, mtime=0)
    template = template.replace("\r\n", "\n")  # as a browser reads it before it makes the hash
    allowed = {kind: base64.b64encode(hashlib.sha256(re.search(
        f"<{kind}>(.*?)</{kind}>", template, re.DOTALL)[1].encode()).digest()).decode()
        for kind in ("script", "style")}
    fill = {"TITLE": html.escape("".join(
                c if c.isprintable() else "\ufffd" for c in str(data.get("title", "")))),
            "CSP": "default-src 'none'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
                   + "; ".join(f"{kind}-src 'sha256-{h}'" for kind, h in allowed.items()),
            "DATA": base64.b64encode(block).decode()}
    return re.sub("@(TITLE|CSP|DATA)@", lambda m: fill[m[1]], template)


def _quantised(x: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Numbers of 1, 2 or 4 bytes, and the least value and the step that make x of them."""
    if not x.size:
        return x.astype("<u2"), 0.0, 1.0
    if x.dtype.kind in "bui":
        if x.min() < 0 or x.max() >= 2**32:
            raise PictureError("whole numbers below 0 or from 2**32 on cannot go into a page")
        return x.astype(next(t for t, top in (("<u1", 2**8), ("<u2", 2**16), ("<u4", 2**32))
                             if x.max() < top)), 0.0, 1.0
    if not np.isfinite(x).all():
        raise PictureError("values that are not finite cannot go into a page: leave them out")
    low, high = float(x.min()), float(x.max())
    step = (high - low) / 65535 or 1.0
    return np.rint((x.astype(np.float64) - low) / step).astype("<u2"), low, step
