"""Save and load the state to resume from: whole or not at all, verified before it is used, without pickle.

A checkpoint is a folder `step-N` of safetensors and JSON files. It is written beside its final place, a manifest
with every file's size and SHA-256 comes last, everything is flushed to disk, and one rename makes it count.
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
from mnist_diffusion.files import flush, give_mode_of, may_pass, open_file, read_json, read_text, replace_text

FORMAT = 3
NAME = re.compile(r"step-(\d+)")
MANIFEST = "manifest.json"
INVALID = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""What reading a checkpoint raises that is not what was written."""
WRONG_CONTENT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What using a checkpoint raises that holds something else than a run's state."""


class CheckpointError(UserError):
    """A checkpoint cannot be read or does not belong to this run."""


class StandingError(CheckpointError):
    """A checkpoint may be whole, but is not for this run, this version or this moment; it stays where it is."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by file and name, and the JSON state beside them."""

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
    """Write `root/step-N`, verify it, then remove all but the newest `keep` checkpoints.

    Args:
        root: the folder of checkpoints.
        step: optimizer updates done.
        tensors: for each file, its tensors by name.
        state: what JSON can hold.
        keep: how many checkpoints to keep.
        about: what else the manifest says of the run, such as its `run_id`.

    Raises:
        CheckpointError: it could not be written, as on a full disk; the earlier checkpoints are as they were.
    """
    target, temporary = root / f"step-{step}", root / f".step-{step}.partial"
    try:
        for left_behind in root.glob(".step-*.partial"):
            shutil.rmtree(left_behind, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        replace_text(temporary / "state.json", json.dumps({**state, "step": step}, indent=1))
        for path in temporary.glob("*.safetensors"):
            give_mode_of(temporary / "state.json", path)
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in temporary.iterdir()}
        manifest = {**(about or {}), "format": FORMAT, "step": step, "files": files}
        replace_text(temporary / MANIFEST, _manifest_text(manifest))
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        _verify(temporary, step)
        if target.exists():  # it was invalid when the run resumed, or the run would have resumed from there
            _set_aside(target)
        temporary.rename(target)
        flush(root)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        others = [path.name for _, path in _folders(root)]
        intact = f"{', '.join(others)} in {root} are as they were" if others else "there is no earlier one"
        raise CheckpointError(f"the checkpoint of step {step} could not be written: {error}; {intact}") from error
    for _, old in _folders(root)[keep:]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def newest_verified(root: Path, *, run_id: str | None = None) -> tuple[int | None, list[str]]:
    """The step of the newest valid checkpoint, and what is wrong with newer ones.

    One that is invalid is set aside under the name `step-N.broken`, never removed.

    Args:
        root: the folder of checkpoints.
        run_id: what its manifest must say; None takes any.

    Raises:
        StandingError: one is another run's, of a newer format, or could not be read now.
    """
    problems: list[str] = []
    for step, path in _folders(root):
        try:
            _verify(path, step, run_id)
        except StandingError as error:
            raise StandingError("; ".join([str(error), *problems])) from error
        except INVALID as error:
            if may_pass(error):
                whole = f"{path} could not be read, and may still be whole: {error}; try again, or move it away"
                raise StandingError("; ".join([whole, *problems])) from error
            problems.append(f"{path} is invalid ({error}); set aside as {_set_aside(path).name}")
        else:
            return step, problems
    return None, problems


def newest_intact(root: Path) -> tuple[Path | None, str | None]:
    """The folder of the newest valid checkpoint and the run it belongs to, changing nothing; None if there is none.

    Raises:
        StandingError: one is of another format, or could not be read now.
    """
    for step, path in _folders(root):
        try:
            return path, _verify(path, step).get("run_id")
        except StandingError:
            raise
        except INVALID as error:
            if may_pass(error):
                raise StandingError(f"{path} could not be read, and may still be whole: {error}") from error
    return None, None


def load_checkpoint(root: Path, step: int) -> Checkpoint:
    """Load the checkpoint of a step, verified once more.

    Raises:
        CheckpointError: it is invalid.
    """
    path = root / f"step-{step}"
    try:
        manifest = _verify(path, step)
        state = read_json(path / "state.json")
        names = [Path(name) for name in manifest["files"]]
        tensors = {name.stem: load_file(path / name) for name in names if name.suffix == ".safetensors"}
    except INVALID as error:
        raise CheckpointError(f"{path} is invalid ({error})") from error
    return Checkpoint(step, path, tensors, state)


def _verify(path: Path, step: int, run_id: str | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint, every file of which is the one that was written."""
    manifest = read_json(path / MANIFEST)
    text = read_text(path / MANIFEST)
    del manifest["sha256"]
    if _manifest_text(manifest) != text:
        raise CheckpointError(f"{MANIFEST} is not the file that was written")
    if manifest["format"] != FORMAT:
        written = f"format {manifest['format']!r:.20}, not {FORMAT}"
        raise StandingError(f"{path} was written by another version of mnist-diffusion ({written}); install that one")
    if run_id is not None and manifest.get("run_id") != run_id:
        raise StandingError(f"{path} belongs to another run, {manifest.get('run_id')!r:.100}; move it away")
    if manifest["step"] != step:
        raise CheckpointError(f"it is of step {manifest['step']!r:.20}")
    expected = manifest["files"]
    if found := {file.name for file in path.iterdir()} - set(expected) - {MANIFEST}:
        raise CheckpointError(f"{sorted(found)} are not in the manifest")
    if "state.json" not in expected:
        raise CheckpointError("state.json is not in the manifest")
    for name, written in expected.items():
        file = path / name
        if file.parent != path or not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != written["size"] or _sha256(file) != written["sha256"]:
            raise CheckpointError(f"{name} is not the file that was written")
    return manifest


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as JSON, with the hash of itself."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True)


def _set_aside(path: Path) -> Path:
    """Move a folder out of the way, under a name that nothing has yet."""
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
