"""What the app draws: visitors' settings are checked, and pictures come out while they form."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.decoding import decode_picture
from mnist_diffusion.data.transforms import fit_to_size, to_channels
from mnist_diffusion.errors import UserError
from mnist_diffusion.option_types import AUTOGUIDANCE, CFG, SAMPLER_NAMES, checked
from mnist_diffusion.pipelines.drawing import call_arguments, class_names, with_sampler
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import sampler_name
from mnist_diffusion.plots.grids import animation, image_grid, to_unit
from mnist_diffusion.plots.run_page import embedded

MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 64, 100, 20, 2**32 - 1
MAX_ROWS, MAX_COLUMNS, MAX_FRAMES = 12, 10, 16
MAX_SECONDS = 60.0
"""After this time a drawing is given up, so that others get their turn."""
MAX_PICTURE_BYTES, MAX_PICTURE_SIDE = 2**19, 1024
PNG = b"\x89PNG\r\n\x1a\n"
PIPELINE_DEFAULT = "pipeline default"
SAMPLER_CHOICES = (PIPELINE_DEFAULT, *SAMPLER_NAMES)
INVERSION_STEPS = 50
Load = Callable[[str], MNISTDiffusionPipeline]


def check_range(name: str, value: Any, low: float, high: float) -> float:
    """A number between two bounds, both included.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low:g} to {high:g}, got {value!r:.100}")
    return float(value)


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """A whole number between two bounds, both included."""
    if not check_range(name, value, low, high).is_integer():
        raise UserError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the choices."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r:.100}")
    return str(value)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a visitor wants to see.

    Args:
        class_labels: names of classes.
        num_images: images of each class.
        settings: how they are sampled; a guidance rule may name a loaded model.
        seed: seed of the first image; the next images have the next seeds.

    Raises:
        UserError: it is out of bounds.
    """

    class_labels: tuple[str, ...]
    num_images: int
    settings: SamplingSettings
    seed: int

    def __post_init__(self) -> None:
        count = max(1, len(self.class_labels)) * check_int("images per class", self.num_images, 1, MAX_IMAGES)
        check_int("images in all", count, 1, MAX_IMAGES)
        check_range("guidance scale", self.settings.guidance_scale, 0, MAX_GUIDANCE)
        check_int("steps", self.settings.num_inference_steps, 1, MAX_STEPS)
        check_int("seed", self.seed, 0, MAX_SEED)

    def call(self, pipeline: MNISTDiffusionPipeline, load: Load | None = None) -> dict[str, Any]:
        """The arguments of a call of this pipeline; `load` loads the model of autoguidance.

        Raises:
            UserError: the pipeline has no such classes.
        """
        settings, labels = self.settings, None
        if pipeline.num_classes is None:
            settings = dataclasses.replace(settings, guidance_scale=None, guidance_interval=None, guidance=CFG)
        else:
            if not self.class_labels:
                raise UserError("choose one class or more")
            labels = [label_of(pipeline, name) for name in self.class_labels]
        if pipeline.config.guidance_distilled:
            settings = dataclasses.replace(settings, guidance_interval=None)
        # A seed for each image, as everywhere in this package.
        count = self.num_images * len(labels or (0,))
        generators = [torch.Generator().manual_seed(self.seed + index) for index in range(count)]
        images = {"class_labels": labels, "num_images_per_label": self.num_images}
        return {**images, **call_arguments(pipeline, settings, load=load), "generator": generators}

    def with_sampler(self, pipeline: MNISTDiffusionPipeline) -> MNISTDiffusionPipeline:
        """The pipeline with the sampler of the settings."""
        name = self.settings.scheduler
        return pipeline if name is None else with_sampler(pipeline, name)

    def code(self, pipeline: MNISTDiffusionPipeline, source_of: Callable[[str], str], name: str) -> str:
        """Python that samples the same images; `source_of` maps a model's name to its folder or Hub id."""
        plain = dataclasses.replace(self, settings=dataclasses.replace(self.settings, guidance=CFG)).call(pipeline)
        seeds = f"range({self.seed}, {self.seed + len(plain.pop('generator'))})"
        imports = ["import torch", "from mnist_diffusion import load"]
        lines = [f"pipeline = load({source_of(name)!r})"]
        if self.settings.scheduler is not None:
            imports.append("from mnist_diffusion.pipelines.samplers import build_sampler")
            scheduler = self.settings.scheduler
            lines.append(f"pipeline.scheduler = build_sampler({scheduler!r}, pipeline.scheduler.config)")
        arguments = [f"{key}={value!r}" for key, value in plain.items()]
        if (rule := self.settings.guidance) != CFG:
            kind, _, weaker = rule.partition(":")
            rule = f"{AUTOGUIDANCE}{source_of(weaker)}" if weaker else kind
            imports.append("from mnist_diffusion.config import SamplingSettings")
            imports.append("from mnist_diffusion.pipelines.drawing import call_arguments")
            guided = {name: getattr(self.settings, name) for name in ("guidance_scale", "guidance_interval")}
            values = ", ".join(f"{key}={value!r}" for key, value in {**guided, "guidance": rule}.items())
            lines.append(f"guidance = call_arguments(pipeline, SamplingSettings({values}))")
            arguments = [text for text in arguments if not text.startswith("guidance")] + ["**guidance"]
        lines.append(f"generators = [torch.Generator().manual_seed(seed) for seed in {seeds}]")
        return "\n".join([*imports, *lines, f"images = pipeline({', '.join(arguments)}, generator=generators).images"])


