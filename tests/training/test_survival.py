"""Training that survives: kills, signals, full disks, other numbers of processes. Each run here is a real one."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mnist_diffusion.training import distributed
from mnist_diffusion.training.checkpoint import load_checkpoint, newest_valid
from mnist_diffusion.training.run_folder import read_metrics
from mnist_diffusion.training.signals import STOPPING, stop_signals
from mnist_diffusion.training.step import TrainState
from tests.support.survival import (
    FLAGS,
    Death,
    Nursery,
    chain_of_kills,
    elastic_runs,
    every_operation,
    final_state,
    join,
)


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return Nursery()


def wait_for_step(folder: Path, step: int, *, seconds: float = 60) -> None:
    """Until the log has a line of this step or a later one."""
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline, f"no step {step} within {seconds} s"
        time.sleep(0.02)


def newest_step(folder: Path) -> int:
    step, problems = newest_valid(folder / "checkpoints")
    assert not problems
    assert step is not None
    return step


class TestKills:
    @pytest.mark.slow
    def test_before_and_after_each_file_operation_of_a_save_and_at_random_times(
        self, nursery: Nursery, tmp_path: Path
    ) -> None:
        deaths = every_operation()
        assert len(deaths) > 24
        result = chain_of_kills(nursery, tmp_path, [*deaths, *[None] * 4])
        assert result["different"] == []
        assert result["kills"] >= len(deaths) + 2

    def test_other_settings(self, nursery: Nursery, tmp_path: Path) -> None:
        """bf16, dropout, augmentation, accumulation, channels-last, a single checkpoint kept."""
        flags = [
            *("--train.mixed_precision", "bf16", "--data.augment.shift", "0.1", "--model.dropout", "0.2"),
            *("--train.gradient_accumulation_steps", "2", "--train.checkpoint_every", "2 steps"),
            *("--train.channels_last", "true", "--train.keep_checkpoints", "1"),
        ]
        deaths: list[Death | None] = [Death(1, 5, after=True), Death(1, 12, after=False), None]
        result = chain_of_kills(nursery, tmp_path, deaths, flags)
        assert (result["kills"], result["different"]) == (3, [])

    @pytest.mark.slow
    def test_two_processes_and_the_other_leaves_by_itself(self, nursery: Nursery, tmp_path: Path) -> None:
        deaths: list[Death | None] = [Death(1, 3, after=False), Death(0, 12, after=True)]
        result = chain_of_kills(nursery, tmp_path, deaths, ranks=2)
        assert (result["kills"], result["different"]) == (2, [])


class TestSignals:
    @pytest.mark.parametrize(
        ("kind", "ranks", "count"),
        [(signal.SIGTERM, 1, 2), (signal.SIGINT, 2, 1), (signal.SIGUSR1, 1, 1), (signal.SIGHUP, 1, 1)],
        ids=str,
    )
    def test_ends_with_a_checkpoint_and_a_pipeline(
        self, nursery: Nursery, tmp_path: Path, kind: signal.Signals, ranks: int, count: int
    ) -> None:
        interrupt_again_and_again(nursery, tmp_path, kind, ranks=ranks, count=count)

    @pytest.mark.parametrize("number", STOPPING)
    def test_each_of_them_is_noted(self, number: signal.Signals) -> None:
        with stop_signals() as request:
            os.kill(os.getpid(), number)
            assert request.number == number

    def test_second_int_ends_it_at_once(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "100000", "--output_dir", str(folder)]
        [process] = nursery.start(flags, log=log, work=steps_of_a_minute)
        wait_for_step(folder, 4)
        time.sleep(0.3)  # into the step that takes a minute
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        assert join([process], seconds=5) == [130]
        assert newest_step(folder) == 4


def interrupt_again_and_again(nursery: Nursery, root: Path, kind: signal.Signals, *, ranks: int, count: int) -> None:
    """Send a signal to one run's processes, go on with it, and so on: exit code, checkpoint and pipeline each time."""
    folder, log = root / "run", root / "log.txt"
    flags = [*FLAGS, "--train.max_steps", "100000", "--train.checkpoint_every", "1000000 steps"]
    flags += ["--train.resume", "true", "--output_dir", str(folder)]
    random.seed(int(kind))
    reached = 0
    for _ in range(count):
        processes = nursery.start(flags, log=log, ranks=ranks)
        wait_for_step(folder, reached + 3)
        time.sleep(random.uniform(0, 0.3))
        for process in processes if kind != signal.SIGTERM else processes[-1:]:  # one that is told tells the others
            os.kill(process.pid, kind)
        assert join(processes, seconds=30) == [128 + kind] * ranks, log.read_text()[-3000:]
        assert newest_step(folder) > reached
        reached = newest_step(folder)
        assert (folder / "pipeline" / "model_index.json").is_file()
        assert json.loads((folder / "summary.json").read_text())["stopped_by_signal"] == kind
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, reached + 1))


