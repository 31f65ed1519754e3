"""Probe the network before a run: its speed and its memory, and the fastest way to train it here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from mnist_diffusion.data.dataset import draw_batch
from mnist_diffusion.training.launch import Config, RunContext
from mnist_diffusion.training.schedule import planned_steps
from mnist_diffusion.training.step import TrainState

PROBE_SECONDS = 1.0
"""Duration of one measurement, unless a single image takes longer."""
GAIN = 1.1
"""A change counts as faster from this speed-up on."""
BYTES_PER_PARAMETER = 24
"""Weights, gradients, at most two moments of the optimizer, the average and its copy, in float32."""


def forward_backward(state: TrainState, count: int) -> None:
    """Run a forward and a backward pass over `count` images of the first batch, which changes nothing."""
    images, labels = draw_batch(state.data.train, state.config.data, seed=0, step=0, part=slice(0, count))
    draws = state.objective.draw(tuple(images.shape), seed=0, step=0, device=state.accelerator.device)
    with state.accelerator.no_sync(state.model):
        state.accelerator.backward(state.training_loss(state.batch(images, labels, *draws)).mean())
    state.optimizer.zero_grad()
    if state.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_image(state: TrainState, *, seconds: float = PROBE_SECONDS) -> float:
    """Seconds per image of a forward and a backward pass, timed with growing batches for about `seconds` seconds."""
    size, started, full = 1, time.perf_counter(), state.config.data.batch_size // state.accelerator.num_processes
    measured: dict[int, float] = {}
    while True:
        forward_backward(state, size)
        before = time.perf_counter()
        forward_backward(state, size)
        measured[size] = min(measured.get(size, math.inf), (time.perf_counter() - before) / size)
        if time.perf_counter() - started >= seconds:
            return measured[size]
        size = min(4 * size, full)


def fastest(
    context: RunContext, config: Config, build: Callable[[RunContext, Config], TrainState]
) -> tuple[RunContext, Config]:
    """Choose the fastest precision, memory format and threads for a run on a CPU; options that are set stay.

    Args:
        context: the run.
        config: its configuration.
        build: builds the state to try, around a copy of the network.

    Returns:
        The context and the configuration with these choices.
    """
    train = config.train
    if context.accelerator.device.type != "cpu" or train.compile:
        return context, config
    threads = torch.get_num_threads()
    tries: list[dict[str, Any]] = []
    if context.accelerator.mixed_precision == "no" and train.mixed_precision is None and _has_bf16():
        tries.append({"mixed_precision": "bf16"})
    if train.channels_last is None:
        tries.append({"channels_last": True})
    if train.num_threads is None and threads > 1:  # threads that wait for each other are far slower than one
        tries.append({"num_threads": 1})
    [tries] = broadcast_object_list([tries])  # machines may differ

    def seconds(changes: dict[str, Any]) -> float:
        torch.set_num_threads(changes.get("num_threads", threads))
        changed = replace(config, train=replace(train, **changes))
        measured = seconds_per_image(build(context.with_precision_of(changed), changed))
        return float(broadcast_object_list([measured])[0])

    fastest_options: dict[str, Any] = {}
    best = seconds(fastest_options) if tries else 0.0
    for change in tries:
        if GAIN * (duration := seconds({**fastest_options, **change})) < best:
            fastest_options, best = {**fastest_options, **change}, duration
    torch.set_num_threads(fastest_options.get("num_threads", threads))
    fastest_options = {"num_threads": threads, **fastest_options}
    config = replace(config, train=replace(train, **fastest_options))
    return context.with_precision_of(config), config


def _has_bf16() -> bool:
    """Whether this CPU computes in bf16 faster than in float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def expected_cost(state: TrainState) -> str:
    """Steps, minutes and memory that the run would take here."""
    config, train = state.config, state.config.train
    size = config.data.batch_size
    speed = 1 / (size * seconds_per_image(state, seconds=2 * PROBE_SECONDS))
    steps, minutes = planned_steps(config, len(state.data.train)), train.time_limit_minutes or 0.0
    expected = steps / speed / 60 if steps else minutes
    limited = f", cut at {minutes:g} minutes" if 0 < minutes < 0.99 * expected else ""
    micro = size // (state.accelerator.num_processes * train.gradient_accumulation_steps)
    gigabytes = (BYTES_PER_PARAMETER * state.unet.num_parameters() + micro * _activation_bytes(state)) / 1e9
    return (
        f"expected     {steps or round(60 * minutes * speed)} steps at {speed * size:.3g} images/s: "
        f"about {expected:.1f} minutes{limited}\n"
        f"memory       about {gigabytes:.1f} GB for weights, optimizer and activations"
    )


def _activation_bytes(state: TrainState) -> int:
    """Memory that a forward pass over one image keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in state.unet.parameters():
        sizes[parameter.untyped_storage().data_ptr()] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(state, 1)
    return sum(sizes.values())
