"""The pipeline: inputs, guidance, seeds, callbacks, threads and other code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EDMEulerScheduler
from PIL import Image

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.pipelines.drawing import generate
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import guided_prediction, predicted_original_sample
from mnist_diffusion.pipelines.samplers import build_sampler
from tests.conftest import ALL_SAMPLERS, make_pipeline


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipeline: MNISTDiffusionPipeline, *labels: Any, seed: int = 0, **arguments: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "pt", **arguments}
    return pipeline(list(labels) or None, generator=torch.Generator().manual_seed(seed), **arguments).images


def guided_output(
    pipeline: MNISTDiffusionPipeline, labels: Any, guidance_scale: float, *classes: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The guided prediction of a single step, and the network's own at the same noise for each of `classes`."""
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    pipeline(
        labels,
        guidance_scale=guidance_scale,
        num_inference_steps=1,
        latents=noise,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.update(tensors) or {},
        callback_on_step_end_tensor_inputs=["model_output"],
    )
    with torch.no_grad():
        return seen["model_output"], [pipeline.unet(noise, 999, torch.tensor([label])).sample for label in classes]


class CountingUNet:
    """Counts the images that go through the real network."""

    def __init__(self, pipeline: MNISTDiffusionPipeline):
        self.nfe = 0
        pipeline.unet.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self.nfe += len(arguments[0])


VALID_LABELS = [
    [3, 7],
    (3, 7),
    ["d", "h"],
    [3, "h"],
    np.array([3, 7]),
    np.array([3, 7], dtype=np.uint8),
    torch.tensor([3, 7]),
    torch.tensor([3, 7], dtype=torch.int32),
    torch.tensor([3, 7], dtype=torch.uint8),
    [np.int64(3), np.int32(7)],
    [torch.tensor(3), torch.tensor(7)],
    [np.array(3), 7],
    range(3, 8, 4),
    [np.uint8(3), "h"],
    np.array(["d", "h"]),
    ("d", torch.tensor(7)),
]


