"""How long a run is and how its learning rate changes: given, counted from epochs, or decided as time passes."""

from __future__ import annotations

import math
import time

from mnist_diffusion.config import Line, RunConfig, TrainConfig

WARMUP_SHARE = 0.05
"""Of a run's time, after which its warm-up, if it is not over, takes as many steps again and no more."""
DECAY_SHARE = 0.4
"""Of a run's time, in which the learning rate falls."""
REVISION = 0.1
"""By how much of what is left a planned end must be wrong to be revised."""
LATELY_SECONDS = 10.0
"""Over about how long the mean of the lengths of steps is taken."""
PAUSE_SECONDS, PAUSE_STEPS = 30.0, 20
"""A step that takes longer than both, the second in steps of usual length, was suspended: no training time."""


def learning_rate_at(config: TrainConfig, step: int, planned_steps: int) -> float:
    """The learning rate of the update after `step` others: a pure function of the step, the plan and the lines."""
    begun = [line for line in config.lr_lines if line[0] <= step]
    if begun:
        return config.learning_rate * _share(begun[-1], step)
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


def _share(line: Line, step: int) -> float:
    start, end, first, last = line
    return first + (last - first) * min(1.0, (step - start) / (end - start))


def warm_up(config: TrainConfig) -> tuple[Line]:
    """The first line of a timed run."""
    steps = max(1, config.warmup_steps)
    return ((0, steps, 1 / steps, 1.0),)


def next_line(config: TrainConfig, step: int, *, used: float, left: float, speed: float) -> Line | None:
    """Decide, after `step` updates, whether the learning rate of a timed run turns into another line.

    Warm-up, stable, decay: Hu et al. (2024), https://arxiv.org/abs/2404.06395, section 4. The decay begins when so much
    time is left, and ends when no more updates will fit at the speed of late; its end is revised if time passes
    differently.

    Args:
        config: gives the lines so far.
        step: updates done.
        used: seconds since the run began.
        left: seconds that are left for updates.
        speed: updates per second, lately.
    """
    start, end, _, last = config.lr_lines[-1]
    if start >= step:  # this was decided before the run was killed, and is done again
        return None
    share, fits = _share(config.lr_lines[-1], step), step + max(1, round(left * speed))
    if last < 1:
        wrong = abs(fits - end) > max(1, REVISION * (end - step))
        return (step, fits, share, last) if wrong and left > 0 else None
    if config.lr_schedule != "constant" and left <= DECAY_SHARE * (used + left):
        return step, fits, share, config.final_lr_factor
    late = start == 0 and 0 < step < end and used > WARMUP_SHARE * (used + left)
    return (step, 2 * step, share, 1.0) if late else None


class Clock:
    """How long a run has been going, without what does not count, and how long a step takes lately.

    Args:
        seconds: of earlier launches.
    """

    def __init__(self, seconds: float = 0.0):
        self.counted, self.step_seconds, self.asked = seconds, 0.0, time.perf_counter()

    def passed(self) -> float:
        """Seconds since this was last asked, which the caller may count or not."""
        before, self.asked = self.asked, time.perf_counter()
        return self.asked - before

    def now(self) -> float:
        """Seconds of the run, everything since the last question counted."""
        self.counted += self.passed()
        return self.counted

    def end_step(self) -> None:
        """Count a step; one in which the machine or the process was suspended counts as one of usual length."""
        passed = self.passed()
        if self.step_seconds and passed > max(PAUSE_SECONDS, PAUSE_STEPS * self.step_seconds):
            passed = self.step_seconds
        self.counted += passed
        weight = 1 - math.exp(-passed / LATELY_SECONDS) if self.step_seconds else 1.0
        self.step_seconds += weight * (passed - self.step_seconds)


def describe_length(config: RunConfig, images: int) -> str:
    """How long the run is to be, in words."""
    train, batch_size = config.train, config.data.batch_size
    if train.max_steps is not None:
        return f"{train.max_steps} steps of {batch_size} images"
    if train.max_epochs is not None:
        return f"{train.max_epochs:g} epochs of {images} images"
    return f"as many steps of {batch_size} images as fit into {train.time_limit_minutes:g} minutes"


def steps_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """Updates that make up so many passes over the images, rounded up."""
    return max(1, math.ceil(epochs * images / batch_size))


def planned_steps(config: RunConfig, images: int) -> int:
    """The steps that the configuration asks for, or that a timed run has decided on; 0 if it has not yet."""
    train = config.train
    if train.max_steps is None and train.max_epochs is not None:
        return steps_of_epochs(train.max_epochs, images, config.data.batch_size)
    decided = train.lr_lines[-1][1] if train.lr_lines and train.lr_lines[-1][3] < 1 else 0
    return train.max_steps or decided
