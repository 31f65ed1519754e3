"""The one long task of the server: a training run or an evaluation, as the command that anyone could have typed."""

from __future__ import annotations

import contextlib
import math
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
from typing import IO, Any

from markupsafe import Markup

from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.evaluation.report import cells
from mnist_diffusion.files import read_json, read_picture
from mnist_diffusion.pictures.page import embedded
from mnist_diffusion.pictures.plots import to_picture, training_curves
from mnist_diffusion.run_folder.metrics import read_metrics
from mnist_diffusion.run_folder.read import sample_sheets

SECONDS_TO_STOP, SECONDS_TO_LOOK = 60, 2
LOOKED_AT = 2000
"""Bytes at the end of what a task prints, which hold its last line."""
OUT = {"train": "--output_dir", "evaluate": "--out"}
"""The option of each command that names the folder it writes."""
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit codes after TERM: of a run, and of what has no handler."""
FIGURE = Markup('<figure><figcaption>{title} <small>{about}</small></figcaption><img src="{picture}" alt=""></figure>')
TABLE, CELL = Markup("<table>{}</table>"), (Markup("<th scope=col>{}</th>"), Markup("<td>{}</td>"))
MEASURED = {"samples-0": "Samples", "misclassified-0": "Read as another class", "nearest-0": "Nearest training images"}


def figure(title: str, picture: str, about: str = "") -> Markup:
    """A titled picture, given as an address; all words are escaped."""
    return FIGURE.format(title=title, about=about, picture=picture)


@dataclass(frozen=True)
class Task:
    """A command that was started.

    Args:
        verb: what it does.
        folder: where it writes.
        started: when, in seconds of `time.monotonic`.
        process: the process that carries it out.
        said: what it prints.
    """

    verb: str
    folder: Path
    started: float
    process: subprocess.Popen[bytes]
    said: IO[bytes]

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def last_line(self) -> str:
        """The last that it has printed."""
        size = os.fstat(self.said.fileno()).st_size
        text = os.pread(self.said.fileno(), LOOKED_AT, max(0, size - LOOKED_AT)).decode(errors="replace")
        return next((line.strip() for line in reversed(text.replace("\r", "\n").split("\n")) if line.strip()), "")


class Work:
    """Starts, shows and stops the one task.

    Args:
        folder: where runs and evaluations are written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._runs: list[Task] = []
        self._seen: tuple[float, str, Markup] = (-math.inf, "", Markup(""))

    def start(self, verb: str, name: str, arguments: Sequence[str]) -> None:
        """Start a command of this package that writes into a new folder.

        Args:
            verb: train or evaluate.
            name: of the folder, to which the time is added.
            arguments: of the command.

        Raises:
            UserError: another task has not ended yet.
        """
        with self._lock:
            if self.running:
                raise UserError("the machine is busy with another training or evaluation; wait, or stop it")
            folder = self.folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            command = [sys.executable, "-m", "mnist_diffusion", verb, *arguments, OUT[verb], str(folder)]
            said = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, and goes with the task
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            self._task = Task(verb, folder, time.monotonic(), process, said)
            self._runs += [self._task] if verb == "train" else []

    @property
    def running(self) -> bool:
        """Whether there is a task that has not ended yet."""
        return self._task is not None and self._task.running

    def stop(self, verb: str | None = None, *, wait: bool = False) -> None:
        """Ask the task, if it is of this kind, to end, as TERM does: a run then leaves a checkpoint and a pipeline."""
        task = self._task
        if task is None or not task.running or verb not in (None, task.verb):
            return
        task.process.terminate()
        if wait:
            try:
                task.process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                task.process.kill()

    def trained(self) -> list[Path]:
        """The pipeline folders that training runs have left, oldest first."""
        folders = [run.folder / "pipeline" for run in self._runs if not run.running]
        return [folder for folder in folders if (folder / "model_index.json").is_file()]

    def shown(self, verb: str) -> Markup:
        """What the page shows of the task, if it is of this kind; for all visitors at most once in two seconds."""
        with self._lock:
            task = self._task
            if task is None or task.verb != verb:
                return Markup("")
            since, state = time.monotonic(), f"{task.folder} {task.running}"
            if self._seen[1] != state or since - self._seen[0] > SECONDS_TO_LOOK:
                role = Markup("") if task.running else Markup(" role=status")
                parts = [Markup("<p{}>{}</p>").format(role, self._status(task))]
                with contextlib.suppress(FileError, OSError, KeyError, ValueError):  # it is being written
                    parts += run_figures(task.folder) if verb == "train" else evaluation_figures(task.folder)
                self._seen = since, state, Markup("").join(parts)
            return self._seen[2]

    def _status(self, task: Task) -> str:
        minutes = (time.monotonic() - task.started) / 60
        if task.running:
            return f"Running for {minutes:.1f} minutes, into {task.folder}. {task.last_line()}"
        if task.process.returncode in STOPPED:
            return f"Stopped; what there is, is in {task.folder}."
        if task.process.returncode == 0:
            return f"Finished; it is in {task.folder}."
        return f"It failed: {task.last_line()}"


def run_figures(folder: Path) -> list[Markup]:
    """Sample sheet and curves of a run that may not have ended."""
    lines: list[dict[str, Any]] = read_metrics(folder / "metrics.jsonl")
    if not lines:
        return []
    last = lines[-1]
    facts = f"step {last['step']}, epoch {last['epoch']:.2f}, loss {last['loss']:.4f}"
    found = []
    if sheets := sample_sheets(folder, epochs_per_step=last["epoch"] / last["step"]):
        found.append(figure(f"Samples, step {sheets[-1].step}", embedded(sheets[-1].picture)))
    return [*found, figure("Curves", embedded(to_picture(training_curves(lines))), facts)]


def evaluation_figures(folder: Path) -> list[Markup]:
    """Table and pictures of an evaluation."""
    headings, rows = cells(read_json(folder / "report.json"))
    table = [
        Markup("<tr>{}</tr>").format(Markup("").join(CELL[place > 0].format(cell) for cell in row))
        for place, row in enumerate((headings, *rows))
    ]
    pictures = [
        figure(title, embedded(read_picture(folder / f"{name}.png")))
        for name, title in MEASURED.items()
        if (folder / f"{name}.png").is_file()
    ]
    return [TABLE.format(Markup("").join(table)), *pictures]
