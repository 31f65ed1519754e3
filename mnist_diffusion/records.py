"""What a run writes down: a line a step, trackers, a summary."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

PACKAGES = ("torch", "diffusers", "accelerate", "mnist-diffusion")


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each step once, also over resumes.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def cut_after(self, step: int) -> None:
        """Drop the lines of later steps, which belong to work that is done again."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Add lines, on the disk before a checkpoint may count on them."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one that was cut off; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, nothing between."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any], *, run_name: str, run_id: str | None) -> None:
    """Start the trackers that the accelerator was built with, with the flattened configuration.

    wandb goes on with the run of the same id, where there is one.
    """
    if not accelerator.log_with:
        return
    wandb = {"name": run_name, "dir": accelerator.project_dir, "id": run_id, "resume": "allow"}
    accelerator.init_trackers("mnist-diffusion", config=_flat(config), init_kwargs={"wandb": wandb})


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def track_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to every tracker."""
    values = np.asarray(picture.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: values}, step=step, **layout)


def machine_description(device: torch.device, processes: int) -> str:
    """The machine in a few words, without its name."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({platform.machine()})"


def package_versions() -> dict[str, str]:
    """Versions of Python and the packages that shape a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
