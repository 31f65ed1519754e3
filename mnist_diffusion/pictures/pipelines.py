"""Draw what a pipeline does: its sample sheet, how an image forms, and what its noising process does to images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.transforms import to_model_range
from mnist_diffusion.diffusion.noise import NoisingProcess
from mnist_diffusion.diffusion.pipeline import generate, one_per_seed
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
    trajectory = pipeline.sample_trajectory(**one_per_seed(labels, seeds), output_type="pt", **call)
    return [image_grid(step / 2 + 0.5, columns, row_labels=row_labels) for step in trajectory.pred_original_samples]


def noised(data: ImageData, process: NoisingProcess, *, seed: int) -> Image.Image:
    """A few training images on their way to noise."""
    images = to_model_range(data.train.spread(FORWARD_ROWS)[0])
    return forward_noising(images, process, generator=torch_generator("cpu", seed, "samples"))


def denoised(pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], *, seed: int, **call: Any) -> Image.Image:
    """One image of each class, at most ten, on its way from noise."""
    names = tuple(class_names[:STRIP_ROWS]) if pipeline.num_classes is not None else None
    count = FORWARD_ROWS if names is None else len(names)
    labels = None if names is None else range(count)
    drawn = one_per_seed(labels, [mixed_seed(seed, "samples", index) for index in range(count)])
    noise = torch.stack([torch.randn(pipeline.image_shape, generator=each) for each in drawn["generator"]])
    trajectory = pipeline.sample_trajectory(**drawn, latents=noise.to(pipeline.device), output_type="pt", **call)
    return denoising_strip(torch.cat([noise[None], trajectory.latents]), trajectory.timesteps, row_labels=names)
