"""Sample the images to evaluate, in parts that are kept on disk and used again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import open_file, replace_file
from mnist_diffusion.parallel import build_parts
from mnist_diffusion.pipelines import drawing
from mnist_diffusion.pipelines.pipeline import CODE_FILE, DenoisingStep, MNISTDiffusionPipeline
from mnist_diffusion.seeds import mixed_seed

IMAGES_PER_PART = 250
MIN_IMAGES = 50
MAX_PART_BYTES = 2**31

Stream = Callable[[range], Iterator[DenoisingStep]]


@dataclass(frozen=True)
class Sample:
    """Images to evaluate, uint8 `[N, C, H, W]`, and the class of each, int64 `[N]`, or None."""

    images: Tensor
    labels: Tensor | None
    nfe_per_image: float | None = None
    seconds: float | None = None


class ImageGenerator:
    """Samples images from one pipeline with any settings.

    Image `i` has class `i` modulo the classes and a seed that depends on `seed` and `i` alone, so that all settings,
    and all pipelines, start from the same noise.

    Args:
        pipeline: the pipeline.
        data: the images that it is measured against.
        num_images: number of images; a multiple of the number of classes.
        seed: random seed of all images.
        batch_size: images per batch; chosen by image size and device if None.
        folder: where parts are kept, to be used again; None keeps none.

    Raises:
        UserError: pipeline and data do not fit, or the classes cannot have equally many images.
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
    ):
        self.pipeline, self.num_images, self.seed = pipeline, num_images, seed
        self.batch_size, self.folder, self.classes = batch_size, folder, pipeline.num_classes
        drawing.require_fit(pipeline, data)
        if num_images < MIN_IMAGES:
            raise UserError(f"num_images must be at least {MIN_IMAGES}, got {num_images}")
        if self.classes is not None and num_images % self.classes:
            raise UserError(f"num_images must be a multiple of the {self.classes} classes, got {num_images}")

    def check(self, settings: SamplingSettings) -> None:
        """Take the first step of one image, so that settings that cannot work fail before others are sampled.

        Raises:
            UserError: the settings cannot work.
        """
        with self._sampling(settings) as stream:
            next(stream(range(1)))

    @contextmanager
    def _sampling(self, settings: SamplingSettings, **changes: Any) -> Iterator[Stream]:
        """Yield a function that streams the denoising steps of one batch of images, given their indices.

        Errors name the settings.
        """

        def stream(indices: range) -> Iterator[DenoisingStep]:
            seeds = [mixed_seed(self.seed, "eval", index) for index in indices]
            return pipeline.stream(**drawing.seeded_call(self._labels(indices), seeds), **call)

        try:
            call = {**drawing.call_arguments(self.pipeline, settings), **changes}
            pipeline = drawing.with_sampler(self.pipeline, settings.scheduler)
            yield stream
        except ValueError as error:  # the pipeline's own, which name argument and value
            raise UserError(f"{settings}: {error}") from error

    def _labels(self, indices: range) -> list[int] | None:
        return None if self.classes is None else [index % self.classes for index in indices]

    def draw(self, settings: SamplingSettings, **changes: Any) -> Sample:
        """Sample the images, quantised to uint8, and count network evaluations; processes share the parts.

        Args:
            settings: how they are sampled.
            changes: further arguments of each call, such as a guidance rule; not with a folder, whose names lack them.

        Raises:
            UserError: the settings cannot work, or the network returns values that are not finite.
        """
        assert not (changes and self.folder)
        starts = range(0, self.num_images, IMAGES_PER_PART)
        parts = [range(self.num_images)[start : start + IMAGES_PER_PART] for start in starts]
        with self._sampling(settings, **changes) as stream:
            draw = partial(self._part, stream)
            if self.folder is None:
                arrays = [draw(indices) for indices in parts]
            else:
                folder = self.folder / self._name(settings)
                folder.mkdir(parents=True, exist_ok=True)
                paths = {folder / f"{each.start:06d}-{each.stop:06d}.npz": each for each in parts}
                for path in paths:
                    _discard_damaged(path)
                build_parts(list(paths), lambda path: _write_part(path, draw(paths[path])))
                arrays = [_read_part(path) for path in paths]
        images = torch.cat([torch.from_numpy(part["images"]) for part in arrays])
        labels = self._labels(range(self.num_images))
        nfe, seconds = (sum(float(part[name]) for part in arrays) for name in ("nfe", "seconds"))
        return Sample(images, None if labels is None else torch.tensor(labels), nfe / self.num_images, seconds)

    def _part(self, stream: Stream, indices: range) -> dict[str, Any]:
        nfe, images, started = 0, [], time.perf_counter()
        for batch in drawing.batches(self.pipeline, len(indices), self.batch_size):
            for done in stream(indices[batch]):
                # Before the images are clamped to [0, 1], which makes infinity white.
                if not torch.isfinite(done.latents).all():
                    raise ValueError(f"values that are not finite (NaN or infinity) in step {done.step + 1}")
            images.append((done.images("pt").cpu() * 255).round().byte())
            nfe += done.nfe
        return {"images": torch.cat(images).numpy(), "nfe": nfe, "seconds": time.perf_counter() - started}

    def _name(self, settings: SamplingSettings) -> str:
        """A folder name that identifies the images: code, weights, sampler, steps, guidance and seed."""
        pipeline = drawing.with_sampler(self.pipeline, settings.scheduler)
        network = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
        networks = drawing.fingerprints(pipeline, drawing.call_arguments(self.pipeline, settings))
        code = [CODE_FILE, diffusers.__version__]
        identity = [*code, *networks, type(pipeline.scheduler).__name__, repr(settings), self.seed, network]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        guided = "" if settings.guidance_scale is None else f"-{settings.guidance_scale:g}"
        return f"{settings.scheduler}-{settings.num_inference_steps}{guided}-{digest[:12]}"


def _write_part(path: Path, part: dict[str, Any]) -> None:
    replace_file(path, lambda file: np.savez(file, allow_pickle=False, **part))


def _read_part(path: Path) -> dict[str, Any]:
    with open_file(path, MAX_PART_BYTES) as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _discard_damaged(path: Path) -> None:
    """Remove a part that cannot be read, so that it is sampled again."""
    try:
        if path.exists():
            _read_part(path)
    except Exception as error:  # zip and NumPy raise anything for bytes that are not theirs
        print(f"warning: {path} is damaged ({error}); sampling its images again")
        path.unlink(missing_ok=True)  # another process may have done it
