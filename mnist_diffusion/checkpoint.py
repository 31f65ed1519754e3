"""State to resume from: written whole or not at all, verified before it is believed, without pickle.

A checkpoint is a folder `step-N` of safetensors and JSON files. It is written beside its final place, a manifest
with every file's size and SHA-256 comes last, everything is flushed to disk, and one rename makes it count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mnist_diffusion.config import UserError

FORMAT = 1
NAME = re.compile(r"step-(\d+)")
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint cannot be read or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by file and name, and the JSON state beside them."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `root/step-N`, then remove all but the newest `keep` checkpoints.

    Args:
        root: the folder of checkpoints.
        step: optimizer updates done.
        tensors: for each file, its tensors by name.
        state: what JSON can hold.
        keep: how many checkpoints to keep.
    """
    target, temporary = root / f"step-{step}", root / f".step-{step}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, group in tensors.items():
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
        save_file(contiguous, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in temporary.iterdir()}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if target.exists():  # the same step again, after a resume: equal content, so the old one may go
        shutil.rmtree(target)
    temporary.rename(target)
    _flush(root)
    for _, old in _folders(root)[keep:]:
        shutil.rmtree(old)
    return target


def load_newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what was found wrong with newer ones.

    A checkpoint that does not verify is set aside under the name `step-N.broken`, never removed.
    """
    problems: list[str] = []
    for step, path in _folders(root):
        try:
            return _load(path, step), problems
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            aside = path.with_name(f"{path.name}.broken")
            problems.append(f"{path} does not verify ({error}); set aside as {aside.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None, problems


def _load(path: Path, step: int) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT or manifest["step"] != step:
        raise CheckpointError(f"manifest is of format {manifest['format']} for step {manifest['step']}")
    for name, expected in manifest["files"].items():
        file = path / name
        if file.parent != path or not file.is_file():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{name} is not the file that was written")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = {
        name.removesuffix(".safetensors"): load_file(path / name)
        for name in manifest["files"]
        if name.endswith(".safetensors")
    }
    return Checkpoint(step, path, tensors, state)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, the newest first."""
    if not root.is_dir():
        return []
    matches = ((NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as flat tensors `index.name`, and its parameter groups as JSON can hold them."""
    state = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, values in state["state"].items() for name, value in values.items()}
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Undo `optimizer_state`; each tensor gets the memory layout of its parameter, so that updates round alike."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        laid_out = torch.empty_like(like).copy_(value) if value.shape == like.shape and value.ndim else value
        state.setdefault(int(index), {})[name] = laid_out
    optimizer.load_state_dict({"state": state, "param_groups": groups})
