"""From a teacher to a student that draws in one pass or a few: one more objective for the training loop.

The teacher draws: its guided trajectory leads from noise to an image in a few steps. The student learns, from points of
the trajectory, the image at its end, which is what a consistency model is asked for (Song et al., 2023,
https://arxiv.org/abs/2303.01469) and what the LCM sampler calls for. The target is the end of the trajectory itself
(Luhman and Luhman, 2021, https://arxiv.org/abs/2101.02388, do so for its first point alone), not the word of the
student at the next point, which is wrong at first and reaches the noisy points only hop by hop.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from mnist_diffusion.checks import FLOW
from mnist_diffusion.config import DistillationConfig, DistillConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.diffusion.noise import NoisingProcess
from mnist_diffusion.diffusion.objective import Batch, Objective
from mnist_diffusion.diffusion.pipeline import fingerprint, load_pipeline, require_fit
from mnist_diffusion.diffusion.samplers import build_sampler
from mnist_diffusion.errors import UserError
from mnist_diffusion.run_folder.read import images_beside
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline, TrajectoryOutput, predicted_original_sample


class TeacherError(UserError):
    """The teacher cannot teach what was asked."""


def load_teacher(config: DistillConfig, accelerator: Accelerator) -> MNISTDiffusionPipeline:
    """The teacher on the student's device and in its precision, ready to draw trajectories.

    Raises:
        TeacherError: it is itself distilled.
        UserError: it could not be loaded.
    """
    name = config.distillation.teacher
    teacher = load_pipeline(name, device=str(accelerator.device), dtype="float32")
    if teacher.config.guidance_distilled:
        raise TeacherError(f"distillation.teacher={name!r} is itself a student; name the model it came from")
    teacher.unet.eval().requires_grad_(False)
    teacher.scheduler = build_sampler(config.distillation.scheduler, teacher.scheduler.config)
    return teacher


def prepare_teacher(config: DistillConfig, teacher: MNISTDiffusionPipeline, accelerator: Accelerator) -> None:
    """Bring the teacher's network to the memory layout and the precision of the student, in place."""
    if config.train.channels_last:
        teacher.unet.to(memory_format=torch.channels_last)
    accelerator.prepare_model(teacher.unet, evaluation_mode=True)


def with_teachers_images(config: DistillConfig) -> DistillConfig:
    """The configuration with the images of the teacher's run, if it says nothing of images itself.

    Raises:
        UserError: what lies beside the teacher is not the configuration of a run.
    """
    if (found := images_beside(config.distillation.teacher, config.data)) is None:
        return config
    images, seed = found
    data = replace(config.data, **images)
    return replace(config, data=data, distillation=replace(config.distillation, split_seed=seed))


def require_possible(config: DistillConfig, teacher: MNISTDiffusionPipeline, data: ImageData) -> None:
    """Make sure that the teacher can teach what is asked, on images like those it draws.

    Raises:
        UserError: its images have another shape or other classes.
        TeacherError: it has fewer timesteps, or no classes.
    """
    require_fit(teacher, data)
    available = teacher.scheduler.config.num_train_timesteps
    for name, steps in (
        ("distillation.num_teacher_steps", config.distillation.num_teacher_steps),
        ("sampling.num_inference_steps", config.sampling.num_inference_steps),
    ):
        if steps > available:
            raise TeacherError(f"{name}={steps} must not exceed the teacher's {available} timesteps")
    if teacher.null_class is None and (scales := config.distillation.guidance_scales) != (1,):
        raise TeacherError(
            f"distillation.guidance_scales={list(scales)} needs a class-conditional teacher; set it to [1]"
        )
    if teacher.null_class is None and config.train.best_metric == "accuracy":
        raise TeacherError("train.best_metric='accuracy' needs a class-conditional teacher; set it to fid")


def student_of(teacher: MNISTDiffusionPipeline, num_scales: int = 1) -> UNet2DModel:
    """A network of the teacher's shape and weights, with the embeddings of its classes once for each guidance scale."""
    student = copy.deepcopy(teacher.unet).train().requires_grad_(True)
    if teacher.null_class is not None:
        table = student.class_embedding.weight.detach()
        table = torch.cat([table[:-1].repeat(num_scales, 1), table[-1:]])
        student.class_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        student.register_to_config(num_class_embeds=len(table))
    return student


def student_scheduler(teacher: MNISTDiffusionPipeline) -> Any:
    """The teacher's noising process, for a student: it predicts the velocity, and its samples are clipped.

    A student of flow matching predicts the flow, as its teacher does.

    From a prediction of the noise the image at the last, noisiest timestep is `(x - sigma eps) / alpha` with an alpha
    near 0, which no network can learn; the velocity there is just minus the image.

    LCM and TCD may take any of its timesteps, so that they start at the noisiest whatever the number of steps.
    """
    if teacher.config.flow_matching:
        return build_sampler("euler", teacher.scheduler.config)
    noise_scheduler = build_sampler("ddpm", teacher.scheduler.config)
    scheduler = DDPMScheduler.from_config(
        noise_scheduler.config, prediction_type="v_prediction", clip_sample=True, clip_sample_range=1.0
    )
    scheduler.register_to_config(original_inference_steps=scheduler.config.num_train_timesteps)
    return scheduler


