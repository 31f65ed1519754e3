"""The command line: `mnist-diffusion <verb>`, and the parsing that every command shares.

Values come from the defaults of the schema, then from `--config`, then from dotted flags, which win wherever
`--config` stands. Heavy imports wait until the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from mnist_diffusion.cli.options import refuse_tokens, reporting_errors

VERBS = {
    "train": ("train_cfg", "train a model; the same as train_cfg.py"),
    "sample": ("cli.sample", "draw images with a pipeline folder or a Hub repository"),
    "evaluate": ("cli.evaluate", "measure the images of a pipeline, or of any program, against real ones"),
    "distill": ("distill_cfg", "turn a trained pipeline into one that draws in one pass or a few"),
    "compare": ("cli.compare", "curves, sheets and figures of several runs, or of one run's snapshots"),
    "plot": ("cli.plot", "one picture: curves, schedule, noising, denoising, classes, epochs, histograms"),
    "push": ("cli.push", "push a run's pipeline to the Hub"),
    "pull": ("cli.pull", "fetch a pipeline, or a run to resume, from the Hub"),
    "data": ("cli.data", "survey labelled images before training on them"),
    "train_evaluator": ("cli.train_evaluator", "train the classifier that evaluations use"),
}
"""The module of each verb, whose `main` carries it out, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mnist-diffusion",
        description="Class-conditional diffusion on Hugging Face diffusers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {verb:16} {text}" for verb, (_, text) in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb", help="what to do; `<verb> --help` tells more")
    refuse_tokens(parser, argv)
    verb = parser.parse_args(argv[:1]).verb
    command = import_module(f"mnist_diffusion.{VERBS[verb][0]}")
    return reporting_errors(lambda: int(command.main(argv[1:], prog=f"mnist-diffusion {verb}")))
