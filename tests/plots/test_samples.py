"""`mnist-diffusion sample`: what it writes, and that it says what is wrong."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mnist_diffusion.cli import main
from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.plots import samples as sampling
from tests.conftest import make_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipelines") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return str(folder)


def sample(folder: str, out: Path, *flags: Any, code: int = 0) -> Path:
    arguments = ["sample", folder, "--out", str(out), "--num_inference_steps", "2", *map(str, flags)]
    try:
        ended: Any = main(arguments)
    except SystemExit as stopped:  # of the parser
        ended = stopped.code
    assert ended == code
    return out


def test_everything_on_request(folder: str, tmp_path: Path) -> None:
    flags = ["--class_labels", "d", "7", "--num_images", "5", "--files", "--gif"]
    out = sample(folder, tmp_path, *flags, "--guidance_sweep", "0", "1", "5", "--interpolation", "4")
    names = {path.name for path in out.iterdir()}
    files = {"class_d_000.png", "class_d_001.png", "class_d_002.png", "class_h_000.png", "class_h_001.png"}
    sheets = {"grid.png", "denoising.gif", "guidance.png", "interpolation.png"}
    assert names == files | sheets
    with Image.open(out / "denoising.gif") as animation:
        assert animation.n_frames == 2  # type: ignore[attr-defined]
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] > 3 * 40
        assert np.asarray(grid).std() > 0


def test_seed_fixes_the_images_whatever_the_batch(folder: str, tmp_path: Path) -> None:
    warnings.simplefilter("error")  # as of `python -W error`
    one = sample(folder, tmp_path / "one", "--files", "--num_images", 4, "--batch_size", 1)
    four = sample(folder, tmp_path / "four", "--files", "--num_images", 4, "--batch_size", 4)
    other = sample(folder, tmp_path / "other", "--files", "--num_images", 4, "--seed", 1)
    for path in one.glob("class_*.png"):
        pixels = [np.asarray(Image.open(where / path.name)).astype(int) for where in (one, four, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
        assert np.abs(pixels[0] - pixels[2]).max() > 1


def test_numbers_that_are_names_of_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = make_pipeline()
    pipeline.register_to_config(id2label={str(label): str(label + 1) for label in range(10)})
    pipeline.save_pretrained(tmp_path / "pipeline")
    sample(str(tmp_path / "pipeline"), tmp_path, "--class_labels", "3", code=2)
    told = "class_labels='3' is ambiguous: it is the name of class 2 and the number of class '4'"
    assert told in capsys.readouterr().err
    sample(str(tmp_path / "pipeline"), tmp_path, "--class_labels", "10", "0", "--num_images", 2, "--files")
    assert {path.name for path in tmp_path.glob("class_*")} == {"class_10_000.png", "class_1_000.png"}


def test_a_data_set_in_shards(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards are of the same images as one file, indexed by a card, taken up again, and never mixed with others."""
    monkeypatch.setattr(sampling, "IMAGES_PER_SHARD", 10)
    flags: list[Any] = ["--as_dataset", "--num_images", 23]
    out = sample(folder, tmp_path / "set", *flags)
    shards = sorted(out.glob("*.parquet"))
    assert [path.name for path in shards] == [f"train-0000{place}-of-00003.parquet" for place in range(3)]
    written = [path.read_bytes() for path in shards]
    loaded = datasets.load_dataset(str(out), split="train")
    assert loaded["label"] == [place % 10 for place in range(23)]
    assert "num_examples: 23" in (out / "README.md").read_text()
    data = load_images(DataConfig(source=str(out)), seed=0)
    assert (len(data.train) + len(data.test), data.class_names) == (23, tuple("abcdefghij"))
    shards[1].unlink()
    sample(folder, out, *flags, "--batch_size", 3)
    assert [path.read_bytes() for path in shards][::2] == written[::2]
    again = datasets.load_dataset("parquet", data_files=[str(path) for path in shards], split="train")
    for one, other in zip(loaded["image"], again["image"], strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    sample(folder, out, *flags, "--seed", 1, code=2)
    assert "train-00000-of-00003.parquet, which another request has made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class_labels", "zebra"], "no class named 'zebra'"),
        (["--scheduler", "lcm", "--num_inference_steps", "90"], "does not work with LCMScheduler"),
        (["--device", "cuda:7"], "could not be loaded"),
        (["--class_labels", "3", "--interpolation", "4"], "--interpolation needs two class labels"),
        (["--dtype", "int4"], "dtype"),
        (["--num_images", "100000000000"], "num_images must be less than or equal to 10000000"),
        (["--num_images", "20000"], "num_images=20000 must be at most 10000 without as_dataset"),
    ],
)
def test_errors_are_messages(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    sample(folder, tmp_path / "out", *flags, code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    sample(str(tmp_path), tmp_path / "out", code=2)
    assert "could not be loaded" in capsys.readouterr().err


HEAVY = {"torch", "diffusers", "datasets", "transformers", "sklearn"}


@pytest.mark.parametrize(
    ("words", "unused"),
    [(["sample", "--help"], HEAVY), (["data", "pictures"], HEAVY - {"torch"})],
    ids=["help", "data"],
)
def test_imports_nothing_heavy(words: list[str], unused: set[str], image_folder: Path, tmp_path: Path) -> None:
    code = (
        f"import sys\nfrom mnist_diffusion.cli import main\ntry: assert main({words!r}) == 0\n"
        f"except SystemExit: pass\nprint(sorted({unused!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "[]"
