"""The table of results: for each recipe the mean and standard deviation over training seeds.

    python benchmarks/results.py path/to/mnist            # three seeds: two hours and three quarters on two cores
    python benchmarks/results.py path/to/mnist --seeds 1 --only default

Runs are kept in `runs/results`, and only those that are missing are trained.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

COLUMNS = {
    "updates": ("updates", 1, 0),
    "nfe_per_image": ("NFE", 1, 0),
    "accuracy": ("class accuracy, %", 100, 2),
    "fid": ("FID", 1, 3),
    "fid_ratio": ("FID / floor", 1, 1),
    "recall": ("recall, %", 100, 1),
    "broken_share": ("broken strokes, %", 100, 1),
}
"""Heading, factor and digits of each metric."""


@dataclass(frozen=True)
class Row:
    """A recipe, and how long its run takes."""

    recipe: str
    time: str


ROWS = (Row("default", "5 minutes"), Row("flow_matching", "5 minutes"), Row("quality", "30 minutes"))


def main(
    data: str, *, seeds: int = 3, only: str = "", num_images: int = 10_000, runs: Path = Path("runs/results")
) -> None:
    """Train what is missing, measure, and print the table.

    Args:
        data: MNIST.
        seeds: training seeds of each row.
        only: the recipes that have this in their name.
        num_images: images to measure of each run.
        runs: the folder of the runs.
    """
    found = {row: measured(row, data, range(seeds), num_images, runs) for row in ROWS if only in row.recipe}
    headings = ["", *(heading for heading, _, _ in COLUMNS.values())]
    print(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}")
    print(f"| real digits | {' | '.join(real(next(iter(found.values()))[0], name) for name in COLUMNS)} |")
    for row, results in found.items():
        metrics = " | ".join(spread([result[name] for result in results], name) for name in COLUMNS)
        print(f"| `{row.recipe}`, {row.time} | {metrics} |")


def measured(row: Row, data: str, seeds: range, num_images: int, runs: Path) -> list[dict[str, Any]]:
    """The result of each seed."""
    folders = [runs / f"{row.recipe}-{seed}" for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        train_if_missing(folder, ["--config", row.recipe, "--train.seed", str(seed), "--data.source", data])
    report = runs / f"{row.recipe}-measured"
    names = ["--names", *(f"seed-{seed}" for seed in seeds)] if len(seeds) > 1 else []
    size = ["--num_images", str(num_images), "--out", str(report)]
    run(["evaluate", *map(str, folders), *names, "--data.source", data, *size])
    results = json.loads((report / "report.json").read_text(encoding="utf-8"))["results"]
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    return [{**result, "updates": each["step"]} for result, each in zip(results, summaries, strict=True)]


def train_if_missing(folder: Path, flags: list[str]) -> None:
    """Train a run, or resume it if it has not finished."""
    summary = folder / "summary.json"
    if not (summary.is_file() and json.loads(summary.read_text(encoding="utf-8"))["finished"]):
        run(["train", *flags, *(["--train.resume"] if folder.is_dir() else []), "--output_dir", str(folder)])


def spread(values: list[float], name: str) -> str:
    """Mean and standard deviation."""
    _, factor, digits = COLUMNS[name]
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return mean if len(set(values)) < 2 else f"{mean} ± {factor * statistics.stdev(values):.{digits}f}"


def real(result: dict[str, Any], name: str) -> str:
    """The score of the held-out images."""
    _, factor, digits = COLUMNS[name]
    value = 1.0 if name == "fid_ratio" else result.get(f"{name}_floor")
    return "" if value is None else f"{factor * value:.{digits}f}"


def run(arguments: list[str]) -> None:
    """Run a command of the package; its output goes to stderr, so that the table alone is on stdout."""
    print(f"mnist-diffusion {' '.join(arguments)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "mnist_diffusion", *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
