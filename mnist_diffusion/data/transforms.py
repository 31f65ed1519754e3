"""Transform images: channels, size, augmentation, and from uint8 to [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_diffusion.config import AugmentConfig
from mnist_diffusion.seeds import numpy_generator


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Bring uint8 `[..., C, H, W]` to 1 (ITU-R 601 luma) or 3 channels."""
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    from torchvision.transforms.v2 import functional as transforms

    return transforms.rgb_to_grayscale(images, num_output_channels=1)


def fit_to_size(images: Tensor, size: int, fit: Literal["pad", "resize"]) -> Tensor:
    """Bring uint8 `[..., C, H, W]` to `size` x `size`.

    `pad` centres on black; `resize` brings the shorter side to `size` (antialiased) and crops the middle.

    Raises:
        ValueError: `pad` was asked for and the image is larger than `size`.
    """
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    if fit == "pad":
        if max(height, width) > size:
            raise ValueError(
                f"data.fit='pad' cannot bring an image of {width} x {height} pixels to data.image_size={size}; "
                "use data.fit='resize' or a larger size"
            )
        left, top = (size - width) // 2, (size - height) // 2
        return F.pad(images, (left, size - width - left, top, size - height - top))
    from torchvision.transforms.v2 import functional as transforms

    resized = transforms.resize(images, [size], antialias=True)
    return transforms.center_crop(resized, [size])


def filled_rows(rows: Sequence[Tensor], columns: int) -> Tensor:
    """Rows of images, each `[n, C, H, W]`, cut or filled with black to so many columns, one after the other."""
    return torch.cat([F.pad(row[:columns], (0, 0) * 3 + (0, max(0, columns - len(row)))) for row in rows])


def augment_images(images: Tensor, config: AugmentConfig, seed: int, epochs: np.ndarray, indices: np.ndarray) -> Tensor:
    """Augment uint8 `[B, C, H, W]`: the change to an image depends on seed, epoch and its index alone."""
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
        augmented.append(transforms.affine(flipped, angle, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR))
    return torch.stack(augmented)


def to_model_range(images: Tensor) -> Tensor:
    """From uint8 [0, 255] to float32 [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """From [-1, 1] to uint8 [0, 255], rounded and clamped."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
