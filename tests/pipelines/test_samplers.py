"""Samplers against independent float64 implementations over whole trajectories; inversion; interpolation."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.pipelines.drawing import generate
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline, slerp
from mnist_diffusion.pipelines.samplers import SAMPLERS, build_sampler, sampler_name
from tests.conftest import ALL_SAMPLERS, DEFAULT, make_pipeline

LABEL, SCALE = 3, 2.5
Step = Callable[..., torch.Tensor]


def cosine_alphas(steps: int = 1000) -> list[float]:
    """Products of alphas of the cosine schedule, Nichol and Dhariwal (2021), equation 17, in float64."""

    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    alphas, product = [], 1.0
    for i in range(steps):
        product *= 1 - min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999)
        alphas.append(product)
    return alphas


def linear_alphas(steps: int = 1000) -> list[float]:
    """Products of alphas of the linear schedule, Ho et al. (2020), section 4, in float64."""
    betas = [1e-4 + (0.02 - 1e-4) * i / (steps - 1) for i in range(steps)]
    return list(itertools.accumulate((1 - beta for beta in betas), operator.mul))


def trailing(count: int, steps: int = 1000) -> list[int]:
    return [round(steps - i * steps / count) - 1 for i in range(count)]


class Reference:
    """The guided v-prediction of a pipeline's network in float64, and DDPM's notation around it."""

    def __init__(self, pipeline: MNISTDiffusionPipeline, *, clip: bool, alphas: list[float] | None = None):
        self.unet = copy.deepcopy(pipeline.unet).double()
        self.alphas, self.clip = alphas or cosine_alphas(), clip

    @torch.no_grad()
    def clean_and_noise(self, x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        conditional, null = (self.unet(x, t, torch.full((len(x),), label)).sample for label in (LABEL, 10))
        v = null + SCALE * (conditional - null)
        a = self.alphas[t]
        clean = math.sqrt(a) * x - math.sqrt(1 - a) * v
        clean = clean.clamp(-1, 1) if self.clip else clean
        return clean, (x - math.sqrt(a) * clean) / math.sqrt(1 - a)


def ddim_reference(reference: Reference, x: torch.Tensor, times: list[int], eta: float, noises: Any) -> torch.Tensor:
    """Song et al. (2020), equations 12 and 16."""
    for t, s in zip(times, [*times[1:], None], strict=True):
        a, b = reference.alphas[t], 1.0 if s is None else reference.alphas[s]
        clean, noise = reference.clean_and_noise(x, t)
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x = math.sqrt(b) * clean + math.sqrt(max(0.0, 1 - b - sigma**2)) * noise
        if eta > 0:
            x = x + sigma * next(noises)
    return x


def ddpm_reference(reference: Reference, x: torch.Tensor, times: list[int], noises: Any) -> torch.Tensor:
    """Ho et al. (2020), equations 6 and 7, on a subset of the steps."""
    for t, s in zip(times, [*times[1:], None], strict=True):
        a, b = reference.alphas[t], 1.0 if s is None else reference.alphas[s]
        alpha = a / b
        clean, _ = reference.clean_and_noise(x, t)
        x = math.sqrt(b) * (1 - alpha) / (1 - a) * clean + math.sqrt(alpha) * (1 - b) / (1 - a) * x
        if s is not None:
            x = x + math.sqrt((1 - b) / (1 - a) * (1 - alpha)) * next(noises)
    return x


def euler_reference(reference: Reference, x: torch.Tensor, times: list[int]) -> torch.Tensor:
    """Karras et al. (2022), algorithm 2 without churn, in x / sqrt(alpha bar)."""
    sigmas = [math.sqrt((1 - reference.alphas[t]) / reference.alphas[t]) for t in times] + [0.0]
    y = x * math.sqrt(1 + sigmas[0] ** 2)
    for t, sigma, following in zip(times, sigmas, sigmas[1:], strict=False):
        clean, _ = reference.clean_and_noise(y / math.sqrt(1 + sigma**2), t)
        y = y + (following - sigma) * (y - clean) / sigma
    return y


def draw(pipeline: MNISTDiffusionPipeline, steps: int, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The drawn images in [-1, 1], the noise they start from, and the noises added, as the generator gave them."""
    generator, shape = torch.Generator().manual_seed(5), (2, 1, 8, 8)
    seen: dict[str, torch.Tensor] = {}
    pipeline(
        [LABEL, LABEL],
        guidance_scale=SCALE,
        num_inference_steps=steps,
        generator=generator,
        callback_on_step_end=lambda p, i, t, tensors: seen.update(tensors) or {},
        **arguments,
    )
    again = torch.Generator().manual_seed(5)
    start = torch.randn(shape, generator=again).double()
    noises = iter(lambda: torch.randn(shape, generator=again).double(), None)
    return seen["latents"].double(), start, noises


