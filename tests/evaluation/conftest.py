"""An evaluator of the embedded digits, trained in seconds, and one pipeline drawn to be measured."""

from pathlib import Path

import pytest

from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, train_evaluator
from mnist_diffusion.evaluation.score import Reference


@pytest.fixture(scope="session")
def mnist_data(mnist_folder: Path) -> ImageData:
    return load_images(ImagesConfig(source=str(mnist_folder)), seed=0)


@pytest.fixture(scope="session")
def digits_evaluator(digits: ImageData) -> ImageEvaluator:
    return train_evaluator(digits, steps=80, progress=False)


@pytest.fixture(scope="session")
def digits_reference(digits: ImageData, digits_evaluator: ImageEvaluator) -> Reference:
    return Reference(digits, digits_evaluator)
