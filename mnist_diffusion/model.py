"""The network and its noising process, stock diffusers objects built from the configuration."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DModel

from mnist_diffusion.config import ConfigError, DiffusionConfig, ModelConfig
from mnist_diffusion.data.stateless import mixed_seed
from mnist_diffusion.sampling import load_pipeline

CLASS_EMBEDDING = "class_embedding.weight"


def build_unet(config: ModelConfig, *, image_size: int, channels: int, num_classes: int, seed: int = 0) -> UNet2DModel:
    """A `UNet2DModel` for images `[B, channels, image_size, image_size]`, its weights a function of `seed`.

    With class conditioning it has `num_classes + 1` class embeddings; the last one is the null class.

    Raises:
        ConfigError: `image_size` cannot be halved as often as the levels ask.
    """
    halvings = len(config.block_out_channels) - 1
    if image_size % 2**halvings:
        fits = image_size + -image_size % 2**halvings
        raise ConfigError(
            f"data.image_size={image_size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.block_out_channels ask; set data.image_size={fits}, with data.fit=pad, or use fewer levels"
        )
    attends = [level in config.attention_levels for level in range(len(config.block_out_channels))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(seed, "init"))
        return UNet2DModel(
            sample_size=image_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
            add_attention=any(attends),
            attention_head_dim=config.attention_head_dim if any(attends) else None,
            norm_num_groups=config.norm_num_groups,
            act_fn=config.act_fn,
            dropout=config.dropout,
            num_class_embeds=num_classes + 1 if config.class_conditional else None,
        )


def initialise(unet: UNet2DModel, source: str) -> str:
    """Give `unet` the weights of a pipeline, in place; what was done, in words.

    Class embeddings start anew where the pipeline knows other classes, or none.

    Args:
        unet: the network.
        source: a pipeline folder, or a Hub id.

    Raises:
        UserError: there is no such pipeline.
        ConfigError: its network has another shape.
    """
    pipeline = load_pipeline(source, device="cpu", dtype="float32")
    before, now = pipeline.unet.state_dict(), unet.state_dict()
    kept = [name for name in now if name != CLASS_EMBEDDING]
    different = [
        f"{name} {list(before[name].shape) if name in before else 'missing'}, not {list(now[name].shape)}"
        for name in kept
        if name not in before or before[name].shape != now[name].shape
    ]
    if different or set(before) - set(now) - {CLASS_EMBEDDING}:
        wanted = {**pipeline.unet.config}
        fields = ("block_out_channels", "layers_per_block", "in_channels", "down_block_types")
        shape = ", ".join(f"{field} {wanted[field]}" for field in fields)
        first = different[0] if different else f"{min(set(before) - set(now))} has no place"
        raise ConfigError(
            f"train.init_from={source!r} has a network of another shape ({first}); give the model section its shape: "
            f"{shape}"
        )
    weights = {name: before[name] for name in kept}
    shapes = [state[CLASS_EMBEDDING].shape if CLASS_EMBEDDING in state else None for state in (before, now)]
    same_classes = shapes[0] == shapes[1]
    if same_classes and CLASS_EMBEDDING in now:
        weights[CLASS_EMBEDDING] = before[CLASS_EMBEDDING]
    unet.load_state_dict(weights, strict=False)
    anew = "" if same_classes or CLASS_EMBEDDING not in now else "; its class embeddings start anew, the classes differ"
    return f"weights      of {source}{anew}"


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
