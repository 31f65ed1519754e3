"""The command line: `mnist-diffusion <verb>`. Heavy imports wait until the arguments are known to be right."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from mnist_diffusion.cli.options import reporting_errors

VERBS = {
    "train": "train a model",
    "distill": "distil a trained pipeline into a student that samples in one step or a few",
    "sample": "sample images from a pipeline",
    "evaluate": "score images against real ones",
    "report": "show one run, or compare several, on an HTML page",
    "data": "inspect labelled images before training on them",
    "average": "build pipelines from other weight averages of a run",
    "train_evaluator": "train the classifier that evaluations use",
    "export": "export a pipeline's network to ONNX",
    "push": "push a run or a pipeline to the Hub",
    "pull": "download a pipeline, or a run to resume, from the Hub",
    "app": "serve the web app on this machine",
    "studio": "write a page that samples in the visitor's browser",
    "space": "write, and push, a Space that samples from a pipeline",
}
"""What each verb does; the module of the same name carries it out with `main(argv, prog=...)`."""
# OpenMP threads that wait go to sleep soon: by default they spin, which slows down cores that others use too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(argv: Sequence[str] | None = None) -> int:
    """The console command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mnist-diffusion",
        description="Class-conditional diffusion on Hugging Face diffusers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {verb:16} {text}" for verb, text in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb", help="what to do; `<verb> --help` lists its options")
    parser.add_argument("--version", action="version", version=f"mnist-diffusion {version('mnist-diffusion')}")
    verb = parser.parse_args(argv[:1]).verb
    command = import_module(f"mnist_diffusion.cli.{verb}")
    return reporting_errors(lambda: int(command.main(argv[1:], prog=f"mnist-diffusion {verb}")))
