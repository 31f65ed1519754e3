"""How fast digits are drawn: this pipeline, its student, and a plain loop of diffusers with DDIM in 50 guided steps.

    python benchmarks/sampling.py runs/<run>/pipeline --student runs/<student>/pipeline

All are timed in turns, so that the ratios say something on any machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from jsonargparse import auto_cli
from torch import Tensor

from mnist_diffusion.diffusion.pipeline import load_pipeline
from mnist_diffusion.environment import machine_description, set_num_threads
from mnist_diffusion.pictures.tables import markdown
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

STOCK_STEPS, STOCK_SCALE = 50, 2.0


@torch.no_grad()
def stock(pipeline: MNISTDiffusionPipeline, labels: list[int]) -> Tensor:
    """The loop of diffusers' tutorials, around the same network: DDIM, and two passes a step in one batch."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STOCK_STEPS)
    classes = torch.tensor(labels + [pipeline.null_class] * len(labels))
    sample, patch = torch.randn(len(labels), *pipeline.image_shape), pipeline.config.patch_size
    for timestep in scheduler.timesteps:
        patches = F.pixel_unshuffle(torch.cat([sample, sample]), patch)
        prediction = F.pixel_shuffle(pipeline.unet(patches, timestep, class_labels=classes).sample, patch)
        conditional, unconditional = prediction.chunk(2)
        guided = unconditional + STOCK_SCALE * (conditional - unconditional)
        sample = scheduler.step(guided, timestep, sample).prev_sample
    return sample.clamp(-1, 1)


def main(pipeline: str, student: str | None = None, *, batch_size: int = 100, repeats: int = 5) -> None:
    """Print the table.

    Args:
        pipeline: a pipeline folder.
        student: a pipeline folder distilled from it.
        batch_size: digits drawn together.
        repeats: how often each is timed; the median counts.
    """
    set_num_threads()
    teacher = load_pipeline(pipeline, device="cpu")
    draw: dict[str, Callable[[list[int]], object]] = {
        f"plain loop, DDIM, {STOCK_STEPS} steps, guidance {STOCK_SCALE:g}": lambda labels: stock(teacher, labels),
        "default call": lambda labels: teacher(labels, output_type="pt"),
    }
    if student is not None:
        learned = load_pipeline(student, device="cpu")
        draw["student, one pass"] = lambda labels: learned(labels, num_inference_steps=1, output_type="pt")
    seconds: dict[tuple[str, int], list[float]] = {(name, size): [] for name in draw for size in (1, batch_size)}
    for repeat in range(repeats + 1):  # the first is not counted
        for (name, size), times in seconds.items():
            started = time.perf_counter()
            draw[name]([index % 10 for index in range(size)])
            if repeat:
                times.append(time.perf_counter() - started)
    found = {key: statistics.median(times) for key, times in seconds.items()}
    slowest = found[next(iter(draw)), batch_size]
    rows = [
        [name, f"{1000 * found[name, 1]:.0f}", f"{batch_size / found[name, batch_size]:.0f}",
         f"{slowest / found[name, batch_size]:.1f}"]
        for name in draw
    ]  # fmt: skip
    print(f"{machine_description(torch.device('cpu'), 1)}, float32:\n")
    print(markdown(["", "one digit, ms", f"digits/s in batches of {batch_size}", "times as fast"], rows))


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
