"""Plots and sheets: what is in them."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mnist_diffusion.config import DiffusionConfig
from mnist_diffusion.data.dataset import ImageData, ImageSplit
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.plots.curves import compared_curves, noise_schedule, to_picture, training_curves
from mnist_diffusion.plots.grids import image_grid
from mnist_diffusion.plots.sheets import denoised, noised


class TestSheets:
    def test_tiles_stand_where_they_should(self) -> None:
        images = torch.zeros(4, 1, 10, 10)
        images[3] = 1.0
        plain = np.asarray(image_grid(images, 2, min_side=10))
        assert plain.shape == (26, 26)
        assert plain[14:24, 14:24].min() == 255
        assert plain.sum() == 255 * 100

    def test_forward_noising_goes_from_image_to_noise(self, digits: ImageData) -> None:
        process = NoisingProcess.of(build_noise_scheduler(DiffusionConfig(num_train_timesteps=100)))
        black = ImageSplit(torch.zeros(4, 1, 40, 40, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
        pixels = np.asarray(noised(dataclasses.replace(digits, train=black), process, seed=0))
        cells = pixels[-168:, 2:].reshape(168, -1)
        spreads = [cells[:, column * 42 : column * 42 + 40].std() for column in range(11)]
        assert spreads[0] == 0
        assert spreads[::2] == sorted(spreads[::2])
        assert spreads[-1] > 60

    def test_denoising_strip_shows_first_and_last(self) -> None:
        latents = torch.linspace(-1, 1, 11).view(11, 1, 1, 1, 1).expand(11, 4, 1, 40, 40)
        trajectory = SimpleNamespace(latents=latents[1:], timesteps=torch.arange(10))
        shape, sampled = (1, 40, 40), lambda **_: trajectory
        pipeline: Any = SimpleNamespace(num_classes=None, image_shape=shape, sample_trajectory=sampled, device="cpu")
        row = np.asarray(denoised(pipeline, (), seed=0))[-20]
        assert [int(row[2 + 42 * column + 20]) for column in (5, 9)] == [153, 255]


def _line(step: int) -> dict[str, Any]:
    """As a run writes it: some things each step, some at each report, some with each sample sheet."""
    line: dict[str, Any] = {"step": step, "epoch": step / 10, "loss": 1 / step, "learning_rate": 0.1, "grad_norm": 1.0}
    if step % 5 == 0:
        line |= {"images_per_second": 100.0, "loss_by_noise": [0.1 * level + 0.1 for level in range(10)]}
    return line | ({"held_out_loss": 0.5} if step % 10 == 0 else {})


LINES = [_line(step) for step in range(1, 21)]


def drawn(panel: Any, line: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Where the points of a line of a panel stand."""
    chosen = panel.lines[line]
    return np.asarray(chosen.get_xdata(), dtype=float), np.asarray(chosen.get_ydata(), dtype=float)


class TestFigures:
    def test_training_curves_show_what_was_measured(self) -> None:
        panels = training_curves(LINES).axes
        losses, levels, rates, speeds = panels[:4]
        np.testing.assert_allclose(drawn(losses, 0)[1], [1 / step for step in range(1, 21)])
        np.testing.assert_allclose(drawn(losses, 2)[0], [10, 20])
        assert len(levels.lines) == 10
        np.testing.assert_allclose(drawn(levels, 9)[1], [1.0] * 4)
        assert len(drawn(rates, 0)[0]) == 20
        np.testing.assert_allclose(drawn(speeds, 0)[0], [5, 10, 15, 20])
        assert all(panel.get_xlabel() and panel.get_ylabel() for panel in panels[:4])

    def test_losses_of_different_objectives_are_compared_apart(self) -> None:
        figure = compared_curves([{"a": LINES, "b": LINES[:10]}, {"$\\frac$": LINES}])
        to_picture(figure)  # a name is no formula
        assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
        assert [line.get_label() for line in figure.axes[2].lines] == ["$\\frac$"]
        assert len(figure.axes) == 4

    def test_noise_schedule_against_its_definition(self) -> None:
        scheduler = build_noise_scheduler(DiffusionConfig(num_train_timesteps=50, beta_schedule="linear"))
        process = NoisingProcess.of(scheduler)
        betas, left, ratio = noise_schedule(process).axes
        expected = np.linspace(0.0001, 0.02, 50)
        np.testing.assert_allclose(drawn(betas, 0)[1], expected, rtol=1e-3)
        alpha_bar = np.cumprod(1 - expected)
        np.testing.assert_allclose(drawn(left, 0)[1], alpha_bar, rtol=1e-5)
        np.testing.assert_allclose(drawn(ratio, 0)[1], 10 * np.log10(alpha_bar / (1 - alpha_bar)), rtol=1e-3)
