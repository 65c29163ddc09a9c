"""Chromium without a window, driven through two pipes by its own protocol (Chrome DevTools Protocol)."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--window-size=1200,900",
           "--disable-dev-shm-usage", "--disable-background-networking"]


class Page:
    """An open page. complaints: what it wrote to the console, and its uncaught errors."""

    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.session, self.number, self.complaints = {}, 0, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in "Page", "Runtime", "DOM":
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Does something -> what came of it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.to_browser.write(json.dumps(message).encode() + b"\0")
        self.to_browser.flush()
        while True:
            answer = bytearray()
            while not answer.endswith(b"\0"):
                byte = self.from_browser.read(1)
                assert byte, "the browser has ended"
                answer += byte
            answer = json.loads(answer[:-1])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.complaints.append(answer["params"])

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

    def mouse(self, *events):
        """events: (what, x, y), what being Pressed, Moved or Released."""
        for what, x, y in events:
            button = "none" if what == "Moved" else "left"
            self.send("Input.dispatchMouseEvent", type=f"mouse{what}", x=x, y=y, button=button, clickCount=1)


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
            yield Page(writer, reader)
    finally:
        process.kill()
        process.wait()
