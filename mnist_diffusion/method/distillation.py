"""Distillation: one more objective, with which a student learns to sample in one network evaluation or a few.

The teacher samples: its guided trajectory leads from noise to an image in a few steps. At points of the trajectory the
student learns to predict the image at its end, like a consistency model (Song et al., 2023,
https://arxiv.org/abs/2303.01469), which is what the LCM sampler needs. The target is the end of the trajectory itself
(as in Luhman and Luhman, 2021, https://arxiv.org/abs/2101.02388, for the first point alone), not the student's own
prediction at the next point, which is wrong at first and improves only hop by hop.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from mnist_diffusion.config import DistillationConfig
from mnist_diffusion.method.noise import NoisingProcess
from mnist_diffusion.method.objective import Batch, Objective
from mnist_diffusion.option_types import FLOW
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import predicted_original_sample

if TYPE_CHECKING:
    from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline, TrajectoryOutput

SNAP_TOLERANCE = 0.04
"""Teacher pixels this close to black or white, in [-1, 1], count as black or white."""
HUBER_C = 0.5
"""Where the pseudo-Huber loss of a pixel turns from quadratic to linear."""
LABEL_DROPOUT = 0.1


def student_of(teacher: MNISTDiffusionPipeline, num_scales: int = 1) -> UNet2DModel:
    """Copy the teacher's network, with its class embeddings repeated for each guidance scale."""
    student = copy.deepcopy(teacher.unet).train().requires_grad_(True)
    if teacher.null_class is not None:
        table = student.class_embedding.weight.detach()
        table = torch.cat([table[:-1].repeat(num_scales, 1), table[-1:]])
        student.class_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        student.register_to_config(num_class_embeds=len(table))
    return student


def clipped_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Error of a prediction clipped at black and white targets, all `[B, C, H, W]`.

    Predictions beyond black where the target is black, or beyond white where it is white, have no error: most pixels of
    a digit lie on a bound, which a network can only hit by overshooting.
    """
    low = torch.where(target <= -1, -1.0, -math.inf)
    high = torch.where(target >= 1, 1.0, math.inf)
    return prediction.clamp(low, high) - target


def pseudo_huber(errors: Tensor, c: float) -> Tensor:
    """`sqrt(e^2 + c^2) - c`: quadratic for small errors, linear for large ones. Song and Dhariwal (2023),
    https://arxiv.org/abs/2310.14189, section 3.3."""
    return (errors.square() + c * c).sqrt() - c


def distillation_objective(
    config: DistillationConfig, teacher: MNISTDiffusionPipeline, *, fingerprint: str = ""
) -> Objective:
    """The loss of a student: at points of a teacher trajectory, the error in predicting the image at its end.

    A step of `data.batch_size` images samples as many trajectories, from noise and the labels of the images; their
    pixels are not used.

    Args:
        config: guidance and steps.
        teacher: samples the trajectories; not trained.
        fingerprint: identifies the teacher.
    """
    process, null_class = NoisingProcess.of(teacher.scheduler), teacher.null_class
    kind = FLOW if teacher.config.flow_matching else "v_prediction"
    num_scales = len(config.guidance_scales)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        count, device = len(batch.noise), batch.noise.device
        trajectory = draw_trajectories(teacher, config, batch)
        points_used = learned_points(config, batch.timesteps)
        points = torch.cat([batch.noise[None], trajectory.latents[:-1].to(device)])
        points = points[points_used, torch.arange(count, device=device)].flatten(0, 1)
        timesteps = trajectory.timesteps.to(torch.int64) - process.times[0]
        timesteps[0] = len(process.times) - 1  # pure noise, wherever the sampler says that it starts
        timesteps = timesteps.to(device)[points_used].flatten()
        labels = None
        if null_class is not None:
            labels = torch.where(
                batch.dropped, num_scales * null_class, batch.labels + null_class * scale_indices(batch, num_scales)
            )
            labels = labels.repeat(len(points_used))
        times = process.times.to(device)[timesteps]
        prediction = model(points, times, class_labels=labels, return_dict=False)[0].float()
        alpha = process.alphas_cumprod.to(device)[timesteps].view(-1, 1, 1, 1)
        images = predicted_original_sample(prediction, points, alpha, kind)
        target = snap_to_black_or_white(trajectory.latents[-1].to(device), SNAP_TOLERANCE)
        errors = clipped_error(images, target.repeat(len(points_used), 1, 1, 1))
        return pseudo_huber(errors, HUBER_C).mean(dim=(1, 2, 3)).view(len(points_used), count).mean(dim=0)

    label_dropout = LABEL_DROPOUT if null_class is not None else 0.0
    draws = max(1, config.num_teacher_steps - 1) * num_scales
    return Objective(loss, label_dropout, draws, fingerprint=fingerprint, name="distillation")


def draw_trajectories(teacher: MNISTDiffusionPipeline, config: DistillationConfig, batch: Batch) -> TrajectoryOutput:
    """The teacher's trajectories from the noise and labels of a batch; unconditional where a label is dropped."""
    call: dict[str, Any] = {"num_images_per_label": len(batch.labels)}
    if teacher.null_class is not None:
        scales = batch.noise.new_tensor(config.guidance_scales)[scale_indices(batch, len(config.guidance_scales))]
        scales = torch.where(batch.dropped, 0.0, scales)
        call = {"class_labels": batch.labels.tolist(), "guidance_scale": scales.tolist()}
    return teacher.sample_trajectory(
        **call, latents=batch.noise, num_inference_steps=config.num_teacher_steps, eta=0.0, output_type="pt"
    )


def scale_indices(batch: Batch, num_scales: int) -> Tensor:
    """The guidance scale of each image of a batch, as an index, int64 `[B]`.

    A drawn timestep encodes a point of the trajectory and a scale, so neither depends on process or micro-batch.
    """
    return batch.timesteps % num_scales


def learned_points(config: DistillationConfig, draws: Tensor) -> Tensor:
    """The points of each trajectory to learn from, int64 `[P, B]`; 0 is the noise, which is always among them.

    One-step sampling starts at the noise. The other points are spread evenly, starting at one that `draws`, random
    int64 `[B]`, selects.
    """
    others, count = config.num_teacher_steps - 1, config.points_per_trajectory - 1
    spread = torch.arange(count, device=draws.device) * others // max(1, count)
    first = others - 1 - draws // len(config.guidance_scales)
    rest = 1 + (first[None] + spread[:, None]) % max(1, others)
    return torch.cat([torch.zeros_like(draws)[None], rest])


def snap_to_black_or_white(images: Tensor, tolerance: float) -> Tensor:
    """Clip images `[B, C, H, W]` to [-1, 1], and set pixels within `tolerance` of a bound to it."""
    images = torch.where(images < tolerance - 1, -1.0, images)
    return torch.where(images > 1 - tolerance, 1.0, images)
