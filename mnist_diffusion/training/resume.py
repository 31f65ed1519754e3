"""Find the checkpoint to resume from: checked before anything changes, with the same decision on every process."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from mnist_diffusion.config import IMAGE_FIELDS, RunConfig
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.training.checkpoint import (
    WRONG_CONTENT,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_valid,
)
from mnist_diffusion.training.distributed import Processes
from mnist_diffusion.training.run_folder import RunFolder

FIXED = ("data.batch_size", "data.augment", "data.balance", "train.seed")
"""Options that decide which images and draws a step sees, so that a resumed run may not change them."""
ABOUT_IMAGES = tuple(f"data.{name}" for name in IMAGE_FIELDS)
"""Options that name the images; their fingerprint decides whether they are the same."""
LAUNCH = ("output_dir", "train.resume")
DECIDED = (
    *("train.max_steps", "train.max_epochs", "train.max_minutes"),
    *("train.mixed_precision", "train.channels_last", "train.num_threads"),
)
"""Options that a run decides itself where they are null."""


@dataclass(frozen=True)
class RunIdentity:
    """What makes two launches the same run: the configuration, the fingerprint of the images, and the objective."""

    config: RunConfig
    data_fingerprint: str
    objective: str


def load_newest(
    accelerator: Accelerator, processes: Processes, run_folder: RunFolder, identity: RunIdentity
) -> Checkpoint | None:
    """Load the newest valid checkpoint of a run folder; None if there is none at all.

    Raises:
        CheckpointError: it is of another run, or not every process can read it.
    """
    root = run_folder.path / "checkpoints"
    step, problems, obstacle = broadcast_object_list(_decision(run_folder) if processes.main else [None] * 3)
    for problem in problems:
        accelerator.print(f"warning: {problem}")
    if obstacle is not None:
        raise CheckpointError(obstacle)
    if step is None and problems:
        advice = f"move {run_folder.path} away, or name another output_dir"
        raise CheckpointError(
            f"no checkpoint in {root} is valid, and starting again would overwrite the results: {advice}"
        )
    if step is None:
        processes.on_main(run_folder.ensure_safe_to_overwrite)
        accelerator.print(f"No checkpoint in {root}: starting at step 0")
        return None
    checkpoint, problem, changes = None, None, ""
    try:
        checkpoint = load_checkpoint(root, step)
        changes = allowed_changes(checkpoint, identity)
    except CheckpointError as error:
        problem = str(error)
    except WRONG_CONTENT as error:
        problem = f"{root / f'step-{step}'} is not a checkpoint of such a run: {error!r:.300}"
    # If one process cannot resume, none does.
    if problems := [each for each in gather_object([problem]) if each is not None]:
        raise CheckpointError(problems[0])
    if changes:
        accelerator.print(f"Changes: {changes}")
    return checkpoint


def _decision(run_folder: RunFolder) -> list[Any]:
    """The step of the newest valid checkpoint, warnings, and what prevents resuming, if anything does."""
    try:
        return [*newest_valid(run_folder.path / "checkpoints", run_id=run_folder.run_id), None]
    except CheckpointError as error:
        return [None, [], str(error)]


def allowed_changes(checkpoint: Checkpoint, identity: RunIdentity) -> str:
    """The options that have changed since a checkpoint was saved, in words.

    Raises:
        CheckpointError: one of them may not change.
    """
    then, now = checkpoint.state["data_fingerprint"], identity.data_fingerprint
    before = checkpoint.state["config"]
    with contextlib.suppress(ConfigError):  # options that were added since had their defaults
        before = identity.config.from_dict(before).to_dict()
    changes = differences(before, identity.config.to_dict())
    # If the images are the same, it does not matter how they are named.
    fixed_names = (*identity.config.FIXED, *FIXED, *(() if then == now else ABOUT_IMAGES))
    changes = {name: text for name, text in changes.items() if then != now or name not in ABOUT_IMAGES}
    fixed = [text for name, text in changes.items() if name.startswith(fixed_names)]
    free = [text for name, text in changes.items() if not name.startswith(fixed_names)]
    if then != now:
        fixed.append(f"the images' fingerprint was {then[:16]}, now {now[:16]}")
    if (objective := checkpoint.state["objective"]) != identity.objective:
        fixed.append(f"the objective was {objective}, now {identity.objective}")
    if fixed:
        wrong = ", ".join(fixed) + (f"; these may change: {', '.join(free)}" if free else "")
        raise CheckpointError(f"cannot resume from {checkpoint.path} with another configuration: {wrong}")
    return ", ".join(free)


def differences(before: Any, after: Any, name: str = "") -> dict[str, str]:
    """The fields that differ between two plain configurations, by dotted name, each in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        below: dict[str, str] = {}
        for key in dict.fromkeys([*before, *after]):
            below |= differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
        return below
    unset = (after is None and name in DECIDED) or name == "train.lr_decay"
    return {} if before == after or unset or name in LAUNCH else {name: f"{name} was {before!r}, now {after!r}"}
