"""The options of the commands that take a pipeline, with their ranges."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from mnist_diffusion.config import ImagesConfig, SamplingSettings
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.option_types import (
    CFG,
    STRICT,
    Count,
    FilePath,
    GuidanceRule,
    GuidanceScale,
    Place,
    Probability,
    Sampler,
    Seed,
    Text,
)


def _level_pairs(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) % 2 or any(low > high for low, high in zip(values[::2], values[1::2], strict=True)):
        raise ValueError("must be pairs of a low and a high noise level")
    return values


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DrawOptions:
    """How a pipeline samples many images."""

    seed: Seed = 0
    """Random seed; equal seeds give equal images, whatever the batch size."""
    batch_size: Count | None = None
    """Images per batch; null chooses by image size and device."""
    device: Text | None = None
    """Device such as cpu or cuda:0; null takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network."""
    processes: Count = 1
    """Processes on this machine that share the sampling."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampleOptions(SamplingSettings, DrawOptions):
    """Sample images from a pipeline."""

    pipeline: Place | None = None
    """Pipeline folder, run folder, or Hub id such as user/name; runs/latest if omitted, or else the shipped model."""
    class_labels: tuple[Text, ...] = ()
    """Classes by number or name; all if omitted."""
    num_images: Annotated[int, Field(ge=1, le=10_000_000)] = 16
    """Total number of images, cycling through the classes."""
    out: FilePath = Path("samples")
    """Output folder."""
    files: bool = False
    """Also write each image to a file such as class_3_000.png."""
    gif: bool = False
    """Also write an animation of the denoising."""
    guidance_sweep: tuple[GuidanceScale, ...] = ()
    """Also write a sheet with a row for each of these guidance scales."""
    interpolation: Annotated[int, Field(ge=0)] = 0
    """Frames per interpolation from each class to the next, including both ends (at least 2); 0 writes no sheet."""
    as_dataset: bool = False
    """Write a labelled data set (parquet) instead of a sheet."""

    @property
    def settings(self) -> SamplingSettings:
        """The sampling settings alone."""
        return SamplingSettings(
            **{each.name: getattr(self, each.name) for each in dataclasses.fields(SamplingSettings)}
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationOptions(DrawOptions):
    """Score generated images against real ones: a table, report.json, report.md with pictures.

    Several schedulers, steps or scales make a sweep: --num_inference_steps 5 10 20 --guidance_scale 1 2
    """

    sources: tuple[Place, ...] = ()
    """Pipeline folders or Hub ids; or one folder of images from any program: a folder per class, parquet, or files
    named class_<class>_<number>.png; runs/latest if omitted, or else the shipped model."""
    names: tuple[Text, ...] = ()
    """Names of the sources in the report; the sources themselves if omitted."""
    data: ImagesConfig = dataclasses.field(default_factory=ImagesConfig)
    """The real images to compare with; those of the first source's run if omitted, or else MNIST."""
    num_images: Count | None = None
    """Images to sample, equally many of each class; if omitted, as many as are held out, but 50 to 10,000."""
    scheduler: tuple[Sampler, ...] = ()
    """Samplers; the pipeline's own if omitted."""
    num_inference_steps: tuple[Count, ...] = ()
    """Numbers of denoising steps; the pipeline's default if omitted."""
    guidance_scale: tuple[GuidanceScale, ...] = ()
    """Guidance scales; the pipeline's default if omitted."""
    guidance_interval: Annotated[tuple[Probability, ...], AfterValidator(_level_pairs)] = ()
    """Pairs of a low and a high noise level between which guidance acts; the pipeline's default if omitted."""
    guidance: tuple[GuidanceRule, ...] = ()
    """Guidance rules: `cfg`, `autoguidance:PIPELINE`, or diffusers guiders; `cfg` if omitted."""
    split_seed: Seed | None = None
    """The `train.seed` that chose the held-out images, used if data.source has no test split. Null reads it from the
    first source's run, or takes 0."""
    evaluator: FilePath | None = None
    """Folder of another evaluator, written by `mnist-diffusion train_evaluator`."""
    imagenet_fid: bool = False
    """Also compute FID with ImageNet's Inception network, for comparison with other work."""
    out: FilePath = Path("evaluation")
    """Output folder; images found there are reused."""
    write_card: bool = False
    """Write the results into the pipeline folder's card."""

    def __post_init__(self) -> None:
        if self.names and len(self.names) != max(1, len(self.sources)):
            raise ConfigError(f"names={list(self.names)} must be one for each of the {len(self.sources)} sources")

    def settings(self) -> list[SamplingSettings]:
        """Every combination of the settings asked for."""
        levels = self.guidance_interval
        choices: dict[str, tuple[Any, ...]] = {
            "scheduler": self.scheduler,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": tuple(zip(levels[::2], levels[1::2], strict=True)),
            "guidance": self.guidance or (CFG,),
        }
        combinations = itertools.product(*(values or (None,) for values in choices.values()))
        return [SamplingSettings(**dict(zip(choices, each, strict=True))) for each in combinations]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AppOptions:
    """Serve a web app on this machine that samples, steers and compares (extra `app`)."""

    pipelines: tuple[Place, ...] = ()
    """Pipeline folders or Hub ids; the first is selected at the start; runs/latest if omitted, or else the shipped
    models."""
    host: Text = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts connections from other machines."""
    port: Annotated[int, Field(ge=1, lt=2**16)] = 7860
    """Port to listen on."""
