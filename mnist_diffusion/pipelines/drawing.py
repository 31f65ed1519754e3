"""Build, load and call pipelines; equal seeds give equal images in any batch."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel, guiders
from diffusers.utils import logging
from torch import Tensor

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.environment import DEFAULT_DEVICE
from mnist_diffusion.errors import ConfigError, UserError
from mnist_diffusion.files import pipeline_folder
from mnist_diffusion.hub_client import HubError, hub_errors
from mnist_diffusion.method.guidance import Autoguidance
from mnist_diffusion.option_types import AUTOGUIDANCE, CFG
from mnist_diffusion.parallel import is_main
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import SAMPLERS, build_sampler, sampler_name

VALUES_PER_BATCH = {"cpu": 100_000, "gpu": 800_000}
"""Pixel values sampled together: on a CPU they should fit into the caches."""
MODELS, SHIPPED, LATEST = Path(__file__).parents[1] / "models", ("mnist", "mnist-student"), "runs/latest"
"""The models that come with the package, and the link to the newest run."""
DEFAULTS = ("num_inference_steps", "guidance_scale", "guidance_interval", "eta", "noise_interval")
"""Settings that are arguments of a call, whose defaults a pipeline folder holds."""


def build_pipeline(
    noise_scheduler: Any,
    sampling: SamplingSettings,
    names: tuple[str, ...],
    unet: UNet2DModel,
    *,
    patch_size: int = 1,
    guidance_distilled: Sequence[float] = (),
) -> MNISTDiffusionPipeline:
    """Build a pipeline around `unet` (not a copy) with a fresh sampler.

    Args:
        noise_scheduler: the training scheduler.
        sampling: the pipeline's defaults; a value of None uses the default of the pipeline class.
        names: the class names.
        unet: the network.
        patch_size: side of the network's patches.
        guidance_distilled: guidance scales distilled into the network, if any.

    Raises:
        ConfigError: the sampling settings do not fit the noising process.
    """
    conditional = unet.config.num_class_embeds is not None
    try:
        return MNISTDiffusionPipeline(
            unet,
            build_sampler(sampling.scheduler or "ddpm", noise_scheduler.config),
            id2label={str(index): name for index, name in enumerate(names)} if conditional else None,
            patch_size=patch_size,
            guidance_distilled=list(guidance_distilled),
            **{name: value for name in DEFAULTS if (value := getattr(sampling, name)) is not None},
        )
    except ValueError as error:  # which names argument and value
        raise ConfigError(f"sampling: {error}") from error


def with_sampler(pipeline: MNISTDiffusionPipeline, name: str | None) -> MNISTDiffusionPipeline:
    """The same pipeline, sharing its network, with another sampler; itself if it has this one, or `name` is None.

    Raises:
        ConfigError: there is no such sampler.
    """
    if name is None or name == sampler_name(pipeline.scheduler):
        return pipeline
    other = copy.copy(pipeline)
    other.scheduler = build_sampler(name, pipeline.scheduler.config)
    return other


def resolved(pipeline: MNISTDiffusionPipeline, settings: SamplingSettings) -> SamplingSettings:
    """The settings with the pipeline's defaults in place of None; a sampler of the user's own stays None."""
    own, name = pipeline.config, sampler_name(pipeline.scheduler)
    nameable = name if name in SAMPLERS or hasattr(diffusers, name) else None  # not a class of the user's own
    scale = None if pipeline.num_classes is None else own.guidance_scale
    return replace(
        settings,
        scheduler=settings.scheduler or nameable,
        num_inference_steps=settings.num_inference_steps or own.num_inference_steps,
        guidance_scale=scale if settings.guidance_scale is None else settings.guidance_scale,
    )


def call_arguments(pipeline: MNISTDiffusionPipeline, settings: SamplingSettings) -> dict[str, Any]:
    """The arguments of a call with these settings, without those that are None; [`with_sampler`] changes the sampler.

    Raises:
        UserError: the weaker model could not be loaded.
    """
    call: dict[str, Any] = {name: value for name in DEFAULTS if (value := getattr(settings, name)) is not None}
    rule = settings.guidance
    if rule.startswith(AUTOGUIDANCE):
        call["guidance"] = Autoguidance(load_on_same_device(pipeline, rule.removeprefix(AUTOGUIDANCE)))
    elif rule != CFG:
        scale = call.pop("guidance_scale", pipeline.config.guidance_scale)
        call["guidance"] = getattr(guiders, rule)(guidance_scale=scale)
    return call


def class_names(pipeline: MNISTDiffusionPipeline) -> tuple[str, ...]:
    """The class names in order; a class without a name is called by its number."""
    names = pipeline.config.id2label or {}
    return tuple(names.get(str(label), str(label)) for label in range(pipeline.num_classes or 0))


def require_fit(pipeline: MNISTDiffusionPipeline, data: ImageData) -> None:
    """Check that a pipeline samples images of the shape and the classes of the data.

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
                "data.source, data.image_size and data.channels to those of its training"
            )


