"""A run on one page: all of it is there, nothing is fetched, and no word of the run is taken for HTML."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mnist_diffusion.cli import main
from tests.conftest import run_folder

SCRIPT = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Its elements, with their attributes, and its words."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(folder: Path, out: Path) -> Page:
    assert main(["report", str(folder), "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_one_page_shows_a_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / SCRIPT.replace("/", "|"))
    (folder / "samples").mkdir()
    (folder / "pictures").mkdir()
    Image.new("L", (20, 20), 90).save(folder / "samples" / "step-000002.png")
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

    page = page_of(folder, tmp_path / "report.html")

    assert "script" not in {tag for tag, _ in page.elements}
    assert f"Distance {SCRIPT}" in page.words
    assert f"# {SCRIPT}" in page.words
    for words in (folder.name, "num images 50", "0.25", "block_out_channels", f"{folder.name}/pipeline"):
        assert words in page.words
    sources = [attributes["src"] or "" for tag, attributes in page.elements if tag == "img"]
    assert [re.match(r"data:image/(\w+);base64,", source)[1] for source in sources] == ["png", "png", "gif", "png"]  # type: ignore[index]
    assert "http" not in "".join(value or "" for _, attributes in page.elements for value in attributes.values())


def test_several_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses of different objectives apart; settings that differ listed; what is broken in a summary left out."""
    runs = [run_folder(tmp_path / name) for name in ("first", "second")]
    config = (runs[1] / "config.yaml").read_text()
    (runs[1] / "config.yaml").write_text(config.replace("v_prediction", "epsilon").replace("seed: 0", "seed: 5"))
    (runs[1] / "summary.json").write_text(json.dumps({"step": 2, "train_seconds": "long", "loss": [1]}))
    (runs[0] / "samples").mkdir()
    Image.new("L", (20, 20), 90).save(runs[0] / "samples" / "step-000002.png")
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    words = "".join(page.words.split())
    for part in (
        "Lossesofdifferentobjectivescannotbecompared",
        "diffusion.prediction_type'v_prediction''epsilon'",
        "train.seed05",
    ):
        assert part in words
    assert "batch_size" not in words
    assert [tag for tag, _ in page.elements].count("img") == 2  # the sheet and the curves


def test_one_without_pictures_or_pipeline(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    shutil.rmtree(folder / "pipeline")
    (folder / "summary.json").unlink()
    page = page_of(folder, tmp_path / "new" / "report.html")
    assert "not finished" in page.words
    assert "from_pretrained" not in page.words
    assert [tag for tag, _ in page.elements].count("img") == 1  # the curves


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
