"""Agreement among the processes of a run, over the CPU, so that no step waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mnist_diffusion.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long processes wait while the main one saves, evaluates or draws. A process that dies ends the wait at once."""


class Processes:
    """The processes of a run; a single one agrees with itself at once.

    Args:
        accelerator: knows how many there are.
    """

    def __init__(self, accelerator: Accelerator):
        self.alone, self.main = accelerator.num_processes == 1, accelerator.is_main_process
        self.group: Any = None if self.alone else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if self.alone:
            return list(numbers)
        mine = torch.tensor(numbers)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.group)
        return mine.tolist()

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the main process while the others wait; its result, on all of them."""
        return self.on_all(work if self.main else lambda: None)[0]

    def on_all(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every process; the results, which can be pickled. If it fails on one, all of them raise.

        Raises:
            UserError: the work raised one, or a process has ended.
        """
        if self.alone:
            return [work()]
        result, problem = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            problem = str(error)
        outcomes: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(outcomes, (result, problem), group=self.group)
        except RuntimeError as error:
            raise UserError(problem or f"another process ended, or did not answer: {error}") from error
        if first := next((each for _, each in outcomes if each), None):
            raise UserError(first)
        return [result for result, _ in outcomes]
