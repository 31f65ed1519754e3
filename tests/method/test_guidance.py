"""Guidance rules: functions of one's own, a weaker model, and diffusers' guiders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from torch import Tensor

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.method.guidance import Autoguidance
from mnist_diffusion.option_types import GUIDERS
from mnist_diffusion.pipelines.drawing import call_arguments
from mnist_diffusion.pipelines.pipeline import GuidanceStep, MNISTDiffusionPipeline
from tests.conftest import make_pipeline
from tests.pipelines.test_pipeline import CountingUNet, draw


@pytest.fixture
def weak() -> MNISTDiffusionPipeline:
    return make_pipeline(seed=1)


def test_a_rule_of_ones_own(pipeline: MNISTDiffusionPipeline) -> None:
    """It sees the step, asks for what it needs, and its passes are counted, in plain diffusers too."""
    seen: list[GuidanceStep] = []

    def rule(step: GuidanceStep) -> Tensor:
        seen.append(step)
        conditional, unconditional = step.predict(step.scales > 2, True)
        assert (conditional[step.scales <= 2] == 0).all()
        return unconditional

    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance": rule}
    *_, last = pipeline.stream([1, 2, 3], guidance_scale=[1.0, 3.0, 4.0], guidance_interval=(0.5, 1), **arguments)
    assert [(step.step, step.num_steps) for step in seen] == [(index, 4) for index in range(4)]
    levels = [float(step.timestep) / 1000 for step in seen]
    for step, level in zip(seen, levels, strict=True):
        assert step.scales.tolist() == ([1, 3, 4] if level >= 0.5 else [1, 1, 1])
    assert last.nfe == sum(3 + (2 if level >= 0.5 else 0) for level in levels)
    unconditional = draw(pipeline, 1, guidance=lambda step: step.predict(False)[1])
    torch.testing.assert_close(unconditional, draw(pipeline, 1, guidance_scale=0))


class TestAutoguidance:
    def test_formula(self, pipeline: MNISTDiffusionPipeline, weak: MNISTDiffusionPipeline) -> None:
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        asked: dict[str, Any] = {"guidance_scale": 3, "num_inference_steps": 1, "latents": noise}
        [done] = pipeline.stream([4], **asked, guidance=Autoguidance(weak))
        with torch.no_grad():
            strong, bad = (each.unet(noise, 999, torch.tensor([4])).sample for each in (pipeline, weak))
        torch.testing.assert_close(done.model_output, bad + 3 * (strong - bad), atol=1e-5, rtol=1e-5)
        assert (strong - bad).abs().max() > 1e-3
        assert done.nfe == 2

    def test_passes_and_ends(self, pipeline: MNISTDiffusionPipeline, weak: MNISTDiffusionPipeline) -> None:
        """At scale 1 it is the strong model, at 0 the weak one, with one pass each; by itself a model is itself."""
        counters = [CountingUNet(each) for each in (pipeline, weak)]
        for scale, model, passes in ((1, pipeline, [2, 0]), (0, weak, [0, 2])):
            before = [counter.nfe for counter in counters]
            images = draw(pipeline, 1, guidance_scale=scale, num_inference_steps=2, guidance=Autoguidance(weak))
            assert [counter.nfe - start for counter, start in zip(counters, before, strict=True)] == passes
            torch.testing.assert_close(images, draw(model, 1, guidance_scale=1, num_inference_steps=2))
        own = draw(pipeline, 1, guidance_scale=4, guidance=Autoguidance(pipeline))
        torch.testing.assert_close(own, draw(pipeline, 1, guidance_scale=1))

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"conditional": False}, "num_classes of the weaker model must be 10, got None"),
            ({"diffusion": DiffusionConfig(beta_schedule="squaredcos_cap_v2")}, "prediction_type .* must be v_pred"),
        ],
    )
    def test_models_that_do_not_fit(self, pipeline: MNISTDiffusionPipeline, other: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pipeline([1], guidance=Autoguidance(make_pipeline(**other)))


class TestGuiders:
    def test_classifier_free(self, pipeline: MNISTDiffusionPipeline) -> None:
        """Scale, steps and passes are the guider's own, within the interval; the pixels are ours."""
        counter = CountingUNet(pipeline)
        arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_interval": (0.4, 0.8)}
        theirs = draw(pipeline, 1, 2, guidance=ClassifierFreeGuidance(guidance_scale=3.0), **arguments)
        assert counter.nfe == 2 * (1 + 2 + 2 + 1)
        torch.testing.assert_close(theirs, draw(pipeline, 1, 2, guidance_scale=3, **arguments))
        early = draw(pipeline, 1, 2, guidance=ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5), **arguments)
        assert counter.nfe == 2 * (6 + 6) + 2 * (1 + 2 + 1 + 1)
        assert not torch.equal(early, theirs)

    @pytest.mark.parametrize("name", GUIDERS)
    def test_every_guider_that_can_be_named(self, pipeline: MNISTDiffusionPipeline, name: str) -> None:
        plain = draw(pipeline, 1, guidance_scale=1)
        settings = SamplingSettings(guidance=name, guidance_scale=4.0, guidance_interval=(0.0, 1.0))
        found = draw(pipeline, 1, **call_arguments(pipeline, settings))
        assert torch.isfinite(found).all()
        assert not torch.allclose(found, plain, atol=1e-3)


def test_names(pipeline: MNISTDiffusionPipeline, weak: MNISTDiffusionPipeline, tmp_path: Path) -> None:
    weak.save_pretrained(tmp_path)
    settings = SamplingSettings(guidance=f"autoguidance:{tmp_path}", guidance_scale=2.0, guidance_interval=(0.1, 0.9))
    named = call_arguments(pipeline, settings)
    assert {**named, "guidance": None} == {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.9), "guidance": None}
    assert torch.equal(draw(pipeline, 1, **named), draw(pipeline, 1, **{**named, "guidance": Autoguidance(weak)}))
    with pytest.raises(ValueError, match="must be cfg, autoguidance:PIPELINE or one of AdaptiveProjected"):
        SamplingSettings(guidance="SkipLayerGuidance")
