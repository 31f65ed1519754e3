"""The pipelines of the pages, and the app's server, as its command starts it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.method.distillation import student_of
from mnist_diffusion.pipelines.drawing import build_pipeline
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import student_scheduler
from tests.conftest import REPOSITORY, make_pipeline
from tests.support.browser import answer, chromium, free_port


@pytest.fixture(scope="session")
def pipelines() -> dict[str, MNISTDiffusionPipeline]:
    """A teacher, and before it a student, whose guidance scales draw different images."""
    teacher, scales = make_pipeline(guidance_interval=(0.2, 0.8)), (1.9, 1.0, 2.8)
    unet, scheduler = student_of(teacher, len(scales)).eval(), student_scheduler(teacher.scheduler.config)
    with torch.no_grad():
        unet.class_embedding.weight.add_(torch.randn_like(unet.class_embedding.weight))
    sampling = SamplingSettings(scheduler="lcm", num_inference_steps=1, guidance_scale=scales[0])
    student = build_pipeline(scheduler, sampling, tuple("abcdefghij"), unet, guidance_distilled=scales)
    student.set_progress_bar_config(disable=True)
    return {"student": student, "teacher": teacher}


@pytest.fixture(scope="session")
def address(pipelines: dict[str, MNISTDiffusionPipeline], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of the teacher and the student, served from loopback by its command."""
    folder, port = tmp_path_factory.mktemp("app"), free_port()
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name / "pipeline")
    named = [str(folder / name / "pipeline") for name in ("teacher", "student")]
    command = [sys.executable, "-m", "mnist_diffusion", "app", *named, "--port", str(port)]
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


@pytest.fixture
def visit(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """A visit to the page of a test's file, with the options that are its parameter, if it has one."""
    with closing(request.module.ReadyVisit(browser, address, **getattr(request, "param", {}))) as visit:
        yield visit
