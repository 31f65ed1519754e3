"""From weights to a pipeline folder: code, weights, scheduler, card and a picture, swapped in whole."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from mnist_diffusion.config import SamplingConfig
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import CARD, PICTURE, MNISTDiffusionPipeline
from mnist_diffusion.sampling import build_sampler

CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
EVALUATION_SECTION = re.compile(r"(<!-- evaluation -->)\n.*?\n(<!-- end of evaluation -->)", re.DOTALL)
DEFAULTS = ("id2label", "num_inference_steps", "guidance_scale", "eta", "guidance_distilled")
CARD_METRICS = {
    "accuracy": "Share read as asked",
    "fid": "Fréchet distance in the evaluator's features",
    "fid_floor": "Fréchet distance of as many held-out images",
    "precision": "Precision",
    "recall": "Recall",
}


MakePipeline = Callable[[UNet2DModel], MNISTDiffusionPipeline]


def build_pipeline(
    noise_scheduler: DDPMScheduler,
    config: SamplingConfig,
    class_names: tuple[str, ...],
    unet: UNet2DModel,
    *,
    guidance_distilled: bool = False,
) -> MNISTDiffusionPipeline:
    """A pipeline around `unet` (not a copy) with a fresh sampler and the configured defaults.

    With `guidance_distilled` the network has learned to draw as if guided at the configured scale.
    """
    conditional = unet.config.num_class_embeds is not None
    return MNISTDiffusionPipeline(
        unet,
        build_sampler(config.scheduler, noise_scheduler.config),
        id2label={str(index): name for index, name in enumerate(class_names)} if conditional else None,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        eta=config.eta,
        guidance_distilled=guidance_distilled,
    )


def export_pipeline(
    pipeline: MNISTDiffusionPipeline, folder: Path, *, card: Mapping[str, Any], samples: Image.Image | None = None
) -> None:
    """Write a pipeline folder that anyone can load, in place of the one that may be there.

    Args:
        pipeline: what to save, as safetensors only.
        folder: where to; a reader sees the old folder or the new one, or none for a moment, but never a part of one.
        card: the values of the card's template.
        samples: the picture on the card.
    """

    def write(temporary: Path) -> None:
        # Safetensors refuses weights in channels-last order.
        unet = copy.deepcopy(pipeline.unet).to(memory_format=torch.contiguous_format)
        type(pipeline)(**{**pipeline.components, "unet": unet}, **_defaults(pipeline)).save_pretrained(temporary)
        if samples is not None:
            samples.save(temporary / PICTURE)
        render_card({**card, "samples": PICTURE if samples is not None else None}).save(temporary / CARD)

    swap_in(folder, write)


def swap_in(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, and put it in place of the one that may be there."""
    temporary, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _defaults(pipeline: MNISTDiffusionPipeline) -> dict[str, Any]:
    return {name: pipeline.config[name] for name in DEFAULTS}


def render_card(values: Mapping[str, Any], *, template: Path = CARD_TEMPLATE) -> ModelCard:
    """The model card with measured values only: what is None in `values` is left out of the text."""
    data = ModelCardData(
        library_name="diffusers",
        license="mit",
        pipeline_tag=values.get("pipeline_tag", "unconditional-image-generation"),
        tags=values.get("tags", ["diffusion"]),
        datasets=values.get("datasets"),
    )
    return ModelCard.from_template(data, template_path=str(template), **values)


def write_results_to_card(
    folder: Path, results: Sequence[Mapping[str, Any]], *, text: str, dataset: str, dataset_id: str
) -> None:
    """Put measured values into the card of a pipeline folder, as metadata and as text, in place of earlier ones.

    Args:
        folder: the pipeline folder.
        results: entries of an evaluation report.
        text: Markdown for the card's section on evaluation.
        dataset: what the images were measured against, for people.
        dataset_id: its id on the Hub, or another name without spaces.
    """
    path = folder / CARD
    content = path.read_text(encoding="utf-8")
    if not EVALUATION_SECTION.search(content):
        content += "\n## Evaluation\n\n<!-- evaluation -->\n\n<!-- end of evaluation -->\n"
    card = ModelCard(EVALUATION_SECTION.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", content))
    settings = ("scheduler", "num_inference_steps", "guidance_scale", "num_images")
    measured = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=dataset_id,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=round(result[metric], 5),
            metric_args={key: result[key] for key in settings if result[key] is not None},
        )
        for result in results
        for metric, name in CARD_METRICS.items()
        if result.get(metric) is not None
    ]
    about = {**card.data.to_dict(), "model_name": folder.resolve().parent.name, "eval_results": measured}
    about.pop("model-index", None)
    card.data = ModelCardData(**about)
    temporary = path.with_name(".README.md.partial")
    card.save(temporary)
    temporary.replace(path)
