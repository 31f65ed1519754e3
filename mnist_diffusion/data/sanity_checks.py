"""Data set checks that no single reader can make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from torch import Tensor

from mnist_diffusion.data.decoding import DataError, EncodedImages, opaque_pixels
from mnist_diffusion.data.layout import evenly, kind_in, listed
from mnist_diffusion.data.raw import RawSplit
from mnist_diffusion.data.transforms import edge_colour
from mnist_diffusion.option_types import Background, Ground

DARK = 32
INK = 64
"""Difference from the background that counts as content."""
NUM_DECODED = 200


def dataset_warnings(images: Iterable[Tensor], labels: Iterable[int], names: Sequence[str]) -> list[str]:
    """Warnings about training images, uint8 `[C, H, W]` each, and their classes, one sentence each."""
    warnings = []
    if all(name.isdecimal() for name in names) and [int(name) for name in names] != list(range(len(names))):
        pairs = listed(f"{place} is {name!r}" for place, name in enumerate(names))
        warnings.append(f"class names are numbers that differ from their labels: label {pairs}")
    if words := [name for name in names if kind_in(name) is not None]:
        warnings.append(
            f"WARNING: classes are called {listed(words)}, as splits are; check how the folders were interpreted"
        )
    ranges: dict[int, list[tuple[int, int]]] = {}
    for image, label in zip(images, labels, strict=True):
        ranges.setdefault(int(label), []).append((int(image.min()), int(image.max())))
    if (largest := max(high for each in ranges.values() for _, high in each)) < DARK:
        warnings.append(f"WARNING: the largest value is {largest} of 255, so all images are nearly black")
    if blank := [names[label] for label in sorted(ranges) if all(low == high for low, high in ranges[label])]:
        warnings.append(
            f"WARNING: all images of {'class' if len(blank) == 1 else 'classes'} {listed(blank)} are of one colour"
        )
    return warnings


def choose_background(split: RawSplit, background: Background) -> tuple[Ground, list[str]]:
    """The colour to put behind transparent pixels, and a note if there are any.

    `auto` is black, or white if more pictures nearly vanish on black than on white. A picture nearly vanishes if most
    of its opaque pixels hardly differ from the background.
    """
    lost: dict[Ground, int] = {"black": 0, "white": 0}
    transparent = 0
    if isinstance(split.images, EncodedImages):
        for index in evenly(len(split.labels), NUM_DECODED):
            pixels = None
            with contextlib.suppress(DataError):  # whoever needs this picture is told, or skips it
                pixels = opaque_pixels(split.images.read([index])[0], split.images.where(index))
            if pixels is not None and len(pixels):
                transparent += 1
                lost["black"] += bool((pixels.amax(dim=1) < INK).float().mean() > 0.5)
                lost["white"] += bool((pixels.amin(dim=1) > 255 - INK).float().mean() > 0.5)
    ground = background if background != "auto" else "white" if lost["black"] > lost["white"] else "black"
    if not transparent:
        return ground, []
    counted = f": of {transparent} pictures, {lost['black']} would nearly vanish on black and {lost['white']} on white"
    note = f"transparent pixels are filled with {ground}{counted if any(lost.values()) else ''}"
    return ground, [f"WARNING: {note}" if (background, ground) == ("auto", "white") else note]


def cropped_fraction(split: RawSplit) -> float:
    """The fraction of images that lose content when cropped to the middle square."""
    indices = evenly(len(split.labels), NUM_DECODED)
    return sum(_loses_content_when_cropped(split.images[index]) for index in indices) / max(1, len(indices))


def _loses_content_when_cropped(image: Tensor) -> bool:
    """Whether there is content outside the middle square of uint8 `[C, H, W]`."""
    height, width = image.shape[-2:]
    if height == width:
        return False
    upright = image if height > width else image.mT
    first = abs(height - width) // 2
    content = (upright.int() - edge_colour(upright).int()).abs() > INK
    return bool(content[:, :first].any() or content[:, first + min(height, width) :].any())
