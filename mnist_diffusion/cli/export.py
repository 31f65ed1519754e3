"""`mnist-diffusion export`: write a pipeline's network for ONNX Runtime, checked against the original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser, parse


def main(argv: Sequence[str], *, prog: str) -> int:
    """Export, and say how to run it."""
    parser = Parser(prog=prog, description="Write a pipeline's network for ONNX Runtime (extra `onnx`).")
    parser.add_argument("pipeline", type=str, help="a pipeline folder, or a Hub id such as user/name")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="the format")
    parser.add_argument("--out", type=Path, default=Path("onnx"), help="the folder to write to")
    values = parse(parser, argv)
    from mnist_diffusion.diffusion.onnx import example_inputs, export_onnx
    from mnist_diffusion.diffusion.pipeline import load_pipeline

    pipeline = load_pipeline(values.pipeline, device="cpu")
    path = export_onnx(pipeline, values.out)
    inputs = ", ".join(f"{name} {list(value.shape)}" for name, value in example_inputs(pipeline, 1).items())
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB), for any number of images; its inputs: {inputs}")
    return 0
