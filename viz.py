"""Pictures of embeddings: arrays and labels in, coordinates and SVG text out. Needs numpy alone.

    plane = pca(vocabulary)                               # fitted on the reference only
    svg = scatter(project(plane, vocabulary), "vocabulary",
                  [Series("prior draw", project(plane, start), hollow=True),
                   Series("trained", project(plane, end))],
                  lines=(project(plane, start), project(plane, end)), axes=axis_names(plane),
                  title="Layer 0")

It returns strings and writes nothing; every text is escaped. The picture is readable on paper, on a
light and on a dark page, and in grey: colours are Okabe and Ito's, kinds also differ by shape.
"""

from __future__ import annotations

import base64
import math
import re
import struct
import textwrap
import zlib
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe and Ito's; told apart by everybody, in grey by shape


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
# a figure


class Series(NamedTuple):
    """Foreground points."""

    name: str
    points: np.ndarray  # (m, 2)
    colour: str = VERMILION
    hollow: bool = False


GREY = "#7a8799"  # the background's, on light and on dark
STYLE = """text{font-family:Helvetica,Arial,sans-serif;fill:#222;font-size:13px}
.paper{fill:#fff}.frame,.tick{stroke:#888;fill:none}.grid{stroke:#888;stroke-opacity:.15}
.path{stroke:#555;stroke-opacity:.55;stroke-width:1}.note{font-size:11px;fill:#555}\
.title{font-size:16px;font-weight:bold}
.halo{fill:#fff}
@media (prefers-color-scheme:dark){text{fill:#ddd}.paper,.halo{fill:#16181c}.note{fill:#aaa}\
.path{stroke:#ccc}.halo[stroke="#0072B2"]{stroke:#56B4E9}}"""


def scatter(background: np.ndarray, background_name: str, series: list[Series],
            axes: tuple[str, str], lines: tuple[np.ndarray, np.ndarray] | None = None,
            title: str = "", caption: str = "") -> str:
    """An SVG figure: background (N, 2) as a raster of log density, series in front, and a line
    from each row of lines[0] (m, 2) to the same row of lines[1]. Both axes have one scale. The
    caption carries the provenance."""
    points = np.concatenate([background, *(s.points for s in series)])
    if not len(points) or not np.isfinite(points).all():
        raise PictureError("no points, or points that are not finite: leave those out")
    left, top, side = 70, 44, 460  # the legend stands to the right, where it covers nothing
    low, high = _limits(points)
    scale = side / (high[0] - low[0])
    tall = round((high[1] - low[1]) * scale)
    x_of = lambda v: left + (np.asarray(v) - low[0]) * scale
    y_of = lambda v: top + tall - (np.asarray(v) - low[1]) * scale

    notes = textwrap.wrap(_clean(caption), 116)
    width, height = 720, top + tall + 58 + 15 * len(notes)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="0 0 {width} {height}" width="178mm" height="{178 * height / width:.2f}mm" '
           f'role="img" aria-label="{_attribute(title)}">',
           f"<style>{STYLE}</style>", f'<rect class="paper" width="{width}" height="{height}"/>',
           f'<text class="title" x="{left}" y="26">{_clean_xml(title)}</text>']
    for axis, place in ((0, x_of), (1, y_of)):
        for tick in _ticks(low[axis], high[axis]):
            p, label = float(place(tick)), f"{tick:.6g}".replace("-", "\u2212")
            if axis == 0:
                out.append(f'<path class="grid" d="M{p:.2f} {top}v{tall}"/>'
                           f'<path class="tick" d="M{p:.2f} {top + tall}v5"/><text x="{p:.2f}" '
                           f'y="{top + tall + 19}" text-anchor="middle">{label}</text>')
            else:
                out.append(f'<path class="grid" d="M{left} {p:.2f}h{side}"/>'
                           f'<path class="tick" d="M{left - 5} {p:.2f}h5"/><text x="{left - 9}" '
                           f'y="{p + 4:.2f}" text-anchor="end">{label}</text>')
    image = base64.b64encode(density_png(
        x_of(background[:, 0]) - left, y_of(background[:, 1]) - top, side, tall)).decode()
    out.append(f'<image x="{left}" y="{top}" width="{side}" height="{tall}" '
               f'xlink:href="data:image/png;base64,{image}"/>')
    if lines is not None:
        for (xa, ya), (xb, yb) in zip(*lines):
            out.append(f'<path class="path" d="M{x_of(xa):.2f} {y_of(ya):.2f}'
                       f'L{x_of(xb):.2f} {y_of(yb):.2f}"/>')
    for s in series:
        out += [_marker(x, y, s) for x, y in zip(x_of(s.points[:, 0]), y_of(s.points[:, 1]))]
    out.append(f'<rect class="frame" x="{left}" y="{top}" width="{side}" height="{tall}"/>')
    out.append(f'<text x="{left + side / 2}" y="{top + tall + 40}" text-anchor="middle">'
               f'{_clean_xml(axes[0])}</text>')
    out.append(f'<text transform="translate(20 {top + tall / 2}) rotate(-90)" '
               f'text-anchor="middle">{_clean_xml(axes[1])}</text>')
    x, y = left + side + 22, top + 12
    swatch = f'<rect x="{x - 6}" y="{y - 6}" width="12" height="12" rx="2" fill="{GREY}" ' \
        f'fill-opacity=".55"/>'
    for name, s in [(background_name, None), *((s.name, s) for s in series)]:
        rows = textwrap.wrap(_clean(name), 19) or [""]
        out.append(_marker(x, y, s) if s else swatch)
        out += [f'<text x="{x + 14}" y="{y + 4.5 + 15 * i}">{_clean_xml(row)}</text>'
                for i, row in enumerate(rows)]
        y += 15 * len(rows) + 9
    if lines is not None:
        out.append(f'<path class="path" d="M{x - 7} {y}h14"/>'
                   f'<text x="{x + 14}" y="{y + 4.5}">start to end</text>')
    for i, note in enumerate(notes):
        out.append(f'<text class="note" x="{left - 50}" y="{top + tall + 64 + 15 * i}">'
                   f'{_clean_xml(note)}</text>')
    return "\n".join(filter(None, out)) + "\n</svg>\n"


