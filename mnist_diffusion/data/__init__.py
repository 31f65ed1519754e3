"""Labelled images for training and for holding out, ready in memory as uint8."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.images import augment_images, fit_to_size, to_channels
from mnist_diffusion.data.sources import DataError, RawSplit, read_source
from mnist_diffusion.data.stateless import indices_of_step

__all__ = ["DataError", "ImageData", "ImageSplit", "draw_batch", "load_images"]

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class ImageSplit:
    """Images, uint8 `[N, C, H, W]`, and their class labels, int64 `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A training and a held-out split of the same classes and shape."""

    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    source_id: str
    source: str
    notice: str | None = None
    hub_id: str | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.train.images.shape[-1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shapes, pixels, labels and class names of both splits."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels):
                digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
                digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def describe(self) -> str:
        """Counts, shape and classes, a line each."""
        counts = torch.bincount(self.train.labels, minlength=self.num_classes).tolist()
        named = [f"{name}: {count}" for name, count in zip(self.class_names, counts, strict=True)]
        shown = ", ".join(named[:12]) + (f", and {len(named) - 12} more" if len(named) > 12 else "")
        colour = "grey" if self.channels == 1 else "RGB"
        return (
            f"source       {self.source}\n"
            f"images       {len(self.train)} to train on, {len(self.test)} held out, "
            f"{self.image_size} x {self.image_size} {colour}\n"
            f"classes      {self.num_classes} ({shown})\n"
            f"fingerprint  {self.fingerprint[:16]}"
        )


def load_images(config: DataConfig, *, seed: int) -> ImageData:
    """Read, decode, bring to one shape and split the images that `config` names.

    Args:
        config: the source and the shape wanted.
        seed: chooses the held-out tenth where the source has no split for it.

    Raises:
        DataError: the source cannot be had, is broken, or its images do not fit together.
    """
    source = read_source(config)
    if len(source.train.images) == 0 or (source.test is not None and len(source.test.images) == 0):
        raise DataError(f"{source.description}: a split holds no images")
    present = set(source.train.labels)
    if None in present or any(isinstance(label, int) and label < 0 for label in present):
        raise DataError(f"{source.description}: some images have no label")
    labels = sorted(present)
    if source.test is not None and (unknown := set(source.test.labels) - present):
        raise DataError(f"{source.description}: held-out classes without training images: {sorted(unknown)}")
    position = {label: index for index, label in enumerate(labels)}
    names = tuple((source.class_names or {}).get(label, str(label)) for label in labels)

    def labels_of(split: RawSplit) -> Tensor:
        return torch.tensor([position[label] for label in split.labels], dtype=torch.int64)

    channels = config.channels or max(image.shape[0] for image in source.train.images)
    train_images = _stack(source.train, channels, config, source.description)
    if (shape := tuple(train_images.shape[-2:]))[0] != shape[1]:
        raise DataError(f"{source.description}: images of {shape[1]} x {shape[0]} are not square; set data.image_size")
    train = ImageSplit(train_images, labels_of(source.train))
    if source.test is not None:
        test_images = _stack(source.test, channels, config, source.description)
        if test_images.shape[1:] != train_images.shape[1:]:
            raise DataError(
                f"{source.description}: training images are {tuple(train_images.shape[1:])} (C, H, W) but held-out "
                f"ones {tuple(test_images.shape[1:])}; set data.image_size and data.channels"
            )
        test = ImageSplit(test_images, labels_of(source.test))
    else:
        train, test = _hold_out(train, names, seed, source.description)
    return ImageData(train, test, names, source.identifier, source.description, source.notice, source.hub_id)


def _stack(split: RawSplit, channels: int, config: DataConfig, description: str) -> Tensor:
    """All images of a split as one uint8 tensor `[N, C, H, W]`."""
    if isinstance(split.images, Tensor):
        images = to_channels(split.images, channels)
        return _fit(images, config, description).contiguous()
    fitted = [_fit(to_channels(image, channels), config, description) for image in split.images]
    sizes = {tuple(image.shape[-2:]) for image in fitted}
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:3])
        raise DataError(f"{description}: images of different sizes ({shown}, ...); set data.image_size")
    return torch.stack(fitted)


def _fit(images: Tensor, config: DataConfig, description: str) -> Tensor:
    if config.image_size is not None:
        try:
            return fit_to_size(images, config.image_size, config.fit)
        except ValueError as error:
            raise DataError(f"{description}: {error}") from error
    return images


def _hold_out(images: ImageSplit, names: Sequence[str], seed: int, description: str) -> tuple[ImageSplit, ImageSplit]:
    """Split off a stratified tenth, at least one image a class, chosen by the seed."""
    from sklearn.model_selection import train_test_split  # noqa: PLC0415  (slow to import)

    counts = torch.bincount(images.labels, minlength=len(names))
    if (counts < 2).any():
        name = names[int(counts.argmin())]
        raise DataError(
            f"{description}: class {name!r} has {int(counts.min())} image, but holding out a test split needs 2 a class"
        )
    held_out = max(len(names), math.ceil(HELD_OUT_SHARE * len(images)))
    kept, taken = train_test_split(
        np.arange(len(images)), test_size=held_out, stratify=images.labels.numpy(), random_state=seed % 2**32
    )
    kept, taken = torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(taken))
    return (
        ImageSplit(images.images[kept], images.labels[kept]),
        ImageSplit(images.images[taken], images.labels[taken]),
    )


def draw_batch(data: ImageSplit, config: DataConfig, *, seed: int, step: int, part: slice) -> tuple[Tensor, Tensor]:
    """The part of a step's batch that one process works on.

    Args:
        data: the training split.
        config: gives the global batch size and the augmentation.
        seed: seed of the run.
        step: the step, 0 for the first.
        part: which of the global batch's images to give.

    Returns:
        uint8 images `[b, C, H, W]` and int64 labels `[b]`.
    """
    indices, epochs = indices_of_step(seed, step, config.batch_size, len(data))
    indices, epochs = indices[part], epochs[part]
    chosen = torch.from_numpy(indices)
    images = augment_images(data.images[chosen], config.augment, seed, epochs, indices)
    return images, data.labels[chosen]
