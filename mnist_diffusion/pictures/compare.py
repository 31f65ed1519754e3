"""Compare runs, or the sample sheets of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mnist_diffusion.pictures.grids import evenly, side_by_side, titled
from mnist_diffusion.run_folder.read import RunRecord, Sheet

MAX_FRAMES = 60
DECIDED = ("train.lr_lines", "train.num_threads")
"""What a run writes into its configuration by itself, which nobody has set."""
SHEETS_SIDE_BY_SIDE = 4
HEADINGS = ("run", "steps", "epochs", "minutes", "images/s", "loss", "held-out loss", "FID", "class accuracy")


def sheet_of_epochs(sheets: Sequence[Sheet]) -> Image.Image:
    """A few of the sample sheets beside each other, the first and the last among them."""
    last = sheets[-1].step
    # Most is learned at the start: each chosen sheet is a multiple of the one before.
    wanted = [max(1, sheets[0].step) ** (1 - share) * last**share for share in np.linspace(0, 1, SHEETS_SIDE_BY_SIDE)]
    nearest = {min(sheets, key=lambda sheet: abs(math.log(max(1, sheet.step) / step))).step for step in wanted}
    return side_by_side([(sheet.title, sheet.picture) for sheet in sheets if sheet.step in nearest])


def frames_of_epochs(sheets: Sequence[Sheet]) -> list[Image.Image]:
    """The sample sheets one after the other, each below its epoch."""
    return [titled(sheets[index].picture, sheets[index].title) for index in evenly(len(sheets), MAX_FRAMES)]


def compared_sheets(runs: Mapping[str, RunRecord]) -> Image.Image | None:
    """The last sample sheet of each run, or several of a single run; None if there are none."""
    last = [(name, run.sheets[-1].picture) for name, run in runs.items() if run.sheets]
    if len(runs) == 1 and last:
        return sheet_of_epochs(next(iter(runs.values())).sheets)
    return side_by_side(last) if last else None


def by_objective(runs: Mapping[str, RunRecord]) -> list[dict[str, RunRecord]]:
    """The runs in groups whose losses compare."""
    groups: list[dict[str, RunRecord]] = []
    for name, run in runs.items():
        fitting = (group for group in groups if all(_comparable(each, run) for each in group.values()))
        group = next(fitting, None)
        if group is None:
            groups.append(group := {})
        group[name] = run
    return groups


def _comparable(one: RunRecord, other: RunRecord) -> bool:
    """Whether losses of two runs compare; a name that is not known, as of an older run's objective, tells nothing."""
    unknown = {"name"} if "" in (one.learned, other.learned) else set()
    first, second = ({key: each.objective[key] for key in each.objective.keys() - unknown} for each in (one, other))
    return first == second


def settings_that_differ(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """One row for each setting, by its dotted name, in which the runs differ, with the value of each run."""
    settings = [{"objective": run.learned, **run.settings} for run in runs.values()]
    names = dict.fromkeys(name for each in settings for name in each if name not in DECIDED)
    differing = [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
    return [[name, *(f"{each.get(name)!r:.60}" for each in settings)] for name in differing]


def rows(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """One row per run: how long it was, and what it measured last."""
    found = []
    for name, run in runs.items():
        summary = {name: value for name, value in run.summary.items() if type(value) in (int, float)}
        seconds = summary.get("train_seconds")
        values = (
            (run.lines[-1]["epoch"], "{:.2f}"),
            (None if seconds is None else seconds / 60, "{:.1f}"),
            (summary.get("images_per_second"), "{:.0f}"),
            (summary.get("loss"), "{:.4f}"),
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
