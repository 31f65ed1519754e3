"""All file I/O: size-limited reads, atomic writes.

No other module of the package opens files. Libraries may open a file that was checked here first.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from PIL import Image

from mnist_diffusion.errors import ConfigError, FileError

MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**17, 10
MAX_JSON_BYTES, MAX_TEXT_BYTES, MAX_PICTURE_BYTES = 2**20, 2**23, 2**27
MAX_NAME, MAX_PIXELS = 200, 64 * 2**20
PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow would also open EPS, for which it starts another program."""
NOT_FOUND_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of a missing file; others, of a disk or a permission, may be transient."""
NOT_SUPPORTED_ERRNOS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
"""Errors of a file system that cannot lock, flush or set permissions."""
STALE_TEMP = re.compile(r"\.[0-9a-f]{8}\.partial|\.rehearsal-\w{8}|\.(?P<name>.+)\.[0-9a-f]{8}\.old")
"""Left by a process that was killed: a partial file, a rehearsal, or the folder it was about to replace."""


def is_printable(name: str) -> bool:
    """Whether a name can be printed and drawn: UTF-8, no control characters, not too long."""
    return len(name) <= MAX_NAME and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def open_file(path: Path, limit: int | None = None) -> io.BufferedReader:
    """Open a regular file for reading; never block, as on a pipe.

    Args:
        path: the file, or a link to it.
        limit: largest size in bytes.

    Raises:
        FileError: it is missing, not a regular file, too large, or could not be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} could not be read: {getattr(error, 'strerror', None) or error}") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (limit is None or status.st_size <= limit):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is not a regular file")
    raise FileError(f"{path} is larger than the limit of {limit:,} bytes: it has {status.st_size:,}")


def is_transient(error: BaseException) -> bool:
    """Whether an error may be transient, so that the file may still be intact."""
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, OSError) and error.errno is not None and error.errno not in NOT_FOUND_ERRNOS


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        FileError: it is something else, or could not be read.
    """
    with open_file(path, limit) as file:
        try:
            return file.read()
        except OSError as error:
            raise FileError(f"{path} could not be read: {error.strerror}") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file; bytes that are not UTF-8 are replaced."""
    return read_bytes(path, limit).decode("utf-8", "replace")


def read_yaml(path: Path) -> Any:
    """The content of a configuration file: small and flat YAML, without anchors, which can expand without bound.

    Raises:
        ConfigError: it is not valid YAML, is nested too deep, or has anchors.
        FileError: it could not be read.
    """
    content, depth = read_bytes(path, MAX_YAML_BYTES), 0
    try:
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:  # an alias has one too
                raise ConfigError(f"{path} has YAML anchors and aliases; write the values out instead")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise ConfigError(f"{path} is nested deeper than {MAX_YAML_DEPTH} levels")
        return parse_yaml(content)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error


class _Reader(yaml.SafeLoader):
    """YAML 1.2, in which `0123` is 123 and `no` a word, without duplicate keys. PyYAML's own loader reads YAML 1.1."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.YAMLError(f"the key {twice[0]!r:.100} occurs twice")
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """Quotes every word that a reader of YAML 1.1 or 1.2 would take for something else."""


_Reader.yaml_implicit_resolvers = {}
for kind, pattern, first in (
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", "~|null|Null|NULL|", [*"~nN", ""]),
    ("int", "[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
):  # the core schema, https://yaml.org/spec/1.2.2/#1032-tag-resolution
    for each in (_Reader, _Writer):
        each.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern})$"), first)
_Writer.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("0o[0-7]+$"), ["0"])
_Reader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(content: str | bytes) -> Any:
    """The value of YAML 1.2; raises yaml.YAMLError or ValueError if it is none."""
    return yaml.load(content, Loader=_Reader)


def yaml_text(values: Any, width: int = 100) -> str:
    """YAML that reads back equal."""
    return str(yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=width))


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file of at most a mebibyte.

    Raises:
        FileError: it is larger, nested too deep, or not JSON with an object.
    """
    content = read_bytes(path, MAX_JSON_BYTES)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise FileError(f"{path} holds no JSON object but a {type(values).__name__}")
    return values


