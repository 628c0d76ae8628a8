"""Does the page that plot writes keep up with the hand? Frames a second in a real browser.

    python benchmarks/page.py                                  # a page of 128,256 random tokens
    python benchmarks/page.py --points 49135 --particles 8     # another size
    python benchmarks/page.py runs/a/report.html               # pages that are there

A page of random embeddings is made by the functions that make a run's. Headless Chromium opens it,
without a graphics card, and the page's own clock (performance.now at every requestAnimationFrame)
tells how long a frame takes while the map is dragged, zoomed by the wheel, and while the slider of
steps is moved: one event a frame, in both projections and at the deepest layer. It tells too when
the first picture stood, counted from the beginning of loading, and how long a search takes until
its results and rings are drawn. The browser shows at most 60 frames a second, 16.7 ms each.

Other work on the machine only adds to what is measured, so of --repeats turns of a motion the best
is printed, and beside it the time that the page's own thread ran (processor ms of a frame).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import viz  # noqa: E402
from browser import Browser  # noqa: E402
from lab import page  # noqa: E402
from lab.populations import Labels, Part, Reference  # noqa: E402

SEARCHES = ("e", "the", "ation", " zqxj")  # many tokens, some, few, none
# When the first frame after the page is ready has been shown.
WATCH = """
addEventListener("DOMContentLoaded", () => {
  const look = () => requestAnimationFrame(now => {
    if (document.documentElement.dataset.ready !== "yes") return look();
    requestAnimationFrame(() => { window.firstPicture = performance.now(); });
  });
  look();
});"""
# The milliseconds between so many frames, while something is done before each.
FRAMES = """
const [kind, count, done] = arguments, canvas = document.getElementById("canvas");
const box = canvas.getBoundingClientRect(), slider = document.getElementById("slider");
const middle = [box.x + box.width / 2, box.y + box.height / 2];
const pointer = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type,
  {pointerId: 1, clientX: x, clientY: y, bubbles: true}));
const act = {
  pan: i => pointer("pointermove", middle[0] + 200 * Math.sin(i / 9),
    middle[1] + 90 * Math.sin(i / 7)),
  zoom: i => canvas.dispatchEvent(new WheelEvent("wheel", {clientX: middle[0] + 40,
    clientY: middle[1], deltaY: i % 60 < 30 ? -12 : 12, cancelable: true})),
  slider: i => { slider.value = i % (+slider.max + 1); slider.dispatchEvent(new Event("input")); },
}[kind];
const frames = [];
let last = 0;
if (kind === "pan") pointer("pointerdown", ...middle);
const go = () => {
  const now = performance.now();
  if (last) frames.push(now - last);
  last = now;
  if (frames.length < count) { act(frames.length); return requestAnimationFrame(go); }
  if (kind === "pan") pointer("pointercancel", ...middle);
  done(frames);
};
setTimeout(() => requestAnimationFrame(go), 400);"""
# The milliseconds from a letter typed until its results and rings are drawn, and the results.
SEARCH = """
const [text, done] = arguments, search = document.getElementById("search");
const start = performance.now();
search.value = text; search.dispatchEvent(new Event("input"));
requestAnimationFrame(() => {
  const channel = new MessageChannel();
  channel.port1.onmessage = () => done(
    [performance.now() - start, document.getElementById("results").firstChild.textContent]);
  channel.port2.postMessage(0);
});"""
SHOW = """
const [layer, plane] = arguments, e = document.getElementById("layer");
e.value = layer; e.dispatchEvent(new Event("change"));
document.querySelector(`#projection [value=${plane}]`).click();
return [e.options[e.value].text, points().length / 2];"""


# --------------------------------------------------------------------------------------------------
# a page, made up


def random_content(points: int, deep: tuple[int, ...] = (15, 30), runs: int = 3, rows: int = 20,
                   particles: int = 1, width: int = 64, steps: int = page.SNAPSHOTS) -> dict:
    """What page.gather gives of so many runs with rows at the token embeddings, points of them, and
    at deep layers; all random."""
    r = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    share = np.linspace(2, .1, 26) / np.linspace(2, .1, 26).sum()
    texts = [" " * bool(n % 3) + "".join(word[:2 + n % 8])
             for n, word in enumerate(r.choice(letters, (points, 9), p=share))]
    maps = {}
    for i in (0, *deep):
        centres = 2 * r.normal(size=(12, width)) * np.linspace(1, .1, width)
        count = points if i == 0 else page.DEEP
        x = centres[r.integers(0, 12, count)] + r.normal(size=(count, width))
        tokens = torch.arange(count) % points
        kinds = [page.kind_of(texts[token]) for token in tokens]
        labels = Labels(tokens, kinds, ["random"] * count, torch.arange(count))
        x = torch.from_numpy(x).float()
        maps[i] = page.layer_map(i, Part(x, "random", labels), Reference([x], "random"), len(deep))
    data = {"title": f"{points} random tokens", "tokens": texts,
            "maps": [made.content for made in maps.values()], "runs": [], "scores": {}}
    for k in range(runs):
        layers = {}
        for i, made in maps.items():
            start = made.rows[r.integers(0, len(made.rows), rows * particles)]
            path = np.cumsum(.1 * r.normal(size=(steps, *start.shape)), axis=0) + start
            arrays = page.positions_on_map(path.reshape(-1, width).astype(np.float32), made)
            arrays["moved"] = np.linalg.norm(path - start, axis=2).reshape(-1)
            layers[str(i)] = {key: array.reshape(steps, -1, *array.shape[1:])
                              for key, array in arrays.items()}
        evals = [{"step": s, "split": "eval", "loss": 3 / (s + 1), "f1": 3. * s}
                 for s in range(steps)]
        data["runs"].append({
            "name": f"random {k}", "prior": "vocab", "data": "random", "posterior": "point",
            "steps": list(range(steps)), "particles": particles, "all_particles": particles,
            "curve": [[s, 3.1 / (s + 1)] for s in range(steps)], "evals": evals, "beside": {},
            "text": "", "predictions": [], "all_predictions": 0,
            "config": {"settings": {"seed": k}}, "layers": layers})
    return data


# --------------------------------------------------------------------------------------------------
# in the browser


def first_picture(browser: Browser, path: Path) -> float:
    """Open a page -> the seconds from the beginning of loading to its first picture."""
    watch = browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
    browser.open(path)
    browser.until("return window.firstPicture > 0")
    browser.cdp("Page.removeScriptToEvaluateOnNewDocument", **watch)
    return browser.js("return window.firstPicture") / 1000


def frames(browser: Browser, kind: str, count: int = 120) -> tuple[list[float], float]:
    """The milliseconds of so many frames while the map is moved, and those of processor time that
    the page's own thread spent on one: kind is pan, zoom or slider."""
    before = browser.seconds()
    milliseconds = browser.wait_for(FRAMES, kind, count)
    return milliseconds, 1000 * (browser.seconds() - before) / (count + 1)


