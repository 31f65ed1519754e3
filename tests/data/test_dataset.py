"""Splits, pixels, batches, the Hub out of reach, and the survey."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch.nn import functional as F

from mnist_diffusion.cli import main
from mnist_diffusion.config import AugmentConfig
from mnist_diffusion.data import sources
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.decoding import DataError, decode_picture
from mnist_diffusion.data.transforms import augment_images, fit_to_size, to_model_range, to_uint8
from tests.conftest import make_image_folder
from tests.data import test_formats as make
from tests.data.test_formats import THREE, classes, digit, encoded, load, write


class TestSplits:
    def test_a_tenth_of_each_class_is_held_out_by_the_seed(self, digits: ImageData) -> None:
        assert (len(digits.train), len(digits.test)) == (1617, 180)
        assert set(torch.bincount(digits.test.labels).tolist()) <= {17, 18, 19}
        assert load("digits").fingerprint == digits.fingerprint
        assert load("digits", seed=1).fingerprint != digits.fingerprint

    def test_identical_pictures_are_on_the_same_side(self, tmp_path: Path) -> None:
        images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
        arrays = {"images": np.concatenate([images, images[:40]]), "labels": np.arange(100) % 2}
        data = load(write(tmp_path, {"x.npz": arrays}))
        train, test = ({image.numpy().tobytes() for image in split.images} for split in (data.train, data.test))
        assert not train & test
        assert len(data.train) + len(data.test) == 100
        assert 6 <= len(data.test) <= 20

    def test_numbers_are_in_their_order(self, tmp_path: Path) -> None:
        """Where words would go 0, 1, 10, 2."""
        names = tuple(map(str, range(12)))
        data = load(write(tmp_path, classes(names, 3)))
        assert data.class_names == names
        assert [make.place_of_bar(image) for image in data.train.images] == data.train.labels.tolist()
        assert "note" not in data.describe()


def test_images_that_do_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch, image_folder: Path) -> None:
    images = load(image_folder)
    total = images.train.images.numel() + images.test.images.numel()
    monkeypatch.setattr("mnist_diffusion.data.dataset.MEMORY_LIMIT_BYTES", total)
    assert load(image_folder).fingerprint == images.fingerprint
    monkeypatch.setattr("mnist_diffusion.data.dataset.MEMORY_LIMIT_BYTES", total - 1)
    with pytest.raises(DataError, match=r"the decoded images take .* GB, more than the limit of .*; set a smaller"):
        load(image_folder)


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

    def test_sixteen_bits_and_palettes(self) -> None:
        deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
        np.testing.assert_array_equal(decode_picture(encoded(deep), "deep.png")[0].numpy(), deep >> 8)
        coloured = Image.new("P", (4, 4), 1)
        coloured.putpalette([0, 0, 0, 10, 200, 30])
        assert decode_picture(encoded(coloured), "p.png")[:, 0, 0].tolist() == [10, 200, 30]

    @pytest.mark.parametrize("mode", ["L", "P"])
    def test_black_ink_on_transparency(self, mode: str, tmp_path: Path) -> None:
        for label, name in enumerate(THREE):
            paper = Image.fromarray(255 * (digit(label) == 0).astype(np.uint8)).convert(mode)
            content = encoded(paper, transparency=255)
            write(tmp_path, {f"{name}/{index}.png": content for index in range(3)})
        found, asked = load(tmp_path), load(tmp_path, background="black")
        counted = "of 9 pictures, 9 would nearly vanish on black and 0 on white"
        assert f"WARNING: transparent pixels are filled with white: {counted}" in found.describe()
        assert (int(found.train.images[0, 0, 0, 0]), int(found.train.images[0, 0, 5].min())) == (255, 0)
        assert f"note         transparent pixels are filled with black: {counted}" in asked.describe()
        assert int(asked.train.images.max()) == 0

    def test_white_ink_on_transparency(self, tmp_path: Path) -> None:
        layers = [np.dstack([np.full((12, 12, 3), 255, np.uint8), digit(label)]) for label in range(3)]
        write(tmp_path, {f"{THREE[n % 3]}/{n}.png": layers[n % 3] for n in range(9)})
        found = load(tmp_path)
        assert "filled with black: of 9 pictures, 0 would nearly vanish on black and 9 on white" in found.describe()
        assert int(found.train.images[0, 0, 0, 0]) == 0

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
        image = whole.train.images[0, 0]
        assert max(image[0, 10], image[-1, 10]) < 100
        assert int(image[10, 0]) == 255
        assert load(tmp_path, image_size=20, fit="contain").train.images[0, 0, 10, 0] == 0

    def test_pad_and_resize(self, digits: ImageData) -> None:
        padded = load("digits", image_size=32, channels=3, fit="pad").train.images
        assert torch.equal(padded, F.pad(digits.train.images, (2, 2, 2, 2)).expand(-1, 3, -1, -1))
        middle = torch.zeros(1, 8, 16, dtype=torch.uint8)
        middle[:, :, 4:12] = 200
        assert fit_to_size(middle, 8, "resize").eq(200).all()

    def test_to_the_models_range_and_back(self) -> None:
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert (to_model_range(images).min(), to_model_range(images).max()) == (-1, 1)
        assert torch.equal(to_uint8(to_model_range(images)), images)

    def test_augmentation_depends_on_seed_epoch_and_image_alone(self, digits: ImageData) -> None:
        config = AugmentConfig(shift=0.1, rotate=10, scale=0.1, horizontal_flip=True)
        images = digits.train.images[:4]
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
        for out, said in ((data, "is inside the source"), (other, "that this command did not write")):
            assert main(["data", str(data), "--out", str(out)]) == 2
            assert said in capsys.readouterr().err
        flags = ["--data.class_names", "x", "y z", "猫", "--out", str(tmp_path / "new")]
        assert [main(["data", str(data), *flags]) for _ in range(2)] == [0, 0]
        assert "y z" in capsys.readouterr().out
