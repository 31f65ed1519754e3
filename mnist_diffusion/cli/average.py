"""`mnist-diffusion average`: make pipelines of other averages of a run's weights, after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.checks import require
from mnist_diffusion.cli.options import Parser, parse
from mnist_diffusion.errors import UserError

TOO_FAR_OFF = 0.01
"""How much of its weight a rebuilt average may give to other steps than it should."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write a pipeline folder for each length."""
    parser = Parser(
        prog=prog,
        description="Make pipelines of other averages of the weights of a run with train.averages_every.",
        epilog="RUN/average-0.1 is then a pipeline folder, and a sweep is mnist-diffusion evaluate RUN/average-*",
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument(
        "--std",
        type=float,
        nargs="+",
        required=True,
        help="how far the average reaches back: its standard deviation as a share of the training, such as 0.1",
    )
    values = parse(parser, argv)
    from mnist_diffusion.diffusion.pipeline import load_pipeline
    from mnist_diffusion.files import replace_folder
    from mnist_diffusion.training.averages import LONGEST, SHORTEST, kept_steps, rebuilt

    for std in values.std:
        require(SHORTEST <= std <= LONGEST, "std", std, f"from {SHORTEST} to {LONGEST}")
    steps = kept_steps(values.run)
    pipeline = load_pipeline(str(values.run), device="cpu")
    for std in values.std:
        weights, error = rebuilt(values.run, std)
        try:
            pipeline.unet.load_state_dict(weights)
        except RuntimeError as wrong:
            raise UserError(f"{values.run} keeps averages of another network than its pipeline's: {wrong}") from wrong
        folder = values.run / f"average-{std:g}"
        replace_folder(folder, pipeline.save_pretrained)
        print(f"{folder}: from {len(steps)} moments up to step {steps[-1]}; the weight of steps is off by {error:.1e}")
        if error > TOO_FAR_OFF:
            print(f"warning: {len(steps)} moments are few for std {std:g}; keep more with train.averages_every")
    return 0
