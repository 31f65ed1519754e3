"""What surviving costs: saves, agreement, the log and the check of the loss, as a share of training time.

python benchmarks/overhead.py path/to/mnist

All parts are timed in one process with the default recipe, and set against its updates at the default intervals.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import auto_cli

from mnist_diffusion.config import Config
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.environment import machine_description
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import diffusion_objective
from mnist_diffusion.option_types import parse_interval
from mnist_diffusion.training.checkpoint import save_checkpoint
from mnist_diffusion.training.distributed import Processes
from mnist_diffusion.training.launch import build_accelerator, start_processes
from mnist_diffusion.training.run_folder import append_metrics
from mnist_diffusion.training.step import TrainState


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of several runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(data: str, updates: int = 60) -> None:
    """Print each part and its share of the training time.

    Args:
        data: labelled images.
        updates: how many updates to time.
    """
    default = Config.load("default")
    config = replace(default, data=replace(default.data, source=data))
    start_processes(config)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        accelerator, images = build_accelerator(config, root), load_images(config.data, seed=0)
        unet = build_unet(config.model, image_size=images.image_size, channels=images.channels, num_classes=10)
        scheduler = build_noise_scheduler(config.diffusion)
        objective = diffusion_objective(config.diffusion, NoisingProcess.of(scheduler), 10)
        state, processes = TrainState(config, accelerator, images, unet, objective), Processes(accelerator)
        log, measured = root / "metrics.jsonl", state.update(0, 1e-3)

        def check() -> None:
            bad = state._is_non_finite(measured)
            first = state.first_non_finite_step
            state.first_non_finite_step = torch.where((first < 0) & bad, 1, first)

        def save() -> None:
            tensors, values = state.to_checkpoint()
            save_checkpoint(root / "checkpoints", 1, tensors, {**values, "config": config.to_dict()}, keep=2)

        seconds = {
            "update": median_seconds(lambda: state.update(1, 1e-3), updates),
            "check of the loss": median_seconds(check, 200),
            "agreement": median_seconds(lambda: processes.largest(0, 0), 200),
            "log": median_seconds(lambda: append_metrics(log, [{"step": 1, "loss": 0.1, "grad_norm": 0.1}] * 50), 20),
            "checkpoint": median_seconds(save, 10),
        }
    train = config.train
    checkpoint_every, _ = parse_interval(train.checkpoint_every or "")
    every = {"log": train.log_every_steps, "checkpoint": int(checkpoint_every)}
    shares = {name: value / every.get(name, 1) / seconds["update"] for name, value in seconds.items()}
    print(f"on {machine_description(accelerator.device, 1)}, {config.data.batch_size} images per update\n")
    print("| part | milliseconds | every | share of training |\n| --- | --- | --- | --- |")
    for name, value in seconds.items():
        interval = f"{every[name]} steps" if name in every else "step"
        share = "" if name == "update" else f"{shares[name]:.3%}"
        print(f"| {name} | {1000 * value:.3f} | {interval} | {share} |")
    print(f"| all but the update | | | {sum(shares.values()) - 1:.2%} |")


if __name__ == "__main__":
    auto_cli(main)
