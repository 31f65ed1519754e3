"""The evaluator network: what ships, how others are trained and kept."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation import evaluator as module
from mnist_diffusion.evaluation.evaluator import (
    SHIPPED,
    EvaluatorConfig,
    ImageEvaluator,
    accuracy,
    evaluator_for,
    load_evaluator,
    logits_and_features,
    save_evaluator,
    train_evaluator,
)


def test_shipped_evaluator_reads_mnist(mnist_data: ImageData) -> None:
    found = evaluator_for(mnist_data)
    assert found.origin == "shipped with the package"
    assert accuracy(found.model, mnist_data.test) >= 0.995
    assert found.sha256 == hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()


def test_shipped_evaluator_is_small_and_a_plain_transformers_folder() -> None:
    assert {path.name for path in SHIPPED.iterdir()} == {"config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_000_000
    assert ImageEvaluator.from_pretrained(SHIPPED).config.id2label[7] == "7"


def test_learns_the_digits(digits: ImageData, digits_evaluator: ImageEvaluator) -> None:
    assert accuracy(digits_evaluator, digits.test) > 0.95
    assert digits_evaluator.config.data_fingerprint == digits.fingerprint


def test_same_seed_gives_the_same_weights_and_leaves_the_global_generator(digits: ImageData) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = (train_evaluator(digits, steps=3, seed=seed, progress=False) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_loss_and_features() -> None:
    model = ImageEvaluator(EvaluatorConfig(channels=3, image_size=48, num_labels=4)).eval()
    output = model(torch.zeros(2, 3, 48, 48), torch.tensor([0, 3]))
    assert output.loss.ndim == 0
    logits, features = logits_and_features(model, torch.zeros(5, 3, 48, 48, dtype=torch.uint8), batch_size=2)
    assert (logits.shape, features.shape) == ((5, 4), (5, 96))


def test_save_and_load(digits: ImageData, digits_evaluator: ImageEvaluator, tmp_path: Path) -> None:
    save_evaluator(digits_evaluator, tmp_path / "evaluator")
    loaded = load_evaluator(tmp_path / "evaluator", digits).model
    images = torch.arange(2 * 784).view(2, 1, 28, 28).remainder(256).byte()
    assert torch.equal(logits_and_features(loaded, images)[0], logits_and_features(digits_evaluator, images)[0])
    with pytest.raises(UserError, match="nowhere"):
        load_evaluator(tmp_path / "nowhere", digits)
    reversed_names = dataclasses.replace(digits, class_names=digits.class_names[::-1])
    with pytest.raises(UserError, match=r"is for \(channels, size, classes\) .* but the images have"):
        load_evaluator(tmp_path / "evaluator", reversed_names)
    weights = tmp_path / "evaluator" / "model.safetensors"
    tensors = load_file(weights)
    save_file({"another": tensors["head.weight"]}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensor|has a tensor|has shape"):
        load_evaluator(tmp_path / "evaluator", digits)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_evaluator(tmp_path / "evaluator", digits)


def test_steps_follow_the_data(digits: ImageData) -> None:
    assert module.evaluator_steps(digits) == 506
    few = dataclasses.replace(digits, train=digits.train.select(torch.arange(20)))
    assert module.evaluator_steps(few) == module.MIN_STEPS


def test_one_class_has_no_evaluator(digits: ImageData) -> None:
    with pytest.raises(UserError, match=r"two classes or more, and data.source has 1"):
        evaluator_for(dataclasses.replace(digits, class_names=("0",)))


def test_trained_once_and_kept_by_data_and_recipe(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(module, "STEPS", 2)
    first = evaluator_for(digits)
    assert first.origin == "trained on the training split"
    [folder] = (tmp_path / "mnist_diffusion" / "evaluators").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert evaluator_for(digits).sha256 == first.sha256
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    monkeypatch.setattr(module, "STEPS", 3)
    assert evaluator_for(digits).sha256 != first.sha256
