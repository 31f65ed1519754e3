"""Splits, pixels, batches, images that are decoded when needed, the Hub out of reach, and the survey."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from mnist_diffusion.cli import main
from mnist_diffusion.config import AugmentConfig, DataConfig
from mnist_diffusion.data import sources
from mnist_diffusion.data.dataset import ImageData, draw_batch
from mnist_diffusion.data.decoding import DataError, decode_picture
from mnist_diffusion.data.lazy import LazyImages
from mnist_diffusion.data.survey import survey
from mnist_diffusion.data.transforms import augment_images, fit_to_size, to_channels, to_model_range, to_uint8
from tests.conftest import make_image_folder
from tests.data import test_formats as make
from tests.data.test_formats import THREE, classes, digit, encoded, load, load_lazily, table, write


class TestSplits:
    def test_real_mnist(self, mnist_folder: Path) -> None:
        data = load(mnist_folder)
        assert (len(data.train), len(data.test), data.image_size) == (60_000, 10_000, 28)
        assert torch.bincount(data.train.labels).tolist()[:3] == [5923, 6742, 5958]
        assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]

    def test_digits(self, digits: ImageData) -> None:
        assert (len(digits.train), len(digits.test)) == (1617, 180)
        assert (digits.train.tensor.shape[1:], digits.train.tensor.max()) == ((1, 28, 28), 255)
        assert set(torch.bincount(digits.test.labels).tolist()) <= {17, 18, 19}

    def test_identical_pictures_are_on_the_same_side(self, tmp_path: Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
        arrays = {"images": np.concatenate([images, images[:40]]), "labels": np.arange(100) % 2}
        data = load(write(tmp_path, {"x.npz": arrays}))
        train, test = ({image.numpy().tobytes() for image in split.tensor} for split in (data.train, data.test))
        assert not train & test
        assert len(data.train) + len(data.test) == 100
        assert 6 <= len(data.test) <= 20

    def test_held_out_tenth_follows_the_seed(self, digits: ImageData) -> None:
        assert load("digits").fingerprint == digits.fingerprint
        assert load("digits", seed=1).fingerprint != digits.fingerprint

    def test_the_smallest_class_has_one_held_out(self, tmp_path: Path) -> None:
        data = load(write(tmp_path, classes(["many"], 80) | classes(["few", "rare"], 2)))
        held_out = torch.bincount(data.test.labels).tolist()
        assert min(held_out) == 1
        assert [kept + out for kept, out in zip(data.counts, held_out, strict=True)] == [2, 80, 2]

    def test_a_folder_called_digits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(write(tmp_path, classes(["cat", "dog"], place="digits/")))
        assert f"these are the embedded digits; write ./digits for {tmp_path}/digits" in load("digits").describe()
        assert load("./digits").class_names == ("cat", "dog")

    def test_numbers_are_in_their_order(self, tmp_path: Path) -> None:
        """Where words would go 0, 1, 10, 2; the survey names them as training does."""
        names = tuple(map(str, range(12)))
        data = load(write(tmp_path / "folders", classes(names, 3)))
        assert data.class_names == names
        assert [make.place_of_bar(image) for image in data.train.tensor] == data.train.labels.tolist()
        assert "note" not in data.describe()
        numbered = table([n for n in range(12) for _ in "ab"], lambda image: [[int(image[0, 0]) // 2 * 20]])
        source = write(tmp_path / "table", {"x.parquet": numbered})
        asked: dict[str, Any] = {"source": str(source), "class_names": tuple("abcdefghijkl")}
        data, look = load(**asked), survey(DataConfig(**asked))
        assert data.train.tensor.flatten().tolist() == [20 * n for n in data.train.labels.tolist()]
        assert data.class_names == look.class_names == asked["class_names"]
        assert int(look.splits["train"].shown["c"][0]) == 40


class TestLazily:
    def test_same_images_and_order(self, image_folder: Path) -> None:
        eager, lazy = load(image_folder), load_lazily(image_folder)
        assert isinstance(lazy.train.images, LazyImages)
        assert lazy.train.images.shape == eager.train.images.shape == (15, 3, 16, 16)
        for step in (0, 3):
            config = DataConfig(batch_size=4)
            one, other = (draw_batch(data.train, config, seed=1, step=step, part=slice(0, 4)) for data in (eager, lazy))
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_a_picture_that_breaks_later_is_named(self, image_folder: Path) -> None:
        data = load_lazily(image_folder)
        for path in image_folder.rglob("*.png"):
            path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(DataError, match=r"\.png: the picture could not be decoded"):
            draw_batch(data.train, DataConfig(batch_size=4), seed=0, step=0, part=slice(0, 4))

    def test_images_that_represent_a_large_split_keep_small_classes(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        write(tmp_path, classes(THREE, 6) | {f"c/more {index}.png": digit(2, index) for index in range(10, 50)})
        monkeypatch.setattr("mnist_diffusion.data.dataset.MAX_REPRESENTATIVE_IMAGES", 10)
        representative = load_lazily(tmp_path).in_memory()
        assert representative.counts[:2] == [2, 2]
        assert 7 <= representative.counts[2] <= 9


class TestPixels:
    def test_grey_where_all_are_grey_and_rgb_where_one_is_not(self, tmp_path: Path) -> None:
        assert load(write(tmp_path, classes())).channels == 1
        write(tmp_path, {"0/red.png": np.full((12, 12, 3), (255, 0, 0), np.uint8)})
        assert (load(tmp_path).channels, load(tmp_path, channels=1).channels) == (3, 1)

    def test_mixed_modes_and_sizes_come_to_one_shape(self, image_folder: Path) -> None:
        pictures = {"red": Image.new("L", (40, 20), 255), "blue": Image.new("1", (7, 7), 1)}
        write(image_folder, {f"{name}/wide.png": encoded(picture) for name, picture in pictures.items()})
        write(image_folder, {"green/print.jpg": encoded(Image.new("CMYK", (30, 30)), "JPEG")})
        assert load(image_folder, image_size=16).train.images.shape[1:] == (3, 16, 16)

    def test_depths_and_palettes(self) -> None:
        deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
        np.testing.assert_array_equal(decode_picture(encoded(deep), "deep.png")[0].numpy(), deep >> 8)
        values = b"".join(int(value).to_bytes(2, "big") for value in digit(3).flatten().astype(int) * 4)
        deep_map = decode_picture(b"P5 12 12 1020\n" + values, "deep.pgm")
        np.testing.assert_allclose(deep_map[0].numpy(), digit(3), atol=1)
        assert decode_picture(b"P1 2 1\n0 1\n", "bits.pbm").flatten().tolist() == [255, 0]
        coloured = Image.new("P", (4, 4), 1)
        coloured.putpalette([0, 0, 0, 10, 200, 30])
        assert decode_picture(encoded(coloured), "p.png")[:, 0, 0].tolist() == [10, 200, 30]

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
    def test_black_ink_on_transparency(self, mode: str, tmp_path: Path) -> None:
        for label, name in enumerate(THREE):
            ink = digit(label) > 0
            layer = Image.fromarray(np.stack([0 * ink, 255 * ink], axis=2).astype(np.uint8))
            paper = Image.fromarray(255 * (~ink).astype(np.uint8))
            picture = {"LA": layer, "RGBA": layer.convert("RGBA"), "tRNS": paper, "P": paper.convert("P")}[mode]
            clear: dict[str, Any] = {"transparency": 255} if mode in ("P", "tRNS") else {}
            content = encoded(picture, **clear)
            write(tmp_path, {f"{name}/{index}.png": content for index in range(3)})
        found, asked = load(tmp_path), load(tmp_path, background="black")
        counted = "of 9 pictures, 9 nearly vanish on black and 0 on white"
        assert f"WARNING: transparent pixels are filled with white: {counted}" in found.describe()
        assert (int(found.train.tensor[0, 0, 0, 0]), int(found.train.tensor[0, 0, 5].min())) == (255, 0)
        assert f"note         transparent pixels are filled with black: {counted}" in asked.describe()
        assert int(asked.train.tensor.max()) == 0

    def test_white_ink_on_transparency(self, tmp_path: Path) -> None:
        layers = [np.dstack([np.full((12, 12, 3), 255, np.uint8), digit(label)]) for label in range(3)]
        write(tmp_path, {f"{THREE[n % 3]}/{n}.png": layers[n % 3] for n in range(9)})
        found = load(tmp_path)
        assert "filled with black: of 9 pictures, 0 nearly vanish on black and 9 on white" in found.describe()
        assert int(found.train.tensor[0, 0, 0, 0]) == 0

    def test_nearly_black(self, tmp_path: Path) -> None:
        write(tmp_path, {f"{THREE[n % 3]}/{n}.png": digit(n) // 16 for n in range(6)})
        assert "WARNING: the largest value is 15 of 255" in load(tmp_path).describe()

    def test_contain_keeps_the_whole(self, tmp_path: Path) -> None:
        tall = np.full((20, 10), 250, np.uint8)
        tall[[0, -1], 1:-1] = 10
        write(tmp_path, {f"{name}/{index}.png": tall for name in THREE for index in range(3)})
        with pytest.raises(DataError, match=r"set data\.image_size, and data\.fit=contain to keep the whole of each"):
            load(tmp_path)
        assert "data.fit=resize crops content from 100% of the images" in load(tmp_path, image_size=16).describe()
        whole = load(tmp_path, image_size=20, fit="contain", background="white")
        assert "crops" not in whole.describe()
        image = whole.train.tensor[0, 0]
        assert max(image[0, 10], image[-1, 10]) < 100
        assert int(image[10, 0]) == 255
        assert load(tmp_path, image_size=20, fit="contain").train.tensor[0, 0, 10, 0] == 0

    def test_fit(self) -> None:
        wide = torch.full((2, 3, 10, 40), 200, dtype=torch.uint8)
        small, large = (fit_to_size(wide, size, "contain", "white") for size in (8, 80))
        assert small.shape == (2, 3, 8, 8)
        assert small[0, 0, :, 0].tolist() == [255] * 3 + [200] * 2 + [255] * 3
        assert (large[0, 0, 30:50] == 200).all()
        padded = fit_to_size(torch.full((1, 28, 28), 9, dtype=torch.uint8), 32, "pad")
        assert padded[0, 2:30, 2:30].eq(9).all()
        assert padded.sum() == 9 * 28 * 28
        middle = torch.zeros(1, 8, 16, dtype=torch.uint8)
        middle[:, :, 4:12] = 200
        assert fit_to_size(middle, 8, "resize").eq(200).all()
        padded_digits = load("digits", image_size=32, channels=3, fit="pad").train.tensor
        assert (padded_digits.shape[1:], padded_digits[:, :, :2].any()) == ((3, 32, 32), False)

    def test_range_and_channels_and_back(self) -> None:
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert (to_model_range(images).min(), to_model_range(images).max()) == (-1, 1)
        assert torch.equal(to_uint8(to_model_range(images)), images)
        assert torch.equal(to_channels(images, 3)[:, 2], images[:, 0])
        assert (to_channels(to_channels(images, 3), 1).int() - images.int()).abs().max() <= 1

    def test_augmentation_depends_on_seed_epoch_and_image_alone(self, digits: ImageData) -> None:
        config = AugmentConfig(shift=0.1, rotate=10, scale=0.1, horizontal_flip=True)
        images = digits.train.tensor[:4]
        epochs, indices = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
        whole = augment_images(images, config, 0, epochs, indices)
        assert torch.equal(whole[2], augment_images(images[2:3], config, 0, epochs[2:3], indices[2:3])[0])
        assert not torch.equal(whole, images)
        assert not torch.equal(whole, augment_images(images, config, 1, epochs, indices))
        assert not torch.equal(whole[0], augment_images(images[:1], config, 0, np.array([1]), indices[:1])[0])

    def test_augmentation_fills_with_the_colour_of_the_edge(self) -> None:
        image = torch.tensor([250, 10, 90], dtype=torch.uint8)[:, None, None].expand(3, 16, 16).clone()
        image[:, 6:10, 6:10] = 128
        config = AugmentConfig(shift=0.25, rotate=45)
        moved = augment_images(image.expand(8, 3, 16, 16), config, 0, np.zeros(8, int), np.arange(8))
        assert torch.equal(moved[..., 0, 0], image[:, 0, 0].expand(8, 3))
        assert len({*map(tuple, (moved[:, 1] > 100).flatten(1).int().tolist())}) == 8


class TestBatches:
    def test_parts_make_up_the_batch(self, digits: ImageData) -> None:
        config = DataConfig(batch_size=12, augment=AugmentConfig(shift=0.1))
        images, labels = draw_batch(digits.train, config, seed=0, step=5, part=slice(0, 12))
        halves = [draw_batch(digits.train, config, seed=0, step=5, part=part) for part in (slice(0, 6), slice(6, 12))]
        assert torch.equal(images, torch.cat([half[0] for half in halves]))
        assert torch.equal(labels, torch.cat([half[1] for half in halves]))

    def test_data_smaller_than_a_batch(self, image_folder: Path) -> None:
        data = load(image_folder)
        images, _ = draw_batch(data.train, DataConfig(batch_size=64), seed=0, step=3, part=slice(0, 64))
        assert images.shape == (64, 3, 16, 16)


class TestHubOutOfReach:
    @pytest.fixture(autouse=True)
    def silent_hub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A Hub that takes connections and never answers."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setattr(constants, "ENDPOINT", address)
            monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
            monkeypatch.setattr(sources, "HUB_TIMEOUT_SECONDS", 0.2)
            monkeypatch.setattr(sources, "HUB_PATIENCE_SECONDS", 0.5)
            yield

    def test_a_name_was_looked_for_here_and_there(self) -> None:
        no_such = r"there is no such folder or file \(looked for /.*user/name\), and from the Hub: "
        with pytest.raises(DataError, match=no_such + r".*(no answer|could not be reached)"):
            load("user/name")

    def test_no_source_falls_back_loudly(self) -> None:
        data = load(None)
        assert data.source_id == "digits"
        assert "FALLING BACK" in (data.notice or "")

    def test_cached_copy_without_the_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What `datasets` left in its cache is found again when the Hub is gone."""
        cached = tmp_path / "cache" / "ylecun___mnist" / "default" / "0.0.0" / ("a" * 40)
        cached.mkdir(parents=True)
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(THREE))})
        rows = datasets.Dataset.from_dict({"image": list(make.pixels(12)), "label": make.LABELS}, kinds)
        for split in ("train", "test"):
            rows.save_to_disk(tmp_path / split)
            [written] = (tmp_path / split).glob("*.arrow")
            written.rename(cached / f"mnist-{split}.arrow")
        about = {"builder_name": "parquet", "dataset_name": "mnist", "config_name": "default", "version": "0.0.0"}
        counted = {"num_bytes": 1, "num_examples": 12, "dataset_name": "mnist"}
        found = {split: {"name": split, **counted} for split in ("train", "test")}
        datasets.DatasetInfo(features=kinds, splits=found, **about).write_to_directory(str(cached))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        data = load(None)
        assert (data.source, data.notice) == ("ylecun/mnist (Hub, cached copy)", None)
        assert data.class_names == THREE


