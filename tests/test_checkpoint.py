"""Checkpoints: whole or nothing, verified, rotated, equal after the way to disk and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mnist_diffusion.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_verified,
    optimizer_state,
    restore_optimizer,
    save_checkpoint,
)

TENSORS = {"unet": {"weight": torch.arange(6.0).view(2, 3)}, "ema": {"weight": torch.ones(2)}}


def save(root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(root, step, TENSORS, {"seconds": 1.5}, keep=keep)


def load_newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    step, problems = newest_verified(root)
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
    manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert load_newest_checkpoint(tmp_path)[0] is None


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
    restore_optimizer(other_optimizer, checkpoint.tensors["optimizer"], checkpoint.state["groups"])
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    moment = other_optimizer.state[next(other.parameters())]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
