"""Class-conditional diffusion on Hugging Face diffusers: train, sample, publish.

Public names: `train`, `distill`, `Config`, `DistillConfig`, `MNISTDiffusionPipeline`, `load`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_diffusion.config import Config, DistillConfig
    from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
    from mnist_diffusion.training.run import distill, train

__all__ = ["Config", "DistillConfig", "MNISTDiffusionPipeline", "__version__", "distill", "load", "train"]
__version__ = "0.2.0"
MODULES = {
    "Config": "config",
    "DistillConfig": "config",
    "MNISTDiffusionPipeline": "pipelines.pipeline",
    "distill": "training.run",
    "train": "training.run",
}
"""Where each public name lives; it is imported when it is used, as torch and diffusers take seconds."""


def load(source: str | None = None, *, device: str | None = None) -> MNISTDiffusionPipeline:
    """Load a pipeline folder, a run folder or a Hub id such as `user/name`, running no code from it.

    Args:
        source: the folder or the id, with `@revision` if wanted; `mnist` and `mnist-student` come with the package.
            None takes the newest run in `runs/`, or else `mnist`.
        device: such as `cpu` or `cuda`; None takes a GPU if there is one.

    Raises:
        UserError: it could not be loaded.
    """
    from mnist_diffusion.pipelines.drawing import load_pipeline

    return load_pipeline(source, device=device)


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"mnist_diffusion.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