def _marker(x: float, y: float, s: Series) -> str:
    fill = f'class="halo" fill-opacity=".75" stroke="{s.colour}" stroke-width="1.6"' \
        if s.hollow else f'fill="{s.colour}" stroke="#fff" stroke-width=".7"'
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="4.2" {fill}/>'


def _limits(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A frame around all points with a margin, from half as tall as wide to square and a tenth."""
    low, high = points.min(0), points.max(0)
    half = np.maximum((high - low) / 2 * 1.06, 1e-12)
    half[0] = max(half[0], half[1] / 1.1)
    half[1] = max(half[1], half[0] / 2)
    middle = (low + high) / 2
    return middle - half, middle + half


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def density_png(x: np.ndarray, y: np.ndarray, width: int, height: int, scale: int = 2) -> bytes:
    """Points at pixels (x, y) of a plot -> a palette PNG of their log density, each point
    a small disc.

    Transparent where nothing is, so it stands on a light and on a dark page alike."""
    count = np.zeros((height * scale, width * scale))
    row, column = (np.clip((v * scale).astype(np.int64), 0, n - 1)
                   for v, n in zip((y, x), count.shape))
    np.add.at(count, (row, column), 1)
    radius = 3 if len(x) < 20_000 else 2 if len(x) < 60_000 else 1
    spread = np.zeros_like(count)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dx * dx + dy * dy <= radius * radius + 1:
                spread += np.roll(count, (dy, dx), (0, 1))
    level = np.log1p(spread)
    level = np.ceil(15 * level / max(level.max(), 1e-9)).astype(np.uint8)  # 0 is empty, 1 to 15
    red, green, blue = (int(GREY[i:i + 2], 16) for i in (1, 3, 5))
    palette = bytes((red, green, blue)) * 16
    alpha = bytes([0] + [int(100 + 130 * i / 15) for i in range(1, 16)])
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
# hostile text


def _clean(text: str) -> str:
    """Without what XML forbids: control characters, surrogates, U+FFFE and U+FFFF. They
    are shown as U+FFFD."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def _clean_xml(text: str) -> str:
    return escape(_clean(text))


def _attribute(text: str) -> str:
    return escape(_clean(text), {'"': "&quot;"})
