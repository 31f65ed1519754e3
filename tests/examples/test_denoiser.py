"""The single-step denoiser: its loss, its product, and noise levels it never saw."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from mnist_diffusion.denoising import SIGMAS, DenoiserProduct, denoiser_objective, held_out_images, load_denoiser, sweep
from PIL import Image

import train_cfg
from mnist_diffusion.cli import main
from mnist_diffusion.cli.options import parse_train_arguments
from mnist_diffusion.config import ModelConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.diffusion.network import build_unet
from mnist_diffusion.diffusion.objective import Batch
from mnist_diffusion.errors import UserError
from tests.conftest import make_pipeline

TRAIN = [
    *("--config", "denoiser", "--data.source", "digits", "--data.batch_size", "16", "--train.max_minutes", "null"),
    *("--model.block_out_channels", "[8,16]", "--train.max_steps", "150", "--train.warmup_steps", "10"),
    *("--train.ema_decay", "0.9", "--train.num_eval_images", "32", "--train.sample_every_steps", "100"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("denoiser") / "run"
    assert train_cfg.main([*TRAIN, "--output_dir", str(folder)]) == 0
    return folder


class Echo(torch.nn.Module):
    """Gives back what it is given, and keeps it."""

    def forward(self, sample: torch.Tensor, timestep: int, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.sample, self.timestep = sample, timestep
        return (sample,)


def test_loss_is_the_squared_error_on_pixels_from_0_to_1() -> None:
    objective = denoiser_objective(0.3)
    batch = Batch(torch.rand(6, 1, 8, 8) * 2 - 1, torch.zeros(6, dtype=torch.int64))
    draws = objective.draw((6, 1, 8, 8), seed=0, step=0, device="cpu")
    network = Echo()
    losses = objective.loss(network, batch, draws)
    assert network.timestep == 0
    torch.testing.assert_close(network.sample, (batch.images + 1) / 2 + 0.3 * draws.noise)
    # What is left of a network that changes nothing is the noise.
    torch.testing.assert_close(losses, (0.3 * draws.noise).square().mean(dim=(1, 2, 3)))


def test_sweep_measures_psnr_as_it_is_defined(digits: ImageData) -> None:
    shape = ModelConfig(block_out_channels=(8,), norm_num_groups=4, class_conditional=False)
    unet = build_unet(shape, image_size=28, channels=1, num_classes=10).eval()
    images = held_out_images(digits, 20)
    found = sweep(unet, images, [0.0, 0.5], seed=0)
    assert found.noisy_psnr[0] == math.inf
    # The noise's mean square is sigma squared, but for the sample: 10 log10 (1 / 0.25) dB.
    assert found.noisy_psnr[1] == pytest.approx(10 * math.log10(4), abs=0.2)
    clean = images.float() / 255
    with torch.no_grad():
        denoised = unet(clean, 0).sample.clamp(0, 1)
    expected = 10 * torch.log10(1 / (denoised - clean).square().mean())
    assert found.denoised_psnr[0] == pytest.approx(float(expected), abs=0.01)


def test_learns_to_denoise_and_generalises(folder: Path, digits: ImageData) -> None:
    unet = load_denoiser(str(folder / "denoiser"), device="cpu")
    found = sweep(unet, held_out_images(digits), SIGMAS, seed=0)
    gains = {
        sigma: after - before
        for sigma, before, after in zip(found.sigmas, found.noisy_psnr, found.denoised_psnr, strict=True)
    }
    assert gains[0.5] > 6
    assert all(gains[sigma] > 3 for sigma in (0.4, 0.6, 0.8, 1.0))  # noise it never saw


def test_a_run_leaves_a_plain_unet_with_its_card_and_pictures(folder: Path) -> None:
    assert not (folder / "pipeline").exists()
    card = (folder / "denoiser" / "README.md").read_text(encoding="utf-8")
    assert 'UNet2DModel.from_pretrained("this-folder-or-repository")' in card
    assert "standard deviation 0.5 alone" in card
    assert {path.name for path in (folder / "pictures").iterdir()} >= {"training_curves.png", "pixel_histograms.png"}
    assert (folder / "samples" / "step-000100.png").is_file()
    made = folder / "denoiser"
    printed = DenoiserProduct(0.5).usage(UNet2DModel.from_pretrained(made), made)
    names = {"noisy": torch.rand(2, 1, 28, 28)}
    exec(printed, names)
    assert names["denoised"].shape == (2, 1, 28, 28)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--data.source", "digits", "--sigmas", "[0.0,0.5,2.0]", "--out", str(tmp_path)]
    assert main(["denoise", str(folder / "denoiser"), *asked]) == 0
    assert "denoised, PSNR in dB" in capsys.readouterr().out
    rows = json.loads((tmp_path / "psnr.json").read_text(encoding="utf-8"))
    assert [row["sigma"] for row in rows] == [0.0, 0.5, 2.0]
    assert rows[0]["noisy_psnr_db"] is None
    with Image.open(tmp_path / "denoised.png") as picture:
        assert picture.width > 3 * 56
    assert main(["plot", "sigmas", str(folder / "denoiser"), "--data.source", "digits", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "sigma_sweep.png").is_file()


def test_errors(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pipeline().unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="network of a class-conditional diffusion model"):
        load_denoiser(str(tmp_path / "unet"), device="cpu")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_denoiser(str(tmp_path), device="cpu")
    asked = ["--data.source", "digits", "--data.image_size", "32", "--out", str(tmp_path)]
    assert main(["denoise", str(folder / "denoiser"), *asked]) == 2
    assert "takes images of 28 x 28 with 1 channels, but data.source has 32 x 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--denoiser.sigma", "0"], "denoiser.sigma must be a positive number, got 0.0"),
        (["--model.class_conditional", "true"], "model.class_conditional must be false with a denoiser"),
        (["--train.evaluate_every_steps", "5"], "train.evaluate_every_steps must be null with a denoiser"),
        (["--train.animate_at_epochs", "[1]"], "train.animate_at_epochs must be empty with a denoiser"),
    ],
)
def test_what_a_denoiser_cannot_do_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_train_arguments(["--config", "denoiser", *flags])
    assert message in capsys.readouterr().err
