"""The objective against independent float64 formulas and diffusers' own helpers."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import nn

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import Batch, Objective, diffusion_objective
from mnist_diffusion.pipelines.pipeline import predicted_original_sample
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import _alpha_cumprod
from tests.conftest import make_pipeline

SHAPE = (6, 1, 8, 8)
SPACES = ("prediction", "epsilon", "v_prediction", "sample", "flow_prediction")
PLAIN = DiffusionConfig(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


class Recorder(nn.Module):
    """Predicts zeros and remembers what it was asked."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any, **_: object) -> Any:
        self.sample, self.timestep, self.labels = sample, timestep, class_labels
        return (torch.zeros_like(sample),)


def make_batch(objective: Objective) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(SHAPE, generator=generator) * 2 - 1
    return Batch(images, torch.arange(6), *objective.draw(SHAPE, seed=0, step=0, device="cpu"))


def make_objective(**config: Any) -> Objective:
    settings = dataclasses.replace(PLAIN, **config)
    return diffusion_objective(settings, NoisingProcess.of(build_noise_scheduler(settings)), 10)


@pytest.mark.parametrize(
    ("prediction_type", "loss_space"),
    [("epsilon", "prediction"), *itertools.product(("v_prediction", "sample"), SPACES)],
)
def test_the_loss_is_the_square_error_of_what_follows_from_the_prediction(
    prediction_type: Any, loss_space: Any
) -> None:
    """However wrong the prediction; and the network sees the image and the noise mixed as in the papers."""
    objective, model = make_objective(prediction_type=prediction_type, loss_space=loss_space), Recorder()
    batch = dataclasses.replace(make_batch(objective), timesteps=torch.tensor([20, 200, 400, 600, 800, 950]))
    loss = objective.loss(model, batch)
    alpha = build_noise_scheduler(PLAIN).alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)

    def all_of(image: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * image
        return {"epsilon": noise, "sample": image, "v_prediction": velocity, "flow_prediction": noise - image}

    images, noise, noisy = batch.images.double(), batch.noise.double(), model.sample.double()
    torch.testing.assert_close(noisy, alpha.sqrt() * images + (1 - alpha).sqrt() * noise, atol=1e-6, rtol=1e-5)
    image = predicted_original_sample(torch.zeros(SHAPE).double(), noisy, alpha, prediction_type)
    found = all_of(image, (noisy - alpha.sqrt() * image) / (1 - alpha).sqrt())
    space = prediction_type if loss_space == "prediction" else loss_space
    expected = (found[space] - all_of(images, noise)[space]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("weighting", "prediction_type"), [("min_snr", "epsilon"), ("min_snr", "v_prediction"), ("sigmoid", "v_prediction")]
)
def test_weights_are_those_of_the_papers(weighting: Any, prediction_type: Any) -> None:
    """Min-SNR as in diffusers' examples: https://arxiv.org/abs/2303.09556; sigmoid: https://arxiv.org/abs/2303.00848."""
    kinds = ("uniform", weighting)
    plain, weighted = (make_objective(loss_weighting=kind, prediction_type=prediction_type) for kind in kinds)
    batch = dataclasses.replace(make_batch(plain), timesteps=torch.tensor([0, 200, 400, 600, 800, 950]))
    snr = compute_snr(build_noise_scheduler(PLAIN), batch.timesteps)
    min_snr = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    expected = min_snr if weighting == "min_snr" else 1 / (1 + snr * math.exp(-2))
    losses = [objective.loss(Recorder(), batch) for objective in (plain, weighted)]
    torch.testing.assert_close(losses[1], losses[0] * expected, atol=0, rtol=1e-3)


def test_stratified_timesteps_fall_into_each_part_of_the_time() -> None:
    objective = make_objective(timesteps="stratified")
    for count in (7, 64, 3000):
        times = objective.draw((count, 1, 1, 1), seed=0, step=count, device="cpu")[1]
        parts = torch.arange(count) * 1000 / count
        assert ((times >= parts.floor()) & (times <= parts + 1000 / count)).all()
    several = [objective.draw((10, 1, 1, 1), seed=0, step=step, device="cpu")[1] for step in range(500)]
    torch.testing.assert_close(torch.stack(several).double().mean(), torch.tensor(499.5).double(), atol=3, rtol=0)


@pytest.mark.parametrize(
    "config", [PLAIN, DiffusionConfig(prediction_type="flow_prediction")], ids=["diffusion", "flow"]
)
def test_lognormal_timesteps(config: DiffusionConfig) -> None:
    """Of the ratio of noise to signal; for flow matching these are logit-normal noise levels."""
    config = dataclasses.replace(config, timesteps="lognormal", lognormal=(-0.5, 0.8))
    process = NoisingProcess.of(build_noise_scheduler(config))
    times = diffusion_objective(config, process, None).draw((20_000, 1, 1, 1), seed=0, step=0, device="cpu")[1]
    levels = (process.noise / process.signal.clamp(min=1e-4)).double()[times].log()
    assert float(levels.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(levels.std()) == pytest.approx(0.8, abs=0.02)


def test_labels_are_dropped_one_by_one() -> None:
    objective, model = make_objective(label_dropout=0.5), Recorder()
    _, _, dropped = objective.draw((4000, 1, 2, 2), seed=0, step=0, device="cpu")
    assert 0.45 < dropped.float().mean() < 0.55
    some = torch.tensor([True, False, True, False, False, True])
    objective.loss(model, dataclasses.replace(make_batch(objective), dropped=some))
    assert model.labels.tolist() == [10, 1, 10, 3, 4, 10]


def test_draws_are_stateless_and_held_out_ones_apart() -> None:
    objective = make_objective(label_dropout=0.3, num_train_timesteps=50)
    torch.manual_seed(0)
    first = objective.draw(SHAPE, seed=1, step=5, device="cpu")
    torch.manual_seed(9)
    again = objective.draw(SHAPE, seed=1, step=5, device="cpu")
    other = objective.draw(SHAPE, seed=1, step=6, device="cpu")
    held_out = objective.draw(SHAPE, seed=1, step=5, device="cpu", held_out=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], held_out[0])
    assert not held_out[2].any()
    assert first[0].dtype == torch.float32
    assert objective.draw((4000, 1, 1, 1), seed=1, step=5, device="cpu")[1].max() == 49


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp", "euler"])
def test_a_shifted_schedule_samples_at_the_shifted_noise_levels(sampler: str) -> None:
    def noise_to_signal(noise_shift: float) -> torch.Tensor:
        diffusion = dataclasses.replace(PLAIN, noise_shift=noise_shift)
        pipeline = make_pipeline(diffusion=diffusion, sampling=SamplingSettings(scheduler=sampler))
        scheduler = pipeline._prepared_scheduler(5, None, None)
        alphas = torch.tensor([_alpha_cumprod(scheduler, step) for step in range(1, 5)], dtype=torch.float64)
        return ((1 - alphas) / alphas).sqrt()

    torch.testing.assert_close(noise_to_signal(1.5), 1.5 * noise_to_signal(1.0), rtol=5e-3, atol=0)