@pytest.mark.parametrize("labels", VALID_LABELS, ids=repr)
def test_spellings_of_the_same_call_give_the_same_bits(pipeline: MNISTDiffusionPipeline, labels: Any) -> None:
    expected = pipeline([3, 7], 1, 2.0, num_inference_steps=2, generator=generators(1, 2), output_type="np").images
    actual = pipeline(
        labels,
        guidance_scale=[2, 2.0],
        num_inference_steps=np.int64(2),
        generator=tuple(generators(1, 2)),
        output_type="np",
    ).images
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("label", [3, "d", np.int64(3), torch.tensor(3), np.array(3)], ids=repr)
def test_one_label(pipeline: MNISTDiffusionPipeline, label: Any) -> None:
    single = pipeline(label, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(single, draw(pipeline, 3, num_inference_steps=2))


NAN, INFINITY = math.nan, math.inf
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"class_labels": True}, TypeError, "class_labels"),
    ({"class_labels": 3.0}, TypeError, "class_labels"),
    ({"class_labels": [3, None]}, TypeError, "class_labels"),
    ({"class_labels": [3.5]}, TypeError, "class_labels"),
    ({"class_labels": [True]}, TypeError, "class_labels"),
    ({"class_labels": [NAN]}, TypeError, "class_labels"),
    ({"class_labels": {3}}, TypeError, "class_labels"),
    ({"class_labels": {"d": 1}}, TypeError, "class_labels"),
    ({"class_labels": b"d"}, ValueError, "class_labels"),
    ({"class_labels": 10}, ValueError, "class_labels must be from 0 to 9, got 10"),
    ({"class_labels": 11}, ValueError, "class_labels"),
    ({"class_labels": -1}, ValueError, "class_labels"),
    ({"class_labels": [0, 99]}, ValueError, "class_labels"),
    ({"class_labels": []}, ValueError, "class_labels must name at least one class"),
    ({"class_labels": torch.tensor([])}, ValueError, "class_labels"),
    ({"class_labels": [[1, 2]]}, TypeError, "class_labels"),
    ({"class_labels": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, r"class_labels .* got \[0, 0\]"),
    ({"class_labels": np.zeros((1, 1), dtype=int)}, TypeError, "class_labels"),
    ({"class_labels": torch.tensor([1.0])}, TypeError, "class_labels"),
    ({"class_labels": np.array([True])}, TypeError, "class_labels"),
    ({"class_labels": "zebra"}, ValueError, "no class named 'zebra'"),
    ({"class_labels": ["a", "zebra"]}, ValueError, "zebra"),
    ({"class_labels": "3"}, ValueError, "no class named '3'"),
    ({"class_labels": None}, ValueError, "guidance_scale needs class_labels"),
    ({"num_images_per_label": 0}, ValueError, "num_images_per_label"),
    ({"num_images_per_label": -2}, ValueError, "num_images_per_label"),
    ({"num_images_per_label": 1.0}, TypeError, "num_images_per_label"),
    ({"num_images_per_label": True}, TypeError, "num_images_per_label"),
    ({"guidance_scale": NAN}, ValueError, "guidance_scale"),
    ({"guidance_scale": INFINITY}, ValueError, "guidance_scale"),
    ({"guidance_scale": -1}, ValueError, "guidance_scale must be at least 0, got -1"),
    ({"guidance_scale": "5"}, TypeError, "guidance_scale"),
    ({"guidance_scale": True}, TypeError, "guidance_scale"),
    ({"guidance_scale": [1.0]}, ValueError, "guidance_scale must be one number or 2"),
    ({"guidance_scale": [1.0, NAN]}, ValueError, "guidance_scale"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, ValueError, "guidance_scale"),
    ({"guidance_scale": torch.ones(2, 1)}, TypeError, "guidance_scale"),
    ({"guidance_interval": 0.5}, TypeError, "guidance_interval"),
    ({"guidance_interval": (0.1, 0.2, 0.3)}, TypeError, "guidance_interval"),
    ({"guidance_interval": (0.8, 0.2)}, ValueError, "guidance_interval must not be reversed"),
    ({"guidance_interval": (-0.1, 0.2)}, ValueError, "guidance_interval"),
    ({"guidance_interval": (0.1, 1.2)}, ValueError, "guidance_interval"),
    ({"guidance_interval": (NAN, 1)}, ValueError, "guidance_interval"),
    ({"guidance_interval": ("a", 1)}, TypeError, "guidance_interval"),
    ({"noise_interval": (0.8, 0.2)}, ValueError, "noise_interval must not be reversed"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be from 1 to 1000, got 0"),
    ({"num_inference_steps": -5}, ValueError, "num_inference_steps"),
    ({"num_inference_steps": 1001}, ValueError, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps"),
    ({"num_inference_steps": True}, TypeError, "num_inference_steps"),
    ({"num_inference_steps": "10"}, TypeError, "num_inference_steps"),
    ({"num_inference_steps": 5, "timesteps": [500, 1]}, ValueError, "only one of"),
    ({"num_inference_steps": None, "timesteps": [1, 500]}, ValueError, "timesteps must be strictly"),
    ({"num_inference_steps": None, "timesteps": [1000, 1]}, ValueError, "timesteps"),
    ({"num_inference_steps": None, "timesteps": []}, TypeError, "timesteps"),
    ({"num_inference_steps": None, "timesteps": 5}, TypeError, "timesteps"),
    ({"num_inference_steps": None, "sigmas": [2.0, 1.0]}, ValueError, "sigmas is not supported"),
    ({"eta": -0.1}, ValueError, "eta"),
    ({"eta": 1.1}, ValueError, "eta"),
    ({"eta": NAN}, ValueError, "eta"),
    ({"eta": "0"}, TypeError, "eta"),
    ({"eta": 0.5}, ValueError, "eta=0.5 has no effect with DPMSolverMultistepScheduler"),
    ({"generator": 3}, TypeError, "generator"),
    ({"generator": generators(1)}, ValueError, "generator must be one or 2"),
    ({"generator": [None, None]}, TypeError, "generator"),
    ({"generator": [1, 2]}, TypeError, "generator"),
    ({"latents": torch.zeros(2, 1, 8, 9)}, ValueError, "latents must have the shape"),
    ({"latents": torch.zeros(1, 1, 8, 8)}, ValueError, "latents"),
    ({"latents": torch.zeros(2, 3, 8, 8)}, ValueError, "latents"),
    ({"latents": torch.full((2, 1, 8, 8), NAN)}, ValueError, "latents must be finite"),
    ({"latents": torch.full((2, 1, 8, 8), INFINITY)}, ValueError, "latents"),
    ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, TypeError, "latents"),
    ({"latents": np.zeros((2, 1, 8, 8))}, TypeError, "latents"),
    ({"output_type": "jpeg"}, ValueError, "output_type must be one of"),
    ({"output_type": None}, ValueError, "output_type"),
    ({"callback_on_step_end": 3}, TypeError, "callback_on_step_end"),
    ({"callback_on_step_end_tensor_inputs": ["prompt"]}, ValueError, "callback_on_step_end_tensor_inputs"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    BAD_CALLS,
    ids=[f"{number} {next(iter(change))}" for number, (change, _, _) in enumerate(BAD_CALLS)],
)
def test_bad_calls_are_refused_before_any_network_evaluation(
    pipeline: MNISTDiffusionPipeline, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    counter = CountingUNet(pipeline)
    arguments = {"class_labels": [3, 7], "guidance_scale": 2.0, "num_inference_steps": 2, **change}
    with pytest.raises(kind, match=message):
        pipeline(**arguments)
    assert counter.nfe == 0


class TestGuidance:
    @pytest.mark.parametrize(("scale", "nfe"), [(1, 3), (0, 3), (5, 6), (0.5, 6), ([0, 1, 5], 4)])
    def test_each_image_costs_what_its_scale_needs(
        self, pipeline: MNISTDiffusionPipeline, scale: Any, nfe: int
    ) -> None:
        counter = CountingUNet(pipeline)
        draw(pipeline, 1, 2, 3, guidance_scale=scale, num_inference_steps=4)
        assert counter.nfe == 4 * nfe

    def test_outside_the_interval_a_step_costs_one_evaluation(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        counter = CountingUNet(pipeline)
        arguments: dict[str, Any] = {"guidance_scale": 5, "guidance_interval": (0.3, 0.7), "num_inference_steps": 10}
        timesteps = pipeline.sample_trajectory([1], **arguments).timesteps.tolist()
        inside = [t for t in timesteps if 0.3 <= t / 1000 <= 0.7]
        assert 0 < len(inside) < 10
        assert counter.nfe == 10 + len(inside)

    def test_unconditional_call_costs_one_evaluation(self, pipeline: MNISTDiffusionPipeline) -> None:
        counter = CountingUNet(pipeline)
        assert len(pipeline(num_inference_steps=2).images) == 1
        assert counter.nfe == 2

    def test_scale_0_is_the_null_class_and_ignores_the_label(self, pipeline: MNISTDiffusionPipeline) -> None:
        assert torch.equal(draw(pipeline, 1, guidance_scale=0), draw(pipeline, 2, guidance_scale=0))
        torch.testing.assert_close(draw(pipeline, 1, guidance_scale=0), draw(pipeline))
        assert not torch.equal(draw(pipeline, 1, guidance_scale=1), draw(pipeline, 2, guidance_scale=1))

    def test_formula(self, pipeline: MNISTDiffusionPipeline) -> None:
        """One step with the sampler's update undone: the guided prediction is the formula on two plain passes."""
        guided, (conditional, null) = guided_output(pipeline, 4, 3.0, 4, 10)
        torch.testing.assert_close(guided, null + 3 * (conditional - null), atol=1e-5, rtol=1e-5)
        assert (conditional - null).abs().max() > 1e-3

    def test_scale_an_image_equals_calls_one_by_one(self, pipeline: MNISTDiffusionPipeline) -> None:
        together = pipeline(
            [1, 1, 1], guidance_scale=[0, 1, 4], num_inference_steps=3, generator=generators(5, 5, 5), output_type="pt"
        ).images
        for image, scale in zip(together, (0, 1, 4), strict=True):
            alone = draw(pipeline, 1, seed=5, guidance_scale=scale)[0]
            torch.testing.assert_close(image, alone, atol=1e-4, rtol=0)

    def test_interval_over_everything_changes_nothing(self, pipeline: MNISTDiffusionPipeline) -> None:
        assert torch.equal(
            draw(pipeline, 1, guidance_scale=4), draw(pipeline, 1, guidance_scale=4, guidance_interval=(0, 1))
        )

    def test_the_folders_interval_is_the_default(self, tmp_path: Path) -> None:
        """Outside of it a scale of 0 is still unconditional."""
        saved = make_pipeline(guidance_interval=(0.3, 0.7))
        saved.save_pretrained(tmp_path)
        loaded = MNISTDiffusionPipeline.from_pretrained(tmp_path)
        expected = draw(saved, 1, guidance_scale=4, guidance_interval=(0.3, 0.7))
        assert torch.equal(draw(loaded, 1, guidance_scale=4), expected)
        assert not torch.equal(draw(loaded, 1, guidance_scale=4, guidance_interval=(0, 1)), expected)
        assert torch.equal(draw(loaded, 1, guidance_scale=0), draw(loaded, 2, guidance_scale=0))

    def test_ho_and_salimans(self) -> None:
        conditional, null, w = torch.tensor(2.0), torch.tensor(1.0), 0.5
        assert guided_prediction(conditional, null, 1 + w) == (1 + w) * conditional - w * null


class TestSeeds:
    @pytest.mark.parametrize("name", ALL_SAMPLERS)
    def test_an_image_does_not_depend_on_its_batch(self, pipeline: MNISTDiffusionPipeline, name: Any) -> None:
        pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
        labels, seeds = [1, 2, 3, 4], [11, 12, 13, 14]
        together = generate(pipeline, labels, seeds, num_inference_steps=5)
        alone = generate(pipeline, labels, seeds, num_inference_steps=5, batch_size=1)
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)

    def test_one_generator_behaves_as_in_diffusers(self, pipeline: MNISTDiffusionPipeline) -> None:
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        from_noise = pipeline([1, 2], num_inference_steps=3, latents=noise, output_type="pt").images
        assert torch.equal(draw(pipeline, 1, 2), from_noise)

    def test_images_per_label_stand_together(self, pipeline: MNISTDiffusionPipeline) -> None:
        images = draw(pipeline, 1, 2, num_images_per_label=2)
        assert torch.equal(images, draw(pipeline, 1, 1, 2, 2))


class TestOutputs:
    def test_types(self, pipeline: MNISTDiffusionPipeline) -> None:
        as_tensor, as_array = draw(pipeline, 1, 2), draw(pipeline, 1, 2, output_type="np")
        pictures = draw(pipeline, 1, 2, output_type="pil")
        latents = draw(pipeline, 1, 2, output_type="latent")
        assert torch.equal((latents / 2 + 0.5).clamp(0, 1), as_tensor)
        assert latents.abs().max() > 1
        assert as_tensor.shape == (2, 1, 8, 8)
        assert isinstance(as_array, np.ndarray)
        assert as_array.shape == (2, 8, 8, 1)
        assert isinstance(pictures[0], Image.Image)
        assert pictures[0].mode == "L"
        np.testing.assert_array_equal(np.asarray(pictures[1]), (as_array[1, ..., 0] * 255).round().astype(np.uint8))
        assert 0 <= as_tensor.min() <= as_tensor.max() <= 1

    def test_rgb(self) -> None:
        [image] = make_pipeline(channels=3)(3, num_inference_steps=2).images
        assert (image.mode, image.size) == ("RGB", (8, 8))

    def test_tuple(self, pipeline: MNISTDiffusionPipeline) -> None:
        result = draw_tuple = pipeline(1, num_inference_steps=1, return_dict=False)
        assert isinstance(result, tuple)
        assert len(draw_tuple[0]) == 1

    def test_unconditional_model(self) -> None:
        pipeline = make_pipeline(conditional=False)
        assert pipeline.num_classes is None
        assert draw(pipeline, num_images_per_label=3).shape == (3, 1, 8, 8)
        with pytest.raises(ValueError, match="class_labels must be None for an unconditional model"):
            pipeline(3)

    def test_defaults_come_from_the_folder(self, tmp_path: Path) -> None:
        pipeline = make_pipeline(sampling=SamplingSettings(num_inference_steps=7, guidance_scale=3.5))
        pipeline.save_pretrained(tmp_path)
        counter = CountingUNet(loaded := MNISTDiffusionPipeline.from_pretrained(tmp_path))
        loaded.set_progress_bar_config(disable=True)
        loaded(3)
        assert counter.nfe == 14
        assert loaded.config.id2label["3"] == "d"


class TestCallback:
    def test_sees_every_step_and_may_change_the_latents(self, pipeline: MNISTDiffusionPipeline) -> None:
        steps: list[int] = []

        def zero(p: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            steps.append(step)
            return {"latents": torch.zeros_like(tensors["latents"])}

        images = draw(pipeline, 1, callback_on_step_end=zero)
        assert steps == [0, 1, 2]
        assert images.eq(0.5).all()

    def test_interrupt(self, pipeline: MNISTDiffusionPipeline) -> None:
        counter = CountingUNet(pipeline)

        def stop(p: MNISTDiffusionPipeline, *_: Any) -> dict[str, torch.Tensor]:
            p._interrupt = True
            return {}

        draw(pipeline, 1, guidance_scale=1, num_inference_steps=5, callback_on_step_end=stop)
        assert counter.nfe == 1
        draw(pipeline, 1, guidance_scale=1, num_inference_steps=5)
        assert counter.nfe == 6

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_predicted_original_sample_is_the_schedulers(self, prediction_type: Any) -> None:
        pipeline = make_pipeline(diffusion=DiffusionConfig(prediction_type=prediction_type, beta_schedule="linear"))
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        seen: dict[str, torch.Tensor] = {}
        pipeline(
            1,
            num_inference_steps=1,
            latents=noise,
            callback_on_step_end=lambda p, i, t, tensors: seen.update(tensors) or {},
            callback_on_step_end_tensor_inputs=["model_output", "pred_original_sample"],
        )
        pipeline.scheduler.set_timesteps(1)
        expected = pipeline.scheduler.step(seen["model_output"], 999, noise).pred_original_sample
        torch.testing.assert_close(seen["pred_original_sample"], expected)
        alpha = float(pipeline.scheduler.alphas_cumprod[999])
        torch.testing.assert_close(
            predicted_original_sample(seen["model_output"], noise, alpha, prediction_type), expected
        )


class TestSchedulers:
    def test_edm_is_refused(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match="EDMEulerScheduler ignores the betas"):
            pipeline(3)

    def test_epsilon_at_zero_snr_is_refused(self) -> None:
        pipeline = make_pipeline(diffusion=DiffusionConfig())
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
        with pytest.raises(ValueError, match="has zero SNR at its last timestep"):
            pipeline(3)

    def test_inverse_ones_are_refused(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match="DDIMInverseScheduler does not go from noise to images"):
            pipeline(3)

    def test_more_steps_than_lcm_can_take(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = build_sampler("lcm", pipeline.scheduler.config)
        with pytest.raises(ValueError, match=r"'num_inference_steps': 60\} does not work with LCMScheduler"):
            pipeline(3, num_inference_steps=60)

    def test_noise_is_added_inside_its_interval_alone(self, tmp_path: Path) -> None:
        pipeline = make_pipeline(sampling=SamplingSettings(scheduler="dpmpp-sde", noise_interval=(0.3, 0.8)))
        pipeline.save_pretrained(tmp_path)
        pipeline = MNISTDiffusionPipeline.from_pretrained(tmp_path)
        own, everywhere, nowhere = (draw(pipeline, 1, noise_interval=each) for each in (None, (0, 1), (1, 1)))
        pipeline.scheduler = build_sampler("dpmpp", pipeline.scheduler.config)
        assert torch.equal(draw(pipeline, 1), nowhere)
        with pytest.raises(ValueError, match="has no effect with DPMSolverMultistepScheduler"):
            draw(pipeline, 1, noise_interval=(0, 1))
        assert not torch.equal(own, nowhere)
        assert not torch.equal(own, everywhere)

    def test_own_timesteps_and_sigmas(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = build_sampler("ddpm", pipeline.scheduler.config)
        assert draw(pipeline, 1, num_inference_steps=None, timesteps=[900, 500, 100]).isfinite().all()
        assert pipeline.num_timesteps == 3
        pipeline.scheduler = build_sampler("euler", pipeline.scheduler.config)
        assert draw(pipeline, 1, num_inference_steps=None, sigmas=[10.0, 1.0, 0.1]).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_models_stay_close(self, dtype: torch.dtype) -> None:
        pipeline = make_pipeline()
        expected = draw(pipeline, 1, 2)
        pipeline.to(dtype)
        actual = draw(pipeline, 1, 2)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)
