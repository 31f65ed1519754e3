"""An exported network computes what the original does, or is not written; the studio's tests draw with one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mnist_diffusion.errors import UserError
from mnist_diffusion.pipelines import onnx
from tests.conftest import make_pipeline


@pytest.mark.slow
def test_no_path_of_this_installation_leaves_it(tmp_path: Path) -> None:
    content = onnx.export_onnx(make_pipeline(conditional=False), tmp_path).read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content


@pytest.mark.slow
def test_one_that_predicts_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs by up to"):
        onnx.export_onnx(make_pipeline(conditional=False), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_what_must_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime; pip install 'mnist-diffusion\[onnx\]'"):
        onnx.export_onnx(make_pipeline(), tmp_path / "onnx")
