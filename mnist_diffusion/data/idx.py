"""The IDX format of the MNIST family, read with its bounds checked.

A file is a magic number (two zero bytes, a type code, the number of dimensions), the size of each dimension
as a big-endian uint32, then the values. Format: http://yann.lecun.com/exdb/mnist/ (archived).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.decoding import DataError, wrap_errors
from mnist_diffusion.data.layout import JUNK, Layout, kind_in
from mnist_diffusion.data.raw import RawSource, RawSplit, source_of
from mnist_diffusion.files import open_file

IMAGES, LABELS = 0x803, 0x801
"""Magic numbers: unsigned bytes in three dimensions, and in one."""
MAX_BYTES = 8 * 2**30
EMNIST = re.compile(r"emnist-(\w+)-(train|test)-")
NAMED = {"fashionmnist": "FashionMNIST", "kmnist": "KMNIST"}
"""Folders whose class names are those of a class of `torchvision.datasets`."""


def read_idx_folder(folder: Path, config: ImagesConfig) -> RawSource | None:
    """Read the IDX files of a folder, or of torchvision's `<name>/raw` below it; None if there are none.

    File names contain `image` or `label` and, optionally, a word for the split.

    Raises:
        DataError: there are several data sets, the subset is not there or is needed, or a file is broken.
    """
    for places in ([folder], [folder / "raw"], sorted(folder.glob("*/raw"))):
        by_folder = {place: files for place in places if (files := _idx_files(place))}
        if len(by_folder) > 1:
            names = ", ".join(str(place.parent) for place in by_folder)
            raise DataError(f"{folder} holds several data sets; name one of {names}")
        for place, files in by_folder.items():
            return _read_files(place, files, config)
    return None


def _idx_files(folder: Path) -> list[Path]:
    """The IDX files of a folder, by name or first bytes; a .gz is skipped if its unpacked copy is there."""
    by_name: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".gz") if folder.is_dir() else ():
        name = path.name.lower()
        if JUNK.fullmatch(name) or not re.search("image|label", name) or not path.is_file():
            continue
        if re.search(r"ubyte(\.gz)?$", name) or _magic(path) in (IMAGES, LABELS):
            by_name[name.removesuffix(".gz").replace(".idx", "-idx")] = path
    return sorted(by_name.values())


def _read_files(folder: Path, files: list[Path], config: ImagesConfig) -> RawSource:
    part_of = {path: match[1] if (match := EMNIST.match(path.name)) else None for path in files}
    parts = sorted({part for part in part_of.values() if part is not None})
    if config.subset not in (None, *parts) or (config.subset is None and len(parts) > 1):
        problem = f"data.subset={config.subset!r} must name one of the subsets of {folder}"
        raise DataError(f"{problem}: {', '.join(parts) or 'there are none'}")
    subset = config.subset or next(iter(parts), None)
    pairs: dict[str, dict[str, Path]] = {}
    for path in (path for path, part in part_of.items() if part == subset):
        role = "images" if "image" in path.name.lower() else "labels"
        pair = pairs.setdefault(kind_in(path.name) or "train", {})
        if role in pair:
            raise DataError(f"{path} and {pair[role].name} could both hold the {role} of one split; keep one")
        pair[role] = path
    splits = {split: _read_pair(pair, subset is not None) for split, pair in pairs.items()}
    place = folder.resolve().parent if folder.resolve().name == "raw" else folder.resolve()
    dataset = NAMED.get(re.sub("[-_]", "", place.name.lower())) if subset is None else "EMNIST"
    title = f", {dataset}{f' {subset}' if subset else ''}" if dataset else ""
    source = source_of(f"{folder} (IDX{title})", splits, config, Layout(has_subsets=True))
    return replace(source, class_names=_class_names(dataset, subset))


def _class_names(dataset: str | None, part: str | None) -> dict[int, str] | None:
    if dataset is None:
        return None
    from torchvision import datasets

    known = getattr(datasets, dataset)
    return dict(enumerate(known.classes if part is None else known.classes_split_dict.get(part, ())))


def _read_pair(pair: dict[str, Path], turned: bool) -> RawSplit:
    """The images and labels of a split; EMNIST has rows and columns exchanged."""
    if len(pair) < 2:
        [(role, path)] = pair.items()
        raise DataError(f"{path} has no file of {'labels' if role == 'images' else 'images'} beside it")
    images, labels = read_idx(pair["images"], dimensions=3), read_idx(pair["labels"], dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{pair['images']} holds {len(images)} images but {pair['labels']} {len(labels)} labels")
    images = images.transpose(0, 2, 1) if turned else images
    return RawSplit(torch.from_numpy(images.copy()).unsqueeze(1), labels.tolist())


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
    with wrap_errors(f"{path}: could not be read"), _unzipped(path) as stream:
        header = stream.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions:
            raise DataError(f"{path}: truncated header of {len(header)} bytes")
        magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
        if magic != (expected := 0x800 | dimensions):
            raise DataError(f"{path}: magic number 0x{magic:08x}, expected 0x{expected:08x} (unsigned bytes)")
        if not 0 < (size := math.prod(shape)) <= MAX_BYTES:
            problem = f"more than the limit of {MAX_BYTES}" if size else "so it holds no pixels"
            raise DataError(f"{path}: declares {size} bytes of data ({shape}), {problem}")
        values = stream.read(size + 1)
        if len(values) != size:
            held = "more" if len(values) > size else len(values)
            raise DataError(f"{path}: declares {size} values {shape} but holds {held}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _magic(path: Path) -> int | None:
    """The first four bytes of a file, which may be gzipped, as a number."""
    with contextlib.suppress(EOFError, OSError, ValueError, zlib.error), _unzipped(path) as stream:
        return int.from_bytes(stream.read(4), "big")
    return None


@contextlib.contextmanager
def _unzipped(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file, or what is in it if its first bytes say that it is gzipped."""
    with open_file(path) as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield gzip.GzipFile(fileobj=file) if zipped else file
