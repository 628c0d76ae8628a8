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
    pixels, palette, alpha = read_png(viz.png(index, bytes(range(48)), bytes(range(16))))
    assert (pixels == index).all() and palette[15].tolist() == [45, 46, 47] and alpha[15] == 15


def test_density_shows_where_points_are():
    index, _, alpha = read_png(viz.density_png(
        np.array([10.0] * 50 + [80.0]), np.array([20.0] * 50 + [90.0]), 100, 100))
    assert index[40, 20] == 15 and 0 < index[180, 160] < 15 and index[100, 100] == 0 \
        and alpha[0] == 0


HOSTILE = '</text><script>alert("1")</script> & \x00\x1b[31m \ud800 \u202e ]]> <!--'


def figure(N=900, name="vocabulary", caption="c", seed=0):
    r = np.random.default_rng(seed)
    cloud, start, end = r.normal(size=(N, 2)), r.normal(size=(20, 2)), 2 * r.normal(size=(20, 2))
    return viz.figure([viz.Panel([
        viz.Cloud(name, cloud), viz.Arrows(name + " moved", start, end),
        viz.Points("prior " + name, start, viz.BLUE, True, labels=(name,) * 20),
        viz.Points("trained rows", end, shape="square")], ("PC1", name), name)], name, caption)


def test_figure_parses_and_its_legend_covers_nothing():
    root = ET.fromstring(figure())
    inside, = root.findall("{*}g")
    assert len(inside.findall("{*}circle")) == 20 and len(root.findall("{*}circle")) == 1
    lines = [p for p in inside.findall("{*}path") if p.get("class") == "path"]
    heads = [p for p in inside.findall("{*}path") if p.get("class") == "head"]
    assert len(lines) == len(heads) == 20
    frame = next(r for r in root.findall("{*}rect") if r.get("class") == "frame")
    x, y, width, height = (float(frame.get(k)) for k in ("x", "y", "width", "height"))
    for c in inside.findall("{*}circle"):
        assert x <= float(c.get("cx")) <= x + width and y <= float(c.get("cy")) <= y + height
    assert float(root.find("{*}circle").get("cx")) > x + width  # the legend's
    image = inside.find("{*}image").get("{http://www.w3.org/1999/xlink}href").removeprefix(
        "data:image/png;base64,")
    index, _, _ = read_png(base64.b64decode(image))
    assert index.max() == 15


@pytest.mark.parametrize("name, lines", [
    ("layer 28 inputs of squad:train-v1.1-4330.jsonl",
     ["layer 28 inputs of", "squad:train-v1.1-", "4330.jsonl"]),
    ("text:c4/realnewslike_0001.txt", ["text:c4/realnewslike_", "0001.txt"]),
    ("vocabulary of math:algebra_linear", ["vocabulary of math:", "algebra_linear"])])
def test_a_legend_breaks_names_of_files_where_their_parts_end(name, lines):
    cloud = np.random.default_rng(0).normal(size=(50, 2))
    legend = [t.text for t in texts(viz.figure([viz.Panel([viz.Cloud(name, cloud)])]), "small")]
    assert legend[-len(lines):] == lines


def test_marks_stand_where_their_numbers_say():
    x = np.array([0.0, 1.0, 2.0])
    panel = viz.Panel([viz.Curve("a", x, x**2, x**2 - 1, x**2 + 1, dots=True)], equal=False,
                      frame=np.array([(0.0, -1.0), (2.0, 5.0)]))
    root = ET.fromstring(viz.figure([panel]))
    frame = next(r for r in root.findall("{*}rect") if r.get("class") == "frame")
    left, top, width, height = (float(frame.get(k)) for k in ("x", "y", "width", "height"))
    circles = root.find("{*}g").findall("{*}circle")
    for c, u in zip(circles, x, strict=True):  # the frame has a margin of 6 % of half the range
        share = 0.5 + (np.array([u - 1, u**2 - 2]) / (1, 3)) / 2.12
        assert float(c.get("cx")) == pytest.approx(left + share[0] * width, abs=0.02)
        assert float(c.get("cy")) == pytest.approx(top + (1 - share[1]) * height, abs=0.02)


