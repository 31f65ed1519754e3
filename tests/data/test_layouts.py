"""What people's folders, splits, labels and files are, each with the right value."""

from __future__ import annotations

import io
import os
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
from mnist_diffusion.data.decoding import DataError
from tests.data.test_dataset import load

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
        (tmp_path / "sets" / "train" / "cache-0123abcd.arrow").write_bytes(b"of an earlier map()")
        assert (len(load(tmp_path).train), len(load(tmp_path).test)) == (12, 3)

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

    def test_flat(self, tmp_path: Path) -> None:
        for index in range(6):
            put(tmp_path / f"{'cat' if index % 2 else 'dog'}.{index}.png", digit(index % 2))
        data = load(tmp_path)
        assert data.class_names == ("image",)
        assert "no folders name classes" in data.describe()

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
        told = "class names are numbers that differ from their labels: label 0 is '2', 1 is '5', 2 is '11'"
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
        assert "1 unreadable pictures skipped; the first:" in data.describe()

    def test_nothing_that_can_be_read(self, tmp_path: Path) -> None:
        classes(tmp_path, THREE)
        for path in tmp_path.rglob("*.png"):
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(DataError, match=r"no picture of a split could be read: .* Git LFS pointer"):
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

    def test_a_saved_data_set_with_a_wrong_offset(self, tmp_path: Path) -> None:
        """Which would read, or write, beside the array."""
        picture = io.BytesIO()
        Image.new("L", (8, 8), 200).save(picture, "PNG")
        cells = [{"bytes": picture.getvalue(), "path": None}] * 9
        datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2] * 3}).save_to_disk(str(tmp_path / "saved"))
        [file] = (tmp_path / "saved").glob("*.arrow")
        content, offsets = file.read_bytes(), np.arange(10, dtype=np.int32) * len(picture.getvalue())
        assert content.count(offsets.tobytes()) == 1
        file.write_bytes(content.replace(offsets.tobytes(), np.append(offsets[:-1], 2**30).astype(np.int32).tobytes()))
        with pytest.raises(DataError, match="saved"):
            load(tmp_path / "saved")

    def test_a_table_whose_picture_is_out_of_all_proportion(self, tmp_path: Path) -> None:
        """81 million numbers in a few kilobytes."""
        row = pa.array(np.zeros(9000 * 9000, np.uint8))
        rows = pa.ListArray.from_arrays(pa.array(np.arange(0, 9000 * 9000 + 1, 9000, dtype=np.int32)), row)
        cell = pa.ListArray.from_arrays(pa.array([0, 9000], pa.int32()), rows)
        parquet.write_table(pa.table({"image": cell, "label": [0]}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match="row 0: a picture of 9000 x 9000 pixels, more than the limit"):
            load(tmp_path / "x.parquet")

    def test_arrays_of_the_datasets_librarys_own_type(self, tmp_path: Path) -> None:
        kinds = datasets.Features({"image": datasets.Array2D((SIDE, SIDE), "uint8"), "label": datasets.Value("int64")})
        rows = {"image": [digit(index % 3, index) for index in range(12)], "label": [index % 3 for index in range(12)]}
        datasets.Dataset.from_dict(rows, kinds).to_parquet(str(tmp_path / "x.parquet"))
        data = load(tmp_path / "x.parquet")
        assert [place_of_bar(image) for image in data.train.tensor] == data.train.labels.tolist()

    def test_a_picture_that_would_start_another_program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """PostScript under the name of a picture, for which Pillow starts Ghostscript."""
        canary, program = tmp_path / "canary", tmp_path / "bin" / "gs"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ntouch {canary}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        classes(tmp_path / "data", ("0", "1", "2"))
        text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 moveto\n"
        (tmp_path / "data" / "0" / "x.png").write_bytes(text)
        with pytest.raises(DataError, match=r"x\.png: the picture could not be decoded"):
            load(tmp_path / "data")
        assert not canary.exists()

    def test_a_table_of_more_rows_than_can_be_meant(self, tmp_path: Path) -> None:
        rows = 10_000_001
        table = pa.table({"image": pa.nulls(rows, pa.binary()), "label": pa.nulls(rows)})
        parquet.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(DataError, match="has 10,000,001 rows, more than the limit of 10,000,000"):
            load(tmp_path / "x.parquet")

    def test_a_broken_archive(self, tmp_path: Path) -> None:
        for name in ("x.zip",):
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
