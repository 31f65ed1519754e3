"""Transform images: channels, size, augmentation, and from uint8 to [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_diffusion.config import AugmentConfig
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.option_types import Fit, Ground
from mnist_diffusion.seeds import numpy_generator

MOST_ALONG = 2**20
"""Pixels along the longer side of an image that is enlarged to cover a square."""


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Bring uint8 `[..., C, H, W]` to 1 (ITU-R 601 luma) or 3 channels."""
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    from torchvision.transforms.v2 import functional as transforms

    return transforms.rgb_to_grayscale(images, num_output_channels=1)


def fit_to_size(images: Tensor, size: int, fit: Fit, background: Ground = "black") -> Tensor:
    """Bring uint8 `[..., C, H, W]` to `size` x `size`.

    `contain` scales the longer side to `size` (antialiased) and pads with the background; `resize` scales the shorter
    side to `size` and crops the middle; `pad` only pads.

    Raises:
        DataError: one is too large for `pad`, or too thin for `resize`.
    """
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    from torchvision.transforms.v2 import functional as transforms

    if fit == "resize":
        if size * max(height, width) // min(height, width) > MOST_ALONG:
            raise DataError(f"an image of {width} x {height} pixels is too long for data.fit='resize'; use contain")
        return transforms.center_crop(transforms.resize(images, [size], antialias=True), [size])
    longer = max(height, width)
    if fit == "contain":
        height, width = (max(1, round(side * size / longer)) for side in (height, width))
        images = transforms.resize(images, [height, width], antialias=True)
    elif longer > size:
        raise DataError(
            f"data.fit='pad' cannot bring an image of {width} x {height} pixels to data.image_size={size}; "
            "use data.fit='contain' or a larger size"
        )
    top, left = (size - height) // 2, (size - width) // 2
    around = (left, size - width - left, top, size - height - top)
    return F.pad(images, around, value=255 * (background == "white"))


def edge_colour(images: Tensor) -> Tensor:
    """The median of the outermost pixels of uint8 `[..., C, H, W]`, as `[..., C, 1, 1]`."""
    sides = (images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1])
    return torch.cat(sides, dim=-1).median(dim=-1).values[..., None, None]


def filled_rows(rows: Sequence[Tensor], columns: int) -> Tensor:
    """Rows of images, each `[n, C, H, W]`, cut or filled with black to `columns` columns, one after the other."""
    return torch.cat([F.pad(row[:columns], (0, 0) * 3 + (0, max(0, columns - len(row)))) for row in rows])


def augment_images(images: Tensor, config: AugmentConfig, seed: int, epochs: np.ndarray, indices: np.ndarray) -> Tensor:
    """Augment uint8 `[B, C, H, W]`: the change to an image depends on seed, epoch and its index alone.

    What comes in from outside has the colour of the image's edge.
    """
    if config == AugmentConfig():
        return images
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as transforms

    augmented = []
    for image, epoch, index in zip(images, epochs, indices, strict=True):
        draw = numpy_generator(seed, "augment", int(epoch), int(index)).uniform(-1, 1, size=5)
        *way, turn, growth, flip = draw.tolist()
        flipped = transforms.horizontal_flip(image) if config.horizontal_flip and flip > 0 else image
        shift = [part * config.shift * images.shape[-1] for part in way]
        angle, scale = turn * config.rotate, 1 + growth * config.scale
        edge = edge_colour(image)
        moved = transforms.affine(flipped - edge.float(), angle, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR)
        augmented.append((moved + edge).round().byte())
    return torch.stack(augmented)


def similarity_transform(images: Tensor, angle: Tensor, scale: Tensor, shift: Tensor, padding: str = "zeros") -> Tensor:
    """Rotate, scale and shift each image of float `[B, C, H, W]`; differentiable.

    Args:
        images: the images.
        angle: radians, `[B]`.
        scale: the part of the image's side that fills the result, `[B]`.
        shift: along x and y, in halves of the side, `[B, 2]`.
        padding: what lies outside, as in `torch.nn.functional.grid_sample`.
    """
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def to_model_range(images: Tensor) -> Tensor:
    """From uint8 [0, 255] to float32 [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """From [-1, 1] to uint8 [0, 255], rounded and clamped."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
