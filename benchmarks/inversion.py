"""How close held-out images come back from DDIM inversion and sampling at guidance 1.

python benchmarks/inversion.py runs/mnist path/to/mnist
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from jsonargparse import auto_cli

from mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.environment import set_num_threads


def main(pipeline: str, data: str, num_images: int = 100, steps: int = 50) -> None:
    """Print the mean and the lowest PSNR.

    Args:
        pipeline: a pipeline folder.
        data: labelled images; those of the held-out split are inverted.
        num_images: how many, evenly over the held-out split.
        steps: DDIM steps each way.
    """
    set_num_threads()
    test = load_images(ImagesConfig(source=data), seed=0).test
    chosen = torch.linspace(0, len(test) - 1, num_images).round().long()
    images, labels = test.images[chosen].float() / 255, test.labels[chosen]
    pipe = MNISTDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents = pipe.invert(images, labels, num_inference_steps=steps)
    restored = pipe(labels, latents=latents, guidance_scale=1, num_inference_steps=steps, output_type="pt").images
    psnr = -10 * (restored - images).square().mean(dim=(1, 2, 3)).log10()
    print(
        f"{num_images} held-out images, {steps} steps each way: PSNR {psnr.mean():.1f} dB on average, "
        f"{psnr.min():.1f} dB at the lowest; latents' standard deviation {latents.std():.2f}"
    )


if __name__ == "__main__":
    auto_cli(main)
