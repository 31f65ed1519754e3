"""Images to evaluate: drawn in parts that are used again, or read from what any program wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.dataset import ImageData, ImageSplit
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.draw import ImageGenerator
from mnist_diffusion.evaluation.external import read_sample
from mnist_diffusion.pipelines.drawing import resolved
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from tests.conftest import make_pipeline
from tests.data.test_formats import Files, encoded, write
from tests.pipelines.test_pipeline import CountingUNet

LETTERS = "abcdefghij"


@pytest.fixture(scope="module")
def letters() -> ImageData:
    """Ten classes of 8 x 8 pixels, as the tests' pipelines draw them."""
    images = torch.randint(0, 256, (100, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    split = ImageSplit(images, torch.arange(100) % 10)
    return ImageData(split, split, tuple(LETTERS), "letters", "letters")


def settings_of(scheduler: str | None, steps: int | None, scale: float | None) -> SamplingSettings:
    return SamplingSettings(scheduler=scheduler, num_inference_steps=steps, guidance_scale=scale)


def generator(
    pipeline: MNISTDiffusionPipeline, data: ImageData, folder: Path | None = None, **changes: int
) -> ImageGenerator:
    arguments: dict[str, Any] = {"num_images": 60, "seed": 0, "batch_size": 16, **changes}
    return ImageGenerator(pipeline, data, **arguments, folder=folder)


class TestDrawing:
    def test_equal_counts_quantised_and_evaluations_counted(
        self, pipeline: MNISTDiffusionPipeline, letters: ImageData
    ) -> None:
        before = pipeline.scheduler
        sample = generator(pipeline, letters).draw(settings_of("ddim", 3, 2.0))
        assert sample.images.dtype == torch.uint8
        assert sample.labels is not None
        assert torch.bincount(sample.labels).tolist() == [6] * 10
        assert sample.nfe_per_image == 6
        assert generator(pipeline, letters).draw(settings_of("heun", 3, 1.0)).nfe_per_image == 5
        assert pipeline.scheduler is before

    def test_parts_that_are_there_are_used_again(
        self, pipeline: MNISTDiffusionPipeline, letters: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mnist_diffusion.evaluation.draw.IMAGES_PER_PART", 20)
        few = generator(pipeline, letters, tmp_path, num_images=70).draw(settings_of("ddim", 2, 2.0))
        [folder] = tmp_path.iterdir()
        sorted(folder.iterdir())[1].unlink()
        counter = CountingUNet(pipeline)
        more = generator(pipeline, letters, tmp_path, num_images=80).draw(settings_of("ddim", 2, 2.0))
        assert counter.nfe == (20 + 20) * 4  # of the part that went, and of the one that had ten
        assert torch.equal(more.images[:70], few.images)
        assert more.nfe_per_image == few.nfe_per_image

    @pytest.mark.parametrize("change", [{"weights": 1}, {"seed": 1}, {"scale": 3.0}, {"spacing": "leading"}])
    def test_other_images_are_not_taken_for_these(self, change: Any, letters: ImageData, tmp_path: Path) -> None:
        def draw(seed: int = 0, scale: float = 2.0, weights: int = 0, spacing: str = "trailing") -> torch.Tensor:
            pipe = make_pipeline(seed=weights)
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
            return generator(pipe, letters, tmp_path, seed=seed).draw(settings_of("dpmpp", 4, scale)).images

        assert not torch.equal(draw(**change), draw())
        assert len(list(tmp_path.iterdir())) == 2

    def test_unconditional(self, letters: ImageData) -> None:
        pipeline = make_pipeline(conditional=False)
        sample = generator(pipeline, letters, num_images=55).draw(resolved(pipeline, settings_of(None, 2, None)))
        assert sample.labels is None
        assert (len(sample.images), sample.nfe_per_image) == (55, 2)

    def test_pipeline_and_data_must_fit(self, pipeline: MNISTDiffusionPipeline, letters: ImageData) -> None:
        with pytest.raises(UserError, match=r"\(3, 8, 8\) for the pipeline, but \(1, 8, 8\)"):
            generator(make_pipeline(channels=3), letters)
        backwards = replace(letters, class_names=tuple(LETTERS[::-1]))
        with pytest.raises(UserError, match=r"class names: \('a', 'b', .* for the pipeline, but \('j', 'i'"):
            generator(pipeline, backwards)


IMAGES = [np.full((8, 8), index, np.uint8) for index in range(60)]
FOLDERS: Files = {f"{LETTERS[index % 10]}/{index}.png": image for index, image in enumerate(IMAGES)}
COLOURED: Files = {name: np.dstack([image] * 3) for name, image in FOLDERS.items()}
PREFIXES = ("class", "digit")  # the second of version 0.2.0
NAMED: Files = {
    f"{PREFIXES[index % 2]}_{LETTERS[index % 10]}_{index:03}.png": image for index, image in enumerate(IMAGES)
}
ALONE: Files = {f"{index:02}.png": image for index, image in enumerate(IMAGES)}
TABLE = {"labels.csv": "file,label\n" + "".join(f"{name},{LETTERS[int(name[:2]) % 10]}\n" for name in ALONE)}
SHEETS = {"grid.png": np.zeros((80, 80), np.uint8), "times.csv": "file,seconds\n"}
KINDS = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LETTERS))})
ROWS = datasets.Dataset.from_dict({"image": IMAGES, "label": [index % 10 for index in range(60)]}, KINDS)
READ: dict[str, tuple[Files, bool, bool]] = {
    "one folder a class": (FOLDERS, True, False),
    "grey saved as RGB": (COLOURED, True, False),
    "classes in the names, and what is written beside them": (NAMED | SHEETS, True, False),
    "a table beside the pictures": (ALONE | TABLE, True, False),
    "parquet": ({"train.parquet": ROWS.to_parquet}, True, False),
    "pictures alone": (ALONE, False, False),
    "webp": ({f"{n[:-4]}.webp": encoded(i, "WEBP", lossless=True) for n, i in ALONE.items()}, False, False),
    "numbered folders": ({f"{int(name[:2]) // 20:06}/{name}": image for name, image in ALONE.items()}, False, True),
    "an array": ({"samples.npz": {"arr_0": np.stack(IMAGES)[..., None]}}, False, True),
}
"""Files, whether they have classes, and whether it is said that their folders are none."""
REFUSED: list[tuple[Files, str]] = [
    ({name: FOLDERS[name] for name in list(FOLDERS)[:40]}, "found 40 images; at least 50 are needed"),
    ({f"{LETTERS[i % 8]}/{i}.png": IMAGES[i] for i in range(60)}, r"no images of the classes \['i', 'j'\]"),
    (FOLDERS | {"x/0.png": IMAGES[0]}, r"classes \['x'\] are not among the real ones"),
    (
        {name: np.tile(image, (2, 2)) for name, image in FOLDERS.items()},
        r"images have shape \(1, 16, 16\) .* \(1, 8, 8\)",
    ),
    (COLOURED | {"a/0.png": np.full((8, 8, 3), (255, 0, 0), np.uint8)}, "are RGB, but the reference images are"),
    (FOLDERS | {"c/broken.png": encoded(IMAGES[0])[:40]}, r"broken\.png: the picture could not be decoded"),
    (NAMED | {"stray.png": IMAGES[0]}, r"'stray.png' names no class, but other files do"),
    ({"pipeline/x": ""}, "looks like a run folder or an incomplete pipeline folder"),
]


class TestReading:
    @pytest.mark.parametrize("case", READ)
    def test_what_other_programs_write(
        self, case: str, letters: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files, labelled, told = READ[case]
        sample = read_sample(write(tmp_path, files), letters)
        numbers = sample.images[:, 0, 0, 0].long()
        assert (sorted(numbers.tolist()), sample.nfe_per_image) == (list(range(60)), None)
        assert labelled == (sample.labels is not None)
        assert sample.labels is None or torch.equal(sample.labels, numbers % 10)
        assert ("names none of the classes" in capsys.readouterr().out) == told

    @pytest.mark.parametrize(("files", "message"), REFUSED)
    def test_what_cannot_be_measured(self, files: Files, message: str, letters: ImageData, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            read_sample(write(tmp_path, files), letters)
