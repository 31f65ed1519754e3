"""The models that come with the package, what commands take when no pipeline is named, and exported networks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from mnist_diffusion import load
from mnist_diffusion.cli import main
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation.evaluator import SHIPPED as EVALUATOR
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, logits_and_features
from mnist_diffusion.pipelines import onnx
from mnist_diffusion.pipelines.drawing import MODELS, SHIPPED, generate
from tests.conftest import make_pipeline


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_sample_the_digits_asked_for(name: str) -> None:
    folder = MODELS / name
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1_000_000
    labels = [label for label in range(10) for _ in range(20)]
    images = generate(load(name), labels, range(200))
    logits, _ = logits_and_features(ImageEvaluator.from_pretrained(EVALUATOR).eval(), (images * 255).round().byte())
    assert (logits.argmax(dim=1) == torch.tensor(labels)).float().mean() > 0.97


def test_no_pipeline_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest run here, or else the shipped model."""
    assert main(["sample", "--num_images", "10"]) == 0
    assert "No pipeline is named, so this uses mnist, the model that comes with" in capsys.readouterr().out
    assert (tmp_path / "samples" / "grid.png").is_file()
    make_pipeline().save_pretrained(tmp_path / "runs" / "mine" / "pipeline")
    (tmp_path / "runs" / "latest").symlink_to("mine")
    assert load().image_shape == (1, 8, 8)
    assert "so this uses runs/latest, the newest run" in capsys.readouterr().out
    assert load("mnist").image_shape == (1, 28, 28)
    (tmp_path / "mnist").mkdir()  # a folder of images, say
    assert load("mnist").image_shape == (1, 28, 28)
    make_pipeline().save_pretrained(tmp_path / "mnist" / "pipeline")
    assert load("mnist").image_shape == (1, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_reach_what_their_cards_say(name: str, mnist_folder: Path, tmp_path: Path) -> None:
    measured = ModelCard.load(MODELS / name / "README.md").data.eval_results or []
    said = {entry.metric_type: entry.metric_value for entry in measured}
    images = ["--data.source", str(mnist_folder.resolve()), "--num_images", "2000"]
    assert main(["evaluate", name, *images, "--out", str(tmp_path / "report")]) == 0
    [result] = json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    assert result["accuracy"] > said["accuracy"] - 0.01
    assert result["recall"] > said["recall"] - 0.03


@pytest.mark.slow
def test_an_export_holds_no_path_of_this_installation_and_one_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = onnx.export_onnx(make_pipeline(conditional=False), tmp_path).read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content
    monkeypatch.setattr(onnx, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs by up to"):
        onnx.export_onnx(make_pipeline(conditional=False), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_what_must_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime; pip install 'mnist-diffusion\[onnx\]'"):
        onnx.export_onnx(make_pipeline(), tmp_path / "onnx")
