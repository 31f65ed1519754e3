"""Metrics as pure functions of feature tensors, logits and pixels; each names its source.

Features and logits are those of an `ImageEvaluator`. Nothing here knows a model, a sampler or a trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import binomtest
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from mnist_diffusion.data.transforms import similarity_transform

WORKING_MEMORY_MIB = 256
HALF_GREY, MIN_PIECE = 128, 5
ALIGNED_BELOW = 10_000
"""Sets of fewer training images are compared after alignment."""
ALIGNMENT_SIDE, ALIGNMENT_STEPS, ALIGNMENT_RATE = 16, 40, 0.02
"""Side in pixels to which images are reduced to find the alignment; updates and learning rate of Adam."""


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features, in float64.

    Heusel et al. (2017), https://arxiv.org/abs/1706.08500, equation 6, in the features given. It is biased upwards by
    about the inverse of the number of images: compare it with a real sample of the same size.

    Args:
        real: `[N, D]`.
        generated: `[M, D]`.
    """
    identity = nn.Identity()  # the features are extracted already
    identity.num_features = real.shape[1]  # type: ignore[assignment]
    # Of several processes only the first scores images, and must not wait for the others.
    metric = FrechetInceptionDistance(feature=identity, sync_on_compute=False).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 50, subset_size: int = 1000, seed: int = 0
) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³, in float64.

    Binkowski et al. (2018), https://arxiv.org/abs/1801.01401, section 4: the mean over random subsets. Near 0 where
    the two distributions are the same; for sets matched by class it tends to lie below.

    Args:
        real: `[N, D]`.
        generated: `[M, D]`.
        subsets: how many subsets.
        subset_size: rows of each, at most those there are.
        seed: chooses the subsets.
    """
    size = min(subset_size, len(real), len(generated))
    real, generated = real.double(), generated.double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        subset_pairs = [
            (torch.randperm(len(real))[:size], torch.randperm(len(generated))[:size]) for _ in range(subsets)
        ]
    return float(torch.stack([poly_mmd(real[one], generated[other]) for one, other in subset_pairs]).mean())


def neighbourhoods(real: Tensor, generated: Tensor, *, k: int = 5) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage`, from balls around each point that reach its k-th neighbour.

    Precision is the share of generated points inside a ball of a real one, recall the share of real points inside a
    ball of a generated one: Kynkäänniemi et al. (2019), https://arxiv.org/abs/1904.06991, equation 2. Density counts
    the balls of real points around each generated one, over k; coverage is the share of real balls with a generated
    point inside: Naeem et al. (2020), https://arxiv.org/abs/2002.09797, section 3.

    Args:
        real: `[N, D]`.
        generated: `[M, D]`; N and M should be the same for the figures to be compared.
        k: which neighbour; the point itself is not counted.
    """
    reals, fakes = real.double().numpy(), generated.double().numpy()
    radii = _neighbour_distances(reals, k)
    balls = _balls_around(fakes, reals, radii)
    to_fake, _ = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(fakes).kneighbors(reals)
    return {
        "precision": float((balls > 0).mean()),
        "recall": float((_balls_around(reals, fakes, _neighbour_distances(fakes, k)) > 0).mean()),
        "density": float(balls.mean() / k),
        "coverage": float((to_fake[:, 0] <= radii).mean()),
    }


def _neighbour_distances(points: np.ndarray, k: int) -> np.ndarray:
    """Distance of each point to its k-th nearest neighbour other than itself, `[N]`."""
    distances, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors()
    return distances[:, -1]


