"""viz.py against numpy's SVD, and its pictures against parsers."""

import base64
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

import viz

R = np.random.default_rng(0)
CLOUD = (R.normal(size=(900, 20)) * np.linspace(5, 0.1, 20) @ R.normal(size=(20, 20)) + 7
         ).astype(np.float32)


@pytest.mark.parametrize("block", [8192, 100])
def test_pca_equals_svd(block):
    plane = viz.pca(CLOUD, k=20, block=block)
    x = CLOUD.astype(np.float64) - CLOUD.astype(np.float64).mean(0)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(plane.explained, s**2 / (s**2).sum(), atol=1e-10)
    np.testing.assert_allclose(np.abs((plane.components * vt).sum(1)), 1, atol=1e-6)
    np.testing.assert_allclose(np.abs(viz.project(plane, CLOUD)), np.abs(x @ vt.T),
                               atol=1e-6 * s[0])
    assert (np.take_along_axis(
        plane.components, np.abs(plane.components).argmax(1)[:, None], 1) > 0).all()


def test_pca_of_fewer_points_than_dimensions():
    plane = viz.pca(CLOUD[:5])
    assert plane.components.shape == (2, 20) and 0 < plane.explained.sum() <= 1


@pytest.mark.parametrize("x", [np.full((9, 3), np.nan), np.ones((1, 3)), np.ones((5, 1))])
def test_pca_refuses(x):
    with pytest.raises(viz.PictureError):
        viz.pca(x)


def read_png(content):
    """(height, width) palette indices, palette (16, 3), alpha (16,); checks every CRC."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at:at + 8])
        chunks[kind] = content[at + 8:at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length:at + 12 + length])[0] == zlib.crc32(
            kind + chunks[kind])
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (4, 3)
    raw = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)[:, 1:]
    index = np.stack((raw >> 4, raw & 15), axis=2).reshape(height, -1)[:, :width]
    return (index, np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3),
            np.frombuffer(chunks[b"tRNS"], np.uint8))


@pytest.mark.parametrize("width", [6, 7])
def test_png(width):
    index = R.integers(0, 16, (5, width)).astype(np.uint8)
    found, palette, alpha = read_png(viz.png(index, bytes(range(48)), bytes(range(16))))
    assert (found == index).all() and palette[15].tolist() == [45, 46, 47] and alpha[15] == 15


def test_density_shows_where_points_are():
    index, _, alpha = read_png(viz.density_png(
        np.array([10.0] * 50 + [80.0]), np.array([20.0] * 50 + [90.0]), 100, 100))
    assert index[40, 20] == 15 and 0 < index[180, 160] < 15 and index[100, 100] == 0 \
        and alpha[0] == 0


HOSTILE = '</text><script>alert("1")</script> & \x00\x1b[31m \ud800 \u202e ]]> <!--'


def figure(N=900, name="vocabulary", caption="c"):
    cloud = R.normal(size=(N, 2))
    start, end = R.normal(size=(20, 2)), 2 * R.normal(size=(20, 2))
    return viz.scatter(cloud, name, [viz.Series(name, start, viz.BLUE, True),
                                     viz.Series("trained rows", end)],
                       ("PC1", name), (start, end), title=name, caption=caption)


def test_figure_parses_and_stays_in_its_frame():
    root = ET.fromstring(figure())
    circles = root.findall("{*}circle")
    assert len(circles) == 20 + 20 + 2 and len(
        [p for p in root.findall("{*}path") if p.get("class") == "path"]) == 21
    frame = next(r for r in root.findall("{*}rect") if r.get("class") == "frame")
    x, y, width, height = (float(frame.get(k)) for k in ("x", "y", "width", "height"))
    inside = [c for c in circles
              if x <= float(c.get("cx")) <= x + width and y <= float(c.get("cy")) <= y + height]
    assert len(inside) == 40  # the two others are the legend's, and it stands outside the data
    image = root.find("{*}image").get("{http://www.w3.org/1999/xlink}href").removeprefix(
        "data:image/png;base64,")
    index, _, _ = read_png(base64.b64decode(image))
    assert index.max() == 15


def test_hostile_text_stays_text():
    svg = figure(name=HOSTILE, caption=HOSTILE * 9)
    root = ET.fromstring(svg)
    assert not root.findall(".//{*}script") and "alert" in "".join(root.itertext())
    svg.encode()  # no lone surrogate is left
    assert not re.search("[\x00-\x08\x0b-\x1f]", svg)


def test_figure_is_small_and_reproducible():
    global R
    sizes = []
    for N in (500, 128_000):
        R = np.random.default_rng(1)
        first = figure(N)
        R = np.random.default_rng(1)
        assert figure(N) == first
        sizes.append(len(first))
    assert max(sizes) < 300_000


@pytest.mark.parametrize("w, h", [(10.0, 1.0), (1.0, 10.0), (3.0, 3.0)])
def test_equal_scale_on_both_axes(w, h):
    corners = np.array([[0.0, 0.0], [w, h]])
    svg = viz.scatter(corners, "b", [viz.Series("s", corners)], ("x", "y"))
    root = ET.fromstring(svg)
    (x0, y0), (x1, y1) = [(float(c.get("cx")), float(c.get("cy")))
                          for c in root.findall("{*}circle")][:2]
    assert (x1 - x0) / (y0 - y1) == pytest.approx(w / h, rel=0.01)
    assert 300 < float(root.get("viewBox").split()[3]) < 700


def test_one_point_and_nothing():
    one = np.zeros((1, 2))
    ET.fromstring(viz.scatter(one, "one", [viz.Series("s", one)], ("x", "y")))
    with pytest.raises(viz.PictureError):
        viz.scatter(np.full((3, 2), np.inf), "x", [], ("x", "y"))


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1e-9), (12345.0, 12350.0), (-3e7, 5e8)])
def test_ticks(low, high):
    ticks = viz._ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= t <= high for t in ticks)
