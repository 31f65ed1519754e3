"""`mnist-diffusion speedrun`: time a recipe to a fixed quality over several seeds, and check such records."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import parse_train_arguments


def main(argv: Sequence[str], *, prog: str) -> int:
    """Train and measure with each seed, or check a record."""
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        usage=f"{prog} [RECIPE] [--section.field VALUE ...] [--seeds N] [--evaluator FOLDER] [--out FOLDER]\n"
        f"       {prog} --check RECORD [OTHER] [--evaluator FOLDER]",
        description="Train a recipe with several seeds, each in a process whose time is taken from start to end, and "
        "measure the images against a fixed target. RECIPE, which comes first, is a name or a YAML file; 'default' if "
        "omitted.",
        epilog="The other options of `mnist-diffusion train` change the recipe, such as --data.source. "
        "The rules, and the records so far: docs/speedrun.md",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings there are")
    parser.add_argument("--evaluator", type=Path, help="a folder that train_evaluator left, for digits")
    parser.add_argument("--out", type=Path, default=Path("runs/speedrun"), help="a new folder for runs and record")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="RECORD",
        help="check this record instead; of two, tell also which figures differ by more than chance",
    )
    values, flags = parser.parse_known_args(argv)
    recipe = flags.pop(0) if flags and not argv[0].startswith("-") else "default"
    own = {"--train.seed": "--seeds", "--output_dir": "--out"}
    for name in (flag.partition("=")[0] for flag in flags):
        if values.check is not None:
            parser.error(f"--check takes no {name}")
        if name in own:
            parser.error(f"{name} is set for each training; give {own[name]}")
    from mnist_diffusion.evaluation import speedrun
    from mnist_diffusion.pictures.tables import console, screen_table

    if values.check is not None:
        if len(values.check) > 2:
            parser.error(f"--check takes one record or two, got {len(values.check)}")
        for path in values.check:
            for line in speedrun.check(path, evaluator=values.evaluator):
                print(f"{path}: {line}")
        if len(values.check) == 2:
            console().print(screen_table(speedrun.COMPARISON, speedrun.compare(*values.check)))
        return 0
    if values.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {values.seeds}")
    asked = ["--config", recipe, *flags]
    config = parse_train_arguments(asked, prog=prog).config
    record = speedrun.run(config, asked, seeds=values.seeds, evaluator=values.evaluator, out=values.out)
    console().print(screen_table(speedrun.HEADINGS, speedrun.rows(record)))
    print(f"One calibration takes {record['runs'][0]['calibration_seconds'] * 1000:.1f} ms on {record['machine']}.")
    print(f"The record is {values.out / speedrun.RECORD}; `{prog} --check` checks it.")
    return 0
