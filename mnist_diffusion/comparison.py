"""Several runs, or the snapshots of one, beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnist_diffusion.config import LEADS_TO_IMAGES, DataConfig, UserError, require_plain_yaml
from mnist_diffusion.gallery import Sheet, sample_sheets
from mnist_diffusion.records import read_metrics


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
            said = {name: self.config["data"][name] for name in LEADS_TO_IMAGES if name in self.config["data"]}
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


HEADINGS = ("run", "steps", "epochs", "minutes", "images/s", "loss", "held-out loss", "FID", "read as asked")


def rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A row a run: how long it was, and what it measured last of itself."""

    def shown(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    found = []
    for run in runs:
        seconds = run.summary.get("train_seconds")
        found.append(
            [
                run.name,
                str(run.lines[-1]["step"]),
                shown(run.lines[-1]["epoch"], "{:.2f}"),
                shown(None if seconds is None else seconds / 60, "{:.1f}"),
                shown(run.summary.get("images_per_second"), "{:.0f}"),
                shown(run.summary.get("loss"), "{:.4f}"),
                shown(run.last("held_out_loss"), "{:.4f}"),
                shown(run.last("fid"), "{:.3f}"),
                shown(run.last("accuracy"), "{:.2%}"),
            ]
        )
    return found


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its folder's, with as much of the path as tells it from the others."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
