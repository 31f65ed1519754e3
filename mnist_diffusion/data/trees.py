"""Read pictures, and small tables and arrays, from a folder or an archive: a tree of files, read by their names."""

from __future__ import annotations

import os
import re
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
from mnist_diffusion.data.decoding import MAX_BYTES, DataError, EncodedImages, cause, read_file, wrap_errors
from mnist_diffusion.data.layout import JUNK, Layout, arrange, choose_splits, kind_of, listed
from mnist_diffusion.data.raw import RawSource, RawSplit, plain_label, require_plain
from mnist_diffusion.files import open_file

PICTURE_SUFFIX = re.compile(r"\.(avif|bmp|gif|jfif|jp2|jpe|jpeg|jpg|pbm|pgm|png|pnm|ppm|tga|tif|tiff|webp)")
TEXT_SUFFIXES, ARRAY_SUFFIXES = (".csv", ".tsv", ".jsonl"), (".npz", ".npy")
ARCHIVES = (".zip",)


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
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_fail):
        real = os.path.realpath(place)
        # A link to what is seen anyway, or to a folder above, which holds all of it.
        linked = Path(place).is_symlink() and place != str(folder)
        around = linked and os.path.commonpath([root, real]) in (root, real)
        if real in seen or around:
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


def _fail(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder could not be read: {cause(error)}") from error


def tree_of_archive(path: Path) -> Tree:
    """List a zip archive; nothing is unpacked onto the disk.

    Raises:
        DataError: it could not be read.
    """
    with wrap_errors(f"{path}: the archive could not be read"):
        names, read = _zip_reader(path)
    parts = {name: PurePosixPath(name).parts for name in names}
    junk = [part for each in parts.values() for part in each[:-1] if JUNK.fullmatch(part)]
    return _tree(str(path), [n for n, each in parts.items() if not any(map(JUNK.fullmatch, each))], read, junk, [])


def _zip_reader(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """The names of the files in a zip archive, and what reads one of them."""
    with open_file(path):  # a regular file
        archive, lock = zipfile.ZipFile(path), threading.Lock()

    def read(name: str) -> bytes:
        with lock, wrap_errors(f"{path}: {name} could not be read"), archive.open(name) as file:
            if len(content := file.read(MAX_BYTES + 1)) > MAX_BYTES:
                raise DataError(f"{path}: {name} is larger than the limit of {MAX_BYTES} bytes")
            return content

    return [info.filename for info in archive.infolist() if not info.is_dir()], read


def _tree(where: str, names: list[str], read: Callable[[str], bytes], junk: list[str], empty: list[str]) -> Tree:
    for part in {part for name in names for part in name.split("/")} | {*junk}:
        require_plain(part, where)
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


def _pictures(tree: Tree, names: Sequence[str]) -> EncodedImages:
    where = Path(tree.where)
    return EncodedImages(
        len(names), lambda indices: [tree.read(names[i]) for i in indices], lambda i: str(where / names[i])
    )


def _foldered_pictures(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource:
    """One folder per class, or one class for all."""
    if tree.empty:
        raise DataError(f"{tree.where}: folders that hold nothing: {listed(tree.empty)}; remove them")
    layout = arrange(names, config, tree.where)
    labelled = dict(layout.splits)
    if all(label is None for part in labelled.values() for _, label in part):
        layout.notes.append("no folders name classes: all images are in one class")
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


def _listed_pictures(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource | None:
    """Pictures listed with their labels in tables beside them; None if no table lists any."""
    tables: dict[str, tuple[Any, str, str | None]] = {}
    known = set(names)
    by_end: dict[str, list[str]] = defaultdict(list)
    for each in names:
        path = PurePosixPath(each)
        for end in {each, path.name, path.stem}:
            by_end[end].append(each)
    for name in tree.having(TEXT_SUFFIXES):
        where = f"{tree.where}/{name}"
        try:
            table = text_table(tree.read(name), where, as_words=True)
            files = find_column(table, FILE_COLUMNS, config.image_column, where)
        except DataError:  # no table, or without this column; the pictures may have class folders
            continue
        if files is None:
            continue
        beside, rows = PurePosixPath(name).parent, [PurePosixPath(str(file)) for file in table[files].to_pylist()]
        if not any(str(beside / file) in known or len(by_end.get(file.name, ())) == 1 for file in rows):
            continue
        rest = table.drop_columns([files])
        asked = config.label_column if config.label_column in rest.column_names else None
        label = find_column(rest, LABEL_COLUMNS, asked, where, only=True)
        tables[name] = (table, files, label if config.label_column in (None, label) else None)
    if not any(label for _, _, label in tables.values()):
        return None
    layout = arrange([name for name, (_, _, label) in tables.items() if label], config, tree.where, tables=True)
    if unlabelled := [name for name, (_, _, label) in tables.items() if not label]:
        layout.notes.append(f"tables without labels left out: {listed(unlabelled)}")
    splits, used_pictures = {}, set()
    for split, part in layout.splits.items():
        chosen, labels = [], []
        for name, _ in part:
            table, files, label = tables[name]
            for row, (file, cell) in enumerate(zip(table[files].to_pylist(), table[label].to_pylist(), strict=True)):
                where = f"{tree.where}/{name} row {row}"
                chosen.append(_picture_named(file, by_end, PurePosixPath(name), kind_of(split), where))
                word = None if cell is None else re.sub(r"^(\d+)\.0+$", r"\1", str(cell).strip())
                labels.append(plain_label(word, f"{where}: data.label_column={label!r}"))
        if twice := [name for name, times in Counter(chosen).items() if times > 1]:
            raise DataError(f"{tree.where}: {listed(n for n, _ in part)} list pictures more than once: {listed(twice)}")
        used_pictures |= set(chosen)
        splits[split] = RawSplit(_pictures(tree, chosen), labels)
    used = ", ".join(name for part in layout.splits.values() for name, _ in part)
    layout.notes.append(f"labels from {used}")
    if unlisted := len(known - used_pictures):
        layout.notes.append(f"{unlisted} pictures that no table lists left out")
    return _source(tree, "pictures listed in tables", splits, config, layout)


def _picture_named(file: Any, by_end: dict[str, list[str]], table: PurePosixPath, split: str | None, where: str) -> str:
    """The picture that a row of a table names: beside the table, or anywhere in the source if only one is called so."""
    asked = PurePosixPath(str(file).replace("\\", "/"))
    beside = str(table.parent / asked)
    if beside in by_end.get(beside, ()):
        return beside
    end = "/".join(asked.parts[-2:])
    alike = [name for name in by_end.get(asked.name, []) if len(asked.parts) == 1 or f"/{name}".endswith(f"/{end}")]
    found = by_end.get(str(asked)) or alike
    if len(found) > 1:
        found = [name for name in found if any(kind_of(part) == split for part in PurePosixPath(name).parts[:-1])]
    if len(found) != 1:
        raise DataError(f"{where} names {str(file)!r}, but {len(found) or 'no'} pictures have that name")
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
        usable = [each for each in found if each is not None]
        if left_out := [name for (name, _), each in zip(part, found, strict=True) if each is None]:
            layout.notes.append(f"no tables of labels and pixels, left out: {listed(left_out)}")
        if len(usable) > 1:
            raise DataError(f"{tree.where}: {listed(n for n, _ in part)} could all be the split {split!r}; keep one")
        if usable:
            splits[split] = usable[0]
    return _source(tree, "table of pixels", splits, config, layout) if splits else None


def _pixel_table(tree: Tree, name: str, config: ImagesConfig) -> RawSplit | None:
    where = f"{tree.where}/{name}"
    table = text_table(tree.read(name), where)
    if config.label_column is not None and config.label_column not in table.column_names:
        return None
    return pixel_split(table, config, where)
