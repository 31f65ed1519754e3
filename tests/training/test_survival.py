"""Training that survives: kills, signals, full disks, other numbers of processes. Each run here is a real one."""

import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from mnist_diffusion.method.objective import Batch
from mnist_diffusion.training import distributed
from mnist_diffusion.training.checkpoint import load_checkpoint, newest_valid
from mnist_diffusion.training.run_folder import read_metrics
from mnist_diffusion.training.signals import STOPPING, stop_signals
from mnist_diffusion.training.step import TrainState
from tests.support import survival
from tests.support.survival import (
    FLAGS,
    Death,
    chain_of_kills,
    elastic_runs,
    every_operation,
    final_state,
    join,
    run_with,
)

UPDATE = "mnist_diffusion.training.step.TrainState.update"


class Runs:
    """Launches of one run, each of which goes on where the one before ended."""

    def __init__(self, root: Path):
        root.mkdir(exist_ok=True)
        self.folder, self.log = root / "run", root / "log.txt"

    def start(self, *flags: str, **options: Any) -> list[Any]:
        flags = (*FLAGS, "--output_dir", str(self.folder), "--train.resume", "true", *flags)
        return survival.start(flags, log=self.log, **options)

    def ends(self, codes: list[int], *flags: str, **options: Any) -> str:
        """Launch as many processes as there are exit codes, with which they must end; what they say."""
        self.log.write_text("")
        found = join(self.start(*flags, ranks=len(codes), **options), seconds=75)
        assert found == codes, self.log.read_text()[-3000:]
        return self.log.read_text()

    def newest_step(self) -> int:
        step, problems = newest_valid(self.folder / "checkpoints")
        assert (step is None, problems) == (False, [])
        return step or 0

    def steps(self) -> list[int]:
        return [line["step"] for line in read_metrics(self.folder / "metrics.jsonl")]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


class TestKills:
    @pytest.mark.slow
    def test_before_and_after_each_file_operation_of_a_save_and_at_random_times(self, tmp_path: Path) -> None:
        deaths = every_operation()
        assert len(deaths) > 24
        result = chain_of_kills(tmp_path, [*deaths, *[None] * 4])
        assert result["different"] == []
        assert result["kills"] >= len(deaths) + 2

    def test_other_settings(self, tmp_path: Path) -> None:
        """bf16, dropout, augmentation, accumulation, channels-last, a single checkpoint kept."""
        flags = [
            *("--train.mixed_precision", "bf16", "--data.augment.shift", "0.1", "--model.dropout", "0.2"),
            *("--train.gradient_accumulation_steps", "2", "--train.checkpoint_every", "2 steps"),
            *("--train.channels_last", "true", "--train.keep_checkpoints", "1"),
        ]
        deaths = [Death(1, 5, after=True), Death(1, 12, after=False), None]
        result = chain_of_kills(tmp_path, deaths, flags)
        assert (result["kills"], result["different"]) == (3, [])

    @pytest.mark.slow
    def test_two_processes_and_the_other_leaves_by_itself(self, tmp_path: Path) -> None:
        deaths = [Death(1, 3, after=False), Death(0, 12, after=True)]
        result = chain_of_kills(tmp_path, deaths, ranks=2)
        assert (result["kills"], result["different"]) == (2, [])


class TestSignals:
    @pytest.mark.parametrize(("kind", "ranks"), [(signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGHUP, 1)], ids=str)
    def test_ends_with_a_checkpoint_and_a_pipeline(self, runs: Runs, kind: signal.Signals, ranks: int) -> None:
        flags = ("--train.max_steps", "100000", "--train.checkpoint_every", "1000000 steps")
        processes, deadline = runs.start(*flags, ranks=ranks), time.monotonic() + 60
        while len(runs.steps()) < 3:
            assert time.monotonic() < deadline, runs.log.read_text()[-3000:]
            time.sleep(0.02)
        for process in processes if kind == signal.SIGINT else processes[-1:]:  # one that is told tells the others
            os.kill(process.pid, kind)
        assert join(processes, seconds=30) == [128 + kind] * ranks, runs.log.read_text()[-3000:]
        assert (runs.folder / "pipeline" / "model_index.json").is_file()
        assert json.loads((runs.folder / "summary.json").read_text())["stopped_by_signal"] == kind
        assert runs.steps() == list(range(1, runs.newest_step() + 1))

    @pytest.mark.parametrize("number", STOPPING)
    def test_each_of_them_is_noted(self, number: signal.Signals) -> None:
        before = signal.signal(number, signal.SIG_DFL)  # nohup has HUP ignored
        with stop_signals() as request:
            os.kill(os.getpid(), number)
            assert request.number == number
        signal.signal(number, before)
        assert {signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU} < {*STOPPING}  # which batch systems send


