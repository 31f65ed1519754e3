"""The training loop: resume, then update, and run the tasks that are due, until the run is done."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from tqdm.auto import tqdm

from mnist_diffusion.config import RunConfig
from mnist_diffusion.environment import package_versions
from mnist_diffusion.errors import FileError
from mnist_diffusion.files import read_json, replace_text
from mnist_diffusion.pipelines.pipeline import is_loadable
from mnist_diffusion.training import logging, schedule
from mnist_diffusion.training.artifacts import Artifacts, Progress, copies_warning, usage, warn_on_failure
from mnist_diffusion.training.checkpoint import (
    WRONG_CONTENT,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from mnist_diffusion.training.distributed import Processes
from mnist_diffusion.training.ema import prune_after_step
from mnist_diffusion.training.probe import expected_cost
from mnist_diffusion.training.resume import allowed_changes, step_to_resume
from mnist_diffusion.training.run_folder import RunFolder, config_text, cut_metrics
from mnist_diffusion.training.signals import StopRequest, detach_stdio, stop_signals
from mnist_diffusion.training.tasks import Task, early, every

SECONDS_TO_WRITE = 2.0
"""Time for checkpoint, export and plots after the last step of a timed run."""
EVALUATIONS_PER_UPDATE = 3
"""An update costs as much as three network evaluations: forward, and backward to inputs and to weights."""


class Trainer:
    """One training run.

    Args:
        artifacts: draws, measures and exports the averaged weights; it knows the run.
    """

    def __init__(self, artifacts: Artifacts):
        self.artifacts, self.context, self.config = artifacts, artifacts.context, artifacts.config
        self.data, self.state = artifacts.data, artifacts.state
        self.accelerator, self.folder = self.context.accelerator, self.context.folder
        self.processes, self.run_folder = Processes(self.accelerator), RunFolder(self.folder)
        self.progress, self.clock = Progress(), schedule.Clock()
        self.steps_per_epoch = len(self.data.train) / self.config.data.batch_size
        self.log = logging.MetricsLog(self.accelerator, self.folder / "metrics.jsonl")

    def run(self, before_training: Callable[[], object], *, dry_run: bool = False) -> int:
        """Train until the planned steps are done or a signal comes; with `dry_run`, only print what would be done.

        Args:
            before_training: is called on the main process when nothing has been written yet.
            dry_run: print the plan and stop.

        Returns:
            The exit code: 0 if finished, 128 + its number if a signal ended the run.
        """
        self.accelerator.print(logging.describe(self.config, self.data, self.context, self.state.unet))
        if dry_run:
            self.accelerator.print(f"{expected_cost(self.state)}\n\n{self.config.to_yaml()}")
            return 0
        self.processes.on_main(before_training)
        resume = self.config.train.resume
        try:
            self.processes.on_main(lambda: self.run_folder.acquire(resume=resume))
            if resume:
                self._resume()
            self._set_config(self._resolved())
            if self.progress.step >= self._last_step:
                self.processes.on_main(self._finish_interrupted_export)
                return 0
            self.processes.on_main(lambda: self.artifacts.prepare(config_text(self.config, self.state.objective)))
            return self._loop()
        finally:
            self.run_folder.release()

    def _loop(self) -> int:
        """Update, and run the tasks that are due; the exit code."""
        progress, train, tasks = self.progress, self.config.train, self._tasks()
        logging.start_trackers(self.accelerator, self.config, self.folder, self.run_folder.run_id)
        self.processes.on_main(self._begin)
        signal_number, stopping = 0, False
        total, mute = progress.planned_steps or None, not self.processes.main
        bar = tqdm(total=total, initial=progress.step, unit="step", dynamic_ncols=True, mininterval=0.5, disable=mute)
        self.clock.skip()  # preparations do not count
        with stop_signals() as stop, bar:
            while not stopping:
                learning_rate = schedule.learning_rate_at(self.config.train, progress.step, progress.planned_steps)
                self.clock.count()
                metrics = self.state.update(progress.step, learning_rate)
                progress.step += 1
                self.clock.count_step()
                self.log.add(progress.step, progress.step / self.steps_per_epoch, learning_rate, metrics)
                bar.update()
                signal_number, stopping = self._should_stop(stop)
                due = [task for task in tasks if task.due(progress.step) or (stopping and task.at_end)]
                if signal_number:  # whoever sends a signal does not want to wait for pictures
                    due = [task for task in due if task.stage in ("save", "export")]
                if due or progress.step % train.log_every_steps == 0:
                    self.log.collect(self.state, self.processes, policy=train.on_non_finite, folder=self.folder)
                    self._carry_out([task for task in due if task.stage == "measure"])
                    self.log.write(progress, self.state, self.processes, self.config.data.batch_size)
                    self._carry_out([task for task in due if task.stage != "measure"])
                    bar.total = progress.planned_steps or None
                    bar.set_postfix(loss=f"{progress.loss:.4f}", img_s=f"{self.log.images_per_second:.0f}")
            self.processes.on_main(lambda: self._finish(signal_number))
        self.accelerator.trackers.clear()
        self.accelerator.end_training()
        return 128 + signal_number if signal_number else 0

    def _tasks(self) -> list[Task]:
        """Everything the loop does besides updates, in order. A task of your own is one line here."""
        train, per_epoch, artifacts, progress = self.config.train, self.steps_per_epoch, self.artifacts, self.progress
        sampling, averaging = every(train.sample_every, per_epoch), every(train.averages_every, per_epoch)
        soon = early(train.sample_every if train.pictures else None, per_epoch)
        scoring, scores = every(train.evaluate_every, per_epoch), train.evaluate_every is not None
        return [
            Task("measure", sampling, lambda: artifacts.measure_loss(progress, self.log), at_end=True),
            Task("measure", scoring, lambda: artifacts.evaluate(progress, self.log), at_end=scores, counted=False),
            Task("save", averaging, lambda: self.state.save_power_averages(self.folder, progress.step), at_end=True),
            Task("save", every(train.checkpoint_every, per_epoch), self._save_checkpoint, at_end=True),
            Task(
                "draw", lambda n: sampling(n) or soon(n), lambda: artifacts.draw(progress, self.log.path), at_end=True
            ),
            Task("export", every(train.snapshot_every, per_epoch), lambda: artifacts.export_snapshot(progress)),
        ]

    def _carry_out(self, tasks: list[Task]) -> None:
        """Carry out tasks on the main process, while the others wait."""
        for task in tasks:
            self.progress.seconds = self.clock.count()
            self.processes.on_main(task.work)
            self.clock.count() if task.counted else self.clock.skip()

    def _should_stop(self, stop: StopRequest) -> tuple[int, bool]:
        """The number of the signal that ends the run, 0 for none, and whether this was the last step."""
        train, clock, step = self.config.train, self.clock, self.progress.step
        limit, timed, decay = train.time_limit_minutes, schedule.is_timed(train), None
        seconds_left = math.inf if limit is None else 60 * limit - clock.count()
        if timed:
            per_image = clock.step_seconds / (EVALUATIONS_PER_UPDATE * self.config.data.batch_size)
            seconds_left -= SECONDS_TO_WRITE + self.artifacts.num_final_evaluations() * per_image
            seconds_left -= clock.step_seconds / 2  # err on the side of stopping half a step early
            decay = schedule.decay_from_clock(train, step, clock, seconds_left)
        # The processes' clocks differ: the first to decide, or to be late, decides for all.
        number, late, *agreed = self.processes.largest(stop.number, int(seconds_left <= 0), *(decay or (0, 0)))
        if agreed[1]:
            self._decide(lr_decay=tuple(agreed))
        over = bool(late) or step == self._last_step
        if over and timed and not number:  # from here on, a run of this many steps
            self._decide(max_steps=step, max_minutes=None)
        return number, over or number > 0

    def _decide(self, **train: Any) -> None:
        """Change the configuration, and write it before anything depends on it."""
        self._set_config(dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, **train)))
        self.processes.on_main(
            lambda: replace_text(self.folder / "config.yaml", config_text(self.config, self.state.objective))
        )

    def _set_config(self, config: RunConfig) -> None:
        self.config = self.artifacts.config = config
        self.progress.planned_steps = schedule.planned_steps(config, len(self.data.train))
        self._last_step = schedule.last_step(config, len(self.data.train))

    def _resolved(self) -> RunConfig:
        """The configuration with what the run decides at its start: precision, memory format, source."""
        decided = {"mixed_precision": self.accelerator.mixed_precision}
        train = dataclasses.replace(self.config.train, **decided, channels_last=bool(self.config.train.channels_last))
        data = dataclasses.replace(self.config.data, source=self.config.data.source or self.data.source_id)
        return dataclasses.replace(self.config, train=train, data=data)

    def _begin(self) -> None:
        """Write the configuration, drop results of later steps, and draw the pictures due now."""
        replace_text(self.folder / "config.yaml", config_text(self.config, self.state.objective))
        cut_metrics(self.log.path, self.progress.step)
        prune_after_step(self.folder, self.progress.step)
        if self.folder.resolve().parent == Path("runs").resolve():
            self.run_folder.link_as_latest()
        if self.progress.step == 0:
            self.artifacts.draw_first()
        elif every(self.config.train.sample_every, self.steps_per_epoch)(self.progress.step):
            self.artifacts.draw(self.progress, self.log.path)  # it may have been killed between checkpoint and pictures

    def _save_checkpoint(self) -> None:
        """Save everything a resumed run needs: weights, averages, optimizer, progress, configuration, fingerprints."""
        tensors, state = self.state.to_checkpoint()
        state |= {
            **dataclasses.asdict(self.progress),
            "config": self.config.to_dict(),
            "data_fingerprint": self.data.fingerprint,
            "objective": str(self.state.objective),
        }
        settings = json.dumps(self.config.reproducible().to_dict(), sort_keys=True)
        about = {
            "run_id": self.run_folder.run_id,
            "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
            "processes": self.accelerator.num_processes,
            "versions": package_versions(),
        }
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.folder / "checkpoints", self.progress.step, tensors, state, keep=keep, about=about)

    def _resume(self) -> None:
        """Restore the newest valid checkpoint of the run folder, if there is one; if one process cannot, none does."""
        step = self.processes.on_main(lambda: step_to_resume(self.run_folder))
        if step is not None:
            self.processes.on_all(lambda: self._restore(load_checkpoint(self.folder / "checkpoints", step)))

    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            changes = allowed_changes(checkpoint, self.config, self.data.fingerprint, str(self.state.objective))
            self.state.restore(checkpoint)
            values = {field.name: checkpoint.state[field.name] for field in dataclasses.fields(Progress)}
            self.progress = TypeAdapter(Progress).validate_python(values)
            if schedule.is_timed(train := self.config.train):  # no other length is given: as before
                then = checkpoint.state["config"]["train"]
                length = {name: then[name] for name in ("max_steps", "max_epochs")}
                length |= {name: getattr(train, name) or then[name] for name in ("max_minutes", "lr_decay")}
                self.config = dataclasses.replace(self.config, train=dataclasses.replace(train, **length))
        except (torch.OutOfMemoryError, CheckpointError):
            raise
        except WRONG_CONTENT as error:
            raise CheckpointError(f"{checkpoint.path} does not hold the state of this run: {error!r:.300}") from error
        self.clock = schedule.Clock(self.progress.seconds)
        self.accelerator.print(f"Resuming from {checkpoint.path}" + (f"\nChanges: {changes}" if changes else ""))

    def _finish(self, signal_number: int) -> None:
        """Export, draw the last pictures, and print how to use the result."""
        self.artifacts.export(self.folder / "pipeline", self.progress)
        copies = ""
        if not signal_number:
            with warn_on_failure("draw the last pictures"):
                self.artifacts.draw_last(self.progress)
            with warn_on_failure("look for copies of training images"):
                copies = copies_warning(self.artifacts)
        # All processes wait for the trackers: a launcher ends the others once one has ended with a signal's code.
        for tracker in self.accelerator.trackers:
            with warn_on_failure("close a tracker"):
                tracker.finish()
        if signal_number == signal.SIGHUP:
            detach_stdio()
        self.progress.seconds = self.clock.count()
        finished = self.progress.step >= self._last_step
        summary = logging.summary(self.config, self.data, self.context, self.progress, str(self.state.objective))
        summary |= {"finished": finished, "stopped_by_signal": signal_number or None}
        replace_text(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        lines = usage(self.artifacts.averaged, self.folder / "pipeline")
        words = logging.closing_words(self.config, self.data, self.folder, self.progress, signal_number, lines)
        print(words + (f"\n\n{copies}" if copies else ""))

    def _finish_interrupted_export(self) -> None:
        """Write any results that the run was killed before writing, and print that it is done."""
        exported, summary = self.folder / "pipeline", {}
        with contextlib.suppress(FileError):
            summary = read_json(self.folder / "summary.json")
        same = summary.get("step") == self.progress.step and not summary.get("stopped_by_signal")
        if same and is_loadable(exported):
            print(f"Finished at step {self.progress.step} already; nothing to do. The pipeline is in {exported}")
            return
        for task in self._tasks():
            if task.stage in ("draw", "export") and (task.at_end or task.due(self.progress.step)):
                task.work()
        self._finish(0)
