"""The objective against independent float64 formulas and diffusers' own helpers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import nn

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import Batch, Objective, diffusion_objective, min_snr_weights, sigmoid_weights
from mnist_diffusion.pipelines.pipeline import predicted_original_sample
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import _alpha_cumprod
from tests.conftest import make_pipeline

SHAPE = (6, 1, 8, 8)
PLAIN = DiffusionConfig(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


class Recorder(nn.Module):
    """Predicts zeros and remembers what it was asked."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, **_: object
    ) -> Any:
        self.sample, self.timestep, self.labels = sample, timestep, class_labels
        return (torch.zeros_like(sample),)


def make_batch(objective: Objective) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(SHAPE, generator=generator) * 2 - 1
    return Batch(images, torch.arange(6), *objective.draw(SHAPE, seed=0, step=0, device="cpu"))


def make_objective(*, null_class: int | None = 10, **config: Any) -> Objective:
    settings = dataclasses.replace(PLAIN, **config)
    return diffusion_objective(settings, NoisingProcess.of(build_noise_scheduler(settings)), null_class)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_loss_is_the_mean_square_of_the_target(prediction_type: Any, beta_schedule: Any) -> None:
    config = DiffusionConfig(prediction_type=prediction_type, beta_schedule=beta_schedule)
    scheduler = build_noise_scheduler(config)
    objective = make_objective(prediction_type=prediction_type, beta_schedule=beta_schedule)
    batch, model = make_batch(objective), Recorder()
    loss = objective.loss(model, batch).mean()
    alpha = scheduler.alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)
    images, noise = batch.images.double(), batch.noise.double()
    noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(model.sample.double(), noisy, atol=1e-6, rtol=1e-5)
    targets = {"epsilon": noise, "sample": images, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * images}
    torch.testing.assert_close(loss.double(), targets[prediction_type].square().mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_diffusers_examples(prediction_type: str) -> None:
    scheduler = build_noise_scheduler(DiffusionConfig(beta_schedule="linear"))
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / divisor
    torch.testing.assert_close(min_snr_weights(scheduler.alphas_cumprod, prediction_type, 5.0), expected)


def test_sigmoid_weights_fall_with_the_signal() -> None:
    alphas = build_noise_scheduler(PLAIN).alphas_cumprod
    expected = 1 / (1 + alphas.double() / (1 - alphas.double()) * math.exp(-2))
    torch.testing.assert_close(sigmoid_weights(alphas, 2.0).double(), expected, atol=1e-5, rtol=1e-3)


def test_weights_change_the_loss() -> None:
    plain, min_snr, sigmoid = (make_objective(loss_weighting=name) for name in ("uniform", "min_snr", "sigmoid"))
    batch = dataclasses.replace(make_batch(plain), timesteps=torch.full((6,), 300))
    losses = [objective.loss(Recorder(), batch) for objective in (plain, min_snr, sigmoid)]
    alphas = build_noise_scheduler(PLAIN).alphas_cumprod
    torch.testing.assert_close(losses[1], losses[0] * min_snr_weights(alphas, "v_prediction", 5.0)[300])
    torch.testing.assert_close(losses[2], losses[0] * sigmoid_weights(alphas, 2.0)[300])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("loss_space", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_error_of_what_follows_from_the_prediction(prediction_type: Any, loss_space: Any) -> None:
    """However wrong a prediction: the loss is the squared error of what follows from it."""
    objective = make_objective(prediction_type=prediction_type, loss_space=loss_space)
    batch, scheduler = make_batch(objective), build_noise_scheduler(PLAIN)
    batch = dataclasses.replace(batch, timesteps=torch.tensor([20, 200, 400, 600, 800, 950]))
    model = Recorder()
    loss = objective.loss(model, batch)
    alpha = scheduler.alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)
    predicted = torch.zeros(SHAPE).double()
    noisy = model.sample.double()
    image = predicted_original_sample(predicted, noisy, alpha, prediction_type)
    noise = (noisy - alpha.sqrt() * image) / (1 - alpha).sqrt()
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * image
    found = {"epsilon": noise, "sample": image, "v_prediction": velocity, "flow_prediction": noise - image}
    true_image, true_noise = batch.images.double(), batch.noise.double()
    velocity = alpha.sqrt() * true_noise - (1 - alpha).sqrt() * true_image
    flow = true_noise - true_image
    wanted = {"epsilon": true_noise, "sample": true_image, "v_prediction": velocity, "flow_prediction": flow}
    expected = (found[loss_space] - wanted[loss_space]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-3)


def test_stratified_timesteps_fall_into_each_part_of_the_time() -> None:
    objective = make_objective(timesteps="stratified")
    for count in (7, 64, 3000):
        times = objective.draw((count, 1, 1, 1), seed=0, step=count, device="cpu")[1]
        parts = torch.arange(count) * 1000 / count
        assert ((times >= parts.floor()) & (times <= parts + 1000 / count)).all()
    several = [objective.draw((10, 1, 1, 1), seed=0, step=step, device="cpu")[1] for step in range(500)]
    torch.testing.assert_close(torch.stack(several).double().mean(), torch.tensor(499.5).double(), atol=3, rtol=0)


def test_lognormal_timesteps() -> None:
    objective = make_objective(timesteps="lognormal", lognormal=(-0.5, 0.8))
    times = objective.draw((20_000, 1, 1, 1), seed=0, step=0, device="cpu")[1]
    alphas = build_noise_scheduler(PLAIN).alphas_cumprod.double()[times]
    ratios = ((1 - alphas) / alphas).sqrt().log()
    assert float(ratios.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(ratios.std()) == pytest.approx(0.8, abs=0.02)


def test_labels_are_dropped_one_by_one() -> None:
    objective, model = make_objective(label_dropout=0.5), Recorder()
    _, _, dropped = objective.draw((4000, 1, 2, 2), seed=0, step=0, device="cpu")
    assert 0.45 < dropped.float().mean() < 0.55
    some = torch.tensor([True, False, True, False, False, True])
    objective.loss(model, dataclasses.replace(make_batch(objective), dropped=some))
    assert model.labels is not None
    assert model.labels.tolist() == [10, 1, 10, 3, 4, 10]


def test_unconditional_model_gets_no_labels() -> None:
    objective, model = make_objective(null_class=None), Recorder()
    objective.loss(model, make_batch(objective))
    assert model.labels is None


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


def test_real_network_learns_from_it() -> None:
    pipeline, objective = make_pipeline(diffusion=PLAIN), make_objective()
    optimizer, batch = torch.optim.AdamW(pipeline.unet.parameters(), lr=3e-3), make_batch(objective)
    losses = []
    for _ in range(15):
        loss = objective.loss(pipeline.unet, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp", "euler"])
def test_a_shifted_schedule_samples_at_the_shifted_noise_levels(sampler: str) -> None:
    def noise_to_signal(noise_shift: float) -> torch.Tensor:
        diffusion = dataclasses.replace(PLAIN, noise_shift=noise_shift)
        pipeline = make_pipeline(diffusion=diffusion, sampling=SamplingSettings(scheduler=sampler))
        scheduler = pipeline._prepared_scheduler(5, None, None)
        alphas = torch.tensor([_alpha_cumprod(scheduler, step) for step in range(1, 5)], dtype=torch.float64)
        return ((1 - alphas) / alphas).sqrt()

    torch.testing.assert_close(noise_to_signal(1.5), 1.5 * noise_to_signal(1.0), rtol=5e-3, atol=0)
