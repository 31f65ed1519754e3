"""Tell splits, configurations and classes apart by the names of folders and files: one rule for pictures and tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import torch

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.decoding import DataError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "t10k", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""What a split may be called, in any case; the Hub's `datasets` know the same words."""
JUNK = re.compile(r"\..*|@eaDir|__MACOSX|__pycache__|lost\+found|\$RECYCLE\.BIN|Thumbs\.db", re.IGNORECASE)
"""System and hidden files to ignore."""
SHOWN = 8


def kind_of(name: str) -> str | None:
    """The split that `name` is a word for, `train`, `test` or `validation`; None if it is none."""
    return next((kind for kind, words in SPLIT_WORDS.items() if name.lower() in words), None)


def kind_in(name: str) -> str | None:
    """The split that a word within `name` stands for, as in `mnist_train.csv`, `x_test` or `train-00000-of-00001`."""
    kinds = dict.fromkeys(kind for word in re.split(r"[^a-zA-Z0-9]+", name) if (kind := kind_of(word)))
    return next(iter(kinds), None)


def split_kind(name: str) -> str | None:
    """The split that a folder's name is or holds a word for, as `seg_train` and `training_set` do."""
    return kind_of(name) or kind_in(name)


def listed(names: Iterable[object]) -> str:
    """A few names, and how many more there are."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, evenly spread, the first and the last among them."""
    return sorted({round(float(place)) for place in torch.linspace(0, count - 1, min(count, limit))})


@dataclass
class Layout:
    """What the files of a source are.

    Args:
        splits: for each split, by the name it has there, its files and the class of each; None where no folder names
            one.
        notes: how files were interpreted and which were skipped.
        has_subsets: whether `data.subset` chose something.
    """

    splits: dict[str, list[tuple[str, str | None]]]
    notes: list[str] = field(default_factory=list)
    has_subsets: bool = False


def choose_splits(found: Sequence[str], config: ImagesConfig, where: str) -> tuple[str, str | None, list[str]]:
    """The names of the split to train on and of the one to hold out, if there is one, and what to say of them.

    A name that the configuration gives may be written otherwise: `test` finds `Testing`.

    Raises:
        DataError: a split that is named is not there.
    """

    def look_for(option: str, name: str) -> str:
        kind = kind_of(name)
        alike = [each for each in found if each == name] or [each for each in found if split_kind(each) == kind]
        if len(alike) != 1 or (alike[0] != name and kind_of(name) is None):
            raise DataError(f"data.{option}={name!r} is not a split of {where}, which has {listed(sorted(found))}")
        return alike[0]

    train = look_for("train_split", config.train_split)
    others = [name for name in found if name != train]
    if config.test_split is not None:
        test: str | None = look_for("test_split", config.test_split)
    else:
        by_kind = {split_kind(name): name for name in reversed(others)}
        test = by_kind.get("test", by_kind.get("validation"))
    unused = [name for name in others if name != test]
    notes = [f"split {listed(map(repr, unused))} left out"] if unused else []
    if {train, test} - {"train", "test", None}:
        held_out = "a part of it" if test is None else repr(test)
        notes.insert(0, f"trained on the split {train!r}, held out: {held_out}")
    return train, test, notes


def choose_subset(found: Sequence[str], config: ImagesConfig, where: str) -> str:
    """The configuration that `data.subset` names, of several.

    Raises:
        DataError: it names none of them.
    """
    if config.subset is None or config.subset not in found:
        asked = "" if config.subset is None else f", got {config.subset!r}"
        raise DataError(f"{where} has several parts; set data.subset to one of {listed(found)}{asked}")
    return config.subset


@dataclass(frozen=True)
class _File:
    name: str
    folders: tuple[str, ...]


