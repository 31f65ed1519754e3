"""`mnist-diffusion plot`: make one picture of a run, a pipeline or a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from mnist_diffusion.cli.options import Parser, parse, parse_train_arguments
from mnist_diffusion.config import Config, ImagesConfig
from mnist_diffusion.errors import UserError

IMAGES_PER_CLASS = 10
HISTOGRAM_IMAGES = 500


def curves(values: Namespace) -> dict[str, Any]:
    """Loss, loss by noise level, learning rate and speed of a run."""
    from mnist_diffusion.pictures import plots
    from mnist_diffusion.run_folder.read import read_run

    run = read_run(Path(values.source[0]))
    return {"training_curves": plots.to_picture(plots.training_curves(run.lines, title=f"Training, {run.name}"))}


def schedule(values: Namespace) -> dict[str, Any]:
    """Betas, alpha bar and signal-to-noise ratio of configurations."""
    from mnist_diffusion.pictures import plots

    sources = {_name(source): source for source in values.source}
    if len(sources) < len(values.source):
        sources = {source: source for source in values.source}
    processes = {name: _process(source) for name, source in sources.items()}
    return {"noise_schedule": plots.to_picture(plots.noise_schedules(processes))}


def forward(values: Namespace) -> dict[str, Any]:
    """A few training images on their way to noise, by a configuration."""
    from mnist_diffusion.pictures import pipelines

    process = _process(values.source[0])
    return {"forward_noising": pipelines.noised(_data(values), process, seed=values.seed)}


def denoising(values: Namespace) -> dict[str, Any]:
    """One image of each class on its way from noise: a strip, and an animation."""
    from mnist_diffusion.diffusion.pipeline import class_names
    from mnist_diffusion.pictures import pipelines
    from mnist_diffusion.seeds import mixed_seed

    pipeline, call = _pipeline(values)
    names = class_names(pipeline)
    labels = list(range(len(names))) or None
    seeds = [mixed_seed(values.seed, "samples", index) for index in range(len(names) or IMAGES_PER_CLASS)]
    return {
        "denoising": pipelines.denoised(pipeline, names, seed=values.seed, **call),
        "denoising_animation": pipelines.predicted_frames(pipeline, labels, seeds, min(5, len(seeds)), **call),
    }


def classes(values: Namespace) -> dict[str, Any]:
    """Ten images of each class."""
    from mnist_diffusion.diffusion.pipeline import class_names
    from mnist_diffusion.pictures.grids import image_grid

    pipeline, call = _pipeline(values)
    images = _images(pipeline, IMAGES_PER_CLASS, values.seed, call)
    title, names = f"Drawn by {_name(values.source[0])}", class_names(pipeline) or None
    return {"classes": image_grid(images, IMAGES_PER_CLASS, row_labels=names, title=title)}


def epochs(values: Namespace) -> dict[str, Any]:
    """The same seeds over the epochs of a run: a sheet, and an animation."""
    from mnist_diffusion.pictures import compare
    from mnist_diffusion.run_folder.read import read_run

    sheets = read_run(Path(values.source[0])).sheets
    if not sheets:
        raise UserError(f"{values.source[0]} has no sample sheets (samples/step-*.png)")
    return {"epochs": compare.sheet_of_epochs(sheets), "epochs_animation": compare.frames_of_epochs(sheets)}


def histograms(values: Namespace) -> dict[str, Any]:
    """Pixel values of training images and of generated ones."""
    from mnist_diffusion.data.transforms import to_uint8
    from mnist_diffusion.diffusion.pipeline import require_fit
    from mnist_diffusion.pictures import plots

    data = _data(values)
    pipeline, call = _pipeline(values)
    require_fit(pipeline, data)
    images = _images(pipeline, max(1, HISTOGRAM_IMAGES // data.num_classes), values.seed, call)
    real, drawn = data.train.spread(len(images))[0], to_uint8(2 * images - 1)
    figure = plots.pixel_histograms(real, drawn, title=f"Pixel values, {_name(values.source[0])}")
    return {"pixel_histograms": plots.to_picture(figure)}


@dataclass(frozen=True)
class Plot:
    """A kind of picture, and what it is made from."""

    make: Callable[[Namespace], dict[str, Any]]
    source: str
    several: bool = False
    needs_data: bool = False
    draws: bool = False


PLOTS: Mapping[str, Plot] = {
    "curves": Plot(curves, "a run folder"),
    "schedule": Plot(schedule, "recipe names or YAML files", several=True),
    "forward": Plot(forward, "a recipe name or YAML file", needs_data=True),
    "denoising": Plot(denoising, "a pipeline folder or Hub id", draws=True),
    "classes": Plot(classes, "a pipeline folder or Hub id", draws=True),
    "epochs": Plot(epochs, "a run folder"),
    "histograms": Plot(histograms, "a pipeline folder or Hub id", needs_data=True, draws=True),
}


def main(argv: Sequence[str], *, prog: str) -> int:
    """Make a picture of the kind asked for, and write it."""
    first = argparse.ArgumentParser(
        prog=prog,
        description="Make one picture; a run makes these by itself, in its folder pictures/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="kinds:\n"
        + "\n".join(f"  {kind:12} {plot.make.__doc__} From {plot.source}." for kind, plot in PLOTS.items()),
    )
    first.add_argument("kind", choices=PLOTS, metavar="kind", help="what to show; `<kind> --help` tells more")
    kind = first.parse_args(argv[:1]).kind
    plot = PLOTS[kind]
    values = parse(_parser(plot, prog=f"{prog} {kind}"), argv[1:])
    from PIL import Image

    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.files import replace_picture
    from mnist_diffusion.pictures.grids import save_animation

    set_num_threads()
    try:
        made = plot.make(values)
    except ValueError as error:  # the pipeline's own, which name argument and value
        raise UserError(str(error)) from error
    values.out.mkdir(parents=True, exist_ok=True)
    for name, picture in made.items():
        if isinstance(picture, Image.Image):
            replace_picture(picture, path := values.out / f"{name}.png")
        else:
            save_animation(picture, path := values.out / f"{name}.gif", milliseconds=300)
        print(path)
    return 0


def _parser(plot: Plot, *, prog: str) -> Parser:
    parser = Parser(prog=prog, description=plot.make.__doc__)
    add = parser.add_argument
    add("source", type=str, nargs="+" if plot.several else 1, help=plot.source)
    if plot.needs_data:
        parser.add_class_arguments(ImagesConfig, "data")
        add("--split_seed", type=NonNegativeInt, default=0, help="the run's train.seed, if the data has no test split")
    if plot.draws:
        add("--guidance_scale", type=NonNegativeFloat | None, help="the folder's default if omitted")
        add("--num_inference_steps", type=PositiveInt | None, help="the folder's default if omitted")
    if plot.draws or plot.needs_data:
        add("--seed", type=NonNegativeInt, default=0, help="of noise and images")
    add("--out", type=Path, default=Path("pictures"), help="the folder to write to")
    return parser


def _config(source: str) -> Config:
    """The configuration that a recipe name, a YAML file or a run folder stands for."""
    path = Path(source)
    arguments = ["--config", str(path / "config.yaml" if path.is_dir() else path)]
    return parse_train_arguments(arguments, prog="mnist-diffusion plot").config


def _process(source: str) -> Any:
    """The noising process of a configuration."""
    from mnist_diffusion.diffusion.noise import NoisingProcess, build_noise_scheduler

    return NoisingProcess.of(build_noise_scheduler(_config(source).diffusion))


def _name(source: str) -> str:
    """The name of a recipe, a run, the run of a pipeline folder or configuration, or a Hub id."""
    path = Path(source)
    if path.exists() and path.name in ("config.yaml", "pipeline"):
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else source.removesuffix(".yaml")


def _data(values: Namespace) -> Any:
    from mnist_diffusion.data.dataset import load_images

    data = load_images(values.data, seed=values.split_seed)
    print(data.banner, end="")
    return data


def _pipeline(values: Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call."""
    from mnist_diffusion.diffusion.pipeline import load_pipeline

    call = {name: values[name] for name in ("guidance_scale", "num_inference_steps") if values[name] is not None}
    return load_pipeline(values.source[0], device=None), call


def _images(pipeline: Any, count: int, seed: int, call: dict[str, Any]) -> Any:
    """So many images of each class, one class after the other, or a hundred without classes."""
    from mnist_diffusion.diffusion.pipeline import generate
    from mnist_diffusion.seeds import mixed_seed

    labels = [label for label in range(pipeline.num_classes or 0) for _ in range(count)] or None
    total = IMAGES_PER_CLASS**2 if labels is None else len(labels)
    return generate(pipeline, labels, [mixed_seed(seed, "samples", index) for index in range(total)], **call)
