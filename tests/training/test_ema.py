"""Averages by power functions: tracked, kept, resumed, and reconstruct_ema at another length."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mnist_diffusion.cli import main
from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.training.ema import TRACKED, PowerAverages, coefficients, exponent, reconstruct_ema
from tests.conftest import tiny_config
from tests.training.conftest import run

STEPS, EVERY = 480, 10


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2])
def test_exponent_gives_the_deviation(std: float) -> None:
    """Of the places weighted by `k ** gamma`."""
    places = (np.arange(10**6) + 0.5) / 10**6
    weights = places ** exponent(std)
    weights /= weights.sum()
    mean = (weights * places).sum()
    assert np.sqrt((weights * (places - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)


def walk(run: Path, stds: tuple[float, ...]) -> dict[float, Tensor]:
    """Weights that drift as in training: their averages are tracked in float32, and here computed in float64."""
    generator, network = torch.Generator().manual_seed(0), nn.Linear(100, 100, bias=False)
    tracked, weights = PowerAverages(network), network.weight.detach().double()
    direction = torch.randn(weights.shape, generator=generator).double()
    direct = {std: weights.clone() for std in stds}
    for step in range(1, STEPS + 1):
        direction.mul_(0.9).add_(0.1 * torch.randn(weights.shape, generator=generator))
        weights.add_(direction, alpha=0.01 * (1 - step / STEPS))
        network.weight.data.copy_(weights)
        tracked.update(network.parameters(), step)
        for std, average in direct.items():
            average.lerp_(network.weight.detach().double(), 1 - (1 - 1 / step) ** (exponent(std) + 1))
        if step % EVERY == 0:
            tracked.write(run, step)
    return direct


def test_rebuilt_ones_agree_with_direct_tracking(tmp_path: Path) -> None:
    direct = walk(tmp_path, stds := (0.05, 0.06, 0.075, 0.1, 0.12, 0.15))
    last = load_file(tmp_path / "averages" / f"step-{STEPS}.safetensors")

    def apart(found: Tensor, std: float) -> float:
        return float((found.double() - direct[std]).norm() / direct[std].norm())

    for std in TRACKED:
        assert apart(last[f"{std}/weight"], std) < 1e-6
    for std in stds:
        weights, error = reconstruct_ema(tmp_path, std)
        assert apart(weights["weight"], std) < 1e-6, std
        assert error < 1e-4
    # What is found is not the nearest tracked one.
    assert apart(reconstruct_ema(tmp_path, 0.075)[0]["weight"], 0.1) > 1e-4


def test_fewer_moments_are_less_exact() -> None:
    errors = [coefficients(list(range(480 // count, 481, 480 // count)), 0.075)[1] for count in (4, 8, 16)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_pipelines_are_made_of_what_a_run_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = run(tiny_config(max_steps=12, averages_every="3 steps"), tmp_path / "run")
    assert main(["average", str(kept), "--std", "0.1", "0.15"]) == 0
    said = capsys.readouterr().out
    assert "average-0.15: from 4 saved averages up to step 12" in said
    assert "warning: 4 saved averages are few for std 0.15; lower train.averages_every" in said
    tracked = load_file(kept / "averages" / "step-12.safetensors")
    pipeline = MNISTDiffusionPipeline.from_pretrained(kept / "average-0.1")
    for name, weight in pipeline.unet.state_dict().items():
        torch.testing.assert_close(weight, tracked[f"0.1/{name}"])
    assert dict(pipeline.scheduler.config) == dict(MNISTDiffusionPipeline.from_pretrained(kept).scheduler.config)
    with pytest.raises(SystemExit):
        main(["average", str(kept), "--std", "0.3"])
    assert "std.0 must be less than or equal to 0.25, got '0.3'" in capsys.readouterr().err
    (kept / "averages" / "step-0.safetensors").touch()  # no run writes it
    changed = kept / "averages" / "step-9.safetensors"
    *others, (name, last) = load_file(changed).items()
    for content, message in (
        (b"no tensors", "could not be read"),
        (save(dict(others)), "it lacks weights, or has others"),
        (save(dict(others) | {name: last * torch.nan}), "values that are not finite"),
        (save(dict(others) | {name.replace("0.1/", "0.2/"): last}), "could not be read"),
        (None, "is not a regular file"),
    ):
        changed.unlink()
        os.mkfifo(changed) if content is None else changed.write_bytes(content)
        assert main(["average", str(kept), "--std", "0.1"]) == 2
        assert re.search(rf"step-9.safetensors.*{message}", capsys.readouterr().err)


def test_turned_on_too_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = run(tiny_config(max_steps=2), tmp_path / "late")
    with pytest.raises(UserError, match="needs averages from the first step on"):
        run(tiny_config(averages_every="1 step"), late, resume=True)
    assert main(["average", str(late), "--std", "0.1"]) == 2
    assert "has no averages: train with --train.averages_every" in capsys.readouterr().err
