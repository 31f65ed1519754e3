"""Read labelled images: one function for each kind of source, each giving raw splits.

A source that was named and could not be read is an error that says what was looked for and where. Only if no source was
named, and MNIST could not be loaded, scikit-learn's embedded digits take its place, with a notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.idx import find_idx_family, find_idx_folder, read_idx_split
from mnist_diffusion.data.pictures import DataError, Encoded, Pictures, cause, explained, picture_files
from mnist_diffusion.data.transforms import fit_to_size

DEFAULT_HUB_ID = "ylecun/mnist"
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
HUB_TIMEOUT_SECONDS = 5.0
HUB_PATIENCE_SECONDS = 12.0
USPS_FILES = {"train": "usps.bz2", "test": "usps.t.bz2"}
PICTURE_SUFFIX = re.compile(r"\.(avif|bmp|gif|jfif|jp2|jpe|jpeg|jpg|pgm|png|pnm|ppm|tga|tif|tiff|webp)")
COLUMNS = {"image_column": ("Image", ["image", "img"]), "label_column": ("ClassLabel", ["label"])}
"""For each option, the type of the column that it names, and the names that are tried if not one has this type."""
TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}


class HubUnavailableError(DataError):
    """The Hub could not be reached, and there is no cached copy."""


@dataclass(frozen=True)
class RawSplit:
    """Images as they come, uint8 `[N, C, H, W]` or encoded and of any sizes, each with a (sortable) label."""

    images: Tensor | Pictures
    labels: Sequence[Any]


@dataclass(frozen=True)
class RawSource:
    """What a source holds: a training split, and if it has them a held-out split and class names."""

    identifier: str
    """Its name in `data.source`."""
    description: str
    train: RawSplit
    test: RawSplit | None
    class_names: dict[Any, str] | None = None
    notice: str | None = None
    hub_id: str | None = None
    has_subsets: bool = False
    """Whether `data.subset` means something here."""

    def labels(self) -> list[Any]:
        """The labels in use, in their order.

        Raises:
            DataError: there are no images, some have no label, or held-out images have labels of their own.
        """
        splits = [split for split in (self.train, self.test) if split is not None]
        if any(len(split.labels) == 0 for split in splits):
            raise DataError(f"{self.description}: a split holds no images")
        present = {label for split in splits for label in split.labels}
        if None in present or any(isinstance(label, int) and label < 0 for label in present):
            raise DataError(f"{self.description}: some images have no label")
        if unknown := present - set(self.train.labels):
            raise DataError(f"{self.description}: held-out classes without training images: {sorted(unknown)}")
        return sorted(present)

    def names(self, asked: tuple[str, ...] | None) -> dict[Any, str]:
        """The name of each label in use: as asked for, or from the source, or the label itself.

        Raises:
            DataError: the number of names asked for is not that of the labels.
        """
        labels = self.labels()
        if asked is None:
            return {label: (self.class_names or {}).get(label, str(label)) for label in labels}
        if len(asked) != len(labels):
            present = f"{self.description} has {len(labels)}: {labels[:20]}"
            raise DataError(f"data.class_names names {len(asked)} classes, but {present}")
        return dict(zip(labels, asked, strict=True))


def read_source(config: ImagesConfig) -> RawSource:
    """Read the images that `config` names.

    Raises:
        DataError: the source could not be found or read.
    """
    source = _read(config)
    if config.subset is not None and not source.has_subsets:
        raise DataError(f"data.subset={config.subset!r}: {source.description} has no parts")
    return source


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
    if config.source == "digits":
        return read_embedded_digits()
    path = Path(config.source).expanduser()
    if path.is_dir():
        return read_folder(path, config)
    if path.is_file():
        if path.suffix in TABLE_SUFFIXES:
            return read_tables([path], config)
        raise DataError(f"data.source={config.source!r} is a file, but not a parquet or arrow one")
    if HUB_ID.fullmatch(config.source):
        return read_hub(config.source, config)
    missing = f"there is no such folder or file (looked for {path.absolute()})"
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
    looked_for = f"{idx}, usps.bz2, parquet or arrow, and one folder per class"
    raise DataError(f"data.source={config.source!r}: {folder.absolute()} holds no images. Looked for {looked_for}")


def _splits(
    config: ImagesConfig, description: str, read: Callable[[str], RawSplit | None]
) -> tuple[RawSplit, RawSplit | None]:
    """The training split, and the held-out one if there is one; a split that is named must exist.

    Raises:
        DataError: it does not.
    """
    train, test = read(config.train_split), read(config.test_split or "test")
    for name, split, found in (("train", config.train_split, train), ("test", config.test_split, test)):
        if split is not None and found is None:
            raise DataError(f"{description} has no split {split!r} (data.{name}_split)")
    assert train is not None
    return train, test


def read_idx_folder(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder of IDX files, or torchvision's `<name>/raw` below it; its splits are `train` and `test`."""
    idx_folder = find_idx_folder(folder)
    if idx_folder is None:
        return None
    family = find_idx_family(idx_folder, config.subset)

    def read(split: str) -> RawSplit | None:
        pair = read_idx_split(idx_folder, split, family)
        return pair and RawSplit(torch.from_numpy(pair[0].copy()).unsqueeze(1), pair[1].tolist())

    train, test = _splits(config, str(idx_folder), read)
    description = f"{idx_folder} ({family.title})"
    return RawSource(str(config.source), description, train, test, family.class_names(), has_subsets=True)


