"""Processes that share work: each part is made once, and again by another if its maker dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from filelock import FileLock

from mnist_diffusion import ranks
from mnist_diffusion.cli import main
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, save_evaluator
from tests.conftest import REPOSITORY
from tests.support.survival import Nursery

NUM_IMAGES, PARTS = 1000, 4


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [tmp_path / str(number) for number in range(4)]


class TestSharing:
    def test_what_is_there_is_kept(self, paths: list[Path]) -> None:
        paths[2].write_text("kept")
        ranks.build_parts(paths, lambda path: path.write_text("made"))
        assert [path.read_text() for path in paths] == ["made", "made", "kept", "made"]
        assert sorted(paths[0].parent.iterdir()) == paths

    def test_the_first_waits_for_what_is_claimed_and_makes_it_if_nobody_does(self, paths: list[Path]) -> None:
        released: list[float] = []
        made_at: list[tuple[str, float]] = []
        claimed = FileLock(paths[1].with_name(".1.lock"), thread_local=False)  # released by another thread

        def dies() -> None:
            time.sleep(0.5)
            released.append(time.monotonic())
            claimed.release()

        def make(path: Path) -> None:
            made_at.append((path.name, time.monotonic()))
            path.write_text("made")

        claimed.acquire()
        other = threading.Thread(target=dies)
        other.start()
        ranks.build_parts(paths, make)
        other.join()
        assert [name for name, _ in made_at] == ["0", "2", "3", "1"]
        assert made_at[-1][1] >= released[0]

    def test_another_begins_elsewhere_and_leaves(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        made: list[Path] = []
        with FileLock(paths[3].with_name(".3.lock")):
            ranks.build_parts(paths, made.append)
        assert made == [paths[2], paths[0], paths[1]]

    def test_a_helper_whose_parent_has_ended_leaves(self, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv(ranks.HELPED, "0")
        ranks.build_parts(paths, lambda path: path.write_text(""))
        assert not any(path.exists() for path in paths)

    def test_helpers_under_a_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="processes=2 must be 1 under a launcher"), ranks.helpers(2, ["evaluate"]):
            pass


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
    assert not list(out.glob("images/*/.*.lock"))
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
def test_a_process_that_is_killed(command: list[str], alone: Any, tmp_path: Path) -> None:
    """The second of two is killed in the middle of a part, and the first makes it."""
    with start(command, tmp_path, "--processes", "2") as process:
        claimed = None
        while claimed is None:
            claimed = next(tmp_path.glob("images/*/.000500-000750.npz.lock"), None)
            assert process.poll() is None
            time.sleep(0.01)
        [helper] = [child for child in psutil.Process(process.pid).children() if "evaluate" in child.cmdline()]
        helper.kill()
        assert not (claimed.parent / "000500-000750.npz").exists()
        assert process.wait() == 0
    require_equal(found(tmp_path), alone)


@pytest.mark.slow
def test_four_processes(command: list[str], alone: Any, tmp_path: Path) -> None:
    """As a launcher starts them."""
    evaluate = [*command[1:], "--out", str(tmp_path)]
    assert Nursery().finish(evaluate, log=tmp_path / "log.txt", ranks=4, work=main) == [0] * 4
    require_equal(found(tmp_path), alone)
    assert (tmp_path / "log.txt").read_text().count("The report is in") == 1
