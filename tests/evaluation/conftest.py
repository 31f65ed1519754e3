"""An evaluator of the embedded digits, trained in seconds, and one pipeline drawn to be measured."""

from __future__ import annotations

import pytest

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, train_evaluator
from mnist_diffusion.evaluation.protocol import Reference


@pytest.fixture(scope="session")
def digits_evaluator(digits: ImageData) -> ImageEvaluator:
    return train_evaluator(digits, steps=150, progress=False)


@pytest.fixture(scope="session")
def digits_reference(digits: ImageData, digits_evaluator: ImageEvaluator) -> Reference:
    return Reference(digits, digits_evaluator)