def read_usps(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read USPS as torchvision keeps it: `usps.bz2` and `usps.t.bz2`, lines of 16 x 16 values from -1 to 1."""
    if not (folder / USPS_FILES["train"]).is_file():
        return None
    from sklearn.datasets import load_svmlight_file

    def read(split: str) -> RawSplit | None:
        path = folder / USPS_FILES.get(split, split)
        if not path.is_file():
            return None
        with explained(f"{path} could not be read"):
            values, labels = load_svmlight_file(str(path), n_features=256)
        pixels = ((values.toarray() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        return RawSplit(torch.from_numpy(pixels).view(-1, 1, 16, 16), [int(label) - 1 for label in labels])

    return RawSource(str(config.source), f"{folder} (USPS)", *_splits(config, str(folder), read))


def read_saved_dataset(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder that `datasets` saved."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return None
    from datasets import load_from_disk

    return read_datasets(f"{folder} (datasets folder)", load_from_disk(str(folder)), config)


def read_table_folder(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read a folder of parquet or arrow files."""
    tables = [path for path in sorted(folder.rglob("*")) if path.suffix in TABLE_SUFFIXES]
    return read_tables(tables, config) if tables else None


def read_image_folder(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read one folder per class, or such trees in folders named after the splits; class names are the folders'."""
    if not any(path.is_dir() for path in folder.iterdir()):
        return None
    train_root, test_root = folder / config.train_split, folder / (config.test_split or "test")
    if not train_root.is_dir():
        if config.test_split is not None:
            raise DataError(f"data.test_split={config.test_split!r} needs the folder {train_root}, which is not there")
        train_root, test_root = folder, folder / "no split"
    train, names, left_out = _read_class_folders(train_root)
    test = None
    if test_root.is_dir():
        test, test_names, also_left_out = _read_class_folders(test_root)
        left_out += also_left_out
        if unknown := set(test_names) - set(names):
            raise DataError(f"{test_root} has classes that {train_root} has not: {sorted(unknown)}")
    elif config.test_split is not None:
        raise DataError(f"data.test_split={config.test_split!r}: there is no folder {test_root}")
    kinds = ", ".join(sorted({path.suffix or path.name for path in left_out})[:5])
    others = f"; {len(left_out)} files that are no pictures left out: {kinds}" if left_out else ""
    return RawSource(str(config.source), f"{folder} (image folder{others})", train, test)


def _read_class_folders(root: Path) -> tuple[RawSplit, list[str], list[Path]]:
    """The pictures of one folder per class, the classes, and files that by their names are no pictures."""
    from torchvision.datasets import ImageFolder

    left_out: list[Path] = []

    def is_picture(name: str) -> bool:
        path = Path(name)
        hidden, known = path.name.startswith("."), PICTURE_SUFFIX.fullmatch(path.suffix.lower())
        if not hidden and not known:
            left_out.append(path)
        return bool(known) and not hidden

    try:
        listing = ImageFolder(str(root), is_valid_file=is_picture)
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}") from error
    images = picture_files([Path(path) for path, _ in listing.samples])
    return RawSplit(images, [listing.classes[index] for _, index in listing.samples]), listing.classes, left_out


def read_tables(paths: list[Path], config: ImagesConfig) -> RawSource:
    """Read parquet or arrow files through `datasets`; a file belongs to the split that its name begins with."""
    from datasets import load_dataset

    kinds = {TABLE_SUFFIXES[path.suffix] for path in paths}
    if len(kinds) > 1:
        raise DataError(f"{paths[0].parent} mixes parquet and arrow files; keep one kind")
    wanted = [config.train_split, config.test_split or "test"]
    files = {split: [str(path) for path in paths if path.name.startswith(split)] for split in wanted}
    files = {split: found for split, found in files.items() if found}
    if config.train_split not in files:
        files = {config.train_split: [str(path) for path in paths]}
    with explained(f"{paths[0]} could not be read"):
        tables = load_dataset(kinds.pop(), data_files=files)
    return read_datasets(f"{paths[0] if len(paths) == 1 else paths[0].parent} (tables)", tables, config)


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
    return dataclasses.replace(source, hub_id=name, has_subsets=True)


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


def read_datasets(description: str, tables: Any, config: ImagesConfig) -> RawSource:
    """Read the splits of a `datasets.DatasetDict`, or a lone `datasets.Dataset` as the training split.

    Raises:
        DataError: a named split or column is missing, or there are several columns to choose from.
    """
    splits = tables if isinstance(tables, dict) else {config.train_split: tables}
    test_split = config.test_split or ("test" if "test" in splits else None)
    for name, split in (("train_split", config.train_split), ("test_split", test_split)):
        if split is not None and split not in splits:
            raise DataError(f"data.{name}={split!r} is not a split of {description}, which has {sorted(splits)}")
    features = splits[config.train_split].features
    image_column, label_column = (_find_column(option, config, features, description) for option in COLUMNS)
    names = dict(enumerate(getattr(features[label_column], "names", ())))

    def raw(split: str) -> RawSplit:
        return _read_rows(splits[split], image_column, label_column, f"{description} {split}")

    train, test = raw(config.train_split), raw(test_split) if test_split else None
    return RawSource(config.source or DEFAULT_HUB_ID, description, train, test, names)


def _find_column(option: str, config: ImagesConfig, features: Any, description: str) -> str:
    kind, usual = COLUMNS[option]
    asked = getattr(config, option)
    if asked is not None:
        if asked not in features:
            raise DataError(f"data.{option}={asked!r} is not a column of {description}, which has {sorted(features)}")
        return str(asked)
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    found = found if len(found) == 1 else [name for name in usual if name in features]
    if not found:
        raise DataError(f"{description}: cannot tell which of the columns {sorted(features)} to use; set data.{option}")
    return found[0]


def _read_rows(rows: Any, image_column: str, label_column: str, description: str) -> RawSplit:
    from datasets import Image

    if type(rows.features[image_column]).__name__ == "Image":
        rows = rows.cast_column(image_column, Image(decode=False))
    cells = rows[label_column]
    labels = [label[0] if isinstance(label, list) and len(label) == 1 else label for label in cells]
    for label in labels:
        if not isinstance(label, int | str | float | None):
            expected = f"data.label_column={label_column!r} must hold one number or word per image"
            raise DataError(f"{description}: {expected}, got {label!r}")
    column = rows.select_columns([image_column])

    def read(indices: Sequence[int]) -> list[Encoded]:
        return [_encoded(value, description) for value in column[list(indices)][image_column]]

    images = Pictures(len(labels), read, lambda index: f"{description} row {index}")
    return RawSplit(images, labels)


def _encoded(value: Any, description: str) -> Encoded:
    """A cell of an image column: a file's content, a file's path, or pixel values."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, dict):
        try:
            return np.asarray(value)
        except ValueError as error:
            raise DataError(f"{description}: a picture's rows are of different lengths") from error
    if value.get("bytes") is not None:
        return bytes(value["bytes"])
    with explained(f"{description}: a picture could not be read", (OSError, KeyError, TypeError)):
        return Path(value["path"]).read_bytes()


FOLDER_READERS = (read_idx_folder, read_usps, read_saved_dataset, read_table_folder, read_image_folder)
"""The kinds of folders, in the order in which they are tried; each gives None for a folder of another kind."""
