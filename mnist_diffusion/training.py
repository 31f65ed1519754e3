"""The loop, in the order a reader expects: plan, resume, then step, report, save, until done.

It is given a `Learner`, which knows how to make one update, and an objective through it; it knows no diffusion.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.checkpoint import save_checkpoint
from mnist_diffusion.config import RunConfig, UserError
from mnist_diffusion.evaluation.monitor import Monitor
from mnist_diffusion.folder import RunFolder
from mnist_diffusion.gallery import show_animation, show_at_the_end, show_beforehand, show_curves, show_samples
from mnist_diffusion.learner import Learner
from mnist_diffusion.planning import learning_rate_at, plan_steps
from mnist_diffusion.product import PipelineProduct, Product
from mnist_diffusion.records import MetricsLog, package_versions, start_trackers, write_whole
from mnist_diffusion.resuming import resume
from mnist_diffusion.run import Run, reproducible
from mnist_diffusion.signals import stop_signals
from mnist_diffusion.summary import card_values, summarise
from mnist_diffusion.together import Together


def train(
    config: RunConfig,
    learner: Learner,
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
    together = Together(learner.accelerator)
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


def _loop(run: Run, together: Together) -> int:
    """Step, report, save, until done; the exit code."""
    config, learner, folder = run.config, run.learner, run.folder
    main = learner.accelerator.is_main_process
    together.on_main(lambda: write_whole(folder / "config.yaml", reproducible(config).to_yaml()))
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


def _collect(run: Run, together: Together, pending: list[dict[str, Tensor]], log: MetricsLog) -> list[dict[str, Any]]:
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


def _log(run: Run, together: Together, log: MetricsLog, lines: list[dict[str, Any]]) -> None:
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