def test_heat_colours_every_number():
    values = np.array([[np.nan, 0.0], [1.0, 0.5]])
    root = ET.fromstring(viz.figure([viz.Panel([viz.Heat(values, ("r0", "r1"), ("c0", "c1"))])]))
    fills = [r.get("fill") for r in root.findall("{*}rect") if r.get("fill")]
    assert fills == [viz.viridis(0), viz.viridis(1), viz.viridis(0.5)] and fills[0] == "#440154"
    cells = [t.text for t in root.findall("{*}text") if t.get("class") == "cell"]
    assert cells == ["0.00", "1.00", "0.50"]
    percents = viz.Heat(100 * values, ("r0", "r1"), ("c0", "c1"), 0, 100)
    svg = viz.figure([viz.Panel([percents], ("columns", "rows"))])
    assert [t.text for t in texts(svg, "cell")] == ["0.0", "100.0", "50.0"]


@pytest.mark.parametrize("columns, slanted", [(("squad", "math"), False),
                                              (("a name of some length" * 3, "b"), True)])
def test_a_matrix_names_its_axes_outside_of_its_names(columns, slanted):
    heat = viz.Heat(np.eye(2), ("one row", "another"), columns)
    svg = viz.figure([viz.Panel([heat], ("columns", "rows"))], caption="c")
    found = {t.text: t for t in texts(svg, "small")}
    frame = next(r for r in ET.fromstring(svg).findall("{*}rect") if r.get("class") == "frame")
    left, top, height = (float(frame.get(k)) for k in ("x", "y", "height"))
    turned = found["rows"].get("transform")
    assert float(turned[10:].split()[0]) < left - 6 - 6 * len("another") and "-90" in turned
    assert all(("rotate" in (found[name].get("transform") or "")) == slanted for name in columns)
    under = float(found["columns"].get("y")) - top - height
    assert under > (150 if slanted else 24)
    assert float(texts(svg, "note")[0].get("y")) > float(found["columns"].get("y")) + 10


def test_arrows_reach_from_rim_to_rim():
    """Their heads stand outside of the markers, and markers that touch have none."""
    start = np.array([[0.0, 0.0], [0.0, 1.0]])
    end = np.array([[10.0, 5.0], [0.1, 1.0]])
    root = ET.fromstring(viz.figure([viz.Panel([
        viz.Arrows("", start, end), viz.Points("", start), viz.Points("", end)])]))
    inside = root.find("{*}g")
    places = [np.array([float(c.get("cx")), float(c.get("cy"))]) for c in inside.findall("{*}circle")]
    line, = (p.get("d") for p in inside.findall("{*}path") if p.get("class") == "path")
    tail, tip = (np.array(point.split(), float) for point in line[1:].split("L"))
    for point, middle in ((tail, places[0]), (tip, places[2])):
        assert np.linalg.norm(point - middle) == pytest.approx(viz.RIM, abs=0.02)
    assert np.linalg.norm(tip - tail) == pytest.approx(
        np.linalg.norm(places[2] - places[0]) - 2 * viz.RIM, abs=0.02)


def test_ticks_stand_at_given_places():
    k = np.array([1, 4, 16])
    curve = viz.Curve("a", np.log2(k), np.array([5.0, 6.0, 8.0]), dots=True, shape="square")
    places = tuple((np.log2(i), f"<{i}>") for i in k)
    svg = viz.figure([viz.Panel([curve], ("k", "y"), equal=False, places=places)])
    assert [t.text for t in texts(svg, "small")][:4] == ["<1>", "<4>", "<16>", "5"]
    middles = [float(t.get("x")) for t in texts(svg, "small")[:3]]
    squares = ET.fromstring(svg).find("{*}g").findall("{*}path")[1:]
    assert [float(s.get("transform")[10:].split()[0]) for s in squares] == middles


def test_curves_are_told_apart_by_shape_and_a_faint_one_stands_back():
    x = np.arange(3.0)
    root = ET.fromstring(viz.figure([viz.Panel([
        viz.Curve("a", x, x, faint=True), viz.Curve("b", x, x, dots=True, shape="diamond")])]))
    pale, line, *dots = root.find("{*}g").findall("{*}path")
    assert float(pale.get("stroke-opacity")) < .6 and line.get("stroke-opacity") is None
    assert [d.get("d") for d in dots] == [viz.SHAPES["diamond"]] * 3


