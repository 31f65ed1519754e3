"""Runs, or the sample sheets of one run, beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from mnist_diffusion.pictures.grids import evenly, side_by_side, titled
from mnist_diffusion.run_folder.read import RunRecord, Sheet

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


SHEETS_SIDE_BY_SIDE = 4
MAX_FRAMES = 60


def sheet_of_epochs(sheets: Sequence[Sheet]) -> Image.Image:
    """A few of the sample sheets beside each other, the first and the last among them."""
    chosen = [sheets[index] for index in evenly(len(sheets), SHEETS_SIDE_BY_SIDE)]
    return side_by_side([sheet.picture for sheet in chosen], [sheet.title for sheet in chosen])


def frames_of_epochs(sheets: Sequence[Sheet]) -> list[Image.Image]:
    """The sample sheets one after the other, each below its epoch."""
    chosen = [sheets[index] for index in evenly(len(sheets), MAX_FRAMES)]
    return [titled(sheet.picture, sheet.title) for sheet in chosen]
