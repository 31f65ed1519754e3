"""Compare runs, or the sample sheets of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from mnist_diffusion.pictures.grids import evenly, side_by_side, titled
from mnist_diffusion.run_folder.read import RunRecord, Sheet

MAX_FRAMES = 60
SHEETS_SIDE_BY_SIDE = 4
HEADINGS = ("run", "steps", "epochs", "minutes", "images/s", "loss", "held-out loss", "FID", "class accuracy")


def sheet_of_epochs(sheets: Sequence[Sheet]) -> Image.Image:
    """A few of the sample sheets beside each other, the first and the last among them."""
    return side_by_side([sheets[index] for index in evenly(len(sheets), SHEETS_SIDE_BY_SIDE)])


def frames_of_epochs(sheets: Sequence[Sheet]) -> list[Image.Image]:
    """The sample sheets one after the other, each below its epoch."""
    return [titled(sheets[index].picture, sheets[index].title) for index in evenly(len(sheets), MAX_FRAMES)]


def compared_sheets(runs: Mapping[str, RunRecord]) -> Image.Image | None:
    """The last sample sheet of each run, or several of a single run; None if there are none."""
    last = [(name, run.sheets[-1].picture) for name, run in runs.items() if run.sheets]
    if len(runs) == 1 and last:
        return sheet_of_epochs(next(iter(runs.values())).sheets)
    return side_by_side(last) if last else None


def rows(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """One row per run: how long it was, and what it measured last."""
    found = []
    for name, run in runs.items():
        seconds = run.summary.get("train_seconds")
        values = (
            (run.lines[-1]["epoch"], "{:.2f}"),
            (None if seconds is None else seconds / 60, "{:.1f}"),
            (run.summary.get("images_per_second"), "{:.0f}"),
            (run.summary.get("loss"), "{:.4f}"),
            (run.last("held_out_loss"), "{:.4f}"),
            (run.last("fid"), "{:.3f}"),
            (run.last("accuracy"), "{:.2%}"),
        )
        shown = ["" if value is None else pattern.format(value) for value, pattern in values]
        found.append([name, str(run.lines[-1]["step"]), *shown])
    return found


def by_name(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The runs by the names of their folders, or by their whole paths if two folders have the same name."""
    named = {run.name: run for run in runs}
    return named if len(named) == len(runs) else {str(run.folder): run for run in runs}
