"""A real browser for what must be seen in one: headless Chromium, where it is installed.

    with Browser(an_empty_folder) as b:
        b.look(width=1400)
        b.open(Path("report.html"))
        print(b.js("return document.title"))
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request


class NoBrowser(Exception):
    """There is none, or it does not start."""


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
         "--disable-background-networking --disable-component-update --disable-sync").split()


class Browser:
    """A headless Chromium, by chromedriver's own protocol (W3C WebDriver)."""

    def __init__(self, folder):
        if not (CHROMIUM and DRIVER):
            raise NoBrowser("no browser (apt-get install chromium chromium-driver)")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.at = f"http://127.0.0.1:{s.getsockname()[1]}"
        self.process = subprocess.Popen([DRIVER, f"--port={self.at.rsplit(':')[-1]}"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{self.at}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(.05)
        options = {"args": [*FLAGS, f"--user-data-dir={folder}"], "binary": CHROMIUM}
        try:
            self.at += "/session/" + self.post("/session", capabilities={"alwaysMatch": {
                "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
                )["sessionId"]
        except (AssertionError, OSError) as e:
            self.process.terminate()
            self.process.wait()
            raise NoBrowser(f"{CHROMIUM} does not start: {e}") from None
        self.cdp("Performance.enable", timeDomain="threadTicks")  # counts from now on

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def post(self, path, **body):
        return self.ask(path, json.dumps(body).encode())

    def ask(self, path, body=None):
        request = urllib.request.Request(self.at + path, body,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(json.load(e)["value"]["message"].splitlines()[0]) from None

    def close(self):
        end = urllib.request.Request(self.at, method="DELETE")
        try:
            urllib.request.urlopen(end, timeout=20).close()
        finally:
            self.process.terminate()
            self.process.wait()

    def js(self, code, *arguments):
        return self.post("/execute/sync", script=code, args=arguments)

    def wait_for(self, code, *arguments):
        """What a script gives to its last argument, a function."""
        return self.post("/execute/async", script=code, args=arguments)

    def cdp(self, command, **parameters):
        """A command of Chromium's own protocol."""
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def look(self, width=1400, height=900, scheme="light", still=False, scale=1):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=scale, mobile=width < 500)
        self.cdp("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}])

    def seconds(self):
        """The processor time that the page's thread has spent since the page was opened."""
        metrics = self.cdp("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "ThreadTime")

    def open(self, path):
        self.post("/url", url=path.as_uri())
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def until(self, code, *arguments, seconds=10):
        end = time.time() + seconds
        while time.time() < end:
            if self.js(code, *arguments):
                return
            time.sleep(.03)
        raise AssertionError(f"never came true: {code}")

    def settled(self):
        """Wait until what was asked to be drawn is drawn."""
        self.wait_for("const done = arguments[0]; requestAnimationFrame(() => "
                      "requestAnimationFrame(() => setTimeout(() => done(1), 20)))")

    def picture(self, path):
        """The window as PNG, to a file."""
        path.write_bytes(base64.b64decode(self.ask("/screenshot")))

    def mouse(self, x, y, *more):
        """The pointer to a place on the canvas, then "pointerDown", "pointerUp"."""
        at = self.js("const b = document.getElementById('canvas').getBoundingClientRect(); "
                     "return [b.x, b.y]")
        self.post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [
            {"type": "pointerMove", "x": round(at[0] + x), "y": round(at[1] + y), "duration": 0},
            *({"type": kind, "button": 0} for kind in more)]}])
        self.settled()

    def keys(self, text):
        self.post("/actions", actions=[{"type": "key", "id": "keys", "actions": [
            {"type": kind, "value": c} for c in text for kind in ("keyDown", "keyUp")]}])
        self.settled()

    def pixels(self, rgb):
        """How many of the canvas are about that colour, and their mean place."""
        self.settled()
        return self.js("""
            const c = document.getElementById("canvas"), d = c.getContext("2d").getImageData(
                0, 0, c.width, c.height).data, want = arguments[0];
            let n = 0, x = 0, y = 0;
            for (let i = 0; i < d.length; i += 4)
              if (want.every((v, k) => Math.abs(d[i + k] - v) < 12) && d[i + 3] > 240) {
                n++; x += i / 4 % c.width; y += Math.floor(i / 4 / c.width);
              }
            return [n, x / n, y / n];""", rgb)
