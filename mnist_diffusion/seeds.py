"""Make randomness a function of (seed, purpose, place), so that resuming needs only the step.

The place is one or more integers, such as a step or an image's index. Nothing here keeps state: the images of step `n`
follow from the seed and `n`, whatever the number of processes and wherever the run was interrupted. Each purpose draws
from a stream of its own, mixed by NumPy's `SeedSequence` (O'Neill's hash), because torch's CPU generator keeps only 32
bits of its seed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal["init", "order", "augment", "noise", "timesteps", "labels", "dropout", "eval", "samples", "balance"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def _sequence(seed: int, purpose: Purpose, place: tuple[int, ...]) -> np.random.SeedSequence:
    """Mix words of fixed number and order: `SeedSequence` splits large numbers and ignores trailing zeros."""
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


class Balance:
    """The places of each class's images, for epochs in which all classes are equally frequent.

    Args:
        labels: int64 `[N]`.
    """

    def __init__(self, labels: np.ndarray):
        self.places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.size = len(labels)

    def epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of an epoch of `N` places, the image and how often it came before, int64 `[N]` each.

        Each class has an endless stream of its own images, shuffled anew in each pass, and an equal share of each
        epoch; what the division leaves over goes to the classes in turn.
        """
        classes = len(self.places)
        share, rest = divmod(self.size, classes)
        images, passes = [], []
        for index, places in enumerate(self.places):
            first, last = (
                each * share + each * rest // classes + (index < each * rest % classes) for each in (epoch, epoch + 1)
            )
            positions = np.arange(first, last)
            rounds, within = positions // len(places), positions % len(places)
            order = {number: self._order(seed, index, int(number), len(places)) for number in np.unique(rounds)}
            chosen = [order[number][place] for number, place in zip(rounds, within, strict=True)]
            images.append(places[np.array(chosen, dtype=np.int64)])
            passes.append(rounds)
        shuffled = numpy_generator(seed, "order", epoch).permutation(self.size)
        return np.concatenate(images)[shuffled], np.concatenate(passes)[shuffled]

    @staticmethod
    def _order(seed: int, label: int, number: int, size: int) -> np.ndarray:
        return numpy_generator(seed, "balance", label, number).permutation(size)


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, size: int, balance: Balance | None) -> tuple[np.ndarray, np.ndarray]:
    """The images of an epoch in order, and how often each came before, int64 `[N]` each."""
    if balance is not None:
        return balance.epoch(seed, epoch)
    return numpy_generator(seed, "order", epoch).permutation(size), np.full(size, epoch)


def indices_of_step(
    seed: int, step: int, batch_size: int, size: int, *, balance: Balance | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which images step `step` (0 for the first) sees: indices and how often each came before, int64 `[B]` each.

    The order is one stream over epochs: a batch may span two (or more, where the data set is smaller than it). How
    often equals the epoch, except with `balance`, which draws small classes more often.
    """
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), size)
    indices, passes = np.empty_like(epochs), np.empty_like(epochs)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        images, times = _epoch(seed, int(epoch), size, balance)
        indices[in_epoch], passes[in_epoch] = images[places[in_epoch]], times[places[in_epoch]]
    return indices, passes
