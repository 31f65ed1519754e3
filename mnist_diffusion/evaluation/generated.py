"""Generate the images to evaluate with a pipeline, in parts that are kept and used again."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist_diffusion.checks import PLAIN_GUIDANCE
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.diffusion.guidance import fingerprints, guidance_arguments, load_beside
from mnist_diffusion.diffusion.pipeline import batches, one_per_seed, require_fit
from mnist_diffusion.diffusion.samplers import build_sampler, sampler_name
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import open_file, replace_file
from mnist_diffusion.ranks import make_together
from mnist_diffusion.seeds import mixed_seed
from mnist_diffusion.sharing.pipeline import DenoisingStep, MNISTDiffusionPipeline

IMAGES_PER_PART = 250
MIN_IMAGES = 50
MAX_PART_BYTES = 2**31


@dataclass(frozen=True)
class Sample:
    """Images to evaluate, uint8 `[N, C, H, W]`, and the class asked of each, int64 `[N]`."""

    images: Tensor
    labels: Tensor | None
    passes_per_image: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn: the sampler, its steps, and the guidance (no scale for an unconditional model)."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None = None
    guidance: str = PLAIN_GUIDANCE

    @property
    def name(self) -> str:
        """The settings in a few words."""
        guided = "" if self.guidance_scale is None else f", guidance {self.guidance_scale:g}"
        if self.guidance_interval is not None:
            guided += " from {:g} to {:g}".format(*self.guidance_interval)
        if self.guidance != PLAIN_GUIDANCE:
            guided += f" by {self.guidance}"
        steps = f"{self.num_inference_steps} step{'s' if self.num_inference_steps > 1 else ''}"
        return f"{self.scheduler}, {steps}{guided}"


class ImageGenerator:
    """Draws the images of one pipeline by any settings.

    Image `i` has class `i` modulo the classes and a seed that follows from `seed` and `i` alone, so that all settings,
    and all pipelines, start from the same noise.

    Args:
        pipeline: draws them.
        data: the images that the pipeline is measured against.
        num_images: how many; a multiple of the number of classes.
        seed: of all of them.
        batch_size: images drawn together; as many as suit their size and the device if omitted.
        folder: where finished parts are kept, to be used again.
        arguments: further arguments of each call, such as a guidance rule; not part of the names of those parts.

    Raises:
        UserError: pipeline and data do not fit together, or `num_images` is not the same number for each class.
    """

    def __init__(
        self,
        pipeline: MNISTDiffusionPipeline,
        data: ImageData,
        *,
        num_images: int,
        seed: int,
        batch_size: int | None = None,
        folder: Path | None = None,
        arguments: Mapping[str, Any] | None = None,
    ):
        self.arguments = arguments or {}
        self.pipeline, self.num_images, self.seed = pipeline, num_images, seed
        self.batch_size, self.folder, self.classes = batch_size, folder, pipeline.num_classes
        self.training_config = pipeline.scheduler.config
        self._weaker = functools.cache(functools.partial(load_beside, pipeline))
        self._identity = functools.cache(self._name)
        require_fit(pipeline, data)
        if num_images < MIN_IMAGES:
            raise UserError(f"num_images must be at least {MIN_IMAGES}, got {num_images}")
        if self.classes is not None and num_images % self.classes:
            raise UserError(f"num_images must be a multiple of the {self.classes} classes, got {num_images}")

    def settings(
        self,
        scheduler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance: str = PLAIN_GUIDANCE,
    ) -> SamplingSettings:
        """Settings, with the pipeline's own defaults in place of None."""
        own = self.pipeline.config
        if self.classes is None and guidance_scale is not None:
            raise UserError(f"guidance_scale={guidance_scale:g} has nothing to guide: the model is unconditional")
        if self.classes is not None and guidance_scale is None:
            guidance_scale = own.guidance_scale
        steps = num_inference_steps or own.num_inference_steps
        name = scheduler or sampler_name(self.pipeline.scheduler)
        return SamplingSettings(name, steps, guidance_scale, guidance_interval, guidance)

    def _guidance(self, settings: SamplingSettings) -> dict[str, Any]:
        asked = settings.guidance, settings.guidance_scale, settings.guidance_interval
        return guidance_arguments(self.pipeline, *asked, load=self._weaker)

    def check(self, settings: SamplingSettings) -> None:
        """Take the first step of one image, so that what cannot work fails before others are drawn.

        Raises:
            UserError: the settings cannot work.
        """
        with self._sampler(settings):
            next(self._stream(settings, range(1)))

    @contextmanager
    def _sampler(self, settings: SamplingSettings) -> Iterator[None]:
        """Give the pipeline the sampler of the settings; its errors name the settings."""
        own = self.pipeline.scheduler
        if settings.scheduler != sampler_name(own):
            self.pipeline.scheduler = build_sampler(settings.scheduler, self.training_config)
        try:
            yield
        except ValueError as error:  # the pipeline's own, which name argument and value
            raise UserError(f"{settings.name}: {error}") from error
        finally:
            self.pipeline.scheduler = own

    def _stream(self, settings: SamplingSettings, indices: range) -> Iterator[DenoisingStep]:
        """The steps of drawing some of the images together."""
        labels, seeds = self._labels(indices), [mixed_seed(self.seed, "eval", index) for index in indices]
        steps, arguments = settings.num_inference_steps, one_per_seed(labels, seeds)
        guided = {**self._guidance(settings), **self.arguments}
        return self.pipeline.stream(**arguments, num_inference_steps=steps, **guided)

    def _labels(self, indices: range) -> list[int] | None:
        return None if self.classes is None else [index % self.classes for index in indices]

    def draw(self, settings: SamplingSettings) -> Sample:
        """Draw the images, quantised to uint8, counting the network's passes.

        Raises:
            UserError: the settings cannot work, or the network gives values that are not finite.
        """
        with self._sampler(settings):
            parts = [self._part(settings, indices) for indices in self._shared(settings)]
        images = torch.cat([torch.from_numpy(part["images"]) for part in parts])
        labels = self._labels(range(self.num_images))
        passes, seconds = (sum(float(part[name]) for part in parts) for name in ("passes", "seconds"))
        return Sample(images, None if labels is None else torch.tensor(labels), passes / self.num_images, seconds)

    def help_to_draw(self, settings: SamplingSettings) -> None:
        """Draw those parts into the folder that no other process has claimed."""
        with self._sampler(settings):
            self._shared(settings)

    def _shared(self, settings: SamplingSettings) -> list[range]:
        """The indices of each part; if they are kept, all are there, drawn by this process and others."""
        starts = range(0, self.num_images, IMAGES_PER_PART)
        parts = [range(self.num_images)[start : start + IMAGES_PER_PART] for start in starts]
        if self.folder is not None:
            paths = {self._path(settings, indices): indices for indices in parts}
            next(iter(paths)).parent.mkdir(parents=True, exist_ok=True)
            make_together(list(paths), lambda path: self._part(settings, paths[path]))
        return parts

    def _path(self, settings: SamplingSettings, indices: range) -> Path:
        return Path(self.folder or "", self._identity(settings), f"{indices.start:06d}-{indices.stop:06d}.npz")

    def _part(self, settings: SamplingSettings, indices: range) -> dict[str, np.ndarray]:
        """Some of the images, read from the folder if they have been drawn before."""
        path = None
        if self.folder is not None:
            path = self._path(settings, indices)
            if (kept := _read_part(path, (len(indices), *self.pipeline.image_shape))) is not None:
                return kept
        passes, images, started = 0, [], time.perf_counter()
        for batch in batches(self.pipeline, len(indices), self.batch_size):
            for done in self._stream(settings, indices[batch]):
                # Before the images are clipped to [0, 1], which makes infinity white.
                if not torch.isfinite(done.latents).all():
                    raise ValueError(f"values that are not finite (NaN or infinity) in step {done.step + 1}")
            images.append((done.images("pt").cpu() * 255).round().byte())
            passes += done.passes
        part = {
            "images": torch.cat(images).numpy(),
            "passes": np.array(passes),
            "seconds": np.array(time.perf_counter() - started),
        }
        if path is not None:
            replace_file(path, lambda file: np.savez(file, allow_pickle=False, **part))
        return part

    def _name(self, settings: SamplingSettings) -> str:
        """A name for what decides the images: weights, sampler, steps, guidance and seed."""
        pipeline = self.pipeline
        network = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
        networks = fingerprints(pipeline, self._guidance(settings))
        drawn = [*networks, type(pipeline.scheduler).__name__, repr(settings), self.seed]
        identity = json.dumps([*drawn, network], sort_keys=True, default=str)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        guided = "" if settings.guidance_scale is None else f"-{settings.guidance_scale:g}"
        return f"{settings.scheduler}-{settings.num_inference_steps}{guided}-{digest[:12]}"


def _read_part(path: Path, shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """A part that was drawn before; None if there is none, or if it is damaged and must be drawn again."""
    if not path.exists():
        return None
    try:
        with open_file(path, MAX_PART_BYTES) as file, np.load(file, allow_pickle=False) as kept:
            part = {name: kept[name] for name in ("images", "passes", "seconds")}
        if part["images"].shape != shape or not all(part[name].shape == () for name in ("passes", "seconds")):
            raise ValueError(f"images of the shape {part['images'].shape}, not {shape}")
        return {"images": part["images"].astype(np.uint8, casting="no")} | {
            name: part[name].astype(float) for name in ("passes", "seconds")
        }
    except Exception as error:  # whatever zip and NumPy make of bytes that are not theirs
        print(f"warning: {path} is damaged ({error}); its images are drawn again")
        return None
