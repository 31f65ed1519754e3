"""Load labelled images as uint8 tensors of one shape, split into training and held-out images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.config import DataConfig, ImagesConfig
from mnist_diffusion.data.decoding import DataError, EncodedImages
from mnist_diffusion.data.layout import evenly
from mnist_diffusion.data.raw import RawSource, RawSplit
from mnist_diffusion.data.sanity_checks import cropped_fraction, dataset_warnings
from mnist_diffusion.data.sources import read_source
from mnist_diffusion.data.transforms import augment_images, fit_to_size, to_channels
from mnist_diffusion.option_types import Ground
from mnist_diffusion.seeds import Balance, indices_of_step

MEMORY_LIMIT_BYTES = 4 * 10**9
AT_A_TIME = 8
"""Images decoded at a time, at their original size."""
MANY = 20_000
"""A progress bar is shown from this many images on."""
HELD_OUT_SHARE = 0.1
NUM_CHECKED_IMAGES = 2000
"""Training images, evenly spread, that are checked for problems."""
ADVICE = "set data.image_size, and data.fit=contain to keep the whole of each"


@dataclass(frozen=True)
class ImageSplit:
    """Images, uint8 `[N, C, H, W]`, and their class labels, int64 `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def balance(self) -> Balance:
        """For drawing each class equally often."""
        return Balance(self.labels.numpy())

    def select(self, indices: Tensor) -> ImageSplit:
        """Some of the images, by index."""
        return ImageSplit(self.images[indices], self.labels[indices])

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """At most `count` images and their labels, spread evenly over all, which may be sorted by class."""
        indices = torch.tensor(evenly(len(self), count))
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True)
class ImageData:
    """A training and a held-out split of the same classes and shape."""

    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    source_id: str
    source: str
    notice: str | None = None
    notes: tuple[str, ...] = ()
    hub_id: str | None = None
    background: Ground = "black"

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
            digest.update(repr((tuple(split.images.shape), torch.uint8)).encode())
            digest.update(split.images.numpy().data)
            digest.update(repr((tuple(split.labels.shape), split.labels.dtype)).encode())
            digest.update(split.labels.numpy().data)
        return digest.hexdigest()

    @property
    def banner(self) -> str:
        """The notice, so that nobody overlooks it; empty if there is none."""
        return f"\n{'!' * 100}\n{self.notice}\n{'!' * 100}\n" if self.notice else ""

    @cached_property
    def counts(self) -> list[int]:
        """Training images of each class."""
        return torch.bincount(self.train.labels, minlength=self.num_classes).tolist()

    def describe(self) -> str:
        """Counts, shape and classes, one line each."""
        per_class = [f"{name}: {count}" for name, count in zip(self.class_names, self.counts, strict=True)]
        class_list = ", ".join(per_class[:12]) + (f", and {len(per_class) - 12} more" if len(per_class) > 12 else "")
        colour = "grey" if self.channels == 1 else "RGB"
        return (
            f"source       {self.source}\n"
            f"images       {len(self.train)} to train on, {len(self.test)} held out, "
            f"{self.image_size} x {self.image_size} {colour}\n"
            f"classes      {self.num_classes} ({class_list})\n"
            f"fingerprint  {self.fingerprint[:16]}" + "".join(f"\nnote         {note}" for note in self.notes)
        )


def load_images(config: ImagesConfig, *, seed: int) -> ImageData:
    """Read, decode, resize and split the images that `config` names.

    Args:
        config: the source, and the size and channels to convert the images to.
        seed: chooses the held-out tenth if the source has no test split.

    Raises:
        DataError: the source could not be read, its images do not fit together, or they do not fit into memory.
    """
    source = read_source(config)
    if config.skip_unreadable:
        source = _readable(source)
    name_of = source.names(config.class_names)
    position, names = {label: index for index, label in enumerate(name_of)}, tuple(name_of.values())

    shape = _common_shape(source, config)
    total = math.prod(shape) * sum(len(split.labels) for split in (source.train, source.test) if split is not None)
    if total > MEMORY_LIMIT_BYTES:
        limit = f"more than the limit of {MEMORY_LIMIT_BYTES / 1e9:g} GB"
        advice = "set a smaller data.image_size or data.channels=1, or use fewer images"
        raise DataError(f"{source.description}: the decoded images take {total / 1e9:.1f} GB, {limit}; {advice}")

    def preprocess(images: Tensor) -> Tensor:
        return fit_to_size(to_channels(images, shape[0]), shape[1], config.fit, source.background)

    def to_split(split: RawSplit) -> ImageSplit:
        labels = torch.tensor([position[label] for label in split.labels], dtype=torch.int64)
        if isinstance(split.images, Tensor):
            return ImageSplit(preprocess(split.images).contiguous(), labels)
        return ImageSplit(_decoded(split.images, preprocess, shape), labels)

    train = to_split(source.train)
    if source.test is not None:
        test = to_split(source.test)
    else:
        train, test = _hold_out(train, names, seed, source.description)
    notes = [*source.notes, *dataset_warnings(*train.spread(NUM_CHECKED_IMAGES), names)]
    if config.fit == "resize" and (cut := cropped_fraction(source.train)):
        notes.append(f"data.fit=resize crops content from {cut:.0%} of the images; data.fit=contain keeps it")
    source_id = config.source or source.hub_id or "digits"
    plain = (source_id, source.description, source.notice, tuple(notes), source.hub_id, source.background)
    return ImageData(train, test, names, *plain)


def _decoded(pictures: EncodedImages, preprocess: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> Tensor:
    """All pictures, each brought to the common shape."""
    images = torch.empty(len(pictures), *shape, dtype=torch.uint8)
    starts = range(0, len(pictures), AT_A_TIME)
    for start in tqdm(starts, desc="reading images", leave=False, disable=len(pictures) < MANY):
        indices = range(len(pictures))[start : start + AT_A_TIME]
        for index, image in zip(indices, pictures.decode(indices, grey=shape[0] == 1), strict=True):
            images[index] = preprocess(image)
    return images


def _readable(source: RawSource) -> RawSource:
    """A source without the pictures that cannot be decoded, and a note that says how many they are."""
    problems: list[str] = []

    def readable(split: RawSplit) -> RawSplit:
        if isinstance(split.images, Tensor):
            return split
        indices, count = [], len(split.labels)
        for index in tqdm(range(count), desc="trying images", leave=False, disable=count < MANY):
            try:
                split.images.decode([index])
                indices.append(index)
            except DataError as error:
                problems.append(str(error))
        if not indices and count:
            raise DataError(f"{source.description}: no picture of a split could be read: {problems[-1]}")
        return RawSplit(split.images.select(indices), [split.labels[index] for index in indices])

    train, test = readable(source.train), source.test and readable(source.test)
    note = f"{len(problems)} unreadable pictures skipped; the first: {problems[0]}" if problems else ""
    return replace(source, train=train, test=test, notes=(*source.notes, note) if note else source.notes)


def _shapes(split: RawSplit) -> set[tuple[int, ...]]:
    return {tuple(split.images.shape[1:])} if isinstance(split.images, Tensor) else set(split.images.shapes())


def _common_shape(source: RawSource, config: ImagesConfig) -> tuple[int, int, int]:
    """Channels, height and width that all images are brought to.

    Raises:
        DataError: they differ, and the configuration names no size.
    """
    size = config.image_size
    shapes = set() if size is not None and config.channels is not None else _shapes(source.train)
    channels = config.channels or max(shape[0] for shape in shapes)
    if size is not None:
        return channels, size, size
    sizes = {shape[1:] for shape in shapes | (_shapes(source.test) if source.test is not None else set())}
    if len(sizes) > 1:
        examples = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:3])
        raise DataError(f"{source.description}: images of different sizes ({examples}, ...); {ADVICE}")
    [(height, width)] = sizes
    if height != width:
        raise DataError(f"{source.description}: images of {width} x {height} are not square; {ADVICE}")
    return channels, height, width


def _hold_out(images: ImageSplit, names: Sequence[str], seed: int, description: str) -> tuple[ImageSplit, ImageSplit]:
    """Split off a stratified tenth, at least one image per class, chosen by the seed; identical images go together."""
    from sklearn.model_selection import train_test_split

    counts = torch.bincount(images.labels, minlength=len(names))
    if (counts < 2).any():
        rare = f"class {names[int(counts.argmin())]!r} has {int(counts.min())} image"
        raise DataError(f"{description}: {rare}, but a held-out split needs 2 per class")
    labels, numbers = images.labels.numpy(), _numbered(images)
    distinct = np.unique(numbers, return_index=True)[1]
    few = np.bincount(labels[distinct], minlength=len(names)) < 2  # classes of copies of one image, which stay apart
    numbers = np.where(few[labels], len(images) + np.arange(len(images)), numbers)
    distinct = np.sort(np.unique(numbers, return_index=True)[1])
    held_out = max(len(names), math.ceil(HELD_OUT_SHARE * len(distinct)))
    train_indices, test_indices = train_test_split(
        distinct, test_size=held_out, stratify=labels[distinct], random_state=seed % 2**32
    )
    for label in {*range(len(names))} - {*labels[test_indices].tolist()}:  # a class too small for its share
        one = train_indices[labels[train_indices] == label][:1]
        train_indices, test_indices = np.setdiff1d(train_indices, one), np.append(test_indices, one)
    is_taken = torch.from_numpy(np.isin(numbers, numbers[test_indices]))
    return images.select((~is_taken).nonzero().flatten()), images.select(is_taken.nonzero().flatten())


def _numbered(images: ImageSplit) -> np.ndarray:
    """A number for each image, the same for identical ones."""
    seen: dict[bytes, int] = {}
    digests = (hashlib.sha256(image.numpy().tobytes()).digest() for image in images.images)
    return np.array([seen.setdefault(digest, len(seen)) for digest in digests])


def draw_batch(data: ImageSplit, config: DataConfig, *, seed: int, step: int, part: slice) -> tuple[Tensor, Tensor]:
    """The part of a step's batch that one process works on.

    Args:
        data: the training split.
        config: gives the global batch size and the augmentation.
        seed: seed of the run.
        step: the step, 0 for the first.
        part: which images of the global batch to give.

    Returns:
        uint8 images `[b, C, H, W]` and int64 labels `[b]`.
    """
    balance = data.balance if config.balance else None
    indices, epochs = indices_of_step(seed, step, config.batch_size, len(data), balance=balance)
    indices, epochs = indices[part], epochs[part]
    rows = torch.from_numpy(indices)
    return augment_images(data.images[rows], config.augment, seed, epochs, indices), data.labels[rows]
