"""Look at the network at work for a moment, before a run: its speed, its memory, and how many threads pay here."""

from __future__ import annotations

import time

import torch
from accelerate.utils import broadcast_object_list

from mnist_diffusion.training.length import planned_steps
from mnist_diffusion.training.state import TrainState

PROBE_SECONDS = 1.0
"""How long one measurement takes, if a single image does not take longer."""
GAIN = 1.1
"""How many times as fast all threads must be to be taken in place of one, which other programs disturb less."""
BYTES_PER_PARAMETER = 24
"""Weights, gradients, at most two moments of the optimizer, the average and its copy, in float32."""


def seconds_per_image(state: TrainState, *, seconds: float = PROBE_SECONDS) -> float:
    """How long a forward and a backward pass take per image, changing nothing.

    Args:
        state: the network and its images.
        seconds: how long to measure, with more and more images; what the last passes took is the answer.
    """
    size, started = 1, time.perf_counter()
    while True:
        state.passes(size)
        before = time.perf_counter()
        state.passes(size)
        taken = (time.perf_counter() - before) / size
        if time.perf_counter() - started >= seconds:
            return taken
        size = min(4 * size, state.config.data.batch_size // state.accelerator.num_processes)


def choose_threads(state: TrainState) -> int:
    """One thread, or as many as there are, by what is faster now: threads that wait for each other are far slower."""
    threads = torch.get_num_threads()
    if threads == 1 or state.accelerator.device.type != "cpu":
        return threads
    torch.set_num_threads(1)
    one = seconds_per_image(state)
    torch.set_num_threads(threads)
    chosen = threads if GAIN * seconds_per_image(state) < one else 1
    [chosen] = broadcast_object_list([chosen])
    torch.set_num_threads(chosen)
    return int(chosen)


def expected_cost(state: TrainState) -> str:
    """Steps, minutes and memory that the run would take here, from passes over a few images."""
    config, train = state.config, state.config.train
    size = config.data.batch_size
    speed = 1 / (size * seconds_per_image(state, seconds=2 * PROBE_SECONDS))
    steps, minutes = planned_steps(config, len(state.data.train)), train.time_limit_minutes or 0.0
    expected = steps / speed / 60 if steps else minutes
    limited = f", cut at {minutes:g} minutes" if 0 < minutes < 0.99 * expected else ""
    parameters = sum(parameter.numel() for parameter in state.unet.parameters())
    micro = size // (state.accelerator.num_processes * train.gradient_accumulation_steps)
    gigabytes = (BYTES_PER_PARAMETER * parameters + micro * _activation_bytes(state)) / 1e9
    return (
        f"expected     {steps or round(60 * minutes * speed)} steps at {speed * size:.3g} images/s: "
        f"about {expected:.1f} minutes{limited}\n"
        f"memory       about {gigabytes:.1f} GB for weights, optimizer and activations"
    )


def _activation_bytes(state: TrainState) -> int:
    """What a forward pass over one image keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in state.unet.parameters():
        kept[parameter.untyped_storage().data_ptr()] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state.passes(1)
    return sum(kept.values())
