"""The periodic tasks of a run (measure, save, draw, export), each with the interval at which it is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mnist_diffusion.option_types import parse_interval

Due = Callable[[int], bool]
"""Whether a task is due after update number `n`, counted from 1."""


@dataclass(frozen=True)
class Task:
    """Work of the main process, and when it is due.

    Args:
        stage: `measure` comes before the log is written; the others after it, in the order of the list. A signal
            skips what is measured or drawn.
        due: whether it is due after update number `n`, counted from 1.
        work: does it; it returns nothing.
        at_end: whether it is also due after the last update.
        counted: whether its time counts as training time.
    """

    stage: Literal["measure", "save", "draw", "export"]
    due: Due
    work: Callable[[], None]
    at_end: bool = False
    counted: bool = True


def every(interval: str | None, steps_per_epoch: float) -> Due:
    """Due whenever another interval such as `500 steps` or `0.5 epochs` is complete; never, for None."""
    length = _steps(interval, steps_per_epoch)
    return lambda step: math.floor((step - 1) / length) < math.floor(step / length)


def early(interval: str | None, steps_per_epoch: float) -> Due:
    """Due at an eighth, a quarter and half of the first interval: most is learned then."""
    length = _steps(interval, steps_per_epoch)
    return lambda step: any(step - 1 < length / part <= step for part in (2, 4, 8))


def _steps(interval: str | None, steps_per_epoch: float) -> float:
    """The length of an interval in steps; infinite for None."""
    count, unit = (math.inf, "steps") if interval is None else parse_interval(interval)
    return count if unit == "steps" else count * steps_per_epoch