def fingerprint(pipeline: MNISTDiffusionPipeline) -> str:
    """SHA-256 over what decides a trajectory: scheduler, defaults of a call, names and values of the weights."""
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    settings["call"] = [pipeline.config[name] for name in ("eta", "guidance_interval", "patch_size")]
    if (levels := list(pipeline.config.noise_interval)) != [0, 1]:
        settings["call"] += levels
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(pipeline: MNISTDiffusionPipeline, call: dict[str, Any]) -> list[str]:
    """The fingerprints of the networks that a call with these arguments uses."""
    rule = call.get("guidance")
    return [fingerprint(each) for each in (pipeline, *([rule.weak] if isinstance(rule, Autoguidance) else []))]


def seeded_call(class_labels: Sequence[int] | None, seeds: Sequence[int]) -> dict[str, Any]:
    """The arguments of a call that samples one image for each seed, of the class at the same index, if any."""
    # Generators on the CPU make the noise independent of the device that denoises it.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    labels = {"num_images_per_label": len(seeds)} if class_labels is None else {"class_labels": list(class_labels)}
    return {**labels, "generator": generators}


def batches(pipeline: MNISTDiffusionPipeline, count: int, size: int | None = None) -> Iterator[slice]:
    """Split `count` images into batches of `size`, or of a size that suits image and device."""
    values = VALUES_PER_BATCH["cpu" if pipeline.device.type == "cpu" else "gpu"]
    size = size or max(1, values // math.prod(pipeline.image_shape))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def generate_batches(
    pipeline: MNISTDiffusionPipeline,
    class_labels: Sequence[int] | None,
    seeds: Sequence[int],
    *,
    batch_size: int | None = None,
    **call: Any,
) -> Iterator[Tensor]:
    """Sample one image for each seed, in batches; an image depends on its seed and label, not on the batch.

    Args:
        pipeline: the pipeline.
        class_labels: one label per seed, or None for unconditional samples.
        seeds: one seed per image.
        batch_size: images per batch; chosen by image size and device if None.
        call: further arguments of the call.

    Yields:
        float32 `[b, C, H, W]` in [0, 1], on the CPU.
    """
    if class_labels is not None and len(class_labels) != len(seeds):
        raise ValueError(f"class_labels must be one for each of the {len(seeds)} seeds, got {len(class_labels)}")
    for part in batches(pipeline, len(seeds), batch_size):
        seeded = seeded_call(None if class_labels is None else class_labels[part], seeds[part])
        yield pipeline(**seeded, output_type="pt", **call).images.cpu()


def generate(
    pipeline: MNISTDiffusionPipeline, class_labels: Sequence[int] | None, seeds: Sequence[int], **call: Any
) -> Tensor:
    """All images of `generate_batches` in one tensor, float32 `[N, C, H, W]` in [0, 1]."""
    return torch.cat(list(generate_batches(pipeline, class_labels, seeds, **call)))


def default_sources() -> tuple[str, ...]:
    """The pipelines of a command that names none: the newest run here, else the models that come with the package."""
    if (pipeline_folder(Path(LATEST)) / "model_index.json").is_file():
        sources: tuple[str, ...] = (LATEST,)
        about = f"{LATEST}, the newest run"
    else:
        sources, about = SHIPPED, f"{SHIPPED[0]}, the model that comes with mnist-diffusion"
    if is_main():
        print(f"No pipeline is named, so this uses {about}")
    return sources


def resolved_source(source: str) -> str:
    """The folder of a model that comes with the package, unless a pipeline here has its name; else the source."""
    here = (pipeline_folder(Path(source)) / "model_index.json").is_file()
    return str(MODELS / source) if source in SHIPPED and not here else source


def load_pipeline(source: str | None, *, device: str | None, dtype: str = "float32") -> MNISTDiffusionPipeline:
    """Load a pipeline, running no code from it.

    Args:
        source: a pipeline folder, a run folder, a Hub repository (`user/name`, `user/name@revision`), or a model that
            comes with the package (`mnist`, `mnist-student`); None takes the first of [`default_sources`].
        device: such as `cpu`; None takes a GPU if there is one.
        dtype: data type of the weights.

    Raises:
        UserError: it could not be loaded, or there is no such device.
    """
    logging.disable_progress_bar()
    source = resolved_source(source or default_sources()[0])
    repo_id, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    failed = f"pipeline {source!r} could not be loaded"
    try:
        with hub_errors(repo_id, f"{failed}: there is no such folder, and on the Hub"):
            pinned = {"revision": revision} if revision else {}
            pipeline = MNISTDiffusionPipeline.from_pretrained(repo_id, dtype=getattr(torch, dtype), **pinned)
        pipeline.to(device or DEFAULT_DEVICE)
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{failed}: {str(error).strip().splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


_kept = lru_cache(maxsize=4)(load_pipeline)


def load_on_same_device(pipeline: MNISTDiffusionPipeline, source: str) -> MNISTDiffusionPipeline:
    """Load a second pipeline on the device and in the precision of the first; once for several calls."""
    return _kept(source, device=str(pipeline.device), dtype=str(pipeline.dtype).removeprefix("torch."))
