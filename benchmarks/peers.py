"""Conditional examples of other projects, trained on MNIST for as long as ours and measured the same way.

    pip install smalldiffusion denoising-diffusion-pytorch
    python benchmarks/peers.py path/to/mnist

Each is its project's own network, loss and sampler; what differs from its example is said at each. The
guidance scale with the smallest Fréchet distance is chosen on half as many digits of another seed, by the first run of
each.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jsonargparse import auto_cli
from samplers import mean_and_deviation
from torch import Tensor, nn

from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.score import Reference, embed
from mnist_diffusion.plots.tables import markdown

BATCH, DRAWN_AT_ONCE, CHOICE_SEED = 64, 250, 100
FIGURES: Mapping[str, str] = {
    "updates": "{:.0f}",
    "accuracy": "{:.2%}",
    "fid": "{:.3f}",
    "recall": "{:.1%}",
    "broken_share": "{:.1%}",
}
HEADINGS = ("project", "updates", "guidance", "NFE", "class accuracy", "FID", "recall", "broken")


@dataclass(frozen=True)
class Peer:
    """A project's example.

    Args:
        network: what is trained.
        loss: of images `[B, 1, 28, 28]` in [0, 1] and labels `[B]`.
        learning_rate: of Adam with its other defaults.
        ema_decay: of its average of the weights.
        sample: digits `[B, 1, 28, 28]` in [0, 1] of labels `[B]`, by the averaged network, at a guidance scale as
            diffusers counts it: 1 is conditional.
        scales: to choose from.
        steps: of sampling; each takes two evaluations where the scale is not 1.
    """

    network: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float
    ema_decay: float
    sample: Callable[[nn.Module, Tensor, float], Tensor]
    scales: tuple[float, ...]
    steps: int


def smalldiffusion() -> Peer:
    """Its examples/fashion_mnist_dit_cond.py, without mirrored digits, by Adam, not AdamW, and in batches of 64."""
    from smalldiffusion import CondEmbedderLabel, DiT, ScheduleDDPM, samples
    from smalldiffusion.diffusion import generate_train_sample

    schedule = ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
    shape = {"in_dim": 28, "channels": 1, "patch_size": 2, "depth": 6, "head_dim": 32, "num_heads": 6, "mlp_ratio": 4.0}
    network = DiT(**shape, cond_embed=CondEmbedderLabel(32 * 6, 10, 0.1))

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        clean, sigma, noise, labels = generate_train_sample((2 * images - 1, labels), schedule, conditional=True)
        return network.get_loss(clean, sigma, noise, cond=labels)

    def sample(averaged: nn.Module, labels: Tensor, scale: float) -> Tensor:
        how = {"gam": 1.6, "batchsize": len(labels), "cond": labels, "cfg_scale": scale - 1}
        *_, last = samples(averaged, schedule.sample_sigmas(20), **how)
        return (last + 1) / 2

    return Peer(network, loss, 1e-3, 0.99, sample, (1.0, 2.0, 3.0), 20)


def denoising_diffusion_pytorch() -> Peer:
    """The example at the end of its classifier_free_guidance.py, for digits padded to 32 pixels: a quarter as wide.

    It names no optimizer; rate and average are those of the project's README and `Trainer`. DDIM takes 20 steps.
    """
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

    network = Unet(dim=16, dim_mults=(1, 2, 4, 8), num_classes=10, cond_drop_prob=0.5, channels=1)
    options = {"image_size": 32, "timesteps": 1000, "sampling_timesteps": 20, "ddim_sampling_eta": 0.0}
    diffusion = GaussianDiffusion(network, **options)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return diffusion(nn.functional.pad(images, (2, 2, 2, 2)), classes=labels)

    def sample(averaged: nn.Module, labels: Tensor, scale: float) -> Tensor:
        diffusion.model = averaged
        return diffusion.sample(classes=labels, cond_scale=scale)[:, :, 2:-2, 2:-2]

    return Peer(network, loss, 8e-5, 0.995, sample, (2.0, 3.0, 6.0), 20)  # at 1 its sampler fails


PEERS: dict[str, Callable[[], Peer]] = {
    "smalldiffusion": smalldiffusion,
    "denoising-diffusion-pytorch": denoising_diffusion_pytorch,
}


def main(data: str, *, minutes: float = 5.0, seeds: int = 3, num_images: int = 500, only: str = "") -> None:
    """Print the table: mean and standard deviation over training seeds.

    Args:
        data: MNIST.
        minutes: of training.
        seeds: training seeds of each.
        num_images: digits that are measured.
        only: the projects that have this in their name.
    """
    set_num_threads()
    real = load_images(DataConfig(source=data), seed=0)
    reference = Reference(real, evaluator_for(real).model)
    floor = reference.floor(num_images, True).values
    rows = [["real digits", "", "", "", *(FIGURES[name].format(floor[name]) for name in list(FIGURES)[1:])]]
    for name, make in PEERS.items():
        if only in name:
            rows.append([name, *_row(make, real, reference, minutes, num_images, seeds)])
    print(markdown(HEADINGS, rows))


def _row(
    make: Callable[[], Peer], real: ImageData, reference: Reference, minutes: float, num_images: int, seeds: int
) -> list[str]:
    """Updates, guidance, evaluations and the metrics of one project, over its training seeds."""
    found: list[dict[str, float]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        peer = make()
        averaged, updates = train(peer, real, minutes)

        draw = partial(measured, reference, partial(peer.sample, averaged))
        if not found:
            distances = {scale: draw(scale, num_images // 2, CHOICE_SEED)["fid"] for scale in peer.scales}
            print(distances, file=sys.stderr, flush=True)
            chosen = min(distances, key=distances.__getitem__)
        found.append({**draw(chosen, num_images, seed), "updates": updates})
        print({name: found[-1][name] for name in FIGURES}, file=sys.stderr, flush=True)
    evaluations = peer.steps * (1 if chosen == 1 else 2)
    cells = [mean_and_deviation([each[name] for each in found], pattern) for name, pattern in FIGURES.items()]
    return [cells[0], f"{chosen:g}", str(evaluations), *cells[1:]]


def measured(
    reference: Reference, sample: Callable[[Tensor, float], Tensor], scale: float, num_images: int, seed: int
) -> dict[str, float]:
    """The metrics of digits, equally many of each class."""
    torch.manual_seed(seed)
    labels = torch.arange(num_images) % len(reference.data.class_names)
    with torch.inference_mode():
        drawn = torch.cat([sample(part, scale) for part in labels.split(DRAWN_AT_ONCE)])
    images = (drawn.clamp(0, 1) * 255).round().to(torch.uint8)
    return reference.measure(embed(reference.evaluator, images, labels)).values


def train(peer: Peer, real: ImageData, minutes: float) -> tuple[nn.Module, int]:
    """The average of the weights after some minutes, and the number of updates."""
    optimizer = torch.optim.Adam(peer.network.parameters(), lr=peer.learning_rate)
    averaged, updates, end = copy.deepcopy(peer.network).eval(), 0, time.monotonic() + 60 * minutes
    peer.network.train()
    while time.monotonic() < end:
        chosen = torch.randint(len(real.train), (BATCH,))
        loss = peer.loss(real.train.images[chosen] / 255, real.train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates += 1
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), peer.network.parameters(), strict=True):
                mean.lerp_(value, 1 - min(peer.ema_decay, updates / (updates + 10)))
    return averaged, updates


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
