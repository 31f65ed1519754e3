"""Read files that others may have made, and write files whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from PIL import Image

from mnist_diffusion.errors import ConfigError, FileError

MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**17, 10
MAX_NAME = 200


def is_plain(name: str) -> bool:
    """Whether a name can be printed, drawn and written into a file: UTF-8, no control characters, not too long."""
    return len(name) <= MAX_NAME and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file that is a configuration's: small, flat, without anchors, which can grow when read.

    Raises:
        ConfigError: it is not.
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_YAML_BYTES:,} bytes")
    depth = 0
    try:
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:  # an alias has one too
                raise ConfigError(f"{path} has YAML anchors and aliases, which are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise ConfigError(f"{path} is nested deeper than {MAX_YAML_DEPTH} levels")
        return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error


def pipeline_folder(folder: Path) -> Path:
    """A pipeline folder, or the one in the run folder that it is."""
    below = folder / "pipeline"
    run = (below / "model_index.json").is_file() and not (folder / "model_index.json").is_file()
    return below if run else folder


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, and put it in place of the one that may be there."""
    temporary, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file, and put it in place of the one that may be there.

    A reader sees the old content or the new, nothing between.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def give_mode_of(other: Path, path: Path) -> None:
    """Let those read a file who may read another; safetensors writes for its owner alone."""
    path.chmod(other.stat().st_mode & 0o777)


def replace_text(path: Path, text: str) -> None:
    """Write a text file as [`replace_file`] does."""
    replace_file(path, lambda file: file.write(text.encode()))


def replace_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture as [`replace_file`] does, in the format of its suffix."""
    replace_file(path, lambda file: picture.save(file, path.suffix.removeprefix("."), **options))


PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
MAX_JSON_BYTES = 2**20


def file_within(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder, which no link leads out of.

    Raises:
        FileError: it is missing, no regular file, or a link to somewhere else.
    """
    path, home = folder / name, folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        # Where the Hub's cache keeps the files of a snapshot: those of the repository, and those of all.
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # not there, or links that go round in a circle
        pickles = [each.name for each in sorted(path.parent.glob("*")) if each.suffix in PICKLES]
        there = f" but {pickles[0]}, which is a pickle and can run code when it is read" if pickles else ""
        raise FileError(f"there is no {path}{there}; only JSON and whole safetensors files are read") from None
    if not any(real.is_relative_to(home) for home in homes):
        raise FileError(f"{path} is a link that leads out of its folder, to {real}")
    if not real.is_file():
        raise FileError(f"{path} is not a regular file")
    return real


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file of at most a mebibyte.

    Raises:
        FileError: it is larger, nested too deep, or not JSON with an object.
    """
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise FileError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise FileError(f"{path} holds no JSON object but a {type(values).__name__}")
    return values
