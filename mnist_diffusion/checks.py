"""Checks of options: each raises a `ConfigError` that names the option and the value it got."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mnist_diffusion.errors import ConfigError

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
"""The diffusers class of each short name, and the arguments that make it this sampler."""
FLOW = "flow_prediction"
"""What a network predicts that is trained by flow matching, as diffusers calls it."""
FLOW_SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: SAMPLERS[name] for name in ("dpmpp", "dpmpp-sde", "unipc")},
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "lcm": ("FlowMatchLCMScheduler", {}),
}
"""The same for models trained by flow matching; the other short names are of samplers that do not follow its paths."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Say what `name` must be, and what it is, where `condition` does not hold."""
    if not condition:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


def require_at_least(low: float, section: str, config: object, *names: str) -> None:
    """Check the named fields of `config`; None passes, NaN and infinity do not."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            require(math.isfinite(value) and value >= low, _dotted(section, name), value, f"at least {low}")


def require_between(low: float, high: float, section: str, config: object, *names: str) -> None:
    """Check the named fields of `config`, both bounds included; NaN does not pass."""
    for name in names:
        value = getattr(config, name)
        require(low <= value <= high, _dotted(section, name), value, f"between {low} and {high}")


def require_positive(section: str, config: object, *names: str) -> None:
    """Check the named fields of `config`; None passes, NaN and infinity do not."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            require(math.isfinite(value) and value > 0, _dotted(section, name), value, "a positive number")


def require_sampler(name: str, value: str) -> None:
    """Make sure that `value` can name a sampler: a short name, or that of a scheduler class.

    Raises:
        ConfigError: it cannot.
    """
    rule = f"one of {', '.join(SAMPLERS)}, or the name of a diffusers scheduler class"
    require(value in SAMPLERS or re.fullmatch(r"[A-Z]\w*Scheduler", value) is not None, name, value, rule)


PLAIN_GUIDANCE, AUTOGUIDANCE = "cfg", "autoguidance:"
GUIDERS = (
    *("AdaptiveProjectedGuidance", "AdaptiveProjectedMixGuidance"),
    *("ClassifierFreeZeroStarGuidance", "TangentialClassifierFreeGuidance"),
)
"""The guiders of diffusers that can be named: they take images, and have a single scale."""


def require_guidance(name: str, value: str) -> None:
    """Make sure that `value` can name a guidance rule.

    Raises:
        ConfigError: it cannot.
    """
    rule = f"{PLAIN_GUIDANCE}, {AUTOGUIDANCE}PIPELINE or one of {', '.join(GUIDERS)}"
    weaker = value.startswith(AUTOGUIDANCE) and value != AUTOGUIDANCE
    require(weaker or value in (PLAIN_GUIDANCE, *GUIDERS), name, value, rule)


def pairs_of_levels(name: str, values: Sequence[float]) -> list[tuple[float, float]]:
    """The pairs (low, high) of noise levels that a list of numbers stands for.

    Raises:
        ConfigError: they are no such pairs.
    """
    pairs = list(zip(values[::2], values[1::2], strict=False))
    possible = len(values) == 2 * len(pairs) and all(0 <= low <= high <= 1 for low, high in pairs)
    require(possible, name, list(values), "pairs of a low and a high noise level from 0 to 1")
    return pairs


def parse_interval(text: str, name: str) -> tuple[float, str]:
    """The number and the unit (`steps` or `epochs`) of an interval such as `500 steps` or `0.5 epochs`.

    Raises:
        ConfigError: it is no such interval; the message calls it `name`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?) *(step|epoch)s?", text)
    count = float(match[1]) if match else 0.0
    whole = match is not None and count > 0 and (match[2] == "epoch" or count.is_integer())
    require(whole, name, text, "null, or so many steps or epochs, such as '500 steps' or '0.5 epochs'")
    return count, f"{match[2]}s" if match else ""


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
