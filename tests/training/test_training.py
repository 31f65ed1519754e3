"""The loop on real digits with a tiny network: run folder, logs, evaluations, trackers, several runs."""

import dataclasses
import errno
import json
import shutil
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import mnist_diffusion
from mnist_diffusion.config import AugmentConfig
from mnist_diffusion.data.dataset import draw_batch, load_images
from mnist_diffusion.errors import UserError
from mnist_diffusion.evaluation import evaluator
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.plots import sheets
from mnist_diffusion.training import artifacts
from mnist_diffusion.training.artifacts import Artifacts
from mnist_diffusion.training.run import RUNNING, TrainedRun, train
from mnist_diffusion.training.run_folder import read_metrics
from mnist_diffusion.training.step import TrainState
from tests.conftest import changed, parse_train, tiny_config
from tests.training.conftest import losses, run, weights


class TestRunFolder:
    def test_everything_is_there_and_nothing_half_made(self, folder: Path) -> None:
        def names(place: str = "") -> set[str]:
            return {path.name for path in (folder / place).iterdir()}

        written = {".lock", "run_id", "config.yaml", "metrics.jsonl", "summary.json"}
        assert names() == written | {"pipeline", "checkpoints", "snapshots", "samples"}
        assert names("snapshots") == {"step-2", "step-4"}
        assert names("samples") == {"step-000003.png", "step-000005.png"}
        assert names("checkpoints") == {"step-4", "step-5"}
        assert not [path for path in folder.rglob("*") if "partial" in path.name or path.name.endswith(".old")]
        with Image.open(folder / "samples" / "step-000005.png") as grid:
            assert grid.size[1] > 10 * 28  # a row a class
            assert np.asarray(grid).std() > 0

    def test_metrics_and_summary(self, folder: Path) -> None:
        lines, summary = read_metrics(folder / "metrics.jsonl"), json.loads((folder / "summary.json").read_text())
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        assert all(np.isfinite(line["loss"]) for line in lines)
        assert {"held_out_loss", "images_per_second"} <= set(lines[2]) & set(lines[4])
        assert (summary["finished"], summary["step"]) == (True, 5)
        assert summary["data_source"] == "scikit-learn digits (embedded)"
        assert summary["objective"] == "denoising diffusion"
        assert {"loss", "train_seconds", "images_per_second", "versions", "data_fingerprint"} <= set(summary)

    def test_snapshots_and_pipeline_load(self, folder: Path) -> None:
        for each in (folder / "pipeline", folder / "snapshots" / "step-2"):
            pipeline = MNISTDiffusionPipeline.from_pretrained(each)
            assert len(pipeline(class_labels=[3], num_inference_steps=1).images) == 1
            assert pipeline.config.id2label["3"] == "3"

    def test_card(self, folder: Path) -> None:
        card = (folder / "pipeline" / "README.md").read_text()
        header = yaml.safe_load(card.split("---")[1])
        assert header["library_name"] == "diffusers"
        assert "datasets" not in header  # which are the Hub's; these images are not
        for part in ("| steps | 5 of 8 images", "scikit-learn digits", "| objective | denoising diffusion |"):
            assert part in card
        assert "{{" not in card
        assert "| not measured |" not in card

    def test_config_reproduces_the_run_to_the_bit(self, folder: Path, tmp_path: Path) -> None:
        assert (folder / "config.yaml").read_text().startswith("# objective: denoising diffusion\n")
        arguments = parse_train(["--config", str(folder / "config.yaml")])
        assert arguments.config.train.mixed_precision == "no"
        again = run(arguments.config, tmp_path / "again")
        assert losses(again) == losses(folder)
        for name, tensor in weights(folder).items():
            assert torch.equal(tensor, weights(again)[name])

    def test_not_empty_is_refused(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"is not empty; add --train.resume true"):
            run(tiny_config(), folder)


