"""Samplers by name, and batched generation with one seed an image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from mnist_diffusion.config import SchedulerName


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler class and the arguments that make it this sampler.

    With `alone` the class warns of the other samplers' arguments, which it is therefore not given.
    """

    scheduler: str
    arguments: Mapping[str, Any]
    alone: bool = False


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
