"""Images to evaluate: drawn in parts that are used again, or read from what any program wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.data.dataset import ImageData, ImageSplit
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.draw import ImageGenerator
from mnist_diffusion.evaluation.external import read_sample
from mnist_diffusion.pipelines.drawing import resolved
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import build_sampler
from tests.conftest import make_pipeline

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
        sample = generator(pipeline, letters).draw(settings_of("ddim", 3, 2.0))
        assert sample.images.dtype == torch.uint8
        assert sample.labels is not None
        assert torch.bincount(sample.labels).tolist() == [6] * 10
        assert sample.nfe_per_image == 6
        assert generator(pipeline, letters).draw(settings_of("heun", 3, 1.0)).nfe_per_image == 5

    def test_a_student_takes_one_evaluation_a_step_at_its_own_scale_alone(
        self, pipeline: MNISTDiffusionPipeline, letters: ImageData
    ) -> None:
        pipeline.register_to_config(guidance_distilled=[1.5], guidance_scale=1.5)
        pipeline.scheduler = build_sampler("lcm", pipeline.scheduler.config)
        student = generator(pipeline, letters)
        settings = resolved(pipeline, settings_of(None, 2, None))
        assert settings == settings_of("lcm", 2, 1.5)
        student.check(settings)
        assert student.draw(settings).nfe_per_image == 2
        with pytest.raises(UserError, match=r"guidance_scale must be one of \[1\.5\], distilled into"):
            student.check(resolved(pipeline, settings_of(None, 2, 5.0)))

    def test_defaults_are_the_pipelines(self, pipeline: MNISTDiffusionPipeline) -> None:
        assert resolved(pipeline, SamplingSettings()) == settings_of("dpmpp", 10, 1.9)
        assert resolved(pipeline, settings_of("ddim", 4, 0.0)) == settings_of("ddim", 4, 0.0)

    def test_the_sampler_is_put_back(self, pipeline: MNISTDiffusionPipeline, letters: ImageData) -> None:
        before = pipeline.scheduler
        generator(pipeline, letters).draw(settings_of("ddpm", 2, 1.0))
        assert pipeline.scheduler is before

    def test_goes_on_where_it_stopped(
        self, pipeline: MNISTDiffusionPipeline, letters: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mnist_diffusion.evaluation.draw.IMAGES_PER_PART", 20)
        settings = settings_of("ddim", 2, 2.0)
        whole = generator(pipeline, letters, tmp_path).draw(settings)
        [folder] = tmp_path.iterdir()
        parts = sorted(folder.iterdir())
        assert len(parts) == 3
        parts[1].unlink()
        drawn = 0

        def count(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
            nonlocal drawn
            drawn += len(arguments[0])

        with pipeline.unet.register_forward_pre_hook(count):
            again = generator(pipeline, letters, tmp_path).draw(settings)
        assert drawn == 20 * 4
        assert torch.equal(again.images, whole.images)
        assert again.nfe_per_image == whole.nfe_per_image

    def test_more_images_take_up_those_that_are_there(
        self, pipeline: MNISTDiffusionPipeline, letters: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mnist_diffusion.evaluation.draw.IMAGES_PER_PART", 20)
        few = generator(pipeline, letters, tmp_path, num_images=70).draw(settings_of("ddim", 2, 2.0))
        drawn = 0

        def count(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
            nonlocal drawn
            drawn += len(arguments[0])

        with pipeline.unet.register_forward_pre_hook(count):
            more = generator(pipeline, letters, tmp_path, num_images=80).draw(settings_of("ddim", 2, 2.0))
        assert drawn == 20 * 4
        assert torch.equal(more.images[:70], few.images)

    def test_damaged_parts_are_drawn_again(
        self, pipeline: MNISTDiffusionPipeline, letters: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = generator(pipeline, letters, tmp_path).draw(settings_of("ddim", 2, 2.0))
        [path] = tmp_path.rglob("*.npz")
        for damaged in (b"", path.read_bytes()[:300]):
            path.write_bytes(damaged)
            assert torch.equal(
                generator(pipeline, letters, tmp_path).draw(settings_of("ddim", 2, 2.0)).images, whole.images
            )
            assert f"{path} is damaged" in capsys.readouterr().out

    @pytest.mark.parametrize("change", ["weights", "seed", "scale", "sampler setting"])
    def test_other_images_are_not_taken_for_these(self, change: str, letters: ImageData, tmp_path: Path) -> None:
        def draw(seed: int = 0, scale: float = 2.0, weights: int = 0, spacing: str = "trailing") -> torch.Tensor:
            pipe = make_pipeline(seed=weights)
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
            return generator(pipe, letters, tmp_path, seed=seed).draw(settings_of("dpmpp", 4, scale)).images

        changes = {
            "weights": {"weights": 1},
            "seed": {"seed": 1},
            "scale": {"scale": 3.0},
            "sampler setting": {"spacing": "leading"},
        }
        first = draw()
        assert not torch.equal(draw(**changes[change]), first)  # type: ignore[arg-type]
        assert len(list(tmp_path.iterdir())) == 2

    def test_unconditional(self, letters: ImageData) -> None:
        pipeline = make_pipeline(conditional=False)
        sample = generator(pipeline, letters, num_images=55).draw(resolved(pipeline, settings_of(None, 2, None)))
        assert sample.labels is None
        assert (len(sample.images), sample.nfe_per_image) == (55, 2)
        with pytest.raises(UserError, match="guidance_scale"):
            generator(pipeline, letters).check(settings_of(None, 2, 2.0))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite(self, pipeline: MNISTDiffusionPipeline, letters: ImageData, value: float) -> None:
        with torch.no_grad():
            pipeline.unet.conv_out.bias.fill_(value)
        with pytest.raises(UserError, match=r"ddim, 2 steps, guidance 2: values that are not finite"):
            generator(pipeline, letters).draw(settings_of("ddim", 2, 2.0))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_images": 40}, "num_images must be at least 50, got 40"),
            ({"num_images": 75}, "multiple of the 10 classes, got 75"),
        ],
    )
    def test_bad_numbers(
        self, pipeline: MNISTDiffusionPipeline, letters: ImageData, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            generator(pipeline, letters, **changes)

    def test_pipeline_and_data_must_fit(self, pipeline: MNISTDiffusionPipeline, letters: ImageData) -> None:
        wide = ImageSplit(torch.zeros(10, 1, 16, 16, dtype=torch.uint8), torch.arange(10))
        with pytest.raises(UserError, match=r"\(1, 8, 8\).* \(1, 16, 16\)"):
            generator(pipeline, ImageData(wide, wide, tuple(LETTERS), "", ""))
        with pytest.raises(UserError, match=r"\(3, 8, 8\)"):
            generator(make_pipeline(channels=3), letters)
        three = ImageSplit(letters.train.images[:3], torch.arange(3))
        backwards = ImageData(letters.train, letters.test, tuple(LETTERS[::-1]), "", "")
        with pytest.raises(UserError, match=r"class names: \('a', 'b', .* for the pipeline, but \('j', 'i'"):
            generator(pipeline, backwards)
        with pytest.raises(UserError, match=r"number of classes: 10 for the pipeline, but 3"):
            generator(pipeline, ImageData(three, three, ("a", "b", "c"), "", ""))

    def test_steps_that_cannot_be(self, pipeline: MNISTDiffusionPipeline, letters: ImageData) -> None:
        with pytest.raises(UserError, match="num_inference_steps"):
            generator(pipeline, letters).draw(settings_of("ddim", 1001, 2.0))


def write_pictures(folder: Path, *, each: int = 6, mode: str = "L", size: int = 8, names: str = LETTERS) -> Path:
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            grey = Image.fromarray(random.integers(0, 256, (size, size)).astype(np.uint8))
            grey.convert(mode).save(folder / name / f"{index}.png")
    return folder


class TestReading:
    def test_one_folder_a_class(self, letters: ImageData, tmp_path: Path) -> None:
        sample = read_sample(write_pictures(tmp_path), letters)
        assert sample.labels is not None
        assert torch.bincount(sample.labels).tolist() == [6] * 10
        assert sample.nfe_per_image is None

    def test_grey_saved_as_rgb(self, letters: ImageData, tmp_path: Path) -> None:
        grey = read_sample(write_pictures(tmp_path / "grey"), letters)
        rgb = read_sample(write_pictures(tmp_path / "rgb", mode="RGB"), letters)
        assert torch.equal(grey.images, rgb.images)

    @pytest.mark.parametrize(("background", "ground"), [("black", 0), ("white", 255)])
    def test_transparent_pixels_as_in_the_data(
        self, letters: ImageData, tmp_path: Path, background: Any, ground: int
    ) -> None:
        for index in range(60):
            Image.new("LA", (8, 8), (100, 255 * (index % 2))).save(tmp_path / f"{index:03}.png")
        sample = read_sample(tmp_path, replace(letters, background=background))
        assert sample.images[:, 0, 0, 0].tolist() == [ground, 100] * 30

    def test_flat_folder_with_classes_in_names(self, letters: ImageData, tmp_path: Path) -> None:
        for index in range(60):
            Image.new("L", (8, 8), index).save(tmp_path / f"digit_{LETTERS[index % 10]}_{index // 10:03d}.png")
        sample = read_sample(tmp_path, letters)
        assert sample.labels is not None
        assert {int(image[0, 0, 0]) % 10 for image in sample.images[sample.labels == 3]} == {3}
        Image.new("L", (80, 80)).save(tmp_path / "grid.png")  # which the command writes beside them
        (tmp_path / "times.csv").write_text("file,seconds\n")
        assert len(read_sample(tmp_path, letters).images) == 60
        Image.new("L", (8, 8)).save(tmp_path / "stray.png")
        with pytest.raises(DataError, match=r"'stray.png' names no class, but other files do"):
            read_sample(tmp_path, letters)

    def test_flat_folder_without_classes(self, letters: ImageData, tmp_path: Path) -> None:
        for index in range(60):
            Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
        sample = read_sample(tmp_path, letters)
        assert sample.labels is None
        assert len(sample.images) == 60

    @pytest.mark.parametrize("kind", ["folders", "one folder", "array", "webp"])
    def test_images_without_classes(
        self, letters: ImageData, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As other programs write them: in numbered folders, in one below, in an array."""
        pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8)).astype(np.uint8)
        for index, image in enumerate(pixels if kind != "array" else ()):
            below = {"folders": f"{index // 20:06}", "one folder": "images", "webp": "."}[kind]
            (tmp_path / below).mkdir(exist_ok=True)
            suffix = "webp" if kind == "webp" else "png"
            Image.fromarray(image).save(tmp_path / below / f"{index:03}.{suffix}", lossless=True)
        if kind == "array":
            np.savez(tmp_path / "samples.npz", arr_0=pixels[..., None])
        sample = read_sample(tmp_path, letters)
        assert sample.labels is None
        assert torch.equal(sample.images[:, 0], torch.from_numpy(pixels))
        assert ("names none of the classes" in capsys.readouterr().out) == (kind != "webp")

    def test_a_table_beside_the_pictures(self, letters: ImageData, tmp_path: Path) -> None:
        for index in range(60):
            Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
        rows = "".join(f"{index}.png,{LETTERS[index % 10]}\n" for index in range(60))
        (tmp_path / "labels.csv").write_text("file,label\n" + rows)
        sample = read_sample(tmp_path, letters)
        assert sample.labels is not None
        assert torch.equal(sample.labels, sample.images[:, 0, 0, 0].long() % 10)

    def test_parquet(self, letters: ImageData, tmp_path: Path) -> None:
        import datasets

        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LETTERS))})
        rows = {"image": [Image.new("L", (8, 8), i) for i in range(60)], "label": [i % 10 for i in range(60)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
        for path in (tmp_path, tmp_path / "train.parquet"):
            sample = read_sample(path, letters)
            assert sample.labels is not None
            assert torch.equal(sample.labels, torch.arange(60) % 10)

    def test_too_few(self, letters: ImageData, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="40 images are too few to measure; there must be at least 50"):
            read_sample(write_pictures(tmp_path, each=4), letters)

    def test_missing_and_unknown_classes(self, letters: ImageData, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no images of the classes \['i', 'j'\]"):
            read_sample(write_pictures(tmp_path / "few", names="abcdefgh"), letters)
        with pytest.raises(DataError, match=r"classes \['x'\] are not among the real ones"):
            read_sample(write_pictures(tmp_path / "more", names=LETTERS + "x"), letters)

    def test_wrong_size_and_colours(self, letters: ImageData, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"images are \(1, 16, 16\) \(C, H, W\), but the real ones \(1, 8, 8\)"):
            read_sample(write_pictures(tmp_path / "large", size=16), letters)
        coloured = write_pictures(tmp_path / "coloured", mode="RGB")
        Image.new("RGB", (8, 8), (255, 0, 0)).save(coloured / "a" / "0.png")
        with pytest.raises(DataError, match="the images have colours, but the real ones are grey"):
            read_sample(coloured, letters)
        mixed = write_pictures(tmp_path / "mixed")
        Image.new("L", (16, 16)).save(mixed / "a" / "0.png")
        with pytest.raises(DataError, match="images of different shapes"):
            read_sample(mixed, letters)

    @pytest.mark.parametrize("flat", [True, False])
    def test_corrupt_picture_is_named(self, letters: ImageData, tmp_path: Path, flat: bool) -> None:
        folder = write_pictures(tmp_path)
        broken = (folder if flat else folder / "c") / "broken.png"
        broken.write_bytes((folder / "a" / "0.png").read_bytes()[:40])
        with pytest.raises(DataError, match=r"broken\.png: the picture could not be decoded"):
            read_sample(folder, letters)

    def test_not_a_number(self, letters: ImageData, tmp_path: Path) -> None:
        import datasets

        rows = {"image": [[[float("nan")] * 8] * 8] * 60, "label": list(LETTERS) * 6}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(DataError, match=r"row 0: pixel values must go from 0 to 255, .* got nan"):
            read_sample(tmp_path, letters)
        rows["image"] = [[[100.5] * 8] * 8] * 60
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(DataError, match="whole numbers from 0 to 255, got fractions"):
            read_sample(tmp_path, letters)

    def test_nothing_there(self, letters: ImageData, tmp_path: Path) -> None:
        (tmp_path / "run" / "pipeline").mkdir(parents=True)
        with pytest.raises(DataError, match="looks like a run folder or an incomplete pipeline folder"):
            read_sample(tmp_path / "run", letters)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="holds no images"):
            read_sample(tmp_path / "empty", letters)
