"""Find the checkpoint to resume from, and check that it belongs to this run, before anything changes."""

from __future__ import annotations

import contextlib
from typing import Any

from mnist_diffusion.config import IMAGE_FIELDS, RunConfig
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.training.checkpoint import Checkpoint, CheckpointError, newest_valid
from mnist_diffusion.training.run_folder import RunFolder

FIXED = ("data.batch_size", "data.augment", "data.balance", "train.seed", "train.optimizer")
"""Options that decide which images and draws a step sees, and what it remembers: a resumed run may not change them."""
ABOUT_IMAGES = tuple(f"data.{name}" for name in IMAGE_FIELDS)
"""Options that name the images; their fingerprint decides whether they are the same."""
LAUNCH = ("output_dir", "train.resume")
DECIDED = (
    *("train.max_steps", "train.max_epochs", "train.max_minutes"),
    *("train.mixed_precision", "train.channels_last", "train.num_threads"),
)
"""Options that a run decides itself where they are null."""


def step_to_resume(run_folder: RunFolder) -> int | None:
    """The step of the newest valid checkpoint of a run folder, on the main process; None to start at step 0.

    Raises:
        UserError: no checkpoint is valid, one is of another run, or starting again would overwrite something.
    """
    root = run_folder.path / "checkpoints"
    step, problems = newest_valid(root, run_id=run_folder.run_id)
    for problem in problems:
        print(f"warning: {problem}")
    if step is None and problems:
        advice = f"move {run_folder.path} away, or name another output_dir"
        raise CheckpointError(
            f"no checkpoint in {root} is valid, and starting again would overwrite the results: {advice}"
        )
    if step is None:
        run_folder.ensure_safe_to_overwrite()
        print(f"No checkpoint in {root}: starting at step 0")
    return step


def allowed_changes(checkpoint: Checkpoint, config: RunConfig, data_fingerprint: str, objective: str) -> str:
    """The options that have changed since a checkpoint was saved, in words.

    Args:
        checkpoint: the checkpoint.
        config: the configuration now.
        data_fingerprint: fingerprint of the images now.
        objective: name and fingerprint of the objective now.

    Raises:
        CheckpointError: one of them may not change.
    """
    then, before = checkpoint.state["data_fingerprint"], checkpoint.state["config"]
    with contextlib.suppress(ConfigError):  # options that were added since had their defaults
        before = config.from_dict(before).to_dict()
    changes = differences(before, config.to_dict())
    # If the images are the same, it does not matter how they are named.
    if then == data_fingerprint:
        changes = {name: text for name, text in changes.items() if name not in ABOUT_IMAGES}
    fixed_names = (*config.FIXED, *FIXED, *ABOUT_IMAGES)
    fixed = [text for name, text in changes.items() if name.startswith(fixed_names)]
    free = [text for name, text in changes.items() if not name.startswith(fixed_names)]
    if then != data_fingerprint:
        fixed.append(f"the images' fingerprint was {then[:16]}, now {data_fingerprint[:16]}")
    if (learned := checkpoint.state["objective"]) != objective:
        fixed.append(f"the objective was {learned}, now {objective}")
    if fixed:
        wrong = ", ".join(fixed) + (f"; these may change: {', '.join(free)}" if free else "")
        raise CheckpointError(
            f"cannot resume from {checkpoint.path} with another configuration; undo the changes, or name another "
            f"output_dir: {wrong}"
        )
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