def arrange(names: Sequence[str], config: ImagesConfig, where: str, *, tables: bool = False) -> Layout:
    """Sort files into splits and classes by the folders that they lie in.

    A folder alone in its folder is passed through. Folders that all have the name of a split, of which one is to train
    on, are the splits; those above such folders are classes, or configurations if there are folders below or the files
    are tables, whose own names count as folders if a word in them stands for a split. Other folders are the classes.

    Args:
        names: of the files, relative to the source, with `/` between folders.
        config: names splits and configuration.
        where: the source, for messages.
        tables: whether they are tables, which have no class.

    Raises:
        DataError: there are several configurations, and `data.subset` names none of them.
    """
    files = []
    for name in names:
        path = PurePosixPath(name)
        own = kind_in(path.stem) if tables else None
        folders = path.parts[:-1]
        inside = own is not None and not any(kind_of(each) for each in folders)
        files.append(_File(name, (*folders, own) if inside and own else folders))
    notes: list[str] = []
    found, chosen = _splits(files, config, where, tables, notes)
    if tables:
        return Layout({split: [(file.name, None) for file in part] for split, part in found.items()}, notes, chosen)
    classes = {split: _classes(part) for split, part in found.items()}
    named = [split for split, part in classes.items() if any(label is not None for _, label in part)]
    for split, part in list(classes.items()):
        kept = [file for file in part if file[1] is not None]
        if named and len(kept) < len(part):
            of_split = f" of the split {split!r}" if len(classes) > 1 else ""
            notes.append(f"{len(part) - len(kept)} pictures{of_split} left out, which lie in no class folder")
            classes[split] = kept
    return Layout({split: part for split, part in classes.items() if part}, notes, chosen)


def _splits(
    files: list[_File], config: ImagesConfig, where: str, tables: bool, notes: list[str]
) -> tuple[dict[str, list[_File]], bool]:
    """The files of each split, without the folders above it, and whether `data.subset` chose among them."""
    chosen = False
    while True:
        deep = [file for file in files if file.folders]
        heads = list(dict.fromkeys(file.folders[0] for file in deep))
        if not deep:
            return {config.train_split: files}, chosen
        kinds = {head: kind_of(head) for head in heads}
        if None in kinds.values() and "train" in kinds.values() and len(set(kinds.values())) > 2:
            strange = [head for head, kind in kinds.items() if kind is None]
            notes.append(f"folders beside the splits left out: {listed(strange)}")
            files = [file for file in files if not file.folders or kinds[file.folders[0]] is not None]
            continue
        below = [_strip_top_folder(file) for file in deep]
        if _are_splits(heads, config):
            found: dict[str, list[_File]] = {}
            for file in deep:
                found.setdefault(file.folders[0], []).append(_strip_top_folder(file))
            _note_unassigned_files(files, deep, tables, notes)
            return found, chosen
        if not chosen and config.subset in heads:
            files, chosen = [_strip_top_folder(file) for file in deep if file.folders[0] == config.subset], True
            continue
        seconds = list(dict.fromkeys(file.folders[0] for file in below if file.folders))
        nested = all(file.folders for file in below) and _are_splits(seconds, config)
        if len(heads) > 1 and (tables or (nested and any(len(file.folders) > 1 for file in below))):
            choose_subset(heads, config, where)
        if nested and len(heads) > 1:  # a class above its splits
            turned = [replace(file, folders=(file.folders[1], file.folders[0])) for file in deep]
            return {split: [_strip_top_folder(f) for f in turned if f.folders[0] == split] for split in seconds}, chosen
        if len(heads) == 1 and (tables or any(file.folders for file in below)):
            _note_unassigned_files(files, deep, tables, notes)
            files = below
            continue
        return {config.train_split: files}, chosen


def _strip_top_folder(file: _File) -> _File:
    return replace(file, folders=file.folders[1:])


def _are_splits(heads: Sequence[str], config: ImagesConfig) -> bool:
    """Whether all folders are called as splits are, and one is the one to train on."""
    named = {config.train_split, config.test_split}
    kinds = [config.train_split if head in named else split_kind(head) for head in heads]
    wanted = {config.train_split, kind_of(config.train_split) or config.train_split}
    return None not in kinds and bool(wanted & {*heads, *kinds})


def _note_unassigned_files(files: Sequence[_File], deep: Sequence[_File], tables: bool, notes: list[str]) -> None:
    if loose := len(files) - len(deep):
        notes.append(f"{loose} {'tables' if tables else 'pictures'} left out, which lie beside the folders")


def _classes(files: Sequence[_File]) -> list[tuple[str, str | None]]:
    """The class of each file: its first folder, once a folder alone in its folder is passed through."""
    while True:
        heads = Counter(file.folders[0] for file in files if file.folders)
        deeper = any(len(file.folders) > 1 for file in files)
        if len(heads) != 1 or not deeper or sum(heads.values()) < len(files):
            return [(file.name, file.folders[0] if file.folders else None) for file in files]
        files = [_strip_top_folder(file) for file in files]


def in_order(labels: Iterable[object]) -> list[object]:
    """Labels as they are numbered: as numbers if each is one, else as words."""
    found = list(labels)
    if all(re.fullmatch(r"\d{1,18}", str(label)) for label in found):
        return sorted(found, key=lambda label: (int(str(label)), str(label)))
    return sorted(found)  # type: ignore[type-var]
