"""The evaluator network, and the protocol on real digits: floors, order, what each figure reacts to."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mnist_diffusion.command_options import EvaluationOptions
from mnist_diffusion.config import AugmentConfig
from mnist_diffusion.data.dataset import ImageData, ImageSplit
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.data.transforms import augment_images
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation import evaluator as module
from mnist_diffusion.evaluation.draw import Sample
from mnist_diffusion.evaluation.evaluate import evaluate, monitor
from mnist_diffusion.evaluation.score import Reference, embed
from mnist_diffusion.pipelines.drawing import load_pipeline


@pytest.fixture(scope="module")
def part_of_mnist(mnist_data: ImageData) -> Reference:
    """A tenth of the training images, which the evaluator classifies in a tenth of the time."""
    train = ImageSplit(mnist_data.train.images[:6000], mnist_data.train.labels[:6000])
    return Reference(dataclasses.replace(mnist_data, train=train), module.evaluator_for(mnist_data).model)


def test_floor_is_held_out_images_of_the_same_number(digits_reference: Reference) -> None:
    floor = digits_reference.floor(100, True)
    assert floor.values["num_images"] == 100
    assert digits_reference.floor(100, True) is floor
    assert [digits_reference.floor(count, True).values["num_images"] for count in (77, 5000)] == [77, 180]


def test_held_out_images_score_as_their_floor(part_of_mnist: Reference) -> None:
    values = part_of_mnist.score(Sample(*part_of_mnist.data.test.spread(2000))).values
    assert 0.5 < values["fid_ratio"] < 2
    assert not values["copies_suspected"]
    assert abs(values["precision"] - values["precision_floor"]) < 0.03
    assert 0 < values["broken_share_floor"] < 0.04
    assert abs(values["odd_shape_share"] - values["odd_shape_share_floor"]) < 0.02
    assert values["accuracy"] > 0.99


def test_class_swap_drops_accuracy_and_leaves_the_distance(digits_reference: Reference) -> None:
    train = digits_reference.data.train
    chosen = torch.cat([torch.nonzero(train.labels == label).flatten()[:20] for label in range(10)])
    images, labels = train.images[chosen], train.labels[chosen]
    right = digits_reference.score(Sample(images, labels)).values
    swapped = digits_reference.score(Sample(images, (labels + 1) % 10)).values
    assert right["accuracy"] > 0.95
    assert swapped["accuracy"] < 0.05
    assert swapped["fid"] == right["fid"]
    assert swapped["class_fid"]["3"] > 5 * right["class_fid"]["3"]


def test_copies_of_training_images_are_flagged(digits_reference: Reference) -> None:
    """Those of the last class alone, moved as by augmentation, in images sorted by class, as folders give them."""
    data = digits_reference.data
    order = data.test.labels.argsort()
    images, labels = data.test.images[order].repeat(5, 1, 1, 1), data.test.labels[order].repeat(5)
    order = labels.argsort()
    images, labels = images[order], labels[order]
    nines = data.train.images[data.train.labels == 9]
    augment = AugmentConfig(shift=0.06, rotate=8, scale=0.1)
    nines = augment_images(nines, augment, 0, np.zeros(len(nines), dtype=int), np.arange(len(nines)))
    images[labels == 9] = nines[: int((labels == 9).sum())]
    values = digits_reference.score(Sample(images, labels)).values
    assert values["copied_share"] > 0.07
    assert values["copies_suspected"]
    assert any("copies of training images" in warning for warning in values["warnings"])


def test_too_few_held_out_images_are_an_error_before_an_evaluator_is_trained(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(digits, test=digits.test.select(torch.arange(20)))
    monkeypatch.setattr("mnist_diffusion.evaluation.evaluate.load_images", lambda *_, **__: few)
    monkeypatch.setattr("mnist_diffusion.evaluation.evaluate.evaluator_for", pytest.fail)
    with pytest.raises(DataError, match="20 held-out images, too few for a floor"):
        evaluate(EvaluationOptions(sources=("mnist",), out=tmp_path))
    with pytest.raises(DataError, match="20 held-out images, too few for a floor"):
        monitor(load_pipeline("mnist", device="cpu"), few, num_images=60, seed=0)


def test_without_labels_images_and_floor_have_one_reference(digits_reference: Reference) -> None:
    """So that the images of the floor themselves have a ratio of 1."""
    values = digits_reference.score(Sample(digits_reference.data.test.images, None)).values
    assert (values["accuracy"], values["fid_ratio"]) == (None, 1.0)
    assert "class_fid" not in values


def test_standard_error_is_that_of_fresh_samples(digits_reference: Reference) -> None:
    """The bootstrap's spread is of the size of the spread over disjoint sets of images."""
    train = digits_reference.data.train
    parts = zip(train.images[:1600].split(200), train.labels[:1600].split(200), strict=True)
    values = [digits_reference.measure(embed(digits_reference.evaluator, *part)).values for part in parts]
    spread = torch.tensor([value["fid"] for value in values]).std()
    mean = torch.tensor([value["fid_standard_error"] for value in values]).mean()
    assert 1 / 4 < mean / spread < 4


def test_reference_takes_the_class_proportions_of_the_sample(digits: ImageData, digits_reference: Reference) -> None:
    zeros, ones = (torch.nonzero(digits.train.labels == label).flatten() for label in (0, 1))
    part = digits.train.select(torch.cat([zeros[:30], ones[:10]]))
    matched = digits_reference.matched(embed(digits_reference.evaluator, part.images, part.labels))
    assert matched.labels is not None
    counts = torch.bincount(matched.labels, minlength=10).tolist()
    assert (sum(counts[2:]), counts[0]) == (0, len(zeros))
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.02)


def test_shipped_evaluator_reads_mnist(mnist_data: ImageData) -> None:
    found = module.evaluator_for(mnist_data)
    assert found.origin == "shipped with the package"
    assert module.accuracy(found.model, mnist_data.test) >= 0.995
    assert found.sha256 == hashlib.sha256((module.SHIPPED / "model.safetensors").read_bytes()).hexdigest()


def test_shipped_evaluator_is_small_and_a_plain_transformers_folder() -> None:
    assert {path.name for path in module.SHIPPED.iterdir()} == {"config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in module.SHIPPED.iterdir()) < 1_000_000
    assert module.ImageEvaluator.from_pretrained(module.SHIPPED).config.id2label[7] == "7"


def test_save_and_load(digits: ImageData, digits_evaluator: module.ImageEvaluator, tmp_path: Path) -> None:
    module.save_evaluator(digits_evaluator, tmp_path / "evaluator")
    loaded = module.load_evaluator(tmp_path / "evaluator", digits).model
    images = torch.arange(2 * 784).view(2, 1, 28, 28).remainder(256).byte()
    of_loaded, of_saved = (module.logits_and_features(each, images)[0] for each in (loaded, digits_evaluator))
    assert torch.equal(of_loaded, of_saved)
    reversed_names = dataclasses.replace(digits, class_names=digits.class_names[::-1])
    with pytest.raises(UserError, match=r"is for \(channels, size, classes\) .* but the images have"):
        module.load_evaluator(tmp_path / "evaluator", reversed_names)


def test_trained_once_and_kept_by_data_and_recipe(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(module, "STEPS", 2)
    first = module.evaluator_for(digits)
    assert first.origin == "trained on the training split"
    [folder] = (tmp_path / "mnist_diffusion" / "evaluators").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert module.evaluator_for(digits).sha256 == first.sha256
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    monkeypatch.setattr(module, "STEPS", 3)
    assert module.evaluator_for(digits).sha256 != first.sha256
