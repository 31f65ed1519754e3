"""Sample for the app: check the visitors' settings, and yield pictures while they form."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.decoding import decode_picture
from mnist_diffusion.data.transforms import fit_to_size, to_channels
from mnist_diffusion.errors import UserError
from mnist_diffusion.option_types import SAMPLER_NAMES, checked
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
FIGURE = Markup('<figure><figcaption>{title} <small>{about}</small></figcaption><img src="{picture}" alt=""></figure>')


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


@dataclass(frozen=True)
class Request:
    """What a visitor wants to see, within the bounds of [`request_of`].

    Args:
        class_labels: names of classes.
        num_images: images of each class.
        settings: how they are sampled.
        seed: seed of the first image; the next images have the next seeds.
    """

    class_labels: tuple[str, ...]
    num_images: int
    settings: SamplingSettings
    seed: int

    def call(self, pipeline: MNISTDiffusionPipeline) -> dict[str, Any]:
        """The arguments of a call of this pipeline.

        Raises:
            UserError: the pipeline has no such classes.
        """
        settings, labels = self.settings, None
        if pipeline.num_classes is None:
            settings = dataclasses.replace(settings, guidance_scale=None)
        else:
            if not self.class_labels:
                raise UserError("choose one class or more")
            labels = [label_of(pipeline, name) for name in self.class_labels]
        # A seed for each image, as everywhere in this package.
        count = self.num_images * len(labels or (0,))
        generators = [torch.Generator().manual_seed(self.seed + index) for index in range(count)]
        images = {"class_labels": labels, "num_images_per_label": self.num_images}
        return {**images, **call_arguments(pipeline, settings), "generator": generators}

    def code(self, pipeline: MNISTDiffusionPipeline, source: str) -> str:
        """Python that samples the same images with the pipeline of a folder or a Hub id."""
        call = self.call(pipeline)
        seeds = f"range({self.seed}, {self.seed + len(call.pop('generator'))})"
        lines = ["import torch", "from mnist_diffusion import load", "", f"pipeline = load({source!r})"]
        if (scheduler := self.settings.scheduler) is not None:
            lines.insert(2, "from mnist_diffusion.pipelines.samplers import build_sampler")
            lines.append(f"pipeline.scheduler = build_sampler({scheduler!r}, pipeline.scheduler.config)")
        arguments = ", ".join(f"{key}={value!r}" for key, value in call.items())
        lines.append(f"generators = [torch.Generator().manual_seed(seed) for seed in {seeds}]")
        return "\n".join([*lines, f"images = pipeline({arguments}, generator=generators).images"])


def request_of(*, classes: Any, count: Any, seed: Any, sampler: Any, steps: Any, scale: Any) -> Request:
    """Check the values of the app's controls, and build a visitor's request from them.

    Raises:
        UserError: a value is out of bounds.
    """
    each = check_int("images per class", count, 1, MAX_IMAGES)
    check_int("images in all", max(1, len(classes)) * each, 1, MAX_IMAGES)
    values = {
        "scheduler": None if sampler == PIPELINE_DEFAULT else sampler,
        "num_inference_steps": check_int("steps", steps, 1, MAX_STEPS),
        "guidance_scale": check_range("guidance scale", scale, 0, MAX_GUIDANCE),
    }
    names = tuple(map(str, classes))
    return Request(names, each, checked(SamplingSettings, values), check_int("seed", seed, 0, MAX_SEED))


def label_of(pipeline: MNISTDiffusionPipeline, name: Any) -> int:
    """The number of a class.

    Raises:
        UserError: the pipeline has no such class, or none at all.
    """
    if not (names := class_names(pipeline)):
        raise UserError("this pipeline is unconditional: it has no classes to choose from")
    return names.index(check_choice("class", name, names))


class Drawing:
    """Images that form a step at a time.

    Args:
        pipeline: the pipeline.
        request: what it samples.

    Raises:
        UserError, ValueError, TypeError: the settings cannot work with this pipeline.
    """

    def __init__(self, pipeline: MNISTDiffusionPipeline, request: Request):
        self.pipeline, self.over = with_sampler(pipeline, request.settings.scheduler), False
        self.stream: Generator[Any, Any, None] = self.pipeline.stream(**request.call(pipeline))
        self.steps = self.pipeline.num_timesteps
        self.pictures: list[Image.Image] = []
        count, classes = request.num_images, request.class_labels
        self.value: dict[str, Any] = {
            "columns": count if classes else max(1, round(count**0.5)),
            "about": f"{count} images" + (f" of each class, a row each: {', '.join(classes)}" if classes else ""),
            "file": f"{'-'.join(classes)[:50]}-seed{request.seed}".lstrip("-"),
            "frames": [],
            "animation": None,
        }
        """What the app's player shows; pictures are `data:` addresses."""

    def advance(self, changes: dict[str, Any] | None = None, note: str = "") -> dict[str, Any]:
        """Take the next denoising step, and return the new value of the player.

        Args:
            changes: new call arguments for this and all later steps, such as `guidance_scale`.
            note: text to append to the caption.

        Raises:
            UserError, ValueError: the changes do not work with this pipeline; the drawing has then ended.
        """
        self.over = True
        done = self.stream.send(changes)
        noisy, clean = (
            image_grid(to_unit(each), self.value["columns"]) for each in (done.latents, done.pred_original_sample)
        )
        place = f"Step {done.step + 1} of {self.steps}, timestep {float(done.timestep):.0f}"
        caption = f"{place}; {done.nfe} network evaluations{note}"
        self.value["frames"].append({"noisy": embedded(noisy), "clean": embedded(clean), "caption": caption})
        self.pictures.append(clean)
        self.over = len(self.pictures) == self.steps
        if self.over:
            self.stream.close()
            self.value["animation"] = embedded(clean, "GIF", **animation(self.pictures))
        return self.value


