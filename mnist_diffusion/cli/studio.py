"""`mnist-diffusion studio`: write a page that samples in the visitor's browser, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.option_types import STRICT, FilePath, Place, Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Write a static page that samples in the visitor's browser (extra `onnx`).

    Any static web server, or a static Space, can serve the folder.
    """

    pipeline: Place | None = None
    """Pipeline folder, run folder, or Hub id such as user/name; runs/latest if omitted, or else the shipped model."""
    student: Place | None = None
    """Distilled student pipeline; listed first."""
    out: FilePath = Path("studio")
    """Output folder."""
    title: Text = "Studio"
    """Page title."""
    runtime: FilePath | None = None
    """The `dist` folder of onnxruntime-web; downloaded with npm if omitted."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Write the page, and print how to open it."""
    options: Options = Parser(Options, "pipeline", prog=prog).read(argv)
    from mnist_diffusion.demo.studio.build import write_studio
    from mnist_diffusion.pipelines.drawing import default_sources, load_pipeline

    teacher, *students = default_sources() if options.pipeline is None else (options.pipeline,)
    student = options.student or next(iter(students), None)
    sources = {"One step or a few": student, "Step by step": teacher}
    pipelines = {name: load_pipeline(source, device="cpu") for name, source in sources.items() if source is not None}
    write_studio(pipelines, options.out, title=options.title, runtime=options.runtime)
    size = sum(path.stat().st_size for path in options.out.iterdir()) / 1e6
    print(f"The page is in {options.out} ({size:.1f} MB). Open it with:\n")
    print(f"    python -m http.server --bind 127.0.0.1 --directory {options.out}\n\nand http://127.0.0.1:8000")
    return 0
