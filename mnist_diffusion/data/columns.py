"""Columns of tables: which holds the images, which the labels; and tables of text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from mnist_diffusion.data.decoding import DataError, wrap_errors

FILE_COLUMNS = (
    *("file_name", "filename", "file", "filepath", "image_path", "path"),
    *("image", "img", "image_id", "id", "name"),
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category", "digit", "y")
"""What such columns are usually called, the likeliest first."""
INDEX_COLUMN = re.compile(r"(__index_level_\d+__|Unnamed: \d+)?")
"""The columns in which pandas writes its index."""
BLOCK_BYTES = 2**26


def text_table(content: bytes, where: str, *, as_words: bool = False) -> Any:
    """A CSV, TSV or JSON-lines file as an Arrow table; a first line of numbers alone is no header.

    Args:
        content: of the file.
        where: the file.
        as_words: keep numbers as they are written, such as 0012.

    Raises:
        DataError: it is none.
    """
    import pyarrow
    from pyarrow import csv, json

    with wrap_errors(f"{where} could not be read as a table"):
        if where.lower().endswith(".jsonl"):
            return json.read_json(io.BytesIO(content), json.ReadOptions(block_size=BLOCK_BYTES))
        first = content.split(b"\n", 1)[0].decode("utf-8-sig")
        delimiter = max(",;\t", key=first.count)
        headless = all(_is_number(cell) for cell in first.split(delimiter))
        reading = csv.ReadOptions(block_size=BLOCK_BYTES, autogenerate_column_names=headless)
        parsing = csv.ParseOptions(delimiter=delimiter)
        table = csv.read_csv(io.BytesIO(content), reading, parsing)
        if as_words:
            kinds = csv.ConvertOptions(column_types=dict.fromkeys(table.column_names, pyarrow.string()))
            table = csv.read_csv(io.BytesIO(content), reading, parsing, kinds)
        return table


def _is_number(cell: str) -> bool:
    try:
        float(cell.strip().strip('"'))
    except ValueError:
        return False
    return True


def find_column(table: Any, usual: Sequence[str], asked: str | None, where: str, *, only: bool = False) -> str | None:
    """The column that is asked for, or one that is called as usual, or with `only` the only one; None if there is none.

    Raises:
        DataError: there is no column of the name asked for.
    """
    names = list(table.column_names)
    if len(set(names)) < len(names):
        raise DataError(f"{where} has several columns of one name: {names[:20]}")
    if asked is not None:
        if asked not in names:
            raise DataError(f"{where} has no column {asked!r}; it has {names[:20]}")
        return asked
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None)
    return names[0] if found is None and only and len(names) == 1 else found
