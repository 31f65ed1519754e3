"""Encoded images: their shapes from the headers, their pixels on request."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import MAX_PIXELS, PICTURE_FORMATS, read_bytes
from mnist_diffusion.option_types import Ground

CHUNK = 256
MAX_BYTES = 256 * 2**20
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L")
UNBOUNDED_MODES = ("I", "F")
"""32 bits per pixel, without a value that is white."""
GREY_MODES = ("1", "L", "LA", *SIXTEEN_BIT_MODES)
MIN_SIXTEEN_BIT_WHITE = 4096
"""A largest value below this means that only 8 or 12 of 16 bits are used."""
MAX_CAUSE = 500
HALF_OPAQUE = 128
ORIENTATION = 0x0112
"""The EXIF tag whose values from 5 to 8 lay a picture on its side."""


class DataError(UserError):
    """The images could not be read or cannot be used; the message says what was looked for and where."""


Encoded = bytes | np.ndarray
"""A picture file's content, or pixel values as `to_images` takes them."""


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of any sizes, read and decoded by index.

    Args:
        count: how many there are.
        read: reads the images of these indices.
        where: names an image, for messages.
        background: colour behind transparent pixels.
    """

    count: int
    read: Callable[[Sequence[int]], list[Encoded]]
    where: Callable[[int], str]
    background: Ground = "black"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.decode([index])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(self.count))

    def decode(self, indices: Sequence[int], *, grey: bool = False) -> list[Tensor]:
        """Images as uint8 `[C, H, W]`: grey if a picture is grey or `grey` asks for it, else RGB.

        Raises:
            DataError: one could not be decoded; the message names it.
        """
        pairs = zip(indices, self.read(indices), strict=True)
        return [decode_picture(each, self.where(index), grey=grey, background=self.background) for index, each in pairs]

    def select(self, selection: Sequence[int]) -> EncodedImages:
        """Some of the pictures, by index."""
        return replace(
            self,
            count=len(selection),
            read=lambda indices: self.read([selection[index] for index in indices]),
            where=lambda index: self.where(selection[index]),
        )

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """Channels, height and width of each, from its header.

        Raises:
            DataError: one is not a picture, or is too large; the message names it.
        """
        for start in range(0, self.count, CHUNK):
            indices = range(self.count)[start : start + CHUNK]
            for index, encoded in zip(indices, self.read(indices), strict=True):
                yield picture_shape(encoded, self.where(index))


def encoded_files(names: Sequence[str], read: Callable[[str], bytes], where: str) -> EncodedImages:
    """Picture files, by their names in a folder or an archive."""
    return EncodedImages(len(names), lambda indices: [read(names[i]) for i in indices], lambda i: f"{where}/{names[i]}")


def read_file(path: Path) -> bytes:
    """Read a whole file into memory.

    Raises:
        DataError: it could not be read, is not a regular file, or is too large.
    """
    try:
        return read_bytes(path, MAX_BYTES)
    except FileError as error:
        raise DataError(str(error)) from error


def picture_shape(encoded: Encoded, where: str) -> tuple[int, int, int]:
    """Channels, height and width of a picture, upright.

    Raises:
        DataError: it is not a picture, or is too large.
    """
    if isinstance(encoded, np.ndarray):
        channels, height, width = to_images(encoded[None], where, factor=1)[0].shape
        return channels, height, width
    with _opened(encoded, where) as picture, wrap_errors(f"{where}: the picture could not be read"):
        width, height = picture.size
        # If its header has no such tag, Pillow would decode the whole PNG.
        if "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        return 1 if picture.mode in (*GREY_MODES, *UNBOUNDED_MODES) else 3, height, width


def decode_picture(
    encoded: Encoded, where: str, *, grey: bool = False, background: Ground = "black", max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A picture as uint8 `[C, H, W]`, upright: grey if it is grey or `grey` asks for it, else RGB.

    Of 16 bits the upper eight are kept. Transparent pixels show the background.

    Raises:
        DataError: it could not be decoded, is too large, or uses only the lower ones of 16 bits.
    """
    if isinstance(encoded, np.ndarray):
        return to_images(encoded[None], where, factor=1)[0]
    with _opened(encoded, where, max_pixels) as opened, wrap_errors(f"{where}: the picture could not be decoded"):
        picture = ImageOps.exif_transpose(opened)
        if picture.mode in SIXTEEN_BIT_MODES or picture.mode in UNBOUNDED_MODES:
            values = np.asarray(picture)
            if 0 < (largest := int(values.max())) < MIN_SIXTEEN_BIT_WHITE:
                raise DataError(
                    f"{where}: the largest value is {largest}, but white in 16 bits is 65535; save it with 8 bits"
                )
            picture = Image.fromarray((values >> 8).astype(np.uint8))
        grey = grey or picture.mode in GREY_MODES
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
        pixels = torch.from_numpy(np.array(picture.convert("L" if grey else "RGB")))
    return pixels[None] if grey else pixels.permute(2, 0, 1)


