"""The noising process: the training scheduler, and how much image and noise there is at each timestep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mnist_diffusion.config import DiffusionConfig
from mnist_diffusion.option_types import FLOW
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import prediction_type_of

BETA_START, BETA_END = 0.0001, 0.02
"""First and last beta of the linear schedules: Ho et al. (2020), section 4."""


def build_noise_scheduler(config: DiffusionConfig) -> Any:
    """Build the training scheduler, with every argument given.

    `from_config` drops arguments that were left at their defaults, and the next scheduler then uses its own. Timesteps
    are spaced `trailing`, which starts few-step sampling at the last, noisiest timestep.
    """
    if config.prediction_type == FLOW:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=1.0)
    scheduler = DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule=config.beta_schedule,
        trained_betas=None,
        variance_type="fixed_small",
        clip_sample=True,
        prediction_type=config.prediction_type,
        thresholding=False,
        dynamic_thresholding_ratio=0.995,
        clip_sample_range=1.0,
        sample_max_value=1.0,
        timestep_spacing="trailing",
        steps_offset=0,
        rescale_betas_zero_snr=False,
    )
    if config.noise_shift != 1:
        scheduler = DDPMScheduler.from_config(
            scheduler.config, trained_betas=shifted_betas(scheduler.alphas_cumprod, config.noise_shift)
        )
    # Arguments of schedulers made from this configuration, whose own defaults suit Stable Diffusion: end on the clean
    # image, and start PNDM without Runge-Kutta steps.
    scheduler.register_to_config(set_alpha_to_one=True, skip_prk_steps=True)
    return scheduler


def shifted_betas(alphas_cumprod: Tensor, shift: float) -> list[float]:
    """The betas `[T]` of a schedule whose log SNR is `2 log(shift)` lower at each timestep.

    Hoogeboom et al. (2023), https://arxiv.org/abs/2301.11093, section 3.1.
    """
    snr = alphas_cumprod.double() / (1 - alphas_cumprod.double()) / shift**2
    shifted = snr / (1 + snr)
    return (1 - shifted / torch.cat([torch.ones(1), shifted[:-1]])).tolist()


@dataclass(frozen=True)
class NoisingProcess:
    """At timestep `t` an image has become `signal[t] * image + noise[t] * e`, with standard normal `e`.

    Args:
        alphas_cumprod: the signal's share of the variance, float32 `[T]`.
        signal: factor of the image, float32 `[T]`.
        noise: factor of the noise, float32 `[T]`.
        times: the network's timestep input, `[T]`.
        prediction_type: the network's prediction target.
    """

    alphas_cumprod: Tensor
    signal: Tensor
    noise: Tensor
    times: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any) -> NoisingProcess:
        """The process of a training scheduler, or of a sampler made from it.

        Either diffusion (Ho et al., 2020, https://arxiv.org/abs/2006.11239, equation 4), or the straight paths of flow
        matching, `signal = 1 - noise` (Lipman et al., 2022, https://arxiv.org/abs/2210.02747, equation 22; Liu et al.,
        2022, https://arxiv.org/abs/2209.03003).
        """
        if (kind := prediction_type_of(scheduler)) == FLOW:
            times = torch.arange(1, scheduler.config.num_train_timesteps + 1)
            noise = times / len(times)
            signal = 1 - noise
            return cls(signal**2 / (signal**2 + noise**2), signal, noise, times, kind)
        alphas = scheduler.alphas_cumprod.cpu()
        return cls(alphas, alphas.sqrt(), (1 - alphas).sqrt(), torch.arange(len(alphas)), kind)

    def noisy(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix images and noise `[B, C, H, W]` at int64 timesteps `[B]`, or `[1]` for all."""
        return self._at(self.signal, timesteps, images) * images + self._at(self.noise, timesteps, images) * noise

    def target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction target `[B, C, H, W]`: the noise, the image, the velocity, or the flow.

        Ho et al. (2020), algorithm 1; Salimans and Ho (2022), https://arxiv.org/abs/2202.00512, section 4 for the
        velocity; Lipman et al. (2022), equation 23 for the flow, which here leads from the image to the noise.
        """
        match self.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return images
            case "v_prediction":
                return (
                    self._at(self.signal, timesteps, images) * noise - self._at(self.noise, timesteps, images) * images
                )
            case _:
                return noise - images

    @staticmethod
    def _at(table: Tensor, timesteps: Tensor, images: Tensor) -> Tensor:
        return table.to(images)[timesteps].view(-1, *([1] * (images.ndim - 1)))
