"""Add an objective: train with a loss of your own, and sample, evaluate and publish the result like any other run.

    accelerate launch examples/own_objective.py --data.source digits --train.max_steps 200

An objective is a function that returns an `Objective`; a page, like `train_cfg.py`, gives it to the training loop. Here
it is the pseudo-Huber loss on the velocity, which is less sensitive to outliers than the squared error. Resuming,
several processes, mixed precision, the average of the weights and the export come from the loop.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from mnist_diffusion.cli.options import parse_train_arguments, reporting_errors
from mnist_diffusion.config import Config
from mnist_diffusion.diffusion.distillation import pseudo_huber
from mnist_diffusion.diffusion.network import build_unet
from mnist_diffusion.diffusion.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.diffusion.objective import Batch, Objective, null_class, prediction_errors
from mnist_diffusion.diffusion.pipeline import build_pipeline
from mnist_diffusion.training.launch import launch
from mnist_diffusion.training.trainer import Trainer

HUBER_C = 0.1
"""Where the loss of a pixel turns from square to linear."""


def huber_objective(config: Config, process: NoisingProcess, *, null_class: int | None) -> Objective:
    """Pseudo-Huber loss on what the network predicts, mean over pixels."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        errors = prediction_errors(model, batch, process, null_class)
        return pseudo_huber(errors, HUBER_C).mean(dim=(1, 2, 3))

    diffusion = config.diffusion
    # The fingerprint keeps a run from being resumed with another loss; configuration, card and summary say the name.
    fingerprint, name = f"c = {HUBER_C}", "pseudo-Huber"
    return Objective(loss, diffusion.label_dropout, diffusion.num_train_timesteps, fingerprint, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, and train."""
    arguments = parse_train_arguments(argv, prog="own_objective.py")
    return reporting_errors(lambda: run(arguments.config, dry_run=arguments.dry_run))


def run(config: Config, *, dry_run: bool = False) -> int:
    """Assemble a training run, and train."""
    launched = launch(config, "own_objective")
    images = launched.load_images(config.data, seed=config.train.seed)
    shape = {"image_size": images.image_size, "channels": images.channels, "num_classes": images.num_classes}
    unet = build_unet(config.model, **shape, seed=config.train.seed)
    scheduler = build_noise_scheduler(config.diffusion)
    learned = huber_objective(config, NoisingProcess.of(scheduler), null_class=null_class(unet))
    exported = partial(
        build_pipeline, scheduler, config.sampling, images.class_names, patch_size=config.model.patch_size
    )
    return Trainer(launched, config, images, unet, learned, make_pipeline=exported).run(dry_run=dry_run)


if __name__ == "__main__":
    sys.exit(main())
