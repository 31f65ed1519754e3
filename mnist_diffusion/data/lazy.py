"""Decode images when they are needed, so that a data set may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.data.decoding import CHUNK, EncodedImages

MANY = 20_000
AT_ONCE = 8
"""Images decoded at once at their original size, which may be large."""


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Stands for a uint8 tensor `[N, C, H, W]` and is indexed like one.

    Args:
        pictures: where they come from.
        preprocess: converts a decoded image to the common shape.
        image_shape: that shape, `(C, H, W)`.
    """

    pictures: EncodedImages
    preprocess: Callable[[Tensor], Tensor]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the tensor it stands for."""
        return (len(self), *self.image_shape)

    def __getitem__(self, wanted: Tensor | slice) -> Tensor:
        """Decode some of the images.

        Raises:
            DataError: one could not be decoded; the message names it.
        """
        indices = [*range(len(self))[wanted]] if isinstance(wanted, slice) else wanted.tolist()
        images = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        for start in range(0, len(indices), AT_ONCE):
            decoded = self.pictures.decode(indices[start : start + AT_ONCE], grey=self.image_shape[0] == 1)
            for place, image in enumerate(decoded, start):
                images[place] = self.preprocess(image)
        return images

    def select(self, wanted: Tensor) -> LazyImages:
        """Some of the images, still encoded."""
        return replace(self, pictures=self.pictures.select(wanted.tolist()))

    def chunks(self) -> Iterator[Tensor]:
        """All images, a few at a time, with a progress bar if it takes long."""
        starts = range(0, len(self), CHUNK)
        for start in tqdm(starts, desc="reading images", leave=False, disable=len(self) < MANY):
            yield self[start : start + CHUNK]

    def decoded(self) -> Tensor:
        """The tensor it stands for."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        for index, chunk in enumerate(self.chunks()):
            images[index * CHUNK : index * CHUNK + len(chunk)] = chunk
        return images
