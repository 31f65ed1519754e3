"""The page's server, as its command starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, make_pipeline
from tests.studio.test_studio import make_student
from tests.support.browser import answer, free_port

MNIST = os.environ.get("MNIST_DIFFUSION_DATA")


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
    """The page, served from loopback by its command; with the real MNIST, where this machine has it."""
    pipelines = [str(folder / name / "pipeline") for name in ("teacher", "student")]
    data = str(REPOSITORY / MNIST) if MNIST is not None else "digits"
    port = free_port()
    flags = ["--runs", str(folder / "runs"), "--data.source", data, "--port", str(port)]
    command = [sys.executable, "-m", "mnist_diffusion", "app", *pipelines, *flags]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        try:
            answer(f"http://127.0.0.1:{port}/config", process)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGINT)
