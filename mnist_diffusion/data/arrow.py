"""Read images and labels from `datasets` tables: find the columns, and decode cells by their content.

The feature types that a table declares serve to find the columns and name the classes, never to decode a cell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.arrays import MIN_PIXELS, pixel_split
from mnist_diffusion.data.columns import INDEX_COLUMN, find_column
from mnist_diffusion.data.decoding import DataError, Encoded, EncodedImages, pixel_factor, read_file, wrap_errors
from mnist_diffusion.data.layout import Layout, choose_splits, listed
from mnist_diffusion.data.raw import RawSource, RawSplit, plain_label

COLUMNS = {
    "image_column": ("Image", ("image", "img", "pixels"), re.compile("^(List|LargeList|Sequence|Array)|binary")),
    "label_column": ("ClassLabel", ("label",), re.compile("int|string|float|bool")),
}
"""For each option: the type of its column, the usual names to try otherwise, and other types that are possible."""


def read_datasets(
    description: str, tables: Any, config: ImagesConfig, layout: Layout, folder: Path | None = None
) -> RawSource:
    """Read the splits of a `datasets.DatasetDict`.

    Args:
        description: the source, for messages.
        tables: a `datasets.Dataset` for each split.
        config: names splits and columns.
        layout: how their files were interpreted.
        folder: the folder of the tables; files that they name are read only from there.

    Raises:
        DataError: a named split or column is missing, or there are several columns to choose from.
    """
    train_split, test_split, notes = choose_splits(list(tables), config, description)
    features = {n: kind for n, kind in tables[train_split].features.items() if not INDEX_COLUMN.fullmatch(n)}
    wide = len(features) > MIN_PIXELS and not {config.image_column, *COLUMNS["image_column"][1]} & features.keys()
    names: dict[Any, str] = {}
    test = None
    if wide and (train := pixel_split(tables[train_split].data.table, config, description)) is not None:
        if test_split is not None and len(tables[test_split].features) == len(tables[train_split].features):
            test = pixel_split(tables[test_split].data.table, config, description)
    else:
        image_column = _find_column("image_column", config.image_column, features, description)
        labels_in = {name: kind for name, kind in features.items() if name != image_column}
        label_column = _find_column("label_column", config.label_column, labels_in, description)
        names = dict(enumerate(_names(features[label_column])))
        train = _read_rows(tables[train_split], image_column, label_column, f"{description} {train_split}", folder)
        if test_split is not None and label_column in (other := tables[test_split].features):
            if image_column not in other:
                raise DataError(f"{description}: the split {test_split!r} has no column {image_column!r}")
            if _names(other[label_column]) != _names(features[label_column]):
                raise DataError(f"{description}: the splits name the classes of {label_column!r} differently")
            test = _read_rows(tables[test_split], image_column, label_column, f"{description} {test_split}", folder)
    if test_split is not None and (test is None or all(label is None for label in test.labels)):
        test, notes = None, [*notes, f"split {test_split!r} left out: it has no labels"]
    all_notes = (*layout.notes, *notes)
    return RawSource(description, train, test, names, notes=all_notes, has_subsets=layout.has_subsets)


def _find_column(option: str, requested: str | None, features: Mapping[str, Any], description: str) -> str:
    """The column asked for, or the only one of its type, or one by its usual name, or the only possible one."""
    kind, usual, possible = COLUMNS[option]
    kinds = {name: f"{type(feature).__name__} {getattr(feature, 'dtype', '')}" for name, feature in features.items()}
    typed = [name for name in features if kinds[name].partition(" ")[0] == kind]
    usually_named = [name for name in usual if name in features][:1]
    others = [name for name in features if possible.search(kinds[name])]
    if (column := find_column(option, requested, [*features], description, typed, usually_named, others)) is None:
        columns = listed(sorted(features))
        raise DataError(f"{description}: cannot tell which of the columns {columns} to use; set data.{option}")
    return column


def _names(feature: Any) -> tuple[str, ...]:
    """The names of a column's classes."""
    return tuple(getattr(feature, "names", None) or ())


def _read_rows(rows: Any, image_column: str, label_column: str, description: str, folder: Path | None) -> RawSplit:
    factor = 1
    with wrap_errors(f"{description} is damaged"):
        rows.data.table.validate(full=True)
        largest = _largest(rows.data.column(image_column))
    if largest is not None:
        factor = pixel_factor(largest, f"{description}: data.image_column={image_column!r}")
    rows = rows.with_format("arrow")  # so that nothing is decoded but here
    cells = rows[label_column].to_pylist()
    labels = [plain_label(cell, f"{description}: data.label_column={label_column!r}") for cell in cells]
    column = rows.select_columns([image_column])

    def where(index: int) -> str:
        return f"{description} row {index}"

    def read(indices: Sequence[int]) -> list[Encoded]:
        cells = column[list(indices)][image_column]
        return [_encoded(cell, where(index), folder, factor) for index, cell in zip(indices, cells, strict=True)]

    return RawSplit(EncodedImages(len(labels), read, where), labels)


def _largest(column: Any) -> float | None:
    """The largest number of an Arrow column of nested lists; None if it holds no numbers."""
    from pyarrow import compute, float32, types

    largest = []
    for chunk in column.chunks:
        values = getattr(chunk, "storage", chunk)  # of datasets' own types of arrays
        while hasattr(values.type, "value_type"):
            values = values.flatten()
        values = values.cast(float32()) if types.is_float16(values.type) else values  # which has no largest
        largest.append(compute.max(values).as_py() if types.is_primitive(values.type) else None)
    return max((float(each) for each in largest if isinstance(each, int | float)), default=None)


def _encoded(cell: Any, where: str, folder: Path | None, factor: int) -> Encoded:
    """A cell of an image column: a file's content, a file's path, or pixel values."""
    if cell.is_valid and hasattr(cell.type, "storage_type"):  # one of datasets' own types of arrays
        cell = cell.value
    if cell.is_valid and hasattr(cell.type, "value_type"):
        values = _pixels(cell.values, where)
        return values if factor == 1 else (values * np.float64(factor)).round()
    value = cell.as_py()
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    if isinstance(content, bytes):
        return content
    with wrap_errors(f"{where}: a picture is named {str(path)[:200]!r}"):
        inside = None if folder is None or path is None else (folder / path).resolve()
    if folder is None or inside is None or not inside.is_relative_to(folder.resolve()):
        raise DataError(f"{where}: a picture is a path, {str(path)[:200]!r}, not a file in the same folder")
    return read_file(inside)


def _pixels(values: Any, where: str) -> np.ndarray:
    """The numbers in an Arrow array of nested lists, all of the same length."""
    from pyarrow import compute

    shape = [len(values)]
    with wrap_errors(f"{where}: a picture's rows are of different lengths"):
        while hasattr(values.type, "value_type"):
            [length] = compute.list_value_length(values).unique().to_pylist()
            shape.append(length)
            values = values.flatten()
        return values.to_numpy(zero_copy_only=False).reshape(shape)
