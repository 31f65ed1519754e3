"""Build, load and call pipelines."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from torch import Tensor

from mnist_diffusion.config import SamplingConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.diffusion.samplers import build_sampler
from mnist_diffusion.environment import DEFAULT_DEVICE
from mnist_diffusion.errors import UserError
from mnist_diffusion.sharing.errors import HubError, hub_errors
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

PIXELS_TOGETHER = (100_000, 800_000)
"""How many values of images are drawn together on a CPU, whose caches they should fit into, and on a GPU."""


def build_pipeline(
    noise_scheduler: DDPMScheduler,
    config: SamplingConfig,
    names: tuple[str, ...],
    unet: UNet2DModel,
    *,
    patch_size: int = 1,
    guidance_distilled: Sequence[float] = (),
) -> MNISTDiffusionPipeline:
    """A pipeline around `unet` (not a copy), for patches of a size, with a fresh sampler and configured defaults.

    `guidance_distilled` are the scales at which the network has learned to draw as if guided, if any.
    """
    conditional = unet.config.num_class_embeds is not None
    return MNISTDiffusionPipeline(
        unet,
        build_sampler(config.scheduler, noise_scheduler.config),
        id2label={str(index): name for index, name in enumerate(names)} if conditional else None,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        eta=config.eta,
        patch_size=patch_size,
        guidance_distilled=guidance_distilled,
    )


def with_sampler(pipeline: MNISTDiffusionPipeline, name: str) -> MNISTDiffusionPipeline:
    """The same pipeline, network included, with another sampler; the one that is given does not change.

    Raises:
        ConfigError: there is no such sampler.
    """
    other = copy.copy(pipeline)
    other.scheduler = build_sampler(name, pipeline.scheduler.config)
    return other


def class_names(pipeline: MNISTDiffusionPipeline) -> tuple[str, ...]:
    """The names of a pipeline's classes, in their order; a class without a name is called by its number."""
    names = pipeline.config.id2label or {}
    return tuple(names.get(str(label), str(label)) for label in range(pipeline.num_classes or 0))


def require_fit(pipeline: MNISTDiffusionPipeline, data: ImageData) -> None:
    """Make sure that a pipeline draws images of the shape and the classes of the data.

    Raises:
        UserError: it does not.
    """
    pairs: dict[str, tuple[Any, Any]] = {
        "images (C, H, W)": (pipeline.image_shape, (data.channels, data.image_size, data.image_size))
    }
    if pipeline.num_classes is not None:
        pairs["number of classes"] = pipeline.num_classes, data.num_classes
        pairs["class names"] = class_names(pipeline) if pipeline.config.id2label else data.class_names, data.class_names
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f"{what}: {theirs!s:.100} for the pipeline, but {ours!s:.100} for data.source={data.source_id!r}; set "
                "data.source, data.image_size and data.channels to what the pipeline was trained on"
            )


def fingerprint(pipeline: MNISTDiffusionPipeline) -> str:
    """SHA-256 over what decides a trajectory: the defaults that a call takes, the scheduler's configuration, names and
    values of the weights."""
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    settings["call"] = [pipeline.config[name] for name in ("eta", "guidance_interval", "patch_size")]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def one_per_seed(class_labels: Sequence[int] | None, seeds: Sequence[int]) -> dict[str, Any]:
    """Arguments of a call that draws one image for each seed, as a tensor, of the class with the same index if any."""
    # Generators on the CPU make the noise independent of the device that denoises it.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    asked = {"num_images_per_label": len(seeds)} if class_labels is None else {"class_labels": list(class_labels)}
    return {**asked, "generator": generators}


def batches(pipeline: MNISTDiffusionPipeline, count: int, size: int | None = None) -> Iterator[slice]:
    """Which of `count` images are drawn together: `size`, or as many as suit their size and the device."""
    size = size or max(1, PIXELS_TOGETHER[pipeline.device.type != "cpu"] // math.prod(pipeline.image_shape))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def generate_batches(
    pipeline: MNISTDiffusionPipeline,
    class_labels: Sequence[int] | None,
    seeds: Sequence[int],
    *,
    batch_size: int | None = None,
    **call_arguments: Any,
) -> Iterator[Tensor]:
    """Draw one image for each seed, in batches; an image depends on its seed and label, not on the batch.

    Args:
        pipeline: draws them.
        class_labels: one label per seed, or None to draw unconditionally.
        seeds: one seed per image.
        batch_size: images drawn together; as many as suit their size and the device if omitted.
        call_arguments: further arguments of the pipeline's call.

    Yields:
        float32 `[b, C, H, W]` in [0, 1], on the CPU.
    """
    if class_labels is not None and len(class_labels) != len(seeds):
        raise ValueError(f"class_labels must be one for each of the {len(seeds)} seeds, got {len(class_labels)}")
    for part in batches(pipeline, len(seeds), batch_size):
        arguments = one_per_seed(None if class_labels is None else class_labels[part], seeds[part])
        yield pipeline(**arguments, output_type="pt", **call_arguments).images.cpu()


def generate(
    pipeline: MNISTDiffusionPipeline, class_labels: Sequence[int] | None, seeds: Sequence[int], **arguments: Any
) -> Tensor:
    """All images of `generate_batches` in one tensor, float32 `[N, C, H, W]` in [0, 1]."""
    return torch.cat(list(generate_batches(pipeline, class_labels, seeds, **arguments)))


def stop_after_step(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A callback that ends a call after its first step, for trying whether the call works."""
    pipeline._interrupt = True
    return values


def load_pipeline(source: str, *, device: str | None, dtype: str = "float32") -> MNISTDiffusionPipeline:
    """Load a pipeline folder or Hub repository (`user/name`, `user/name@revision`), running no code from it.

    Raises:
        UserError: it could not be loaded, or there is no such device.
    """
    logging.disable_progress_bar()
    repo_id, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    failed = f"pipeline {source!r} could not be loaded"
    try:
        with hub_errors(repo_id, f"{failed}: there is no such folder, and on the Hub"):
            where = {"revision": revision} if revision else {}
            pipeline = MNISTDiffusionPipeline.from_pretrained(repo_id, dtype=getattr(torch, dtype), **where)
        pipeline.to(device or DEFAULT_DEVICE)
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{failed}: {str(error).strip().splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
