"""Order and seeds as functions of (seed, purpose, place)."""

from __future__ import annotations

import numpy as np
import torch

from mnist_diffusion.data.stateless import PURPOSES, indices_of_step, mixed_seed, torch_generator


def test_each_epoch_sees_each_image_once_though_batches_span_epochs() -> None:
    size, batch_size = 10, 4
    steps = [indices_of_step(7, step, batch_size, size) for step in range(15)]
    indices = np.concatenate([step[0] for step in steps])
    epochs = np.concatenate([step[1] for step in steps])
    for epoch in range(6):
        assert sorted(indices[epochs == epoch]) == list(range(size))
    assert len({tuple(indices[epochs == epoch]) for epoch in range(6)}) == 6
    assert set(steps[2][1]) == {0, 1}


def test_order_does_not_depend_on_the_batch_size() -> None:
    small = np.concatenate([indices_of_step(1, step, 3, 10)[0] for step in range(8)])
    large = np.concatenate([indices_of_step(1, step, 8, 10)[0] for step in range(3)])
    np.testing.assert_array_equal(small, large)


def test_order_depends_on_the_seed() -> None:
    assert list(indices_of_step(0, 0, 20, 100)[0]) != list(indices_of_step(1, 0, 20, 100)[0])


def test_batch_larger_than_the_data() -> None:
    indices, epochs = indices_of_step(0, 0, 7, 3)
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert sorted(indices[:3]) == [0, 1, 2]


def test_every_purpose_and_place_has_its_own_seed() -> None:
    seeds = {
        mixed_seed(seed, purpose, place) % 2**32
        for seed in (0, 1, 2**32)
        for purpose in PURPOSES
        for place in range(50)
    }
    assert len(seeds) == 3 * len(PURPOSES) * 50


def test_generator_repeats() -> None:
    first, second = (torch.randn(4, generator=torch_generator("cpu", 3, "noise", 9)) for _ in range(2))
    assert torch.equal(first, second)
