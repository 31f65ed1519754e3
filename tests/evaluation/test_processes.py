"""Processes that share the sampling of one evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mnist_diffusion import parallel
from mnist_diffusion.cli import main
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, save_evaluator
from tests.conftest import REPOSITORY
from tests.support.survival import Nursery

NUM_IMAGES, PARTS = 1000, 4


def test_a_launcher_starts_processes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="processes=2 must be 1 under a launcher"):
        parallel.run_in_processes(2, ["evaluate"])


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, digits_evaluator: ImageEvaluator) -> list[str]:
    """`evaluate` of an untrained pipeline."""
    root = tmp_path_factory.mktemp("ranks")
    train = ["--config", "tiny", "--data.source", "digits", "--train.max_steps", "2", "--train.pictures", "false"]
    assert main(["train", *train, "--train.num_threads", "1", "--output_dir", str(root / "run")]) == 0
    save_evaluator(digits_evaluator, root / "evaluator")
    flags = ["--evaluator", str(root / "evaluator"), "--num_images", str(NUM_IMAGES), "--num_inference_steps", "2"]
    flags += ["--guidance_scale", "1"]
    return ["mnist_diffusion", "evaluate", str(root / "run"), *flags]


def start(command: list[str], out: Path, *flags: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", *command, "--out", str(out), *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(line, cwd=REPOSITORY, env=environment)


def found(out: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The figures and the images that an evaluation left."""
    [result] = json.loads((out / "report.json").read_text())["results"]
    figures = {name: value for name, value in result.items() if isinstance(value, float) and "seconds" not in name}
    parts = sorted(out.glob("images/*/*.npz"))
    assert len(parts) == PARTS
    return figures, [np.load(part)["images"] for part in parts]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[np.ndarray]]:
    out = tmp_path_factory.mktemp("alone")
    assert main([*command[1:], "--out", str(out)]) == 0
    return found(out)


def require_equal(one: tuple[dict[str, Any], list[np.ndarray]], other: tuple[dict[str, Any], list[np.ndarray]]) -> None:
    for mine, theirs in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one[0] == pytest.approx(other[0], rel=1e-6)


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(command: list[str], alone: Any, tmp_path: Path) -> None:
    """The command ends with an error; the same command finds the parts that are there, and builds the others."""
    with start(command, tmp_path, "--processes", "2") as process:
        while len(list(tmp_path.glob("images/*/*.npz"))) < 1:
            assert process.poll() is None
            time.sleep(0.01)
        workers = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "evaluate" in child.cmdline()
        ]
        max(workers, key=lambda worker: worker.pid).kill()
        assert process.wait() != 0
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/*/*.npz")}
    assert 1 <= len(kept) < PARTS
    with start(command, tmp_path, "--processes", "2") as process:
        assert process.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    require_equal(found(tmp_path), alone)


@pytest.mark.slow
def test_four_processes_of_a_launcher(command: list[str], alone: Any, tmp_path: Path) -> None:
    evaluate = [*command[1:], "--out", str(tmp_path)]
    assert Nursery().finish(evaluate, log=tmp_path / "log.txt", ranks=4, work=main) == [0] * 4
    require_equal(found(tmp_path), alone)
    assert (tmp_path / "log.txt").read_text().count("The report is in") == 1
