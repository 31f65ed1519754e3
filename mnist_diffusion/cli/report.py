"""`mnist-diffusion report`: show one run, or compare several, on one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.option_types import STRICT, FilePath


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Show a run on one HTML page: samples, scores, curves, configuration; or compare several.

    Scores are those of the run's card: `mnist-diffusion evaluate RUN --write_card` puts them there.
    """

    runs: tuple[FilePath, ...]
    """Run folders; one is shown in full, several are compared."""
    out: FilePath = Path("report.html")
    """HTML file to write."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write the HTML page."""
    options: Options = Parser(Options, "runs", prog=prog).read(argv)
    from mnist_diffusion.files import replace_text
    from mnist_diffusion.plots.run_page import by_name, comparison_page, run_page
    from mnist_diffusion.training.run_folder import read_run

    runs = [read_run(folder) for folder in options.runs]
    html = run_page(runs[0]) if len(runs) == 1 else comparison_page(by_name(runs))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, html)
    print(f"{options.out} ({len(html) / 1e6:.1f} MB); open it in a browser")
    return 0
