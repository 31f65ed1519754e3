"""Class accuracy and Fréchet distance for each sampler and number of steps; writes docs/samplers.md.

    python benchmarks/samplers.py runs/<run>/pipeline path/to/mnist --out docs/samplers.md
    python benchmarks/samplers.py runs/<student>/pipeline path/to/mnist --samplers '[lcm,TCDScheduler,ddim]' \
        --steps '[1,2,4,8]' --out docs/samplers_of_a_student.md

Every cell draws the same classes from the same seeds at the pipeline's default guidance.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from mnist_diffusion.checks import SAMPLERS
from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.diffusion.pipeline import load_pipeline
from mnist_diffusion.environment import machine_description, set_num_threads
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.generated import ImageGenerator
from mnist_diffusion.evaluation.metrics import frechet_distance
from mnist_diffusion.evaluation.protocol import Reference

CLASSES = (
    *("DEISMultistepScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    "TCDScheduler",
)
DISTILLED = ", distilled in five minutes more,"


def main(
    pipeline: str,
    data: str,
    *,
    num_images: int = 1000,
    samplers: tuple[str, ...] = (*SAMPLERS, *CLASSES),
    steps: tuple[int, ...] = (5, 10, 20, 50),
    images: Path = Path("runs/samplers"),
    out: Path | None = None,
) -> None:
    """Print the table, one row per sampler.

    Args:
        pipeline: a pipeline folder.
        data: the labelled images that are the reference.
        num_images: images drawn for each cell.
        samplers: one row each.
        steps: the numbers of steps, one column each.
        images: where the images are kept; those found are used again.
        out: a file for the table; rewritten after each row.
    """
    set_num_threads()
    real = load_images(DataConfig(source=data), seed=0)
    reference = Reference(real, evaluator_for(real).model)
    pipe = load_pipeline(pipeline, device=None)
    generator = ImageGenerator(pipe, real, num_images=num_images, seed=0, batch_size=128, folder=images)
    floor, student = reference.floor(num_images).values, pipe.config.guidance_distilled
    lines = [
        f"# Samplers and steps{' of a student' if student else ''}",
        "",
        f"`python benchmarks/samplers.py PIPELINE path/to/mnist --num_images {num_images}"
        + (f" --samplers '[{','.join(samplers)}]' --steps '{list(steps)}'`," if student else "`,"),
        f"on the default recipe{DISTILLED if student else ''} after five minutes of training on MNIST:",
        "",
        f"{num_images} images per cell at guidance {pipe.config.guidance_scale:g}, "
        f"on {machine_description(pipe.device, 1)}: the class accuracy, and the Fréchet "
        f"distance in the evaluator's features (as many held-out images: {floor['accuracy']:.1%}, {floor['fid']:.2f}).",
        "",
        "| sampler | " + " | ".join(f"{count} step{'s' if count > 1 else ''}" for count in steps) + " |",
        "| --- |" + " --- |" * len(steps),
    ]
    print("\n".join(lines), flush=True)
    for name in samplers:
        cells = [_cell(generator, reference, name, count) for count in steps]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        if out is not None:
            out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(generator: ImageGenerator, reference: Reference, sampler: str, num_inference_steps: int) -> str:
    settings = generator.settings(sampler, num_inference_steps)
    try:
        generator.check(settings)
    except UserError:
        return "refused"
    evaluated = reference.evaluated(generator.draw(settings))
    assert evaluated.labels is not None
    accuracy = float((evaluated.logits.argmax(dim=1) == evaluated.labels).float().mean())
    return f"{accuracy:.1%}, {frechet_distance(reference.matched(evaluated).features, evaluated.features):.2f}"


if __name__ == "__main__":
    auto_cli(main)
