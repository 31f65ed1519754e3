"""Report an evaluation: a table on the screen, `report.json`, and `report.md` with pictures and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.data.transforms import filled_rows
from mnist_diffusion.evaluation.draw import Sample
from mnist_diffusion.evaluation.score import Scores
from mnist_diffusion.files import replace_picture, replace_text
from mnist_diffusion.pipelines.card import as_markdown
from mnist_diffusion.plots.curves import figure_of_panels, log_scale, to_picture
from mnist_diffusion.plots.grids import image_grid
from mnist_diffusion.plots.tables import markdown, screen_table

IMAGES_PER_ROW = 10
COLUMNS: Mapping[str, tuple[str, str]] = {
    "name": ("images", "{}"),
    "nfe_per_image": ("NFE", "{:g}"),
    "num_images": ("count", "{}"),
    "accuracy": ("class accuracy", "{:.2%}"),
    "fid": ("FID", "{:.3f}"),
    "fid_standard_error": ("± s.e.", "{:.3f}"),
    "fid_ratio": ("ratio to floor", "{:.1f}"),
    "thousand_kernel_distance": ("1000 KID", "{:.2f}"),
    "imagenet_fid": ("ImageNet FID", "{:.2f}"),
    "precision": ("precision", "{:.1%}"),
    "recall": ("recall", "{:.1%}"),
    "density": ("density", "{:.2f}"),
    "coverage": ("coverage", "{:.1%}"),
    "copied_share": ("copies", "{:.1%}"),
    "broken_share": ("broken", "{:.1%}"),
    "odd_shape_share": ("odd shapes", "{:.1%}"),
    "seconds": ("seconds", "{:.0f}"),
}
"""The heading of each metric in a table, and its format."""


def _format(pattern: str, value: Any) -> str:
    return "" if value is None else pattern.format(value)


ON_SCREEN = (
    *("name", "nfe_per_image", "accuracy", "fid", "fid_standard_error"),
    *("fid_ratio", "precision", "recall", "broken_share"),
)


def cells(report: Mapping[str, Any], columns: Sequence[str] = tuple(COLUMNS)) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the results table, without empty columns.

    The first row is the floor: held-out real images, as many as the first result has. Then one row per result.
    """
    first = report["results"][0]
    floor = {name: first.get(f"{name}_floor") for name in (*COLUMNS, "kernel_distance")}
    floor |= {"name": "held-out real images", "fid_ratio": 1.0}
    rows = [row | {"thousand_kernel_distance": 1000 * row["kernel_distance"]} for row in (floor, *report["results"])]
    used = {name: COLUMNS[name] for name in columns if any(row.get(name) is not None for row in rows)}
    table = [[_format(pattern, row.get(name)) for name, (_, pattern) in used.items()] for row in rows]
    return [heading for heading, _ in used.values()], table


def print_table(report: Mapping[str, Any], console: Console) -> None:
    """Show the results on the screen."""
    console.print(f"{report['source']} against {report['data']['source']}", markup=False, soft_wrap=True)
    console.print(screen_table(*cells(report, ON_SCREEN)))
    for warning in _warnings(report):
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def card_text(report: Mapping[str, Any]) -> str:
    """The results for the card of a pipeline folder."""
    return "\n".join([markdown(*cells(report)), "", *(f"- {text}" for text in _explanations(report))])


def write_report(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Image.Image]], folder: Path) -> None:
    """Write `report.json`, and `report.md` with its pictures.

    Args:
        report: the results and what they were measured with.
        pictures: of each result, by kind.
        folder: where to; it must exist.
    """
    replace_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    lines = [f"# {as_markdown(report['source'])}", "", card_text(report)]
    for plot, (name, settings) in PLOTS.items():
        if (figure := plot_results(report["results"], name, settings)) is not None:
            replace_picture(to_picture(figure), folder / f"{plot}.png")
            lines += ["", f"![{plot.replace('_', ' ')}]({plot}.png)"]
    for index, (result, grids) in enumerate(zip(report["results"], pictures, strict=True)):
        lines += ["", f"## {as_markdown(result['name'])}", ""]
        for kind, grid in grids.items():
            replace_picture(grid, folder / f"{kind}-{index}.png")
            lines += [f"![{kind}]({kind}-{index}.png)", "", f"*{CAPTIONS[kind]}*", ""]
        if "class_accuracy" in result:
            lines += [_class_table(result)]
    replace_text(folder / "report.md", "\n".join(lines) + "\n")


CAPTIONS = {
    "samples": "The first images, one row per class.",
    "misclassified": "Images that the evaluator classifies as another class.",
    "nearest": "The images most like a copy, each above the training image nearest to it.",
}


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """Caveats of the measurement, then those of the results, each once."""
    return [*report["warnings"], *sorted({warning for result in report["results"] for warning in result["warnings"]})]


def _explanations(report: Mapping[str, Any]) -> list[str]:
    evaluator, data = report["evaluator"], report["data"]
    return [
        f"Data: {data['source']}, fingerprint `{data['fingerprint'][:16]}`; reference: {data['num_train_images']} "
        "training images, in the class proportions of the images evaluated; floor: as many held-out images.",
        f"Evaluator: {evaluator['origin']}, SHA-256 `{evaluator['sha256'][:16]}`, classifies "
        f"{evaluator['accuracy']:.2%} of the held-out images correctly.",
        "FID and KID are Fréchet and kernel distance in this evaluator's features, not ImageNet's: compare them "
        "only at the same evaluator and number of images.",
        f"Seed {report['seed']}; {report['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        *[f"**Warning:** {warning}" for warning in _warnings(report)],
    ]