def stream_frames(pipeline: MNISTDiffusionPipeline, request: Request) -> Iterator[dict[str, Any]]:
    """Sample, and yield the value of the player after each step.

    Raises:
        UserError, ValueError, TypeError: the settings cannot work with this pipeline, or it took too long.
    """
    drawing, deadline = Drawing(pipeline, request), time.monotonic() + MAX_SECONDS
    while not drawing.over:
        yield drawing.advance()
        check_deadline(deadline)


def steered(drawing: Drawing, class_label: str, guidance_scale: float) -> dict[str, Any]:
    """Do the next step of a drawing under this class and scale; the value of the player.

    Raises:
        UserError, ValueError: the pipeline cannot.
    """
    scale = check_range("guidance scale", guidance_scale, 0, MAX_GUIDANCE)
    changes = {"class_labels": [label_of(drawing.pipeline, class_label)], "guidance_scale": scale}
    return drawing.advance(changes if drawing.pictures else None, f"; {class_label}, guidance {scale:g}")


def check_deadline(deadline: float) -> None:
    """Raise UserError if a drawing takes too long."""
    if time.monotonic() > deadline:
        raise UserError(f"this took longer than {MAX_SECONDS:.0f} s and was stopped; choose fewer images or steps")


def figure(title: str, picture: Image.Image, about: str = "") -> Markup:
    """A titled picture; all text is escaped."""
    return FIGURE.format(title=title, about=about, picture=embedded(picture))


def compared(
    pipelines: Mapping[str, MNISTDiffusionPipeline],
    *,
    samplers: Sequence[str],
    steps: Sequence[int],
    scales: Sequence[float],
    seed: int,
) -> Iterator[Markup]:
    """Sample one image of each class (at most 10) from the same seeds with each combination; yields figures so far.

    Raises:
        UserError, ValueError, TypeError: one of them cannot work.
    """
    check_int("combinations", len(pipelines) * len(samplers) * len(steps) * len(scales), 1, MAX_ROWS)
    figures, deadline = Markup(), time.monotonic() + MAX_SECONDS
    for name, sampler, count, scale in itertools.product(pipelines, samplers, steps, scales):
        names = class_names(pipelines[name])[:MAX_COLUMNS]
        how: dict[str, Any] = {"sampler": sampler, "steps": count, "scale": scale, "seed": seed}
        request = request_of(classes=names, count=1 if names else MAX_COLUMNS, **how)
        pipeline, started = with_sampler(pipelines[name], request.settings.scheduler), time.perf_counter()
        for done in pipeline.stream(**request.call(pipeline)):  # noqa: B007
            check_deadline(deadline)
        milliseconds = 1000 * (time.perf_counter() - started) / len(done.latents)
        title = f"{name}: {sampler_name(pipeline.scheduler)}, {count} steps, guidance {scale:g}"
        about = f"{done.nfe / len(done.latents):.3g} network evaluations and {milliseconds:.0f} ms per image"
        figures += figure(title, image_grid(to_unit(done.latents), len(done.latents)), about)
        yield figures


