"""What cannot work is refused before the first step, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joblib import cpu_count

from mnist_diffusion.cli import main
from mnist_diffusion.config import DataConfig, SamplingSettings
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines import drawing
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.training.step import TrainState
from tests.conftest import tiny_config
from tests.training.conftest import run


@pytest.mark.parametrize(
    ("train", "data", "message"),
    [
        ({"gradient_accumulation_steps": 3}, {}, r"data.batch_size=8 must be divisible by 1 processes x .*=3"),
        ({"mixed_precision": "fp16"}, {}, r"train.mixed_precision='fp16' needs a GPU"),
        ({}, {"source": "/no/such/folder"}, r"data.source='/no/such/folder' was not found"),
        ({}, {"image_size": 9}, r"data.image_size=9 cannot be cut into patches of .*=2 and halved 1 times"),
    ],
)
def test_bad_runs_leave_nothing_behind(tmp_path: Path, train: Any, data: Any, message: str) -> None:
    config = tiny_config(**train)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class TestFileSystems:
    def test_one_that_cannot_lock_flush_or_set_permissions_will_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        for place in ("fcntl.flock", "os.fsync", "pathlib.Path.chmod"):
            monkeypatch.setattr(place, refuse)
        folder = run(tiny_config(), tmp_path / "run")
        assert run(tiny_config(), folder, resume=True, max_steps=6) == folder

    @pytest.mark.parametrize("place", ["pathlib.Path.rename", "mnist_diffusion.training.artifacts.append_text"])
    def test_one_that_cannot_hold_a_run_is_refused_before_the_first_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        (tmp_path / "empty").mkdir()
        monkeypatch.setattr(place, refuse)
        monkeypatch.setattr(TrainState, "update", None)
        for folder in (tmp_path / "run", tmp_path / "empty"):
            with pytest.raises(UserError, match=r"pre-flight check failed: .*Operation not permitted"):
                run(tiny_config(), folder)
        assert not (tmp_path / "run").exists()
        assert list((tmp_path / "empty").iterdir()) == []


def test_processes_that_know_nothing_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as a launcher for two GPUs sets it, where there are none
    with pytest.raises(UserError, match="2 independent runs writing over each other"):
        run(tiny_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value, f"STEPS='{value}' in the env") for value in ("4", "0", "")),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP='true' in the environment is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "ACCELERATE_USE_DEEPSPEED='1' in the environment is not supported"),
        *(("ACCELERATE_USE_CPU", value, f"USE_CPU='{value}' in the environment is not") for value in ("2", "")),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "ACCELERATE_DYNAMO_BACKEND='inductor' in the environment"),
        ("ACCELERATE_MIXED_PRECISION", "BF16", "ACCELERATE_MIXED_PRECISION='BF16' in the environment must be no, fp16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "'fp8'"),
        ("ACCELERATE_MIXED_PRECISION", "", "''"),
        ("RANK", "1", "RANK=1 in the environment must be less than WORLD_SIZE=1"),
        ("LOCAL_RANK", "2", "LOCAL_RANK=2 in the environment must be less than WORLD_SIZE=1"),
        ("RANK", "first", "RANK='first' in the environment must be a whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE='0' in the environment must be a whole number, at least 1"),
    ],
)
def test_an_environment_that_asks_for_something_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run(tiny_config(), tmp_path / "run")
    if name.endswith("RANK"):  # nothing is written, and it says so
        for verb in ("sample", "evaluate"):
            assert main([verb, "nowhere", "--out", str(tmp_path / "out")]) == 2
            assert message in capsys.readouterr().err


def test_threads_that_openmp_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first number of a list, which OpenMP has followed already; what is no whole number is passed over."""

    def threads(value: str) -> int:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        torch.set_num_threads(7)
        set_num_threads()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    kept, *others = (threads(value) for value in ("4,1", "", "auto", "1.0"))
    torch.set_num_threads(before)
    assert kept == 7
    assert others == [cpu_count(only_physical_cores=True)] * 3


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"):
        run(tiny_config(), tmp_path / "run")


def test_launchers_precision_against_the_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"train.mixed_precision='no', but the launcher asks for 'bf16'"):
        run(tiny_config(mixed_precision="no"), tmp_path / "run")
    folder = run(tiny_config(), tmp_path / "run")
    assert json.loads((folder / "summary.json").read_text())["mixed_precision"] == "bf16"


def test_a_pipeline_that_does_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a page makes it that forgets the patches of its network."""
    from mnist_diffusion.pipelines import drawing as pipeline

    build = pipeline.build_pipeline

    def forgetful(*parts: Any, patch_size: int = 1, **named: Any) -> MNISTDiffusionPipeline:
        return build(*parts, **named)

    monkeypatch.setattr(drawing, "build_pipeline", forgetful)
    with pytest.raises(UserError, match=r"images \(C, H, W\): \(4, 14, 14\) for the pipeline, but \(1, 28, 28\)"):
        run(tiny_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "folder", "message"),
    [
        (
            {"sampling": SamplingSettings(scheduler="lcm", num_inference_steps=60)},
            "run",
            "sampling as configured cannot work",
        ),
        ({}, "a\nb", "has control characters"),
    ],
    ids=["more LCM steps than it takes", "newline"],
)
def test_what_would_fail_at_the_end_fails_before_the_first_step(
    changes: dict[str, Any], folder: str, message: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config(), **changes)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / folder)
    assert not list(tmp_path.glob("*run*"))


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(TrainState, "update", fail)
    with pytest.raises(MemoryError):
        run(tiny_config(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_more_names_than_a_pipeline_folder_may_hold_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """60,000 classes, one image each: their index would be larger than its reader takes."""
    count = 60_000
    images = np.zeros((count, 8, 8), np.uint8)
    images[:, 1] = 255
    images[:, 0, :3] = np.arange(count)[:, None] // np.array([1, 256, 65536]) % 256
    np.savez(tmp_path / "x.npz", x_train=images, y_train=np.arange(count), x_test=images[:20], y_test=np.arange(20))
    config = dataclasses.replace(tiny_config(), data=DataConfig(source=str(tmp_path / "x.npz"), batch_size=8))
    with pytest.raises(UserError, match=r"model_index\.json is larger than the limit of 1,048,576 bytes"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
