"""The objective against independent float64 formulas and diffusers' own helpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import nn

from mnist_diffusion.config import DiffusionConfig
from mnist_diffusion.diffusion.noise import build_noise_scheduler
from mnist_diffusion.diffusion.objective import Batch, Draws, diffusion_draws, diffusion_objective, min_snr_weights
from tests.conftest import make_pipeline

SHAPE = (6, 1, 8, 8)


class Recorder(nn.Module):
    """Predicts zeros and remembers what it was asked."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, **_: object
    ) -> Any:
        self.sample, self.timestep, self.labels = sample, timestep, class_labels
        return (torch.zeros_like(sample),)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.rand(SHAPE, generator=generator) * 2 - 1, torch.arange(6))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_loss_is_the_mean_square_of_the_target(prediction_type: str, beta_schedule: str) -> None:
    config = DiffusionConfig(prediction_type=prediction_type, beta_schedule=beta_schedule)  # type: ignore[arg-type]
    scheduler = build_noise_scheduler(config)
    batch, draws = make_batch(), diffusion_draws(config, SHAPE, seed=0, step=0, device="cpu")
    model = Recorder()
    loss = diffusion_objective(config, scheduler, null_class=10).loss(model, batch, draws).mean()
    alpha = scheduler.alphas_cumprod.double()[draws.timesteps].view(-1, 1, 1, 1)
    images, noise = batch.images.double(), draws.noise.double()
    noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(model.sample.double(), noisy, atol=1e-6, rtol=1e-5)
    target = {"epsilon": noise, "sample": images, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * images}[
        prediction_type
    ]
    torch.testing.assert_close(loss.double(), target.square().mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_diffusers_examples(prediction_type: str) -> None:
    scheduler = build_noise_scheduler(DiffusionConfig(beta_schedule="linear"))
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / divisor
    torch.testing.assert_close(min_snr_weights(scheduler.alphas_cumprod, prediction_type, 5.0), expected)


def test_min_snr_changes_the_loss_by_its_weights() -> None:
    plain, weighted = DiffusionConfig(), DiffusionConfig(loss_weighting="min_snr")
    scheduler = build_noise_scheduler(plain)
    batch = make_batch()
    draws = Draws(torch.randn(SHAPE), torch.full((6,), 300), torch.zeros(6, dtype=torch.bool))
    losses = [
        diffusion_objective(c, scheduler, null_class=10).loss(Recorder(), batch, draws) for c in (plain, weighted)
    ]
    weight = min_snr_weights(scheduler.alphas_cumprod, "v_prediction", 5.0)[300]
    torch.testing.assert_close(losses[1], losses[0] * weight)


def test_labels_are_dropped_one_by_one() -> None:
    config = DiffusionConfig(label_dropout=0.5)
    draws = diffusion_draws(config, (4000, 1, 2, 2), seed=0, step=0, device="cpu")
    assert 0.45 < draws.dropped.float().mean() < 0.55
    model, batch = Recorder(), make_batch()
    dropped = torch.tensor([True, False, True, False, False, True])
    objective = diffusion_objective(config, build_noise_scheduler(config), null_class=10)
    objective.loss(model, batch, Draws(torch.randn(SHAPE), torch.zeros(6, dtype=torch.int64), dropped))
    assert model.labels is not None
    assert model.labels.tolist() == [10, 1, 10, 3, 4, 10]


def test_unconditional_model_gets_no_labels() -> None:
    config, model = DiffusionConfig(), Recorder()
    draws = diffusion_draws(config, SHAPE, seed=0, step=0, device="cpu")
    diffusion_objective(config, build_noise_scheduler(config), null_class=None).loss(model, make_batch(), draws)
    assert model.labels is None


def test_draws_are_stateless_and_held_out_ones_apart() -> None:
    config = DiffusionConfig(label_dropout=0.3)
    torch.manual_seed(0)
    first = diffusion_draws(config, SHAPE, seed=1, step=5, device="cpu")
    torch.manual_seed(9)
    again = diffusion_draws(config, SHAPE, seed=1, step=5, device="cpu")
    other = diffusion_draws(config, SHAPE, seed=1, step=6, device="cpu")
    held_out = diffusion_draws(config, SHAPE, seed=1, step=5, device="cpu", held_out=True)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise, held_out.noise)
    assert not held_out.dropped.any()
    assert first.noise.dtype == torch.float32


def test_real_network_learns_from_it() -> None:
    config = DiffusionConfig()
    pipeline = make_pipeline()
    objective = diffusion_objective(config, build_noise_scheduler(config), null_class=10)
    draws = diffusion_draws(config, SHAPE, seed=0, step=0, device="cpu")
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = objective.loss(pipeline.unet, make_batch(), draws).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
