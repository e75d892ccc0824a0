"""A real browser for tests: headless Chromium, controlled through chromedriver's WebDriver protocol."""

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
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element reference


class Browser:
    """A browser tab."""

    def __init__(self, address):
        self.address = address

    def __call__(self, path, **values):
        """Sends a command and returns its value; a GET if there are no values."""
        body = json.dumps(values).encode() if values or path.endswith(("/click", "/refresh")) else None
        request = Request(f"{self.address}/{path}", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self("url", url=address)

    def run(self, script, *arguments):
        """Runs a script in the page and returns its value."""
        return self("execute/sync", script=script, args=list(arguments))

    def wait(self, script, seconds=20):
        """Waits until a script returns a true value, and returns it."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.05)
        return value

    def type(self, selector, text):
        """Types into an element; for a file input, the file's path."""
        element = self("element", using="css selector", value=selector)[_ELEMENT]
        self(f"element/{element}/value", text=str(text))

    def press(self, *keys):
        """Presses keys one after another in the focused element."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self("actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def resize(self, width, height=900):
        """Sets the size of the page, which may be narrower than the smallest window."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def prefer(self, scheme):
        """Sets the preferred colour scheme: ``"light"`` or ``"dark"``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})

    def log(self):
        """The console's messages, such as violations of the page's content security policy."""
        return [entry["message"] for entry in self("se/log", type="browser")]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self("screenshot")))


@contextmanager
def chromium(profile, *flags):
    """Starts a browser with a new profile and additional flags; skips the test if there is no browser."""
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
