"""The run folder: its lock and id, its `metrics.jsonl`, and reading it back."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from mnist_diffusion.config import IMAGE_FIELDS, ImagesConfig, RunConfig
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import (
    NOT_SUPPORTED_ERRNOS,
    append_text,
    file_within,
    is_transient,
    pipeline_folder,
    read_json,
    read_picture,
    read_text,
    read_yaml,
    remove_left_behind,
    replace_text,
)
from mnist_diffusion.option_types import explain
from mnist_diffusion.training.checkpoint import MANIFEST, newest_intact

LOCK, SOFT_LOCK, RUN_ID = ".lock", ".lock.soft", "run_id"
RESULTS = ("pipeline", "pipeline_best", "snapshots", "summary.json")
"""Results of a run that training again would overwrite."""
WRITTEN_FOLDERS = ("samples", "pictures", "snapshots", "averages")
OBJECTIVE = "# objective: "
"""First words of a run's configuration."""
IN_LOSS = ("diffusion.", "distillation.")
NOT_IN_LOSS = ("diffusion.label_dropout", "distillation.teacher", "distillation.split_seed")
MAX_LOG_BYTES = 2**31
MAX_NUMBER = 10**18
"""Largest absolute value of a number in a summary."""
NOISE_LEVELS = 10
"""Tenths of the timesteps, for each of which `loss_by_noise` has a mean."""
SHEET_NAME = re.compile(r"step-(\d+)\.png")
Images = TypeVar("Images", bound=ImagesConfig)


def is_empty(path: Path) -> bool:
    """Whether a run folder is missing, empty, or holds only the lock of a run that did not start."""
    return not path.is_dir() or {file.name for file in path.iterdir()} <= {LOCK, SOFT_LOCK}


