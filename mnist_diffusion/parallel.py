"""Share the sampling of one command among processes: each writes some of the files in a folder visible to all.

Files that an interrupted command has finished are reused by the next one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.other import get_free_port
from tqdm.auto import tqdm

from mnist_diffusion.environment import launcher
from mnist_diffusion.errors import UserError


def is_main() -> bool:
    """Whether this is the process that reports."""
    return launcher().rank == 0


def build_parts(paths: Sequence[Path], build: Callable[[Path], object]) -> None:
    """Build the files that are missing, each by one of the processes, and wait for all of them.

    Args:
        paths: the files, in a folder that exists.
        build: builds one of them atomically.

    Raises:
        UserError: another process has ended.
    """
    # Over the CPU, whatever samples; the main process may score for hours between two lists of parts.
    state = PartialState(cpu=True, timeout=timedelta(hours=6))
    try:
        state.wait_for_everyone()
        [missing] = broadcast_object_list([[path for path in paths if not path.exists()]])
        with state.split_between_processes(missing) as mine:
            for path in tqdm(mine, desc="sampling", unit="part", leave=False, disable=not is_main()):
                build(path)
        state.wait_for_everyone()
    except (dist.DistBackendError, dist.DistNetworkError) as error:
        raise UserError(
            f"another process ended early ({error!r:.100}); run the command again, finished parts are kept"
        ) from error


def in_processes(count: int, command: Sequence[str], work: Callable[[], int]) -> int:
    """Run `work` in this process and the same command in `count - 1` others; return the exit code.

    Args:
        count: number of processes.
        command: a verb of this package and its arguments.
        work: carries it out here.

    Raises:
        UserError: a launcher has started several processes already.
    """
    if count == 1:
        return work()
    if "RANK" in os.environ:
        raise UserError(f"processes={count} must be 1 under a launcher, which starts processes itself")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    line = [sys.executable, "-m", "mnist_diffusion", *command, "--processes", "1"]
    others = [
        subprocess.Popen(
            line,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # they fail for the same reasons as this one, which says so
        )
        for rank in range(1, count)
    ]
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    try:
        return work()
    finally:
        for process in others:
            process.terminate()
        for process in others:
            process.wait()
