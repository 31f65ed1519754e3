"""Say what looks wrong about images that could be read: one net for all that a reader cannot know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mnist_diffusion.data.layout import listed, split_kind
from mnist_diffusion.data.raw import RawSplit, numbering
from mnist_diffusion.data.transforms import background_of

DARK = 32
INK = 64
"""How much a value differs from the background where something is drawn."""
DECODED = 200


def doubts(images: Iterable[Tensor], labels: Iterable[int], names: Sequence[str]) -> list[str]:
    """Doubts about training images, uint8 `[C, H, W]` each, and their classes, one sentence each."""
    found = [] if (note := numbering(names)) is None else [note]
    if words := [name for name in names if split_kind(name) is not None]:
        found.append(f"WARNING: classes are called {listed(words)}, as splits are; see what was taken for a class")
    ranges: dict[int, list[tuple[int, int]]] = {}
    for image, label in zip(images, labels, strict=True):
        ranges.setdefault(int(label), []).append((int(image.min()), int(image.max())))
    if (largest := max(high for each in ranges.values() for _, high in each)) < DARK:
        found.append(f"WARNING: the largest value is {largest} of 255, so that all images are nearly black")
    if blank := [names[label] for label in sorted(ranges) if all(low == high for low, high in ranges[label])]:
        found.append(
            f"WARNING: all images of {'class' if len(blank) == 1 else 'classes'} {listed(blank)} are of one colour; "
            "if they are drawn in black on transparency, set data.background=white"
        )
    return found


def share_cut(split: RawSplit) -> float:
    """The share of images that lose something that is drawn, if the middle is cropped to a square."""
    count = len(split.labels)
    chosen = torch.linspace(0, count - 1, min(DECODED, count)).round().long().tolist()

    def images() -> Iterator[Tensor]:
        if isinstance(split.images, Tensor):
            yield from split.images[chosen]
            return
        for index in chosen:
            yield split.images.decode([index])[0]

    return sum(_loses(image) for image in images()) / max(1, len(chosen))


def _loses(image: Tensor) -> bool:
    """Whether something is drawn outside the middle square of uint8 `[C, H, W]`."""
    height, width = image.shape[-2:]
    if height == width:
        return False
    upright = image if height > width else image.mT
    first = abs(height - width) // 2
    drawn = (upright.int() - background_of(upright, "edge").int()).abs() > INK
    return bool(drawn[:, :first].any() or drawn[:, first + min(height, width) :].any())
