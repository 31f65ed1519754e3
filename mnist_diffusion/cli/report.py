"""`mnist-diffusion report`: show a run on one page of HTML that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser, parse


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write the page."""
    parser = Parser(
        prog=prog,
        description="Show a run on one page of HTML: samples, figures, curves, pictures, configuration.",
        epilog="Figures are those of its card: `mnist-diffusion evaluate PIPELINE --write_card` puts them there.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file to write")
    values = parse(parser, argv)
    from mnist_diffusion.files import replace_text
    from mnist_diffusion.pictures.page import run_page
    from mnist_diffusion.run_folder.read import read_run

    page = run_page(read_run(values.run))
    values.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(values.out, page)
    print(f"{values.out} ({len(page) / 1e6:.1f} MB) shows the run; open it in a browser")
    return 0
