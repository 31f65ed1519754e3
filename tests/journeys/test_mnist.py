"""The whole way on the real MNIST with the default network: train, sample, measure, invert. Minutes, so marked slow."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torchvision.transforms.functional import gaussian_blur

from mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.cli import main
from mnist_diffusion.config import DataConfig, SamplingSettings
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.evaluation.draw import ImageGenerator, Sample
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.score import Reference, embed
from mnist_diffusion.pipelines.drawing import resolved

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mnist_folder: Path) -> Path:
    """A shortened default run, with a snapshot at a third of it."""
    folder = tmp_path_factory.mktemp("mnist") / "run"
    flags = ["--data.source", str(mnist_folder.resolve()), "--output_dir", str(folder), "--train.max_steps", "240"]
    flags += ["--train.snapshot_every", "80 steps", "--train.sample_every", "null"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def reference(mnist_folder: Path) -> Reference:
    data = load_images(DataConfig(source=str(mnist_folder)), seed=0)
    return Reference(data, evaluator_for(data).model)


def test_evaluate_finds_high_class_accuracy(run: Path, mnist_folder: Path, tmp_path: Path) -> None:
    data = ["--data.source", str(mnist_folder.resolve())]
    flags = ["--num_images", "200", "--scheduler", "ddim", "--num_inference_steps", "10"]
    flags += ["--guidance_scale", "4", "--out", str(tmp_path / "report")]
    assert main(["evaluate", str(run / "pipeline"), *data, *flags, "--write_card"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    [result] = report["results"]
    assert result["accuracy"] > 0.93
    assert result["nfe_per_image"] == 16  # guidance acts in six of the ten steps
    assert not result["copies_suspected"]
    assert report["evaluator"]["origin"] == "shipped with the package"
    assert f"{result['fid']:.3f}" in (run / "pipeline" / "README.md").read_text()


def test_order_of_every_metric_that_claims_one(run: Path, reference: Reference) -> None:
    """Real, then trained, then half-trained, then blurred, then noise."""

    def drawn(folder: Path) -> Sample:
        pipeline = MNISTDiffusionPipeline.from_pretrained(folder)
        generator = ImageGenerator(pipeline, reference.data, num_images=250, seed=0, batch_size=125)
        return generator.draw(resolved(pipeline, SamplingSettings(guidance_scale=1.0)))

    real, labels = reference.data.test.spread(250)
    noise = torch.randint(0, 256, real.shape, generator=torch.Generator().manual_seed(0)).byte()
    levels = {
        "real": Sample(real, labels),
        "trained": drawn(run / "pipeline"),
        "half-trained": drawn(run / "snapshots" / "step-80"),
        "blurred": Sample(gaussian_blur(real, 15, 3.0), labels),
        "noise": Sample(noise, labels),
    }
    values: dict[str, dict[str, Any]] = {
        name: reference.measure(embed(reference.evaluator, sample.images, sample.labels)).values
        for name, sample in levels.items()
    }
    for metric, direction in {"fid": 1, "kernel_distance": 1, "accuracy": -1, "coverage": -1, "recall": -1}.items():
        measured = {name: direction * value[metric] for name, value in values.items()}
        assert list(measured) == sorted(measured, key=lambda name: measured[name]), (metric, measured)
