"""Order and seeds as functions of (seed, purpose, place)."""

import itertools

import numpy as np

from mnist_diffusion.seeds import PURPOSES, Balance, indices_of_step, mixed_seed


def test_each_epoch_sees_each_image_once_in_an_order_of_the_seed_whatever_the_batch_size() -> None:
    """Also where batches span epochs."""

    def order(seed: int, batch_size: int) -> np.ndarray:
        """Images and epochs of the first six epochs of ten images."""
        return np.hstack([np.stack(indices_of_step(seed, step, batch_size, 10)) for step in range(60 // batch_size)])

    indices, epochs = order(7, 4)
    for epoch in range(6):
        assert sorted(indices[epochs == epoch]) == list(range(10))
    assert len({tuple(indices[epochs == epoch]) for epoch in range(6)}) == 6
    np.testing.assert_array_equal(epochs, np.arange(60) // 10)
    np.testing.assert_array_equal(order(7, 15), order(7, 4))
    assert (order(8, 4)[0] != indices).any()


def test_every_purpose_and_place_has_its_own_seed() -> None:
    seeds = {mixed_seed(*each) % 2**32 for each in itertools.product((0, 1, 2**32), PURPOSES, range(50))}
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
