"""What the network is asked to do: draws, targets, weights and the loss, each a small function.

The training loop is given an `Objective`, a pair of functions, and knows nothing of diffusion; another objective,
such as a student's, is another pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from mnist_diffusion.config import DiffusionConfig
from mnist_diffusion.seeds import Purpose, torch_generator


@dataclass(frozen=True)
class Batch:
    """Images in [-1, 1], float32 `[B, C, H, W]`, and their labels, int64 `[B]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Draws:
    """The randomness of a batch: noise, float32 `[B, C, H, W]`; timesteps, int64 `[B]`; dropped labels, bool `[B]`."""

    noise: Tensor
    timesteps: Tensor
    dropped: Tensor

    def __getitem__(self, part: slice) -> Draws:
        return Draws(self.noise[part], self.timesteps[part], self.dropped[part])


class Draw(Protocol):
    """Draws the randomness of a global batch of `shape` at a step; `held_out` draws are a stream of their own."""

    def __call__(
        self, shape: tuple[int, ...], *, seed: int, step: int, device: torch.device | str, held_out: bool = False
    ) -> Draws:
        """Draw them."""


@dataclass(frozen=True)
class Objective:
    """What the loop is given: `draw` makes the randomness of a step, `loss` turns a batch into a loss an image, `[B]`.

    `num_timesteps` is given where the draws' timesteps, all below it, say how noisy an image is. `fingerprint` stands
    for what the loss depends on beside configuration and images, such as a teacher's weights; a resumed run must find
    it the same.
    """

    draw: Draw
    loss: Callable[[nn.Module, Batch, Draws], Tensor]
    num_timesteps: int | None = None
    fingerprint: str = ""


def diffusion_draws(
    config: DiffusionConfig,
    shape: tuple[int, ...],
    *,
    seed: int,
    step: int,
    device: torch.device | str,
    held_out: bool = False,
) -> Draws:
    """The randomness of step `step` for a global batch of `shape` `[B, C, H, W]`, a stream for each purpose.

    With `held_out` the draws come from a stream of their own and no label is dropped.
    """

    def generator(purpose: Purpose) -> torch.Generator:
        place = (0, step) if held_out else (1, step)
        return torch_generator(device, seed, purpose, *place)

    noise = torch.randn(shape, generator=generator("noise"), device=device, dtype=torch.float32)
    timesteps = torch.randint(
        config.num_train_timesteps, shape[:1], generator=generator("timesteps"), device=device, dtype=torch.int64
    )
    share = 0.0 if held_out else config.label_dropout
    dropped = torch.rand(shape[:1], generator=generator("labels"), device=device) < share
    return Draws(noise, timesteps, dropped)


def diffusion_target(scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network should predict, `[B, C, H, W]`: the noise, the image, or the velocity.

    Ho et al. (2020), https://arxiv.org/abs/2006.11239, algorithm 1; Salimans and Ho (2022),
    https://arxiv.org/abs/2202.00512, section 4 for the velocity.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return images
        case _:
            return scheduler.get_velocity(images, noise, timesteps)


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """The min-SNR weight of each timestep, `[T]`: min(SNR, gamma) as a weight on the error of the clean image.

    Hang et al. (2023), https://arxiv.org/abs/2303.09556, section 3.4: divided by SNR for a prediction of the noise,
    by SNR + 1 for the velocity.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    # At zero terminal SNR an epsilon weight would be 0 / 0; such a schedule is refused by the configuration.
    return snr.clamp(max=gamma) / divisor


def diffusion_objective(config: DiffusionConfig, scheduler: DDPMScheduler, *, null_class: int | None) -> Objective:
    """The loss of denoising diffusion: mean squared error to the target, weighted over timesteps.

    Args:
        config: loss weighting.
        scheduler: the training scheduler.
        null_class: the label that stands for no class; None for an unconditional network.
    """
    weights = None
    if config.loss_weighting == "min_snr":
        weights = min_snr_weights(scheduler.alphas_cumprod, config.prediction_type, config.min_snr_gamma)

    def training_loss(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        noisy = scheduler.add_noise(batch.images, draws.noise, draws.timesteps)
        target = diffusion_target(scheduler, batch.images, draws.noise, draws.timesteps)
        labels = None if null_class is None else torch.where(draws.dropped, null_class, batch.labels)
        prediction = model(noisy, draws.timesteps, class_labels=labels, return_dict=False)[0]
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        errors = (prediction - target).square().mean(dim=(1, 2, 3))
        if weights is not None:
            errors = errors * weights.to(errors.device)[draws.timesteps]
        return errors

    return Objective(partial(diffusion_draws, config), training_loss, num_timesteps=config.num_train_timesteps)
