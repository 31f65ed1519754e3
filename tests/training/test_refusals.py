"""What cannot work is refused before the first step, and leaves nothing behind."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from joblib import cpu_count

from mnist_diffusion.cli import main
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines import drawing
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.training.step import TrainState
from tests.conftest import changed, tiny_config
from tests.training.conftest import run

LCM = {"scheduler": "lcm", "num_inference_steps": 60}
REFUSED: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({}, {"train": {"gradient_accumulation_steps": 3}}, r"data.batch_size=8 must be divisible by 1 processes x .*=3"),
    ({}, {"train": {"mixed_precision": "fp16"}}, r"train.mixed_precision='fp16' needs a GPU"),
    ({}, {"data": {"source": "/no/such/folder"}}, r"data.source='/no/such/folder' was not found"),
    ({}, {"data": {"image_size": 9}}, r"data.image_size=9 cannot be cut into patches of .*=2 and halved 1 times"),
    ({}, {"sampling": LCM}, "sampling as configured cannot work"),
    ({"LOCAL_WORLD_SIZE": "2"}, {}, "2 independent runs writing over each other"),  # as for GPUs that are not there
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "STEPS='4' in the environment is not supported"),
    ({"ACCELERATE_USE_CPU": ""}, {}, "USE_CPU='' in the environment is not supported"),
    ({"ACCELERATE_USE_FSDP": "true"}, {}, "ACCELERATE_USE_FSDP='true' in the environment is not supported"),
    ({"ACCELERATE_USE_DEEPSPEED": "1"}, {}, "ACCELERATE_USE_DEEPSPEED='1' in the environment is not supported"),
    ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, {}, "ACCELERATE_DYNAMO_BACKEND='inductor' in the environment"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "ACCELERATE_MIXED_PRECISION='fp8' in the environment must be no, fp16"),
    (
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        {"train": {"mixed_precision": "no"}},
        r"train.mixed_precision='no', but the launcher asks for 'bf16'",
    ),
    *(({"ACCELERATE_MIXED_PRECISION": each}, {}, f"PRECISION='{each}' in the .* must be no") for each in ("BF16", "")),
    ({"RANK": "1"}, {}, "RANK=1 in the environment must be less than WORLD_SIZE=1"),
    ({"LOCAL_RANK": "2"}, {}, "LOCAL_RANK=2 in the environment must be less than WORLD_SIZE=1"),
    ({"LOCAL_RANK": ""}, {}, "LOCAL_RANK='' in the environment must be a whole number"),
    ({"LOCAL_RANK": "0"}, {}, "LOCAL_RANK is in the environment without RANK, WORLD_SIZE, MASTER_ADDR"),
    ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE=2 is in the environment without RANK, MASTER_ADDR"),
    ({"RANK": "first"}, {}, "RANK='first' in the environment must be a whole number"),
    ({"WORLD_SIZE": "0"}, {}, "WORLD_SIZE='0' in the environment must be a whole number, at least 1"),
]


@pytest.mark.parametrize(("environment", "changes", "message"), REFUSED)
def test_what_cannot_work_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], changes: Any, message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run(changed(tiny_config(), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("a\nb", "has control characters"),
        ("file", "is a file"),
        ("/proc/nowhere/run", "output_dir='/proc/nowhere/run' cannot be written to"),
    ],
)
def test_folders_that_cannot_be(tmp_path: Path, folder: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        run(tiny_config(), tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("verb", "variable"), [("sample", "RANK"), ("evaluate", "LOCAL_RANK")])
def test_an_environment_of_no_launcher_is_said_by_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    assert main([verb, "nowhere", "--out", str(tmp_path / "out")]) == 2
    assert f"{variable}=1 in the environment must be less than WORLD_SIZE=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OMP_NUM_THREADS": "4,1"}, None),
        *(({"OMP_NUM_THREADS": each}, 1) for each in ("auto", "1.0")),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, 2),
    ],
    ids=str,
)
def test_threads(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int | None) -> None:
    """As OpenMP has followed it already; all cores, shared, where a launcher has set one thread by itself."""
    before = torch.get_num_threads()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(7)
    set_num_threads()
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert os.environ["OMP_NUM_THREADS"].isdecimal()  # accelerate takes nothing else
    assert found == (7 if expected is None else max(1, cpu_count(only_physical_cores=True) // expected))


class TestFileSystems:
    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
    def test_one_that_cannot_lock_flush_or_set_permissions_will_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

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


def test_launchers_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = run(tiny_config(max_steps=1), tmp_path / "run")
    assert json.loads((folder / "summary.json").read_text())["mixed_precision"] == "bf16"


def test_a_pipeline_that_does_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a page makes it that forgets the patches of its network."""
    build = drawing.build_pipeline

    def forgetful(*parts: Any, patch_size: int = 1, **named: Any) -> MNISTDiffusionPipeline:
        return build(*parts, **named)

    monkeypatch.setattr(drawing, "build_pipeline", forgetful)
    with pytest.raises(UserError, match=r"images \(C, H, W\): \(4, 14, 14\) for the pipeline, but \(1, 28, 28\)"):
        run(tiny_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(TrainState, "update", fail)
    with pytest.raises(MemoryError):
        run(tiny_config(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