@pytest.mark.parametrize(("steps", "eta", "clip"), [*itertools.product([10, 30], [0.0, 1.0], [True, False])])
def test_ddim(steps: int, eta: float, clip: bool) -> None:
    """Also where the steps do not divide the training steps, and with the noise that belongs to the clipped image."""
    pipeline = make_pipeline(sampling=SamplingSettings(scheduler="ddim"))
    pipeline.scheduler.register_to_config(clip_sample=clip)
    actual, start, noises = draw(pipeline, steps, eta=eta)
    expected = ddim_reference(Reference(pipeline, clip=clip), start, trailing(steps), eta, noises)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [10, 30])
def test_ddpm(steps: int) -> None:
    pipeline = make_pipeline(sampling=SamplingSettings(scheduler="ddpm"))
    actual, start, noises = draw(pipeline, steps)
    expected = ddpm_reference(Reference(pipeline, clip=True), start, trailing(steps), noises)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [10, 30])
def test_euler(steps: int) -> None:
    """On the linear schedule: the cosine one starts at sigma 20,000, where float32 itself keeps three digits."""
    pipeline = make_pipeline(
        sampling=SamplingSettings(scheduler="euler"),
        diffusion=dataclasses.replace(DEFAULT.diffusion, beta_schedule="linear"),
    )
    actual, start, _ = draw(pipeline, steps)
    expected = euler_reference(Reference(pipeline, clip=False, alphas=linear_alphas()), start, trailing(steps))
    torch.testing.assert_close(actual / 2, expected / 2, atol=1e-4, rtol=0)  # as images, from 0 to 1


def test_solvers_agree_in_the_limit() -> None:
    """They solve one differential equation: with many steps they draw the same images from the same noise."""
    pipeline = make_pipeline()
    config = {**pipeline.scheduler.config, "clip_sample": False}
    drawn = {}
    names = ["dpmpp", "unipc", "ddim", "euler", "heun"]
    names += ["DEISMultistepScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"]
    for name in names:
        pipeline.scheduler = build_sampler(name, config)
        drawn[name] = generate(pipeline, [1, 2], [3, 4], num_inference_steps=60, guidance_scale=1)
    for name in names:
        difference = float((drawn[name] - drawn["dpmpp"]).abs().max())
        assert difference < 0.04, f"{name} differs from dpmpp by {difference}"


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
        *((name, "scheduler must be one of") for name in ("magic", "MagicScheduler", "DDIMPipeline", "UNet2DModel")),
        *((name, "ignores the betas") for name in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")),
        *((name, "shifts its noise levels") for name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")),
        ("DDIMInverseScheduler", "one step at a time"),
    ],
)
def test_what_is_no_sampler_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build_sampler(name, make_pipeline().scheduler.config)
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("name", ["SASolverScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"])
def test_a_class_does_not_inherit_the_algorithm_of_another(name: str) -> None:
    config = make_pipeline().scheduler.config
    made = [build_sampler(name, build_sampler(before, config).config) for before in ("ddpm", "dpmpp-sde", "unipc")]
    assert len({each.config.algorithm_type for each in made}) == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_stream_gives_the_bits_of_a_call(name: str, pipeline: MNISTDiffusionPipeline) -> None:
    pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
    asked: dict[str, Any] = {"guidance_scale": SCALE, "num_inference_steps": 4}

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    trajectory = pipeline.sample_trajectory([3, 7], **asked, generator=noise(), output_type="pt")
    steps = list(pipeline.stream([3, 7], **asked, generator=noise()))
    called = pipeline([3, 7], **asked, generator=noise(), output_type="pt").images
    assert torch.equal(steps[-1].images("pt"), called)
    assert torch.equal(trajectory.images, called)
    assert torch.equal(torch.stack([done.latents for done in steps]), trajectory.latents)
    assert torch.equal(torch.stack([done.pred_original_sample for done in steps]), trajectory.pred_original_samples)


