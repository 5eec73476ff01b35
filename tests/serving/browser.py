"""Drive a headless Chromium by its driver's HTTP API (W3C WebDriver), where both are installed.

    python -m tests.serving.browser 'http://127.0.0.1:8000/?prompt=def+' docs/page.png

saves a picture of the page, when it has done what the link asks.
"""

import base64
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

DRIVER = shutil.which("chromedriver")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=900,900",
]


class Browser:
    def __init__(self, profile: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        options = {"args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        self.session = ""
        for _ in range(100):
            try:
                answer = self.post("/session", capabilities=capabilities)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        self.session = f"/session/{answer['sessionId']}"

    def post(self, path: str, **body):
        answer = self.http.post(self.session + path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self.post("/url", url=url)

    def run(self, script: str):
        """Return what a function body of JavaScript returns."""
        return self.post("/execute/sync", script=script, args=[])

    def wait_for(self, script: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, self.run("return document.body.innerText")
            time.sleep(0.1)

    def close(self) -> None:
        self.http.delete(self.session)
        self.driver.terminate()
        self.driver.wait()


def main() -> None:
    link, path = sys.argv[1:]
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            browser.open(link)
            browser.wait_for("return document.body.dataset.done")
            time.sleep(2)  # the numbers of the server appear
            picture = browser.http.get(f"{browser.session}/screenshot").json()["value"]
        finally:
            browser.close()
    Path(path).write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main()
