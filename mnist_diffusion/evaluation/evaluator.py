"""The evaluator: a small image classifier that provides the predictions and features for the metrics.

It is a `transformers` model built from a configuration, without any download, because the stock stems shrink an
image of 28 pixels too fast. It never sees a generated image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from mnist_diffusion.data.dataset import ImageData, ImageSplit
from mnist_diffusion.data.transforms import similarity_transform, to_model_range
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import copy_permissions, file_within, open_file, read_json, replace_folder
from mnist_diffusion.pipelines.folder import require_weights
from mnist_diffusion.seeds import indices_of_step, mixed_seed, torch_generator

SHIPPED = Path(__file__).parent / "mnist"
"""The evaluator of MNIST that ships with the package."""
STEPS, MIN_STEPS, EPOCHS = 4000, 300, 40
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 6e-3
WEIGHT_DECAY = 1e-2
MAX_ROTATION_DEGREES = 12.0
MAX_SHIFT = 0.1
MAX_SCALE = 0.1
MAX_LAYERS, MAX_WIDTH = 20, 10_000
SAVED = ("channels", "image_size", "widths", "kernel_sizes", "strides", "data_fingerprint", "id2label")
"""What is read of a saved evaluator's configuration."""


class EvaluatorConfig(PretrainedConfig):
    """Shape of an `ImageEvaluator`: width, kernel size and stride of each convolution, first to last."""

    model_type = "mnist_diffusion_evaluator"

    channels: int = 1
    image_size: int = 28
    widths: Sequence[int] = (32, 32, 64, 64, 96)
    kernel_sizes: Sequence[int] = (5, 3, 3, 3, 3)
    strides: Sequence[int] = (2, 1, 2, 1, 1)
    data_fingerprint: str | None = None


class ImageEvaluator(PreTrainedModel):
    """Convolutions with batch normalisation; mean pooling; a linear head."""

    config_class = EvaluatorConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EvaluatorConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        before = config.channels
        for width, kernel, stride in zip(config.widths, config.kernel_sizes, config.strides, strict=True):
            convolution = nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: float `[B, C, H, W]` in [-1, 1].
            labels: int64 `[B]`; with them the output has a loss.

        Returns:
            `.logits` `[B, classes]`, and `.hidden_states[0]`, the pooled features `[B, D]`.
        """
        features = self.features(pixel_values).mean(dim=(2, 3))
        logits = self.head(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=(features,))


def evaluator_steps(data: ImageData) -> int:
    """Number of training steps: 40 epochs, but at least 300 and at most 4,000 steps."""
    return min(STEPS, max(MIN_STEPS, math.ceil(EPOCHS * len(data.train) / BATCH_SIZE)))


def _build(data: ImageData) -> ImageEvaluator:
    """An evaluator with random weights."""
    # Larger images are halved once more, so that the last convolutions see the whole of them.
    strides = (2, 1, 2, 1, 1) if data.image_size <= 32 else (2, 1, 2, 1, 2)
    shape: dict[str, Any] = {"channels": data.channels, "image_size": data.image_size, "strides": strides}
    names = dict(enumerate(data.class_names))
    return ImageEvaluator(EvaluatorConfig(**shape, id2label=names, data_fingerprint=data.fingerprint))


def train_evaluator(data: ImageData, *, steps: int | None = None, seed: int = 0, progress: bool = True) -> Any:
    """Train an evaluator on the training split: AdamW, one-cycle learning rate, small random affine changes.

    Args:
        data: the images; the held-out split is not touched.
        steps: updates of 128 images; chosen by the size of the data set if None.
        seed: random seed for weights, order and augmentation.
        progress: show a progress bar.
    """
    steps = evaluator_steps(data) if steps is None else steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(seed, "init"))
        model: Any = _build(data)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.2)
    model.train()
    for step in tqdm(range(steps), unit="step", disable=not progress, desc="evaluator"):
        indices = torch.from_numpy(indices_of_step(seed, step, BATCH_SIZE, len(data.train))[0])
        generator = torch_generator("cpu", seed, "augment", step)
        images = _random_affine(to_model_range(data.train.images[indices]), generator)
        loss = model(pixel_values=images, labels=data.train.labels[indices]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().to(memory_format=torch.contiguous_format)


def _random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shift and scale each image of `[B, C, H, W]` a little, with black (-1) around."""
    draw = torch.rand(len(images), 4, generator=generator) * 2 - 1
    angle = draw[:, 0] * math.radians(MAX_ROTATION_DEGREES)
    moved = similarity_transform(images + 1, angle, 1 + draw[:, 1] * MAX_SCALE, draw[:, 2:] * 2 * MAX_SHIFT)
    return moved - 1


