"""What a run makes of its averaged weights: a folder to load, and pictures of what it does.

The loop is given a product as it is given an objective, and knows neither pipelines nor denoisers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.transforms import to_model_range, to_uint8
from mnist_diffusion.diffusion.pipeline import MakePipeline, generate
from mnist_diffusion.pictures.grids import denoising_strip, forward_noising, image_grid
from mnist_diffusion.pictures.plots import noise_schedules, pixel_histograms, to_picture
from mnist_diffusion.seeds import mixed_seed, torch_generator
from mnist_diffusion.sharing.export import export_pipeline
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

MAX_ROWS = 20
STRIP_ROWS = 10
FORWARD_ROWS = 4


class Product(Protocol):
    """What a run leaves behind, made of a network `unet` with its averaged weights."""

    @property
    def folder_name(self) -> str:
        """Where in the run folder."""

    def save(self, unet: UNet2DModel, folder: Path, *, card: Mapping[str, Any], samples: Image.Image | None) -> None:
        """Write the folder whole, in place of the one that may be there, with its card and the picture on it."""

    def card_values(self, unet: UNet2DModel) -> dict[str, Any]:
        """The values of its card that a run does not know by itself."""

    def usage(self, unet: UNet2DModel, folder: Path) -> str:
        """Lines of Python that load and use it."""

    def beforehand(self, data: ImageData, seed: int) -> dict[str, Image.Image]:
        """Pictures that do not change while training, by name."""

    def pictures(
        self, unet: UNet2DModel, data: ImageData, *, columns: int, seed: int, more: bool
    ) -> dict[str, Image.Image]:
        """What the network does now, on the same seeds each time: `samples`, and `more` where asked for, by name."""

    def animation(self, unet: UNet2DModel, data: ImageData, *, columns: int, seed: int) -> list[Image.Image]:
        """The frames of the sheet's making; none where it is made at once."""


@dataclass(frozen=True)
class PipelineProduct:
    """A `Product`: a pipeline folder, drawn from as it will be exported.

    Args:
        make: puts a pipeline around a network.
        noise_scheduler: the noising process it is trained on.
    """

    make: MakePipeline
    noise_scheduler: DDPMScheduler
    folder_name: str = "pipeline"

    def pipeline(self, unet: UNet2DModel) -> MNISTDiffusionPipeline:
        """The pipeline around the network, without a progress bar."""
        pipeline = self.make(unet)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, unet: UNet2DModel, folder: Path, *, card: Mapping[str, Any], samples: Image.Image | None) -> None:
        """Write the pipeline folder."""
        export_pipeline(self.pipeline(unet), folder, card=card, samples=samples)

    def card_values(self, unet: UNet2DModel) -> dict[str, Any]:
        """How the pipeline is called, and what it does by default."""
        pipeline = self.pipeline(unet)
        conditional = ["class-conditional", "classifier-free-guidance"] if pipeline.num_classes is not None else []
        return {
            "tags": ["diffusion", *conditional],
            "num_classes": pipeline.num_classes,
            "example_call": _example_call(pipeline),
            "num_inference_steps": pipeline.config.num_inference_steps,
            "guidance_scale": pipeline.config.guidance_scale,
            "guidance_distilled": pipeline.config.guidance_distilled,
        }

    def usage(self, unet: UNet2DModel, folder: Path) -> str:
        """Load with plain diffusers, and draw one image."""
        return (
            "from diffusers import DiffusionPipeline\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)\n'
            f'{_example_call(self.pipeline(unet))}.images[0].save("sample.png")'
        )

    def beforehand(self, data: ImageData, seed: int) -> dict[str, Image.Image]:
        """The noise schedule, and what it does to the first images of the training split."""
        return {
            "noise_schedule": to_picture(noise_schedules({"this run": self.noise_scheduler})),
            "forward_noising": noised(data, self.noise_scheduler, seed=seed),
        }

    def pictures(
        self, unet: UNet2DModel, data: ImageData, *, columns: int, seed: int, more: bool
    ) -> dict[str, Image.Image]:
        """One row a class, at most 20; the denoising of one image a class; pixel values of real and drawn images."""
        pipeline = self.pipeline(unet)
        labels, names = self._rows(pipeline, data, columns)
        drawn = generate(pipeline, labels, self._seeds(data, columns, seed))
        found = {"samples": image_grid(drawn, columns, row_labels=names)}
        if more:
            histograms = pixel_histograms(spread(data, len(drawn)), to_uint8(2 * drawn - 1))
            found["denoising"] = denoised(pipeline, data.class_names, seed=seed)
            found["pixel_histograms"] = to_picture(histograms)
        return found

    def animation(self, unet: UNet2DModel, data: ImageData, *, columns: int, seed: int) -> list[Image.Image]:
        """The clean images that the network predicts for the sheet at each step."""
        pipeline = self.pipeline(unet)
        labels, names = self._rows(pipeline, data, columns)
        return predicted_frames(pipeline, labels, self._seeds(data, columns, seed), columns, row_labels=names)

    def _rows(
        self, pipeline: MNISTDiffusionPipeline, data: ImageData, columns: int
    ) -> tuple[list[int] | None, tuple[str, ...] | None]:
        """The class of each image of a sheet, and the names of its rows; None and None without classes."""
        if pipeline.num_classes is None:
            return None, None
        names = data.class_names[:MAX_ROWS]
        return [label for label in range(len(names)) for _ in range(columns)], names

    def _seeds(self, data: ImageData, columns: int, seed: int) -> list[int]:
        count = min(MAX_ROWS, data.num_classes) * columns
        return [mixed_seed(seed, "samples", index) for index in range(count)]


