"""A run on one page: all of it is there, nothing is fetched, and no word of the run is taken for HTML."""

import html
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mnist_diffusion.cli import main
from tests.conftest import run_folder
from tests.data.test_formats import png_header

SCRIPT = "<script>alert(1)</script>"


def page_of(out: Path, *folders: Path) -> tuple[str, str]:
    """The report of runs, as it is and as it is read."""
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    return text, html.unescape(re.sub(r"<[^>]*>", "", text))


def test_one_page_shows_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / SCRIPT.replace("/", "|"))
    (folder / "samples").mkdir()
    (folder / "pictures").mkdir()
    (folder / "samples" / "step-000001.png").write_bytes(png_header(8200))  # not the last, and not decoded
    Image.new("L", (20, 20), 90).save(folder / "samples" / "step-000002.png")
    (folder / "pictures" / "large.png").write_bytes(png_header(8200))
    Image.new("L", (20, 20), 90).save(folder / "pictures" / "noise_schedule.png")
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 90)]
    frames[0].save(folder / "pictures" / "epochs.gif", save_all=True, append_images=frames[1:])
    (folder / "pictures" / "broken.png").write_bytes(b"no picture")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"# {SCRIPT}\n{config}")
    card = folder / "pipeline" / "README.md"
    results = (
        "model-index:\n- name: a\n  results:\n  - task: {type: unconditional-image-generation}\n"
        "    dataset: {type: mnist, name: MNIST}\n    metrics:\n"
        f"    - {{type: fid, name: 'Distance {SCRIPT}', value: 0.25, args: {{num_images: 50}}}}\n"
    )
    card.write_text(card.read_text().replace("---\n", f"---\n{results}", 1))

    page, words = page_of(tmp_path / "report.html", folder)

    said = "".join(capsys.readouterr())
    assert re.findall(r"(\S+) could not be read as a picture: 8200 x 8200", said) == [f"{folder}/pictures/large.png"]
    assert "<script" not in page
    for part in (f"Distance {SCRIPT}", f"# {SCRIPT}", folder.name, "num images 50", "0.25", "block_out_channels"):
        assert part in words
    assert f"{folder.name}/pipeline" in words
    assert re.findall(r'<img[^>]* src="data:image/(\w+);base64,', page) == ["png", "png", "gif", "png"]
    assert "http" not in "".join(re.findall(r'="([^"]*)"', page))


def test_several_runs_are_compared(tmp_path: Path) -> None:
    """Losses of different objectives apart; settings that differ listed; what is broken in a summary left out."""
    runs = [run_folder(tmp_path / name) for name in ("first", "second")]
    config = (runs[1] / "config.yaml").read_text()
    (runs[1] / "config.yaml").write_text(config.replace("v_prediction", "epsilon").replace("seed: 0", "seed: 5"))
    (runs[1] / "summary.json").write_text(json.dumps({"step": 2, "train_seconds": 10**400, "loss": [1]}))
    (runs[0] / "samples").mkdir()
    Image.new("L", (20, 20), 90).save(runs[0] / "samples" / "step-000002.png")
    page, words = page_of(tmp_path / "report.html", *runs)
    words = "".join(words.split())
    for part in (
        "Lossesofdifferentobjectivescannotbecompared",
        "diffusion.prediction_type'v_prediction''epsilon'",
        "train.seed05",
    ):
        assert part in words
    assert "batch_size" not in words
    assert page.count("<img") == 2  # the sheet and the curves


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
