"""The sheets, files, animations and data sets of `mnist-diffusion sample`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import DatasetCardData
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.command_options import SampleOptions
from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.transforms import filled_rows
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text, replace_file, replace_picture, replace_text
from mnist_diffusion.parallel import build_parts, is_main
from mnist_diffusion.pipelines import drawing
from mnist_diffusion.plots.grids import drawable, file_names, image_grid, save_animation, to_pictures
from mnist_diffusion.plots.sheets import predicted_frames
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
        pipeline = drawing.load_pipeline(options.pipeline, device=options.device, dtype=options.dtype)
        self.pipeline = drawing.with_sampler(pipeline, options.scheduler)
        self.load_weaker = functools.cache(functools.partial(drawing.load_on_same_device, self.pipeline))
        self.call = self._call_with(options.settings)
        self.names = drawing.class_names(self.pipeline)
        self.labels = self._labels()
        count = range(options.num_images)
        self.image_labels = None if self.labels is None else [self.labels[i % len(self.labels)] for i in count]
        self.seeds = [mixed_seed(options.seed, "samples", index) for index in count]

    def _call_with(self, settings: SamplingSettings) -> dict[str, Any]:
        return drawing.call_arguments(self.pipeline, settings, load=self.load_weaker)

    def _labels(self) -> list[int] | None:
        """The classes by number; all if none is named; None for an unconditional model."""
        if self.pipeline.num_classes is None and not self.options.class_labels:
            return None
        try:
            labels = [_resolve_label(name, self.names) for name in self.options.class_labels]
            return self.pipeline.label_ids(labels or range(self.pipeline.num_classes))
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def batches(self, part: slice = slice(None)) -> Iterator[Tensor]:
        """The images, or some of them, in batches, float `[b, C, H, W]` in [0, 1]."""
        size, labels = self.options.batch_size, None if self.image_labels is None else self.image_labels[part]
        return drawing.generate_batches(self.pipeline, labels, self.seeds[part], batch_size=size, **self.call)

    def grid(self) -> tuple[Image.Image, Tensor]:
        """A grid with one row per class (or a square one), and its images in the order of their seeds."""
        parts = []
        with tqdm(total=self.options.num_images, unit="image") as bar:
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
        labels, seeds = self._first(MAX_ANIMATED)
        columns = max(1, round(len(seeds) ** 0.5))
        save_animation(predicted_frames(self.pipeline, labels, seeds, columns, **self.call), path)

    def guidance_sweep(self, scales: Sequence[float]) -> Image.Image:
        """The same noise and classes at several guidance scales, one row each."""
        if self.labels is None:
            raise UserError("--guidance_sweep needs a class-conditional model")
        settings = (dataclasses.replace(self.options.settings, guidance_scale=scale) for scale in scales)
        calls = [(each.guidance_scale, self._call_with(each)) for each in settings]
        rows = [(f"scale {scale:g}", self._row(**call)) for scale, call in calls]
        return _sheet(rows, "The same noise, by guidance scale", self._column_labels())

    def _column_labels(self) -> list[str] | None:
        labels = self._first(max(10, len(self.names)))[0]
        return None if labels is None else ["\n".join(drawable(self.names[label]).split()[:2]) for label in labels]

    def _row(self, **changes: Any) -> Tensor:
        """The first images, at most one of each class or ten."""
        return drawing.generate(self.pipeline, *self._first(max(10, len(self.names))), **{**self.call, **changes})

    def _first(self, count: int) -> tuple[list[int] | None, list[int]]:
        """Labels and seeds of the first images."""
        return None if self.image_labels is None else self.image_labels[:count], self.seeds[:count]

    def interpolation(self, num_frames: int) -> Image.Image:
        """From each class to the next, from the same noise: one row for each pair."""
        if self.labels is None or len(self.labels) < 2:
            raise UserError("--interpolation needs two class labels or more")
        rows = []
        for pair in pairwise(self.labels):
            call = {**self.call, "generator": torch.Generator().manual_seed(self.seeds[0]), "output_type": "pt"}
            frames = self.pipeline.interpolate(pair, num_frames, **call)
            rows.append((" to ".join(self.names[label] for label in pair), frames.images.cpu()))
        shares = [f"{100 * place / max(1, num_frames - 1):.0f} %" for place in range(num_frames)]
        return _sheet(rows, "From one class to the next, the same noise", shares)

    def write_dataset(self, folder: Path) -> None:
        """Write a labelled data set: parquet shards, shared among processes, and a card that indexes them.

        Memory stays flat. Shards of the same request that are there already are kept.

        Raises:
            UserError: the folder holds another data set.
        """
        import datasets
        import pyarrow

        kinds: dict[str, Any] = {"image": datasets.Image()}
        if self.image_labels is not None:
            kinds["label"] = datasets.ClassLabel(names=list(self.names))
        features, count = datasets.Features(kinds), self.options.num_images
        starts = range(0, count, IMAGES_PER_SHARD)
        names = [f"train-{place:05d}-of-{len(starts):05d}.parquet" for place in range(len(starts))]
        shards = {folder / name: start for name, start in zip(names, starts, strict=True)}
        if is_main():
            self._claim_folder(folder)

        def write_shard(path: Path) -> None:
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

        build_parts(list(shards), write_shard)
        if is_main():
            split = datasets.SplitInfo(name="train", num_examples=count)
            info = datasets.DatasetInfo(features=features, splits=datasets.SplitDict({"train": split}))
            card = DatasetCardData(configs=[{"config_name": "default", "data_files": "train-*.parquet"}])
            datasets.info.DatasetInfosDict({"default": info}).to_dataset_card_data(card)
            about = f"{count} images sampled by `mnist-diffusion sample` with seed {self.options.seed}."
            replace_text(folder / "README.md", f"---\n{card}\n---\n\n{about}\n")

    def _claim_folder(self, folder: Path) -> None:
        """Note in a folder what is sampled into it, or check the note that is there."""
        fields = {"seed", "num_images", "class_labels", *(each.name for each in dataclasses.fields(SamplingSettings))}
        request = {name: value for name, value in dataclasses.asdict(self.options).items() if name in fields}
        defaults = {name: self.pipeline.config[name] for name in ("num_inference_steps", "guidance_scale", "id2label")}
        about = {"networks": drawing.fingerprints(self.pipeline, self.call), "defaults": defaults, "request": request}
        note = json.dumps({**about, "sampler": type(self.pipeline.scheduler).__name__}, sort_keys=True)
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
    number, named = int(text), names.index(text) if text in names else None
    if named is not None and named != number and 0 <= number < len(names):
        raise UserError(
            f"class_labels={text!r} is the name of class {named}, but {number} is {names[number]!r}: set "
            f"data.class_names in training, or sample from Python: pipeline([{number}]) or pipeline([{text!r}])"
        )
    return number if named is None else text


def _sheet(rows: Sequence[tuple[str, Tensor]], title: str, columns: Sequence[str] | None) -> Image.Image:
    """A grid of named rows, each float `[N, C, H, W]` in [0, 1], and named columns."""
    images, names = torch.cat([each for _, each in rows]), [name for name, _ in rows]
    return image_grid(images, len(rows[0][1]), row_labels=names, column_labels=columns, title=title)
