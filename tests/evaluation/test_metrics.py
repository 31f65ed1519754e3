"""Metrics against closed forms, sums over pairs, and sets small enough to count by hand."""

from typing import Any

import pytest
import torch
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
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_a_shift() -> None:
    """Its square, also where features never vary."""
    real = torch.cat([features(100, 4), torch.zeros(100, 4)], dim=1)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(real, real + 1) == pytest.approx(8, rel=1e-6)


def test_kernel_distance_is_a_sum_over_pairs() -> None:
    real, generated = features(40, 6), features(40, 6, seed=1) + 1

    def kernels(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / 6 + 1) ** 3

    within = sum((kernels(x, x).sum() - kernels(x, x).trace()) / (40 * 39) for x in (real, generated))
    expected = float(within - 2 * kernels(real, generated).mean())
    assert kernel_distance(real, generated, subsets=1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("real", "fake", "k", "expected"),
    [
        ((0, 1, 10, 11), (0.5, 10.5, 100, 101), 1, (0.5, 1.0, 1.0, 1.0)),  # half of the fakes are far off
        ((0, 1, 10, 11), (0.30, 0.41, 0.60, 0.71), 1, (1.0, 0.0, 2.0, 0.5)),  # a dropped mode
        # Balls of real points reach 3, 2 and 3; those of fake ones 7, 4 and 7.
        ((0, 1, 3), (-2.5, 0.5, 4.5), 2, (1.0, 1.0, (1 + 3 + 1) / 3 / 2, 1.0)),
    ],
)
def test_neighbourhoods_by_hand(real: Any, fake: Any, k: int, expected: tuple[float, ...]) -> None:
    found = neighbourhoods(*(torch.tensor(each).double()[:, None] for each in (real, fake)), k=k)
    assert found == pytest.approx(dict(zip(("precision", "recall", "density", "coverage"), expected, strict=True)))


def test_a_copy_is_nearest() -> None:
    training = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    new = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    found = nearest_images(torch.cat([training[7:8], new]), training)
    assert found.indices[0] == 7
    assert found.relative[0] == pytest.approx(0, abs=1e-6)
    assert 0.8 < found.relative[1] <= 1


def test_an_interval_that_newcombe_published() -> None:
    """Statistics in Medicine, 1998."""
    assert wilson_share(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)


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
