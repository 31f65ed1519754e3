"""Sheets of a pipeline's samples by class, of the steps of denoising, and of the noising process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.layout import evenly
from mnist_diffusion.data.transforms import to_model_range
from mnist_diffusion.method.noise import NoisingProcess
from mnist_diffusion.pipelines.drawing import generate, seeded_call
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.plots.grids import image_grid, side_by_side, titled, to_unit
from mnist_diffusion.seeds import mixed_seed, torch_generator
from mnist_diffusion.training.run_folder import Sheet

MAX_ROWS, STRIP_ROWS, STRIP_COLUMNS, FORWARD_ROWS = 20, 10, 10, 4
MAX_FRAMES, SHEETS_SIDE_BY_SIDE = 60, 4


def sheet_rows(
    pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], columns: int, seed: int
) -> tuple[list[int] | None, list[int], Sequence[str] | None]:
    """The label (None without classes) and the seed of each image of a sheet, and the names of its rows.

    A sheet has one row per class, at most 20, and always the same seeds.
    """
    names = class_names[:MAX_ROWS]
    seeds = [mixed_seed(seed, "samples", index) for index in range(len(names) * columns)]
    if pipeline.num_classes is None:
        return None, seeds, None
    return [label for label in range(len(names)) for _ in range(columns)], seeds, names


def sample_sheet(
    pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], *, columns: int, seed: int
) -> tuple[Image.Image, Tensor]:
    """A sheet sampled with the pipeline's defaults, and its images, float32 `[N, C, H, W]` in [0, 1]."""
    labels, seeds, names = sheet_rows(pipeline, class_names, columns, seed)
    images = generate(pipeline, labels, seeds)
    return image_grid(images, columns, row_labels=names), images


def denoising_frames(
    pipeline: MNISTDiffusionPipeline,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    **call: Any,
) -> list[Image.Image]:
    """A grid of the samples after each denoising step, from noise to images."""
    trajectory = pipeline.sample_trajectory(**seeded_call(labels, seeds), output_type="pt", **call)
    return [image_grid(to_unit(step), columns, row_labels=row_labels) for step in trajectory.latents]


def noised(data: ImageData, process: NoisingProcess, *, seed: int) -> Image.Image:
    """Training images on their way to noise: one row per image, one column per timestep, the same noise along a row."""
    images = to_model_range(data.train.spread(FORWARD_ROWS)[0])
    noise = torch.randn(images.shape, generator=torch_generator("cpu", seed, "samples"))
    timesteps = evenly(len(process.times), STRIP_COLUMNS)
    noisy = [process.noisy(images, noise, torch.tensor([timestep])) for timestep in timesteps]
    tiles = to_unit(torch.stack([images, *noisy], dim=1)).flatten(0, 1)
    names = ["image", *(f"t = {int(process.times[timestep])}" for timestep in timesteps)]
    return image_grid(tiles, len(names), column_labels=names, title="Forward noising, by timestep")


def denoised(pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], *, seed: int, **call: Any) -> Image.Image:
    """One image of each class, at most ten, on its way from noise: one row per image, one column per step."""
    names = tuple(class_names[:STRIP_ROWS]) if pipeline.num_classes is not None else None
    count = FORWARD_ROWS if names is None else len(names)
    labels = None if names is None else range(count)
    seeded = seeded_call(labels, [mixed_seed(seed, "samples", index) for index in range(count)])
    noise = torch.stack([torch.randn(pipeline.image_shape, generator=each) for each in seeded["generator"]])
    trajectory = pipeline.sample_trajectory(**seeded, latents=noise.to(pipeline.device), output_type="pt", **call)
    latents, steps = torch.cat([noise[None], trajectory.latents]), len(trajectory.timesteps)
    indices = evenly(len(latents), STRIP_COLUMNS)
    columns = [f"t = {int(trajectory.timesteps[place])}" if place < steps else "image" for place in indices]
    tiles = to_unit(latents[indices]).transpose(0, 1).flatten(0, 1)
    title = f"Denoising in {steps} step{'s' if steps > 1 else ''}, by timestep"
    return image_grid(tiles, len(indices), row_labels=names, column_labels=columns, title=title)


def sheet_of_epochs(sheets: Sequence[Sheet]) -> Image.Image:
    """A few sample sheets of a run side by side, the first and the last among them."""
    last = sheets[-1].step
    # Most is learned at the start: each sheet is a multiple of the one before.
    steps = [max(1, sheets[0].step) ** (1 - share) * last**share for share in np.linspace(0, 1, SHEETS_SIDE_BY_SIDE)]
    nearest = {min(sheets, key=lambda sheet: abs(math.log(max(1, sheet.step) / step))).step for step in steps}
    return side_by_side([(sheet.title, sheet.picture) for sheet in sheets if sheet.step in nearest])


def frames_of_epochs(sheets: Sequence[Sheet]) -> list[Image.Image]:
    """The sample sheets one after the other, each below its epoch."""
    return [titled(sheets[index].picture, sheets[index].title) for index in evenly(len(sheets), MAX_FRAMES)]