def test_images_are_measured_the_best_are_kept_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an evaluator of a few steps."""
    monkeypatch.setattr(evaluator, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluator, "STEPS", 20)
    monkeypatch.setattr(artifacts, "NUM_EVALUATION_IMAGES", 50)
    config = tiny_config(evaluate_every="2 steps", max_steps=5, learning_rate=0.05)
    cut = shutil.copytree(folder := run(config, tmp_path / "run"), tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "step-5")
    run(config, cut, resume=True)
    lines, again = (read_metrics(each / "metrics.jsonl") for each in (folder, cut))
    measured = {line["step"]: line["fid"] for line in lines if "fid" in line}
    assert measured == {line["step"]: line["fid"] for line in again if "fid" in line}
    assert set(measured) == {2, 4, 5}
    assert {"accuracy", "fid_ratio", "precision", "recall"} <= set(lines[1])
    best = min(measured, key=lambda step: measured[step])
    for each in (folder, cut):
        assert f"| steps | {best} of 8 images" in (each / "pipeline_best" / "README.md").read_text()
    MNISTDiffusionPipeline.from_pretrained(folder / "pipeline_best")


def test_loss_falls_and_init_from_goes_on_where_the_pipeline_ended(tmp_path: Path) -> None:
    """With the averaged weights of the pipeline, and an optimizer that starts anew."""
    first = run(tiny_config(max_steps=60, learning_rate=0.01, checkpoint_every=None), tmp_path / "first")
    values = [line[2] for line in losses(first)]
    assert np.mean(values[-10:]) < 0.6 * np.mean(values[:5])
    asked = {"init_from": str(first / "pipeline"), "learning_rate": 1e-9, "num_eval_images": 64}
    again = run(tiny_config(**asked), tmp_path / "again")
    for name, value in weights(again).items():
        torch.testing.assert_close(value, weights(first)[name], atol=1e-6, rtol=0)
    saved = yaml.safe_load((again / "config.yaml").read_text(encoding="utf-8"))
    assert saved["train"]["init_from"] == str(first / "pipeline")
    shutil.rmtree(first)
    run(tiny_config(**asked), again, resume=True, max_steps=6)  # needs it no more
    with pytest.raises(UserError, match=r"pipeline .* could not be loaded"):
        run(tiny_config(**asked), tmp_path / "third")


def add_reds(image_folder: Path, count: int) -> None:
    for index in range(count):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(image_folder / "red" / f"more {index}.png")


def test_balance_draws_small_classes_as_often(image_folder: Path) -> None:
    add_reds(image_folder, 30)
    for balance, expected in ((False, 32 / 42), (True, 1 / 3)):
        data = dataclasses.replace(tiny_config().data, source=str(image_folder), balance=balance, batch_size=12)
        images = load_images(data, seed=0)
        drawn = [draw_batch(images.train, data, seed=0, step=step, part=slice(0, 12))[1] for step in range(20)]
        share = (torch.cat(drawn) == images.class_names.index("red")).float().mean().item()
        assert share == pytest.approx(expected, abs=0.06)


def test_hints(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_diffusion.training.trainer.expected_cost", lambda state: "")  # it takes seconds

    def said(recipe: str = "tiny", **data: Any) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = changed(tiny_config(), data={"source": str(image_folder), **data})
        capsys.readouterr()
        config = dataclasses.replace(config, output_dir=str(tmp_path / "x"))
        assert train(config, recipe=recipe, dry_run=True).exit_code == 0
        return capsys.readouterr().out

    plain = said()
    assert "blue: 5, green: 5, red: 5" in plain
    assert "\nhint" not in plain
    assert "--config icons is for colour pictures" in said("default")
    add_reds(image_folder, 40)
    assert "--data.balance draws every class equally often" in said()
    assert "horizontal_flip mirrors images" in said(source="digits", augment=AugmentConfig(horizontal_flip=True))


@pytest.mark.parametrize(
    ("conditional", "data", "mode"),
    [
        (False, {}, "RGB"),
        (True, {"image_size": 32, "channels": 3}, "RGB"),
        (True, {"image_size": 32, "channels": 1, "fit": "pad"}, "L"),
    ],
)
def test_other_kinds_of_runs(tmp_path: Path, image_folder: Path, conditional: bool, data: Any, mode: str) -> None:
    """Unconditional, RGB and 32 pixels, grey, on a data set smaller than a batch."""
    data = {"source": str(image_folder), "batch_size": 32, **data}
    config = changed(tiny_config(), data=data, model={"class_conditional": conditional})
    pipeline = MNISTDiffusionPipeline.from_pretrained(run(config, tmp_path / "run") / "pipeline")
    image = pipeline("red" if conditional else None, num_inference_steps=2).images[0]
    assert (image.size, image.mode) == ((config.data.image_size or 16,) * 2, mode)


@pytest.mark.parametrize("split", ["train", "test"])
def test_copies_are_said(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    shown = getattr(load_images(config.data, seed=0), split).spread(40)[0]
    drawn = sheets.sample_sheet
    monkeypatch.setattr(sheets, "sample_sheet", lambda *a, **named: (drawn(*a, **named)[0], shown / 255))
    run(config, tmp_path / "run", max_steps=1)
    warning = "WARNING: 100% of the last 40 samples are nearly copies of training images"
    assert (warning in capsys.readouterr().out) == (split == "train")


def test_trackers_get_numbers_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    asked = {"trackers": ("tensorboard", "trackio"), "pictures": True, "sample_every": "2 steps"}
    folder = run(tiny_config(**asked), tmp_path / "run")
    pictures = {"samples", "noise_schedule", "forward_noising", "denoising", "training_curves"}
    [events] = list((folder / "logs" / "mnist-diffusion").glob("events*"))
    recorded = EventAccumulator(str(events)).Reload()
    assert {"loss", "loss_by_noise/5"} <= set(recorded.Tags()["scalars"])
    assert set(recorded.Tags()["images"]) == pictures | {"epochs"}
    with sqlite3.connect(tmp_path / "trackio" / "mnist-diffusion.db") as database:
        logged = [json.loads(line) for (line,) in database.execute("select metrics from metrics")]
    assert pictures | {"loss", "loss_by_noise/5"} <= {name for line in logged for name in line}
    assert list((tmp_path / "trackio" / "media").rglob("*.png"))


def test_wandb_needs_a_key_or_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # where wandb may leave a folder
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny_config(trackers=("wandb",))
    wandb.teardown()  # which forgets the mode of tests before
    with pytest.raises(UserError, match="wandb has no key; run `wandb login`"):
        run(config, tmp_path / "run")
    assert not list(tmp_path.glob("*run*"))
    (tmp_path / "dir").mkdir()
    place = str(tmp_path / "dir")
    own = {"MODE": "offline", "PROJECT": "mine", "NAME": "called so", "RUN_ID": "abc", "DIR": place}
    for name, value in own.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(config, tmp_path / "second")
    [recorded] = (tmp_path / "dir" / "wandb").glob("offline-run-*-abc/run-abc.wandb")
    assert b"mine" in recorded.read_bytes()
    assert b"called so" in recorded.read_bytes()
    monkeypatch.setenv("WANDB_MODE", "sideways")
    wandb.teardown()
    with pytest.raises(UserError, match="wandb could not be started"):
        run(config, tmp_path / "third")
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *_: 1 / 0)  # as without a network
    with pytest.raises(UserError, match="trackers could not be started: ZeroDivisionError"):
        run(tiny_config(trackers=("tensorboard",)), tmp_path / "fourth")


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_ends_it_with_a_pipeline_and_a_second_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Two end the command, or the cell of a notebook; either way the run can be resumed."""
    original, folder = TrainState.update, tmp_path / "run"

    def update(self: TrainState, step: int, learning_rate: float) -> dict[str, torch.Tensor]:
        for _ in range(times if step == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        return original(self, step, learning_rate)

    monkeypatch.setattr(TrainState, "update", update)
    config = dataclasses.replace(tiny_config(max_steps=50), output_dir=str(folder))
    if times == 2:
        with pytest.raises(KeyboardInterrupt):
            train(config, recipe="tiny")
    else:
        assert train(config, recipe="tiny").exit_code == 128 + signal.SIGINT
        assert [line[0] for line in losses(folder)] == [1, 2, 3]
        assert MNISTDiffusionPipeline.from_pretrained(folder / "pipeline")(3, num_inference_steps=1).images
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    run(config, folder, resume=True, max_steps=5)
    assert [line[0] for line in losses(folder)] == [1, 2, 3, 4, 5]


def test_pictures_and_evaluations_that_fail_are_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever fails, the weights are those of a run in which nothing does."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    asked = {"sample_every": "2 steps", "evaluate_every": "2 steps", "pictures": True}
    whole = run(tiny_config(sample_every="2 steps"), tmp_path / "whole")
    monkeypatch.setattr(Artifacts, "_show", fail)
    monkeypatch.setattr(artifacts, "save_animation", fail)
    monkeypatch.setattr(Artifacts, "prepare", lambda self, config_text: setattr(self, "measure", fail))
    folder = run(tiny_config(**asked), tmp_path / "run")
    said = capsys.readouterr().err
    assert "warning: could not draw samples (continuing): OSError(28, 'No space left on device')" in said
    assert "warning: could not evaluate (continuing)" in said
    assert losses(folder) == losses(whole)
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights(whole).items())


