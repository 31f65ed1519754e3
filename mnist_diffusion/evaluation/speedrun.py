"""The speedrun: how long a recipe takes to draw images that are good enough, over several seeds, in a record to check.

The clock runs from the start of the training process to its end. Beside each time stands how long a fixed workload
takes on the same machine, so that times of different machines compare as ratios.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import ttest_ind_from_stats
from torch import nn

from mnist_diffusion.checks import require
from mnist_diffusion.config import Config
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.diffusion.pipeline import fingerprint, load_pipeline
from mnist_diffusion.environment import DEFAULT_DEVICE, machine_description, package_versions, set_num_threads
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.evaluation.evaluate import evaluate
from mnist_diffusion.files import read_json, replace_text
from mnist_diffusion.pictures.tables import markdown
from mnist_diffusion.requests import EvaluationRequest

RECORD = "record.json"
COMPARISON = ("mean ± s.d.", "first", "second", "p", "difference")
HEADINGS = ("seed", "seconds", "calibrations", "class accuracy", "ratio to floor", "passes", "target")
FIGURES = {"seconds": "{:.0f}", "calibrations": "{:.0f}", "accuracy": "{:.2%}", "fid_ratio": "{:.1f}"}
"""What is given as mean and standard deviation over the seeds, and how it is written."""
SIGNIFICANCE = 0.05
TOLERANCE = {"accuracy": 0.002, "fid_ratio": 0.05}
"""By how much figures may differ that another processor finds for the same weights."""
PASSES_TO_TIME = 20
FIRST_LOOK = 100
"""Images that are measured first, so that a clear miss does not draw them all."""


@dataclass(frozen=True)
class Target:
    """What the images of a run must reach, with the data that it trains on.

    Args:
        data: how the fingerprint of the images begins.
        num_images: how many are drawn.
        accuracy: least class accuracy.
        fid_ratio: largest Fréchet distance, over that of as many held-out images.
        passes: most network passes per image.
    """

    data: str
    num_images: int
    accuracy: float
    fid_ratio: float
    passes: float

    def reached(self, measured: Mapping[str, Any]) -> bool:
        """Whether a result of an evaluation reaches it."""
        whole = measured["num_images"] == self.num_images and measured["passes_per_image"] <= self.passes
        return bool(whole and measured["accuracy"] >= self.accuracy and measured["fid_ratio"] <= self.fid_ratio)


TARGETS = {
    "mnist": Target("ec5f7e3f40bf4f70", 10_000, 0.985, 10.0, 20),
    "digits": Target("11ef49e8f93951ec", 100, 0.3, 100.0, 20),
}


def target_for(data: str) -> str:
    """The name of the target for images with this fingerprint.

    Raises:
        UserError: there is none.
    """
    for name, target in TARGETS.items():
        if data.startswith(target.data):
            return name
    raise UserError(f"a speedrun is on the images of {' or '.join(TARGETS)}, got others with fingerprint {data[:16]}")


def calibrate() -> float:
    """Seconds of the fixed workload on this machine: the median of 20 passes, forward and backward.

    A pass takes 64 images of 28 x 28 pixels through four 3 x 3 convolutions of 32 channels, in float32.
    """
    layers = [nn.Conv2d(1 if index == 0 else 32, 32, 3, padding=1) for index in range(4)]
    network, images = nn.Sequential(*layers).to(DEFAULT_DEVICE), torch.ones(64, 1, 28, 28, device=DEFAULT_DEVICE)
    seconds = []
    for _ in range(PASSES_TO_TIME):
        started = time.perf_counter()
        network(images).square().mean().backward()
        float(next(network.parameters()).grad.sum())  # type: ignore[union-attr]  # which waits for a GPU
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def run(config: Config, arguments: Sequence[str], *, seeds: int, evaluator: Path | None, out: Path) -> dict[str, Any]:
    """Train and measure with each seed, and write the record, also as a table for a page.

    Args:
        config: what is trained, with the images to train on.
        arguments: of the training command, from which it was read.
        seeds: how many trainings there are, with seeds from 0 on.
        evaluator: another evaluator than the data's own.
        out: a folder for the runs and the record.

    Returns:
        The record.

    Raises:
        UserError: there is no target for these images, or a training failed.
    """
    require(config.train.init_from is None, "train.init_from", config.train.init_from, "null in a speedrun")
    set_num_threads(config.train.num_threads)
    name = target_for(load_images(config.data, seed=0).fingerprint)
    record: dict[str, Any] = {
        "target": {"name": name, **asdict(TARGETS[name])},
        # Without a place of this machine.
        "config": replace(config, data=replace(config.data, source=name)).to_dict(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_description(torch.device(DEFAULT_DEVICE), 1),
        "versions": package_versions(),
        "runs": [],
    }
    for seed in range(seeds):
        folder, before = out / f"seed-{seed}", calibrate()
        asked = [*arguments, "--train.seed", str(seed), "--output_dir", str(folder)]
        started = time.perf_counter()
        ended = subprocess.run([sys.executable, "-m", "mnist_diffusion", "train", *asked], check=False)
        seconds = time.perf_counter() - started
        if ended.returncode:
            raise UserError(f"the training with seed {seed} ended with status {ended.returncode}; see above")
        calibration = (before + calibrate()) / 2
        timed = {"seconds": seconds, "calibration_seconds": calibration, "calibrations": seconds / calibration}
        figures = _measured(folder, TARGETS[name], evaluator, folder / "evaluation")
        record["runs"].append({"seed": seed, **timed, **figures})
    record |= _summary(record["runs"])
    record["sha256"] = _digest(record)
    replace_text(out / RECORD, json.dumps(record, indent=1) + "\n")
    replace_text((out / RECORD).with_suffix(".md"), markdown(HEADINGS, rows(record)) + "\n")
    return record


def rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A record as the cells of a table: a row for each run, and one for all."""
    found = []
    for run in record["runs"]:
        figures = [pattern.format(run[name]) for name, pattern in FIGURES.items()]
        found.append([str(run["seed"]), *figures, f"{run['passes_per_image']:g}", _outcome(run)])
    return [*found, ["mean ± s.d.", *(_spread(record, name) for name in FIGURES), "", _outcome(record)]]