def search(browser: Browser, text: str) -> tuple[float, str]:
    """The milliseconds until what is found of a text is drawn, and how much it is."""
    return browser.wait_for(SEARCH, text)


def measure(browser: Browser, path: Path, a: argparse.Namespace) -> None:
    """Print all of one page."""
    seconds, busy = zip(*((first_picture(browser, path), browser.seconds())
                          for _ in range(a.repeats)))
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB; first picture after "
          f"{min(seconds):.2f} to {max(seconds):.2f} s, processor {statistics.median(busy):.2f} s")
    print(f"  {'':<44}{'':>9}  frame ms, median   95th   frames/s  processor ms")
    layers = {0, browser.js("return maps.length - 1")}
    for layer, plane in product(sorted(layers), ("pca", "tsne")):
        name, points = browser.js(SHOW, layer, plane)
        for kind in ("pan", "zoom", "slider"):
            each, busy = zip(*(frames(browser, kind, a.frames) for _ in range(a.repeats)))
            best = min(each, key=statistics.median)
            middle, late = statistics.median(best), np.percentile(best, 95)
            print(f"  {f'{name}, {plane}, {int(points):,} points':<44}{kind:>9}{middle:>18.1f}"
                  f"{late:>7.1f}{1000 / middle:>11.1f}{statistics.median(busy):>13.1f}", flush=True)
    browser.js(SHOW, 0, "pca")
    for text in SEARCHES:
        spent = browser.seconds()
        times, found = zip(*(search(browser, text) for _ in range(a.repeats)))
        spent = 1000 * (browser.seconds() - spent) / a.repeats
        print(f"  search {text!r}: {min(times):.0f} to {max(times):.0f} ms, processor "
              f"{spent:.0f} ms; {found[0]}")
        search(browser, "")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("pages", nargs="*", help="pages of plot; none: one is made up")
    p.add_argument("--points", type=int, default=128_256, help="tokens of the page made up")
    p.add_argument("--runs", type=int, default=3, help="runs on it, one over the other")
    p.add_argument("--rows", type=int, default=20, help="prompt rows of a run at every layer")
    p.add_argument("--particles", type=int, default=1, help="prompts of a run")
    p.add_argument("--frames", type=int, default=120, help="of each motion")
    p.add_argument("--repeats", type=int, default=5, help="turns of each motion and search")
    p.add_argument("--width", type=int, default=1400, help="of the window")
    p.add_argument("--scale", type=float, default=1, help="pixels of the screen to one of the page")
    p.add_argument("--out", help="keep the page made up there")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = list(map(Path, a.pages))
        if not pages:
            pages = [Path(a.out or folder, f"random-{a.points}.html")]
            data = random_content(a.points, runs=a.runs, rows=a.rows, particles=a.particles)
            html = viz.page(page.TEMPLATE.read_text(encoding="utf-8"), data)
            pages[0].write_bytes(html.encode())
        with Browser(Path(folder, "browser")) as browser:
            browser.look(a.width, scale=a.scale)
            version = browser.cdp("Browser.getVersion")["product"]
            load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
            print(f"{version}, headless, no graphics card; {os.cpu_count()} processors, "
                  f"load {load}; window {a.width} wide, scale {a.scale:g}")
            for path in pages:
                measure(browser, path.resolve(), a)


if __name__ == "__main__":
    main()
