"""Every recipe on this machine: parameters, speed, and what the small ones draw after ten minutes.

    python benchmarks/recipes.py path/to/mnist

Each of the small recipes is trained with its learning rate planned for `--minutes`, in `--runs/<name>`; what is found
there is used again. Samples are drawn by the sampler of the recipe at its guidance.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from jsonargparse import auto_cli

from mnist_diffusion.config import RECIPES, Config
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.method.objective import diffusion_objective
from mnist_diffusion.plots.tables import markdown
from mnist_diffusion.training.probe import seconds_per_image
from mnist_diffusion.training.step import TrainState

SMALL = ("default", "tiny", "ddpm_200", "compact_500", "guided_300")
HEADINGS = (
    "recipe",
    "parameters",
    "images/s",
    "steps",
    "epochs",
    "drawn by",
    "class accuracy",
    "FID",
    "± s.e.",
    "floor",
)


def main(
    data: str,
    *,
    minutes: float = 10,
    num_images: int = 1000,
    max_inference_steps: int = 50,
    dtype: str = "bfloat16",
    recipes: tuple[str, ...] = (),
    runs: Path = Path("runs/recipes"),
) -> None:
    """Print the table, one row per recipe.

    Args:
        data: the labelled images to train on and to measure against.
        minutes: training time of the small recipes.
        num_images: images drawn of each.
        max_inference_steps: at most so many steps of the recipe's sampler.
        dtype: precision of the networks that draw.
        recipes: which to measure; all if omitted.
        runs: where runs and measurements are kept.
    """
    chosen = recipes or tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    rows = []
    for name in chosen:
        measured = _speed(name, data, runs / f"{name}.json")
        if name in SMALL:
            measured |= _quality(
                name,
                data,
                minutes=minutes,
                num_images=num_images,
                max_inference_steps=max_inference_steps,
                dtype=dtype,
                runs=runs,
            )
        rows.append(_row(name, measured))
    print(markdown(HEADINGS, rows))


def _speed(name: str, data: str, kept: Path) -> dict[str, Any]:
    """Parameters, and training images per second."""
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    recipe = Config.load(name)
    data_config, train = replace(recipe.data, source=data), replace(recipe.train, mixed_precision="no")
    config = replace(recipe, data=data_config, train=train)
    set_num_threads(config.train.num_threads)
    images = load_images(config.data, seed=0)
    unet = build_unet(
        config.model, image_size=images.image_size, channels=images.channels, num_classes=images.num_classes
    )
    null_class = images.num_classes if config.model.class_conditional else None
    objective = diffusion_objective(
        config.diffusion, NoisingProcess.of(build_noise_scheduler(config.diffusion)), null_class
    )
    state = TrainState(config, Accelerator(), images, unet, objective)
    measured = {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "images_per_second": 1 / seconds_per_image(state, seconds=12.0),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(measured), encoding="utf-8")
    return measured


def _quality(
    name: str, data: str, *, minutes: float, num_images: int, max_inference_steps: int, dtype: str, runs: Path
) -> dict[str, Any]:
    """What a recipe draws after so many minutes."""
    folder, evaluation = runs / name, runs / f"{name}-evaluation"
    if not (folder / "pipeline").is_dir():
        length = ["--train.max_steps", "null", "--train.max_epochs", "null", "--train.max_minutes", str(minutes)]
        _command("train", "--config", name, "--data.source", data, *length, "--output_dir", str(folder))
    if not (evaluation / "report.json").is_file():
        own = Config.load(name).sampling.num_inference_steps or max_inference_steps
        asked = ["--num_images", str(num_images), "--dtype", dtype]
        steps = ["--num_inference_steps", str(min(own, max_inference_steps))]
        pipeline = str(folder / "pipeline")
        _command("evaluate", pipeline, "--data.source", data, *asked, *steps, "--out", str(evaluation))
    [result] = json.loads((evaluation / "report.json").read_text(encoding="utf-8"))["results"]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = Config.load(folder / "config.yaml")
    return {**result, "step": summary["step"], "images": summary["step"] * config.data.batch_size}


def _command(*arguments: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name("mnist-diffusion")), *arguments], check=True)


def _row(name: str, measured: dict[str, Any]) -> list[str]:
    cost = [f"`{name}`", f"{measured['parameters']:,}", f"{measured['images_per_second']:.3g}"]
    if "fid" not in measured:
        return [*cost, "", "", "", *["not measured"] * 2, "", ""]
    epochs = measured["images"] / 60_000
    return [
        *cost,
        str(measured["step"]),
        f"{epochs:.2f}",
        measured["name"],
        f"{measured['accuracy']:.2%}",
        f"{measured['fid']:.3f}",
        f"{measured['fid_standard_error']:.3f}",
        f"{measured['fid_floor']:.3f}",
    ]


if __name__ == "__main__":
    auto_cli(main)