def test_panels_of_a_grid_do_not_overlap():
    clouds = [np.random.default_rng(i).normal(size=(50, 2)) * [1, i] for i in range(1, 8)]
    root = ET.fromstring(viz.figure([viz.Panel([viz.Cloud("c", c, None)], ("x", ""), f"layer {i}",
                                               ticks=False) for i, c in enumerate(clouds)]))
    boxes = [tuple(float(r.get(k)) for k in ("x", "y", "width", "height"))
             for r in root.findall("{*}rect") if r.get("class") == "frame"]
    assert len(boxes) == 7 and len({b[2:] for b in boxes}) == 1  # one shape
    for i, (x, y, w, h) in enumerate(boxes):
        assert 0 <= x and x + w <= viz.WIDTH - viz.LEGEND
        for u, v, _, _ in boxes[:i]:
            assert abs(x - u) >= w or abs(y - v) >= h + 20
    assert len(root.findall(".//{*}image")) == 7


def test_labels_do_not_cover_one_another():
    points = np.random.default_rng(0).normal(size=(60, 2)) / 5
    root = ET.fromstring(viz.figure([viz.Panel([viz.Points("p", points,
                                                           labels=("word",) * 60)])]))
    at = np.array([(float(t.get("x")), float(t.get("y"))) for t in root.iter(
        "{http://www.w3.org/2000/svg}text") if t.get("class") == "label"])
    assert 5 < len(at) < 60
    apart = np.abs(at[:, None] - at)[np.triu_indices(len(at), 1)]
    assert ((apart[:, 0] >= 24) | (apart[:, 1] >= 10)).all()


def test_hostile_text_stays_text():
    svg = figure(name=HOSTILE, caption=HOSTILE * 9)
    root = ET.fromstring(svg)
    assert not root.findall(".//{*}script") and "alert" in "".join(root.itertext())
    svg.encode()  # no lone surrogate is left
    assert not re.search("[\x00-\x08\x0b-\x1f]", svg)


def test_visible():
    assert viz.visible(" the") == "\u2423the" and viz.visible("a b ") == "a b\u2423"
    assert viz.visible("\n\x1b[31m\u202e\ud800\u200b") == r"\n\x1b[31m\u202e\ud800\u200b"


@pytest.mark.parametrize("N", [500, 128_000])
def test_figure_is_small_and_reproducible(N):
    first = figure(N)
    assert figure(N) == first and len(first) < 300_000


@pytest.mark.parametrize("w, h", [(10.0, 1.0), (1.0, 10.0), (3.0, 3.0)])
def test_equal_scale_on_both_axes(w, h):
    corners = np.array([[0.0, 0.0], [w, h]])
    svg = viz.figure([viz.Panel([viz.Cloud("b", corners), viz.Points("s", corners)], ("x", "y"))])
    root = ET.fromstring(svg)
    (x0, y0), (x1, y1) = [(float(c.get("cx")), float(c.get("cy")))
                          for c in root.find("{*}g").findall("{*}circle")]
    assert (x1 - x0) / (y0 - y1) == pytest.approx(w / h, rel=0.01)
    assert 250 < float(root.get("viewBox").split()[3]) < 700


def texts(svg, kind):
    return [t for t in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
            if t.get("class") == kind]


