"""Small real components that the tests share."""

import copy
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from huggingface_hub import constants
from PIL import Image

from mnist_diffusion.cli.options import RunArguments, parse_run
from mnist_diffusion.config import Config, DataConfig, DistillConfig
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.noise import build_noise_scheduler
from mnist_diffusion.pipelines.card import REPO_PLACEHOLDER
from mnist_diffusion.pipelines.drawing import build_pipeline
from mnist_diffusion.pipelines.folder import export_pipeline
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import SAMPLERS
from mnist_diffusion.training.checkpoint import save_checkpoint
from tests.support.hub_server import HubServer

REPOSITORY = Path(__file__).parents[1]

# Each worker keeps to one core, with the processes that it starts: threads that wait for each other end all speed.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)
ALL_SAMPLERS = [
    *SAMPLERS,
    *("DEISMultistepScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    "TCDScheduler",
]
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, whose network is trained once, so that no other worker takes one of them over."""
    items.sort(key=lambda item: item.path.name != "test_mnist.py")


# Under nohup, and on some CI machines, INT is ignored, and so it would be in all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Accelerate keeps device and precision for the life of a process; each test here is a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


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


def parse_train(argv: Sequence[str]) -> RunArguments[Config]:
    return parse_run(Config, argv, prog="train_cfg.py")


def parse_distill(argv: Sequence[str]) -> RunArguments[DistillConfig]:
    return parse_run(DistillConfig, argv, "distillation.teacher", prog="distill")


def changed(config: Any, **sections: dict[str, Any]) -> Any:
    """A configuration with other values in some of its sections."""
    values = {name: dataclasses.replace(getattr(config, name), **changes) for name, changes in sections.items()}
    return dataclasses.replace(config, **values)


DEFAULT = changed(
    Config.load("default"),
    diffusion={"noise_shift": 1.0},
    sampling={"scheduler": "dpmpp", "num_inference_steps": 10, "guidance_scale": 1.9, "noise_interval": None},
)
"""The recipe that most tests shrink, on a plain schedule and with a deterministic sampler, as references are."""


def tiny_config(**train: object) -> Config:
    """A run of a few seconds."""
    short = {"max_steps": 4, "warmup_steps": 1, "num_eval_images": 32, "samples_per_class": 1}
    quiet = {"checkpoint_every": "2 steps", "sample_every": None, "pictures": False}
    return changed(
        DEFAULT,
        data={"source": "digits", "batch_size": 8},
        model={"block_out_channels": (8, 8), "norm_num_groups": 4},
        sampling={"num_inference_steps": 2},
        train={**short, **quiet, **train},
    )


@lru_cache
def untrained_network(conditional: bool, channels: int, seed: int) -> UNet2DModel:
    """A network of 10 classes and 8 x 8 pixels, to be copied, whose conditional and null predictions differ."""
    shape: dict[str, Any] = {"block_out_channels": (8, 16), "patch_size": 1, "norm_num_groups": 4}
    model = dataclasses.replace(DEFAULT.model, class_conditional=conditional, **shape)
    unet = build_unet(model, image_size=8, channels=channels, num_classes=10, seed=seed).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.2)
    return unet


def make_pipeline(
    *,
    conditional: bool = True,
    channels: int = 1,
    seed: int = 0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    **changes: object,
) -> MNISTDiffusionPipeline:
    """An untrained pipeline around a copy of that network, guided at every step unless asked otherwise."""
    config = dataclasses.replace(DEFAULT, **changes)
    sampling = dataclasses.replace(config.sampling, guidance_interval=guidance_interval)
    unet = copy.deepcopy(untrained_network(conditional, channels, seed))
    scheduler = build_noise_scheduler(config.diffusion)
    pipeline = build_pipeline(scheduler, sampling, tuple("abcdefghij"), unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> MNISTDiffusionPipeline:
    return make_pipeline()


def card_of(pipeline: MNISTDiffusionPipeline) -> dict[str, Any]:
    """What the card of a pipeline is rendered from."""
    about: dict[str, Any] = {"title": "a run", "location": REPO_PLACEHOLDER, "parameters": 1, "minutes": 1.5}
    about |= {"example_call": "pipeline(class_labels=[3], guidance_scale=5)", "num_classes": 10, "config": "data:\n"}
    defaults = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_distilled", "flow_matching")
    return {**about, "loss": None, "held_out_loss": None, **{name: pipeline.config[name] for name in defaults}}


def run_folder(folder: Path) -> Path:
    """A run's folder as training leaves it: an untrained pipeline with a card, two checkpoints, and what is around."""
    pipeline = make_pipeline()
    export_pipeline(pipeline, folder / "pipeline", card=card_of(pipeline), samples=Image.new("L", (8, 8)))
    for step in (1, 2):
        tensors = {"model": {"w": torch.full((3,), float(step))}}
        save_checkpoint(folder / "checkpoints", step, tensors, {"n": step}, keep=2, about={"run_id": "r"})
    (folder / "logs").mkdir()
    metrics = '{"step": 1, "epoch": 0.1}\n{"step": 2, "epoch": 0.2}\n'
    written = {"config.yaml": tiny_config().to_yaml(), "summary.json": '{"step": 2}', "metrics.jsonl": metrics}
    for name, text in {**written, "run_id": "r", "logs/events": "private", "pipeline/notes.txt": "private"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def use_hub(url: str, cache: Path) -> None:
    """Point this process's Hub client at a server; a process that has not imported it yet is told by HF_ENDPOINT."""
    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(cache)
    constants.HF_HUB_DISABLE_XET = True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of its own, with its owner logged in, whose client does not wait before it tries again."""
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET"):
        monkeypatch.setattr(constants, name, getattr(constants, name))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_owner0123456789")
    with HubServer() as server:
        use_hub(server.url, tmp_path / "cache")
        yield server


@pytest.fixture
def made_run(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run")
