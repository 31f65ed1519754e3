"""Read images to evaluate from files that any program made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.decoding import DataError, encoded_files, read_file
from mnist_diffusion.data.sources import read_source
from mnist_diffusion.data.trees import PICTURE_SUFFIX, TEXT_SUFFIXES
from mnist_diffusion.evaluation.draw import MIN_IMAGES, Sample
from mnist_diffusion.option_types import Ground
from mnist_diffusion.plots.grids import SHEETS, file_names

PARTS_OF_A_RUN = ("unet", "scheduler", "pipeline", "config.yaml")
# The second prefix is that of version 0.2.0.
LABELLED_NAME = re.compile(r"(?:class|digit)_(?P<name>.+)_\d+")


def read_sample(path: Path, data: ImageData) -> Sample:
    """Read images that any program wrote: whatever can be trained on, or a flat folder.

    In a flat folder the class is read from names such as `class_3_000.png`, which `mnist-diffusion sample --files`
    writes, or from a table. With other names, and where labels and folders name none of the classes, the images have no
    classes, and no class accuracy.

    Raises:
        DataError: the images could not be read, are too few, or differ from the data in size, channels or classes.
    """
    images, names = (_read_flat if _is_flat(path) else _read_labelled)(path, data.background)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise DataError(f"{path}: images of different shapes (C, H, W): {sorted(shapes)[:3]}")
    stacked = torch.stack(images)
    if data.channels == 1 and stacked.shape[1] == 3:  # grey pictures that were saved as RGB
        if not (stacked == stacked[:, :1]).all():
            raise DataError(f"{path}: the images are RGB, but the reference images are grey")
        stacked = stacked[:, :1]
    if tuple(stacked.shape[1:]) != (expected := tuple(data.train.images.shape[1:])):
        raise DataError(
            f"{path}: images have shape {tuple(stacked.shape[1:])} (C, H, W), but the reference images {expected}"
        )
    labels = None
    known = {name: index for index, name in enumerate(data.class_names)}
    known |= {name: index for index, name in enumerate(file_names(data.class_names))} if _is_flat(path) else {}
    if names is not None and not _is_flat(path) and not set(names) & set(known):
        print(f"note: {path} names none of the classes, so it is scored without labels; got {sorted(set(names))[:5]}")
        names = None
    if names is not None:
        if unknown := sorted(set(names) - set(known)):
            raise DataError(f"{path}: classes {unknown[:5]} are not among the real ones {list(known)[:20]}")
        labels = torch.tensor([known[name] for name in names])
        if missing := [name for index, name in enumerate(data.class_names) if index not in labels]:
            raise DataError(f"{path}: no images of the classes {missing[:20]}")
    if len(stacked) < MIN_IMAGES:
        raise DataError(f"{path}: found {len(stacked)} images; at least {MIN_IMAGES} are needed")
    return Sample(stacked, labels)


def _is_flat(path: Path) -> bool:
    """Whether pictures lie in a folder itself, with their classes in their names or no table beside them."""
    files = [*path.iterdir()] if path.is_dir() else []
    pictures = [file for file in files if PICTURE_SUFFIX.fullmatch(file.suffix.lower())]
    labelled = sum(LABELLED_NAME.fullmatch(file.stem) is not None for file in pictures) * 2 > len(pictures)
    return bool(pictures) and (labelled or not any(file.suffix.lower() in TEXT_SUFFIXES for file in files))


def _read_flat(folder: Path, background: Ground) -> tuple[list[Tensor], list[str] | None]:
    pictures = (file for file in folder.iterdir() if PICTURE_SUFFIX.fullmatch(file.suffix.lower()))
    files = sorted(file for file in pictures if file.name not in SHEETS)
    encoded = encoded_files([file.name for file in files], lambda name: read_file(folder / name), str(folder))
    images = list(tqdm(replace(encoded, background=background), desc="reading", leave=False))
    matches = [LABELLED_NAME.fullmatch(file.stem) for file in files]
    if any(matches) and not all(matches):
        stray = next(file.name for file, match in zip(files, matches, strict=True) if match is None)
        raise DataError(f"{folder}: {stray!r} names no class, but other files do (class_<class>_<number>.png)")
    return images, [match["name"] for match in matches if match] or None


def _read_labelled(path: Path, background: Ground) -> tuple[list[Tensor], Sequence[str]]:
    if any((path / name).exists() for name in PARTS_OF_A_RUN):
        raise DataError(
            f"source={str(path)!r} looks like a run folder or an incomplete pipeline folder: name the pipeline folder "
            "in it, which has a model_index.json"
        )
    try:
        source = read_source(ImagesConfig(source=str(path), background=background))
    except DataError as error:
        raise DataError(f"source: {str(error).replace('data.source=', '')}") from error
    if len(source.train.images) == 0:
        raise DataError(f"{path} holds no images")
    names = source.class_names or {}
    return list(source.train.images), [str(names.get(label, label)) for label in source.train.labels]
