"""From weights to a pipeline folder: code, weights, scheduler, card and a picture, swapped in whole."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from mnist_diffusion.config import SamplingConfig
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.sampling import build_sampler

CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
SAMPLES = "samples.png"


def build_pipeline(
    unet: UNet2DModel, noise_scheduler: DDPMScheduler, config: SamplingConfig, class_names: tuple[str, ...]
) -> MNISTDiffusionPipeline:
    """A pipeline around `unet` (not a copy) with a fresh sampler and the configured defaults."""
    conditional = unet.config.num_class_embeds is not None
    return MNISTDiffusionPipeline(
        unet,
        build_sampler(config.scheduler, noise_scheduler.config),
        id2label={str(index): name for index, name in enumerate(class_names)} if conditional else None,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        eta=config.eta,
    )


def export_pipeline(
    pipeline: MNISTDiffusionPipeline, folder: Path, *, card: Mapping[str, Any], samples: Image.Image | None = None
) -> None:
    """Write a pipeline folder that anyone can load, in place of the one that may be there.

    Args:
        pipeline: what to save, as safetensors only.
        folder: where to; a reader sees the old folder or the new one, nothing between.
        card: the values of the card's template.
        samples: the picture on the card.
    """
    temporary, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    # Safetensors refuses weights in channels-last order.
    unet = copy.deepcopy(pipeline.unet).to(memory_format=torch.contiguous_format)
    type(pipeline)(**{**pipeline.components, "unet": unet}, **_defaults(pipeline)).save_pretrained(temporary)
    if samples is not None:
        samples.save(temporary / SAMPLES)
    render_card({**card, "samples": SAMPLES if samples is not None else None}).save(temporary / "README.md")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _defaults(pipeline: MNISTDiffusionPipeline) -> dict[str, Any]:
    return {name: pipeline.config[name] for name in ("id2label", "num_inference_steps", "guidance_scale", "eta")}


def render_card(values: Mapping[str, Any]) -> ModelCard:
    """The model card with measured values only: what is None in `values` is left out of the text."""
    data = ModelCardData(
        library_name="diffusers",
        license="mit",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusion", "class-conditional", "classifier-free-guidance"],
        datasets=values.get("datasets"),
    )
    return ModelCard.from_template(data, template_path=str(CARD_TEMPLATE), **values)
