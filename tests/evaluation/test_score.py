"""The evaluator network, and the protocol on real digits: floors, order, what each figure reacts to."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mnist_diffusion.data.dataset import ImageData, ImageSplit
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation import evaluator as module
from mnist_diffusion.evaluation.draw import Sample
from mnist_diffusion.evaluation.score import Reference, embed


@pytest.fixture(scope="module")
def part_of_mnist(mnist_data: ImageData) -> Reference:
    """A tenth of the training images, which the evaluator classifies in a tenth of the time."""
    train = ImageSplit(mnist_data.train.tensor[:6000], mnist_data.train.labels[:6000])
    return Reference(dataclasses.replace(mnist_data, train=train), module.evaluator_for(mnist_data).model)


def held_out(reference: Reference, count: int = 1000) -> Sample:
    """Evenly over the split: MNIST's first test images are cleaner than its last."""
    test = reference.data.test
    chosen = torch.linspace(0, len(test) - 1, count).round().long()
    return Sample(test.images[chosen], test.labels[chosen])


def test_floor_is_held_out_images_of_the_same_number(digits_reference: Reference) -> None:
    floor = digits_reference.floor(100, True)
    assert floor.values["num_images"] == 100
    assert digits_reference.floor(100, True) is floor
    assert [digits_reference.floor(count, True).values["num_images"] for count in (77, 5000)] == [77, 180]


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


def test_held_out_class_without_images_and_too_few(digits: ImageData, digits_reference: Reference) -> None:
    def held_out(chosen: Tensor) -> ImageData:
        return dataclasses.replace(digits, test=digits.test.select(chosen.nonzero().flatten()))

    nine_out = Reference(held_out(digits.test.labels < 9), digits_reference.evaluator)
    assert nine_out.floor(100, True).values["class_accuracy"]["9"]["accuracy"] is None
    with pytest.raises(DataError, match="20 held-out images, too few for a floor"):
        Reference(held_out(torch.arange(180) < 20), digits_reference.evaluator)


def test_without_labels_images_and_floor_have_one_reference(digits_reference: Reference) -> None:
    """So that the images of the floor themselves have a ratio of 1."""
    values = digits_reference.score(Sample(digits_reference.data.test.tensor, None)).values
    assert (values["accuracy"], values["fid_ratio"]) == (None, 1.0)
    assert "class_fid" not in values


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


@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_value(digits_reference: Reference, value: int) -> None:
    images = torch.full((60, 1, 28, 28), value, dtype=torch.uint8)
    with pytest.raises(DataError, match=f"all 60 images are of one value, {value} of 255"):
        digits_reference.score(Sample(images, torch.arange(60) % 10))


def test_reference_takes_the_class_proportions_of_the_sample(digits: ImageData, digits_reference: Reference) -> None:
    zeros, ones = (torch.nonzero(digits.train.labels == label).flatten() for label in (0, 1))
    part = digits.train.select(torch.cat([zeros[:30], ones[:10]]))
    matched = digits_reference.matched(embed(digits_reference.evaluator, part.tensor, part.labels))
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


def test_learns_the_digits(digits: ImageData, digits_evaluator: module.ImageEvaluator) -> None:
    assert module.accuracy(digits_evaluator, digits.test) > 0.95
    assert digits_evaluator.config.data_fingerprint == digits.fingerprint


def test_same_seed_gives_the_same_weights_and_leaves_the_global_generator(digits: ImageData) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = (module.train_evaluator(digits, steps=3, seed=seed, progress=False) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_loss_and_features() -> None:
    model = module.ImageEvaluator(module.EvaluatorConfig(channels=3, image_size=48, num_labels=4)).eval()
    output = model(torch.zeros(2, 3, 48, 48), torch.tensor([0, 3]))
    assert output.loss.ndim == 0
    logits, features = module.logits_and_features(model, torch.zeros(5, 3, 48, 48, dtype=torch.uint8), batch_size=2)
    assert (logits.shape, features.shape) == ((5, 4), (5, 96))


def test_save_and_load(digits: ImageData, digits_evaluator: module.ImageEvaluator, tmp_path: Path) -> None:
    module.save_evaluator(digits_evaluator, tmp_path / "evaluator")
    loaded = module.load_evaluator(tmp_path / "evaluator", digits).model
    images = torch.arange(2 * 784).view(2, 1, 28, 28).remainder(256).byte()
    of_loaded, of_saved = (module.logits_and_features(each, images)[0] for each in (loaded, digits_evaluator))
    assert torch.equal(of_loaded, of_saved)
    with pytest.raises(UserError, match="nowhere"):
        module.load_evaluator(tmp_path / "nowhere", digits)
    reversed_names = dataclasses.replace(digits, class_names=digits.class_names[::-1])
    with pytest.raises(UserError, match=r"is for \(channels, size, classes\) .* but the images have"):
        module.load_evaluator(tmp_path / "evaluator", reversed_names)
    weights = tmp_path / "evaluator" / "model.safetensors"
    tensors = load_file(weights)
    save_file({"another": tensors["head.weight"]}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensor|has a tensor|has shape"):
        module.load_evaluator(tmp_path / "evaluator", digits)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        module.load_evaluator(tmp_path / "evaluator", digits)


def test_steps_follow_the_data(digits: ImageData) -> None:
    assert module.evaluator_steps(digits) == 506
    few = dataclasses.replace(digits, train=digits.train.select(torch.arange(20)))
    assert module.evaluator_steps(few) == module.MIN_STEPS


def test_one_class_has_no_evaluator(digits: ImageData) -> None:
    with pytest.raises(UserError, match=r"two classes or more, and data.source has 1"):
        module.evaluator_for(dataclasses.replace(digits, class_names=("0",)))


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