def settings_from(
    *, scheduler: Any, steps: Any, scale: Any, interval: tuple[Any, Any] | None = None, rule: str = CFG
) -> SamplingSettings:
    """The sampling settings of the app's controls.

    Raises:
        UserError: one is out of bounds.
    """
    values = {
        "scheduler": None if scheduler == PIPELINE_DEFAULT else scheduler,
        "num_inference_steps": check_int("steps", steps, 1, MAX_STEPS),
        "guidance_scale": check_range("guidance scale", scale, 0, MAX_GUIDANCE),
        "guidance_interval": interval,
        "guidance": rule,
    }
    settings: SamplingSettings = checked(SamplingSettings, values)
    return settings


def label_of(pipeline: MNISTDiffusionPipeline, name: Any) -> int:
    """The number of a class.

    Raises:
        UserError: the pipeline has no such class, or none at all.
    """
    if not (names := class_names(pipeline)):
        raise UserError("this pipeline is unconditional: it has no classes to choose from")
    return names.index(check_choice("class", name, names))


@dataclass
class DenoisingPlayer:
    """How images form, for the app's player; pictures are `data:` addresses.

    Args:
        columns: images in a row of each picture.
        about: what the pictures show.
        file: name of the files to save, without a suffix.
        frames: for each step the noisy samples, the predicted images, and a caption.
        animation: the predicted images as a GIF, when they are complete.
    """

    columns: int
    about: str
    file: str
    frames: list[dict[str, str]] = field(default_factory=list)
    animation: str | None = None
    predicted: list[Image.Image] = field(default_factory=list)

    def add(self, done: Any, steps: int) -> None:
        """Add the state after a step of `steps`."""
        noisy, clean = (image_grid(to_unit(each), self.columns) for each in (done.latents, done.pred_original_sample))
        caption = (
            f"Step {done.step + 1} of {steps}, timestep {float(done.timestep):.0f}; {done.nfe} network evaluations"
        )
        self.frames.append({"noisy": embedded(noisy), "clean": embedded(clean), "caption": caption})
        self.predicted.append(clean)

    def finish(self) -> None:
        """Make the GIF."""
        self.animation = embedded(self.predicted[0], "GIF", **animation(self.predicted))

    def value(self) -> dict[str, Any]:
        """The value of the player's component."""
        return {name: getattr(self, name) for name in ("columns", "about", "file", "frames", "animation")}


