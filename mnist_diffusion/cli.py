"""The command line: `mnist-diffusion <verb>`, and the parsing that every command shares.

Values come from the defaults of the schema, then from `--config`, then from dotted flags, which win wherever
`--config` stands. Heavy imports wait until the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from mnist_diffusion.config import (
    RECIPES,
    Config,
    DistillConfig,
    RunConfig,
    UserError,
    find_recipe,
    require_no_nulls,
    require_plain_yaml,
)

set_parsing_settings(docstring_parse_attribute_docstrings=True)


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


@dataclass(frozen=True)
class RunArguments(Generic[AnyConfig]):
    """What a command that starts a run was asked for."""

    config: AnyConfig
    recipe: str
    dry_run: bool


def parse_train_arguments(argv: Sequence[str] | None = None, *, prog: str = "train_cfg.py") -> RunArguments[Config]:
    """Read a training run's configuration from the command line.

    Exits with status 2 and a message that names field and value where something is wrong.
    """
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE_OR_RECIPE] [--section.field VALUE ...] [--dry_run]",
        description="Train a class-conditional diffusion model and leave a pipeline folder that diffusers loads.",
        epilog="Example: %(prog)s --config tiny --data.source digits --train.max_steps 100",
    )
    return _parse_run(parser, Config, list(sys.argv[1:] if argv is None else argv), recipes=RECIPES)


def parse_distill_arguments(argv: Sequence[str], *, prog: str) -> RunArguments[DistillConfig]:
    """Read a distillation's configuration from the command line.

    Exits with status 2 and a message that names field and value where something is wrong.
    """
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} PIPELINE [--out FOLDER] [--config FILE_OR_RECIPE] [--section.field VALUE ...] [--dry_run]",
        description="Distil a trained pipeline (a folder, or a Hub id) into a student that draws in one pass or a few.",
        epilog="PIPELINE, which comes first, is short for --distillation.teacher, and --out for --output_dir.",
    )
    short = argparse.ArgumentParser(prog=prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    short.add_argument("--out")
    found, flags = short.parse_known_args(list(argv))
    if flags and not flags[0].startswith("-"):
        flags = ["--distillation.teacher", *flags]
    if found.out is not None:
        flags += ["--output_dir", found.out]
    return _parse_run(parser, DistillConfig, flags, recipes=RECIPES / "distillation")


def _parse_run(
    parser: ArgumentParser, schema: type[AnyConfig], argv: list[str], *, recipes: Path
) -> RunArguments[AnyConfig]:
    """Read a configuration of `schema`: defaults, then recipes, then flags, which win wherever `--config` stands."""
    _refuse_tokens(parser, argv)
    parser.add_argument("--config", action="config", help="a YAML file, or the name of a recipe such as 'tiny'")
    add_switch(parser, "--dry_run", "show what would be done, and stop")
    parser.add_class_arguments(schema, as_group=False)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    found, flags = first.parse_known_args(argv)
    try:
        files = [find_recipe(name, recipes) for name in found.config]
        for file in files:
            require_plain_yaml(file)
        values = parser.parse_args([*(item for file in files for item in ("--config", str(file))), *flags])
        require_no_nulls(schema, values)
        built = parser.instantiate_classes(values)
        config = schema(**{field.name: built[field.name] for field in fields(schema)})
    except UserError as error:
        parser.error(str(error))
    return RunArguments(config, _recipe_name(files[-1]) if files else "default", values.dry_run)


def _recipe_name(file: Path) -> str:
    """The name for run folders: the file's, or its folder's for a run's own `config.yaml`."""
    return file.resolve().parent.name if file.stem == "config" else file.stem


def add_switch(parser: ArgumentParser, name: str, text: str) -> None:
    """An option that stands alone for true, and also takes true or false."""
    parser.add_argument(name, type=bool, default=False, nargs="?", const=True, help=text)


def _refuse_tokens(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Leave before an error message could repeat a token."""
    if any(argument.startswith("-") and argument.partition("=")[0].endswith("token") for argument in argv):
        parser.error("a token is never an argument, which others can see; log in with `hf auth login`, or set HF_TOKEN")


VERBS = {
    "train": ("train_cfg", "train a model; the same as train_cfg.py"),
    "sample": ("commands.sample", "draw images with a pipeline folder or a Hub repository"),
    "evaluate": ("commands.evaluate", "measure a pipeline's images, or any program's, against real ones"),
    "distill": ("distill_cfg", "turn a trained pipeline into one that draws in one pass or a few"),
    "compare": ("commands.compare", "curves, sheets and figures of several runs, or of one run's snapshots"),
    "plot": ("commands.plot", "one picture: curves, schedule, noising, denoising, classes, epochs, histograms, sigmas"),
    "push": ("commands.push", "push a run's pipeline to the Hub"),
    "pull": ("commands.pull", "fetch a pipeline, or a run to go on with, from the Hub"),
    "data": ("commands.data", "look at labelled images before training on them"),
    "denoise": ("commands.denoise", "try a single-step denoiser at several noise levels"),
    "train_evaluator": ("commands.train_evaluator", "train the classifier that evaluations read images with"),
}
"""The module of each verb, whose `main` carries it out, and what it does."""


def reporting_errors(command: Callable[[], int]) -> int:
    """Run a command; what the user can put right is a message and exit code 2, not a traceback."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(f"error: {error}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The console command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mnist-diffusion",
        description="Class-conditional diffusion on Hugging Face diffusers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {verb:16} {text}" for verb, (_, text) in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb", help="what to do; `<verb> --help` tells more")
    _refuse_tokens(parser, argv)
    verb = parser.parse_args(argv[:1]).verb
    command = import_module(f"mnist_diffusion.{VERBS[verb][0]}")
    return reporting_errors(lambda: int(command.main(argv[1:], prog=f"mnist-diffusion {verb}")))


if __name__ == "__main__":
    sys.exit(main())
