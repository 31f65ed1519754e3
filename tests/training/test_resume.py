"""Resumed runs go on as if they had never ended, and refuse what is not theirs."""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_diffusion.errors import UserError
from mnist_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from mnist_diffusion.training.launch import PROBED
from tests.conftest import changed, tiny_config
from tests.training.conftest import losses, run, weights

NOT_THE_DEFAULT = {"gradient_accumulation_steps": 2, "mixed_precision": "bf16", "channels_last": True}


@pytest.mark.parametrize(
    ("train", "dropout"),
    [
        ({**NOT_THE_DEFAULT, "averages_every": "2 steps"}, 0.2),
        pytest.param({"compile": True}, 0, marks=pytest.mark.slow),
    ],
    ids=["not the default", "compiled"],
)
def test_equal_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any, dropout: float) -> None:
    """A compiled one traced as for any compiler, with one that takes no minute in place of the default."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = tiny_config(max_steps=7, checkpoint_every="3 steps", keep_checkpoints=9, **train)
    config = changed(config, model={"dropout": dropout})
    parts = shutil.copytree(whole := run(config, tmp_path / "whole"), tmp_path / "parts")
    for name in ("checkpoints/step-6", "checkpoints/step-7", "pipeline"):  # as if it was killed after step 3
        shutil.rmtree(parts / name)
    (parts / "averages").mkdir(exist_ok=True)
    (parts / "averages" / "step-99.safetensors").write_bytes(b"of a branch that was left")
    # What a run chose for its machine need not be said again.
    run(config, parts, resume=True, **{name: None for name in train if name in PROBED})
    assert losses(parts) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    averages = [{path.name: path.read_bytes() for path in each.glob("averages/*")} for each in (whole, parts)]
    assert averages[0] == averages[1]


def test_a_finished_run_is_left_alone_where_it_is_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    run(tiny_config(), copy, resume=True, max_steps=5)
    assert "Finished at step 5 already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    (copy / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    run(tiny_config(), copy, resume=True, max_steps=5)
    assert all(torch.equal(weights(copy)[name], tensor) for name, tensor in weights(folder).items())


def test_damaged_logs_and_pictures_do_not_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tiny_config(max_steps=4, sample_every="2 steps"), tmp_path / "whole")
    short = run(tiny_config(max_steps=2, sample_every="2 steps"), tmp_path / "run")
    log = short / "metrics.jsonl"
    before = log.read_text()
    log.write_bytes(log.read_bytes() + b'\xff{"step": \n[1]\n' + b'{"step": 9, "epoch": %s}\n' % (b"9" * 400))
    log.write_bytes(log.read_bytes() + b"[" * 100_000 + b"\n")
    (short / "summary.json").write_text("{")
    for picture in (short / "samples").glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:60])
    run(tiny_config(max_steps=4, sample_every="2 steps"), short, resume=True)
    assert "4 lines of" in capsys.readouterr().out
    assert losses(short) == losses(whole)
    assert log.read_text().startswith(before)


@pytest.mark.parametrize("name", ["averages", "samples", "logs"])
def test_nothing_is_removed_through_a_link(name: str, folder: Path, tmp_path: Path) -> None:
    copy, elsewhere = shutil.copytree(folder, tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "step-9.safetensors").write_text("of another run")
    shutil.rmtree(copy / name, ignore_errors=True)
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"run/{name} is a link"):
        run(tiny_config(), copy, resume=True, max_steps=6)
    assert (elsewhere / "step-9.safetensors").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "secret"])
def test_what_is_no_file_in_a_run_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    """Nothing waits for it, and nothing is written through it; whose run it is, the checkpoint says."""
    copy, secret = shutil.copytree(folder, tmp_path / "run"), tmp_path / "secret"
    secret.write_text("secret")
    names = ["metrics.jsonl", "summary.json", "run_id", "config.yaml", "samples/step-000003.png"]
    for name in [*names, *(["pipeline/README.md"] if kind == "secret" else [])]:
        (copy / name).unlink()
        if kind == "pipe":
            os.mkfifo(copy / name)
        else:
            (copy / name).symlink_to("/dev/zero" if kind == "device" else secret)
    run(tiny_config(sample_every="3 steps", snapshot_every="2 steps"), copy, resume=True, max_steps=6)
    assert secret.read_text() == "secret"
    assert [line[0] for line in losses(copy)] == [6]
    assert json.loads((copy / "summary.json").read_text())["step"] == 6
    assert (copy / "run_id").read_text() == (folder / "run_id").read_text()
    assert "secret" not in (copy / "pipeline" / "README.md").read_text()


@pytest.mark.parametrize("lost", [["checkpoints/*/manifest.json"], ["checkpoints"], ["checkpoints", "run_id"]], ids=str)
def test_begins_only_where_nothing_is_lost(lost: list[str], folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "run")
    for path in [path for pattern in lost for path in copy.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    files = [path for path in copy.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    kept = {path: path.read_bytes() for path in files}
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"would overwrite the results|no checkpoint to resume from, and holds pipe"
        ):
            run(tiny_config(max_steps=2), copy, resume=True)
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("keys", [["seconds"], ["ema_step"], ["config", "train", "max_steps"]], ids=str)
def test_a_whole_checkpoint_of_something_else(keys: list[str], folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "run") / "checkpoints"
    found, about = load_checkpoint(root, 5), {"run_id": (folder / "run_id").read_text()}
    functools.reduce(dict.__getitem__, keys[:-1], found.state)[keys[-1]] = "many"
    shutil.rmtree(root)
    save_checkpoint(root, 5, found.tensors, found.state, keep=1, about=about)
    with pytest.raises(UserError, match="step-5 does not hold the state of this run"):
        run(tiny_config(), root.parent, resume=True, max_steps=None, max_minutes=1.0)


def test_other_model_or_data_is_refused(folder: Path) -> None:
    other = changed(tiny_config(max_steps=9), diffusion={"beta_schedule": "linear"})
    with pytest.raises(UserError, match=r"diffusion.beta_schedule was 'squaredcos_cap_v2', now 'linear'"):
        run(other, folder, resume=True)
    with pytest.raises(UserError, match="the images' fingerprint was"):
        run(tiny_config(max_steps=9), folder, resume=True, seed=5)
