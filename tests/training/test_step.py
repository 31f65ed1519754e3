"""One update, and the state it changes."""

import copy
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch

from mnist_diffusion.training.step import TrainState
from tests.conftest import tiny_config
from tests.training.conftest import make_state


class TestTrainState:
    def test_accumulation_changes_nothing_but_rounding(self, tmp_path: Path) -> None:
        whole = make_state(tiny_config(), tmp_path)
        parts = make_state(tiny_config(gradient_accumulation_steps=4), tmp_path)
        for step in range(3):
            one, other = whole.update(step, 0.01), parts.update(step, 0.01)
            torch.testing.assert_close(one["loss"], other["loss"], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(one["grad_norm"], other["grad_norm"], atol=1e-4, rtol=1e-3)

    def test_average_follows_emas_formula(self, tmp_path: Path) -> None:
        state = make_state(tiny_config(ema_decay=0.5), tmp_path)
        expected = next(state.unet.parameters()).detach().clone()
        for n in range(4):
            state.update(n, 0.01)
            decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
            expected = decay * expected + (1 - decay) * next(state.unet.parameters()).detach()
        torch.testing.assert_close(next(state.update_averaged_unet().parameters()), expected)

    def test_a_skipped_update_moves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither weights nor any of their averages."""
        state = make_state(tiny_config(on_non_finite="skip", averages_every="1 step"), tmp_path)
        state.update(0, 0.01)
        before, batch = copy.deepcopy(state.to_checkpoint()[0]), TrainState.batch
        monkeypatch.setattr(
            TrainState, "batch", lambda *parts: replace(made := batch(*parts), images=made.images * nan)
        )
        assert state.update(1, 0.01)["skipped"] == 1
        torch.testing.assert_close(state.to_checkpoint()[0], before, rtol=0, atol=0)

    def test_gradient_clipping(self, tmp_path: Path) -> None:
        state = make_state(tiny_config(max_grad_norm=1e-9), tmp_path)
        before = [parameter.detach().clone() for parameter in state.unet.parameters()]
        assert state.update(0, 0.01)["grad_norm"] > 1e-3
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(before, state.unet.parameters(), strict=True))
        assert moved < 0.01

    def test_loss_by_noise_level_is_the_loss_in_parts(self, tmp_path: Path) -> None:
        state = make_state(tiny_config(gradient_accumulation_steps=2), tmp_path)
        count = state.config.data.batch_size
        levels, losses = [], []
        for step in range(5):
            losses.append(float(state.update(step, 0.01)["loss"]))
            _, timesteps, _ = state.objective.draw((count, 1, 28, 28), seed=0, step=step, device="cpu")
            levels += (timesteps // 100).tolist()
        found = state.pop_loss_by_noise_level()
        assert found is not None
        shares = np.bincount(levels, minlength=10)
        assert [mean is None for mean in found] == [share == 0 for share in shares]
        total = sum(mean * share for mean, share in zip(found, shares, strict=True) if mean is not None)
        assert total / shares.sum() == pytest.approx(float(np.mean(losses)), rel=1e-4)
        assert state.pop_loss_by_noise_level() == [None] * 10
