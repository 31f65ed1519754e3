"""Distil a trained pipeline into a student that draws in one pass or a few.

    mnist-diffusion distill runs/my-run/pipeline --out runs/student                        # five minutes on a laptop
    mnist-diffusion distill user/name --data.source path/to/mnist --out runs/student       # a teacher from the Hub
    accelerate launch -m mnist_diffusion.distill_cfg runs/my-run/pipeline --out runs/student   # several processes

Leaves `pipeline/` in its folder, like any other run: the same loop with another objective.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from mnist_diffusion.cli.options import RunArguments, parse_distill_arguments, reporting_errors
from mnist_diffusion.config import DistillConfig, SamplingConfig


def run(arguments: RunArguments[DistillConfig]) -> int:
    """Assemble a distillation from its configuration, and train."""
    import torch

    from mnist_diffusion.data.dataset import load_images
    from mnist_diffusion.diffusion.distillation import (
        distillation_objective,
        load_teacher,
        method,
        require_possible,
        require_same_images,
        student_of,
        student_scheduler,
        with_teachers_images,
    )
    from mnist_diffusion.diffusion.pipeline import build_pipeline
    from mnist_diffusion.pictures.pipelines import PipelineProduct
    from mnist_diffusion.training.launch import build_accelerator, choose_output_dir, require_same, start_processes
    from mnist_diffusion.training.length import expected_cost
    from mnist_diffusion.training.publish import Publisher
    from mnist_diffusion.training.report import describe
    from mnist_diffusion.training.state import TrainState
    from mnist_diffusion.training.trainer import train

    config = with_teachers_images(arguments.config)
    start_processes(config)
    output_dir = choose_output_dir(config, f"student-{arguments.recipe}")
    accelerator = build_accelerator(config, output_dir)

    with accelerator.main_process_first():  # which fetches; the others find it in the cache
        teacher = load_teacher(config.distillation, device=accelerator.device)
        data = load_images(config.data, seed=config.distillation.split_seed)
    require_same("images", data.fingerprint)
    require_same_images(teacher, data)
    require_possible(config, teacher)
    student = student_of(teacher)
    if config.train.channels_last:
        teacher.unet.to(memory_format=torch.channels_last)
    accelerator.prepare_model(teacher.unet, evaluation_mode=True)  # the teacher in the student's precision
    objective = distillation_objective(config.distillation, teacher)
    require_same("teachers", objective.fingerprint)
    learner = TrainState(config, accelerator, data, student, objective)
    noise_scheduler = student_scheduler(teacher)
    sampling = SamplingConfig(**vars(config.sampling), guidance_scale=config.distillation.guidance_scale)
    make_pipeline = partial(build_pipeline, noise_scheduler, sampling, data.class_names, guidance_distilled=True)
    card = {
        "teacher": config.distillation.teacher,
        "teacher_fingerprint": objective.fingerprint,
        "seed": config.distillation.split_seed,
        "method": method(config.distillation),
    }
    accelerator.print(f"teacher      {config.distillation.teacher}\n{describe(learner, output_dir)}")
    if arguments.dry_run:
        accelerator.print(f"{expected_cost(learner)}\n\n{config.to_yaml()}")
        return 0
    product = PipelineProduct(make_pipeline, noise_scheduler)
    publisher = Publisher(config.hub, output_dir, accelerator)
    code = train(
        config, learner, product, output_dir, recipe=arguments.recipe, card=card, on_snapshot=publisher.snapshot
    )
    if code == 0:
        publisher.finish()
    return code


def main(argv: Sequence[str] | None = None, *, prog: str = "mnist_diffusion.distill_cfg") -> int:
    """Parse, print, assemble, train."""
    arguments = parse_distill_arguments(sys.argv[1:] if argv is None else argv, prog=prog)
    return reporting_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
