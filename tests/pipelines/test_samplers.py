"""Samplers against independent float64 implementations over whole trajectories; inversion; interpolation."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.pipelines.drawing import generate
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import FLOW_SAMPLERS, SAMPLERS, build_sampler, sampler_name
from tests.conftest import ALL_SAMPLERS, make_pipeline

LABEL, SCALE = 3, 2.5


def cosine_alphas(steps: int = 1000) -> list[float]:
    """Products of alphas of the cosine schedule, Nichol and Dhariwal (2021), equation 17, in float64."""
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999)).tolist()


class Reference:
    """The guided v-prediction of a pipeline's network in float64, and DDPM's notation around it."""

    def __init__(self, pipeline: MNISTDiffusionPipeline, *, clip: bool):
        self.unet, self.alphas, self.clip = copy.deepcopy(pipeline.unet).double(), cosine_alphas(), clip

    @torch.no_grad()
    def clean_and_noise(self, x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        conditional, null = (self.unet(x, t, torch.full((len(x),), label)).sample for label in (LABEL, 10))
        v = null + SCALE * (conditional - null)
        a = self.alphas[t]
        clean = math.sqrt(a) * x - math.sqrt(1 - a) * v
        clean = clean.clamp(-1, 1) if self.clip else clean
        return clean, (x - math.sqrt(a) * clean) / math.sqrt(1 - a)


def ddim_reference(reference: Reference, steps: int, eta: float, noises: Any) -> torch.Tensor:
    """Song et al. (2020), equations 12 and 16, from the first of the noises."""
    x, times = next(noises), [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    for t, s in zip(times, [*times[1:], None], strict=True):
        a, b = reference.alphas[t], 1.0 if s is None else reference.alphas[s]
        clean, noise = reference.clean_and_noise(x, t)
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x = math.sqrt(b) * clean + math.sqrt(max(0.0, 1 - b - sigma**2)) * noise
        if eta > 0:
            x = x + sigma * next(noises)
    return x


@pytest.mark.parametrize(
    ("name", "steps", "eta", "clip"),
    [*itertools.product(["ddim"], [10, 30], [0.0, 1.0], [True, False]), *(("ddpm", n, 1.0, True) for n in (10, 30))],
)
def test_against_the_papers(name: str, steps: int, eta: float, clip: bool) -> None:
    """Also where the steps do not divide the training steps, and with the noise that belongs to the clipped image.

    DDPM, Ho et al. (2020), equations 6 and 7, is DDIM at eta 1.
    """
    pipeline = make_pipeline(sampling=SamplingSettings(scheduler=name))
    pipeline.scheduler.register_to_config(clip_sample=clip)
    generator, again = (torch.Generator().manual_seed(5) for _ in range(2))
    asked: dict[str, Any] = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    asked |= {"eta": eta} if name == "ddim" else {}
    actual = pipeline([LABEL, LABEL], guidance_scale=SCALE, **asked).images.double()
    noises = iter(lambda: torch.randn(2, 1, 8, 8, generator=again).double(), None)
    expected = ddim_reference(Reference(pipeline, clip=clip), steps, eta, noises)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_solvers_agree_in_the_limit() -> None:
    """They solve one differential equation: with many steps they draw the same images from the same noise."""
    pipeline, drawn = make_pipeline(), list[torch.Tensor]()
    config = {**pipeline.scheduler.config, "clip_sample": False}
    others = ("DEISMultistepScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler")
    for name in ("dpmpp", "unipc", "ddim", "euler", "heun", *others):
        pipeline.scheduler = build_sampler(name, config)
        drawn.append(generate(pipeline, [1, 2], [3, 4], num_inference_steps=60, guidance_scale=1))
        assert float((drawn[-1] - drawn[0]).abs().max()) < 0.04, name


@pytest.mark.parametrize("name", ["heun", "KDPM2DiscreteScheduler"])
def test_second_order_solvers_get_karras_spacing(name: str) -> None:
    pipeline = make_pipeline(sampling=SamplingSettings(scheduler=name))
    before = dict(pipeline.scheduler.config)
    assert generate(pipeline, [1], [0], num_inference_steps=6).isfinite().all()
    sigmas = pipeline._prepared_scheduler(6, None, None).sigmas.unique().flip(0)[:-1]
    assert float(sigmas[0]) == pytest.approx(80, rel=1e-4)
    ratios = sigmas[:-1] / sigmas[1:]
    assert ratios.max() < 20  # the default spacing's first ratio is 3,000
    assert dict(pipeline.scheduler.config) == before
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_exponential_sigmas=True)
    assert float(pipeline._prepared_scheduler(6, None, None).sigmas[0]) > 1000  # a spacing that was chosen is kept


def test_a_sampler_is_a_short_name_or_a_diffusers_class() -> None:
    config = make_pipeline().scheduler.config
    assert type(build_sampler("EulerAncestralDiscreteScheduler", config)).__name__ == "EulerAncestralDiscreteScheduler"
    for name in ALL_SAMPLERS:
        assert SamplingSettings(scheduler=name).scheduler == name
        assert sampler_name(build_sampler(name, config)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "scheduler must be one of") for name in ("magic", "UNet2DModel")),
        *(("EDMEulerScheduler", "ignores the betas"), ("CogVideoXDDIMScheduler", "shifts its noise levels")),
        ("DDIMInverseScheduler", "one step at a time"),
    ],
)
def test_what_is_no_sampler_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build_sampler(name, make_pipeline().scheduler.config)
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize(("flow", "name"), [*((False, n) for n in SAMPLERS), *((True, n) for n in FLOW_SAMPLERS)])
def test_a_stream_a_call_and_plain_diffusers_give_the_same_bits(flow: bool, name: str, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"diffusion": DiffusionConfig(prediction_type="flow_prediction")} if flow else {}
    pipeline = make_pipeline(sampling=SamplingSettings(scheduler=name), **kind)
    assert sampler_name(pipeline.scheduler) == name
    pipeline.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    asked: dict[str, Any] = {"class_labels": [3, 7], "guidance_scale": SCALE, "num_inference_steps": 4}

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    trajectory = pipeline.sample_trajectory(**asked, generator=noise(), output_type="pt")
    steps = list(pipeline.stream(**asked, generator=noise()))
    called, loaded = (each(**asked, generator=noise(), output_type="pt").images for each in (pipeline, plain))
    for images in (steps[-1].images("pt"), trajectory.images, loaded):
        assert torch.equal(images, called)
    assert torch.equal(torch.stack([done.latents for done in steps]), trajectory.latents)
    assert torch.equal(torch.stack([done.pred_original_sample for done in steps]), trajectory.pred_original_samples)


class TestInterpolation:
    @pytest.mark.parametrize("sampler", ["dpmpp", "dpmpp-sde"])
    def test_ends_are_the_plain_images(self, pipeline: MNISTDiffusionPipeline, sampler: str) -> None:
        pipeline.scheduler = build_sampler(sampler, pipeline.scheduler.config)
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        first, *others = (torch.Generator().manual_seed(1) for _ in range(3))
        call: dict[str, Any] = {"latents": noise, "num_inference_steps": 3, "output_type": "pt"}
        frames = pipeline.interpolate([1, 7], 5, generator=first, **call).images
        ends = pipeline([1, 7], generator=others, **call).images
        assert frames.shape == (5, 1, 8, 8)
        torch.testing.assert_close(frames[[0, -1]], ends, atol=1e-4, rtol=0)
        assert (frames[2] - frames[0]).abs().max() > 1e-3

    def test_between_noises_of_one_class_and_classes_of_one_noise(self, pipeline: MNISTDiffusionPipeline) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
        noises = pipeline.interpolate("c", 3, generator=generators, **asked).images
        classes = pipeline.interpolate(["c", "d"], 3, generator=torch.Generator().manual_seed(0), **asked).images
        torch.testing.assert_close(noises[0], classes[0], atol=1e-5, rtol=0)
        assert not torch.allclose(noises[2], classes[2])


def test_inversion_there_and_back() -> None:
    pipeline = make_pipeline(sampling=SamplingSettings(scheduler="ddim"))
    pipeline.scheduler.register_to_config(clip_sample=False)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 50}
    latents = pipeline.invert(images, [1, 2], **asked)
    back = pipeline([1, 2], latents=latents, output_type="pt", **asked).images
    assert -10 * math.log10(float((back - images).square().mean())) > 40