def _class_table(result: Mapping[str, Any]) -> str:
    table = []
    for name, share in result["class_accuracy"].items():
        correct, low, high = (_format("{:.1%}", share[each]) for each in ("accuracy", "low", "high"))
        real = _format("{:.1%}", result["class_accuracy_floor"][name]["accuracy"])
        distances = (_format("{:.3f}", result[each][name]) for each in ("class_fid", "class_fid_floor"))
        table.append([name, correct, f"{low} to {high}", real, *distances])
    headings = ["class", "class accuracy", "95% interval", "held-out accuracy", "FID", "held-out FID"]
    return markdown(headings, table)


def result_pictures(sample: Sample, data: ImageData, scored: Scores) -> dict[str, Image.Image]:
    """The pictures of a result, by kind: its first images, misclassified ones if there are any, and possible copies."""
    images, pictures = sample.images.float() / 255, {}
    if sample.labels is None:
        pictures["samples"] = image_grid(images[: IMAGES_PER_ROW**2], IMAGES_PER_ROW)
    else:
        names = data.class_names[:20]
        rows = [images[sample.labels == label] for label in range(len(names))]
        pictures["samples"] = image_grid(filled_rows(rows, IMAGES_PER_ROW), IMAGES_PER_ROW, row_labels=names)
        wrong = torch.nonzero(scored.predicted != sample.labels).flatten()[: 5 * IMAGES_PER_ROW]
        if len(wrong):
            pictures["misclassified"] = image_grid(images[wrong], IMAGES_PER_ROW)
    first = np.argsort(scored.nearest.relative)[:IMAGES_PER_ROW]
    nearest = data.train.images[torch.from_numpy(scored.nearest.indices[first])].float() / 255
    pairs = torch.cat([images[scored.checked[first]], nearest])
    pictures["nearest"] = image_grid(pairs, len(first), row_labels=["generated", "nearest"])
    return pictures


PLOTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "quality_against_nfe": ("nfe_per_image", {"scheduler": "{}", "guidance_scale": "guidance {:g}"}),
    "guidance": ("guidance_scale", {"scheduler": "{}", "num_inference_steps": "{} steps"}),
}
"""For each plot, the metric on its x axis, and the settings that distinguish its lines, with formats for the legend."""


VARIED = {"pipeline": "{}", "guidance": "{}", "guidance_interval": "{0[0]:g} to {0[1]:g}"}
"""Settings that a legend names where they differ."""


def plot_results(results: Sequence[Mapping[str, Any]], across: str, settings: Mapping[str, str]) -> Figure | None:
    """FID, class accuracy, and one against the other; a line for each pipeline and each combination of settings.

    Args:
        results: of a report.
        across: the metric on the x axis; without two different values there is no plot.
        settings: by name, with their formats for the legend.
    """
    results = [result for result in results if result.get(across) is not None]
    if len({result[across] for result in results}) < 2:
        return None
    several = {name for name in VARIED if len({str(result.get(name)) for result in results}) > 1}
    spelled = {**{name: pattern for name, pattern in VARIED.items() if name in several}, **settings}
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        texts = [_format(pattern, result.get(name)) for name, pattern in spelled.items()]
        lines.setdefault(", ".join(filter(None, texts)), []).append(result)
    label = across.replace("_", " ").replace("nfe", "NFE")
    figure, (left, right, both) = figure_of_panels(1, 3, title=f"Quality by {label}", height=3.6)
    for name, chosen in lines.items():
        chosen.sort(key=lambda result: float(result[across]))
        xs, fid, errors = ([result[each] for result in chosen] for each in (across, "fid", "fid_standard_error"))
        left.errorbar(xs, fid, yerr=errors, marker="o", label=name)
        if all(result["accuracy"] is not None for result in chosen):
            shares = [100 * result["accuracy"] for result in chosen]
            right.plot(xs, shares, marker="o")
            both.plot(shares, fid, marker="o")
            for place in zip(xs, shares, fid, strict=True):
                both.annotate(f"{place[0]:g}", place[1:], xytext=(3, 3), textcoords="offset points", fontsize="x-small")
    left.axhline(results[0]["fid_floor"], color="grey", linestyle=":", label="real images")
    left.set(xlabel=label, ylabel="FID (lower is better)")
    right.set(xlabel=label, ylabel="class accuracy, % (higher is better)")
    both.set(xlabel="class accuracy, %", ylabel=f"FID; beside each point its {label}")
    log_scale(left)
    if across == "nfe_per_image":
        log_scale(left, "x")
        log_scale(right, "x")
    if results[0]["accuracy"] is not None:
        right.axhline(100 * results[0]["accuracy_floor"], color="grey", linestyle=":")
        both.plot(100 * results[0]["accuracy_floor"], results[0]["fid_floor"], "*", color="grey", label="real images")
    log_scale(both)
    left.legend(fontsize="small")
    return figure
