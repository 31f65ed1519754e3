"""Export a network to ONNX, which runs faster than torch on a CPU, and in browsers."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_diffusion.errors import UserError
from mnist_diffusion.files import replace_bytes
from mnist_diffusion.method.network import PatchedUNet
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline

FILE = "model.onnx"
TOLERANCE = 1e-4


def export_onnx(pipeline: MNISTDiffusionPipeline, folder: Path) -> Path:
    """Write `model.onnx`, checked against the network.

    Its inputs, for any number B of images: `sample`, float32 `[B, C, H, W]` noisy images; `timestep`, float32 `[B]`;
    and for a class-conditional network `class_labels`, int64 `[B]`; the highest label is the null class. Its output is
    `prediction`, float32 `[B, C, H, W]`. Patches are cut and put together inside.

    Args:
        pipeline: in float32 on the CPU.
        folder: output folder, created if missing.

    Returns:
        The file.

    Raises:
        UserError: the extra is not installed, or the export computes something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"exporting needs {error.name}; pip install 'mnist-diffusion[onnx]'") from error
    network = PatchedUNet(pipeline.unet, pipeline.config.patch_size).eval()
    inputs = example_inputs(pipeline, 2)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=["prediction"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    assert program is not None  # as no file is named
    for node in (model := program.model_proto).graph.node:
        del node.metadata_props[:]  # paths of this installation
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        inputs = example_inputs(pipeline, count)
        [output] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            expected = network(*inputs.values())[0].numpy()
        if not np.allclose(output, expected, rtol=0, atol=TOLERANCE):
            apart = float(np.abs(output - expected).max())
            raise UserError(f"the exported network differs by up to {apart:.2g}, more than {TOLERANCE:g}")
    folder.mkdir(parents=True, exist_ok=True)
    replace_bytes(folder / FILE, content)
    return folder / FILE


def example_inputs(pipeline: MNISTDiffusionPipeline, count: int) -> dict[str, Tensor]:
    """Inputs of the network by name, for `count` images: noise at all levels, of all classes."""
    timesteps = torch.linspace(0, pipeline.scheduler.config.num_train_timesteps - 1, count).round()
    noise = torch.randn(count, *pipeline.image_shape, generator=torch.Generator().manual_seed(count))
    inputs = {"sample": noise, "timestep": timesteps}
    if pipeline.null_class is not None:
        inputs["class_labels"] = torch.linspace(0, pipeline.null_class, count).long()
    return inputs
