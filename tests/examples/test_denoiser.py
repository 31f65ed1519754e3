"""The single-step denoiser: its loss, its run folder, and noise levels it has never seen."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from PIL import Image

from examples import denoiser
from mnist_diffusion.config import ModelConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.objective import Batch
from mnist_diffusion.errors import UserError
from tests.conftest import tiny_config

TRAIN = [
    *("--sigma", "0.5", "--data.source", "digits", "--data.batch_size", "16", "--train.max_minutes", "null"),
    *("--model.block_out_channels", "[8,16]", "--train.max_steps", "150", "--train.warmup_steps", "10"),
    *("--train.ema_decay", "0.9", "--train.num_eval_images", "32", "--train.sample_every", "100 steps"),
    *("--train.pictures", "false"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("denoiser") / "run"
    assert denoiser.main([*TRAIN, "--output_dir", str(folder)]) == 0
    return folder


class Echo(torch.nn.Module):
    """Gives back what it is given, and keeps it."""

    def forward(self, sample: torch.Tensor, timestep: int, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.sample, self.timestep = sample, timestep
        return (sample,)


def test_loss_is_the_squared_error_on_pixels_from_0_to_1() -> None:
    objective, shape = denoiser.denoiser_objective(0.3), (6, 1, 8, 8)
    draws = objective.draw(shape, seed=0, step=0, device="cpu")
    batch = Batch(torch.rand(shape) * 2 - 1, torch.zeros(6, dtype=torch.int64), *draws)
    network = Echo()
    losses = objective.loss(network, batch)
    assert network.timestep == 0
    torch.testing.assert_close(network.sample, (batch.images + 1) / 2 + 0.3 * batch.noise)
    # What is left of a network that changes nothing is the noise.
    torch.testing.assert_close(losses, (0.3 * batch.noise).square().mean(dim=(1, 2, 3)))


def test_sweep_measures_psnr_as_it_is_defined(digits: ImageData) -> None:
    shape = ModelConfig(block_out_channels=(8,), patch_size=1, norm_num_groups=4, class_conditional=False)
    unet = build_unet(shape, image_size=28, channels=1, num_classes=10).eval()
    images = digits.test.spread(20)[0]
    (clear, noisy), picture = denoiser.sweep(unet, images, [0.0, 0.5], seed=0)
    assert clear["noisy_psnr_db"] is None
    # The noise's mean square is sigma squared, but for the sample: 10 log10 (1 / 0.25) dB.
    assert noisy["noisy_psnr_db"] == pytest.approx(10 * math.log10(4), abs=0.2)
    clean = images.float() / 255
    with torch.no_grad():
        denoised = unet(clean, 0).sample.clamp(0, 1)
    expected = 10 * torch.log10(1 / (denoised - clean).square().mean())
    assert clear["denoised_psnr_db"] == pytest.approx(float(expected), abs=0.01)
    assert picture.height > 6 * 56  # noisy, denoised, clean of two images


def test_learns_to_denoise_and_generalises(folder: Path) -> None:
    rows = json.loads((folder / "psnr.json").read_text(encoding="utf-8"))
    assert [row["sigma"] for row in rows] == list(denoiser.SIGMAS)
    gains = {row["sigma"]: row["denoised_psnr_db"] - row["noisy_psnr_db"] for row in rows if row["sigma"]}
    assert gains[0.5] > 6
    assert all(gains[sigma] > 3 for sigma in (0.4, 0.6, 0.8, 1.0))  # noise it has never seen


def test_a_run_leaves_a_plain_unet_and_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not (folder / "pipeline").exists()
    assert {path.name for path in (folder / "samples").iterdir()} == {"step-000100.png", "step-000150.png"}
    with Image.open(folder / "denoised.png") as picture:
        assert picture.width > 7 * 56
    resume = ["--output_dir", str(folder), "--train.resume", "true"]
    assert denoiser.main([*TRAIN, *resume, "--train.max_steps", "151"]) == 0
    printed = capsys.readouterr().out
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    names: dict[str, Any] = {"noisy": torch.rand(2, 1, 28, 28)}
    exec("\n".join(lines), names)
    assert isinstance(names["unet"], UNet2DModel)
    assert names["denoised"].shape == (2, 1, 28, 28)
    with pytest.raises(SystemExit):
        denoiser.main(["--sigma", "0"])
    assert "--sigma must be a positive number, got 0.0" in capsys.readouterr().err
    assert denoiser.main([*TRAIN, *resume, "--sigma", "0.4"]) == 2
    assert "fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize("train", [{"evaluate_every": "5 steps"}, {"animate_at_epochs": (1.0,)}], ids=str)
def test_what_a_denoiser_cannot_do_is_refused(train: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(train))):
        denoiser.run(tiny_config(**train), 0.5)
