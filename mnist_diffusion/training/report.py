"""Report on a run: text, pictures, trackers, card and summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from mnist_diffusion.environment import machine_description, package_versions
from mnist_diffusion.files import replace_text
from mnist_diffusion.pictures.compare import frames_of_epochs, sheet_of_epochs
from mnist_diffusion.pictures.grids import save_animation, save_picture
from mnist_diffusion.pictures.plots import to_picture, training_curves
from mnist_diffusion.run_folder.metrics import read_metrics
from mnist_diffusion.run_folder.read import sample_sheets
from mnist_diffusion.sharing.card import ANYWHERE
from mnist_diffusion.training.state import TrainState
from mnist_diffusion.training.trainer import Run, reproducible

ANIMATED_A_CLASS = 2


def show_beforehand(run: Run) -> None:
    """What does not change while training, such as the noise schedule."""
    if run.config.train.pictures:
        for name, picture in run.product.beforehand(run.learner.data, run.config.train.seed).items():
            _show(run, name, picture)


def show_samples(run: Run) -> None:
    """The sample sheet of this step, and further pictures of what the averaged weights do."""
    train = run.config.train
    shown = run.product.pictures(
        run.learner.average(), run.learner.data, columns=train.samples_per_class, seed=train.seed, more=train.pictures
    )
    run.grid = shown.pop("samples")
    path = run.folder / "samples" / f"step-{run.step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    save_picture(run.grid, path)
    track_picture(run.learner.accelerator, "samples", run.grid, run.step)
    for name, picture in shown.items():
        _show(run, name, picture)


def show_animation(run: Run) -> None:
    """The making of this step's sample sheet."""
    train = run.config.train
    frames = run.product.animation(
        run.learner.average(), run.learner.data, columns=train.samples_per_class, seed=train.seed
    )
    if frames:
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        save_animation(frames, folder / f"step-{run.step:06d}.gif")


def show_curves(run: Run) -> None:
    """What the run has measured so far."""
    if run.config.train.pictures:
        lines = read_metrics(run.folder / "metrics.jsonl")
        _show(run, "training_curves", to_picture(training_curves(lines, title=f"Training, {run.recipe}")))


def show_at_the_end(run: Run) -> None:
    """The same seeds over the epochs, as a sheet and an animation, and how a few images come about."""
    if not run.config.train.pictures:
        return
    sheets = sample_sheets(run.folder, epochs_a_step=run.config.data.batch_size / len(run.learner.data.train))
    if len(sheets) > 1:
        _show(run, "epochs", sheet_of_epochs(sheets))
        save_animation(frames_of_epochs(sheets), run.folder / "pictures" / "epochs.gif", milliseconds=400)
    train = run.config.train
    columns = min(ANIMATED_A_CLASS, train.samples_per_class)
    frames = run.product.animation(run.learner.average(), run.learner.data, columns=columns, seed=train.seed)
    if frames:
        save_animation(frames, run.folder / "pictures" / "denoising.gif")


