"""Evaluate pipelines, or the images of any program: load, sample, embed, score, report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mnist_diffusion.command_options import EvaluationOptions
from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.environment import DEFAULT_DEVICE, launcher, machine_description, package_versions
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.draw import MIN_IMAGES, ImageGenerator, Sample
from mnist_diffusion.evaluation.evaluator import accuracy, evaluator_for, load_evaluator
from mnist_diffusion.evaluation.external import read_sample
from mnist_diffusion.evaluation.inception import ImageNetDistance
from mnist_diffusion.evaluation.report import result_pictures, write_report
from mnist_diffusion.evaluation.score import Reference, require_held_out
from mnist_diffusion.files import pipeline_folder, require_writable
from mnist_diffusion.parallel import is_main
from mnist_diffusion.pipelines.drawing import load_pipeline, resolved, resolved_source
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.training.run_folder import training_fingerprint, with_training_images

MAX_IMAGES = 10_000
TRUSTED_ACCURACY = 0.9
MONITORED = ("accuracy", "fid", "fid_ratio", "precision", "recall")
ONLY_FOR_PIPELINES = {"num_images", *(field.name for field in dataclasses.fields(SamplingSettings))}

Draw = tuple[dict[str, Any], Callable[[], Sample]]
"""The description of a set of images, and a function that samples or returns it."""


def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Score images and write the report; in processes besides the main one, only sample.

    Returns:
        The content of `report.json`; empty in the other processes.

    Raises:
        UserError: something that the user can fix.
    """
    images, seed = with_training_images(options.sources[0], options.data)
    if is_main():
        print(f"Comparing {', '.join(options.sources)} with {images.source or 'MNIST'}", flush=True)
    device = _device(options.device)
    require_writable(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    imagenet = ImageNetDistance(device) if options.imagenet_fid and is_main() else None
    split_seed = (seed or 0) if options.split_seed is None else options.split_seed
    data = load_images(images, seed=split_seed)
    lines = [data.banner, *(note for note in data.notes if note.startswith("WARNING"))] if is_main() else []
    print("".join(f"{line}\n" for line in lines if line), end="")
    require_held_out(data)
    draws = _draws(options, data)
    if not is_main():
        for _, draw in draws:
            draw()
        return {}
    evaluator = evaluator_for(data) if options.evaluator is None else load_evaluator(options.evaluator, data)
    reference = Reference(data, evaluator.model, seed=options.seed)
    share = accuracy(evaluator.model, data.test)
    warnings = [
        f"{each} was trained on other images, or another split of them; copies of its own training images are not found"
        for each in options.sources
        if training_fingerprint(each) not in (None, data.fingerprint)
    ]
    if share < TRUSTED_ACCURACY:
        warnings += [f"the evaluator classifies only {share:.1%} of the held-out images correctly; scores say little"]
    if imagenet is not None:
        imagenet.update(data.train.images, real=True)
    report = {
        "source": ", ".join(options.names or options.sources),
        "data": {
            **{name: getattr(data, name) for name in ("source", "source_id", "hub_id", "fingerprint", "notice")},
            "num_train_images": len(data.train),
            "num_held_out_images": len(data.test),
        },
        "evaluator": {"sha256": evaluator.sha256, "origin": evaluator.origin, "accuracy": share},
        "seed": options.seed,
        "dtype": options.dtype,
        "machine": machine_description(device, 1),
        "processes": launcher().num_processes,
        "versions": package_versions(),
        "warnings": warnings,
        "results": (results := []),
    }
    pictures = []
    for about, draw in tqdm(draws, desc="evaluating", unit="result", disable=len(draws) < 2):
        sample, started = draw(), time.perf_counter()
        scored = reference.score(sample)
        values = dict(scored.values)
        if imagenet is not None:
            values["imagenet_fid"] = imagenet(sample.images)
            values["imagenet_fid_floor"] = imagenet(data.test.images[: len(sample.images)])
        cost = {"nfe_per_image": sample.nfe_per_image, "seconds": sample.seconds}
        results.append({**about, **cost, "metrics_seconds": time.perf_counter() - started, **values})
        pictures.append(result_pictures(sample, data, scored))
        write_report(report, pictures, options.out)  # after each result, so that an interrupted sweep has a report
    return report


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or DEFAULT_DEVICE)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} could not be used: {str(error).splitlines()[0]}") from error
    return device


def _draws(options: EvaluationOptions, data: ImageData) -> list[Draw]:
    """The sets of images to score."""
    first = Path(resolved_source(options.sources[0]))
    if len(options.sources) == 1 and first.exists() and not (pipeline_folder(first) / "model_index.json").is_file():
        if unused := [name for name, value in vars(options).items() if name in ONLY_FOR_PIPELINES and value]:
            raise UserError(f"{', '.join(unused)} can only be given for a pipeline, and {str(first)!r} holds images")
        sample = read_sample(first, data)
        return [({"name": first.name}, lambda: sample)]
    names = options.names or options.sources
    draws: list[Draw] = []
    for name, source in zip(names, options.sources, strict=True):
        pipeline = load_pipeline(source, device=options.device, dtype=options.dtype)
        classes, folder = pipeline.num_classes or 1, options.out / "images"
        of_each = max(min(MAX_IMAGES, len(data.test)) // classes, math.ceil(MIN_IMAGES / classes))
        count = options.num_images or of_each * classes
        numbers: dict[str, Any] = {"num_images": count, "seed": options.seed, "batch_size": options.batch_size}
        generator = ImageGenerator(pipeline, data, **numbers, folder=folder)
        for settings in [resolved(pipeline, each) for each in options.settings()]:
            generator.check(settings)
            title = f"{name}: {settings}" if len(names) > 1 else str(settings)
            about = {**dataclasses.asdict(settings), "pipeline": name, "name": title}
            draws.append((about, partial(generator.draw, settings)))
    return draws


def monitor(
    pipeline: MNISTDiffusionPipeline, data: ImageData, *, num_images: int, seed: int
) -> Callable[..., dict[str, float]]:
    """Make a function that scores a pipeline with its current weights and scheduler, from the same seeds.

    Args:
        pipeline: around the weights in training.
        data: the images it is trained on.
        num_images: images to sample each time.
        seed: random seed of the images.

    Returns:
        A function that returns metrics by name; its arguments, such as `guidance`, go to the pipeline's call.

    Raises:
        UserError: the classes cannot have equally many of `num_images`, or too few images are held out.
    """
    generator = ImageGenerator(pipeline, data, num_images=num_images, seed=seed)
    require_held_out(data)
    reference = Reference(data, evaluator_for(data).model, seed=seed)
    reference.floor(num_images, pipeline.num_classes is not None)

    def measure(**call: Any) -> dict[str, float]:
        values = reference.score(generator.draw(resolved(pipeline, SamplingSettings()), **call)).values
        return {name: values[name] for name in MONITORED if values[name] is not None}

    return measure
