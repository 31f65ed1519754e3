"""Find the image and label columns of a table; read CSV, TSV and JSON-lines files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from mnist_diffusion.data.decoding import DataError, wrap_errors
from mnist_diffusion.data.layout import listed

FILE_COLUMNS = (
    *("file_name", "filename", "file", "filepath", "image_path", "path"),
    *("image", "img", "image_id", "id", "name"),
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category", "digit", "y")
"""Usual names of such columns, the likeliest first."""
INDEX_COLUMN = re.compile(r"(__index_level_\d+__|Unnamed: \d+)?")
"""The columns in which pandas writes its index."""
NUMBERS = re.compile(r'[ "]*[-+.\d][-+.,;"\deE\s]*')
BLOCK_BYTES = 2**26


def text_table(content: bytes, where: str, *, as_words: bool = False) -> Any:
    """A CSV, TSV or JSON-lines file as an Arrow table; a first line of numbers alone is no header.

    Args:
        content: of the file.
        where: the file.
        as_words: keep numbers as they are written, such as 0012.

    Raises:
        DataError: the file is not a table.
    """
    import pyarrow
    from pyarrow import csv, json

    with wrap_errors(f"{where} could not be read as a table"):
        if where.lower().endswith(".jsonl"):
            return json.read_json(io.BytesIO(content), json.ReadOptions(block_size=BLOCK_BYTES))
        first = content.split(b"\n", 1)[0].decode("utf-8-sig")
        parsing = csv.ParseOptions(delimiter=max(",;\t", key=first.count))
        headless = NUMBERS.fullmatch(first) is not None
        reading = csv.ReadOptions(block_size=BLOCK_BYTES, autogenerate_column_names=headless)
        table = csv.read_csv(io.BytesIO(content), reading, parsing)
        if as_words:
            kinds = csv.ConvertOptions(column_types=dict.fromkeys(table.column_names, pyarrow.string()))
            table = csv.read_csv(io.BytesIO(content), reading, parsing, kinds)
        return table


def find_column(
    option: str, requested: str | None, names: Sequence[str], where: str, *candidates: Sequence[str]
) -> str | None:
    """The requested column, or else the first that is alone in its list of `candidates`; None if there is none.

    Raises:
        DataError: there is no column of the requested name, or two have the same name.
    """
    if len(set(names)) < len(names):
        raise DataError(f"{where} has several columns of the same name; rename them: {listed(names)}")
    if requested is not None and requested not in names:
        raise DataError(f"data.{option}={requested!r} is not a column of {where}, which has {listed(sorted(names))}")
    return requested or next((each[0] for each in candidates if len(each) == 1), None)


def usual(names: Sequence[str], expected: Sequence[str]) -> list[str]:
    """The first expected name that is a column, ignoring upper and lower case."""
    lower = {name.lower(): name for name in reversed(names)}
    return [lower[name] for name in expected if name in lower][:1]
