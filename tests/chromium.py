"""A real headless Chromium, driven over the pipe of its DevTools protocol; needs no package."""

from __future__ import annotations

import base64
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

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_S = 60.0


class Page:
    """One page: `requests` are the addresses that it has asked for, `complaints` its console's errors.

    `password` is what whoever sits before it types where a server asks for one; None: they press Escape.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._buffer = b""
        self._serial = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.password: str | None = None
        self.asked = 0
        """Times that a password was asked for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Fetch.enable", handleAuthRequests=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result."""
        serial, end = self._send(method, parameters), time.monotonic() + WAIT_S
        while True:
            answer = self._read(end)
            if answer.get("id") == serial:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if "method" in answer:
                self._event(answer["method"], answer["params"])

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._serial += 1
        message = {"id": self._serial, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._serial

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            self._buffer += os.read(self._in, 1 << 20)
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def _event(self, method: str, inside: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(inside["request"]["url"])
        elif method == "Log.entryAdded" and inside["entry"]["level"] == "error":
            self.complaints.append(inside["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(inside["exceptionDetails"]))
        elif method == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", {"requestId": inside["requestId"]})
        elif method == "Fetch.authRequired":
            self.asked += 1
            answer = {"response": "CancelAuth"}
            if self.password is not None:
                answer = {"response": "ProvideCredentials", "username": "anyone", "password": self.password}
            self._send("Fetch.continueWithAuth", {"requestId": inside["requestId"], "authChallengeResponse": answer})

    def open(self, address: str) -> None:
        """Goes to an address."""
        self.call("Page.navigate", url=address)

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + WAIT_S
        while not (value := self.eval(expression)):
            assert time.monotonic() < end, f"waited in vain for {expression}: {self.eval('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def picture(self, file: Path, *, width: int, height: int, dark: bool) -> bytes:
        """Writes the whole page, at least `height` high, as PNG; its bytes."""
        size = {"width": width, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", height=height, **size)
        whole = int(self.eval("document.documentElement.scrollHeight"))
        self.call("Emulation.setDeviceMetricsOverride", height=max(height, whole), **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        file.write_bytes(data)
        return data


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser that can reach this machine alone."""
    assert PROGRAM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def place() -> None:  # the protocol's pipes are 3 and 4
        os.dup2(to_read, 103)
        os.dup2(from_write, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        running = subprocess.Popen(
            [
                *(PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--no-proxy-server"),
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Page(to_write, from_read)
        finally:
            running.terminate()
            running.wait(WAIT_S)
            os.close(to_write)
            os.close(from_read)
