"""Score a set of images against real ones.

The reference is the training split. The floor is the score of held-out real images, as many as there are images to
score (or all, if there are fewer), measured by the same function.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.evaluation import metrics
from mnist_diffusion.evaluation.draw import MIN_IMAGES, Sample
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, logits_and_features
from mnist_diffusion.seeds import numpy_generator

BOOTSTRAPS = 20
SMALL_SAMPLE = 5000
MAX_NEIGHBOURHOOD = 10_000
MAX_COPY_CHECK = 2000
COPY_QUANTILE = 0.01
SUSPICIOUS_SHARE = 0.05
RARE_SHAPE = 0.01
"""Share of a class's training images below which a combination of pieces and holes is odd."""
SPREADS = ("accuracy_low", "accuracy_high", "fid_standard_error")
"""Metrics of the images alone; all others are also given for held-out images."""


@dataclass(frozen=True)
class EvaluatedImages:
    """Images, their classes (int64 `[N]`, or None), and the evaluator's logits `[N, classes]` and features `[N, D]`."""

    images: Tensor
    labels: Any
    logits: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> EvaluatedImages:
        """Some of the images."""
        labels = None if self.labels is None else self.labels[indices]
        return EvaluatedImages(self.images[indices], labels, self.logits[indices], self.features[indices])


@dataclass(frozen=True)
class Scores:
    """The metrics of a set of images, and what pictures of it need."""

    values: dict[str, Any]
    """Numbers by name, and `warnings` in words."""
    predicted: Tensor
    """The class that the evaluator predicts for each image, int64 `[N]`."""
    checked: Tensor
    """Which images, at most 2,000, were checked for copies, int64 `[n]`."""
    nearest: metrics.NearestImages
    """The training images nearest to those, and how near they are."""


def embed(evaluator: ImageEvaluator, images: Tensor, labels: Tensor | None) -> EvaluatedImages:
    """Run the evaluator over uint8 images `[N, C, H, W]`.

    Raises:
        DataError: every pixel of every image has the same value.
    """
    if images.min() == images.max():
        raise DataError(f"all {len(images)} images are blank: every pixel is {int(images.min())} of 255")
    return EvaluatedImages(images, labels, *logits_and_features(evaluator, images))


def copied_share(sampled: metrics.NearestImages, held_out: metrics.NearestImages) -> tuple[float, float, float]:
    """The share, with its interval, of images nearer to one training image than 99 of 100 held-out images are."""
    copied = sampled.relative <= np.quantile(held_out.relative, COPY_QUANTILE)
    return metrics.wilson_share(int(copied.sum()), len(copied))


def require_held_out(data: ImageData) -> None:
    """Raise a `DataError` if there are too few held-out images to compare with."""
    if len(data.test) < MIN_IMAGES:
        raise DataError(
            f"data.source has {len(data.test)} held-out images, too few for a floor; at least {MIN_IMAGES} are needed"
        )


