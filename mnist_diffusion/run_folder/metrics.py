"""`metrics.jsonl`: one JSON object a line, each step once, also over resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mnist_diffusion.errors import FileError
from mnist_diffusion.files import append_text, may_pass, read_text, replace_text

MAX_LOG_BYTES = 2**31
NOISE_LEVELS = 10
"""Tenths of the timesteps, for each of which `loss_by_noise` has a mean."""


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of later steps, which belong to work that is done again; what is no log is replaced by one."""
    kept: list[dict[str, Any]] = []
    try:
        kept = [line for line in read_metrics(path) if line["step"] <= step]
    except FileError as error:
        if may_pass(error):
            raise
        print(f"warning: the log begins anew: {error}")
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def append_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines, on the disk before a checkpoint may count on them."""
    append_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one that was cut off; none if there is no file.

    Lines that are damaged are left out, with a warning: no run depends on them.
    """
    if not path.exists():
        return []
    lines = read_text(path, MAX_LOG_BYTES).splitlines(keepends=True)
    found = [_line(line) for line in lines if line.endswith("\n")]
    if damaged := found.count(None):
        print(f"warning: {damaged} lines of {path} could not be read, and are left out")
    return [line for line in found if line is not None]


def _line(text: str) -> dict[str, Any] | None:
    try:
        line: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 1:
        return None
    if type(line.get("epoch")) not in (int, float):
        return None
    levels = [None] * NOISE_LEVELS if line.get("loss_by_noise") is None else line["loss_by_noise"]
    if not isinstance(levels, list) or len(levels) != NOISE_LEVELS:
        return None
    values = [*levels, *(value for name, value in line.items() if name != "loss_by_noise")]
    return line if all(value is None or type(value) in (int, float) for value in values) else None
