"""A real browser for tests: headless Chromium through chromedriver, over the WebDriver protocol itself."""

import base64
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what the protocol calls a reference


class Browser:
    """A tab."""

    def __init__(self, address):
        self.address = address

    def __call__(self, path, **values):
        """One command; a GET where there are no values."""
        body = json.dumps(values).encode() if values or path.endswith(("/click", "/refresh")) else None
        request = Request(f"{self.address}/{path}", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self("url", url=address)

    def run(self, script, *arguments):
        """What a script in the page returns."""
        return self("execute/sync", script=script, args=list(arguments))

    def wait(self, script, seconds=20):
        """Waits until a script returns something true, and gives that."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.05)
        return found

    def type(self, selector, text):
        """Types into an element; of one for files, their path."""
        element = self("element", using="css selector", value=selector)[_ELEMENT]
        self(f"element/{element}/value", text=str(text))

    def press(self, *keys):
        """Presses keys, one after the other, wherever the focus is."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self("actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def resize(self, width, height=900):
        """What the page has to itself, also narrower than a window may be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def prefer(self, scheme):
        """``"light"`` or ``"dark"``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})

    def log(self):
        """What the console has been told, such as breaches of the page's policy."""
        return [entry["message"] for entry in self("se/log", type="browser")]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self("screenshot")))


@contextmanager
def chromium(profile, *flags):
    """A browser with a new profile, and more flags perhaps; skips the test where there is none."""
    driver, program = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or program is None:
        pytest.skip("needs chromium and chromedriver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next(line for line in process.stdout if "successfully on port" in line)
        port = line.rpartition("port")[2].strip(" .\n")
        address = f"http://127.0.0.1:{port}/session"
        options = {"binary": program, "args": [*FLAGS, *flags, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        request = Request(address, json.dumps({"capabilities": {"alwaysMatch": wanted}}).encode())
        with urlopen(request, timeout=60) as answer:
            session = f"{address}/{json.load(answer)['value']['sessionId']}"
        try:
            yield Browser(session)
        finally:
            urlopen(Request(session, method="DELETE"), timeout=60).close()
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
