"""What people bring, trained with one flag; and the class that was asked for is drawn, by number and by name."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_cfg
from mnist_diffusion.cli import main
from mnist_diffusion.command_options import SampleOptions
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.plots.samples import Samples

SIDE = 16


def picture(label: int, index: int) -> np.ndarray:
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[2:14, label], pixels[0, 0] = 255, index
    return pixels


def class_folders(root: Path, count: int, save: Callable[[int, int, Path], None]) -> Path:
    for label in range(count):
        (root / str(label)).mkdir(parents=True)
        for index in range(4):
            save(label, index, root / str(label) / f"{index}.png")
    return root


def kaggle_csv(root: Path) -> Path:
    names = ["label", *(f"pixel{place}" for place in range(SIDE**2))]
    rows = [",".join(map(str, [n % 12, *picture(n % 12, n // 12).flatten()])) for n in range(48)]
    (root / "train.csv").write_text("\n".join([",".join(names), *rows]))
    return root / "train.csv"


def keras_npz(root: Path) -> Path:
    images = np.stack([picture(n % 12, n // 12) for n in range(48)])
    np.savez(root / "my.npz", x_train=images, y_train=np.arange(48) % 12, x_test=images[:12], y_test=np.arange(12))
    return root / "my.npz"


def zipped(root: Path) -> Path:
    folder = folders(root / "x")
    with zipfile.ZipFile(root / "x.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(root))
    return root / "x.zip"


def folders(root: Path) -> Path:
    return class_folders(root, 12, lambda label, index, path: Image.fromarray(picture(label, index)).save(path))


def transparent(root: Path) -> Path:
    def save(label: int, index: int, path: Path) -> None:
        layer = np.zeros((SIDE, SIDE, 4), np.uint8)
        layer[..., 3] = picture(label, index)
        Image.fromarray(layer).save(path)

    return class_folders(root, 12, save)


@pytest.mark.slow
@pytest.mark.parametrize("make", [kaggle_csv, keras_npz, zipped, folders, transparent])
def test_train_and_draw(make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train_cfg.main(["--config", "tiny", "--train.max_steps", "2", "--data.source", str(source)]) == 0
    run = str(tmp_path / "runs" / "latest")
    pipeline = MNISTDiffusionPipeline.from_pretrained(run)
    assert pipeline.config.id2label == {str(number): str(number) for number in range(12)}
    assert pipeline.label_ids([2, "2", 10, "10"]) == [2, 2, 10, 10]
    assert Samples(SampleOptions(pipeline=run, class_labels=("2", "10"))).labels == [2, 10]
    assert main(["sample", run, "--class_labels", "10", "2", "--num_images", "2", "--files"]) == 0
    assert {path.name for path in (tmp_path / "samples").glob("digit_*")} == {"digit_10_000.png", "digit_2_000.png"}
