"""Samplers by name, and batched generation with one seed an image."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor

from mnist_diffusion.config import SchedulerName, UserError
from mnist_diffusion.hub_errors import HubError, hub_errors
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import MNISTDiffusionPipeline


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler class and the arguments that make it this sampler.

    With `alone` the class warns of the other samplers' arguments, which it is therefore not given.
    """

    scheduler: str
    arguments: Mapping[str, Any]
    alone: bool = False


DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OF_THE_LONE = ("original_inference_steps", "timestep_scaling")
"""Arguments of LCM and TCD that the others warn of."""
MULTISTEP: Mapping[str, Any] = {"solver_order": 2, "lower_order_final": True}

SAMPLERS: Mapping[SchedulerName, Sampler] = {
    "ddpm": Sampler("DDPMScheduler", {"variance_type": "fixed_small"}),
    "ddim": Sampler("DDIMScheduler", {}),
    "dpmpp": Sampler("DPMSolverMultistepScheduler", {**MULTISTEP, "algorithm_type": "dpmsolver++"}),
    "dpmpp-sde": Sampler("DPMSolverMultistepScheduler", {**MULTISTEP, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler", {**MULTISTEP, "solver_type": "bh2"}),
    "deis": Sampler("DEISMultistepScheduler", {**MULTISTEP, "algorithm_type": "deis", "solver_type": "logrho"}),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": Sampler("EulerDiscreteScheduler", {}),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler", {}),
    "heun": Sampler("HeunDiscreteScheduler", {}),
    "kdpm2": Sampler("KDPM2DiscreteScheduler", {}),
    "lcm": Sampler("LCMScheduler", {}, alone=True),
    "tcd": Sampler("TCDScheduler", {}, alone=True),
}


def build_sampler(name: SchedulerName, config: Mapping[str, Any]) -> Any:
    """A fresh scheduler for sampling.

    Args:
        name: a key of `SAMPLERS`.
        config: configuration of the training scheduler, or of any sampler made from it.

    Raises:
        ValueError: there is no such sampler.
    """
    if name not in SAMPLERS:
        raise ValueError(f"scheduler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    sampler = SAMPLERS[name]
    made = getattr(diffusers, sampler.scheduler)
    known = inspect.signature(made.__init__).parameters
    config = {key: value for key, value in config.items() if key in known or not (sampler.alone or key in OF_THE_LONE)}
    return made.from_config(config, **sampler.arguments)


def sampler_name(scheduler: Any) -> str:
    """The short name of a scheduler, or its class name where it is none of `SAMPLERS`."""
    for name, sampler in SAMPLERS.items():
        arguments = {**sampler.arguments, "scheduler": sampler.scheduler}
        asked = {**{key: scheduler.config.get(key) for key in sampler.arguments}, "scheduler": type(scheduler).__name__}
        if asked == arguments:
            return name
    return type(scheduler).__name__


def generate_batches(
    pipeline: MNISTDiffusionPipeline,
    class_labels: Sequence[int] | None,
    seeds: Sequence[int],
    *,
    batch_size: int = 128,
    **call_arguments: Any,
) -> Iterator[Tensor]:
    """Draw one image for each seed, in batches; an image depends on its seed and label, not on the batch.

    Args:
        pipeline: draws them.
        class_labels: one label a seed, or None to draw unconditionally.
        seeds: one seed an image.
        batch_size: images drawn together.
        call_arguments: further arguments of the pipeline's call.

    Yields:
        float32 `[b, C, H, W]` in [0, 1], on the CPU.
    """
    if class_labels is not None and len(class_labels) != len(seeds):
        raise ValueError(f"class_labels must be one for each of the {len(seeds)} seeds, got {len(class_labels)}")
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        # Generators on the CPU make the noise independent of the device that denoises it.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        asked: dict[str, Any] = (
            {"class_labels": list(class_labels[part])}
            if class_labels is not None
            else {"num_images_per_label": len(generators)}
        )
        yield pipeline(**asked, generator=generators, output_type="pt", **call_arguments).images.cpu()


def generate(
    pipeline: MNISTDiffusionPipeline, class_labels: Sequence[int] | None, seeds: Sequence[int], **arguments: Any
) -> Tensor:
    """All images of `generate_batches` in one tensor, float32 `[N, C, H, W]` in [0, 1]."""
    return torch.cat(list(generate_batches(pipeline, class_labels, seeds, **arguments)))


def repository(source: str) -> tuple[str, dict[str, str]]:
    """A folder, or a Hub id and the revision behind its `@` as an argument, where there is one."""
    repo_id, _, revision = source.partition("@") if not Path(source).exists() else (source, "", "")
    return repo_id, {"revision": revision} if revision else {}


def load_pipeline(source: str, *, device: str | None, dtype: str) -> MNISTDiffusionPipeline:
    """Load a pipeline folder or Hub repository (`user/name`, `user/name@revision`), running no code from it.

    Raises:
        UserError: it cannot be loaded, or there is no such device.
    """
    logging.disable_progress_bar()
    repo_id, where = repository(source)
    try:
        with hub_errors(repo_id, f"pipeline {source!r} cannot be loaded: there is no such folder, and on the Hub"):
            pipeline = MNISTDiffusionPipeline.from_pretrained(repo_id, dtype=getattr(torch, dtype), **where)
        pipeline.to(device or DEFAULT_DEVICE)
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"pipeline {source!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
