"""What the page draws: settings are checked, pictures come out while they form."""

from __future__ import annotations

import base64
import binascii
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mnist_diffusion.checks import SAMPLERS, require, require_sampler
from mnist_diffusion.data.pictures import decode_picture
from mnist_diffusion.data.transforms import fit_to_size, to_channels
from mnist_diffusion.diffusion.pipeline import class_names, with_sampler
from mnist_diffusion.diffusion.samplers import sampler_name
from mnist_diffusion.errors import UserError
from mnist_diffusion.pictures.grids import animation, image_grid, to_unit
from mnist_diffusion.pictures.page import embedded
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

MAX_IMAGES, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 64, 100, 20.0, 2**32 - 1
MAX_ROWS, MAX_COLUMNS, MAX_FRAMES = 12, 10, 16
MAX_SECONDS = 60.0
"""After this a drawing is given up, so that others get their turn."""
MAX_PICTURE_BYTES = 2**21
ENLARGED = 4
OWN = "its own"
"""The sampler, or the number of steps, that a pipeline comes with."""
INVERSION_STEPS = 50


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

    def call(self, pipeline: MNISTDiffusionPipeline) -> dict[str, Any]:
        """Arguments of a call of this pipeline.

        Raises:
            UserError: it has no such classes.
        """
        names, labels = class_names(pipeline), None
        if pipeline.num_classes is not None:
            if unknown := [name for name in self.class_labels if name not in names]:
                raise UserError(f"class must be one of {', '.join(names)}, got {str(unknown[0])[:100]!r}")
            require(len(self.class_labels) > 0, "classes", [], "one or more")
            labels = [names.index(name) for name in self.class_labels]
        count = self.num_images * len(labels or (0,))
        call: dict[str, Any] = {"class_labels": labels, "num_images_per_label": self.num_images}
        if labels is not None:
            call["guidance_scale"] = self.guidance_scale
            if self.guidance_interval is not None and not pipeline.config.guidance_distilled:
                call["guidance_interval"] = self.guidance_interval
        # A seed for each image, as everywhere in this package.
        generators = [torch.Generator().manual_seed(self.seed + index) for index in range(count)]
        return {**call, "num_inference_steps": self.num_inference_steps, "generator": generators}

    def sampler(self, pipeline: MNISTDiffusionPipeline) -> MNISTDiffusionPipeline:
        """The pipeline with the sampler that was chosen."""
        return pipeline if self.scheduler == OWN else with_sampler(pipeline, self.scheduler)

    def code(self, pipeline: MNISTDiffusionPipeline, source: str) -> str:
        """Python that draws the same images."""
        call = self.call(pipeline)
        seeds = f"range({self.seed}, {self.seed + len(call.pop('generator'))})"
        lines = [
            "import torch",
            "from mnist_diffusion import MNISTDiffusionPipeline",
            f"pipeline = MNISTDiffusionPipeline.from_pretrained({source!r})",
        ]
        if self.scheduler != OWN:
            lines.insert(2, "from mnist_diffusion.diffusion.samplers import build_sampler")
            lines.append(f"pipeline.scheduler = build_sampler({self.scheduler!r}, pipeline.scheduler.config)")
        lines.append(f"generators = [torch.Generator().manual_seed(seed) for seed in {seeds}]")
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
        return "\n".join([*lines, f"images = pipeline({arguments}, generator=generators).images"])


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
    """How images form, as the page's player takes it.

    Args:
        columns: images in a row of each picture.
        about: what the pictures show, in words.
        file: name of the files to save, without a suffix.
        frames: for each step the noisy samples and the predicted images, as pictures in words (`data:` addresses).
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
        larger = [each.resize((ENLARGED * each.width, ENLARGED * each.height), 0) for each in self._predicted]
        self.animation = embedded(larger[0], "GIF", **animation(larger))

    def value(self) -> dict[str, Any]:
        """What the player shows."""
        shown = ("columns", "about", "file", "frames", "animation")
        return {name: getattr(self, name) for name in shown}


def films(pipeline: MNISTDiffusionPipeline, settings: Settings) -> Iterator[Film]:
    """Draw, and give the film after each step.

    Raises:
        UserError, ValueError, TypeError: the settings cannot work with this pipeline, or it took too long.
    """
    film = _film(settings, pipeline)
    pipeline, deadline = settings.sampler(pipeline), time.monotonic() + MAX_SECONDS
    for done in pipeline.stream(**settings.call(pipeline)):
        film.add(done, settings.num_inference_steps)
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


def _film(settings: Settings, pipeline: MNISTDiffusionPipeline) -> Film:
    if pipeline.num_classes is None:
        return Film(max(1, round(settings.num_images**0.5)), f"{settings.num_images} images", f"seed{settings.seed}")
    rows = ", ".join(settings.class_labels)
    about = f"{settings.num_images} images of each class, one row for each: {rows}"
    return Film(settings.num_images, about, f"{'-'.join(settings.class_labels)[:50]}-seed{settings.seed}")


class Steering:
    """A drawing that goes on a step at a time, and whose classes and guidance may change in between.

    Args:
        pipeline: draws.
        settings: how it begins.
    """

    def __init__(self, pipeline: MNISTDiffusionPipeline, settings: Settings):
        self.settings, self.film = settings, _film(settings, pipeline)
        pipeline = settings.sampler(pipeline)
        self._stream: Generator[Any, dict[str, Any] | None, None] = pipeline.stream(**settings.call(pipeline))
        self._names = class_names(pipeline)

    @property
    def over(self) -> bool:
        """Whether all steps are done."""
        return len(self.film.frames) >= self.settings.num_inference_steps

    def advance(self, class_label: str, guidance_scale: float) -> None:
        """Do the next step, under this class and scale."""
        changes: dict[str, Any] | None = None
        if self.film.frames:
            require(class_label in self._names, "class", class_label, f"one of {', '.join(self._names)}")
            scale = within("guidance scale", guidance_scale, 0, MAX_GUIDANCE)
            changes = {"class_labels": [self._names.index(class_label)], "guidance_scale": scale}
        self.film.add(self._stream.send(changes), self.settings.num_inference_steps)
        self.film.frames[-1]["caption"] += f"; {class_label}, scale {guidance_scale:g}"
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
    samplers: Iterable[str],
    steps: Iterable[int],
    scales: Iterable[float],
    seed: int,
) -> Iterator[list[Row]]:
    """Draw one image of each class (at most 10) from the same seeds in each of these ways; rows as they come.

    Raises:
        UserError, ValueError, TypeError: one of them cannot work.
    """
    ways = list(itertools.product(pipelines, samplers, steps, scales))
    require(0 < len(ways) <= MAX_ROWS, "combinations", len(ways), f"from 1 to {MAX_ROWS}")
    rows, deadline = [], time.monotonic() + MAX_SECONDS
    for name, sampler, count, scale in ways:
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
        list(classes) if pipeline.config.id2label else [int(each) for each in classes],
        whole("frames", frames, 2, MAX_FRAMES),
        generator=generators,
        guidance_scale=within("guidance scale", scale, 0, MAX_GUIDANCE),
        output_type="pt",
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
    names, ddim = class_names(pipeline), with_sampler(pipeline, "ddim")
    for name in (is_a, as_a):
        require(name in names, "class", name, f"one of {', '.join(names) or 'none, as this pipeline has none'}")
    scale, this, other = within("guidance scale", scale, 0, MAX_GUIDANCE), names.index(is_a), names.index(as_a)
    latents = pipeline.invert(image, [this], num_inference_steps=INVERSION_STEPS)

    def drawn(label: int, guidance_scale: float) -> Tensor:
        call = {"num_inference_steps": INVERSION_STEPS, "output_type": "pt", "eta": 0.0}
        return ddim([label], latents=latents, guidance_scale=guidance_scale, **call).images

    found = {
        "Your picture": image,
        f"Its noise, as if it were {is_a}": to_unit(latents),
        f"Drawn again from this noise as {is_a}": drawn(this, 1.0),
        f"The same noise as {as_a}": drawn(other, scale),
    }
    return [Row(title, "", embedded(image_grid(each, 1))) for title, each in found.items()]


SAMPLER_NAMES = (OWN, *SAMPLERS)
