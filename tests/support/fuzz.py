"""Mutated inputs for everything that reads what others made; a long run of it, and the short one of the tests.

    python -m tests.support.fuzz --inputs 10000

Inputs are a function of the seed and their number: `--first N --inputs 1` does one again.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mnist_diffusion.errors import UserError

EXTREMES = (
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"99999999999999999999",
    b"2147483648",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
)
LARGEST_WAIT = 2.0
LARGEST_PEAK = 10**9
"""Bytes of memory that a process may take that reads the inputs of one target, with all that it imports."""


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
    peak_bytes: int = 0


def _idx(folder: Path) -> Callable[[random.Random], Callable[[], object]]:
    from mnist_diffusion.config import DataConfig
    from mnist_diffusion.data.dataset import load_images

    pixels = np.arange(40 * 64, dtype=np.uint8).tobytes()
    files = {}
    for name, count in (("train", 30), ("t10k", 10)):
        files[f"{name}-images-idx3-ubyte"] = struct.pack(">IIII", 2051, count, 8, 8) + pixels[: count * 64]
        files[f"{name}-labels-idx1-ubyte"] = struct.pack(">II", 2049, count) + bytes(i % 3 for i in range(count))

    def make(source: random.Random) -> Callable[[], object]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        chosen, how = source.choice(list(files)), source.randrange(3)
        for name, content in files.items():
            if name != chosen:
                (folder / name).write_bytes(content)
            elif how == 0:
                (folder / f"{name}.gz").write_bytes(mutated(gzip.compress(content), source))
            else:
                changed = mutated(content, source, within=16 if how == 1 else None)
                (folder / f"{name}.gz").write_bytes(gzip.compress(changed))
        return lambda: load_images(DataConfig(source=str(folder)), seed=0)

    return make


def _pictures(folder: Path) -> Callable[[random.Random], Callable[[], object]]:
    from mnist_diffusion.config import DataConfig
    from mnist_diffusion.data.dataset import load_images

    kinds = (
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("GIF", "P"),
        ("BMP", "L"),
        ("WEBP", "RGB"),
    )
    pictures = []
    for kind, mode in kinds:
        file = io.BytesIO()
        Image.new("RGB", (12, 12), (200, 30, 60)).convert("L" if mode == "I;16" else mode).save(file, kind)
        pictures.append((kind.lower(), file.getvalue()))
    for index in range(8):
        (folder / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (index, 0, 0)).save(folder / "ab"[index % 2] / f"{index}.png")

    def make(source: random.Random) -> Callable[[], object]:
        for left in (folder / "a").glob("changed.*"):
            left.unlink()
        suffix, content = source.choice(pictures)
        (folder / "a" / f"changed.{suffix}").write_bytes(mutated(content, source))
        return lambda: load_images(DataConfig(source=str(folder)), seed=0)

    return make


def _one_file(folder: Path, name: str, content: Callable[[], bytes]) -> Callable[[random.Random], Callable[[], object]]:
    """A source that is a single file."""
    from mnist_diffusion.config import DataConfig
    from mnist_diffusion.data.dataset import load_images

    folder.mkdir()
    whole = content()

    def make(source: random.Random) -> Callable[[], object]:
        (folder / name).write_bytes(mutated(whole, source))
        return lambda: load_images(DataConfig(source=str(folder / name)), seed=0)

    return make


def _csv() -> bytes:
    rows = [",".join(["label", *(f"p{index}" for index in range(64))])]
    for index in range(12):
        rows.append(",".join(map(str, [index % 3, *((index * 7 + place) % 256 for place in range(64))])))
    return "\n".join(rows).encode()


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.arange(12 * 64, dtype=np.uint8).reshape(12, 8, 8), y=np.arange(12) % 3)
    return file.getvalue()


def _archive() -> bytes:
    picture, file = io.BytesIO(), io.BytesIO()
    Image.new("L", (8, 8), 200).save(picture, "PNG")
    with zipfile.ZipFile(file, "w") as archive:
        for name in (f"{label}/{index}.png" for label in "abc" for index in range(3)):
            archive.writestr(name, picture.getvalue())
    return file.getvalue()


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    picture, file = io.BytesIO(), io.BytesIO()
    Image.new("L", (8, 8), 200).save(picture, "PNG")
    cell = {"bytes": picture.getvalue(), "path": None}
    parquet.write_table(pyarrow.table({"image": [cell] * 9, "label": [0, 1, 2] * 3}), file)
    return file.getvalue()


def _label_table(folder: Path) -> Callable[[random.Random], Callable[[], object]]:
    from mnist_diffusion.config import DataConfig
    from mnist_diffusion.data.dataset import load_images

    folder.mkdir()
    for index in range(9):
        Image.new("L", (8, 8), index).save(folder / f"{index}.png")
    content = "\n".join(["file,label", *(f"{index}.png,{index % 3}" for index in range(9))]).encode()

    def make(source: random.Random) -> Callable[[], object]:
        (folder / "labels.csv").write_bytes(mutated(content, source))
        return lambda: load_images(DataConfig(source=str(folder)), seed=0)

    return make


def _yaml(folder: Path) -> Callable[[random.Random], Callable[[], object]]:
    from tests.conftest import parse_train, tiny_config

    content = tiny_config().to_yaml().encode()
    folder.mkdir()

    def make(source: random.Random) -> Callable[[], object]:
        file = folder / "config.yaml"
        file.write_bytes(mutated(content, source))
        return lambda: parse_train(["--config", str(file)])

    return make


def _pipeline(folder: Path, name: str) -> Callable[[random.Random], Callable[[], object]]:
    from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
    from tests.conftest import make_pipeline

    make_pipeline().save_pretrained(folder)
    content = (folder / name).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith(".safetensors") else None

    def make(source: random.Random) -> Callable[[], object]:
        (folder / name).write_bytes(mutated(content, source, within=header))
        return lambda: MNISTDiffusionPipeline.from_pretrained(folder)

    return make


def _saved_data_set(folder: Path) -> Callable[[random.Random], Callable[[], object]]:
    import datasets

    from mnist_diffusion.config import DataConfig
    from mnist_diffusion.data.dataset import load_images

    datasets.Dataset.from_parquet(str(_written(folder.with_name("table.parquet"), _parquet()))).save_to_disk(
        str(folder)
    )
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def make(source: random.Random) -> Callable[[], object]:
        chosen = source.choice(list(files))
        for path, content in files.items():
            _written(path, mutated(content, source) if path == chosen else content)
        return lambda: load_images(DataConfig(source=str(folder)), seed=0)

    return make


def _run(folder: Path, name: str, read: str) -> Callable[[random.Random], Callable[[], object]]:
    """A file of a run folder, which a function of the package reads."""
    from mnist_diffusion.hub import stage
    from mnist_diffusion.pipelines.card import write_results_to_card
    from mnist_diffusion.plots import curves, run_page
    from mnist_diffusion.training.run_folder import RunRecord, read_run
    from tests.conftest import run_folder

    def shown(run: RunRecord) -> None:
        run_page.comparison_page({"a": run, "b": run})
        curves.training_curves(run.lines)

    run_folder(folder)
    about = {"source": "x", "hub_id": None, "fingerprint": "0"}
    report = {"data": about, "results": [{"accuracy": 0.5, **dict.fromkeys(SETTINGS)}]}
    readers: dict[str, Callable[[], object]] = {
        "run": lambda: shown(read_run(folder)),
        "push": lambda: stage(
            folder / "pipeline", folder.with_name("staged"), "user/name", with_checkpoints=True, license=None
        ),
        "card": lambda: write_results_to_card(folder / "pipeline", report, "x"),
    }
    lines = [{"step": step, "epoch": step / 10, "loss": 1.0, "loss_by_noise": [0.1] * 10} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = (folder / name).read_bytes()

    def make(source: random.Random) -> Callable[[], object]:
        _written(folder / name, mutated(content, source))
        return readers[read]

    return make


SETTINGS = ("scheduler", "num_inference_steps", "guidance_scale", "num_images")


def _checkpoint(folder: Path) -> Callable[[random.Random], Callable[[], object]]:
    """A checkpoint whose state says something else, under hashes that are right: what a resumed run makes of it."""
    from mnist_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
    from mnist_diffusion.training.resume import differences

    state = json.dumps({"loss": 0.5, "seconds": 3.0, "config": {"train": {"seed": 0}}, "optimizer_groups": [{"lr": 1}]})

    def make(source: random.Random) -> Callable[[], object]:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(ValueError, RecursionError):
            changed = json.loads(mutated(state.encode(), source))
            if isinstance(changed, dict):
                save_checkpoint(folder, 1, {"w": {"w": torch.zeros(2)}}, changed, keep=1)
        if not folder.exists():
            save_checkpoint(folder, 1, {"w": {"w": torch.zeros(2)}}, {}, keep=1)
            path = source.choice([folder / "step-1" / name for name in ("manifest.json", "state.json")])
            _written(path, mutated(path.read_bytes(), source))
        return lambda: differences(load_checkpoint(folder, 1).state.get("config"), json.loads(state)["config"])

    return make


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


TARGETS: dict[str, Callable[[Path], Callable[[random.Random], Callable[[], object]]]] = {
    "IDX files": _idx,
    "folders of pictures": _pictures,
    "CSV of pixels": partial(_one_file, name="x.csv", content=_csv),
    "NumPy arrays": partial(_one_file, name="x.npz", content=_npz),
    "zip archives": partial(_one_file, name="x.zip", content=_archive),
    "parquet tables": partial(_one_file, name="x.parquet", content=_parquet),
    "tables of labels": _label_table,
    "saved data sets": _saved_data_set,
    "metrics.jsonl": partial(_run, name="metrics.jsonl", read="run"),
    "summary.json": partial(_run, name="summary.json", read="push"),
    "config.yaml of a run": partial(_run, name="config.yaml", read="run"),
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
            if wrong:
                found.wrong.append(f"{target} {number}: {wrong}")
            if seconds > LARGEST_WAIT:
                found.wrong.append(f"{target} {number}: took {seconds:.1f} s")
    found.peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def _end(read: Callable[[], object]) -> tuple[str, str, float]:
    """How reading ended, what was wrong with that, if anything, and after how many seconds."""
    before, wrong = time.perf_counter(), ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            read()
        end = "read"
    except UserError as error:
        end = type(error).__name__
    except SystemExit as error:
        end = f"exit {error.code}"
        wrong = end if error.code != 2 else ""
    except BaseException as error:
        end = type(error).__name__
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
    print("| input | inputs | ends | slowest | most memory |\n| --- | ---: | --- | ---: | ---: |")
    for target in chosen:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:  # so that its memory is that of this target
            found = fresh.apply(fuzz, (target, -(-asked.inputs // len(chosen))), {"first": asked.first})
        if found.peak_bytes > LARGEST_PEAK:
            found.wrong.append(f"{target}: took {found.peak_bytes} bytes")
        ends = ", ".join(f"{end} {count}" for end, count in found.ends.most_common())
        row = (target, str(found.ends.total()), ends, f"{found.slowest:.2f} s", f"{found.peak_bytes / 1e6:.0f} MB")
        print(f"| {' | '.join(row)} |", *found.wrong, sep="\n", flush=True)


if __name__ == "__main__":
    main()
