"""Let the processes of a run agree, over the CPU, so that no step waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mnist_diffusion.errors import UserError

PATIENCE = timedelta(hours=6)
"""How long the others wait while one evaluates or draws."""
SAVE_PATIENCE = timedelta(seconds=60)
"""How long the others wait while one saves."""


class ProcessError(UserError):
    """Another process had a problem, or has ended."""


class Processes:
    """The processes of a run. A single one agrees with itself at once.

    Args:
        accelerator: tells how many there are.
    """

    def __init__(self, accelerator: Accelerator):
        self.alone, self.main = accelerator.num_processes == 1, accelerator.is_main_process
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

    def on_main(self, work: Callable[[], object], *, saving: bool = False) -> None:
        """Do something on the main process while the others wait; if it fails, all of them raise.

        Args:
            work: what to do.
            saving: wait for a minute only, instead of hours.

        Raises:
            UserError: the work raised one, or a process has ended.
        """
        if self.alone:
            work()
            return
        problem = None
        if self.main:
            try:
                work()
            except (UserError, OSError) as error:
                problem = str(error)
        found: list[str | None] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(found, problem, group=self.brisk if saving else self.patient)
        except RuntimeError as error:
            limit = SAVE_PATIENCE if saving else PATIENCE
            gone = f"another process ended, or gave no answer within {limit.total_seconds():.0f} s: {error}"
            raise ProcessError(problem or gone) from error
        if told := next(filter(None, found), None):
            raise ProcessError(told)
