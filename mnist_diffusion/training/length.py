"""How long a run is and how its learning rate goes: given, counted from epochs, or measured to fit the minutes."""

from __future__ import annotations

import math

from accelerate.utils import broadcast_object_list

from mnist_diffusion.config import TrainConfig
from mnist_diffusion.training.state import TrainState

# With `max_minutes` alone, this share of the time is planned for steps; the rest is for grids, evaluation and saving.
SHARE_FOR_STEPS = 0.93
# Of the planned time, what measuring the speed may take.
SHARE_FOR_MEASURING = 0.04


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


def plan_steps(learner: TrainState, *, seconds_used: float) -> int:
    """How many steps shape the learning rate, the same for every process.

    Args:
        learner: is measured where the time decides.
        seconds_used: of the run's time, what is gone already.
    """
    config, train = learner.config, learner.config.train
    if train.max_steps is not None:
        return train.max_steps
    if train.max_epochs is not None:
        return steps_of_epochs(train.max_epochs, len(learner.data.train), config.data.batch_size)
    minutes = train.time_limit_minutes
    assert minutes is not None
    speed = learner.measure_speed(60 * minutes * SHARE_FOR_MEASURING)
    left = 60 * minutes * (SHARE_FOR_STEPS - SHARE_FOR_MEASURING) - seconds_used
    [planned] = broadcast_object_list([max(1, round(left * speed))])
    learner.accelerator.print(
        f"Measured {speed * config.data.batch_size:.0f} images/s: {planned} steps fit into {minutes:g} minutes"
    )
    return planned


def expected_cost(learner: TrainState) -> str:
    """Steps and minutes that the run would take here, from a few seconds of real updates that are then undone."""
    config, train = learner.config, learner.config.train
    speed = learner.measure_speed(6.0)
    minutes = train.time_limit_minutes
    if train.max_steps is not None:
        steps = train.max_steps
    elif train.max_epochs is not None:
        steps = steps_of_epochs(train.max_epochs, len(learner.data.train), config.data.batch_size)
    else:
        assert minutes is not None
        steps = round(60 * minutes * (SHARE_FOR_STEPS - SHARE_FOR_MEASURING) * speed)
    expected = steps / speed / (SHARE_FOR_STEPS - SHARE_FOR_MEASURING) / 60
    limited = f", cut at {minutes:g} minutes" if minutes is not None and minutes < 0.99 * expected else ""
    return (
        f"expected     {steps} steps at {speed * config.data.batch_size:.0f} images/s: "
        f"about {expected:.1f} minutes{limited}"
    )
