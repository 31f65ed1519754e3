"""Tables, arrays and archives of images, and the ranges and sizes of their pixels, each with the right value."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from mnist_diffusion.data.decoding import DataError, decode_picture
from mnist_diffusion.data.transforms import fit_to_size
from tests.conftest import REPOSITORY
from tests.data.test_dataset import idx_bytes, load
from tests.data.test_layouts import SIDE, THREE, classes, digit, place_of_bar, put, table
from tests.data.test_sources import load_lazily


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


def pixels_by_pandas(root: Path) -> None:
    """A column for each pixel, and the index of a data frame whose rows were chosen."""
    for split, count in (("train", 12), ("test", 3)):
        images, labels = pixels_and_labels(count)
        frame = pandas.DataFrame(images.reshape(count, -1)).rename(columns="pixel{}".format).assign(label=labels)
        frame.index = frame.index[::-1] * 2
        frame.to_parquet(root / f"{split}.parquet")
        if split == "train":
            (root / "csv").mkdir()
            frame.to_csv(root / "csv" / "train.csv")


def zip_of_classes(root: Path) -> None:
    classes(root / "pictures", ("0", "1", "2"))
    with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
        for path in sorted((root / "pictures").rglob("*.png")):
            archive.write(path, f"pictures/{path.relative_to(root / 'pictures')}")
        archive.writestr("__MACOSX/pictures/0/._0.png", b"junk")


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
    "pixel columns in parquet": (pixels_by_pandas, "train.parquet", 9, 3),
    "pixel columns in parquet, a folder": (pixels_by_pandas, ".", 12, 3),
    "CSV with an index": (pixels_by_pandas, "csv", 9, 3),
    "zip": (zip_of_classes, "pictures.zip", 9, 3),
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
    assert data.source.startswith(str(tmp_path / source))
    assert load_lazily(tmp_path / source).fingerprint == data.fingerprint


DOCUMENTED = {
    "nothing": "test_no_source_falls_back_loudly",
    "`digits`": "test_digits_and_errors",
    "a folder with one folder per class": "test_junk_is_no_class",
    "a folder of pictures and a table": "a table beside pictures",
    "a folder of pictures alone": "test_flat",
    "`.zip`": "zip",
    "`.csv`, or a folder of them": "CSV of pixels",
    "`.npz`, `.npy`, or a folder of them": "Keras .npz",
    "parquet or arrow files, or a folder of them": "flat lists in parquet",
    "a folder that `datasets` saved": "test_saved_data_sets_side_by_side",
    "a folder of IDX files": "IDX by other names",
    "a Hub id": "test_cached_copy_without_the_network",
}
"""Each row of the table in docs/own_images.md, with what reads such a source: a format above, or another test."""


def test_each_row_of_the_documented_table_is_read() -> None:
    table = (
        (REPOSITORY / "docs" / "own_images.md")
        .read_text(encoding="utf-8")
        .partition("## What is read")[2]
        .partition("| --- | --- |\n")[2]
    )
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.partition("\n\n")[0].splitlines()]
    assert rows == list(DOCUMENTED)
    tests = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name in DOCUMENTED.values() if name not in FORMATS and f"def {name}(" not in tests] == []


SUBMITTED = "".join(f"{index}.png,{index % 2}\n" for index in range(20, 25))
NO_LABELS = [
    ("sample_submission.csv", f"id,label\n{SUBMITTED}", "a submission holds no labels"),
    ("answers.csv", f"id,label\n{SUBMITTED}", "it lists pictures of a test folder alone"),
    ("answers.csv", "id,label\n0.png,0\n1.png,0\n", "its labels are all alike: '0'"),
    (
        "metadata.csv",
        "file_name,caption\n0.png,a bar on the left\n1.png,a bar in the middle\n",
        "its column 'caption' is not called a label, and the folders name classes",
    ),
    ("sizes.csv", "width,height\n640,480\n640,320\n", "none of its columns 'width', 'height' names pictures"),
    ("sizes.csv", "file,width,height\n0.png,8,9\n", "none of its columns 'file', 'width', 'height' is called a label"),
]


class TestWrongArraysAndTables:
    def test_several_classes_per_image(self, tmp_path: Path) -> None:
        labels = np.zeros((4, 3), np.uint8)
        labels[0, :2] = 1
        np.savez(tmp_path / "x.npz", x=np.full((4, 8, 8), 99, np.uint8), labels=labels)
        with pytest.raises(DataError, match=r"labels of the shape \(4, 3\) are not one class per image"):
            load(tmp_path)

    @pytest.mark.parametrize("file", ["other/3.png", "../../etc/passwd.png"])
    def test_a_row_takes_no_picture_from_elsewhere(self, file: str, tmp_path: Path) -> None:
        table_beside_pictures(tmp_path)
        with (tmp_path / "labels.csv").open("a") as table:
            table.write(f"{file},1\n")
        with pytest.raises(DataError, match=rf"labels\.csv row 12 names '{re.escape(file)}', but no pictures"):
            load(tmp_path)

    def test_pictures_listed_twice_and_not_at_all(self, tmp_path: Path) -> None:
        table_beside_pictures(tmp_path)
        put(tmp_path / "images" / "more.png", digit(0))
        assert "1 pictures that no table lists left out" in load(tmp_path).describe()
        with (tmp_path / "labels.csv").open("a") as file:
            file.write("3.png,1\n")
        with pytest.raises(DataError, match=r"labels\.csv list pictures more than once: images/3\.png"):
            load(tmp_path)

    @pytest.mark.parametrize(("name", "content", "note"), NO_LABELS)
    @pytest.mark.parametrize("with_labels", [True, False])
    def test_tables_that_are_none_of_labels(
        self, name: str, content: str, note: str, with_labels: bool, tmp_path: Path
    ) -> None:
        """Beside class folders, and beside another table that is one."""
        for index in range(12):
            put(tmp_path / "train" / THREE[index % 3] / f"{index}.png", digit(index % 3, index))
        for index in range(20, 25):
            put(tmp_path / "test" / f"{index}.png", digit(0))
        if with_labels:
            rows = "".join(f"{index}.png,{THREE[index % 3]}\n" for index in range(12))
            (tmp_path / "labels.csv").write_text("file,label\n" + rows)
        (tmp_path / name).write_text(content)
        data = load(tmp_path)
        assert data.class_names == THREE
        assert len(data.train) + len(data.test) == 12
        assert f"{name} left out: {note}" in data.describe()

    def test_a_table_whose_labels_could_be_in_several_columns(self, tmp_path: Path) -> None:
        table_beside_pictures(tmp_path)
        rows = "".join(f"{index}.png,{index % 3},{index % 2}\n" for index in range(12))
        (tmp_path / "labels.csv").write_text("picture,animal,colour\n" + rows)
        with pytest.raises(
            DataError,
            match=r"labels\.csv left out: none of its columns 'picture', 'animal', 'colour' is called a label",
        ):
            load(tmp_path)
        assert load(tmp_path, label_column="animal").class_names == ("0", "1", "2")

    def test_a_table_for_each_class_and_tables_that_cannot_be_read(self, tmp_path: Path) -> None:
        for index in range(12):
            put(tmp_path / f"{index}.png", digit(index % 3, index))
        for label, name in enumerate(THREE):
            rows = "".join(f"{index}.png,{name}\n" for index in range(label, 12, 3))
            (tmp_path / f"{name}.csv").write_text("file,label\n" + rows)
        (tmp_path / "twice.csv").write_text("file,label,label\n0.png,a,b\n")
        (tmp_path / "nested.jsonl").write_text('{"file_name": "0.png", "objects": {"box": [1, 2]}}\n')
        data = load(tmp_path)
        assert data.class_names == THREE
        assert len(data.train) + len(data.test) == 12
        assert "twice.csv left out: " in data.describe()

    def test_a_table_that_contradicts_the_folders(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        pictures = sorted(tmp_path.rglob("*.png"))
        lines = [f"{path.relative_to(tmp_path)},class {path.parent.name}" for path in pictures]
        (tmp_path / "labels.csv").write_text("\n".join(["file,label", *lines]))
        data = load(tmp_path)
        assert data.class_names == tuple(f"class {name}" for name in THREE)
        assert "labels.csv contradicts the folder of every picture" in data.describe()

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
        with pytest.raises(DataError, match=rf"deep\.png: the largest value is {255 * factor}, but white in 16"):
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
        found = load(tmp_path)
        counted = "of 9 pictures, 9 nearly vanish on black and 0 on white"
        assert f"WARNING: transparent pixels are filled with white: {counted}" in found.describe()
        shown = found.train.tensor
        assert (int(shown[0, 0, 0, 0]), int(shown[0, 0, 5].min())) == (255, 0)
        asked = load(tmp_path, background="black")
        assert f"note         transparent pixels are filled with black: {counted}" in asked.describe()
        assert int(asked.train.tensor.max()) == 0

    def test_white_ink_on_transparency(self, tmp_path: Path) -> None:
        for label, name in enumerate(THREE):
            for index in range(3):
                layer = np.full((SIDE, SIDE, 4), 255, np.uint8)
                layer[..., 3] = digit(label)
                put(tmp_path / name / f"{index}.png", layer)
        found = load(tmp_path)
        assert "filled with black: of 9 pictures, 0 nearly vanish on black and 9 on white" in found.describe()
        assert int(found.train.tensor[0, 0, 0, 0]) == 0

    def test_contain_keeps_the_whole(self, tmp_path: Path) -> None:
        for name in THREE:
            for index in range(3):
                tall = np.full((20, 10), 250, np.uint8)
                tall[0], tall[-1] = 10, 10
                tall[0, 0] = tall[0, -1] = tall[-1, 0] = tall[-1, -1] = 250
                put(tmp_path / name / f"{index}.png", tall)
        with pytest.raises(DataError, match=r"set data\.image_size, and data\.fit=contain to keep the whole of each"):
            load(tmp_path)
        assert "data.fit=resize crops content from 100% of the images" in load(tmp_path, image_size=16).describe()
        whole = load(tmp_path, image_size=20, fit="contain", background="white")
        assert "crops" not in whole.describe()
        image = whole.train.tensor[0, 0]
        assert image[0, 10] < 100
        assert image[-1, 10] < 100
        assert int(image[10, 0]) == 255
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
