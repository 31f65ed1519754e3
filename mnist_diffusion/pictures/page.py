"""A run on one page of HTML that needs no other file."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from mnist_diffusion.errors import FileError
from mnist_diffusion.files import MAX_PICTURE_BYTES, file_within, read_bytes, read_picture, read_text
from mnist_diffusion.pictures import plots
from mnist_diffusion.run_folder.read import RunRecord
from mnist_diffusion.sharing.card import CARD, parse_card

TEMPLATE = Path(__file__).parents[1] / "run_page.html"
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
"""Values of a summary, and what the page calls them."""


def run_page(run: RunRecord) -> str:
    """A run's samples, figures, curves, pictures and configuration as HTML; all words from the run are escaped.

    Raises:
        FileError: the configuration could not be read.
    """
    pipelines = run.pipelines()
    pictures = sorted((run.folder / "pictures").glob("*.[pg][ni][gf]"))
    shown = [(_title(path), _embedded_file(path)) for path in pictures if path.stem != "training_curves"]
    finished = run.summary.get("finished")
    values = {
        "name": run.name,
        "state": f"A run of mnist-diffusion, {'finished' if finished else 'not finished'}.",
        "samples": embedded(run.sheets[-1].picture) if run.sheets else None,
        "usage": _usage(run) if "pipeline" in pipelines else None,
        "measured": _measured(pipelines["pipeline"]) if "pipeline" in pipelines else [],
        "facts": [
            (words, _short(run.summary[key])) for key, words in FACTS.items() if run.summary.get(key) is not None
        ],
        "curves": embedded(plots.to_picture(plots.training_curves(run.lines, title="Training"))),
        "pictures": [(title, picture) for title, picture in shown if picture is not None],
        "config": read_text(run.folder / "config.yaml"),
    }
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(read_text(TEMPLATE))
    return page.render(values)


def _title(path: Path) -> str:
    return path.stem.replace("_", " ") + (", moving" if path.suffix == ".gif" else "")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _usage(run: RunRecord) -> str:
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({f'{run.name}/pipeline'!r}, trust_remote_code=True)\n"
        'pipeline().images[0].save("sample.png")'
    )


def _measured(pipeline: Path) -> list[tuple[str, str, str]]:
    """What the card of a pipeline says was measured: the settings, the figure and its value."""
    try:
        card = parse_card(read_text(file_within(pipeline, CARD)))
    except FileError as error:
        print(f"warning: what was measured is left out: {error}", file=sys.stderr)
        return []
    results = getattr(card.data, "eval_results", None) or []
    return [(_settings(each.metric_args), str(each.metric_name), _short(each.metric_value)) for each in results]


def _settings(arguments: Any) -> str:
    values = arguments if isinstance(arguments, dict) else {}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def embedded(picture: Image.Image, format: str = "PNG", **options: Any) -> str:
    """A picture as an address (`data:`) that holds it.

    Args:
        picture: mode L or RGB.
        format: PNG or GIF.
        options: of Pillow's `save`.
    """
    file = io.BytesIO()
    picture.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _embedded_file(path: Path) -> str | None:
    """A picture of a run as it is, so that it moves; None, with a warning, if it cannot be read."""
    try:
        read_picture(path)
        content = read_bytes(path, MAX_PICTURE_BYTES)
    except FileError as error:
        print(f"warning: a picture is left out: {error}", file=sys.stderr)
        return None
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(content).decode()}"
