"""Write the outputs of a run from its averaged weights: sample sheets, plots, scores and pipeline folders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mnist_diffusion.config import RunConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.transforms import to_uint8
from mnist_diffusion.environment import package_versions
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import append_text, read_picture, read_yaml, replace_picture, replace_text, yaml_text
from mnist_diffusion.method.noise import NoisingProcess
from mnist_diffusion.pipelines.card import REPO_PLACEHOLDER, as_markdown, local_paths_in, redact_paths
from mnist_diffusion.pipelines.drawing import class_names, require_fit, seeded_call
from mnist_diffusion.pipelines.folder import export_pipeline
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.plots import curves, sheets
from mnist_diffusion.plots.grids import image_grid, save_animation
from mnist_diffusion.training import logging
from mnist_diffusion.training.checkpoint import save_checkpoint
from mnist_diffusion.training.launch import RunContext
from mnist_diffusion.training.run_folder import read_metrics, sample_sheets
from mnist_diffusion.training.step import TrainState

ANIMATED_PER_CLASS = 2
MAX_COMPARED, MAX_COMPARED_VALUES = 5000, 2**26
"""Training images that samples are compared with to find copies, and their pixel values."""
NUM_EVALUATION_IMAGES = 1000
"""Images sampled at each evaluation during training, or the next multiple of the classes."""


@dataclass
class Progress:
    """Where a run stands; a checkpoint holds it.

    Args:
        step: updates done.
        planned_steps: updates the learning rate is planned for; 0 while a timed run has not decided.
        seconds: training time, over all launches.
        best: the best FID so far.
        loss: mean loss since the previous log line.
        held_out_loss: held-out loss when it was last measured.
    """

    step: int = 0
    planned_steps: int = 0
    seconds: float = 0.0
    best: float | None = None
    loss: float | None = None
    held_out_loss: float | None = None


@contextlib.contextmanager
def warn_on_failure(work: str) -> Iterator[None]:
    """Warn instead of failing if optional work raises."""
    try:
        yield
    except Exception as error:
        print(f"warning: could not {work} (continuing): {error!r:.300}", file=sys.stderr)


class Artifacts:
    """Draws, measures and exports the averaged weights of a run; the main process calls it.

    Args:
        context: the run's folder and trackers.
        config: the run.
        data: the images.
        state: the network in training.
        make_pipeline: builds a pipeline around a network.
        card: further values of the model card.

    Raises:
        UserError: the pipeline samples images of another shape or other classes than the data.
    """

    def __init__(
        self,
        context: RunContext,
        config: RunConfig,
        data: ImageData,
        state: TrainState,
        *,
        make_pipeline: Callable[..., MNISTDiffusionPipeline],
        card: Mapping[str, Any] | None = None,
    ):
        self.context, self.config, self.data, self.state, self.card = context, config, data, state, card or {}
        self.folder = context.folder
        self.averaged = make_pipeline(unet=state.averaged_unet)
        require_fit(self.averaged, data)
        self.averaged.set_progress_bar_config(disable=True)
        self.drawn_step, self.sheet_images = -1, torch.empty(0)
        self.measure: Callable[[], dict[str, float]] = dict  # nothing, until `prepare`

    def pipeline(self) -> MNISTDiffusionPipeline:
        """The pipeline with the averaged weights of this step."""
        self.state.update_averaged_unet()
        return self.averaged

    def num_final_evaluations(self) -> int:
        """Network evaluations of one image each that follow the last step: held-out loss, sheet, strip, animation."""
        train, classes = self.config.train, min(self.data.num_classes, sheets.MAX_ROWS)
        images = classes * (train.samples_per_class + (3 if train.pictures else 0))
        return train.num_eval_images + 2 * images * self.averaged.config.num_inference_steps

    def prepare(self, config_text: str) -> None:
        """Rehearse the end of the run, and load the evaluator if images will be measured.

        Raises:
            UserError: something that comes at the end cannot work.
        """
        try:
            self._rehearse(config_text)
        except UserError:
            raise
        except Exception as error:  # libraries raise anything
            raise UserError(f"pre-flight check failed: {type(error).__name__}: {error}") from error
        if self.config.train.evaluate_every is not None:
            from mnist_diffusion.evaluation.evaluate import monitor  # takes seconds to import

            classes = self.averaged.num_classes or 1
            count = math.ceil(NUM_EVALUATION_IMAGES / classes) * classes
            self.measure = monitor(self.averaged, self.data, num_images=count, seed=self.config.train.seed)

    def _rehearse(self, config_text: str) -> None:
        """Rehearse sampling and every write, so that a failure shows up now rather than at the end."""
        pipeline, seed = self.pipeline(), self.config.train.seed
        labels, seeds, rows = sheets.sheet_rows(pipeline, self.data.class_names, 1, seed)
        try:
            next(pipeline.stream(**seeded_call(labels and labels[:1], seeds[:1])))
        except ValueError as error:  # the pipeline's own, which name argument and value
            raise UserError(f"sampling as configured cannot work: {error}") from error
        image_grid(torch.zeros(len(seeds), *pipeline.image_shape), 1, row_labels=rows)
        # If the process is killed, `remove_left_behind` removes it.
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=self.folder, ignore_cleanup_errors=True) as name:
            temporary = Path(name)
            folder, config = temporary / self.folder.resolve().name / "pipeline", temporary / "config.yaml"
            self.export(folder, Progress())
            MNISTDiffusionPipeline.from_pretrained(folder)
            save_checkpoint(temporary, 0, {"unet": {"weight": torch.zeros(1)}}, {}, keep=1)
            append_text(temporary / "metrics.jsonl", "{}\n")
            replace_text(config, config_text)
            read_yaml(config)  # as resuming does

    def measure_loss(self, progress: Progress, log: logging.MetricsLog) -> None:
        """Measure the held-out loss."""
        if self.config.train.num_eval_images > 0:
            progress.held_out_loss = log.measured["held_out_loss"] = self.state.held_out_loss()

    def evaluate(self, progress: Progress, log: logging.MetricsLog) -> None:
        """Measure images, and keep the pipeline if its FID is the best so far."""
        with warn_on_failure("evaluate"):
            self.pipeline()
            metrics = self.measure()
            log.measured |= metrics
            if progress.best is None or metrics["fid"] < progress.best:
                with warn_on_failure("draw samples"):
                    self._draw_samples(progress)
                self.export(self.folder / "pipeline_best", progress)
                progress.best = metrics["fid"]

    def export(self, folder: Path, progress: Progress) -> None:
        """Write a pipeline folder of the averaged weights with its card, and the sample sheet of this step if any."""
        samples = None
        with contextlib.suppress(FileError):  # better no picture than no pipeline
            samples = read_picture(self._sheet_path(progress.step))
        paths = local_paths_in(dataclasses.asdict(self.config))
        card = {name: redact_paths(value, paths) for name, value in card_values(self, folder, progress).items()}
        export_pipeline(self.pipeline(), folder, card=card, samples=samples)

    def export_snapshot(self, progress: Progress) -> None:
        """Write a snapshot of this step."""
        self.export(self.folder / "snapshots" / f"step-{progress.step}", progress)

    def draw_first(self) -> None:
        """Draw the noise schedule, and what it does to a few training images."""
        if self.config.train.pictures:
            with warn_on_failure("draw the noise schedule"):
                process = NoisingProcess.of(self.averaged.scheduler)
                self._show("noise_schedule", curves.to_picture(curves.noise_schedule(process)), 0)
                self._show("forward_noising", sheets.noised(self.data, process, seed=self.config.train.seed), 0)

    def draw(self, progress: Progress, log_path: Path) -> None:
        """Draw the sample sheet of this step, how images form, and the training curves."""
        with warn_on_failure("draw samples"):
            self._draw_samples(progress)
            if self.config.train.pictures:
                figure = curves.training_curves(read_metrics(log_path), title=f"Training, {self.context.recipe}")
                self._show("training_curves", curves.to_picture(figure), progress.step)

    def _draw_samples(self, progress: Progress) -> None:
        if self.drawn_step == progress.step:
            return
        pipeline, names, train = self.pipeline(), self.data.class_names, self.config.train
        sheet, images = sheets.sample_sheet(pipeline, names, columns=train.samples_per_class, seed=train.seed)
        self.sheet_images = to_uint8(2 * images - 1)
        self._show("samples", sheet, progress.step, self._sheet_path(progress.step))
        if train.pictures:
            self._show("denoising", sheets.denoised(pipeline, names, seed=train.seed), progress.step)
        self.drawn_step = progress.step

    def draw_last(self, progress: Progress) -> None:
        """Draw the same seeds over the epochs, as a sheet and an animation, and how a few images form."""
        if not self.config.train.pictures:
            return
        epochs_per_step = self.config.data.batch_size / len(self.data.train)
        history = sample_sheets(self.folder, epochs_per_step=epochs_per_step)
        if len(history) > 1:
            self._show("epochs", sheets.sheet_of_epochs(history), progress.step)
            frames = sheets.frames_of_epochs(history)
            save_animation(frames, self.folder / "pictures" / "epochs.gif", milliseconds=400)
        columns, seed = min(ANIMATED_PER_CLASS, self.config.train.samples_per_class), self.config.train.seed
        labels, seeds, names = sheets.sheet_rows(self.pipeline(), self.data.class_names, columns, seed)
        frames = sheets.denoising_frames(self.averaged, labels, seeds, columns, row_labels=names)
        save_animation(frames, self.folder / "pictures" / "denoising.gif")

    def _sheet_path(self, step: int) -> Path:
        return self.folder / "samples" / f"step-{step:06d}.png"

    def _show(self, name: str, picture: Image.Image, step: int, path: Path | None = None) -> None:
        """Save a picture, in `pictures/` by default, and send it to the trackers."""
        path = path or self.folder / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        replace_picture(picture, path)
        with warn_on_failure("send a picture to the trackers"):
            logging.track_picture(self.context.accelerator, name, picture, step)


def copies_warning(artifacts: Artifacts) -> str:
    """A warning if the last sample sheet seems to show copies of training images; empty otherwise."""
    from mnist_diffusion.evaluation import metrics, score  # takes a second to import

    if len(sheet := artifacts.sheet_images) == 0:
        return ""
    count = min(MAX_COMPARED, max(100, MAX_COMPARED_VALUES // sheet[0].numel()))
    training, held_out = artifacts.data.train.spread(count)[0], artifacts.data.test.spread(count // 10)[0]
    sampled, real = (metrics.nearest_images(each, training) for each in (sheet, held_out))
    share, low, _ = score.copied_share(sampled, real)
    if low <= score.SUSPICIOUS_SHARE:
        return ""
    return (
        f"WARNING: {share:.0%} of the last {len(sheet)} samples are nearly copies of training "
        "images: more images or augmentation may help; `mnist-diffusion evaluate` shows them"
    )


def example_call(pipeline: MNISTDiffusionPipeline) -> str:
    """Python that calls a pipeline."""
    if (classes := pipeline.num_classes) is None:
        return "pipeline()"
    label = min(3, classes - 1)
    name = class_names(pipeline)[label]
    guidance = "" if pipeline.config.guidance_distilled else f", guidance_scale={pipeline.config.guidance_scale:g}"
    return f"pipeline(class_labels=[{label if name == str(label) else json.dumps(name)}]{guidance})"


def usage(pipeline: MNISTDiffusionPipeline, folder: Path) -> str:
    """Python that loads a pipeline from its folder with plain diffusers and saves one image."""
    return (
        "from diffusers import DiffusionPipeline\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)\n'
        f'{example_call(pipeline)}.images[0].resize((280, 280), 0).save("sample.png")'
    )


def card_values(artifacts: Artifacts, folder: Path, progress: Progress) -> dict[str, Any]:
    """The values of the model card."""
    data, config, pipeline = artifacts.data, artifacts.config, artifacts.averaged
    conditional = [] if pipeline.num_classes is None else ["class-conditional", "classifier-free-guidance"]
    defaults = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_distilled", "flow_matching")
    return {
        "title": f"{folder.parent.name} ({artifacts.context.recipe})" if folder.name == "pipeline" else folder.name,
        "location": REPO_PLACEHOLDER,
        "tags": ["diffusion", *conditional],
        "datasets": [data.hub_id] if data.hub_id is not None else None,
        "class_names": ", ".join(map(as_markdown, data.class_names)),
        "num_classes": pipeline.num_classes,
        "parameters": pipeline.unet.num_parameters(),
        "example_call": example_call(pipeline),
        "scheduler": config.sampling.scheduler or "ddpm",
        **{name: pipeline.config[name] for name in defaults},
        **{name: getattr(data, name) for name in ("image_size", "channels", "source", "source_id", "notice")},
        "seed": config.train.seed,
        "num_train_images": len(data.train),
        "fingerprint": data.fingerprint[:16],
        "objective": artifacts.state.objective,
        "steps": progress.step,
        "epochs": progress.step * config.data.batch_size / len(data.train),
        "batch_size": config.data.batch_size,
        "minutes": progress.seconds / 60,
        "machine": logging.machine(artifacts.context.accelerator),
        "loss": progress.loss,
        "held_out_loss": progress.held_out_loss,
        "versions": ", ".join(f"{name} {number}" for name, number in package_versions().items()),
        "config": yaml_text(config.reproducible().to_dict(), width=10**6),
        **artifacts.card,
    }
