"""Going on from a checkpoint: verified before anything changes, and the same decision on every process."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from mnist_diffusion.checkpoint import Checkpoint, CheckpointError, load_checkpoint, newest_verified
from mnist_diffusion.config import LEADS_TO_IMAGES
from mnist_diffusion.planning import plan_steps
from mnist_diffusion.run import Run

FIXED = (
    "data.batch_size",
    "data.augment",
    "data.balance",
    "train.seed",
    "train.ema_start_step",
    "train.ema_update_every_steps",
)
"""What a resumed run may not change, beside its configuration's own: which images and draws a step sees."""

LEADING = ("data.in_memory", *(f"data.{name}" for name in LEADS_TO_IMAGES))
"""How the images are found and brought to one shape, which their fingerprint decides on."""
UNTOLD = ("output_dir", "train.resume")
"""Where the run is."""
DECIDED = ("train.max_steps", "train.max_epochs", "train.max_minutes", "train.mixed_precision")
"""What a run decides where nothing is asked: null is no change of it."""


def resume(run: Run) -> None:
    """Take up the newest checkpoint of the run folder that verifies, if there is one.

    Raises:
        CheckpointError: it is of another configuration or other images, or not every process can read it.
    """
    accelerator, root = run.learner.accelerator, run.folder / "checkpoints"
    decision: list[Any] = [None, []]
    if accelerator.is_main_process:
        decision = list(newest_verified(root, run_id=run.run_id))
    step, problems = broadcast_object_list(decision)
    for problem in problems:
        accelerator.print(f"warning: {problem}")
    if step is None and problems:
        raise CheckpointError(
            f"no checkpoint in {root} verifies, and starting again would overwrite what the run has left: move "
            f"{run.folder} away, or name another output_dir"
        )
    if step is None:
        accelerator.print(f"No checkpoint in {root}: starting at step 0")
        return
    checkpoint, problem = None, None
    try:
        checkpoint = load_checkpoint(root, step)
        _require_same_run(run, checkpoint)
    except CheckpointError as error:
        problem = str(error)
    # One process that cannot go on keeps all from it.
    if found := [each for each in gather_object([problem]) if each is not None]:
        raise CheckpointError(found[0])
    assert checkpoint is not None
    run.learner.restore(checkpoint)
    run.step, run.seconds_before = checkpoint.step, checkpoint.state["seconds"]
    run.best, run.loss, run.held_out_loss = (checkpoint.state[name] for name in ("best", "loss", "held_out_loss"))
    if pictures := sorted((run.folder / "samples").glob("step-*.png")):
        with Image.open(pictures[-1]) as picture:
            run.grid = picture.copy()
    train = run.config.train
    counted = train.max_steps is not None or train.max_epochs is not None
    run.planned_steps = (
        plan_steps(run.learner, seconds_used=run.seconds) if counted else checkpoint.state["planned_steps"]
    )
    if not counted:
        accelerator.print(f"{run.planned_steps} steps were planned; --train.max_steps sets another length")
    accelerator.print(f"Resuming from {checkpoint.path}")


def _require_same_run(run: Run, checkpoint: Checkpoint) -> None:
    """Make sure that the run can go on from the checkpoint, and say what is different about it."""
    then, now = checkpoint.state["data_fingerprint"], run.learner.data.fingerprint
    changes = differences(checkpoint.state["config"], run.config.to_dict())
    # The same images however they are named: what leads to them does not matter.
    fixed_names = (*run.config.FIXED, *FIXED, *(() if then == now else LEADING))
    told = {name: text for name, text in changes.items() if then != now or name not in LEADING}
    fixed = [change for name, change in told.items() if name.startswith(fixed_names)]
    free = [change for name, change in told.items() if not name.startswith(fixed_names)]
    if then != now:
        fixed.append(f"the images' fingerprint was {then[:16]}, now {now[:16]}")
    learned, learning = checkpoint.state.get("objective_fingerprint", ""), run.learner.objective.fingerprint
    if learned != learning:
        fixed.append(f"the teacher's fingerprint was {learned[:16]}, now {learning[:16]}")
    if fixed:
        allowed = f"; these may change: {', '.join(free)}" if free else ""
        raise CheckpointError(
            f"{checkpoint.path} cannot be gone on from with another configuration: {', '.join(fixed)}{allowed}"
        )
    if free:
        run.learner.accelerator.print(f"Changed since: {', '.join(free)}")


def differences(before: Any, after: Any, name: str = "") -> dict[str, str]:
    """The fields that differ between two plain configurations, by dotted name, each in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, str] = {}
        for key in [*before, *(key for key in after if key not in before)]:
            found |= differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
        return found
    unasked = after is None and name in DECIDED
    return {} if before == after or unasked or name in UNTOLD else {name: f"{name} was {before!r}, now {after!r}"}
