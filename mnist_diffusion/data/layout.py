"""Tell splits, configurations and classes apart by the names of folders and files: one rule for pictures and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
JUNK = re.compile(r"\..*|@eaDir|__MACOSX|__pycache__|lost\+found|\$RECYCLE\.BIN|cache-\w+\.arrow", re.IGNORECASE)
"""System and hidden files to ignore, and what `datasets` keeps beside a data set that it saved."""
SHOWN = 8


def kind_of(name: str) -> str | None:
    """The split that `name` is a word for, `train`, `test` or `validation`; None if it is none."""
    return next((kind for kind, words in SPLIT_WORDS.items() if name.lower() in words), None)


def kind_in(name: str) -> str | None:
    """The split that `name`, or a word in it, stands for, as in `mnist_train.csv`, `seg_train` or `x_test`."""
    return next(filter(None, map(kind_of, re.split(r"[^a-zA-Z0-9]+", name))), None)


def listed(names: Iterable[object]) -> str:
    """A few names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, evenly spread, the first and the last among them."""
    return sorted({round(float(place)) for place in torch.linspace(0, count - 1, min(count, limit))})


@dataclass
class Layout:
    """What the files of a source are.

    Args:
        splits: the files of each split, by the name it has there.
        classes: the class of each file, if folders name classes.
        notes: how files were interpreted and which were skipped.
        has_subsets: whether `data.subset` chose something.
    """

    splits: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    has_subsets: bool = False


Files = list[tuple[tuple[str, ...], str]]
"""The folders that each file lies in, as far as they are not passed through, and its name."""


def choose_splits(names: Sequence[str], config: ImagesConfig, where: str) -> tuple[str, str | None, list[str]]:
    """The names of the split to train on and of the one to hold out, if there is one, and notes on both.

    A name that the configuration gives may be written otherwise: `test` finds `Testing`.

    Raises:
        DataError: a split that is named is not there.
    """

    def look_for(option: str, name: str) -> str:
        kind = kind_of(name)
        alike = [each for each in names if each == name] or [each for each in names if kind_in(each) == kind]
        if len(alike) != 1 or (alike[0] != name and kind_of(name) is None):
            raise DataError(f"data.{option}={name!r} is not a split of {where}, which has {listed(sorted(names))}")
        return alike[0]

    train = look_for("train_split", config.train_split)
    others = [name for name in names if name != train]
    if config.test_split is not None:
        test: str | None = look_for("test_split", config.test_split)
    else:
        by_kind = {kind_in(name): name for name in reversed(others)}
        test = by_kind.get("test", by_kind.get("validation"))
    unused = [name for name in others if name != test]
    notes = [f"split {listed(map(repr, unused))} left out"] if unused else []
    if {train, test} - {"train", "test", None}:
        held_out = "a part of it" if test is None else repr(test)
        notes.insert(0, f"trained on the split {train!r}, held out: {held_out}")
    return train, test, notes


def arrange(names: Sequence[str], config: ImagesConfig, where: str, *, tables: bool = False) -> Layout:
    """Sort files into splits and classes by their folders.

    A folder that is alone in its parent is skipped. If all folders of a level have the names of splits, one of them the
    training split, they are the splits. Folders above splits are classes; they are subsets if the files are tables, or
    if the splits contain folders of their own. Other folders are classes. A table whose file name contains the name of
    a split counts as a file in a folder of that name.

    Args:
        names: of the files, relative to the source, with `/` between folders.
        config: names splits and subset.
        where: the source, for messages.
        tables: whether they are tables, which have no class.

    Raises:
        DataError: there are several subsets, and `data.subset` names none of them.
    """
    files: Files = []
    for name in names:
        *folders, file = PurePosixPath(name).parts
        own = kind_in(PurePosixPath(file).stem) if tables and not any(map(kind_of, folders)) else None
        files.append(((*folders, own) if own else tuple(folders), name))
    layout = Layout()
    splits = _splits(files, config, where, tables, layout)
    if not tables:
        layout.classes = {name: label for part in splits.values() for name, label in _classes(part)}
    for split, part in splits.items():
        in_classes = [name for _, name in part if not layout.classes or name in layout.classes]
        if len(in_classes) < len(part):
            of_split = f" of the split {split!r}" if len(splits) > 1 else ""
            layout.notes.append(
                f"{len(part) - len(in_classes)} pictures{of_split} left out, which lie in no class folder"
            )
        if in_classes:
            layout.splits[split] = in_classes
    return layout


def _splits(files: Files, config: ImagesConfig, where: str, tables: bool, layout: Layout) -> dict[str, Files]:
    """The files of each split, without the folders above it; what is said of them goes into `layout`."""
    while deep := [(folders, name) for folders, name in files if folders]:
        heads = list(dict.fromkeys(folders[0] for folders, _ in deep))
        below = [(folders[1:], name) for folders, name in deep]
        if {None, "train"} < set(map(kind_of, heads)):
            strange = [head for head in heads if kind_of(head) is None]
            layout.notes.append(f"folders beside the splits left out: {listed(strange)}")
            files = [(folders, name) for folders, name in files if not folders or folders[0] not in strange]
            continue
        loose = f"{len(files) - len(deep)} {'tables' if tables else 'pictures'} left out, which lie beside the folders"
        notes = [loose] if len(files) > len(deep) else []
        if _are_splits(heads, config):
            layout.notes += notes
            return {head: [(folders[1:], name) for folders, name in deep if folders[0] == head] for head in heads}
        if config.subset in heads and not layout.has_subsets:
            files = [(folders[1:], name) for folders, name in deep if folders[0] == config.subset]
            layout.has_subsets = True
            continue
        seconds = list(dict.fromkeys(folders[0] for folders, _ in below if folders))
        nested = all(folders for folders, _ in below) and _are_splits(seconds, config)
        if len(heads) > 1 and (tables or (nested and any(len(folders) > 1 for folders, _ in below))):
            got = "" if config.subset is None else f", got {config.subset!r}"
            raise DataError(f"{where} has several subsets; set data.subset to one of {listed(heads)}{got}")
        if len(heads) > 1 and nested:  # a class above its splits
            return {split: [(folders[:1], name) for folders, name in deep if folders[1] == split] for split in seconds}
        if len(heads) > 1 or not (tables or seconds):
            break
        layout.notes += notes
        files = below
    return {config.train_split: files}


def _are_splits(heads: Sequence[str], config: ImagesConfig) -> bool:
    """Whether all folders are called as splits are, and one is the one to train on."""
    configured = {config.train_split, config.test_split}
    kinds = [config.train_split if head in configured else kind_in(head) for head in heads]
    return None not in kinds and bool({config.train_split, kind_of(config.train_split)} & {*heads, *kinds})


def _classes(files: Files) -> list[tuple[str, str]]:
    """The files in folders, and the class of each: its first folder, once a folder alone in its folder is passed."""
    while len({folders[:1] for folders, _ in files}) == 1 and any(len(folders) > 1 for folders, _ in files):
        files = [(folders[1:], name) for folders, name in files]
    return [(name, folders[0]) for folders, name in files if folders]


def in_order(labels: Iterable[object]) -> list[object]:
    """Labels as they are numbered: as numbers if each is one, else as words."""
    values = list(labels)
    if all(re.fullmatch(r"\d{1,18}", str(label)) for label in values):
        return sorted(values, key=lambda label: (int(str(label)), str(label)))
    return sorted(values)  # type: ignore[type-var]
