"""The default recipe on the real MNIST: digits that read as asked, by any sampler, and that invert."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from mnist_diffusion.config import DataConfig
from mnist_diffusion.data import ImageData, load_images
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, accuracy, logits_and_features, train_evaluator
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.sampling import build_sampler, generate
from tests.journeys.test_commands import SCRIPT, command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mnist(mnist_folder: Path) -> ImageData:
    return load_images(DataConfig(source=str(mnist_folder)), seed=0)


@pytest.fixture(scope="module")
def classifier(mnist: ImageData) -> ImageEvaluator:
    model = train_evaluator(mnist, epochs=3, progress=False)
    assert accuracy(model, mnist.test) > 0.985
    return model


@pytest.fixture(scope="module")
def pipeline(mnist_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MNISTDiffusionPipeline:
    """Less than five minutes on two cores give, and counted in steps: the machine's speed must not matter."""
    cwd = tmp_path_factory.mktemp("mnist")
    flags = ["--data.source", str(mnist_folder), "--train.max_steps", "900", "--output_dir", "run"]
    command(sys.executable, SCRIPT, *flags, cwd=cwd, timeout=1500)
    pipeline = MNISTDiffusionPipeline.from_pretrained(cwd / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_as_asked(pipeline: MNISTDiffusionPipeline, classifier: ImageEvaluator, count: int, **arguments: Any) -> float:
    labels = torch.arange(10).repeat_interleave(count)
    images = generate(pipeline, labels.tolist(), range(len(labels)), **arguments)
    logits, _ = logits_and_features(classifier, (images * 255).round().byte())
    return float((logits.argmax(dim=1) == labels).float().mean())


def test_default_call(pipeline: MNISTDiffusionPipeline, classifier: ImageEvaluator) -> None:
    assert read_as_asked(pipeline, classifier, 50) >= 0.96


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "unipc"])
def test_other_samplers_with_strong_guidance(
    pipeline: MNISTDiffusionPipeline, classifier: ImageEvaluator, name: Any
) -> None:
    kept, pipeline.scheduler = pipeline.scheduler, build_sampler(name, pipeline.scheduler.config)
    share = read_as_asked(pipeline, classifier, 20, guidance_scale=5, num_inference_steps=20)
    pipeline.scheduler = kept
    assert share >= 0.95


def test_inversion(pipeline: MNISTDiffusionPipeline, mnist: ImageData) -> None:
    images, labels = mnist.test.images[:20].float() / 255, mnist.test.labels[:20]
    kept, pipeline.scheduler = pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)
    latents = pipeline.invert(images, labels, num_inference_steps=50)
    again = pipeline(labels, latents=latents, guidance_scale=1, num_inference_steps=50, output_type="pt").images
    pipeline.scheduler = kept
    psnr = [-10 * math.log10(float(error)) for error in (again - images).square().mean(dim=(1, 2, 3))]
    assert sum(psnr) / len(psnr) > 30
