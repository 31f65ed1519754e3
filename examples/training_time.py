"""Show how samples improve with training time: the same noise drawn by the snapshots of one run, real digits last.

    accelerate launch train_cfg.py --output_dir runs/clock --train.snapshot_every "25 steps"
    python examples/training_time.py runs/clock

Writes `training_time.png` into the run folder: one row per training time, one column per class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mnist_diffusion import load
from mnist_diffusion.config import Config
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.method.network import build_unet, zero_init_output
from mnist_diffusion.pipelines.drawing import generate
from mnist_diffusion.plots.grids import image_grid

SECONDS = (0, 15, 30, 60, 120, 300)


def main() -> None:
    """Draw each row from the snapshot nearest to its time."""
    parser = argparse.ArgumentParser(description="Show how samples improve with training time.")
    parser.add_argument("run", type=Path, help="run folder with snapshots")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args()
    summary = json.loads((options.run / "summary.json").read_text(encoding="utf-8"))
    snapshots = sorted(int(path.name.removeprefix("step-")) for path in (options.run / "snapshots").glob("step-*"))
    config = Config.load(options.run / "config.yaml")
    data = load_images(config.data, seed=config.train.seed)
    labels = range(data.num_classes)
    rows, titles = [], []
    for seconds in SECONDS:
        step = min(snapshots, key=lambda each: abs(each - summary["step"] * seconds / summary["train_seconds"]))
        pipeline = load(str(options.run / "snapshots" / f"step-{step}"))
        if seconds == 0:
            shape = {"image_size": data.image_size, "channels": data.channels, "num_classes": data.num_classes}
            pipeline.unet = build_unet(config.model, **shape, seed=config.train.seed).eval()
            zero_init_output(pipeline.unet)  # as a run begins
        rows.append(generate(pipeline, labels, [options.seed + label for label in labels]))
        titles.append(f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s")
    real = [data.test.images[(data.test.labels == label).nonzero()[0, 0]] for label in labels]
    rows.append(torch.stack(real).float() / 255)
    picture = image_grid(torch.cat(rows), len(labels), row_labels=[*titles, "real"], min_side=84)
    picture.save(options.run / "training_time.png")
    print(f"The picture is {options.run / 'training_time.png'}")


if __name__ == "__main__":
    main()
