"""Change the class while a digit forms: early it becomes the other digit, late it stays what it is.

    python examples/steering.py runs/my-run/pipeline steering.png

Takes a pipeline folder, or a Hub id such as `user/name`. No code of the folder is run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.data.layout import evenly
from mnist_diffusion.files import replace_picture
from mnist_diffusion.plots.grids import image_grid, to_unit

STEPS, SHOWN, FIRST, THEN, SCALE = 20, 8, 3, 8, 2.0


def main(source: str, picture: str) -> None:
    """Draw one row for each moment of the change, all from the same noise."""
    pipeline = MNISTDiffusionPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    columns = evenly(STEPS, SHOWN)
    tiles, names = [], []
    for change in (1, 3, 5, 7, 10, STEPS):
        generator, believed = torch.Generator().manual_seed(0), []
        stream = pipeline.stream([FIRST], guidance_scale=SCALE, num_inference_steps=STEPS, generator=generator)
        for step in range(STEPS):
            done = stream.send({"class_labels": [THEN]} if step == change else None)
            believed.append(done.pred_original_sample)
        tiles += [believed[step] for step in columns]
        names.append(f"{THEN} from step {change + 1}" if change < STEPS else f"{FIRST} throughout")
    titles = [f"step {step + 1}" for step in columns]
    grid = image_grid(to_unit(torch.cat(tiles)), len(columns), row_labels=names, column_labels=titles)
    replace_picture(grid, Path(picture))
    print(f"{len(names)} rows in {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
