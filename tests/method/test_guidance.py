"""Guidance rules: functions of one's own, a weaker model, and diffusers' guiders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    SkipLayerGuidance,
)
from diffusers.guiders import MagnitudeAwareGuidance
from torch import Tensor

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.method.guidance import Autoguidance
from mnist_diffusion.option_types import GUIDERS
from mnist_diffusion.pipelines import pipeline_mnist_diffusion as shipped
from mnist_diffusion.pipelines.drawing import call_arguments
from mnist_diffusion.pipelines.pipeline import GuidanceStep, MNISTDiffusionPipeline
from tests.conftest import make_pipeline
from tests.demo.test_studio import make_student
from tests.pipelines.test_pipeline import CountingUNet, draw


@pytest.fixture
def weak() -> MNISTDiffusionPipeline:
    return make_pipeline(seed=1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_plain_rule_draws_the_same_bits(pipeline: MNISTDiffusionPipeline, scale: float) -> None:
    counter, counts, images = CountingUNet(pipeline), [], []
    for rule in (None, shipped.classifier_free_guidance):
        images.append(draw(pipeline, 1, 2, guidance_scale=scale, guidance_interval=(0.3, 0.7), guidance=rule))
        counts.append(counter.nfe)
    assert torch.equal(*images)
    assert counts[1] == 2 * counts[0]


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
    torch.testing.assert_close(
        draw(pipeline, 1, guidance=lambda step: step.predict(False)[1]), draw(pipeline, 1, guidance_scale=0)
    )


def test_a_stream_may_lose_and_gain_its_class(pipeline: MNISTDiffusionPipeline) -> None:
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for begins, goes_on in (([1], None), (None, [1])):
        scale: dict[str, Any] = {} if begins is None else {"guidance_scale": 3.0}
        stream = pipeline.stream(begins, latents=noise, num_inference_steps=2, **scale)
        first = next(stream)
        second = stream.send({"class_labels": goes_on, "guidance_scale": None if goes_on is None else 3.0})
        with torch.no_grad():
            predicted = {label: pipeline.unet(first.latents, 499, torch.tensor([label])).sample for label in (1, 10)}
        guided = predicted[10] + 3 * (predicted[1] - predicted[10])
        wanted = predicted[10] if goes_on is None else guided
        torch.testing.assert_close(second.model_output, wanted, atol=1e-4, rtol=1e-4)


def test_mixed_classes(pipeline: MNISTDiffusionPipeline, weak: MNISTDiffusionPipeline) -> None:
    weights = torch.zeros(1, 10)
    weights[0, [3, 8]] = 0.5
    for rule, nfe in ((None, 3), (Autoguidance(weak), 4)):
        *_, last = pipeline.stream(weights, guidance_scale=2, num_inference_steps=2, guidance=rule)
        assert last.nfe == 2 * nfe


class TestAutoguidance:
    def test_formula(self, pipeline: MNISTDiffusionPipeline, weak: MNISTDiffusionPipeline) -> None:
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        [done] = pipeline.stream(
            [4], guidance_scale=3, num_inference_steps=1, latents=noise, guidance=Autoguidance(weak)
        )
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
            ({"channels": 3}, r"image_shape of the weaker model must be \(1, 8, 8\), got \(3, 8, 8\)"),
            ({"conditional": False}, "num_classes of the weaker model must be 10, got None"),
            (
                {"diffusion": DiffusionConfig(beta_schedule="squaredcos_cap_v2")},
                "prediction_type of the weaker model must be v_prediction, got epsilon",
            ),
        ],
    )
    def test_models_that_do_not_fit(
        self, pipeline: MNISTDiffusionPipeline, other: dict[str, Any], message: str
    ) -> None:
        counter = CountingUNet(pipeline)
        with pytest.raises(ValueError, match=message):
            pipeline([1], guidance=Autoguidance(make_pipeline(**other)))
        assert counter.nfe == 0


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
        named = call_arguments(
            pipeline, SamplingSettings(guidance=name, guidance_scale=4.0, guidance_interval=(0.0, 1.0))
        )
        found = draw(pipeline, 1, **named)
        assert torch.isfinite(found).all()
        assert not torch.allclose(found, plain, atol=1e-3)

    def test_a_guider_remembers_nothing_from_call_to_call(self, pipeline: MNISTDiffusionPipeline) -> None:
        guider = AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5)
        later: dict[str, Any] = {"guidance_interval": (0, 0.8), "num_inference_steps": 5}
        first = draw(pipeline, 1, guidance=guider, **later)
        assert torch.equal(draw(pipeline, 1, guidance=guider, **later), first)
        assert guider.momentum_buffer is None
        forgetful = AdaptiveProjectedGuidance(guidance_scale=4.0)
        assert not torch.equal(draw(pipeline, 1, guidance=forgetful, **later), first)  # though not asked at step 0

    def test_not_in_plain_diffusers(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
        with pytest.raises(
            TypeError, match="guidance must be a function of a GuidanceStep, got ClassifierFreeGuidance"
        ):
            draw(loaded, 1, guidance=ClassifierFreeGuidance(guidance_scale=3.0))


def nothing(step: GuidanceStep) -> None:
    return None


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"guidance": ClassifierFreeGuidance}, TypeError, "guidance must be a function of a GuidanceStep"),
        ({"guidance": "cfg"}, TypeError, "guidance must be a function of a GuidanceStep, got 'cfg'"),
        ({"guidance": nothing}, TypeError, r"guidance must predict \(1, 1, 8, 8\), got None"),
        ({"guidance": nothing, "class_labels": None}, ValueError, "guidance needs class_labels"),
        ({"guidance": ClassifierFreeGuidance(), "guidance_scale": 2}, ValueError, "guidance_scale=2 has no effect"),
        ({"guidance": AutoGuidance(auto_guidance_layers=[0], dropout=0.1)}, ValueError, "AutoGuidance needs other"),
        ({"guidance": SkipLayerGuidance(skip_layer_guidance_layers=[0])}, ValueError, "needs other predictions"),
        ({"guidance": MagnitudeAwareGuidance()}, ValueError, "guidance=MagnitudeAwareGuidance needs other predictions"),
    ],
)
def test_bad_rules(
    pipeline: MNISTDiffusionPipeline, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    counter = CountingUNet(pipeline)
    with pytest.raises(kind, match=message):
        pipeline(**{"class_labels": [1], **arguments})
    assert counter.nfe == 0


def test_a_student_has_its_guidance_in_the_weights() -> None:
    with pytest.raises(ValueError, match="have no effect on a distilled model"):
        make_student(make_pipeline())([1], guidance=shipped.classifier_free_guidance)


def test_names(pipeline: MNISTDiffusionPipeline, weak: MNISTDiffusionPipeline, tmp_path: Path) -> None:
    weak.save_pretrained(tmp_path)
    assert call_arguments(pipeline, SamplingSettings()) == {}
    named = call_arguments(
        pipeline,
        SamplingSettings(guidance=f"autoguidance:{tmp_path}", guidance_scale=2.0, guidance_interval=(0.1, 0.9)),
    )
    assert {**named, "guidance": None} == {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.9), "guidance": None}
    assert torch.equal(draw(pipeline, 1, **named), draw(pipeline, 1, **{**named, "guidance": Autoguidance(weak)}))
    named = call_arguments(
        pipeline, SamplingSettings(guidance="AdaptiveProjectedGuidance", guidance_interval=(0.3, 0.9))
    )
    assert (named.pop("guidance").guidance_scale, named) == (1.9, {"guidance_interval": (0.3, 0.9)})
    with pytest.raises(ValueError, match="must be cfg, autoguidance:PIPELINE or one of AdaptiveProjected"):
        SamplingSettings(guidance="SkipLayerGuidance")
