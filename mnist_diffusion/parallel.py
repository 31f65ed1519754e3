"""Processes that share the sampling of one command: each builds its share of files in a folder that all of them see.

Parts that an interrupted command has left are found again by the next one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from mnist_diffusion.errors import UserError


def is_main() -> bool:
    """Whether this is the process that reports."""
    return int(os.environ.get("RANK") or 0) == 0


def num_processes() -> int:
    """How many processes share the work."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def build_parts(paths: Sequence[Path], build: Callable[[Path], object]) -> None:
    """Build the files that are missing, each by one of the processes, and wait for all of them.

    Args:
        paths: the files, in a folder that exists.
        build: builds one of them atomically.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    missing = [path for path in paths if not path.exists()]
    state.wait_for_everyone()  # before the first is built, so that all processes split the same list
    with state.split_between_processes(missing) as mine:
        for path in tqdm(mine, desc="sampling", unit="part", leave=False, disable=not is_main()):
            build(path)
    state.wait_for_everyone()


def run_in_processes(count: int, command: Sequence[str]) -> int | None:
    """Run a command of this package again in `count` processes; its exit code, or None if this process is to do it.

    Args:
        count: number of processes.
        command: a verb of this package and its arguments.

    Raises:
        UserError: a launcher has started several processes already.
    """
    if count == 1:
        return None
    if "RANK" in os.environ:
        raise UserError(f"processes={count} must be 1 under a launcher, which starts processes itself")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **os.environ}
    command = [*torchrun, "-m", "mnist_diffusion", *command, "--processes", "1"]
    return subprocess.run(command, env=environment, check=False).returncode
