"""`mnist-diffusion denoise`: try a single-step denoiser at several noise levels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from mnist_diffusion.config import DataConfig, TrainConfig


def main(argv: Sequence[str], *, prog: str) -> int:
    """Print PSNR at each noise level, and show what the denoiser makes of held-out images."""
    parser = ArgumentParser(
        prog=prog, description="Denoise held-out images in one step, at noise levels the denoiser may never have seen."
    )
    parser.add_argument("denoiser", type=str, help="the folder `denoiser` that a run of the denoiser recipe leaves")
    parser.add_class_arguments(DataConfig, "data", skip={"batch_size", "augment", "balance"})
    parser.add_argument(
        "--sigmas", type=list[NonNegativeFloat], default=None, help="standard deviations, for pixels from 0 to 1"
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of the noise")
    parser.add_argument(
        "--split_seed", type=NonNegativeInt, default=0, help="the run's train.seed, where data.source has no test split"
    )
    parser.add_argument("--device", type=str | None, help="such as cpu or cuda:0; a GPU where there is one")
    parser.add_argument("--out", type=Path, default=Path("denoised"), help="the folder for denoised.png and psnr.json")
    values = parser.parse_args(list(argv))
    from rich.console import Console  # noqa: PLC0415  (heavy)
    from rich.table import Table  # noqa: PLC0415

    from mnist_diffusion.data import load_images  # noqa: PLC0415
    from mnist_diffusion.denoising import SIGMAS, held_out_images, load_denoiser, require_same_shape, sweep  # noqa: PLC0415
    from mnist_diffusion.launch import set_num_threads  # noqa: PLC0415
    from mnist_diffusion.sampling import DEFAULT_DEVICE  # noqa: PLC0415

    set_num_threads(TrainConfig())
    unet = load_denoiser(values.denoiser, device=values.device or DEFAULT_DEVICE)
    data = load_images(DataConfig(**values.data.as_dict()), seed=values.split_seed)
    print(data.banner, end="")
    require_same_shape(unet, data)
    found = sweep(unet, held_out_images(data), values.sigmas or SIGMAS, seed=values.seed)
    table = Table("sigma", "noisy, PSNR in dB", "denoised, PSNR in dB", title=f"{values.denoiser} on held-out images")
    for sigma, noisy, denoised in zip(found.sigmas, found.noisy_psnr, found.denoised_psnr, strict=True):
        table.add_row(f"{sigma:g}", f"{noisy:.2f}", f"{denoised:.2f}")
    Console().print(table)
    values.out.mkdir(parents=True, exist_ok=True)
    found.picture.save(values.out / "denoised.png")
    rows = [
        {"sigma": sigma, "noisy_psnr_db": noisy if sigma else None, "denoised_psnr_db": denoised}
        for sigma, noisy, denoised in zip(found.sigmas, found.noisy_psnr, found.denoised_psnr, strict=True)
    ]
    (values.out / "psnr.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"The picture is {values.out / 'denoised.png'}")
    return 0
