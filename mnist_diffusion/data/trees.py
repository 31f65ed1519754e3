"""Read pictures, and small tables and arrays, from a folder or an archive: a tree of files, read by their names."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.arrays import array_splits, pixel_split
from mnist_diffusion.data.columns import text_table
from mnist_diffusion.data.decoding import MAX_BYTES, DataError, cause, encoded_files, read_file, wrap_errors
from mnist_diffusion.data.label_tables import Pictures, UnknownLabelsError, alike, read_label_table
from mnist_diffusion.data.layout import JUNK, Layout, arrange, kind_of, listed
from mnist_diffusion.data.raw import RawSource, RawSplit, require_plain, source_of
from mnist_diffusion.files import open_file

PICTURE_SUFFIX = re.compile(r"\.(avif|bmp|gif|jfif|jp2|jpe|jpeg|jpg|pbm|pgm|png|pnm|ppm|tga|tif|tiff|webp)")
TEXT_SUFFIXES, ARRAY_SUFFIXES = (".csv", ".tsv", ".jsonl"), (".npz", ".npy")
FILE_SUFFIXES = (*TEXT_SUFFIXES, *ARRAY_SUFFIXES, ".zip")


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
        below = Path(place).relative_to(folder)
        names += [(below / name).as_posix() for name in files if not JUNK.fullmatch(name)]
        if not folders and not files:
            empty.append(str(below))
    return _tree(str(folder), names, lambda name: read_file(folder / name), junk, empty)


def _fail(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder could not be read: {cause(error)}") from error


def tree_of_file(path: Path) -> Tree:
    """A file by itself, or what is in a zip archive, of which nothing is unpacked onto the disk.

    Raises:
        DataError: the archive could not be read.
    """
    if path.suffix.lower() != ".zip":
        return Tree(str(path.parent), [path.name], lambda name: read_file(path), [], [])
    with wrap_errors(f"{path}: the archive could not be read"), open_file(path):  # a regular file
        archive = zipfile.ZipFile(path)
    files = [name for name in archive.namelist() if not name.endswith("/")]  # a name may be empty
    parts = {name: PurePosixPath(name).parts for name in files}

    def read(name: str) -> bytes:
        with wrap_errors(f"{path}: {name} could not be read"), archive.open(name) as file:
            if len(content := file.read(MAX_BYTES + 1)) > MAX_BYTES:
                raise DataError(f"{path}: {name} is larger than the limit of {MAX_BYTES} bytes")
            return content

    junk = [part for each in parts.values() for part in each[:-1] if JUNK.fullmatch(part)]
    return _tree(str(path), [n for n, each in parts.items() if not any(map(JUNK.fullmatch, each))], read, junk, [])


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
            return replace(source, notes=(*tree.notes, *source.notes))
    return None


def _foldered_pictures(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource:
    """One folder per class, or one class for all."""
    if tree.empty:
        raise DataError(f"{tree.where}: empty folders: {listed(tree.empty)}; remove them")
    layout = arrange(names, config, tree.where)
    if not layout.classes:
        layout.notes.append("no folders name classes: all images are in one class")
    if others := {*tree.names} - {*names}:
        kinds = sorted({PurePosixPath(name).suffix or name for name in others})
        layout.notes.append(f"{len(others)} files that are no pictures left out: {listed(kinds)}")
    splits = {
        split: RawSplit(encoded_files(part, tree.read, tree.where), [layout.classes.get(n, "image") for n in part])
        for split, part in layout.splits.items()
    }
    return source_of(f"{config.source} (image folder)", splits, config, layout)


def _listed_pictures(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource | None:
    """Pictures listed with their classes in tables beside them; None if no table does."""
    pictures = Pictures(names, _class_folders(tree, names, config))
    tables, unclear = {}, []
    for name in tree.having(TEXT_SUFFIXES):
        try:
            tables[name] = read_label_table(tree.read(name), name, f"{tree.where}/{name}", pictures, config)
        except DataError as error:
            tree.notes.append(f"{name} left out: {error}")
            unclear += tree.notes[-1:] if isinstance(error, UnknownLabelsError) and not pictures.classes else []
    for name, label in (alike(tables, pictures) if config.label_column is None else {}).items():
        tree.notes.append(f"{name} left out: its labels are all alike: {label!r}")
        del tables[name]
    if not tables and unclear:
        raise DataError(f"{tree.where}: {unclear[0]}")
    if not tables:
        return None
    layout = arrange(list(tables), config, tree.where, tables=True)
    layout.notes += [f"{name} contradicts the folder of every picture" for name in tables if tables[name].contradicts]
    splits, used = {}, set()
    for split, part in layout.splits.items():
        picture_names, labels = [], []
        for name in part:
            for row, cell in enumerate(tables[name].files):
                picture_names.append(pictures.named(cell, name, kind_of(split), f"{tree.where}/{name} row {row}"))
            labels += tables[name].labels
        if twice := [name for name, times in Counter(picture_names).items() if times > 1]:
            raise DataError(f"{tree.where}: {listed(part)} list pictures more than once: {listed(twice)}")
        splits[split] = RawSplit(encoded_files(picture_names, tree.read, tree.where), labels)
        used |= set(picture_names)
    layout.notes.append(f"labels from {', '.join(name for part in layout.splits.values() for name in part)}")
    if unlisted := len(pictures.names - used):
        layout.notes.append(f"{unlisted} pictures that no table lists left out")
    return source_of(f"{config.source} (pictures listed in tables)", splits, config, layout)


def _class_folders(tree: Tree, names: list[str], config: ImagesConfig) -> dict[str, str]:
    """The class folder of each picture; empty if folders do not name classes."""
    with contextlib.suppress(DataError):  # which is raised again when the folders are used
        classes = arrange(names, config, tree.where).classes
        return classes if len(set(classes.values())) > 1 else {}
    return {}


def _arrays(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource:
    """NumPy files, sorted into splits, images and labels by their names and keys."""
    splits = array_splits({name: tree.read(name) for name in names}, tree.where)
    return source_of(f"{config.source} (arrays)", splits, config, Layout())


def _pixel_tables(tree: Tree, names: list[str], config: ImagesConfig) -> RawSource | None:
    """Tables of a label and pixels per row."""
    layout, splits = arrange(names, config, tree.where, tables=True), {}
    for split, part in layout.splits.items():
        usable = {}
        for name in part:
            where = f"{tree.where}/{name}"
            table = text_table(tree.read(name), where)
            labelled = config.label_column in (None, *table.column_names)
            if labelled and (pixels := pixel_split(table, config, where)) is not None:
                usable[name] = pixels
        if left_out := [name for name in part if name not in usable]:
            layout.notes.append(f"no tables of labels and pixels, left out: {listed(left_out)}")
        if len(usable) > 1:
            raise DataError(f"{tree.where}: {listed(usable)} could all be the split {split!r}; keep one")
        if usable:
            splits[split] = next(iter(usable.values()))
    return source_of(f"{config.source} (table of pixels)", splits, config, layout) if splits else None