class TestSurvey:
    def test_a_whole_folder_and_held_out_copies(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_image_folder(tmp_path / "pictures" / "train")
        shutil.copytree(tmp_path / "pictures" / "train", tmp_path / "pictures" / "test")
        assert main(["data", str(tmp_path / "pictures"), "--out", str(tmp_path / "look")]) == 0
        printed = capsys.readouterr().out
        assert "train: 18 images: 18 of 16 x 16 RGB" in printed
        assert "18 the same pixels in the training and the held-out split" in printed
        assert "could not be read" not in printed
        with Image.open(tmp_path / "look" / "contact_sheet.png") as sheet:
            assert sheet.height > 3 * 48

    def test_everything_that_can_be_wrong(
        self, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first = sorted((image_folder / "blue").iterdir())[0].read_bytes()
        broken = {"red/broken.png": b"nothing", "red/huge.png": make.png_header(50_000)}
        write(image_folder, {**broken, "blue/again.png": first, "green/stray.png": first})
        assert main(["data", str(image_folder), "--out", str(tmp_path / "look")]) == 1
        printed = capsys.readouterr().out
        for part in ("2 could not be read", "huge.png", "1 the same pixels in two classes"):
            assert part in printed
        told = json.loads((tmp_path / "look" / "survey.json").read_text(encoding="utf-8"))
        assert told["splits"]["train"]["counts"] == {"blue": 7, "green": 7, "red": 6}
        assert (len(told["duplicates"][0]), told["in_both_splits"]) == (3, [])

    def test_digits_and_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["data", "digits", "--out", str(tmp_path)]) == 0
        assert "1797 of 28 x 28 grey" in capsys.readouterr().out
        assert main(["data", str(tmp_path / "nowhere")]) == 2
        assert "was not found" in capsys.readouterr().err

    def test_what_others_wrote_is_kept(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data, other = write(tmp_path / "data", classes()), write(tmp_path / "out", {"survey.json": '{"mine": 1}'})
        for out, said in ((data, "lies in the source"), (other, "of other origin")):
            assert main(["data", str(data), "--out", str(out)]) == 2
            assert said in capsys.readouterr().err
        flags = ["--data.class_names", "x", "y z", "猫", "--out", str(tmp_path / "new")]
        assert [main(["data", str(data), *flags]) for _ in range(2)] == [0, 0]
        assert "y z" in capsys.readouterr().out

    def test_many_classes_have_a_bounded_sheet(self, tmp_path: Path) -> None:
        images = np.arange(1500)[:, None, None] % 256 + np.zeros((1, 8, 8))
        write(tmp_path, {"x.npz": {"x": images, "y": np.arange(1500)}})
        assert main(["data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out")]) == 0
        with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
            assert sheet.height < 100 * 60
