"""A real Chromium for tests, driven through its DevTools pipe in real time: true mouse, keys, files and camera."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
in_browser = pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")


SECONDS = 60.0  # for anything, on a slow machine


class Tab:
    """One page in the browser. ``errors`` are what its scripts threw and what its console called an error."""

    def __init__(self, ask: int, answers: int):
        self.ask, self.answers = ask, os.fdopen(answers, "rb")
        self.session: dict[str, str] = {}
        self.number, self.left = 0, b""
        self.errors: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; return its result."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.ask, json.dumps(asked).encode() + b"\0")
        while True:
            got = self.read()
            if got.get("id") == self.number:
                assert "error" not in got, got
                return dict(got["result"])

    def read(self) -> dict[str, Any]:
        """Return the next message; note errors."""
        while b"\0" not in self.left:
            assert select.select([self.answers], [], [], SECONDS)[0], f"the browser said nothing for {SECONDS} s"
            more = self.answers.read1(1 << 20)  # type: ignore[attr-defined]
            assert more, "the browser has ended"
            self.left += more
        message, self.left = self.left.split(b"\0", 1)
        got: dict[str, Any] = json.loads(message)
        if got.get("method") == "Runtime.exceptionThrown":
            self.errors.append(got["params"]["exceptionDetails"].get("exception", {}).get("description", "?"))
        elif got.get("method") == "Log.entryAdded" and got["params"]["entry"]["level"] == "error":
            self.errors.append(got["params"]["entry"]["text"])
        return got

    def open(self, address: str) -> None:
        """Open an address; return when the page has loaded."""
        self.call("Page.navigate", url=address)  # the new page is there when it answers
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of a script (JSON); a promise is waited for."""
        got = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, condition: str, seconds: float = SECONDS / 2) -> Any:
        """Wait until a script's value is true, and return it."""
        value = self.run(
            f"(async () => {{ const end = performance.now() + {1000 * seconds}; let value;"
            f" while (!(value = ({condition})) && performance.now() < end) await new Promise((r) => setTimeout(r, 20));"
            " return value; })()"
        )
        assert value, f"it did not come to this: {condition}"
        return value

    def key(self, key: str, times: int = 1) -> None:
        """Press a key so many times."""
        text = {"text": key} if len(key) == 1 else {}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def draw(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point of the window, move it through the others, let go."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, (*points, points[-1]), strict=True):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


@contextlib.contextmanager
def browse(folder: Path, width: int = 1200, height: int = 900, *flags: str) -> Iterator[Tab]:
    """Start a browser that keeps its own files in ``folder``; give its page; end it."""
    to_browser, ask = os.pipe()
    answers, from_browser = os.pipe()

    def connect() -> None:  # the browser reads its commands from descriptor 3 and answers on 4
        pair = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        for place, end in zip((3, 4), pair, strict=True):
            os.dup2(end, place)

    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    command += [f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}", *flags]
    process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=connect, stderr=subprocess.DEVNULL)
    os.close(to_browser)
    os.close(from_browser)
    tab = Tab(ask, answers)
    try:
        target = tab.call("Target.createTarget", url="about:blank")["targetId"]
        tab.session = {"sessionId": tab.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        yield tab
        tab.session = {}
        tab.call("Browser.close")
    finally:
        os.close(ask)
        tab.answers.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
