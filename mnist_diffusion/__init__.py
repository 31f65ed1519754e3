"""Class-conditional diffusion on Hugging Face diffusers: train, sample, publish."""

from __future__ import annotations

import os
from typing import Any

# Before torch is imported: threads that wait for each other go to sleep soon. By default they spin for a millisecond,
# which on cores that others use as well makes two threads several times slower than one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = ["MNISTDiffusionPipeline", "__version__", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch and diffusers take seconds."""
    if name == "MNISTDiffusionPipeline":
        from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline

        return MNISTDiffusionPipeline
    if name == "train":
        from mnist_diffusion.train_cfg import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
