"""Class accuracy and Fréchet distance for each sampler and number of steps.

    python benchmarks/samplers.py runs/<run>/pipeline path/to/mnist
    python benchmarks/samplers.py runs/<student>/pipeline path/to/mnist --samplers '[lcm,TCDScheduler,ddim]' \
        --steps '[1,2,4,8]'

Every cell draws the same classes from the same seeds at the pipeline's default guidance.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from mnist_diffusion.config import DataConfig, SamplingSettings
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.draw import ImageGenerator
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.metrics import frechet_distance
from mnist_diffusion.evaluation.score import Reference, embed
from mnist_diffusion.pipelines.drawing import load_pipeline
from mnist_diffusion.pipelines.samplers import SAMPLERS
from mnist_diffusion.plots.tables import markdown

CLASSES = (
    *("DEISMultistepScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    "TCDScheduler",
)


def main(
    pipeline: str,
    data: str,
    *,
    num_images: int = 1000,
    samplers: tuple[str, ...] = (*SAMPLERS, *CLASSES),
    steps: tuple[int, ...] = (5, 10, 20, 50),
    images: Path = Path("runs/samplers"),
) -> None:
    """Print the table, one row per sampler.

    Args:
        pipeline: a pipeline folder.
        data: the labelled images that are the reference.
        num_images: images drawn for each cell.
        samplers: one row each.
        steps: the numbers of steps, one column each.
        images: where the images are kept; those found are used again.
    """
    set_num_threads()
    real = load_images(DataConfig(source=data), seed=0)
    reference = Reference(real, evaluator_for(real).model)
    pipe = load_pipeline(pipeline, device=None)
    generator = ImageGenerator(pipe, real, num_images=num_images, seed=0, batch_size=128, folder=images)
    floor = reference.floor(num_images).values
    rows = [["real images", f"{floor['accuracy']:.1%}, {floor['fid']:.2f}", *[""] * (len(steps) - 1)]]
    rows += [[name, *(_cell(generator, reference, name, count) for count in steps)] for name in samplers]
    print(markdown(["sampler", *(f"{count} step{'s' if count > 1 else ''}" for count in steps)], rows))


def _cell(generator: ImageGenerator, reference: Reference, sampler: str, num_inference_steps: int) -> str:
    settings = generator.resolved(SamplingSettings(scheduler=sampler, num_inference_steps=num_inference_steps))
    try:
        generator.check(settings)
    except UserError:
        return "refused"
    sample = generator.draw(settings)
    evaluated = embed(reference.evaluator, sample.images, sample.labels)
    assert evaluated.labels is not None
    accuracy = float((evaluated.logits.argmax(dim=1) == evaluated.labels).float().mean())
    return f"{accuracy:.1%}, {frechet_distance(reference.matched(evaluated).features, evaluated.features):.2f}"


if __name__ == "__main__":
    auto_cli(main)
