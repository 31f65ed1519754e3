"""`mnist-diffusion distill`: distil a trained pipeline; `accelerate launch distill_cfg.py` does the same."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from mnist_diffusion.cli.options import parse_run, reporting_errors
from mnist_diffusion.config import DistillConfig

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in `mnist_diffusion.cli.train`


def main(argv: Sequence[str] | None = None, *, prog: str = "distill_cfg.py") -> int:
    """Parse the command line, and distil.

    A word without a flag stands for `--distillation.teacher`, and `--out` for `--output_dir`.
    """
    words = [re.sub("^--out(?==|$)", "--output_dir", word) for word in (sys.argv[1:] if argv is None else argv)]
    about = (
        "Distil PIPELINE, a folder or a Hub id, into a student that samples in a step or a few: PIPELINE --out FOLDER"
    )
    arguments = parse_run(DistillConfig, words, prog=prog, about=about, positional=["distillation.teacher"])

    def command() -> int:
        from mnist_diffusion.training.run import distill

        return distill(arguments.config, recipe=arguments.recipe, dry_run=arguments.dry_run).exit_code

    return reporting_errors(command)
