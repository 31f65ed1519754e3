"""Train a class-conditional diffusion model with classifier-free guidance.

    accelerate launch train_cfg.py                                       # the default recipe: five minutes on a laptop
    accelerate launch train_cfg.py --data.source path/to/mnist           # on a folder of IDX files, or of pictures
    accelerate launch train_cfg.py --config tiny --train.max_steps 100   # another recipe, shortened
    accelerate launch train_cfg.py --help                                # every option and what it means

Leaves `runs/<recipe>-<time>/pipeline`, a folder that `DiffusionPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from mnist_diffusion.cli.options import RunArguments, parse_train_arguments, reporting_errors
from mnist_diffusion.config import Config

if TYPE_CHECKING:
    from mnist_diffusion.training.trainer import TrainedRun, Trainer


def assemble(arguments: RunArguments[Config]) -> Trainer:
    """Assemble a training run from its configuration."""
    from mnist_diffusion.diffusion import network, noise, objective, pipeline
    from mnist_diffusion.training import launch, trainer

    config = arguments.config
    # Processes, device and precision, and the folder that the run will write.
    launched = launch.launch(config, arguments.recipe)
    # Labelled images, and some held out that are never trained on.
    images = launched.load_images(config.data, seed=config.train.seed)
    # A UNet that takes a noisy image, a timestep and a class; one more class, the null class, stands for "any".
    shape = {"image_size": images.image_size, "channels": images.channels, "num_classes": images.num_classes}
    unet = network.build_unet(config.model, **shape, seed=config.train.seed)
    # Its first weights: random before a last layer of zeros, or those of another pipeline.
    network.silence(unet)
    if config.train.init_from is not None and not launched.resumes:
        predicts = config.diffusion.prediction_type
        first = partial(network.initialise, class_names=images.class_names, prediction_type=predicts)
        launched.accelerator.print(launched.main_first(partial(first, unet, config.train.init_from)))
    # The noising process: how an image becomes noise over the timesteps.
    scheduler = noise.build_noise_scheduler(config.diffusion)
    # What the network learns: to undo the noise, sometimes without being told the class, as guidance needs.
    learned = objective.diffusion_objective(config.diffusion, scheduler, null_class=objective.null_class(unet))
    # What is exported: the averaged weights in a pipeline with a sampler, guidance and the names of the classes.
    exported = partial(
        pipeline.build_pipeline, scheduler, config.sampling, images.class_names, patch_size=config.model.patch_size
    )
    # The loop: step, report, sample, evaluate, save.
    return trainer.Trainer(launched, config, images, unet, learned, make_pipeline=exported)


def run(arguments: RunArguments[Config]) -> int:
    """Train; the exit code."""
    return assemble(arguments).run(dry_run=arguments.dry_run)


def train(config: Config | None = None) -> TrainedRun:
    """Train from Python, in this process: `mnist_diffusion.train(Config(train=TrainConfig(max_steps=100)))`.

    Args:
        config: the run; the default recipe if omitted.

    Returns:
        Its folder, its pipeline and its summary, which says whether a signal stopped it.

    Raises:
        UserError: it cannot be done as asked.
    """
    from mnist_diffusion.training.launch import forget_earlier_runs

    forget_earlier_runs()
    training = assemble(RunArguments(config or Config(), "python", dry_run=False))
    training.run()
    return training.result()


def main(argv: Sequence[str] | None = None, *, prog: str = "train_cfg.py") -> int:
    """Parse the command line, and train."""
    arguments = parse_train_arguments(argv, prog=prog)
    return reporting_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
