"""Sampler plans: each step of a sampler as a linear combination, with coefficients fitted while it samples."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline

IMAGES, SEED, TOLERANCE = 4, 0, 1e-3


def sampler_plan(pipeline: MNISTDiffusionPipeline, num_inference_steps: int) -> list[dict[str, Any]]:
    """The steps of the pipeline's sampler, as sums of samples, predictions and noise.

    With a sample `x`, a prediction `v`, standard normal noise `e`, and `D'` for the `D` of the step before:

        D = p x + q v        clipped to [-1, 1] if `clip`
        x = a x + b D + c D' + d e

    Args:
        pipeline: class-conditional; samples a few images, to whose steps the numbers are fitted by least squares.
        num_inference_steps: steps.

    Returns:
        For each step its timestep `t`, and `p`, `q`, `clip`, `a`, `b`, `c`, `d`.

    Raises:
        UserError: the steps are not such sums, or the samples are not of unit variance.
    """
    scheduler, name = pipeline.scheduler, type(pipeline.scheduler).__name__
    if getattr(scheduler, "init_noise_sigma", 1) != 1:
        raise UserError(f"{name} works on samples that are not of unit variance; use dpmpp, ddim, ddpm or lcm")
    generators = [torch.Generator().manual_seed(SEED + index) for index in range(IMAGES)]
    before = torch.randn(IMAGES, *pipeline.image_shape, generator=torch.Generator().manual_seed(SEED))
    last = torch.zeros_like(before)
    # Of its own: others hand on the setting of the training scheduler.
    clip = "clip_sample" in inspect.signature(type(scheduler)).parameters and bool(scheduler.config.clip_sample)
    labels = [index % pipeline.num_classes for index in range(IMAGES)]
    plan: list[dict[str, Any]] = []
    stream = pipeline.stream(labels, num_inference_steps=num_inference_steps, generator=generators, latents=before)
    while True:
        noise = torch.stack([_next_noise(each, pipeline.image_shape) for each in generators])
        if (done := next(stream, None)) is None:
            return plan
        clean = done.pred_original_sample
        (p, q), error = _fit(clean, [before, done.model_output])
        clean = clean.clamp(-1, 1) if clip else clean
        (a, b, c, d), wrong = _fit(done.latents, [before, clean, last, noise])
        if max(error, wrong) > TOLERANCE:
            raise UserError(
                f"{name} in {num_inference_steps} steps does not combine the last two predictions linearly; use dpmpp"
            )
        if abs(d) < TOLERANCE:
            d = 0.0
        plan.append({"t": float(done.timestep), "clip": clip, "p": p, "q": q, "a": a, "b": b, "c": c, "d": d})
        before, last = done.latents, clean


def _next_noise(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """What a generator will draw next, if the step adds noise at all."""
    again = torch.Generator()
    again.set_state(generator.get_state())
    return torch.randn(shape, generator=again)


def _fit(values: torch.Tensor, parts: list[torch.Tensor]) -> tuple[list[float], float]:
    """The least-squares coefficients of `parts` in `values`, and the largest error."""
    columns = np.stack([part.double().flatten().numpy() for part in parts], axis=1)
    target = values.double().flatten().numpy()
    numbers, *_ = np.linalg.lstsq(columns, target, rcond=None)
    return numbers.tolist(), float(np.abs(columns @ numbers - target).max())
