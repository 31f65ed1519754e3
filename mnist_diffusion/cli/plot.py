"""`mnist-diffusion plot`: make one picture of a run, a pipeline or a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from mnist_diffusion.cli.options import parse_train_arguments
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
    from mnist_diffusion.diffusion.noise import build_noise_scheduler
    from mnist_diffusion.pictures import plots

    names = [_name(source) for source in values.source]
    names = names if len(set(names)) == len(names) else list(values.source)
    schedulers = [build_noise_scheduler(_config(source).diffusion) for source in values.source]
    figure = plots.noise_schedules(dict(zip(names, schedulers, strict=True)))
    return {"noise_schedule": plots.to_picture(figure)}


def forward(values: Namespace) -> dict[str, Any]:
    """A few training images on their way to noise, by a configuration."""
    from mnist_diffusion.diffusion.noise import build_noise_scheduler
    from mnist_diffusion.pictures import pipelines

    scheduler = build_noise_scheduler(_config(values.source[0]).diffusion)
    return {"forward_noising": pipelines.noised(_data(values), scheduler, seed=values.seed)}


def denoising(values: Namespace) -> dict[str, Any]:
    """One image of each class on its way from noise: a strip, and an animation."""
    from mnist_diffusion.pictures import pipelines
    from mnist_diffusion.seeds import mixed_seed

    pipeline, names, call = _pipeline(values)
    labels = list(range(len(names))) or None
    seeds = [mixed_seed(values.seed, "samples", index) for index in range(len(names) or IMAGES_PER_CLASS)]
    return {
        "denoising": pipelines.denoised(pipeline, names, seed=values.seed, **call),
        "denoising_animation": pipelines.predicted_frames(pipeline, labels, seeds, min(5, len(seeds)), **call),
    }


def classes(values: Namespace) -> dict[str, Any]:
    """Ten images of each class."""
    from mnist_diffusion.pictures.grids import image_grid

    images, names = _images(values, IMAGES_PER_CLASS)
    title = f"Drawn by {_name(values.source[0])}"
    return {"classes": image_grid(images, IMAGES_PER_CLASS, row_labels=names or None, title=title)}


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
    from mnist_diffusion.pictures import pipelines, plots

    data = _data(values)
    images, _ = _images(values, max(1, HISTOGRAM_IMAGES // data.num_classes))
    if images.shape[1:] != data.train.images.shape[1:]:
        raise UserError(
            f"{values.source[0]} draws images of {tuple(images.shape[1:])} (C, H, W), but data.source has "
            f"{tuple(data.train.images.shape[1:])}; set data.image_size and data.channels"
        )
    title = f"Pixel values, {_name(values.source[0])}"
    figure = plots.pixel_histograms(pipelines.spread(data, len(images)), to_uint8(2 * images - 1), title=title)
    return {"pixel_histograms": plots.to_picture(figure)}


@dataclass(frozen=True)
class Plot:
    """A kind of picture, and what it is made from."""

    make: Callable[[Namespace], dict[str, Any]]
    source: str
    several: bool = False
    needs_data: bool = False
    draws: bool = False

    @property
    def text(self) -> str:
        """What it shows."""
        return (self.make.__doc__ or "").splitlines()[0]


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
        epilog="kinds:\n" + "\n".join(f"  {kind:12} {plot.text} From {plot.source}." for kind, plot in PLOTS.items()),
    )
    first.add_argument("kind", choices=PLOTS, metavar="kind", help="what to show; `<kind> --help` tells more")
    kind = first.parse_args(argv[:1]).kind
    plot = PLOTS[kind]
    values = _parser(plot, prog=f"{prog} {kind}").parse_args(list(argv[1:]))
    from PIL import Image

    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.pictures.grids import save_animation, save_picture

    set_num_threads()
    try:
        made = plot.make(values)
    except ValueError as error:  # the pipeline's own, which name argument and value
        raise UserError(str(error)) from error
    values.out.mkdir(parents=True, exist_ok=True)
    for name, picture in made.items():
        if isinstance(picture, Image.Image):
            save_picture(picture, path := values.out / f"{name}.png")
        else:
            save_animation(picture, path := values.out / f"{name}.gif", milliseconds=300)
        print(path)
    return 0


def _parser(plot: Plot, *, prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=plot.text)
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


def _name(source: str) -> str:
    """The name of a recipe, a run, the run of a pipeline folder or configuration, or a Hub id."""
    path = Path(source)
    if path.exists() and path.name in ("config.yaml", "pipeline"):
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else source.removesuffix(".yaml")


def _data(values: Namespace) -> Any:
    from mnist_diffusion.data.dataset import load_images

    data = load_images(ImagesConfig(**values.data.as_dict()), seed=values.split_seed)
    print(data.banner, end="")
    return data


def _pipeline(values: Namespace) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
    """The pipeline, the names of its classes, and the arguments of its call."""
    from mnist_diffusion.diffusion.pipeline import class_names, load_pipeline

    pipeline = load_pipeline(values.source[0], device=None)
    call = {name: values[name] for name in ("guidance_scale", "num_inference_steps") if values[name] is not None}
    return pipeline, class_names(pipeline), call


def _images(values: Namespace, count: int) -> tuple[Any, tuple[str, ...]]:
    """So many images of each class, one class after the other, or a hundred without classes."""
    from mnist_diffusion.diffusion.pipeline import generate
    from mnist_diffusion.seeds import mixed_seed

    pipeline, names, call = _pipeline(values)
    labels = [label for label in range(len(names)) for _ in range(count)] or None
    total = len(labels) if labels is not None else IMAGES_PER_CLASS**2
    seeds = [mixed_seed(values.seed, "samples", index) for index in range(total)]
    return generate(pipeline, labels, seeds, **call), names
