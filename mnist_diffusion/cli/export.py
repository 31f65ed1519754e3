"""`mnist-diffusion export`: export a pipeline's network to ONNX, checked against the original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.option_types import STRICT, FilePath, Place


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Export a pipeline's network to ONNX (extra `onnx`)."""

    pipeline: Place | None = None
    """Pipeline folder, run folder, or Hub id such as user/name; runs/latest if omitted, or else the shipped model."""
    out: FilePath = Path("onnx")
    """Output folder."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Export, and print the inputs of the network."""
    options: Options = Parser(Options, "pipeline", prog=prog).read(argv)
    from mnist_diffusion.pipelines.drawing import load_pipeline
    from mnist_diffusion.pipelines.onnx import example_inputs, export_onnx

    pipeline = load_pipeline(options.pipeline, device="cpu")
    path = export_onnx(pipeline, options.out)
    inputs = ", ".join(f"{name} {list(value.shape)}" for name, value in example_inputs(pipeline, 1).items())
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB), for any number of images; its inputs: {inputs}")
    return 0
