"""Recognise and read tables that list image files with their classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.columns import FILE_COLUMNS, LABEL_COLUMNS, find_column, text_table, usual
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.data.layout import kind_in, kind_of, listed


class UnknownLabelsError(DataError):
    """A table lists pictures, but it is not clear which of its columns holds their classes."""


class Pictures:
    """The pictures of a source, and what a table may call them.

    Args:
        names: all of them, with `/` between folders.
        classes: the class folder of each, if folders name classes.
    """

    def __init__(self, names: Sequence[str], classes: Mapping[str, str]):
        self.names, self.classes = set(names), classes
        self.called: dict[str, list[str]] = defaultdict(list)
        for name in names:
            for end in {name, PurePosixPath(name).name, PurePosixPath(name).stem}:
                self.called[end].append(name)

    def likely(self, column: Any, table: str) -> Iterator[str | None]:
        """The picture that each cell names, beside the table or by a name that only one picture has."""
        for cell in map(PurePosixPath, map(str, column)):
            ends = self.called.get(str(PurePosixPath(table).parent / cell)) or self.called.get(cell.name, [])
            yield ends[0] if len(ends) == 1 else None

    def named(self, cell: Any, table: str, split: str | None, where: str) -> str:
        """The picture that a cell names: beside the table, or anywhere in the source if only one is called so.

        Raises:
            DataError: no picture, or more than one, has that name.
        """
        path = PurePosixPath(str(cell).replace("\\", "/"))
        if (beside := str(PurePosixPath(table).parent / path)) in self.names:
            return beside
        end = f"/{'/'.join(path.parts[-2:])}"
        alike = [name for name in self.called.get(path.name, ()) if f"/{name}".endswith(end)]
        matches = self.called.get(str(path)) or alike
        if len(matches) > 1:
            matches = [name for name in matches if split in splits_above(name)]
        if len(matches) != 1:
            raise DataError(f"{where} names {str(cell)!r}, but {len(matches) or 'no'} pictures have that name")
        return matches[0]


def splits_above(name: str) -> set[str | None]:
    """The splits that the folders of a file stand for."""
    return set(map(kind_of, PurePosixPath(name).parts[:-1]))


@dataclass(frozen=True)
class LabelTable:
    """A table of pictures and their classes.

    Args:
        files: what names the picture in each row.
        labels: the class in each row.
        contradicts: whether the pictures all lie in folders of other classes.
    """

    files: list[Any]
    labels: list[str | None]
    contradicts: bool


def read_label_table(content: bytes, name: str, where: str, pictures: Pictures, config: ImagesConfig) -> LabelTable:
    """Read a table of pictures and their classes.

    Args:
        content: of the file.
        name: its name in the source.
        where: its place, for messages.
        pictures: those of the source.
        config: may name columns.

    Raises:
        UnknownLabelsError: it lists pictures, but which column holds their classes is not clear.
        DataError: it is another kind of table, or not a table.
    """
    table = text_table(content, where, as_words=True)
    names: list[str] = table.column_names
    columns = listed(map(repr, names))
    files = find_column("image_column", config.image_column, names, where, usual(names, FILE_COLUMNS))
    if files is None and len(table):  # called otherwise
        files = next((each for each in names if all(pictures.likely(table[each], name))), None)
    matches = [] if files is None else list(pictures.likely(table[files], name))
    if not any(matches):
        raise DataError(f"none of its columns {columns} names pictures; set data.image_column and data.label_column")
    rest = [each for each in names if each != files]
    label = config.label_column or find_column("label_column", None, rest, where, usual(rest, LABEL_COLUMNS), rest)
    if label not in rest:
        raise UnknownLabelsError(f"none of its columns {columns} is called a label; set data.label_column")
    labels = [_word(cell, label) for cell in table[label].to_pylist()]
    rows = [(picture, word) for picture, word in zip(matches, labels, strict=True) if picture is not None]
    if config.label_column is None:
        _require_labels(name, label, {picture for picture, _ in rows}, pictures)
    contradicts = all(pictures.classes.get(picture, word) != word for picture, word in rows)
    return LabelTable(table[files].to_pylist(), labels, contradicts)


def _word(cell: Any, column: str) -> str | None:
    """Return a cell as text, with `3.0` written as `3`; None if it is empty."""
    if isinstance(cell, dict | list):
        raise DataError(f"its column {column!r} holds no words or numbers")
    return None if cell is None else re.sub(r"^(\d+)\.0+$", r"\1", str(cell).strip()) or None


def _require_labels(name: str, label: str, listing: set[str], pictures: Pictures) -> None:
    """Check that a table's column can be meant as labels.

    Raises:
        DataError: it is something else.
    """
    if "submission" in name.lower():
        raise DataError("a submission holds no labels")
    tested = {each for each in pictures.names if "test" in splits_above(each)}
    if listing <= tested < pictures.names and "test" not in map(kind_in, PurePosixPath(name).parts):
        raise DataError("it only lists pictures in a test folder")
    if pictures.classes and label.lower() not in LABEL_COLUMNS:
        raise DataError(
            f"its column {label!r} is not called a label, and the folders name classes; set data.label_column to use it"
        )


def alike(tables: Mapping[str, LabelTable], pictures: Pictures) -> dict[str, str | None]:
    """The tables that give all pictures one label, where others or folders tell classes apart; each with its label."""
    single = {name: table.labels[0] for name, table in tables.items() if len(set(table.labels)) == 1}
    if len(single) == len(tables) and not pictures.classes and len(set(single.values())) > 1:  # a table for each class
        return {}
    return {name: label for name, label in single.items() if len(tables[name].labels) > 1}
