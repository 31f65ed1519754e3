"""The site: it builds without a warning, has a page for each module, and fetches nothing; and the notebook."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    entries = json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]
    found = "\n".join(entry["title"] + entry["text"] for entry in entries)
    for name in ("MNISTDiffusionPipeline", "prediction_errors", "guided_prediction", "Muon", "--train.max_minutes"):
        assert name in found
    for module in (REPOSITORY / "mnist_diffusion").rglob("*.py"):
        name = ".".join(module.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        assert name.endswith("__main__") or (tmp_path / "reference" / name / "index.html").is_file(), name
    assert "<math" in (tmp_path / "tutorial" / "index.html").read_text()
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(https?:[^\s\">]+)", page.read_text())
        fetched += re.findall(r"<link[^>]*rel=\"?stylesheet\"?[^>]*href=\"?(https?:[^\s\">]+)", page.read_text())
        assert fetched == [], page


def test_the_notebook_is_the_tutorial() -> None:
    """`jupytext --to notebook docs/tutorial.md` makes it anew."""
    folder = REPOSITORY / "docs"
    page, notebook = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(folder / name).cells]
        for name in ("tutorial.md", "tutorial.ipynb")
    )
    assert page == notebook
    assert not [source for kind, source in page if kind == "code" and source.startswith("%%")]
