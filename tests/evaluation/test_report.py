"""`mnist-diffusion evaluate`: what it leaves, and that it says what is wrong before any work."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from mnist_diffusion import MNISTDiffusionPipeline
from mnist_diffusion.cli import main
from mnist_diffusion.config import Config, DataConfig, ImagesConfig, ModelConfig, SamplingSettings, TrainConfig
from mnist_diffusion.data.dataset import ImageData, load_images
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, load_evaluator, save_evaluator
from mnist_diffusion.method.network import build_unet
from mnist_diffusion.method.noise import build_noise_scheduler
from mnist_diffusion.pipelines.drawing import build_pipeline
from mnist_diffusion.pipelines.folder import export_pipeline
from tests.conftest import DEFAULT, REPOSITORY, card_of


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, digits: ImageData, digits_evaluator: ImageEvaluator
) -> tuple[Path, Path]:
    """An untrained pipeline folder of 28 x 28 pixels, and the evaluator's."""
    root = tmp_path_factory.mktemp("evaluation")
    model = ModelConfig(block_out_channels=(8, 8), norm_num_groups=4, patch_size=2)
    unet = build_unet(model, image_size=28, channels=1, num_classes=10)
    scheduler = build_noise_scheduler(DEFAULT.diffusion)
    sampling = SamplingSettings(scheduler="dpmpp", num_inference_steps=2, guidance_scale=2)
    pipeline = build_pipeline(scheduler, sampling, digits.class_names, unet, patch_size=model.patch_size)
    export_pipeline(pipeline, root / "run" / "pipeline", card=card_of(pipeline))
    save_evaluator(digits_evaluator, root / "evaluator")
    return root / "run" / "pipeline", root / "evaluator"


def evaluate(source: Path, evaluator: Path, out: Path, *flags: Any, code: int = 0, num_images: int | None = 60) -> Path:
    common = ["--data.source", "digits", "--evaluator", str(evaluator), "--out", str(out)]
    common += [] if num_images is None else ["--num_images", str(num_images)]
    try:
        ended: Any = main(["evaluate", str(source), *common, *map(str, flags)])
    except SystemExit as stopped:  # of the parser
        ended = stopped.code
    assert ended == code
    return out


def figures(out: Path) -> dict[str, Any]:
    """The result that an evaluation left, without its times."""
    [result] = json.loads((out / "report.json").read_text())["results"]
    return {name: value for name, value in result.items() if not name.endswith("seconds")}


