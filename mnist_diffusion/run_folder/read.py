"""Read a run folder: its configuration, metrics, summary, sample sheets and pipelines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mnist_diffusion.config import IMAGE_FIELDS, DataConfig
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import require_plain_yaml
from mnist_diffusion.run_folder.metrics import read_metrics


@dataclass(frozen=True)
class RunRecord:
    """What a run has left.

    Args:
        folder: the run folder.
        lines: of its `metrics.jsonl`.
        summary: its `summary.json`; empty while it is on its way.
        config: its `config.yaml`.
        sheets: its sample sheets, oldest first.
    """

    folder: Path
    lines: list[dict[str, Any]]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    sheets: Sequence[Sheet]

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.folder.resolve().name

    def last(self, name: str) -> float | None:
        """The last value measured under a name."""
        found = [line[name] for line in self.lines if line.get(name) is not None]
        return found[-1] if found else None

    def data(self) -> tuple[DataConfig, int]:
        """The images that it was trained on, and the seed that chose the held-out ones.

        Raises:
            UserError: its configuration does not say.
        """
        try:
            said = {name: self.config["data"][name] for name in IMAGE_FIELDS if name in self.config["data"]}
            return DataConfig(**said), int(self.config["train"]["seed"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{str(self.folder)!r}: config.yaml does not say what images the run saw ({error!r}); name them with "
                "--data.source"
            ) from error

    def pipelines(self) -> dict[str, Path]:
        """Its pipeline folders, snapshots first, by name."""
        snapshots = sorted(
            (path for path in (self.folder / "snapshots").glob("step-*") if (path / "model_index.json").is_file()),
            key=lambda path: int(path.name.removeprefix("step-")),
        )
        others = [self.folder / name for name in ("pipeline_best", "pipeline")]
        return {path.name: path for path in [*snapshots, *others] if (path / "model_index.json").is_file()}


def read_run(folder: Path) -> RunRecord:
    """Read what a run has left.

    Raises:
        UserError: it is no run folder.
    """
    config = folder / "config.yaml"
    lines = read_metrics(folder / "metrics.jsonl")
    if not config.is_file() or not lines:
        raise UserError(f"{str(folder)!r} is no run folder: it needs config.yaml and metrics.jsonl with a line")
    require_plain_yaml(config)
    try:
        about = yaml.safe_load(config.read_text(encoding="utf-8"))
        summary_file = folder / "summary.json"
        summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
        epochs_a_step = lines[-1]["epoch"] / lines[-1]["step"]
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(folder)!r}: what the run has left cannot be read: {error!r}") from error
    return RunRecord(folder, lines, summary, about, sample_sheets(folder, epochs_a_step=epochs_a_step))


SHEET_NAME = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class Sheet:
    """A sample sheet of a run, and how many epochs it had seen."""

    epoch: float
    picture: Image.Image

    @property
    def title(self) -> str:
        """Its epoch."""
        return f"epoch {self.epoch:.2f}"


def sample_sheets(folder: Path, *, epochs_a_step: float) -> list[Sheet]:
    """The sample sheets that a run has left, oldest first."""
    paths = (folder / "samples").glob("step-*.png")
    found = {int(match[1]): path for path in paths if (match := SHEET_NAME.fullmatch(path.name))}
    sheets = []
    for step in sorted(found):
        with Image.open(found[step]) as picture:
            sheets.append(Sheet(step * epochs_a_step, picture.copy()))
    return sheets
