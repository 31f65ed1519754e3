"""Quality of what a training command leaves after so many minutes, beside other flags or another revision.

    python benchmarks/time_to_quality.py path/to/mnist --minutes '[1,2,5,10]' --seeds 3
    python benchmarks/time_to_quality.py path/to/mnist --minutes '[5]' --seeds 3 --against HEAD~1
    python benchmarks/time_to_quality.py path/to/mnist --minutes '[2]' --flags '["--train.optimizer adamw"]'

Each run is the real command in a process of its own, its time taken from the start of the process to its end. Runs of
what is compared alternate, so that their ratio says something on any machine. All are measured by this revision. Runs
that are found in the folder are not made again.
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
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from mnist_diffusion.command_options import EvaluationOptions
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.evaluation.evaluate import evaluate

REPOSITORY = Path(__file__).parents[1]
FIGURES = {"accuracy": "{:.2%}", "fid": "{:.3f}", "recall": "{:.1%}"}
HEADINGS = ("run", "minutes", "seed", "seconds in all", "of them training", "steps", "class accuracy", "FID", "recall")
PATTERNS = {**dict.fromkeys(("seconds", "train_seconds", "steps"), "{:.0f}"), **FIGURES}


def main(
    data: str,
    *,
    minutes: tuple[float, ...] = (1, 2, 5, 10),
    seeds: int = 3,
    against: str | None = None,
    flags: tuple[str, ...] = (),
    config: str = "default",
    num_images: int = 10_000,
    runs: Path = Path("runs/time_to_quality"),
) -> None:
    """Print the table: a row for each seed, and their medians.

    Args:
        data: labelled images.
        minutes: how long each run may take.
        seeds: runs for each of these.
        against: another revision of this repository, whose runs alternate with those of the working tree.
        flags: further flags of the command, whose runs alternate with those without; each may hold several.
        config: a recipe.
        num_images: drawn to measure each run.
        runs: where runs and their reports are kept.
    """
    print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS), flush=True)
    with _revisions(against, runs.resolve()) as revisions:
        compared = {name: (tree, "") for name, tree in revisions.items()} | {each: (REPOSITORY, each) for each in flags}
        for limit in minutes:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
            for seed in range(seeds):
                for name, (tree, more) in compared.items():
                    folder = runs.resolve() / f"{name}-{config}-{limit:g}-{seed}".replace("/", "_")
                    asked = ["--config", config, "--train.max_minutes", str(limit), "--train.seed", str(seed)]
                    found[name].append(_run(tree, folder, data, [*asked, *more.split()], num_images))
            for name, results in found.items():
                median = {each: statistics.median(result[each] for result in results) for each in PATTERNS}
                rows = [(str(seed), result) for seed, result in enumerate(results)]
                for row, values in [*rows, ("median", median)]:
                    cells = [pattern.format(values[each]) for each, pattern in PATTERNS.items()]
                    print("| " + " | ".join([name, f"{limit:g}", row, *cells]) + " |", flush=True)


def _run(tree: Path, folder: Path, data: str, asked: list[str], num_images: int) -> dict[str, Any]:
    """Train, measure, and keep what was found."""
    kept = folder / "time_to_quality.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    flags = ["--data.source", str(Path(data).resolve()), "--output_dir", str(folder), *asked]
    started = time.perf_counter()
    subprocess.run(
        [Path(sys.executable).with_name("accelerate"), "launch", tree / "train_cfg.py", *flags],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - started
    images = ImagesConfig(source=data)
    request = EvaluationOptions(sources=(str(folder / "pipeline"),), data=images, num_images=num_images, out=folder)
    [measured] = evaluate(request)["results"]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    result = {"seconds": seconds, "train_seconds": summary["train_seconds"], "steps": summary["step"]}
    result |= {name: measured[name] for name in FIGURES}
    kept.write_text(json.dumps({**result, "machine": summary["machine"]}), encoding="utf-8")
    return result


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
