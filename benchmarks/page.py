"""Measures the page of `cda inspect-sparsity --html` in Chromium: until it is ready, a click on a head, and a hover.

    python benchmarks/page.py                   # makes the page of 12 layers, 12 heads and 1,024 tokens first
    python benchmarks/page.py report.html       # a page that is there; of several pages, each measurement takes turns

The browser runs headless, without a library: this program speaks the DevTools protocol over two pipes. A click counts
from the event to the frame in which the map of the head is on the screen, and "whole" to that in which its row and its
charts are too; a hover counts to the frame with the row. The heads are far apart, so none of them was unpacked ahead,
unless `--neighbours` walks from a head to the next one. The screen of a phone is 390 pixels wide, with four real pixels
for each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from synthetic import cda, header, row

MODEL = {"depth": 12, "heads": 12, "dim": 96, "dim_head": 8, "seq_len": 1024}
SCREENS = {"desktop": (1280, 800, 1), "phone": (390, 844, 2)}
SLOWER = (1, 4)  # times by which the processor is slowed
LOADS, CLICKS, HOVERS = 5, 40, 80

ACT = """
(async ({ clicks, hovers, step }) => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = done;
    channel.port2.postMessage(0);
  }));
  const pause = (time) => new Promise((done) => setTimeout(done, time));
  const until = (node, done) => new Promise((resolve) => {
    const look = () => done() && (watcher.disconnect(), resolve());
    const watcher = new MutationObserver(look);
    watcher.observe(node, { attributes: true });
    look();
  });
  const cells = [...document.querySelectorAll("#grid [data-head]")];
  const [panel, map] = [document.querySelector("#head"), document.querySelector("#map")];
  const found = { clicks: [], wholes: [], hovers: [] };
  for (let turn = 1; turn <= clicks; turn++) {
    const cell = cells[(turn * step) % cells.length];
    const start = performance.now();
    cell.click();
    await until(map, () => map.ariaLabel?.includes(`head ${cell.dataset.head},`));
    await frame();
    found.clicks.push(performance.now() - start);
    await until(panel, () => panel.ariaBusy !== "true");
    await frame();
    found.wholes.push(performance.now() - start);
    await pause(250);
  }
  const tokens = [...document.querySelectorAll("#text span")];
  for (let turn = 0; turn < hovers; turn++) {
    const token = tokens[(turn * 131) % tokens.length];
    const start = performance.now();
    token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    await frame();
    await frame();
    found.hovers.push(performance.now() - start);
  }
  return found;
})"""


class Browser:
    """A headless Chromium with one tab, and what it says of errors and requests."""

    def __init__(self, profile: str) -> None:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if found is None:
            sys.exit("benchmarks/page.py measures in Chromium, and none is installed")
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        (theirs, self._out), (self._in, back) = os.pipe(), os.pipe()

        def pipes_3_and_4() -> None:
            first, second = os.dup(theirs), os.dup(back)
            os.dup2(first, 3)
            os.dup2(second, 4)

        command = [found, *switches, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=pipes_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(back)
        self._reader = os.fdopen(self._in, "rb")
        self._number = itertools.count(1)
        self._tab: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = next(each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._tab = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol, and returns its result."""
        number = next(self._number)
        message = {"id": number, "method": method, "params": parameters}
        if self._tab:
            message["sessionId"] = self._tab
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda said: said.get("id") == number).get("result", {})

    def open(self, address: str) -> float:
        """Opens a page, and returns the seconds until it is ready."""
        self.send("Page.navigate", url="about:blank")
        self.requests.clear()
        start = time.perf_counter()
        self.send("Page.navigate", url=address)
        while not self.evaluate("'ready' in (document.documentElement?.dataset ?? {})"):
            time.sleep(0.005)
        return time.perf_counter() - start

    def evaluate(self, script: str) -> Any:
        given = {"expression": script, "awaitPromise": True, "returnByValue": True}
        return self.send("Runtime.evaluate", **given).get("result", {}).get("value")

    def close(self) -> None:
        self.send("Browser.close")
        self._process.wait()

    def _until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            said = self._next()
            if is_it(said):
                return said

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium ended")
            text += byte
        said: dict[str, Any] = json.loads(text)
        method, given = said.get("method"), said.get("params", {})
        if method == "Network.requestWillBeSent" and not given["request"]["url"].startswith("data:"):
            self.requests.append(given["request"]["url"])
        elif method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and given["type"] == "error"):
            self.errors.append(json.dumps(given))
        elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(given["entry"]["text"])
        return said


def made(folder: Path) -> Path:
    """The page of a model that was hardly trained: its rows spread, so they fill the page up to its budget."""
    sets = [f"--set=model.{key}={value}" for key, value in MODEL.items()]
    cda("train", "--preset", "tiny", "--out", folder / "run", "--steps", 1, "--set=optim.batch_size=1", *sets)
    cda("inspect-sparsity", folder / "run", "--max-batches", 1, "--html", folder / "page.html")
    return folder / "page.html"


def ninety_fifth(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def measure(page: Path, screen: str, slower: int, step: int, profile: str) -> dict[str, Any]:
    browser = Browser(profile)
    try:
        width, height, scale = SCREENS[screen]
        browser.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        browser.send("Emulation.setCPUThrottlingRate", rate=slower)
        ready = [browser.open(page.resolve().as_uri()) for _ in range(LOADS)]
        found = browser.evaluate(f"{ACT}({json.dumps({'clicks': CLICKS, 'hovers': HOVERS, 'step': step})})")
        return {**found, "ready": ready, "requests": len(browser.requests) - 1, "errors": browser.errors}
    finally:
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="pages; without any, one is made")
    parser.add_argument("--neighbours", action="store_true", help="walk from each head to the next")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = asked.pages or [made(Path(folder))]
        columns = ("ready, s", "click", "click, 95 %", "whole", "whole, 95 %", "hover", "hover, 95 %")
        header("The page in Chromium, milliseconds", "page, screen, processor", *columns, "requests", "errors")
        for screen, slower, (number, page) in itertools.product(SCREENS, SLOWER, enumerate(pages)):
            step = 1 if asked.neighbours else 37
            found = measure(page, screen, slower, step, f"{folder}/{screen}-{slower}-{number}")
            kinds = ("clicks", "wholes", "hovers")
            times = [round(of(found[kind])) for kind in kinds for of in (statistics.median, ninety_fifth)]
            name = f"{page.name}, {page.stat().st_size / 1e6:.1f} MB, {screen}, ×1/{slower}"
            row(name, f"{statistics.median(found['ready']):.2f}", *times, found["requests"], len(found["errors"]))


if __name__ == "__main__":
    main()
