"""`mnist-diffusion sample`: draw images with a pipeline folder or a Hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from mnist_diffusion.checks import require
from mnist_diffusion.cli.options import Parser, add_options, add_switch, from_options, parse
from mnist_diffusion.errors import UserError
from mnist_diffusion.ranks import helpers, rank
from mnist_diffusion.requests import SampleRequest

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from mnist_diffusion.pictures.sampling import Samples


def main(argv: Sequence[str], *, prog: str) -> int:
    """Draw images and write what was asked for."""
    parser = Parser(prog=prog, description="Draw images with a pipeline folder or a Hub repository.")
    parser.add_argument("pipeline", type=str, help="a pipeline folder, or a Hub id such as user/name")
    add_options(parser, SampleRequest, skip={"pipeline"})
    parser.add_argument("--out", type=Path, default=Path("samples"), help="the folder to write to")
    add_switch(parser, "--files", "also each image, digit_3_000.png")
    add_switch(parser, "--gif", "also an animation of the denoising")
    add_switch(parser, "--compare_schedulers", "also DDPM against DDIM")
    parser.add_argument("--guidance_sweep", type=NonNegativeFloat, nargs="+", default=[], help="also these scales")
    parser.add_argument("--interpolation", type=NonNegativeInt, default=0, help="also so many frames between classes")
    add_switch(parser, "--as_dataset", "a labelled data set instead of a grid")
    values = parse(parser, argv)
    request = from_options(SampleRequest, values)
    require(values.as_dataset or request.processes == 1, "processes", request.processes, "1 without as_dataset")
    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.pictures.sampling import Samples

    with helpers(request.processes, ["sample", *argv]):
        set_num_threads()
        try:
            if values.as_dataset:
                Samples(request).write_dataset(values.out)
                print(f"{request.num_images} images in {values.out}; train on them with --data.source {values.out}")
            elif rank() == 0:
                draw_pictures(Samples(request), values)
        except ValueError as error:  # the pipeline's own, which name argument and value
            raise UserError(str(error)) from error
    return 0


def draw_pictures(samples: Samples, values: Namespace) -> None:
    """Draw the pictures that were asked for, and write them all."""
    from mnist_diffusion.files import replace_picture

    out: Path = values.out
    grid, images = samples.grid()
    pictures = {"grid": grid}
    if values.compare_schedulers:
        pictures["schedulers"] = samples.compare_schedulers()
    if values.guidance_sweep:
        pictures["guidance"] = samples.guidance_sweep(values.guidance_sweep)
    if values.interpolation:
        pictures["interpolation"] = samples.interpolation(values.interpolation)
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        replace_picture(picture, out / f"{name}.png")
    if values.files:
        samples.write_files(images, out)
    if values.gif:
        samples.animation(out / "denoising.gif")
    print(f"{len(images)} images in {out}")
