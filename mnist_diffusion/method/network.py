"""The network: a `UNet2DModel` on pixels or patches, and its first weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from mnist_diffusion.config import ModelConfig
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.seeds import mixed_seed

CLASS_EMBEDDING = "class_embedding.weight"
NOT_IN_WEIGHTS = ("sample_size", "num_class_embeds", "dropout")
"""Settings that do not change the shape of the weights, but for the class embeddings."""


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


def zero_init_output(unet: UNet2DModel) -> None:
    """Set the last convolution to zero, in place, so that the first prediction is zero.

    As in the code of Ho et al. (2020), https://arxiv.org/abs/2006.11239.
    """
    for parameter in unet.conv_out.parameters():
        nn.init.zeros_(parameter)


def patch_size_of(unet: UNet2DModel, *, channels: int) -> int:
    """The side of the patches whose pixels are the input channels of `unet`."""
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
        """The prediction in a tuple, as from a `UNet2DModel` with `return_dict=False`."""
        patches = F.pixel_unshuffle(sample, self.patch_size)
        predicted = self.unet(patches, timestep, class_labels=class_labels, return_dict=False)[0]
        return (F.pixel_shuffle(predicted, self.patch_size),)


def load_pretrained_weights(unet: UNet2DModel, pretrained: UNet2DModel, *, same_classes: bool) -> bool:
    """Copy the weights of another network, in place.

    Class embeddings keep their random values unless both networks have the same classes and number of embeddings.

    Args:
        unet: the network to change.
        pretrained: the network to copy from.
        same_classes: whether both are for the same classes, in the same order.

    Returns:
        False if the class embeddings kept their random values, else True.

    Raises:
        ConfigError: the networks have different shapes; the message names the settings.
    """
    theirs, ours = _shape_settings(pretrained.config), _shape_settings(unet.config)
    if different := [
        f"{name} is {theirs[name]!r}, not {value!r}" for name, value in ours.items() if theirs[name] != value
    ]:
        raise ConfigError(f"train.init_from is a network of another shape: {'; '.join(different)}")
    before, now = pretrained.state_dict(), unet.state_dict()
    fits = CLASS_EMBEDDING not in now or (same_classes and before[CLASS_EMBEDDING].shape == now[CLASS_EMBEDDING].shape)
    unchanged = set() if fits else {CLASS_EMBEDDING}
    unet.load_state_dict({name: now[name] if name in unchanged else before[name] for name in now})
    return fits


def _shape_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network that decide the shapes of its weights, with lists for tuples."""
    settings = {
        name: value for name, value in config.items() if not name.startswith("_") and name not in NOT_IN_WEIGHTS
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
