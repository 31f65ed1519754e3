"""What a sampler does at each step, as a few numbers that are read off the pipeline while it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline

IMAGES, SEED, TOLERANCE = 4, 0, 1e-3


def sampler_plan(pipeline: MNISTDiffusionPipeline, num_inference_steps: int) -> list[dict[str, Any]]:
    """The steps of the pipeline's sampler, as sums of what is known at each.

    With a sample `x`, a prediction `v`, standard normal noise `e`, and `D'` for the `D` of the step before:

        D = p x + q v        clipped to [-1, 1] if `clip`
        x = a x + b D + c D' + d e

    Args:
        pipeline: class-conditional; draws a few images, of whose steps the numbers are the least-squares fit.
        num_inference_steps: steps.

    Returns:
        For each step its timestep `t`, and `p`, `q`, `clip`, `a`, `b`, `c`, `d`.

    Raises:
        UserError: the steps are not such sums, or the samples are not of unit variance.
    """
    name = type(pipeline.scheduler).__name__
    if getattr(pipeline.scheduler, "init_noise_sigma", 1) != 1:
        raise UserError(f"{name} works on samples that are not of unit variance; use dpmpp, ddim, ddpm or lcm")
    generators = [torch.Generator().manual_seed(SEED + index) for index in range(IMAGES)]
    before, last = torch.randn(IMAGES, *pipeline.image_shape, generator=torch.Generator().manual_seed(SEED)), None
    labels = [index % pipeline.num_classes for index in range(IMAGES)]
    plan: list[dict[str, Any]] = []
    stream = pipeline.stream(labels, num_inference_steps=num_inference_steps, generator=generators, latents=before)
    while True:
        noise = torch.stack([_next_noise(each, pipeline.image_shape) for each in generators])
        if (done := next(stream, None)) is None:
            return plan
        parts = [before, done.model_output]
        (p, q), error = _fit(done.pred_original_sample, parts)
        clean, sums = done.pred_original_sample, {}
        for clip in (False, True):
            shown = clean.clamp(-1, 1) if clip else clean
            known = [before, shown, torch.zeros_like(shown) if last is None else last[clip], noise]
            sums[clip] = (*_fit(done.latents, known), shown)
        clip = sums[True][1] < sums[False][1]
        (a, b, c, d), wrong, _ = sums[clip]
        if max(error, wrong) > TOLERANCE:
            raise UserError(
                f"{name} in {num_inference_steps} steps does not combine the last two predictions; use dpmpp"
            )
        if abs(d) < TOLERANCE:
            d = 0.0
        numbers = {"p": p, "q": q, "a": a, "b": b, "c": c, "d": d}
        plan.append({"t": float(done.timestep), "clip": clip, **numbers})
        before, last = done.latents, {each: sums[each][2] for each in (False, True)}


def _next_noise(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """What a generator will draw next, if the step adds noise at all."""
    again = torch.Generator()
    again.set_state(generator.get_state())
    return torch.randn(shape, generator=again)


def _fit(values: torch.Tensor, parts: list[torch.Tensor]) -> tuple[list[float], float]:
    """The numbers by which `parts` sum up to `values`, and by how much they fail at most."""
    columns = np.stack([part.double().flatten().numpy() for part in parts], axis=1)
    wanted = values.double().flatten().numpy()
    numbers, *_ = np.linalg.lstsq(columns, wanted, rcond=None)
    return numbers.tolist(), float(np.abs(columns @ numbers - wanted).max())


def possible_plans(pipeline: MNISTDiffusionPipeline, counts: list[int]) -> dict[int, list[dict[str, Any]]]:
    """The plans for those of `counts` that the sampler can take.

    Raises:
        UserError: there is none.
    """
    available = pipeline.scheduler.config.num_train_timesteps
    plans = {count: sampler_plan(pipeline, count) for count in counts if count <= available}
    if not plans:
        raise UserError(f"the sampler has {available} timesteps, fewer than {counts}")
    return plans
