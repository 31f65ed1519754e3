"""Every objective of the configuration goes all the way: train, resume, export, plain load, distil, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from mnist_diffusion.cli import main
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.evaluation.evaluator import save_evaluator, train_evaluator
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline

OBJECTIVES = {
    "the image, by the velocity, stratified": [
        *("--diffusion.prediction_type", "sample", "--diffusion.loss_space", "v_prediction"),
        *("--diffusion.timesteps", "stratified", "--diffusion.loss_weighting", "sigmoid"),
    ],
    "the noise, min-SNR, log-normal": [
        *("--diffusion.prediction_type", "epsilon", "--diffusion.loss_weighting", "min_snr"),
        *("--diffusion.timesteps", "lognormal"),
    ],
    "the flow": ["--diffusion.prediction_type", "flow_prediction", "--diffusion.beta_schedule", "linear"],
}
FLAGS = [
    *("--config", "tiny", "--data.source", "digits", "--train.pictures", "false", "--train.num_eval_images", "16"),
    *("--train.samples_per_class", "1", "--train.num_threads", "1", "--data.batch_size", "8"),
    *("--train.lr_schedule", "constant", "--train.checkpoint_every", "4 steps"),
]


@pytest.fixture(scope="module")
def evaluator(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that has learned next to nothing."""
    folder = tmp_path_factory.mktemp("objectives") / "evaluator"
    save_evaluator(train_evaluator(digits, steps=3, progress=False), folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_all_the_way(objective: list[str], tmp_path: Path, evaluator: str) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(["train", *FLAGS, *objective, "--train.max_steps", "8", "--output_dir", str(whole)]) == 0
    assert main(["train", *FLAGS, *objective, "--train.max_steps", "4", "--output_dir", str(resumed)]) == 0
    again = ["--train.max_steps", "8", "--output_dir", str(resumed), "--train.resume", "true"]
    assert main(["train", *FLAGS, *objective, *again]) == 0
    for name in ("unet", "ema", "optimizer"):
        file = f"checkpoints/step-8/{name}.safetensors"
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    folder = whole / "pipeline"
    plain = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    if "flow_prediction" in objective:
        assert type(plain.scheduler).__name__ == "DPMSolverMultistepScheduler"
        assert "FlowMatchEulerDiscreteScheduler()" in (folder / "README.md").read_text()
    images = [
        pipeline([3], generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipeline in (plain, MNISTDiffusionPipeline.from_pretrained(folder))
    ]
    assert torch.equal(*images)
    short = ["--train.max_steps", "2", "--train.num_eval_images", "8", "--train.samples_per_class", "1"]
    short += ["--data.batch_size", "4", "--train.pictures", "false", "--distillation.num_teacher_steps", "2"]
    student = str(tmp_path / "student")
    assert main(["distill", str(whole), "--output_dir", student, *short, "--train.num_threads", "1"]) == 0
    evaluate = ["evaluate", str(whole), student, "--num_images", "50", "--evaluator", evaluator]
    assert main([*evaluate, "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["results"]) == 2