def _show(run: Run, name: str, picture: Image.Image) -> None:
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    save_picture(picture, folder / f"{name}.png")
    track_picture(run.learner.accelerator, name, picture, run.step)


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any], *, run_name: str, run_id: str | None) -> None:
    """Start the trackers that the accelerator was built with, with the flattened configuration.

    wandb goes on with the run of the same id, where there is one.
    """
    if not accelerator.log_with:
        return
    wandb = {"name": run_name, "dir": accelerator.project_dir, "id": run_id, "resume": "allow"}
    accelerator.init_trackers("mnist-diffusion", config=_flat(config), init_kwargs={"wandb": wandb})


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def track_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to every tracker."""
    values = np.asarray(picture.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: values}, step=step, **layout)


IMBALANCE = 3.0
"""A class so many times as large as another is worth a hint."""


def describe(learner: TrainState, folder: Path) -> str:
    """What is about to happen: data, model, diffusion and length, a line each."""
    config, data = learner.config, learner.data
    train = config.train
    parameters = sum(parameter.numel() for parameter in learner.unet.parameters())
    if train.max_steps is not None:
        length = f"{train.max_steps} steps of {config.data.batch_size} images"
    elif train.max_epochs is not None:
        length = f"{train.max_epochs:g} epochs of {len(data.train)} images"
    else:
        length = f"as many steps of {config.data.batch_size} images as fit into {train.time_limit_minutes:g} minutes"
    hints = ""
    if config.data.augment.horizontal_flip:
        hints += "\nwarning      data.augment.horizontal_flip mirrors images, which is wrong for digits and letters"
    if max(data.counts) > IMBALANCE * min(data.counts) and not config.data.balance:
        hints += "\nhint         the classes are of unequal size; --data.balance true draws each equally often"
    if data.num_classes == 1:
        hints += "\nhint         there is one class only: guidance has nothing to tell apart"
    return (
        f"{data.banner}{data.describe()}{hints}\n"
        f"model        UNet2DModel, {parameters:,} parameters\n"
        f"training     {length}\n"
        f"machine      {machine_description(learner.accelerator.device, learner.accelerator.num_processes)}, "
        f"precision {learner.accelerator.mixed_precision}\n"
        f"run folder   {folder}"
    )


def card_values(run: Run, folder: Path) -> dict[str, Any]:
    """The values of the model card, as this run measured them."""
    data, config, learner = run.learner.data, run.config, run.learner
    versions = package_versions()
    return {
        "title": f"{folder.parent.name} ({run.recipe})" if folder.name == run.product.folder_name else folder.name,
        "location": ANYWHERE,
        "datasets": [data.hub_id] if data.hub_id is not None else None,
        "class_names": ", ".join(data.class_names),
        "image_size": data.image_size,
        "channels": data.channels,
        "parameters": sum(parameter.numel() for parameter in learner.unet.parameters()),
        "scheduler": config.sampling.scheduler,
        "source": data.source,
        "source_id": data.source_id,
        "seed": config.train.seed,
        "notice": data.notice,
        "num_train_images": len(data.train),
        "fingerprint": data.fingerprint[:16],
        "steps": run.step,
        "epochs": run.step * config.data.batch_size / len(data.train),
        "batch_size": config.data.batch_size,
        "minutes": run.seconds / 60,
        "machine": machine_description(learner.accelerator.device, learner.accelerator.num_processes),
        "loss": run.loss,
        "held_out_loss": run.held_out_loss,
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "config": reproducible(config).to_yaml(),
        **run.product.card_values(learner.averaged_unet),
        **run.card,
    }


def summarise(run: Run, signal_number: int) -> None:
    """Write `summary.json` and tell the user how to use what was made."""
    accelerator, data = run.learner.accelerator, run.learner.data
    summary = {
        "finished": run.step >= run.last_step,
        "step": run.step,
        "planned_steps": run.planned_steps,
        "stopped_by_signal": signal_number or None,
        "loss": run.loss,
        "held_out_loss": run.held_out_loss,
        "train_seconds": round(run.seconds, 1),
        "images_per_second": round(run.step * run.config.data.batch_size / run.seconds, 1),
        "machine": machine_description(accelerator.device, accelerator.num_processes),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "data_source": data.source,
        "data_fingerprint": data.fingerprint,
        "notice": data.notice,
        "versions": package_versions(),
    }
    replace_text(run.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    usage = run.product.usage(run.learner.averaged_unet, run.folder / run.product.folder_name)
    print(
        f"\n{'Stopped' if signal_number else 'Done'} at step {run.step} after {run.seconds / 60:.1f} minutes: "
        f"loss {run.loss:.4f}" + (f", held-out loss {run.held_out_loss:.4f}" if run.held_out_loss is not None else "")
    )
    if data.notice:
        print(f"\nNOTICE: {data.notice}")
    shown = " and ".join(str(run.folder / name) for name in ("samples", "pictures") if (run.folder / name).is_dir())
    pictures = f"Pictures are in {shown}. " if shown else ""
    print(f"\n{pictures}Load and use the result with:\n\n{indent(usage, '    ')}\n")
    if signal_number:
        print(f"Go on with: --config {run.folder / 'config.yaml'} --train.resume true --output_dir {run.folder}\n")
        if run.config.hub.push:
            later = f"mnist-diffusion push {run.folder} {run.config.hub.repo_id or run.folder.name}"
            print(f"Not pushed, because it is not finished. Give --hub.push true again, or push it as it is: {later}\n")
