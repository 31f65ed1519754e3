"""Train a single-step denoiser at one noise level, and try it at levels it has never seen.

    python examples/denoiser.py                                             # two minutes on a laptop
    python examples/denoiser.py --sigma 0.3 --data.source path/to/mnist     # another level; any option of train_cfg.py

The denoiser of Berkeley's CS180 project on diffusion models, with a smaller network: it knows neither time nor class,
and `unet(noisy, 0).sample` is the clean image, for pixels from 0 to 1. Leaves `denoiser/` (a plain `UNet2DModel`),
`denoised.png` and `psnr.json` in its run folder.

It is trained by the same loop as a pipeline, so it also shows how much of a run an objective and a page can change.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from mnist_diffusion.cli.options import parse_train_arguments, reporting_errors
from mnist_diffusion.config import Config
from mnist_diffusion.data.transforms import to_model_range
from mnist_diffusion.diffusion.network import build_unet
from mnist_diffusion.diffusion.objective import Batch, Objective
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.files import replace_folder, replace_picture
from mnist_diffusion.pictures.grids import image_grid
from mnist_diffusion.seeds import torch_generator
from mnist_diffusion.training.launch import launch
from mnist_diffusion.training.loop import TrainingLoop

SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
SHOWN_IMAGES, DRAWN_IMAGES, MEASURED_IMAGES = 2, 100, 500


def denoiser_objective(sigma: float) -> Objective:
    """Squared error to the clean image, mean over pixels, from an image with noise of standard deviation `sigma`.

    Vincent et al. (2010), https://jmlr.org/papers/v11/vincent10a.html, with an isotropic Gaussian corruption. There is
    one timestep, and no label to drop.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        clean = batch.images.add(1).div(2)
        prediction = model(clean + sigma * batch.noise, 0, return_dict=False)[0]
        return (prediction.float() - clean).square().mean(dim=(1, 2, 3))

    return Objective(loss, num_timesteps=1, fingerprint=f"sigma {sigma}", name="denoiser")


@torch.no_grad()
def sweep(
    unet: UNet2DModel, images: Tensor, sigmas: Sequence[float], *, seed: int
) -> tuple[list[dict[str, float | None]], Image.Image]:
    """Denoise uint8 images `[N, C, H, W]` at several noise levels, with the same noise scaled to each.

    Returns:
        For each level `sigma`, `noisy_psnr_db` (None without noise) and `denoised_psnr_db`; and a picture with a noisy,
        a denoised and a clean row for each of the first images.
    """
    clean = to_model_range(images).add(1).div(2)
    noise = torch.randn(clean.shape, generator=torch_generator("cpu", seed, "eval"))
    weight = next(unet.parameters())
    rows: list[dict[str, float | None]] = []
    shown = []
    for sigma in sigmas:
        noisy = clean + sigma * noise
        parts = [unet(part.to(weight.device, weight.dtype), 0).sample.float().cpu() for part in noisy.split(100)]
        denoised = torch.cat(parts).clamp(0, 1)
        before, after = (float(peak_signal_noise_ratio(each, clean, data_range=1.0)) for each in (noisy, denoised))
        rows.append({"sigma": sigma, "noisy_psnr_db": before if sigma else None, "denoised_psnr_db": after})
        shown.append(torch.stack([noisy, denoised, clean], dim=1)[:SHOWN_IMAGES].flatten(0, 1))
    tiles = torch.stack(shown, dim=1).clamp(0, 1)  # [3 rows for each image, one column for each level, C, H, W]
    picture = image_grid(
        tiles.flatten(0, 1),
        len(rows),
        row_labels=["noisy", "denoised", "clean"] * (len(tiles) // 3),
        column_labels=[f"sigma {row['sigma']:g}\n{row['denoised_psnr_db']:.1f} dB" for row in rows],
        title="One denoising step, by standard deviation of the noise, with PSNR",
        min_side=56,
    )
    return rows, picture


class DenoiserRun(TrainingLoop):
    """A training run of a denoiser: it draws the sweep in place of samples, and exports the network alone."""

    exported = "denoiser"

    def _sweep(self, count: int) -> tuple[list[dict[str, float | None]], Image.Image]:
        images = self.data.test.spread(count)[0]
        return sweep(self.state.average(), images, SIGMAS, seed=self.config.train.seed)

    def draw_samples(self) -> None:
        """The sweep, on a few held-out images."""
        path = self.folder / "samples" / f"step-{self.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        replace_picture(self._sweep(DRAWN_IMAGES)[1], path)

    def draw_at_the_end(self) -> None:
        """The sweep on more held-out images, as a picture and a table."""
        rows, picture = self._sweep(MEASURED_IMAGES)
        replace_picture(picture, self.folder / "denoised.png")
        (self.folder / "psnr.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        table = Table("sigma", "noisy, PSNR in dB", "denoised, PSNR in dB")
        for row in rows:
            table.add_row(*("" if value is None else f"{value:.2f}" for value in row.values()))
        Console().print(table)

    def export(self, folder: Path) -> None:
        """Write the network."""
        # Safetensors refuses weights in channels-last order.
        network = copy.deepcopy(self.state.average()).to(memory_format=torch.contiguous_format)
        replace_folder(folder, network.save_pretrained)

    def usage(self) -> str:
        """Load with plain diffusers, and denoise."""
        return (
            "from diffusers import UNet2DModel\n"
            f'unet = UNet2DModel.from_pretrained("{self.folder / self.exported}")\n'
            "denoised = unet(noisy, 0).sample  # noisy: float [B, C, H, W], pixels from 0 to 1 plus noise"
        )


def run(config: Config, sigma: float, *, dry_run: bool = False) -> int:
    """Train a denoiser at one noise level."""
    for name, value in (("evaluate_every", None), ("animate_at_epochs", ())):
        if getattr(config.train, name) != value:
            raise ConfigError(f"train.{name} must be left out: a denoiser draws no images, got {value!r}")
    plain = dataclasses.replace(config.model, class_conditional=False, patch_size=1)
    config = dataclasses.replace(config, model=plain)
    launched = launch(config, "denoiser")
    images = launched.load_images(config.data, seed=config.train.seed)
    shape = {"image_size": images.image_size, "channels": images.channels, "num_classes": images.num_classes}
    unet = build_unet(config.model, **shape, seed=config.train.seed)
    return DenoiserRun(launched, config, images, unet, denoiser_objective(sigma)).run(dry_run=dry_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sigma", type=float, default=0.5)
    own, others = parser.parse_known_args(argv)
    if not 0 < own.sigma < float("inf"):
        parser.error(f"--sigma must be a positive number, got {own.sigma}")
    arguments: Any = parse_train_arguments(["--train.max_minutes", "2", *others], prog="denoiser.py [--sigma S]")
    return reporting_errors(lambda: run(arguments.config, own.sigma, dry_run=arguments.dry_run))


if __name__ == "__main__":
    sys.exit(main())
