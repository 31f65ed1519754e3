"""Decode images when they are needed, so that a data set may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.data.decoding import CHUNK, EncodedImages

MANY = 20_000
AT_ONCE = 8
"""Images decoded at once at their original size, which may be large."""


class LazyImages:
    """Stands for a uint8 tensor `[N, C, H, W]` and is indexed like one.

    Args:
        pictures: where they come from.
        preprocess: converts a decoded image to the common shape.
        shape: that shape, `(C, H, W)`.
        chosen: which of the pictures, int64 `[N]`; all if omitted.
    """

    def __init__(
        self,
        pictures: EncodedImages,
        preprocess: Callable[[Tensor], Tensor],
        shape: tuple[int, int, int],
        chosen: Tensor | None = None,
    ):
        self.pictures, self.preprocess, self._shape = pictures, preprocess, shape
        self.chosen = torch.arange(len(pictures)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the tensor it stands for."""
        return (len(self), *self._shape)

    def __getitem__(self, wanted: Tensor | slice) -> Tensor:
        """Decode some of the images.

        Raises:
            DataError: one could not be decoded; the message names it.
        """
        indices = self.chosen[wanted].tolist()
        if not indices:
            return torch.empty(0, *self._shape, dtype=torch.uint8)
        images = torch.empty(len(indices), *self._shape, dtype=torch.uint8)
        for start in range(0, len(indices), AT_ONCE):
            decoded = self.pictures.decode(indices[start : start + AT_ONCE], grey=self._shape[0] == 1)
            for place, image in enumerate(decoded, start):
                images[place] = self.preprocess(image)
        return images

    def select(self, wanted: Tensor) -> LazyImages:
        """Some of the images, still encoded."""
        return LazyImages(self.pictures, self.preprocess, self._shape, self.chosen[wanted])

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
