"""Mutated inputs end in the package's own errors, soon and without much memory."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.fuzz import TARGETS, fuzz_into
from tests.survival import Nursery


@pytest.mark.parametrize(
    "count", [40, pytest.param(10_000 // len(TARGETS) + 1, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_only_typed_errors(count: int, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    work = partial(fuzz_into, out=str(out))
    assert Nursery().finish(["0", str(count)], log=tmp_path / "log.txt", work=work, seconds=3000) == [0]
    for target, found in json.loads(out.read_text()).items():
        assert found["wrong"] == [], target
        assert sum(found["ends"].values()) == count
        assert sum(count for end, count in found["ends"].items() if end != "read") > count / 10
        assert found["grown_bytes"] < 2**28
