"""Draw what a pipeline does: its sample sheet, how an image forms, and what its noising process does to images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.transforms import to_model_range
from mnist_diffusion.diffusion.pipeline import generate
from mnist_diffusion.pictures.grids import denoising_strip, forward_noising, image_grid
from mnist_diffusion.seeds import mixed_seed, torch_generator
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

MAX_ROWS = 20
STRIP_ROWS = 10
FORWARD_ROWS = 4


def sheet_rows(
    pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], columns: int, seed: int
) -> tuple[list[int] | None, list[int], Sequence[str] | None]:
    """The label (None without classes) and the seed of each image of a sheet, and the names of its rows.

    A sheet has one row per class, at most 20, and the same seeds each time.
    """
    names = class_names[:MAX_ROWS]
    seeds = [mixed_seed(seed, "samples", index) for index in range(len(names) * columns)]
    if pipeline.num_classes is None:
        return None, seeds, None
    return [label for label in range(len(names)) for _ in range(columns)], seeds, names


def sample_sheet(
    pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], *, columns: int, seed: int
) -> tuple[Image.Image, Tensor]:
    """A sheet drawn with the pipeline's default call, and its images, float32 `[N, C, H, W]` in [0, 1]."""
    labels, seeds, names = sheet_rows(pipeline, class_names, columns, seed)
    drawn = generate(pipeline, labels, seeds)
    return image_grid(drawn, columns, row_labels=names), drawn


def sheet_frames(
    pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], *, columns: int, seed: int
) -> list[Image.Image]:
    """The sheet of [`sample_sheet`] as the network predicts it at each step of the sampler."""
    labels, seeds, names = sheet_rows(pipeline, class_names, columns, seed)
    return predicted_frames(pipeline, labels, seeds, columns, row_labels=names)


def predicted_frames(
    pipeline: MNISTDiffusionPipeline,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    **call: Any,
) -> list[Image.Image]:
    """For each step of the sampler, a grid of the clean images that the network predicts there."""
    asked: dict[str, Any] = {"num_images_per_label": len(seeds)} if labels is None else {"class_labels": list(labels)}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    trajectory = pipeline.sample_trajectory(**asked, generator=generators, output_type="pt", **call)
    return [image_grid(step / 2 + 0.5, columns, row_labels=row_labels) for step in trajectory.pred_original_samples]


def spread(data: ImageData, count: int) -> Tensor:
    """At most `count` training images, uint8 `[N, C, H, W]`, spread over all of them, which may be sorted by class."""
    return data.train.images[data.train.spread(count)]


def noised(data: ImageData, scheduler: DDPMScheduler, *, seed: int) -> Image.Image:
    """A few training images on their way to noise."""
    images = to_model_range(spread(data, FORWARD_ROWS))
    return forward_noising(images, scheduler, generator=torch_generator("cpu", seed, "samples"))


def denoised(pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], *, seed: int, **call: Any) -> Image.Image:
    """One image of each class, at most ten, on its way from noise."""
    names = tuple(class_names[:STRIP_ROWS]) if pipeline.num_classes is not None else None
    count = FORWARD_ROWS if names is None else len(names)
    generators = [torch.Generator().manual_seed(mixed_seed(seed, "samples", index)) for index in range(count)]
    noise = torch.stack([torch.randn(pipeline.image_shape, generator=generator) for generator in generators])
    asked: dict[str, Any] = {"num_images_per_label": count} if names is None else {"class_labels": list(range(count))}
    trajectory = pipeline.sample_trajectory(
        **asked, latents=noise.to(pipeline.device), generator=generators, output_type="pt", **call
    )
    return denoising_strip(torch.cat([noise[None], trajectory.latents]), trajectory.timesteps, row_labels=names)
