"""The speedrun: time a recipe to a fixed quality on MNIST over several seeds.

    python benchmarks/speedrun.py flow_matching path/to/mnist --seeds 3 --out runs/flow
    python benchmarks/speedrun.py default path/to/mnist --options '["--train.max_minutes 4"]' --out runs/shorter
    python benchmarks/speedrun.py flow_matching path/to/mnist --out runs/flow --against runs/shorter/record.json

Each run is the training command in a process of its own, timed from its start to its end, with imports, reading data
and exporting the pipeline. Measuring comes after it. Runs and evaluations that are found in the folder are used again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from scipy.stats import ttest_ind

from mnist_diffusion.command_options import EvaluationOptions
from mnist_diffusion.config import Config, ImagesConfig
from mnist_diffusion.environment import DEFAULT_DEVICE, machine_description
from mnist_diffusion.evaluation.evaluate import evaluate
from mnist_diffusion.plots.tables import markdown

TRAIN = Path(__file__).parents[1] / "train_cfg.py"
MIN_ACCURACY, MAX_FID_RATIO, MAX_NFE, NUM_IMAGES = 0.985, 10.0, 20, 10_000
METRICS = {"seconds": "{:.0f}", "accuracy": "{:.2%}", "fid_ratio": "{:.1f}", "step": "{:.0f}"}
HEADINGS = ("seed", "seconds", "class accuracy", "ratio to floor", "steps", "target")


def main(
    recipe: str,
    data: str,
    *,
    seeds: int = 3,
    options: tuple[str, ...] = (),
    num_images: int = NUM_IMAGES,
    out: Path = Path("runs/speedrun"),
    against: Path | None = None,
) -> None:
    """Print a row for each seed, their mean and standard deviation, and write `record.json`.

    Args:
        recipe: name or file of the recipe.
        data: MNIST.
        seeds: number of seeds, from 0.
        options: further options of the training command; each may hold several.
        num_images: images to sample for each run.
        out: folder for runs, evaluations and the record.
        against: another record, whose means are compared with these.
    """
    runs = [_run(recipe, data, seed, options, num_images, out) for seed in range(seeds)]
    config = Config.load(out / "seed-0" / "config.yaml").reproducible().to_dict()
    machine = machine_description(torch.device(DEFAULT_DEVICE), 1)
    record = {"recipe": recipe, "options": options, "machine": machine, "config": config}
    (out / "record.json").write_text(json.dumps({**record, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    rows = [[str(run["seed"]), *_cells(run), "reached" if run["reached"] else "missed"] for run in runs]
    means = {name: [float(run[name]) for run in runs] for name in METRICS}
    if seeds > 1:
        summary = zip(_cells({k: statistics.mean(v) for k, v in means.items()}),
                      _cells({k: statistics.stdev(v) for k, v in means.items()}), strict=True)  # fmt: skip
        rows.append(["mean ± s.d.", *(f"{mean} ± {deviation}" for mean, deviation in summary), ""])
    print(f"{recipe} on {machine}\n\n{markdown(HEADINGS, rows)}")
    if against is not None:
        theirs = json.loads(against.read_text(encoding="utf-8"))["runs"]
        for name, values in means.items():
            test = ttest_ind(values, [run[name] for run in theirs], equal_var=False)
            print(f"{name}: p = {test.pvalue:.2f} in Welch's t-test against {against}")


def _run(recipe: str, data: str, seed: int, options: tuple[str, ...], num_images: int, out: Path) -> dict[str, Any]:
    """Train and measure one seed."""
    folder, evaluation, clock = out / f"seed-{seed}", out / f"evaluation-{seed}", out / f"seconds-{seed}.json"
    if not clock.is_file():
        words = [word for each in options for word in shlex.split(each)]
        named = ["--config", recipe, "--data.source", data, "--train.seed", str(seed), "--output_dir", str(folder)]
        started = time.perf_counter()
        subprocess.run([sys.executable, str(TRAIN), *named, *words], check=True)
        clock.write_text(json.dumps(time.perf_counter() - started), encoding="utf-8")
    asked: dict[str, Any] = {"sources": (str(folder),), "data": ImagesConfig(source=data), "num_images": num_images}
    [result] = evaluate(EvaluationOptions(**asked, out=evaluation))["results"]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    good = result["accuracy"] >= MIN_ACCURACY and result["fid_ratio"] <= MAX_FID_RATIO
    return {
        **{"seed": seed, "seconds": json.loads(clock.read_text()), "step": summary["step"]},
        **{name: result[name] for name in ("accuracy", "fid", "fid_ratio", "recall", "nfe_per_image")},
        "reached": good and result["nfe_per_image"] <= MAX_NFE,
    }


def _cells(run: dict[str, Any]) -> list[str]:
    return [pattern.format(run[name]) for name, pattern in METRICS.items()]


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
