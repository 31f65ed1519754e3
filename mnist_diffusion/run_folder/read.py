"""Read a run folder: its configuration, metrics, summary, sample sheets and pipelines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mnist_diffusion.config import IMAGE_FIELDS, ImagesConfig
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import pipeline_folder, read_json, read_picture, read_text, read_yaml
from mnist_diffusion.run_folder.checkpoint import NAME
from mnist_diffusion.run_folder.metrics import read_metrics

IN_LOSS = ("diffusion.", "distillation.")
NOT_IN_LOSS = ("diffusion.label_dropout", "diffusion.clip_sample", "distillation.teacher", "distillation.split_seed")
OBJECTIVE = "# objective: "
"""How the configuration of a run begins."""
SHEET_NAME = re.compile(r"step-(\d+)\.png")


class Sheet(NamedTuple):
    """A sample sheet of a run, titled with the epoch it was drawn at."""

    title: str
    picture: Image.Image
    step: int


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Args:
        folder: the run folder.
        config: its `config.yaml`.
        learned: the name of its objective; empty if it is not known.
        lines: of its `metrics.jsonl`.
        summary: its `summary.json`; empty until the run ends.
        sheets: its sample sheets, oldest first.
    """

    folder: Path
    config: Mapping[str, Any]
    learned: str
    lines: list[dict[str, Any]]
    summary: Mapping[str, Any]
    sheets: Sequence[Sheet]

    @property
    def settings(self) -> dict[str, Any]:
        """Its configuration by dotted names."""
        sections = ((section, values) for section, values in self.config.items() if isinstance(values, dict))
        return {f"{section}.{name}": value for section, values in sections for name, value in values.items()}

    @property
    def objective(self) -> dict[str, Any]:
        """What its loss depends on beside images and network; where it differs, losses do not compare."""
        in_loss = {name: value for name, value in self.settings.items() if name.startswith(IN_LOSS)}
        return {name: value for name, value in in_loss.items() if name not in NOT_IN_LOSS} | {"name": self.learned}

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    def last(self, name: str) -> float | None:
        """The last value measured under a name."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), None)

    def pipelines(self) -> dict[str, Path]:
        """Its pipeline folders by name, snapshots first."""
        found = ((NAME.fullmatch(path.name), path) for path in (self.folder / "snapshots").glob("step-*"))
        paths = [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]
        paths += [self.folder / "pipeline_best", self.folder / "pipeline"]
        return {path.name: path for path in paths if (path / "model_index.json").is_file()}


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it is not a run folder, or could not be read.
    """
    config, summary_file = folder / "config.yaml", folder / "summary.json"
    lines = read_metrics(folder / "metrics.jsonl")
    if not config.is_file() or not lines:
        raise UserError(f"{str(folder)!r} is not a run folder: it needs config.yaml and metrics.jsonl with a line")
    try:
        summary = read_json(summary_file) if summary_file.is_file() else {}
        values, first = dict(read_yaml(config)), read_text(config).partition("\n")[0].strip()
        epochs_per_step = lines[-1]["epoch"] / lines[-1]["step"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(folder)!r}: the run folder could not be read: {error}") from error
    learned = first.removeprefix(OBJECTIVE) if first.startswith(OBJECTIVE) else ""
    plain = {name: value for name, value in summary.items() if isinstance(value, int | float | str)}
    return RunRecord(folder, values, learned, lines, plain, sample_sheets(folder, epochs_per_step=epochs_per_step))


def images_of_run(config_file: Path) -> tuple[ImagesConfig, int]:
    """The images that a run was trained on, and the seed that chose the held-out ones.

    Args:
        config_file: its `config.yaml`.

    Raises:
        UserError: it does not say.
    """
    run = read_yaml(config_file)
    try:
        images = {name: run["data"][name] for name in IMAGE_FIELDS if name in run["data"]}
        chosen_by = run.get("distillation", {}).get("split_seed", run["train"]["seed"])  # a student's is its teacher's
        return ImagesConfig(**images), int(chosen_by)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        missing = f"does not say what images the run was trained on ({error!r}); name them with --data.source"
        raise UserError(f"{config_file} {missing}") from error


def images_beside(pipeline: str, given: ImagesConfig) -> tuple[dict[str, Any], int] | None:
    """What decides the images of the run that a pipeline folder or run folder belongs to, by field, and their seed.

    A run leaves its configuration beside its pipeline folder.

    Args:
        pipeline: the folder, or a Hub id.
        given: if this already names images, they are meant.

    Raises:
        UserError: what is there is not the configuration of a run.
    """
    folder, default = pipeline_folder(Path(pipeline)), ImagesConfig()
    place = folder.resolve()
    beside = (place.parents[1] if place.parent.name == "snapshots" else place.parent) / "config.yaml"
    named = any(getattr(given, name) != getattr(default, name) for name in IMAGE_FIELDS)
    exported = (folder / "model_index.json").is_file() and beside.is_file()
    if named or not exported:
        return None
    images, seed = images_of_run(beside)
    return {name: getattr(images, name) for name in IMAGE_FIELDS}, seed


def sample_sheets(folder: Path, *, epochs_per_step: float) -> list[Sheet]:
    """The sample sheets of a run folder, oldest first."""
    paths = (folder / "samples").glob("step-*.png")
    found = {int(match[1]): path for path in paths if (match := SHEET_NAME.fullmatch(path.name))}
    sheets = []
    for step, path in sorted(found.items()):
        try:
            sheets.append(Sheet(f"epoch {step * epochs_per_step:.2f}", read_picture(path), step))
        except FileError as error:
            print(f"warning: a sample sheet is left out: {error}")
    return sheets
