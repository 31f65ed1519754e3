"""Measuring a pipeline again and again while it is trained: few images, always from the same seeds."""

from __future__ import annotations

from mnist_diffusion.data import ImageData
from mnist_diffusion.evaluation.evaluator import evaluator_for
from mnist_diffusion.evaluation.protocol import Reference
from mnist_diffusion.evaluation.samples import Artist
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import MNISTDiffusionPipeline

FOLLOWED = ("accuracy", "fid", "fid_ratio", "precision", "recall")


class Monitor:
    """Measures one pipeline, whose weights change, with its default call.

    Args:
        pipeline: around the weights that are trained.
        data: the images it is trained on.
        num_images: how many to draw each time.
        seed: of the images.

    Raises:
        UserError: `num_images` is not the same number for each class.
    """

    def __init__(self, pipeline: MNISTDiffusionPipeline, data: ImageData, *, num_images: int, seed: int):
        data = data.in_memory()
        self.artist = Artist(pipeline, data, num_images=num_images, seed=seed, batch_size=128)
        self.reference = Reference(data, evaluator_for(data).model, seed=seed)
        self.reference.floor(num_images)

    def measure(self) -> dict[str, float]:
        """The figures to follow, by name."""
        values = self.reference.report(self.artist.draw(self.artist.way(None, None, None))).values
        return {name: values[name] for name in FOLLOWED if values[name] is not None}
