"""Entry points: `train(config)` and `distill(config)` assemble a run from its configuration and execute it."""

from __future__ import annotations

import contextlib
import copy
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import UNet2DModel

from mnist_diffusion.config import Config, DistillConfig, HubConfig, RunConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.errors import ConfigError, UserError
from mnist_diffusion.files import read_json
from mnist_diffusion.hub_client import HubError, open_repository
from mnist_diffusion.method import distillation
from mnist_diffusion.method import network as networks
from mnist_diffusion.method import objective as objectives
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import Objective
from mnist_diffusion.pipelines import drawing
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline, prediction_type_of
from mnist_diffusion.pipelines.samplers import build_sampler, student_scheduler
from mnist_diffusion.training.artifacts import Artifacts
from mnist_diffusion.training.launch import RunContext, start_run
from mnist_diffusion.training.probe import fastest
from mnist_diffusion.training.run_folder import with_training_images
from mnist_diffusion.training.schedule import is_timed
from mnist_diffusion.training.step import TrainState
from mnist_diffusion.training.trainer import Trainer

NetworkBuilder = Callable[..., UNet2DModel]
"""Builds the network, with the arguments of [`mnist_diffusion.method.network.build_unet`]."""
ObjectiveBuilder = Callable[[Any, NoisingProcess, int | None], Objective]
"""Builds the objective, with the arguments of [`mnist_diffusion.method.objective.diffusion_objective`]."""
RUNNING = threading.Lock()
"""Held while a run takes place in this process."""


