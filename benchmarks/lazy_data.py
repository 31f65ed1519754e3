"""Memory and speed of images that are decoded when they are needed, beside images in memory, as the data set grows.

    python benchmarks/lazy_data.py --counts '[25000,50000,100000,200000]'

Each count is a parquet file of pictures of 64 x 64 RGB, and each measurement a process of its own, which reads the
source, and then draws the batches of `--steps` training steps.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jsonargparse import auto_cli
from PIL import Image

from mnist_diffusion.config import DataConfig
from mnist_diffusion.data import dataset
from mnist_diffusion.data.dataset import draw_batch, load_images

SIDE = 64
CLASSES = 10


def main(
    *,
    counts: tuple[int, ...] = (25_000, 50_000, 100_000, 200_000),
    steps: int = 200,
    folder: Path = Path("runs/lazy_data"),
) -> None:
    """Print a row for each count, in memory and lazily.

    Args:
        counts: numbers of images.
        steps: training steps whose batches are drawn.
        folder: where the parquet files are kept; those found are used again.
    """
    print(f"`python benchmarks/lazy_data.py --counts '{list(counts)}' --steps {steps}`:\n")
    print("| images | decoded | memory of the process, MB | to read, s | images/s drawn |")
    print("| ---: | --- | ---: | ---: | ---: |")
    spawn = multiprocessing.get_context("spawn")
    for count in counts:
        file = _generated(folder / f"train-{count}.parquet", count)
        for in_memory in (True, False):
            with spawn.Pool(1) as pool:
                found = json.loads(pool.apply(_measure, (str(file), in_memory, steps)))
            how = "at the start" if in_memory else "when needed"
            print(
                f"| {count} | {how} | {found['megabytes']:.0f} | {found['reading']:.1f} | {found['speed']:.0f} |",
                flush=True,
            )


def _generated(file: Path, count: int) -> Path:
    """A parquet file of pictures: a coloured disc each, anywhere, one colour per class."""
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [str(label) for label in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    random, places = np.random.default_rng(0), np.mgrid[:SIDE, :SIDE]
    with datasets.arrow_writer.ParquetWriter(features=features, path=str(file)) as writer:
        for index in range(count):
            middle = random.integers(8, SIDE - 8, 2)
            inside = np.square(places - middle[:, None, None]).sum(axis=0) < random.integers(10, 200)
            colour = np.array([index % CLASSES * 25, 255 - index % CLASSES * 25, 128])
            pixels = np.where(inside[..., None], colour, 0).astype(np.uint8)
            writer.write(features.encode_example({"image": Image.fromarray(pixels), "label": index % CLASSES}))
        writer.finalize()
    return file


def _measure(file: str, in_memory: bool, steps: int) -> str:
    """Memory that belongs to the process alone, and times."""
    config = DataConfig(source=file, batch_size=64)
    dataset.MEMORY_LIMIT_BYTES = 2**40 if in_memory else 0
    started = time.perf_counter()
    data = load_images(config, seed=0)
    reading = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(steps):
        draw_batch(data.train, config, seed=0, step=step, part=slice(0, config.batch_size))
    speed = steps * config.batch_size / (time.perf_counter() - started)
    found: dict[str, Any] = {"megabytes": _own_megabytes(), "reading": reading, "speed": speed}
    return json.dumps(found)


def _own_megabytes() -> float:
    """Memory of this process without the pages of files, which the system may drop at any time."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    raise RuntimeError("/proc/self/status does not tell; this benchmark needs Linux")


if __name__ == "__main__":
    auto_cli(main)
