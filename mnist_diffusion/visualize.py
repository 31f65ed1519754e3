"""Pictures: tensors in, PIL images out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SHEETS = ("grid.png", "schedulers.png", "guidance.png", "interpolation.png")
"""The pictures that `mnist-diffusion sample` writes beside single files."""
MARGIN = 2
INK = 235


def image_grid(
    images: Tensor, columns: int, *, row_labels: Sequence[str] | None = None, min_side: int = 40
) -> Image.Image:
    """A sheet of images, row by row.

    Args:
        images: float `[N, C, H, W]` in [0, 1], with one or three channels.
        columns: images a row.
        row_labels: a name for each row, written to its left.
        min_side: small images are enlarged by a whole factor until they have at least this many pixels a side.

    Returns:
        A PIL image, mode L or RGB.
    """
    height, width = images.shape[-2:]
    factor = max(1, -(-min_side // height))
    cell_width, cell_height = width * factor + MARGIN, height * factor + MARGIN
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=max(11, min(16, cell_height // 3)))
    left = 0
    if row_labels is not None:
        left = int(max(font.getlength(label) for label in row_labels)) + 4 * MARGIN
    mode = "L" if images.shape[1] == 1 else "RGB"
    sheet = Image.new(mode, (left + columns * cell_width + MARGIN, rows * cell_height + MARGIN), 0)
    for index, picture in enumerate(to_pictures(images)):
        tile = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        sheet.paste(tile, (left + MARGIN + column * cell_width, MARGIN + row * cell_height))
    draw = ImageDraw.Draw(sheet)
    ink = INK if mode == "L" else (INK, INK, INK)
    for row, label in enumerate(row_labels or ()):
        middle = MARGIN + row * cell_height + cell_height // 2
        draw.text((2 * MARGIN, middle), label, fill=ink, font=font, anchor="lm")
    return sheet


def safe_name(name: str) -> str:
    """The name of a class as it stands in a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """PIL images, mode L or RGB, of float `[N, C, H, W]` in [0, 1]."""
    pixels = (images.clamp(0, 1) * 255).round().byte().cpu()
    return [
        Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()) for image in pixels
    ]


def save_animation(frames: Sequence[Image.Image], path: Path, *, milliseconds: int = 150) -> None:
    """Write frames as a looping GIF that rests on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [8 * milliseconds]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
