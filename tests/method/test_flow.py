"""Flow matching: straight paths from images to noise, and the samplers that go back along them."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import Batch, diffusion_objective
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import FLOW_SAMPLERS, build_sampler
from tests.conftest import make_pipeline
from tests.method.test_objective import Recorder

CONFIG = DiffusionConfig(prediction_type="flow_prediction")
SHAPE = (6, 1, 8, 8)


@pytest.fixture
def pipeline() -> MNISTDiffusionPipeline:
    """One of an untrained network, which predicts the flow."""
    return make_pipeline(diffusion=CONFIG, sampling=SamplingSettings(scheduler="euler"))


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def solve_exactly(pipeline: MNISTDiffusionPipeline, mean: Tensor, std: float) -> None:
    """Give the pipeline the flow of images that are normal around a mean.

    On a straight path the image is expected at `mean + (1 - s) std^2 / ((1 - s)^2 std^2 + s^2) (x - (1 - s) mean)`.
    """

    def forward(sample: Tensor, timestep: Tensor, *_: object, **__: object) -> Any:
        level = timestep.double() / 1000
        gain = (1 - level) * std**2 / ((1 - level) ** 2 * std**2 + level**2)
        image = mean + gain * (sample.double() - (1 - level) * mean)
        return (((sample - image) / level).to(sample),)

    pipeline.unet.forward = forward


def test_the_loss_is_the_square_of_the_flow_on_diffusers_paths() -> None:
    scheduler = build_noise_scheduler(CONFIG)
    objective = diffusion_objective(CONFIG, NoisingProcess.of(scheduler), 10)
    images, noise, timesteps = normal(0), normal(1), torch.tensor([0, 1, 499, 500, 998, 999])
    batch = Batch(images, torch.arange(6), noise, timesteps, torch.zeros(6, dtype=torch.bool))
    loss = objective.loss(model := Recorder(), batch)
    torch.testing.assert_close(loss, (noise - images).square().mean(dim=(1, 2, 3)))
    assert model.timestep.tolist() == [1, 2, 500, 501, 999, 1000]
    torch.testing.assert_close(model.sample, scheduler.scale_noise(images, model.timestep.float(), noise))
    assert torch.equal(model.sample[-1], noise[-1])


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
class TestSamplers:
    def test_one_image_is_found_at_every_step(self, pipeline: MNISTDiffusionPipeline, name: str) -> None:
        pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
        image = normal(3, (1, 1, 8, 8)).clamp(-1, 1)
        solve_exactly(pipeline, image, 0.0)
        for done in pipeline.stream([1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0)):
            torch.testing.assert_close(done.pred_original_sample, image.expand(2, -1, -1, -1), atol=2e-3, rtol=0)
        torch.testing.assert_close(done.latents, image.expand(2, -1, -1, -1), atol=2e-3, rtol=0)

    def test_images_of_a_normal_distribution(self, pipeline: MNISTDiffusionPipeline, name: str) -> None:
        """From many noises, images of its spread; and from each noise, where nothing is drawn on the way, its own."""
        pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
        mean, std = torch.full((1, 1, 8, 8), 0.3), 0.5
        solve_exactly(pipeline, mean, std)
        noise, generator = normal(4, (64, 1, 8, 8)), torch.Generator().manual_seed(0)
        asked: dict[str, Any] = {"latents": noise, "num_inference_steps": 50, "output_type": "latent"}
        drawn = pipeline([1] * 64, generator=generator, **asked).images
        if name not in ("lcm", "dpmpp-sde"):
            torch.testing.assert_close(drawn, mean + std * noise, atol=0.08, rtol=0)
        if name != "lcm":
            assert float(drawn.std()) == pytest.approx(std, abs=0.02)


def test_steps_are_spaced_evenly_and_shifted(pipeline: MNISTDiffusionPipeline) -> None:
    """Not as diffusers does by default, whose last step goes from sigma 0.001 to 0."""
    for shift, expected in ((1.0, [1, 0.75, 0.5, 0.25, 0]), (3.0, [1, 0.9, 0.75, 0.5, 0])):
        for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "FlowMatchHeunDiscreteScheduler"):
            pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, shift=shift)
            sigmas = pipeline._prepared_scheduler(4, None, None).sigmas
            torch.testing.assert_close(sigmas.unique().flip(0), torch.tensor(expected))
    assert build_sampler("dpmpp", pipeline.scheduler.config).config.flow_shift == 3.0


def test_samplers_of_other_paths_are_refused(pipeline: MNISTDiffusionPipeline) -> None:
    for name, told in (("ddim", "unipc, euler, heun, lcm for flow matching"), ("EDMEulerScheduler", "straight paths")):
        with pytest.raises(ConfigError, match=told):
            build_sampler(name, pipeline.scheduler.config)
    other = make_pipeline()
    betas, solver = other.scheduler.config, diffusers.DPMSolverMultistepScheduler
    bare, half = diffusers.FlowMatchEulerDiscreteScheduler(), solver.from_config(betas, use_flow_sigmas=True)
    straight = solver.from_config(betas, use_flow_sigmas=True, prediction_type="flow_prediction")
    for each, wrong in (
        (other, [bare, straight, half]),
        (pipeline, [diffusers.DDIMScheduler(), solver.from_config(betas), half]),
    ):
        for each.scheduler in wrong:
            message = f"{type(each.scheduler).__name__} with prediction_type=.* does not fit"
            with pytest.raises(ValueError, match=message):
                each(3)
    for pipeline.scheduler in (bare, straight):
        assert pipeline(3, num_inference_steps=2).images


def test_what_has_no_effect_is_refused(pipeline: MNISTDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="has no effect on flow_prediction; leave it out"):
        DiffusionConfig(prediction_type="flow_prediction", beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="cannot be inverted with flow matching"):
        pipeline.invert(torch.rand(SHAPE), [0] * 6)
