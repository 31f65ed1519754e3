"""`mnist-diffusion train`: train a model. `train_cfg.py` is the same command for `accelerate launch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mnist_diffusion.cli.options import parse_run, reporting_errors
from mnist_diffusion.config import Config

if TYPE_CHECKING:
    from mnist_diffusion.training.run import NetworkBuilder, ObjectiveBuilder


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "train_cfg.py",
    network: NetworkBuilder | None = None,
    objective: ObjectiveBuilder | None = None,
) -> int:
    """Parse the command line, and train."""
    arguments = parse_run(Config, argv, prog=prog)

    def command() -> int:
        from mnist_diffusion.training.run import train

        options: dict[str, Any] = {"recipe": arguments.recipe, "dry_run": arguments.dry_run}
        return train(arguments.config, network=network, objective=objective, **options).exit_code

    return reporting_errors(command)
