"""Class-conditional diffusion on Hugging Face diffusers: train, sample, publish."""

__version__ = "0.1.0"
