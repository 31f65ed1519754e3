"""`mnist-diffusion sample`: draw images with a pipeline folder or a Hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

from mnist_diffusion.cli.options import add_switch
from mnist_diffusion.config import SchedulerName
from mnist_diffusion.errors import UserError


def parser(prog: str) -> ArgumentParser:
    """The arguments of `mnist-diffusion sample`."""
    made = ArgumentParser(prog=prog, description="Draw images with a pipeline folder or a Hub repository.")
    add = made.add_argument
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
    add_switch(made, "--files", "also each image, digit_3_000.png")
    add_switch(made, "--gif", "also an animation of the denoising")
    add_switch(made, "--compare_schedulers", "also DDPM against DDIM")
    add("--guidance_sweep", type=list[NonNegativeFloat], default=[], help="also these scales, such as '[0,1,2,5]'")
    add("--interpolation", type=NonNegativeInt, default=0, help="also so many frames from each class to the next")
    add_switch(made, "--as_dataset", "a labelled data set instead of a grid")
    return made


def main(argv: Sequence[str], *, prog: str) -> int:
    """Draw images and write what was asked for."""
    values = parser(prog).parse_args(list(argv))
    from mnist_diffusion.pictures.sampling import Drawing, Request

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
