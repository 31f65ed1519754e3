"""The network: patches, and beginning with the weights of a pipeline."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.method.network import PatchedUNet, build_unet, patch_size_of
from mnist_diffusion.method.noise import build_noise_scheduler
from mnist_diffusion.pipelines.drawing import build_pipeline
from mnist_diffusion.training.run import warm_start
from tests.conftest import DEFAULT, changed, make_pipeline

NAMES = tuple("abcdefghij")
TINY = dataclasses.replace(DEFAULT.model, block_out_channels=(8, 16), norm_num_groups=4, patch_size=1)


def test_weights_follow_the_seed() -> None:
    first, again, other = (build_unet(TINY, image_size=8, channels=1, num_classes=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_in_training_and_in_the_pipeline(channels: int) -> None:
    """The pixels of a patch are channels, the same in training and in drawing, and images come out whole."""
    model = dataclasses.replace(TINY, patch_size=2)
    unet = build_unet(model, image_size=8, channels=channels, num_classes=10)
    assert (unet.config.sample_size, unet.config.in_channels) == (4, 4 * channels)
    assert patch_size_of(unet, channels=channels) == 2
    noise, labels = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    patches = noise.view(2, channels, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 4 * channels, 4, 4)
    expected = unet(patches, 999, class_labels=labels).sample.view(2, channels, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3)
    expected = expected.reshape(2, channels, 8, 8)
    assert torch.equal(PatchedUNet(unet, 2)(noise, 999, class_labels=labels)[0], expected)
    pipeline = build_pipeline(build_noise_scheduler(DiffusionConfig()), SamplingSettings(), NAMES, unet, patch_size=2)
    assert pipeline.image_shape == (channels, 8, 8)
    [done] = pipeline.stream(labels, guidance_scale=1, num_inference_steps=1, latents=noise)
    torch.testing.assert_close(done.model_output, expected.detach())
    assert done.images("pt").shape == noise.shape


class TestWarmStart:
    """A run that begins with the weights of a pipeline."""

    def load(self, folder: Path, names: tuple[str, ...] = NAMES, **changes: Any) -> tuple[str, UNet2DModel, Any]:
        """What is said, the network, and its weights before."""
        model = dataclasses.replace(TINY, **changes)
        config = changed(DEFAULT, train={"init_from": str(folder)})
        unet = build_unet(model, image_size=8, channels=1, num_classes=len(names))
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        return warm_start(config, unet, names), unet, before

    @pytest.mark.parametrize(
        ("names", "copied"),
        [(NAMES, True), (("x", "y", "z"), False), (tuple("klmnopqrst"), False)],
        ids=["same", "fewer", "as many others"],
    )
    def test_class_embeddings_of_other_classes_start_anew(self, names: Any, copied: bool, tmp_path: Path) -> None:
        theirs = make_pipeline(seed=5)
        theirs.save_pretrained(tmp_path)
        message, unet, before = self.load(tmp_path, names)
        assert ("class embeddings start anew" in message) != copied
        for name, value in unet.state_dict().items():
            own = name == "class_embedding.weight" and not copied
            assert torch.equal(value, before[name] if own else theirs.unet.state_dict()[name])

    @pytest.mark.parametrize(
        ("theirs", "changes", "message"),
        [
            ({}, {"block_out_channels": (8, 8)}, r"block_out_channels is \[8, 16\], not \[8, 8\]"),
            ({}, {"layers_per_block": 2}, "layers_per_block is 1, not 2"),
            ({}, {"norm_num_groups": 8}, "norm_num_groups is 4, not 8"),
            ({"diffusion": DiffusionConfig()}, {}, "predicts 'epsilon', but diffusion.prediction_type is 'v_pred"),
        ],
    )
    def test_another_network_or_prediction_is_refused(
        self, theirs: Any, changes: Any, message: str, tmp_path: Path
    ) -> None:
        """Also where the weights would fit."""
        make_pipeline(**theirs).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=message):
            self.load(tmp_path, **changes)
