"""Labelled images of every kind: the family of MNIST, lazily decoded ones, hostile files, and the survey."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_diffusion.cli import main
from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.dataset import ImageData, draw_batch
from mnist_diffusion.data.decoding import DataError, decode_picture
from mnist_diffusion.data.lazy import LazyImages
from mnist_diffusion.data.survey import survey
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import MAX_PIXELS
from tests.conftest import make_image_folder
from tests.data.test_dataset import idx_bytes, load, write_idx

FASHION = ("T-shirt/top", "Trouser")


def write_emnist(folder: Path, subset: str, labels: list[int]) -> np.ndarray:
    """EMNIST files of a subset; the images as they should be seen."""
    folder.mkdir(parents=True, exist_ok=True)
    upright = np.random.default_rng(0).integers(0, 256, (len(labels), 12, 12)).astype(np.uint8)
    for split in ("train", "test"):
        for kind, values in (("images-idx3", upright.transpose(0, 2, 1)), ("labels-idx1", np.array(labels, np.uint8))):
            path = folder / f"emnist-{subset}-{split}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx_bytes(np.ascontiguousarray(values))))
    return upright


class TestFamilyOfMnist:
    @pytest.mark.parametrize(
        ("layout", "names"),
        [
            ("FashionMNIST/raw", ("T-shirt/top", "Trouser")),
            ("KMNIST/raw", ("o", "ki")),
            ("fashion-mnist", ("T-shirt/top", "Trouser")),
        ],
    )
    def test_class_names_come_along(self, layout: str, names: tuple[str, ...], tmp_path: Path) -> None:
        write_idx(tmp_path / layout)
        assert load(tmp_path / layout).class_names == names
        if layout.endswith("raw"):
            assert load(tmp_path).class_names == names

    def test_emnist_letters_are_upright_and_named(self, tmp_path: Path) -> None:
        upright = write_emnist(tmp_path / "EMNIST" / "raw", "letters", [1, 26, 1, 3])
        data = load(tmp_path)
        assert data.class_names == ("a", "c", "z")
        assert data.train.labels.tolist() == [0, 2, 0, 1]
        np.testing.assert_array_equal(data.train.tensor[:, 0].numpy(), upright)

    def test_emnist_of_several_parts(self, tmp_path: Path) -> None:
        write_emnist(tmp_path, "letters", [1, 2])
        write_emnist(tmp_path, "balanced", [0, 10, 46])
        with pytest.raises(UserError, match=r"data\.subset=None must name one of the parts of .*: balanced, letters"):
            load(tmp_path)
        assert load(tmp_path, subset="balanced").class_names == ("0", "A", "t")
        with pytest.raises(UserError, match=r"data\.subset='digits' must name one of the parts of .*: balanced"):
            load(tmp_path, subset="digits")

    def test_medmnist_like_parquet(self, tmp_path: Path) -> None:
        """Labels are lists of one, names come from the user."""
        import datasets

        images = [Image.fromarray(np.full((28, 28, 3), 40 * index, np.uint8)) for index in range(6)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Sequence(datasets.Value("int64"))})
        rows = {"image": images, "label": [[index % 2] for index in range(6)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
        data = load(tmp_path, class_names=("benign", "malignant"))
        assert data.class_names == ("benign", "malignant")
        assert data.channels == 3
        with pytest.raises(DataError, match=r"data.class_names names 3 classes, but .* has 2"):
            load(tmp_path, class_names=("a", "b", "c"))


def load_lazily(source: Path) -> ImageData:
    """As if the images did not fit into memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mnist_diffusion.data.dataset.MEMORY_LIMIT_BYTES", 0)
        return load(source)


