"""How fast digits are drawn: this pipeline, its student, its student in ONNX Runtime, and a plain loop of diffusers
with DDIM in 50 guided steps.

    python benchmarks/sampling.py runs/mnist --student runs/student --data path/to/mnist

All are timed in turns, so that the ratios say something on any machine. With `--data`, the images of each are measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from jsonargparse import auto_cli
from torch import Tensor

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.data.transforms import to_uint8
from mnist_diffusion.environment import DEFAULT_DEVICE, machine_description, set_num_threads
from mnist_diffusion.evaluation.draw import Sample
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.score import Reference
from mnist_diffusion.pipelines.drawing import load_pipeline
from mnist_diffusion.pipelines.onnx import export_onnx
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline, predicted_original_sample
from mnist_diffusion.plots.tables import markdown

STOCK_STEPS, STOCK_SCALE = 50, 2.0


@torch.no_grad()
def stock(pipeline: MNISTDiffusionPipeline, labels: list[int]) -> Tensor:
    """The loop of diffusers' tutorials, around the same network: DDIM, and two passes a step in one batch."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STOCK_STEPS)
    classes = torch.tensor(labels + [pipeline.null_class] * len(labels), device=pipeline.device)
    sample, patch = torch.randn(len(labels), *pipeline.image_shape).to(classes.device), pipeline.config.patch_size
    for timestep in scheduler.timesteps:
        patches = F.pixel_unshuffle(torch.cat([sample, sample]), patch)
        prediction = pipeline.unet(patches.to(pipeline.dtype), timestep, class_labels=classes).sample.float()
        prediction = F.pixel_shuffle(prediction, patch)
        conditional, unconditional = prediction.chunk(2)
        guided = unconditional + STOCK_SCALE * (conditional - unconditional)
        sample = scheduler.step(guided, timestep, sample).prev_sample
    return (sample / 2 + 0.5).clamp(0, 1)


def in_onnx_runtime(student: MNISTDiffusionPipeline, folder: Path) -> Callable[[list[int]], Tensor]:
    """One pass of a student by its exported network."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(export_onnx(student, folder), options, ["CPUExecutionProvider"])
    timestep = student.scheduler.config.num_train_timesteps - 1
    alpha = student.scheduler.alphas_cumprod[timestep]

    def draw(labels: list[int]) -> Tensor:
        noise = torch.randn(len(labels), *student.image_shape)
        levels = np.full(len(labels), timestep, dtype=np.float32)
        inputs = {"sample": noise.numpy(), "timestep": levels, "class_labels": np.array(labels)}
        [velocity] = session.run(None, inputs)
        images = predicted_original_sample(torch.from_numpy(velocity), noise, alpha, "v_prediction")
        return (images / 2 + 0.5).clamp(0, 1)

    return draw


def main(
    pipeline: str,
    student: str | None = None,
    *,
    data: str | None = None,
    num_images: int = 10_000,
    batch_size: int = 100,
    repeats: int = 5,
    device: str = DEFAULT_DEVICE,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compiled: bool = False,
) -> None:
    """Print the table.

    Args:
        pipeline: a pipeline folder.
        student: a pipeline folder distilled from it.
        data: labelled images, to measure what is drawn by.
        num_images: drawn in each way to measure them.
        batch_size: digits drawn together.
        repeats: how often each is timed; the median counts.
        device: where to draw.
        dtype: precision of the networks.
        compiled: also time compiled networks.
    """
    set_num_threads()
    teacher = load_pipeline(pipeline, device=device, dtype=dtype)
    draw: dict[str, Callable[[list[int]], Tensor]] = {
        f"plain loop, DDIM, {STOCK_STEPS} steps, guidance {STOCK_SCALE:g}": lambda labels: stock(teacher, labels),
        "default call": lambda labels: teacher(labels, output_type="pt").images,
    }
    if student is not None:
        learned = load_pipeline(student, device=device, dtype=dtype)
        draw["student, 1 step"] = lambda labels: learned(labels, num_inference_steps=1, output_type="pt").images
        if learned.device.type == "cpu" and dtype == "float32":
            with tempfile.TemporaryDirectory() as folder:
                draw["student, 1 step, ONNX Runtime"] = in_onnx_runtime(learned, Path(folder))
    quality = {name: ["", "", ""] for name in draw} if data is None else _quality(draw, data, num_images)
    if compiled:
        faster = load_pipeline(pipeline, device=device, dtype=dtype)
        faster.unet.compile(mode="reduce-overhead", dynamic=False)
        draw["default call, compiled"] = lambda labels: faster(labels, output_type="pt").images
    seconds: dict[tuple[str, int], list[float]] = {(name, size): [] for name in draw for size in (1, batch_size)}
    for repeat in range(repeats + 2):  # the first two are not counted
        for (name, size), times in seconds.items():
            started = time.perf_counter()
            draw[name]([index % 10 for index in range(size)]).cpu()
            if repeat > 1:
                times.append(time.perf_counter() - started)
    found = {key: statistics.median(times) for key, times in seconds.items()}
    slowest = found[next(iter(draw)), batch_size]
    rows = [
        [name, f"{1000 * found[name, 1]:.1f}", f"{batch_size / found[name, batch_size]:.0f}",
         f"{slowest / found[name, batch_size]:.1f}", *quality.get(name, ["", "", ""])]
        for name in draw
    ]  # fmt: skip
    headings = ["", "one digit, ms", f"digits/s in batches of {batch_size}", "times as fast"]
    print(f"{machine_description(teacher.device, 1)}, {dtype}:\n")
    print(markdown([*headings, "class accuracy", "FID", "recall"], rows))


def _quality(
    draw: dict[str, Callable[[list[int]], Tensor]], data: str, num_images: int, batch_size: int = 500
) -> dict[str, list[str]]:
    """Class accuracy, Fréchet distance and recall of what is drawn in each way."""
    images = load_images(ImagesConfig(source=data), seed=0)
    reference, labels = Reference(images, evaluator_for(images).model), torch.arange(num_images) % 10
    found = {}
    for name, drawn in draw.items():
        torch.manual_seed(0)
        parts = [to_uint8(drawn(part.tolist()).cpu() * 2 - 1) for part in labels.split(batch_size)]
        values = reference.score(Sample(torch.cat(parts), labels)).values
        found[name] = [f"{values['accuracy']:.2%}", f"{values['fid']:.3f}", f"{values['recall']:.1%}"]
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
