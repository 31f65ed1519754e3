"""Read labelled images: one function for each kind of source, each giving raw splits.

A source that was named and could not be read is an error that says what was looked for and where. Only if no source was
named, and MNIST could not be loaded, scikit-learn's embedded digits take its place, with a notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.arrow import read_datasets
from mnist_diffusion.data.decoding import DataError, EncodedImages, cause, read_file, wrap_errors
from mnist_diffusion.data.idx import read_idx_folder
from mnist_diffusion.data.layout import JUNK, arrange, choose_splits, listed
from mnist_diffusion.data.raw import RawSource, RawSplit
from mnist_diffusion.data.sanity_checks import choose_background
from mnist_diffusion.data.transforms import fit_to_size
from mnist_diffusion.data.trees import (
    ARCHIVES,
    ARRAY_SUFFIXES,
    TEXT_SUFFIXES,
    Tree,
    is_archive,
    read_tree,
    tree_of_archive,
    tree_of_folder,
)
from mnist_diffusion.files import file_within, open_file

DEFAULT_HUB_ID = "ylecun/mnist"
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
HUB_TIMEOUT_SECONDS = 5.0
HUB_PATIENCE_SECONDS = 12.0
MAX_ROWS = 10_000_000
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}


class HubUnavailableError(DataError):
    """The Hub could not be reached, and there is no cached copy."""


def read_source(config: ImagesConfig) -> RawSource:
    """Read the images that `config` names.

    Raises:
        DataError: the source could not be found or read.
    """
    source = _read(config)
    if config.subset is not None and not source.has_subsets:
        raise DataError(f"data.subset={config.subset!r}: {source.description} has no parts")

    background, notes = choose_background(source.train, config.background)

    def with_background(split: RawSplit) -> RawSplit:
        if not isinstance(split.images, EncodedImages):
            return split
        return dataclasses.replace(split, images=dataclasses.replace(split.images, background=background))

    train, test = with_background(source.train), source.test and with_background(source.test)
    notes = [*source.notes, *notes]
    return dataclasses.replace(source, train=train, test=test, background=background, notes=tuple(notes))


def _read(config: ImagesConfig) -> RawSource:
    if config.source is None:
        try:
            return read_hub(DEFAULT_HUB_ID, config)
        except HubUnavailableError as error:
            notice = (
                f"MNIST could not be loaded ({error}). FALLING BACK to the 1,797 real digits of 8 x 8 pixels that come "
                "with scikit-learn, enlarged to 28 x 28: the results are NOT MNIST results. "
                "Name a data set with --data.source to train on it."
            )
            return read_embedded_digits(notice=notice)
    path = Path(config.source)
    if config.source == "digits":
        found = read_embedded_digits()
        other = f"these are the embedded digits; write ./digits for {path.absolute()}"
        return dataclasses.replace(found, notes=(other,)) if path.exists() else found
    if path.is_dir():
        return read_folder(path, config)
    if path.exists():
        return read_file_source(path, config)
    if path.is_symlink():
        raise DataError(f"data.source={config.source!r} is a link that leads nowhere")
    missing = f"there is no such folder or file (looked for {path.absolute()})"
    if HUB_ID.fullmatch(config.source):
        try:
            return read_hub(config.source, config)
        except DataError as error:
            raise DataError(f"{missing}, and from the Hub: {error}") from error
    not_an_id = "it is not a Hub data set id (name or user/name)"
    raise DataError(f"data.source={config.source!r} was not found: {missing}, and {not_an_id}")


def read_embedded_digits(notice: str | None = None) -> RawSource:
    """The UCI digits that ship with scikit-learn: 1,797 grey images, drawn at 20 x 20 inside 28 x 28 as MNIST's are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    images = fit_to_size(fit_to_size(small, 20, "resize"), 28, "pad")
    train = RawSplit(images, digits.target.tolist())
    return RawSource("digits", "scikit-learn digits (embedded)", train, None, notice=notice)


