"""A single-step denoiser: trained at one noise level, tried at levels it never saw. Another objective, another product.

It works on pixels from 0 to 1 and knows neither time nor class: `unet(noisy, 0).sample` is the clean image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from mnist_diffusion.config import DiffusionConfig, UserError
from mnist_diffusion.data import ImageData
from mnist_diffusion.data.images import to_model_range
from mnist_diffusion.data.stateless import torch_generator
from mnist_diffusion.export import render_card, swap_in
from mnist_diffusion.figures import pixel_histograms, to_picture
from mnist_diffusion.hub_errors import HubError, hub_errors
from mnist_diffusion.objective import Batch, Draws, Objective, diffusion_draws
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import PICTURE, PipelineFolderError, fetch_unet, read_unet
from mnist_diffusion.sampling import repository
from mnist_diffusion.visualize import sigma_sweep, to_unit

SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
SHOWN_IMAGES = 2
MEASURED_IMAGES = 500
LOOKED_AT_IMAGES = 100
CARD_TEMPLATE = Path(__file__).parent / "denoiser_card.md"


def denoiser_objective(sigma: float) -> Objective:
    """The loss of a denoiser: squared error to the clean image, mean over pixels, of an image with noise of one level.

    Vincent et al. (2010), https://jmlr.org/papers/v11/vincent10a.html, with an isotropic Gaussian corruption.

    Args:
        sigma: standard deviation of the noise, for pixels from 0 to 1.
    """
    process = DiffusionConfig(label_dropout=0.0)

    def draw(shape: tuple[int, ...], **place: Any) -> Draws:
        return diffusion_draws(process, shape, **place)

    def training_loss(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        clean = batch.images.add(1).div(2)
        prediction = model(clean + sigma * draws.noise, 0, return_dict=False)[0]
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        return (prediction - clean).square().mean(dim=(1, 2, 3))

    return Objective(draw, training_loss)


@dataclass(frozen=True)
class Sweep:
    """A denoiser at several noise levels.

    Args:
        sigmas: standard deviations of the noise, for pixels from 0 to 1.
        noisy_psnr: peak signal-to-noise ratio of the noisy images at each, in dB; infinite without noise.
        denoised_psnr: that of the denoised images.
        picture: noisy, denoised and clean images at each.
        last: what becomes of the images at the last, uint8 `[N, C, H, W]`.
    """

    sigmas: tuple[float, ...]
    noisy_psnr: tuple[float, ...]
    denoised_psnr: tuple[float, ...]
    picture: Image.Image
    last: Tensor


@torch.no_grad()
def sweep(unet: UNet2DModel, images: Tensor, sigmas: Sequence[float], *, seed: int, batch_size: int = 100) -> Sweep:
    """Try a denoiser at several noise levels, with the same noise scaled to each.

    Args:
        unet: called at timestep 0.
        images: uint8 `[N, C, H, W]`.
        sigmas: standard deviations of the noise, for pixels from 0 to 1.
        seed: of the noise.
        batch_size: images denoised together.
    """
    clean = to_unit(to_model_range(images))
    noise = torch.randn(clean.shape, generator=torch_generator("cpu", seed, "eval"))
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    noisy_psnr, denoised_psnr, shown = [], [], []
    for sigma in sigmas:
        noisy = clean + sigma * noise
        parts = [unet(part.to(device, dtype), 0).sample.float().cpu() for part in noisy.split(batch_size)]
        denoised = torch.cat(parts).clamp(0, 1)
        noisy_psnr.append(float(peak_signal_noise_ratio(noisy, clean, data_range=1.0)))
        denoised_psnr.append(float(peak_signal_noise_ratio(denoised, clean, data_range=1.0)))
        shown.append(torch.stack([noisy[:SHOWN_IMAGES], denoised[:SHOWN_IMAGES]]))
    rows = torch.stack(shown, dim=1)
    picture = sigma_sweep(clean[:SHOWN_IMAGES], rows[0], rows[1], sigmas, torch.tensor(denoised_psnr))
    return Sweep(tuple(sigmas), tuple(noisy_psnr), tuple(denoised_psnr), picture, (denoised * 255).round().byte())


def held_out_images(data: ImageData, count: int = MEASURED_IMAGES) -> Tensor:
    """At most `count` held-out images, spread over all of them, uint8 `[N, C, H, W]`."""
    return data.test.images[data.test.spread(count)]


def load_denoiser(folder: str, *, device: str) -> UNet2DModel:
    """Load a denoiser, from safetensors only.

    Raises:
        UserError: it cannot be loaded, or it is no denoiser.
    """
    try:
        found = Path(folder)
        if not found.is_dir() and "/" not in folder.partition("@")[0]:
            raise PipelineFolderError("there is no such folder, and a Hub id is user/name")
        if not found.is_dir():
            repo_id, where = repository(folder)
            with hub_errors(repo_id, f"denoiser {folder!r} cannot be loaded: there is no such folder, and on the Hub"):
                found = fetch_unet(repo_id, **where)
        unet = read_unet(found).to(device)
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"denoiser {folder!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if unet.config.num_class_embeds is not None:
        raise UserError(f"{folder!r} is the network of a class-conditional diffusion model, not a denoiser")
    return unet.eval()


def require_same_shape(unet: UNet2DModel, data: ImageData) -> None:
    """Make sure that the images are such as the denoiser takes.

    Raises:
        UserError: they are not.
    """
    size, channels = unet.config.sample_size, unet.config.in_channels
    if (channels, size) != (data.channels, data.image_size):
        raise UserError(
            f"the denoiser takes images of {size} x {size} with {channels} channels, but data.source has "
            f"{data.image_size} x {data.image_size} with {data.channels}; set data.image_size and data.channels"
        )


@dataclass(frozen=True)
class DenoiserProduct:
    """A `Product`: the folder of a plain `UNet2DModel` that is called at timestep 0.

    Args:
        sigma: standard deviation of the noise it is trained on, for pixels from 0 to 1.
    """

    sigma: float
    folder_name: str = "denoiser"

    def save(self, unet: UNet2DModel, folder: Path, *, card: Mapping[str, Any], samples: Image.Image | None) -> None:
        """Write the network's folder."""

        def write(temporary: Path) -> None:
            copy.deepcopy(unet).to(memory_format=torch.contiguous_format).save_pretrained(temporary)
            if samples is not None:
                samples.save(temporary / PICTURE)
            values = {**card, "samples": PICTURE if samples is not None else None}
            render_card(values, template=CARD_TEMPLATE).save(temporary / "README.md")

        swap_in(folder, write)

    def card_values(self, unet: UNet2DModel) -> dict[str, Any]:
        """The noise it is trained on."""
        return {"sigma": self.sigma, "tags": ["denoising"], "pipeline_tag": "image-to-image"}

    def usage(self, unet: UNet2DModel, folder: Path) -> str:
        """Load with plain diffusers, and denoise."""
        return (
            "from diffusers import UNet2DModel\n"
            f'unet = UNet2DModel.from_pretrained("{folder}")\n'
            "denoised = unet(noisy, 0).sample  # noisy: float [B, C, H, W], pixels from 0 to 1 plus noise"
        )

    def beforehand(self, data: ImageData, seed: int) -> dict[str, Image.Image]:
        """Nothing: there is no schedule."""
        return {}

    def pictures(
        self, unet: UNet2DModel, data: ImageData, *, columns: int, seed: int, more: bool
    ) -> dict[str, Image.Image]:
        """Noisy, denoised and clean images at several noise levels; pixel values of real and denoised ones."""
        images = held_out_images(data, LOOKED_AT_IMAGES)
        found = {"samples": sweep(unet, images, SIGMAS, seed=seed).picture}
        if more:
            at_sigma = sweep(unet, images, [self.sigma], seed=seed)
            figure = pixel_histograms(images, at_sigma.last, title="Pixel values, real and denoised")
            found["pixel_histograms"] = to_picture(figure)
        return found

    def animation(self, unet: UNet2DModel, data: ImageData, *, columns: int, seed: int) -> list[Image.Image]:
        """Nothing: it takes a single step."""
        return []
