"""What more pictures bring: `icons` on the 1,715 training emoji of `examples/emoji.py`, and on 573 and 115 of them.

    python benchmarks/own_images.py            # four hours on two cores; needs npm

Class accuracy, FID and recall are measured with a classifier of the full set; copies are looked for among the pictures
that a run was trained on. Sets and runs are kept in `runs/own_images`, and only missing ones are made.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from results import train_if_missing

from mnist_diffusion.config import ImagesConfig, SamplingSettings
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.evaluation.draw import ImageGenerator
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.score import Reference
from mnist_diffusion.pipelines.drawing import load_pipeline, resolved
from mnist_diffusion.plots.tables import markdown
from mnist_diffusion.training.run_folder import with_training_images

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji.py"
STRONGER = ("--data.augment.shift", "0.1", "--data.augment.rotate", "15")
HEADINGS = ("pictures", "seed", "updates", "class accuracy", "of the smallest four classes", "FID", "recall", "copies")
FORMATS = ("{:.0%}", "{:.0%}", "{:.2f}", "{:.0%}", "{:.1%}")
NUM_IMAGES = 189
"""As `evaluate` takes where 191 pictures of nine classes are held out."""


@dataclass(frozen=True)
class Run:
    """A training run on every Nth picture."""

    name: str
    every: int
    seed: int = 0
    flags: tuple[str, ...] = ()
    note: str = ""

    def folder(self, runs: Path) -> Path:
        """Where it is; made and trained if it is missing."""
        pictures, folder = runs / f"emoji-{self.every}", runs / self.name
        if not pictures.is_dir():
            make = [sys.executable, str(EXAMPLE), str(pictures), "--every", str(self.every)]
            subprocess.run(make, check=True, stdout=sys.stderr)
        flags = ["--config", "icons", "--data.source", str(pictures), "--train.seed", str(self.seed), *self.flags]
        train_if_missing(folder, flags)
        return folder


RUNS = (
    *(Run(f"full-{seed}", 1, seed) for seed in range(3)),
    Run("unbalanced-0", 1, flags=("--data.balance", "false"), note=", without balance"),
    Run("third-0", 3),
    Run("seventeenth-0", 17),
    Run("stronger-0", 17, flags=STRONGER, note=", stronger augmentation"),
)


def main(*, draws: int = 5, runs: Path = Path("runs/own_images")) -> None:
    """Train what is missing, measure, and print the table.

    Args:
        draws: sampling seeds, over which each figure is the mean.
        runs: the folder of sets and runs.
    """
    set_num_threads()
    folders = {run: run.folder(runs) for run in RUNS}
    images = {run: with_training_images(str(folder), ImagesConfig())[0] for run, folder in folders.items()}
    sets = {run: load_images(config, seed=0) for run, config in images.items()}
    full = sets[RUNS[0]]
    evaluator = evaluator_for(full).model
    references = [Reference(full, evaluator, seed=seed) for seed in range(draws)]
    smallest = [full.class_names[label] for label in np.bincount(full.train.labels).argsort()[:4]]

    def figures(values: dict[str, Any]) -> list[float]:
        of_smallest = statistics.mean(values["class_accuracy"][name]["accuracy"] for name in smallest)
        return [values["accuracy"], of_smallest, values["fid"], values["recall"]]

    real = [figures(each.floor(NUM_IMAGES, True).values) for each in references]
    rows = [["held-out pictures", "", "", *map(str.format, FORMATS, np.mean(real, axis=0)), ""]]
    for run, folder in folders.items():
        pipeline, own = load_pipeline(str(folder), device=None), Reference(sets[run], evaluator)
        found = []
        for reference in references:
            generator = ImageGenerator(pipeline, full, num_images=NUM_IMAGES, seed=reference.seed)
            sample = generator.draw(resolved(pipeline, SamplingSettings()))
            found.append([*figures(reference.score(sample).values), own.score(sample).values["copied_share"]])
        means = map(str.format, FORMATS, np.mean(found, axis=0))
        updates = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["step"]
        rows.append([f"{len(sets[run].train):,}{run.note}", str(run.seed), f"{updates:,}", *means])
    print(markdown(HEADINGS, rows))


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
