"""An exported network computes what the original does, for any number of images, or is not written."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from mnist_diffusion.cli import main
from mnist_diffusion.diffusion import onnx
from tests.conftest import make_pipeline


def test_the_exported_network_predicts_what_the_original_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert main(["export", str(tmp_path / "pipeline"), "--out", str(tmp_path / "onnx")]) == 0
    assert "sample [1, 1, 8, 8], timestep [1], class_labels [1]" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    noise, levels = torch.randn(7, 1, 8, 8), torch.tensor([999, 500, 0, 1, 2, 3, 4])
    labels = torch.tensor([0, 1, 2, 3, 9, 10, 10])
    inputs = {"sample": noise.numpy(), "timestep": levels.float().numpy(), "class_labels": labels.numpy()}
    [found] = session.run(None, inputs)
    with torch.no_grad():
        wanted = pipeline.unet(noise, levels, class_labels=labels).sample
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=0)


def test_one_that_predicts_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "TOLERANCE", -1.0)
    with pytest.raises(onnx.OnnxError, match="the exported network is wrong by up to"):
        onnx.export_onnx(make_pipeline(conditional=False), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_what_must_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(onnx.OnnxError, match=r"needs onnxruntime; pip install 'mnist-diffusion\[onnx\]'"):
        onnx.export_onnx(make_pipeline(), tmp_path / "onnx")