def read_folder(folder: Path, config: ImagesConfig) -> RawSource:
    """Read a local folder by the first of `FOLDER_READERS` that recognises it."""
    for read in FOLDER_READERS:
        if (source := read(folder, config)) is not None:
            return source
    idx = "IDX files (train-images-idx3-ubyte[.gz], here or in <name>/raw)"
    looked_for = f"{idx}, parquet or arrow, pictures, .npz or .npy, and CSV tables of pixels"
    raise DataError(f"data.source={config.source!r}: {folder.absolute()} holds no images. Looked for {looked_for}")


def read_file_source(path: Path, config: ImagesConfig) -> RawSource:
    """Read a table, an archive, or a file of arrays.

    Raises:
        DataError: it is something else, or holds nothing that can be read.
    """
    if not path.is_file():
        raise DataError(f"data.source={config.source!r} is neither a folder nor a regular file")
    if path.suffix in TABLE_SUFFIXES:
        return read_tables(path, [path.name], config)
    if is_archive(path):
        source = read_tree(tree_of_archive(path), config)
    elif path.suffix.lower() in (*TEXT_SUFFIXES, *ARRAY_SUFFIXES):
        alone = Tree(str(path.parent), [path.name], lambda name: read_file(path), [], [])
        source = read_tree(alone, config)
        if source is not None:
            named = source.description.replace(alone.where, str(path), 1)
            source = dataclasses.replace(source, description=named)
    else:
        kinds = ", ".join((*TABLE_SUFFIXES, *TEXT_SUFFIXES, *ARRAY_SUFFIXES, *ARCHIVES))
        raise DataError(f"data.source={config.source!r} is a file, but none of {kinds}")
    if source is None:
        raise DataError(f"data.source={config.source!r} holds no images with labels that could be recognised")
    return source


