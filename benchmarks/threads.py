"""Training images per second by number of threads, on idle cores and on busy ones.

    python benchmarks/threads.py
    python benchmarks/threads.py --recipe tiny --busy 4

OpenMP's threads wait for each other at every layer. How long they spin before they sleep is set when torch is imported,
so each row is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from jsonargparse import auto_cli

REPOSITORY = Path(__file__).parents[1]
OPENMPS_OWN = "300000"
MEASURE = """
import sys, time
import torch
from accelerate import Accelerator
from dataclasses import replace
from mnist_diffusion.config import Config
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import diffusion_objective
from mnist_diffusion.training.step import TrainState

torch.set_num_threads(int(sys.argv[2]))
config = Config.load(sys.argv[1])
config = replace(config, data=replace(config.data, source="digits"))
images = load_images(config.data, seed=0)
unet = build_unet(config.model, image_size=28, channels=1, num_classes=10)
objective = diffusion_objective(config.diffusion, NoisingProcess.of(build_noise_scheduler(config.diffusion)), 10)
state = TrainState(config, Accelerator(), images, unet, objective)
for step in range(3):
    state.update(step, 0.001)
done, started = 0, time.perf_counter()
while time.perf_counter() - started < float(sys.argv[3]):
    state.update(done, 0.001)
    done += 1
print(done * config.data.batch_size / (time.perf_counter() - started))
"""


def main(recipe: str = "default", *, busy: int = 4, seconds: float = 8.0, repeats: int = 1) -> None:
    """Print a table.

    Args:
        recipe: whose network.
        busy: programs beside it that use all that they get.
        seconds: how long each process measures.
        repeats: of which the best counts.
    """
    threads = os.cpu_count() or 1
    rows: dict[str, tuple[int, str | None]] = {"1 thread": (1, None), f"{threads} threads": (threads, None)}
    rows[f"{threads} threads that spin as long as OpenMP's do by default"] = (threads, OPENMPS_OWN)
    print(f"| images/s, {recipe} | idle | {busy} busy programs |\n| --- | --- | --- |")
    for name, (count, spin) in rows.items():
        found = []
        for others in (0, busy):
            beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
            time.sleep(1)
            try:
                found.append(max(_measure(recipe, count, spin, seconds) for _ in range(repeats)))
            finally:
                for process in beside:
                    process.kill()
        print(f"| {name} | {found[0]:.0f} | {found[1]:.0f} |", flush=True)


def _measure(recipe: str, threads: int, spin: str | None, seconds: float) -> float:
    spins = {"GOMP_SPINCOUNT": spin or "10000"}  # else as the training commands set it
    command = [sys.executable, "-c", MEASURE, recipe, str(threads), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **spins}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
