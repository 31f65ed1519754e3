"""Mutated inputs for everything that reads what others made; a long run of it, and the short one of the tests.

    python -m tests.support.fuzz --inputs 10000

Inputs are a function of the seed and their number: `--first N --inputs 1` does one again.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mnist_diffusion.config import DataConfig
from mnist_diffusion.data.dataset import load_images
from mnist_diffusion.errors import UserError
from mnist_diffusion.hub import stage
from mnist_diffusion.pipelines.card import write_results_to_card
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.plots import curves, run_page
from mnist_diffusion.training.checkpoint import load_checkpoint, newest_intact, save_checkpoint
from mnist_diffusion.training.resume import differences
from mnist_diffusion.training.run_folder import read_run
from tests.conftest import make_pipeline, parse_train, run_folder, tiny_config

EXTREMES = (
    *(b"0", b"-1", b"1e999", b"NaN", b"99999999999999999999", b"2147483648"),
    *(b"null", b"true", b"[]", b"{}", b'""'),
)
LARGEST_WAIT = 2.0
LARGEST_GROWTH = 3 * 10**8
"""Bytes of memory by which a process may grow after it has read the first input of a target."""
Make = Callable[[random.Random], Callable[[], object]]
"""Changes what is read, and gives what reads it."""


def mutated(content: bytes, source: random.Random, *, within: int | None = None) -> bytes:
    """`content` with one to four changes, in its first `within` bytes where that is given."""
    head, tail = bytearray(content[:within]), content[within:] if within is not None else b""
    for _ in range(source.randint(1, 4)):
        at, length = source.randrange(len(head) + 1), source.choice((1, 1, 2, 4, 8, 64))
        kind = source.randrange(7)
        if kind == 0:
            head[at : at + length] = source.randbytes(length)
        elif kind == 1:
            head[at : at + length] = source.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
        elif kind == 2:
            del head[at : at + length]
        elif kind == 3:
            head[at:at] = head[at : at + length] * source.choice((1, 2, 100))
        elif kind == 4:
            del head[at:]
        elif kind == 5 and head:
            at %= len(head)
            head[at] ^= 1 << source.randrange(8)
        elif numbers := list(re.finditer(rb"-?\d+(\.\d+)?", bytes(head))):
            chosen = source.choice(numbers)
            head[chosen.start() : chosen.end()] = source.choice(EXTREMES)
    return bytes(head) + tail


@dataclass
class Findings:
    """What a fuzzing run found: how often each kind of end came, and what should not have come."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    growth_bytes: int = 0


def changing(folder: Path, read: Callable[[], object], name: str = "**/*") -> Make:
    """Before each reading, one file of a folder that matches `name` is changed; of weights, only the header."""
    whole = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    choices = sorted(path for path in folder.glob(name) if path in whole)

    def make(source: random.Random) -> Callable[[], object]:
        chosen = source.choice(choices)
        for path, content in whole.items():
            header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else None
            path.write_bytes(mutated(content, source, within=header) if path == chosen else content)
        return read

    return make


def _pictures(folder: Path) -> Make:
    """Two class folders of pictures in the usual formats."""
    for index, kind in enumerate(2 * ("png", "gif", "bmp", "webp", "jpg")):
        path = folder / "ab"[index % 2] / f"{index}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (10 * index, 30, 60)).save(path)
    return changing(folder, lambda: load_images(DataConfig(source=str(folder)), seed=0))


def _images(folder: Path, *, case: str, name: str = "**/*") -> Make:
    """One of the sources of labelled images that the tests of formats read."""
    from tests.data.test_formats import FORMATS, write

    files, _, _, _, source, fields = FORMATS[case]
    write(folder, files)
    return changing(folder, lambda: load_images(DataConfig(source=str(folder / source), **fields), seed=0), name)


def _yaml(folder: Path) -> Make:
    folder.mkdir()
    tiny_config().save(folder / "config.yaml")
    return changing(folder, lambda: parse_train(["--config", str(folder / "config.yaml")]))


def _pipeline(folder: Path, *, name: str) -> Make:
    make_pipeline().save_pretrained(folder)
    return changing(folder, lambda: MNISTDiffusionPipeline.from_pretrained(folder), name)