def read_idx(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder of IDX files, or torchvision's `<name>/raw` below it."""
    if (found := read_idx_folder(folder, config.subset)) is None:
        return None
    splits = {
        split: RawSplit(torch.from_numpy(images.copy()).unsqueeze(1), labels.tolist())
        for split, (images, labels) in found.splits.items()
    }
    train, test, notes = choose_splits(list(splits), config, found.title)
    held_out = None if test is None else splits[test]
    about = (str(config.source), found.title, splits[train], held_out, found.class_names)
    return RawSource(*about, notes=tuple(notes), has_subsets=True)


def read_saved_datasets(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder that `datasets` saved, or one with such folders in it, which are splits or configurations."""
    found = sorted(path.parent for path in folder.rglob("state.json") if (path.parent / "dataset_info.json").is_file())
    if not found:
        return None
    from datasets import load_from_disk

    names = [(path.relative_to(folder) / "state.json").as_posix() for path in found]
    layout = arrange(names, config, str(folder), tables=True)
    tables = {}
    for split, [(name, _), *others] in layout.splits.items():
        if others:
            raise DataError(f"{folder} holds several saved data sets; name one of {listed(map(str, found))}")
        with wrap_errors(f"{(folder / name).parent} could not be read as a saved data set"):
            files = [each["filename"] for each in json.loads(read_file(folder / name))["_data_files"]]
            if any(Path(each).name != each for each in files):
                raise DataError(f"{folder / name} names files elsewhere: {listed(files)}")
            for each in files:
                file_within((folder / name).parent, each)
            tables[split] = load_from_disk(str((folder / name).parent))
    source = read_datasets(f"{folder} (datasets folder)", tables, config, folder)
    return dataclasses.replace(source, notes=(*layout.notes, *source.notes), has_subsets=layout.has_subsets)


def read_table_folder(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder of parquet or arrow files."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix in TABLE_SUFFIXES and path.is_file())
    below = [path.relative_to(folder) for path in found]
    tables = [path.as_posix() for path in below if not any(map(JUNK.fullmatch, path.parts))]
    return read_tables(folder, tables, config) if tables else None


def read_any_tree(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder of pictures, arrays or tables of text."""
    return read_tree(tree_of_folder(folder), config)


def read_tables(place: Path, names: list[str], config: ImagesConfig) -> RawSource:
    """Read parquet or arrow files through `datasets`, sorted into splits by the names of files and folders.

    Args:
        place: the file, or the folder that `names` are relative to.
        names: of the files.
        config: names splits and columns.
    """
    from datasets import load_dataset

    folder = place if place.is_dir() else place.parent
    kinds = {TABLE_SUFFIXES[Path(name).suffix] for name in names}
    if len(kinds) > 1:
        raise DataError(f"{folder} mixes parquet and arrow files; keep one kind")
    layout = arrange(names, config, str(place), tables=True)
    for name in names:
        _require_rows(folder / name)
    files = {split: [glob.escape(str(folder / name)) for name, _ in part] for split, part in layout.splits.items()}
    [kind] = kinds
    with wrap_errors(f"{place} could not be read"):  # each by itself, as the first would decide on the others' types
        tables = {split: load_dataset(kind, data_files={"train": each})["train"] for split, each in files.items()}
    source = read_datasets(f"{place} (tables)", tables, config, folder)
    return dataclasses.replace(source, notes=(*layout.notes, *source.notes), has_subsets=layout.has_subsets)


def _require_rows(path: Path) -> None:
    """Make sure that a table is a regular file, which does not claim more rows than can be meant.

    Raises:
        DataError: it is not.
    """
    from pyarrow import parquet

    with wrap_errors(f"{path} could not be read"), open_file(path) as file:
        rows = parquet.read_metadata(file).num_rows if path.suffix == ".parquet" else 0
        if rows > MAX_ROWS:
            raise DataError(f"{path} has {rows:,} rows, more than the limit of {MAX_ROWS:,}")


def read_hub(name: str, config: ImagesConfig) -> RawSource:
    """Read a data set of the Hub, or its cached copy if the Hub could not be reached.

    Raises:
        HubUnavailableError: the Hub does not answer, and there is no cached copy.
        DataError: the Hub has no such data set, or does not give access to it.
    """
    from datasets import load_dataset

    reason = _hub_unreachable_reason(name)
    with _offline() if reason else contextlib.nullcontext():
        try:
            tables = load_dataset(name, config.subset)
        except Exception as error:
            if reason:
                raise HubUnavailableError(f"data set {name!r}: {reason}, and there is no cached copy of it") from error
            raise DataError(f"data.source={name!r}: the Hub data set could not be read: {cause(error)}") from error
    source = read_datasets(f"{name} (Hub{', cached copy' if reason else ''})", tables, config)
    return dataclasses.replace(source, identifier=name, hub_id=name, has_subsets=True)


def _hub_unreachable_reason(name: str) -> str | None:
    """Why the Hub cannot be used, or None: one short request, bounded in time even if name lookups hang."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    outcome: list[str | None] = [f"{constants.ENDPOINT} gave no answer within {HUB_PATIENCE_SECONDS:.0f} seconds"]

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
            outcome[0] = None
        except HfHubHTTPError as error:  # it answered; what it says is reported when the data set is read
            status = error.response.status_code if error.response is not None else 0
            outcome[0] = f"{constants.ENDPOINT} answered {status}" if status >= 500 else None
        except Exception as error:
            outcome[0] = f"{constants.ENDPOINT} could not be reached ({type(error).__name__})"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE_SECONDS)
    return outcome[0]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make `datasets` use its cache at once instead of retrying a Hub that cannot be reached."""
    import datasets.config
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


FOLDER_READERS = (read_idx, read_saved_datasets, read_table_folder, read_any_tree)
"""The readers of folders in the order they are tried; each returns None for a folder of another kind."""
