"""What `mnist-diffusion evaluate` does: images in, a report out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from mnist_diffusion.config import DataConfig, SchedulerName
from mnist_diffusion.data import ImageData, load_images
from mnist_diffusion.evaluation.evaluator import accuracy, evaluator_for, load_evaluator
from mnist_diffusion.evaluation.inception import ImageNetDistance
from mnist_diffusion.evaluation.protocol import Reference
from mnist_diffusion.evaluation.report import misread_grid, nearest_grid, sample_grid, write_report
from mnist_diffusion.evaluation.samples import Artist, Sample, read_sample
from mnist_diffusion.records import machine_description, package_versions
from mnist_diffusion.sampling import DEFAULT_DEVICE, load_pipeline


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate, and how; None and empty tuples stand for the pipeline's own."""

    source: str
    data: DataConfig
    num_images: int
    scheduler: tuple[SchedulerName, ...]
    num_inference_steps: tuple[int, ...]
    guidance_scale: tuple[float, ...]
    seed: int
    split_seed: int
    batch_size: int
    device: str | None
    dtype: str
    evaluator: Path | None
    train_on_synthetic: bool
    imagenet_fid: bool
    out: Path


def run(request: Request) -> dict[str, Any]:
    """Measure images and write the report.

    Returns:
        The content of `report.json`.

    Raises:
        UserError: something that the user can put right.
    """
    imagenet = ImageNetDistance() if request.imagenet_fid else None
    data = load_images(request.data, seed=request.split_seed)
    if data.notice:
        print(f"\n{'!' * 100}\n{data.notice}\n{'!' * 100}\n")
    samples = _samples(request, data)
    evaluator = evaluator_for(data) if request.evaluator is None else load_evaluator(request.evaluator)
    request.out.mkdir(parents=True, exist_ok=True)
    reference = Reference(data, evaluator.model, seed=request.seed)
    if imagenet is not None:
        imagenet.set_reference(data.train.images)
    results: list[dict[str, Any]] = []
    pictures: dict[str, list[Any]] = {"samples": [], "misread": [], "nearest": []}
    for about, draw in tqdm(samples, desc="evaluating", unit="result", disable=len(samples) < 2):
        sample = draw()
        started = time.perf_counter()
        measured = reference.report(sample, train_on_synthetic=request.train_on_synthetic)
        values = dict(measured.values)
        if imagenet is not None:
            values["imagenet_fid"] = imagenet(sample.images)
        cost = {"passes_per_image": sample.passes_per_image, "seconds": sample.seconds}
        results.append({**about, **cost, "metrics_seconds": time.perf_counter() - started, **values})
        pictures["samples"].append(sample_grid(sample, data.class_names))
        pictures["misread"].append(misread_grid(sample, measured.read))
        pictures["nearest"].append(nearest_grid(sample, data.train.images, measured.relative, measured.nearest))
    report = {
        "source": request.source,
        "data": {
            "source": data.source,
            "hub_id": data.hub_id,
            "fingerprint": data.fingerprint,
            "notice": data.notice,
            "num_train_images": len(data.train),
            "num_held_out_images": len(data.test),
        },
        "evaluator": {
            "sha256": evaluator.sha256,
            "origin": evaluator.origin,
            "accuracy": accuracy(evaluator.model, data.test),
        },
        "seed": request.seed,
        "machine": machine_description(torch.device(request.device or DEFAULT_DEVICE), 1),
        "versions": package_versions(),
        "results": results,
    }
    write_report(report, pictures, request.out)
    return report


def _samples(request: Request, data: ImageData) -> list[tuple[dict[str, Any], Callable[[], Sample]]]:
    """What is judged: a description of each set of images, and how to get it."""
    path = Path(request.source)
    if path.exists() and not (path / "model_index.json").is_file():
        sample = read_sample(path, data)
        return [({"name": path.name}, lambda: sample)]
    pipeline = load_pipeline(request.source, device=request.device, dtype=request.dtype)
    artist = Artist(
        pipeline,
        data,
        num_images=request.num_images,
        seed=request.seed,
        batch_size=request.batch_size,
        folder=request.out / "images",
    )
    ways = [
        artist.way(*chosen)
        for chosen in itertools.product(
            request.scheduler or (None,), request.num_inference_steps or (None,), request.guidance_scale or (None,)
        )
    ]
    return [({"name": way.name, **asdict(way)}, partial(artist.draw, way)) for way in ways]
