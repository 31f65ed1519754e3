"""Checkpoints: whole or nothing, verified, rotated, equal after the way to disk and back."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_diffusion.training import checkpoint as checkpoint_module
from mnist_diffusion.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_valid,
    optimizer_state,
    restore_optimizer,
    save_checkpoint,
)

real_rmtree = shutil.rmtree
TENSORS = {"unet": {"weight": torch.arange(6.0).view(2, 3)}, "ema": {"weight": torch.ones(2)}}


def save(root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(root, step, TENSORS, {"seconds": 1.5}, keep=keep)


def load_newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    step, problems = newest_valid(root)
    return (None if step is None else load_checkpoint(root, step)), problems


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 7)
    checkpoint, problems = load_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert not problems
    assert checkpoint.step == 7
    assert checkpoint.state["seconds"] == 1.5
    assert torch.equal(checkpoint.tensors["unet"]["weight"], TENSORS["unet"]["weight"])


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100", "step-15"]


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "nothing") == (None, [])


def test_partial_folders_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-2.partial").mkdir()
    checkpoint, _ = load_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1


@pytest.mark.parametrize("file", ["unet.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        # In the manifest a flipped blank would change nothing: flip a digit of a hash there.
        place = content.find(b'"sha256": "') + 12 if file == "manifest.json" else len(content) // 2
        content[place] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    checkpoint, problems = load_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(problems) == 1
    assert (tmp_path / "step-2.broken").is_dir()


def test_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    manifest["files"]["../secret"] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint, [problem] = load_newest_checkpoint(tmp_path)
    assert checkpoint is None
    assert "../secret is missing" in problem


def test_optimizer_comes_back_to_the_bit(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, groups = optimizer_state(optimizer)
    save_checkpoint(tmp_path, 3, {"optimizer": tensors, "model": model.state_dict()}, {"groups": groups}, keep=1)
    checkpoint, _ = load_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    other, other_optimizer = make()
    other.load_state_dict(checkpoint.tensors["model"])
    restore_optimizer(other_optimizer, checkpoint.tensors["optimizer"])
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    moment = other_optimizer.state[next(other.parameters())]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_the_one_just_saved_is_never_rotated_away(tmp_path: Path) -> None:
    for step in (100, 110, 50):
        save(tmp_path, step)
    assert (tmp_path / "step-50").is_dir()


def test_what_a_killed_save_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-3.partial").mkdir()
    save(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"step-4"}


class TestCorruption:
    """Every damage is found before anything is loaded, and the checkpoint before is used."""

    @staticmethod
    def damaged(content: bytes, other: bytes, kind: str, generator: random.Random) -> bytes | None:
        place = generator.randrange(len(content))
        match kind:
            case "truncate":
                return content[:place]
            case "flip":
                return content[:place] + bytes([content[place] ^ (1 << generator.randrange(8))]) + content[place + 1 :]
            case "swap":
                return other
            case "append":
                return content + b"\0"
            case "zeros":
                return content[:place] + bytes(len(content) - place)
        return None

    def test_hundreds(self, tmp_path: Path) -> None:
        generator = random.Random(0)
        pristine = tmp_path / "pristine"
        for step in (1, 2):
            tensors = {name: {"w": torch.full((8,), step + index)} for index, name in enumerate(("unet", "ema", "opt"))}
            save_checkpoint(pristine, step, tensors, {"seconds": step}, keep=2, about={"versions": {"torch": "2.0"}})
        # A byte of the manifest may say nothing of the files.
        files = sorted(path.name for path in (pristine / "step-2").iterdir() if path.name != "manifest.json")
        found = 0
        for kind, repeats in {"delete": 1, "truncate": 14, "flip": 40, "swap": 1, "append": 1, "zeros": 6}.items():
            for file, _ in itertools.product(files, range(repeats)):
                root = tmp_path / "root"
                shutil.copytree(pristine, root)
                path = root / "step-2" / file
                content = path.read_bytes()
                bad = self.damaged(content, (root / "step-1" / file).read_bytes(), kind, generator)
                if bad == content:  # zeros over zeros
                    shutil.rmtree(root)
                    continue
                if bad is None:
                    path.unlink()
                else:
                    path.write_bytes(bad)
                newest, problems = newest_valid(root)
                assert (newest, len(problems)) == (1, 1), (file, kind)
                assert {p.name for p in root.iterdir()} == {"step-1", "step-2.broken"}
                assert load_checkpoint(root, 1).state["seconds"] == 1
                shutil.rmtree(root)
                found += 1
        assert found >= 240

    def test_whole_folders_swapped_renamed_or_foreign(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save_checkpoint(tmp_path, step, TENSORS, {}, keep=3, about={"run_id": "mine" if step < 3 else "theirs"})
        (tmp_path / "step-2").rename(tmp_path / "step-9")
        with pytest.raises(CheckpointError, match="step-3 belongs to another run, 'theirs'; move it away"):
            newest_valid(tmp_path, run_id="mine")
        assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-9.broken", "step-3"}
        shutil.rmtree(tmp_path / "step-3")
        assert newest_valid(tmp_path, run_id="mine") == (1, [])

    def test_one_of_a_newer_version_or_that_cannot_be_read_now_stays_where_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint_module, "FORMAT", checkpoint_module.FORMAT + 1)
        save(tmp_path, 1)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="written by another version"):
            newest_valid(tmp_path)
        shutil.rmtree(tmp_path / "step-1")
        save(tmp_path, 2)

        def failing(*_: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("hashlib.file_digest", failing)
        with pytest.raises(CheckpointError, match=r"could not be read, and may be intact: .*Input/output error"):
            newest_valid(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["step-2"]

    def test_file_that_was_not_written(self, tmp_path: Path) -> None:
        (save(tmp_path, 1) / "more.safetensors").write_bytes(b"")
        assert newest_valid(tmp_path)[0] is None

    def test_link_in_place_of_a_file(self, tmp_path: Path) -> None:
        file = save(tmp_path, 1) / "unet.safetensors"
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        assert newest_valid(tmp_path)[0] is None


class Crash(BaseException):
    """Stands for the end of the process: nothing in the code under test may catch it."""


@pytest.mark.parametrize("sequences", [300, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_verified_checkpoint_remains_whatever_the_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: int
) -> None:
    """Random sequences of saves, crashes before or after a file operation, resumes and rotations."""
    generator = random.Random(0)
    remaining = -1

    def crashing(operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining == 0 and generator.random() < 0.5:
                raise Crash
            result = operation(*args, **kwargs)
            if remaining == 0:
                raise Crash
            return result

        return call

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a crash of the process does not need
    for owner, name in ((checkpoint_module, "save_file"), (checkpoint_module, "flush"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, crashing(getattr(owner, name)))
    for name in ("replace", "mkdir", "rename"):
        monkeypatch.setattr(Path, name, crashing(getattr(Path, name)))
    memory = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    crashes = saves = 0
    try:
        for sequence in range(sequences):
            root, step, safe = base / str(sequence % 50), 0, -1
            remaining = -1
            real_rmtree(root, ignore_errors=True)
            keep = generator.choice([1, 1, 2, 3])
            for _ in range(generator.randrange(2, 5)):
                step += 1
                remaining = generator.randrange(1, 26) if generator.random() < 0.5 else -1
                try:
                    save_checkpoint(root, step, {"w": {"w": torch.tensor([float(step)])}}, {}, keep=keep)
                    saves += 1
                    safe = step
                except Crash:
                    crashes += 1
                remaining = -1
                found, problems = newest_valid(root)
                assert not problems
                assert (found or -1) >= safe, (sequence, step)
                if found is not None:
                    safe = step = found
    finally:
        real_rmtree(base)
    assert crashes > 0.5 * sequences
    assert saves > sequences


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
            raise Crash

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


def test_a_power_cut_at_any_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []
    for last in range(100):
        root = tmp_path / str(last)
        save(root, 1)
        cut = PowerCut(root, last)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", cut.fsync)
            for name in cut.operations:
                patched.setattr(Path, name, cut.move(name))
            try:
                save(root, 2)
                finished = True
            except Crash:
                finished = False
        cut.strike()
        step, problems = newest_valid(root)
        assert not problems
        reached.append(step)
        if finished:
            break
    assert set(reached) == {1, 2}
    assert finished
    assert reached[-1] == 2
