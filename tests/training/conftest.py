"""Short runs on real digits with a tiny network, and what they leave."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mnist_diffusion.config import Config
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import diffusion_objective
from mnist_diffusion.training.launch import build_accelerator
from mnist_diffusion.training.run import train
from mnist_diffusion.training.run_folder import read_metrics
from mnist_diffusion.training.step import TrainState
from tests.conftest import tiny_config

LOSSES = ("step", "epoch", "loss", "grad_norm", "learning_rate")


def run(config: Config, folder: Path, **options: Any) -> Path:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **options), output_dir=str(folder))
    assert train(config, recipe="tiny").exit_code == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in LOSSES) for line in read_metrics(folder / "metrics.jsonl")]


def make_state(config: Config, tmp_path: Path) -> TrainState:
    data = load_images(config.data, seed=config.train.seed)
    unet = build_unet(config.model, image_size=data.image_size, channels=data.channels, num_classes=data.num_classes)
    scheduler = build_noise_scheduler(config.diffusion)
    objective = diffusion_objective(config.diffusion, NoisingProcess.of(scheduler), data.num_classes)
    return TrainState(config, build_accelerator(config, tmp_path), data, unet, objective)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return run(tiny_config(sample_every="3 steps", snapshot_every="2 steps"), folder, max_steps=5)
