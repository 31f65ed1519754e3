"""The one long task of the server: a training run or an evaluation, as the command that anyone could have typed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.evaluation.report import cells
from mnist_diffusion.files import read_json, read_picture, read_text
from mnist_diffusion.pictures.page import embedded
from mnist_diffusion.pictures.plots import to_picture, training_curves
from mnist_diffusion.run_folder.metrics import read_metrics
from mnist_diffusion.run_folder.read import sample_sheets

SECONDS_TO_STOP = 60
FIGURE = Markup(
    '<figure><figcaption>{title} <small>{about}</small></figcaption><img src="{picture}" alt="{title}"></figure>'
)
TABLE, CELL = Markup("<table>{}</table>"), (Markup("<th>{}</th>"), Markup("<td>{}</td>"))
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
        process: it.
    """

    verb: str
    folder: Path
    started: float
    process: subprocess.Popen[bytes]

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None


class Work:
    """Starts, shows and stops the one task.

    Args:
        folder: where runs and evaluations are written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._log = Path(tempfile.mkdtemp(prefix="mnist-diffusion-app-")) / "output.txt"

    def start(self, verb: str, name: str, arguments: Sequence[str], *, out: str) -> None:
        """Start `mnist-diffusion VERB ARGUMENTS OUT FOLDER`.

        Args:
            verb: train or evaluate.
            name: of the folder, to which the time is added.
            arguments: of the command.
            out: its option that names the folder.

        Raises:
            UserError: another task has not ended yet.
        """
        with self._lock:
            if self.running:
                raise UserError("the machine is busy with another training or evaluation; wait, or stop it")
            folder = self.folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            command = [sys.executable, "-m", "mnist_diffusion", verb, *arguments, out, str(folder)]
            with self._log.open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            self._task = Task(verb, folder, time.monotonic(), process)

    @property
    def running(self) -> bool:
        """Whether there is a task that has not ended yet."""
        return self._task is not None and self._task.running

    def stop(self, *, wait: bool = False) -> None:
        """Ask the task to end, as TERM does: a run then leaves a checkpoint and a pipeline."""
        if self._task is None or not self._task.running:
            return
        self._task.process.terminate()
        if wait:
            try:
                self._task.process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                self._task.process.kill()

    def trained(self) -> Path | None:
        """The pipeline folder of a training run that has ended, if it left one."""
        if self._task is None or self.running or self._task.verb != "train":
            return None
        pipeline = self._task.folder / "pipeline"
        return pipeline if (pipeline / "model_index.json").is_file() else None

    def shown(self, verb: str) -> Markup:
        """What the page shows of the last task of this kind."""
        if self._task is None or self._task.verb != verb:
            return Markup("")
        task, parts = self._task, [Markup("<p role=status>{}</p>").format(self._status(self._task))]
        with contextlib.suppress(FileError, OSError, KeyError, ValueError):  # it is being written
            parts += _of_run(task.folder) if verb == "train" else _of_evaluation(task.folder)
        return Markup("").join(parts)

    def _status(self, task: Task) -> str:
        minutes = (time.monotonic() - task.started) / 60
        if task.running:
            return f"Running for {minutes:.1f} minutes, into {task.folder}. {self._last_line()}"
        if task.process.returncode in (0, 128 + 15, -15):
            return f"Finished; it is in {task.folder}."
        return f"It failed: {self._last_line()}"

    def _last_line(self) -> str:
        lines = read_text(self._log)[-2000:].replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _of_run(folder: Path) -> list[Markup]:
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


def _of_evaluation(folder: Path) -> list[Markup]:
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
