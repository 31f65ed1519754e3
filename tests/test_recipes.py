"""Every recipe that ships: a few real steps, a save, a load, and an image."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import train_cfg
from mnist_diffusion.config import RECIPES
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.option_types import find_recipe
from mnist_diffusion.training.run_folder import read_metrics
from tests.conftest import parse_train

SHORT = [
    *("--data.source", "digits", "--data.batch_size", "4", "--train.max_epochs", "null", "--train.max_minutes", "null"),
    *("--train.max_steps", "1", "--train.log_every_steps", "1", "--train.num_eval_images", "8"),
    *("--train.samples_per_class", "1", "--train.pictures", "false"),
    *("--train.evaluate_every", "null"),
]
NARROWER = {
    "ddpm_1000": ["--model.block_out_channels", "[32,32,32,32]", "--model.attention_head_dim", "32"],
    "ddpm_1000_unconditional": ["--model.block_out_channels", "[32,32,32,32]", "--model.attention_head_dim", "32"],
    "diffusers_example": ["--model.block_out_channels", "[32,32,32,32,32,32]"],
    "rgb32_attention": ["--model.block_out_channels", "[64,64,64,128]"],
}
"""Widths of the large ones here; everything else of them stays."""
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_short_run(name: str, tmp_path: Path) -> None:
    narrower = [*NARROWER.get(name, []), "--sampling.num_inference_steps", "2"]
    folder = tmp_path / "run"
    assert train_cfg.main(["--config", name, *SHORT, *narrower, "--output_dir", str(folder)]) == 0
    [line] = read_metrics(folder / "metrics.jsonl")
    assert line["loss"] > 0
    assert (folder / "checkpoints" / "step-1" / "manifest.json").is_file()
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline", trust_remote_code=True)
    flow = "FlowMatchEulerDiscreteScheduler()" in (folder / "pipeline" / "README.md").read_text()
    config = parse_train(["--config", name]).config
    assert flow == (config.diffusion.prediction_type == "flow_prediction")
    labels = [3] if config.model.class_conditional else None
    image = pipeline(labels, num_inference_steps=2).images[0]
    size = config.data.image_size or 28
    assert image.size == (size, size)
    assert image.mode == ("RGB" if config.data.channels == 3 else "L")


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_how_large_and_what_it_costs(name: str) -> None:
    """The parameters in the first comment are those of the network, on MNIST or whatever the recipe asks for."""
    text = find_recipe(name, RECIPES).read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    config = parse_train(["--config", name]).config
    with torch.device("meta"):
        unet = build_unet(
            config.model, image_size=config.data.image_size or 28, channels=config.data.channels or 1, num_classes=10
        )
    count = sum(parameter.numel() for parameter in unet.parameters())
    shown = f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
    assert f"{shown} parameters" in comment
    assert re.search(r"Cost: .*(second|minute|images/s)", comment)
