"""Quality of a training command after a given number of minutes or updates, beside other flags or another revision.

    python benchmarks/time_to_quality.py path/to/mnist --minutes '[1,2,5,10]' --seeds 3
    python benchmarks/time_to_quality.py path/to/mnist --minutes '[5]' --seeds 3 --against HEAD~1
    python benchmarks/time_to_quality.py path/to/mnist --updates 3000 --flags '["--train.optimizer adamw"]'
    python benchmarks/time_to_quality.py path/to/icons --recipe icons --minutes '[30]' --num_images 189 --draws 5

Each run is the real command in a process of its own, its time taken from the start of the process to its end. Runs of
what is compared alternate, so that their ratio says something on any machine. Each is measured at the best of
`--scales`, the one with the smallest Fréchet distance on images of another seed than those reported. Where few images
are held out, let `--num_images` be as many, so that the floor compares, and `--draws` take the mean over several
sampling seeds. All are measured by this revision. Runs that are found in the folder are not made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from mnist_diffusion.command_options import EvaluationOptions
from mnist_diffusion.evaluation.evaluate import evaluate

REPOSITORY = Path(__file__).parents[1]
CHOICE_SEED, CHOICE_IMAGES = 100, 2000
FIGURES = {
    "accuracy": ("class accuracy", "{:.2%}"),
    "fid": ("FID", "{:.3f}"),
    "fid_floor": ("floor", "{:.3f}"),
    "recall": ("recall", "{:.1%}"),
    "broken_share": ("broken", "{:.1%}"),
    "copied_share": ("copies", "{:.1%}"),
}
RUN = {"seconds": ("seconds in all", "{:.0f}"), "train_seconds": ("of them training", "{:.0f}")}
COLUMNS = {**RUN, "steps": ("steps", "{:.0f}"), "scale": ("guidance", "{:g}"), **FIGURES}


def main(
    data: str,
    *,
    minutes: tuple[float, ...] = (5,),
    updates: int | None = None,
    seeds: int = 3,
    scales: tuple[float, ...] = (1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9),
    against: str | None = None,
    flags: tuple[str, ...] = (),
    recipe: str = "default",
    num_images: int = 10_000,
    draws: int = 1,
    runs: Path = Path("runs/time_to_quality"),
) -> None:
    """Print the table: a row for each seed, and their medians.

    Args:
        data: labelled images.
        minutes: how long each run may take.
        updates: length of each run in updates, in place of minutes.
        seeds: runs for each of these.
        scales: the guidance scales to choose from.
        against: another revision of this repository, whose runs alternate with those of the working tree.
        flags: further flags of the command, whose runs alternate with those without; each may hold several.
        recipe: the name of a recipe, or a file.
        num_images: images to measure each run.
        draws: how often these are sampled, each time from another seed.
        runs: where runs and their reports are kept.
    """
    headings = ["run", "length", "seed", *(heading for heading, _ in COLUMNS.values())]
    stem = Path(recipe).stem
    recipe = str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe  # the runs start in another folder
    print("| " + " | ".join(headings) + " |\n|" + " --- |" * len(headings), flush=True)
    with _revisions(against, runs.resolve()) as revisions:
        compared = {name: (tree, "") for name, tree in revisions.items()} | {each: (REPOSITORY, each) for each in flags}
        for limit in minutes if updates is None else (updates,):
            by_name: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
            for seed in range(seeds):
                for name, (tree, more) in compared.items():
                    kind = f"{name}-{stem}-{limit:g}{'-updates' if updates else ''}"
                    folder = runs.resolve() / f"{kind}-{seed}".replace("/", "_")
                    length = ["--train.max_minutes", *(["null", "--train.max_steps"] if updates else [])]
                    asked = ["--config", recipe, *length, str(limit), "--train.seed", str(seed), *more.split()]
                    by_name[name].append(_run(tree, folder, data, asked, num_images, draws, scales))
            for name, results in by_name.items():
                names = [each for each in COLUMNS if all(each in result for result in results)]
                median = {each: statistics.median(result[each] for result in results) for each in names}
                rows = [(str(seed), result) for seed, result in enumerate(results)]
                for row, values in [*rows, ("median", median)]:
                    cells = [pattern.format(values.get(each, nan)) for each, (_, pattern) in COLUMNS.items()]
                    print("| " + " | ".join([name, f"{limit:g}", row, *cells]) + " |", flush=True)


def _run(
    tree: Path, folder: Path, data: str, flags: list[str], num_images: int, draws: int, scales: tuple[float, ...]
) -> dict[str, float]:
    """Train unless the finished run is there, choose the guidance scale, and measure."""
    summary, timing = folder / "summary.json", folder / "time_to_quality.json"
    if not (summary.is_file() and _read(summary)["finished"]):
        images = ["--data.source", str(Path(data).resolve()), "--output_dir", str(folder)]
        images += ["--train.resume"] if folder.is_dir() else []
        accelerate = Path(sys.executable).with_name("accelerate")
        started = time.perf_counter()
        subprocess.run(
            [accelerate, "launch", tree / "train_cfg.py", *images, *flags],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        timing.write_text(json.dumps({"seconds": time.perf_counter() - started}), encoding="utf-8")
    choice = _measure(folder, scales, range(CHOICE_SEED, CHOICE_SEED + draws), min(CHOICE_IMAGES, num_images))
    best = min(choice, key=lambda scale: choice[scale]["fid"])
    run = _read(summary)
    return {
        **(_read(timing) if timing.is_file() else {}),
        **{"train_seconds": run["train_seconds"], "steps": run["step"], "scale": best},
        **_measure(folder, (best,), range(draws), num_images)[best],
    }


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _measure(folder: Path, scales: tuple[float, ...], seeds: range, num_images: int) -> dict[float, dict[str, float]]:
    """The metrics at each guidance scale, means over sampling seeds, against the images of the run."""
    measured: dict[float, list[dict[str, Any]]] = {scale: [] for scale in scales}
    for seed in seeds:
        request = EvaluationOptions(
            sources=(str(folder / "pipeline"),),
            num_images=num_images,
            seed=seed,
            guidance_scale=scales,
            out=folder / f"evaluation-{seed}",
        )
        with contextlib.redirect_stdout(sys.stderr):  # where it does not break up the table
            results = evaluate(request)["results"]
        for result in results:
            measured[result["guidance_scale"]].append(result)
    return {
        scale: {name: statistics.mean(each[name] for each in results) for name in FIGURES if name in results[0]}
        for scale, results in measured.items()
    }


@contextlib.contextmanager
def _revisions(against: str | None, runs: Path) -> Iterator[dict[str, Path]]:
    """The trees to compare by name: the other revision's, checked out beside the runs, and this one."""
    if against is None:
        yield {"this": REPOSITORY}
        return
    other = runs / "tree"
    subprocess.run(["git", "worktree", "add", "--detach", "--force", other, against], cwd=REPOSITORY, check=True)
    try:
        yield {against: other, "this": REPOSITORY}
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", other], cwd=REPOSITORY, check=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
