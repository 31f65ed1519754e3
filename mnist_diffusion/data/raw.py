"""The result of reading a source: splits of images in their original form, with their labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.decoding import DataError, EncodedImages
from mnist_diffusion.data.layout import Layout, choose_splits, in_order
from mnist_diffusion.files import MAX_NAME, is_printable
from mnist_diffusion.option_types import Ground


@dataclass(frozen=True)
class RawSplit:
    """Images in their original form, uint8 `[N, C, H, W]` or encoded and of any sizes, each with a label or None."""

    images: Tensor | EncodedImages
    labels: Sequence[Any]


@dataclass(frozen=True)
class RawSource:
    """A source: a training split, and if it has them a held-out split and class names."""

    description: str
    train: RawSplit
    test: RawSplit | None
    class_names: dict[Any, str] | None = None
    notice: str | None = None
    notes: tuple[str, ...] = ()
    """How files were interpreted, and which were skipped."""
    hub_id: str | None = None
    background: Ground = "black"
    """Colour behind transparent pixels and padding."""
    has_subsets: bool = False
    """Whether `data.subset` applies."""

    def names(self, class_names: tuple[str, ...] | None) -> dict[Any, str]:
        """The name of each label in use, in their order: as given, or from the source, or the label itself.

        Raises:
            DataError: there are no images, some have no label, or held-out images have labels of their own; the number
                of names asked for is not that of the labels, or a name is not printable.
        """
        splits = {"training": self.train} | ({} if self.test is None else {"held-out": self.test})
        for name, split in splits.items():
            if len(split.labels) == 0:
                raise DataError(f"{self.description}: the {name} split holds no images")
            if missing := sum(label is None for label in split.labels):
                wrong = f"{missing} of {len(split.labels)} {name} images have none, or NaN, or a negative one"
                raise DataError(f"{self.description}: some images have no label: {wrong}")
            if unknown := set(split.labels) - set(self.train.labels):
                classes = sorted(unknown, key=str)[:20]
                raise DataError(f"{self.description}: held-out classes without training images: {classes}")
        labels = in_order(set(self.train.labels))
        if class_names is not None and len(class_names) != len(labels):
            present = f"{self.description} has {len(labels)}: {labels[:20]}"
            raise DataError(f"data.class_names names {len(class_names)} classes, but {present}")
        names = {label: (self.class_names or {}).get(label, str(label)) for label in labels}
        names = names if class_names is None else dict(zip(labels, class_names, strict=True))
        for name in names.values():
            require_plain(name, self.description)
        return names


def source_of(description: str, splits: Mapping[str, RawSplit], config: ImagesConfig, layout: Layout) -> RawSource:
    """A source of these splits: the one to train on, and the one to hold out if there is one."""
    train, test, notes = choose_splits(list(splits), config, description)
    held_out, all_notes = None if test is None else splits[test], (*layout.notes, *notes)
    return RawSource(description, splits[train], held_out, notes=all_notes, has_subsets=layout.has_subsets)


def require_plain(name: str, where: str) -> None:
    """Check that a name can be printed and drawn.

    Raises:
        DataError: it is not UTF-8, has control characters, or is too long.
    """
    if not is_printable(name):
        problem = f"has {len(name)} letters, more than {MAX_NAME}," if len(name) > MAX_NAME else "is not UTF-8"
        raise DataError(f"{where}: the name {name[:40]!a} {problem} or has control characters; rename it")


def plain_label(cell: Any, what: str) -> int | str | None:
    """A cell of a label column as a whole number or a word; None if it is missing, NaN or negative.

    Raises:
        DataError: it is something else.
    """
    while isinstance(cell, list) and len(cell) == 1:
        [cell] = cell
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "backslashreplace")
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, int):
        return int(cell) if cell >= 0 else None
    if not isinstance(cell, str):
        raise DataError(f"{what} must hold one number or word per image, got {str(cell)[:80]}")
    return cell
