"""Take the pictures of the web app for the documents, in Chromium.

python benchmarks/screenshots.py
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from PIL import Image
from playwright.sync_api import sync_playwright

DOCUMENTS = Path(__file__).parents[1] / "docs"


def main(*, port: int = 7862, documents: Path = DOCUMENTS) -> None:
    """Serve the app with the models that come with the package, and write `app_generate.png` and `app_compare.png`.

    Args:
        port: of the app.
        documents: the output folder.
    """
    command = [sys.executable, "-m", "mnist_diffusion", "app", "mnist", "mnist-student", "--port", str(port)]
    with subprocess.Popen(command) as server, sync_playwright() as playwright:
        try:
            wait_for(f"http://127.0.0.1:{port}/config")
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 900})
            page.set_default_timeout(60_000)
            page.goto(f"http://127.0.0.1:{port}/")
            page.get_by_label("3", exact=True).first.wait_for()
            for name in ("1", "7", "8"):
                page.get_by_label(name, exact=True).first.check()
            page.get_by_role("button", name="Sample", exact=True).click()
            page.locator("#generated .gif").wait_for()
            for _ in range(4):  # back to a step at which the digits form
                page.locator("#generated .place").press("ArrowLeft")
            save(page, documents / "app_generate.png")
            page.get_by_role("tab", name="Compare").click()
            page.get_by_role("button", name="Compare", exact=True).click()
            page.locator("#compared figure").nth(3).wait_for()
            save(page, documents / "app_compare.png")
            browser.close()
        finally:
            server.terminate()


def wait_for(address: str) -> None:
    """Until a server answers."""
    for _ in range(300):
        try:
            urllib.request.urlopen(address).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(address)


def save(page: Any, path: Path) -> None:
    """Write the whole page as a small PNG."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
