"""Processes that share the sampling of one evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_diffusion import parallel
from mnist_diffusion.cli import main
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, save_evaluator
from tests.conftest import REPOSITORY

NUM_IMAGES, PARTS = 1000, 4


def test_a_launcher_starts_processes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="processes=2 must be 1 under a launcher"):
        parallel.in_processes(2, ["evaluate"], lambda: 0)


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


def found(out: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The figures and the images that an evaluation left."""
    [result] = json.loads((out / "report.json").read_text())["results"]
    figures = {name: value for name, value in result.items() if isinstance(value, float) and "seconds" not in name}
    parts = sorted(out.glob("images/*/*.npz"))
    assert len(parts) == PARTS
    return figures, [np.load(part)["images"] for part in parts]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[np.ndarray], Path]:
    out = tmp_path_factory.mktemp("alone")
    assert main([*command[1:], "--out", str(out)]) == 0
    return *found(out), out


@pytest.mark.slow
def test_two_processes_give_what_one_does_and_keep_the_parts_that_are_there(
    command: list[str], alone: Any, tmp_path: Path
) -> None:
    [folder] = (path for path in alone[2].glob("images/*"))
    kept = tmp_path / "images" / folder.name / "000250-000500.npz"
    kept.parent.mkdir(parents=True)
    shutil.copy(folder / kept.name, kept)
    before = kept.stat().st_mtime_ns
    line = [sys.executable, "-m", *command, "--out", str(tmp_path), "--processes", "2"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    printed = subprocess.run(line, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True).stdout
    assert printed.count("The report is in") == 1
    assert kept.stat().st_mtime_ns == before
    for mine, theirs in zip(found(tmp_path)[1], alone[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert found(tmp_path)[0] == pytest.approx(alone[0], rel=1e-6)
