"""Processes that share the work of one command: they claim parts of it as files, in a folder that all of them see.

`torchrun`, `accelerate launch` or [`helpers`] start them. All but the first only make parts, and end. A process that
dies gives up what it had claimed, and another takes it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from mnist_diffusion.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.2
HELPED = "MNIST_DIFFUSION_HELPED_PROCESS"
"""Names the process that [`helpers`] has started this one for."""


def rank() -> int:
    """Which of the processes this is; 0 is the one that reports."""
    return int(os.environ.get("RANK") or 0)


def num_processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def make_together(paths: Sequence[Path], make: Callable[[Path], object]) -> None:
    """Make the files that are not there yet, each by one of the processes.

    The first process waits for what others have claimed, and makes it if they die; the others then leave.

    Args:
        paths: the files, in folders that exist.
        make: makes one of them whole.
    """
    first = rank() * len(paths) // num_processes()  # each begins where no other does
    missing = [*paths[first:], *paths[:first]]
    with tqdm(total=len(paths), desc="drawing", unit="part", leave=False, disable=rank() > 0) as bar:
        while missing := [path for path in missing if not path.exists()]:
            bar.update(len(paths) - len(missing) - bar.n)
            for path in missing:
                if os.environ.get(HELPED) not in (None, str(os.getppid())):  # nobody waits for the work any more
                    return
                if path.exists():
                    continue
                with contextlib.suppress(Timeout), FileLock(_lock(path)).acquire(timeout=0):
                    if not path.exists():
                        make(path)
                        bar.update()
            if rank() > 0:
                return
            if not all(path.exists() for path in missing):
                time.sleep(SECONDS_BETWEEN_LOOKS)
    for path in paths:
        _lock(path).unlink(missing_ok=True)


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def helpers(count: int, command: Sequence[str]) -> Iterator[None]:
    """Start a command `count - 1` times beside this process, to make parts of its work, and be silent if this is one.

    Args:
        count: processes in all.
        command: a verb of this package and its arguments.

    Raises:
        UserError: a launcher has started several processes already.
    """
    if count == 1:
        with contextlib.redirect_stdout(None) if rank() > 0 else contextlib.nullcontext():
            yield
        return
    if "RANK" in os.environ:
        raise UserError(f"processes={count} must be 1 under a launcher, which starts processes itself")
    size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = []
    before = {name: os.environ.get(name) for name in (*size, "RANK")}
    os.environ |= {**size, "RANK": "0"}
    try:
        for index in range(1, count):
            environment = {**os.environ, "RANK": str(index), "LOCAL_RANK": str(index), HELPED: str(os.getpid())}
            line = [sys.executable, "-m", "mnist_diffusion", *command, "--processes", "1"]
            started.append(subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL))
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
