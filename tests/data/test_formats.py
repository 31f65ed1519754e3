"""What people's folders, files, tables and archives are read as: the right pixels by the right labels, or why not."""

import gzip
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.data.decoding import DataError

SIDE, SPLITS = 12, {"train": 12, "test": 3}
THREE, DIGITS, LABELS = ("a", "b", "c"), ("0", "1", "2"), [0, 1, 2] * 4
Files = dict[str, Any]


def load(source: Path | str | None, seed: int = 0, **fields: Any) -> ImageData:
    return load_images(DataConfig(source=None if source is None else str(source), **fields), seed=seed)


def digit(label: int, index: int = 0) -> np.ndarray:
    """A white bar whose place says the label, on black; the image's number is in a corner."""
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[3:9, label % SIDE] = 255
    image[0, 0] = index
    return image


def place_of_bar(image: torch.Tensor) -> int:
    return int(image[0, 5].argmax())


def encoded(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def write(root: Path, files: Files) -> Path:
    """Text, bytes, pixels as PNG, arrays by name, Arrow tables, folders (None), and what writes itself to its path."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif callable(content):
            content(path)
        elif isinstance(content, pa.Table):
            parquet.write_table(content, path)
        elif isinstance(content, dict):
            np.savez(path, **content)
        else:
            text = encoded(content) if isinstance(content, np.ndarray) else content
            path.write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def classes(names: Sequence[str] = DIGITS, count: int = 4, place: str = "") -> Files:
    """One folder per name; the bars of its pictures are at the name's place in the list."""
    numbered = [(label, name, index) for label, name in enumerate(names) for index in range(count)]
    return {f"{place}{name}/{index}.png": digit(label, index) for label, name, index in numbered}


def splits(**counts: int) -> Files:
    return {name: each for split, n in counts.items() for name, each in classes(DIGITS, n, f"{split}/").items()}


def images(count: int, place: str = "", width: int = 0) -> Files:
    """Pictures of three classes in one folder."""
    return {f"{place}{index:0{width}}.png": digit(index % 3, index) for index in range(count)}


def pixels(count: int) -> np.ndarray:
    return np.stack(list(images(count).values()))


def rows(count: int, cell: str) -> str:
    """Lines of a table of these images."""
    return "".join(cell.format(index, index % 3) + "\n" for index in range(count))


def as_file(image: np.ndarray) -> dict[str, Any]:
    return {"bytes": encoded(image), "path": None}


def table(labels: Any = LABELS, cell: Any = as_file, names: Any = ("image", "label"), **more: Any) -> pa.Table:
    cells = [cell(digit(index % 3, index)) for index in range(len(labels))]
    return pa.table({names[0]: cells, names[1]: list(labels), **more})


def typed(image: Any, label: Any) -> Callable[[Path], object]:
    """A table whose types alone tell what its columns are."""
    kinds = datasets.Features({"picture": image, "kind": label})
    cells = {"picture": list(pixels(12)), "kind": LABELS}
    return lambda path: datasets.Dataset.from_dict(cells, kinds).to_parquet(str(path))


def named(names: Sequence[str]) -> Callable[[Path], object]:
    return typed(datasets.Image(), datasets.ClassLabel(names=list(names)))


def frame(count: int) -> pandas.DataFrame:
    """A column for each pixel, and the index of a data frame whose rows were chosen."""
    frame = pandas.DataFrame(pixels(count).reshape(count, -1)).rename(columns="pixel{}".format)
    frame.index = frame.index[::-1] * 2
    return frame.assign(label=LABELS[:count])


def saved(count: int, shards: int = 1) -> Callable[[Path], object]:
    cells = {"image": pixels(count).tolist(), "label": LABELS[:count]}
    return lambda path: datasets.Dataset.from_dict(cells).save_to_disk(path, num_shards=shards)


def saved_twice(path: Path) -> None:
    saved(9, shards=3)(path)
    saved(12)(path)


def leading_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def idx_bytes(values: Any) -> bytes:
    values = np.asarray(values)
    return struct.pack(f">I{values.ndim}I", 0x0800 | values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def idx(place: str = "", zipped: bool = False, **instead: bytes | None) -> Files:
    """MNIST's files; `t10k_labels=None`, say, leaves that one out."""
    files: Files = {}
    for split, count in (("train", 12), ("t10k", 3)):
        for kind, values in (("images-idx3", pixels(count)), ("labels-idx1", LABELS[:count])):
            content = instead.get(f"{split}_{kind[:6]}", idx_bytes(values))
            if content is not None:
                files[f"{place}{split}-{kind}-ubyte{'.gz' * zipped}"] = gzip.compress(content) if zipped else content
    return files


def emnist(subset: str, numbers: Sequence[int], place: str = "") -> Files:
    """A part of EMNIST, which has rows and columns exchanged, with three classes."""
    files = {}
    for split, count in SPLITS.items():
        name, turned = f"{place}emnist-{subset}-{split}", np.ascontiguousarray(pixels(count).transpose(0, 2, 1))
        files[f"{name}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(turned))
        files[f"{name}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(np.array(numbers)[LABELS[:count]]))
    return files


def csv_of_pixels(header: bool) -> Files:
    """As on Kaggle: `train.csv` with labels, `test.csv` without, but where no header tells."""
    files = {}
    for split, count in SPLITS.items():
        labels = [["label", *LABELS[:count]]] if split == "train" or not header else []
        values = [[f"pixel{place}", *each] for place, each in enumerate(pixels(count).reshape(count, -1).T)]
        lines = [",".join(map(str, line)) for line in zip(*labels, *values, strict=True)]
        files[f"{split}.csv"] = "\n".join(lines[not header :]) + "\n"
    return files


def zipped(files: Files) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo("x")
            entry.filename = name  # also one that zipfile itself would not write
            archive.writestr(entry, encoded(content))
    return file.getvalue()


Case = tuple[Files, str, tuple[int, int], tuple[str, ...], str, dict[str, Any]]


def case(files: Files, told: str = "", counts: Any = (9, 3), names: Any = DIGITS, source: str = ".", **of: Any) -> Case:
    """Files; what is told of them; images to train on and held out; classes; what `load` is given."""
    return files, told, counts, names, source, of


BAR, LFS = digit(0), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
LISTED, WHOLE = images(12, "images/"), {"labels.csv": "file,label\n" + rows(12, "{}.png,{}")}
SEVERAL = {"labels.csv": "picture,animal,colour\n" + rows(12, "{}.png,{},red")}
IDS = {"train.csv": "id;breed\n" + rows(12, "{:04};{}"), "sample_submission.csv": "id;breed\n0012;0\n"}
JSONL = {f"{split}/metadata.jsonl": rows(n, '{{"file_name": "{}.png", "label": {}}}') for split, n in SPLITS.items()}
PARTS = {"letters/train-0-of-1.parquet": table(LABELS[:9]), "letters/test-0-of-1.parquet": table(LABELS[:3])}
PARTS |= {"digits/train.parquet": table(), "digits/test.parquet": table(LABELS[:3])}
TREES = {f"one/{name}": content for name, content in splits(train=3, test=1).items()}
TREES |= {name.replace("one", "two", 1): content for name, content in TREES.items()}
PANDAS = {f"{split}.parquet": frame(count).to_parquet() for split, count in SPLITS.items()}
SAVED: dict[str, Any] = {f"sets/{split}": saved(count) for split, count in SPLITS.items()}
SAVED |= {"sets/train/cache-0123abcd.arrow": b"of an earlier map()"}
ARRAYS = {split: {"x": pixels(count), "y": LABELS[:count]} for split, count in SPLITS.items()}
KERAS = {f"{kind}_{split}": values for split, each in ARRAYS.items() for kind, values in each.items()}
KMNIST = {f"kmnist-{split}-imgs.npz": {"arr_0": each["x"]} for split, each in ARRAYS.items()}
KMNIST |= {f"kmnist-{split}-labels.npz": {"arr_0": each["y"]} for split, each in ARRAYS.items()}
MEDMNIST = {f"{split}_images": pixels(count) for split, count in {**SPLITS, "val": 6}.items()}
MEDMNIST |= {name.replace("image", "label"): np.array(LABELS[: len(each)])[:, None] for name, each in MEDMNIST.items()}
NUMPY = {"images.npy": partial(np.save, arr=pixels(12)[:, None] / np.float32(255))}
NUMPY |= {"labels.npy": partial(np.save, arr=np.eye(3)[LABELS])}
OTHER_IDX = {f"my_images_{split.title()}.gz": gzip.compress(idx_bytes(pixels(n))) for split, n in SPLITS.items()}
OTHER_IDX |= {f"my_labels_{split}": idx_bytes(LABELS[:count]) for split, count in SPLITS.items()}
LETTERS_OR_NOT = emnist("letters", [1, 2, 3]) | emnist("balanced", [0, 10, 46])
STRAYS = {"0/x.txt": "mine", "0/.DS_Store": "", "0/x.gif": digit(0, 9)}
BESIDE = {f"train/{THREE[index % 3]}/{index}.png": digit(index % 3, index) for index in range(12)}
BESIDE |= {f"test/{index}.png": BAR for index in range(20, 25)}
TOLD = {"labels.csv": "file,label\n" + "".join(f"{index}.png,{THREE[index % 3]}\n" for index in range(12))}
SUBMITTED = "".join(f"{index}.png,{index % 2}\n" for index in range(20, 25))
CAPTIONS = "file_name,caption\n0.png,a bar on the left\n1.png,a bar in the middle\n"
NO_LABELS = [
    ("sample_submission.csv", f"id,label\n{SUBMITTED}", "a submission holds no labels"),
    ("answers.csv", f"id,label\n{SUBMITTED}", "it only lists pictures in a test folder"),
    ("sizes.csv", "width,height\n640,480\n640,320\n", "none of its columns 'width', 'height' names pictures"),
    ("answers.csv", f"id,label\n{rows(12, '{}.png,0')}", "its labels are all alike: '0'"),
    ("metadata.csv", CAPTIONS, "its column 'caption' is not called a label, and the folders name classes"),
]
CONTRADICTION = "file,label\n" + "".join(f"{name}/{index}.png,no {name}\n" for name in DIGITS for index in range(4))
GAPS = "class names are numbers that differ from their labels: label 0 is '2', 1 is '5', 2 is '11'"
NOT_TEST = "note         trained on the split"
VEHICLES, LETTERS = ("apple", "bus", "train", "whale"), ("kleine Katze", "Ω mega", "猫")
FASHION, AGES = ("T-shirt/top", "Trouser", "Pullover"), ("2", "5", "11")
FORMATS: dict[str, Case] = {
    "a table beside pictures": case(LISTED | WHOLE, "labels from labels.csv"),
    "a table of ids, with pictures to submit": case(images(12, "train/", 4) | {"test/0012.png": BAR} | IDS),
    "metadata.jsonl": case(images(12, "train/") | images(3, "test/") | JSONL, "", (12, 3)),
    "CSV of pixels": case(csv_of_pixels(True)),
    "CSV of pixels, the file": case(csv_of_pixels(True), source="train.csv"),
    "CSV of pixels without header": case(csv_of_pixels(False), "", (12, 3)),
    "Keras .npz": case({"mnist.npz": KERAS}, "", (12, 3), source="mnist.npz"),
    "MedMNIST .npz": case({"organ.npz": MEDMNIST}, "", (12, 3)),
    "KMNIST .npz": case(KMNIST, "", (12, 3)),
    ".npy": case(NUMPY),
    "flat lists in parquet": case({"train.parquet": table(cell=lambda a: a.flatten().tolist())}),
    "zip": case({"x.zip": zipped(classes(place="x/") | {"__MACOSX/x/0/._0.png": BAR, "": BAR})}, source="x.zip"),
    "IDX by other names": case(OTHER_IDX, "", (12, 3)),
    "IDX": case(idx() | {"._train-images-idx3-ubyte": "", "train-images-idx3-ubyte.gz.md5": ""}, "", (12, 3)),
    "zipped IDX where torchvision has it": case(idx("MNIST/raw/", True), "", (12, 3)),
    "Fashion": case(idx("FashionMNIST/raw/"), "", (12, 3), FASHION),
    "KMNIST": case(idx("KMNIST/raw/", True), "", (12, 3), ("o", "ki", "su")),
    "EMNIST": case(emnist("letters", [1, 3, 26], "EMNIST/raw/"), "", (12, 3), ("a", "c", "z")),
    "a part of EMNIST": case(LETTERS_OR_NOT, "", (12, 3), ("0", "A", "t"), subset="balanced"),
    # Splits.
    **{
        f"{train} and {test}": case(classes(place=f"{train}/") | classes(DIGITS, 2, f"{test}/"), NOT_TEST, (12, 6))
        for train, test in (
            *(("archive/Training/images", "archive/Testing/images"), ("train", "VALID")),
            ("seg_train/seg_train", "seg_test/seg_test"),
        )
    },
    **{
        train: case({f"{train}.parquet": table(), f"{test}.parquet": table(LABELS[:3])}, "", (12, 3))
        for train, test in (
            *(("mnist_train", "mnist_test"), ("default/train/0", "default/test/0")),
            ("data/train-00000-of-00001", "data/validation-00000-of-00001"),
        )
    },
    "splits below": case(classes(["0/train", "1/train"]) | classes(["0/test", "1/test"], 1), "", (8, 2), ("0", "1")),
    "a third split": case(splits(train=4, val=2, test=1), "split 'val' left out", (12, 3)),
    "another split": case(splits(train=4, val=2, test=1), "held out: 'val'", (12, 6), test_split="validation"),
    "a folder that `datasets` saved": case(SAVED, "", (12, 3)),
    "a folder that it saved twice": case({"x": saved_twice}, source="x"),
    "one of two configurations": case(PARTS, subset="letters"),
    "one of two trees": case(TREES, subset="two"),
    "masks": case(splits(train=4, test=1) | {"masks/0.png": BAR}, "beside the splits left out: masks", (12, 3)),
    "pictures to submit": case(splits(train=4) | {"test/0.png": BAR}, "1 pictures of the split 'test' left out"),
    # Folders.
    **{
        name: case(classes() | {f"{name}/0.png": BAR}, f"folders left out: {name}")
        for name in (".ipynb_checkpoints", "__MACOSX")
    },
    "a class called train": case(classes(VEHICLES), "WARNING: classes are called train, as", (12, 4), VEHICLES),
    "pixel columns in parquet, a folder": case(PANDAS, "", (12, 3)),
    "CSV with an index": case({"train.csv": frame(12).to_csv()}),
    "a contradiction": case(
        classes() | {"labels.csv": CONTRADICTION}, "labels.csv contradicts the", names=("no 0", "no 1", "no 2")
    ),
    "links that go round": case(classes() | {"0/again": lambda path: path.symlink_to(path.parents[1])}),
    "loose pictures": case(classes() | {"x.png": BAR}, "1 pictures left out, which lie in no class folder"),
    "pictures alone": case({f"{n}.png": digit(0, n) for n in range(6)}, "no folders name classes", (5, 1), ("image",)),
    "one class": case(classes(["only"], 20), "", (18, 2), ("only",)),
    "other letters": case(classes(LETTERS, place="Bilder für später/"), names=LETTERS),
    "other files": case(classes() | STRAYS, "1 files that are no pictures left out: .txt", (10, 3)),
    "a broken picture": case(classes() | {"0/x.png": LFS}, "1 unreadable pictures skipped", skip_unreadable=True),
    "a link that leads nowhere": case(classes() | {"0/x.png": leading_nowhere}, "1 unreadable", skip_unreadable=True),
    # Labels, and tables of them.
    "gaps between classes": case(classes(AGES), GAPS, names=AGES),
    "gaps in a table": case({"x.parquet": table([2, 5, 11] * 4)}, GAPS, names=AGES),
    "numbers with a point": case({"x.parquet": table([0.0, 1.0, 2.0] * 4)}),
    "labels in lists of one": case({"x.parquet": table([[n] for n in LABELS])}, names=THREE, class_names=THREE),
    "columns by other names": case({"x.parquet": table(names=("img", "digit"))}),
    "a column that is named": case({"x.parquet": table(names=("picture", "fine_label"))}, image_column="picture"),
    "labels that are named": case({"x.parquet": table(other=[*"abc"] * 4)}, names=THREE, label_column="other"),
    "names in the types": case({"x.parquet": named(THREE)}, names=THREE),
    "arrays": case({"x.parquet": typed(datasets.Array2D((SIDE, SIDE), "uint8"), datasets.Value("int64"))}),
    "a binary column": case({"x.parquet": table(cell=encoded)}),
    "paths": case(images(3) | {"x.parquet": table(cell=lambda a: {"bytes": None, "path": f"{a[5].argmax()}.png"})}),
    "pixels of true and false": case({"x.parquet": table(cell=lambda a: (a > 99).tolist())}),
    "pixels from 0 to 1": case({"x.parquet": table(cell=lambda a: (a / 255).tolist())}),
    "pictures in no table": case(LISTED | WHOLE | {"images/more.png": BAR}, "1 pictures that no table lists left out"),
    "one of several columns": case(LISTED | SEVERAL, label_column="animal"),
    **{
        f"{note}{end}": case(BESIDE | labels | {name: content}, f"{name} left out: {note}", names=THREE)
        for name, content, note in NO_LABELS
        for end, labels in (("", {}), (", beside labels", TOLD))
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    files, told, counts, names, source, fields = FORMATS[name]
    data = load(write(tmp_path, files) / source, **fields)
    assert (len(data.train), len(data.test), data.class_names) == (*counts, names)
    assert (data.train.images.shape[1:], data.train.images.max()) == ((1, SIDE, SIDE), 255)
    assert [place_of_bar(image) for image in data.train.images] == data.train.labels.tolist()
    assert data.source.startswith(str(tmp_path / source))
    assert told in data.describe()


def png_header(side: int) -> bytes:
    """A PNG that claims a size and holds nothing of it."""
    start, parts = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0), b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", start), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")):
        parts += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return parts


def each(name: str, *told: tuple[Any, str], beside: Files | None = None, **fields: Any) -> Iterable[Case]:
    """Sources that are refused for what is in one file, which is named."""
    stem = Path(name).stem
    return [case((beside or {}) | {name: content}, f"{stem}.*({words})", **fields) for content, words in told]


IMAGES, SIDEWAYS = idx_bytes(pixels(12)), Image.Exif()
SIDEWAYS[0x0112] = 6
ODD, DEEP = {"0/odd.png": np.zeros((30, 20), np.uint8)}, digit(1).astype(np.uint16) * 16
REFUSED: list[Case] = [
    *each(
        "train-images-idx3-ubyte",
        (IMAGES[:2], "truncated header"),
        (IMAGES[:-1], r"declares 1728 values \[12, 12, 12\] but holds 1727"),
        (IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], "more than the limit"),
        (gzip.compress(IMAGES)[:-9], "could not be read"),
        (gzip.compress(IMAGES + b"x"), "holds more"),
        beside=idx(),
    ),
    case(idx(train_labels=idx_bytes(LABELS[:11])), "holds 12 images but .* 11 labels"),
    case(idx(t10k_labels=idx_bytes([7, 7, 7])), r"held-out classes without training images: \[7\]"),
    case(idx(), "data.train_split='letters' is not a split", train_split="letters"),
    case(idx("MNIST/raw/") | idx("FashionMNIST/raw/"), "several data sets; name one of .*FashionMNIST, .*MNIST"),
    case(LETTERS_OR_NOT, "data.subset=None must name one of the subsets of .*: balanced, letters"),
    case(splits(train=4, test=1), "data.test_split='other' is not a split of .*test, train", test_split="other"),
    case(PARTS, "several subsets; set data.subset to one of digits, letters"),
    case(TREES, "set data.subset to one of one, two"),
    case(classes(), "data.class_names names 2 classes, but .* has 3", class_names=("a", "b")),
    case(classes() | {"violet/0.png": BAR}, "class 'violet' has 1 image"),
    case(classes(["\x1b[31m"]), "is not UTF-8 or has control characters; rename it"),
    case({"train.parquet": named(THREE), "test.parquet": named("bca")}, "name the classes of 'kind' differently"),
    *each(
        "x.parquet",
        (b"PAR1 and nothing", "could not be read"),
        (table(names=("image", "a"), b=LABELS), "cannot tell which of the columns .* set data.label_column"),
        *((table([0.0, 1.0, no, 1.0] * 2), "no label: 2 of 8 training") for no in (float("nan"), -1.0, None)),
        (table(cell=lambda _: [[100, 200], [30]]), "a picture's rows are of different lengths"),
        (table(cell=lambda _: [[float("nan")]]), "row 0: pixel values must go from 0 to 255"),
        (table(cell=lambda _: np.ones((4, 4, 5)).tolist()), "no images of 1 or 3 channels"),
        (table(cell=lambda a: (a // 16 * (a > 99)).tolist()), "the largest pixel value is 15; they must go from 0 to"),
        (table(cell=lambda _: {"bytes": None, "path": "/etc/hostname"}), "not a file in the same folder"),
        (table(cell=lambda _: {"bytes": None, "path": "../x.png"}), "not a file in the same folder"),
        source="x.parquet",
    ),
    case(LISTED | SEVERAL, "left out: none of its columns 'picture', 'animal', 'colour' is called a label"),
    *(
        case(LISTED | {"labels.csv": WHOLE["labels.csv"] + f"{file},1\n"}, f"labels.csv {told}")
        for file, told in (
            ("../../etc/x.png", "row 12 names '../../etc/x.png', but no pictures"),
            ("3.png", "list pictures more than once: images/3.png"),
        )
    ),
    case({"x.npz": {"x_train": np.ones((4, 8, 8)), "y": np.zeros(3)}}, "'train' needs one array of images and .* got"),
    case({"x.npz": {"x": np.array([{"a": 1}], dtype=object)}}, r"x\.npz could not be read as NumPy arrays without pic"),
    *each(
        "0/wrong.png",
        (png_header(8200), "8200 x 8200 pixels, more than the limit"),
        (LFS, "it is a Git LFS pointer"),
        (b"\x89PNG not really", "the picture could not be decoded: it is damaged, or of an unknown format"),
        (encoded(Image.new("F", (12, 12)), "TIFF"), "of mode 'F' has no known range"),
        (DEEP, "the largest value is 4080, but white in 16"),
        (os.mkfifo, "is not a regular file"),
        beside=classes(),
        image_size=SIDE,
    ),
    case({"x.png": LFS}, "no picture of a split could be read: .* Git LFS pointer", skip_unreadable=True),
    case({"x.png": np.zeros((1, 400_000), np.uint8)}, "400000 x 1 pixels is too long for", image_size=16),
    case({"x.jpg": encoded(Image.new("RGB", (12, 8)), "JPEG", exif=SIDEWAYS)}, "images of 8 x 12 are not square"),
    case(classes() | ODD, "images of different sizes .* set data.image_size"),
    case(classes() | ODD, "data.fit='pad' cannot bring an image of 20 x 30", image_size=16, fit="pad"),
    case({"x.zip": b"nothing of it"}, "the archive could not be read", source="x.zip"),
    case({"x.txt": ""}, r"is a file, but none of \.parquet, \.arrow, \.csv", source="x.txt"),
    case({}, r"holds no images\. Looked for IDX files"),
    case({}, r"was not found: there is no such folder or file \(looked for /", source="/no/such/folder"),
]


@pytest.mark.parametrize("refused", REFUSED, ids=[refused[1] for refused in REFUSED])
def test_what_cannot_be_read_is_said(refused: Case, tmp_path: Path) -> None:
    files, told, _, _, source, fields = refused
    with pytest.raises(DataError, match=told) as raised:
        load(write(tmp_path, files) / source, **fields)
    assert str(raised.value).isprintable()


def test_a_saved_data_set_with_a_wrong_offset(tmp_path: Path) -> None:
    """Which would read, or write, beside the array."""
    rows = {"image": [as_file(BAR)] * 9, "label": LABELS[:9]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    [file] = (tmp_path / "saved").glob("*.arrow")
    content, offsets = file.read_bytes(), np.arange(10, dtype=np.int32) * len(encoded(BAR))
    assert content.count(offsets.tobytes()) == 1
    file.write_bytes(content.replace(offsets.tobytes(), np.append(offsets[:-1], 2**30).astype(np.int32).tobytes()))
    with pytest.raises(DataError, match="saved"):
        load(tmp_path / "saved")


def test_a_picture_that_would_start_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under the name of a picture, for which Pillow starts Ghostscript."""
    write(tmp_path, {"bin/gs": f"#!/bin/sh\ntouch {tmp_path / 'canary'}\n"})
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 moveto\n"
    with pytest.raises(DataError, match=r"x\.png: the picture could not be decoded"):
        load(write(tmp_path / "data", classes() | {"0/x.png": text}))
    assert not (tmp_path / "canary").exists()
