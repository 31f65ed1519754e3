"""The loop, in the order a reader expects: plan, resume, then step, report, save, until done.

It is given a `Learner`, which knows how to make one update, and an objective through it; it knows no diffusion.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from mnist_diffusion.checkpoint import CheckpointError, load_newest_checkpoint, save_checkpoint
from mnist_diffusion.config import Config, TrainConfig
from mnist_diffusion.data.stateless import mixed_seed
from mnist_diffusion.evaluation.monitor import Monitor
from mnist_diffusion.export import build_pipeline, export_pipeline
from mnist_diffusion.learner import Learner
from mnist_diffusion.records import (
    MetricsLog,
    machine_description,
    package_versions,
    start_trackers,
    track_picture,
    write_whole,
)
from mnist_diffusion.sampling import generate
from mnist_diffusion.visualize import image_grid

# With `max_minutes` alone, this share of the time is planned for steps; the rest is for grids, evaluation and saving.
SHARE_FOR_STEPS = 0.93
# Of the planned time, what measuring the speed may take.
SHARE_FOR_MEASURING = 0.04


def learning_rate_at(config: TrainConfig, step: int, planned_steps: int) -> float:
    """The learning rate of the update after `step` others: a pure function of the step and the planned steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, planned_steps - config.warmup_steps))
    last = config.final_lr_factor
    factor = {
        "constant": 1.0,
        "linear": 1 - (1 - last) * progress,
        "cosine": last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)),
        "exponential": last**progress,
    }[config.lr_schedule]
    return config.learning_rate * factor


def steps_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """Updates that make up so many passes over the images, rounded up."""
    return max(1, math.ceil(epochs * images / batch_size))


@dataclass
class Run:
    """One training run on its way.

    Args:
        config: the run.
        learner: network, average and optimizer.
        noise_scheduler: the training scheduler, from which samplers are made.
        folder: the run folder.
        recipe: name of the recipe, for titles.
        planned_steps: how many updates the learning rate is shaped for.
        step: updates done.
        seconds_before: training time of earlier launches.
    """

    config: Config
    learner: Learner
    noise_scheduler: DDPMScheduler
    folder: Path
    recipe: str
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

    def out_of_time(self) -> bool:
        """Whether `max_minutes`, beside a number of steps or epochs, has passed."""
        minutes = self.config.train.time_limit_minutes
        return minutes is not None and self.seconds > 60 * minutes


def train(
    config: Config, learner: Learner, noise_scheduler: DDPMScheduler, folder: Path, *, recipe: str = "default"
) -> int:
    """Train until the planned steps are done or a signal comes, and leave a pipeline folder.

    Args:
        config: the run.
        learner: network, average and optimizer, with the objective.
        noise_scheduler: the training scheduler.
        folder: the run folder; made here, resumed from where the configuration says so.
        recipe: name of the recipe.

    Returns:
        The exit code: 0 finished, 128 + the signal's number where one ended it.
    """
    accelerator = learner.accelerator
    main = accelerator.is_main_process
    run = Run(config, learner, noise_scheduler, folder, recipe)
    _resume(run)
    if run.step == 0:
        run.planned_steps = _plan(run)
    config = run.config = _resolved(run)
    if run.step >= run.last_step:
        accelerator.print(
            f"Finished at step {run.step} already; nothing to do. The pipeline is in {folder / 'pipeline'}"
        )
        return 0
    if main:
        if config.train.evaluates:
            run.monitor = _monitor(run)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", _reproducible(config).to_yaml())
    log = MetricsLog(folder / "metrics.jsonl", run.step) if main else None
    start_trackers(accelerator, config.to_dict(), folder.name)
    pending: list[dict[str, Tensor]] = []
    since, signal_number = time.perf_counter(), 0

    with (
        _stop_signal() as stop,
        tqdm(
            total=run.last_step, initial=run.step, unit="step", disable=not main, dynamic_ncols=True, mininterval=0.5
        ) as bar,
    ):
        while run.step < run.last_step:
            pending.append(learner.update(run.step, learning_rate_at(config.train, run.step, run.planned_steps)))
            run.step += 1
            bar.update()

            signal_number, out_of_time = _agree(learner, stop.number, int(run.out_of_time()))
            over = bool(signal_number or out_of_time) or run.step == run.last_step
            sample = run.due("sample") or over

            evaluate = run.due("evaluate") or (config.train.evaluates and over and not signal_number)

            seconds = time.perf_counter() - since
            if sample:
                _sample(run)
            if evaluate:
                _evaluate(run)
            if run.step % config.train.log_every_steps == 0 or sample or evaluate or run.due("checkpoint"):
                images_per_second = len(pending) * config.data.batch_size / seconds
                lines = _report(run, pending, images_per_second)
                if log is not None:
                    log.append(lines)
                bar.set_postfix(loss=f"{run.loss:.4f}", img_s=f"{images_per_second:.0f}")
                pending, since = [], time.perf_counter()
            if run.due("checkpoint") or over:
                _checkpoint(run)
            if run.due("snapshot"):
                _export(run, folder / "snapshots" / f"step-{run.step}")
            if over:
                break

    _export(run, folder / "pipeline")
    _summarise(run, signal_number)
    accelerator.end_training()
    return 128 + signal_number if signal_number else 0


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
    notice = f"\n{'!' * 100}\n{data.notice}\n{'!' * 100}\n" if data.notice else ""
    return (
        f"{notice}{data.describe()}\n"
        f"model        UNet2DModel, {parameters:,} parameters\n"
        f"training     {length}\n"
        f"machine      {machine_description(learner.accelerator.device, learner.accelerator.num_processes)}, "
        f"precision {learner.accelerator.mixed_precision}\n"
        f"run folder   {folder}"
    )


