"""The figures of the documents: written anew by their commands, and listed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from benchmarks import performance
from tests.conftest import REPOSITORY

PAGE = """# Page

## Some figures

<!-- figures: python -c "print('| a |\\n| --- |\\n| path/to/mnist |')" -->
`before`, nowhere, 2020-01-01:

| a |
| --- |
| old |

<!-- end -->

## A GPU

<!-- figures on rocket: python -c "print(1)" -->
`there`, 1 x rocket, 2020-01-01:
<!-- end -->
"""


def test_tables_are_written_anew_and_listed(tmp_path: Path) -> None:
    page, listing = tmp_path / "page.md", tmp_path / "performance.md"
    page.write_text(PAGE)
    listing.write_text("<!-- list -->\n<!-- end -->\n\n<!-- figures: false -->\nkept\n<!-- end -->\n")
    performance.main("here", only="print", documents=tmp_path)
    today, command = time.strftime("%Y-%m-%d"), PAGE.split("<!-- figures: ")[1].split(" -->", maxsplit=1)[0]
    text = page.read_text()
    assert f"<!-- figures: {command} -->\n`{command}`, " in text
    assert f", {today}:\n\n| a |\n| --- |\n| here |\n\n<!-- end -->" in text
    assert PAGE[PAGE.index("## A GPU") :] in text
    assert "[Some figures](page.md#some-figures) | `-c` | " in listing.read_text()
    assert "| [A GPU](page.md#a-gpu) | `there` | 1 x rocket | 2020-01-01 |" in listing.read_text()
    assert "kept" in listing.read_text()
    before = text, listing.read_text()
    performance.main("here", documents=tmp_path, only="nothing")
    assert (page.read_text(), listing.read_text()) == before


def test_a_table_in_the_folder_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("# Title\n\n| a |\n| --- |\n| 1 |\n\n| b |\n| --- |\n")
    assert performance.measured(f"python -c 'print()' --out {tmp_path}") == "| a |\n| --- |\n| 1 |\n"
    training = f"python -c 'exit(1)' --output_dir {tmp_path}"  # which is there, so it does not run
    assert performance.measured(f"{training} && python -c 'print()' --out {tmp_path}").startswith("| a |")
    with pytest.raises(SystemExit, match="no table is printed by"):
        performance.measured("python -c 'print(1)'")


def test_the_list_is_that_of_the_documents(tmp_path: Path) -> None:
    documents = shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    performance.main("nowhere", documents=documents, only="nothing is called so")
    for page in documents.glob("*.md"):
        assert page.read_text() == (REPOSITORY / "docs" / page.name).read_text(), page.name
