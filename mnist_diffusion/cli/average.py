"""`mnist-diffusion average`: build pipelines from other weight averages of a run, after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.errors import UserError
from mnist_diffusion.option_types import STRICT, FilePath

MAX_RECONSTRUCTION_ERROR = 0.01
"""Largest error in the cumulative weights of the steps without a warning."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Build pipelines from other averages of the weights of a run with train.averages_every.

    RUN/average-0.1 is then a pipeline folder; compare them with mnist-diffusion evaluate RUN/average-*
    """

    run: FilePath
    """Run folder, trained with train.averages_every."""
    std: tuple[Annotated[float, Field(ge=0.005, le=0.25)], ...]
    """Relative standard deviations of the averages: 0.1 spans about a tenth of the training."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write a pipeline folder for each average."""
    options: Options = Parser(Options, "run", prog=prog).read(argv)
    from mnist_diffusion.files import replace_folder
    from mnist_diffusion.pipelines.drawing import load_pipeline
    from mnist_diffusion.training.ema import reconstruct_ema, saved_steps

    steps = saved_steps(options.run)
    pipeline = load_pipeline(str(options.run), device="cpu")
    for std in options.std:
        weights, error = reconstruct_ema(options.run, std)
        try:
            pipeline.unet.load_state_dict(weights)
        except RuntimeError as wrong:
            raise UserError(f"the averages in {options.run} do not fit its pipeline: {wrong}") from wrong
        folder = options.run / f"average-{std:g}"
        replace_folder(folder, pipeline.save_pretrained)
        print(f"{folder}: from {len(steps)} saved averages up to step {steps[-1]}; error in the weights {error:.1e}")
        if error > MAX_RECONSTRUCTION_ERROR:
            print(f"warning: {len(steps)} saved averages are few for std {std:g}; lower train.averages_every")
    return 0
