"""Randomness as a function of (seed, purpose, place), so that resuming needs the step alone.

Nothing here keeps state: which images step `n` sees follows from the seed and `n`, whatever the number of
processes and wherever the run was interrupted. Each purpose draws from a stream of its own, mixed by NumPy's
`SeedSequence` (O'Neill's hash), because torch's CPU generator keeps only 32 bits of its seed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

Purpose = Literal["init", "order", "augment", "noise", "timesteps", "labels", "dropout", "eval", "samples"]
PURPOSES: tuple[Purpose, ...] = (
    "init",
    "order",
    "augment",
    "noise",
    "timesteps",
    "labels",
    "dropout",
    "eval",
    "samples",
)


def _sequence(seed: int, purpose: Purpose, place: tuple[int, ...]) -> np.random.SeedSequence:
    """Mix in words of fixed number and order: `SeedSequence` cuts large numbers up and ignores trailing zeros."""
    return np.random.SeedSequence((1 + len(place), seed % 2**32, seed >> 32, PURPOSES.index(purpose), *place))


def mixed_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """A 63-bit seed that differs for each purpose and place."""
    return int(_sequence(seed, purpose, place).generate_state(1, np.uint64)[0]) >> 1


def torch_generator(device: torch.device | str, seed: int, purpose: Purpose, *place: int) -> torch.Generator:
    """A torch generator on `device`, seeded for this purpose and place."""
    return torch.Generator(device).manual_seed(mixed_seed(seed, purpose, *place))


def numpy_generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """A NumPy generator, seeded for this purpose and place."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, place)))


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return numpy_generator(seed, "order", epoch).permutation(size)


def positions_of_step(step: int, batch_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and place within it of each image of a step, int64 `[B]` each.

    The order is one stream over epochs: a batch may span two (or more, where the data set is smaller than it).
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    return positions // size, positions % size


def indices_of_step(seed: int, step: int, batch_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images step `step` (0 for the first) sees: indices and their epochs, int64 `[B]` each."""
    epochs, places = positions_of_step(step, batch_size, size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(seed, int(epoch), size)[places[chosen]]
    return indices, epochs
