"""Survey labelled images before training: counts, shapes, duplicates, and pictures that could not be read."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.data.raw import RawSplit
from mnist_diffusion.data.sanity_checks import dataset_warnings
from mnist_diffusion.data.sources import read_source
from mnist_diffusion.data.transforms import filled_rows, fit_to_size, to_channels
from mnist_diffusion.option_types import Ground

PREVIEW_PER_CLASS = 10
MAX_SHOWN_SIDE = 64
MAX_SHOWN_CLASSES = 100


@dataclass
class SplitSurvey:
    """What a split holds.

    Args:
        counts: readable images of each class.
        sizes: how many images have each width, height and colour, in words.
        unreadable: what is wrong with the others, one line each.
        previews: the first images of each class.
    """

    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    previews: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass
class Survey:
    """What a source holds.

    Args:
        description: the source.
        class_names: all classes, in the order of their labels.
        splits: by name, `train` and, if the source has it, `test`.
        duplicates: groups of images with the same pixels, by name.
        in_two_classes: the groups with images of different classes.
        in_both_splits: the groups with images of both the training and the held-out split.
        notes: how files were interpreted, which were skipped, and warnings.
        background: colour behind transparent pixels and padding.
    """

    description: str
    class_names: tuple[str, ...]
    splits: dict[str, SplitSurvey]
    duplicates: list[list[str]]
    in_two_classes: list[list[str]]
    in_both_splits: list[list[str]]
    notes: list[str]
    background: Ground

    def contact_sheet(self) -> tuple[Tensor, list[str], int]:
        """The first images of each class of the training split, one row per class, for at most 100 classes.

        Returns:
            float `[N, C, H, W]` in [0, 1]; the class of each row; images per row.
        """
        previews = self.splits["train"].previews
        names = [name for name in self.class_names if previews.get(name)][:MAX_SHOWN_CLASSES]
        images = [image for name in names for image in previews[name]]
        side = min(MAX_SHOWN_SIDE, max(max(image.shape[-2:]) for image in images))
        channels = max(image.shape[0] for image in images)
        columns = max(len(previews[name]) for name in names)
        fit = partial(fit_to_size, size=side, fit="contain", background=self.background)
        rows = [torch.stack([fit(to_channels(image, channels)) for image in previews[name]]) / 255 for name in names]
        return filled_rows(rows, columns), names, columns


_Places = dict[bytes, list[tuple[str, str, str]]]
"""Split, class and name of the images that have the same pixels, by a digest of those."""


def survey(config: ImagesConfig) -> Survey:
    """Read every image of a source, and go on after those that could not be read.

    Raises:
        DataError: the source itself could not be read, or holds no readable image.
    """
    source = read_source(config)
    of_label = source.names(config.class_names)
    places: _Places = {}
    splits = {"train": _survey_split(source.train, "train", of_label, places)}
    if source.test is not None:
        splits["test"] = _survey_split(source.test, "test", of_label, places)
    if not splits["train"].counts:
        raise DataError("; ".join([f"{source.description}: no image could be read", *splits["train"].unreadable[:1]]))
    groups = [tuple(zip(*group, strict=True)) for group in places.values() if len(group) > 1]
    duplicates = [list(where) for _, _, where in groups]
    in_two_classes = [list(where) for _, classes, where in groups if len(set(classes)) > 1]
    in_both_splits = [list(where) for in_splits, _, where in groups if len(set(in_splits)) > 1]
    names = tuple(of_label.values())
    previews = [(image, label) for label, name in enumerate(names) for image in splits["train"].previews.get(name, ())]
    images, labels = zip(*previews, strict=True)
    notes = [*source.notes, *dataset_warnings(images, labels, names)]
    groups_of_copies = (duplicates, in_two_classes, in_both_splits)
    return Survey(source.description, names, splits, *groups_of_copies, notes, source.background)


def _survey_split(split: RawSplit, name: str, of_label: dict[Any, str], places: _Places) -> SplitSurvey:
    result, images = SplitSurvey(), split.images
    for index, label in enumerate(tqdm(split.labels, desc=name, unit="image", leave=False)):
        where = f"{name} image {index}" if isinstance(images, Tensor) else images.where(index)
        try:
            image = images[index]
        except DataError as error:
            result.unreadable.append(str(error))
            continue
        class_name = of_label[label]
        result.counts[class_name] += 1
        result.sizes[f"{image.shape[2]} x {image.shape[1]} {'grey' if len(image) == 1 else 'RGB'}"] += 1
        previews = result.previews.setdefault(class_name, [])
        if len(previews) < PREVIEW_PER_CLASS:
            too_large = max(image.shape[-2:]) > MAX_SHOWN_SIDE
            previews.append(fit_to_size(image, MAX_SHOWN_SIDE, "contain") if too_large else image)
        content = repr(tuple(image.shape)).encode() + image.numpy().tobytes()
        digest = hashlib.sha1(content, usedforsecurity=False).digest()
        places.setdefault(digest, []).append((name, class_name, where))
    return result
