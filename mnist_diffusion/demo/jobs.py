"""The app's one long job: a training run, as the command that anyone could have typed."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from markupsafe import Markup

from mnist_diffusion.demo.drawing import figure
from mnist_diffusion.errors import UserError
from mnist_diffusion.plots.curves import to_picture, training_curves
from mnist_diffusion.training.run_folder import read_run

SECONDS_TO_STOP, SECONDS_TO_REFRESH = 60, 2
TAIL_BYTES = 2000
"""Bytes at the end of a job's output, which hold its last line."""
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes after TERM: of a run, and of a process without a handler."""


@dataclass(frozen=True)
class Job:
    """A training run that was started.

    Args:
        folder: its run folder.
        started: time of the start, in seconds of `time.monotonic`.
        process: the process.
        log_file: its output.
    """

    folder: Path
    started: float
    process: subprocess.Popen[bytes]
    log_file: IO[bytes]

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def last_line(self) -> str:
        """The last line of its output."""
        size = os.fstat(self.log_file.fileno()).st_size
        text = os.pread(self.log_file.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        return next((line.strip() for line in reversed(text.replace("\r", "\n").split("\n")) if line.strip()), "")


class JobRunner:
    """Starts, shows and stops the one job.

    Args:
        folder: where runs are written.
    """

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        self.jobs: list[Job] = []

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start a training run in a new folder.

        Args:
            name: of the folder, to which the time is added.
            arguments: of the command.

        Raises:
            UserError: another run has not ended yet.
        """
        with self.lock:
            if self.running:
                raise UserError("the machine is busy with another training run; wait, or stop it")
            folder = self.folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            command = [sys.executable, "-m", "mnist_diffusion", "train", *arguments, "--output_dir", str(folder)]
            for job in self.jobs[-1:]:
                job.log_file.close()
            log_file = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, and goes with the job
            process = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            self.jobs.append(Job(folder, time.monotonic(), process, log_file))

    @property
    def running(self) -> bool:
        """Whether there is a job that has not ended yet."""
        return bool(self.jobs) and self.jobs[-1].running

    def stop(self, *, wait: bool = False) -> None:
        """Send TERM to the job: a run then leaves a checkpoint and a pipeline."""
        if not self.running:
            return
        process = self.jobs[-1].process
        process.terminate()
        if wait:
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()

    def pipelines(self) -> list[Path]:
        """The pipeline folders of finished runs, oldest first."""
        folders = [job.folder / "pipeline" for job in self.jobs if not job.running]
        return [folder for folder in folders if (folder / "model_index.json").is_file()]

    def status_html(self) -> Markup:
        """The state of the job, with its samples and curves; refreshed every two seconds for all visitors."""
        with self.lock:
            if not self.jobs:
                return Markup("")
            job = self.jobs[-1]
            return _status_html(job, job.running, time.monotonic() // SECONDS_TO_REFRESH)


@functools.lru_cache(maxsize=1)
def _status_html(job: Job, running: bool, now: float) -> Markup:
    parts = [Markup("<p{}>{}</p>").format(Markup("" if running else " role=status"), _status(job))]
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # it is being written
        parts += run_figures(job.folder)
    return Markup("").join(parts)


def _status(job: Job) -> str:
    if job.running:
        minutes = (time.monotonic() - job.started) / 60
        return f"Running for {minutes:.1f} minutes, in {job.folder}. {job.last_line()}"
    if job.process.returncode in STOPPED:
        return f"Stopped; the results so far are in {job.folder}."
    return f"Finished; the run is in {job.folder}." if job.process.returncode == 0 else f"It failed: {job.last_line()}"


def run_figures(folder: Path) -> list[Markup]:
    """Sample sheet and curves of a run that may not have ended."""
    run = read_run(folder)
    sheets = [figure(f"Samples, step {run.sheet.step}", run.sheet.picture)] if run.sheet else []
    facts = "step {step}, epoch {epoch:.2f}, loss {loss:.4f}".format(**run.lines[-1])
    return [*sheets, figure("Curves", to_picture(training_curves(run.lines)), facts)]
