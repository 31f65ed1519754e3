"""How long a run is and how its learning rate changes: given, counted from epochs, or measured to fit the minutes."""

from __future__ import annotations

import math

from accelerate.utils import broadcast_object_list

from mnist_diffusion.config import RunConfig, TrainConfig
from mnist_diffusion.training.state import TrainState

SHARE_FOR_STEPS = 0.93
"""With `max_minutes` alone, this share of the time is planned for steps; the rest is for grids and saving."""
SHARE_FOR_MEASURING = 0.04
"""Of the planned time, what measuring the speed may take."""


def learning_rate_at(config: TrainConfig, step: int, planned_steps: int) -> float:
    """The learning rate of the update after `step` others: a pure function of the step and the planned steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, planned_steps - config.warmup_steps))
    last = config.final_lr_factor
    factor = {
        "constant": 1.0,
        "linear": 1 - (1 - last) * progress,
        "cosine": last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)),
        "exponential": last**progress,
    }[config.lr_schedule]
    return config.learning_rate * factor


def steps_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """Updates that make up so many passes over the images, rounded up."""
    return max(1, math.ceil(epochs * images / batch_size))


def describe_length(config: RunConfig, images: int) -> str:
    """How long the run is to be, in words."""
    train, batch_size = config.train, config.data.batch_size
    if train.max_steps is not None:
        return f"{train.max_steps} steps of {batch_size} images"
    if train.max_epochs is not None:
        return f"{train.max_epochs:g} epochs of {images} images"
    return f"as many steps of {batch_size} images as fit into {train.time_limit_minutes:g} minutes"


def _asked_steps(state: TrainState) -> int | None:
    """The steps that the configuration asks for, None if the time decides."""
    train = state.config.train
    if train.max_steps is None and train.max_epochs is not None:
        return steps_of_epochs(train.max_epochs, len(state.data.train), state.config.data.batch_size)
    return train.max_steps


def plan_steps(state: TrainState, *, seconds_used: float) -> int:
    """How many steps shape the learning rate, the same for every process.

    Args:
        state: is measured if the time decides.
        seconds_used: of the run's time, what is gone already.
    """
    if (asked := _asked_steps(state)) is not None:
        return asked
    minutes = state.config.train.time_limit_minutes or 0.0
    speed = state.measure_speed(60 * minutes * SHARE_FOR_MEASURING)
    left = 60 * minutes * (SHARE_FOR_STEPS - SHARE_FOR_MEASURING) - seconds_used
    [planned] = broadcast_object_list([max(1, round(left * speed))])
    images = speed * state.config.data.batch_size
    state.accelerator.print(f"Measured {images:.0f} images/s: {planned} steps fit into {minutes:g} minutes")
    return planned


def expected_cost(state: TrainState) -> str:
    """Steps and minutes that the run would take here, from a few seconds of real updates that are then undone."""
    speed = state.measure_speed(6.0)
    minutes, share = state.config.train.time_limit_minutes, SHARE_FOR_STEPS - SHARE_FOR_MEASURING
    steps = _asked_steps(state) or max(1, round(60 * (minutes or 0.0) * share * speed))
    expected = steps / speed / share / 60
    limited = f", cut at {minutes:g} minutes" if minutes is not None and minutes < 0.99 * expected else ""
    images = speed * state.config.data.batch_size
    return f"expected     {steps} steps at {images:.0f} images/s: about {expected:.1f} minutes{limited}"
