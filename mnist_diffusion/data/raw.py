"""The result of reading a source: splits of images in their original form, with their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mnist_diffusion.data.decoding import DataError, EncodedImages
from mnist_diffusion.data.layout import in_order, listed
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

    identifier: str
    """Its name in `data.source`."""
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

    def labels(self) -> list[Any]:
        """The labels in use, in their order.

        Raises:
            DataError: there are no images, some have no label, or held-out images have labels of their own.
        """
        splits = {"training": self.train} | ({} if self.test is None else {"held-out": self.test})
        for name, split in splits.items():
            if len(split.labels) == 0:
                raise DataError(f"{self.description}: a split holds no images: the {name} one")
            if missing := sum(label is None for label in split.labels):
                raise DataError(
                    f"{self.description}: some images have no label: {missing} of {len(split.labels)} {name} images "
                    "have none, or NaN, or a negative one"
                )
        present = {label for split in splits.values() for label in split.labels}
        if unknown := present - set(self.train.labels):
            raise DataError(
                f"{self.description}: held-out classes without training images: {sorted(unknown, key=str)[:20]}"
            )
        return in_order(present)

    def names(self, given: tuple[str, ...] | None) -> dict[Any, str]:
        """The name of each label in use: as given, or from the source, or the label itself.

        Raises:
            DataError: the number of names asked for is not that of the labels, or a name is not printable.
        """
        labels = self.labels()
        if given is not None and len(given) != len(labels):
            present = f"{self.description} has {len(labels)}: {labels[:20]}"
            raise DataError(f"data.class_names names {len(given)} classes, but {present}")
        own = {label: (self.class_names or {}).get(label, str(label)) for label in labels}
        names = own if given is None else dict(zip(labels, given, strict=True))
        for name in names.values():
            require_plain(name, self.description)
        return names


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
    while isinstance(cell, list | np.ndarray) and len(cell) == 1:
        cell = cell[0]
    cell = cell.item() if isinstance(cell, np.generic) else cell
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "backslashreplace")
    if isinstance(cell, float) and math.isfinite(cell) and cell == int(cell):
        cell = int(cell)
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, int):
        return int(cell) if cell >= 0 else None
    if not isinstance(cell, str):
        raise DataError(f"{what} must hold one number or word per image, got {str(cell)[:80]}")
    return cell


def label_order_warning(names: Sequence[str]) -> str | None:
    """A warning about classes whose names are other numbers than their labels."""
    if all(name.isdecimal() for name in names) and [int(name) for name in names] != list(range(len(names))):
        pairs = listed(f"{place} is {name!r}" for place, name in enumerate(names))
        return f"class names are numbers that differ from their labels: label {pairs}"
    return None