def expected_cost(learner: Learner) -> str:
    """Steps and minutes that the run would take here, from a few seconds of real updates that are then undone."""
    config, train = learner.config, learner.config.train
    speed = learner.measure_speed(6.0)
    minutes = train.time_limit_minutes
    if train.max_steps is not None:
        steps = train.max_steps
    elif train.max_epochs is not None:
        steps = steps_of_epochs(train.max_epochs, len(learner.data.train), config.data.batch_size)
    else:
        assert minutes is not None
        steps = round(60 * minutes * (SHARE_FOR_STEPS - SHARE_FOR_MEASURING) * speed)
    expected = steps / speed / (SHARE_FOR_STEPS - SHARE_FOR_MEASURING) / 60
    limited = f", cut at {minutes:g} minutes" if minutes is not None and minutes < 0.99 * expected else ""
    return (
        f"expected     {steps} steps at {speed * config.data.batch_size:.0f} images/s: "
        f"about {expected:.1f} minutes{limited}"
    )


def _plan(run: Run) -> int:
    """How many steps shape the learning rate: given, counted from epochs, or measured to fit the minutes."""
    train, learner = run.config.train, run.learner
    if train.max_steps is not None:
        return train.max_steps
    if train.max_epochs is not None:
        return steps_of_epochs(train.max_epochs, len(learner.data.train), run.config.data.batch_size)
    minutes = train.time_limit_minutes
    assert minutes is not None
    speed = learner.measure_speed(60 * minutes * SHARE_FOR_MEASURING)
    left = 60 * minutes * SHARE_FOR_STEPS - run.seconds
    [planned] = broadcast_object_list([max(1, round(left * speed))])
    learner.accelerator.print(
        f"Measured {speed * run.config.data.batch_size:.0f} images/s: {planned} steps fit into {minutes:g} minutes"
    )
    return planned


def _resolved(run: Run) -> Config:
    """The configuration with what the run has decided: the planned steps, the precision, the source."""
    train = run.config.train
    if train.max_steps is None and train.max_epochs is None:
        train = dataclasses.replace(train, max_steps=run.planned_steps, max_minutes=None)
    train = dataclasses.replace(train, mixed_precision=run.learner.accelerator.mixed_precision)
    data = dataclasses.replace(run.config.data, source=run.config.data.source or run.learner.data.source_id)
    return dataclasses.replace(run.config, train=train, data=data)


