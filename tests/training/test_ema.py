"""Averages by power functions: tracked, kept, resumed, and reconstruct_ema at another length."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import train_cfg
from mnist_diffusion.cli import main
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.training.ema import TRACKED, PowerAverages, coefficients, exponent, reconstruct_ema

STEPS, EVERY = 480, 10


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2])
def test_exponent_gives_the_deviation(std: float) -> None:
    """Of the places weighted by `k ** gamma`."""
    places = (np.arange(10**6) + 0.5) / 10**6
    weights = places ** exponent(std)
    weights /= weights.sum()
    mean = (weights * places).sum()
    assert np.sqrt((weights * (places - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)


class Walk:
    """A network whose weights drift as in training, and its averages: tracked in float32, and directly in float64."""

    def __init__(self, run: Path, stds: tuple[float, ...]):
        generator = torch.Generator().manual_seed(0)
        network = nn.Linear(100, 100)
        tracked = PowerAverages(network)
        weights = [each.detach().double() for each in network.parameters()]
        directions = [torch.randn(each.shape, generator=generator).double() for each in weights]
        self.direct = {std: [each.clone() for each in weights] for std in stds}
        for step in range(1, STEPS + 1):
            for weight, direction in zip(weights, directions, strict=True):
                noise = torch.randn(weight.shape, generator=generator)
                direction.mul_(0.9).add_(0.1 * noise)
                weight.add_(direction, alpha=0.01 * (1 - step / STEPS))
            for parameter, weight in zip(network.parameters(), weights, strict=True):
                parameter.data.copy_(weight)
            tracked.update(network.parameters(), step)
            for std, average in self.direct.items():
                kept = (1 - 1 / step) ** (exponent(std) + 1)
                for each, parameter in zip(average, network.parameters(), strict=True):
                    each.mul_(kept).add_(parameter.detach().double(), alpha=1 - kept)
            if step % EVERY == 0:
                tracked.write(run, step)


def relative(found: dict[str, Tensor], wanted: list[Tensor]) -> float:
    """Difference over size, of all weights together."""
    both = [found["weight"], found["bias"]], wanted
    flat, target = (torch.cat([each.double().flatten() for each in group]) for group in both)
    return float((flat - target).norm() / target.norm())


def test_rebuilt_ones_agree_with_direct_tracking(tmp_path: Path) -> None:
    walk = Walk(tmp_path, stds := (0.05, 0.06, 0.075, 0.1, 0.12, 0.15))
    last = load_file(tmp_path / "averages" / f"step-{STEPS}.safetensors")
    for std in TRACKED:
        assert relative({n: last[f"{std}/{n}"] for n in ("weight", "bias")}, walk.direct[std]) < 1e-6
    for std in stds:
        weights, error = reconstruct_ema(tmp_path, std)
        assert relative(weights, walk.direct[std]) < 1e-6, std
        assert error < 1e-4
    # What is found is not the nearest tracked one.
    assert relative(reconstruct_ema(tmp_path, 0.075)[0], walk.direct[0.1]) > 1e-4


def test_fewer_moments_are_less_exact() -> None:
    errors = [coefficients(list(range(480 // count, 481, 480 // count)), 0.075)[1] for count in (4, 8, 16)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    shares, error = coefficients([100, 200], 0.1)
    np.testing.assert_allclose(shares, [[0, 0], [0, 1]], atol=1e-9)
    assert error < 1e-9


FLAGS = [
    *("--config", "tiny", "--data.source", "digits", "--train.max_minutes", "null", "--train.max_steps", "12"),
    *("--train.averages_every", "3 steps", "--train.checkpoint_every", "4 steps", "--train.pictures", "false"),
    *("--train.num_eval_images", "0", "--train.samples_per_class", "1", "--data.batch_size", "4"),
    *("--train.num_threads", "1", "--train.lr_schedule", "constant"),
]


def test_a_run_keeps_them_through_a_resume_and_makes_pipelines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_cfg.main([*FLAGS, "--output_dir", str(whole)]) == 0
    assert train_cfg.main([*FLAGS, "--output_dir", str(resumed), "--train.max_steps", "8"]) == 0
    for step in (3, 6, 8):
        (resumed / "averages" / f"step-{step}.safetensors").rename(tmp_path / f"{step}")
    (resumed / "averages" / "step-99.safetensors").write_bytes(b"of a branch that was left")
    assert train_cfg.main([*FLAGS, "--output_dir", str(resumed), "--train.resume", "true"]) == 0
    assert not (resumed / "averages" / "step-99.safetensors").exists()
    for step in (9, 12):
        name = f"averages/step-{step}.safetensors"
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert main(["average", str(whole), "--std", "0.1", "0.15"]) == 0
    said = capsys.readouterr().out
    assert "average-0.15: from 4 saved averages up to step 12" in said
    assert "warning: 4 saved averages are few for std 0.15; lower train.averages_every" in said
    tracked = load_file(whole / "averages" / "step-12.safetensors")
    pipeline = MNISTDiffusionPipeline.from_pretrained(whole / "average-0.1")
    for name, weight in pipeline.unet.state_dict().items():
        torch.testing.assert_close(weight, tracked[f"0.1/{name}"])
    assert dict(pipeline.scheduler.config) == dict(MNISTDiffusionPipeline.from_pretrained(whole).scheduler.config)
    # Turned on too late, and asked of runs that cannot give them.
    late = [*FLAGS, "--output_dir", str(tmp_path / "late"), "--train.max_steps", "4"]
    assert train_cfg.main([*late, "--train.averages_every", "null"]) == 0
    assert train_cfg.main([*late, "--train.resume", "true", "--train.max_steps", "8"]) == 2
    assert "needs averages from the first step on" in capsys.readouterr().err
    assert main(["average", str(tmp_path / "late"), "--std", "0.1"]) == 2
    assert "has no averages: train with --train.averages_every" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["average", str(whole), "--std", "0.3"])
    assert "std.0 must be less than or equal to 0.25, got '0.3'" in capsys.readouterr().err
    file = whole / "averages" / "step-9.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    for content, message in (
        (save({**tensors, name: torch.full_like(tensors[name], float("nan"))}), "values that are not finite"),
        (save({f"0.2/{name.partition('/')[2]}": tensors[name]}), "step-9.safetensors could not be read"),
        (b"no tensors", "step-9.safetensors could not be read"),
    ):
        file.write_bytes(content)
        assert main(["average", str(whole), "--std", "0.1"]) == 2
        assert message in capsys.readouterr().err
    file.unlink()
    os.mkfifo(file)
    assert main(["average", str(whole), "--std", "0.1"]) == 2
    assert "is not a regular file" in capsys.readouterr().err
