"""The options of the commands that take a pipeline: one sentence per field, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mnist_diffusion.checks import (
    PLAIN_GUIDANCE,
    pairs_of_levels,
    require,
    require_at_least,
    require_between,
    require_guidance,
    require_sampler,
)
from mnist_diffusion.config import ImagesConfig

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class DrawingRequest:
    """How a pipeline draws many images."""

    seed: int = 0
    """The same seed draws the same images, whatever the batch size."""
    batch_size: int | None = None
    """Images drawn together; null takes as many as suit their size and the device."""
    device: str | None = None
    """Such as cpu or cuda:0; null takes a GPU if there is one."""
    dtype: Precision = "float32"
    """Precision of the network."""
    processes: int = 1
    """Processes on this machine that share the drawing of an evaluation or a data set."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest(DrawingRequest):
    """What `mnist-diffusion sample` draws, and how."""

    pipeline: str
    """A pipeline folder, or a Hub id such as `user/name`."""
    class_labels: tuple[str, ...] = ()
    """Classes by number or name; all if omitted."""
    num_images: int = 16
    """Images in all, the classes taken in turn."""
    guidance_scale: float | None = None
    """1 is conditional, 0 unconditional; null takes the folder's default."""
    guidance_interval: tuple[float, ...] = ()
    """Low and high noise level between which guidance acts, 0 being clean; the folder's default if omitted."""
    guidance: str = PLAIN_GUIDANCE
    """The rule: `cfg` (classifier-free), `autoguidance:` and a weaker pipeline, such as an earlier snapshot, or the
    name of a guider class of diffusers."""
    scheduler: str | None = None
    """The sampler, by its short name or its diffusers class; null takes the folder's own."""
    num_inference_steps: int | None = None
    """Denoising steps; null takes the folder's default."""
    eta: float | None = None
    """Noise of DDIM and TCD, from 0 to 1."""

    def __post_init__(self) -> None:
        require_at_least(1, "", self, "num_images", "num_inference_steps", "batch_size", "processes")
        require_at_least(0, "", self, "guidance_scale", "seed")
        intervals = pairs_of_levels("guidance_interval", self.guidance_interval)
        require(len(intervals) < 2, "guidance_interval", self.guidance_interval, "a single pair")
        require_guidance("guidance", self.guidance)
        if self.eta is not None:
            require_between(0, 1, "", self, "eta")
        if self.scheduler is not None:
            require_sampler("scheduler", self.scheduler)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest(DrawingRequest):
    """What `mnist-diffusion evaluate` measures, and how."""

    sources: tuple[str, ...]
    """Pipeline folders or Hub ids; or a single folder of images."""
    names: tuple[str, ...] = ()
    """Names of the sources in the report, if there are several; by default the sources themselves."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The real images to measure against; by default those of the first source's run, or else MNIST."""
    num_images: int | None = None
    """Images to draw, the same number of each class; 10,000 if omitted."""
    scheduler: tuple[str, ...] = ()
    """Samplers, by short name or diffusers class; the folder's own if omitted."""
    num_inference_steps: tuple[int, ...] = ()
    """Denoising steps; the folder's default if omitted."""
    guidance_scale: tuple[float, ...] = ()
    """Guidance scales; the folder's default if omitted."""
    guidance_interval: tuple[float, ...] = ()
    """Pairs of a low and a high noise level between which guidance acts; the folder's default if omitted."""
    guidance: tuple[str, ...] = ()
    """Guidance rules: `cfg` (classifier-free), `autoguidance:` and a weaker pipeline, such as an earlier snapshot, or
    guider classes of diffusers; `cfg` if omitted."""
    split_seed: int | None = None
    """The run's train.seed, where data.source has no test split; null takes that of the first source's run, or 0."""
    evaluator: Path | None = None
    """A folder that train_evaluator left, in place of the data set's own evaluator."""
    second_opinion: bool = False
    """Also the distance by a second evaluator and by random features, each over that of held-out images, and the
    geometric mean of all three."""
    train_on_synthetic: bool = False
    """Also train a classifier on the images and test it on real ones."""
    imagenet_fid: bool = False
    """Also ImageNet-Inception FID, which says little of such images."""
    out: Path = Path("evaluation")
    """The folder to write to; images found there are used again."""

    def __post_init__(self) -> None:
        require_at_least(1, "", self, "num_images", "batch_size", "processes")
        require_at_least(0, "", self, "seed", "split_seed")
        for name in self.scheduler:
            require_sampler("scheduler", name)
        for steps in self.num_inference_steps:
            require(steps >= 1, "num_inference_steps", steps, "at least 1")
        for scale in self.guidance_scale:
            require(0 <= scale < math.inf, "guidance_scale", scale, "finite and at least 0")
        pairs_of_levels("guidance_interval", self.guidance_interval)
        for rule in self.guidance:
            require_guidance("guidance", rule)


@dataclass(frozen=True, kw_only=True)
class AppRequest:
    """What `mnist-diffusion app` serves, and where."""

    pipelines: tuple[str, ...] = ()
    """Pipeline folders or Hub ids, the first of which is shown first."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The images to train on and to measure against."""
    runs: Path = Path("runs")
    """Where training runs and evaluations are written."""
    only_draw: bool = False
    """Leave out what takes minutes of this machine: training and evaluation."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """The port to listen at."""

    def __post_init__(self) -> None:
        require(0 < self.port < 2**16, "port", self.port, f"from 1 to {2**16 - 1}")
        require(bool(self.pipelines) or not self.only_draw, "only_draw", True, "false without a pipeline to draw with")
