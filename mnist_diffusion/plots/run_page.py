"""One run, or several compared, on one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image

from mnist_diffusion.errors import FileError
from mnist_diffusion.files import MAX_PICTURE_BYTES, file_within, read_bytes, read_picture, read_text
from mnist_diffusion.pipelines.card import CARD, parse_card
from mnist_diffusion.plots import curves
from mnist_diffusion.plots.grids import side_by_side
from mnist_diffusion.training.run_folder import RunRecord, by_dotted_name

TEMPLATE = Path(__file__).with_suffix(".html")
FACTS = {
    "step": "steps",
    "train_seconds": "seconds",
    "images_per_second": "images per second",
    "loss": "loss",
    "held_out_loss": "held-out loss",
    "objective": "objective",
    "data_source": "data",
    "data_fingerprint": "fingerprint of the data",
    "machine": "machine",
    "mixed_precision": "mixed precision",
    "notice": "notice",
}
"""Values of a summary, and their names on the page."""
DECIDED = ("train.lr_decay", "train.num_threads")
"""Options that a run sets itself."""
HEADINGS = ("run", "steps", "epochs", "minutes", "images/s", "loss", "held-out loss", "FID", "class accuracy")


def run_page(run: RunRecord) -> str:
    """The samples, scores, curves, pictures and configuration of a run as HTML; all text from the run is escaped.

    Raises:
        FileError: the configuration could not be read.
    """
    pipeline = run.folder / "pipeline"
    exported = (pipeline / "model_index.json").is_file()
    pictures = sorted((run.folder / "pictures").glob("*.[pg][ni][gf]"))
    embedded_pictures = [(_title(path), _embedded_file(path)) for path in pictures if path.stem != "training_curves"]
    facts = [(words, _short(run.summary[key])) for key, words in FACTS.items() if run.summary.get(key) is not None]
    scores = _scores(pipeline) if exported else []
    return _render(
        name=run.name,
        state=f"A run of mnist-diffusion, {'finished' if run.summary.get('finished') else 'not finished'}.",
        samples=embedded(run.sheet.picture) if run.sheet else None,
        usage=_usage(run) if exported else None,
        tables=[("Evaluation", ("images", "metric", "value"), scores), ("Training", (), facts)],
        curves=embedded(curves.to_picture(curves.training_curves(run.lines, title="Training"))),
        pictures=[(title, picture) for title, picture in embedded_pictures if picture is not None],
        config=read_text(run.folder / "config.yaml"),
    )


def comparison_page(runs: Mapping[str, RunRecord]) -> str:
    """Several runs compared as HTML: results, settings that differ, curves, last sample sheets."""
    groups = by_objective(runs)
    apart = " Losses of different objectives cannot be compared; plotted apart." if len(groups) > 1 else ""
    sheets = [(name, run.sheet.picture) for name, run in runs.items() if run.sheet]
    figure = curves.compared_curves([{name: run.lines for name, run in group.items()} for group in groups])
    return _render(
        name="Runs compared",
        state=f"{len(runs)} runs of mnist-diffusion.{apart}",
        samples=embedded(side_by_side(sheets)) if sheets else None,
        tables=[
            ("Results", HEADINGS, results_table(runs)),
            ("Settings that differ", ("setting", *runs), settings_that_differ(runs)),
        ],
        curves=embedded(curves.to_picture(figure)),
    )


def _render(**values: Any) -> str:
    """Render the page, without the sections for which no value is given."""
    return Environment(autoescape=True).from_string(read_text(TEMPLATE)).render(values)


def by_name(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The runs by the names of their folders, or by their paths if two folders have the same name."""
    runs_by_name = {run.name: run for run in runs}
    return runs_by_name if len(runs_by_name) == len(runs) else {str(run.folder): run for run in runs}


def by_objective(runs: Mapping[str, RunRecord]) -> list[dict[str, RunRecord]]:
    """The runs in groups of the same objective, whose losses compare."""
    groups: dict[str, dict[str, RunRecord]] = {}
    for name, run in runs.items():
        groups.setdefault(repr((run.objective_name, sorted(run.loss_settings.items()))), {})[name] = run
    return list(groups.values())


def settings_that_differ(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """One row for each setting, by its dotted name, in which the runs differ, with the value of each run."""
    settings = [{"objective": run.objective_name, **by_dotted_name(run.config)} for run in runs.values()]
    names = dict.fromkeys(name for each in settings for name in each if name not in DECIDED)
    differing = [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
    return [[name, *(f"{each.get(name)!r:.60}" for each in settings)] for name in differing]


def results_table(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """One row per run under `HEADINGS`: its length, and its last metrics."""
    table = []
    for name, run in runs.items():
        summary = {key: value for key, value in run.summary.items() if type(value) in (int, float)}
        seconds = summary.get("train_seconds")
        values = (
            (run.lines[-1]["epoch"], "{:.2f}"),
            (None if seconds is None else seconds / 60, "{:.1f}"),
            (summary.get("images_per_second"), "{:.0f}"),
            (summary.get("loss"), "{:.4f}"),
            (run.last("held_out_loss"), "{:.4f}"),
            (run.last("fid"), "{:.3f}"),
            (run.last("accuracy"), "{:.2%}"),
        )
        cells = ["" if value is None else pattern.format(value) for value, pattern in values]
        table.append([name, str(run.lines[-1]["step"]), *cells])
    return table


def _title(path: Path) -> str:
    return path.stem.replace("_", " ") + (", animated" if path.suffix == ".gif" else "")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _usage(run: RunRecord) -> str:
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({f'{run.name}/pipeline'!r}, trust_remote_code=True)\n"
        'pipeline().images[0].save("sample.png")'
    )


def _scores(pipeline: Path) -> list[tuple[str, str, str]]:
    """The evaluation results in the card of a pipeline: settings, metric and value."""
    try:
        card = parse_card(read_text(file_within(pipeline, CARD)))
    except FileError as error:
        print(f"warning: skipping the evaluation: {error}", file=sys.stderr)
        return []
    results = getattr(card.data, "eval_results", None) or []
    return [(_settings(each.metric_args), str(each.metric_name), _short(each.metric_value)) for each in results]


def _settings(arguments: Any) -> str:
    values = arguments if isinstance(arguments, dict) else {}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def embedded(picture: Image.Image, format: str = "PNG", **options: Any) -> str:
    """A picture as a `data:` address.

    Args:
        picture: mode L or RGB.
        format: PNG or GIF.
        options: of Pillow's `save`.
    """
    file = io.BytesIO()
    picture.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _embedded_file(path: Path) -> str | None:
    """A picture file as a `data:` address; None, with a warning, if it cannot be read."""
    try:
        read_picture(path)
        content = read_bytes(path, MAX_PICTURE_BYTES)
    except FileError as error:
        print(f"warning: skipping a picture: {error}", file=sys.stderr)
        return None
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(content).decode()}"
