"""Build the UNet from the configuration, and give it the weights of another pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from mnist_diffusion.config import ModelConfig
from mnist_diffusion.diffusion.pipeline import class_names as pipeline_class_names
from mnist_diffusion.diffusion.pipeline import load_pipeline
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.seeds import mixed_seed
from mnist_diffusion.sharing.pipeline import prediction_type_of

CLASS_EMBEDDING = "class_embedding.weight"
FREE = ("sample_size", "num_class_embeds", "dropout")
"""Values in which networks that share their weights may differ."""


def build_unet(config: ModelConfig, *, image_size: int, channels: int, num_classes: int, seed: int = 0) -> UNet2DModel:
    """Build a `UNet2DModel` for images `[B, channels, image_size, image_size]`, its weights a function of `seed`.

    With class conditioning it has `num_classes + 1` class embeddings; the last one is the null class.

    Raises:
        ConfigError: `image_size` cannot be halved as often as the levels ask.
    """
    halvings, patch = len(config.block_out_channels) - 1, config.patch_size
    if image_size % (patch * 2**halvings):
        fits = image_size + -image_size % (patch * 2**halvings)
        raise ConfigError(
            f"data.image_size={image_size} cannot be cut into patches of model.patch_size={patch} and halved "
            f"{halvings} times, as the {halvings + 1} levels of model.block_out_channels ask; set "
            f"data.image_size={fits}, with data.fit=pad, or use fewer levels"
        )
    attends = [level in config.attention_levels for level in range(len(config.block_out_channels))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(seed, "init"))
        return UNet2DModel(
            sample_size=image_size // patch,
            in_channels=channels * patch**2,
            out_channels=channels * patch**2,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
            add_attention=any(attends),
            attention_head_dim=config.attention_head_dim if any(attends) else None,
            norm_num_groups=config.norm_num_groups,
            resnet_time_scale_shift=config.resnet_time_scale_shift,
            dropout=config.dropout,
            num_class_embeds=num_classes + 1 if config.class_conditional else None,
        )


def silence(unet: UNet2DModel) -> None:
    """Set the last convolution to zero, in place, so that training begins with a prediction of nothing.

    So does the code of Ho et al. (2020), https://arxiv.org/abs/2006.11239.
    """
    for parameter in unet.conv_out.parameters():
        nn.init.zeros_(parameter)


def patch_size_of(unet: UNet2DModel, *, channels: int) -> int:
    """The side of the patches of which `unet` takes the pixels of images with `channels`."""
    return math.isqrt(unet.config.in_channels // channels)


class PatchedUNet(nn.Module):
    """A network that takes and predicts images `[B, C, H, W]`, around one for patches `[B, C p^2, H / p, W / p]`.

    Args:
        unet: the network.
        patch_size: the side p of a patch.
    """

    def __init__(self, unet: UNet2DModel, patch_size: int):
        super().__init__()
        self.unet, self.patch_size = unet, patch_size

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, **options: Any) -> tuple[Tensor]:
        """What a call of the network with `return_dict=False` gives."""
        patches = F.pixel_unshuffle(sample, self.patch_size)
        predicted = self.unet(patches, timestep, class_labels=class_labels, return_dict=False)[0]
        return (F.pixel_shuffle(predicted, self.patch_size),)


def initialise(unet: UNet2DModel, source: str, *, class_names: tuple[str, ...], prediction_type: str) -> str:
    """Give `unet` the weights of a pipeline, in place, and say what was done.

    Class embeddings start afresh if the pipeline has other classes, or is a student with several guidance scales.

    Args:
        unet: the network.
        source: a pipeline folder, or a Hub id.
        class_names: the classes that `unet` is to draw.
        prediction_type: what `unet` is to predict.

    Raises:
        UserError: there is no such pipeline.
        ConfigError: its network is of another kind, or predicts something else.
    """
    pipeline = load_pipeline(source, device="cpu", dtype="float32")
    theirs, ours = _plain(pipeline.unet.config), _plain(unet.config)
    different = [
        f"{name} is {theirs[name]!r} there, {value!r} here" for name, value in ours.items() if theirs[name] != value
    ]
    predicts = prediction_type_of(pipeline.scheduler)
    if predicts != prediction_type:
        different.append(f"it predicts {predicts!r}, and diffusion.prediction_type is {prediction_type!r}")
    if different:
        raise ConfigError(f"train.init_from={source!r} has another kind of network: {'; '.join(different)}")
    before, now = pipeline.unet.state_dict(), unet.state_dict()
    fresh = CLASS_EMBEDDING in now and (
        pipeline_class_names(pipeline) != class_names or before[CLASS_EMBEDDING].shape != now[CLASS_EMBEDDING].shape
    )
    unet.load_state_dict({name: now[name] if name == CLASS_EMBEDDING and fresh else before[name] for name in now})
    text = "; the class embeddings start afresh, because its own are for other classes or scales" if fresh else ""
    return f"weights      of {source}{text}"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A network's configuration as read from a file, without the values that may differ."""
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name not in FREE}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