@torch.no_grad()
def logits_and_features(model: Any, images: Tensor, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Logits `[N, classes]` and features `[N, D]`, float32, of uint8 images `[N, C, H, W]`."""
    logits, features = [], []
    for part in images.split(batch_size):
        output = model(pixel_values=to_model_range(part.to(model.device)))
        logits.append(output.logits.cpu())
        features.append(output.hidden_states[0].cpu())
    return torch.cat(logits), torch.cat(features)


def accuracy(model: Any, split: ImageSplit) -> float:
    """Share of a split's images that the evaluator classifies as labelled."""
    logits, _ = logits_and_features(model, split.images)
    return float((logits.argmax(dim=1) == split.labels).float().mean())


@dataclass(frozen=True)
class LoadedEvaluator:
    """An evaluator, the SHA-256 of its weights, and where it comes from."""

    model: Any
    sha256: str
    origin: str


def load_evaluator(folder: Path, data: ImageData, *, origin: str | None = None) -> LoadedEvaluator:
    """Load a saved evaluator of a data set, for inference; its weights are checked before memory is taken for them.

    Args:
        folder: where it is saved.
        data: the images it must be for.
        origin: where it comes from, in words; the folder if None.

    Raises:
        UserError: there is none in the folder, or it is for other classes or images of another shape.
    """
    path, weights = file_within(folder, "config.json"), file_within(folder, "model.safetensors")
    values = read_json(path)
    try:
        for name in ("widths", "kernel_sizes", "strides"):
            if len(values[name]) > MAX_LAYERS or not all(1 <= number <= MAX_WIDTH for number in values[name]):
                raise ValueError(f"{name} must be at most {MAX_LAYERS} numbers from 1 to {MAX_WIDTH}")
        config = EvaluatorConfig(**{name: values[name] for name in SAVED})
        reads = (config.channels, config.image_size, tuple(config.id2label[i] for i in range(config.num_labels)))
        with torch.device("meta"):
            model = ImageEvaluator(config)
    except Exception as error:  # whatever a constructor makes of values that it does not expect
        raise FileError(f"{path} describes no evaluator: {type(error).__name__}: {str(error)[:200]}") from error
    expected = (data.channels, data.image_size, data.class_names)
    if reads != expected:
        raise UserError(
            f"evaluator {str(folder)!r} is for (channels, size, classes) {reads!s:.200}, "
            f"but the images have {expected!s:.200}; train another with `mnist-diffusion train_evaluator`"
        )
    require_weights([weights], model)
    model.load_state_dict(load_file(weights), assign=True)
    with open_file(weights) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return LoadedEvaluator(model.eval(), digest, origin or str(folder))


def evaluator_for(data: ImageData) -> LoadedEvaluator:
    """The evaluator of a data set: for MNIST one that ships with the package, else one that is trained once.

    It is kept in the Hugging Face cache, by the data's fingerprint and the settings of its training.

    Raises:
        UserError: there is only one class, from which no features can be learned.
    """
    if data.num_classes < 2:
        raise UserError(f"an evaluator needs images of two classes or more, and data.source has {data.num_classes}")
    if read_json(SHIPPED / "config.json")["data_fingerprint"] == data.fingerprint:
        return load_evaluator(SHIPPED, data, origin="shipped with the package")
    shape, steps = EvaluatorConfig(), evaluator_steps(data)
    optimization = (steps, BATCH_SIZE, PEAK_LEARNING_RATE, WEIGHT_DECAY)
    recipe = (*optimization, MAX_ROTATION_DEGREES, MAX_SHIFT, MAX_SCALE, [*shape.widths], [*shape.kernel_sizes])
    key = f"{data.fingerprint[:16]}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}"
    folder = Path(HF_HOME) / "mnist_diffusion" / "evaluators" / key
    weights = folder / "model.safetensors"
    if not weights.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent.with_suffix(".lock")):  # another evaluation may be training it
            if not weights.is_file():
                print(f"Training an evaluator on these images first, once: {steps} steps", flush=True)
                save_evaluator(train_evaluator(data), folder)
    return load_evaluator(folder, data, origin="trained on the training split")


def save_evaluator(model: PreTrainedModel, folder: Path) -> None:
    """Save an evaluator as a transformers folder, in place of the one that may be there."""

    logging.disable_progress_bar()  # of a single small file

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        copy_permissions(temporary / "config.json", temporary / "model.safetensors")

    replace_folder(folder, write)