def _balls_around(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """In how many balls each point lies, `[N]`."""
    chunks = pairwise_distances_chunked(points, centres, working_memory=WORKING_MEMORY_MIB)
    return np.concatenate([(distances <= radii).sum(axis=1) for distances in chunks])


def wilson_share(successes: int, trials: int) -> tuple[float, float, float]:
    """A share and its 95% Wilson (1927) score interval, which holds its level near 0 and 1 and for few trials."""
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return successes / trials, float(interval.low), float(interval.high)


def stroke_shapes(images: Tensor) -> np.ndarray:
    """Pieces and holes of each image, int64 `[N, 2]`, cut at half grey.

    A piece is an 8-connected bright area of at least five pixels; a hole is any 4-connected dark area except
    the largest.

    Args:
        images: uint8 `[N, 1, H, W]`, bright strokes on a dark ground.
    """
    shapes = []
    for bright in (images[:, 0] >= HALF_GREY).numpy():
        sizes = np.bincount(ndimage.label(bright, np.ones((3, 3)))[0].ravel())[1:]
        shapes.append(((sizes >= MIN_PIECE).sum(), max(0, ndimage.label(~bright)[1] - 1)))
    return np.array(shapes, dtype=np.int64)


@dataclass(frozen=True)
class NearestImages:
    """The training images that each image of a set is nearest to, after alignment in small sets."""

    distances: np.ndarray
    """Root-mean-square pixel difference to the nearest, on a scale from 0 to 1, `[N]`."""
    relative: np.ndarray
    """Ratio to the mean of the nearest ten: near 1 for a new image, near 0 for a copy, `[N]`."""
    indices: np.ndarray
    """Which training image is nearest, `[N]`."""


def nearest_images(images: Tensor, training: Tensor, *, neighbours: int = 10) -> NearestImages:
    """Find the nearest training images, pixel by pixel.

    The relative distance follows Carlini et al. (2023), https://arxiv.org/abs/2301.13188, equation 2: smooth, typical
    images are near to many training images, a copy is near to one. A network trained with augmentation copies images
    rotated, scaled or shifted a little. Below `ALIGNED_BELOW` training images, where memorising is likely, the nearest
    ones are therefore aligned with the image before distances are taken.

    Args:
        images: uint8 `[N, C, H, W]`.
        training: uint8 `[M, C, H, W]`.
        neighbours: over how many the mean is taken, at most those there are.
    """
    search = NearestNeighbors(n_neighbors=min(neighbours, len(training)), algorithm="brute").fit(_flat(training))
    distances, indices = search.kneighbors(_flat(images))
    if len(training) < ALIGNED_BELOW:
        distances = np.minimum(distances, _aligned_distances(images, training, indices))
        order = distances.argsort(axis=1)
        distances, indices = (np.take_along_axis(each, order, axis=1) for each in (distances, indices))
    scale = np.sqrt(images[0].numel())
    mean = distances.mean(axis=1)
    relative = np.divide(distances[:, 0], mean, out=np.zeros_like(mean), where=mean > 0)
    return NearestImages(distances[:, 0] / scale, relative, indices[:, 0])


@torch.enable_grad()
def _aligned_distances(images: Tensor, training: Tensor, indices: np.ndarray) -> np.ndarray:
    """Distances `[N, K]` of images to training images after the rotation, scale and shift that fit best."""
    distances = []
    bytes_of_image = indices.shape[1] * images[0].numel() * 32  # eight float32 values for each of a pair
    at_once = max(1, WORKING_MEMORY_MIB * 2**20 // bytes_of_image)
    for batch, nearest in zip(images.split(at_once), torch.from_numpy(indices).split(at_once), strict=True):
        pairs = batch.repeat_interleave(nearest.shape[1], dim=0), training[nearest.flatten()]
        fixed, moving = (each.float() / 255 for each in pairs)
        small, small_moving = (F.interpolate(each, (ALIGNMENT_SIDE,) * 2, mode="area") for each in (fixed, moving))
        angle, growth, shift = (torch.zeros(len(fixed), *size, requires_grad=True) for size in ((), (), (2,)))
        optimizer = torch.optim.Adam([angle, growth, shift], lr=ALIGNMENT_RATE)
        for _ in range(ALIGNMENT_STEPS):
            optimizer.zero_grad()
            moved = similarity_transform(small_moving, angle, 1 + growth, shift, "border")
            (moved - small).square().sum().backward()
            optimizer.step()
        moved = similarity_transform(moving, angle, 1 + growth, shift, "border").detach()
        distances.append((moved - fixed).flatten(1).norm(dim=1).view(nearest.shape))
    return torch.cat(distances).numpy()


def _flat(images: Tensor) -> np.ndarray:
    return images.flatten(1).float().div(255).numpy()