def steps_of_a_minute(arguments: list[str]) -> int:
    """A run each of whose steps from the fifth on takes a minute."""
    import train_cfg
    from mnist_diffusion.training.step import TrainState

    update = TrainState.update

    def slow(self: TrainState, step: int, learning_rate: float) -> Any:
        if step >= 4:
            for _ in range(600):
                time.sleep(0.1)
        return update(self, step, learning_rate)

    TrainState.update = slow  # type: ignore[method-assign]
    return train_cfg.main(arguments)


class TestElastic:
    @pytest.mark.slow
    def test_one_to_two_to_one_in_float64(self, nursery: Nursery, tmp_path: Path) -> None:
        """Same samples, draws and learning rates in the same order, so the same weights to rounding."""
        whole, elastic = elastic_runs(nursery, tmp_path, dtype="float64")
        first, second = (load_checkpoint(folder / "checkpoints", 20).tensors for folder in (whole, elastic))
        assert first["unet"]["conv_in.weight"].dtype == torch.float64
        for group in ("unet", "ema"):
            for name, value in first[group].items():
                torch.testing.assert_close(second[group][name], value, rtol=0, atol=1e-6)
        one, other = (read_metrics(folder / "metrics.jsonl") for folder in (whole, elastic))
        for mine, theirs in zip(one, other, strict=True):
            assert (mine["step"], mine["learning_rate"]) == (theirs["step"], theirs["learning_rate"])
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)

    def test_ranks_see_their_slices_of_what_one_process_sees(self, nursery: Nursery, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        for ranks in (1, 2):
            folder = tmp_path / f"ranks-{ranks}"
            flags = [*FLAGS, "--train.max_steps", "3", "--data.augment.shift", "0.1", "--output_dir", str(folder)]
            assert nursery.finish(flags, log=log, ranks=ranks, work=recording_batches) == [0] * ranks, log.read_text()
        [whole] = (torch.load(tmp_path / "ranks-1" / "seen-0.pt", weights_only=True),)
        halves = [torch.load(tmp_path / "ranks-2" / f"seen-{rank}.pt", weights_only=True) for rank in range(2)]
        assert len(whole["images"]) == 3
        for name, steps in whole.items():
            if name == "weights":
                continue
            for step, value in enumerate(steps):
                assert torch.equal(value, torch.cat([half[name][step] for half in halves])), name
        for mine, theirs in zip(halves[0]["weights"], halves[1]["weights"], strict=True):
            assert torch.equal(mine, theirs)


def recording_batches(arguments: list[str]) -> int:
    """A run that writes down what each of its updates saw, and the weights it ended with."""
    import train_cfg
    from mnist_diffusion.method.objective import Batch, Objective
    from mnist_diffusion.training import run as module_of_runs

    module: Any = module_of_runs
    state_class = module.TrainState
    seen: dict[str, list[Any]] = {field.name: [] for field in dataclasses.fields(Batch)}
    made: list[Any] = []

    class Recording(state_class):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, accelerator: Any, data: Any, unet: Any, objective: Objective):
            def loss(model: Any, batch: Batch) -> Any:
                if model.training:
                    for name, values in seen.items():
                        values.append(getattr(batch, name).clone())
                return objective.loss(model, batch)

            super().__init__(config, accelerator, data, unet, dataclasses.replace(objective, loss=loss))
            made.append(self)

    module.TrainState = Recording
    code = train_cfg.main(arguments)
    weights = [parameter.detach().clone() for parameter in made[0].unet.parameters()]
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    torch.save({**seen, "weights": weights}, folder / f"seen-{os.environ.get('RANK', '0')}.pt")
    return code


