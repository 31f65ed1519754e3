"""Read labelled images: one function per kind of source, each returning raw splits.

If `data.source` is set but cannot be read, the error lists the places and formats that were tried. If it is not set and
the Hub is unreachable without a cached copy of MNIST, scikit-learn's digits are used instead, with a notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import re
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.arrow import read_datasets
from mnist_diffusion.data.decoding import DataError, EncodedImages, cause, wrap_errors
from mnist_diffusion.data.idx import read_idx_folder
from mnist_diffusion.data.layout import Layout, arrange, listed
from mnist_diffusion.data.raw import RawSource, RawSplit
from mnist_diffusion.data.sanity_checks import choose_background
from mnist_diffusion.data.transforms import fit_to_size
from mnist_diffusion.data.trees import FILE_SUFFIXES, read_tree, tree_of_file, tree_of_folder
from mnist_diffusion.files import open_file, read_json

DEFAULT_HUB_ID = "ylecun/mnist"
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
HUB_TIMEOUT_SECONDS = 5.0
HUB_PATIENCE_SECONDS = 12.0
MAX_ROWS = 10_000_000
TABLE_SUFFIXES = (".parquet", ".arrow")


class HubUnavailableError(DataError):
    """The Hub could not be reached, and there is no cached copy."""


def read_source(config: ImagesConfig) -> RawSource:
    """Read the images that `config` names.

    Raises:
        DataError: the source could not be found or read.
    """
    source = _read(config)
    if config.subset is not None and not source.has_subsets:
        raise DataError(f"data.subset={config.subset!r}: {source.description} has no subsets; leave the option out")

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
        digits = read_embedded_digits()
        other = f"these are the embedded digits; write ./digits for {path.absolute()}"
        return dataclasses.replace(digits, notes=(other,)) if path.exists() else digits
    if path.is_dir():
        return read_folder(path, config)
    if path.exists():
        return read_file_source(path, config)
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
    return RawSource("scikit-learn digits (embedded)", train, None, notice=notice)


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
    if (suffix := path.suffix.lower()) in TABLE_SUFFIXES:
        return read_tables(path, [path.name], config)
    if suffix not in FILE_SUFFIXES:
        kinds = ", ".join((*TABLE_SUFFIXES, *FILE_SUFFIXES))
        raise DataError(f"data.source={config.source!r} is a file, but none of {kinds}")
    if (source := read_tree(tree_of_file(path), config)) is None:
        raise DataError(f"data.source={config.source!r} holds no images with labels that could be recognised")
    return source


def read_files(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder of parquet or arrow files, which `datasets` may have saved, or of pictures, arrays or tables."""
    tree = tree_of_folder(folder)
    tables = sorted(tree.having(TABLE_SUFFIXES), key=lambda name: name.split("/"))
    for state in (PurePosixPath(name) for name in tree.names if name.rpartition("/")[2] == "state.json"):
        if str(state.with_name("dataset_info.json")) in tree.names:  # saved, perhaps over an earlier data set
            with wrap_errors(f"{folder / state} could not be read as that of a saved data set"):
                saved = {str(state.with_name(each["filename"])) for each in read_json(folder / state)["_data_files"]}
            if missing := saved - {*tables}:
                raise DataError(f"{folder / state} names files that are not there: {listed(sorted(missing))}")
            tables = [name for name in tables if PurePosixPath(name).parent != state.parent or name in saved]
    return read_tables(folder, tables, config) if tables else read_tree(tree, config)


def read_tables(place: Path, names: list[str], config: ImagesConfig) -> RawSource:
    """Read parquet or arrow files through `datasets`, sorted into splits by the names of files and folders.

    Args:
        place: the file, or the folder that `names` are relative to.
        names: of the files.
        config: names splits and columns.
    """
    from datasets import load_dataset

    folder = place if place.is_dir() else place.parent
    if len(kinds := {PurePosixPath(name).suffix.lower() for name in names}) > 1:
        raise DataError(f"{folder} mixes parquet and arrow files; keep one kind")
    layout = arrange(names, config, str(place), tables=True)
    for name in names:
        _require_rows(folder / name)
    files = {split: [str(folder / name) for name in part] for split, part in layout.splits.items()}
    with wrap_errors(f"{place} could not be read"):  # each by itself, as the first would decide on the others' types
        if kinds == {".arrow"}:
            tables = {split: _read_arrow(each) for split, each in files.items()}
        else:
            data_files = {split: {"train": [glob.escape(name) for name in each]} for split, each in files.items()}
            tables = {split: load_dataset("parquet", data_files=each)["train"] for split, each in data_files.items()}
    return read_datasets(f"{place} (tables)", tables, config, layout, folder)


def _read_arrow(names: list[str]) -> Any:
    """Memory-map Arrow files, in stream or file format, as one `datasets.Dataset`; each table is validated first."""
    import pyarrow
    from datasets import Dataset

    tables = []
    for file in map(pyarrow.memory_map, names):
        try:
            reader = pyarrow.ipc.open_stream(file)
        except (OSError, pyarrow.ArrowInvalid):  # OSError: a file of more than 1.3 GB
            reader = pyarrow.ipc.open_file(file)
        tables.append(reader.read_all())
        tables[-1].validate(full=True)
    whole = pyarrow.concat_tables(tables, promote_options="permissive")
    return Dataset(whole, fingerprint="arrow")  # without one it hashes the whole table


def _require_rows(path: Path) -> None:
    """Check that a table is a regular file, and does not claim more rows than the limit.

    Raises:
        DataError: it is not a regular file, could not be read, or claims more.
    """
    from pyarrow import parquet

    with wrap_errors(f"{path} could not be read"), open_file(path) as file:
        rows = parquet.read_metadata(file).num_rows if path.suffix.lower() == ".parquet" else 0
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
    where = f"{name} (Hub{', cached copy' if reason else ''})"
    return dataclasses.replace(read_datasets(where, tables, config, Layout(has_subsets=True)), hub_id=name)


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


FOLDER_READERS = (read_idx_folder, read_files)
"""The readers of folders in the order they are tried; each returns None for a folder of another kind."""
