"""What the page draws: settings are checked, pictures come out while they form."""

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

from mnist_diffusion.checks import PLAIN_GUIDANCE, SAMPLERS, require, require_sampler
from mnist_diffusion.data.pictures import decode_picture
from mnist_diffusion.data.transforms import fit_to_size, to_channels
from mnist_diffusion.diffusion.guidance import guidance_arguments
from mnist_diffusion.diffusion.pipeline import class_names, with_sampler
from mnist_diffusion.diffusion.samplers import sampler_name
from mnist_diffusion.errors import UserError
from mnist_diffusion.pictures.grids import animation, image_grid, to_unit
from mnist_diffusion.pictures.page import embedded
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 64, 100, 20, 2**32 - 1
MAX_ROWS, MAX_COLUMNS, MAX_FRAMES = 12, 10, 16
MAX_SECONDS = 60.0
"""After this a drawing is given up, so that others get their turn."""
MAX_PICTURE_BYTES, MAX_PICTURE_SIDE = 2**19, 1024
PNG = b"\x89PNG\r\n\x1a\n"
OWN = "its own"
"""The sampler that a pipeline comes with."""
SAMPLER_NAMES = (OWN, *SAMPLERS)
INVERSION_STEPS = 50
Load = Callable[[str], MNISTDiffusionPipeline]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a visitor wants drawn, and how.

    Raises:
        ConfigError: it is out of bounds.
    """

    class_labels: tuple[str, ...]
    """Names of classes, of which as many images each are drawn."""
    num_images: int
    """Images of each class."""
    guidance_scale: float
    guidance_interval: tuple[float, float] | None = None
    """The pipeline's own if omitted."""
    guidance: str = PLAIN_GUIDANCE
    """The rule, as [`guidance_arguments`] takes it."""
    scheduler: str = OWN
    num_inference_steps: int
    seed: int
    """The first image's; the next images have the next ones."""

    def __post_init__(self) -> None:
        count = max(1, len(self.class_labels)) * whole("images per class", self.num_images, 1, MAX_IMAGES)
        require(count <= MAX_IMAGES, "images", count, f"at most {MAX_IMAGES} in all")
        within("guidance scale", self.guidance_scale, 0, MAX_GUIDANCE)
        for bound in self.guidance_interval or ():
            within("guidance interval", bound, 0, 1)
        whole("steps", self.num_inference_steps, 1, MAX_STEPS)
        whole("seed", self.seed, 0, MAX_SEED)
        require(isinstance(self.scheduler, str), "sampler", self.scheduler, "a name")
        if self.scheduler != OWN:
            require_sampler("sampler", self.scheduler)

    def call(self, pipeline: MNISTDiffusionPipeline, load: Load | None = None) -> dict[str, Any]:
        """Arguments of a call of this pipeline; `load` gives the model by which autoguidance is done.

        Raises:
            UserError: it has no such classes.
        """
        labels = None
        if pipeline.num_classes is not None:
            require(len(self.class_labels) > 0, "classes", [], "one or more")
            labels = [label_of(pipeline, name) for name in self.class_labels]
        count = self.num_images * len(labels or (0,))
        call: dict[str, Any] = {"class_labels": labels, "num_images_per_label": self.num_images}
        if labels is not None:
            interval = None if pipeline.config.guidance_distilled else self.guidance_interval
            call |= guidance_arguments(pipeline, self.guidance, self.guidance_scale, interval, load=load)
        # A seed for each image, as everywhere in this package.
        generators = [torch.Generator().manual_seed(self.seed + index) for index in range(count)]
        return {**call, "num_inference_steps": self.num_inference_steps, "generator": generators}

    def sampler(self, pipeline: MNISTDiffusionPipeline) -> MNISTDiffusionPipeline:
        """The pipeline with the sampler that was chosen."""
        return pipeline if self.scheduler == OWN else with_sampler(pipeline, self.scheduler)

    def code(self, pipeline: MNISTDiffusionPipeline, where: Callable[[str], str], name: str) -> str:
        """Python that draws the same images; `where` says from where a model is."""
        call = dataclasses.replace(self, guidance=PLAIN_GUIDANCE).call(pipeline)
        seeds = f"range({self.seed}, {self.seed + len(call.pop('generator'))})"
        lines = [
            "import torch",
            "from mnist_diffusion import MNISTDiffusionPipeline",
            f"pipeline = MNISTDiffusionPipeline.from_pretrained({where(name)!r})",
        ]
        if self.scheduler != OWN:
            lines.insert(2, "from mnist_diffusion.diffusion.samplers import build_sampler")
            lines.append(f"pipeline.scheduler = build_sampler({self.scheduler!r}, pipeline.scheduler.config)")
        lines.append(f"generators = [torch.Generator().manual_seed(seed) for seed in {seeds}]")
        arguments = [f"{name}={value!r}" for name, value in call.items()]
        if self.guidance != PLAIN_GUIDANCE:
            rule, _, weaker = self.guidance.partition(":")
            asked = (f"{rule}:{where(weaker)}" if weaker else rule, self.guidance_scale, self.guidance_interval)
            lines.insert(2, "from mnist_diffusion.diffusion.guidance import guidance_arguments")
            lines.append(f"guidance = guidance_arguments(pipeline, *{asked!r})")
            arguments = [text for text in arguments if not text.startswith("guidance")] + ["**guidance"]
        return "\n".join([*lines, f"images = pipeline({', '.join(arguments)}, generator=generators).images"])


