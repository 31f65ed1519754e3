"""The protocol on real digits: floors, order, what each figure reacts to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mnist_diffusion.data.dataset import ImageData, ImageSplit
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.evaluation.draw import Sample
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.score import Reference, embed


@pytest.fixture(scope="module")
def part_of_mnist(mnist_data: ImageData) -> Reference:
    """A tenth of the training images, which the evaluator classifies in a tenth of the time."""
    train = ImageSplit(mnist_data.train.tensor[:6000], mnist_data.train.labels[:6000])
    return Reference(dataclasses.replace(mnist_data, train=train), evaluator_for(mnist_data).model)


def held_out(reference: Reference, count: int = 1000) -> Sample:
    """Evenly over the split: MNIST's first test images are cleaner than its last."""
    test = reference.data.test
    chosen = torch.linspace(0, len(test) - 1, count).round().long()
    return Sample(test.images[chosen], test.labels[chosen])


def noise(images: Tensor) -> Tensor:
    return torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0)).byte()


def test_floor_is_held_out_images_of_the_same_number(digits_reference: Reference) -> None:
    floor = digits_reference.floor(100, True)
    assert floor.values["num_images"] == 100
    assert digits_reference.floor(100, True) is floor
    assert digits_reference.floor(5000, True).values["num_images"] == 180


def test_held_out_images_score_as_their_floor(part_of_mnist: Reference) -> None:
    values = part_of_mnist.score(held_out(part_of_mnist, 2000)).values
    assert 0.5 < values["fid_ratio"] < 2
    assert not values["copies_suspected"]
    assert abs(values["precision"] - values["precision_floor"]) < 0.03
    assert 0 < values["broken_share_floor"] < 0.04
    assert abs(values["odd_shape_share"] - values["odd_shape_share_floor"]) < 0.02
    assert values["accuracy"] > 0.99


def test_class_swap_drops_accuracy_and_leaves_the_distance(digits_reference: Reference) -> None:
    train = digits_reference.data.train
    chosen = torch.cat([torch.nonzero(train.labels == label).flatten()[:20] for label in range(10)])
    images, labels = train.tensor[chosen], train.labels[chosen]
    right = digits_reference.score(Sample(images, labels)).values
    swapped = digits_reference.score(Sample(images, (labels + 1) % 10)).values
    assert right["accuracy"] > 0.95
    assert swapped["accuracy"] < 0.05
    assert swapped["fid"] == right["fid"]
    assert swapped["class_fid"]["3"] > 5 * right["class_fid"]["3"]


@pytest.mark.parametrize("shift", [0, 1])
def test_copies_of_training_images_are_flagged(digits_reference: Reference, shift: int) -> None:
    train = digits_reference.data.train
    brighter = (train.tensor[:200].int() + shift).clamp(max=255).byte()
    values = digits_reference.score(Sample(brighter, train.labels[:200])).values
    assert values["copies_suspected"]
    assert values["copied_share"] == 1.0
    assert any("copies of training images" in warning for warning in values["warnings"])


def test_copies_are_looked_for_in_every_class(digits_reference: Reference) -> None:
    """Copies of the last class alone, in images sorted by class, as folders give them."""
    data = digits_reference.data
    order = data.test.labels.argsort()
    images, labels = data.test.tensor[order].repeat(20, 1, 1, 1), data.test.labels[order].repeat(20)
    order = labels.argsort()
    images, labels = images[order], labels[order]
    nines = data.train.tensor[data.train.labels == 9]
    images[labels == 9] = nines.repeat(10, 1, 1, 1)[: int((labels == 9).sum())]
    values = digits_reference.score(Sample(images, labels)).values
    assert values["copied_share"] > 0.08
    assert values["copies_suspected"]


@pytest.mark.parametrize("count", [50, 77, 140, 299])
def test_floor_has_exactly_as_many(part_of_mnist: Reference, count: int) -> None:
    labels = part_of_mnist.held_out.labels
    assert labels is not None
    chosen = part_of_mnist._choose(part_of_mnist.held_out, labels, count)
    assert len(chosen) == len(set(chosen.tolist())) == count


def test_held_out_class_without_images_and_too_few(digits: ImageData, digits_reference: Reference) -> None:
    nine_out = dataclasses.replace(
        digits, test=ImageSplit(digits.test.tensor[digits.test.labels < 9], digits.test.labels[digits.test.labels < 9])
    )
    floor = Reference(nine_out, digits_reference.evaluator).floor(100, True).values
    assert floor["class_accuracy"]["9"]["accuracy"] is None
    few = dataclasses.replace(digits, test=ImageSplit(digits.test.tensor[:20], digits.test.labels[:20]))
    with pytest.raises(DataError, match="20 held-out images, too few for a floor"):
        Reference(few, digits_reference.evaluator)


def test_without_labels_images_and_floor_have_one_reference(digits_reference: Reference) -> None:
    """So that the images of the floor themselves have a ratio of 1."""
    floor = digits_reference._some(digits_reference.held_out, 100)
    assert digits_reference.score(Sample(floor.images, None)).values["fid_ratio"] == 1.0


def test_without_labels(digits_reference: Reference) -> None:
    values = digits_reference.score(Sample(digits_reference.data.test.tensor, None)).values
    assert values["accuracy"] is None
    assert "class_fid" not in values
    assert values["fid_ratio"] < 2


def test_small_samples_carry_their_floor_in_a_warning(digits_reference: Reference) -> None:
    values = digits_reference.score(held_out(digits_reference, 100)).values
    [few] = values["warnings"]
    assert "100 images are few" in few
    assert f"{values['fid_floor']:.3g}" in few
    more = Sample(digits_reference.data.train.tensor[:500], digits_reference.data.train.labels[:500])
    assert any("the floor is from all 180" in warning for warning in digits_reference.score(more).values["warnings"])


def test_standard_error_is_that_of_fresh_samples(digits_reference: Reference) -> None:
    """The bootstrap's spread is of the size of the spread over disjoint sets of images."""
    train = digits_reference.data.train
    parts = [slice(start, start + 200) for start in range(0, 1600, 200)]
    values = [
        digits_reference.measure(embed(digits_reference.evaluator, train.tensor[p], train.labels[p])).values
        for p in parts
    ]
    spread = torch.tensor([value["fid"] for value in values]).std()
    mean = torch.tensor([value["fid_standard_error"] for value in values]).mean()
    assert 1 / 4 < mean / spread < 4


def test_same_seed_same_figures(digits: ImageData, digits_reference: Reference) -> None:
    again = Reference(digits, digits_reference.evaluator)
    sample = held_out(digits_reference, 150)
    assert again.score(sample).values == digits_reference.score(sample).values


@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_value(digits_reference: Reference, value: int) -> None:
    images = torch.full((60, 1, 28, 28), value, dtype=torch.uint8)
    with pytest.raises(DataError, match=f"all 60 images are of one value, {value} of 255"):
        digits_reference.score(Sample(images, torch.arange(60) % 10))


def test_reference_takes_the_class_proportions_of_the_sample(digits: ImageData, digits_reference: Reference) -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    chosen = torch.cat(
        [torch.nonzero(digits.train.labels == label).flatten()[:count] for label, count in ((0, 30), (1, 10))]
    )
    split = ImageSplit(digits.train.tensor[chosen], labels)
    matched = digits_reference.matched(embed(digits_reference.evaluator, split.tensor, split.labels))
    assert matched.labels is not None
    counts = torch.bincount(matched.labels, minlength=10).tolist()
    assert sum(counts[2:]) == 0
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.02)
    assert counts[0] == (digits.train.labels == 0).sum()
