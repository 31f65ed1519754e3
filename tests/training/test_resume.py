"""Resumed runs go on as if they had never ended, and refuse what is not theirs."""

from __future__ import annotations

import dataclasses
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
from tests.conftest import tiny_config
from tests.training.conftest import losses, run, weights


class TestResume:
    @pytest.mark.parametrize(
        "train", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}, {"channels_last": True}], ids=str
    )
    def test_equal_to_the_bit(self, tmp_path: Path, train: dict[str, Any]) -> None:
        config = tiny_config(max_steps=7, checkpoint_every="3 steps", keep_checkpoints=9, **train)
        model = dataclasses.replace(config.model, dropout=0.2)
        config = dataclasses.replace(config, model=model)
        whole = run(config, tmp_path / "whole")
        parts = run(config, tmp_path / "parts")
        for step in (6, 7):  # what a run killed after step 3 leaves behind
            shutil.rmtree(parts / "checkpoints" / f"step-{step}")
        # What a run chose for its machine need not be said again.
        run(config, parts, resume=True, **{name: None for name in train if name in PROBED})
        assert losses(parts) == losses(whole)
        for name, tensor in weights(whole).items():
            assert torch.equal(tensor, weights(parts)[name]), name

    @pytest.mark.slow
    def test_equal_to_the_bit_when_compiled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Traced as for any compiler, with one that takes no minute in place of the default."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        config = tiny_config(max_steps=4, checkpoint_every="2 steps", compile=True)
        whole, parts = run(config, tmp_path / "whole"), run(config, tmp_path / "parts")
        shutil.rmtree(parts / "checkpoints" / "step-4")
        run(config, parts, resume=True)
        for name, tensor in weights(whole).items():
            assert torch.equal(tensor, weights(parts)[name]), name

    def test_starts_at_0_where_there_is_none(self, tmp_path: Path) -> None:
        assert losses(run(tiny_config(), tmp_path / "run", resume=True))[0][0] == 1

    def test_finished_run_is_left_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = run(tiny_config(), tmp_path / "run")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        run(tiny_config(), folder, resume=True)
        assert "Finished at step 4 already" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def test_damaged_logs_and_pictures_do_not_stop_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        whole = run(tiny_config(max_steps=4, sample_every="2 steps"), tmp_path / "whole")
        short = run(tiny_config(max_steps=2, sample_every="2 steps"), tmp_path / "run")
        log = short / "metrics.jsonl"
        log.write_bytes(log.read_bytes() + b'\xff{"step": \n[1]\n' + b'{"step": 9, "epoch": %s}\n' % (b"9" * 400))
        (short / "summary.json").write_text("{")
        for picture in (short / "samples").glob("*.png"):
            picture.write_bytes(picture.read_bytes()[:60])
        run(tiny_config(max_steps=4, sample_every="2 steps"), short, resume=True)
        assert "3 lines of" in capsys.readouterr().out
        for name, tensor in weights(whole).items():
            assert torch.equal(weights(short)[name], tensor)
        assert losses(short) == losses(whole)

    @pytest.mark.parametrize("name", ["averages", "samples", "logs"])
    def test_nothing_is_removed_through_a_link(self, name: str, folder: Path, tmp_path: Path) -> None:
        copy, elsewhere = shutil.copytree(folder, tmp_path / "run"), tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "step-9.safetensors").write_text("of another run")
        shutil.rmtree(copy / name, ignore_errors=True)
        (copy / name).symlink_to(elsewhere)
        with pytest.raises(UserError, match=f"run/{name} is a link"):
            run(tiny_config(), copy, resume=True, max_steps=6)
        assert (elsewhere / "step-9.safetensors").exists()

    @pytest.mark.parametrize("kind", ["pipe", "device", "secret"])
    def test_what_is_no_file_in_a_run_folder(self, kind: str, folder: Path, tmp_path: Path) -> None:
        """Nothing waits for it, and nothing is written through it."""
        copy, secret = shutil.copytree(folder, tmp_path / "run"), tmp_path / "secret"
        secret.write_text("secret")
        for name in ("metrics.jsonl", "summary.json", "run_id", "config.yaml", "samples/step-000003.png"):
            (copy / name).unlink()
            if kind == "pipe":
                os.mkfifo(copy / name)
            else:
                (copy / name).symlink_to("/dev/zero" if kind == "device" else secret)
        if kind == "secret":
            (copy / "pipeline" / "README.md").unlink()
            (copy / "pipeline" / "README.md").symlink_to(secret)
        run(tiny_config(sample_every="3 steps", snapshot_every="2 steps"), copy, resume=True, max_steps=6)
        assert secret.read_text() == "secret"
        assert [line[0] for line in losses(copy)] == [6]
        assert json.loads((copy / "summary.json").read_text())["step"] == 6
        assert "secret" not in (copy / "pipeline" / "README.md").read_text()

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensors, state: tensors.pop("ema"),
            lambda tensors, state: tensors["optimizer"].update({"9999.step": torch.zeros(1)}),
            lambda tensors, state: state.pop("planned_steps"),
            lambda tensors, state: state.pop("config"),
            lambda tensors, state: state.update(seconds="many"),
        ],
    )
    def test_a_whole_checkpoint_of_something_else(self, change: Any, folder: Path, tmp_path: Path) -> None:
        """Its hashes are right, its content is not."""
        copy = shutil.copytree(folder, tmp_path / "run")
        found = load_checkpoint(copy / "checkpoints", 5)
        tensors = {name: {**group} for name, group in found.tensors.items()}
        state = {**found.state}
        change(tensors, state)
        about = {"run_id": (copy / "run_id").read_text()}
        shutil.rmtree(copy / "checkpoints")
        save_checkpoint(copy / "checkpoints", 5, tensors, state, keep=1, about=about)
        before = (copy / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match="step-5 is not a checkpoint of such a run"):
            run(tiny_config(), copy, resume=True, max_steps=6)
        assert (copy / "metrics.jsonl").read_bytes() == before

    def test_a_finished_run_checks_what_it_left(self, tmp_path: Path) -> None:
        folder = run(tiny_config(max_steps=2), tmp_path / "run")
        before = {name: tensor.clone() for name, tensor in weights(folder).items()}  # not of the file below
        (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
        run(tiny_config(max_steps=2), folder, resume=True)
        assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in before.items())

    @pytest.mark.parametrize("mine", [True, False])
    def test_begins_only_where_nothing_is_lost(self, mine: bool, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        if mine:
            shutil.rmtree(run(tiny_config(max_steps=2), folder) / "checkpoints")
        else:
            (folder / "pipeline").mkdir(parents=True)
            (folder / "pipeline" / "precious").write_text("mine")
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
        for _ in range(2):
            with pytest.raises(UserError, match=r"has no checkpoint to resume from, and holds pipeline"):
                run(tiny_config(max_steps=2), folder, resume=True)
        assert {path: path.read_bytes() for path in kept} == kept

    def test_more_steps_go_on(self, tmp_path: Path) -> None:
        folder = run(tiny_config(), tmp_path / "run")
        run(tiny_config(), folder, resume=True, max_steps=6)
        assert [line[0] for line in losses(folder)] == [1, 2, 3, 4, 5, 6]

    def test_other_model_or_data_is_refused(self, tmp_path: Path) -> None:
        folder = run(tiny_config(), tmp_path / "run")
        config = tiny_config(max_steps=9)
        other = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, beta_schedule="linear"))
        with pytest.raises(UserError, match=r"diffusion.beta_schedule was 'squaredcos_cap_v2', now 'linear'"):
            run(other, folder, resume=True)
        with pytest.raises(UserError, match="the images' fingerprint was"):
            run(config, folder, resume=True, seed=5)
