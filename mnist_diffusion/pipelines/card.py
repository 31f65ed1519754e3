"""The model card: rendered from measured values, and updated with evaluation results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from mnist_diffusion.errors import FileError
from mnist_diffusion.files import file_within, read_text, replace_text
from mnist_diffusion.option_types import AUTOGUIDANCE

CARD, PICTURE, REPO_PLACEHOLDER = "README.md", "samples.png", "this-folder-or-repository"
CARD_TEMPLATE = Path(__file__).parents[1] / "model_card.md"
SHORT_CARD = Path(__file__).parents[1] / "short_card.md"
SECTION_START, SECTION_END = "<!-- evaluation -->", "<!-- end of evaluation -->"
CARD_METRICS = {
    "accuracy": "Class accuracy",
    "fid": "Fréchet distance in the evaluator's features",
    "fid_floor": "Fréchet distance of as many held-out images",
    "precision": "Precision",
    "recall": "Recall",
}
SETTINGS = ("scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "guidance", "num_images")
"""Sampling settings listed beside a metric."""


def as_markdown(text: str) -> str:
    """Escape text for Markdown, so that it starts no link, image, HTML or table cell."""
    return re.sub(r"([\\`<>\[\]|])", r"\\\1", text)


def render_card(values: Mapping[str, Any], *, template: Path = CARD_TEMPLATE) -> ModelCard:
    """Render the model card; values of None are left out."""
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=values.get("pipeline_tag", "unconditional-image-generation"),
        tags=values.get("tags", ["diffusion"]),
        datasets=values.get("datasets"),
    )
    return ModelCard.from_template(data, template_path=str(template), **values)


def parse_card(text: str) -> ModelCard:
    """Parse a card and its metadata.

    Raises:
        FileError: its metadata could not be read.
    """
    try:
        return ModelCard(text)
    except (YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileError(f"the metadata at the top of {CARD} could not be read: {reason}") from error


def write_results_to_card(folder: Path, report: Mapping[str, Any], text: str) -> None:
    """Write evaluation results into the card of a pipeline folder, as metadata and as text, replacing earlier ones.

    Args:
        folder: the pipeline folder.
        report: the content of an evaluation's report.json.
        text: Markdown for the card's section on evaluation.

    Raises:
        FileError: the card could not be read.
    """
    path = folder / CARD
    content = read_text(file_within(folder, CARD)).replace("\r\n", "\n")
    if "\ufffd" in content:  # which would be written back
        raise FileError(f"{path} is not UTF-8")
    rules = [str(result.get("guidance")).removeprefix(AUTOGUIDANCE) for result in report["results"]]
    paths = local_paths([report["data"].get("source_id"), report.get("evaluator", {}).get("origin"), *rules])
    before, _, rest = content.partition(SECTION_START)
    _, end, after = rest.partition(SECTION_END)
    if not end:
        before, after = f"{content}\n## Evaluation\n\n", "\n"
    section = redact_paths(text, paths)
    card = parse_card(f"{before}{SECTION_START}\n{section}\n{SECTION_END}{after}")
    measured = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=report["data"]["hub_id"] or report["data"]["fingerprint"][:16],
            dataset_name=redact_paths(report["data"]["source"], paths),
            metric_type=metric,
            metric_name=name,
            metric_value=round(result[metric], 5),
            metric_args={key: redact_paths(result[key], paths) for key in SETTINGS if result.get(key) is not None},
        )
        for result in report["results"]
        for metric, name in CARD_METRICS.items()
        if result.get(metric) is not None
    ]
    place = folder.resolve()
    name = place.parent.name if place.name in ("pipeline", "pipeline_best") else place.name
    vars(card.data).update(model_name=name, eval_results=measured)
    replace_text(path, str(parse_card(str(card))))  # parsed again with a safe loader


def local_paths_in(config: Any) -> list[str]:
    """The paths of this machine in a run's configuration, in every spelling; not the names of Hub repositories."""
    sections = config if isinstance(config, dict) else {}
    fields = (("data", "source"), ("distillation", "teacher"), ("train", "init_from"))
    return local_paths(values.get(name) for part, name in fields if isinstance(values := sections.get(part), dict))


def local_paths(values: Iterable[Any]) -> list[str]:
    """The paths among some values, in every spelling, the longest first."""
    paths: set[str] = set()
    for each in values:
        value = each if isinstance(each, str) else ""
        path = Path(value).expanduser()
        is_path = len(path.parts) != 2 or value.startswith((".", "~", "/")) or path.exists()
        if is_path and len(path.parts) > 1 + path.is_absolute():
            paths |= {value, str(path), str(path.resolve())}
    return sorted(paths, key=len, reverse=True)


def redact_paths(value: Any, paths: Sequence[str]) -> Any:
    """Replace paths in a text by their last part; other values stay."""
    for path in paths if isinstance(value, str) else ():
        value = value.replace(path, Path(path).name)
    return value


def short_card(num_classes: int | None) -> str:
    """A card for a pipeline that has none."""
    call = "pipeline()" if num_classes is None else "pipeline(class_labels=[0])"
    return read_text(SHORT_CARD).format(anywhere=REPO_PLACEHOLDER, call=call)


def card_for(text: str, repo_id: str) -> str:
    """The card with its code examples loading a repository."""
    text = re.sub(r'from_pretrained\("[^"\n]*"', f'from_pretrained("{repo_id}"', text)
    return re.sub(r"(mnist-diffusion evaluate )\S+", rf"\g<1>{repo_id}", text).replace(REPO_PLACEHOLDER, repo_id)
