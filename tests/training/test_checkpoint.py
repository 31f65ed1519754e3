"""Checkpoints: whole or nothing, verified, rotated; what comes back to the bit, the tests of resumed runs compare."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_diffusion.training import checkpoint as checkpoint_module
from mnist_diffusion.training.checkpoint import CheckpointError, load_checkpoint, newest_valid, save_checkpoint


def save(root: Path, step: int, keep: int = 2, **about: Any) -> Path:
    tensors = {name: {"weight": torch.full((2, 3), float(step))} for name in ("unet", "ema")}
    return save_checkpoint(root, step, tensors, {"seconds": 1.5}, keep=keep, about=about)


def test_round_trip(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nothing") == (None, [])
    save(tmp_path, 7)
    (tmp_path / ".step-8.partial").mkdir()  # what a killed save left
    assert newest_valid(tmp_path) == (7, [])
    checkpoint = load_checkpoint(tmp_path, 7)
    assert (checkpoint.step, checkpoint.state) == (7, {"seconds": 1.5, "step": 7})
    assert all(torch.equal(checkpoint.tensors[name]["weight"], torch.full((2, 3), 7.0)) for name in ("unet", "ema"))


def test_rotation_keeps_the_newest_and_the_one_just_saved(tmp_path: Path) -> None:
    (tmp_path / ".step-3.partial").mkdir()
    for step in (5, 10, 15, 100, 7, 7):  # the last over one that was there
        save(tmp_path, step)
    assert {path.name for path in tmp_path.iterdir()} == {"step-100", "step-15", "step-7", "step-7.broken"}


def flipped(file: Path) -> None:
    """One bit: in the manifest of a hash, as a blank there may be another one."""
    content = bytearray(file.read_bytes())
    content[content.find(b'"sha256": "') + 12] ^= 1
    file.write_bytes(content)


def linked(file: Path) -> None:
    file.symlink_to(file.rename(file.parents[1] / "elsewhere"))


def naming_a_file_elsewhere(file: Path) -> None:
    (file.parents[1] / "secret").write_bytes(b"x")
    manifest = json.loads(file.read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    file.write_text(json.dumps(manifest))


FILES = ("unet.safetensors", "ema.safetensors", "state.json", "manifest.json")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "shorter": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "one bit": flipped,
    "that of another": lambda file: file.write_bytes((file.parents[1] / "step-1" / file.name).read_bytes()),
}
OTHERS = [("more.safetensors", Path.touch), ("unet.safetensors", linked), ("manifest.json", naming_a_file_elsewhere)]


@pytest.mark.parametrize(("file", "damage"), [*((file, each) for file in FILES for each in DAMAGES.values()), *OTHERS])
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, file: str, damage: Any) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / file)
    newest, [problem] = newest_valid(tmp_path)
    assert newest == 1
    assert problem.endswith("renamed to step-2.broken")
    assert {path.name for path in tmp_path.iterdir()} - {"elsewhere", "secret"} == {"step-1", "step-2.broken"}


def test_whole_folders_swapped_renamed_or_foreign(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3, run_id="mine" if step < 3 else "theirs")
    (tmp_path / "step-2").rename(tmp_path / "step-9")
    with pytest.raises(CheckpointError, match="step-3 belongs to another run, 'theirs'; move it away"):
        newest_valid(tmp_path, run_id="mine")
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-9.broken", "step-3"}
    shutil.rmtree(tmp_path / "step-3")
    assert newest_valid(tmp_path, run_id="mine") == (1, [])


def test_one_of_a_newer_version_or_that_cannot_be_read_now_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_module, "FORMAT", checkpoint_module.FORMAT + 1)
    with pytest.raises(CheckpointError, match="written by another version"):
        newest_valid(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("hashlib.file_digest", failing)
    with pytest.raises(CheckpointError, match=r"could not be read, and may be intact: .*Input/output error"):
        newest_valid(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


class CrashError(BaseException):
    """Stands for the end of the process: nothing in the code under test may catch it."""


class PowerCut:
    """Loses, from one operation on, what has not been flushed: contents of files, and names in folders.

    Args:
        root: the folder of checkpoints.
        last: the operation, a flush or a rename, that does not happen any more.
    """

    def __init__(self, root: Path, last: int):
        self.root, self.left = root, last
        self.safe = {path.stat().st_ino for path in root.rglob("*") if path.is_file()}
        self.renamed: list[tuple[Path, Path]] = []
        self.operations = {name: getattr(Path, name) for name in ("rename", "replace")}

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise CrashError

    def fsync(self, descriptor: int) -> None:
        self.step()
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.safe.add(os.fstat(descriptor).st_ino)
        self.renamed = [(old, new) for old, new in self.renamed if new.parent != place]

    def move(self, name: str) -> Any:
        def call(old: Path, new: Path) -> Path:
            self.step()
            self.renamed.append((old, new))
            return self.operations[name](old, new)

        return call

    def strike(self) -> None:
        for old, new in reversed(self.renamed):
            self.operations["rename"](new, old)
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.safe:
                path.write_bytes(b"")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_power_cut_at_any_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    reached: list[int | None] = []
    finished = False
    while not finished:
        root = tmp_path / str(len(reached))
        save(root, 1)
        cut = PowerCut(root, len(reached))
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", cut.fsync)
            for name in cut.operations:
                patched.setattr(Path, name, cut.move(name))
            try:
                save(root, 2, keep)
                finished = True
            except CrashError:
                pass
        cut.strike()
        step, problems = newest_valid(root)
        assert not problems
        reached.append(step)
    assert set(reached) == {1, 2}
    assert reached[-1] == 2
