"""Sources, IDX parsing, shapes and splits."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mnist_diffusion.config import AugmentConfig, DataConfig
from mnist_diffusion.data import sources
from mnist_diffusion.data.dataset import ImageData, draw_batch, load_images
from mnist_diffusion.data.decoding import DataError
from mnist_diffusion.data.idx import read_idx
from mnist_diffusion.data.transforms import augment_images, fit_to_size, to_channels, to_model_range, to_uint8
from mnist_diffusion.errors import UserError
from tests.conftest import COLOURS, make_image_folder


def idx_bytes(values: np.ndarray, *, magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    magic = 0x0800 | values.ndim if magic is None else magic
    shape = values.shape if shape is None else shape
    return struct.pack(f">I{len(shape)}I", magic, *shape) + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, *, train: int = 20, test: int = 10, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images, labels = random.integers(0, 256, (count, 12, 12)), np.arange(count) % 2
        for stem, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = idx_bytes(values)
            path = folder / (stem + (".gz" if zipped else ""))
            path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def load(source: Path | str | None, seed: int = 0, **fields: object) -> ImageData:
    return load_images(DataConfig(source=None if source is None else str(source), **fields), seed=seed)  # type: ignore[arg-type]


class TestIdx:
    @pytest.mark.parametrize("layout", [".", "MNIST/raw", "raw"])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_layouts(self, tmp_path: Path, layout: str, zipped: bool) -> None:
        write_idx(tmp_path / layout, zipped=zipped)
        for stray in ("._train-images-idx3-ubyte", "train-images-idx3-ubyte.gz.md5"):
            (tmp_path / layout / stray).touch()
        data = load(tmp_path)
        assert data.train.tensor.shape == (20, 1, 12, 12)
        assert len(data.test) == 10
        assert data.class_names == ("0", "1")

    def test_values_are_the_files(self, tmp_path: Path) -> None:
        values = np.random.default_rng(1).integers(0, 256, (3, 4, 5)).astype(np.uint8)
        path = tmp_path / "images"
        path.write_bytes(idx_bytes(values))
        np.testing.assert_array_equal(read_idx(path, dimensions=3), values)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data[:2], "truncated header"),
            (lambda data: data[:-1], r"declares 48 values \[3, 4, 4\] but holds 47"),
            (lambda data: data + b"x", "holds more"),
            (lambda data: b"\x00\x00\x08\x01" + data[4:], "magic number 0x00000801, expected 0x00000803"),
            (lambda data: b"\x00\x00\x0d\x03" + data[4:], "magic number"),
            (lambda data: b"PK\x03\x04" + data[4:], "magic number"),
            (lambda data: data[:4] + b"\xff" * 12 + data[16:], "more than the limit"),
            (lambda data: b"", "truncated header"),
            (lambda data: gzip.compress(data)[:-9], "could not be read"),
            (lambda data: gzip.compress(data)[:10] + b"\xff" * 30, "could not be read|broken gzip"),
            (lambda data: gzip.compress(data + b"x"), "holds more"),
        ],
    )
    def test_broken_files(self, tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
        path = tmp_path / "images"
        path.write_bytes(change(idx_bytes(np.zeros((3, 4, 4)))))
        with pytest.raises(UserError, match=message) as raised:
            read_idx(path, dimensions=3)
        assert str(path) in str(raised.value)

    def test_labels_must_match_images(self, tmp_path: Path) -> None:
        write_idx(tmp_path)
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19)))
        with pytest.raises(UserError, match=r"holds 20 images but .* 19 labels"):
            load(tmp_path)

    def test_partner_missing(self, tmp_path: Path) -> None:
        write_idx(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte has no partner with the labels"):
            load(tmp_path)

    def test_no_pixels(self, tmp_path: Path) -> None:
        write_idx(tmp_path)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((0, 4, 4))))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(0)))
        with pytest.raises(UserError, match="holds no pixels"):
            load(tmp_path)

    def test_held_out_class_without_training_images(self, tmp_path: Path) -> None:
        write_idx(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(10, 7)))
        with pytest.raises(DataError, match=r"held-out classes without training images: \[7\]"):
            load(tmp_path)

    def test_unknown_split(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data.train_split='letters' is not a split"):
            load(write_idx(tmp_path), train_split="letters")

    def test_real_mnist(self, mnist_folder: Path) -> None:
        data = load(mnist_folder)
        assert (len(data.train), len(data.test), data.image_size) == (60_000, 10_000, 28)
        assert torch.bincount(data.train.labels).tolist()[:3] == [5923, 6742, 5958]
        assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


class TestDigits:
    def test_shape_and_split(self, digits: ImageData) -> None:
        assert (len(digits.train), len(digits.test)) == (1617, 180)
        assert digits.train.tensor.shape[1:] == (1, 28, 28)
        assert digits.train.tensor.max() == 255
        counts = torch.bincount(digits.test.labels)
        assert counts.min() >= 17
        assert counts.max() <= 19

    def test_identical_pictures_are_on_the_same_side(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
        np.savez(tmp_path / "x.npz", images=np.concatenate([pixels, pixels[:40]]), labels=np.arange(100) % 2)
        data = load(tmp_path)
        train, test = ({image.numpy().tobytes() for image in split.tensor} for split in (data.train, data.test))
        assert not train & test
        assert len(data.train) + len(data.test) == 100
        assert 6 <= len(data.test) <= 20

    def test_held_out_tenth_follows_the_seed(self, digits: ImageData) -> None:
        assert load("digits").fingerprint == digits.fingerprint
        assert load("digits", seed=1).fingerprint != digits.fingerprint

    def test_other_size_and_channels(self) -> None:
        data = load("digits", image_size=32, channels=3, fit="pad")
        assert data.train.tensor.shape[1:] == (3, 32, 32)
        assert not data.train.tensor[:, :, :2].any()


class TestImageFolder:
    def test_classes_are_the_folders(self, image_folder: Path) -> None:
        data = load(image_folder)
        assert data.class_names == tuple(sorted(COLOURS))
        assert data.channels == 3
        assert (len(data.train), len(data.test)) == (15, 3)
        assert sorted(data.test.labels.tolist()) == [0, 1, 2]

    def test_split_folders(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "train", images_per_class=4)
        make_image_folder(tmp_path / "test", images_per_class=1)
        data = load(tmp_path)
        assert (len(data.train), len(data.test)) == (12, 3)

    def test_grey_where_all_are_grey_and_rgb_where_one_is_not(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            for index in range(3):
                Image.new("L", (8, 8), 50).save(tmp_path / name / f"{index}.png")
        assert load(tmp_path).channels == 1
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a" / "red.png")
        assert load(tmp_path).channels == 3
        assert load(tmp_path, channels=1).channels == 1

    def test_modes(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / name / "rgba.png")
            Image.new("P", (8, 8)).save(tmp_path / name / "palette.png")
            Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / name / "deep.png")
        data = load(tmp_path)
        assert data.channels == 3
        assert data.train.tensor.max() == 255

    def test_corrupt_picture_is_named(self, image_folder: Path) -> None:
        broken = image_folder / "red" / "broken.png"
        broken.write_bytes(b"\x89PNG not really")
        with pytest.raises(DataError, match=r"broken\.png: the picture could not be decoded"):
            load(image_folder)

    def test_mixed_sizes_need_a_size(self, image_folder: Path) -> None:
        Image.new("RGB", (20, 30)).save(image_folder / "red" / "odd.png")
        with pytest.raises(DataError, match=r"images of different sizes .* set data.image_size"):
            load(image_folder)
        assert load(image_folder, image_size=16).image_size == 16
        with pytest.raises(DataError, match=r"data.fit='pad' cannot bring an image of 20 x 30"):
            load(image_folder, image_size=16, fit="pad")

    def test_not_square(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="images of 20 x 10 are not square"):
            load(make_image_folder(tmp_path / "wide", size=(10, 20)))

    def test_empty_class(self, image_folder: Path) -> None:
        (image_folder / "violet").mkdir()
        with pytest.raises(DataError, match="violet"):
            load(image_folder)

    def test_class_with_one_image(self, image_folder: Path) -> None:
        (image_folder / "violet").mkdir()
        Image.new("RGB", (16, 16)).save(image_folder / "violet" / "1.png")
        with pytest.raises(DataError, match="class 'violet' has 1 image"):
            load(image_folder)


class TestTables:
    @staticmethod
    def table(count: int = 12) -> datasets.Dataset:
        def encode(value: int) -> bytes:
            buffer = io.BytesIO()
            Image.new("L", (8, 8), value).save(buffer, "PNG")
            return buffer.getvalue()

        rows = {
            "picture": [{"bytes": encode(i), "path": None} for i in range(count)],
            "kind": [i % 2 for i in range(count)],
        }
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
        return datasets.Dataset.from_dict(rows, features=features)

    def test_parquet_file(self, tmp_path: Path) -> None:
        self.table().to_parquet(tmp_path / "all.parquet")
        data = load(tmp_path / "all.parquet")
        assert data.class_names == ("even", "odd")
        assert len(data.train) + len(data.test) == 12

    def test_parquet_splits(self, tmp_path: Path) -> None:
        self.table().to_parquet(tmp_path / "train-00000.parquet")
        self.table(4).to_parquet(tmp_path / "test-00000.parquet")
        data = load(tmp_path)
        assert (len(data.train), len(data.test)) == (12, 4)
        assert data.train.tensor[:, 0, 0, 0].tolist() == list(range(12))

    def test_saved_datasets_folder(self, tmp_path: Path) -> None:
        datasets.DatasetDict(train=self.table(), test=self.table(4)).save_to_disk(tmp_path / "saved")
        assert len(load(tmp_path / "saved").test) == 4

    def test_columns(self, tmp_path: Path) -> None:
        table = self.table().add_column("label", ["a", "b"] * 6)
        table.to_parquet(tmp_path / "all.parquet")
        assert load(tmp_path, label_column="label").class_names == ("a", "b")
        with pytest.raises(DataError, match=r"data.label_column='nope' is not a column"):
            load(tmp_path, label_column="nope")
        with pytest.raises(DataError, match=r"data.test_split='nope' is not a split"):
            load(tmp_path, test_split="nope")

    def test_ambiguous_column(self, tmp_path: Path) -> None:
        table = self.table().rename_column("kind", "a").cast_column("a", datasets.Value("int64"))
        table.add_column("b", list(range(12))).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(DataError, match=r"cannot tell which of the columns .* set data.label_column"):
            load(tmp_path)

    def test_broken_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing")
        with pytest.raises(DataError, match=r"x\.parquet could not be read"):
            load(tmp_path / "x.parquet")


class TestNamedSources:
    def test_not_found_says_where_it_looked(self) -> None:
        with pytest.raises(DataError, match=r"was not found: there is no such folder or file \(looked for /"):
            load("/no/such/folder")

    def test_empty_folder_says_what_it_looked_for(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"holds no images\. Looked for IDX files"):
            load(tmp_path)

    def test_other_file(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(DataError, match=r"is a file, but none of \.parquet, \.arrow, \.csv"):
            load(tmp_path / "notes.txt")

    def test_hub_out_of_reach(self, silent_hub: str) -> None:
        no_such = r"there is no such folder or file \(looked for /.*user/name\), and from the Hub: "
        with pytest.raises(DataError, match=no_such + r".*(no answer|could not be reached)"):
            load("user/name")

    def test_no_source_falls_back_loudly(self, silent_hub: str) -> None:
        data = load(None)
        assert data.source_id == "digits"
        assert data.notice is not None
        assert "FALLING BACK" in data.notice

    def test_cached_copy_without_the_network(
        self, silent_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What `datasets` left in its cache is found again when the Hub is gone."""
        cached = tmp_path / "cache" / "ylecun___mnist" / "default" / "0.0.0" / ("a" * 40)
        cached.mkdir(parents=True)
        for split in ("train", "test"):
            with datasets.arrow_writer.ArrowWriter(
                features=TestTables.table().features, path=str(cached / f"mnist-{split}.arrow")
            ) as writer:
                for row in TestTables.table().cast_column("picture", datasets.Image(decode=False)):
                    writer.write(row)
                writer.finalize()
        info = datasets.DatasetInfo(
            features=TestTables.table().features,
            builder_name="parquet",
            dataset_name="mnist",
            config_name="default",
            version="0.0.0",
            splits={
                split: {"name": split, "num_bytes": 1, "num_examples": 12, "dataset_name": "mnist"}
                for split in ("train", "test")
            },
        )
        info.write_to_directory(str(cached))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        data = load(None)
        assert data.source == "ylecun/mnist (Hub, cached copy)"
        assert data.notice is None
        assert data.class_names == ("even", "odd")

    @pytest.fixture
    def silent_hub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """A Hub that takes connections and never answers."""
        import socket

        from huggingface_hub import constants

        server = socket.create_server(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(sources, "HUB_TIMEOUT_SECONDS", 1.0)
        monkeypatch.setattr(sources, "HUB_PATIENCE_SECONDS", 2.0)
        yield address
        server.close()


class TestImages:
    def test_range_and_back(self) -> None:
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert to_model_range(images).min() == -1
        assert to_model_range(images).max() == 1
        assert torch.equal(to_uint8(to_model_range(images)), images)

    def test_channels(self) -> None:
        grey = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
        assert torch.equal(to_channels(grey, 3)[:, 2], grey[:, 0])
        assert (to_channels(to_channels(grey, 3), 1).int() - grey.int()).abs().max() <= 1

    def test_pad_centres(self) -> None:
        padded = fit_to_size(torch.full((1, 28, 28), 9, dtype=torch.uint8), 32, "pad")
        assert padded[0, 2:30, 2:30].eq(9).all()
        assert padded.sum() == 9 * 28 * 28

    def test_resize_crops_the_middle(self) -> None:
        wide = torch.zeros(1, 8, 16, dtype=torch.uint8)
        wide[:, :, 4:12] = 200
        assert fit_to_size(wide, 8, "resize").eq(200).all()

    def test_augmentation_depends_on_seed_epoch_and_image_alone(self, digits: ImageData) -> None:
        config = AugmentConfig(shift=0.1, rotate=10, scale=0.1, horizontal_flip=True)
        images = digits.train.tensor[:4]
        epochs, indices = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
        whole = augment_images(images, config, 0, epochs, indices)
        alone = augment_images(images[2:3], config, 0, epochs[2:3], indices[2:3])
        assert torch.equal(whole[2], alone[0])
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