def clipped_error(prediction: Tensor, target: Tensor) -> Tensor:
    """What is wrong with a predicted image once samples are clipped to [-1, 1], all `[B, C, H, W]`.

    Beyond black where the target is black, or beyond white where it is white, nothing is wrong. A network can hit a
    bound exactly only by overshooting it, and most of a digit's picture lies on one.
    """
    low = torch.where(target <= -1, -1.0, -math.inf)
    high = torch.where(target >= 1, 1.0, math.inf)
    return prediction.clamp(low, high) - target


def pseudo_huber(errors: Tensor, c: float) -> Tensor:
    """`sqrt(e^2 + c^2) - c`: square for small errors, linear for large ones. Song and Dhariwal (2023),
    https://arxiv.org/abs/2310.14189, section 3.3."""
    return (errors.square() + c * c).sqrt() - c


def distillation_objective(config: DistillationConfig, teacher: MNISTDiffusionPipeline) -> Objective:
    """The loss of a student: at points of a teacher's trajectory, the error of the image it sees at the end.

    An update of `data.batch_size` images draws as many trajectories, from noise and the labels of the images, whose
    pixels it does not look at.

    Args:
        config: guidance, steps and loss.
        teacher: draws the trajectories; not trained.
    """
    process, null_class = NoisingProcess.of(teacher.scheduler), teacher.null_class
    kind = FLOW if teacher.config.flow_matching else "v_prediction"
    num_scales = len(config.guidance_scales)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        count, device = len(batch.noise), batch.noise.device
        trajectory = draw_trajectories(teacher, config, batch)
        chosen = chosen_points(config, batch.timesteps)
        points = torch.cat([batch.noise[None], trajectory.latents[:-1].to(device)])
        points = points[chosen, torch.arange(count, device=device)].flatten(0, 1)
        timesteps = trajectory.timesteps.to(torch.int64) - process.times[0]
        timesteps[0] = len(process.times) - 1  # where the noise is, wherever the sampler says that it begins
        timesteps = timesteps.to(device)[chosen].flatten()
        labels = None
        if null_class is not None:
            labels = torch.where(
                batch.dropped, num_scales * null_class, batch.labels + null_class * scale_indices(batch, num_scales)
            )
            labels = labels.repeat(len(chosen))
        times = process.times.to(device)[timesteps]
        prediction = model(points, times, class_labels=labels, return_dict=False)[0].float()
        alpha = process.alphas_cumprod.to(device)[timesteps].view(-1, 1, 1, 1)
        images = predicted_original_sample(prediction, points, alpha, kind)
        target = cleaned(trajectory.latents[-1].to(device), config.clean_within)
        errors = clipped_error(images, target.repeat(len(chosen), 1, 1, 1))
        return pseudo_huber(errors, config.huber_c).mean(dim=(1, 2, 3)).view(len(chosen), count).mean(dim=0)

    label_dropout = config.label_dropout if null_class is not None else 0.0
    draws = max(1, config.num_teacher_steps - 1) * num_scales
    return Objective(loss, label_dropout, draws, fingerprint=fingerprint(teacher), name="distillation")


def draw_trajectories(teacher: MNISTDiffusionPipeline, config: DistillationConfig, batch: Batch) -> TrajectoryOutput:
    """The teacher's trajectories from the noise and the labels of a batch, without guidance or class if a label is
    dropped."""
    asked: dict[str, Any] = {"num_images_per_label": len(batch.labels)}
    if teacher.null_class is not None:
        scales = batch.noise.new_tensor(config.guidance_scales)[scale_indices(batch, len(config.guidance_scales))]
        scales = torch.where(batch.dropped, 0.0, scales)
        asked = {"class_labels": batch.labels.tolist(), "guidance_scale": scales.tolist()}
    return teacher.sample_trajectory(
        **asked, latents=batch.noise, num_inference_steps=config.num_teacher_steps, eta=0.0, output_type="pt"
    )


def scale_indices(batch: Batch, num_scales: int) -> Tensor:
    """Which guidance scale each image of a batch is for, int64 `[B]`, whatever process or micro-batch it falls to.

    A draw is for a point of the trajectory, of which [`chosen_points`] counts the noisiest last, and a scale.
    """
    return batch.timesteps % num_scales


def chosen_points(config: DistillationConfig, draws: Tensor) -> Tensor:
    """Which points of each trajectory are learned from, int64 `[P, B]`, 0 being the noise, which always is.

    One pass starts there, where most is still to be learned. The others are as far apart as can be, beginning with the
    one that `draws`, random int64 `[B]`, decides on.
    """
    others, count = config.num_teacher_steps - 1, config.points_per_trajectory - 1
    spread = torch.arange(count, device=draws.device) * others // max(1, count)
    first = others - 1 - draws // len(config.guidance_scales)
    rest = 1 + (first[None] + spread[:, None]) % max(1, others)
    return torch.cat([torch.zeros_like(draws)[None], rest])


def cleaned(images: Tensor, within: float) -> Tensor:
    """Images `[B, C, H, W]` clipped to [-1, 1], and what is `within` of black or white set to it."""
    images = torch.where(images < within - 1, -1.0, images)
    return torch.where(images > 1 - within, 1.0, images)


def card_values(config: DistillationConfig, objective: Objective) -> dict[str, Any]:
    """What the model card says of the student's training."""
    return {
        "teacher": config.teacher,
        "teacher_fingerprint": objective.fingerprint,
        "seed": config.split_seed,
        "method": (
            f"regression on the ends of the teacher's trajectories, {config.num_teacher_steps} steps of "
            f"{config.scheduler} at guidance {', '.join(f'{scale:g}' for scale in config.guidance_scales)}"
        ),
    }
