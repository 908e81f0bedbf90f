"""A page in headless Chromium, driven over its DevTools protocol: clicks, keys, what is seen."""

import base64
import json
import subprocess
import time
import urllib.request
from pathlib import Path

from conftest import ENVIRONMENT, PATIENCE
from websockets.sync.client import connect

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
# No request of the browser's own, and none of the page's to another machine
ALONE = ("--disable-background-networking", "--disable-component-update", "--no-first-run")
ALONE += ("--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


class Page:
    """One page; `with Page(folder) as page:` ends its browser."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900):
        """`folder`: the browser's, empty; `width`, `height`: of the window in pixels."""
        self.folder = folder
        self.asked: list[str] = []  # the URLs that the page has asked for
        self.unanswered: set[str] = set()  # requests, by their ids
        self.number = 0  # of the last command
        log = (folder / "chromium.log").open("w")
        # Any free port of 127.0.0.1; the browser writes it into a file
        own = [f"--user-data-dir={folder}", "--remote-debugging-port=0"]
        own.append(f"--window-size={width},{height}")
        command = ["chromium", *FLAGS, *ALONE, *own, "about:blank"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)

    def __enter__(self) -> "Page":
        file = self.folder / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (file.is_file() and "\n" in file.read_text()):
            ended = self.process.poll() is not None or time.monotonic() > deadline
            assert not ended, (self.folder / "chromium.log").read_text()[-2000:]
            time.sleep(0.1)
        port = file.read_text().split()[0]
        targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
        (page,) = [target for target in targets if target["type"] == "page"]
        self.socket = connect(page["webSocketDebuggerUrl"], max_size=None, close_timeout=1)
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()
        self.socket.close()

    def send(self, method: str, **parameters) -> dict:
        """The protocol's answer to one command; what the page asks meanwhile is noted."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=PATIENCE))
            self.note(message.get("method"), message.get("params", {}))
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def note(self, event: str | None, facts: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(facts["request"]["url"])
            self.unanswered.add(facts["requestId"])
        elif event in ("Network.loadingFinished", "Network.loadingFailed"):
            self.unanswered.discard(facts["requestId"])

    def settle(self) -> None:
        """Wait until what has just been done is answered; streams that stay open do not count."""
        before = set(self.unanswered)
        time.sleep(0.3)
        self.value("0")
        deadline = time.monotonic() + PATIENCE
        while self.unanswered - before and time.monotonic() < deadline:
            time.sleep(0.1)
            self.value("0")

    def value(self, expression: str):
        """What a JavaScript expression gives."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, expression: str):
        """Wait until a JavaScript expression is true, and return what it gives."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"never: {expression}\n{self.text()[-3000:]}"
            time.sleep(0.1)
        return value

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.until("document.readyState == 'complete'")

    def shows(self, words: str) -> None:
        """Wait until `words` stand on the page."""
        self.until(f"document.body.innerText.includes({json.dumps(words)})")

    def text(self) -> str:
        return self.value("document.body.innerText")

    def click(self, element: str) -> None:
        """Click into the middle of what a JavaScript expression finds, as a hand would."""
        self.until(f"!!({element})")
        self.value(f"({element}).scrollIntoView({{block: 'center'}})")
        middle = "r => [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = self.value(f"({middle})(({element}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def press(self, key: str, text: str = "") -> None:
        """A key, and the character that it makes, if any."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def write(self, element: str, text: str) -> None:
        """Click into a field and write `text` over what stands there."""
        self.click(element)
        self.value(f"({element}).select()")
        self.send("Input.insertText", text=text)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
