"""The sheets, files, animations and data sets of `mnist-diffusion sample`."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import DatasetCardData
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.command_options import SampleOptions
from mnist_diffusion.data.transforms import filled_rows
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text, replace_file, replace_picture, replace_text
from mnist_diffusion.parallel import build_parts, is_main
from mnist_diffusion.pipelines import drawing
from mnist_diffusion.plots.grids import drawable, file_names, image_grid, save_animation, to_pictures
from mnist_diffusion.plots.sheets import denoising_frames
from mnist_diffusion.seeds import mixed_seed

MAX_ANIMATED = 64
IMAGES_PER_SHARD = 2000


class Samples:
    """The images that the options ask for, sampled when they are needed.

    Args:
        options: what to sample.

    Raises:
        UserError: the pipeline could not be loaded, or an option does not fit it.
    """

    def __init__(self, options: SampleOptions):
        self.options = options
        loaded = drawing.load_pipeline(options.pipeline, device=options.device, dtype=options.dtype)
        self.pipeline = drawing.with_sampler(loaded, options.scheduler)
        self.call = drawing.call_arguments(self.pipeline, options.settings)
        self.names = drawing.class_names(self.pipeline)
        self.labels = self._labels()
        count = range(options.num_images)
        self.image_labels = None if self.labels is None else [self.labels[i % len(self.labels)] for i in count]
        self.seeds = [mixed_seed(options.seed, "samples", index) for index in count]

    def _labels(self) -> list[int] | None:
        """The classes by number; all if none is named; None for an unconditional model."""
        requested = [_resolve_label(name, self.names) for name in self.options.class_labels]
        return self.pipeline.label_ids(requested or range(len(self.names)) or None)

    def batches(self, part: slice = slice(None)) -> Iterator[Tensor]:
        """The images, or some of them, in batches, float `[b, C, H, W]` in [0, 1]."""
        size, labels = self.options.batch_size, None if self.image_labels is None else self.image_labels[part]
        return drawing.generate_batches(self.pipeline, labels, self.seeds[part], batch_size=size, **self.call)

    def grid(self) -> tuple[Image.Image, Tensor]:
        """Sample a grid, one row per class (square if unconditional); return it and its images in seed order."""
        parts = []
        with tqdm(total=self.options.num_images, unit="image") as bar:
            for part in self.batches():
                parts.append(part)
                bar.update(len(part))
        images = torch.cat(parts)
        if self.labels is None:
            return image_grid(images, round(len(images) ** 0.5)), images
        rows = [images[start :: len(self.labels)] for start in range(len(self.labels))]
        filled = filled_rows(rows, columns := max(len(row) for row in rows))
        return image_grid(filled, columns, row_labels=[self.names[label] for label in self.labels]), images

    def write_files(self, images: Tensor, folder: Path) -> None:
        """Write each image to `class_<class>_<number>.png` (`image_<number>.png` without classes)."""
        names, written = file_names(self.names), Counter[str]()
        for index, picture in enumerate(to_pictures(images)):
            stem = "image" if self.image_labels is None else f"class_{names[self.image_labels[index]]}"
            replace_picture(picture, folder / f"{stem}_{written[stem]:03d}.png")
            written[stem] += 1

    def animation(self, path: Path) -> None:
        """Write a GIF of the samples on their way from noise, in rows of equal length."""
        labels, seeds = self.image_labels and self.image_labels[:MAX_ANIMATED], self.seeds[:MAX_ANIMATED]
        columns = next(each for each in range(math.isqrt(len(seeds)), len(seeds) + 1) if len(seeds) % each == 0)
        frames = denoising_frames(self.pipeline, labels, seeds, max(columns, len(seeds) // columns), **self.call)
        save_animation(frames, path)

    def guidance_sweep(self, scales: Sequence[float]) -> Image.Image:
        """Sample the same images at each guidance scale, one row per scale.

        There is one column per class, or as many per class as ten columns allow; fewer if fewer images are sampled.
        """
        if self.image_labels is None or self.labels is None:
            raise UserError("--guidance_sweep needs a class-conditional model")
        count = len(self.labels) * max(1, 10 // len(self.labels))
        labels, seeds, rows = self.image_labels[:count], self.seeds[:count], []
        for scale in scales:
            settings = dataclasses.replace(self.options.settings, guidance_scale=scale)
            call = drawing.call_arguments(self.pipeline, settings)
            rows.append((f"scale {scale:g}", drawing.generate(self.pipeline, labels, seeds, **call)))
        columns = [textwrap.fill(drawable(self.names[label]), 10, break_long_words=False) for label in labels]
        return _sheet(rows, "The same noise, by guidance scale", columns)

    def interpolation(self, num_frames: int) -> Image.Image:
        """From each class to the next, from the same noise: one row for each pair."""
        if self.labels is None or len(self.labels) < 2:
            raise UserError("--interpolation needs two class labels or more")
        rows = []
        for pair in pairwise(self.labels):
            call = {**self.call, "generator": torch.Generator().manual_seed(self.seeds[0]), "output_type": "pt"}
            frames = self.pipeline.interpolate(pair, num_frames, **call)
            rows.append((" to ".join(self.names[label] for label in pair), frames.images.cpu()))
        shares = [f"{100 * place / (num_frames - 1):.0f} %" for place in range(num_frames)]
        return _sheet(rows, "From one class to the next, the same noise", shares)

    def write_dataset(self, folder: Path) -> None:
        """Write a labelled data set: parquet shards, shared among processes, and a card that indexes them.

        One shard is in memory at a time. Those of the same request that are there already are kept.

        Raises:
            UserError: the folder holds another data set.
        """
        import datasets

        datasets.disable_progress_bars()  # of which each shard would leave one
        kinds: dict[str, Any] = {"image": datasets.Image()}
        if self.image_labels is not None:
            kinds["label"] = datasets.ClassLabel(names=list(self.names))
        features, count = datasets.Features(kinds), self.options.num_images
        starts = range(0, count, IMAGES_PER_SHARD)
        shards = {folder / f"train-{i:05d}-of-{len(starts):05d}.parquet": start for i, start in enumerate(starts)}
        if is_main():
            self._claim_folder(folder)

        def write_shard(path: Path) -> None:
            part = slice(shards[path], shards[path] + IMAGES_PER_SHARD)
            rows: dict[str, Any] = {"image": [each for batch in self.batches(part) for each in to_pictures(batch)]}
            if self.image_labels is not None:
                rows["label"] = self.image_labels[part]
            replace_file(path, datasets.Dataset.from_dict(rows, features).to_parquet)

        build_parts(list(shards), write_shard)
        if is_main():
            split = datasets.SplitInfo(name="train", num_examples=count)
            info = datasets.DatasetInfo(features=features, splits=datasets.SplitDict({"train": split}))
            card = DatasetCardData(configs=[{"config_name": "default", "data_files": "train-*.parquet"}])
            datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(card)
            about = f"{count} images sampled by `mnist-diffusion sample` with seed {self.options.seed}."
            replace_text(folder / "README.md", f"---\n{card}\n---\n\n{about}\n")

    def _claim_folder(self, folder: Path) -> None:
        """Record what is being sampled into a folder, or check the existing record."""
        settings = repr(drawing.resolved(self.pipeline, self.options.settings))
        about = [*drawing.fingerprints(self.pipeline, self.call), settings, self.labels, self.names]
        note = json.dumps([*about, self.options.seed, self.options.num_images])
        folder.mkdir(parents=True, exist_ok=True)
        file, others = folder / ".request.json", [*sorted(folder.glob("train-*.parquet")), *folder.glob("README.md")]
        if others and not (file.exists() and read_text(file) == note):
            raise UserError(f"{folder} holds {others[0].name}, which another request has made; name another --out")
        replace_text(file, note)


def _resolve_label(text: str, names: Sequence[str]) -> str | int:
    """A class as Python takes it: its name, or its number if there is no such name.

    Raises:
        UserError: this is the name of one class and the number of another.
    """
    if not text.lstrip("-").isdigit():
        return text
    number, class_of_name = int(text), names.index(text) if text in names else None
    if class_of_name is not None and class_of_name != number and 0 <= number < len(names):
        raise UserError(
            f"class_labels={text!r} is ambiguous: it is the name of class {class_of_name} and the number of class "
            f"{names[number]!r}; train with other data.class_names, or sample from Python: pipeline([{number}]) for "
            f"the number, pipeline([{text!r}]) for the name"
        )
    return number if class_of_name is None else text


def _sheet(rows: Sequence[tuple[str, Tensor]], title: str, columns: Sequence[str]) -> Image.Image:
    """A grid of named rows, each float `[N, C, H, W]` in [0, 1], and named columns."""
    images, names = torch.cat([each for _, each in rows]), [name for name, _ in rows]
    return image_grid(images, len(rows[0][1]), row_labels=names, column_labels=columns, title=title)
