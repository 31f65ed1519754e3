"""Draw what `mnist-diffusion sample` writes: grids, files, animations, sheets, data sets."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock
from huggingface_hub import DatasetCardData
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.checks import pairs_of_levels
from mnist_diffusion.data.transforms import filled_rows
from mnist_diffusion.diffusion.guidance import fingerprints, guidance_arguments, load_beside
from mnist_diffusion.diffusion.pipeline import class_names, generate, generate_batches, load_pipeline, with_sampler
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text, replace_file, replace_picture, replace_text
from mnist_diffusion.pictures.grids import drawable, file_names, image_grid, save_animation, to_pictures
from mnist_diffusion.pictures.pipelines import predicted_frames
from mnist_diffusion.ranks import make_together, rank
from mnist_diffusion.requests import SampleRequest
from mnist_diffusion.seeds import mixed_seed

SHEET_STEPS = (5, 10, 20, 50)
ANIMATION_IMAGES = 64
IMAGES_PER_SHARD = 2000


class Samples:
    """The images of a request, drawn when they are asked for.

    Args:
        request: what to draw.

    Raises:
        UserError: the pipeline could not be loaded, or an argument cannot work with it.
    """

    def __init__(self, request: SampleRequest):
        self.request = request
        self.pipeline = load_pipeline(request.pipeline, device=request.device, dtype=request.dtype)
        if request.scheduler is not None:
            self.pipeline = with_sampler(self.pipeline, request.scheduler)
        self._weaker = functools.cache(functools.partial(load_beside, self.pipeline))
        chosen = {name: getattr(request, name) for name in ("num_inference_steps", "eta")}
        self.arguments = {name: value for name, value in chosen.items() if value is not None}
        self.arguments |= self._guidance(request.guidance_scale)
        self.names = class_names(self.pipeline)
        self.labels = self._labels()
        count = range(request.num_images)
        self.image_labels = None if self.labels is None else [self.labels[i % len(self.labels)] for i in count]
        self.seeds = [mixed_seed(request.seed, "samples", index) for index in count]

    def _guidance(self, scale: float | None) -> dict[str, Any]:
        """Arguments of a call, by the rule that was asked for."""
        intervals = pairs_of_levels("guidance_interval", self.request.guidance_interval)
        return guidance_arguments(self.pipeline, self.request.guidance, scale, *intervals, load=self._weaker)

    def _labels(self) -> list[int] | None:
        """The classes asked for, by number; all if none is named; None for an unconditional model."""
        asked = self.request.class_labels
        if self.pipeline.num_classes is None and not asked:
            return None
        try:
            return self.pipeline.label_ids([self._spelled(name) for name in asked] or range(self.pipeline.num_classes))
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def _spelled(self, asked: str) -> str | int:
        """A class as Python spells it: its name, or its number if it has no such name.

        Raises:
            UserError: this is the name of one class and the number of another.
        """
        if not asked.lstrip("-").isdigit():
            return asked
        number, named = int(asked), self.names.index(asked) if asked in self.names else None
        if named is not None and named != number and 0 <= number < len(self.names):
            raise UserError(
                f"class_labels={asked!r} is the name of class {named}, but {number} is {self.names[number]!r}: set "
                f"data.class_names in training, or draw from Python: pipeline([{number}]) or pipeline([{asked!r}])"
            )
        return number if named is None else asked

    def batches(self, part: slice = slice(None)) -> Iterator[Tensor]:
        """The images, or some of them, in batches, float `[b, C, H, W]` in [0, 1]."""
        size, labels = self.request.batch_size, None if self.image_labels is None else self.image_labels[part]
        return generate_batches(self.pipeline, labels, self.seeds[part], batch_size=size, **self.arguments)

    def grid(self) -> tuple[Image.Image, Tensor]:
        """A grid with one row per class (or a square one), and its images in the order they were drawn."""
        parts = []
        with tqdm(total=self.request.num_images, unit="image") as bar:
            for part in self.batches():
                parts.append(part)
                bar.update(len(part))
        images = torch.cat(parts)
        if self.labels is None:
            return image_grid(images, max(1, round(len(images) ** 0.5))), images
        rows = [images[start :: len(self.labels)] for start in range(len(self.labels))]
        filled = filled_rows(rows, columns := max(len(row) for row in rows))
        return image_grid(filled, columns, row_labels=[self.names[label] for label in self.labels]), images

    def write_files(self, images: Tensor, folder: Path) -> None:
        """Write each image to `digit_<class>_<number>.png` (`image_<number>.png` without classes)."""
        counts: dict[int, int] = {}
        names = file_names(self.names)
        for index, picture in enumerate(to_pictures(images)):
            if self.image_labels is None:
                replace_picture(picture, folder / f"image_{index:03d}.png")
                continue
            label = self.image_labels[index]
            counts[label] = counts.get(label, -1) + 1
            replace_picture(picture, folder / f"digit_{names[label]}_{counts[label]:03d}.png")

    def animation(self, path: Path) -> None:
        """Write a GIF of the predicted clean images, step by step."""
        labels, seeds = self._first(ANIMATION_IMAGES)
        columns = max(1, round(len(seeds) ** 0.5))
        save_animation(predicted_frames(self.pipeline, labels, seeds, columns, **self.arguments), path)

    def compare_schedulers(self) -> Image.Image:
        """DDPM against DDIM from the same noise: one row per sampler and number of steps."""
        rows, kept = [], self.pipeline
        for sampler in ("ddpm", "ddim"):
            self.pipeline = with_sampler(kept, sampler)
            rows += [(f"{sampler} {steps}", self._row(num_inference_steps=steps)) for steps in SHEET_STEPS]
        self.pipeline = kept
        return _sheet(rows, "The same noise, by sampler and steps", self._columns())

    def guidance_sweep(self, scales: Sequence[float]) -> Image.Image:
        """The same noise and classes at several guidance scales, one row each."""
        if self.labels is None:
            raise UserError("--guidance_sweep needs a class-conditional model")
        rows = [(f"scale {scale:g}", self._row(**self._guidance(scale))) for scale in scales]
        return _sheet(rows, "The same noise, by guidance scale", self._columns())

    def _columns(self) -> list[str] | None:
        """The class of each image of a row."""
        labels = self._first(max(10, len(self.names)))[0]
        return None if labels is None else ["\n".join(drawable(self.names[label]).split()[:2]) for label in labels]

    def _row(self, **changes: Any) -> Tensor:
        """The first images of the request, at most one of each class or ten."""
        return generate(self.pipeline, *self._first(max(10, len(self.names))), **{**self.arguments, **changes})

    def _first(self, count: int) -> tuple[list[int] | None, list[int]]:
        """Labels and seeds of the first images."""
        return None if self.image_labels is None else self.image_labels[:count], self.seeds[:count]

    def interpolation(self, num_frames: int) -> Image.Image:
        """From each class to the next, from the same noise: one row for each pair."""
        if self.labels is None or len(self.labels) < 2:
            raise UserError("--interpolation needs two class labels or more")
        rows = []
        for pair in pairwise(self.labels):
            generator = torch.Generator().manual_seed(self.seeds[0])
            frames = self.pipeline.interpolate(
                pair, num_frames, generator=generator, output_type="pt", **self.arguments
            )
            rows.append((" to ".join(self.names[label] for label in pair), frames.images.cpu()))
        shares = [f"{100 * place / max(1, num_frames - 1):.0f} %" for place in range(num_frames)]
        return _sheet(rows, "From one class to the next, the same noise", shares)

    def write_dataset(self, folder: Path) -> None:
        """Write a labelled data set: parquet in shards, by this process and others, and a card that indexes them.

        Memory stays flat. Shards that are there already from the same request are kept.

        Raises:
            UserError: the folder holds another data set.
        """
        import datasets
        import pyarrow

        kinds: dict[str, Any] = {"image": datasets.Image()}
        if self.image_labels is not None:
            kinds["label"] = datasets.ClassLabel(names=list(self.names))
        features, count = datasets.Features(kinds), self.request.num_images
        starts = range(0, count, IMAGES_PER_SHARD)
        names = [f"train-{place:05d}-of-{len(starts):05d}.parquet" for place in range(len(starts))]
        shards = {folder / name: start for name, start in zip(names, starts, strict=True)}
        self._begin_dataset(folder)

        def make(path: Path) -> None:
            part = slice(shards[path], shards[path] + IMAGES_PER_SHARD)
            labels = iter(self.image_labels[part] if self.image_labels is not None else ())

            def write(file: BinaryIO) -> None:
                stream = pyarrow.PythonFile(file, mode="w")
                writer = datasets.arrow_writer.ParquetWriter(features=features, stream=stream)
                for batch in self.batches(part):
                    for picture in to_pictures(batch):
                        label = {} if self.image_labels is None else {"label": next(labels)}
                        writer.write(features.encode_example({"image": picture, **label}))
                writer.finalize(close_stream=False)

            replace_file(path, write)

        make_together(list(shards), make)
        if rank() == 0:
            split = datasets.SplitInfo(name="train", num_examples=count)
            info = datasets.DatasetInfo(features=features, splits=datasets.SplitDict({"train": split}))
            card = DatasetCardData(configs=[{"config_name": "default", "data_files": "train-*.parquet"}])
            datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(card)
            about = f"{count} images drawn by `mnist-diffusion sample` with seed {self.request.seed}."
            replace_text(folder / "README.md", f"---\n{card}\n---\n\n{about}\n")

    def _begin_dataset(self, folder: Path) -> None:
        """Note what is drawn into a folder, or find it noted there."""
        request = dataclasses.replace(self.request, processes=1, device=None, batch_size=None, pipeline="")
        defaults = {name: self.pipeline.config[name] for name in ("num_inference_steps", "guidance_scale", "id2label")}
        about = {
            "drawn_by": fingerprints(self.pipeline, self.arguments),
            "sampler": type(self.pipeline.scheduler).__name__,
            "defaults": defaults,
        }
        wanted = json.dumps({**about, "request": dataclasses.asdict(request)}, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        noted = folder / ".request.json"
        held = [*sorted(folder.glob("train-*.parquet")), *folder.glob("README.md")]
        with FileLock(folder / ".request.lock"):
            if held and not (noted.exists() and read_text(noted) == wanted):
                other = f"{folder} holds {held[0].name}, which was not drawn by this request"
                raise UserError(f"{other}; name another --out")
            replace_text(noted, wanted)


def _sheet(rows: Sequence[tuple[str, Tensor]], title: str, columns: Sequence[str] | None) -> Image.Image:
    """A grid of named rows, each float `[N, C, H, W]` in [0, 1], and named columns."""
    images, names = torch.cat([each for _, each in rows]), [name for name, _ in rows]
    return image_grid(images, len(rows[0][1]), row_labels=names, column_labels=columns, title=title)
