"""How long a run is, and its learning rate: fixed in advance, or decided from the clock (warm-up, stable, decay)."""

from __future__ import annotations

import math
import time

from mnist_diffusion.config import RunConfig, TrainConfig

NEVER = 2**62
"""The last step of a run whose length is not decided yet."""
DECAY_SHARE = 0.4
"""Share of a timed run in which the learning rate decays."""
SMOOTHING_SECONDS = 10.0
"""Time constant of the mean step time."""
PAUSE_SECONDS, PAUSE_STEPS = 2.0, 20
"""A step longer than both (the second in mean steps) was suspended, and counts as a mean step."""


def learning_rate_at(config: TrainConfig, step: int, planned_steps: int) -> float:
    """The learning rate of update `step`, counted from 0.

    Args:
        config: peak, warm-up and schedule.
        step: updates done.
        planned_steps: updates of the whole run; 0 while a timed run has not decided, which keeps the peak.
    """
    last, warmup = config.final_lr_factor, config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_decay is not None:
        start, length = config.lr_decay
        return config.learning_rate * (1 - (1 - last) * min(1.0, max(0.0, (step - start) / length)))
    if planned_steps == 0:
        return config.learning_rate
    progress = min(1.0, (step - warmup) / max(1, planned_steps - warmup))
    factor = {
        "constant": 1.0,
        "linear": 1 - (1 - last) * progress,
        "cosine": last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)),
        "exponential": last**progress,
    }[config.lr_schedule]
    return config.learning_rate * factor


def is_timed(config: TrainConfig) -> bool:
    """Whether minutes alone end the run."""
    return config.max_steps is None and config.max_epochs is None


def decay_from_clock(config: TrainConfig, step: int, clock: Clock, seconds_left: float) -> tuple[int, int] | None:
    """Decide, after `step` updates of a timed run, whether its learning rate starts to decay now.

    Warm-up, stable, decay: Hu et al. (2024), https://arxiv.org/abs/2404.06395, section 4. The decay starts when
    `DECAY_SHARE` of the time is left, over as many updates as then fit at the current speed.

    Args:
        config: the run, without a decay so far.
        step: updates done.
        clock: the time so far, and the current speed.
        seconds_left: seconds left for updates.

    Returns:
        First step and length of the decay, as in `train.lr_decay`; None if it does not start yet.
    """
    if (
        config.lr_decay is not None
        or config.lr_schedule == "constant"
        or seconds_left > DECAY_SHARE * (clock.elapsed + seconds_left)
    ):
        return None
    return step, max(1, round(seconds_left / clock.step_seconds))


class Clock:
    """The time a run has taken, without what does not count, and its current time per step.

    Args:
        elapsed: seconds of earlier launches.
    """

    def __init__(self, elapsed: float = 0.0):
        self.elapsed, self.step_seconds, self.last = elapsed, 0.0, time.perf_counter()

    def skip(self) -> float:
        """Restart the timer without counting the time; return the skipped seconds."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    def count(self) -> float:
        """Count the seconds since the last call; the total."""
        self.elapsed += self.skip()
        return self.elapsed

    def count_step(self) -> None:
        """Count a step; a suspended one counts as a mean step."""
        seconds = self.skip()
        if self.step_seconds and seconds > max(PAUSE_SECONDS, PAUSE_STEPS * self.step_seconds):
            seconds = self.step_seconds
        self.elapsed += seconds
        weight = 1 - math.exp(-seconds / SMOOTHING_SECONDS) if self.step_seconds else 1.0
        self.step_seconds += weight * (seconds - self.step_seconds)


def describe_length(config: RunConfig, images: int) -> str:
    """The planned length of a run, in words."""
    train, batch_size = config.train, config.data.batch_size
    if train.max_steps is not None:
        return f"{train.max_steps} steps of {batch_size} images"
    if train.max_epochs is not None:
        return f"{train.max_epochs:g} epochs of {images} images"
    return f"as many steps of {batch_size} images as fit into {train.time_limit_minutes:g} minutes"


def steps_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """The number of updates in `epochs` epochs, rounded up."""
    return max(1, math.ceil(epochs * images / batch_size))


def planned_steps(config: RunConfig, images: int) -> int:
    """The number of steps a run is configured for, or has decided on; 0 if a timed run has not decided yet."""
    train = config.train
    if train.max_steps is None and train.max_epochs is not None:
        return steps_of_epochs(train.max_epochs, images, config.data.batch_size)
    return train.max_steps or (sum(train.lr_decay) if train.lr_decay else 0)


def last_step(config: RunConfig, images: int) -> int:
    """The step at which a run is finished."""
    if is_timed(config.train):
        return NEVER
    planned, epochs = planned_steps(config, images), config.train.max_epochs
    return planned if epochs is None else min(planned, steps_of_epochs(epochs, images, config.data.batch_size))