def compare(first: Path, second: Path) -> list[list[str]]:
    """Which figures of two records differ by more than chance explains: Welch's t-test over their seeds.

    Returns:
        A row for each figure, under `COMPARISON`; without the seconds if the machines are not the same.

    Raises:
        FileError: they have not the same target, or one has a single run.
    """
    records = [read_json(path) for path in (first, second)]
    if records[0]["target"] != records[1]["target"]:
        raise FileError(f"{first} and {second} have not the same target, so nothing in them can be compared")
    for path, record in zip((first, second), records, strict=True):
        if len(record["runs"]) < 2:
            raise FileError(f"{path} has one run; what chance does is seen in two or more")
    found = []
    for title, name in zip(HEADINGS[1:], FIGURES, strict=False):
        if name == "seconds" and records[0]["machine"] != records[1]["machine"]:
            continue
        told = [
            (*(record[name][each] for each in ("mean", "standard_deviation")), len(record["runs"]))
            for record in records
        ]
        p = float(ttest_ind_from_stats(*told[0], *told[1], equal_var=False).pvalue)
        p = 1.0 if math.isnan(p) else p  # of equal figures without any spread
        spreads = [_spread(record, name) for record in records]
        found.append([title, *spreads, f"{p:.2f}", "yes" if p < SIGNIFICANCE else "cannot be told from chance"])
    return found


def _spread(record: Mapping[str, Any], name: str) -> str:
    mean, deviation = record[name]["mean"], record[name]["standard_deviation"]
    return FIGURES[name].format(mean) + ("" if deviation is None else f" ± {FIGURES[name].format(deviation)}")


def _outcome(found: Mapping[str, Any]) -> str:
    return "reached" if found["reached"] else "missed"


def _measured(folder: Path, target: Target, evaluator: Path | None, out: Path) -> dict[str, Any]:
    """The figures of a run's pipeline, and whether they reach the target; images that are in `out` are used again.

    A few images decide where even the upper end of their 95% interval of class accuracy is too low.
    """
    for count in sorted({FIRST_LOOK, target.num_images}):
        asked = EvaluationRequest(sources=(str(folder),), num_images=count, evaluator=evaluator, out=out)
        [result] = evaluate(asked)["results"]
        if result["accuracy_high"] < target.accuracy or result["passes_per_image"] > target.passes:
            break
    figures = {name: result[name] for name in ("num_images", "accuracy", "fid", "fid_ratio", "passes_per_image")}
    return {**figures, "reached": target.reached(result), "weights": _weights(folder)}


def _weights(folder: Path) -> str:
    """What stands for the pipeline of a run: its weights and all that decides what it draws."""
    return fingerprint(load_pipeline(str(folder), device="cpu"))


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and whether all reach the target."""
    found: dict[str, Any] = {"reached": all(each["reached"] for each in runs)}
    for name in FIGURES:
        values = [float(each[name]) for each in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {"mean": statistics.fmean(values), "standard_deviation": deviation}
    return found


def _digest(record: Mapping[str, Any]) -> str:
    body = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check(path: Path, *, evaluator: Path | None = None) -> list[str]:
    """Check a record: that it is as it was written, and that the runs beside it, if they are there, draw what it says.

    Args:
        path: the record.
        evaluator: another evaluator than the data's own.

    Returns:
        What was found to be right, a line each.

    Raises:
        FileError: it is no record, was altered, or its runs draw something else.
    """
    record = read_json(path)
    try:
        return _checked(record, path, evaluator)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileError(f"{path} is no record of a speedrun: {type(error).__name__}: {error}") from error


def _checked(record: Any, path: Path, evaluator: Path | None) -> list[str]:
    if _digest(record) != record["sha256"]:
        raise FileError(f"{path} was altered: its content does not have the SHA-256 {record['sha256']!s:.64}")
    name = record["target"]["name"]
    if name not in TARGETS or record["target"] != {"name": name, **asdict(TARGETS[name])}:
        raise FileError(f"{path} has another target than the speedrun {name!s:.100}: {record['target']!s:.300}")
    runs, target = record["runs"], TARGETS[name]
    reached = all(each["reached"] == target.reached(each) for each in runs)
    if not reached or json.dumps(_summary(runs)) != json.dumps({key: record[key] for key in _summary(runs)}):
        raise FileError(f"{path}: what it says of all runs does not follow from the runs")
    lines = [f"unaltered, and {len(runs)} runs give what it says of them"]
    for each in runs:
        folder = path.parent / f"seed-{int(each['seed'])}"
        if not folder.is_dir():
            lines.append(
                f"seed {each['seed']}: its run is not beside the record, so its figures were not measured again"
            )
            continue
        if _weights(folder) != each["weights"]:
            raise FileError(f"{folder} holds other weights than {path} says")
        with tempfile.TemporaryDirectory() as empty:  # images of before could be anybody's
            measured = _measured(folder, target, evaluator, Path(empty))
        for figure, tolerance in TOLERANCE.items():
            if abs(measured[figure] - each[figure]) > tolerance * max(1.0, each[figure]):
                raise FileError(
                    f"{path}: {figure} of seed {each['seed']} is {each[figure]}, but {measured[figure]} now"
                )
        lines.append(f"seed {each['seed']}: the same weights, which drew and were measured again")
    return lines