class RunFolder:
    """A run folder, locked until it is released or the process ends, however it ends.

    Args:
        path: the folder; created if missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lock: BaseFileLock = FileLock(path / LOCK)
        self.run_id: str | None = None
        self.was_empty = self.had_run_id = self.created = False

    def acquire(self, *, resume: bool) -> None:
        """Create and lock the folder, and mark it with the run's id.

        Args:
            resume: whether to resume the run in the folder; if not, the folder must be empty.

        Raises:
            UserError: another run holds it, it cannot be written to, or it is not empty.
        """
        path = self.path
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                self.created = True
            self._lock()
            if not resume and not is_empty(path):
                raise UserError(f"another run has started in {path}; name another output_dir")
            for name in (*WRITTEN_FOLDERS, "logs"):
                if (path / name).is_symlink():
                    raise UserError(
                        f"{path / name} is a link; a run removes files there, so move the folder itself here"
                    )
            self.was_empty, self.had_run_id = is_empty(path), (path / RUN_ID).is_file()
            for folder in (path, *(path / name for name in WRITTEN_FOLDERS)) if self.had_run_id else ():
                remove_left_behind(folder)
            self.run_id = self._read_or_make_id()
        except Timeout:
            raise UserError(f"another run is writing to {path}; wait for it, or name another output_dir") from None
        except OSError as error:
            reason = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '')})"
            raise UserError(f"output_dir={str(path)!r} cannot be written to: {reason}") from error

    def _lock(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED_ERRNOS:
                raise
            self.lock = SoftFileLock(self.path / SOFT_LOCK)  # a file that is there or not
            self.lock.acquire(timeout=0)

    def link_as_latest(self) -> None:
        """Point the link `latest` beside the folder to it, unless something else has that name."""
        latest = self.path.parent / "latest"
        new = latest.with_name(f".latest-{self.run_id}")
        with contextlib.suppress(OSError):  # some file systems have no links
            if latest.is_symlink() or not latest.exists():
                new.symlink_to(self.path.name, target_is_directory=True)
                new.replace(latest)

    def _read_or_make_id(self) -> str:
        """The id of the run that started this folder; if it was lost, that of its newest checkpoint."""
        known = ""
        try:
            known = read_text(file_within(self.path, RUN_ID), 100).strip()
        except FileError as error:
            if is_transient(error):
                raise
        if not re.fullmatch(r"\w+", known):
            newest = newest_intact(self.path / "checkpoints")
            manifest = {} if newest is None else read_json(newest / MANIFEST)
            known = str(manifest.get("run_id") or uuid.uuid4().hex)
            replace_text(self.path / RUN_ID, known)
        return known

    def ensure_safe_to_overwrite(self) -> None:
        """Check that a run may start at step 0 here: the folder was empty, or a run started in it and left no result.

        Raises:
            UserError: the folder holds results of a run, or files of something else.
        """
        lost = [name for name in RESULTS if (self.path / name).exists()]
        lost += [f"checkpoints/{path.name}" for path in (self.path / "checkpoints").glob("*.broken*")]
        if not self.was_empty and (lost or not self.had_run_id):
            if not self.had_run_id:
                (self.path / RUN_ID).unlink()
            held = f"holds {', '.join(lost)}" if lost else "is not the folder of a run"
            raise UserError(f"{self.path} has no checkpoint to resume from, and {held}; name another output_dir")

    def release(self) -> None:
        """Unlock the folder, and leave it as it was if the run left nothing in it."""
        leftovers = (RUN_ID, "config.yaml", "metrics.jsonl")
        try:
            with contextlib.suppress(OSError):
                present = {
                    file.name for file in self.path.iterdir() if file.name != leftovers[-1] or file.stat().st_size
                }
                if self.was_empty and self.lock.is_locked and present <= {LOCK, SOFT_LOCK, *leftovers[:-1]}:
                    for name in (*leftovers, LOCK, SOFT_LOCK):
                        (self.path / name).unlink(missing_ok=True)
                    if self.created:
                        self.path.rmdir()
        finally:
            self.lock.release()


def config_text(config: RunConfig, objective: object) -> str:
    """The configuration to save: it repeats the run, in a folder of its own, without publishing."""
    return f"{OBJECTIVE}{objective}\n{config.reproducible().to_yaml()}"


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of later steps, which will be trained again; replace a file that is not a log by an empty one."""
    lines: list[dict[str, Any]] = []
    try:
        lines = [line for line in read_metrics(path) if line["step"] <= step]
    except FileError as error:
        if is_transient(error):
            raise
        print(f"warning: starting a new log: {error}")
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def append_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines, durably, so that a checkpoint may count on them."""
    append_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one that was cut off; none if there is no file.

    Damaged lines are skipped with a warning: no run depends on them.
    """
    if not path.exists():
        return []
    texts = read_text(path, MAX_LOG_BYTES).splitlines(keepends=True)
    lines = [_parsed(text) for text in texts if text.endswith("\n")]
    if damaged := lines.count(None):
        print(f"warning: {damaged} lines of {path} could not be read, and are skipped")
    return [line for line in lines if line is not None]


class Line(BaseModel, extra="allow", strict=True):
    """A line of `metrics.jsonl`; its other values are numbers as well."""

    __pydantic_extra__: dict[str, float | None] = Field(init=False)
    step: Annotated[int, Field(ge=1, lt=2**63)]
    epoch: FiniteFloat
    loss_by_noise: Annotated[list[float | None], Field(min_length=NOISE_LEVELS, max_length=NOISE_LEVELS)] | None = None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        Line.model_validate_json(text)
        return dict(json.loads(text))
    except ValueError:  # of either
        return None


