"""Logging: the run's plan, `metrics.jsonl` and trackers, the summary and the final message."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from PIL import Image

from mnist_diffusion.config import RunConfig
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.environment import machine_description, package_versions
from mnist_diffusion.errors import UserError
from mnist_diffusion.training.distributed import Processes
from mnist_diffusion.training.launch import RunContext
from mnist_diffusion.training.run_folder import append_metrics, by_dotted_name
from mnist_diffusion.training.schedule import NEVER, describe_length
from mnist_diffusion.training.step import TrainState

if TYPE_CHECKING:
    from mnist_diffusion.training.artifacts import Progress

MIN_WARMUPS = 3
"""A timed run shorter than this many warm-ups prints a warning."""
IMBALANCE = 3.0
"""Ratio of class sizes from which a hint is printed."""


class MetricsLog:
    """The metrics of each step, gathered over the processes, on their way to the file and the trackers.

    Args:
        accelerator: processes and trackers.
        path: the `metrics.jsonl`.
    """

    def __init__(self, accelerator: Accelerator, path: Path):
        self.accelerator, self.path = accelerator, path
        self.pending: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
        self.lines: list[dict[str, Any]] = []
        self.measured: dict[str, float] = {}
        self.since, self.images_per_second = time.perf_counter(), 0.0

    def add(self, step: int, epoch: float, learning_rate: float, metrics: dict[str, torch.Tensor]) -> None:
        """Note the metrics of a step, scalars on the device, without waiting for them."""
        self.pending.append(({"step": step, "epoch": round(epoch, 4), "learning_rate": learning_rate}, metrics))

    def collect(self, state: TrainState, processes: Processes, *, policy: str, folder: Path) -> None:
        """Average what is pending over the processes, in one exchange.

        Raises:
            UserError: a step was not finite, and the run is to stop there; the lines before it are written.
        """
        names = list(self.pending[0][1])
        stacked = torch.stack([torch.stack([metrics[name].float() for name in names]) for _, metrics in self.pending])
        rows = self.accelerator.reduce(stacked, reduction="mean").tolist()
        # The smallest over the processes: a non-finite gradient of one makes all of them non-finite a step later.
        first = int(state.first_non_finite_step)
        bad_step = -processes.largest(-first if first >= 0 else -NEVER)[0]
        for (about, _), row in zip(self.pending, rows, strict=True):
            if about["step"] == bad_step and policy == "stop":
                processes.on_main(lambda: append_metrics(self.path, self.lines))
                cause = ", ".join(f"{name} {value}" for name, value in zip(names, row, strict=True))
                raise UserError(
                    f"non-finite loss or gradient at step {bad_step} ({cause}); the run stopped without saving this "
                    f"step. Resume from an earlier checkpoint in {folder / 'checkpoints'} with a lower "
                    "train.learning_rate or train.max_grad_norm, or with train.on_non_finite=skip"
                )
            finite = {name: value if math.isfinite(value) else None for name, value in zip(names, row, strict=True)}
            self.lines.append({**about, **finite})

    def write(self, progress: Progress, state: TrainState, processes: Processes, batch_size: int) -> None:
        """Write the collected lines, and what was measured after the last of them, to the file and the trackers."""
        lines, last = self.lines, self.lines[-1]
        self.images_per_second = len(lines) * batch_size / (time.perf_counter() - self.since)
        last |= {"images_per_second": round(self.images_per_second, 1), **self.measured}
        if (by_noise := state.pop_loss_by_noise_level()) is not None:
            last["loss_by_noise"] = by_noise
        finite = [line["loss"] for line in lines if line["loss"] is not None]
        progress.loss = sum(finite) / len(finite) if finite else math.nan
        tracked = {**last, "loss": progress.loss}
        tracked |= {f"loss_by_noise/{level}": value for level, value in enumerate(tracked.pop("loss_by_noise", []))}
        values = {name: value for name, value in tracked.items() if value is not None}
        try:
            self.accelerator.log(values, step=progress.step)
        except Exception as error:  # a tracker that fails is no reason to stop
            print(f"warning: could not write to the trackers (continuing): {error!r:.300}")
        processes.on_main(lambda: append_metrics(self.path, lines))
        self.pending, self.lines, self.measured, self.since = [], [], {}, time.perf_counter()


def describe(config: RunConfig, data: ImageData, context: RunContext, unet: UNet2DModel) -> str:
    """The plan of a run: data, model and length, one line each."""
    uneven = max(data.counts) > IMBALANCE * min(data.counts) and not config.data.balance
    flips = "\nwarning      data.augment.horizontal_flip mirrors images, which is wrong for digits and letters"
    sizes = "\nhint         class sizes differ; --data.balance draws every class equally often"
    single = "\nhint         only one class: guidance has no effect"
    colour = "\nhint         this recipe was tuned on grey digits; --config icons is for colour pictures"
    raised = {flips: config.data.augment.horizontal_flip, sizes: uneven, single: data.num_classes == 1}
    raised |= {colour: data.channels == 3 and context.recipe == "default"}
    return (
        f"{data.banner}{data.describe()}{''.join(hint for hint, holds in raised.items() if holds)}\n"
        f"model        UNet2DModel, {unet.num_parameters():,} parameters\n"
        f"training     {describe_length(config, len(data.train))}\n"
        f"machine      {machine(context.accelerator)}, precision {context.accelerator.mixed_precision}\n"
        f"run folder   {context.folder}"
    )


def machine(accelerator: Accelerator) -> str:
    """The machine of a run in a few words."""
    return machine_description(accelerator.device, accelerator.num_processes)


def summary(
    config: RunConfig, data: ImageData, context: RunContext, progress: Progress, objective: str
) -> dict[str, Any]:
    """The content of `summary.json`, but for how the run ended."""
    return {
        "step": progress.step,
        "planned_steps": progress.planned_steps,
        "loss": progress.loss,
        "held_out_loss": progress.held_out_loss,
        "train_seconds": round(progress.seconds, 1),
        "images_per_second": round(progress.step * config.data.batch_size / max(progress.seconds, 1e-9), 1),
        "objective": objective,
        "machine": machine(context.accelerator),
        "processes": context.accelerator.num_processes,
        "mixed_precision": context.accelerator.mixed_precision,
        "data_source": data.source,
        "data_fingerprint": data.fingerprint,
        "notice": data.notice,
        "versions": package_versions(),
    }


def closing_words(
    config: RunConfig, data: ImageData, folder: Path, progress: Progress, signal_number: int, usage: str
) -> str:
    """What a run prints at its end: how far it came, and how to use or resume it."""
    held_out = "" if progress.held_out_loss is None else f", held-out loss {progress.held_out_loss:.4f}"
    ended = "Stopped" if signal_number else "Done"
    parts = [
        f"\n{ended} at step {progress.step} after {progress.seconds / 60:.1f} minutes: "
        f"loss {progress.loss:.4f}{held_out}"
    ]
    if data.notice:
        parts.append(f"NOTICE: {data.notice}")
    train = config.train
    if train.lr_decay and progress.step < MIN_WARMUPS * train.warmup_steps and not signal_number:
        few = f"Only {progress.step} steps fit in the time limit; samples will be poor."
        advice = f"Close other programs, or train longer: --train.max_minutes {math.ceil(progress.seconds / 30)}"
        parts.append(f"{'!' * 100}\nTOO FEW STEPS. {few} {advice}\n{'!' * 100}")
    folders = " and ".join(str(folder / name) for name in ("samples", "pictures") if (folder / name).is_dir())
    pictures = f"Pictures are in {folders}. " if folders else ""
    parts.append(f"{pictures}Load and use the result with:\n\n{indent(usage, '    ')}\n")
    if signal_number:
        flags = ["--config", str(folder / "config.yaml"), "--train.resume", "--output_dir", str(folder)]
        parts.append(f"Resume with: {shlex.join(flags)}\n")
        if config.hub.push:
            command = ["mnist-diffusion", "push", str(folder), config.hub.repo_id or folder.name]
            parts.append(
                f"Not pushed, because it is not finished. Resume with --hub.push, or run {shlex.join(command)}\n"
            )
    return "\n\n".join(parts)


def start_trackers(accelerator: Accelerator, config: RunConfig, folder: Path, run_id: str | None) -> None:
    """Start the trackers with the flattened configuration; wandb and trackio resume the run of the same id.

    W&B's own variables (`WANDB_PROJECT`, `WANDB_NAME`, `WANDB_DIR`, `WANDB_RUN_ID`, `WANDB_RESUME`) come first.

    Raises:
        UserError: a tracker could not be started.
    """
    if not accelerator.log_with:
        return
    own = {"NAME": ("name", folder.name), "DIR": ("dir", accelerator.project_dir)}
    own |= {"RUN_ID": ("id", run_id), "RESUME": ("resume", "allow")}
    wandb = dict(argument for variable, argument in own.items() if f"WANDB_{variable}" not in os.environ)
    trackio = {"name": f"{folder.name}-{(run_id or '')[:8]}", "resume": "allow"}
    project = (os.environ.get("WANDB_PROJECT") if "wandb" in config.train.trackers else None) or "mnist-diffusion"
    options = by_dotted_name(config.to_dict()).items()
    plain = {name: each if isinstance(each, int | float | str) else json.dumps(each) for name, each in options}
    try:
        accelerator.init_trackers(project, plain, {"wandb": wandb, "trackio": trackio})
    except Exception as error:  # whatever a tracker raises
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"train.trackers could not be started: {type(error).__name__}: {reason}") from error


def track_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to every tracker."""
    values = np.asarray(picture.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":  # accelerate logs its numbers alone
            import trackio

            tracker.log({name: trackio.Image(values[0])}, step=step)
            continue
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: values}, step=step, **layout)
