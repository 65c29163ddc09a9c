"""Chromium without a window, driven through two pipes by its own protocol (Chrome DevTools Protocol)."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
           "--disable-quic", "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--disable-dev-shm-usage"]


class Page:
    """An open page. complaints: what it wrote to the console, and its uncaught errors."""

    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.session, self.number, self.complaints = {}, 0, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in "Page", "Runtime", "Log", "DOM":
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Does something -> what came of it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.to_browser.write(json.dumps(message).encode() + b"\0")
        self.to_browser.flush()
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(answer["params"])

    def read(self):
        message = bytearray()
        while not message.endswith(b"\0"):
            byte = self.from_browser.read(1)
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message[:-1])

    def evaluate(self, script):
        """-> the value of JavaScript, awaited if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script):
        """Waits until JavaScript is true -> its value."""
        end = time.monotonic() + 20
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} is not so: {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, address):
        self.send("Page.navigate", url=address)
        self.wait(f"location.href.startsWith('{address}') && document.readyState === 'complete'")

    def choose(self, selector, *paths):
        """Chooses files in a file field."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        field = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=field, files=[str(path) for path in paths])

    def mouse(self, *events):
        """events: (what, x, y), what being Pressed, Moved or Released."""
        for what, x, y in events:
            button = "none" if what == "Moved" else "left"
            self.send("Input.dispatchMouseEvent", type=f"mouse{what}", x=x, y=y, button=button, clickCount=1)

    def look(self, width=1200, height=900, dark=False, scale=1, touch=False):
        """Changes the window."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def photograph(self, path):
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_browser(profile):
    """-> a Page. profile: an empty folder."""
    (its_input, to_browser), (from_browser, its_output) = os.pipe(), os.pipe()
    redirect = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'  # the protocol is spoken there
    process = subprocess.Popen(
        ["bash", "-c", redirect, CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"],
        pass_fds=(its_input, its_output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(its_input)
    os.close(its_output)
    try:
        with open(to_browser, "wb") as writer, open(from_browser, "rb") as reader:
            page = Page(writer, reader)
            yield page
            page.session = {}
            page.send("Browser.close")
            process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
