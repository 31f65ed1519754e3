"""The pictures that a run makes of itself: into its folder, and to the trackers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mnist_diffusion.figures import to_picture, training_curves
from mnist_diffusion.records import read_metrics, track_picture
from mnist_diffusion.run import Run
from mnist_diffusion.visualize import evenly, save_animation, save_picture, side_by_side, titled

SHEET_NAME = re.compile(r"step-(\d+)\.png")
SHEETS_SIDE_BY_SIDE = 4
MAX_FRAMES = 60
ANIMATED_A_CLASS = 2


def show_beforehand(run: Run) -> None:
    """What does not change while training, such as the noise schedule."""
    if run.config.train.pictures:
        for name, picture in run.product.beforehand(run.learner.data, run.config.train.seed).items():
            _show(run, name, picture)


def show_samples(run: Run) -> None:
    """The sample sheet of this step, and further pictures of what the averaged weights do."""
    train = run.config.train
    shown = run.product.pictures(
        run.learner.average(),
        run.learner.data,
        columns=train.samples_per_class,
        seed=train.seed,
        more=train.pictures,
    )
    run.grid = shown.pop("samples")
    path = run.folder / "samples" / f"step-{run.step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    save_picture(run.grid, path)
    track_picture(run.learner.accelerator, "samples", run.grid, run.step)
    for name, picture in shown.items():
        _show(run, name, picture)


def show_animation(run: Run) -> None:
    """The making of this step's sample sheet."""
    train = run.config.train
    frames = run.product.animation(
        run.learner.average(), run.learner.data, columns=train.samples_per_class, seed=train.seed
    )
    if frames:
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        save_animation(frames, folder / f"step-{run.step:06d}.gif")


def show_curves(run: Run) -> None:
    """What the run has measured so far."""
    if run.config.train.pictures:
        lines = read_metrics(run.folder / "metrics.jsonl")
        _show(run, "training_curves", to_picture(training_curves(lines, title=f"Training, {run.recipe}")))


def show_at_the_end(run: Run) -> None:
    """The same seeds over the epochs, as a sheet and an animation, and how a few images come about."""
    if not run.config.train.pictures:
        return
    sheets = sample_sheets(run.folder, epochs_a_step=run.config.data.batch_size / len(run.learner.data.train))
    if len(sheets) > 1:
        _show(run, "epochs", sheet_of_epochs(sheets))
        save_animation(frames_of_epochs(sheets), run.folder / "pictures" / "epochs.gif", milliseconds=400)
    train = run.config.train
    columns = min(ANIMATED_A_CLASS, train.samples_per_class)
    frames = run.product.animation(run.learner.average(), run.learner.data, columns=columns, seed=train.seed)
    if frames:
        save_animation(frames, run.folder / "pictures" / "denoising.gif")


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


def sheet_of_epochs(sheets: Sequence[Sheet]) -> Image.Image:
    """A few of the sample sheets beside each other, the first and the last among them."""
    chosen = [sheets[index] for index in evenly(len(sheets), SHEETS_SIDE_BY_SIDE)]
    return side_by_side([sheet.picture for sheet in chosen], [sheet.title for sheet in chosen])


def frames_of_epochs(sheets: Sequence[Sheet]) -> list[Image.Image]:
    """The sample sheets one after the other, each below its epoch."""
    chosen = [sheets[index] for index in evenly(len(sheets), MAX_FRAMES)]
    return [titled(sheet.picture, sheet.title) for sheet in chosen]


def _show(run: Run, name: str, picture: Image.Image) -> None:
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    save_picture(picture, folder / f"{name}.png")
    track_picture(run.learner.accelerator, name, picture, run.step)
