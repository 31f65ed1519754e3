"""Train a pipeline: the training loop with what a run draws, measures and exports of its averaged weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from PIL import Image

from mnist_diffusion.data.transforms import to_uint8
from mnist_diffusion.diffusion.noise import NoisingProcess
from mnist_diffusion.diffusion.pipeline import generate, require_fit, stop_after_step
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import read_json, read_picture, read_yaml, replace_picture
from mnist_diffusion.pictures import pipelines, plots
from mnist_diffusion.pictures.compare import frames_of_epochs, sheet_of_epochs
from mnist_diffusion.pictures.grids import image_grid, save_animation
from mnist_diffusion.run_folder.metrics import read_metrics
from mnist_diffusion.run_folder.read import sample_sheets
from mnist_diffusion.sharing.export import export_pipeline
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.training import report
from mnist_diffusion.training.loop import TrainingLoop, warned_of

ANIMATED_PER_CLASS = 2


@dataclass(frozen=True)
class TrainedRun:
    """What a run left: its folder, its pipeline with the averaged weights, and what its `summary.json` says."""

    folder: Path
    pipeline: MNISTDiffusionPipeline
    summary: Mapping[str, Any]


class Trainer(TrainingLoop):
    """One training run of a pipeline.

    Args:
        loop: what every [`TrainingLoop`] takes.
        make_pipeline: puts a pipeline around a network; it is drawn from, measured and exported with averaged weights.
        card: further values of the model card.

    Raises:
        UserError: the pipeline draws images of another shape or other classes, as with another `patch_size`.
    """

    def __init__(
        self,
        *loop: Any,
        make_pipeline: Callable[[UNet2DModel], MNISTDiffusionPipeline],
        card: Mapping[str, Any] | None = None,
    ):
        super().__init__(*loop)
        self.average = make_pipeline(self.state.averaged_unet)
        require_fit(self.average, self.data)
        self.average.set_progress_bar_config(disable=True)
        self.card, self.drawn_at = card or {}, -1
        self.measure: Callable[[], dict[str, float]] = dict  # nothing, until `prepare`

    def passes_at_the_end(self) -> int:
        """Those of the held-out loss, the sample sheet, the strip, and the animation, which show every step."""
        train, classes = self.config.train, min(self.data.num_classes, pipelines.MAX_ROWS)
        drawn = classes * (train.samples_per_class + (3 if train.pictures else 0))
        return super().passes_at_the_end() + 2 * drawn * self.config.sampling.num_inference_steps

    def pipeline(self) -> MNISTDiffusionPipeline:
        """The pipeline with the averaged weights of this step."""
        self.state.average()
        return self.average

    def prepare(self) -> None:
        """Rehearse the end of the run, and get the evaluator ready if images are to be measured."""
        try:
            self._rehearse()
        except UserError:
            raise
        except Exception as error:  # whatever the libraries make of it
            raise UserError(f"what comes at the end of the run cannot work: {type(error).__name__}: {error}") from error
        train = self.config.train
        if train.evaluate_every is not None:
            from mnist_diffusion.evaluation.evaluate import monitor  # takes seconds to import

            self.measure = monitor(self.average, self.data, num_images=train.num_evaluation_images, seed=train.seed)

    def _rehearse(self) -> None:
        """Do in small, in a temporary folder, what comes at the end: draw, write, load. What fails there fails here."""
        pipeline, names, seed = self.pipeline(), self.data.class_names, self.config.train.seed
        labels, seeds, rows = pipelines.sheet_rows(pipeline, names, 1, seed)
        try:
            generate(pipeline, labels and labels[:1], seeds[:1], callback_on_step_end=stop_after_step)
        except ValueError as error:  # the pipeline's own, which name argument and value
            raise UserError(f"sampling, as it is configured, cannot work: {error}") from error
        image_grid(torch.zeros(len(seeds), *pipeline.image_shape), 1, row_labels=rows)
        with tempfile.TemporaryDirectory() as temporary:
            folder, config = Path(temporary, self.folder.resolve().name, self.exported), Path(temporary, "config.yaml")
            self.export(folder)
            MNISTDiffusionPipeline.from_pretrained(folder)
            self.write_config(config)
            try:
                read_yaml(config)
            except UserError as error:
                raise UserError(
                    f"the run's configuration could not be read again, to resume from it: {error}"
                ) from error

    def evaluate(self) -> None:
        """Measure images, and keep the pipeline if none was better."""
        self.pipeline()
        self.measured |= (found := self.measure())
        metric, best = self.config.train.best_metric, self.progress.best
        if best is None or (found[metric] < best if metric == "fid" else found[metric] > best):
            with warned_of("drawing"):
                self.draw_samples()
            self.export(self.folder / "pipeline_best")
            self.progress.best = found[metric]

    def export(self, folder: Path) -> None:
        """Write a pipeline folder with its card and the sample sheet of this step, if it has been drawn."""
        samples = None
        with contextlib.suppress(FileError):  # better no picture than no pipeline
            samples = read_picture(self._sheet(".png"))
        export_pipeline(self.pipeline(), folder, card=report.card_values(self, folder), samples=samples)

    def result(self) -> TrainedRun:
        """What the run left, read from its folder."""
        pipeline = MNISTDiffusionPipeline.from_pretrained(self.folder / self.exported)
        return TrainedRun(self.folder, pipeline, read_json(self.folder / "summary.json"))

    def is_whole(self, folder: Path) -> bool:
        """Whether the pipeline loads."""
        try:
            return folder.is_dir() and bool(MNISTDiffusionPipeline.from_pretrained(folder))
        except (OSError, ValueError):
            return False

    def usage(self) -> str:
        """Load with plain diffusers, and draw one image."""
        return (
            "from diffusers import DiffusionPipeline\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{self.folder / self.exported}", trust_remote_code=True)\n'
            f'{self.example_call()}.images[0].resize((280, 280), 0).save("sample.png")'
        )

    def example_call(self) -> str:
        """A call that shows what the pipeline can be asked for."""
        if (classes := self.average.num_classes) is None:
            return "pipeline()"
        guidance = "" if self.average.config.guidance_distilled else ", guidance_scale=5"
        return f"pipeline(class_labels=[{min(3, classes - 1)}]{guidance})"

    # Pictures.

    def draw_before(self) -> None:
        """The noise schedule, and what it does to the first images of the training split."""
        if self.config.train.pictures:
            process = NoisingProcess.of(self.average.scheduler)
            self._show("noise_schedule", plots.to_picture(plots.noise_schedules({"this run": process})))
            self._show("forward_noising", pipelines.noised(self.data, process, seed=self.config.train.seed))

    def draw_samples(self) -> None:
        """The sample sheet of this step; how images form, and pixel values of real and generated images."""
        if self.drawn_at == self.step:
            return
        pipeline, names, train = self.pipeline(), self.data.class_names, self.config.train
        sheet, images = pipelines.sample_sheet(pipeline, names, columns=train.samples_per_class, seed=train.seed)
        self._show("samples", sheet, self._sheet(".png"))
        if train.pictures:
            self._show("denoising", pipelines.denoised(pipeline, names, seed=train.seed))
            real = self.data.train.spread(len(images))[0]
            self._show("pixel_histograms", plots.to_picture(plots.pixel_histograms(real, to_uint8(2 * images - 1))))
        self.drawn_at = self.step

    def draw_curves(self) -> None:
        """What has been logged so far."""
        if self.config.train.pictures:
            figure = plots.training_curves(read_metrics(self.log), title=f"Training, {self.recipe}")
            self._show("training_curves", plots.to_picture(figure))

    def draw_animation(self) -> None:
        """How the sample sheet of this step forms."""
        self._save_frames(self._sheet(".gif"), self.config.train.samples_per_class)

    def draw_at_the_end(self) -> None:
        """The same seeds over the epochs, as a sheet and an animation, and how a few images form."""
        if not self.config.train.pictures:
            return
        sheets = sample_sheets(self.folder, epochs_per_step=self._epochs(1))
        if len(sheets) > 1:
            self._show("epochs", sheet_of_epochs(sheets))
            save_animation(frames_of_epochs(sheets), self.folder / "pictures" / "epochs.gif", milliseconds=400)
        columns = min(ANIMATED_PER_CLASS, self.config.train.samples_per_class)
        self._save_frames(self.folder / "pictures" / "denoising.gif", columns)

    def _sheet(self, suffix: str) -> Path:
        return self.folder / "samples" / f"step-{self.step:06d}{suffix}"

    def _save_frames(self, path: Path, columns: int) -> None:
        rows = pipelines.sheet_rows(self.pipeline(), self.data.class_names, columns, self.config.train.seed)
        labels, seeds, names = rows
        frames = pipelines.predicted_frames(self.average, labels, seeds, columns, row_labels=names)
        path.parent.mkdir(exist_ok=True)
        save_animation(frames, path)

    def _show(self, name: str, picture: Image.Image, path: Path | None = None) -> None:
        """Save a picture, in `pictures/` if no other path is given, and send it to the trackers."""
        path = path or self.folder / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        replace_picture(picture, path)
        with warned_of("tracking"):
            report.track_picture(self.accelerator, name, picture, self.step)
