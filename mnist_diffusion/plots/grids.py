"""Arrange images into pictures: tensors in, PIL images out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mnist_diffusion.files import replace_picture

SHEETS = ("grid.png", "guidance.png", "interpolation.png")
"""The sheets that `mnist-diffusion sample` writes beside single files."""
MARGIN = 2
INK = "#ebebeb"
TITLE_SIZE = 14
MAX_LABEL = 40
FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
"""The font of matplotlib's figures."""


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


@lru_cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(FONT).get_charmap())


def drawable(label: str) -> str:
    """A label as it can be drawn: cut if it is long; with code points in place of letters that the font lacks."""
    label = label if len(label) <= MAX_LABEL else f"{label[:MAX_LABEL]}…"
    known = frozenset(map(ord, label)) - {ord("\n")} <= _glyphs()
    return label if known else label.encode("ascii", "backslashreplace").decode()


def image_grid(
    images: Tensor,
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
    min_side: int = 40,
) -> Image.Image:
    """A sheet of images, row by row.

    Args:
        images: float `[N, C, H, W]` in [0, 1], with one or three channels.
        columns: images per row.
        row_labels: a name for each row, written to its left.
        column_labels: a name for each column, written above it.
        title: written above the sheet.
        min_side: small images are enlarged by a whole factor until they have at least this many pixels per side.

    Returns:
        A PIL image, mode L or RGB.
    """
    height, width = images.shape[-2:]
    factor = max(1, -(-min_side // height))
    cell_width, cell_height = width * factor + MARGIN, height * factor + MARGIN
    rows = -(-len(images) // columns)
    row_labels = [drawable(label) for label in row_labels or ()]
    row_font = _font(max(11, min(15, cell_height // 3)))
    left = int(max(map(row_font.getlength, row_labels))) + 4 * MARGIN if row_labels else 0
    heading_size = _fitting_size(column_labels or (), cell_width - MARGIN)
    heading_lines = max((label.count("\n") + 1 for label in column_labels or ()), default=0)
    top = heading_lines * (heading_size + 3) + 2 * MARGIN if heading_lines else 0
    mode = "L" if images.shape[1] == 1 else "RGB"
    sheet = Image.new(mode, (left + columns * cell_width + MARGIN, top + rows * cell_height + MARGIN), 0)
    for index, picture in enumerate(to_pictures(images)):
        tile = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        sheet.paste(tile, (left + MARGIN + column * cell_width, top + MARGIN + row * cell_height))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(row_labels):
        middle = top + MARGIN + row * cell_height + cell_height // 2
        draw.text((2 * MARGIN, middle), label, fill=INK, font=row_font, anchor="lm")
    for column, label in enumerate(column_labels or ()):
        middle = left + MARGIN + column * cell_width + cell_width // 2
        draw.text((middle, top // 2), label, fill=INK, font=_font(heading_size), anchor="mm", align="center")
    return sheet if title is None else titled(sheet, title)


def _fitting_size(labels: Sequence[str], width: int) -> int:
    """The largest font from 8 to 12 points in which every line of the labels is at most `width` pixels wide."""
    lines = [line for label in labels for line in label.split("\n")]
    fitting = (size for size in range(12, 8, -1) if all(_font(size).getlength(line) <= width for line in lines))
    return next(fitting, 8)


def titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture below a line of text, and as wide as the text needs."""
    font = _font(TITLE_SIZE)
    width = max(picture.width, int(font.getlength(title)) + 4 * MARGIN)
    sheet = Image.new(picture.mode, (width, picture.height + 2 * TITLE_SIZE), 0)
    sheet.paste(picture, (0, 2 * TITLE_SIZE))
    ImageDraw.Draw(sheet).text((2 * MARGIN, TITLE_SIZE), title, fill=INK, font=font, anchor="lm")
    return sheet


def side_by_side(pictures: Sequence[tuple[str, Image.Image]], *, gap: int = 12) -> Image.Image:
    """Pictures in a row, each below its title.

    Args:
        pictures: title and picture, of any size, mode L or RGB.
        gap: pixels between them.
    """
    mode = "RGB" if any(picture.mode == "RGB" for _, picture in pictures) else "L"
    parts = [titled(picture.convert(mode), title) for title, picture in pictures]
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    sheet = Image.new(mode, (width, max(part.height for part in parts)), 0)
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + gap
    return sheet


def file_names(names: Sequence[str]) -> list[str]:
    """Class names for use in file names, made unique with class numbers where necessary."""
    short = ["".join(letter if letter.isalnum() else "_" for letter in name[:MAX_LABEL]) for name in names]
    if len(set(map(str.lower, short))) == len(short):  # some file systems take upper and lower case for the same
        return short
    return [f"{label}_{name}" for label, name in enumerate(short)]


def to_unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], clamped."""
    return images.float().add(1).div(2).clamp(0, 1)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """PIL images, mode L or RGB, of float `[N, C, H, W]` in [0, 1]."""
    pixels = (images.clamp(0, 1) * 255).round().byte().cpu()
    return [
        Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()) for image in pixels
    ]


def save_animation(frames: Sequence[Image.Image], path: Path, *, milliseconds: int = 150) -> None:
    """Write frames atomically as a looping GIF that rests on its last frame."""
    replace_picture(frames[0], path, **animation(frames, milliseconds=milliseconds))


def animation(frames: Sequence[Image.Image], *, milliseconds: int = 150) -> dict[str, Any]:
    """Arguments for saving the first frame as a looping GIF of all of them, which rests on the last."""
    durations = [milliseconds] * (len(frames) - 1) + [8 * milliseconds]
    return {"save_all": True, "append_images": list(frames[1:]), "duration": durations, "loop": 0}
