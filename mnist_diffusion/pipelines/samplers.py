"""Samplers by a short name, or by the name of a diffusers scheduler class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from mnist_diffusion.errors import ConfigError
from mnist_diffusion.option_types import FLOW
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import prediction_type_of, unusable

MULTISTEP: Mapping[str, Any] = {"solver_order": 2, "lower_order_final": True}
SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small"}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp": ("DPMSolverMultistepScheduler", {**MULTISTEP, "algorithm_type": "dpmsolver++"}),
    "dpmpp-sde": ("DPMSolverMultistepScheduler", {**MULTISTEP, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {**MULTISTEP, "solver_type": "bh2"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""The diffusers class of each short name, and its arguments."""
FLOW_SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: SAMPLERS[name] for name in ("dpmpp", "dpmpp-sde", "unipc")},
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "lcm": ("FlowMatchLCMScheduler", {}),
}
"""The same for flow matching; the samplers of the other short names do not follow straight paths."""
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "DEISMultistepScheduler": {**MULTISTEP, "algorithm_type": "deis", "solver_type": "logrho"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    "PNDMScheduler": {"skip_prk_steps": True},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
}
"""Arguments of classes without a short name, which must not be taken from the previous sampler."""
CONSISTENCY_ARGUMENTS = {"original_inference_steps", "timestep_scaling"}
"""Arguments of LCM and TCD; each kind of class warns about the other's arguments."""


def build_sampler(name: str, config: Mapping[str, Any]) -> Any:
    """Build a scheduler for sampling.

    Args:
        name: a short name, or the name of a diffusers scheduler class.
        config: configuration of the training scheduler, or of any sampler made from it.

    Raises:
        ConfigError: there is no such sampler, or it does not fit the noising process.
    """
    flow = config.get("prediction_type") == FLOW or "beta_schedule" not in config
    known_names = FLOW_SAMPLERS if flow else SAMPLERS
    class_name, arguments = known_names.get(name) or (name, ARGUMENTS.get(name, {}))
    kind: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ConfigError(
            f"scheduler must be one of {', '.join(known_names)}{' for flow matching' if flow else ''}, or a scheduler "
            f"class that diffusers offers here, got {name!r}"
        )
    known = inspect.signature(kind).parameters
    if flow and "use_flow_sigmas" in known:
        straight = {"prediction_type": FLOW, "use_flow_sigmas": True, "flow_shift": config.get("shift", 1.0)}
        arguments = {**arguments, **straight}
    elif flow and not class_name.startswith("FlowMatch"):
        raise ConfigError(f"scheduler={name!r} does not follow the straight paths of flow matching")
    if reason := unusable(kind, flow):
        raise ConfigError(f"scheduler={name!r} {reason}")
    consistency = "original_inference_steps" in known
    passed_on = () if flow or consistency else config.keys() - CONSISTENCY_ARGUMENTS
    settings = {key: value for key, value in config.items() if key in known or key in passed_on}
    try:
        return kind.from_config(settings, **arguments)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"scheduler={name!r} does not work with this noising process: {error}") from error


def sampler_name(scheduler: Any) -> str:
    """The short name of a scheduler, or its class name if it has none."""
    names = FLOW_SAMPLERS if prediction_type_of(scheduler) == FLOW else SAMPLERS
    for name, (class_name, arguments) in names.items():
        same = all(scheduler.config.get(key) == value for key, value in arguments.items())
        if type(scheduler).__name__ == class_name and same:
            return name
    return type(scheduler).__name__


def student_scheduler(config: Mapping[str, Any]) -> Any:
    """The noising process of a teacher, given its scheduler's configuration, for a student.

    The student predicts the velocity: at the noisiest timestep the image cannot be recovered from a prediction of the
    noise, and the velocity there is just minus the image. A student of flow matching predicts the flow. LCM and TCD may
    use all timesteps, so that they start at the noisiest whatever the number of steps.
    """
    if config.get("prediction_type") == FLOW or "beta_schedule" not in config:
        return build_sampler("euler", config)
    changed = {"prediction_type": "v_prediction", "clip_sample": True, "clip_sample_range": 1.0}
    scheduler = diffusers.DDPMScheduler.from_config(build_sampler("ddpm", config).config, **changed)
    scheduler.register_to_config(original_inference_steps=scheduler.config.num_train_timesteps)
    return scheduler