class TestElastic:
    @pytest.mark.slow
    def test_one_to_two_to_one_in_float64(self, tmp_path: Path) -> None:
        """Same samples, draws and learning rates in the same order, so the same weights to rounding."""
        whole, elastic = elastic_runs(tmp_path, dtype="float64")
        first, second = (load_checkpoint(folder / "checkpoints", 20).tensors for folder in (whole, elastic))
        assert first["unet"]["conv_in.weight"].dtype == torch.float64
        for group in ("unet", "ema"):
            torch.testing.assert_close(second[group], first[group], rtol=0, atol=1e-6)
        one, other = (read_metrics(folder / "metrics.jsonl") for folder in (whole, elastic))
        for mine, theirs in zip(one, other, strict=True):
            assert (mine["step"], mine["learning_rate"]) == (theirs["step"], theirs["learning_rate"])
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)

    def test_ranks_see_their_slices_of_what_one_process_sees(self, tmp_path: Path) -> None:
        flags = ("--train.max_steps", "3", "--data.augment.shift", "0.1")
        for ranks in (1, 2):
            Runs(tmp_path / str(ranks)).ends([0] * ranks, *flags, work=recording_batches)
        require_slices(tmp_path / "1" / "run", tmp_path / "2" / "run")


def recording_batches(arguments: list[str]) -> int:
    """A run that writes down what each of its updates saw, and the weights it ended with."""
    import train_cfg

    seen: dict[str, list[Any]] = {field.name: [] for field in dataclasses.fields(Batch)}
    states: list[TrainState] = []
    loss = TrainState.training_loss

    def recording(self: TrainState, batch: Batch) -> torch.Tensor:
        states.append(self)
        for name, values in seen.items():
            values.append(getattr(batch, name).clone())
        return loss(self, batch)

    mock.patch.object(TrainState, "training_loss", recording).start()
    code = train_cfg.main(arguments)
    weights = [parameter.detach().clone() for parameter in states[0].unet.parameters()]
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    torch.save({**seen, "weights": weights}, folder / f"seen-{os.environ.get('RANK', '0')}.pt")
    return code


def require_slices(one: Path, two: Path) -> None:
    """Two processes each saw a half of what one saw, and both ended with the same weights, near those of one."""
    files = (one / "seen-0.pt", two / "seen-0.pt", two / "seen-1.pt")
    whole, *halves = (torch.load(file, weights_only=True) for file in files)
    alone, *weights = (each.pop("weights") for each in (whole, *halves))
    assert len(whole["images"]) > 2
    for name, steps in whole.items():
        for step, value in enumerate(steps):
            assert torch.equal(value, torch.cat([half[name][step] for half in halves])), name
    assert all(map(torch.equal, *weights))
    torch.testing.assert_close(weights[0], alone, atol=1e-3, rtol=0)


