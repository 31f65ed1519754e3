"""How fast the default recipe trains here, by batch size, precision, memory layout and compiling.

    python benchmarks/updates.py path/to/mnist --peak 990

`--peak` is what the device can do in bfloat16, in TFLOP/s; the share of it that is used is then printed too.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch.utils.flop_counter import FlopCounterMode

from mnist_diffusion.config import Config, DataConfig
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.environment import machine_description
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import diffusion_objective
from mnist_diffusion.training.launch import build_accelerator, start_processes
from mnist_diffusion.training.probe import forward_backward
from mnist_diffusion.training.step import TrainState

DEFAULT = Config.load("default")
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, channels-last": {"mixed_precision": "bf16", "channels_last": True},
    "float32, compiled": {"compile": True},
    "bf16, channels-last, compiled": {"mixed_precision": "bf16", "channels_last": True, "compile": True},
}


def main(
    data: str,
    *,
    batch_sizes: tuple[int, ...] = (64, 1024),
    ways: tuple[str, ...] = tuple(WAYS),
    updates: int = 200,
    peak: float | None = None,
) -> None:
    """Print the table.

    Args:
        data: labelled images.
        batch_sizes: images per update.
        ways: which rows.
        updates: how many to time, after some that are not counted.
        peak: what the device can do, in TFLOP/s.
    """
    images = load_images(DataConfig(source=data), seed=0)
    print("| images | | ms per update | images/s | TFLOP/s | of peak |\n|" + " --- |" * 6)
    for size in batch_sizes:
        for way in ways:
            train = replace(DEFAULT.train, **WAYS[way])
            config = replace(DEFAULT, data=DataConfig(source=data, batch_size=size), train=train)
            seconds, work, where = _update(config, images, updates)
            teraflops = work / seconds / 1e12
            share = "" if peak is None else f"{teraflops / peak:.1%}"
            row = (str(size), way, f"{1000 * seconds:.2f}", f"{size / seconds:.0f}", f"{teraflops:.2f}", share)
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\non {where}")


def _update(config: Config, images: ImageData, updates: int) -> tuple[float, float, str]:
    """Seconds and floating-point operations of an update, and the machine."""
    start_processes(config)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = build_accelerator(config, Path(folder))
    shape = {"image_size": images.image_size, "channels": images.channels, "num_classes": images.num_classes}
    unet = build_unet(config.model, **shape)
    scheduler = build_noise_scheduler(config.diffusion)
    objective = diffusion_objective(config.diffusion, NoisingProcess.of(scheduler), images.num_classes)
    state = TrainState(config, accelerator, images, unet, objective)

    def wait() -> None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    for step in range(max(3, updates // 10)):
        state.update(step, 1e-3)
    wait()
    started = time.perf_counter()
    for step in range(updates):
        state.update(step, 1e-3)
    wait()
    seconds = (time.perf_counter() - started) / updates
    plain = TrainState(
        replace(DEFAULT, data=config.data), accelerator, images, build_unet(config.model, **shape), objective
    )
    with FlopCounterMode(display=False) as counter:
        forward_backward(plain, config.data.batch_size)
    return seconds, float(counter.get_total_flops()), machine_description(accelerator.device, 1)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
