"""Report on a run: what it is about to do, its trackers, its card, and the summary at the end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from mnist_diffusion.environment import machine_description, package_versions
from mnist_diffusion.files import replace_text
from mnist_diffusion.sharing.card import ANYWHERE, as_markdown
from mnist_diffusion.training.length import describe_length

if TYPE_CHECKING:
    from mnist_diffusion.training.loop import TrainingLoop
    from mnist_diffusion.training.trainer import Trainer

ENOUGH_WARMUPS = 3
"""How many times as many steps as its warm-up a run that the time ended must have made, or a warning is given."""
IMBALANCE = 3.0
"""If a class is so many times as large as another, a hint is given."""


def describe(loop: TrainingLoop) -> str:
    """What is about to happen: data, model and length, one line each."""
    config, data = loop.config, loop.data
    uneven = max(data.counts) > IMBALANCE * min(data.counts) and not config.data.balance
    flips = "\nwarning      data.augment.horizontal_flip mirrors images, which is wrong for digits and letters"
    sizes = "\nhint         the classes are of unequal size; --data.balance true draws each equally often"
    single = "\nhint         there is one class only: guidance has nothing to tell apart"
    given = {flips: config.data.augment.horizontal_flip, sizes: uneven, single: data.num_classes == 1}
    hints = "".join(hint for hint, holds in given.items() if holds)
    return (
        f"{data.banner}{data.describe()}{hints}\n"
        f"model        UNet2DModel, {_parameters(loop):,} parameters\n"
        f"training     {describe_length(config, len(data.train))}\n"
        f"machine      {_machine(loop)}, precision {loop.accelerator.mixed_precision}\n"
        f"run folder   {loop.folder}"
    )


def _parameters(loop: TrainingLoop) -> int:
    return sum(parameter.numel() for parameter in loop.state.unet.parameters())


def _machine(loop: TrainingLoop) -> str:
    return machine_description(loop.accelerator.device, loop.accelerator.num_processes)


def card_values(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The values of the model card, as this run measured them."""
    data, config, pipeline = trainer.data, trainer.config, trainer.average
    conditional = [] if pipeline.num_classes is None else ["class-conditional", "classifier-free-guidance"]
    defaults = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_distilled", "flow_matching")
    return {
        "title": f"{folder.parent.name} ({trainer.recipe})" if folder.name == trainer.exported else folder.name,
        "location": ANYWHERE,
        "tags": ["diffusion", *conditional],
        "datasets": [data.hub_id] if data.hub_id is not None else None,
        "class_names": ", ".join(map(as_markdown, data.class_names)),
        "num_classes": pipeline.num_classes,
        "parameters": _parameters(trainer),
        "example_call": trainer.example_call(),
        "scheduler": config.sampling.scheduler,
        **{name: pipeline.config[name] for name in defaults},
        **{name: getattr(data, name) for name in ("image_size", "channels", "source", "source_id", "notice")},
        "seed": config.train.seed,
        "num_train_images": len(data.train),
        "fingerprint": data.fingerprint[:16],
        "objective": trainer.state.objective,
        "steps": trainer.step,
        "epochs": trainer.step * config.data.batch_size / len(data.train),
        "batch_size": config.data.batch_size,
        "minutes": trainer.clock.counted / 60,
        "machine": _machine(trainer),
        "loss": trainer.progress.loss,
        "held_out_loss": trainer.progress.held_out_loss,
        "versions": ", ".join(f"{name} {number}" for name, number in package_versions().items()),
        "config": trainer.reproducible_config().to_yaml(),
        **trainer.card,
    }


def summarise(loop: TrainingLoop, signal_number: int) -> None:
    """Write `summary.json`, and tell the user how to use what was exported."""
    data, progress, folder = loop.data, loop.progress, loop.folder
    summary = {
        "finished": loop.step >= loop.last_step,
        "step": loop.step,
        "planned_steps": progress.planned_steps,
        "stopped_by_signal": signal_number or None,
        "loss": progress.loss,
        "held_out_loss": progress.held_out_loss,
        "train_seconds": round(loop.clock.now(), 1),
        "images_per_second": round(loop.step * loop.config.data.batch_size / loop.clock.now(), 1),
        "objective": str(loop.state.objective),
        "machine": _machine(loop),
        "processes": loop.accelerator.num_processes,
        "mixed_precision": loop.accelerator.mixed_precision,
        "data_source": data.source,
        "data_fingerprint": data.fingerprint,
        "notice": data.notice,
        "versions": package_versions(),
    }
    replace_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    held_out = "" if progress.held_out_loss is None else f", held-out loss {progress.held_out_loss:.4f}"
    ended = "Stopped" if signal_number else "Done"
    minutes = loop.clock.now() / 60
    print(f"\n{ended} at step {loop.step} after {minutes:.1f} minutes: loss {progress.loss:.4f}{held_out}")
    if data.notice:
        print(f"\nNOTICE: {data.notice}")
    train = loop.config.train
    if train.lr_lines and loop.step < ENOUGH_WARMUPS * train.warmup_steps and not signal_number:
        few = f"Only {loop.step} steps fitted into the time; this recipe needs far more for images that can be read."
        advice = "Close other programs, or train longer: --train.max_minutes 20, say."
        print(f"\n{'!' * 100}\nTOO FEW STEPS. {few} {advice}\n{'!' * 100}")
    shown = " and ".join(str(folder / name) for name in ("samples", "pictures") if (folder / name).is_dir())
    pictures = f"Pictures are in {shown}. " if shown else ""
    print(f"\n{pictures}Load and use the result with:\n\n{indent(loop.usage(), '    ')}\n")
    if signal_number:
        flags = ["--config", str(folder / "config.yaml"), "--train.resume", "--output_dir", str(folder)]
        print(f"Resume with: {shlex.join(flags)}\n")
        if loop.config.hub.push:
            command = ["mnist-diffusion", "push", str(folder), loop.config.hub.repo_id or folder.name]
            later = f"push it as it is: {shlex.join(command)}"
            print(f"Not pushed, because it is not finished. Resume with --hub.push true, or {later}\n")


def start_trackers(loop: TrainingLoop) -> None:
    """Start the trackers that the accelerator was built with, with the flattened configuration.

    wandb resumes the run of the same id, if there is one.
    """
    if not loop.accelerator.log_with:
        return
    wandb = {"name": loop.folder.name, "dir": loop.accelerator.project_dir, "id": loop.held.run_id, "resume": "allow"}
    flat = _flat(loop.config.to_dict())
    loop.accelerator.init_trackers("mnist-diffusion", config=flat, init_kwargs={"wandb": wandb})


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        plain = value if isinstance(value, bool | int | float | str) else json.dumps(value)
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": plain}
    return flat


def track_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to every tracker."""
    values = np.asarray(picture.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: values}, step=step, **layout)
