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

from mnist_diffusion.data.layout import kind_in
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import open_file

UNSIGNED_BYTE = 0x08
MAX_BYTES = 8 * 2**30

PREFIXES = {"train": "train", "test": "t10k"}
TRAIN_IMAGES = "train-images-idx3-ubyte"
EMNIST_IMAGES = re.compile(r"emnist-(?P<subset>\w+)-train-images[-.]idx3-ubyte(\.gz)?")


@dataclass(frozen=True)
class IdxFamily:
    """The data set of a folder of IDX files."""

    title: str
    dataset: str | None = None
    """The class of `torchvision.datasets` that has the names of the classes."""
    subset: str | None = None
    """Of EMNIST, whose images are stored with rows and columns exchanged."""

    def stems(self, split: str) -> tuple[str, str]:
        """The names of the files with images and labels, without `.gz`."""
        prefix = PREFIXES[split] if self.subset is None else f"emnist-{self.subset}-{split}"
        return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"

    def class_names(self) -> dict[int, str] | None:
        """The name of each label, if they are known."""
        if self.dataset is None:
            return None
        from torchvision import datasets

        known = getattr(datasets, self.dataset)
        names = known.classes if self.subset is None else known.classes_split_dict.get(self.subset, ())
        return dict(enumerate(names)) or None


def find_idx_folder(folder: Path) -> Path | None:
    """The folder that holds the IDX training images: `folder` itself, or torchvision's `<name>/raw` below it.

    Raises:
        UserError: there are several.
    """
    for candidates in ([folder], [folder / "raw"], sorted(path for path in folder.glob("*/raw") if path.is_dir())):
        found = [path for path in candidates if _find(path, TRAIN_IMAGES) or _emnist_subsets(path)]
        if len(found) > 1:
            places = ", ".join(str(path.parent) for path in found)
            raise UserError(f"{folder} holds several data sets; name one of {places}")
        if found:
            return found[0]
    return None


def _emnist_subsets(folder: Path) -> list[str]:
    files = sorted(folder.glob("emnist-*")) if folder.is_dir() else []
    return list(dict.fromkeys(match["subset"] for path in files if (match := EMNIST_IMAGES.fullmatch(path.name))))


def find_idx_family(folder: Path, subset: str | None) -> IdxFamily:
    """What the IDX files of `folder` are: by their names, and by that of the folder, as torchvision lays them out.

    Args:
        folder: holds the files.
        subset: which part of EMNIST is wanted, if there are several.

    Raises:
        UserError: `subset` is not there, or is needed.
    """
    subsets = _emnist_subsets(folder)
    if subset is not None and subset not in subsets:
        raise UserError(f"data.subset={subset!r}: {folder} has {', '.join(subsets) or 'no parts'}")
    if len(subsets) > 1 and subset is None:
        raise UserError(f"{folder} holds several parts of EMNIST; set data.subset to one of {', '.join(subsets)}")
    if subsets:
        chosen = subset or subsets[0]
        return IdxFamily(f"IDX, EMNIST {chosen}", "EMNIST", chosen)
    place = folder.resolve()
    name = (place.parent if place.name == "raw" else place).name.lower().replace("-", "").replace("_", "")
    known = {"fashionmnist": "FashionMNIST", "kmnist": "KMNIST"}.get(name)
    return IdxFamily(f"IDX, {known}" if known else "IDX", known)


def _find(folder: Path, stem: str) -> Path | None:
    dotted = stem.replace("-idx", ".idx")
    paths = (folder / name for name in (stem, f"{stem}.gz", dotted, f"{dotted}.gz"))
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, raw or gzipped.

    Args:
        path: the file; gzip is recognised by its first bytes.
        dimensions: 3 for images `[N, H, W]`, 1 for labels `[N]`.

    Returns:
        A uint8 array of that many dimensions.

    Raises:
        UserError: wrong magic, type or dimensions; fewer or more bytes than declared; a broken gzip stream.
    """
    try:
        with _unzipped(path) as stream:
            header_size = 4 + 4 * dimensions
            header = stream.read(header_size)
            if len(header) < header_size:
                raise UserError(f"{path}: truncated header, {len(header)} bytes where {header_size} are needed")
            magic, *sizes = struct.unpack(f">{1 + dimensions}I", header)
            expected, shape = UNSIGNED_BYTE << 8 | dimensions, tuple(sizes)
            if magic != expected:
                kind = f"unsigned bytes, {dimensions} dimension{'s' if dimensions > 1 else ''}"
                raise UserError(f"{path}: magic number 0x{magic:08x}, expected 0x{expected:08x} ({kind})")
            if 0 in shape:
                raise UserError(f"{path}: holds no pixels, its shape is {shape}")
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise UserError(f"{path}: declares {size} bytes of data ({shape}), more than the limit of {MAX_BYTES}")
            values = stream.read(size)
            if len(values) < size:
                raise UserError(f"{path}: truncated, declares {size} values {shape} but holds {len(values)}")
            if stream.read(1):
                raise UserError(f"{path}: holds more than the {size} values {shape} that it declares")
    except FileError as error:
        raise UserError(str(error)) from error
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: could not be read: {error}") from error
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def read_idx_split(folder: Path, split: str, family: IdxFamily) -> tuple[np.ndarray, np.ndarray] | None:
    """Images `[N, H, W]` and labels `[N]`, both uint8, of `train` or `test`; None if the split has no files.

    Raises:
        UserError: a file is broken, one of the pair is missing, or the counts differ.
    """
    stems = family.stems(split)
    images_path, labels_path = (_find(folder, stem) for stem in stems)
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        missing = stems[0] if images_path is None else stems[1]
        raise UserError(f"{folder}: {missing} (raw or .gz) is missing beside its partner")
    images, labels = _pair(images_path, labels_path)
    return images.transpose(0, 2, 1) if family.subset is not None else images, labels


def _pair(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise UserError(f"{images_path} holds {len(images)} images but {labels_path} holds {len(labels)} labels")
    if images.size == 0:
        raise UserError(f"{images_path}: holds no pixels, its shape is {images.shape}")
    return images, labels


def read_loose_idx(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The splits of a folder of IDX files by other names, which hold the words `image` and `label`.

    Returns:
        Images `[N, H, W]` and labels `[N]`, both uint8, by the split that a word in the names stands for, `train` if
        none does; empty if there are no such files.

    Raises:
        UserError: a file is broken, has no partner, or there are several of a kind.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        role = next((role for role in ("image", "label") if role in path.name.lower()), None)
        if role is None or not path.is_file() or _magic(path) not in (0x801, 0x803):
            continue
        roles = found.setdefault(kind_in(path.name) or "train", {})
        if role in roles:
            raise UserError(f"{path} and {roles[role].name} could both hold the {role}s of one split; keep one")
        roles[role] = path
    for roles in found.values():
        if len(roles) < 2:
            [(role, path)] = roles.items()
            raise UserError(f"{path} has no partner with the {'labels' if role == 'image' else 'images'}")
    return {split: _pair(roles["image"], roles["label"]) for split, roles in found.items()}


def _magic(path: Path) -> int | None:
    """The first four bytes of a file, which may be gzipped, as a number."""
    try:
        with _unzipped(path) as stream:
            return int.from_bytes(stream.read(4), "big")
    except (EOFError, OSError, zlib.error, FileError):
        return None


@contextmanager
def _unzipped(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file, or what is in it if its first bytes say that it is gzipped."""
    with open_file(path) as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield gzip.GzipFile(fileobj=file) if zipped else file
