"""Plots: numbers in, matplotlib figures out, in colours that the colour-blind can tell apart."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image
from scipy.ndimage import uniform_filter1d

if TYPE_CHECKING:
    from mnist_diffusion.method.noise import NoisingProcess

# Okabe and Ito (2008), https://jfly.uni-koeln.de/color/, black first.
PALETTE = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
LINE_STYLES = ("-", "--", ":", "-.")
DPI, MANY_TICKS = 100, 500

Lines = Sequence[Mapping[str, Any]]
"""The lines of a run's `metrics.jsonl`."""


def figure_of_panels(rows: int, columns: int, *, title: str, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure with a title and a grid of empty panels, row by row, in the package's colours."""
    figure = Figure(figsize=(4.5 * columns, height * rows), layout="constrained")
    figure.suptitle(title)
    panels = list(np.asarray(figure.subplots(rows, columns)).flatten())
    for panel in panels:
        panel.set_prop_cycle(cycler(color=PALETTE))
        panel.grid(alpha=0.25)
    return figure, panels


def to_picture(figure: Figure) -> Image.Image:
    """The figure as an image, for trackers and sheets."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may hold a dollar
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return Image.open(buffer).convert("RGB")


def log_scale(panel: Axes, axis: str = "y") -> None:
    """Make an axis logarithmic once its lines are drawn, with ticks that can be read: 0.03, not 3 x 10^-2."""
    (panel.set_xscale if axis == "x" else panel.set_yscale)("log")
    ticks = panel.xaxis if axis == "x" else panel.yaxis
    low, high = ticks.get_view_interval()
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if high < MANY_TICKS * low else (1,)))
    ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _series(lines: Lines, name: str, across: str = "step") -> tuple[list[float], list[float]]:
    """The steps (or epochs) at which a value was measured, and its values there."""
    points = [(line[across], line[name]) for line in lines if line.get(name) is not None]
    return [place for place, _ in points], [value for _, value in points]


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Means over a window of about a fiftieth of the values."""
    return np.asarray(uniform_filter1d(np.asarray(values, dtype=float), 1 + 2 * (len(values) // 100)))


def training_curves(lines: Lines, *, title: str = "Training") -> Figure:
    """Loss, loss by noise level (or gradient norm where there are no levels), learning rate, images per second."""
    figure, (losses, levels, rates, speeds) = figure_of_panels(2, 2, title=title)
    steps, values = _series(lines, "loss")
    losses.plot(steps, values, color="0.8", linewidth=0.8, label="each step")
    losses.plot(steps, _smoothed(values), label="smoothed")
    held_steps, held_out = _series(lines, "held_out_loss")
    if held_out:
        losses.plot(held_steps, held_out, "o--", color=PALETTE[4], label="held out, averaged weights")
    losses.set(xlabel="step", ylabel="loss")
    log_scale(losses)
    losses.legend(fontsize="small")
    _plot_levels(figure, levels, lines)
    rates.plot(*_series(lines, "learning_rate"))
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    speeds.plot(*_series(lines, "images_per_second"), marker=".")
    speeds.set(xlabel="step", ylabel="training images per second", ylim=(0, None))
    return figure


def _plot_levels(figure: Figure, axes: Axes, lines: Lines) -> None:
    steps, measured = _series(lines, "loss_by_noise")
    if not measured:
        axes.plot(*_series(lines, "grad_norm"), linewidth=0.8)
        axes.set(xlabel="step", ylabel="norm of the gradient")
        log_scale(axes)
        return
    levels, colours = np.array(measured, dtype=float).T, matplotlib.colormaps["viridis"]  # None becomes NaN
    for level, values in enumerate(levels):
        colour = colours(level / (len(levels) - 1))
        axes.plot(steps, values, color=colour, marker="." if len(steps) < 10 else None)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 100), colours)
    figure.colorbar(scale, ax=axes, label="timestep, % of all (100 is noise)")
    axes.set(xlabel="step", ylabel="loss, by noise level")
    log_scale(axes)


def compared_curves(groups: Sequence[Mapping[str, Lines]], *, title: str = "Runs compared") -> Figure:
    """Smoothed loss, held-out loss and, where it was measured on the way, Fréchet distance of several runs.

    Args:
        groups: runs by their names, those whose losses compare together; each group has a row of its own.
        title: of the figure.
    """
    measured = any(line.get("fid") is not None for runs in groups for lines in runs.values() for line in lines)
    names = ["loss", "held_out_loss", *(["fid"] if measured else [])]
    labels = {"loss": "loss, smoothed", "held_out_loss": "held-out loss", "fid": "FID (evaluator's features)"}
    figure, panels = figure_of_panels(len(groups), len(names), title=title, height=3.4)
    for (group, name), panel in zip(itertools.product(groups, names), panels, strict=True):
        for index, (run, lines) in enumerate(group.items()):
            epochs, values = _series(lines, name, "epoch")
            series = _smoothed(values) if name == "loss" else values
            style = LINE_STYLES[index % len(LINE_STYLES)]
            panel.plot(epochs, series, style, marker=None if name == "loss" else ".", label=run)
        panel.set(xlabel="epoch", ylabel=labels[name])
        log_scale(panel)
        if name == names[0]:
            panel.legend(fontsize="small")
    return figure


def noise_schedule(process: NoisingProcess) -> Figure:
    """Beta, the share of the image in the variance (alpha bar), and the signal-to-noise ratio, by timestep."""
    figure, (betas, shares, ratios) = figure_of_panels(1, 3, title="Noise schedule")
    alpha_bar = process.alphas_cumprod.double().numpy()
    betas.plot(1 - alpha_bar / np.array([1, *alpha_bar[:-1]]))
    betas.set(xlabel="timestep", ylabel="beta (variance added)")
    log_scale(betas)
    shares.plot(alpha_bar)
    shares.set(xlabel="timestep", ylabel="alpha bar (share of the image)")
    with np.errstate(divide="ignore"):
        ratios.plot(10 * np.log10(alpha_bar / (1 - alpha_bar)))
    ratios.set(xlabel="timestep", ylabel="signal-to-noise ratio, dB")
    ratios.axhline(0, color="0.6", linewidth=0.8)
    return figure