def test_sweep(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = evaluate(*folders, tmp_path, "--num_inference_steps", 1, 2, "--guidance_scale", 0, 2, "--scheduler", "ddim")
    report = json.loads((out / "report.json").read_text())
    assert [result["name"] for result in report["results"]] == [
        f"ddim, {steps}, guidance {scale}" for steps in ("1 step", "2 steps") for scale in (0, 2)
    ]
    assert [result["nfe_per_image"] for result in report["results"]] == [1, 2, 2, 4]
    wanted = {"accuracy", "accuracy_low", "accuracy_high", "fid", "fid_floor", "fid_ratio", "fid_standard_error"}
    wanted |= {"kernel_distance", "precision", "recall", "density", "coverage", "odd_shape_share", "seconds"}
    wanted |= {"num_images", "nearest_distance", "nearest_distance_floor", "copied_share", "broken_share", "warnings"}
    for result in report["results"]:
        assert wanted <= set(result)
        assert result["fid_ratio"] == result["fid"] / result["fid_floor"]
    assert len(report["evaluator"]["sha256"]) == 64
    assert report["data"]["fingerprint"]
    text = (out / "report.md").read_text()
    assert "| class | class accuracy | 95% interval | held-out accuracy |" in text
    found = set(re.findall(r"\]\(([^)]+\.png)\)", text))
    assert {"quality_against_nfe.png", "guidance.png", "samples-3.png", "misclassified-0.png", "nearest-0.png"} <= found
    for name in found:
        with Image.open(out / name) as picture:
            assert picture.getextrema() not in ((0, 0), (255, 255))
    shown = capsys.readouterr().out
    assert "held-out real images" in shown
    assert "60 images are few" in shown.replace("\n", " ")


def test_sweep_over_guidance_rules(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Rules, intervals and scales: each is drawn and its passes are counted, those of a weaker model too."""
    weak = tmp_path / "weak"
    pipeline = MNISTDiffusionPipeline.from_pretrained(folders[0])
    for parameter in pipeline.unet.parameters():
        parameter.data.mul_(0.5)
    pipeline.save_pretrained(weak)
    flags: list[object] = ["--num_inference_steps", 4, "--guidance_scale", 3, "--guidance_interval", 0, 1, 0.4, 0.8]
    flags += ["--guidance", "cfg", f"autoguidance:{weak}"]
    out = evaluate(*folders, tmp_path / "out", *flags)
    results = json.loads((out / "report.json").read_text())["results"]
    rules = ["", f" by autoguidance:{weak}"]
    assert [each["name"] for each in results] == [
        f"dpmpp, 4 steps, guidance 3 from {bounds}{rule}" for bounds in ("0 to 1", "0.4 to 0.8") for rule in rules
    ]
    assert [each["nfe_per_image"] for each in results] == [8, 8, 6, 6]
    images = [each["kernel_distance"] for each in results]
    assert len(set(images)) == 4
    assert len(list((out / "images").iterdir())) == 4


def test_images_of_another_program(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline, evaluator = folders
    assert main(["sample", str(pipeline), "--num_images", "60", "--files", "--out", str(tmp_path / "images")]) == 0
    result = figures(evaluate(tmp_path / "images", evaluator, tmp_path / "report", num_images=None))
    assert (result["num_images"], result["nfe_per_image"]) == (60, None)
    assert result["accuracy"] is not None


def test_a_run_is_measured_against_its_own_images(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, data = [tmp_path / "run", tmp_path / "other"], load_images(ImagesConfig(source="digits"), seed=5)
    config = Config(data=DataConfig(source="digits"), train=TrainConfig(seed=5))
    for run, fingerprint in zip(runs, (data.fingerprint, "that of another split"), strict=True):
        shutil.copytree(folders[0].parent, run)
        (run / "config.yaml").write_text(config.to_yaml())
        (run / "summary.json").write_text(json.dumps({"data_fingerprint": fingerprint}))
    flags = ["--evaluator", str(folders[1]), "--out", str(tmp_path / "out")]
    assert main(["evaluate", *map(str, runs), *flags]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "with digits" in said
    assert [f"{run} was trained on other images" in said for run in runs] == [False, True]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["fingerprint"] == data.fingerprint
    assert report["results"][0]["num_images"] == len(data.test) // 10 * 10


def test_card_and_that_the_same_command_gives_the_same_figures(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline, _ = folders
    assert "Not evaluated yet" in (pipeline / "README.md").read_text()
    flags = ["--write_card", "--seed", 1, "--num_inference_steps", 2]
    first, second = (figures(evaluate(*folders, tmp_path / name, *flags)) for name in ("first", "second"))
    assert first == second
    card = ModelCard.load(pipeline / "README.md")
    assert "!!python" not in str(card)
    assert "Not evaluated yet" not in card.content
    assert card.content.count("held-out real images") == 1
    measured = {entry.metric_type: entry.metric_value for entry in card.data.eval_results or []}
    assert len(measured) == len(card.data.eval_results or [])
    assert (measured["accuracy"], measured["fid"]) == pytest.approx((first["accuracy"], first["fid"]), abs=1e-4)
    assert card.data.library_name == "diffusers"
    MNISTDiffusionPipeline.from_pretrained(pipeline)


@pytest.mark.slow
def test_two_processes_give_what_one_does_and_keep_the_parts_that_are_there(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--num_inference_steps", "2", "--guidance_scale", "1"]
    [one] = (evaluate(*folders, tmp_path / "one", *flags, num_images=1000) / "images").iterdir()
    two = tmp_path / "two" / "images" / one.name
    two.mkdir(parents=True)
    kept = Path(shutil.copy(one / "000250-000500.npz", two))
    before = kept.stat().st_mtime_ns
    line = [sys.executable, "-m", "mnist_diffusion", "evaluate", str(folders[0]), *flags, "--num_images", "1000"]
    line += ["--data.source", "digits", "--evaluator", str(folders[1]), "--out", str(tmp_path / "two")]
    line += ["--processes", "2"]
    printed = subprocess.run(line, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert printed.count("The report is in") == 1
    assert kept.stat().st_mtime_ns == before
    assert len(list(one.iterdir())) == 4
    for part in one.iterdir():
        np.testing.assert_array_equal(np.load(two / part.name)["images"], np.load(part)["images"])
    fids = [figures(tmp_path / name)["fid"] for name in ("one", "two")]
    assert fids[0] == pytest.approx(fids[1], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_images 20", "num_images must be at least 50, got 20"),
        ("--num_images 65", "multiple of the 10 classes"),
        ("--data.image_size 32", "(1, 32, 32) for data.source='digits'; set data.source, data.image_size and"),
        ("--data.source /nowhere/at/all", "'/nowhere/at/all' was not found"),
        ("--num_inference_steps 1 1001", "dpmpp, 1001 steps, guidance 2: num_inference_steps"),
        ("--evaluator /nowhere", "/nowhere"),
        ("--guidance_scale 2 inf", "guidance_scale.1 must be a finite number, got 'inf'"),
        ("--guidance autoguidance:", "guidance.0 must be cfg, autoguidance:PIPELINE or one of"),
        ("--num_imags 2", "did you mean --num_images?"),
        ("--names a b", "names=['a', 'b'] must be one for each of the 1 sources"),
    ],
)
def test_what_cannot_be(
    folders: tuple[Path, Path], tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(*folders, tmp_path / "out", *flags.split(), code=2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_train_evaluator_command(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnist_diffusion.evaluation.evaluator.STEPS", 3)
    arguments = ["train_evaluator", "--data.source", "digits", "--out", str(tmp_path / "evaluator")]
    assert main(arguments) == 0
    assert "of 180 held-out images classified correctly" in capsys.readouterr().out
    assert load_evaluator(tmp_path / "evaluator", digits).model.config.data_fingerprint == digits.fingerprint
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_imagenet_weights_that_could_not_be_loaded(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    evaluate(*folders, tmp_path / "out", "--imagenet_fid", code=2)
    said = capsys.readouterr().err
    assert "imagenet_fid=true: the Inception network could not be loaded" in said
