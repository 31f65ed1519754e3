"""`mnist-diffusion studio`: write a page that draws with a pipeline in the visitor's browser, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser, parse


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write the page, and say how to look at it."""
    parser = Parser(
        prog=prog,
        description="Write a static page that draws with a pipeline in the visitor's browser (extra `onnx`).",
        epilog="The folder is what a server of static files, or a static Space, serves as it is.",
    )
    parser.add_argument("pipeline", type=str, help="a pipeline folder, or a Hub id such as user/name")
    parser.add_argument("--student", type=str, default=None, help="also one distilled from it, which is shown first")
    parser.add_argument("--out", type=Path, default=Path("studio"), help="the folder to write to")
    parser.add_argument("--title", type=str, default="Studio", help="of the page")
    parser.add_argument(
        "--runtime", type=Path, default=None, help="the `dist` folder of onnxruntime-web; npm fetches it if omitted"
    )
    values = parse(parser, argv)
    from mnist_diffusion.diffusion.pipeline import load_pipeline
    from mnist_diffusion.studio.build import write_studio

    sources = {"In few passes": values.student, "Step by step": values.pipeline}
    pipelines = {name: load_pipeline(source, device="cpu") for name, source in sources.items() if source is not None}
    write_studio(pipelines, values.out, title=values.title, runtime=values.runtime)
    size = sum(path.stat().st_size for path in values.out.iterdir()) / 1e6
    print(f"The page is in {values.out} ({size:.1f} MB). Look at it with:\n")
    print(f"    python -m http.server --bind 127.0.0.1 --directory {values.out}\n\nand http://127.0.0.1:8000")
    return 0