@dataclass(frozen=True)
class TrainedRun:
    """The result of a run: its folder, and the exit code that a command would return."""

    folder: Path
    exit_code: int

    @property
    def pipeline(self) -> MNISTDiffusionPipeline:
        """The exported pipeline with the averaged weights."""
        return MNISTDiffusionPipeline.from_pretrained(self.folder / "pipeline")

    @property
    def summary(self) -> Mapping[str, Any]:
        """The content of `summary.json`, which says whether a signal stopped the run."""
        return read_json(self.folder / "summary.json")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Refuse a second run in another thread: precision and random state belong to the process."""
    if not RUNNING.acquire(blocking=False):
        raise UserError("another run is still in progress in this process; start each run in its own process")
    try:
        yield
    finally:
        RUNNING.release()


@one_at_a_time()
def train(
    config: Config,
    *,
    network: NetworkBuilder | None = None,
    objective: ObjectiveBuilder | None = None,
    recipe: str = "python",
    dry_run: bool = False,
) -> TrainedRun:
    """Train a model, in this process.

    Args:
        config: the run, such as `Config.load("default")`.
        network: builds another network than `build_unet`.
        objective: builds another objective than `diffusion_objective`.
        recipe: name of the recipe, for the folder and titles.
        dry_run: print the plan and stop.

    Raises:
        UserError: it cannot be done as configured.
    """
    context, config = start_run(config, recipe)
    images = context.load_images(config.data, seed=config.train.seed)
    shape = {"image_size": images.image_size, "channels": images.channels, "num_classes": images.num_classes}
    # A UNet that takes a noisy image, a timestep and a class; one more class, the null class, stands for "any".
    unet = (network or networks.build_unet)(config.model, **shape, seed=config.train.seed)
    networks.zero_init_output(unet)
    if config.train.init_from is not None and not context.resumes:
        with context.accelerator.main_process_first():  # which may download it
            context.accelerator.print(warm_start(config, unet, images.class_names))
    # The noising process: how an image turns into noise over the timesteps.
    scheduler = build_noise_scheduler(config.diffusion)
    # What the network learns: to undo the noise, sometimes without being told the class, as guidance needs.
    build_objective = objective or objectives.diffusion_objective
    learned = build_objective(config.diffusion, NoisingProcess.of(scheduler), objectives.null_class(unet))
    # What is exported: the averaged weights in a pipeline with a sampler, guidance and the class names.
    patch_size = networks.patch_size_of(unet, channels=images.channels)
    exported = partial(drawing.build_pipeline, scheduler, config.sampling, images.class_names, patch_size=patch_size)
    return run_training(context, config, images, unet, learned, exported, dry_run=dry_run)


@one_at_a_time()
def distill(config: DistillConfig, *, recipe: str = "python", dry_run: bool = False) -> TrainedRun:
    """Distil a trained pipeline into a student that samples in one network evaluation or a few, in this process.

    Args:
        config: the run, with its teacher.
        recipe: name of the recipe, for the folder and titles.
        dry_run: print the plan and stop.

    Raises:
        UserError: it cannot be done as configured.
    """
    config = with_images_of_teacher(config)
    context, config = start_run(config, f"student-{recipe}")
    with context.accelerator.main_process_first():  # which may download it
        teacher = load_teacher(config, context.accelerator)
    # The images the teacher was trained on: only their labels are used, and the student is measured against them.
    images = context.load_images(config.data, seed=config.distillation.split_seed)
    validate_teacher(config, teacher, images)
    # The student starts as a copy of the teacher, and predicts the velocity of the same noising process.
    scales = config.distillation.guidance_scales
    student, scheduler = distillation.student_of(teacher, len(scales)), student_scheduler(teacher.scheduler.config)
    # What it learns: at points of a teacher's trajectory, the image at its end.
    fingerprint = drawing.fingerprint(teacher)
    learned = distillation.distillation_objective(config.distillation, teacher, fingerprint=fingerprint)
    context.require_same("teachers", learned.fingerprint)
    # What is exported: a pipeline whose guidance is in the weights.
    sampling = replace(config.sampling, guidance_scale=scales[0])
    kind: dict[str, Any] = {"patch_size": teacher.config.patch_size, "guidance_distilled": scales}
    exported = partial(drawing.build_pipeline, scheduler, sampling, images.class_names, **kind)
    method = (
        f"regression on the ends of the teacher's trajectories, {config.distillation.num_teacher_steps} steps of "
        f"dpmpp at guidance {', '.join(f'{scale:g}' for scale in scales)}"
    )
    about = {"teacher": config.distillation.teacher, "teacher_fingerprint": fingerprint, "method": method}
    card = {**about, "seed": config.distillation.split_seed}
    context.accelerator.print(f"teacher      {config.distillation.teacher}")
    return run_training(context, config, images, student, learned, exported, card=card, dry_run=dry_run)


def run_training(
    context: RunContext,
    config: RunConfig,
    images: ImageData,
    unet: UNet2DModel,
    objective: Objective,
    make_pipeline: Callable[..., MNISTDiffusionPipeline],
    *,
    card: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> TrainedRun:
    """Train a network on an objective, and publish it if `hub.push` is set."""
    if is_timed(config.train) and not context.resumes:

        def build(context: RunContext, config: RunConfig) -> TrainState:
            return TrainState(config, context.accelerator, images, copy.deepcopy(unet), objective)

        context, config = fastest(context, config, build)
    state = TrainState(config, context.accelerator, images, unet, objective)
    artifacts = Artifacts(context, config, images, state, make_pipeline=make_pipeline, card=card)
    trainer = Trainer(artifacts)
    hub, repo_id = config.hub, config.hub.repo_id or context.folder.name
    # The repository is opened before the first step, so that a missing login costs nothing.
    code = trainer.run(lambda: hub.push and open_repository(repo_id, private=hub.private), dry_run=dry_run)
    if hub.push and code == 0 and not dry_run and trainer.processes.main:  # the process group has ended
        publish(hub, context.folder, repo_id)
    return TrainedRun(context.folder, code)


def publish(config: HubConfig, folder: Path, repo_id: str) -> None:
    """Push a finished run.

    Raises:
        HubError: it could not be pushed; the message says how to do it later.
    """
    from mnist_diffusion.hub import push

    try:
        address = push(folder, repo_id, private=config.private, with_checkpoints=config.with_checkpoints)
    except Exception as error:
        flags = [f"--{name}" for name in ("private", "with_checkpoints") if getattr(config, name)]
        later = shlex.join(["mnist-diffusion", "push", str(folder), repo_id, *flags])
        raise HubError(f"{error}\nThe run is complete in {folder}; push it later with: {later}") from None
    print(f"Pushed: {address}")


def warm_start(config: Config, unet: UNet2DModel, class_names: tuple[str, ...]) -> str:
    """Load the weights of `train.init_from` into `unet`, in place; a line that says so.

    Raises:
        UserError: there is no such pipeline, its network has another shape, or it has another prediction target.
    """
    source = str(config.train.init_from)
    pipeline = drawing.load_pipeline(source, device="cpu", dtype="float32")
    if (target := prediction_type_of(pipeline.scheduler)) != config.diffusion.prediction_type:
        expected = config.diffusion.prediction_type
        raise ConfigError(
            f"train.init_from={source!r} predicts {target!r}, but diffusion.prediction_type is {expected!r}"
        )
    same = drawing.class_names(pipeline) == class_names
    fits = networks.load_pretrained_weights(unet, pipeline.unet, same_classes=same)
    note = "" if fits else "; class embeddings start anew: the pipeline's are for other classes or guidance scales"
    return f"weights      {source}{note}"


def with_images_of_teacher(config: DistillConfig) -> DistillConfig:
    """The configuration with the images of the teacher's run, unless it names images itself.

    Raises:
        UserError: the configuration beside the teacher is not that of a run.
    """
    data, seed = with_training_images(config.distillation.teacher, config.data)
    split_seed = config.distillation.split_seed if seed is None else seed
    return replace(config, data=data, distillation=replace(config.distillation, split_seed=split_seed))


def load_teacher(config: DistillConfig, accelerator: Accelerator) -> MNISTDiffusionPipeline:
    """Load the teacher on the student's device, ready to sample trajectories.

    Raises:
        UserError: it could not be loaded, or is itself a student.
    """
    name = config.distillation.teacher
    teacher = drawing.load_pipeline(name, device=str(accelerator.device), dtype="float32")
    if teacher.config.guidance_distilled:
        raise UserError(f"distillation.teacher={name!r} is itself a student; name the model it was distilled from")
    teacher.unet.eval().requires_grad_(False)
    teacher.scheduler = build_sampler("dpmpp", teacher.scheduler.config)
    return teacher


def validate_teacher(config: DistillConfig, teacher: MNISTDiffusionPipeline, images: ImageData) -> None:
    """Check that the teacher fits the images and the configuration.

    Raises:
        UserError: it samples other images or classes, has too few timesteps, or no classes to guide.
    """
    drawing.require_fit(teacher, images)
    steps, available = config.distillation.num_teacher_steps, teacher.scheduler.config.num_train_timesteps
    if steps > available:
        raise UserError(f"distillation.num_teacher_steps={steps} must not exceed the teacher's {available} timesteps")
    if teacher.null_class is None and (scales := config.distillation.guidance_scales) != (1,):
        raise UserError(f"distillation.guidance_scales={list(scales)} must be [1] for an unconditional teacher")
