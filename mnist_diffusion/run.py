"""One training run on its way: what it was asked, where it stands, when something is due."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mnist_diffusion.config import HubConfig, RunConfig
from mnist_diffusion.evaluation.monitor import Monitor
from mnist_diffusion.learner import Learner
from mnist_diffusion.planning import steps_of_epochs
from mnist_diffusion.product import Product


@dataclass
class Run:
    """One training run on its way.

    Args:
        config: the run.
        learner: network, average and optimizer.
        product: what is made of the averaged weights.
        folder: the run folder.
        recipe: name of the recipe, for titles.
        card: further values of the model card.
        on_snapshot: told of each snapshot's folder.
        run_id: tells its checkpoints from those of other runs.
        planned_steps: how many updates the learning rate is shaped for.
        step: updates done.
        seconds_before: training time of earlier launches.
    """

    config: RunConfig
    learner: Learner
    product: Product
    folder: Path
    recipe: str
    card: Mapping[str, Any] = field(default_factory=dict)
    on_snapshot: Callable[[Path], None] | None = None
    run_id: str | None = None
    planned_steps: int = 0
    step: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    loss: float | None = None
    held_out_loss: float | None = None
    grid: Image.Image | None = None
    monitor: Monitor | None = None
    measured: dict[str, float] = field(default_factory=dict)
    best: float | None = None

    @property
    def seconds(self) -> float:
        """Training time over all launches, planning included."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def last_step(self) -> int:
        """The step at which the run is finished."""
        ends = [self.planned_steps]
        if self.config.train.max_epochs is not None:
            images, batch_size = len(self.learner.data.train), self.config.data.batch_size
            ends.append(steps_of_epochs(self.config.train.max_epochs, images, batch_size))
        return min(ends)

    def due(self, what: str) -> bool:
        """Whether `what` (checkpoint, sample, snapshot) comes after this step."""
        steps = getattr(self.config.train, f"{what}_every_steps")
        epochs = getattr(self.config.train, f"{what}_every_epochs")
        if steps is not None and self.step % steps == 0:
            return True
        if epochs is None:
            return False
        images, batch_size = len(self.learner.data.train), self.config.data.batch_size
        passed = [math.floor(step * batch_size / images / epochs) for step in (self.step - 1, self.step)]
        return passed[0] < passed[1]

    @property
    def animates(self) -> bool:
        """Whether an animation comes after this step."""
        before, now = (
            step * self.config.data.batch_size / len(self.learner.data.train) for step in (self.step - 1, self.step)
        )
        return any(before < epoch <= now for epoch in self.config.train.animate_at_epochs)

    def out_of_time(self) -> bool:
        """Whether `max_minutes`, beside a number of steps or epochs, has passed."""
        minutes = self.config.train.time_limit_minutes
        return minutes is not None and self.seconds > 60 * minutes


def reproducible(config: RunConfig) -> RunConfig:
    """The configuration to save: a run from it is this run again, in a folder of its own, and is not published."""
    train = dataclasses.replace(config.train, resume=False)
    return dataclasses.replace(config, train=train, hub=HubConfig(), output_dir=None)
