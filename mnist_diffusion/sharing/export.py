"""Write a pipeline folder: weights, scheduler, code, card and picture, replaced as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from mnist_diffusion.errors import FileError
from mnist_diffusion.files import replace_folder, replace_picture, replace_text
from mnist_diffusion.sharing.card import CARD, PICTURE, render_card
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.sharing.reading import index_arguments


def export_pipeline(
    pipeline: MNISTDiffusionPipeline, folder: Path, *, card: Mapping[str, Any], samples: Image.Image | None = None
) -> None:
    """Write a pipeline folder that anyone can load, in place of the one that may be there.

    Args:
        pipeline: what to save, as safetensors only.
        folder: where to; a reader sees the old folder or the new one, or none for a moment, but never a part of one.
        card: the values of the card's template.
        samples: the picture on the card.

    Raises:
        FileError: the weights could not be written.
    """

    def write(temporary: Path) -> None:
        # Safetensors refuses weights in channels-last order.
        unet = copy.deepcopy(pipeline.unet).to(memory_format=torch.contiguous_format)
        values = {name: pipeline.config[name] for name in index_arguments(type(pipeline)) if name in pipeline.config}
        type(pipeline)(**{**values, **pipeline.components, "unet": unet}).save_pretrained(temporary)
        if samples is not None:
            replace_picture(samples, temporary / PICTURE)
        replace_text(temporary / CARD, str(render_card({**card, "samples": PICTURE if samples is not None else None})))

    try:
        replace_folder(folder, write)
    except SafetensorError as error:  # as of a full disk
        raise FileError(f"{folder} could not be written: {error}") from error