def label_of(pipeline: MNISTDiffusionPipeline, name: Any) -> int:
    """The number of a class.

    Raises:
        UserError: it has no such class, or none at all.
    """
    names = class_names(pipeline)
    if not names:
        raise UserError("this pipeline is unconditional: it has no classes to choose from")
    require(name in names, "class", str(name)[:100], f"one of {', '.join(names)}")
    return names.index(name)


def within(name: str, value: Any, low: float, high: float) -> float:
    """A number between two bounds, both included."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    require(number, name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number between two bounds, both included."""
    require(within(name, value, low, high).is_integer(), name, value, "a whole number")
    return int(value)


@dataclass
class Film:
    """How images form, as the page's player takes it; pictures are addresses that hold them (`data:`).

    Args:
        columns: images in a row of each picture.
        about: says what the pictures show.
        file: name of the files to save, without a suffix.
        frames: for each step the noisy samples, the predicted images, and a caption.
        animation: the predicted images as a moving picture, when they are complete.
    """

    columns: int
    about: str
    file: str
    frames: list[dict[str, str]] = field(default_factory=list)
    animation: str | None = None
    _predicted: list[Image.Image] = field(default_factory=list)

    def add(self, done: Any, steps: int) -> None:
        """Add what there is after a step of `steps`."""
        noisy, clean = (image_grid(to_unit(each), self.columns) for each in (done.latents, done.pred_original_sample))
        caption = f"Step {done.step + 1} of {steps}, timestep {float(done.timestep):.0f}; {done.passes} network passes"
        self.frames.append({"noisy": embedded(noisy), "clean": embedded(clean), "caption": caption})
        self._predicted.append(clean)

    def finish(self) -> None:
        """Make the moving picture."""
        self.animation = embedded(self._predicted[0], "GIF", **animation(self._predicted))

    def value(self) -> dict[str, Any]:
        """What the player shows."""
        shown = ("columns", "about", "file", "frames", "animation")
        return {name: getattr(self, name) for name in shown}


def films(pipeline: MNISTDiffusionPipeline, settings: Settings, load: Load | None = None) -> Iterator[Film]:
    """Draw, and give the film after each step.

    Raises:
        UserError, ValueError, TypeError: the settings cannot work with this pipeline, or it took too long.
    """
    film = _film(settings, pipeline)
    pipeline, deadline = settings.sampler(pipeline), time.monotonic() + MAX_SECONDS
    for done in pipeline.stream(**settings.call(pipeline, load)):
        film.add(done, pipeline.num_timesteps)
        yield film
        require_time(deadline)
    film.finish()
    yield film


def require_time(deadline: float) -> None:
    """Make sure that a drawing does not take too long.

    Raises:
        UserError: it does.
    """
    if time.monotonic() > deadline:
        raise UserError(f"this took longer than {MAX_SECONDS:.0f} s and was given up; ask for fewer images or steps")