def test_labels_and_seeds_must_match() -> None:
    with pytest.raises(ValueError, match="class_labels must be one for each of the 3 seeds, got 1"):
        generate(make_pipeline(), [1], [1, 2, 3])


class TestTrajectory:
    def test_keeps_every_step(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = build_sampler("ddim", pipeline.scheduler.config)
        trajectory = pipeline.sample_trajectory(
            [1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
        )
        plain = pipeline([1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt")
        assert trajectory.latents.shape == trajectory.pred_original_samples.shape == (4, 2, 1, 8, 8)
        assert trajectory.timesteps.tolist() == [999, 749, 499, 249]
        assert torch.equal(trajectory.images, plain.images)
        last = (trajectory.pred_original_samples[-1] / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(last, plain.images, atol=1e-4, rtol=0)


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
        noises = pipeline.interpolate("c", 3, generator=generators, num_inference_steps=2, output_type="pt").images
        classes = pipeline.interpolate(
            ["c", "d"], 3, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt"
        ).images
        torch.testing.assert_close(noises[0], classes[0], atol=1e-5, rtol=0)
        assert not torch.allclose(noises[2], classes[2])

    def test_slerp_keeps_the_norm(self) -> None:
        start, end = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        end = end * start.norm() / end.norm()
        path = slerp(start, end, torch.linspace(0, 1, 7))
        torch.testing.assert_close(path[0], start)
        torch.testing.assert_close(path[-1], end)
        torch.testing.assert_close(path.flatten(1).norm(dim=1), start.norm().expand(7))
        torch.testing.assert_close(slerp(start, start, torch.tensor([0.5]))[0], start)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"class_labels": None}, "class_labels must be one label or two"),
            ({"class_labels": [1, 2, 3]}, "class_labels must be one label or two"),
            ({"class_labels": [1, 2], "num_frames": 1}, "num_frames must be at least 2, got 1"),
            ({"class_labels": [1, 2], "num_frames": 2.0}, "num_frames must be an integer"),
            (
                {"class_labels": [1, 2], "latents": torch.zeros(3, 1, 8, 8)},
                "latents must be a tensor of one noise or two",
            ),
            ({"class_labels": [1, 2], "latents": torch.zeros(2, 1, 9, 8)}, "latents must have the shape"),
            ({"class_labels": [1, 2], "generator": 5}, "generator must be a torch.Generator"),
        ],
    )
    def test_bad_input(self, pipeline: MNISTDiffusionPipeline, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            pipeline.interpolate(**arguments)


class TestInversion:
    @pytest.mark.parametrize(("labels", "scale"), [([1, 2], 1.0), ([1, 2], 2.0), (None, 1.0)])
    def test_there_and_back(self, labels: Any, scale: float) -> None:
        pipeline = make_pipeline(sampling=SamplingSettings(scheduler="ddim"))
        pipeline.scheduler.register_to_config(clip_sample=False)
        images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        guidance: dict[str, Any] = {} if labels is None else {"guidance_scale": scale}
        latents = pipeline.invert(images, labels, num_inference_steps=50, **guidance)
        count: dict[str, Any] = {"num_images_per_label": 2} if labels is None else {}
        back = pipeline(labels, latents=latents, num_inference_steps=50, output_type="pt", **guidance, **count).images
        assert -10 * math.log10(float((back - images).square().mean())) > 40

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (torch.zeros(2, 1, 8, 9), None, "images must have the shape"),
            (torch.zeros(2, 1, 8, 8) - 1, None, "images must be from 0 to 1"),
            (torch.full((1, 1, 8, 8), float("nan")), None, "images must be finite"),
            (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, "images must be a float tensor"),
            ([[1.0]], None, "images must be a float tensor"),
            (torch.zeros(2, 1, 8, 8), [1], "class_labels must be one for each of the 2 images"),
        ],
    )
    def test_bad_input(self, pipeline: MNISTDiffusionPipeline, images: Any, labels: Any, message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            pipeline.invert(images, labels)