def read_picture(path: Path) -> Image.Image:
    """Read a picture written by a run or a command.

    Raises:
        FileError: it is not a picture.
    """
    content = read_bytes(path, MAX_PICTURE_BYTES)
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            return picture.copy()
    except Exception as error:  # whatever Pillow makes of it
        raise FileError(f"{path} could not be read as a picture: {str(error)[:200]}") from error


def require_writable(folder: Path) -> None:
    """Check that a folder, which need not exist yet, can be written to.

    Raises:
        FileError: it cannot.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise FileError(
            f"{folder} cannot be written to: {existing} is {'read-only' if existing.is_dir() else 'a file'}"
        )


def file_within(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder, unless a link leads out of it.

    Raises:
        FileError: it is missing, no regular file, or a link to somewhere else.
    """
    path, home = folder / name, folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        # The Hub's cache keeps the files of a snapshot there.
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # not there, or links that go round in a circle
        pickles = [each.name for each in sorted(path.parent.glob("*")) if each.suffix in PICKLES]
        only = "can run code when it is read; only JSON and safetensors files are read"
        hint = f", only {pickles[0]}, which is a pickle and {only}" if pickles else ""
        raise FileError(f"there is no {path}{hint}") from None
    if not any(real.is_relative_to(home) for home in homes):
        raise FileError(f"{path} is a link that leads out of its folder, to {real}")
    if not real.is_file():
        raise FileError(f"{path} is not a regular file")
    return real


def pipeline_folder(folder: Path) -> Path:
    """The folder itself, or its pipeline folder if it is a run folder."""
    below = folder / "pipeline"
    run = (below / "model_index.json").is_file() and not (folder / "model_index.json").is_file()
    return below if run else folder


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED_ERRNOS:
            raise


def replace_file(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Write a file atomically: readers see the old content or the new; if `durable`, also after a power cut."""
    temporary = path.with_name(f".{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            if durable:
                _sync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, IsADirectoryError):
            raise FileError(f"{path} is a folder, but a file of this name must be written; move it away") from error
        if (
            isinstance(error, OSError) and error.errno is not None and error.filename is None
        ):  # for example, when the disk is full
            error.filename = str(path)
        raise
    if durable:
        flush(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder with `write`, and replace the existing one with it."""
    token = secrets.token_hex(4)
    temporary, old = folder.with_name(f".{token}.partial"), folder.with_name(f".{folder.name}.{token}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        write(temporary)
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        if os.path.lexists(folder):
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_left_behind(folder: Path) -> None:
    """Remove the partial files of a killed process, and restore the folders it was about to replace."""
    for path, match in [(each, STALE_TEMP.fullmatch(each.name)) for each in folder.glob(".*")]:
        if match is None:
            continue
        if match["name"] and not (target := path.with_name(match["name"])).exists():
            path.rename(target)
        else:
            _remove(path)


def append_text(path: Path, text: str) -> None:
    """Append to a file durably, never through a link.

    Raises:
        FileError: it is a link, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise FileError(f"{path} is not a regular file") from error
        raise
    with os.fdopen(descriptor, "ab") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path} is not a regular file")
        file.write(text.encode())
        file.flush()
        _sync(descriptor)


def copy_permissions(source: Path, path: Path) -> None:
    """Copy another file's permissions (safetensors creates files as 0600), where a file system has them."""
    try:
        path.chmod(source.stat().st_mode & 0o777)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED_ERRNOS:
            raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    replace_file(path, lambda file: file.write(content))


def replace_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture atomically, in the format of its suffix, without waiting for the disk."""
    replace_file(path, lambda file: picture.save(file, path.suffix.removeprefix("."), **options), durable=False)
