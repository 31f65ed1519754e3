"""Small real components that the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_diffusion.config import Config, DataConfig, ModelConfig, SamplingConfig, TrainConfig
from mnist_diffusion.data import ImageData, load_images
from mnist_diffusion.export import build_pipeline
from mnist_diffusion.model import build_noise_scheduler, build_unet
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import MNISTDiffusionPipeline

REPOSITORY = Path(__file__).parents[1]
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The real MNIST, where this machine has it."""
    folder = os.environ.get("MNIST_DIFFUSION_DATA")
    if folder is None:
        pytest.skip("set MNIST_DIFFUSION_DATA to a folder with MNIST's IDX files to run this test")
    path = Path(folder)
    path = path if path.is_absolute() else REPOSITORY / path
    if not path.is_dir():
        pytest.skip(f"MNIST_DIFFUSION_DATA={folder!r} is not a folder")
    return path


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_images(DataConfig(source="digits"), seed=0)


def make_image_folder(root: Path, *, images_per_class: int = 6, size: tuple[int, int] = (16, 16)) -> Path:
    """RGB pictures in one folder a colour."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for index in range(images_per_class):
            pixels = np.clip(np.array(colour) + random.integers(-40, 40, (*size, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{name} {index}.png")
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "pictures")


def tiny_config(**train: object) -> Config:
    """A run of a few seconds."""
    defaults: dict[str, object] = {
        "max_steps": 4,
        "warmup_steps": 1,
        "num_eval_images": 32,
        "samples_per_class": 1,
        "checkpoint_every_steps": 2,
        "sample_every_steps": None,
        "pictures": False,
    }
    return Config(
        data=DataConfig(source="digits", batch_size=8),
        model=ModelConfig(block_out_channels=(8, 8), norm_num_groups=4),
        sampling=SamplingConfig(num_inference_steps=2),
        train=TrainConfig(**{**defaults, **train}),  # type: ignore[arg-type]
    )


def make_pipeline(
    *, conditional: bool = True, channels: int = 1, seed: int = 0, **changes: object
) -> MNISTDiffusionPipeline:
    """An untrained pipeline of 10 classes and 8 x 8 pixels, whose conditional and null predictions differ."""
    config = Config(**changes)  # type: ignore[arg-type]
    model = ModelConfig(block_out_channels=(8, 16), norm_num_groups=4, class_conditional=conditional)
    unet = build_unet(model, image_size=8, channels=channels, num_classes=10, seed=seed).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.2)
    scheduler = build_noise_scheduler(config.diffusion)
    pipeline = build_pipeline(scheduler, config.sampling, tuple("abcdefghij"), unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> MNISTDiffusionPipeline:
    return make_pipeline()
