"""Distil a trained pipeline into a student that draws in one network pass or a few.

    mnist-diffusion distill runs/my-run/pipeline --out runs/student                    # five minutes on a laptop
    mnist-diffusion distill user/name --data.source path/to/mnist --out runs/student   # a teacher from the Hub
    accelerate launch distill_cfg.py runs/my-run/pipeline --out runs/student           # several processes

Leaves `pipeline/` in its folder, like any other run: the same loop with another objective.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from mnist_diffusion.cli.options import RunArguments, parse_distill_arguments, reporting_errors
from mnist_diffusion.config import DistillConfig, SamplingConfig


def run(arguments: RunArguments[DistillConfig]) -> int:
    """Assemble a distillation from its configuration, and train."""
    from mnist_diffusion.diffusion import distillation, pipeline
    from mnist_diffusion.training import launch, trainer

    config = distillation.with_teachers_images(arguments.config)
    # Processes, device and precision, and the folder that the run will write.
    launched = launch.launch(config, f"student-{arguments.recipe}")
    # The teacher, which draws guided trajectories from noise to images.
    teacher = launched.main_first(lambda: distillation.load_teacher(config, launched.accelerator))
    # The images it was trained on: only their labels are learned from, but the student is measured against them.
    images = launched.load_images(config.data, seed=config.distillation.split_seed)
    distillation.require_possible(config, teacher, images)
    # The student, which begins as a copy of the teacher, and predicts the velocity of the same noising process.
    scales = config.distillation.guidance_scales
    student, scheduler = distillation.student_of(teacher, len(scales)), distillation.student_scheduler(teacher)
    distillation.prepare_teacher(config, teacher, launched.accelerator)
    # What it learns: from points of a trajectory, the image at its end.
    learned = distillation.distillation_objective(config.distillation, teacher)
    launched.require_same("teachers", learned.fingerprint)
    # What is exported: a pipeline whose guidance is in the weights.
    sampling = SamplingConfig(**vars(config.sampling), guidance_scale=scales[0])
    kind: dict[str, Any] = {"patch_size": teacher.config.patch_size, "guidance_distilled": scales}
    exported = partial(pipeline.build_pipeline, scheduler, sampling, images.class_names, **kind)
    card = distillation.card_values(config.distillation, learned)
    # The loop: the same as in training.
    launched.accelerator.print(f"teacher      {config.distillation.teacher}")
    training = trainer.Trainer(launched, config, images, student, learned, make_pipeline=exported, card=card)
    return training.run(dry_run=arguments.dry_run)


def main(argv: Sequence[str] | None = None, *, prog: str = "distill_cfg.py") -> int:
    """Parse the command line, and distil."""
    arguments = parse_distill_arguments(sys.argv[1:] if argv is None else argv, prog=prog)
    return reporting_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
