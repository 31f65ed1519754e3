"""This machine: threads, device, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Variables that `accelerate launch` and `torchrun` set."""
PACKAGES = ("torch", "diffusers", "accelerate", "mnist-diffusion")


def set_num_threads(threads: int | None = None) -> None:
    """Use every core: launchers set one thread per process unless told otherwise, which halves the speed on a CPU.

    `threads` takes precedence; then OMP_NUM_THREADS, unless it is the 1 that a launcher sets by itself; otherwise the
    physical cores are divided among the processes.
    """
    given = int(os.environ.get("OMP_NUM_THREADS") or 0)
    by_launcher = given == 1 and any(name in os.environ for name in LAUNCHERS)
    if threads is None and (given == 0 or by_launcher):
        from joblib import cpu_count  # a dependency of scikit-learn

        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        threads = max(1, cpu_count(only_physical_cores=True) // processes)
    if threads is not None:
        torch.set_num_threads(threads)


def machine_description(device: torch.device, processes: int) -> str:
    """The machine in a few words, without its name."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def package_versions() -> dict[str, str]:
    """Versions of Python and the packages that shape a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
if DEFAULT_DEVICE == "cuda" and (local_rank := int(os.environ.get("LOCAL_RANK") or 0)):
    DEFAULT_DEVICE = f"cuda:{local_rank % torch.cuda.device_count()}"  # each process of a machine takes its own