def _example_call(pipeline: MNISTDiffusionPipeline) -> str:
    """A call of the pipeline that shows what it can be asked for."""
    if pipeline.num_classes is None:
        return "pipeline()"
    guidance = "" if pipeline.config.guidance_distilled else ", guidance_scale=5"
    return f"pipeline(class_labels=[{min(3, pipeline.num_classes - 1)}]{guidance})"


def spread(data: ImageData, count: int) -> Tensor:
    """At most `count` training images, uint8 `[N, C, H, W]`, spread over all of them, which may go by class."""
    return data.train.images[data.train.spread(count)]


def noised(data: ImageData, scheduler: DDPMScheduler, *, seed: int) -> Image.Image:
    """The way of a few training images to noise."""
    images = to_model_range(spread(data, FORWARD_ROWS))
    return forward_noising(images, scheduler, generator=torch_generator("cpu", seed, "samples"))


def denoised(pipeline: MNISTDiffusionPipeline, class_names: Sequence[str], *, seed: int, **call: Any) -> Image.Image:
    """The way from noise to one image of each class, at most ten."""
    conditional = pipeline.num_classes is not None
    names = tuple(class_names[:STRIP_ROWS]) if conditional else None
    count = len(names) if names is not None else FORWARD_ROWS
    generators = [torch.Generator().manual_seed(mixed_seed(seed, "samples", index)) for index in range(count)]
    noise = torch.stack([torch.randn(pipeline.image_shape, generator=generator) for generator in generators])
    asked: dict[str, Any] = {"class_labels": list(range(count))} if conditional else {"num_images_per_label": count}
    trajectory = pipeline.sample_trajectory(
        **asked, latents=noise.to(pipeline.device), generator=generators, output_type="pt", **call
    )
    return denoising_strip(torch.cat([noise[None], trajectory.latents]), trajectory.timesteps, row_labels=names)


def predicted_frames(
    pipeline: MNISTDiffusionPipeline,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    **call: Any,
) -> list[Image.Image]:
    """A sheet of the clean images that the network predicts, for each step of the sampler."""
    asked: dict[str, Any] = {"num_images_per_label": len(seeds)} if labels is None else {"class_labels": list(labels)}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    trajectory = pipeline.sample_trajectory(**asked, generator=generators, output_type="pt", **call)
    return [image_grid(step / 2 + 0.5, columns, row_labels=row_labels) for step in trajectory.pred_original_samples]
