"""Metrics against closed forms, independent computations, and sets small enough to count by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from mnist_diffusion.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    nearest_images,
    neighbourhoods,
    stroke_shapes,
    wilson_share,
)


def features(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated features with unequal scales."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(columns, columns))
    return torch.from_numpy(random.normal(size=(rows, columns)) @ mixing + random.normal(size=columns))


class TestFrechetDistance:
    def test_against_scipy(self) -> None:
        real, generated = features(300, 16).numpy(), features(200, 16, seed=10).numpy()
        first, second = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
        shift = ((real.mean(axis=0) - generated.mean(axis=0)) ** 2).sum()
        expected = shift + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
        value = frechet_distance(torch.from_numpy(real), torch.from_numpy(generated))
        assert value == pytest.approx(expected, rel=1e-6)

    def test_same_features(self) -> None:
        assert frechet_distance(features(100, 8), features(100, 8)) == pytest.approx(0, abs=1e-6)

    def test_features_that_never_vary(self) -> None:
        real = torch.cat([features(100, 4), torch.zeros(100, 4)], dim=1)
        assert frechet_distance(real, real + 1) == pytest.approx(8, rel=1e-6)


class TestKernelDistance:
    def test_against_sums_over_pairs(self) -> None:
        real, generated = features(40, 6).numpy(), features(40, 6, seed=1).numpy()

        def kernel(x: np.ndarray, y: np.ndarray) -> float:
            return float((x @ y / 6 + 1) ** 3)

        def over_pairs(points: np.ndarray) -> float:
            return float(np.mean([kernel(x, y) for x, y in itertools.permutations(points, 2)]))

        across = np.mean([kernel(x, y) for x, y in itertools.product(real, generated)])
        value = kernel_distance(torch.from_numpy(real), torch.from_numpy(generated), subsets=1)
        assert value == pytest.approx(over_pairs(real) + over_pairs(generated) - 2 * across, rel=1e-6)

    def test_subsets_follow_the_seed_and_leave_the_global_generator(self) -> None:
        real, generated = features(300, 6), features(200, 6, seed=1)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = kernel_distance(real, generated, subset_size=50, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert kernel_distance(real, generated, subset_size=50, seed=3) == first
        assert kernel_distance(real, generated, subset_size=50, seed=4) != first


class TestNeighbourhoods:
    @pytest.mark.parametrize(
        ("real", "fake", "k", "expected"),
        [
            ((0, 1, 10, 11), (0.5, 10.5, 100, 101), 1, (0.5, 1.0, 1.0, 1.0)),  # half of the fakes are far off
            ((0, 1, 10, 11), (0.30, 0.41, 0.60, 0.71), 1, (1.0, 0.0, 2.0, 0.5)),  # a dropped mode
            # Balls of real points reach 3, 2 and 3; those of fake ones 7, 4 and 7.
            ((0, 1, 3), (-2.5, 0.5, 4.5), 2, (1.0, 1.0, (1 + 3 + 1) / 3 / 2, 1.0)),
        ],
    )
    def test_by_hand(self, real: Any, fake: Any, k: int, expected: tuple[float, ...]) -> None:
        found = neighbourhoods(*(torch.tensor(each).double()[:, None] for each in (real, fake)), k=k)
        assert found == pytest.approx(dict(zip(("precision", "recall", "density", "coverage"), expected, strict=True)))

    def test_same_set_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real, fake = features(400, 4), features(300, 4, seed=1)
        whole = neighbourhoods(real, fake)
        monkeypatch.setattr("mnist_diffusion.evaluation.metrics.WORKING_MEMORY_MIB", 0.05)
        assert neighbourhoods(real, fake) == whole
        assert neighbourhoods(real, real)["coverage"] == 1.0


class TestWilsonShare:
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)],  # the last is Newcombe's (1998)
    )
    def test_published_values(self, successes: int, trials: int, low: float, high: float) -> None:
        share = (successes / trials, low, high)
        assert wilson_share(successes, trials) == tuple(pytest.approx(value, abs=1e-4) for value in share)


class TestNearestImages:
    def test_a_copy_is_found(self) -> None:
        training = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
        new = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
        found = nearest_images(torch.cat([training[7:8], new]), training)
        assert found.indices[0] == 7
        assert found.distances[0] == pytest.approx(0, abs=1e-6)
        assert found.relative[0] == pytest.approx(0, abs=1e-6)
        assert 0.8 < found.relative[1] <= 1

    def test_distance_is_the_root_mean_square_of_the_pixels(self) -> None:
        training = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        found = nearest_images(torch.full((1, 1, 4, 4), 51, dtype=torch.uint8), training)
        assert found.distances[0] == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("..... ..... .....", (0, 0)),
        ("##### #...# #####", (1, 1)),
        ("##### #...# #.###", (1, 0)),  # open at the bottom
        ("#.... .#... ..### ....#", (1, 0)),  # corners touch
        ("##### ..... #####", (2, 0)),
        ("##### ..... ####.", (1, 0)),  # four pixels are a speck
    ],
)
def test_pieces_and_holes(rows: str, expected: tuple[int, int]) -> None:
    values = torch.tensor([[128 if letter == "#" else 127 for letter in row] for row in rows.split()])
    framed = torch.nn.functional.pad(values, (1, 1, 1, 1)).byte()
    assert tuple(stroke_shapes(framed[None, None])[0]) == expected
