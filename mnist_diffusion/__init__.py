"""Class-conditional diffusion on Hugging Face diffusers: train, sample, publish."""

from __future__ import annotations

from typing import Any

__all__ = ["MNISTDiffusionPipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is asked for: torch and diffusers take seconds."""
    if name == "MNISTDiffusionPipeline":
        from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

        return MNISTDiffusionPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
