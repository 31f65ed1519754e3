"""`mnist-diffusion train_evaluator`: train the classifier that evaluations classify images with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from mnist_diffusion.cli.options import Parser, parse
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.errors import UserError


def main(argv: Sequence[str], *, prog: str) -> int:
    """Train the classifier, and save it."""
    parser = Parser(
        prog=prog, description="Train the classifier that evaluations use, on the training split of labelled images."
    )
    parser.add_class_arguments(ImagesConfig, "data")
    parser.add_argument(
        "--architecture",
        choices=("convolutions", "transformer"),
        default="convolutions",
        help="convolutions, or the transformer of a second opinion",
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of weights, order and augmentation")
    parser.add_argument(
        "--split_seed", type=NonNegativeInt, default=0, help="the run's train.seed, if data.source has no test split"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to; it must not exist")
    values = parse(parser, argv)
    if values.out.exists():
        raise UserError(f"--out {values.out} exists already")
    from mnist_diffusion.data.dataset import load_images
    from mnist_diffusion.environment import set_num_threads
    from mnist_diffusion.evaluation import evaluator

    set_num_threads()
    data = load_images(values.data, seed=values.split_seed)
    print(data.describe())
    model = evaluator.train_evaluator(data, architecture=values.architecture, seed=values.seed)
    evaluator.save_evaluator(model, values.out)
    share = evaluator.accuracy(model, data.test)
    print(f"{share:.2%} of {len(data.test)} held-out images classified correctly; in {values.out}")
    return 0