def _reproducible(config: Config) -> Config:
    """The configuration to save: a run from it is this run again, in a folder of its own."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, resume=False), output_dir=None)


def _resume(run: Run) -> None:
    """Take up the newest checkpoint, where the configuration asks for it and there is one."""
    if not run.config.train.resume:
        return
    accelerator = run.learner.accelerator
    problems: list[str] = []
    if accelerator.is_main_process:
        _, problems = load_newest_checkpoint(run.folder / "checkpoints")
    accelerator.wait_for_everyone()
    checkpoint, _ = load_newest_checkpoint(run.folder / "checkpoints")
    for problem in problems:
        accelerator.print(f"warning: {problem}")
    if checkpoint is None:
        accelerator.print(f"No checkpoint in {run.folder / 'checkpoints'}: starting at step 0")
        return
    fingerprint = run.learner.data.fingerprint
    if checkpoint.state["data_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{checkpoint.path} was trained on other images (fingerprint {checkpoint.state['data_fingerprint'][:16]}, "
            f"now {fingerprint[:16]})"
        )
    for section in ("model", "diffusion"):
        now, then = run.config.to_dict()[section], checkpoint.state["config"][section]
        if changed := {name: (then.get(name), value) for name, value in now.items() if value != then.get(name)}:
            raise CheckpointError(
                f"{checkpoint.path} was trained with another {section}: "
                + ", ".join(f"{section}.{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
            )
    run.learner.restore(checkpoint)
    run.step, run.seconds_before = checkpoint.step, checkpoint.state["seconds"]
    run.best = checkpoint.state["best"]
    train = run.config.train
    run.planned_steps = (
        _plan(run) if train.max_steps is not None or train.max_epochs is not None else checkpoint.state["planned_steps"]
    )
    accelerator.print(f"Resuming from {checkpoint.path}")


@dataclass
class _Stop:
    """The number of the signal that asked the run to end, 0 while there was none."""

    number: int = 0


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """Turn the first INT or TERM into a flag; a second one acts at once."""
    stop = _Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: Any) -> None:
        stop.number = number
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    for number in before:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _agree(learner: Learner, *numbers: int) -> list[int]:
    """The largest of each number over all processes, so that all end after the same step."""
    if learner.accelerator.num_processes == 1:
        return list(numbers)
    mine = torch.tensor([numbers], device=learner.accelerator.device)
    return learner.accelerator.gather(mine).amax(dim=0).tolist()


def _report(run: Run, pending: list[dict[str, Tensor]], images_per_second: float) -> list[dict[str, Any]]:
    """The lines of the steps since the last report, losses averaged over processes, one exchange for all."""
    accelerator, train = run.learner.accelerator, run.config.train
    names = list(pending[0])
    stacked = torch.stack([torch.stack([measured[name].float() for name in names]) for measured in pending])
    values = accelerator.reduce(stacked, reduction="mean").tolist()
    batch_size, images = run.config.data.batch_size, len(run.learner.data.train)
    lines: list[dict[str, Any]] = []
    for offset, row in enumerate(values):
        step = run.step - len(values) + offset + 1
        line: dict[str, Any] = {"step": step, "epoch": round(step * batch_size / images, 4)}
        line |= dict(zip(names, row, strict=True))
        line["learning_rate"] = learning_rate_at(train, step - 1, run.planned_steps)
        lines.append(line)
    lines[-1]["images_per_second"] = round(images_per_second, 1)
    lines[-1] |= run.measured
    run.measured = {}
    run.loss = sum(line["loss"] for line in lines) / len(lines)
    accelerator.log(dict({**lines[-1], "loss": run.loss}.items()), step=run.step)
    return lines


def _sample(run: Run) -> None:
    """Held-out loss and the sample grid, by the main process while the others wait."""
    accelerator = run.learner.accelerator
    if accelerator.is_main_process:
        if run.config.train.num_eval_images > 0:
            run.held_out_loss = run.measured["held_out_loss"] = run.learner.held_out_loss()
        run.grid = _sample_grid(run)
        path = run.folder / "samples" / f"step-{run.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        run.grid.save(path)
        track_picture(accelerator, "samples", run.grid, run.step)
    accelerator.wait_for_everyone()


def _monitor(run: Run) -> Monitor:
    """Made before the first step, so that what cannot work is said before any work is lost."""
    train = run.config.train
    return Monitor(_pipeline(run), run.learner.data, num_images=train.num_evaluation_images, seed=train.seed)


def _evaluate(run: Run) -> None:
    """Measure images of the averaged weights, and keep the pipeline if none was better."""
    if run.monitor is not None:
        run.learner.average()
        measured = run.monitor.measure()
        run.measured |= measured
        metric = run.config.train.best_metric
        better = min if metric == "fid" else max
        if run.best is None or better(measured[metric], run.best) != run.best:
            run.best = measured[metric]
            _write_pipeline(run, run.folder / "pipeline_best")
    run.learner.accelerator.wait_for_everyone()


def _sample_grid(run: Run) -> Image.Image:
    """One row a class (at most 20), the same seeds each time, drawn by the pipeline as it will be exported."""
    pipeline = _pipeline(run)
    columns, names = run.config.train.samples_per_class, run.learner.data.class_names[:20]
    conditional = pipeline.num_classes is not None
    labels = [label for label in range(len(names)) for _ in range(columns)]
    seeds = [mixed_seed(run.config.train.seed, "samples", index) for index in range(len(labels))]
    images = generate(pipeline, labels if conditional else None, seeds)
    return image_grid(images, columns, row_labels=names if conditional else None)


def _pipeline(run: Run) -> Any:
    names = run.learner.data.class_names
    pipeline = build_pipeline(run.learner.average(), run.noise_scheduler, run.config.sampling, names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _checkpoint(run: Run) -> None:
    if run.learner.accelerator.is_main_process:
        tensors, state = run.learner.state()
        save_checkpoint(
            run.folder / "checkpoints",
            run.step,
            tensors,
            {
                **state,
                "planned_steps": run.planned_steps,
                "seconds": run.seconds,
                "best": run.best,
                "config": run.config.to_dict(),
                "data_fingerprint": run.learner.data.fingerprint,
                "versions": package_versions(),
            },
            keep=run.config.train.keep_checkpoints,
        )
    run.learner.accelerator.wait_for_everyone()


def _export(run: Run, folder: Path) -> None:
    if run.learner.accelerator.is_main_process:
        _write_pipeline(run, folder)
    run.learner.accelerator.wait_for_everyone()


def _write_pipeline(run: Run, folder: Path) -> None:
    export_pipeline(_pipeline(run), folder, card=_card(run, folder), samples=run.grid)


def _card(run: Run, folder: Path) -> dict[str, Any]:
    """The values of the model card, as this run measured them."""
    data, config, learner = run.learner.data, run.config, run.learner
    versions = package_versions()
    return {
        "title": f"{folder.parent.name} ({run.recipe})" if folder.name == "pipeline" else folder.name,
        "location": "this-folder-or-repository",
        "datasets": [data.hub_id] if data.hub_id is not None else None,
        "num_classes": data.num_classes if config.model.class_conditional else None,
        "class_names": ", ".join(data.class_names),
        "example_label": min(3, data.num_classes - 1),
        "example_scale": 5,
        "image_size": data.image_size,
        "channels": data.channels,
        "parameters": sum(parameter.numel() for parameter in learner.unet.parameters()),
        "num_inference_steps": config.sampling.num_inference_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "scheduler": config.sampling.scheduler,
        "source": data.source,
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
        "config": _reproducible(config).to_yaml(),
    }


def _summarise(run: Run, signal_number: int) -> None:
    """Write `summary.json` and tell the user how to use what was made."""
    accelerator, data = run.learner.accelerator, run.learner.data
    if not accelerator.is_main_process:
        return
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
    conditional = run.config.model.class_conditional
    call = f"class_labels=[{min(3, data.num_classes - 1)}], guidance_scale=5" if conditional else ""
    print(
        f"\n{'Stopped' if signal_number else 'Done'} at step {run.step} after {run.seconds / 60:.1f} minutes: "
        f"loss {run.loss:.4f}" + (f", held-out loss {run.held_out_loss:.4f}" if run.held_out_loss is not None else "")
    )
    if data.notice:
        print(f"\nNOTICE: {data.notice}")
    print(
        f"\nPictures are in {run.folder / 'samples'}. Load and sample the result with:\n\n"
        "    from diffusers import DiffusionPipeline\n"
        f'    pipeline = DiffusionPipeline.from_pretrained("{run.folder / "pipeline"}", trust_remote_code=True)\n'
        f'    pipeline({call}).images[0].save("sample.png")\n'
    )
    if signal_number:
        print(f"Go on with: --train.resume true --output_dir {run.folder}\n")