class TestBadTimes:
    def test_disk_full_in_a_save_tells_every_process(self, runs: Runs) -> None:
        flags = ("--train.keep_checkpoints", "1", "--train.max_steps")
        runs.ends([0], *flags, "2")
        before = {path.name: path.read_bytes() for path in (runs.folder / "checkpoints" / "step-2").iterdir()}
        said = runs.ends([2, 2], *flags, "9", work=partial(run_with, place=UPDATE, by=with_small_files))
        assert "error: the checkpoint of step 3 could not be written" in said
        assert "step-2 in" in said
        assert "Traceback" not in said
        assert {path.name: path.read_bytes() for path in (runs.folder / "checkpoints" / "step-2").iterdir()} == before
        assert not list((runs.folder / "checkpoints").glob(".*"))
        runs.ends([0], *flags, "9")

    def test_processes_must_read_the_same_images(self, runs: Runs) -> None:
        assert "error: the processes read different images (fingerprints" in runs.ends([2, 2], work=with_other_images)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_process_that_raises_in_mid_save(self, runs: Runs, rank: int) -> None:
        raising = partial(raising_in_the_third_save, rank=rank)
        work = partial(run_with, place="mnist_diffusion.training.distributed.Processes.on_main", by=raising)
        # Waits no longer than a save may take; a hang would be a timeout.
        assert 0 not in join(runs.start("--train.max_steps", "50", ranks=2, work=work), seconds=75)
        assert runs.newest_step() in (2, 3)

    @pytest.mark.slow
    def test_two_processes_agree_on_the_length_that_the_time_allows(self, runs: Runs) -> None:
        runs.ends([0, 0], "--train.max_minutes", "0.1")
        train = yaml.safe_load((runs.folder / "config.yaml").read_text())["train"]
        assert train["max_steps"] == len(runs.steps()) == runs.newest_step()

    def test_a_slow_save_ends_no_run(self) -> None:
        """A large network on a slow disk takes minutes to save."""
        assert timedelta(hours=1) <= distributed.COLLECTIVE_TIMEOUT

    @pytest.mark.parametrize(
        ("codes", "flag", "saved"),
        [([2], ("--train.checkpoint_every", "2 steps"), 4), ([2, 2], ("--train.max_grad_norm", "null"), 5)],
    )
    def test_not_finite_stops_before_a_save(self, runs: Runs, codes: list[int], flag: Any, saved: int) -> None:
        work = partial(run_with, place=UPDATE, by=nan_at_step_six)
        assert "non-finite loss or gradient at step 6" in runs.ends(codes, "--train.max_steps", "9", *flag, work=work)
        assert runs.newest_step() == saved
        assert runs.steps() == [1, 2, 3, 4, 5]

    def test_not_finite_is_skipped_where_asked(self, runs: Runs) -> None:
        work = partial(run_with, place=UPDATE, by=nan_at_step_six)
        runs.ends([0, 0], "--train.max_steps", "9", "--train.on_non_finite", "skip", work=work)
        lines = read_metrics(runs.folder / "metrics.jsonl")
        assert [(line["step"], line["loss"]) for line in lines if line["skipped"]] == [(6, None)]
        before, after = (load_checkpoint(runs.folder / "checkpoints", step).tensors["unet"] for step in (8, 9))
        assert all(torch.isfinite(value).all() for value in after.values())
        assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])

    def test_killed_between_a_save_and_what_follows_it(self, tmp_path: Path) -> None:
        """What a kill left undrawn and unexported is made when the run resumes, as if there had been none."""
        flags = ("--train.sample_every", "3 steps", "--train.max_steps", "6")
        whole, cut = Runs(tmp_path / "whole"), Runs(tmp_path / "cut")
        whole.ends([0], *flags)
        for step in (3, 6):
            killed = partial(killed_before_drawing, step=step)
            work = partial(run_with, place="mnist_diffusion.training.artifacts.Artifacts.draw", by=killed)
            cut.ends([-signal.SIGKILL], *flags, work=work)
            assert cut.newest_step() == step
            assert not (cut.folder / "samples" / f"step-{step:06d}.png").exists()
        assert not (cut.folder / "pipeline").exists()
        cut.ends([0], *flags)
        first, second = final_state(whole.folder), final_state(cut.folder)
        assert [name for name in first if first[name] != second[name]] == []
        for name in ("samples/step-000003.png", "samples/step-000006.png", "pipeline/samples.png"):
            assert (cut.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def with_small_files(update: Callable[..., Any], *given: Any) -> Any:
    """From the first step on, files as large as the weights cannot be written, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return update(*given)


def with_other_images(arguments: list[str]) -> int:
    """A run whose processes find different images."""
    import train_cfg

    return train_cfg.main([*arguments, "--train.seed", os.environ["RANK"]])  # which chooses those held out


SAVES = itertools.count(1)
"""Of this process."""


def raising_in_the_third_save(on_main: Callable[..., Any], self: Any, work: Any, *, rank: int) -> Any:
    """One process raises when the third checkpoint is to be written."""
    saving = getattr(work, "__name__", "") == "_save_checkpoint"
    if saving and next(SAVES) == 3 and os.environ["RANK"] == str(rank):
        raise RuntimeError("on purpose")
    return on_main(self, work)


def killed_before_drawing(draw: Callable[..., Any], self: Any, progress: Any, log_path: Path, *, step: int) -> None:
    """The process is killed when it is about to draw the samples of a step."""
    if progress.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    draw(self, progress, log_path)


def nan_at_step_six(update: Callable[..., Any], self: TrainState, step: int, learning_rate: float) -> Any:
    """The sixth update sees NaN on the last process."""
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    make_batch = TrainState.batch

    def batch(*parts: Any) -> Batch:
        made = make_batch(*parts)
        return dataclasses.replace(made, images=made.images * (math.nan if step == 5 and last else 1.0))

    with mock.patch.object(TrainState, "batch", batch):
        return update(self, step, learning_rate)
