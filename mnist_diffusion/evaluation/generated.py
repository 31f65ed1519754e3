"""The images to be judged: drawn with a pipeline, or read from files that any program made."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.config import SchedulerName
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.diffusion.pipeline import generate
from mnist_diffusion.diffusion.samplers import build_sampler, sampler_name
from mnist_diffusion.errors import UserError
from mnist_diffusion.seeds import mixed_seed
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

IMAGES_A_PART = 500
MIN_IMAGES = 50


@dataclass(frozen=True)
class Sample:
    """Images to be judged, uint8 `[N, C, H, W]`, and the class asked of each, int64 `[N]`."""

    images: Tensor
    labels: Tensor | None
    passes_per_image: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """A way of drawing: the sampler, its steps and the guidance."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float | None
    """None for an unconditional model."""

    @property
    def name(self) -> str:
        """In a few words."""
        guided = "" if self.guidance_scale is None else f", guidance {self.guidance_scale:g}"
        steps = f"{self.num_inference_steps} step{'s' if self.num_inference_steps > 1 else ''}"
        return f"{self.scheduler}, {steps}{guided}"


class ImageGenerator:
    """Draws the images of one pipeline in each way asked for.

    Image `i` has class `i` modulo the classes and a seed that follows from `seed` and `i` alone, so that every way,
    and every pipeline, starts from the same noise.

    Args:
        pipeline: draws them.
        data: the images that the pipeline is measured against.
        num_images: how many; a multiple of the number of classes.
        seed: of all of them.
        batch_size: images drawn together.
        folder: where finished parts are kept, to be taken up again.

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
        batch_size: int,
        folder: Path | None = None,
    ):
        self.pipeline, self.num_images, self.seed = pipeline, num_images, seed
        self.batch_size, self.folder, self.classes = batch_size, folder, pipeline.num_classes
        self.training_config = pipeline.scheduler.config
        self._weights_hash: str | None = None
        size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.out_channels
        if (channels, size) != (data.channels, data.image_size):
            raise UserError(
                f"the pipeline draws images of {size} x {size} with {channels} channels, but data.source has "
                f"{data.image_size} x {data.image_size} with {data.channels}; set data.source, data.image_size, "
                "data.channels to what it was trained on"
            )
        if self.classes is not None and self.classes != data.num_classes:
            raise UserError(f"the pipeline knows {self.classes} classes, but data.source has {data.num_classes}")
        names = pipeline.config.id2label or {}
        known = tuple(names.get(str(index), str(index)) for index in range(data.num_classes))
        if self.classes is not None and names and known != data.class_names:
            raise UserError(
                f"the pipeline's classes are {', '.join(known[:12])}, but those of data.source are "
                f"{', '.join(data.class_names[:12])}, in this order"
            )
        if num_images < MIN_IMAGES:
            raise UserError(f"num_images must be at least {MIN_IMAGES}, got {num_images}")
        if self.classes is not None and num_images % self.classes:
            raise UserError(
                f"num_images must be a multiple of the {self.classes} classes, for equal counts a class, "
                f"got {num_images}"
            )

    def way(
        self, scheduler: SchedulerName | None, num_inference_steps: int | None, guidance_scale: float | None
    ) -> SamplingSettings:
        """A way of drawing, the pipeline's own defaults standing for None."""
        own = self.pipeline.config
        if self.classes is None:
            if guidance_scale is not None:
                raise UserError(f"guidance_scale={guidance_scale:g} has nothing to guide: the model is unconditional")
        elif guidance_scale is None:
            guidance_scale = own.guidance_scale
        return SamplingSettings(
            scheduler or sampler_name(self.pipeline.scheduler),
            num_inference_steps or own.num_inference_steps,
            guidance_scale,
        )

    def check(self, way: SamplingSettings) -> None:
        """Take the first step of one image, so that what cannot work is said before others are drawn.

        Raises:
            UserError: the way cannot work.
        """

        def stop(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = True
            return values

        with self._drawing(way):
            self._generate(way, range(1), callback_on_step_end=stop)

    @contextmanager
    def _drawing(self, way: SamplingSettings) -> Iterator[None]:
        """The pipeline with the way's sampler; its errors name the way."""
        own = self.pipeline.scheduler
        if way.scheduler != sampler_name(own):
            self.pipeline.scheduler = build_sampler(way.scheduler, self.training_config)  # type: ignore[arg-type]
        try:
            yield
        except ValueError as error:  # the pipeline's own, which name argument and value
            raise UserError(f"{way.name}: {error}") from error
        finally:
            self.pipeline.scheduler = own

    def _generate(self, way: SamplingSettings, indices: range, **options: Any) -> Tensor:
        labels = None if self.classes is None else [index % self.classes for index in indices]
        seeds = [mixed_seed(self.seed, "eval", index) for index in indices]
        return generate(
            self.pipeline,
            labels,
            seeds,
            batch_size=self.batch_size,
            num_inference_steps=way.num_inference_steps,
            guidance_scale=way.guidance_scale,
            **options,
        )

    def draw(self, way: SamplingSettings) -> Sample:
        """Draw the images in one way, quantised to uint8, counting the network's passes.

        Raises:
            UserError: the way cannot work, or the network gives values that are not finite.
        """
        with self._drawing(way):
            starts = tqdm(range(0, self.num_images, IMAGES_A_PART), desc="drawing", unit="part", leave=False)
            parts = [self._part(way, range(start, min(start + IMAGES_A_PART, self.num_images))) for start in starts]
        images = torch.cat([torch.from_numpy(part["images"]) for part in parts])
        labels = None if self.classes is None else torch.arange(self.num_images) % self.classes
        passes, seconds = (sum(float(part[name]) for part in parts) for name in ("passes", "seconds"))
        return Sample(images, labels, passes / self.num_images, seconds)

    def _part(self, way: SamplingSettings, indices: range) -> dict[str, np.ndarray]:
        """Some of the images, taken from the folder where they are there already."""
        path = None
        if self.folder is not None:
            path = self.folder / self._identity(way) / f"{indices.start:06d}-{indices.stop:06d}.npz"
            if (kept := _read_part(path, len(indices))) is not None:
                return kept
        passes = 0

        def count(module: Any, arguments: tuple[Any, ...]) -> None:
            nonlocal passes
            passes += len(arguments[0])

        def check_finite(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            # Before the images are clipped to [0, 1], which makes infinity white.
            if not torch.isfinite(values["latents"]).all():
                raise ValueError(f"values that are not finite (NaN or infinity) in step {step + 1}")
            return values

        started = time.perf_counter()
        with self.pipeline.unet.register_forward_pre_hook(count):
            images = self._generate(way, indices, callback_on_step_end=check_finite)
        part = {
            "images": (images * 255).round().byte().numpy(),
            "passes": np.array(passes),
            "seconds": np.array(time.perf_counter() - started),
        }
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.partial")
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        return part

    def _identity(self, way: SamplingSettings) -> str:
        """A name for what decides the images: weights, sampler, steps, guidance and seed."""
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        if self._weights_hash is None:
            weights = {name: value.contiguous() for name, value in pipeline.unet.state_dict().items()}
            self._weights_hash = hashlib.sha256(safetensors.torch.save(weights)).hexdigest()
        network = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
        settings = [
            type(scheduler).__name__,
            dict(scheduler.config),
            repr(way),
            self.seed,
            pipeline.config.eta,
            network,
        ]
        said = self._weights_hash + json.dumps(settings, sort_keys=True, default=str)
        guided = "" if way.guidance_scale is None else f"-{way.guidance_scale:g}"
        digest = hashlib.sha256(said.encode()).hexdigest()
        return f"{way.scheduler}-{way.num_inference_steps}{guided}-{digest[:12]}"


def _read_part(path: Path, count: int) -> dict[str, np.ndarray] | None:
    """A part that was drawn before; None where there is none, or it is damaged and must be drawn again."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            part = {name: kept[name] for name in ("images", "passes", "seconds")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        print(f"warning: {path} is damaged ({error}); its images are drawn again")
        return None
    return part if len(part["images"]) == count else None
