"""Read images from arrays of numbers: NumPy's files, and tables with a column per pixel."""

from __future__ import annotations

import io
import math
import re
import zipfile
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.columns import INDEX_COLUMN, LABEL_COLUMNS, find_column, usual
from mnist_diffusion.data.decoding import DataError, to_images, wrap_errors
from mnist_diffusion.data.layout import kind_in, listed
from mnist_diffusion.data.raw import RawSplit, plain_label

MAX_ARRAY_BYTES = 4 * 2**30
MIN_PIXELS = 64
LABEL_WORDS = {"label", "labels", "target", "targets", "y"}


def array_splits(contents: dict[str, bytes], where: str) -> dict[str, RawSplit]:
    """The splits that `.npz` and `.npy` files hold, as Keras, MedMNIST and KMNIST lay them out.

    Arrays with three axes or more, or with two of which the second is long, are images; others are labels. The names
    of files and keys say which belong together: `x_train`, `test_images`, `kmnist-val-labels.npz`.

    Raises:
        DataError: a file holds something else, or it is unclear which arrays belong together.
    """
    by_split: dict[str, list[tuple[str, np.ndarray]]] = {}
    for file, content in contents.items():
        for key, array in _arrays(file, content, f"{where}/{file}"):
            by_split.setdefault(kind_in(f"{file} {key}") or "train", []).append((key or file, array))
    splits = {}
    for split, arrays in by_split.items():
        images = [array for name, array in arrays if _are_images(name, array)]
        labels = [array for name, array in arrays if array.ndim > 0 and not _are_images(name, array)]
        if len(images) == 1 and not labels:
            splits[split] = RawSplit(to_images(images[0], where), [None] * len(images[0]))
            continue
        if len(images) != 1 or len(labels) != 1 or len(images[0]) != len(labels[0]):
            shapes = listed(f"{name} {array.shape}" for name, array in arrays)
            raise DataError(
                f"{where}: the split {split!r} needs one array of images and one of as many labels, got {shapes}"
            )
        several = labels[0].ndim == 2 and labels[0].shape[1] > 1
        if several and (labels[0].dtype.kind not in "buif" or ((labels[0] != 0).sum(axis=1) != 1).any()):
            raise DataError(f"{where}: labels of the shape {labels[0].shape} are not one class per image")
        rows = labels[0].argmax(axis=1) if several else labels[0]
        classes = [plain_label(cell, f"{where}: labels") for cell in rows.reshape(len(rows), -1)[:, 0].tolist()]
        splits[split] = RawSplit(to_images(images[0], where), classes)
    return splits


def _arrays(file: str, content: bytes, where: str) -> list[tuple[str, np.ndarray]]:
    """The arrays of a file, by key; nothing in it is run."""
    with wrap_errors(f"{where} could not be read as NumPy arrays without pickles"):
        if PurePosixPath(file).suffix.lower() == ".npy":
            return [("", np.load(io.BytesIO(content), allow_pickle=False))]
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if (size := sum(info.file_size for info in archive.infolist())) > MAX_ARRAY_BYTES:
                raise DataError(f"{where} declares {size} bytes, more than the limit of {MAX_ARRAY_BYTES}")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return [(key, arrays[key]) for key in arrays.files]


def _are_images(name: str, array: np.ndarray) -> bool:
    if array.ndim == 2 and LABEL_WORDS & set(re.split(r"[^a-z]+", name.lower())):
        return False
    return array.ndim > 2 or (array.ndim == 2 and array.shape[1] >= MIN_PIXELS)


def pixel_split(table: Any, config: ImagesConfig, where: str) -> RawSplit | None:
    """The images and labels of a table with a label and a column for each pixel; None if it is none."""
    import pyarrow

    table = table.drop_columns([name for name in table.column_names if INDEX_COLUMN.fullmatch(name)])
    names = table.column_names
    headless = ["f0"] if names[:1] == ["f0"] else []
    label = find_column("label_column", config.label_column, names, where, usual(names, LABEL_COLUMNS), headless)
    if label is None:
        return None
    pixels = table.drop_columns([label])
    numbers = all(pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) for kind in pixels.schema.types)
    if not numbers or pixels.num_columns < MIN_PIXELS or math.isqrt(pixels.num_columns) ** 2 != pixels.num_columns:
        return None
    values = np.stack([column.to_numpy() for column in pixels.columns], axis=1)
    labels = [plain_label(cell, f"{where}: data.label_column={label!r}") for cell in table[label].to_pylist()]
    return RawSplit(to_images(values, where), labels)
