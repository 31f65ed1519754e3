"""What `mnist-diffusion sample` makes of a pipeline folder: grids, files, animations, sheets, data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.config import SchedulerName
from mnist_diffusion.diffusion.pipeline import generate, generate_batches, load_pipeline
from mnist_diffusion.diffusion.samplers import build_sampler
from mnist_diffusion.errors import UserError
from mnist_diffusion.pictures.grids import image_grid, safe_name, save_animation, to_pictures
from mnist_diffusion.pictures.pipelines import predicted_frames
from mnist_diffusion.seeds import mixed_seed

SHEET_STEPS = (5, 10, 20, 50)
ANIMATION_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw, and how."""

    pipeline: str
    class_labels: tuple[str, ...]
    num_images: int
    guidance_scale: float | None
    scheduler: SchedulerName | None
    num_inference_steps: int | None
    eta: float | None
    seed: int
    batch_size: int
    device: str | None
    dtype: str
    out: Path


class Drawing:
    """A loaded pipeline and a request for images from it.

    Args:
        request: what to draw.

    Raises:
        UserError: the pipeline cannot be loaded, or an argument cannot work with it.
    """

    def __init__(self, request: Request):
        self.request = request
        self.pipeline = load_pipeline(request.pipeline, device=request.device, dtype=request.dtype)
        if request.scheduler is not None:
            self.pipeline.scheduler = build_sampler(request.scheduler, self.pipeline.scheduler.config)
        chosen = {name: getattr(request, name) for name in ("guidance_scale", "num_inference_steps", "eta")}
        self.arguments = {name: value for name, value in chosen.items() if value is not None}
        self.labels = self._labels()

    def _labels(self) -> list[int] | None:
        """The classes asked for, by index; all where none is named; None for an unconditional model."""
        pipeline, names = self.pipeline, self.request.class_labels
        if pipeline.num_classes is None and not names:
            return None
        known = set((pipeline.config.id2label or {}).values())
        spelled = [name if name in known or not name.lstrip("-").isdigit() else int(name) for name in names]
        try:
            return pipeline.label_ids(spelled or list(range(pipeline.num_classes)))
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def name(self, label: int) -> str:
        """The name of a class, or its number."""
        return (self.pipeline.config.id2label or {}).get(str(label), str(label))

    @property
    def image_labels(self) -> list[int] | None:
        """The label of each image: the classes in turn."""
        if self.labels is None:
            return None
        return [self.labels[index % len(self.labels)] for index in range(self.request.num_images)]

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [mixed_seed(self.request.seed, "samples", index) for index in range(self.request.num_images)]

    def batches(self, **changes: Any) -> Iterator[Tensor]:
        """The images in batches, float `[b, C, H, W]` in [0, 1]."""
        arguments = {**self.arguments, **changes}
        return generate_batches(
            self.pipeline, self.image_labels, self.seeds, batch_size=self.request.batch_size, **arguments
        )

    def grid(self) -> tuple[Image.Image, Tensor]:
        """A grid with one row a class (or a square one), and the images in it in the order they were drawn."""
        images = torch.cat(list(tqdm(self.batches(), total=-(-self.request.num_images // self.request.batch_size))))
        if self.labels is None:
            return image_grid(images, max(1, round(len(images) ** 0.5))), images
        rows = [images[start :: len(self.labels)] for start in range(len(self.labels))]
        columns = max(len(row) for row in rows)
        blank = torch.zeros(1, *images.shape[1:])
        filled = torch.cat([torch.cat([row, *[blank] * (columns - len(row))]) for row in rows])
        return image_grid(filled, columns, row_labels=[self.name(label) for label in self.labels]), images

    def write_files(self, images: Tensor, folder: Path) -> None:
        """Write each image to `digit_<class>_<number>.png` (`image_<number>.png` without classes)."""
        counts: dict[int, int] = {}
        for index, picture in enumerate(to_pictures(images)):
            if self.image_labels is None:
                picture.save(folder / f"image_{index:03d}.png")
                continue
            label = self.image_labels[index]
            number = counts.setdefault(label, 0)
            counts[label] += 1
            picture.save(folder / f"digit_{safe_name(self.name(label))}_{number:03d}.png")

    def animation(self, path: Path) -> None:
        """A GIF of the predicted clean images, step by step."""
        count = min(self.request.num_images, ANIMATION_IMAGES)
        labels = self.image_labels[:count] if self.image_labels is not None else None
        columns = max(1, round(count**0.5))
        save_animation(predicted_frames(self.pipeline, labels, self.seeds[:count], columns, **self.arguments), path)

    def compare_schedulers(self) -> Image.Image:
        """DDPM against DDIM from the same noise: a row for each sampler and number of steps."""
        rows, names = [], []
        kept = self.pipeline.scheduler
        for sampler in ("ddpm", "ddim"):
            self.pipeline.scheduler = build_sampler(sampler, kept.config)
            for steps in SHEET_STEPS:
                rows.append(self._row(num_inference_steps=steps))
                names.append(f"{sampler} {steps}")
        self.pipeline.scheduler = kept
        return image_grid(torch.cat(rows), len(rows[0]), row_labels=names)

    def guidance_sweep(self, scales: Sequence[float]) -> Image.Image:
        """The same noise and classes at several guidance scales, a row each."""
        if self.labels is None:
            raise UserError("--guidance_sweep needs a class-conditional model")
        rows = [self._row(guidance_scale=scale) for scale in scales]
        return image_grid(torch.cat(rows), len(rows[0]), row_labels=[f"scale {scale:g}" for scale in scales])

    def _row(self, **changes: Any) -> Tensor:
        """The first images of the request, at most one of each class or ten."""
        count = min(self.request.num_images, max(10, len(self.labels or ())))
        labels = self.image_labels[:count] if self.image_labels is not None else None
        return generate(self.pipeline, labels, self.seeds[:count], **{**self.arguments, **changes})

    def interpolation(self, num_frames: int) -> Image.Image:
        """From each class to the next, from the same noise: a row for each pair."""
        if self.labels is None or len(self.labels) < 2:
            raise UserError("--interpolation needs two class labels or more")
        rows, names = [], []
        for first, last in zip(self.labels, self.labels[1:], strict=False):
            generator = torch.Generator().manual_seed(self.seeds[0])
            frames = self.pipeline.interpolate(
                [first, last], num_frames, generator=generator, output_type="pt", **self.arguments
            ).images
            rows.append(frames.cpu())
            names.append(f"{self.name(first)} to {self.name(last)}")
        return image_grid(torch.cat(rows), num_frames, row_labels=names)

    def write_dataset(self, folder: Path) -> None:
        """A labelled data set as parquet, `train-00000.parquet`, written as it is drawn; memory stays flat."""
        import datasets

        labels = self.image_labels
        kinds: dict[str, Any] = {"image": datasets.Image()}
        if labels is not None:
            names = [self.name(label) for label in range(self.pipeline.num_classes)]
            kinds["label"] = datasets.ClassLabel(names=names)
        features = datasets.Features(kinds)
        folder.mkdir(parents=True, exist_ok=True)
        index = 0
        with (
            datasets.arrow_writer.ParquetWriter(features=features, path=str(folder / "train-00000.parquet")) as writer,
            tqdm(total=self.request.num_images, unit="image") as bar,
        ):
            for batch in self.batches():
                for picture in to_pictures(batch):
                    row = {"image": picture} if labels is None else {"image": picture, "label": labels[index]}
                    writer.write(features.encode_example(row))
                    index += 1
                bar.update(len(batch))
            writer.finalize()