def test_table_stands_between_panels_and_caption():
    panels = [viz.Panel([viz.Cloud("c", np.random.default_rng(0).normal(size=(50, 2)))])]
    table = {"step": 12.3456, "half": 0.5, "tiny": 1.234e-5, "below": -2.0, "rows": 49152,
             "parameters": 123456.7, "large": 12345678.9, "none": np.nan, "share": np.float32(1),
             "model": "<tiny> & more", HOSTILE: "x" * 500}
    svg = viz.figure(panels, "t", "caption", table=table)
    names, values = texts(svg, "note")[:-1], texts(svg, "small")[-len(table):]
    assert [t.text for t in names][:-1] == list(table)[:-1]
    assert [t.text for t in values] == [
        "12.3", "0.500", "1.23e\u221205", "\u22122.00", "49152", "123457", "1.23e+07", "nan",
        "1.00", "<tiny> & more", "x" * 39 + "\u2026"]

    # below the panels and above the caption, within the page, and no name covers a value
    places = [(float(n.get("x")), float(v.get("x")), float(n.get("y"))) for n, v in zip(
        names, values)]
    frame, = (r for r in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
              if r.get("class") == "frame")
    caption = texts(svg, "note")[-1]
    assert caption.text == "caption"
    for (left, right, y), n, v in zip(places, names, values):
        assert float(frame.get("y")) + float(frame.get("height")) < y < float(caption.get("y"))
        assert 20 <= left < right <= viz.WIDTH - 20
        assert right - left >= 6 * (len(n.text) + len(v.text))
    assert len(set(places)) == len(table)


@pytest.mark.parametrize("count, columns", [(1, 2), (3, 7)])
def test_fewer_panels_than_columns_take_the_whole_width(count, columns):
    panels = [viz.Panel([viz.Curve("a", np.arange(3.0), np.arange(3.0))], equal=False)] * count
    assert viz.figure(panels, columns=columns) == viz.figure(panels, columns=count)


@pytest.mark.parametrize("value, text", [(999.6, "1000"), (999.5, "1000"), (-999.7, "\u22121000"),
                                         (999.4, "999"), (99.96, "100"), (1234.5, "1234")])
def test_a_number_that_rounds_to_a_thousand_is_written_as_one(value, text):
    marks = [viz.Curve("", np.arange(3.0), np.arange(3.0))]
    svg = viz.figure([viz.Panel(marks, equal=False)], table={"name": value})
    assert text in [t.text for t in ET.fromstring(svg).findall("{*}text")]


def test_table_fills_columns_side_by_side():
    panels = [viz.Panel([viz.Cloud("", np.eye(2))])]
    svg = viz.figure(panels, table={f"n{i}": i / 7 for i in range(30)})
    columns = {t.get("x") for t in texts(svg, "note")}
    assert len(columns) == 8 and len({t.get("y") for t in texts(svg, "note")}) == 4
    assert viz.figure(panels, table={}) == viz.figure(panels)


def test_one_point_and_nothing():
    one = np.zeros((1, 2))
    ET.fromstring(viz.figure([viz.Panel([viz.Cloud("one", one), viz.Points("s", one)])]))
    for bad in ([], [viz.Panel([])], [viz.Panel([viz.Cloud("x", np.full((3, 2), np.inf))])]):
        with pytest.raises(viz.PictureError):
            viz.figure(bad)


def test_braille():
    # corners of the plot are corners of the text: one dot each, bit by bit
    corners = np.array([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
    text = viz.braille(corners, [("#", np.array([[0.5, 0.5]]))], 20, 10)
    lines = text.split("\n")
    assert max(map(len, lines)) <= 20 and len(lines) <= 10
    dots = [(r, c, bin(ord(x) - 0x2800).count("1")) for r, line in enumerate(lines)
            for c, x in enumerate(line) if 0x2800 < ord(x) < 0x2900]
    assert len(dots) == 4 and all(n == 1 for _, _, n in dots)
    (r0, c0, _), (_, c1, _), (r1, _, _), _ = sorted(dots)
    assert r0 == 0 and r1 == len(lines) - 1
    assert c1 - c0 == pytest.approx(2 * (r1 - r0), abs=2)  # a character is twice as tall as wide
    assert [(r, c) for r, line in enumerate(lines) for c, x in enumerate(line) if x == "#"] == [
        (pytest.approx(r1 / 2, abs=1), pytest.approx((c0 + c1) / 2, abs=1))]
    # every dot of a cell has its bit
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 2).astype(float)
    assert "\u28ff" in viz.braille(grid, [], 20, 10)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1e-9), (12345.0, 12350.0), (-3e7, 5e8)])
def test_ticks(low, high):
    ticks = viz._ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= t <= high for t in ticks)
