"""`mnist-diffusion distill`: distil a trained pipeline; `accelerate launch distill_cfg.py` does the same."""

from __future__ import annotations

from collections.abc import Sequence

from mnist_diffusion.cli.options import parse_run, reporting_errors
from mnist_diffusion.config import DistillConfig


def main(argv: Sequence[str] | None = None, *, prog: str = "distill_cfg.py") -> int:
    """Parse the command line, and distil. A word without a flag stands for `--distillation.teacher`."""
    arguments = parse_run(DistillConfig, argv, "distillation.teacher", prog=prog)

    def command() -> int:
        from mnist_diffusion.training.run import distill

        return distill(arguments.config, recipe=arguments.recipe, dry_run=arguments.dry_run).exit_code

    return reporting_errors(command)
