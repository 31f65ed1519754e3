"""The pipeline: inputs, guidance, seeds, callbacks, streams that are steered, and schedulers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EDMEulerScheduler, LCMScheduler
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance
from PIL import Image

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.pipelines.drawing import generate
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import build_sampler
from tests.conftest import ALL_SAMPLERS, make_pipeline


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipeline: MNISTDiffusionPipeline, *labels: Any, seed: int = 0, **arguments: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "output_type": "pt", **arguments}
    return pipeline(list(labels) or None, generator=torch.Generator().manual_seed(seed), **arguments).images


class CountingUNet:
    """Counts the images that go through the real network, and keeps their labels."""

    def __init__(self, pipeline: MNISTDiffusionPipeline):
        self.nfe, self.labels = 0, list[Any]()
        pipeline.unet.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        self.nfe += len(arguments[0])
        self.labels.append(None if named["class_labels"] is None else named["class_labels"].tolist())


VALID_LABELS = [
    *([3, 7], ["d", "h"], (3, "h"), ("d", torch.tensor(7)), [np.int64(3), np.array(7)], range(3, 8, 4)),
    *(np.array(["d", "h"]), np.array([3, 7], np.uint8), torch.tensor([3, 7], dtype=torch.uint8)),
    *(np.eye(10)[[3, 7]], torch.eye(10)[[3, 7]]),  # shares of each class
]


@pytest.mark.parametrize("labels", VALID_LABELS)
def test_spellings_of_the_same_call_give_the_same_bits(pipeline: MNISTDiffusionPipeline, labels: Any) -> None:
    expected = pipeline([3, 7], 1, 2.0, num_inference_steps=2, generator=generators(1, 2), output_type="np").images
    asked: dict[str, Any] = {"guidance_scale": [2, 2.0], "num_inference_steps": np.int64(2), "output_type": "np"}
    np.testing.assert_array_equal(pipeline(labels, generator=tuple(generators(1, 2)), **asked).images, expected)


NAN, AUTO = math.nan, AutoGuidance(auto_guidance_layers=[0], dropout=0.1)
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"class_labels": True}, TypeError, "class_labels"),
    ({"class_labels": 10}, ValueError, "class_labels must be from 0 to 9, got 10"),
    ({"class_labels": []}, ValueError, "class_labels must name at least one class"),
    ({"class_labels": "3"}, ValueError, "no class named '3'"),
    ({"class_labels": None}, ValueError, "guidance_scale needs class_labels"),
    ({"class_labels": torch.ones(2, 10)}, ValueError, "class_labels as weights must"),
    ({"num_images_per_label": 0}, ValueError, "num_images_per_label"),
    ({"guidance_scale": -1}, ValueError, "guidance_scale must be at least 0, got -1"),
    ({"guidance_scale": "5"}, TypeError, "guidance_scale"),
    ({"guidance_scale": [1.0]}, ValueError, "guidance_scale must be one number or 2"),
    ({"guidance_scale": [1.0, math.inf]}, ValueError, "guidance_scale"),
    ({"guidance_interval": (0.8, 0.2)}, ValueError, "guidance_interval must not be reversed"),
    ({"noise_interval": (0.8, 0.2)}, ValueError, "noise_interval must not be reversed"),
    ({"num_inference_steps": 1001}, ValueError, "num_inference_steps must be from 1 to 1000, got 1001"),
    ({"num_inference_steps": 5, "timesteps": [500, 1]}, ValueError, "only one of"),
    ({"num_inference_steps": None, "timesteps": [1, 500]}, ValueError, "timesteps must be strictly"),
    ({"num_inference_steps": None, "sigmas": [2.0, 1.0]}, ValueError, "sigmas is not supported"),
    ({"eta": 0.5}, ValueError, "eta=0.5 has no effect with DPMSolverMultistepScheduler"),
    ({"noise_interval": (0, 1)}, ValueError, "has no effect with DPMSolverMultistepScheduler"),
    ({"generator": generators(1)}, ValueError, "generator must be one or 2"),
    ({"latents": torch.zeros(2, 1, 8, 9)}, ValueError, "latents must have the shape"),
    ({"latents": torch.full((2, 1, 8, 8), NAN)}, ValueError, "latents must be finite"),
    ({"output_type": "jpeg"}, ValueError, "output_type must be one of"),
    ({"callback_on_step_end_tensor_inputs": ["prompt"]}, ValueError, "callback_on_step_end_tensor_inputs"),
    ({"guidance": "cfg"}, TypeError, "guidance must be a function of a GuidanceStep, got 'cfg'"),
    ({"guidance": lambda step: None}, TypeError, r"guidance must predict \(2, 1, 8, 8\), got None"),
    ({"guidance": ClassifierFreeGuidance()}, ValueError, "guidance_scale=2.0 has no effect"),
    ({"guidance": AUTO, "guidance_scale": None}, ValueError, "AutoGuidance needs other"),
    ({"of": "interpolate", "class_labels": [1, 2, 3]}, ValueError, "class_labels must be one label or two"),
    ({"of": "interpolate", "num_frames": 1}, ValueError, "num_frames must be at least 2, got 1"),
    ({"of": "interpolate", "latents": torch.zeros(3, 1, 8, 8)}, ValueError, "must be a tensor of one noise"),
    ({"of": "invert", "images": torch.zeros(2, 1, 8, 9)}, ValueError, "images must have the shape"),
    ({"of": "invert", "images": torch.zeros(2, 1, 8, 8) - 1}, ValueError, "images must be from 0 to 1"),
    ({"of": "invert", "images": torch.zeros(2, 1, 8, 8), "class_labels": [1]}, ValueError, "one for each of the 2 im"),
    ({"of": "stream", "num_inference_steps": 0}, ValueError, "num_inference_steps must be from 1 to 1000, got 0"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_CALLS)
def test_bad_calls_are_refused_before_any_network_evaluation(
    pipeline: MNISTDiffusionPipeline, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    counter = CountingUNet(pipeline)
    asked: dict[str, Any] = {"class_labels": [3, 7], "guidance_scale": 2.0, "num_inference_steps": 2, **change}
    with pytest.raises(kind, match=message):
        getattr(pipeline, asked.pop("of", "__call__"))(**asked)
    assert counter.nfe == 0


class TestGuidance:
    @pytest.mark.parametrize(
        ("labels", "scale", "nfe"),
        [((), None, 1), *(((1, 2, 3), *each) for each in ((1, 3), (0, 3), (5, 6), (0.5, 6), ([0, 1, 5], 4)))],
    )
    def test_each_image_costs_what_its_scale_needs(
        self, pipeline: MNISTDiffusionPipeline, labels: Any, scale: Any, nfe: int
    ) -> None:
        counter = CountingUNet(pipeline)
        draw(pipeline, *labels, guidance_scale=scale, num_inference_steps=4)
        assert counter.nfe == 4 * nfe

    def test_scale_0_is_the_null_class_and_ignores_the_label(self, pipeline: MNISTDiffusionPipeline) -> None:
        assert torch.equal(draw(pipeline, 1, guidance_scale=0), draw(pipeline, 2, guidance_scale=0))
        torch.testing.assert_close(draw(pipeline, 1, guidance_scale=0), draw(pipeline))
        assert not torch.equal(draw(pipeline, 1, guidance_scale=1), draw(pipeline, 2, guidance_scale=1))

    @pytest.mark.parametrize("shares", [{4: 1.0}, {3: 0.25, 7: 0.75}])
    def test_formula(self, pipeline: MNISTDiffusionPipeline, shares: dict[int, float]) -> None:
        """The prediction of one step, of a class or of several mixed, against passes of the network by hand."""
        noise, weights = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 10)
        weights[0, [*shares]] = torch.tensor([*shares.values()])
        [done] = pipeline.stream(weights, guidance_scale=3.0, num_inference_steps=1, latents=noise)
        with torch.no_grad():
            *parts, null = (pipeline.unet(noise, 999, torch.tensor([label])).sample for label in (*shares, 10))
        mixed = sum(share * part for share, part in zip(shares.values(), parts, strict=True))
        torch.testing.assert_close(done.model_output, null + 3 * (mixed - null), atol=1e-5, rtol=1e-4)
        assert (mixed - null).abs().max() > 1e-3

    def test_scale_an_image_equals_calls_one_by_one(self, pipeline: MNISTDiffusionPipeline) -> None:
        arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", "generator": generators(5, 5, 5)}
        together = pipeline([1, 1, 1], guidance_scale=[0, 1, 4], **arguments).images
        for image, scale in zip(together, (0, 1, 4), strict=True):
            alone = draw(pipeline, 1, seed=5, guidance_scale=scale)[0]
            torch.testing.assert_close(image, alone, atol=1e-4, rtol=0)

    def test_defaults_come_from_the_folder(self, tmp_path: Path) -> None:
        """Outside of its interval a scale of 0 is still unconditional."""
        settings = SamplingSettings(num_inference_steps=7, guidance_scale=3.5)
        saved = make_pipeline(sampling=settings, guidance_interval=(0.3, 0.7))
        saved.save_pretrained(tmp_path)
        loaded = MNISTDiffusionPipeline.from_pretrained(tmp_path)
        counter = CountingUNet(loaded)
        loaded(3)
        assert counter.nfe == 7 + 2  # 570 and 428 of 999, 856, 713, 570, 428, 285, 142
        expected = draw(saved, 1, guidance_scale=4, guidance_interval=(0.3, 0.7))
        assert torch.equal(draw(loaded, "b", guidance_scale=4), expected)
        assert not torch.equal(draw(loaded, 1, guidance_scale=4, guidance_interval=(0, 1)), expected)
        assert torch.equal(draw(loaded, 1, guidance_scale=0), draw(loaded, 2, guidance_scale=0))


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
        assert torch.equal(draw(pipeline, 1, 2, num_images_per_label=2), draw(pipeline, 1, 1, 2, 2))


class TestOutputs:
    def test_types(self, pipeline: MNISTDiffusionPipeline) -> None:
        kinds = ("pt", "np", "pil", "latent")
        as_tensor, as_array, pictures, latents = (draw(pipeline, 1, 2, output_type=kind) for kind in kinds)
        assert torch.equal((latents / 2 + 0.5).clamp(0, 1), as_tensor)
        assert latents.abs().max() > 1
        assert (as_tensor.shape, as_array.shape) == ((2, 1, 8, 8), (2, 8, 8, 1))
        assert isinstance(pictures[0], Image.Image)
        np.testing.assert_array_equal(np.asarray(pictures[1]), (as_array[1, ..., 0] * 255).round().astype(np.uint8))
        assert 0 <= as_tensor.min() <= as_tensor.max() <= 1
        [coloured] = make_pipeline(channels=3)(3, num_inference_steps=2).images
        assert (pictures[0].mode, coloured.mode, coloured.size) == ("L", "RGB", (8, 8))
        assert len(pipeline(1, num_inference_steps=1, return_dict=False)[0]) == 1

    def test_unconditional_model(self) -> None:
        pipeline = make_pipeline(conditional=False)
        assert pipeline.num_classes is None
        assert draw(pipeline, num_images_per_label=3).shape == (3, 1, 8, 8)
        with pytest.raises(ValueError, match="class_labels must be None for an unconditional model"):
            pipeline(3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_models_stay_close(self, dtype: torch.dtype) -> None:
        pipeline = make_pipeline()
        expected = draw(pipeline, 1, 2)
        pipeline.to(dtype)
        actual = draw(pipeline, 1, 2)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)


class TestCallback:
    def test_sees_every_step_and_may_change_the_latents(self, pipeline: MNISTDiffusionPipeline) -> None:
        steps: list[tuple[Any, ...]] = []

        def zero(p: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            steps.append((step, *tensors))
            return {"latents": torch.zeros_like(tensors["latents"])}

        names = ("latents", "model_output")
        images = draw(pipeline, 1, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=names)
        assert steps == [(step, *names) for step in range(3)]
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


class TestStream:
    def test_the_class_and_the_guidance_change_half_way(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = build_sampler("ddim", pipeline.scheduler.config)
        counted = CountingUNet(pipeline)
        stream = pipeline.stream([3, 4], guidance_scale=2.0, num_inference_steps=4, generator=generators(1, 2))
        seen = [next(stream), stream.send({"class_labels": ["h", 8]}), stream.send({"guidance_scale": [1.0, 0]})]
        seen.append(next(stream))
        with pytest.raises(StopIteration):
            next(stream)
        assert counted.labels == [[3, 4, 10, 10], [7, 8, 10, 10], [7, 10], [7, 10]]
        assert [(done.step, done.nfe) for done in seen] == [(0, 4), (1, 8), (2, 10), (3, 12)]
        unchanged = pipeline.stream([3, 4], guidance_scale=2.0, num_inference_steps=4, generator=generators(1, 2))
        assert torch.equal(next(unchanged).latents, seen[0].latents)
        assert not torch.equal(next(unchanged).latents, seen[1].latents)

    def test_samples_can_be_replaced(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = build_sampler("ddim", pipeline.scheduler.config)
        one, other = (pipeline.stream([3], num_inference_steps=3, generator=generators(seed)) for seed in (1, 2))
        next(one).latents = next(other).latents
        assert torch.equal(next(one).latents, next(other).latents)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"class_labels": [1, 2]}, "class_labels must be for 1 images"),
            ({"class_labels": [10]}, "class_labels must be from 0 to 9, got 10"),
            ({"guidance_scale": NAN}, "guidance_scale must be at least 0"),
            ({"eta": 1}, r"a stream takes class_labels and guidance_scale, got \['eta'\]"),
        ],
    )
    def test_what_cannot_change(self, pipeline: MNISTDiffusionPipeline, changes: Any, message: str) -> None:
        stream = pipeline.stream([3], num_inference_steps=3)
        next(stream)
        with pytest.raises(ValueError, match=message):
            stream.send(changes)


class TestSchedulers:
    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            (EDMEulerScheduler, {}, "EDMEulerScheduler ignores the betas"),
            (DDIMInverseScheduler, {}, "DDIMInverseScheduler does not go from noise to images"),
            (LCMScheduler, {}, r"'num_inference_steps': 60\} does not work with LCMScheduler"),
            (DDIMScheduler, {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "has zero SNR at its last"),
        ],
    )
    def test_what_does_not_fit(
        self, pipeline: MNISTDiffusionPipeline, kind: Any, changes: dict[str, Any], message: str
    ) -> None:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
        with pytest.raises(ValueError, match=message):
            pipeline(3, num_inference_steps=60)

    def test_noise_is_added_inside_its_interval_alone(self, tmp_path: Path) -> None:
        pipeline = make_pipeline(sampling=SamplingSettings(scheduler="dpmpp-sde", noise_interval=(0.3, 0.8)))
        pipeline.save_pretrained(tmp_path)
        pipeline = MNISTDiffusionPipeline.from_pretrained(tmp_path)
        own, everywhere, nowhere = (draw(pipeline, 1, noise_interval=each) for each in (None, (0, 1), (1, 1)))
        pipeline.scheduler = build_sampler("dpmpp", pipeline.scheduler.config)
        assert torch.equal(draw(pipeline, 1), nowhere)
        assert not torch.equal(own, nowhere)
        assert not torch.equal(own, everywhere)
