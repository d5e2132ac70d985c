"""Chromium without a screen, by mouse and keyboard as a person has them: its DevTools protocol over a pipe."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
KEYS = {  # key -> (code, number, text)
    "Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " "), "Backspace": ("Backspace", 8, ""),
    "ArrowUp": ("ArrowUp", 38, ""), "ArrowRight": ("ArrowRight", 39, ""), "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""), "Escape": ("Escape", 27, ""),
}  # fmt: skip


class Browser:
    """One page. asked: the address of each request that it made; said: errors on its console."""

    def __init__(self, profile: Path, *, within: float = 30):
        assert CHROMIUM is not None
        reads, their_writes = os.pipe()
        their_reads, writes = os.pipe()
        # Chromium reads at 3 and writes at 4; above 10 neither is in the way.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_reads, their_writes)]
        line = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", CHROMIUM, *QUIET, "--remote-debugging-pipe"]
        self.process = subprocess.Popen([*line, f"--user-data-dir={profile}", "about:blank"], pass_fds=theirs, stderr=subprocess.DEVNULL)
        for end in (their_reads, their_writes, *theirs):
            os.close(end)
        self._reads, self._writes, self._left, self._number, self._within = reads, writes, b"", 0, within
        self.asked: list[str] = []
        self.said: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._session = None
            self._send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._reads)
        os.close(self._writes)

    # ---- the protocol

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, **parameters)
        goal = time.monotonic() + self._within
        while True:
            message = self._receive(goal - time.monotonic())
            assert message is not None, f"{method}: no answer"
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                return message["result"]

    def _send(self, method: str, **parameters: Any) -> int:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = json.dumps({"id": self._number, "method": method, "params": parameters, **session})
        os.write(self._writes, message.encode() + b"\0")
        return self._number

    def _receive(self, within: float) -> dict[str, Any] | None:
        """The next message, noted where it is an event."""
        goal = time.monotonic() + within
        while b"\0" not in self._left:
            if not select.select([self._reads], [], [], max(0, goal - time.monotonic()))[0]:
                return None
            more = os.read(self._reads, 1 << 20)
            assert more, f"Chromium ended ({self.process.poll()})"
            self._left += more
        raw, self._left = self._left.split(b"\0", 1)
        message = json.loads(raw)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            case "Network.webSocketCreated":
                self.asked.append(message["params"]["url"])
            case "Log.entryAdded" if message["params"]["entry"]["level"] == "error":
                self.said.append(message["params"]["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.said.append(json.dumps(message["params"]["exceptionDetails"])[:500])
        if "method" in message:
            self.events.append(message)
        return message

    # ---- a person

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; an error in it is one here."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, wanted: Callable[[Any], object] = bool, called: str = "as wanted") -> Any:
        """The value of an expression, when it is as wanted."""
        goal = time.monotonic() + self._within
        while not wanted(value := self.js(expression)):
            assert time.monotonic() < goal, f"{expression} is not {called}: {value!r}"
            time.sleep(0.05)
        return value

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """(left, top, width, height) of the first element of a selector, on the screen."""
        self.js(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        get = f"(one => [one.x, one.y, one.width, one.height])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        return tuple(self.js(get))

    def click(self, selector: str) -> None:
        """In its middle, by the mouse."""
        left, top, width, height = self.box(selector)
        at = dict(x=left + width / 2, y=top + height / 2, button="left", clickCount=1)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def drop(self, selector: str, file: Path) -> None:
        left, top, width, height = self.box(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=left + width / 2, y=top + height / 2, data=data)

    def press(self, *keys: str, shift: bool = False) -> None:
        for key in keys:
            code, number, text = KEYS.get(key, (f"Digit{key}", ord(key[:1]), key))
            pressed = dict(key=key, code=code, windowsVirtualKeyCode=number, modifiers=8 if shift else 0)
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **pressed)
            self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def chosen_file(self, file: Path, ask: Callable[[], None]) -> None:
        """Answer the dialog that asks for a file, which `ask` opens, as a person would."""
        self.call("Page.setInterceptFileChooserDialog", enabled=True)
        self.events.clear()
        ask()
        goal = time.monotonic() + self._within
        while not (opened := [one["params"] for one in self.events if one["method"] == "Page.fileChooserOpened"]):
            assert time.monotonic() < goal, "no dialog opens"
            self._receive(0.1)
        self.call("DOM.setFileInputFiles", files=[str(file)], backendNodeId=opened[0]["backendNodeId"])
        self.call("Page.setInterceptFileChooserDialog", enabled=False)

    def picture(self, file: Path, *, whole: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))

    def name(self) -> tuple[str, str]:
        """(role, name) of what has the focus, as a screen reader says them."""
        found = self.call("Runtime.evaluate", expression="document.activeElement")["result"]["objectId"]
        node = self.call("Accessibility.getPartialAXTree", objectId=found, fetchRelatives=False)["nodes"][0]
        return node.get("role", {}).get("value", ""), node.get("name", {}).get("value", "")
