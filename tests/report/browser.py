"""A headless Chromium, spoken to by its DevTools protocol over a pair of pipes: nothing to install beside it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_TIMEOUT = 60.0  # seconds


def find_browser() -> str | None:
    """Where a Chromium is: MTL_LORA_BROWSER, or one of the usual names."""
    given = os.environ.get("MTL_LORA_BROWSER")
    return given or next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass(frozen=True)
class Seen:
    """A page as a browser showed it.

    Attributes:
        problems: what came on the console at warning or error, exceptions, and requests for anything
            but the page itself.
        width: of what can be scrolled to, in pixels.
        screenshot: a PNG image.
    """

    problems: list[str]
    width: int
    screenshot: bytes


class Browser:
    """One tab of a running browser."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer, self._number = b"", 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def see(self, page: Path, *, width: int, dark: bool, opened: bool = True) -> Seen:
        """Load a page in a window of so many pixels, with all that is folded opened."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        url = page.resolve().as_uri()
        failed = self._ask("Page.navigate", url=url).get("errorText")
        assert failed is None, f"{url}: {failed}"
        self._wait("Page.loadEventFired")
        if opened:
            self.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        scrollable = self.evaluate("document.documentElement.scrollWidth")
        shot = self._ask("Page.captureScreenshot", format="png")["data"]
        return Seen(self._problems(url), scrollable, base64.b64decode(shot))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _problems(self, url: str) -> list[str]:
        found = []
        for event in self._events:
            what, given = event["method"], event["params"]
            if what == "Runtime.exceptionThrown":
                found.append(json.dumps(given["exceptionDetails"]))
            elif what == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
                found.append(json.dumps(given["args"]))
            elif what == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                found.append(given["entry"]["text"])
            elif what == "Network.requestWillBeSent":
                wanted = given["request"]["url"]
                if wanted != url and not wanted.startswith("data:"):
                    found.append(f"asked for {wanted}")
        return found

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _wait(self, method: str) -> None:
        while not any(event["method"] == method for event in self._events):
            self._next()

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser says nothing any more"
            part = os.read(self._read, 2**20)
            assert part, "the browser is gone"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
        return message


@contextmanager
def started(command: str, profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block; it reads commands at descriptor 3 and answers at 4."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Out of the way of 3 and 4, which may be taken by one of them.
    theirs = [fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 10) for handle in (theirs_in, theirs_out)]
    arguments = [
        command, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(
        arguments,
        preexec_fn=lambda: [os.dup2(handle, 3 + n) for n, handle in enumerate(theirs)],
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for handle in (theirs_in, theirs_out, *theirs):
        os.close(handle)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.kill()
        process.wait()
        os.close(ours_in)
        os.close(ours_out)