class TestLazily:
    def test_same_images_order_and_fingerprint(self, image_folder: Path) -> None:
        eager, lazy = load(image_folder), load_lazily(image_folder)
        assert isinstance(lazy.train.images, LazyImages)
        assert lazy.train.images.shape == eager.train.images.shape
        assert lazy.fingerprint == eager.fingerprint
        for step in (0, 3):
            config = DataConfig(batch_size=4)
            one, other = (draw_batch(data.train, config, seed=1, step=step, part=slice(0, 4)) for data in (eager, lazy))
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_tables_too(self, tmp_path: Path) -> None:
        import datasets

        images = [
            Image.fromarray(np.random.default_rng(index).integers(0, 255, (9, 9), np.uint8)) for index in range(12)
        ]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
        rows = {"image": images, "label": [index % 2 for index in range(12)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
        eager, lazy = load(tmp_path / "train.parquet"), load_lazily(tmp_path / "train.parquet")
        assert isinstance(eager.train.images, torch.Tensor)
        assert lazy.fingerprint == eager.fingerprint
        torch.testing.assert_close(lazy.in_memory().train.tensor, eager.train.tensor)

    def test_a_picture_that_breaks_later_is_named(self, image_folder: Path) -> None:
        data = load_lazily(image_folder)
        for path in image_folder.rglob("*.png"):
            path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(DataError, match=r"\.png: the picture could not be decoded"):
            draw_batch(data.train, DataConfig(batch_size=4), seed=0, step=0, part=slice(0, 4))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class TestHostilePictures:
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [50_000, 10_000])
    def test_a_header_that_claims_too_much(self, side: int, image_folder: Path) -> None:
        (image_folder / "red" / "huge.png").write_bytes(png_header(side, side))
        with pytest.raises(DataError, match=rf"huge\.png: .*({side} x {side} pixels|too large)"):
            load(image_folder, image_size=16)

    def test_a_header_just_within_the_limit_without_its_pixels(self, image_folder: Path) -> None:
        side = int(MAX_PIXELS**0.5)
        (image_folder / "red" / "hollow.png").write_bytes(png_header(side, side))
        with pytest.raises(DataError, match=r"hollow\.png: the picture could not be decoded"):
            load(image_folder, image_size=16)

    def test_sixteen_bits_keep_their_upper_eight(self) -> None:
        import io

        values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        decoded = decode_picture(buffer.getvalue(), "deep.png")
        np.testing.assert_array_equal(decoded[0].numpy(), (values >> 8).astype(np.uint8))

    def test_palette_has_its_colours(self, tmp_path: Path) -> None:
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([0, 0, 0, 10, 200, 30])
        picture.save(tmp_path / "p.png")
        assert decode_picture((tmp_path / "p.png").read_bytes(), "p.png")[:, 0, 0].tolist() == [10, 200, 30]

    def test_transparent_is_black(self, tmp_path: Path) -> None:
        Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(tmp_path / "t.png")
        assert decode_picture((tmp_path / "t.png").read_bytes(), "t.png").max() == 0

    def test_mixed_modes_and_sizes_come_to_one_shape(self, image_folder: Path) -> None:
        Image.new("L", (40, 20), 255).save(image_folder / "red" / "grey wide.png")
        Image.new("1", (7, 7), 1).save(image_folder / "blue" / "bits.png")
        Image.new("CMYK", (30, 30)).save(image_folder / "green" / "print.jpg")
        data = load(image_folder, image_size=16)
        assert data.train.images.shape[1:] == (3, 16, 16)

    def test_sideways_by_exif(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            for index in range(2):
                picture = Image.new("RGB", (12, 8))
                exif = picture.getexif()
                exif[0x0112] = 6
                picture.save(tmp_path / name / f"{index}.jpg", exif=exif)
        with pytest.raises(DataError, match="images of 8 x 12 are not square"):
            load(tmp_path)

    def test_names_with_spaces_and_other_letters(self, tmp_path: Path) -> None:
        root = tmp_path / "Bilder für später"
        for name in ("kleine Katze", "猫", "Ω mega"):
            (root / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (8, 8), (index, 0, 0)).save(root / name / f"ñ {index}.png")
        assert load(root).class_names == ("kleine Katze", "Ω mega", "猫")

    def test_one_class_only(self, tmp_path: Path) -> None:
        (tmp_path / "only").mkdir()
        for index in range(20):
            Image.new("L", (8, 8), index).save(tmp_path / "only" / f"{index}.png")
        assert load(tmp_path).class_names == ("only",)

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_thirty_two_bits_are_refused(self, mode: str, image_folder: Path) -> None:
        Image.new(mode, (16, 16), 1).save(image_folder / "red" / "raw.tiff")
        with pytest.raises(DataError, match=rf"raw\.tiff: a picture of mode '{mode}' has no known range"):
            load(image_folder)

    def test_other_files_are_left_out_and_counted(self, image_folder: Path) -> None:
        (image_folder / "red" / "notes.txt").write_text("mine")
        (image_folder / "red" / ".DS_Store").write_text("")
        Image.new("RGB", (16, 16)).save(image_folder / "red" / "moving.gif")
        data = load(image_folder)
        assert len(data.train) + len(data.test) == 19
        assert "1 files that are no pictures left out: .txt" in data.describe()

    def test_four_channels_in_a_table(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images of 1 or 3 channels"):
            decode_picture(np.zeros((4, 4, 5)), "row 0")


class TestTables:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ({"image": [[[100, 200], [30]]] * 3, "label": [0, 1, 0]}, "a picture's rows are of different lengths"),
            ({"image": [[["a"]]] * 3, "label": [0, 1, 0]}, "no images of 1 or 3 channels"),
            (
                {"image": [[[0]]] * 3, "label": [[0, 1], [1, 0], [0, 0]]},
                r"data\.label_column='label' must hold one number",
            ),
            ({"image": [[[0]]] * 3, "label": [0, None, 0]}, "some images have no label"),
        ],
    )
    def test_cells_that_are_no_pictures_or_labels(
        self, rows: dict[str, list[object]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import datasets

        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(DataError, match=message):
            load(tmp_path / "train.parquet")
        assert main(["data", str(tmp_path / "train.parquet"), "--out", str(tmp_path / "out")]) == 2

    def test_a_binary_column(self, tmp_path: Path) -> None:
        import datasets

        Image.new("L", (8, 8), 7).save(tmp_path / "seven.png")
        rows = {"image": [(tmp_path / "seven.png").read_bytes()] * 4, "label": [0, 1, 0, 1]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        assert load(tmp_path / "train.parquet").train.tensor.unique().tolist() == [7]

    def test_eleven_classes_are_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        """Where words would go 0, 1, 10, 2; the survey names them as training does."""
        import datasets

        rows = {
            "image": [[[20 * label]] for label in range(11) for _ in range(2)],
            "label": [n for n in range(11) for _ in "ab"],
        }
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        names = tuple("abcdefghijk")
        data = load(tmp_path / "train.parquet", class_names=names)
        assert data.train.tensor.flatten().tolist() == [20 * n for n in data.train.labels.tolist()]
        assert data.class_names == names
        look = survey(DataConfig(source=str(tmp_path / "train.parquet"), class_names=names))
        assert look.class_names == names
        assert int(look.splits["train"].shown["c"][0]) == 40


def test_images_that_represent_a_large_split_keep_small_classes(
    monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    for index in range(40):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(image_folder / "red" / f"more {index}.png")
    monkeypatch.setattr("mnist_diffusion.data.dataset.MAX_REPRESENTATIVE_IMAGES", 10)
    representative = load_lazily(image_folder).in_memory()
    assert representative.counts[:2] == [2, 2]
    assert 7 <= representative.counts[2] <= 9


def test_several_data_sets_in_one_folder(tmp_path: Path) -> None:
    for name in ("MNIST", "FashionMNIST"):
        write_idx(tmp_path / name / "raw")
    with pytest.raises(UserError, match=r"several data sets; name one of .*FashionMNIST, .*MNIST"):
        load(tmp_path)
    assert load(tmp_path / "MNIST").class_names == ("0", "1")


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_subset_of_what_has_no_parts(source: str, image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.subset='letters': .* has no parts"):
        load(image_folder if source == "folder" else source, subset="letters")


class TestLook:
    def test_clean_folder(self, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["data", str(image_folder), "--out", str(tmp_path / "look")]) == 0
        printed = capsys.readouterr().out
        assert "18 images: 18 of 16 x 16 RGB" in printed
        assert "could not be read" not in printed
        with Image.open(tmp_path / "look" / "contact_sheet.png") as sheet:
            assert sheet.height > 3 * 48

    def test_everything_that_can_be_wrong(
        self, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (image_folder / "red" / "broken.png").write_bytes(b"nothing")
        (image_folder / "red" / "huge.png").write_bytes(png_header(50_000, 50_000))
        first = sorted((image_folder / "blue").iterdir())[0]
        (image_folder / "blue" / "again.png").write_bytes(first.read_bytes())
        (image_folder / "green" / "stray.png").write_bytes(first.read_bytes())
        assert main(["data", str(image_folder), "--out", str(tmp_path / "look")]) == 1
        printed = capsys.readouterr().out
        assert "2 could not be read" in printed
        assert "huge.png" in printed
        assert "1 the same pixels in two classes" in printed
        told = json.loads((tmp_path / "look" / "survey.json").read_text(encoding="utf-8"))
        assert told["splits"]["train"]["counts"] == {"blue": 7, "green": 7, "red": 6}
        assert len(told["duplicates"][0]) == 3
        assert told["in_both_splits"] == []

    def test_held_out_copies_are_found(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_image_folder(tmp_path / "pictures" / "train")
        shutil.copytree(tmp_path / "pictures" / "train", tmp_path / "pictures" / "test")
        assert main(["data", str(tmp_path / "pictures"), "--out", str(tmp_path / "look")]) == 0
        assert "18 the same pixels in the training and the held-out split" in capsys.readouterr().out

    def test_digits_and_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["data", "digits", "--out", str(tmp_path)]) == 0
        assert "1797 of 28 x 28 grey" in capsys.readouterr().out
        assert main(["data", str(tmp_path / "nowhere")]) == 2
        assert "was not found" in capsys.readouterr().err
