"""A headless Chromium driven through its DevTools protocol over a pipe: no driver and no further package."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--mute-audio")


class Browser:
    """One page. `errors` gathers what the console said and what was thrown; `urls` all that was asked for."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 860):
        assert CHROMIUM
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        command += [f"--window-size={width},{height}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdin=quiet, stdout=quiet, stderr=quiet
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._ids, self._answers = b"", itertools.count(1), {}
        self._session: str | None = None
        self.errors: list[str] = []
        self.urls: list[str] = []
        pages = self.wait(lambda: [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"])
        target = {"targetId": pages[0]["targetId"], "flatten": True}
        self._session = self.call("Target.attachToTarget", target)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def close(self) -> None:
        try:
            self._session = None
            self.call("Browser.close", limit=5)
            self._process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, parameters: dict[str, Any] | None = None, limit: float = 30) -> dict[str, Any]:
        id = next(self._ids)
        message = {"id": id, "method": method, "params": parameters or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + limit
        while id not in self._answers:
            self._read(end - time.monotonic())
        answer = self._answers.pop(id)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self, limit: float) -> None:
        if limit <= 0 or not select.select([self._in], [], [], limit)[0]:
            raise TimeoutError("Chromium does not answer")
        data = os.read(self._in, 1 << 20)
        if not data:
            raise OSError("Chromium ended")
        *whole, self._rest = (self._rest + data).split(b"\0")
        for text in whole:
            self._take(json.loads(text))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        told = message["params"]
        match message["method"]:
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(told["exceptionDetails"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.errors.append(told["entry"]["text"] + " " + told["entry"].get("url", ""))
            case "Network.requestWillBeSent":
                self.urls.append(told["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        asked = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, found: Any, limit: float = 15) -> Any:
        """Asks again and again, a function or a JavaScript expression, until the answer is true."""
        end = time.monotonic() + limit
        while True:
            value = found() if callable(found) else self.run(found)
            if value:
                return value
            assert time.monotonic() < end, f"never came true: {found}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", {"url": url})
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", metrics)

    def click(self, selector: str) -> None:
        """A real click in the middle of the element, which must be in view."""
        place = "(e => { const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })"
        x, y = self.run(f"{place}(document.querySelector({json.dumps(selector)}))")
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", event)

    def type(self, selector: str, text: str, enter: bool = False) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", {"text": text})
        if enter:
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", {"type": "keyDown"} | key)
            self.call("Input.dispatchKeyEvent", {"type": "keyUp"} | key)

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", {"format": "png"})["data"]))
