"""The training loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.config import IMAGE_FIELDS, HubConfig, RunConfig
from mnist_diffusion.environment import package_versions
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.evaluate import Monitor
from mnist_diffusion.files import replace_text
from mnist_diffusion.pictures.pipelines import PipelineProduct, Product
from mnist_diffusion.run_folder.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_verified,
    save_checkpoint,
)
from mnist_diffusion.run_folder.lock import RunFolder
from mnist_diffusion.run_folder.metrics import MetricsLog
from mnist_diffusion.training.length import learning_rate_at, plan_steps, steps_of_epochs
from mnist_diffusion.training.processes import Processes
from mnist_diffusion.training.report import (
    card_values,
    show_animation,
    show_at_the_end,
    show_beforehand,
    show_curves,
    show_samples,
    start_trackers,
    summarise,
)
from mnist_diffusion.training.signals import stop_signals
from mnist_diffusion.training.state import TrainState

FIXED = (
    "data.batch_size",
    "data.augment",
    "data.balance",
    "train.seed",
    "train.ema_start_step",
    "train.ema_update_every_steps",
)
"""What a resumed run may not change, beside its configuration's own: which images and draws a step sees."""

LEADING = ("data.in_memory", *(f"data.{name}" for name in IMAGE_FIELDS))
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


