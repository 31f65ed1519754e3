"""What a run says of itself: before it starts, on the card of its pipeline, and when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import Any

from mnist_diffusion.learner import Learner
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import ANYWHERE
from mnist_diffusion.records import machine_description, package_versions, write_whole
from mnist_diffusion.run import Run, reproducible

IMBALANCE = 3.0
"""A class so many times as large as another is worth a hint."""


def describe(learner: Learner, folder: Path) -> str:
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
    write_whole(run.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
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
