"""Order and seeds as functions of (seed, purpose, place)."""

import numpy as np

from mnist_diffusion.seeds import PURPOSES, Balance, indices_of_step, mixed_seed


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


def test_every_purpose_and_place_has_its_own_seed() -> None:
    seeds = {
        mixed_seed(seed, purpose, place) % 2**32
        for seed in (0, 1, 2**32)
        for purpose in PURPOSES
        for place in range(50)
    }
    assert len(seeds) == 3 * len(PURPOSES) * 50


class TestBalance:
    LABELS = np.array([0] * 50 + [1] * 7 + [2] * 3)

    def test_every_image_of_a_class_before_one_comes_again(self) -> None:
        balance = Balance(self.LABELS)
        both = [balance.epoch(3, epoch) for epoch in range(4)]
        indices, passes = (np.concatenate(parts) for parts in zip(*both, strict=True))
        seen = set(zip(indices.tolist(), passes.tolist(), strict=True))
        assert len(seen) == len(indices)  # so that each is augmented anew
        counts = np.bincount(indices, minlength=60)
        assert all(np.ptp(counts[label == self.LABELS]) <= 1 for label in range(3))

    def test_a_step_is_a_function_of_seed_and_step(self) -> None:
        steps = [*range(20), *reversed(range(20))]
        drawn = [indices_of_step(3, step, 8, 60, balance=Balance(self.LABELS))[0] for step in steps]
        np.testing.assert_array_equal(drawn[:20], drawn[:19:-1])
