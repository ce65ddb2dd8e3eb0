"""A headless Chromium that a test talks to: the DevTools protocol over two pipes, so no port is
open and nothing but the Debian package is needed."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

# Every connection goes to a proxy that is not there, every name to nothing: there is no network.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"),
    "--remote-debugging-pipe",
)
DEADLINE = 120.0  # seconds for one answer, on a busy machine


class Page:
    """The one page of a running Chromium."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._ids = to_browser, from_browser, itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.requests: list[str] = []
        """The addresses that were asked for, data: URIs left out."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        self.call("Emulation.setScrollbarsHidden", hidden=True)  # pictures as wide as the page
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Load the file, `width` CSS pixels wide, and wait until every picture is there or
        failed."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self._go("about:blank")  # else a page that is loaded twice seems to be there at once
        self.requests.clear()
        self._go(path.as_uri())
        self.ask("Promise.allSettled([...document.images].map(image => image.decode()))")

    def _go(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        end = time.monotonic() + DEADLINE
        there = f"location.href === {json.dumps(address)} && document.readyState === 'complete'"
        while not self.ask(there):
            assert time.monotonic() < end, f"Chromium did not load {address} in {DEADLINE} s"
            time.sleep(0.05)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> np.ndarray:
        """The whole page, float32 [height, width, 3 or 4] from 0 to 1."""
        png = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        return matplotlib.image.imread(io.BytesIO(base64.b64decode(png)), format="png")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; returns its result."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + DEADLINE
        while True:
            answer = self._receive(method, end)
            if answer.get("method") == "Network.requestWillBeSent":
                address = answer["params"]["request"]["url"]
                if not address.startswith("data:"):
                    self.requests.append(address)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self, method: str, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer {method} in {DEADLINE} s"
            data = os.read(self._from, 1 << 20)
            assert data, f"Chromium ended during {method}"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def chromium() -> Iterator[Page]:
    """Start Chromium, yield its page, end it. Fails the test where the package is missing."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("the Debian package chromium is missing: apt-get install chromium")
    commands, answers = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the protocol wants descriptors 3 (commands) and 4 (answers); bash puts them there
        redirect = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
        process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(commands[0], answers[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(answers[1])
        try:
            page = Page(commands[1], answers[0])
            yield page
            page._session = None
            page.call("Browser.close")
            process.wait(timeout=30)
        finally:
            process.kill()  # nothing to do for one that has ended
            process.wait()
            os.close(commands[1])
            os.close(answers[0])
