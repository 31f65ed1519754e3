"""The network and its noising process, stock diffusers objects built from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from mnist_diffusion.config import ConfigError, DiffusionConfig, ModelConfig
from mnist_diffusion.data.stateless import mixed_seed
from mnist_diffusion.sampling import load_pipeline

CLASS_EMBEDDING = "class_embedding.weight"
FREE = ("sample_size", "num_class_embeds", "dropout")
"""What networks may differ in that share their weights."""


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


def initialise(
    unet: UNet2DModel, source: str, *, class_names: tuple[str, ...], prediction_type: str | None = None
) -> str:
    """Give `unet` the weights of a pipeline, in place; what was done, in words.

    Class embeddings start anew where the pipeline knows other classes, or none.

    Args:
        unet: the network.
        source: a pipeline folder, or a Hub id.
        class_names: what `unet` is to draw.
        prediction_type: what `unet` is to predict; None for none of what a diffusion model does.

    Raises:
        UserError: there is no such pipeline.
        ConfigError: its network is of another kind, or predicts something else.
    """
    pipeline = load_pipeline(source, device="cpu", dtype="float32")
    theirs, ours = _plain(pipeline.unet.config), _plain(unet.config)
    different = [
        f"{name} is {theirs[name]!r} there, {value!r} here" for name, value in ours.items() if theirs[name] != value
    ]
    predicts = pipeline.scheduler.config.prediction_type
    if prediction_type is not None and predicts != prediction_type:
        different.append(f"it predicts {predicts!r}, and diffusion.prediction_type is {prediction_type!r}")
    if different:
        raise ConfigError(f"train.init_from={source!r} has another kind of network: {'; '.join(different)}")
    before, now = pipeline.unet.state_dict(), unet.state_dict()
    names = pipeline.config.id2label or {}
    known = tuple(names.get(str(label), str(label)) for label in range(pipeline.num_classes or 0))
    anew = CLASS_EMBEDDING in now and known != class_names
    unet.load_state_dict({name: now[name] if name == CLASS_EMBEDDING and anew else before[name] for name in now})
    text = "; the class embeddings start anew, because the classes are others" if anew else ""
    return f"weights      of {source}{text}"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What weights mean to a network: its configuration as read from a file, without what may differ."""
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name not in FREE}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


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
