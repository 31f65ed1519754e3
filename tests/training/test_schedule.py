"""How long a run is and how its learning rate changes, on a clock that the updates move."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mnist_diffusion.config import Config, TrainConfig
from mnist_diffusion.training import probe, schedule, trainer
from mnist_diffusion.training.artifacts import Artifacts
from mnist_diffusion.training.launch import start_run
from mnist_diffusion.training.run_folder import read_metrics
from mnist_diffusion.training.schedule import learning_rate_at
from mnist_diffusion.training.step import TrainState
from tests.conftest import parse_train, tiny_config
from tests.training.conftest import losses, make_state, run


class TestLearningRate:
    @pytest.mark.parametrize("lr_schedule", ["constant", "linear", "cosine", "exponential"])
    def test_ends(self, lr_schedule: Any) -> None:
        config = TrainConfig(lr_schedule=lr_schedule, learning_rate=2.0, warmup_steps=10, final_lr_factor=0.1)
        assert learning_rate_at(config, 0, 100) == pytest.approx(0.2)
        assert learning_rate_at(config, 9, 100) == pytest.approx(2.0)
        assert learning_rate_at(config, 10, 100) == pytest.approx(2.0)
        last = learning_rate_at(config, 100, 100)
        assert last == pytest.approx(2.0 if lr_schedule == "constant" else 0.2)
        middle = {"constant": 2.0, "linear": 1.1, "cosine": 1.1, "exponential": 2 * 0.1**0.5}[lr_schedule]
        assert learning_rate_at(config, 55, 100) == pytest.approx(middle)


def timed_config(**train: Any) -> Config:
    """A run that its minutes end, of updates of a few milliseconds."""
    plain = {"mixed_precision": "no", "channels_last": False, "num_threads": 1}
    config = tiny_config(**{"max_steps": None, "num_eval_images": 8, **plain, **train})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=8))


@dataclasses.dataclass
class FakeClock:
    """A time, and how long the update after so many others takes at that time."""

    now: float = 0.0
    step_seconds: Callable[[int, float], float] = lambda step, now: 1.0


LOADS: dict[str, Callable[[int, float], float]] = {
    "twice as slow": lambda step, now: 1.0 if now < 30 else 2.0,
    "ten times as slow": lambda step, now: 0.5 if now < 85 else 5.0,
    "slow at first": lambda step, now: 10.0 if now < 20 else 1.0,
    "suspended for an hour": lambda step, now: 3600.0 if step == 35 else 1.0,
    "suspended for 25 seconds": lambda step, now: 25.0 if step == 35 else 1.0,
}


class TestLength:
    def test_epochs(self, tmp_path: Path) -> None:
        """0.06 epochs of 1617 images in batches of 8 are 12.1 steps; 0.02 are 4.04, so that the saves drift."""
        config = tiny_config(max_steps=None, max_epochs=0.06, checkpoint_every="0.02 epochs", keep_checkpoints=9)
        folder = run(config, tmp_path / "run")
        assert sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir()) == [5, 9, 13]

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
        """A run's clock that only its updates move."""
        clock, update, last = FakeClock(), TrainState.update, [0.0]

        def timed_update(self: TrainState, step: int, learning_rate: float) -> dict[str, torch.Tensor]:
            last[0] = clock.step_seconds(step, clock.now)
            clock.now += last[0]
            return update(self, step, learning_rate)

        def draw(self: Artifacts, progress: Any, log_path: Path) -> None:
            images = self.num_final_evaluations()
            clock.now += trainer.SECONDS_TO_WRITE + images * last[0] / (trainer.EVALUATIONS_PER_UPDATE * 8)

        monkeypatch.setattr(schedule, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        monkeypatch.setattr(TrainState, "update", timed_update)
        monkeypatch.setattr(Artifacts, "draw", draw)
        return clock

    @pytest.mark.parametrize("step_seconds", LOADS.values(), ids=LOADS)
    def test_the_time_holds_whatever_the_load(self, tmp_path: Path, clock: FakeClock, step_seconds: Any) -> None:
        clock.step_seconds = step_seconds
        config = timed_config(max_minutes=2, warmup_steps=10, checkpoint_every=None)
        folder = run(config, tmp_path / "run")
        suspended = step_seconds(35, 30) - 1 if step_seconds(35, 30) > 20 else 0.0
        assert 0.95 * 120 <= clock.now - suspended <= 1.03 * 120
        train = yaml.safe_load((folder / "config.yaml").read_text())["train"]
        lines = read_metrics(folder / "metrics.jsonl")
        assert (train["max_steps"], train["max_minutes"]) == (len(lines), None)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["finished"]
        assert summary["planned_steps"] == len(lines)
        rates = [line["learning_rate"] / config.train.learning_rate for line in lines]
        assert max(rates) == 1.0
        assert rates[-1] < (0.1 if step_seconds(0, 0) == step_seconds(0, 100) else 1)  # it has come down
        assert sum(rate == 1.0 for rate in rates) > len(rates) / 4
        start, _ = train["lr_decay"]
        assert rates[start] == 1.0 > rates[start + 1]

    def test_killed_at_any_moment_and_run_again_give_the_same_bits(self, tmp_path: Path, clock: FakeClock) -> None:
        """Before, in and after the decision on the decay; and from the configuration that the run left.

        With what is not the default, beside what is, where it changes how numbers are rounded.
        """
        clock.step_seconds = lambda step, now: 1.0 if now < 40 else 1.4
        rounding = {"mixed_precision": "bf16", "channels_last": True, "max_grad_norm": 0.1}
        config = timed_config(max_minutes=1, warmup_steps=5, checkpoint_every="7 steps", **rounding)
        folder = tmp_path / "run"

        class KilledError(Exception):
            pass

        for kill in (10, 33, 34, 35, 38):
            original = clock.step_seconds

            def killing(step: int, now: float, kill: int = kill, original: Any = original) -> float:
                if step == kill:
                    raise KilledError
                return float(original(step, now))

            clock.step_seconds = killing
            with pytest.raises(KilledError):
                run(config, folder, resume=folder.exists())
            clock.step_seconds = original
            file = folder / "config.yaml"
            config = parse_train(["--config", str(file)]).config
        run(config, folder, resume=True)
        final = parse_train(["--config", str(folder / "config.yaml")]).config
        again = run(final, tmp_path / "again")
        assert losses(again) == losses(folder)
        newest = [each / "checkpoints" / f"step-{len(losses(folder))}" for each in (folder, again)]
        for name in ("unet", "ema", "optimizer"):
            one, other = ((checkpoint / f"{name}.safetensors").read_bytes() for checkpoint in newest)
            assert one == other

    def test_too_few_steps_are_said(self, tmp_path: Path, clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
        clock.step_seconds = lambda step, now: 3.0
        run(timed_config(max_minutes=1, warmup_steps=100), tmp_path / "run")
        assert "TOO FEW STEPS. Only 17 steps fit in the time limit" in capsys.readouterr().out

    def test_minutes_beside_steps_cut_the_run(self, tmp_path: Path, clock: FakeClock) -> None:
        clock.step_seconds = lambda step, now: 6.0
        folder = run(tiny_config(max_steps=100_000, max_minutes=1), tmp_path / "run")
        summary = json.loads((folder / "summary.json").read_text())
        assert not summary["finished"]
        assert summary["step"] == 10
        assert summary["planned_steps"] == 100_000
        assert (folder / "pipeline" / "model_index.json").is_file()

    @pytest.mark.parametrize(
        ("given", "speeds", "chosen"),
        [
            ({}, {"bf16": 2.0, "channels_last": 1.05, "one thread": 0.7}, ("bf16", None, 2)),
            ({}, {"bf16": 0.8, "channels_last": 1.3, "one thread": 1.5}, (None, True, 1)),
            ({"mixed_precision": "no", "channels_last": False, "num_threads": 2}, {}, ("no", False, 2)),
        ],
    )
    def test_the_fastest_of_what_is_not_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, speeds: dict[str, float], chosen: Any
    ) -> None:
        def measured(state: TrainState) -> float:
            train, speed = state.config.train, 1.0
            assert state.accelerator.mixed_precision == (train.mixed_precision or "no")
            uses = {"bf16": train.mixed_precision == "bf16", "channels_last": train.channels_last}
            for name, used in {**uses, "one thread": torch.get_num_threads() == 1}.items():
                speed *= speeds[name] if used else 1
            return 1 / speed

        monkeypatch.setattr(probe, "seconds_per_image", measured)
        monkeypatch.setattr(probe, "_has_bf16", lambda: True)
        config, before = tiny_config(**given), torch.get_num_threads()
        torch.set_num_threads(2)
        context, _ = start_run(dataclasses.replace(config, output_dir=str(tmp_path / "run")), "tiny")
        torch.set_num_threads(2)
        context, found = probe.fastest(context, config, lambda context, config: make_state(config, tmp_path))
        threads = torch.get_num_threads()
        torch.set_num_threads(before)
        assert (found.train.mixed_precision, found.train.channels_last, threads) == chosen
        assert found.train.num_threads == threads
        assert context.accelerator.mixed_precision == (found.train.mixed_precision or "no")