class TestBadTimes:
    def test_second_run_on_a_folder_refuses(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "100000", "--output_dir", str(folder)]
        [first] = nursery.start(flags, log=tmp_path / "first.txt")
        wait_for_step(folder, 2)
        assert nursery.finish([*flags, "--train.resume", "true"], log=log) == [2]
        assert "another run is writing to" in log.read_text()
        assert nursery.finish(flags, log=log) == [2]
        assert "is not empty" in log.read_text()
        os.kill(first.pid, signal.SIGKILL)
        join([first])
        again = [*flags, "--train.resume", "true", "--train.max_steps", str(newest_step(folder) + 2)]
        assert nursery.finish(again, log=log) == [0], log.read_text()

    def test_disk_full_in_a_save(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.keep_checkpoints", "1", "--output_dir", str(folder)]
        assert nursery.finish([*flags, "--train.max_steps", "2"], log=log) == [0]
        before = {path.name: path.read_bytes() for path in (folder / "checkpoints" / "step-2").iterdir()}
        more = [*flags, "--train.max_steps", "9", "--train.resume", "true"]
        assert nursery.finish(more, log=log, work=with_small_files) == [2], log.read_text()
        said = log.read_text()
        assert "error: the checkpoint of step 3 could not be written" in said
        assert "step-2 in" in said
        assert "Traceback" not in said
        assert {path.name: path.read_bytes() for path in (folder / "checkpoints" / "step-2").iterdir()} == before
        assert not list((folder / "checkpoints").glob(".*"))
        assert nursery.finish(more, log=log) == [0], log.read_text()

    def test_disk_full_tells_every_process(self, nursery: Nursery, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "9", "--output_dir", str(tmp_path / "run")]
        assert nursery.finish(flags, log=log, ranks=2, work=with_small_files, seconds=60) == [2, 2], log.read_text()

    def test_processes_must_read_the_same_images(self, nursery: Nursery, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        assert nursery.finish([*FLAGS], log=log, ranks=2, work=with_other_images) == [2, 2], log.read_text()
        assert "error: the processes read different images: fingerprints" in log.read_text()

    def test_folder_that_cannot_be_written_to(self, nursery: Nursery, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "2", "--output_dir", "/proc/nowhere/run"]
        assert nursery.finish(flags, log=log) == [2]
        assert "output_dir='/proc/nowhere/run' cannot be written to" in log.read_text()

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_process_that_raises_in_mid_save(self, nursery: Nursery, tmp_path: Path, rank: int) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "50", "--output_dir", str(folder)]
        # Waits no longer than a save may take; a hang would be a timeout.
        codes = nursery.finish(flags, log=log, ranks=2, work=partial(raising_in_the_third_save, rank=rank), seconds=75)
        assert 0 not in codes
        assert newest_step(folder) in (2, 3)

    def test_a_batch_that_two_processes_cannot_share(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--data.batch_size", "15", "--train.max_steps", "2", "--output_dir", str(folder)]
        assert nursery.finish(flags, log=log, ranks=2) == [2, 2]
        assert "data.batch_size=15 must be divisible by 2 processes" in log.read_text()
        assert not folder.exists()

    @pytest.mark.slow
    def test_two_processes_agree_on_the_length_that_the_time_allows(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_minutes", "0.1", "--output_dir", str(folder)]
        assert nursery.finish(flags, log=log, ranks=2) == [0, 0], log.read_text()
        train = yaml.safe_load((folder / "config.yaml").read_text())["train"]
        assert train["max_steps"] == len(read_metrics(folder / "metrics.jsonl")) == newest_step(folder)

    def test_a_slow_save_ends_no_run(self) -> None:
        """A large network on a slow disk takes minutes to save."""
        assert timedelta(hours=1) <= distributed.COLLECTIVE_TIMEOUT

    def test_not_finite_stops_before_a_save(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "9", "--train.checkpoint_every", "2 steps", "--output_dir", str(folder)]
        assert nursery.finish(flags, log=log, work=nan_at_step_six) == [2]
        assert "step 6 was not finite (loss nan" in log.read_text()
        assert newest_step(folder) == 4
        assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_not_finite_without_clipping_and_on_one_of_two(self, nursery: Nursery, tmp_path: Path, ranks: int) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "9", "--train.max_grad_norm", "null", "--output_dir", str(folder)]
        assert nursery.finish(flags, log=log, work=nan_at_step_six, ranks=ranks) == [2] * ranks
        assert "step 6 was not finite" in log.read_text()
        assert newest_step(folder) == 5

    def test_killed_between_the_last_checkpoint_and_the_pipeline(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "6", "--train.resume", "true", "--output_dir", str(folder)]
        assert nursery.finish(flags, log=log, work=killed_before_the_pipeline) == [-signal.SIGKILL]
        assert newest_step(folder) == 6
        assert not (folder / "pipeline").exists()
        assert nursery.finish(flags, log=log) == [0], log.read_text()
        assert (folder / "pipeline" / "model_index.json").is_file()
        assert json.loads((folder / "summary.json").read_text())["step"] == 6

    def test_killed_between_a_save_and_its_pictures(self, nursery: Nursery, tmp_path: Path) -> None:
        """What a kill left undrawn is drawn when the run resumes; all else is as if there had been none."""
        log, drawn = tmp_path / "log.txt", ["--train.sample_every", "3 steps", "--train.max_steps", "6"]
        flags = [*FLAGS, *drawn, "--train.resume", "true", "--output_dir"]
        assert nursery.finish([*flags, str(tmp_path / "whole")], log=log) == [0]
        for step in (3, 6):
            work = partial(killed_before_drawing, step=step)
            assert nursery.finish([*flags, str(tmp_path / "cut")], log=log, work=work) == [-signal.SIGKILL]
            assert newest_step(tmp_path / "cut") == step
            assert not (tmp_path / "cut" / "samples" / f"step-{step:06d}.png").exists()
        assert nursery.finish([*flags, str(tmp_path / "cut")], log=log) == [0], log.read_text()
        whole, cut = (final_state(tmp_path / name) for name in ("whole", "cut"))
        assert [name for name in whole if whole[name] != cut[name]] == []
        for name in ("samples/step-000003.png", "samples/step-000006.png", "pipeline/samples.png"):
            assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_nothing_verifies(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "2", "--output_dir", str(folder)]
        assert nursery.finish(flags, log=log) == [0]
        lines = (folder / "metrics.jsonl").read_text()
        for path in (folder / "checkpoints").glob("*/manifest.json"):
            path.unlink()
        assert nursery.finish([*flags, "--train.resume", "true"], log=log) == [2]
        assert "starting again would overwrite the results" in log.read_text()
        assert (folder / "metrics.jsonl").read_text() == lines

    def test_run_id_that_was_lost(self, nursery: Nursery, tmp_path: Path) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--output_dir", str(folder), "--train.max_steps"]
        assert nursery.finish([*flags, "2"], log=log) == [0]
        before = (folder / "run_id").read_text()
        (folder / "run_id").write_text("")
        assert nursery.finish([*flags, "4", "--train.resume", "true"], log=log) == [0]
        assert (folder / "run_id").read_text() == before
        assert newest_step(folder) == 4

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_not_finite_is_skipped_where_asked(self, nursery: Nursery, tmp_path: Path, ranks: int) -> None:
        folder, log = tmp_path / "run", tmp_path / "log.txt"
        flags = [*FLAGS, "--train.max_steps", "9", "--train.on_non_finite", "skip", "--output_dir", str(folder)]
        assert nursery.finish(flags, log=log, work=nan_at_step_six, ranks=ranks) == [0] * ranks, log.read_text()
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in lines if line["skipped"]] == [6]
        assert lines[5]["loss"] is None
        five, six = (load_checkpoint(folder / "checkpoints", step) for step in (8, 9))
        assert all(torch.isfinite(value).all() for value in six.tensors["unet"].values())
        assert not torch.equal(five.tensors["unet"]["conv_in.weight"], six.tensors["unet"]["conv_in.weight"])


def with_small_files(arguments: list[str]) -> int:
    """A run that cannot write files as large as its weights: what a full disk does, without filling one."""
    import train_cfg

    state: Any = TrainState
    update = state.update

    def limited(*arguments: Any) -> Any:  # from the first step on
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return update(*arguments)

    state.update = limited
    return train_cfg.main(arguments)


def with_other_images(arguments: list[str]) -> int:
    """A run whose processes find different images."""
    import train_cfg

    return train_cfg.main([*arguments, "--train.seed", os.environ["RANK"]])  # which chooses those held out


def is_save(work: Any) -> bool:
    return getattr(work, "__name__", "") == "_save_checkpoint"


def raising_in_the_third_save(arguments: list[str], *, rank: int) -> int:
    """A run one of whose processes raises while the third checkpoint is written."""
    import train_cfg
    from mnist_diffusion.training import trainer as module

    training: Any = module
    save, on_main, count = training.save_checkpoint, training.Processes.on_main, 0

    def failing_save(*arguments: Any, **options: Any) -> Any:
        if count == 3 and rank == 0:
            raise RuntimeError("on purpose")
        return save(*arguments, **options)

    def failing(self: Any, work: Any) -> None:
        nonlocal count
        count += is_save(work)
        if is_save(work) and count == 3 and rank == 1 and os.environ["RANK"] == "1":
            raise RuntimeError("on purpose")
        on_main(self, work)

    training.save_checkpoint, training.Processes.on_main = failing_save, failing
    return train_cfg.main(arguments)


def killed_before_the_pipeline(arguments: list[str]) -> int:
    """A run killed after its last checkpoint, before it writes its pipeline."""
    import train_cfg
    from mnist_diffusion.training import artifacts as module

    artifacts: Any = module
    export, calls = artifacts.export_pipeline, 0

    def killed(*parts: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first is the rehearsal
            os.kill(os.getpid(), signal.SIGKILL)
        export(*parts, **more)

    artifacts.export_pipeline = killed
    return train_cfg.main(arguments)


def killed_before_drawing(arguments: list[str], *, step: int) -> int:
    """A run killed when it is about to draw the samples of a step."""
    import train_cfg
    from mnist_diffusion.training.artifacts import Artifacts

    artifacts: Any = Artifacts
    draw = artifacts.draw

    def killed(self: Any, progress: Any, log_path: Path) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        draw(self, progress, log_path)

    artifacts.draw = killed
    return train_cfg.main(arguments)


def nan_at_step_six(arguments: list[str]) -> int:
    """A run whose sixth update sees NaN on its last process."""
    import train_cfg
    from mnist_diffusion.training import step as state

    train_state: Any = state.TrainState
    last, now = int(os.environ.get("WORLD_SIZE", "1")) - 1, 0
    update, make_batch = train_state.update, train_state.batch

    def spoiled(self: Any, *parts: Any) -> Any:
        batch = make_batch(self, *parts)
        if now == 5 and int(os.environ.get("RANK", "0")) == last and self.unet.training:
            batch.images[0, 0, 0, 0] = float("nan")
        return batch

    def remembering(self: Any, step: int, learning_rate: float) -> Any:
        nonlocal now
        now = step
        return update(self, step, learning_rate)

    train_state.update, train_state.batch = remembering, spoiled
    return train_cfg.main(arguments)
