"""Train a single-step denoiser at one noise level, and try it at levels it has never seen.

    python examples/denoiser.py                                                # two minutes on a laptop
    python examples/denoiser.py --sigma 0.3 --source path/to/mnist --steps 2000

The denoiser of Berkeley's CS180 project on diffusion models, with a smaller network: it knows neither time nor class,
and `unet(noisy, 0).sample` is the clean image, for pixels from 0 to 1. The training loop is written out. Leaves a plain
`UNet2DModel`, `denoised.png` and `psnr.json` in `runs/denoiser`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import trange

from mnist_diffusion.config import DataConfig, ModelConfig
from mnist_diffusion.data.dataset import ImageData, draw_batch, load_images
from mnist_diffusion.data.transforms import to_model_range
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.plots.grids import image_grid
from mnist_diffusion.seeds import torch_generator

SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
SHOWN_IMAGES, NUM_TEST_IMAGES = 2, 500


def train_denoiser(data: ImageData, config: DataConfig, *, sigma: float, steps: int, seed: int = 0) -> UNet2DModel:
    """Minimise the squared error to the clean image, from an image with noise of standard deviation `sigma`.

    Vincent et al. (2010), https://jmlr.org/papers/v11/vincent10a.html, with an isotropic Gaussian corruption.
    """
    model = ModelConfig(block_out_channels=(16, 32), layers_per_block=1, class_conditional=False)
    shape = {"image_size": data.image_size, "channels": data.channels, "num_classes": data.num_classes}
    unet = build_unet(model, **shape, seed=seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in trange(steps, desc="training", unit="step"):
        images, _ = draw_batch(data.train, config, seed=seed, step=step, part=slice(None))
        clean = to_model_range(images).add(1).div(2)
        noisy = clean + sigma * torch.randn(clean.shape, generator=torch_generator("cpu", seed, "noise", step))
        loss = (unet(noisy, 0).sample - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return unet.eval()


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
    rows: list[dict[str, float | None]] = []
    tiles = []
    for sigma in sigmas:
        noisy = clean + sigma * noise
        denoised = torch.cat([unet(part, 0).sample for part in noisy.split(100)]).clamp(0, 1)
        before, after = (float(peak_signal_noise_ratio(each, clean, data_range=1.0)) for each in (noisy, denoised))
        rows.append({"sigma": sigma, "noisy_psnr_db": before if sigma else None, "denoised_psnr_db": after})
        tiles.append(torch.stack([noisy, denoised, clean], dim=1)[:SHOWN_IMAGES].flatten(0, 1))
    by_row = torch.stack(tiles, dim=1).clamp(0, 1)  # [3 rows for each image, one column for each level, C, H, W]
    picture = image_grid(
        by_row.flatten(0, 1),
        len(rows),
        row_labels=["noisy", "denoised", "clean"] * (len(by_row) // 3),
        column_labels=[f"sigma {row['sigma']:g}\n{row['denoised_psnr_db']:.1f} dB" for row in rows],
        title="One denoising step, by standard deviation of the noise, with PSNR",
        min_side=56,
    )
    return rows, picture


def main() -> None:
    """Parse the command line, train, and write the sweep."""
    parser = argparse.ArgumentParser(description="Train a single-step denoiser at one noise level.")
    parser.add_argument("--sigma", type=float, default=0.5, help="standard deviation of the noise, pixels from 0 to 1")
    parser.add_argument("--source", default="digits", help="images, as for --data.source of train_cfg.py")
    parser.add_argument("--steps", type=int, default=1000, help="updates of 64 images")
    parser.add_argument("--out", type=Path, default=Path("runs/denoiser"), help="output folder")
    options = parser.parse_args()
    if options.sigma <= 0 or options.steps < 1:
        parser.error(f"--sigma={options.sigma} and --steps={options.steps} must be positive")
    config = DataConfig(source=options.source, batch_size=64)
    data = load_images(config, seed=0)
    unet = train_denoiser(data, config, sigma=options.sigma, steps=options.steps)
    rows, picture = sweep(unet, data.test.spread(NUM_TEST_IMAGES)[0], SIGMAS, seed=0)
    unet.save_pretrained(options.out)
    picture.save(options.out / "denoised.png")
    (options.out / "psnr.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print("  ".join(f"{name} {value}" if value is None else f"{name} {value:.2f}" for name, value in row.items()))
    print(f"The network and denoised.png are in {options.out}")


if __name__ == "__main__":
    main()