def opaque_pixels(encoded: Encoded, where: str) -> Tensor | None:
    """The pixels of a picture that hide what is behind it, uint8 `[N, 3]`; None if all do.

    Raises:
        DataError: it could not be decoded, or is too large.
    """
    if isinstance(encoded, np.ndarray):
        return None
    with _opened(encoded, where) as picture, wrap_errors(f"{where}: the picture could not be decoded"):
        if picture.has_transparency_data:
            pixels = torch.from_numpy(np.array(picture.convert("RGBA")))
            opaque = pixels[..., 3] >= HALF_OPAQUE
            return None if opaque.all() else pixels[opaque][:, :3]
    return None


def _opened(encoded: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(encoded), formats=PICTURE_FORMATS)
        width, height = picture.size
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        problem = "is too large" if isinstance(error, Image.DecompressionBombError) else "could not be decoded"
        reason = _identify_non_image(encoded) if unknown else cause(error)
        raise DataError(f"{where}: the picture {problem}: {reason}") from error
    if picture.mode in UNBOUNDED_MODES and picture.format != "PPM":  # whose values Pillow brings to 16 bits
        raise DataError(f"{where}: a picture of mode {picture.mode!r} has no known range; save it with 8 or 16 bits")
    if width * height > max_pixels:
        raise DataError(f"{where}: a picture of {width} x {height} pixels, more than the limit of {max_pixels}")
    return picture


def _identify_non_image(content: bytes) -> str:
    """Why a file is not an image."""
    start = content[:200].lstrip().lower()
    if not content:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the files with `git lfs pull`"
    html = start.startswith((b"<!doctype html", b"<html"))
    return "it is an HTML page, not a picture" if html else "it is damaged, or of an unknown format"


def pixel_factor(largest: float, where: str) -> int:
    """The factor that scales pixel values to [0, 255]: 255 if the largest is at most 1, else 1.

    Raises:
        DataError: the largest is above 1 and below 32, so that all pictures would be black.
    """
    if 1 < largest < 32:
        raise DataError(f"{where}: the largest pixel value is {largest:g}; they must go from 0 to 255, or from 0 to 1")
    return 255 if largest <= 1 else 1


def to_images(values: np.ndarray, where: str, *, factor: int | None = None) -> Tensor:
    """Pixel values `[N, H, W]`, `[N, H, W, C]`, `[N, C, H, W]` or `[N, P]` of square images as uint8 `[N, C, H, W]`.

    Args:
        values: whole numbers from 0 to 255, or numbers that the factor brings there.
        where: for messages.
        factor: multiplies the values; None takes 255 if none is above 1, else 1.

    Raises:
        DataError: the shape or the values are not as above, or an image is too large.
    """
    if values.ndim == 2 and (side := math.isqrt(values.shape[1])) ** 2 == values.shape[1]:
        values = values.reshape(len(values), side, side)
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim == 4 and values.shape[-1] not in (1, 3):
        values = values.transpose(0, 2, 3, 1)
    if values.ndim != 4 or values.shape[-1] not in (1, 3) or values.dtype.kind not in "buif" or values.size == 0:
        raise DataError(f"{where}: no images of 1 or 3 channels, the shape is {values.shape}, the type {values.dtype}")
    if math.prod(values.shape[1:3]) > MAX_PIXELS:
        size = f"{values.shape[2]} x {values.shape[1]}"
        raise DataError(f"{where}: a picture of {size} pixels, more than the limit of {MAX_PIXELS}")
    least, largest = float(values.min()), float(values.max())
    if not (least >= 0 and largest <= 255):  # NaN passes no comparison
        raise DataError(f"{where}: pixel values must go from 0 to 255, or from 0 to 1, got {least:g} to {largest:g}")
    factor = pixel_factor(largest, where) if factor is None else factor
    if factor != 1:
        values = (values * float(factor)).round()
    elif values.dtype.kind == "f" and (values != np.floor(values)).any():
        raise DataError(f"{where}: pixel values must be whole numbers from 0 to 255, got fractions")
    return torch.from_numpy(np.ascontiguousarray(values.astype(np.uint8).transpose(0, 3, 1, 2)))


@contextlib.contextmanager
def wrap_errors(message: str) -> Iterator[None]:
    """Turn an exception into a `DataError` of this message and its cause."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{message}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """The root of a chain of exceptions in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_CAUSE]}"
