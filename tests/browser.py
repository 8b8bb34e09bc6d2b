"""A headless Chromium, driven through chromedriver by the WebDriver protocol: JSON over HTTP.

<https://www.w3.org/TR/webdriver2/>
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
SECONDS = 60  # that one command may take
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element's name


def missing() -> list[str]:
    """The programs that are not here."""
    return [name for name in PROGRAMS if not shutil.which(name)]


class Browser:
    """A browser with one page; `close` ends it."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        words = ["--headless=new", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        words += [f"--window-size={width},{height}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.driver.stdout
        started = next(line for line in self.driver.stdout if "started successfully on port" in line)
        port = re.search(r"port (\d+)", started)
        assert port, started
        self.session = f"http://127.0.0.1:{port[1]}/session"
        options = {"binary": shutil.which("chromium"), "args": words}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = self._do("", {"capabilities": {"alwaysMatch": wanted}})
        self.session += f"/{session['sessionId']}"

    def open(self, file: Path) -> None:
        """Opens a file as a page, and forgets what was logged until now."""
        self._do("/url", {"url": "about:blank"})
        self.said(), self.fetched()
        self._do("/url", {"url": file.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._do("/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Clicks the first element of a CSS selector, as with a mouse."""
        found = self._do("/element", {"using": "css selector", "value": selector})
        self._do(f"/element/{found[ELEMENT]}/click", {})

    def move(self, selector: str, right: int = 0) -> None:
        """Moves the mouse to so many pixels from the middle of an element, which must be in sight."""
        self._mouse(selector, (right,))

    def drag(self, selector: str, start: int, end: int) -> None:
        """Drags the mouse from so many pixels from the middle of an element to others."""
        self._mouse(selector, (start, "pointerDown", end, "pointerUp"))

    def double_click(self, selector: str) -> None:
        """Clicks twice."""
        self._mouse(selector, (0, *("pointerDown", "pointerUp") * 2))

    def _mouse(self, selector: str, actions: Sequence[str | int]) -> None:
        found = self._do("/element", {"using": "css selector", "value": selector})
        self.run("arguments[0].scrollIntoView({ block: 'center' })", found)
        to = {"type": "pointerMove", "duration": 0, "origin": found, "y": 0}
        done = [to | {"x": one} if isinstance(one, int) else {"type": one, "button": 0} for one in actions]
        self._do("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": done}]})

    def picture(self) -> bytes:
        """What can be seen, as PNG."""
        return base64.b64decode(self._do("/screenshot"))

    def said(self) -> list[str]:
        """What the page has written to its console since the last call, errors among it."""
        return [line["message"] for line in self._do("/se/log", {"type": "browser"})]

    def fetched(self) -> list[str]:
        """What the page has asked for since the last call, itself and what lies in it left out."""
        events = [
            json.loads(line["message"])["message"] for line in self._do("/se/log", {"type": "performance"})
        ]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in sent if one["documentURL"] != one["request"]["url"]]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        """Ends the browser."""
        try:
            self._do("", method="DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait()
            assert self.driver.stdout
            self.driver.stdout.close()

    def _do(self, path: str, body: Any = None, method: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, method=method or None)
        request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]
