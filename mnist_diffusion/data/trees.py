"""Read pictures, and small tables and arrays, from a folder or an archive: a tree of files, read by their names."""

from __future__ import annotations

import os
import re
import tarfile
import threading
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.arrays import array_splits, pixel_split
from mnist_diffusion.data.columns import FILE_COLUMNS, LABEL_COLUMNS, find_column, text_table
from mnist_diffusion.data.layout import JUNK, Layout, arrange, choose_splits, kind_of, listed
from mnist_diffusion.data.pictures import MAX_BYTES, DataError, Pictures, explained, read_file
from mnist_diffusion.data.raw import RawSource, RawSplit, plain_label, require_plain

PICTURE_SUFFIX = re.compile(r"\.(avif|bmp|gif|jfif|jp2|jpe|jpeg|jpg|pbm|pgm|png|pnm|ppm|tga|tif|tiff|webp)")
TEXT_SUFFIXES, ARRAY_SUFFIXES = (".csv", ".tsv", ".jsonl"), (".npz", ".npy")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_ARCHIVE_BYTES = 2 * 10**9
"""Of the pictures in a tar archive, which are kept in memory."""


@dataclass(frozen=True)
class Tree:
    """The files below a folder or in an archive.

    Args:
        where: the folder or the archive.
        names: of the files, sorted, with `/` between folders.
        read: the content of a file, by its name.
        notes: what was left out.
        empty: folders without any file.
    """

    where: str
    names: list[str]
    read: Callable[[str], bytes]
    notes: list[str]
    empty: list[str]

    def having(self, suffixes: Sequence[str]) -> list[str]:
        """The files with one of these suffixes."""
        return [name for name in self.names if PurePosixPath(name).suffix.lower() in suffixes]


def is_archive(path: Path) -> bool:
    """Whether a file is an archive that can be read, by its name."""
    return path.name.lower().endswith(ARCHIVES)


def tree_of_folder(folder: Path) -> Tree:
    """List a folder, links to folders included, each once.

    Raises:
        DataError: a name is not UTF-8 or has control characters.
    """
    names, junk, empty, seen = [], [], [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        junk += [name for name in folders if JUNK.fullmatch(name)]
        folders[:] = sorted(name for name in folders if not JUNK.fullmatch(name))
        below = os.path.relpath(place, folder).replace(os.sep, "/")
        names += [name if below == "." else f"{below}/{name}" for name in files if not JUNK.fullmatch(name)]
        if not folders and not files:
            empty.append(below)
    return _tree(str(folder), names, lambda name: read_file(folder / name), junk, empty)


def tree_of_archive(path: Path) -> Tree:
    """List a zip or tar archive; nothing is unpacked onto the disk.

    Raises:
        DataError: it could not be read, or the files of a tar archive take too much memory.
    """
    with explained(f"{path}: the archive could not be read"):
        if path.name.lower().endswith(".zip"):
            names, read = _zip_reader(path)
        else:
            contents = _tar_contents(path)
            names, read = list(contents), contents.__getitem__
    parts = {name: PurePosixPath(name).parts for name in names}
    junk = [part for each in parts.values() for part in each[:-1] if JUNK.fullmatch(part)]
    return _tree(str(path), [n for n, each in parts.items() if not any(map(JUNK.fullmatch, each))], read, junk, [])


def _zip_reader(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """The names of the files in a zip archive, and what reads one of them."""
    archive, lock = zipfile.ZipFile(path), threading.Lock()

    def read(name: str) -> bytes:
        with lock, explained(f"{path}: {name} could not be read"), archive.open(name) as file:
            if len(content := file.read(MAX_BYTES + 1)) > MAX_BYTES:
                raise DataError(f"{path}: {name} is larger than the limit of {MAX_BYTES} bytes")
            return content

    return [info.filename for info in archive.infolist() if not info.is_dir()], read


def _tar_contents(path: Path) -> dict[str, bytes]:
    """The files in a tar archive, which can only be read from its start."""
    contents, left = {}, MAX_ARCHIVE_BYTES
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)) is not None:
                if (left := left - member.size) < 0:
                    raise DataError(f"{path} holds over {MAX_ARCHIVE_BYTES} bytes; unpack it into a folder")
                contents[member.name.removeprefix("./")] = file.read()
    return contents


def _tree(where: str, names: list[str], read: Callable[[str], bytes], junk: list[str], empty: list[str]) -> Tree:
    for name in names:
        require_plain(name.rpartition("/")[2], where)
        require_plain(name.rpartition("/")[0].rpartition("/")[2], where)
    notes = [f"folders left out: {listed(dict.fromkeys(junk))}"] if junk else []
    return Tree(where, sorted(names), read, notes, empty)


def read_tree(tree: Tree, config: ImagesConfig) -> RawSource | None:
    """Read what a tree holds: pictures whose classes tables or folders name, else arrays, else tables of pixels."""
    pictures = [name for name in tree.names if PICTURE_SUFFIX.fullmatch(PurePosixPath(name).suffix.lower())]
    for names, read in (
        (pictures, _listed_pictures),
        (pictures, _foldered_pictures),
        (tree.having(ARRAY_SUFFIXES), _arrays),
        (tree.having(TEXT_SUFFIXES), _pixel_tables),
    ):
        if names and (source := read(tree, names, config)) is not None:
            return source
    return None


def _source(tree: Tree, kind: str, splits: dict[str, RawSplit], config: ImagesConfig, layout: Layout) -> RawSource:
    train, test, notes = choose_splits(list(splits), config, tree.where)
    return RawSource(
        str(config.source),
        f"{tree.where} ({kind})",
        splits[train],
        None if test is None else splits[test],
        notes=(*tree.notes, *layout.notes, *notes),
        has_subsets=layout.has_subsets,
    )


