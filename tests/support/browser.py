"""Chromium, and a visit to a page in it, which notes what the page says and where it sends requests."""

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

import pytest

CHROMIUM = shutil.which("chromium")
LAUNCH = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
NARROW = {"color_scheme": "dark", "reduced_motion": "reduce", "viewport": {"width": 360, "height": 800}}
"""Options of a visit with a small, dark screen."""


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(LAUNCH))
        yield browser
        browser.close()


class Visit:
    """A page that was opened, what it said on the console, and where it sent requests."""

    def __init__(self, browser: Any, address: str, **options: Any):
        self.page = browser.new_page(**options)
        self.said: list[str] = []
        self.hosts: set[str | None] = set()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlparse(request.url).hostname))
        self.page.goto(address)

    def close(self) -> None:
        """Close it; it must have said nothing, and have asked this machine alone."""
        self.page.close()
        assert self.said == []
        assert self.hosts <= {"127.0.0.1", None}


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answer(address: str, process: subprocess.Popen[bytes]) -> bytes:
    """What a server that is starting answers; it must not end before."""
    for _ in range(600):
        assert process.poll() is None
        try:
            with urllib.request.urlopen(address) as found:
                return bytes(found.read())
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(address)
