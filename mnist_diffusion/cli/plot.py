"""`mnist-diffusion plot`: one picture at a time, of a run, a pipeline, a configuration or a denoiser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from mnist_diffusion.cli.options import parse_train_arguments
from mnist_diffusion.config import Config, DataConfig
from mnist_diffusion.errors import UserError

IMAGES_A_CLASS = 10
HISTOGRAM_IMAGES = 500


def curves(values: Namespace) -> dict[str, Any]:
    """Loss, loss by noise level, learning rate and speed of a run."""
    from mnist_diffusion.pictures.plots import to_picture, training_curves
    from mnist_diffusion.run_folder.read import read_run

    run = read_run(Path(values.source[0]))
    return {"training_curves": to_picture(training_curves(run.lines, title=f"Training, {run.name}"))}


def schedule(values: Namespace) -> dict[str, Any]:
    """Betas, alpha bar and signal-to-noise ratio of configurations."""
    from mnist_diffusion.diffusion.noise import build_noise_scheduler
    from mnist_diffusion.pictures.plots import noise_schedules, to_picture

    names = [_name(source) for source in values.source]
    names = names if len(set(names)) == len(names) else list(values.source)
    configs = [_config(source).diffusion for source in values.source]
    schedulers = {name: build_noise_scheduler(config) for name, config in zip(names, configs, strict=True)}
    return {"noise_schedule": to_picture(noise_schedules(schedulers))}


def forward(values: Namespace) -> dict[str, Any]:
    """The way of a few training images to noise, as a configuration has it."""
    from mnist_diffusion.diffusion.noise import build_noise_scheduler
    from mnist_diffusion.pictures.pipelines import noised

    scheduler = build_noise_scheduler(_config(values.source[0]).diffusion)
    return {"forward_noising": noised(_data(values), scheduler, seed=values.seed)}


def denoising(values: Namespace) -> dict[str, Any]:
    """The way of a pipeline from noise to one image a class: a strip, and an animation."""
    from mnist_diffusion.pictures.pipelines import denoised, predicted_frames
    from mnist_diffusion.seeds import mixed_seed

    pipeline, names, call = _pipeline(values)
    labels = list(range(len(names))) if pipeline.num_classes is not None else None
    seeds = [mixed_seed(values.seed, "samples", index) for index in range(len(names) or IMAGES_A_CLASS)]
    return {
        "denoising": denoised(pipeline, names, seed=values.seed, **call),
        "denoising_animation": predicted_frames(pipeline, labels, seeds, min(5, len(seeds)), **call),
    }


def classes(values: Namespace) -> dict[str, Any]:
    """Ten images of each class."""
    from mnist_diffusion.pictures.grids import image_grid

    images, names = _drawn(values, IMAGES_A_CLASS)
    title = f"Drawn by {_name(values.source[0])}"
    return {"classes": image_grid(images, IMAGES_A_CLASS, row_labels=names or None, title=title)}


def epochs(values: Namespace) -> dict[str, Any]:
    """The same seeds over the epochs of a run: a sheet, and an animation."""
    from mnist_diffusion.pictures.compare import frames_of_epochs, sheet_of_epochs
    from mnist_diffusion.run_folder.read import read_run

    sheets = read_run(Path(values.source[0])).sheets
    if not sheets:
        raise UserError(f"{values.source[0]} has no sample sheets (samples/step-*.png)")
    return {"epochs": sheet_of_epochs(sheets), "epochs_animation": frames_of_epochs(sheets)}


def histograms(values: Namespace) -> dict[str, Any]:
    """Pixel values of training images and of a pipeline's."""
    from mnist_diffusion.data.transforms import to_uint8
    from mnist_diffusion.pictures.pipelines import spread
    from mnist_diffusion.pictures.plots import pixel_histograms, to_picture

    data = _data(values)
    images, _ = _drawn(values, max(1, HISTOGRAM_IMAGES // data.num_classes))
    if images.shape[1:] != data.train.images.shape[1:]:
        raise UserError(
            f"{values.source[0]} draws images of {tuple(images.shape[1:])} (C, H, W), but data.source has "
            f"{tuple(data.train.images.shape[1:])}"
        )
    title = f"Pixel values, {_name(values.source[0])}"
    figure = pixel_histograms(spread(data, len(images)), to_uint8(2 * images - 1), title=title)
    return {"pixel_histograms": to_picture(figure)}


def sigmas(values: Namespace) -> dict[str, Any]:
    """A single-step denoiser at several noise levels."""
    from mnist_diffusion.denoising import SIGMAS, held_out_images, load_denoiser, require_same_shape, sweep
    from mnist_diffusion.environment import DEFAULT_DEVICE

    unet, data = load_denoiser(values.source[0], device=DEFAULT_DEVICE), _data(values)
    require_same_shape(unet, data)
    return {"sigma_sweep": sweep(unet, held_out_images(data), SIGMAS, seed=values.seed).picture}


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
    "sigmas": Plot(sigmas, "the folder of a denoiser", needs_data=True),
}


def main(argv: Sequence[str], *, prog: str) -> int:
    """Make a picture of the kind asked for, and write it."""
    first = argparse.ArgumentParser(
        prog=prog,
        description="Make one picture; a run makes these of its own accord, in its folder pictures/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="kinds:\n" + "\n".join(f"  {kind:12} {_text(plot)} From {plot.source}." for kind, plot in PLOTS.items()),
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
        path = values.out / (f"{name}.png" if isinstance(picture, Image.Image) else f"{name}.gif")
        if isinstance(picture, Image.Image):
            save_picture(picture, path)
        else:
            save_animation(picture, path, milliseconds=300)
        print(path)
    return 0


def _text(plot: Plot) -> str:
    return (plot.make.__doc__ or "").splitlines()[0]


def _parser(plot: Plot, *, prog: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=_text(plot))
    parser.add_argument("source", type=str, nargs="+" if plot.several else 1, help=plot.source)
    if plot.needs_data:
        parser.add_class_arguments(DataConfig, "data", skip={"batch_size", "augment", "balance"})
        parser.add_argument(
            "--split_seed", type=NonNegativeInt, default=0, help="the run's train.seed, if the data has no test split"
        )
    if plot.draws:
        parser.add_argument("--guidance_scale", type=NonNegativeFloat | None, help="the folder's default if left out")
        parser.add_argument("--num_inference_steps", type=PositiveInt | None, help="the folder's default if left out")
    if plot.draws or plot.needs_data:
        parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of noise and images")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="the folder to write to")
    return parser


def _config(source: str) -> Config:
    """The configuration that a recipe name, a YAML file or a run folder stands for."""
    path = Path(source)
    arguments = ["--config", str(path / "config.yaml" if path.is_dir() else path)]
    return parse_train_arguments(arguments, prog="mnist-diffusion plot").config


def _name(source: str) -> str:
    """The name of a recipe, a run, the run of a pipeline folder or configuration, or a Hub id."""
    path = Path(source)
    if path.exists() and path.name in ("config.yaml", "pipeline", "denoiser"):
        return path.resolve().parent.name
    return path.resolve().name if path.is_dir() else source.removesuffix(".yaml")


def _data(values: Namespace) -> Any:
    from mnist_diffusion.data.dataset import load_images

    data = load_images(DataConfig(**values.data.as_dict()), seed=values.split_seed)
    print(data.banner, end="")
    return data


def _pipeline(values: Namespace) -> tuple[Any, list[str], dict[str, Any]]:
    """The pipeline, the names of its classes (none without), and what its call is asked for."""
    from mnist_diffusion.diffusion.pipeline import load_pipeline

    pipeline = load_pipeline(values.source[0], device=None, dtype="float32")
    names = pipeline.config.id2label or {}
    found = [names.get(str(label), str(label)) for label in range(pipeline.num_classes or 0)]
    asked = {name: values[name] for name in ("guidance_scale", "num_inference_steps") if values[name] is not None}
    return pipeline, found, asked


def _drawn(values: Namespace, count: int) -> tuple[Any, list[str]]:
    """So many images of each class, a class after the other, or a hundred without classes."""
    from mnist_diffusion.diffusion.pipeline import generate
    from mnist_diffusion.seeds import mixed_seed

    pipeline, names, call = _pipeline(values)
    labels = [label for label in range(len(names)) for _ in range(count)] if names else None
    total = len(labels) if labels is not None else IMAGES_A_CLASS**2
    seeds = [mixed_seed(values.seed, "samples", index) for index in range(total)]
    return generate(pipeline, labels, seeds, **call), names
