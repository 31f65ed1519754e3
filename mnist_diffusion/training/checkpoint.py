"""Atomic checkpoints without pickle, verified by checksum before they are used.

A checkpoint is a folder `step-N` of safetensors and JSON files, with a manifest of every file's size and SHA-256. It is
written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mnist_diffusion.errors import UserError
from mnist_diffusion.files import copy_permissions, flush, is_transient, open_file, read_json, replace_text

FORMAT = 4
NAME = re.compile(r"step-(\d+)")
MANIFEST = "manifest.json"
INVALID = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""Exceptions from reading a damaged checkpoint."""
WRONG_CONTENT = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
"""Exceptions from using a checkpoint that holds something else than a run's state."""


class CheckpointError(UserError):
    """A checkpoint cannot be read or does not belong to this run."""


class ForeignCheckpointError(CheckpointError):
    """A checkpoint may be intact, but belongs to another run or version, or cannot be read now; it stays in place."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by file and name, and the JSON state beside them."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write `root/step-N`, then remove all but the newest `keep` checkpoints.

    Args:
        root: the folder of checkpoints.
        step: updates done.
        tensors: for each file, its tensors by name.
        state: values that JSON can hold.
        keep: number of checkpoints to keep.
        about: further values of the manifest, such as the `run_id`.

    Raises:
        CheckpointError: it could not be written, as on a full disk; earlier checkpoints are intact.
    """
    target, temporary = root / f"step-{step}", root / f".step-{step}.partial"
    try:
        for stale in root.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        replace_text(temporary / "state.json", json.dumps({**state, "step": step}, indent=1))
        for path in temporary.glob("*.safetensors"):
            copy_permissions(temporary / "state.json", path)
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in temporary.iterdir()}
        manifest = {**(about or {}), "format": FORMAT, "step": step, "files": files}
        replace_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if target.exists():  # it was invalid when the run resumed, or the run would have resumed from it
            _set_aside(target)
        temporary.rename(target)
        flush(root)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        others = [path.name for _, path in _folders(root)]
        intact = f"{', '.join(others)} in {root} are intact" if others else "there is no earlier one"
        raise CheckpointError(f"the checkpoint of step {step} could not be written: {error}; {intact}") from error
    for _, old in _folders(root)[keep:]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def newest_valid(root: Path, *, run_id: str | None = None, set_aside: bool = True) -> tuple[int | None, list[str]]:
    """The step of the newest valid checkpoint, and the problems of newer ones.

    Args:
        root: the folder of checkpoints.
        run_id: the run it must belong to; None accepts any.
        set_aside: rename an invalid one to `step-N.broken`; it is never removed.

    Raises:
        ForeignCheckpointError: one belongs to another run or version, or could not be read now.
    """
    problems: list[str] = []
    for step, path in _folders(root):
        try:
            verify(path, step, run_id)
        except ForeignCheckpointError as error:
            raise ForeignCheckpointError("; ".join([str(error), *problems])) from error
        except INVALID as error:
            if is_transient(error):
                text = f"{path} could not be read, and may be intact: {error}; try again, or move it away"
                raise ForeignCheckpointError("; ".join([text, *problems])) from error
            renamed = f"; renamed to {_set_aside(path).name}" if set_aside else ""
            problems.append(f"{path} is invalid ({error}){renamed}")
        else:
            return step, problems
    return None, problems


def newest_intact(root: Path) -> Path | None:
    """The folder of the newest valid checkpoint, without changing anything; None if there is none.

    Raises:
        ForeignCheckpointError: one is of another version, or could not be read now.
    """
    step, _ = newest_valid(root, set_aside=False)
    return None if step is None else root / f"step-{step}"


def load_checkpoint(root: Path, step: int) -> Checkpoint:
    """Load the checkpoint of a step, which has been verified.

    Raises:
        CheckpointError: it could not be read.
    """
    path = root / f"step-{step}"
    try:
        state = read_json(path / "state.json")
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    except INVALID as error:
        raise CheckpointError(f"{path} is invalid ({error})") from error
    return Checkpoint(step, path, tensors, state)


def verify(path: Path, step: int, run_id: str | None = None) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ForeignCheckpointError: it belongs to another run or version.
        CheckpointError, KeyError, TypeError: it is damaged.
    """
    manifest = read_json(path / MANIFEST)
    if manifest["format"] != FORMAT:
        written = f"format {manifest['format']!r:.20}, not {FORMAT}"
        raise ForeignCheckpointError(f"{path} was written by another version of mnist-diffusion ({written})")
    if run_id is not None and manifest.get("run_id") != run_id:
        raise ForeignCheckpointError(f"{path} belongs to another run, {manifest.get('run_id')!r:.100}; move it away")
    expected = manifest["files"]
    if manifest["step"] != step or "state.json" not in expected:
        raise CheckpointError(f"{MANIFEST} is for step {manifest['step']!r:.20}, or lacks state.json")
    if extra := {file.name for file in path.iterdir()} - set(expected) - {MANIFEST}:
        raise CheckpointError(f"{sorted(extra)} are not in the manifest")
    for name, written in expected.items():
        file = path / name
        if file.parent != path or not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != written["size"] or _sha256(file) != written["sha256"]:
            raise CheckpointError(f"the size or SHA-256 of {name} does not match {MANIFEST}")


def _set_aside(path: Path) -> Path:
    """Rename a folder to the first free `.broken` name."""
    number = 0
    while (aside := path.with_name(f"{path.name}.broken{f'-{number}' if number else ''}")).exists():
        number += 1
    return path.rename(aside)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, the newest first."""
    if not root.is_dir():
        return []
    matches = ((NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors `index.name`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the tensors of `optimizer_state`; the options of the parameter groups stay those of the configuration.

    Each tensor takes the memory layout of its parameter, so that updates round alike.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        laid_out = torch.empty_like(like).copy_(value) if value.shape == like.shape and value.ndim else value
        state.setdefault(int(index), {})[name] = laid_out
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
