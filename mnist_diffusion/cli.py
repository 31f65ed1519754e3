"""The command line: `mnist-diffusion <verb>`, and the parsing that every command shares.

Values come from the defaults of the schema, then from `--config`, then from dotted flags, which win wherever
`--config` stands. Heavy imports wait until the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from mnist_diffusion.config import Config, UserError, find_recipe

VERBS = {"train": "train a model; the same as train_cfg.py"}


@dataclass(frozen=True)
class TrainArguments:
    """What a training command was asked for."""

    config: Config
    recipe: str
    dry_run: bool


def parse_train_arguments(argv: Sequence[str] | None = None, *, prog: str = "train_cfg.py") -> TrainArguments:
    """Read a run's configuration from the command line.

    Exits with status 2 and a message that names field and value where something is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE_OR_RECIPE] [--section.field VALUE ...] [--dry_run]",
        description="Train a class-conditional diffusion model and leave a pipeline folder that diffusers loads.",
        epilog="Example: %(prog)s --config tiny --data.source digits --train.max_steps 100",
    )
    parser.add_argument("--config", action="config", help="a YAML file, or the name of a recipe such as 'tiny'")
    parser.add_argument(
        "--dry_run", type=bool, default=False, nargs="?", const=True, help="show what would be done, and stop"
    )
    parser.add_class_arguments(Config, as_group=False)
    recipes, flags = _take_config(argv)
    try:
        files = [find_recipe(name) for name in recipes]
        values = parser.parse_args([*(item for file in files for item in ("--config", str(file))), *flags])
        values.pop("config")
        dry_run = values.pop("dry_run")
        config = _build(parser, values)
    except UserError as error:
        parser.error(str(error))
    return TrainArguments(config, _recipe_name(files[-1]) if files else "default", dry_run)


def _take_config(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate `--config` from the other flags, which are read after it and so win wherever it stands."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=None)
    first.add_argument("--config", action="append", default=[])
    found, flags = first.parse_known_args(argv)
    return found.config, flags


def _build(parser: ArgumentParser, values: Any) -> Config:
    built = parser.instantiate_classes(values)
    return Config(**{name: built[name] for name in Config.__dataclass_fields__})


def _recipe_name(file: Path) -> str:
    """The name for run folders: the file's, or its folder's for a run's own `config.yaml`."""
    return file.resolve().parent.name if file.stem == "config" else file.stem


def reporting_errors(command: Callable[[], int]) -> int:
    """Run a command; what the user can put right is a message and exit code 2, not a traceback."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The console command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mnist-diffusion",
        description="Class-conditional diffusion on Hugging Face diffusers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb", help="what to do; `<verb> --help` tells more")
    verb = parser.parse_args(argv[:1]).verb
    if verb == "train":
        from mnist_diffusion import train_cfg  # noqa: PLC0415  (heavy)

        return train_cfg.main(argv[1:], prog="mnist-diffusion train")
    raise AssertionError(verb)


if __name__ == "__main__":
    sys.exit(main())
