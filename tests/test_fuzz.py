"""Mutated inputs end in the package's own errors, soon and without much memory."""

import json
from functools import partial
from pathlib import Path

from tests.support.fuzz import fuzz_into
from tests.support.survival import finish


def test_only_typed_errors(tmp_path: Path) -> None:
    """The short tier; `python -m tests.support.fuzz --inputs 10000` is the long one."""
    count, refused = 3, 0
    out = tmp_path / "found.json"
    work = partial(fuzz_into, out=str(out))
    assert finish(["0", str(count)], log=tmp_path / "log.txt", work=work) == [0]
    for target, found in json.loads(out.read_text()).items():
        assert found["wrong"] == [], target
        assert sum(found["ends"].values()) == count
        refused += sum(number for end, number in found["ends"].items() if end != "read")
    assert refused > 25
