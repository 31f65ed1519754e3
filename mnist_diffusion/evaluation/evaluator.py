"""The evaluator: a small image classifier whose labels and features the measurements are taken from.

It is a `transformers` model built from a configuration, without any download, because the stock stems shrink an
image of 28 pixels too fast. It never sees a generated image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from mnist_diffusion.data import ImageData, ImageSplit
from mnist_diffusion.data.images import to_model_range
from mnist_diffusion.data.stateless import numpy_generator, torch_generator

BATCH_SIZE = 128
MAX_ROTATION_DEGREES = 12.0
MAX_SHIFT = 0.1
MAX_SCALE = 0.1
LABEL_SMOOTHING = 0.05


class EvaluatorConfig(PretrainedConfig):
    """Shape of an `ImageEvaluator`."""

    model_type = "mnist_diffusion_evaluator"

    def __init__(
        self, channels: int = 1, image_size: int = 28, widths: tuple[int, ...] = (24, 32, 48, 64, 96), **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.channels, self.image_size, self.widths = channels, image_size, list(widths)


class ImageEvaluator(PreTrainedModel):
    """Convolutions with batch normalisation, halved after every second one; mean pooling; a linear head."""

    config_class = EvaluatorConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EvaluatorConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        before = config.channels
        for index, width in enumerate(config.widths):
            stride = 2 if index % 2 else 1
            layers += [
                nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: float `[B, C, H, W]` in [-1, 1].
            labels: int64 `[B]`; with them the output has a loss.

        Returns:
            `.logits` `[B, classes]`, and `.hidden_states[0]`, the pooled features `[B, D]`.
        """
        features = self.features(pixel_values).mean(dim=(2, 3))
        logits = self.head(features)
        loss = None if labels is None else F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=(features,))


def train_evaluator(data: ImageData, *, epochs: int = 10, seed: int = 0, progress: bool = True) -> ImageEvaluator:
    """Train an evaluator on the training split: AdamW, one-cycle learning rate, small random affine changes.

    Args:
        data: the images; the held-out split is not touched.
        epochs: passes over the training split.
        seed: of weights, order and augmentation.
        progress: show a bar.
    """
    labels = dict(enumerate(data.class_names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageEvaluator(
            EvaluatorConfig(channels=data.channels, image_size=data.image_size, id2label=labels, num_labels=len(labels))
        )
    batches_an_epoch = math.ceil(len(data.train) / BATCH_SIZE)
    steps = epochs * batches_an_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps, pct_start=0.2)
    model.train()
    for images, targets, step in tqdm(
        _training_batches(data.train, epochs, seed), total=steps, unit="step", disable=not progress, desc="evaluator"
    ):
        augmented = _random_affine(images, torch_generator("cpu", seed, "augment", step))
        loss = model(augmented, targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _training_batches(split: ImageSplit, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    step = 0
    for epoch in range(epochs):
        order = torch.from_numpy(numpy_generator(seed, "order", epoch).permutation(len(split)))
        for chosen in order.split(BATCH_SIZE):
            yield to_model_range(split.images[chosen]), split.labels[chosen], step
            step += 1


def _random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shift and scale each image of `[B, C, H, W]` a little, with black (-1) around."""
    draw = torch.rand(len(images), 4, generator=generator) * 2 - 1
    angle = draw[:, 0] * math.radians(MAX_ROTATION_DEGREES)
    scale = 1 + draw[:, 1] * MAX_SCALE
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = draw[:, 2:] * 2 * MAX_SHIFT
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.no_grad()
def logits_and_features(model: ImageEvaluator, images: Tensor, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Logits `[N, classes]` and features `[N, D]`, float32, of uint8 images `[N, C, H, W]`."""
    outputs = [model(to_model_range(part.to(model.device))) for part in images.split(batch_size)]
    return torch.cat([o.logits.cpu() for o in outputs]), torch.cat([o.hidden_states[0].cpu() for o in outputs])


def accuracy(model: ImageEvaluator, split: ImageSplit) -> float:
    """Share of a split's images that the evaluator reads as labelled."""
    logits, _ = logits_and_features(model, split.images)
    return float((logits.argmax(dim=1) == split.labels).float().mean())


def load_evaluator(folder: str | Path) -> ImageEvaluator:
    """Load a saved evaluator, for inference."""
    return ImageEvaluator.from_pretrained(folder, use_safetensors=True).eval()
