"""`mnist-diffusion train_evaluator`: train the classifier that evaluations use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.errors import UserError
from mnist_diffusion.option_types import STRICT, FilePath, Seed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Train the classifier that evaluations use, on the training split of labelled images."""

    data: ImagesConfig = dataclasses.field(default_factory=ImagesConfig)
    """The images to train on."""
    seed: Seed = 0
    """Random seed for weights, order and augmentation."""
    split_seed: Seed = 0
    """train.seed of the run to evaluate, if data.source has no test split."""
    out: FilePath
    """Output folder, which must not exist."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Train the classifier, and save it."""
    options: Options = Parser(Options, prog=prog).read(argv)
    if options.out.exists():
        raise UserError(f"out={str(options.out)!r} exists already; name a new folder")
    from mnist_diffusion.data.dataset import load_images
    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.evaluation import evaluator

    set_num_threads()
    data = load_images(options.data, seed=options.split_seed)
    print(data.describe())
    model = evaluator.train_evaluator(data, seed=options.seed)
    evaluator.save_evaluator(model, options.out)
    share = evaluator.accuracy(model, data.test)
    print(f"{share:.2%} of {len(data.test)} held-out images classified correctly; saved in {options.out}")
    return 0