class Reference:
    """The real side of every measurement.

    Args:
        data: the real images.
        evaluator: gives logits and features.
        seed: chooses subsets.
    """

    def __init__(self, data: ImageData, evaluator: ImageEvaluator, *, seed: int = 0):
        self.data, self.evaluator, self.seed = data, evaluator, seed
        self.train = embed(evaluator, data.train.images, data.train.labels)
        self.held_out = embed(evaluator, data.test.images, data.test.labels)
        self.floor = cache(self._floor)

    def _floor(self, num_images: int, labelled: bool) -> Scores:
        """The scores of `num_images` held-out images (all of them if there are fewer), with or without labels."""
        count = min(num_images, len(self.held_out))
        if not labelled:
            return self.measure(replace(self._some(self.held_out, count), labels=None))
        return self.measure(self.held_out.subset(self._choose(self.held_out, self.held_out.labels, count)))

    def score(self, sample: Sample) -> Scores:
        """All metrics of a sample, with their floor, such as `fid`, `fid_floor` and `fid_ratio`."""
        evaluated = embed(self.evaluator, sample.images, sample.labels)
        measured, floor = self.measure(evaluated), self.floor(len(evaluated), sample.labels is not None)
        share, low, _ = copied_share(measured.nearest, floor.nearest)
        entry = dict(measured.values)
        entry |= {f"{name}_floor": value for name, value in floor.values.items() if name in entry.keys() - SPREADS}
        entry["fid_ratio"] = entry["fid"] / entry["fid_floor"]
        entry |= {"copied_share": share, "copied_share_floor": COPY_QUANTILE}
        entry["copies_suspected"] = low > SUSPICIOUS_SHARE
        entry["warnings"] = self._warnings(entry)
        return replace(measured, values=entry)

    def measure(self, evaluated: EvaluatedImages) -> Scores:
        """The metrics of one set of images against the training split, without a floor."""
        real = self.matched(evaluated)
        checked = self._permutation(len(evaluated))[:MAX_COPY_CHECK]
        nearest = metrics.nearest_images(evaluated.images[checked], self.data.train.images)
        size = min(len(evaluated), len(real), MAX_NEIGHBOURHOOD)
        values: dict[str, Any] = {
            "num_images": len(evaluated),
            **self._by_class(evaluated),
            "fid": metrics.frechet_distance(real.features, evaluated.features),
            "fid_standard_error": self._fid_standard_error(real, evaluated),
            "kernel_distance": metrics.kernel_distance(real.features, evaluated.features, seed=self.seed),
            **metrics.neighbourhoods(self._some(real, size).features, self._some(evaluated, size).features),
            **self._stroke_shares(evaluated),
            "nearest_distance": float(np.median(nearest.distances)),
        }
        return Scores(values, evaluated.logits.argmax(dim=1), checked, nearest)

    def _by_class(self, evaluated: EvaluatedImages) -> dict[str, Any]:
        """Class accuracy over all and by class, with 95% intervals, and each class's distance to its real images."""
        if evaluated.labels is None:
            return {"accuracy": None}
        correct = evaluated.logits.argmax(dim=1) == evaluated.labels
        whole, shares, distances = _share(correct), {}, {}
        for label, name in enumerate(self.data.class_names):
            of_class = evaluated.labels == label
            real, generated = self.train.features[self.train.labels == label], evaluated.features[of_class]
            shares[name] = _share(correct[of_class])
            distances[name] = metrics.frechet_distance(real, generated) if min(len(real), len(generated)) > 1 else None
        interval = {"accuracy_low": whole["low"], "accuracy_high": whole["high"]}
        return {"accuracy": whole["accuracy"], **interval, "class_accuracy": shares, "class_fid": distances}

    def _stroke_shares(self, evaluated: EvaluatedImages) -> dict[str, float]:
        """Shares of grey images whose strokes are broken, and whose shape is odd for their class."""
        if evaluated.images.shape[1] != 1:
            return {}
        shapes = metrics.stroke_shapes(evaluated.images)
        shares = {"broken_share": float((shapes[:, 0] > 1).mean())}
        if evaluated.labels is not None:
            kinds = zip(evaluated.labels.tolist(), map(tuple, shapes), strict=True)
            shares["odd_shape_share"] = float(np.mean([kind not in self._usual_shapes for kind in kinds]))
        return shares

    @cached_property
    def _usual_shapes(self) -> set[tuple[int, tuple[int, ...]]]:
        """Class, and pieces and holes, of all but the rarest training images."""
        labels = self.data.train.labels.tolist()
        kinds = Counter(zip(labels, map(tuple, metrics.stroke_shapes(self.data.train.images)), strict=True))
        sizes = Counter(labels)
        return {kind for kind, count in kinds.items() if count >= RARE_SHAPE * sizes[kind[0]]}

    def _fid_standard_error(self, real: EvaluatedImages, evaluated: EvaluatedImages) -> float:
        """Standard deviation of the Fréchet distance when the images of each class are drawn again with replacement."""
        generator, labels = numpy_generator(self.seed, "eval", 1), evaluated.labels
        classes = [torch.arange(len(evaluated))]
        if labels is not None:
            classes = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        distances = []
        for _ in range(BOOTSTRAPS):
            resampled = [
                places[torch.from_numpy(generator.integers(len(places), size=len(places)))] for places in classes
            ]
            distances.append(metrics.frechet_distance(real.features, evaluated.features[torch.cat(resampled)]))
        return float(np.std(distances, ddof=1))

    def matched(self, evaluated: EvaluatedImages) -> EvaluatedImages:
        """The largest part of the training split with the class proportions of `evaluated`; all without labels."""
        if evaluated.labels is None:
            return self.train
        return self.train.subset(self._choose(self.train, evaluated.labels))

    def _choose(self, pool: EvaluatedImages, labels: Tensor, total: float = inf) -> Tensor:
        """Images of `pool` with classes in the proportions of `labels`: `total` of them, or as many as possible."""
        counts, available = (torch.bincount(each, minlength=self.data.num_classes) for each in (labels, pool.labels))
        present = counts > 0
        factor = min(float((available[present] / counts[present]).min()), total / len(labels))
        exact = counts.double() * factor
        shares = exact.floor().long()
        # The largest remainders make up the sum.
        missing = round(float(exact.sum())) - int(shares.sum())
        shares[(exact - shares).argsort(descending=True)[:missing]] += 1
        shares = torch.minimum(shares, available)
        generator = numpy_generator(self.seed, "eval", 2)
        parts = [
            generator.permutation(np.flatnonzero(pool.labels.numpy() == label))[:share]
            for label, share in enumerate(shares.tolist())
        ]
        return torch.from_numpy(np.sort(np.concatenate(parts)))

    def _some(self, evaluated: EvaluatedImages, size: int) -> EvaluatedImages:
        """`size` of the images, evenly chosen."""
        return evaluated if size == len(evaluated) else evaluated.subset(self._permutation(len(evaluated))[:size])

    def _permutation(self, size: int) -> Tensor:
        return torch.from_numpy(numpy_generator(self.seed, "eval", 3).permutation(size))

    def _warnings(self, entry: dict[str, Any]) -> list[str]:
        """Caveats for reading the metrics."""
        count, real_count = entry["num_images"], entry["num_images_floor"]
        few = (
            f"{count} images are few: distances are biased upwards, and {real_count} real images score "
            f"{entry['fid_floor']:.3g}. Compare equal image counts only; more held-out images make it more precise."
        )
        high_floor = (
            f"the floor is from all {real_count} held-out images, fewer than the {count} images: it is higher "
            "than at an equal number, and the ratio is lower."
        )
        copies = (
            f"{entry['copied_share']:.1%} of images are nearer to one training image than {1 - COPY_QUANTILE:.0%} "
            "of held-out images are: look for copies of training images."
        )
        raised = ((few, count < SMALL_SAMPLE), (high_floor, real_count < count), (copies, entry["copies_suspected"]))
        return [text for text, holds in raised if holds]


def _share(correct: Tensor) -> dict[str, Any]:
    """Share of the true values of `[n]`, with its interval; None without any."""
    if len(correct) == 0:
        return {"accuracy": None, "low": None, "high": None, "num_images": 0}
    share, low, high = metrics.wilson_share(int(correct.sum()), len(correct))
    return {"accuracy": share, "low": low, "high": high, "num_images": len(correct)}
