"""Read the rows of tables of `datasets`: which column holds the pictures, which the labels, and what a cell is.

Nothing is decoded by the types that a table declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.arrays import MIN_PIXELS, pixel_split
from mnist_diffusion.data.columns import INDEX_COLUMN
from mnist_diffusion.data.decoding import (
    DataError,
    Encoded,
    EncodedImages,
    from_array,
    pixel_factor,
    read_file,
    wrap_errors,
)
from mnist_diffusion.data.layout import choose_splits
from mnist_diffusion.data.raw import RawSource, RawSplit, plain_label

MAX_NUMBERS = 2**24
"""In one picture that is given as a list of numbers."""


def read_datasets(description: str, tables: Any, config: ImagesConfig, folder: Path | None = None) -> RawSource:
    """Read the splits of a `datasets.DatasetDict`.

    Args:
        description: the source, for messages.
        tables: a `datasets.Dataset` for each split.
        config: names splits and columns.
        folder: that the tables lie in; files that they name are read only from there.

    Raises:
        DataError: a named split or column is missing, or there are several columns to choose from.
    """
    train_split, test_split, notes = choose_splits(list(tables), config, description)
    features = {n: kind for n, kind in tables[train_split].features.items() if not INDEX_COLUMN.fullmatch(n)}
    wide = len(features) > MIN_PIXELS and not {config.image_column, *COLUMNS["image_column"][1]} & features.keys()
    if wide and (train := pixel_split(tables[train_split].data.table, config, description)) is not None:
        labelled = test_split is not None and len(tables[test_split].features) == len(tables[train_split].features)
        test = pixel_split(tables[test_split].data.table, config, description) if labelled else None
        if test_split is not None and (test is None or all(label is None for label in test.labels)):
            test, notes = None, [*notes, f"split {test_split!r} left out: it has no labels"]
        return RawSource(str(config.source), description, train, test, notes=tuple(notes))
    image_column = _find_column("image_column", config.image_column, features, description)
    labels_in = {name: kind for name, kind in features.items() if name != image_column}
    label_column = _find_column("label_column", config.label_column, labels_in, description)
    names = dict(enumerate(getattr(features[label_column], "names", ())))

    def raw(split: str) -> RawSplit:
        return _read_rows(tables[split], image_column, label_column, f"{description} {split}", folder)

    train, test = raw(train_split), None
    if test_split is not None and label_column not in tables[test_split].features:
        notes.append(f"split {test_split!r} left out: it has no column {label_column!r}")
    elif test_split is not None:
        other = tables[test_split].features
        if image_column not in other:
            raise DataError(f"{description}: the split {test_split!r} has no column {image_column!r}")
        if getattr(other[label_column], "names", None) != getattr(features[label_column], "names", None):
            raise DataError(f"{description}: the splits name the classes of {label_column!r} differently")
        test = raw(test_split)
        if all(label is None for label in test.labels):
            test, notes = None, [*notes, f"split {test_split!r} left out: it has no labels"]
    return RawSource(str(config.source), description, train, test, names, notes=tuple(notes))


def _find_column(option: str, asked: str | None, features: Mapping[str, Any], description: str) -> str:
    """The column asked for, or the only one of its type, or one by its usual name, or the only possible one."""
    if asked is not None:
        if asked not in features:
            raise DataError(f"data.{option}={asked!r} is not a column of {description}, which has {sorted(features)}")
        return asked
    kind, usual, possible = COLUMNS[option]
    typed = [name for name, feature in features.items() if type(feature).__name__ == kind]
    named = [name for name in usual if name in features]
    others = [name for name, feature in features.items() if possible(feature)]
    for found in (typed, named[:1], others):
        if len(found) == 1:
            return found[0]
    raise DataError(f"{description}: cannot tell which of the columns {sorted(features)} to use; set data.{option}")


def _is_pixels(feature: Any) -> bool:
    """Whether a column can hold pictures: bytes, or nested or long lists."""
    kind = type(feature).__name__
    return kind in ("List", "LargeList", "Sequence") or kind.startswith("Array") or "binary" in _dtype(feature)


def _is_label(feature: Any) -> bool:
    return any(word in _dtype(feature) for word in ("int", "string", "float", "bool"))


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def _read_rows(rows: Any, image_column: str, label_column: str, description: str, folder: Path | None) -> RawSplit:
    from datasets import Image

    factor = 1
    with wrap_errors(f"{description} is damaged"):
        rows.data.table.validate(full=True)
    if type(rows.features[image_column]).__name__ == "Image":
        rows = rows.cast_column(image_column, Image(decode=False))
    elif (largest := _largest(rows.data.column(image_column))) is not None:
        factor = pixel_factor(largest, f"{description}: data.image_column={image_column!r}")
    rows = rows.with_format("arrow")  # so that nothing is decoded but here
    cells = rows[label_column].to_pylist()
    labels = [plain_label(cell, f"{description}: data.label_column={label_column!r}") for cell in cells]
    column = rows.select_columns([image_column])

    def read(indices: Sequence[int]) -> list[Encoded]:
        cells = column[list(indices)][image_column]
        for index, cell in zip(indices, cells, strict=True):
            if (count := _numbers_in(cell)) > MAX_NUMBERS:
                wrong = f"a picture of {count:,} numbers, more than the limit of {MAX_NUMBERS:,}"
                raise DataError(f"{description} row {index}: {wrong}; encode it")
        return [_encoded(value, description, folder, factor) for value in cells.to_pylist()]

    images = EncodedImages(len(labels), read, lambda index: f"{description} row {index}")
    return RawSplit(images, labels)


def _numbers_in(cell: Any) -> int:
    """How many numbers there are in a cell of nested lists."""
    cell = cell.value if hasattr(cell.type, "storage_type") else cell  # of datasets' own types of arrays
    if cell is None or not hasattr(cell.type, "value_type") or cell.values is None:
        return 0
    values = cell.values
    while hasattr(values.type, "value_type"):
        values = values.flatten()
    return len(values)


def _largest(column: Any) -> float | None:
    """The largest number of an Arrow column of nested lists; None if it holds no numbers."""
    import pyarrow
    from pyarrow import compute

    largest = []
    for chunk in column.chunks:
        values = getattr(chunk, "storage", chunk)
        while hasattr(values, "flatten") and not pyarrow.types.is_struct(values.type):
            if not pyarrow.types.is_nested(values.type):
                break
            values = values.flatten()
        if not (pyarrow.types.is_integer(values.type) or pyarrow.types.is_floating(values.type)):
            return 1.0 if pyarrow.types.is_boolean(values.type) else None
        if (value := compute.max(values).as_py()) is not None:
            largest.append(float(value))
    return max(largest, default=None)


def _encoded(value: Any, description: str, folder: Path | None, factor: int) -> Encoded:
    """A cell of an image column: a file's content, a file's path, or pixel values."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, dict):
        try:
            values = np.asarray(value)
        except ValueError as error:
            raise DataError(f"{description}: a picture's rows are of different lengths") from error
        return values if factor == 1 else from_array(values, description, factor=factor).permute(1, 2, 0).numpy()
    if isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    path = value.get("path")
    with wrap_errors(f"{description}: a picture is named {str(path)[:200]!r}"):
        inside = None if folder is None or path is None else (folder / path).resolve()
    if folder is None or inside is None or not inside.is_relative_to(folder.resolve()):
        raise DataError(f"{description}: a picture is a path, {str(path)[:200]!r}, not a file in the same folder")
    return read_file(inside)


COLUMNS: dict[str, tuple[str, tuple[str, ...], Callable[[Any], bool]]] = {
    "image_column": ("Image", ("image", "img", "pixels"), _is_pixels),
    "label_column": ("ClassLabel", ("label",), _is_label),
}
"""For each option: the type of its column, the names that are tried if not one has this type, and what it could be."""
