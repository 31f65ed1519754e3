"""Make samplers: by a short name, or by the name of a diffusers scheduler class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from mnist_diffusion.checks import FLOW, FLOW_SAMPLERS, MULTISTEP, SAMPLERS
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.sharing.pipeline import prediction_type_of

ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "DEISMultistepScheduler": {**MULTISTEP, "algorithm_type": "deis", "solver_type": "logrho"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    "PNDMScheduler": {"skip_prk_steps": True},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
}
"""Arguments of classes without a short name, which must not come from the sampler that was there before."""
CONSISTENCY_ARGUMENTS = {"original_inference_steps", "timestep_scaling"}
"""Arguments of LCM and TCD. The other classes warn about them, and these two warn about the others' arguments."""


def build_sampler(name: str, config: Mapping[str, Any]) -> Any:
    """Make a fresh scheduler for sampling.

    Args:
        name: a short name, or the name of a diffusers scheduler class.
        config: configuration of the training scheduler, or of any sampler made from it.

    Raises:
        ConfigError: there is no such sampler, or it does not work with pipelines of this package.
    """
    flow = config.get("prediction_type") == FLOW or "beta_schedule" not in config
    known_names = FLOW_SAMPLERS if flow else SAMPLERS
    class_name, arguments = known_names.get(name) or (name, ARGUMENTS.get(name, {}))
    made: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if diffusers.SchedulerMixin not in getattr(made, "__mro__", ()):
        raise ConfigError(
            f"scheduler must be one of {', '.join(known_names)}{' for flow matching' if flow else ''}, or a scheduler "
            f"class that diffusers offers here, got {name!r}"
        )
    known = inspect.signature(made).parameters
    if flow and "use_flow_sigmas" in known:
        straight = {"prediction_type": FLOW, "use_flow_sigmas": True, "flow_shift": config.get("shift", 1.0)}
        arguments = {**arguments, **straight}
    elif flow and not class_name.startswith("FlowMatch"):
        raise ConfigError(f"scheduler={name!r} does not follow the straight paths on which the model is trained")
    elif not flow and not known.keys() >= {"beta_schedule", "prediction_type"}:
        raise ConfigError(f"scheduler={name!r} ignores the betas or the prediction type that the model is trained with")
    if "Inverse" in class_name or "timestep_back" in inspect.signature(made.step).parameters:
        raise ConfigError(f"scheduler={name!r} does not go from noise to images one step at a time")
    consistency = "original_inference_steps" in known
    passed_on = () if flow or consistency else config.keys() - CONSISTENCY_ARGUMENTS
    kept = {key: value for key, value in config.items() if key in known or key in passed_on}
    try:
        return made.from_config(kept, **arguments)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"scheduler={name!r} could not be made from this noising process: {error}") from error


def sampler_name(scheduler: Any) -> str:
    """The short name of a scheduler, or its class name if it has none."""
    names = FLOW_SAMPLERS if prediction_type_of(scheduler) == FLOW else SAMPLERS
    for name, (class_name, arguments) in names.items():
        same = all(scheduler.config.get(key) == value for key, value in arguments.items())
        if type(scheduler).__name__ == class_name and same:
            return name
    return type(scheduler).__name__