def _run(folder: Path, *, name: str, read: str) -> Make:
    """A file of a run folder, which a function of the package reads."""
    run_folder(folder)
    lines = [{"step": step, "epoch": step / 10, "loss": 1.0, "loss_by_noise": [0.1] * 10} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pipeline, staged = folder / "pipeline", folder.with_name("staged")
    result = {"accuracy": 0.5, **dict.fromkeys(("scheduler", "num_inference_steps", "guidance_scale", "num_images"))}
    report = {"data": {"source": "x", "hub_id": None, "fingerprint": "0"}, "results": [result]}

    def show() -> None:
        record = read_run(folder)
        run_page.comparison_page({"a": record, "b": record})
        curves.training_curves(record.lines)

    readers: dict[str, Callable[[], object]] = {
        "show": show,
        "push": lambda: stage(pipeline, staged, "user/name", with_checkpoints=True, license=None),
        "card": lambda: write_results_to_card(pipeline, report, "x"),
    }
    return changing(folder, readers[read], name)


def _checkpoint(folder: Path) -> Make:
    """A checkpoint whose state or manifest says something else: what a resumed run makes of it."""
    state = {"loss": 0.5, "seconds": 3.0, "config": {"train": {"seed": 0}}}
    save_checkpoint(folder, 1, {"w": {"w": torch.zeros(2)}}, state, keep=1)

    def read() -> None:
        newest_intact(folder)
        differences(load_checkpoint(folder, 1).state.get("config"), state["config"])

    return changing(folder, read, "step-1/*.json")


TARGETS: dict[str, Callable[[Path], Make]] = {
    "IDX files": partial(_images, case="Fashion"),
    "IDX files, compressed": partial(_images, case="KMNIST"),
    "folders of pictures": _pictures,
    "CSV of pixels": partial(_images, case="CSV of pixels, the file", name="train.csv"),
    "NumPy arrays": partial(_images, case="Keras .npz"),
    "zip archives": partial(_images, case="zip"),
    "parquet tables": partial(_images, case="columns by other names"),
    "tables of labels": partial(_images, case="a table beside pictures", name="labels.csv"),
    "saved data sets": partial(_images, case="a folder that `datasets` saved"),
    "metrics.jsonl": partial(_run, name="metrics.jsonl", read="show"),
    "summary.json": partial(_run, name="summary.json", read="push"),
    "config.yaml of a run": partial(_run, name="config.yaml", read="show"),
    "model cards": partial(_run, name="pipeline/README.md", read="card"),
    "model cards to push": partial(_run, name="pipeline/README.md", read="push"),
    "checkpoints": _checkpoint,
    "YAML configurations": _yaml,
    "model_index.json": partial(_pipeline, name="model_index.json"),
    "unet/config.json": partial(_pipeline, name="unet/config.json"),
    "scheduler_config.json": partial(_pipeline, name="scheduler/scheduler_config.json"),
    "safetensors headers": partial(_pipeline, name="unet/diffusion_pytorch_model.safetensors"),
}


def fuzz(target: str, count: int, *, first: int = 0, seed: int = 0) -> Findings:
    """Read `count` mutated inputs; only the package's own errors may come of it, and none may take long."""
    found = Findings()
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = TARGETS[target](Path(temporary) / "x")
        for number in range(first, first + count):
            read = make(random.Random(f"{seed} {target} {number}"))
            end, wrong, seconds = _end(read)
            if seconds > LARGEST_WAIT:  # with what is imported at first use, which is none of an input's time
                end, wrong, seconds = _end(read)
            found.ends[end] += 1
            found.slowest = max(found.slowest, seconds)
            problems = [wrong] if wrong else [f"took {seconds:.1f} s"] if seconds > LARGEST_WAIT else []
            if number == first:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found.growth_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if found.growth_bytes > LARGEST_GROWTH:
                problems.append(f"grew by {found.growth_bytes} bytes")
            found.wrong += [f"{target} {number}: {problem}" for problem in problems]
    return found


def _end(read: Callable[[], object]) -> tuple[str, str, float]:
    """How reading ended, what was wrong with that, if anything, and after how many seconds."""
    before, end, wrong = time.perf_counter(), "read", ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            read()
    except BaseException as error:
        end = type(error).__name__
        if not isinstance(error, UserError) and getattr(error, "code", None) != 2:  # that of a wrong command line
            wrong = "".join(traceback.format_exception(error))[-1500:]
    return end, wrong, time.perf_counter() - before


def fuzz_into(arguments: list[str], *, out: str) -> int:
    """`fuzz` of each target in this process, into a JSON file: `arguments` are first and count."""
    first, count = map(int, arguments)
    results: dict[str, Any] = {target: vars(fuzz(target, count, first=first)) for target in TARGETS}
    Path(out).write_text(json.dumps(results), encoding="utf-8")
    return 0


def main() -> None:
    """Print what came of a long run."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz")
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--target", choices=TARGETS, action="append", default=[])
    asked = parser.parse_args()
    chosen = asked.target or list(TARGETS)
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| input | inputs | ends | slowest | memory growth |\n| --- | ---: | --- | ---: | ---: |")
    for target in chosen:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:  # so that its memory is that of this target
            found = fresh.apply(fuzz, (target, -(-asked.inputs // len(chosen))), {"first": asked.first})
        ends = ", ".join(f"{end} {count}" for end, count in found.ends.most_common())
        row = (target, str(found.ends.total()), ends, f"{found.slowest:.2f} s", f"{found.growth_bytes / 1e6:.0f} MB")
        print(f"| {' | '.join(row)} |", *found.wrong, sep="\n", flush=True)


if __name__ == "__main__":
    main()
