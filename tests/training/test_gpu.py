"""What only a GPU shows: bf16 with compiled passes, resumed to the bit, and digits drawn there."""

from pathlib import Path

import pytest
import torch

from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from train_cfg import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA")


def test_a_compiled_run_is_resumed_to_the_bit_and_draws(tmp_path: Path) -> None:
    flags = ["--config", "tiny", "--data.source", "digits", "--train.mixed_precision", "bf16"]
    flags += ["--train.channels_last", "true", "--train.pictures", "false", "--train.lr_schedule", "constant"]
    flags += ["--train.compile", "true"]

    def run(name: str, steps: int, *more: str) -> Path:
        folder = tmp_path / name
        assert main([*flags, "--output_dir", str(folder), "--train.max_steps", str(steps), *more]) == 0
        return folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"

    at_once = run("at_once", 40)
    run("killed", 20)
    resumed = run("killed", 40, "--train.resume", "true")
    assert resumed.read_bytes() == at_once.read_bytes()
    pipeline = MNISTDiffusionPipeline.from_pretrained(tmp_path / "killed" / "pipeline").to("cuda")
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return pipeline([3, 8], generator=noise, output_type="pt").images

    plain = draw()
    pipeline.compile()
    torch.testing.assert_close(draw(), plain, atol=0.02, rtol=0)
