"""Build the training scheduler, which defines the noising process."""

from __future__ import annotations

from diffusers import DDPMScheduler

from mnist_diffusion.config import DiffusionConfig


def build_noise_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """The training scheduler, with every argument given.

    What is left at its default is dropped when another scheduler is made from this one's configuration, and that
    one's own default takes its place; nothing may be left to that. Timesteps are spaced `trailing`, which starts
    few-step sampling at the last, noisiest step.
    """
    scheduler = DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        trained_betas=None if config.trained_betas is None else list(config.trained_betas),
        variance_type="fixed_small",
        clip_sample=config.clip_sample,
        prediction_type=config.prediction_type,
        thresholding=False,
        dynamic_thresholding_ratio=0.995,
        clip_sample_range=1.0,
        sample_max_value=1.0,
        timestep_spacing="trailing",
        steps_offset=0,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )
    # Not arguments of this scheduler, but of those made from its configuration, whose defaults belong to Stable
    # Diffusion: end on the clean image, and let PNDM start without Runge-Kutta steps.
    scheduler.register_to_config(set_alpha_to_one=True, skip_prk_steps=True)
    return scheduler
