"""Measure pipelines, or the images of any program: images in, a report out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mnist_diffusion.checks import PLAIN_GUIDANCE, pairs_of_levels
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.diffusion.pipeline import load_pipeline
from mnist_diffusion.environment import DEFAULT_DEVICE, machine_description, package_versions
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.evaluator import (
    TrustedEvaluator,
    accuracy,
    evaluator_for,
    load_evaluator,
    random_features,
)
from mnist_diffusion.evaluation.external import read_sample
from mnist_diffusion.evaluation.generated import ImageGenerator
from mnist_diffusion.evaluation.inception import ImageNetDistance
from mnist_diffusion.evaluation.protocol import Reference
from mnist_diffusion.evaluation.report import misclassified_grid, nearest_grid, sample_grid, write_report
from mnist_diffusion.files import pipeline_folder
from mnist_diffusion.ranks import num_processes, rank
from mnist_diffusion.requests import EvaluationRequest
from mnist_diffusion.run_folder.read import images_beside
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

NUM_IMAGES = 10_000
TRUSTED_ACCURACY = 0.9
MONITORED = ("accuracy", "fid", "fid_ratio", "precision", "recall")

Draws = list[tuple[dict[str, Any], Callable[[], Any]]]
"""Descriptions of sets of images, each with a function that gets the images, or helps another process to draw them."""


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """Measure images and write the report; of several processes the first does, and the others help it to draw.

    Returns:
        The content of `report.json`; of a helper, nothing.

    Raises:
        UserError: something that the user can put right.
    """
    if (found := images_beside(request.sources[0], request.data)) is not None:
        split_seed = found[1] if request.split_seed is None else request.split_seed
        request = replace(request, data=replace(request.data, **found[0]), split_seed=split_seed)
    print(f"Measuring {', '.join(request.sources)} against {request.data.source or 'MNIST'}", flush=True)
    device = _device(request.device)
    request.out.mkdir(parents=True, exist_ok=True)
    # Its sums are of float64, which Apple's GPUs do not know.
    imagenet = (
        ImageNetDistance(torch.device("cpu") if device.type == "mps" else device)
        if request.imagenet_fid and rank() == 0
        else None
    )
    data = load_images(request.data, seed=request.split_seed or 0).in_memory()
    print(data.banner, end="")
    draws = _draws(request, data)
    if rank() > 0:
        for _, draw in draws:
            draw()
        return {}
    evaluator = evaluator_for(data) if request.evaluator is None else load_evaluator(request.evaluator, data)
    judges = {name: judge.model for name, judge in _judges(data).items()} if request.second_opinion else {}
    reference = Reference(data, evaluator.model, seed=request.seed, judges=judges)
    reached = accuracy(evaluator.model, data.test)
    if reached < TRUSTED_ACCURACY:
        print(f"warning: the evaluator classifies {reached:.1%} of the held-out images correctly: figures say little")
    if imagenet is not None:
        imagenet.update(data.train.tensor, real=True)
    report = {
        "source": ", ".join(request.names or request.sources),
        "data": {
            **{name: getattr(data, name) for name in ("source", "hub_id", "fingerprint", "notice")},
            "num_train_images": len(data.train),
            "num_held_out_images": len(data.test),
        },
        "evaluator": {"sha256": evaluator.sha256, "origin": evaluator.origin, "accuracy": reached},
        "seed": request.seed,
        "dtype": request.dtype,
        "machine": machine_description(device, 1),
        "processes": num_processes(),
        "versions": package_versions(),
        "results": (results := []),
    }
    pictures: dict[str, list[Any]] = {"samples": [], "misclassified": [], "nearest": []}
    for about, draw in tqdm(draws, desc="evaluating", unit="result", disable=len(draws) < 2):
        sample = draw()
        started = time.perf_counter()
        measured = reference.report(sample, train_on_synthetic=request.train_on_synthetic)
        values = dict(measured.values)
        if imagenet is not None:
            values["imagenet_fid"] = imagenet(sample.images)
            values["imagenet_fid_floor"] = imagenet(data.test.tensor[: len(sample.images)])
        cost = {"passes_per_image": sample.passes_per_image, "seconds": sample.seconds}
        results.append({**about, **cost, "metrics_seconds": time.perf_counter() - started, **values})
        pictures["samples"].append(sample_grid(sample, data.class_names))
        pictures["misclassified"].append(misclassified_grid(sample, measured.predicted))
        pictures["nearest"].append(nearest_grid(sample, data.train.tensor, measured))
        # After each result, so that an interrupted sweep has a report of what is done.
        write_report(report, pictures, request.out)
    return report


def _judges(data: ImageData) -> dict[str, TrustedEvaluator]:
    """The networks of a second opinion, by the names of their distances."""
    nothing_learned = TrustedEvaluator(random_features(data), "", "random weights")
    return {"second_fid": evaluator_for(data, "transformer"), "random_fid": nothing_learned}


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or DEFAULT_DEVICE)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} could not be used: {str(error).splitlines()[0]}") from error
    return device


def _draws(request: EvaluationRequest, data: ImageData) -> Draws:
    """The sets of images to measure."""
    first = Path(request.sources[0])
    if len(request.sources) == 1 and first.exists() and not (pipeline_folder(first) / "model_index.json").is_file():
        asked = ("num_images", "scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "guidance")
        if idle := [name for name in asked if getattr(request, name)]:
            raise UserError(f"{', '.join(idle)} can only be given for a pipeline, and {str(first)!r} holds images")
        sample = read_sample(first, data)
        return [({"name": first.name}, lambda: sample)]
    names = request.names or request.sources
    found = []
    for name, source in zip(names, request.sources, strict=True):
        for about, draw in _pipeline_draws(source, request, data):
            title = f"{name}: {about['name']}" if len(names) > 1 else about["name"]
            found.append(({**about, "pipeline": name, "name": title}, draw))
    return found


def _pipeline_draws(source: str, request: EvaluationRequest, data: ImageData) -> Draws:
    """The images of one pipeline by each of the settings asked for, tried on a first step."""
    generator = ImageGenerator(
        load_pipeline(source, device=request.device, dtype=request.dtype),
        data,
        num_images=request.num_images or NUM_IMAGES,
        seed=request.seed,
        batch_size=request.batch_size,
        folder=request.out / "images",
    )
    own = (None,)
    schedulers, steps, scales = request.scheduler, request.num_inference_steps, request.guidance_scale
    guided = pairs_of_levels("guidance_interval", request.guidance_interval), request.guidance or (PLAIN_GUIDANCE,)
    asked = itertools.product(schedulers or own, steps or own, scales or own, guided[0] or own, guided[1])
    chosen = [generator.settings(*each) for each in asked]
    for settings in chosen:
        generator.check(settings)
    draw = generator.draw if rank() == 0 else generator.help_to_draw
    return [({"name": each.name, **asdict(each)}, partial(draw, each)) for each in chosen]


def monitor(
    pipeline: MNISTDiffusionPipeline, data: ImageData, *, num_images: int, seed: int
) -> Callable[..., dict[str, float]]:
    """Make a function that measures a pipeline as it then is, with its weights and its scheduler, from the same seeds.

    Args:
        pipeline: around the weights that are trained.
        data: the images it is trained on.
        num_images: how many to draw each time.
        seed: of the images.

    Returns:
        The figures to follow, by name, when it is called. Its arguments, such as `guidance`, go to the pipeline's call.

    Raises:
        UserError: `num_images` is not the same number for each class.
    """
    data = data.in_memory()
    drawing = partial(ImageGenerator, pipeline, data, num_images=num_images, seed=seed)
    drawing()  # which refuses what cannot work
    reference = Reference(data, evaluator_for(data).model, seed=seed)
    reference.floor(num_images)

    def measure(**arguments: Any) -> dict[str, float]:
        generator = drawing(arguments=arguments)
        values = reference.report(generator.draw(generator.settings())).values
        return {name: values[name] for name in MONITORED if values[name] is not None}

    return measure
