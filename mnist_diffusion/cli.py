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
from pathlib import Path
from typing import Generic, Literal, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

from mnist_diffusion.config import (
    RECIPES,
    Config,
    DataConfig,
    DistillConfig,
    RunConfig,
    SchedulerName,
    TrainConfig,
    UserError,
    find_recipe,
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
    parser.add_argument("--config", action="config", help="a YAML file, or the name of a recipe such as 'tiny'")
    add_switch(parser, "--dry_run", "show what would be done, and stop")
    parser.add_class_arguments(schema, as_group=False)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    found, flags = first.parse_known_args(argv)
    try:
        files = [find_recipe(name, recipes) for name in found.config]
        values = parser.parse_args([*(item for file in files for item in ("--config", str(file))), *flags])
        built = parser.instantiate_classes(values)
        config = schema(**{field.name: built[field.name] for field in fields(schema)})
    except UserError as error:
        parser.error(str(error))
    return RunArguments(config, _recipe_name(files[-1]) if files else "default", values.dry_run)


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
    add_switch(parser, "--files", "also each image, digit_3_000.png")
    add_switch(parser, "--gif", "also an animation of the denoising")
    add_switch(parser, "--compare_schedulers", "also DDPM against DDIM")
    add("--guidance_sweep", type=list[NonNegativeFloat], default=[], help="also these scales, such as '[0,1,2,5]'")
    add("--interpolation", type=NonNegativeInt, default=0, help="also so many frames from each class to the next")
    add_switch(parser, "--as_dataset", "a labelled data set instead of a grid")
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


def evaluate_parser(prog: str) -> ArgumentParser:
    """The arguments of `mnist-diffusion evaluate`."""
    parser = ArgumentParser(
        prog=prog,
        description="Measure generated images against real ones: a table, report.json, report.md with pictures.",
        epilog="Several schedulers, steps or scales make a sweep: --num_inference_steps 5 10 20 --guidance_scale 1 2",
    )
    add = parser.add_argument
    add(
        "source",
        type=str,
        help="a pipeline folder, a Hub id, or images that any program made: one folder a class, parquet, or files "
        "named digit_<class>_<number>.png",
    )
    parser.add_class_arguments(DataConfig, "data", skip={"batch_size", "augment"})
    add("--num_images", type=PositiveInt | None, help="images to draw, the same number of each class; 10,000")
    add("--scheduler", type=SchedulerName, nargs="+", default=[], help="samplers; the folder's own where left out")
    add("--num_inference_steps", type=PositiveInt, nargs="+", default=[], help="denoising steps")
    add("--guidance_scale", type=NonNegativeFloat, nargs="+", default=[], help="guidance scales")
    add("--seed", type=NonNegativeInt, default=0, help="of the images drawn, and of choices among the real ones")
    add(
        "--split_seed", type=NonNegativeInt, default=0, help="the run's train.seed, where data.source has no test split"
    )
    add("--batch_size", type=PositiveInt, default=128, help="images drawn together; changes nothing but the speed")
    add("--device", type=str | None, help="such as cpu or cuda:0; a GPU where there is one")
    add("--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="precision of the network")
    add("--evaluator", type=Path | None, help="a folder that train_evaluator left, in place of the data set's own")
    add_switch(parser, "--train_on_synthetic", "also train a classifier on the images and test it on real ones")
    add_switch(parser, "--imagenet_fid", "also ImageNet-Inception FID, which says little of such images")
    add_switch(parser, "--write_card", "write the results into the pipeline folder's card")
    add(
        "--out", type=Path, default=Path("evaluation"), help="the folder to write to; images found there are used again"
    )
    return parser


def evaluate(argv: Sequence[str], *, prog: str) -> int:
    """Measure images and write a report."""
    values = evaluate_parser(prog).parse_args(list(argv))
    card = Path(values.source) / "README.md"
    if values.write_card and not (card.is_file() and card.with_name("model_index.json").is_file()):
        raise UserError(f"--write_card needs a pipeline folder with a card, but there is no {card}")
    from rich.console import Console  # noqa: PLC0415  (heavy)

    from mnist_diffusion.evaluation.report import card_text, print_table  # noqa: PLC0415
    from mnist_diffusion.evaluation.runner import Request, run  # noqa: PLC0415
    from mnist_diffusion.export import write_results_to_card  # noqa: PLC0415
    from mnist_diffusion.launch import set_num_threads  # noqa: PLC0415

    set_num_threads(TrainConfig())
    fields = {name: values[name] for name in Request.__dataclass_fields__ if name != "data"}
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    report = run(Request(data=DataConfig(**values.data.as_dict()), **{**fields, **lists}))
    console = Console()
    print_table(report, console if console.is_terminal else Console(width=120))
    if values.write_card:
        about = report["data"]
        write_results_to_card(
            card.parent,
            report["results"],
            text=card_text(report),
            dataset=about["source"],
            dataset_id=about["hub_id"] or about["fingerprint"][:16],
        )
    print(f"The report is in {values.out / 'report.md'}" + (f", the card is {card}" if values.write_card else ""))
    return 0


def train_evaluator(argv: Sequence[str], *, prog: str) -> int:
    """Train the classifier that evaluations read images with, and save it."""
    parser = ArgumentParser(
        prog=prog, description="Train the classifier that evaluations use, on the training split of labelled images."
    )
    parser.add_class_arguments(DataConfig, "data", skip={"batch_size", "augment"})
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of weights, order and augmentation")
    parser.add_argument(
        "--split_seed", type=NonNegativeInt, default=0, help="the run's train.seed, where data.source has no test split"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to; it must not be there")
    values = parser.parse_args(list(argv))
    if values.out.exists():
        raise UserError(f"--out {values.out} is there already")
    from mnist_diffusion.data import load_images  # noqa: PLC0415  (heavy)
    from mnist_diffusion.evaluation import evaluator  # noqa: PLC0415
    from mnist_diffusion.launch import set_num_threads  # noqa: PLC0415

    set_num_threads(TrainConfig())
    data = load_images(DataConfig(**values.data.as_dict()), seed=values.split_seed)
    print(data.describe())
    model = evaluator.train_evaluator(data, steps=evaluator.STEPS, seed=values.seed)
    evaluator.save_evaluator(model, values.out)
    print(f"{evaluator.accuracy(model, data.test):.2%} of {len(data.test)} held-out images read right; in {values.out}")
    return 0


def add_switch(parser: ArgumentParser, name: str, text: str) -> None:
    """An option that stands alone for true, and also takes true or false."""
    parser.add_argument(name, type=bool, default=False, nargs="?", const=True, help=text)


def train(argv: Sequence[str], *, prog: str) -> int:
    """Train, as `train_cfg.py` does."""
    from mnist_diffusion import train_cfg  # noqa: PLC0415  (heavy)

    return train_cfg.main(argv, prog=prog)


def distill(argv: Sequence[str], *, prog: str) -> int:
    """Distil a pipeline into a student."""
    from mnist_diffusion import distill_cfg  # noqa: PLC0415  (imports this module)

    return distill_cfg.main(argv, prog=prog)


VERBS: dict[str, tuple[Callable[..., int], str]] = {
    "train": (train, "train a model; the same as train_cfg.py"),
    "sample": (sample, "draw images with a pipeline folder or a Hub repository"),
    "evaluate": (evaluate, "measure a pipeline's images, or any program's, against real ones"),
    "distill": (distill, "turn a trained pipeline into one that draws in one pass or a few"),
    "train_evaluator": (train_evaluator, "train the classifier that evaluations read images with"),
}


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
    verb = parser.parse_args(argv[:1]).verb
    command, _ = VERBS[verb]
    return reporting_errors(lambda: command(argv[1:], prog=f"mnist-diffusion {verb}"))


if __name__ == "__main__":
    sys.exit(main())
