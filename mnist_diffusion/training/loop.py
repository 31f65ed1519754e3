"""The training loop: plan, resume, then step, report and save until the run is done.

`TrainingLoop` knows nothing of diffusion: it is given an objective, and what is drawn, measured and exported is up to
its subclass. `training.trainer.Trainer` is the one for pipelines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.checks import parse_interval
from mnist_diffusion.config import HubConfig, RunConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.diffusion.objective import Objective
from mnist_diffusion.environment import package_versions, set_num_threads
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import read_json, replace_text
from mnist_diffusion.run_folder.checkpoint import WRONG_CONTENT, Checkpoint, CheckpointError, save_checkpoint
from mnist_diffusion.run_folder.lock import RunFolder
from mnist_diffusion.run_folder.metrics import append_metrics, cut_metrics
from mnist_diffusion.run_folder.read import OBJECTIVE
from mnist_diffusion.training import length, report
from mnist_diffusion.training.averages import forget_after
from mnist_diffusion.training.launch import Launch
from mnist_diffusion.training.probe import choose_threads, expected_cost
from mnist_diffusion.training.processes import Processes
from mnist_diffusion.training.publish import Publisher
from mnist_diffusion.training.resume import load_newest
from mnist_diffusion.training.signals import StopRequest, leave_terminal, stop_signals
from mnist_diffusion.training.state import TrainState

NEVER = 2**62
SECONDS_TO_WRITE = 2.0
"""For checkpoint, export and plots at the end of a run."""
PASSES_PER_UPDATE = 3
"""Network passes that an update of one image is worth: forward, and backward to inputs and to weights."""


@contextlib.contextmanager
def warned_of(work: str) -> Iterator[None]:
    """Let a run go on when work fails that it does not depend on; a warning says what is missing, and why."""
    try:
        yield
    except Exception as error:
        print(f"warning: {work} failed, and the run goes on without: {error!r:.300}", file=sys.stderr)


class NonFiniteError(UserError):
    """The loss or its gradient became NaN or infinite."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; a checkpoint holds it.

    Args:
        planned_steps: how many updates the learning rate is shaped for; 0 while the time has not decided it.
        seconds: training time of earlier launches.
        best: the best value of `train.best_metric` so far.
        loss: mean loss since the report before the last.
        held_out_loss: loss on held-out images when samples were last drawn.
    """

    planned_steps: int = 0
    seconds: float = 0.0
    best: float | None = None
    loss: float | None = None
    held_out_loss: float | None = None


class TrainingLoop:
    """One training run.

    Args:
        launch: its processes, device and folder.
        config: the run.
        data: the images.
        unet: the network, with the weights to start from.
        objective: what it learns.
    """

    exported = "pipeline"
    """The folder in the run folder that [`export`] writes at the end."""

    def __init__(self, launch: Launch, config: RunConfig, data: ImageData, unet: UNet2DModel, objective: Objective):
        self.accelerator, self.folder, self.recipe = launch.accelerator, launch.folder, launch.recipe
        self.config, self.data = config, data
        self.state = TrainState(config, self.accelerator, data, unet, objective)
        self.processes = Processes(self.accelerator)
        self.step, self.progress = 0, Progress()
        self.clock = length.Clock()
        self.measured: dict[str, float] = {}
        self.held, self.log = RunFolder(self.folder), self.folder / "metrics.jsonl"

    # What a subclass adds. The main process calls these; `export` is the only one that it must have.

    def prepare(self) -> None:
        """Get ready for the first step, and raise what would fail later."""

    def draw_before(self) -> None:
        """Draw what does not change while training."""

    def draw_samples(self) -> None:
        """Draw what the averaged weights do now."""

    def draw_curves(self) -> None:
        """Draw what has been logged so far."""

    def draw_animation(self) -> None:
        """Draw how the samples of this step form."""

    def draw_at_the_end(self) -> None:
        """Draw a finished run."""

    def evaluate(self) -> None:
        """Measure images of the averaged weights."""

    def export(self, folder: Path) -> None:
        """Write the averaged weights, in place of what `folder` may hold, in a form that others load."""
        raise NotImplementedError

    def is_whole(self, folder: Path) -> bool:
        """Whether what was exported is there, and can be loaded."""
        return folder.is_dir()

    def passes_at_the_end(self) -> int:
        """Network passes over one image, in drawing and measuring, that come when the last step is done."""
        return self.config.train.num_eval_images

    def usage(self) -> str:
        """Lines of Python that load and use what was exported."""
        return ""

    # The run.

    def run(self, *, dry_run: bool = False) -> int:
        """Train until the planned steps are done or a signal comes, or with `dry_run` only say what would be done.

        Returns:
            The exit code: 0 if finished, 128 + the signal's number if one ended the run.
        """
        self.accelerator.print(report.describe(self))
        if dry_run:
            self.accelerator.print(f"{expected_cost(self.state)}\n\n{self.config.to_yaml()}")
            return 0
        self.publisher = Publisher(self.config.hub, self.folder, self.processes)
        if (code := self._train()) == 0:
            self.publisher.finish()
        return code

    def _train(self) -> int:
        self.clock = length.Clock()
        resume = self.config.train.resume
        try:
            if resume:
                self.processes.on_main(lambda: self.held.hold(resume=True))
                self._resume()
            if self.step == 0:
                self.progress.planned_steps = length.planned_steps(self.config, len(self.data.train))
            self.config = self._resolved()
            if self.step >= self.last_step:
                self.processes.on_main(self._complete)
                return 0
            self.processes.on_main(self.prepare)
            self.clock.passed()  # as the time of evaluations, that of getting ready for them is not counted
            if not resume:
                self.processes.on_main(lambda: self.held.hold(resume=False))
            return self._loop()
        finally:
            self.held.release()

    def _loop(self) -> int:
        """Step, report, save, until done; the exit code."""
        self.processes.on_main(self.write_config)
        self.processes.on_main(lambda: cut_metrics(self.log, self.step))
        self.processes.on_main(lambda: forget_after(self.folder, self.step))
        report.start_trackers(self)
        if self.step == 0:
            self.processes.on_main(self._draw_first)
        elif self._passes("sample_every"):  # it may have been killed between save and pictures
            self.processes.on_main(self._draw)
        if self.config.output_dir is None:
            self.processes.on_main(self.held.link_as_latest)
        pending: list[dict[str, Tensor]] = []
        since, signal_number = time.perf_counter(), 0
        with stop_signals() as stop, self._progress_bar() as bar:
            while self.step < self.last_step:
                rate = length.learning_rate_at(self.config.train, self.step, self.progress.planned_steps)
                self.clock.now()
                pending.append(self.state.update(self.step, rate))
                self.step += 1
                self.clock.end_step()
                bar.update()

                signal_number, over = self._is_over(stop)
                due = self._due(over=over, interrupted=signal_number > 0)
                if due:
                    lines = self._collect(pending)
                    speed = len(lines) * self.config.data.batch_size / (time.perf_counter() - since)
                    lines[-1]["images_per_second"] = round(speed, 1)
                    self._do(due, sample=self._measure)
                    self.clock.now()
                    self._do(due, evaluate=self._evaluate)
                    self.clock.passed()  # an evaluation's time comes on top
                    self._log(lines)
                    self._do(due, averages=self._keep_averages)  # before the checkpoint, or a kill could lose them
                    bar.total = self.progress.planned_steps or None
                    bar.set_postfix(loss=f"{self.progress.loss:.4f}", img_s=f"{speed:.0f}")
                    if "checkpoint" in due:
                        self.processes.on_main(self._checkpoint, saving=True)
                    self.processes.on_main(partial(self._after_save, due))
                    pending, since = [], time.perf_counter()
                if over:
                    break
            self.processes.on_main(lambda: self._finish(signal_number))
        self.accelerator.trackers.clear()
        self.accelerator.end_training()
        return 128 + signal_number if signal_number else 0

    def _do(self, due: set[str], **works: Callable[[], object]) -> None:
        """On the main process, one after the other, what of `works` is due."""
        for name, work in works.items():
            if name in due:
                self.processes.on_main(work)

    def _progress_bar(self) -> Any:
        look: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5, "initial": self.step}
        return tqdm(total=self.progress.planned_steps or None, disable=not self.processes.main, **look)

    def _is_over(self, stop: StopRequest) -> tuple[int, bool]:
        """The number of the signal that ends the run, 0 for none, and whether this was the last step."""
        train, limit, line = self.config.train, self.config.train.time_limit_minutes, None
        left = math.inf if limit is None else 60 * limit - self.clock.now()
        if self.timed:
            left -= self.seconds_at_the_end() + self.clock.step_seconds / 2  # rather half a step too few than too many
            if self.processes.main:
                speed = 1 / self.clock.step_seconds
                line = length.next_line(train, self.step, used=self.clock.counted, left=left, speed=speed)
        signal_number, late, decided = self.processes.largest(stop.number, int(left <= 0), int(line is not None))
        if decided:
            [line] = broadcast_object_list([line])
            self._decide(lr_lines=(*train.lr_lines, line))
        over = bool(late) or self.step == self.last_step
        if over and self.timed and not signal_number:  # from here on, a run of so many steps
            self._decide(max_steps=self.step, max_minutes=None)
        return signal_number, over or signal_number > 0

    def _decide(self, **train: Any) -> None:
        """Change the configuration, and write it down before anything depends on it."""
        self.config = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, **train))
        self.progress.planned_steps = length.planned_steps(self.config, len(self.data.train))
        self.processes.on_main(self.write_config)

    def _due(self, *, over: bool, interrupted: bool) -> set[str]:
        """What comes after this step."""
        train = self.config.train
        regular = ("checkpoint", "sample", "evaluate", "snapshot", "averages")
        due = {name for name in regular if self._passes(f"{name}_every")}
        if any(self._epochs(self.step - 1) < epoch <= self._epochs(self.step) for epoch in train.animate_at_epochs):
            due.add("animation")
        if over:
            due |= {"checkpoint", "sample"}
            due |= {name for name in ("evaluate", "averages") if getattr(train, f"{name}_every") is not None}
        if "sample" in due or self._is_early():
            due.add("draw")
        if interrupted:  # who sends a signal does not want to wait for pictures
            due -= {"sample", "evaluate", "draw", "animation"}
        return due | ({"report"} if self.step % train.log_every_steps == 0 else set())

    def _passes(self, option: str) -> bool:
        """Whether this step completes another interval of `train.<option>`."""
        if (interval := getattr(self.config.train, option)) is None:
            return False
        count, unit = parse_interval(interval, f"train.{option}")
        before, now = (place if unit == "steps" else self._epochs(place) for place in (self.step - 1, self.step))
        return math.floor(before / count) < math.floor(now / count)

    def _is_early(self) -> bool:
        """Whether this step is half, a quarter or an eighth of the first interval of samples: most is learned then."""
        if self.config.train.sample_every is None or not self.config.train.pictures:
            return False
        count, unit = parse_interval(self.config.train.sample_every, "train.sample_every")
        before, now = (place if unit == "steps" else self._epochs(place) for place in (self.step - 1, self.step))
        return any(before < count / part <= now for part in (2, 4, 8))

    def _epochs(self, step: int) -> float:
        return step * self.config.data.batch_size / len(self.data.train)

    @property
    def timed(self) -> bool:
        """Whether the time alone ends the run."""
        return self.config.train.max_steps is None and self.config.train.max_epochs is None

    def seconds_at_the_end(self) -> float:
        """How long it will take to draw, measure and write when the last step is done."""
        a_pass = self.clock.step_seconds / (PASSES_PER_UPDATE * self.config.data.batch_size)
        return SECONDS_TO_WRITE + self.passes_at_the_end() * a_pass

    @property
    def last_step(self) -> int:
        """The step at which the run is finished."""
        planned = self.progress.planned_steps or NEVER
        if (epochs := self.config.train.max_epochs) is None:
            return planned
        return min(planned, length.steps_of_epochs(epochs, len(self.data.train), self.config.data.batch_size))

    def reproducible_config(self) -> RunConfig:
        """The configuration to save: a run from it is this run again, in a folder of its own, and is not published."""
        train = dataclasses.replace(self.config.train, resume=False)
        return dataclasses.replace(self.config, train=train, hub=HubConfig(), output_dir=None)

    # The steps of the loop.

    def _resolved(self) -> RunConfig:
        """The configuration with what the run decides at its start: the precision, the source, and if it is timed
        the threads and the warm-up."""
        train = self.config.train
        if self.timed:
            lines, threads = train.lr_lines or length.warm_up(train), train.num_threads or choose_threads(self.state)
            train = dataclasses.replace(train, num_threads=threads, lr_lines=lines)
        train = dataclasses.replace(train, mixed_precision=self.accelerator.mixed_precision)
        data = dataclasses.replace(self.config.data, source=self.config.data.source or self.data.source_id)
        return dataclasses.replace(self.config, train=train, data=data)

    def write_config(self, path: Path | None = None) -> None:
        """Write down the configuration, under the name of what is learned."""
        config = f"{OBJECTIVE}{self.state.objective}\n{self.reproducible_config().to_yaml()}"
        replace_text(path or self.folder / "config.yaml", config)

    def _collect(self, pending: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """The lines of the steps since the last report, losses averaged over processes, in one exchange.

        Raises:
            NonFiniteError: a step was not finite, and the run is to stop there; the lines before it are written.
        """
        names, train = list(pending[0]), self.config.train
        stacked = torch.stack([torch.stack([measured[name].float() for name in names]) for measured in pending])
        values = self.accelerator.reduce(stacked, reduction="mean").tolist()
        # The smallest over the processes: a bad gradient of one makes all of them bad a step later.
        first_bad = int(self.state.first_bad_step)
        bad_step = -self.processes.largest(-first_bad if first_bad >= 0 else -NEVER)[0]
        lines: list[dict[str, Any]] = []
        for step, row in enumerate(values, self.step - len(values) + 1):
            if step == bad_step and train.on_non_finite == "stop":
                self.processes.on_main(lambda: append_metrics(self.log, lines))
                cause = ", ".join(f"{name} {value}" for name, value in zip(names, row, strict=True))
                raise NonFiniteError(
                    f"step {step} was not finite ({cause}); the run stopped before saving anything of it. Resume from "
                    f"an earlier checkpoint in {self.folder / 'checkpoints'} with a lower train.learning_rate or "
                    "train.max_grad_norm, or with train.on_non_finite=skip"
                )
            finite = {name: value if math.isfinite(value) else None for name, value in zip(names, row, strict=True)}
            rate = length.learning_rate_at(train, step - 1, self.progress.planned_steps)
            lines.append({"step": step, "epoch": round(self._epochs(step), 4), **finite, "learning_rate": rate})
        return lines

    def _log(self, lines: list[dict[str, Any]]) -> None:
        """Write the lines, and what was measured after the last of them, to the file and the trackers."""
        lines[-1] |= self.measured
        self.measured = {}
        if (by_noise := self.state.take_loss_by_noise()) is not None:
            lines[-1]["loss_by_noise"] = by_noise
        finite = [line["loss"] for line in lines if line["loss"] is not None]
        self.progress.loss = sum(finite) / len(finite) if finite else math.nan
        tracked = {**lines[-1], "loss": self.progress.loss}
        tracked |= {f"loss_by_noise/{level}": value for level, value in enumerate(tracked.pop("loss_by_noise", []))}
        with warned_of("tracking"):
            self.accelerator.log({name: value for name, value in tracked.items() if value is not None}, step=self.step)
        self.processes.on_main(lambda: append_metrics(self.log, lines))

    def _after_save(self, due: set[str] | None = None) -> None:
        """What comes after a checkpoint: the pictures and the snapshot of this step, if they are due."""
        due = self._due(over=False, interrupted=False) if due is None else due
        for name, work in (("draw", self._draw), ("animation", self._animate), ("snapshot", self._snapshot)):
            if name in due:
                work()

    def _draw_first(self) -> None:
        with warned_of("drawing"):
            self.draw_before()

    def _measure(self) -> None:
        if self.config.train.num_eval_images > 0:
            self.progress.held_out_loss = self.measured["held_out_loss"] = self.state.held_out_loss()

    def _evaluate(self) -> None:
        with warned_of("evaluating"):
            self.evaluate()

    def _draw(self) -> None:
        with warned_of("drawing"):
            self.draw_samples()
            self.draw_curves()

    def _animate(self) -> None:
        with warned_of("drawing"):
            self.draw_animation()

    def _keep_averages(self) -> None:
        if self.state.averages is not None:
            self.state.averages.write(self.folder, self.step)

    def _snapshot(self) -> None:
        folder = self.folder / "snapshots" / f"step-{self.step}"
        self.export(folder)
        self.publisher.snapshot(folder)

    def _checkpoint(self) -> None:
        """Save all that a resumed run needs: weights, average and optimizer, progress, and what must not change."""
        tensors, state = self.state.state()
        state |= {
            **dataclasses.asdict(dataclasses.replace(self.progress, seconds=self.clock.now())),
            "config": self.config.to_dict(),
            "data_fingerprint": self.data.fingerprint,
            "objective_fingerprint": self.state.objective.fingerprint,
        }
        settings = json.dumps(self.reproducible_config().to_dict(), sort_keys=True)
        about = {
            "run_id": self.held.run_id,
            "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
            "processes": self.accelerator.num_processes,
            "versions": package_versions(),
        }
        root, keep = self.folder / "checkpoints", self.config.train.keep_checkpoints
        save_checkpoint(root, self.step, tensors, state, keep=keep, about=about)

    def _resume(self) -> None:
        """Take up the newest valid checkpoint of the run folder, if there is one."""
        if (checkpoint := load_newest(self)) is None:
            return
        try:
            self.state.restore(checkpoint)
            self._take_up(checkpoint)
        except torch.OutOfMemoryError:
            raise
        except WRONG_CONTENT as error:
            raise CheckpointError(f"{checkpoint.path} is no checkpoint of such a run: {error!r:.300}") from error
        self.accelerator.print(f"Resuming from {checkpoint.path}")

    def _take_up(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint stood, with what had been decided by then."""
        self.step = checkpoint.step
        self.progress = Progress(**{name: checkpoint.state[name] for name in get_type_hints(Progress)})
        self.clock = length.Clock(self.progress.seconds)
        if self.timed:  # no other length is asked for: as it was
            train, then = self.config.train, checkpoint.state["config"]["train"]
            kept = {name: then[name] for name in ("max_steps", "max_epochs")}
            kept |= {name: getattr(train, name) or then[name] for name in ("max_minutes", "num_threads", "lr_lines")}
            kept["lr_lines"] = tuple(map(tuple, kept["lr_lines"]))
            self.config = dataclasses.replace(self.config, train=dataclasses.replace(train, **kept))
            set_num_threads(kept["num_threads"])
        self.progress.planned_steps = length.planned_steps(self.config, len(self.data.train))

    def _finish(self, signal_number: int) -> None:
        self.export(self.folder / self.exported)
        if not signal_number:
            with warned_of("drawing"):
                self.draw_at_the_end()
        # All wait for the trackers: a launcher ends the others as soon as one has ended with a signal's code.
        for tracker in self.accelerator.trackers:
            with warned_of("tracking"):
                tracker.finish()
        if signal_number == signal.SIGHUP:
            leave_terminal()
        report.summarise(self, signal_number)

    def _complete(self) -> None:
        """Say that the run is finished; write again what it was killed before writing."""
        exported, summary = self.folder / self.exported, {}
        with contextlib.suppress(FileError):
            summary = read_json(self.folder / "summary.json")
        if summary.get("step") != self.step or summary.get("stopped_by_signal") or not self.is_whole(exported):
            self._after_save({"draw", *self._due(over=False, interrupted=False)})
            self._finish(0)
        else:
            print(f"Finished at step {self.step} already; nothing to do. The {self.exported} is in {exported}")