def test_several_runs_from_python_also_from_a_thread_and_of_other_precision(tmp_path: Path) -> None:
    """As in a notebook, whose process lives on; the pipeline of each draws."""
    done: list[TrainedRun] = []
    for index, precision in enumerate(("no", "bf16", "no")):
        asked = dataclasses.replace(tiny_config(mixed_precision=precision), output_dir=str(tmp_path / str(index)))
        thread = threading.Thread(target=lambda config: done.append(mnist_diffusion.train(config)), args=(asked,))
        (thread.start if index == 1 else thread.run)()
        if index == 1:
            thread.join()
    with RUNNING, pytest.raises(UserError, match="another run is still in progress in this process"):
        mnist_diffusion.train(asked)
    assert [each.summary["mixed_precision"] for each in done] == ["no", "bf16", "no"]
    assert all(each.summary["finished"] and each.folder.is_dir() for each in done)
    assert len(done[1].pipeline([3, 4]).images) == 2
    first, _, third = (each.pipeline.unet.state_dict() for each in done)
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_names_are_words_on_the_card_whatever_they_look_like(tmp_path: Path) -> None:
    names = ("<img src=x onerror=y>", "[a](http://b)", "a | b", "`c`", *"efghij")
    folder = run(changed(tiny_config(max_steps=1), data={"class_names": names}), tmp_path / "run")
    card = (folder / "pipeline" / "README.md").read_text(encoding="utf-8")
    said = next(line for line in card.splitlines() if line.startswith("The classes are"))
    assert said == r"The classes are \<img src=x onerror=y\>, \[a\](http://b), a \| b, \`c\`, e, f, g, h, i, j."
    assert 'pipeline(class_labels=["`c`"], guidance_scale=' in card
    assert MNISTDiffusionPipeline.from_pretrained(folder).config.id2label["1"] == "[a](http://b)"
