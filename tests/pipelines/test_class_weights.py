"""Shares of several classes in place of a label, which the installed pipeline class takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import build_sampler
from tests.pipelines.test_pipeline import NAN, draw, generators, guided_output


class TestClassWeights:
    def test_one_class_is_its_label(self, pipeline: MNISTDiffusionPipeline) -> None:
        weights = torch.eye(10)[[3, 7]]
        for each in (weights, weights.double(), weights.numpy()):
            assert torch.equal(draw_weights(pipeline, each), draw(pipeline, 3, 7, guidance_scale=2.0))

    def test_mixed_classes_mix_the_conditional_prediction(self, pipeline: MNISTDiffusionPipeline) -> None:
        """Against two passes of the network by hand, for a single step."""
        pipeline.scheduler = build_sampler("ddim", pipeline.scheduler.config)
        weights = torch.zeros(1, 10)
        weights[0, 3], weights[0, 7] = 0.25, 0.75
        guided, (three, seven, null) = guided_output(pipeline, weights, 2.0, 3, 7, 10)
        mixed = 0.25 * three + 0.75 * seven
        torch.testing.assert_close(guided, null + 2 * (mixed - null), atol=1e-5, rtol=1e-4)

    def test_mixed_classes_pass_one_by_one_for_all_images(self, pipeline: MNISTDiffusionPipeline) -> None:
        """The last bits of a result depend on the batch of a network pass, so that is part of what is promised."""
        seen: list[list[int]] = []
        with pipeline.unet.register_forward_pre_hook(
            lambda module, arguments, named: seen.append(named["class_labels"].tolist()), with_kwargs=True
        ):
            pipeline.interpolate([7, 3], 3, guidance_scale=2.0, num_inference_steps=1, generator=generators(0))
        assert seen == [[7, 7, 7, 3, 3, 3, 10, 10, 10]]

    @pytest.mark.parametrize(
        "weights", [torch.ones(2, 9) / 9, torch.ones(2, 10), -torch.eye(10)[:2], torch.full((1, 10), NAN)], ids=str
    )
    def test_what_are_no_weights(self, pipeline: MNISTDiffusionPipeline, weights: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="class_labels as weights must"):
            pipeline(weights)


def draw_weights(pipeline: MNISTDiffusionPipeline, weights: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(weights, guidance_scale=2.0, num_inference_steps=3, output_type="pt", generator=generator).images
