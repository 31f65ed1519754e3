"""A student beside its teacher: quality against network passes, speed, and the same noise drawn by both.

    python benchmarks/distillation.py runs/<run>/pipeline runs/<student>/pipeline path/to/mnist --out docs

Prints the table, and writes `distillation_plot.png` and `distillation.png` into `--out`. Images are drawn from the same
seeds throughout; those found in `--images` are used again.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from mnist_diffusion.command_options import EvaluationOptions
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.environment import machine_description, set_num_threads
from mnist_diffusion.evaluation.evaluate import evaluate
from mnist_diffusion.evaluation.report import PLOTS, cells, plot_results
from mnist_diffusion.pipelines.drawing import generate, load_pipeline, with_sampler
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.plots.grids import image_grid
from mnist_diffusion.plots.tables import markdown

STUDENT_STEPS = (1, 2, 4, 8)


def main(
    teacher: str,
    student: str,
    data: str,
    *,
    num_images: int = 10_000,
    teacher_steps: tuple[int, ...] = (2, 5, 10),
    teacher_scales: tuple[float, ...] = (),
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    images: Path = Path("runs/distillation"),
    out: Path = Path("docs"),
) -> None:
    """Measure both, draw both, time the student.

    Args:
        teacher: its pipeline folder.
        student: its pipeline folder.
        data: the labelled images that are the reference.
        num_images: images for each figure.
        teacher_steps: numbers of steps of the teacher.
        teacher_scales: guidance scales of the teacher; the student's if omitted.
        dtype: precision of both networks.
        images: where the images are kept.
        out: the folder for the pictures.
    """
    set_num_threads()
    learned = load_pipeline(student, device=None, dtype=dtype)
    asked = EvaluationOptions(
        sources=(teacher,),
        data=ImagesConfig(source=data),
        num_images=num_images,
        scheduler=("dpmpp",),  # as in its trajectories
        num_inference_steps=teacher_steps,
        guidance_scale=teacher_scales or (learned.config.guidance_scale,),
        batch_size=64,
        dtype=dtype,
        out=images / "teacher",
    )
    report = evaluate(asked)
    of_student = dataclasses.replace(
        asked,
        sources=(student,),
        scheduler=(),
        num_inference_steps=STUDENT_STEPS,
        guidance_scale=(),
        out=images / "student",
    )
    others = tuple(scale for scale in learned.config.guidance_distilled if scale != learned.config.guidance_scale)
    of_scales = dataclasses.replace(of_student, num_inference_steps=(1,), guidance_scale=others, out=images / "scales")
    results = report["results"] + evaluate(of_student)["results"] + (evaluate(of_scales)["results"] if others else [])
    lines = [
        f"`python benchmarks/distillation.py TEACHER STUDENT path/to/mnist --num_images {num_images} --dtype {dtype} "
        f"--teacher_steps '{list(teacher_steps)}' --teacher_scales '{list(asked.guidance_scale)}'`, on "
        f"{machine_description(learned.device, 1)}:",
        "",
        markdown(*cells({**report, "results": results})),
        "",
        *speeds(learned),
    ]
    print("\n".join(lines))
    figure = plot_results(results, *PLOTS["quality_against_nfe"])
    assert figure is not None
    figure.savefig(out / "distillation_plot.png", dpi=100)
    side_by_side(load_pipeline(teacher, device=None, dtype="float32"), student).save(out / "distillation.png")


def speeds(student: MNISTDiffusionPipeline, repeats: int = 51) -> list[str]:
    """One pass: digits a second in batches, and the median time of a single digit, after warm-up."""

    def seconds(count: int, **arguments: Any) -> float:
        labels = [index % 10 for index in range(count)]
        started = time.perf_counter()
        student(labels, num_inference_steps=1, **arguments)
        return time.perf_counter() - started

    for count in (1, 64):
        seconds(count)
    batch = statistics.median(seconds(64, output_type="pt") for _ in range(repeats))
    single = statistics.median(seconds(1) for _ in range(repeats))
    dtype = str(student.dtype).removeprefix("torch.")
    return [
        f"One step, median of {repeats} calls in {dtype}: {64 / batch:.0f} digits/s in batches of 64, "
        f"{1000 * single:.1f} ms for a single digit as a PIL image."
    ]


def side_by_side(teacher: MNISTDiffusionPipeline, student_folder: str) -> Any:
    """The same twenty noises drawn by the teacher in 50 steps and by the student in 1, 2 and 4."""
    student = load_pipeline(student_folder, device=None, dtype="float32")
    teacher = with_sampler(teacher, "dpmpp")
    labels, seeds = [index % 10 for index in range(20)], list(range(20))
    scale = student.config.guidance_scale
    rows = {"teacher, 50 steps": generate(teacher, labels, seeds, num_inference_steps=50, guidance_scale=scale)}
    for steps in STUDENT_STEPS[:3]:
        rows[f"student, {steps}"] = generate(student, labels, seeds, num_inference_steps=steps)
    return image_grid(torch.cat(list(rows.values())), len(labels), row_labels=list(rows))


if __name__ == "__main__":
    auto_cli(main)
