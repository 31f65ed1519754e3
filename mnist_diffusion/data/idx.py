"""The IDX format of the MNIST family, read with its bounds checked.

A file is a magic number (two zero bytes, a type code, the number of dimensions), the size of each dimension
as a big-endian uint32, then the values. Format: http://yann.lecun.com/exdb/mnist/ (archived).
"""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.data.layout import JUNK, kind_in
from mnist_diffusion.files import open_file

IMAGES, LABELS = 0x803, 0x801
"""Magic numbers: unsigned bytes in three dimensions, and in one."""
MAX_BYTES = 8 * 2**30
EMNIST = re.compile(r"emnist-(\w+)-(train|test)-")
NAMED = {"fashionmnist": "FashionMNIST", "kmnist": "KMNIST"}
"""Folders whose class names are those of a class of `torchvision.datasets`."""


@dataclass(frozen=True)
class IdxFolder:
    """The content of a folder of IDX files.

    Args:
        title: the folder and the data set in it.
        splits: images `[N, H, W]` and labels `[N]`, both uint8, of `train`, `test` and `validation`.
        class_names: the name of each label, if they are known.
    """

    title: str
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    class_names: dict[int, str] | None


def read_idx_folder(folder: Path, subset: str | None) -> IdxFolder | None:
    """Read the IDX files of a folder, or of torchvision's `<name>/raw` below it; None if there are none.

    File names contain `image` or `label` and, optionally, a word for the split.

    Args:
        folder: the folder.
        subset: which part of EMNIST is wanted, if there are several.

    Raises:
        DataError: there are several data sets, the subset is not there or is needed, or a file is broken.
    """
    for places in ([folder], [folder / "raw"], sorted(folder.glob("*/raw"))):
        found = {place: files for place in places if (files := _idx_files(place))}
        if len(found) > 1:
            names = ", ".join(str(place.parent) for place in found)
            raise DataError(f"{folder} holds several data sets; name one of {names}")
        for place, files in found.items():
            return _read_files(place, files, subset)
    return None


def _idx_files(folder: Path) -> list[Path]:
    """The IDX files of a folder, by name or first bytes; a .gz is skipped if its unpacked copy is there."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".gz") if folder.is_dir() else ():
        name = path.name.lower()
        if JUNK.fullmatch(name) or not re.search("image|label", name) or not path.is_file():
            continue
        if re.search(r"ubyte(\.gz)?$", name) or _magic(path) in (IMAGES, LABELS):
            found[name.removesuffix(".gz").replace(".idx", "-idx")] = path
    return sorted(found.values())


def _read_files(folder: Path, files: list[Path], subset: str | None) -> IdxFolder:
    part_of = {path: match[1] if (match := EMNIST.match(path.name)) else None for path in files}
    subsets = sorted({part for part in part_of.values() if part is not None})
    if subset is not None and subset not in subsets:
        raise DataError(f"data.subset={subset!r}: {folder} has {', '.join(subsets) or 'no parts'}")
    if len(subsets) > 1 and subset is None:
        raise DataError(f"{folder} holds several parts of EMNIST; set data.subset to one of {', '.join(subsets)}")
    chosen = subset or (subsets[0] if subsets else None)
    found: dict[str, dict[str, Path]] = {}
    for path in (path for path, part in part_of.items() if part == chosen):
        role = "images" if "image" in path.name.lower() else "labels"
        roles = found.setdefault(kind_in(path.name) or "train", {})
        if role in roles:
            raise DataError(f"{path} and {roles[role].name} could both hold the {role} of one split; keep one")
        roles[role] = path
    splits = {split: _pair(roles) for split, roles in found.items()}
    if chosen is not None:  # EMNIST has rows and columns exchanged
        splits = {split: (images.transpose(0, 2, 1), labels) for split, (images, labels) in splits.items()}
    place = (folder.resolve().parent if folder.resolve().name == "raw" else folder.resolve()).name
    dataset = NAMED.get(re.sub("[-_]", "", place.lower())) if chosen is None else f"EMNIST {chosen}"
    return IdxFolder(f"{folder} (IDX{f', {dataset}' if dataset else ''})", splits, _class_names(dataset))


def _class_names(dataset: str | None) -> dict[int, str] | None:
    if dataset is None:
        return None
    from torchvision import datasets

    name, _, subset = dataset.partition(" ")
    known = getattr(datasets, name)
    return dict(enumerate(known.classes_split_dict.get(subset, ()) if subset else known.classes)) or None


def _pair(roles: dict[str, Path]) -> tuple[np.ndarray, np.ndarray]:
    if len(roles) < 2:
        [(role, path)] = roles.items()
        raise DataError(f"{path} has no partner with the {'labels' if role == 'images' else 'images'}")
    images, labels = read_idx(roles["images"], dimensions=3), read_idx(roles["labels"], dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{roles['images']} holds {len(images)} images but {roles['labels']} {len(labels)} labels")
    return images, labels


def read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, raw or gzipped.

    Args:
        path: the file; gzip is recognised by its first bytes.
        dimensions: 3 for images `[N, H, W]`, 1 for labels `[N]`.

    Returns:
        A uint8 array of that many dimensions.

    Raises:
        DataError: wrong magic, type or dimensions; fewer or more bytes than declared; a broken gzip stream.
    """
    try:
        with _unzipped(path) as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions:
                raise DataError(f"{path}: truncated header of {len(header)} bytes")
            magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
            if magic != (expected := 0x800 | dimensions):
                raise DataError(f"{path}: magic number 0x{magic:08x}, expected 0x{expected:08x} (unsigned bytes)")
            if not 0 < (size := math.prod(shape)) <= MAX_BYTES:
                problem = f"more than the limit of {MAX_BYTES}" if size else "so it holds no pixels"
                raise DataError(f"{path}: declares {size} bytes of data ({shape}), {problem}")
            values = stream.read(size)
            if len(values) < size:
                raise DataError(f"{path}: truncated, declares {size} values {shape} but holds {len(values)}")
            if stream.read(1):
                raise DataError(f"{path}: holds more than the {size} values {shape} that it declares")
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: could not be read: {error}") from error
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _magic(path: Path) -> int | None:
    """The first four bytes of a file, which may be gzipped, as a number."""
    try:
        with _unzipped(path) as stream:
            return int.from_bytes(stream.read(4), "big")
    except (EOFError, OSError, ValueError, zlib.error):
        return None


@contextmanager
def _unzipped(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file, or what is in it if its first bytes say that it is gzipped."""
    with open_file(path) as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield gzip.GzipFile(fileobj=file) if zipped else file
