"""The examples run as they stand, and what they leave can be used."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from examples import denoiser, emoji, own_objective, sample, steering, training_time
from mnist_diffusion import train
from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.errors import UserError
from tests.conftest import tiny_config


def test_own_objective_trains_a_pipeline_that_the_other_examples_sample_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    config = dataclasses.replace(tiny_config(max_steps=3, snapshot_every="1 steps"), output_dir=str(folder))
    assert train(config, objective=own_objective.huber_objective).exit_code == 0
    sample.main(str(folder / "pipeline"), str(tmp_path / "digits.png"))
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (10 * 28, 3 * 28)
    with pytest.raises(UserError, match="objective"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, resume=True, max_steps=5)))
    steering.main(str(folder), str(tmp_path / "steering.png"))
    assert capsys.readouterr().out.endswith(f"6 rows in {tmp_path / 'steering.png'}\n")
    with Image.open(tmp_path / "steering.png") as picture:
        assert picture.convert("L").getextrema() == (0, 255)
    monkeypatch.setattr(sys, "argv", ["training_time.py", str(folder)])
    training_time.main()
    with Image.open(folder / "training_time.png") as picture:
        assert picture.height >= 7 * 84


@pytest.mark.slow
def test_denoiser_learns_and_generalises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["denoiser.py", "--steps", "100", "--out", str(tmp_path)])
    denoiser.main()
    rows = json.loads((tmp_path / "psnr.json").read_text(encoding="utf-8"))
    assert [row["sigma"] for row in rows] == list(denoiser.SIGMAS)
    gains = {row["sigma"]: row["denoised_psnr_db"] - row["noisy_psnr_db"] for row in rows if row["sigma"]}
    assert gains[0.5] > 6
    assert all(gains[sigma] > 3 for sigma in (0.4, 0.6, 0.8, 1.0))  # noise it has never seen
    assert UNet2DModel.from_pretrained(tmp_path)(torch.rand(2, 1, 28, 28), 0).sample.shape == (2, 1, 28, 28)
    with Image.open(tmp_path / "denoised.png") as picture:
        assert picture.width > 7 * 56


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing")
def test_a_set_of_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["emoji.py", str(tmp_path / "emoji")])
    try:
        emoji.main()
    except subprocess.CalledProcessError:
        pytest.skip("the registry of npm cannot be reached")
    data = load_images(DataConfig(source=str(tmp_path / "emoji"), image_size=32), seed=0)
    assert (len(data.train), len(data.test)) == (1715, 191)
    assert data.class_names[:2] == ("Activities", "Animals & Nature")
    assert data.channels == 3
