"""Tables beside pictures: which of them say what the pictures show, and which are something else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.columns import FILE_COLUMNS, LABEL_COLUMNS, find_column, text_table
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.data.layout import kind_of, listed, split_kind

NUM_TRIED = 20
"""Cells that are looked at to find a column of file names."""


class UnknownLabelsError(DataError):
    """A table lists pictures, but it is not clear which of its columns holds their classes."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a source.

    Args:
        names: all of them, with `/` between folders.
        by_end: those that a path, a file name, or a file name without suffix may stand for.
        classes: the class folder of each, if folders name classes.
    """

    names: set[str]
    by_end: Mapping[str, Sequence[str]]
    classes: Mapping[str, str]

    @classmethod
    def of(cls, names: Sequence[str], classes: Mapping[str, str]) -> Pictures:
        """Index pictures by what a table may call them."""
        by_end: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = PurePosixPath(name)
            for end in {name, path.name, path.stem}:
                by_end[end].append(name)
        return cls(set(names), by_end, classes)

    def found(self, column: Any, table: str) -> list[str | None]:
        """The picture that each cell names, beside the table or by a name that only one picture has."""
        beside = PurePosixPath(table).parent
        cells = [PurePosixPath(str(cell)) for cell in column.to_pylist()]
        ends = [self.by_end.get(str(beside / cell)) or self.by_end.get(cell.name, ()) for cell in cells]
        return [end[0] if len(end) == 1 else None for end in ends]

    def named(self, file: Any, table: PurePosixPath, split: str | None, where: str) -> str:
        """The picture that a cell names: beside the table, or anywhere in the source if only one is called so.

        Raises:
            DataError: none or several are.
        """
        asked = PurePosixPath(str(file).replace("\\", "/"))
        beside = str(table.parent / asked)
        if beside in self.names:
            return beside
        end = "/".join(asked.parts[-2:])
        alike = [
            name for name in self.by_end.get(asked.name, ()) if len(asked.parts) == 1 or f"/{name}".endswith(f"/{end}")
        ]
        found = list(self.by_end.get(str(asked), ())) or alike
        if len(found) > 1:
            found = [name for name in found if any(kind_of(part) == split for part in PurePosixPath(name).parts[:-1])]
        if len(found) != 1:
            raise DataError(f"{where} names {str(file)!r}, but {len(found) or 'no'} pictures have that name")
        return found[0]


@dataclass(frozen=True)
class LabelTable:
    """A table of pictures and their classes.

    Args:
        files: what names the picture in each row.
        labels: the class in each row.
        label_column: the name of that column.
        contradicts: whether the pictures all lie in folders of other classes.
    """

    files: list[Any]
    labels: list[str | None]
    label_column: str
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
        DataError: it is another table, or none.
    """
    table = text_table(content, where, as_words=True)
    files = find_column(table, FILE_COLUMNS, config.image_column, where)
    if files is None and len(table):  # called otherwise
        named = (each for each in table.column_names if all(pictures.found(table[each].slice(0, NUM_TRIED), name)))
        files = next((each for each in named if all(pictures.found(table[each], name))), None)
    found = [] if files is None else pictures.found(table[files], name)
    columns = listed(map(repr, table.column_names))
    if not any(found):
        raise DataError(f"none of its columns {columns} names pictures; set data.image_column and data.label_column")
    rest = table.drop_columns([files])
    asked = config.label_column if config.label_column in rest.column_names else None
    label = find_column(rest, LABEL_COLUMNS, asked, where, only=True)
    if label is None or config.label_column not in (None, label):
        raise UnknownLabelsError(f"none of its columns {columns} is called a label; set data.label_column")
    cells = table[label].to_pylist()
    if any(isinstance(cell, dict | list) for cell in cells):
        raise DataError(f"its column {label!r} holds no words or numbers")
    labels = [plain_word(cell) for cell in cells]
    rows = [(picture, word) for picture, word in zip(found, labels, strict=True) if picture is not None]
    if asked is None and (reason := _why_no_labels(name, label, {each for each, _ in rows}, pictures)):
        raise DataError(reason)
    contradicts = all(pictures.classes.get(picture, word) != word for picture, word in rows)
    return LabelTable(table[files].to_pylist(), labels, label, contradicts)


def plain_word(cell: Any) -> str | None:
    """A cell as a word; a whole number without decimals."""
    return None if cell is None else re.sub(r"^(\d+)\.0+$", r"\1", str(cell).strip())


def alike(tables: Mapping[str, LabelTable], pictures: Pictures) -> dict[str, str]:
    """The tables that give all pictures one label, where others or folders tell classes apart; each with its label."""
    single = {name: str(table.labels[0]) for name, table in tables.items() if len(set(table.labels)) == 1}
    if len(single) == len(tables) and not pictures.classes and len(set(single.values())) > 1:  # a table for each class
        return {}
    return {name: label for name, label in single.items() if len(tables[name].labels) > 1}


def _why_no_labels(name: str, label: str, listing: set[str], pictures: Pictures) -> str | None:
    tested = {
        each for each in pictures.names if any(kind_of(part) == "test" for part in PurePosixPath(each).parts[:-1])
    }
    of_test = any(split_kind(part) == "test" for part in PurePosixPath(name).with_suffix("").parts)
    reasons = (
        ("submission" in name.lower(), "a submission holds no labels"),
        (listing <= tested < pictures.names and not of_test, "it lists pictures of a test folder alone"),
        (
            pictures.classes and label.lower() not in LABEL_COLUMNS,
            f"its column {label!r} is not called a label, and the folders name classes",
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)
