"""Train a class-conditional diffusion model with classifier-free guidance.

    accelerate launch train_cfg.py                                       # the default recipe: five minutes on a laptop
    accelerate launch train_cfg.py --data.source path/to/mnist           # on a folder of IDX files, or of pictures
    accelerate launch train_cfg.py --config tiny --train.max_steps 100   # another recipe, shortened
    accelerate launch train_cfg.py --help                                # every field and what it means

Leaves `runs/<recipe>-<time>/pipeline`, a folder that `DiffusionPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from mnist_diffusion.cli.options import RunArguments, parse_train_arguments, reporting_errors
from mnist_diffusion.config import Config


def run(arguments: RunArguments[Config]) -> int:
    """Assemble a run from its configuration, and train."""
    from mnist_diffusion.denoising import DenoiserProduct, denoiser_objective

    from mnist_diffusion.data.dataset import load_images
    from mnist_diffusion.diffusion.network import build_unet, initialise
    from mnist_diffusion.diffusion.noise import build_noise_scheduler
    from mnist_diffusion.diffusion.objective import diffusion_objective
    from mnist_diffusion.diffusion.pipeline import build_pipeline
    from mnist_diffusion.pictures.pipelines import PipelineProduct, Product
    from mnist_diffusion.training.launch import (
        begins_anew,
        build_accelerator,
        choose_output_dir,
        require_same,
        start_processes,
    )
    from mnist_diffusion.training.length import expected_cost
    from mnist_diffusion.training.publish import Publisher
    from mnist_diffusion.training.report import describe
    from mnist_diffusion.training.state import TrainState
    from mnist_diffusion.training.trainer import train

    config = arguments.config
    start_processes(config)
    output_dir = choose_output_dir(config, arguments.recipe)
    accelerator = build_accelerator(config, output_dir)

    with accelerator.main_process_first():  # which fetches; the others find it in the cache
        data = load_images(config.data, seed=config.train.seed)
    require_same("images", data.fingerprint)
    unet = build_unet(
        config.model,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        seed=config.train.seed,
    )
    product: Product
    if config.denoiser.sigma is not None:
        objective, product = denoiser_objective(config.denoiser.sigma), DenoiserProduct(config.denoiser.sigma)
    else:
        noise_scheduler = build_noise_scheduler(config.diffusion)
        null_class = data.num_classes if config.model.class_conditional else None
        objective = diffusion_objective(config.diffusion, noise_scheduler, null_class=null_class)
        make_pipeline = partial(build_pipeline, noise_scheduler, config.sampling, data.class_names)
        product = PipelineProduct(make_pipeline, noise_scheduler)
    if config.train.init_from is not None and begins_anew(config, output_dir):
        predicts = config.diffusion.prediction_type if config.denoiser.sigma is None else None
        with accelerator.main_process_first():
            said = initialise(unet, config.train.init_from, class_names=data.class_names, prediction_type=predicts)
        accelerator.print(said)
    learner = TrainState(config, accelerator, data, unet, objective)

    accelerator.print(describe(learner, output_dir))
    if arguments.dry_run:
        accelerator.print(f"{expected_cost(learner)}\n\n{config.to_yaml()}")
        return 0
    publisher = Publisher(config.hub, output_dir, accelerator)
    code = train(config, learner, product, output_dir, recipe=arguments.recipe, on_snapshot=publisher.snapshot)
    if code == 0:
        publisher.finish()
    return code


def main(argv: Sequence[str] | None = None, *, prog: str = "train_cfg.py") -> int:
    """Parse, print, assemble, train."""
    arguments = parse_train_arguments(argv, prog=prog)
    return reporting_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
