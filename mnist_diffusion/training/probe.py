"""Probe the network before a run: its speed, its memory, and how many threads are worth using."""

from __future__ import annotations

import time

import torch
from accelerate.utils import broadcast_object_list

from mnist_diffusion.data.dataset import draw_batch
from mnist_diffusion.training.schedule import planned_steps
from mnist_diffusion.training.step import TrainState

PROBE_SECONDS = 1.0
"""Duration of one measurement, unless a single image takes longer."""
GAIN = 1.1
"""Speed-up from which all threads are preferred to one, which other programs disturb less."""
BYTES_PER_PARAMETER = 24
"""Weights, gradients, at most two moments of the optimizer, the average and its copy, in float32."""


def forward_backward(state: TrainState, count: int) -> None:
    """Run a forward and a backward pass over `count` images of the first batch, which changes nothing."""
    images, labels = draw_batch(state.data.train, state.config.data, seed=0, step=0, part=slice(0, count))
    draws = state.objective.draw(tuple(images.shape), seed=0, step=0, device=state.accelerator.device)
    state.model.train()
    with state.accelerator.no_sync(state.model):
        loss = state.objective.loss(state.model, state.batch(images, labels, *draws))
        state.accelerator.backward(loss.mean())
    state.optimizer.zero_grad()
    if state.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_image(state: TrainState, *, seconds: float = PROBE_SECONDS) -> float:
    """Time a forward and a backward pass per image, with growing batches for about so many seconds."""
    size, started = 1, time.perf_counter()
    while True:
        forward_backward(state, size)
        before = time.perf_counter()
        forward_backward(state, size)
        per_image = (time.perf_counter() - before) / size
        if time.perf_counter() - started >= seconds:
            return per_image
        size = min(4 * size, state.config.data.batch_size // state.accelerator.num_processes)


def choose_threads(state: TrainState) -> int:
    """Use one thread or all of them, whichever is faster now: threads that wait for each other are far slower."""
    threads = torch.get_num_threads()
    if threads == 1 or state.accelerator.device.type != "cpu":
        return threads
    torch.set_num_threads(1)
    one = seconds_per_image(state)
    torch.set_num_threads(threads)
    [best] = broadcast_object_list([threads if GAIN * seconds_per_image(state) < one else 1])
    torch.set_num_threads(best)
    return int(best)


def expected_cost(state: TrainState) -> str:
    """Steps, minutes and memory that the run would take here."""
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
