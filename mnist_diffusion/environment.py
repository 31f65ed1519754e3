"""This machine: threads, device, versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch

from mnist_diffusion.errors import UserError

LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Variables that `accelerate launch` and `torchrun` set."""
OFF, ON = ("0", "false", "no"), ("1", "true", "yes")
SWITCHES = {
    "ACCELERATE_USE_CPU": (*OFF, *ON),
    **dict.fromkeys(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"), OFF),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
}
"""Variables of `accelerate launch`, and the values of each that are supported here."""
TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
"""Variables that launchers set together."""
PACKAGES = ("torch", "diffusers", "accelerate", "mnist-diffusion")


@dataclass(frozen=True)
class Launcher:
    """The settings that `accelerate launch` or `torchrun` passes in environment variables."""

    rank: int
    num_processes: int
    local_processes: int
    mixed_precision: str


def launcher() -> Launcher:
    """Read what a launcher has set.

    Raises:
        UserError: a variable has a value that nothing here knows; the message names it.
    """
    for name, taken in SWITCHES.items():
        if (value := os.environ.get(name, taken[0])).lower() not in taken:
            raise UserError(f"{name}={value!r} in the environment is not supported; unset it, or launch without it")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION={precision!r} in the environment must be no, fp16 or bf16")
    rank, size = _count("RANK", 0), _count("WORLD_SIZE", 1)
    local_rank, local_size = _count("LOCAL_RANK", 0), _count("LOCAL_WORLD_SIZE", 1)
    for name, number, limit in (("RANK", rank, size), ("LOCAL_RANK", local_rank, max(size, local_size))):
        if number >= limit:
            raise UserError(f"{name}={number} in the environment must be less than WORLD_SIZE={limit}; unset it")
    if (size > 1 or "LOCAL_RANK" in os.environ) and (missing := [each for each in TOGETHER if each not in os.environ]):
        variable = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else f"WORLD_SIZE={size}"
        raise UserError(f"{variable} is in the environment without {', '.join(missing)}; unset it, or use a launcher")
    return Launcher(rank, size, local_size, precision)


def _count(name: str, least: int) -> int:
    """The whole number in a variable, at least `least`; `least` if it is unset."""
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text!r} in the environment must be a whole number, at least {least}")
    return int(text)


def set_num_threads(threads: int | None = None) -> None:
    """Use every core: launchers set one thread per process unless told otherwise, which halves the speed on a CPU.

    `threads` takes precedence; then OMP_NUM_THREADS, unless it is the 1 that a launcher sets by itself; otherwise the
    physical cores are divided among the processes.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of a list for nested regions
    number = int(first) if first.isdecimal() else 0
    if "OMP_NUM_THREADS" in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(number)  # accelerate takes a number alone
    by_launcher = number == 1 and any(name in os.environ for name in LAUNCHERS)
    if threads is None and (number == 0 or by_launcher):
        from joblib import cpu_count  # a dependency of scikit-learn

        threads = max(1, cpu_count(only_physical_cores=True) // launcher().local_processes)
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
if DEFAULT_DEVICE == "cuda" and (local_rank := os.environ.get("LOCAL_RANK", "")).isdecimal():
    DEFAULT_DEVICE = f"cuda:{int(local_rank) % torch.cuda.device_count()}"  # each process of a machine takes its own
