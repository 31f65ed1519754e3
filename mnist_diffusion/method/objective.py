"""Training objectives: a loss per image, a label dropout, and a distribution of timesteps.

The training loop takes an `Objective` and knows nothing of diffusion. `examples/own_objective.py` adds another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from mnist_diffusion.config import DiffusionConfig
from mnist_diffusion.method.noise import NoisingProcess
from mnist_diffusion.option_types import FLOW
from mnist_diffusion.seeds import Purpose, torch_generator

SIGMOID_BIAS, MIN_SNR_GAMMA = 2.0, 5.0


@dataclass(frozen=True)
class Batch:
    """Images and the randomness of one step.

    Args:
        images: in [-1, 1], float32 `[B, C, H, W]`.
        labels: int64 `[B]`.
        noise: standard normal, float32 `[B, C, H, W]`.
        timesteps: below the objective's number of timesteps, int64 `[B]`.
        dropped: labels to replace by the null class, bool `[B]`.
    """

    images: Tensor
    labels: Tensor
    noise: Tensor
    timesteps: Tensor
    dropped: Tensor

    def __getitem__(self, part: slice) -> Batch:
        return Batch(*(getattr(self, each.name)[part] for each in fields(self)))

    def conditions(self, null_class: int | None) -> Tensor | None:
        """The labels, with the null class in place of dropped ones; None for an unconditional network."""
        return None if null_class is None else torch.where(self.dropped, null_class, self.labels)


@dataclass(frozen=True)
class Objective:
    """What the training loop minimises.

    Args:
        loss: maps a network and a batch to one loss per image, `[B]`.
        label_dropout: probability of dropping a label.
        num_timesteps: number of timesteps to draw from.
        fingerprint: identifies what the loss depends on besides configuration and images, such as a teacher's weights;
            a run resumes only with the same one.
        name: name in the configuration, card and summary of a run; the function's own if empty.
        draw_timesteps: draws timesteps, int64 `[B]`, from a count and a generator; uniform if None.
    """

    loss: Callable[[nn.Module, Batch], Tensor]
    label_dropout: float = 0.0
    num_timesteps: int = 1000
    fingerprint: str = ""
    name: str = ""
    draw_timesteps: Callable[[int, torch.Generator], Tensor] | None = None

    def __str__(self) -> str:
        name = self.name or getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        return f"{name}, fingerprint {self.fingerprint[:16]}" if self.fingerprint else name

    def draw(
        self, shape: tuple[int, ...], *, seed: int, step: int, device: torch.device | str, held_out: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw noise, timesteps and dropped labels of a step, for a global batch of `shape` `[B, C, H, W]`.

        Each has a random stream of its own. With `held_out` the streams are different ones, timesteps are uniform, and
        no label is dropped.
        """

        def generator(purpose: Purpose) -> torch.Generator:
            return torch_generator(device, seed, purpose, 0 if held_out else 1, step)

        noise = torch.randn(shape, generator=generator("noise"), device=device, dtype=torch.float32)
        if self.draw_timesteps is None or held_out:
            timesteps = torch.randint(self.num_timesteps, shape[:1], generator=generator("timesteps"), device=device)
        else:
            timesteps = self.draw_timesteps(shape[0], generator("timesteps"))
        share = 0.0 if held_out else self.label_dropout
        return noise, timesteps, torch.rand(shape[:1], generator=generator("labels"), device=device) < share


def null_class(unet: UNet2DModel) -> int | None:
    """The label of the null class, the last class embedding; None for an unconditional network."""
    embeddings = unet.config.num_class_embeds
    return None if embeddings is None else embeddings - 1


