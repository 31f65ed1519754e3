"""Quality of a training command after a given number of minutes or updates, beside other flags or another revision.

    python benchmarks/time_to_quality.py path/to/mnist --minutes '[1,2,5,10]' --seeds 3
    python benchmarks/time_to_quality.py path/to/mnist --minutes '[5]' --seeds 3 --against HEAD~1
    python benchmarks/time_to_quality.py path/to/mnist --updates 3000 --flags '["--train.optimizer adamw"]'

Each run is the real command in a process of its own, its time taken from the start of the process to its end. Runs of
what is compared alternate, so that their ratio says something on any machine. Each is measured at the best of
`--scales`, the one with the smallest Fréchet distance on 2,000 images of another seed than those reported. All are
measured by this revision. Runs that are found in the folder are not made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
CHOICE_SEED = 100
FIGURES = {"accuracy": "{:.2%}", "fid": "{:.3f}", "fid_ratio": "{:.1f}", "recall": "{:.1%}", "broken_share": "{:.1%}"}
HEADINGS = (
    *("run", "length", "seed", "seconds in all", "of them training", "steps", "guidance"),
    *("class accuracy", "FID", "ratio to floor", "recall", "broken"),
)
PATTERNS = {**dict.fromkeys(("seconds", "train_seconds", "steps"), "{:.0f}"), "scale": "{:g}", **FIGURES}


def main(
    data: str,
    *,
    minutes: tuple[float, ...] = (5,),
    updates: int | None = None,
    seeds: int = 3,
    scales: tuple[float, ...] = (1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9),
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
        updates: length of each run in updates, in place of minutes.
        seeds: runs for each of these.
        scales: the guidance scales to choose from.
        against: another revision of this repository, whose runs alternate with those of the working tree.
        flags: further flags of the command, whose runs alternate with those without; each may hold several.
        config: a recipe.
        num_images: drawn to measure each run.
        runs: where runs and their reports are kept.
    """
    print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS), flush=True)
    with _revisions(against, runs.resolve()) as revisions:
        compared = {name: (tree, "") for name, tree in revisions.items()} | {each: (REPOSITORY, each) for each in flags}
        for limit in minutes if updates is None else (updates,):
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
            for seed in range(seeds):
                for name, (tree, more) in compared.items():
                    kind = f"{name}-{config}-{limit:g}{'-updates' if updates else ''}"
                    folder = runs.resolve() / f"{kind}-{seed}".replace("/", "_")
                    length = ["--train.max_minutes", *(["null", "--train.max_steps"] if updates else [])]
                    asked = ["--config", config, *length, str(limit), "--train.seed", str(seed), *more.split()]
                    found[name].append(_run(tree, folder, data, asked, num_images, scales))
            for name, results in found.items():
                median = {each: statistics.median(result[each] for result in results) for each in PATTERNS}
                rows = [(str(seed), result) for seed, result in enumerate(results)]
                for row, values in [*rows, ("median", median)]:
                    cells = [pattern.format(values[each]) for each, pattern in PATTERNS.items()]
                    print("| " + " | ".join([name, f"{limit:g}", row, *cells]) + " |", flush=True)


def _run(
    tree: Path, folder: Path, data: str, asked: list[str], num_images: int, scales: tuple[float, ...]
) -> dict[str, Any]:
    """Train, choose the guidance scale, measure, and keep what was found."""
    kept = folder / "time_to_quality.json"
    if kept.is_file() and "scale" in (known := json.loads(kept.read_text(encoding="utf-8"))):
        return dict(known)
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
    request = EvaluationOptions(
        sources=(str(folder / "pipeline"),),
        data=ImagesConfig(source=data),
        num_images=2000,
        seed=CHOICE_SEED,
        guidance_scale=scales,
        out=folder / "choice",
    )
    best = min(evaluate(request)["results"], key=lambda result: float(result["fid"]))["guidance_scale"]
    final = dataclasses.replace(
        request, seed=0, num_images=num_images, guidance_scale=(best,), out=folder / "evaluation"
    )
    [measured] = evaluate(final)["results"]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    result = {"seconds": seconds, "train_seconds": summary["train_seconds"], "steps": summary["step"], "scale": best}
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
