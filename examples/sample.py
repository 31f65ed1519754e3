"""Sample all classes from a trained pipeline: two guidance scales, two samplers.

    python examples/sample.py runs/my-run/pipeline digits.png

Takes a pipeline folder, or a Hub id such as `user/name`. No code of the folder is run.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DDIMScheduler
from diffusers.utils import make_image_grid

from mnist_diffusion import MNISTDiffusionPipeline


def main(source: str, picture: str) -> None:
    """Draw one row per sampler and guidance scale, from the same noise."""
    pipeline = MNISTDiffusionPipeline.from_pretrained(source)
    labels = list(range(pipeline.num_classes))
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    rows = []
    for scheduler, steps, scale in ((pipeline.scheduler, 10, 1.0), (pipeline.scheduler, 10, 3.0), (ddim, 20, 3.0)):
        pipeline.scheduler = scheduler
        generators = [torch.Generator().manual_seed(label) for label in labels]  # one per image fixes each image
        rows += pipeline(labels, guidance_scale=scale, num_inference_steps=steps, generator=generators).images
    make_image_grid(rows, rows=len(rows) // len(labels), cols=len(labels)).save(picture)
    print(f"{len(rows)} images in {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
