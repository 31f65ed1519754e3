"""`mnist-diffusion sample`: sample images from a pipeline folder or a Hub repository."""

from __future__ import annotations

from collections.abc import Sequence

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.command_options import SampleOptions
from mnist_diffusion.errors import UserError

MAX_ON_SHEET = 10_000


def main(argv: Sequence[str], *, prog: str) -> int:
    """Sample images and write the sheets and files that were asked for."""
    options: SampleOptions = Parser(SampleOptions, "pipeline", prog=prog).read(argv)
    if options.processes > 1 and not options.as_dataset:
        raise UserError(f"processes={options.processes} must be 1 without as_dataset")
    if options.num_images > MAX_ON_SHEET and not options.as_dataset:
        limit = f"at most {MAX_ON_SHEET} without as_dataset, which writes images as they are sampled"
        raise UserError(f"num_images={options.num_images} must be {limit}")
    from mnist_diffusion.parallel import in_processes, is_main

    if not (options.as_dataset or is_main()):
        return 0  # a launcher's other processes
    return in_processes(options.processes, ["sample", *argv], lambda: _sample(options))


def _sample(options: SampleOptions) -> int:
    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.files import replace_picture, require_writable
    from mnist_diffusion.parallel import is_main
    from mnist_diffusion.plots.samples import Samples

    set_num_threads()
    require_writable(out := options.out)
    try:
        samples = Samples(options)
        if options.as_dataset:
            samples.write_dataset(out)
            if is_main():
                print(f"{options.num_images} images in {out}; train on them with --data.source {out}")
            return 0
        grid, images = samples.grid()
        sheets = {"grid": grid}
        if options.guidance_sweep:
            sheets["guidance"] = samples.guidance_sweep(options.guidance_sweep)
        if options.interpolation:
            sheets["interpolation"] = samples.interpolation(options.interpolation)
        out.mkdir(parents=True, exist_ok=True)
        for name, sheet in sheets.items():
            replace_picture(sheet, out / f"{name}.png")
        if options.files:
            samples.write_files(images, out)
        if options.gif:
            samples.animation(out / "denoising.gif")
    except ValueError as error:  # the pipeline's own, which name argument and value
        raise UserError(str(error)) from error
    print(f"{len(images)} images in {out / 'grid.png'}{', and each in a file beside it' if options.files else ''}")
    return 0