def _pictures(tree: Tree, names: Sequence[str]) -> Pictures:
    where = Path(tree.where)
    return Pictures(len(names), lambda indices: [tree.read(names[i]) for i in indices], lambda i: str(where / names[i]))


def _foldered_pictures(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource:
    """One folder per class, or the class found in the path by a pattern, or one class for all."""
    if tree.empty:
        raise DataError(f"{tree.where}: folders that hold nothing: {listed(tree.empty)}; remove them")
    layout = arrange(names, config, tree.where)
    labelled = dict(layout.splits)
    if config.label_pattern is not None:
        pattern = re.compile(config.label_pattern)
        labelled = {split: [(n, _found(pattern, n, tree.where)) for n, _ in part] for split, part in labelled.items()}
    elif all(label is None for part in labelled.values() for _, label in part):
        layout.notes.append(
            "no folders name classes, so that there is one; data.label_pattern finds classes in the names of files"
        )
        labelled = {split: [(name, "image") for name, _ in part] for split, part in labelled.items()}
    others = Counter(PurePosixPath(name).suffix or name for name in tree.names)
    for name in names:
        others[PurePosixPath(name).suffix or name] -= 1
    if left_out := sum(others.values()):
        layout.notes.append(f"{left_out} files that are no pictures left out: {listed(sorted(+others))}")
    splits = {
        split: RawSplit(_pictures(tree, [n for n, _ in part]), [label for _, label in part])
        for split, part in labelled.items()
    }
    return _source(tree, "image folder", splits, config, layout)


def _found(pattern: re.Pattern[str], name: str, where: str) -> str:
    if (match := pattern.search(name)) is None or not match[1]:
        raise DataError(f"data.label_pattern={pattern.pattern!r} finds no class in {where}/{name}")
    return match[1]


def _listed_pictures(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource | None:
    """Pictures that tables beside them list with their labels; None if no table does."""
    tables: dict[str, tuple[Any, str, str | None]] = {}
    for name in tree.having(TEXT_SUFFIXES):
        where = f"{tree.where}/{name}"
        table = text_table(tree.read(name), where, as_words=True)
        if (files := find_column(table, FILE_COLUMNS, config.image_column, where)) is None:
            continue
        rest = table.drop_columns([files])
        label = find_column(rest, LABEL_COLUMNS, config.label_column, where, only=True)
        tables[name] = (table, files, label)
    if not any(label for _, _, label in tables.values()):
        return None
    layout = arrange([name for name, (_, _, label) in tables.items() if label], config, tree.where, tables=True)
    if unlabelled := [name for name, (_, _, label) in tables.items() if not label]:
        layout.notes.append(f"tables without labels left out: {listed(unlabelled)}")
    by_end: dict[str, list[str]] = defaultdict(list)
    for each in names:
        path = PurePosixPath(each)
        for end in {each, path.name, path.stem}:
            by_end[end].append(each)
    splits = {}
    for split, part in layout.splits.items():
        chosen, labels = [], []
        for name, _ in part:
            table, files, label = tables[name]
            for row, (file, cell) in enumerate(zip(table[files].to_pylist(), table[label].to_pylist(), strict=True)):
                where = f"{tree.where}/{name} row {row}"
                chosen.append(_picture_named(file, by_end, PurePosixPath(name), kind_of(split), where))
                labels.append(plain_label(cell, f"{where}: data.label_column={label!r}"))
        splits[split] = RawSplit(_pictures(tree, chosen), labels)
    used = ", ".join(name for part in layout.splits.values() for name, _ in part)
    layout.notes.append(f"labels from {used}")
    return _source(tree, "pictures listed in tables", splits, config, layout)


def _picture_named(file: Any, by_end: dict[str, list[str]], table: PurePosixPath, split: str | None, where: str) -> str:
    """The picture that a row of a table names: beside the table, or anywhere in the source if only one is called so."""
    asked = PurePosixPath(str(file).replace("\\", "/"))
    beside = str(table.parent / asked)
    if beside in by_end.get(beside, ()):
        return beside
    found = by_end.get(str(asked)) or by_end.get(asked.name, [])
    if len(found) > 1:
        found = [name for name in found if kind_of(PurePosixPath(name).parts[0]) == split]
    if len(found) != 1:
        raise DataError(f"{where} names {str(file)!r}, and {len(found) or 'none'} of the pictures are called so")
    return found[0]


def _arrays(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource:
    """NumPy's files, whose names and keys say what is what."""
    splits = array_splits({name: tree.read(name) for name in names}, tree.where)
    return _source(tree, "arrays", splits, config, Layout({}))


def _pixel_tables(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource | None:
    """Tables of a label and pixels per row."""
    layout, splits = arrange(names, config, tree.where, tables=True), {}
    for split, part in layout.splits.items():
        found = [_pixel_table(tree, name, config) for name, _ in part]
        if any(each is None for each in found):
            layout.notes.append(f"no table of labels and pixels, left out: {listed(name for name, _ in part)}")
        elif len(found) > 1:
            raise DataError(f"{tree.where}: {listed(n for n, _ in part)} could all be the split {split!r}; keep one")
        elif found[0] is not None:
            splits[split] = found[0]
    return _source(tree, "table of pixels", splits, config, layout) if splits else None


def _pixel_table(tree: Tree, name: str, config: ImagesConfig) -> RawSplit | None:
    where = f"{tree.where}/{name}"
    return pixel_split(text_table(tree.read(name), where), config, where)
