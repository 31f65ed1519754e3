"""Find the checkpoint to resume from: checked before anything changes, with the same decision on every process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object

from mnist_diffusion.config import IMAGE_FIELDS
from mnist_diffusion.run_folder.checkpoint import (
    WRONG_CONTENT,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_verified,
)

if TYPE_CHECKING:
    from mnist_diffusion.training.loop import TrainingLoop

FIXED = ("data.batch_size", "data.augment", "data.balance", "train.seed", "train.ema_start_step")
"""What a resumed run may not change, beside its configuration's own: which images and draws a step sees."""
ABOUT_IMAGES = ("data.in_memory", *(f"data.{name}" for name in IMAGE_FIELDS))
"""How the images are found and brought to one shape; their fingerprint decides whether they are the same."""
LAUNCH = ("output_dir", "train.resume")
"""Where the run is, which is no change."""
LENGTH = ("train.max_steps", "train.max_epochs", "train.max_minutes")
DECIDED = (*LENGTH, "train.mixed_precision", "train.num_threads")
"""What a run decides for itself where nothing is asked: null is no change."""


def load_newest(loop: TrainingLoop) -> Checkpoint | None:
    """The newest valid checkpoint of the run folder; None if there is none at all.

    Raises:
        CheckpointError: it is of another configuration or other images, or not every process can read it.
    """
    accelerator, root = loop.accelerator, loop.folder / "checkpoints"
    step, problems, standing = broadcast_object_list(_decision(loop) if accelerator.is_main_process else [None] * 3)
    for problem in problems:
        accelerator.print(f"warning: {problem}")
    if standing is not None:
        raise CheckpointError(standing)
    if step is None and problems:
        left = "starting again would overwrite what the run has left"
        advice = f"move {loop.folder} away, or name another output_dir"
        raise CheckpointError(f"no checkpoint in {root} is valid, and {left}: {advice}")
    if step is None:
        loop.processes.on_main(loop.held.require_nothing_to_lose)
        accelerator.print(f"No checkpoint in {root}: starting at step 0")
        return None
    checkpoint, problem = None, None
    try:
        checkpoint = load_checkpoint(root, step)
        _require_same_run(loop, checkpoint)
    except CheckpointError as error:
        problem = str(error)
    except WRONG_CONTENT as error:
        problem = f"{root / f'step-{step}'} is no checkpoint of such a run: {error!r:.300}"
    # If one process cannot resume, none does.
    if found := [each for each in gather_object([problem]) if each is not None]:
        raise CheckpointError(found[0])
    return checkpoint


def _decision(loop: TrainingLoop) -> list[Any]:
    """The step of the newest valid checkpoint, warnings, and what stands in the way of resuming, if anything does."""
    try:
        return [*newest_verified(loop.folder / "checkpoints", run_id=loop.held.run_id), None]
    except CheckpointError as error:
        return [None, [], str(error)]


def _require_same_run(loop: TrainingLoop, checkpoint: Checkpoint) -> None:
    """Make sure that the run can resume from the checkpoint, and print what has changed since."""
    then, now = checkpoint.state["data_fingerprint"], loop.data.fingerprint
    changes = differences(checkpoint.state["config"], loop.config.to_dict())
    # If the images are the same, it does not matter how they are named.
    fixed_names = (*loop.config.FIXED, *FIXED, *(() if then == now else ABOUT_IMAGES))
    changes = {name: text for name, text in changes.items() if then != now or name not in ABOUT_IMAGES}
    fixed = [text for name, text in changes.items() if name.startswith(fixed_names)]
    free = [text for name, text in changes.items() if not name.startswith(fixed_names)]
    learned, learning = checkpoint.state["objective_fingerprint"], loop.state.objective.fingerprint
    for whose, before, after in (("images'", then, now), ("teacher's", learned, learning)):
        if before != after:
            fixed.append(f"the {whose} fingerprint was {before[:16]}, now {after[:16]}")
    if fixed:
        wrong = ", ".join(fixed) + (f"; these may change: {', '.join(free)}" if free else "")
        raise CheckpointError(f"cannot resume from {checkpoint.path} with another configuration: {wrong}")
    if free:
        loop.accelerator.print(f"Changed since: {', '.join(free)}")


def differences(before: Any, after: Any, name: str = "") -> dict[str, str]:
    """The fields that differ between two plain configurations, by dotted name, each in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*before, *after]):
            found |= differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
        return found
    unasked = (after is None and name in DECIDED) or name == "train.lr_lines"
    return {} if before == after or unasked or name in LAUNCH else {name: f"{name} was {before!r}, now {after!r}"}
