"""What the processes of a run agree on, over the CPU, so that no step waits for a GPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

PATIENCE = timedelta(hours=6)
"""How long a process waits for one that evaluates or draws."""
SAVE_PATIENCE = timedelta(seconds=60)
"""How long a process waits for one that saves."""


class Together:
    """The processes of a run; alone, everything is agreed on at once.

    Args:
        accelerator: tells how many there are.
    """

    def __init__(self, accelerator: Accelerator):
        self.alone = accelerator.num_processes == 1
        if not self.alone:
            self.patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
            self.brisk: Any = dist.new_group(backend="gloo", timeout=SAVE_PATIENCE)

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if self.alone:
            return list(numbers)
        mine = torch.tensor(numbers)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.patient)
        return mine.tolist()

    def wait(self) -> None:
        """Go on when all have come here; for hours, where one evaluates."""
        if not self.alone:
            dist.barrier(group=self.patient)

    def problem(self, mine: str | None) -> str | None:
        """The first problem that a process has with a save, or None; known within a minute of it.

        A process that has ended, or gives no answer in that time, is a problem too.
        """
        if self.alone:
            return mine
        found: list[str | None] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(found, mine, group=self.brisk)
        except RuntimeError as error:
            return mine or f"another process ended, or gave no answer within {SAVE_PATIENCE.seconds} s: {error}"
        return next((each for each in found if each is not None), None)