def interpolated(
    pipeline: MNISTDiffusionPipeline, *, classes: tuple[str, str], seeds: tuple[int, int], frames: int, scale: float
) -> Markup:
    """Sample between two classes and between the noises of two seeds.

    Raises:
        UserError, ValueError, TypeError: it cannot work with this pipeline.
    """
    generators = [torch.Generator().manual_seed(check_int("seed", seed, 0, MAX_SEED)) for seed in seeds]
    deadline = time.monotonic() + MAX_SECONDS
    images = pipeline.interpolate(
        [label_of(pipeline, name) for name in classes],
        check_int("images", frames, 2, MAX_FRAMES),
        generator=generators,
        guidance_scale=check_range("guidance scale", scale, 0, MAX_GUIDANCE),
        output_type="pt",
        callback_on_step_end=lambda *_: check_deadline(deadline),
    ).images
    title = f"From {classes[0]} (seed {seeds[0]}) to {classes[1]} (seed {seeds[1]})"
    return figure(title, image_grid(images, len(images)), f"{len(images)} images")


def decode_sketch(address: Any, shape: tuple[int, int, int]) -> Tensor:
    """Decode the picture that a visitor drew or chose, to float `[1, C, H, W]` in [0, 1].

    Args:
        address: a PNG as a `data:` address.
        shape: channels, height and width to convert it to.

    Raises:
        UserError, ValueError: it is not such a picture, or blank.
    """
    kind = "data:image/png;base64,"
    if not isinstance(address, str) or not address.startswith(kind) or len(address) > MAX_PICTURE_BYTES:
        raise UserError("draw a picture first, or choose a file")
    content = base64.b64decode(address.removeprefix(kind))
    if not content.startswith(PNG):
        raise UserError("the drawing must be a PNG")
    picture = decode_picture(content, "the drawing", grey=shape[0] == 1, max_pixels=MAX_PICTURE_SIDE**2)
    image = fit_to_size(to_channels(picture[None], shape[0]), shape[1], "contain").float() / 255
    if image.max() == image.min():
        raise UserError("the drawing is blank; draw a picture first, or choose a file")
    return image


def reconstruct(
    pipeline: MNISTDiffusionPipeline, image: Tensor, *, source_class: str, target_class: str, scale: float
) -> Markup:
    """Find the noise of a picture, and sample from it under its own class and under another.

    Raises:
        UserError, ValueError, TypeError: it cannot work with this pipeline.
    """
    source, target = label_of(pipeline, source_class), label_of(pipeline, target_class)
    scale, deadline = check_range("guidance scale", scale, 0, MAX_GUIDANCE), time.monotonic() + MAX_SECONDS
    latents = pipeline.invert(image, [source], num_inference_steps=INVERSION_STEPS)
    ddim = with_sampler(pipeline, "ddim")
    how: dict[str, Any] = {"num_inference_steps": INVERSION_STEPS, "eta": 0.0, "latents": latents, "output_type": "pt"}
    how["callback_on_step_end"] = lambda *_: check_deadline(deadline)
    pictures = {
        "Your picture": image,
        f"Its noise, as {source_class}": to_unit(latents),
        f"Sampled from this noise as {source_class}": ddim([source], guidance_scale=1.0, **how).images,
        f"Sampled from this noise as {target_class}": ddim([target], guidance_scale=scale, **how).images,
    }
    return Markup("").join(figure(title, image_grid(each, 1)) for title, each in pictures.items())