def until(deadline: float) -> dict[str, Any]:
    """Arguments of a call that is given up at a deadline."""

    def check(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        require_time(deadline)
        return {}

    return {"callback_on_step_end": check}


def _film(settings: Settings, pipeline: MNISTDiffusionPipeline) -> Film:
    if pipeline.num_classes is None:
        return Film(max(1, round(settings.num_images**0.5)), f"{settings.num_images} images", f"seed{settings.seed}")
    rows = ", ".join(settings.class_labels)
    about = f"{settings.num_images} images of each class, one row for each: {rows}"
    return Film(settings.num_images, about, f"{'-'.join(settings.class_labels)[:50]}-seed{settings.seed}")


class Steering:
    """A drawing that goes on a step at a time, and whose class and guidance may change in between.

    Args:
        pipeline: draws.
        settings: how it begins.
    """

    def __init__(self, pipeline: MNISTDiffusionPipeline, settings: Settings):
        self.film, self._pipeline = _film(settings, pipeline), settings.sampler(pipeline)
        self._stream: Generator[Any, dict[str, Any] | None, None] = self._pipeline.stream(**settings.call(pipeline))
        self._steps = self._pipeline.num_timesteps
        self.over = False

    def advance(self, class_label: str, guidance_scale: float) -> None:
        """Do the next step, under this class and scale.

        Raises:
            UserError, ValueError: the pipeline cannot; the drawing is over.
        """
        changes: dict[str, Any] | None = None
        if self.film.frames:
            scale = within("guidance scale", guidance_scale, 0, MAX_GUIDANCE)
            changes = {"class_labels": [label_of(self._pipeline, class_label)], "guidance_scale": scale}
        self.over = True
        self.film.add(self._stream.send(changes), self._steps)
        self.over = len(self.film.frames) >= self._steps
        self.film.frames[-1]["caption"] += f"; {class_label}, guidance {guidance_scale:g}"
        if self.over:
            self._stream.close()
            self.film.finish()


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
    """Draw one image of each class (at most 10) from the same seeds in each of these ways; rows as they come.

    Raises:
        UserError, ValueError, TypeError: one of them cannot work.
    """
    count = len(pipelines) * len(samplers) * len(steps) * len(scales)
    require(0 < count <= MAX_ROWS, "combinations", count, f"from 1 to {MAX_ROWS}")
    rows, deadline = [], time.monotonic() + MAX_SECONDS
    for name, sampler, count, scale in itertools.product(pipelines, samplers, steps, scales):
        names = class_names(pipelines[name])[:MAX_COLUMNS]
        settings = Settings(
            class_labels=names,
            num_images=1 if names else MAX_COLUMNS,
            guidance_scale=scale,
            scheduler=sampler,
            num_inference_steps=count,
            seed=seed,
        )
        pipeline = settings.sampler(pipelines[name])
        started = time.perf_counter()
        for done in pipeline.stream(**settings.call(pipeline)):  # noqa: B007
            require_time(deadline)
        seconds, images = time.perf_counter() - started, len(done.latents)
        title = f"{name}: {sampler_name(pipeline.scheduler)}, {count} steps, guidance {scale:g}"
        about = f"{done.passes / images:.3g} passes and {1000 * seconds / images:.0f} ms per image"
        rows.append(Row(title, about, embedded(image_grid(to_unit(done.latents), images))))
        yield rows


def interpolated(
    pipeline: MNISTDiffusionPipeline, *, classes: tuple[str, str], seeds: tuple[int, int], frames: int, scale: float
) -> list[Row]:
    """Draw between two classes and between the noises of two seeds.

    Raises:
        UserError, ValueError, TypeError: it cannot work with this pipeline.
    """
    generators = [torch.Generator().manual_seed(whole("seed", seed, 0, MAX_SEED)) for seed in seeds]
    found = pipeline.interpolate(
        [label_of(pipeline, name) for name in classes],
        whole("images", frames, 2, MAX_FRAMES),
        generator=generators,
        guidance_scale=within("guidance scale", scale, 0, MAX_GUIDANCE),
        output_type="pt",
        **until(time.monotonic() + MAX_SECONDS),
    ).images
    title = f"From {classes[0]} (seed {seeds[0]}) to {classes[1]} (seed {seeds[1]})"
    return [Row(title, f"{len(found)} images", embedded(image_grid(found, len(found))))]


def drawn_by_hand(address: Any, shape: tuple[int, int, int]) -> Tensor:
    """The picture that a visitor drew or chose, as float `[1, C, H, W]` in [0, 1].

    Args:
        address: a PNG as a `data:` address.
        shape: channels, height and width to bring it to.

    Raises:
        UserError: it is no such picture, or empty.
    """
    kind = "data:image/png;base64,"
    if not isinstance(address, str) or not address.startswith(kind) or len(address) > MAX_PICTURE_BYTES:
        raise UserError("draw a picture first, or choose a file")
    try:
        content = base64.b64decode(address.removeprefix(kind), validate=True)
    except binascii.Error as error:
        raise UserError("the drawing could not be read") from error
    sides = (int.from_bytes(content[start : start + 4]) for start in (16, 20))  # of the header
    if not content.startswith(PNG) or max(sides) > MAX_PICTURE_SIDE:
        raise UserError(f"the drawing must be a PNG of at most {MAX_PICTURE_SIDE} pixels a side")
    image = to_channels(decode_picture(content, "the drawing", grey=shape[0] == 1)[None], shape[0])
    image = fit_to_size(image, shape[1], "contain").float() / 255
    if image.max() == image.min():
        raise UserError("draw a picture first, or choose a file: all pixels are alike")
    return image


def drawn_again(pipeline: MNISTDiffusionPipeline, image: Tensor, *, is_a: str, as_a: str, scale: float) -> list[Row]:
    """Find the noise of a picture, and draw from it: the picture again, and what it is under another class.

    Raises:
        UserError, ValueError, TypeError: it cannot work with this pipeline.
    """
    this, other, ddim = label_of(pipeline, is_a), label_of(pipeline, as_a), with_sampler(pipeline, "ddim")
    scale, deadline = within("guidance scale", scale, 0, MAX_GUIDANCE), time.monotonic() + MAX_SECONDS
    latents = pipeline.invert(image, [this], num_inference_steps=INVERSION_STEPS)

    def drawn(label: int, guidance_scale: float) -> Tensor:
        call = {"num_inference_steps": INVERSION_STEPS, "output_type": "pt", "eta": 0.0, **until(deadline)}
        return ddim([label], latents=latents, guidance_scale=guidance_scale, **call).images

    found = {
        "Your picture": image,
        f"Its noise, as if it were {is_a}": to_unit(latents),
        f"Drawn again from this noise as {is_a}": drawn(this, 1.0),
        f"The same noise as {as_a}": drawn(other, scale),
    }
    return [Row(title, "", embedded(image_grid(each, 1))) for title, each in found.items()]