def by_dotted_name(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of a plain configuration, as `train.seed`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= by_dotted_name(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class Sheet(NamedTuple):
    """A sample sheet of a run, titled with its epoch."""

    title: str
    picture: Image.Image
    step: int


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder.

    Args:
        folder: the run folder.
        config: its `config.yaml`.
        objective_name: the name of its objective; empty if unknown.
        lines: the lines of its `metrics.jsonl`.
        summary: its `summary.json`; empty until the run ends.
        sheet: its last sample sheet, if there is one.
    """

    folder: Path
    config: Mapping[str, Any]
    objective_name: str
    lines: list[dict[str, Any]]
    summary: Mapping[str, Any]
    sheet: Sheet | None

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The settings its loss depends on besides images and network."""
        in_loss = {name: value for name, value in by_dotted_name(self.config).items() if name.startswith(IN_LOSS)}
        return {name: value for name, value in in_loss.items() if name not in NOT_IN_LOSS}

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    def last(self, name: str) -> float | None:
        """The last logged value of a metric."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), None)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it is not a run folder, or could not be read.
    """
    config, summary_file = folder / "config.yaml", folder / "summary.json"
    lines = read_metrics(folder / "metrics.jsonl")
    if not config.is_file() or not lines:
        raise UserError(f"{str(folder)!r} is not a run folder: it needs config.yaml and a non-empty metrics.jsonl")
    try:
        summary = read_json(summary_file) if summary_file.is_file() else {}
        values, first = dict(read_yaml(config)), read_text(config).partition("\n")[0].strip()
        epochs_per_step = lines[-1]["epoch"] / lines[-1]["step"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(folder)!r}: the run folder could not be read: {error}") from error
    name = first.removeprefix(OBJECTIVE) if first.startswith(OBJECTIVE) else ""
    plain = {
        key: value
        for key, value in summary.items()
        if isinstance(value, str) or (isinstance(value, int | float) and abs(value) < MAX_NUMBER)
    }
    last = sample_sheets(folder, epochs_per_step=epochs_per_step, only_last=True)
    return RunRecord(folder, values, name, lines, plain, last[0] if last else None)


def with_training_images(pipeline: str, options: Images) -> tuple[Images, int | None]:
    """The options with the images of the run that exported a pipeline folder, and their split seed.

    Args:
        pipeline: a pipeline folder, a run folder, or a Hub id.
        options: the options; if these name images, they are meant instead.

    Returns:
        `options` and None if it names images, or there is no run beside the pipeline.

    Raises:
        UserError: the configuration beside it does not name the images of a run.
    """
    beside, default = _of_run(pipeline, "config.yaml"), ImagesConfig()
    names_images = any(getattr(options, name) != getattr(default, name) for name in IMAGE_FIELDS)
    if names_images or beside is None:
        return options, None
    run = read_yaml(beside)
    try:
        images = ImagesConfig(**{name: run["data"][name] for name in IMAGE_FIELDS if name in run["data"]})
        seed = run.get("distillation", {}).get("split_seed", run["train"]["seed"])  # a student's is its teacher's
        return replace(options, **asdict(images)), int(seed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else repr(error)
        problem = f"does not name the images of the run ({reason:.200}); use --data.source"
        raise UserError(f"{beside} {problem}") from error


def training_fingerprint(pipeline: str) -> str | None:
    """The fingerprint of the images that a pipeline was trained on; None if there is no ended run beside it.

    Raises:
        UserError: the run's summary could not be read.
    """
    summary = _of_run(pipeline, "summary.json")
    return None if summary is None else read_json(summary).get("data_fingerprint")


def _of_run(pipeline: str, name: str) -> Path | None:
    """A file of the run that exported a pipeline folder, if there is one."""
    folder = pipeline_folder(Path(pipeline))
    place = folder.resolve()
    beside = (place.parents[1] if place.parent.name == "snapshots" else place.parent) / name
    return beside if (folder / "model_index.json").is_file() and beside.is_file() else None


def sample_sheets(folder: Path, *, epochs_per_step: float, only_last: bool = False) -> list[Sheet]:
    """The sample sheets of a run folder, oldest first, or the last readable one alone."""
    paths = (folder / "samples").glob("step-*.png")
    by_step = {int(match[1]): path for path in paths if (match := SHEET_NAME.fullmatch(path.name))}
    sheets = []
    for step, path in sorted(by_step.items(), reverse=only_last):
        try:
            sheets.append(Sheet(f"epoch {step * epochs_per_step:.2f}", read_picture(path), step))
        except FileError as error:
            print(f"warning: skipping a sample sheet: {error}")
        if only_last and sheets:
            break
    return sheets