@dataclass
class Run:
    """One training run on its way.

    Args:
        config: the run.
        learner: network, average and optimizer.
        product: what is made of the averaged weights.
        folder: the run folder.
        recipe: name of the recipe, for titles.
        card: further values of the model card.
        on_snapshot: told of each snapshot's folder.
        run_id: tells its checkpoints from those of other runs.
        planned_steps: how many updates the learning rate is shaped for.
        step: updates done.
        seconds_before: training time of earlier launches.
    """

    config: RunConfig
    learner: TrainState
    product: Product
    folder: Path
    recipe: str
    card: Mapping[str, Any] = field(default_factory=dict)
    on_snapshot: Callable[[Path], None] | None = None
    run_id: str | None = None
    planned_steps: int = 0
    step: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    loss: float | None = None
    held_out_loss: float | None = None
    grid: Image.Image | None = None
    monitor: Monitor | None = None
    measured: dict[str, float] = field(default_factory=dict)
    best: float | None = None

    @property
    def seconds(self) -> float:
        """Training time over all launches, planning included."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def last_step(self) -> int:
        """The step at which the run is finished."""
        ends = [self.planned_steps]
        if self.config.train.max_epochs is not None:
            images, batch_size = len(self.learner.data.train), self.config.data.batch_size
            ends.append(steps_of_epochs(self.config.train.max_epochs, images, batch_size))
        return min(ends)

    def due(self, what: str) -> bool:
        """Whether `what` (checkpoint, sample, snapshot) comes after this step."""
        steps = getattr(self.config.train, f"{what}_every_steps")
        epochs = getattr(self.config.train, f"{what}_every_epochs")
        if steps is not None and self.step % steps == 0:
            return True
        if epochs is None:
            return False
        images, batch_size = len(self.learner.data.train), self.config.data.batch_size
        passed = [math.floor(step * batch_size / images / epochs) for step in (self.step - 1, self.step)]
        return passed[0] < passed[1]

    @property
    def animates(self) -> bool:
        """Whether an animation comes after this step."""
        before, now = (
            step * self.config.data.batch_size / len(self.learner.data.train) for step in (self.step - 1, self.step)
        )
        return any(before < epoch <= now for epoch in self.config.train.animate_at_epochs)

    def out_of_time(self) -> bool:
        """Whether `max_minutes`, beside a number of steps or epochs, has passed."""
        minutes = self.config.train.time_limit_minutes
        return minutes is not None and self.seconds > 60 * minutes


def reproducible(config: RunConfig) -> RunConfig:
    """The configuration to save: a run from it is this run again, in a folder of its own, and is not published."""
    train = dataclasses.replace(config.train, resume=False)
    return dataclasses.replace(config, train=train, hub=HubConfig(), output_dir=None)


def train(
    config: RunConfig,
    learner: TrainState,
    product: Product,
    folder: Path,
    *,
    recipe: str = "default",
    card: Mapping[str, Any] | None = None,
    on_snapshot: Callable[[Path], None] | None = None,
) -> int:
    """Train until the planned steps are done or a signal comes, and leave a folder to load.

    Args:
        config: the run.
        learner: network, average and optimizer, with the objective.
        product: what is made of the averaged weights, to look at and to leave behind.
        folder: the run folder; made here, resumed from where the configuration says so.
        recipe: name of the recipe.
        card: further values of the model card.
        on_snapshot: told of each snapshot's folder, when it is there.

    Returns:
        The exit code: 0 finished, 128 + the signal's number where one ended it.
    """
    together = Processes(learner.accelerator)
    held = RunFolder(folder, learner.accelerator, resume=True) if config.train.resume else None
    try:
        run = Run(config, learner, product, folder, recipe, card or {}, on_snapshot)
        if held is not None:
            run.run_id = held.run_id
            resume(run)
        if run.step == 0:
            run.planned_steps = plan_steps(learner, seconds_used=run.seconds)
        run.config = _resolved(run)
        if run.step >= run.last_step:
            together.on_main(lambda: _complete(run))
            return 0
        if config.train.evaluates:
            together.on_main(lambda: _make_monitor(run))
        held = held or RunFolder(folder, learner.accelerator, resume=False)
        run.run_id = held.run_id
        return _loop(run, together)
    finally:
        if held is not None:
            held.release()


def _complete(run: Run) -> None:
    """Say that a run is finished; write again what it was killed before writing."""
    summary = run.folder / "summary.json"
    told = json.loads(summary.read_text(encoding="utf-8"))["step"] if summary.is_file() else None
    made = run.folder / run.product.folder_name
    if told != run.step or not (made / "README.md").is_file():
        _save_product(run, made)
        summarise(run, 0)
    print(f"Finished at step {run.step} already; nothing to do. The {run.product.folder_name} is in {made}")


def _loop(run: Run, together: Processes) -> int:
    """Step, report, save, until done; the exit code."""
    config, learner, folder = run.config, run.learner, run.folder
    main = learner.accelerator.is_main_process
    together.on_main(lambda: replace_text(folder / "config.yaml", reproducible(config).to_yaml()))
    log = MetricsLog(folder / "metrics.jsonl")
    together.on_main(lambda: log.cut_after(run.step))
    start_trackers(learner.accelerator, config.to_dict(), run_name=folder.name, run_id=run.run_id)
    if run.step == 0:
        together.on_main(lambda: show_beforehand(run))
    pending: list[dict[str, Tensor]] = []
    since, signal_number = time.perf_counter(), 0

    with (
        stop_signals() as stop,
        tqdm(
            total=run.last_step, initial=run.step, unit="step", disable=not main, dynamic_ncols=True, mininterval=0.5
        ) as bar,
    ):
        while run.step < run.last_step:
            pending.append(learner.update(run.step, learning_rate_at(config.train, run.step, run.planned_steps)))
            run.step += 1
            bar.update()

            signal_number, out_of_time = together.largest(stop.number, int(run.out_of_time()))
            over = bool(signal_number or out_of_time) or run.step == run.last_step
            finished = over and not signal_number  # who sends a signal does not want to wait for pictures
            sample = not signal_number and (run.due("sample") or finished)
            evaluate = not signal_number and (run.due("evaluate") or (config.train.evaluates and finished))
            animate = not signal_number and run.animates
            checkpoint, snapshot = run.due("checkpoint") or over, run.due("snapshot")
            report = run.step % config.train.log_every_steps == 0

            if report or sample or evaluate or checkpoint or snapshot:
                lines = _collect(run, together, pending, log)
                lines[-1]["images_per_second"] = round(
                    len(lines) * config.data.batch_size / (time.perf_counter() - since), 1
                )
                if sample:
                    together.on_main(lambda: _sample(run))
                if evaluate:
                    together.on_main(lambda: _evaluate(run))
                _log(run, together, log, lines)
                if sample:
                    together.on_main(lambda: show_curves(run))
                bar.set_postfix(loss=f"{run.loss:.4f}", img_s=f"{lines[-1]['images_per_second']:.0f}")
                pending, since = [], time.perf_counter()
            if checkpoint:
                together.on_main(lambda: _checkpoint(run), saving=True)
            if animate:
                together.on_main(lambda: show_animation(run))
            if snapshot:
                together.on_main(lambda: _snapshot(run))
            if over:
                break

        together.on_main(lambda: _save_product(run, folder / run.product.folder_name))
        if not signal_number:
            together.on_main(lambda: show_at_the_end(run))
        together.on_main(lambda: summarise(run, signal_number))
        # All wait for the trackers: a launcher ends the others as soon as one has ended with a signal's code.
        together.on_main(lambda: [tracker.finish() for tracker in learner.accelerator.trackers])
        learner.accelerator.trackers.clear()
        learner.accelerator.end_training()
    return 128 + signal_number if signal_number else 0


def _resolved(run: Run) -> RunConfig:
    """The configuration with what the run has decided: the planned steps, the precision, the source."""
    train = run.config.train
    if train.max_steps is None and train.max_epochs is None:
        train = dataclasses.replace(train, max_steps=run.planned_steps, max_minutes=None)
    train = dataclasses.replace(train, mixed_precision=run.learner.accelerator.mixed_precision)
    data = dataclasses.replace(run.config.data, source=run.config.data.source or run.learner.data.source_id)
    return dataclasses.replace(run.config, train=train, data=data)


NEVER = 2**62


class NonFiniteError(UserError):
    """The loss or its gradient became NaN or infinite."""


def _collect(run: Run, together: Processes, pending: list[dict[str, Tensor]], log: MetricsLog) -> list[dict[str, Any]]:
    """The lines of the steps since the last report, losses averaged over processes, one exchange for all.

    Raises:
        NonFiniteError: a step was not finite, and the run is to stop there; the lines before it are written.
    """
    accelerator, train = run.learner.accelerator, run.config.train
    names = list(pending[0])
    stacked = torch.stack([torch.stack([measured[name].float() for name in names]) for measured in pending])
    values = accelerator.reduce(stacked, reduction="mean").tolist()
    # The smallest over the processes: a bad gradient of one makes all of them bad a step later.
    first_bad = int(run.learner.first_bad_step)
    bad_step = -together.largest(-first_bad if first_bad >= 0 else -NEVER)[0]
    batch_size, images = run.config.data.batch_size, len(run.learner.data.train)
    lines: list[dict[str, Any]] = []
    for offset, row in enumerate(values):
        step = run.step - len(values) + offset + 1
        if step == bad_step and train.on_non_finite == "stop":
            together.on_main(lambda: log.append(lines))
            cause = ", ".join(f"{name} {value}" for name, value in zip(names, row, strict=True))
            raise NonFiniteError(
                f"step {step} was not finite ({cause}); stopped before anything of it was saved. Go on from an earlier "
                f"checkpoint in {run.folder / 'checkpoints'} with a lower train.learning_rate or train.max_grad_norm, "
                "or with train.on_non_finite=skip"
            )
        line: dict[str, Any] = {"step": step, "epoch": round(step * batch_size / images, 4)}
        line |= {name: value if math.isfinite(value) else None for name, value in zip(names, row, strict=True)}
        line["learning_rate"] = learning_rate_at(train, step - 1, run.planned_steps)
        lines.append(line)
    return lines


def _log(run: Run, together: Processes, log: MetricsLog, lines: list[dict[str, Any]]) -> None:
    """Write the lines, and what was measured after the last of them, to the file and the trackers."""
    lines[-1] |= run.measured
    run.measured = {}
    if (by_noise := run.learner.take_loss_by_noise()) is not None:
        lines[-1]["loss_by_noise"] = by_noise
    finite = [line["loss"] for line in lines if line["loss"] is not None]
    run.loss = sum(finite) / len(finite) if finite else math.nan
    told = {**lines[-1], "loss": run.loss}
    for level, value in enumerate(told.pop("loss_by_noise", [])):
        told[f"loss_by_noise/{level}"] = value
    run.learner.accelerator.log({name: value for name, value in told.items() if value is not None}, step=run.step)
    together.on_main(lambda: log.append(lines))


def _sample(run: Run) -> None:
    """Held-out loss and pictures of what the averaged weights do."""
    if run.config.train.num_eval_images > 0:
        run.held_out_loss = run.measured["held_out_loss"] = run.learner.held_out_loss()
    show_samples(run)


def _make_monitor(run: Run) -> None:
    """Before the first step, so that what cannot work is said before any work is lost."""
    train = run.config.train
    assert isinstance(run.product, PipelineProduct)  # the configuration refuses to evaluate others
    pipeline = run.product.pipeline(run.learner.average())
    run.monitor = Monitor(pipeline, run.learner.data, num_images=train.num_evaluation_images, seed=train.seed)


def _evaluate(run: Run) -> None:
    """Measure images of the averaged weights, and keep the pipeline if none was better."""
    assert run.monitor is not None
    run.learner.average()
    measured = run.monitor.measure()
    run.measured |= measured
    metric = run.config.train.best_metric
    better = min if metric == "fid" else max
    if run.best is None or better(measured[metric], run.best) != run.best:
        run.best = measured[metric]
        _save_product(run, run.folder / "pipeline_best")


def _checkpoint(run: Run) -> None:
    """Save the state to resume from."""
    tensors, state = run.learner.state()
    state |= {
        "planned_steps": run.planned_steps,
        "seconds": run.seconds,
        "best": run.best,
        "loss": run.loss,
        "held_out_loss": run.held_out_loss,
        "config": run.config.to_dict(),
        "data_fingerprint": run.learner.data.fingerprint,
        "objective_fingerprint": run.learner.objective.fingerprint,
    }
    settings = json.dumps(reproducible(run.config).to_dict(), sort_keys=True)
    about = {
        "run_id": run.run_id,
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        "processes": run.learner.accelerator.num_processes,
        "versions": package_versions(),
    }
    keep = run.config.train.keep_checkpoints
    save_checkpoint(run.folder / "checkpoints", run.step, tensors, state, keep=keep, about=about)


def _snapshot(run: Run) -> None:
    """Keep what the averaged weights make now."""
    folder = run.folder / "snapshots" / f"step-{run.step}"
    _save_product(run, folder)
    if run.on_snapshot is not None:
        run.on_snapshot(folder)


def _save_product(run: Run, folder: Path) -> None:
    run.product.save(run.learner.average(), folder, card=card_values(run, folder), samples=run.grid)
