"""Share of digits read as asked for each sampler and number of steps; writes the table of docs/samplers.md.

    python benchmarks/samplers.py runs/<run>/pipeline path/to/mnist

Every cell draws the same seeds at the pipeline's default guidance. The classifier is that of read_as_asked.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from jsonargparse import auto_cli

from mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.config import DataConfig, TrainConfig
from mnist_diffusion.data import load_images
from mnist_diffusion.evaluation.evaluator import accuracy, load_evaluator, logits_and_features, train_evaluator
from mnist_diffusion.launch import set_num_threads
from mnist_diffusion.records import machine_description
from mnist_diffusion.sampling import SAMPLERS, build_sampler, generate


def main(
    pipeline: str,
    data: str,
    *,
    evaluator: Path = Path("runs/evaluator"),
    images_per_class: int = 100,
    steps: tuple[int, ...] = (5, 10, 20, 50),
    out: Path | None = None,
) -> None:
    """Print the table, a row a sampler.

    Args:
        pipeline: a pipeline folder.
        data: the labelled images that the classifier learns from and is tested on.
        evaluator: where the classifier is kept.
        images_per_class: images drawn of each class in each cell.
        steps: the numbers of steps, a column each.
        out: a file for the table; it is written anew after each row.
    """
    set_num_threads(TrainConfig())
    images = load_images(DataConfig(source=data), seed=0)
    if not (evaluator / "config.json").is_file():
        train_evaluator(images).save_pretrained(evaluator)
    classifier = load_evaluator(evaluator)
    pipe = MNISTDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(images.num_classes).repeat_interleave(images_per_class)
    config = pipe.scheduler.config
    machine, share = machine_description(pipe.device, 1), accuracy(classifier, images.test)
    lines = [
        f"{len(labels)} images a cell at guidance {pipe.config.guidance_scale}, on {machine}; the classifier reads "
        f"{share:.2%} of the held-out images right.",
        "",
        "| sampler | " + " | ".join(f"{count} steps" for count in steps) + " |",
        "| --- |" + " --- |" * len(steps),
    ]
    print("\n".join(lines), flush=True)
    for name in SAMPLERS:
        cells = []
        started = time.perf_counter()
        for count in steps:
            pipe.scheduler = build_sampler(name, config)
            try:
                drawn = generate(pipe, labels.tolist(), range(len(labels)), num_inference_steps=count)
            except ValueError:
                cells.append("refused")
                continue
            logits, _ = logits_and_features(classifier, (drawn * 255).round().byte())
            cells.append(f"{(logits.argmax(dim=1) == labels).float().mean():.1%}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        print(lines[-1], f"<!-- {time.perf_counter() - started:.0f} s -->", flush=True)
        if out is not None:
            out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main)
