"""`metrics.jsonl`: one JSON object a line, each step once, also over resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mnist_diffusion.files import replace_text


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of later steps, which belong to work that is done again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def append_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines, on the disk before a checkpoint may count on them."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one that was cut off; none if there is no file.

    Lines that are damaged are left out, with a warning: no run depends on them.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found = [_line(line) for line in lines if line.endswith("\n")]
    if damaged := found.count(None):
        print(f"warning: {damaged} lines of {path} could not be read, and are left out")
    return [line for line in found if line is not None]


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None
