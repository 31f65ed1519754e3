"""How many generated images an independent classifier reads as the class that was asked for.

    python benchmarks/read_as_asked.py runs/<run>/pipeline --data path/to/mnist

Draws the same seeds with the pipeline's default call and with DDIM in 20 steps at guidance scale 5. The classifier
is trained on the data's training split, or taken from `--evaluator` where that folder has one already.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from jsonargparse import auto_cli

from mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.config import DataConfig, TrainConfig
from mnist_diffusion.data import load_images
from mnist_diffusion.evaluation.evaluator import accuracy, load_evaluator, logits_and_features, train_evaluator
from mnist_diffusion.launch import set_num_threads
from mnist_diffusion.sampling import generate


def main(pipeline: str, data: str, evaluator: Path = Path("runs/evaluator"), images_per_class: int = 100) -> None:
    """Print a table row for each way of drawing.

    Args:
        pipeline: a pipeline folder.
        data: the labelled images that the classifier learns from and is tested on.
        evaluator: where the classifier is kept.
        images_per_class: images drawn of each class.
    """
    set_num_threads(TrainConfig())
    images = load_images(DataConfig(source=data), seed=0)
    if not (evaluator / "config.json").is_file():
        train_evaluator(images).save_pretrained(evaluator)
    classifier = load_evaluator(evaluator)
    print(f"classifier: {accuracy(classifier, images.test):.2%} of {len(images.test)} held-out images read right")
    pipe = MNISTDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(images.num_classes).repeat_interleave(images_per_class)
    ways: dict[str, tuple[Any, dict[str, Any]]] = {"default call": (pipe.scheduler, {})}
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    ways["DDIM, 20 steps, guidance 5"] = (ddim, {"guidance_scale": 5, "num_inference_steps": 20})
    print("| call | images | read as asked | worst class | seconds |\n| --- | --- | --- | --- | --- |")
    for name, (scheduler, arguments) in ways.items():
        pipe.scheduler = scheduler
        started = time.perf_counter()
        drawn = generate(pipe, labels.tolist(), range(len(labels)), **arguments)
        seconds = time.perf_counter() - started
        logits, _ = logits_and_features(classifier, (drawn * 255).round().byte())
        right = (logits.argmax(dim=1) == labels).float()
        worst = right.view(images.num_classes, -1).mean(dim=1)
        print(
            f"| {name} | {len(labels)} | {right.mean():.1%} | "
            f"{images.class_names[int(worst.argmin())]}: {worst.min():.0%} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    auto_cli(main)
