"""Samplers and steps, each at its own best guidance.

    python benchmarks/samplers.py runs/mnist path/to/mnist
    python benchmarks/samplers.py runs/student path/to/mnist --samplers '[lcm,ddim]' --steps '[1,2]' \
        --scales '[1.15]'

Every row draws the same classes. The guidance scale with the smallest Fréchet distance is chosen on the same number of
images from a different seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
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
from mnist_diffusion.plots.tables import markdown

CHOICE_SEED = 100
FIGURES: Mapping[str, str] = {"accuracy": "{:.2%}", "fid": "{:.3f}", "recall": "{:.1%}", "broken_share": "{:.1%}"}
HEADINGS = ("sampler", "steps", "guidance", "NFE", "class accuracy", "FID", "recall", "broken")


def main(
    pipeline: str,
    data: str,
    *,
    num_images: int = 5000,
    samplers: tuple[str, ...] = ("dpmpp", "dpmpp-sde", "ddpm", "ddim", "unipc", "euler", "heun"),
    steps: tuple[int, ...] = (10, 12, 16, 20),
    scales: tuple[float, ...] = (1.0, 1.15, 1.3, 1.5, 1.7, 2.0),
    seeds: int = 3,
    images: Path = Path("runs/samplers"),
) -> None:
    """Print the table, one row per sampler and number of steps: mean and standard deviation over the seeds.

    Args:
        pipeline: a pipeline folder.
        data: the labelled images that are the reference.
        num_images: images drawn for each figure.
        samplers: short names, or classes of diffusers.
        steps: the numbers of steps.
        scales: the guidance scales to choose from.
        seeds: how many are reported.
        images: where the images are kept; those found are used again.
    """
    set_num_threads()
    real = load_images(DataConfig(source=data), seed=0)
    reference = Reference(real, evaluator_for(real).model)
    pipe = load_pipeline(pipeline, device=None)
    generator = partial(ImageGenerator, pipe, real, num_images=num_images, batch_size=128, folder=images)
    floor = reference.floor(num_images, True).values
    rows = [["real images", "", "", "", *(pattern.format(floor[name]) for name, pattern in FIGURES.items())]]
    for name in samplers:
        for count in steps:
            settings = [
                SamplingSettings(scheduler=name, num_inference_steps=count, guidance_scale=scale) for scale in scales
            ]
            if not (settings := [each for each in settings if _is_possible(generator(seed=0), each)]):
                continue
            best = min(settings, key=lambda each: _distance(generator(seed=CHOICE_SEED), reference, each))
            drawn = [generator(seed=seed).draw(best) for seed in range(seeds)]
            scores = [reference.measure(embed(reference.evaluator, each.images, each.labels)).values for each in drawn]
            cells = [mean_and_deviation([each[figure] for each in scores], FIGURES[figure]) for figure in FIGURES]
            rows.append([name, str(count), f"{best.guidance_scale:g}", f"{drawn[0].nfe_per_image:g}", *cells])
    print(markdown(HEADINGS, rows))


def _is_possible(generator: ImageGenerator, settings: SamplingSettings) -> bool:
    """Whether the pipeline can draw so; a student takes its own scales alone."""
    try:
        generator.check(settings)
    except UserError:
        return False
    return True


def _distance(generator: ImageGenerator, reference: Reference, settings: SamplingSettings) -> float:
    sample = generator.draw(settings)
    evaluated = embed(reference.evaluator, sample.images, sample.labels)
    return frechet_distance(reference.matched(evaluated).features, evaluated.features)


def mean_and_deviation(values: list[float], pattern: str) -> str:
    """Of some figures, in a pattern such as `{:.2f}`."""
    mean = pattern.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {pattern.format(statistics.stdev(values))}"


if __name__ == "__main__":
    auto_cli(main)
