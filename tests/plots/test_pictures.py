"""EncodedImages: what stands in them, that every command makes its own, and what `compare` sets side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import train_cfg
from mnist_diffusion.cli import main
from mnist_diffusion.cli.plot import PLOTS
from mnist_diffusion.config import DiffusionConfig
from mnist_diffusion.method.noise import NoisingProcess, build_noise_scheduler
from mnist_diffusion.evaluation import evaluator
from mnist_diffusion.plots.compare import sheet_of_epochs
from mnist_diffusion.plots.grids import (
    LONGEST_LABEL,
    denoising_strip,
    drawable,
    evenly,
    forward_noising,
    image_grid,
    side_by_side,
    titled,
)
from mnist_diffusion.plots.curves import compared_curves, noise_schedules, pixel_histograms, training_curves
from mnist_diffusion.training.run_folder import Sheet
from tests.conftest import make_image_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of a few steps on pictures in three colours, the first with snapshots."""
    root = tmp_path_factory.mktemp("runs")
    make_image_folder(root / "pictures" / "train", images_per_class=40)
    make_image_folder(root / "pictures" / "test", images_per_class=20)
    for name, more in (
        ("first", ["--train.snapshot_every", "4 steps"]),
        ("second", ["--train.seed", "1", "--train.pictures", "false"]),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = ["--train.max_steps", "8", "--train.sample_every", "4 steps", "--output_dir", str(root / name)]
        assert train_cfg.main(["--config", "tiny", "--data.source", str(root / "pictures"), *flags, *more]) == 0
    return root / "first", root / "second"


def test_letters_that_no_font_has_are_drawn_by_their_code_points() -> None:
    assert drawable("Käfer") == "Käfer"
    assert drawable("\U000f0000") == "\\U000f0000"
    assert len(drawable("x" * 200)) == LONGEST_LABEL + 1


class TestSheets:
    def test_tiles_stand_where_they_should(self) -> None:
        images = torch.zeros(4, 1, 10, 10)
        images[3] = 1.0
        plain = np.asarray(image_grid(images, 2, min_side=10))
        assert plain.shape == (26, 26)
        assert plain[14:24, 14:24].min() == 255
        assert plain.sum() == 255 * 100

    def test_labels_and_title_make_room(self) -> None:
        images = torch.zeros(4, 3, 28, 28)
        plain = image_grid(images, 2)
        full = image_grid(images, 2, row_labels=["one", "two"], column_labels=["a", "b\nc"], title="A title")
        assert full.width > plain.width
        assert full.height > plain.height + 28
        pixels = np.asarray(full)
        assert pixels[:28].max() > 0  # the title
        assert pixels[28:50].max() > 0  # the columns' names
        assert pixels[:, :20].max() > 0  # the rows' names

    @pytest.mark.parametrize("name", ["Ärger", "Ω", "ключ"])
    def test_letters_beyond_ascii_are_drawn_not_boxes(self, name: str) -> None:
        drawn, missing = (
            np.asarray(image_grid(torch.zeros(1, 1, 28, 28), 1, row_labels=[text]))
            for text in (name, "\U0001fffd" * len(name))
        )
        assert drawn.shape != missing.shape or (drawn != missing).any()

    def test_evenly(self) -> None:
        assert evenly(10, 4) == [0, 3, 6, 9]
        assert evenly(3, 10) == [0, 1, 2]
        assert evenly(1, 4) == [0]

    def test_side_by_side(self) -> None:
        grey, red = Image.new("L", (40, 30), 200), Image.new("RGB", (50, 20), (255, 0, 0))
        sheet = side_by_side([("a", grey), ("b", red)], gap=10)
        assert sheet.size == (100, 58)
        assert sheet.mode == "RGB"
        assert sheet.getpixel((60, 40)) == (255, 0, 0)

    def test_long_title_widens(self) -> None:
        assert titled(Image.new("L", (10, 10)), "A very long title of a picture").width > 100


class TestWays:
    def test_forward_noising_goes_from_image_to_noise(self) -> None:
        process = NoisingProcess.of(build_noise_scheduler(DiffusionConfig(num_train_timesteps=100)))
        images = torch.full((2, 1, 40, 40), -1.0)
        pixels = np.asarray(forward_noising(images, process, columns=4, generator=torch.Generator().manual_seed(0)))
        cells = pixels[-84:, 2:].reshape(84, -1)
        spreads = [cells[:, column * 42 : column * 42 + 40].std() for column in range(5)]
        assert spreads[0] == 0
        assert spreads == sorted(spreads)
        assert spreads[-1] > 60

    def test_denoising_strip_shows_first_and_last(self) -> None:
        latents = torch.linspace(-1, 1, 21).view(21, 1, 1, 1, 1).expand(21, 2, 1, 40, 40)
        strip = np.asarray(denoising_strip(latents, torch.arange(20), columns=5))
        row = strip[-20]
        assert [int(row[2 + 42 * column + 20]) for column in range(5)] == [0, 64, 128, 191, 255]


def _line(step: int) -> dict[str, Any]:
    """As a run writes it: some things each step, some at each report, some with each sample sheet."""
    line: dict[str, Any] = {"step": step, "epoch": step / 10, "loss": 1 / step, "learning_rate": 0.1, "grad_norm": 1.0}
    if step % 5 == 0:
        line |= {"images_per_second": 100.0, "loss_by_noise": [0.1 * level + 0.1 for level in range(10)]}
    return line | ({"held_out_loss": 0.5} if step % 10 == 0 else {})


LINES = [_line(step) for step in range(1, 21)]


def drawn(panel: Any, line: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Where the points of a line of a panel stand."""
    chosen = panel.lines[line]
    return np.asarray(chosen.get_xdata(), dtype=float), np.asarray(chosen.get_ydata(), dtype=float)


class TestFigures:
    def test_training_curves_show_what_was_measured(self) -> None:
        panels = training_curves(LINES).axes
        losses, levels, rates, speeds = panels[:4]
        np.testing.assert_allclose(drawn(losses, 0)[1], [1 / step for step in range(1, 21)])
        np.testing.assert_allclose(drawn(losses, 2)[0], [10, 20])
        assert len(levels.lines) == 10
        np.testing.assert_allclose(drawn(levels, 9)[1], [1.0] * 4)
        assert len(drawn(rates, 0)[0]) == 20
        np.testing.assert_allclose(drawn(speeds, 0)[0], [5, 10, 15, 20])
        assert all(panel.get_xlabel() and panel.get_ylabel() for panel in panels[:4])

    def test_without_noise_levels_the_gradient_is_shown(self) -> None:
        lines = [{key: value for key, value in line.items() if key != "loss_by_noise"} for line in LINES]
        assert training_curves(lines).axes[1].get_ylabel() == "norm of the gradient"

    def test_compared_curves(self) -> None:
        figure = compared_curves([{"a": LINES, "b": LINES[:10]}, {"of another objective": LINES}])
        assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
        assert [line.get_label() for line in figure.axes[2].lines] == ["of another objective"]
        assert len(figure.axes) == 4
        figure.draw_without_rendering()
        ticks = [tick.get_text() for panel in figure.axes for tick in panel.get_yticklabels(which="both")]
        assert not any("\\times" in tick or "^" in tick for tick in ticks)
        assert "0.2" in ticks

    def test_noise_schedule_against_its_definition(self) -> None:
        scheduler = build_noise_scheduler(DiffusionConfig(num_train_timesteps=50, beta_schedule="linear"))
        process = NoisingProcess.of(scheduler)
        betas, left, ratio = noise_schedules({"x": process}).axes
        expected = np.linspace(0.0001, 0.02, 50)
        np.testing.assert_allclose(drawn(betas, 0)[1], expected, rtol=1e-3)
        alpha_bar = np.cumprod(1 - expected)
        np.testing.assert_allclose(drawn(left, 0)[1], alpha_bar, rtol=1e-5)
        np.testing.assert_allclose(drawn(ratio, 0)[1], 10 * np.log10(alpha_bar / (1 - alpha_bar)), rtol=1e-3)
        longer = DiffusionConfig(num_train_timesteps=200, prediction_type="flow_prediction")
        for panel in noise_schedules({"x": process, "longer": NoisingProcess.of(build_noise_scheduler(longer))}).axes:
            assert panel.get_xlabel() == "timestep, % of all"
            assert [round(drawn(panel, line)[0][-1], 1) for line in (0, 1)] == [98.0, 99.5]

    def test_pixel_histograms_are_shares(self) -> None:
        real = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        generated = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
        panels: list[Any] = pixel_histograms(real, generated).axes
        of_real, of_drawn = (patch.get_data().values for patch in panels[0].patches)
        assert of_real[0] == 100
        assert of_drawn[-1] == 100
        assert of_real.sum() == of_drawn.sum() == 100


ARGUMENTS: dict[str, Callable[[Path], list[str]]] = {
    "curves": lambda run: [str(run)],
    "schedule": lambda run: ["default", "compact_500", str(run)],
    "forward": lambda run: ["default", "--data.source", str(run.parent / "pictures")],
    "denoising": lambda run: [str(run / "pipeline"), "--num_inference_steps", "3"],
    "classes": lambda run: [str(run / "pipeline"), "--guidance_scale", "1"],
    "epochs": lambda run: [str(run)],
    "histograms": lambda run: [str(run / "pipeline"), "--data.source", str(run.parent / "pictures")],
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_every_plot_command(
    kind: str, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", kind, *ARGUMENTS[kind](runs[0]), "--out", str(tmp_path)]) == 0
    written = sorted(tmp_path.iterdir())
    assert written
    assert sorted(capsys.readouterr().out.split()) == [str(path) for path in written]
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) >= 40
            low, high = picture.convert("L").getextrema()
            assert low != high
            assert (getattr(picture, "n_frames", 1) > 1) == (path.suffix == ".gif")


def test_every_kind_is_tried() -> None:
    assert set(ARGUMENTS) == set(PLOTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curves", "nowhere"], "'nowhere' is not a run folder"),
        (["classes", "nowhere"], "pipeline 'nowhere' could not be loaded"),
    ],
)
def test_plot_errors(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_histograms_of_other_images(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data.source", "digits", "--out", str(tmp_path)]
    assert main(["plot", "histograms", str(runs[0] / "pipeline"), *asked]) == 2
    assert (
        "images (C, H, W): (3, 16, 16) for the pipeline, but (1, 28, 28) for data.source='digits'"
        in capsys.readouterr().err
    )


class TestCompare:
    @pytest.fixture(autouse=True)
    def quick_evaluator(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluator, "HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(evaluator, "STEPS", 20)

    def test_two_runs(self, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", *(str(run) for run in runs), "--out", str(tmp_path)]) == 0
        text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
        assert "| first | 8 |" in text
        assert "| second | 8 |" in text
        shown = capsys.readouterr().out
        assert "first" in shown
        assert "drawn apart" not in shown
        for name in ("curves.png", "sheets.png"):
            with Image.open(tmp_path / name) as picture:
                assert picture.width > 200

    def test_measured_against_the_images_the_runs_saw(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        """From the same seeds: a run and its copy have the same figures."""
        copy = shutil.copytree(runs[0], tmp_path / "copy")
        shutil.rmtree(copy / "snapshots")
        chosen = [str(runs[0]), str(copy), str(runs[1])]
        assert main(["compare", *chosen, "--num_images", "60", "--out", str(tmp_path / "out")]) == 0
        report = json.loads((tmp_path / "out" / "evaluation" / "report.json").read_text(encoding="utf-8"))
        first, same, other = report["results"]
        assert [each["pipeline"] for each in report["results"]] == ["first", "copy", "second"]
        assert first["fid"] == same["fid"] != other["fid"]
        assert "pictures (image folder)" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")

    def test_snapshots_of_one_run(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        assert main(["compare", str(runs[0]), "--num_images", "60", "--out", str(tmp_path)]) == 0
        report = json.loads((tmp_path / "evaluation" / "report.json").read_text(encoding="utf-8"))
        assert [each["pipeline"] for each in report["results"]] == ["step-4", "step-8", "pipeline"]
        assert report["results"][1]["fid"] == report["results"][2]["fid"]

    def test_what_cannot_be_measured_is_said_first(
        self, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = shutil.copytree(runs[0], tmp_path / "copy")
        shutil.rmtree(copy / "pipeline")
        asked = ["--num_images", "60", "--out", str(tmp_path / "out")]
        assert main(["compare", str(copy), str(runs[1]), *asked]) == 2
        assert "need" in capsys.readouterr().err
        shutil.copytree(runs[0] / "pipeline", copy / "pipeline")
        config = (copy / "config.yaml").read_text(encoding="utf-8").replace("image_size: null", "image_size: 16")
        (copy / "config.yaml").write_text(config, encoding="utf-8")
        assert main(["compare", str(copy), str(runs[1]), *asked]) == 2
        assert "the runs saw different images" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_runs_of_different_objectives_are_drawn_apart_and_what_differs_is_listed(
        self, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        copy = shutil.copytree(runs[0], tmp_path / "copy")
        config = (copy / "config.yaml").read_text(encoding="utf-8")
        (copy / "config.yaml").write_text(config.replace("v_prediction", "epsilon").replace("seed: 0", "seed: 5"))
        # What somebody's program left in a summary is no reason to end.
        summary = json.loads((copy / "summary.json").read_text())
        (copy / "summary.json").write_text(json.dumps({**summary, "train_seconds": "long", "loss": [1]}))
        assert main(["compare", str(runs[0]), str(copy), "--out", str(tmp_path / "out")]) == 0
        assert "Losses of different objectives do not compare" in capsys.readouterr().out
        text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
        assert "| diffusion.prediction_type | 'v_prediction' | 'epsilon' |" in text
        assert "| train.seed | 0 | 5 |" in text
        assert "train.batch_size" not in text

    def test_the_chosen_sheets_are_multiples_of_each_other(self) -> None:
        sheets = [Sheet(str(step), Image.new("L", (20, 20)), step) for step in (60, 125, 250, *range(500, 8001, 500))]
        wide = sheet_of_epochs(sheets).width
        assert wide == side_by_side([(str(step), Image.new("L", (20, 20))) for step in (60, 250, 1500, 8000)]).width

    def test_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", str(tmp_path)]) == 2
        assert "is not a run folder" in capsys.readouterr().err
