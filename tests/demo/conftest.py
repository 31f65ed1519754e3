"""The page's server, as its command starts it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, make_pipeline
from tests.demo.test_studio import make_student
from tests.support.browser import answer, chromium, free_port


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student, and where runs go."""
    folder = tmp_path_factory.mktemp("app")
    teacher = make_pipeline(guidance_interval=(0.2, 0.8))
    teacher.save_pretrained(folder / "teacher" / "pipeline")
    make_student(teacher).save_pretrained(folder / "student" / "pipeline")
    return folder


@pytest.fixture(scope="session")
def address(folder: Path) -> Iterator[str]:
    """The page, served from loopback by its command."""
    pipelines = [str(folder / name / "pipeline") for name in ("teacher", "student")]
    port = free_port()
    flags = ["--runs", str(folder / "runs"), "--data.source", "digits", "--port", str(port)]
    command = [sys.executable, "-m", "mnist_diffusion", "app", *pipelines, *flags]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        try:
            answer(f"http://127.0.0.1:{port}/config", process)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser
