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
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

from mnist_diffusion.config import Config, SchedulerName, UserError, find_recipe


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


def sample_parser(prog: str) -> ArgumentParser:
    """The arguments of `mnist-diffusion sample`."""
    parser = ArgumentParser(prog=prog, description="Draw images with a pipeline folder or a Hub repository.")
    add = parser.add_argument
    add("pipeline", type=str, help="a pipeline folder, or a Hub id such as user/name")
    add("--class_labels", type=str, nargs="+", default=[], help="classes by number or name; all where left out")
    add("--num_images", type=PositiveInt, default=16, help="images in all, the classes taken in turn")
    add(
        "--guidance_scale", type=NonNegativeFloat | None, help="1 is conditional, 0 unconditional; the folder's default"
    )
    add("--scheduler", type=SchedulerName | None, help="the sampler; the folder's own where left out")
    add("--num_inference_steps", type=PositiveInt | None, help="denoising steps; the folder's default where left out")
    add("--eta", type=ClosedUnitInterval | None, help="noise of DDIM and TCD, from 0 to 1")
    add("--seed", type=NonNegativeInt, default=0, help="the same seed draws the same images, whatever the batch size")
    add("--batch_size", type=PositiveInt, default=128, help="images drawn together")
    add("--device", type=str | None, help="such as cpu or cuda:0; a GPU where there is one")
    add("--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="precision of the network")
    add("--out", type=Path, default=Path("samples"), help="the folder to write to")
    add("--files", type=bool, default=False, nargs="?", const=True, help="also each image, digit_3_000.png")
    add("--gif", type=bool, default=False, nargs="?", const=True, help="also an animation of the denoising")
    add("--compare_schedulers", type=bool, default=False, nargs="?", const=True, help="also DDPM against DDIM")
    add("--guidance_sweep", type=list[NonNegativeFloat], default=[], help="also these scales, such as '[0,1,2,5]'")
    add("--interpolation", type=NonNegativeInt, default=0, help="also so many frames from each class to the next")
    add("--as_dataset", type=bool, default=False, nargs="?", const=True, help="a labelled data set instead of a grid")
    return parser


def sample(argv: Sequence[str], *, prog: str) -> int:
    """Draw images and write what was asked for."""
    values = sample_parser(prog).parse_args(list(argv))
    from mnist_diffusion.drawing import Drawing, Request  # noqa: PLC0415  (heavy)

    fields = {name: values[name] for name in Request.__dataclass_fields__}
    drawing = Drawing(Request(**{**fields, "class_labels": tuple(fields["class_labels"])}))
    out: Path = values.out
    try:
        if values.as_dataset:
            drawing.write_dataset(out)
            print(f"{values.num_images} images in {out}; train on them with --data.source {out}")
            return 0
        grid, images = drawing.grid()
        pictures = {"grid": grid}
        if values.compare_schedulers:
            pictures["schedulers"] = drawing.compare_schedulers()
        if values.guidance_sweep:
            pictures["guidance"] = drawing.guidance_sweep(values.guidance_sweep)
        if values.interpolation:
            pictures["interpolation"] = drawing.interpolation(values.interpolation)
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            picture.save(out / f"{name}.png")
        if values.files:
            drawing.write_files(images, out)
        if values.gif:
            drawing.animation(out / "denoising.gif")
    except ValueError as error:  # the pipeline's own, which name argument and value
        raise UserError(str(error)) from error
    print(f"{len(images)} images in {out}")
    return 0


def train(argv: Sequence[str], *, prog: str) -> int:
    """Train, as `train_cfg.py` does."""
    from mnist_diffusion import train_cfg  # noqa: PLC0415  (heavy)

    return train_cfg.main(argv, prog=prog)


VERBS: dict[str, tuple[Callable[..., int], str]] = {
    "train": (train, "train a model; the same as train_cfg.py"),
    "sample": (sample, "draw images with a pipeline folder or a Hub repository"),
}


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
        epilog="verbs:\n" + "\n".join(f"  {verb:10} {text}" for verb, (_, text) in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb", help="what to do; `<verb> --help` tells more")
    verb = parser.parse_args(argv[:1]).verb
    command, _ = VERBS[verb]
    return reporting_errors(lambda: command(argv[1:], prog=f"mnist-diffusion {verb}"))


if __name__ == "__main__":
    sys.exit(main())
