"""Fréchet distance in the features of ImageNet's Inception network, for those who must report it.

It is unreliable here: the network was trained on colour photographs of 299 x 299 pixels, images of 28 x 28 are
upscaled more than tenfold for it, and its features have not been validated on digits. Barratt and Sharma (2018),
https://arxiv.org/abs/1801.01973, advise against it outside ImageNet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from mnist_diffusion.errors import UserError

BATCH_SIZE = 100


class ImageNetDistance:
    """Fréchet distance in ImageNet-Inception features.

    Args:
        device: runs the network.

    Raises:
        UserError: torch-fidelity is not installed, or its weights could not be loaded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
        try:
            metric = FrechetInceptionDistance(feature=2048, reset_real_features=False, sync_on_compute=False)
            self.metric = metric.to(self.device)
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                f"imagenet_fid=true: the Inception network could not be loaded ({error}). It needs torch-fidelity (pip "
                "install 'mnist-diffusion[inception]') and weights from GitHub or, offline, in torch.hub.get_dir()"
            ) from error

    def __call__(self, images: Tensor) -> float:
        """The distance of uint8 images `[N, C, H, W]` to the reference."""
        self.update(images, real=False)
        value = float(self.metric.compute())
        self.metric.reset()
        return value

    def update(self, images: Tensor, *, real: bool) -> None:
        """Add uint8 images `[N, C, H, W]` to the reference if `real`, else to those to be measured."""
        for part in tqdm(images.split(BATCH_SIZE), desc="Inception", unit="batch", leave=False):
            self.metric.update(part.expand(-1, 3, -1, -1).to(self.device), real=real)