def error_scale(alphas_cumprod: Tensor, kind: str) -> Tensor:
    """Squared error in `kind` divided by squared error in the image, at each timestep, `[T]`.

    Salimans and Ho (2022), https://arxiv.org/abs/2202.00512, section 4: SNR for `epsilon`, SNR + 1 for `v_prediction`.
    For the flow it is `1 / sigma^2`, where the ratio of signal to noise is `(1 - sigma) / sigma`.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    scales = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr), FLOW: (snr.sqrt() + 1) ** 2}
    return scales[kind]


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """The min-SNR weight of each timestep, `[T]`: min(SNR, gamma) as a weight on the error of the clean image.

    Hang et al. (2023), https://arxiv.org/abs/2303.09556, section 3.4: divided by SNR for a prediction of the noise,
    by SNR + 1 for the velocity.
    """
    return error_scale(alphas_cumprod, "epsilon").clamp(max=gamma) / error_scale(alphas_cumprod, prediction_type)


def sigmoid_weights(alphas_cumprod: Tensor, bias: float) -> Tensor:
    """The weight of each timestep, `[T]`: sigmoid(bias - log SNR), on the error of the prediction.

    Kingma and Gao (2023), https://arxiv.org/abs/2303.00848, use it on the error of the noise, with a bias of 2.
    """
    return torch.sigmoid(bias - torch.logit(alphas_cumprod))


def timestep_distribution(
    config: DiffusionConfig, alphas_cumprod: Tensor
) -> Callable[[int, torch.Generator], Tensor] | None:
    """The function that draws the timesteps of a batch; None for a uniform distribution.

    Stratified: one from each of as many equal parts as there are images. Log-normal: Karras et al. (2022),
    https://arxiv.org/abs/2206.00364, table 1, whose noise level is the ratio of noise to signal, at the timestep with
    the nearest ratio. With straight paths this is the logit-normal distribution of Esser et al. (2024),
    https://arxiv.org/abs/2403.03206, section 3.1.
    """
    steps, (mean, std) = config.num_train_timesteps, config.lognormal
    levels = -torch.logit(alphas_cumprod.double()) / 2
    between = (levels[1:] + levels[:-1]) / 2

    def stratified(count: int, generator: torch.Generator) -> Tensor:
        within = torch.rand(count, generator=generator, device=generator.device)
        places = torch.arange(count, device=generator.device) + within
        return (places * (steps / count)).long().clamp(max=steps - 1)

    def lognormal(count: int, generator: torch.Generator) -> Tensor:
        level = mean + std * torch.randn(count, generator=generator, device=generator.device)
        return torch.searchsorted(between.to(level), level)

    return {"uniform": None, "stratified": stratified, "lognormal": lognormal}[config.timesteps]


def prediction_errors(model: nn.Module, batch: Batch, process: NoisingProcess, null_class: int | None) -> Tensor:
    """Prediction minus target for a batch, at least float32 `[B, C, H, W]`."""
    mixed, labels = (batch.images, batch.noise, batch.timesteps), batch.conditions(null_class)
    times = process.times.to(batch.timesteps.device)[batch.timesteps]
    prediction = model(process.noisy(*mixed), times, class_labels=labels, return_dict=False)[0]
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32)) - process.target(*mixed)


def diffusion_objective(config: DiffusionConfig, process: NoisingProcess, null_class: int | None) -> Objective:
    """Denoising diffusion, or flow matching: mean squared error, weighted over timesteps.

    Args:
        config: label dropout, timesteps, the space of the error, and the weighting.
        process: the noising process.
        null_class: the label of the null class; None for an unconditional network.
    """
    alphas, kind = process.alphas_cumprod, process.prediction_type
    space = kind if config.loss_space == "prediction" else config.loss_space
    weights = error_scale(alphas, space) / error_scale(alphas, kind)
    if config.loss_weighting == "sigmoid":
        weights = sigmoid_weights(alphas, SIGMOID_BIAS) * weights
    elif config.loss_weighting == "min_snr":
        weights = min_snr_weights(alphas, kind, MIN_SNR_GAMMA)
    weights = weights.nan_to_num(1.0)  # at zero SNR both scales of a prediction of the noise vanish

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        errors = prediction_errors(model, batch, process, null_class).square().mean(dim=(1, 2, 3))
        return errors * weights.to(errors.device)[batch.timesteps]

    name = "flow matching" if kind == FLOW else "denoising diffusion"
    draw_timesteps = timestep_distribution(config, alphas)
    return Objective(loss, config.label_dropout, len(process.times), name=name, draw_timesteps=draw_timesteps)
