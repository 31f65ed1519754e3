"""What people's folders, tables, arrays and archives hold, each with the right value."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mnist_diffusion.cli import main
from mnist_diffusion.data.pictures import DataError, decode_picture
from mnist_diffusion.data.transforms import fit_to_size
from tests.data.test_dataset import idx_bytes, load

SIDE = 12


def digit(label: int, index: int = 0) -> np.ndarray:
    """A white bar whose place says the label, on black; the image's number is in a corner."""
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[3:9, label % SIDE] = 255
    image[0, 0] = index
    return image


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def put(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))


def classes(root: Path, names: Sequence[str], count: int = 4, *, suffix: str = "") -> Path:
    """One folder per name; the bars of its pictures are at the name's place in the list."""
    for label, name in enumerate(names):
        for index in range(count):
            put(root / name / suffix / f"{index}.png", digit(label, index))
    return root


def table(path: Path, labels: Sequence[Any], cell: Callable[[np.ndarray], Any] | None = None, **more: Any) -> None:
    """A parquet file with an image and a label column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = cell or (lambda pixels: {"bytes": png(pixels), "path": None})
    images = [cell(digit(index % 3, index)) for index in range(len(labels))]
    parquet.write_table(pa.table({"image": images, "label": list(labels), **more}), path)


def place_of_bar(image: torch.Tensor) -> int:
    return int(image[0, 5].argmax())


THREE = ("a", "b", "c")


class TestSplits:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("training", "testing"),
            ("Train", "Test"),
            ("train", "val"),
            ("train", "VALID"),
            ("archive/train", "archive/validation"),
            ("archive/Training/images", "archive/Testing/images"),
            ("seg_train/seg_train", "seg_test/seg_test"),
            ("training_set", "test_set"),
        ],
    )
    def test_folders_by_other_names(self, train: str, test: str, tmp_path: Path) -> None:
        classes(tmp_path / train, THREE)
        classes(tmp_path / test, THREE, 2)
        data = load(tmp_path)
        assert (len(data.train), len(data.test), data.class_names) == (12, 6, THREE)
        assert [place_of_bar(image) for image in data.train.tensor] == data.train.labels.tolist()
        if (train.rpartition("/")[2], test) != ("train", "test"):
            assert "note         trained on the split" in data.describe()

    def test_splits_below_the_classes(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE, 3, suffix="train")
        classes(tmp_path, THREE, 1, suffix="test")
        assert (len(load(tmp_path).train), len(load(tmp_path).test)) == (9, 3)

    def test_a_third_split_is_left_out_and_told(self, tmp_path: Path) -> None:
        for split, count in (("train", 4), ("val", 2), ("test", 1)):
            classes(tmp_path / split, THREE, count)
        data = load(tmp_path)
        assert (len(data.train), len(data.test)) == (12, 3)
        assert "split 'val' left out" in data.describe()
        assert len(load(tmp_path, test_split="validation").test) == 6
        with pytest.raises(DataError, match=r"data\.test_split='other' is not a split of .*test, train, val"):
            load(tmp_path, test_split="other")

    def test_folders_beside_the_splits(self, tmp_path: Path) -> None:
        classes(tmp_path / "train", THREE)
        classes(tmp_path / "test", THREE, 2)
        put(tmp_path / "masks" / "0.png", digit(0))
        data = load(tmp_path)
        assert (len(data.train), len(data.test), data.class_names) == (12, 6, THREE)
        assert "folders beside the splits left out: masks" in data.describe()

    def test_a_class_called_train_is_a_class(self, tmp_path: Path) -> None:
        data = load(classes(tmp_path, ("apple", "bus", "train", "whale")))
        assert data.class_names == ("apple", "bus", "train", "whale")
        assert "WARNING: classes are called train, as splits are" in data.describe()

    @pytest.mark.parametrize(
        "names",
        [
            ("train/0000.parquet", "test/0000.parquet"),
            ("mnist_train.parquet", "mnist_test.parquet"),
            ("default/train/0.parquet", "default/test/0.parquet"),
            ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ],
    )
    def test_tables(self, names: tuple[str, str], tmp_path: Path) -> None:
        table(tmp_path / names[0], [0, 1, 2] * 4)
        table(tmp_path / names[1], [0, 1, 2])
        assert (len(load(tmp_path).train), len(load(tmp_path).test)) == (12, 3)

    def test_two_configurations_are_not_merged(self, tmp_path: Path) -> None:
        for count, part in ((2, "digits"), (3, "letters")):
            table(tmp_path / part / "train-00000-of-00001.parquet", [0, 1, 2] * count)
            table(tmp_path / part / "test-00000-of-00001.parquet", [0, 1, 2])
        with pytest.raises(DataError, match=r"several parts; set data\.subset to one of digits, letters"):
            load(tmp_path)
        assert len(load(tmp_path, subset="letters").train) == 9
        with pytest.raises(DataError, match="got 'other'"):
            load(tmp_path, subset="other")

    def test_two_trees_of_pictures_are_not_merged(self, tmp_path: Path) -> None:
        for part in ("one", "two"):
            classes(tmp_path / part / "train", THREE)
            classes(tmp_path / part / "test", THREE, 1)
        with pytest.raises(DataError, match=r"set data\.subset to one of one, two"):
            load(tmp_path)
        assert (len(load(tmp_path, subset="two").train), len(load(tmp_path, subset="two").test)) == (12, 3)

    def test_saved_data_sets_side_by_side(self, tmp_path: Path) -> None:
        for split, count in (("train", 4), ("test", 1)):
            rows = {"image": [digit(label).tolist() for label in range(3)] * count, "label": [0, 1, 2] * count}
            datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "sets" / split)
        assert (len(load(tmp_path).train), len(load(tmp_path).test)) == (12, 3)
        (tmp_path / "sets" / "train" / "state.json").write_text("{")
        with pytest.raises(DataError, match="could not be read as a saved data set"):
            load(tmp_path)

    def test_the_cache_of_datasets(self, tmp_path: Path) -> None:
        table(tmp_path / "mine_train.parquet", [0, 1, 2] * 4)
        table(tmp_path / "mine_test.parquet", [0, 1, 2])
        files = {split: str(tmp_path / f"mine_{split}.parquet") for split in ("train", "test")}
        datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
        [info] = (tmp_path / "cache").rglob("dataset_info.json")
        assert (len(load(info.parent).train), len(load(info.parent).test)) == (12, 3)


class TestFolders:
    @pytest.mark.parametrize("junk", [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir"])
    def test_junk_is_no_class(self, junk: str, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        put(tmp_path / junk / "0-checkpoint.png", digit(0))
        data = load(tmp_path)
        assert data.class_names == THREE
        assert f"folders left out: {junk}" in data.describe()

    def test_one_folder_too_deep(self, tmp_path: Path) -> None:
        classes(tmp_path / "archive", THREE)
        put(tmp_path / "sample.png", digit(0))
        data = load(tmp_path)
        assert data.class_names == THREE
        assert "1 pictures left out, which lie beside the folders" in data.describe()

    def test_loose_pictures_beside_classes(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        put(tmp_path / "loose.png", digit(0))
        data = load(tmp_path)
        assert len(data.train) + len(data.test) == 12
        assert "1 pictures left out, which lie in no class folder" in data.describe()

    def test_test_pictures_without_labels(self, tmp_path: Path) -> None:
        classes(tmp_path / "train", THREE)
        put(tmp_path / "test" / "0.png", digit(0))
        data = load(tmp_path)
        assert (len(data.train), len(data.test), data.class_names) == (9, 3, THREE)
        assert "1 pictures of the split 'test' left out" in data.describe()

    def test_a_folder_called_digits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        classes(tmp_path / "digits", ("cat", "dog"))
        assert f"these are the embedded digits; write ./digits for {tmp_path}/digits" in load("digits").describe()
        assert load("./digits").class_names == ("cat", "dog")

    def test_flat_and_patterns(self, tmp_path: Path) -> None:
        for index in range(6):
            put(tmp_path / f"{'cat' if index % 2 else 'dog'}.{index}.png", digit(index % 2))
        data = load(tmp_path)
        assert data.class_names == ("image",)
        assert "no folders name classes" in data.describe()
        assert load(tmp_path, label_pattern=r"(cat|dog)").class_names == ("cat", "dog")
        with pytest.raises(DataError, match=r"data\.label_pattern='\(cow\)' finds no class in .*cat\.1\.png"):
            load(tmp_path, label_pattern="(cow)")
        for wrong in ("(cat", "cat"):
            with pytest.raises(ValueError, match=r"data\.label_pattern"):
                load(tmp_path, label_pattern=wrong)

    def test_links_that_go_round(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        (tmp_path / "a" / "again").symlink_to(tmp_path)
        (tmp_path / "d").symlink_to(classes(tmp_path.parent / f"{tmp_path.name} other", ("x",)) / "x")
        assert load(tmp_path).class_names == (*THREE, "d")

    @pytest.mark.parametrize("name", [b"\xb0\xa1", b"a\nb", b"\x1b[31m"])
    def test_names_that_are_no_text(self, name: bytes, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        (tmp_path / "a").rename(tmp_path / os.fsdecode(name))
        with pytest.raises(DataError, match="is not UTF-8 or has control characters; rename it") as raised:
            load(tmp_path)
        assert str(raised.value).isprintable()


class TestLabels:
    def test_the_smallest_class_has_one_held_out(self, tmp_path: Path) -> None:
        classes(tmp_path, ["many"], 80)
        classes(tmp_path, ["few", "rare"], 2)
        data = load(tmp_path)
        held_out = torch.bincount(data.test.labels).tolist()
        assert min(held_out) == 1
        assert [kept + out for kept, out in zip(data.counts, held_out, strict=True)] == [2, 80, 2]

    def test_numbers_are_in_their_order(self, tmp_path: Path) -> None:
        data = load(classes(tmp_path, [str(number) for number in range(12)], 3))
        assert data.class_names == tuple(str(number) for number in range(12))
        assert [place_of_bar(image) for image in data.train.tensor] == data.train.labels.tolist()
        assert "note" not in data.describe()

    def test_gaps_are_told(self, tmp_path: Path) -> None:
        told = "the names of the classes are numbers, but not their own: class 0 is '2', 1 is '5', 2 is '11'"
        assert told in load(classes(tmp_path / "folders", ("2", "5", "11"))).describe()
        table(tmp_path / "x.parquet", [2, 5, 11] * 3)
        assert told in load(tmp_path / "x.parquet").describe()

    @pytest.mark.parametrize("missing", [float("nan"), -1.0, None])
    def test_missing_ones_are_counted(self, missing: float | None, tmp_path: Path) -> None:
        table(tmp_path / "train.parquet", [0.0, 1.0, missing, 1.0] * 2)
        table(tmp_path / "test.parquet", [0.0, 1.0])
        with pytest.raises(DataError, match=r"some images have no label: 2 of 8 training images"):
            load(tmp_path)

    def test_whole_numbers_with_a_point(self, tmp_path: Path) -> None:
        table(tmp_path / "train.parquet", [0.0, 1.0] * 5)
        assert load(tmp_path).class_names == ("0", "1")

    def test_no_plain_names(self, tmp_path: Path) -> None:
        table(tmp_path / "train.parquet", ["a", "x" * 300] * 3)
        with pytest.raises(DataError, match="300 letters, more than 200"):
            load(tmp_path)

    @pytest.mark.parametrize("columns", [("img", "label"), ("image", "digit"), ("picture", "fine_label")])
    def test_columns_by_other_names(self, columns: tuple[str, str], tmp_path: Path) -> None:
        rows = {columns[0]: [{"bytes": png(digit(label)), "path": None} for label in range(3)] * 3}
        parquet.write_table(pa.table({**rows, columns[1]: [0, 1, 2] * 3}), tmp_path / "x.parquet")
        asked = "picture" if columns[0] == "picture" else None
        assert load(tmp_path, image_column=asked).class_names == ("0", "1", "2")


def table_beside_pictures(root: Path) -> None:
    for index in range(12):
        put(root / "images" / f"{index}.png", digit(index % 3, index))
    (root / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(12)))


def ids_without_suffix(root: Path) -> None:
    for index in range(12):
        put(root / "train" / f"{index:04}.png", digit(index % 3, index))
    put(root / "test" / "0012.png", digit(0))
    (root / "train.csv").write_text("id;breed\n" + "".join(f"{i:04};{i % 3}\n" for i in range(12)))
    (root / "sample_submission.csv").write_text("id;breed\n0012;0\n")


def metadata_jsonl(root: Path) -> None:
    for split, count in (("train", 12), ("test", 3)):
        for index in range(count):
            put(root / split / f"{index}.png", digit(index % 3, index))
        lines = [json.dumps({"file_name": f"{index}.png", "label": index % 3}) for index in range(count)]
        (root / split / "metadata.jsonl").write_text("\n".join(lines))


def csv_of_pixels(root: Path, *, header: bool = True) -> None:
    """As on Kaggle: `train.csv` with labels, `test.csv` without."""
    for name, count in (("train.csv", 12), ("test.csv", 3)):
        names = [*(["label"] if name == "train.csv" else []), *(f"pixel{index}" for index in range(SIDE**2))]
        lines = [",".join(names)] if header else []
        for index in range(count):
            label = [index % 3] if name == "train.csv" or not header else []
            lines.append(",".join(map(str, [*label, *digit(index % 3, index).flatten()])))
        (root / name).write_text("\n".join(lines) + "\n")


def pixels_and_labels(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([digit(index % 3, index) for index in range(count)]), np.arange(count) % 3


def keras_npz(root: Path) -> None:
    (x_train, y_train), (x_test, y_test) = pixels_and_labels(12), pixels_and_labels(3)
    np.savez(root / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def medmnist_npz(root: Path) -> None:
    arrays: dict[str, Any] = {}
    for split, count in (("train", 12), ("val", 6), ("test", 3)):
        images, labels = pixels_and_labels(count)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez_compressed(root / "organ.npz", **arrays)


def kmnist_npz(root: Path) -> None:
    for split, count in (("train", 12), ("test", 3)):
        for kind, values in zip(("imgs", "labels"), pixels_and_labels(count), strict=True):
            np.savez(root / f"kmnist-{split}-{kind}.npz", values)


def npy_pair(root: Path) -> None:
    images, labels = pixels_and_labels(12)
    np.save(root / "images.npy", (images[:, None] / 255).astype(np.float32))
    np.save(root / "labels.npy", np.eye(3)[labels])


def flat_lists(root: Path) -> None:
    table(root / "train.parquet", [0, 1, 2] * 4, lambda pixels: pixels.flatten().tolist())
    table(root / "test.parquet", [0, 1, 2], lambda pixels: pixels.flatten().tolist())


def zip_of_classes(root: Path) -> None:
    classes(root / "pictures", ("0", "1", "2"))
    with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
        for path in sorted((root / "pictures").rglob("*.png")):
            archive.write(path, f"pictures/{path.relative_to(root / 'pictures')}")
        archive.writestr("__MACOSX/pictures/0/._0.png", b"junk")


def tar_of_splits(root: Path) -> None:
    classes(root / "p" / "train", ("0", "1", "2"))
    classes(root / "p" / "test", ("0", "1", "2"), 1)
    with tarfile.open(root / "pictures.tar.gz", "w:gz") as archive:
        archive.add(root / "p", "./p")


def idx_by_other_names(root: Path) -> None:
    for split, count in (("Train", 12), ("test", 3)):
        images, labels = pixels_and_labels(count)
        (root / f"my_images_{split}.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (root / f"my_labels_{split}").write_bytes(idx_bytes(labels.astype(np.uint8)))


FORMATS: dict[str, tuple[Callable[[Path], None], str, int, int]] = {
    "a table beside pictures": (table_beside_pictures, ".", 9, 3),
    "a table of ids, with pictures to submit": (ids_without_suffix, ".", 9, 3),
    "metadata.jsonl": (metadata_jsonl, ".", 12, 3),
    "CSV of pixels": (csv_of_pixels, ".", 9, 3),
    "CSV of pixels, the file": (csv_of_pixels, "train.csv", 9, 3),
    "CSV of pixels without header": (lambda root: csv_of_pixels(root, header=False), ".", 12, 3),
    "Keras .npz": (keras_npz, "mnist.npz", 12, 3),
    "MedMNIST .npz": (medmnist_npz, ".", 12, 3),
    "KMNIST .npz": (kmnist_npz, ".", 12, 3),
    ".npy": (npy_pair, ".", 9, 3),
    "flat lists in parquet": (flat_lists, ".", 12, 3),
    "zip": (zip_of_classes, "pictures.zip", 9, 3),
    "tar.gz": (tar_of_splits, "pictures.tar.gz", 12, 3),
    "IDX by other names": (idx_by_other_names, ".", 12, 3),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    make, source, train, test = FORMATS[name]
    make(tmp_path)
    data = load(tmp_path / source)
    assert (len(data.train), len(data.test), data.class_names) == (train, test, ("0", "1", "2"))
    assert data.train.tensor.shape[1:] == (1, SIDE, SIDE)
    assert [place_of_bar(image) for image in data.train.tensor] == data.train.labels.tolist()
    lazy = load(tmp_path / source, in_memory=False)
    assert lazy.fingerprint == data.fingerprint


class TestWrongArraysAndTables:
    def test_several_classes_per_image(self, tmp_path: Path) -> None:
        labels = np.zeros((4, 3), np.uint8)
        labels[0, :2] = 1
        np.savez(tmp_path / "x.npz", x=np.full((4, 8, 8), 99, np.uint8), labels=labels)
        with pytest.raises(DataError, match=r"labels of the shape \(4, 3\) are not one class per image"):
            load(tmp_path)

    def test_a_row_does_not_take_a_picture_of_another_folder(self, tmp_path: Path) -> None:
        table_beside_pictures(tmp_path)
        with (tmp_path / "labels.csv").open("a") as file:
            file.write("other/3.png,1\n")
        with pytest.raises(DataError, match=r"row 12 names 'other/3\.png', and none"):
            load(tmp_path)

    def test_pictures_listed_twice_and_not_at_all(self, tmp_path: Path) -> None:
        table_beside_pictures(tmp_path)
        put(tmp_path / "images" / "more.png", digit(0))
        assert "1 pictures that no table lists left out" in load(tmp_path).describe()
        with (tmp_path / "labels.csv").open("a") as file:
            file.write("3.png,1\n")
        with pytest.raises(DataError, match=r"labels\.csv list pictures more than once: images/3\.png"):
            load(tmp_path)

    def test_tables_of_something_else_are_left_out(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        (tmp_path / "classes.csv").write_text("id,name\n0,first\n1,second\n")
        (tmp_path / "notes.csv").write_bytes(b"\xff\xfe,a\n1,2,3\n")
        assert load(tmp_path).class_names == THREE

    def test_splits_that_name_classes_differently(self, tmp_path: Path) -> None:
        for split, names in (("train", ["x", "y"]), ("test", ["y", "x"])):
            kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
            rows = {"image": [Image.fromarray(digit(label)) for label in (0, 1)] * 3, "label": [0, 1] * 3}
            table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
            table.to_parquet(tmp_path / f"{split}.parquet")
        with pytest.raises(DataError, match="the splits name the classes of 'label' differently"):
            load(tmp_path)

    def test_pickles_are_not_read(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", x_train=np.array([{"a": 1}], dtype=object), y_train=np.zeros(1))
        with pytest.raises(DataError, match=r"x\.npz could not be read as NumPy arrays without pickles"):
            load(tmp_path)

    def test_arrays_that_do_not_belong_together(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.zeros(3))
        with pytest.raises(
            DataError, match=r"'train' needs one array of images and one of as many labels, got x_train"
        ):
            load(tmp_path)

    def test_a_picture_that_is_not_there(self, tmp_path: Path) -> None:
        table_beside_pictures(tmp_path)
        with (tmp_path / "labels.csv").open("a") as file:
            file.write("../../etc/passwd.png,1\n")
        with pytest.raises(DataError, match=r"labels\.csv row 12 names '\.\./\.\./etc/passwd\.png', and none"):
            load(tmp_path)

    def test_a_path_out_of_the_table(self, tmp_path: Path) -> None:
        """A table may name files beside it, and no others."""
        put(tmp_path / "secret.png", digit(1))
        put(tmp_path / "data" / "mine.png", digit(2))
        for path, right in ((tmp_path / "secret.png", False), ("../secret.png", False), ("mine.png", True)):
            cell = {"bytes": None, "path": str(path)}
            table(tmp_path / "data" / "x.parquet", [0, 1] * 3, lambda pixels, cell=cell: cell)  # type: ignore[misc]
            if right:
                assert place_of_bar(load(tmp_path / "data").train.tensor[0]) == 2
            else:
                with pytest.raises(DataError, match="not a file in the same folder"):
                    load(tmp_path / "data")


class TestPixels:
    @pytest.mark.parametrize(
        "cell", [lambda a: (a > 99).tolist(), lambda a: (a > 99).astype(float).tolist(), lambda a: (a / 255).tolist()]
    )
    def test_from_zero_to_one(self, cell: Callable[[np.ndarray], Any], tmp_path: Path) -> None:
        table(tmp_path / "train.parquet", [0, 1, 2] * 4, cell)
        data = load(tmp_path)
        assert data.train.tensor.max() == 255
        assert [place_of_bar(image) for image in data.train.tensor] == data.train.labels.tolist()

    def test_from_zero_to_sixteen_is_refused(self, tmp_path: Path) -> None:
        table(tmp_path / "train.parquet", [0, 1, 2] * 4, lambda a: (a // 16 * (a > 99)).tolist())
        with pytest.raises(DataError, match="the largest pixel value is 15; they must go from 0 to 255, or from 0"):
            load(tmp_path)

    @pytest.mark.parametrize("factor", [1, 16])
    def test_lower_bits_of_sixteen_are_refused(self, factor: int, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        Image.fromarray(digit(1).astype(np.uint16) * factor).save(tmp_path / "a" / "deep.png")
        with pytest.raises(DataError, match=rf"deep\.png: the largest value is {255 * factor}, of 65535"):
            load(tmp_path)

    def test_maps_of_sixteen_bits_and_of_one(self) -> None:
        values = b"".join(int(value).to_bytes(2, "big") for value in digit(3).flatten().astype(int) * 4)
        deep = decode_picture(f"P5 {SIDE} {SIDE} 1020\n".encode() + values, "deep.pgm")
        np.testing.assert_allclose(deep[0].numpy(), digit(3), atol=1)
        bits = decode_picture(b"P1 2 1\n0 1\n", "bits.pbm")
        assert bits.flatten().tolist() == [255, 0]

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
    def test_black_ink_on_transparency(self, mode: str, tmp_path: Path) -> None:
        for label, name in enumerate(THREE):
            for index in range(3):
                ink = digit(label) > 0
                options: dict[str, Any] = {}
                layer = np.zeros((SIDE, SIDE, 4), np.uint8)
                layer[..., 3] = 255 * ink
                picture = Image.fromarray(layer)
                if mode == "LA":
                    picture = picture.convert("LA")
                if mode == "tRNS":
                    picture, options = Image.fromarray(255 * (~ink).astype(np.uint8)), {"transparency": 255}
                if mode == "P":
                    picture, options = Image.fromarray((~ink).astype(np.uint8)).convert("P"), {"transparency": 1}
                    picture.putpalette([0, 0, 0, 255, 255, 255])
                (tmp_path / name).mkdir(exist_ok=True)
                picture.save(tmp_path / name / f"{index}.png", **options)
        told = "of one colour; if they are drawn in black on transparency, set data.background=white"
        assert told in load(tmp_path).describe()
        for background in ("white", "edge"):
            shown = load(tmp_path, background=background).train.tensor
            assert (int(shown[0, 0, 0, 0]), int(shown[0, 0, 5].min())) == (255, 0)

    def test_contain_keeps_the_whole(self, tmp_path: Path) -> None:
        for name in THREE:
            for index in range(3):
                tall = np.full((20, 10), 250, np.uint8)
                tall[0], tall[-1] = 10, 10
                tall[0, 0] = tall[0, -1] = tall[-1, 0] = tall[-1, -1] = 250
                put(tmp_path / name / f"{index}.png", tall)
        with pytest.raises(DataError, match=r"set data\.image_size, and data\.fit=contain to keep the whole of each"):
            load(tmp_path)
        assert "data.fit=resize cuts something off 100% of the images" in load(tmp_path, image_size=16).describe()
        whole = load(tmp_path, image_size=20, fit="contain", background="edge")
        assert "cuts" not in whole.describe()
        image = whole.train.tensor[0, 0]
        assert image[0, 10] < 100
        assert image[-1, 10] < 100
        assert int(image[10, 0]) == 250
        assert load(tmp_path, image_size=20, fit="contain").train.tensor[0, 0, 10, 0] == 0

    def test_contain_scales_down_and_up(self) -> None:
        wide = torch.full((2, 3, 10, 40), 200, dtype=torch.uint8)
        small, large = (fit_to_size(wide, size, "contain", "white") for size in (8, 80))
        assert small.shape == (2, 3, 8, 8)
        assert small[0, 0, :, 0].tolist() == [255] * 3 + [200] * 2 + [255] * 3
        assert (large[0, 0, 30:50] == 200).all()

    def test_nearly_black(self, tmp_path: Path) -> None:
        for name in THREE:
            put(tmp_path / name / "0.png", digit(1) // 16)
            put(tmp_path / name / "1.png", digit(2) // 16)
        assert "WARNING: the largest value is 15 of 255" in load(tmp_path).describe()


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "nature"),
        [
            (b"", "the file is empty"),
            (b"<!DOCTYPE html><html>404</html>", "it is an HTML page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "could not be decoded"),
        ],
    )
    def test_what_is_no_picture_is_named_or_skipped(self, content: bytes, nature: str, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        (tmp_path / "a" / "wrong.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"wrong\.png: .*{nature}"):
            load(tmp_path)
        data = load(tmp_path, skip_unreadable=True)
        assert len(data.train) + len(data.test) == 12
        assert "1 pictures that could not be read are left out, such as" in data.describe()

    def test_nothing_that_can_be_read(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        for path in tmp_path.rglob("*.png"):
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(DataError, match=r"no picture of a split could be read, such as .* Git LFS pointer"):
            load(tmp_path, skip_unreadable=True)

    def test_too_long_and_thin(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        put(tmp_path / "a" / "thin.png", np.zeros((1, 400_000), np.uint8))
        with pytest.raises(DataError, match="400000 x 1 pixels is too long and thin"):
            load(tmp_path, image_size=16)

    def test_a_pipe_is_no_picture(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        os.mkfifo(tmp_path / "a" / "pipe.png")
        with pytest.raises(DataError, match=r"pipe\.png is not a regular file"):
            load(tmp_path)

    def test_a_broken_archive(self, tmp_path: Path) -> None:
        for name in ("x.zip", "x.tar.gz"):
            (tmp_path / name).write_bytes(b"nothing of it")
            with pytest.raises(DataError, match="the archive could not be read"):
                load(tmp_path / name)

    def test_the_survey_keeps_what_others_wrote(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        classes(tmp_path / "data", THREE)
        assert main(["data", str(tmp_path / "data"), "--out", str(tmp_path / "data")]) == 2
        assert "lies in the source" in capsys.readouterr().err
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "data.json").write_text('{"mine": 1}')
        assert main(["data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
        assert "of other origin" in capsys.readouterr().err
        for _ in range(2):
            flags = ["--data.class_names", "x", "y z", "猫", "--out", str(tmp_path / "new")]
            assert main(["data", str(tmp_path / "data"), *flags]) == 0
        assert "y z" in capsys.readouterr().out

    def test_many_classes_have_a_bounded_sheet(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", x=np.arange(1500)[:, None, None] % 256 + np.zeros((1, 8, 8)), y=np.arange(1500))
        assert main(["data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out")]) == 0
        with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
            assert sheet.height < 100 * 60