def stream_frames(
    pipeline: MNISTDiffusionPipeline, request: Request, load: Load | None = None
) -> Iterator[DenoisingPlayer]:
    """Sample, and yield the player after each step.

    Raises:
        UserError, ValueError, TypeError: the settings cannot work with this pipeline, or it took too long.
    """
    player, deadline = _player(request, pipeline), time.monotonic() + MAX_SECONDS
    pipeline = request.with_sampler(pipeline)
    for done in pipeline.stream(**request.call(pipeline, load)):
        player.add(done, pipeline.num_timesteps)
        yield player
        check_deadline(deadline)
    player.finish()
    yield player


def check_deadline(deadline: float) -> None:
    """Raise UserError if a drawing takes too long."""
    if time.monotonic() > deadline:
        raise UserError(f"this took longer than {MAX_SECONDS:.0f} s and was stopped; choose fewer images or steps")


def deadline_callback(deadline: float) -> dict[str, Any]:
    """Arguments of a call that is stopped at a deadline."""

    def check(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        check_deadline(deadline)
        return {}

    return {"callback_on_step_end": check}


def _player(request: Request, pipeline: MNISTDiffusionPipeline) -> DenoisingPlayer:
    count = request.num_images
    if pipeline.num_classes is None:
        return DenoisingPlayer(max(1, round(count**0.5)), f"{count} images", f"seed{request.seed}")
    about = f"{count} images of each class, one row for each: {', '.join(request.class_labels)}"
    return DenoisingPlayer(count, about, f"{'-'.join(request.class_labels)[:50]}-seed{request.seed}")


class Steering:
    """A sampling that advances a step at a time, while its class and guidance may change.

    Args:
        pipeline: the pipeline.
        request: how it starts.
    """

    def __init__(self, pipeline: MNISTDiffusionPipeline, request: Request):
        self.player, self.pipeline = _player(request, pipeline), request.with_sampler(pipeline)
        self.stream: Generator[Any, dict[str, Any] | None, None] = self.pipeline.stream(**request.call(pipeline))
        self.steps, self.over = self.pipeline.num_timesteps, False

    def advance(self, class_label: str, guidance_scale: float) -> None:
        """Do the next step, under this class and scale.

        Raises:
            UserError, ValueError: the pipeline cannot; the sampling is over.
        """
        changes: dict[str, Any] | None = None
        if self.player.frames:
            scale = check_range("guidance scale", guidance_scale, 0, MAX_GUIDANCE)
            changes = {"class_labels": [label_of(self.pipeline, class_label)], "guidance_scale": scale}
        self.over = True
        self.player.add(self.stream.send(changes), self.steps)
        self.over = len(self.player.frames) >= self.steps
        self.player.frames[-1]["caption"] += f"; {class_label}, guidance {guidance_scale:g}"
        if self.over:
            self.stream.close()
            self.player.finish()


class Row(NamedTuple):
    """A titled picture."""

    title: str
    about: str
    picture: str


def compared(
    pipelines: Mapping[str, MNISTDiffusionPipeline],
    *,
    samplers: Sequence[str],
    steps: Sequence[int],
    scales: Sequence[float],
    seed: int,
) -> Iterator[list[Row]]:
    """Sample one image of each class (at most 10) from the same seeds with each combination; yields rows as they come.

    Raises:
        UserError, ValueError, TypeError: one of them cannot work.
    """
    check_int("combinations", len(pipelines) * len(samplers) * len(steps) * len(scales), 1, MAX_ROWS)
    rows, deadline = [], time.monotonic() + MAX_SECONDS
    for name, sampler, count, scale in itertools.product(pipelines, samplers, steps, scales):
        names = class_names(pipelines[name])[:MAX_COLUMNS]
        settings = settings_from(scheduler=sampler, steps=count, scale=scale)
        images = 1 if names else MAX_COLUMNS
        request = Request(class_labels=names, num_images=images, settings=settings, seed=seed)
        pipeline, started = request.with_sampler(pipelines[name]), time.perf_counter()
        for done in pipeline.stream(**request.call(pipeline)):  # noqa: B007
            check_deadline(deadline)
        milliseconds = 1000 * (time.perf_counter() - started) / len(done.latents)
        title = f"{name}: {sampler_name(pipeline.scheduler)}, {count} steps, guidance {scale:g}"
        about = f"{done.nfe / len(done.latents):.3g} network evaluations and {milliseconds:.0f} ms per image"
        rows.append(Row(title, about, embedded(image_grid(to_unit(done.latents), len(done.latents)))))
        yield rows


def interpolated(
    pipeline: MNISTDiffusionPipeline, *, classes: tuple[str, str], seeds: tuple[int, int], frames: int, scale: float
) -> list[Row]:
    """Sample between two classes and between the noises of two seeds.

    Raises:
        UserError, ValueError, TypeError: it cannot work with this pipeline.
    """
    generators = [torch.Generator().manual_seed(check_int("seed", seed, 0, MAX_SEED)) for seed in seeds]
    images = pipeline.interpolate(
        [label_of(pipeline, name) for name in classes],
        check_int("images", frames, 2, MAX_FRAMES),
        generator=generators,
        guidance_scale=check_range("guidance scale", scale, 0, MAX_GUIDANCE),
        output_type="pt",
        **deadline_callback(time.monotonic() + MAX_SECONDS),
    ).images
    title = f"From {classes[0]} (seed {seeds[0]}) to {classes[1]} (seed {seeds[1]})"
    return [Row(title, f"{len(images)} images", embedded(image_grid(images, len(images))))]


def decode_sketch(address: Any, shape: tuple[int, int, int]) -> Tensor:
    """Decode the picture that a visitor drew or chose, to float `[1, C, H, W]` in [0, 1].

    Args:
        address: a PNG as a `data:` address.
        shape: channels, height and width to convert it to.

    Raises:
        UserError: it is not such a picture, or blank.
    """
    kind = "data:image/png;base64,"
    if not isinstance(address, str) or not address.startswith(kind) or len(address) > MAX_PICTURE_BYTES:
        raise UserError("draw a picture first, or choose a file")
    try:
        content = base64.b64decode(address.removeprefix(kind), validate=True)
    except binascii.Error as error:
        raise UserError("the drawing could not be read") from error
    if not content.startswith(PNG):
        raise UserError("the drawing must be a PNG")
    drawn = decode_picture(content, "the drawing", grey=shape[0] == 1, max_pixels=MAX_PICTURE_SIDE**2)
    image = to_channels(drawn[None], shape[0])
    image = fit_to_size(image, shape[1], "contain").float() / 255
    if image.max() == image.min():
        raise UserError("the drawing is blank; draw a picture first, or choose a file")
    return image


def reconstruct(
    pipeline: MNISTDiffusionPipeline, image: Tensor, *, source_class: str, target_class: str, scale: float
) -> list[Row]:
    """Find the noise of a picture, and sample from it: the picture again, and what it is under another class.

    Raises:
        UserError, ValueError, TypeError: it cannot work with this pipeline.
    """
    source, target = label_of(pipeline, source_class), label_of(pipeline, target_class)
    scale, deadline = check_range("guidance scale", scale, 0, MAX_GUIDANCE), time.monotonic() + MAX_SECONDS
    latents = pipeline.invert(image, [source], num_inference_steps=INVERSION_STEPS)
    ddim = with_sampler(pipeline, "ddim")

    def sampled(label: int, guidance_scale: float) -> Tensor:
        call = {"num_inference_steps": INVERSION_STEPS, "output_type": "pt", "eta": 0.0, **deadline_callback(deadline)}
        return ddim([label], latents=latents, guidance_scale=guidance_scale, **call).images

    pictures = {
        "Your picture": image,
        f"Its noise, as a {source_class}": to_unit(latents),
        f"Sampled from this noise as {source_class}": sampled(source, 1.0),
        f"Sampled from this noise as {target_class}": sampled(target, scale),
    }
    return [Row(title, "", embedded(image_grid(each, 1))) for title, each in pictures.items()]
