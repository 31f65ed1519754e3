"""Build the studio: the networks, the plans of their samplers, and ONNX Runtime Web."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_diffusion.demo.studio.plans import sampler_plan
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_bytes, replace_bytes, replace_text
from mnist_diffusion.pipelines.drawing import class_names
from mnist_diffusion.pipelines.onnx import export_onnx
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline

HERE = Path(__file__).parent
PAGE = ("index.html", "studio.css", "studio.js")
RUNTIME = "onnxruntime-web@1.22.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page loads of it: the build for CPUs, which runs everywhere."""
MAX_RUNTIME_BYTES, MAX_PACKAGE_BYTES, MAX_NETWORK_BYTES = 2**26, 2**28, 2**31
TEACHER_STEPS, STUDENT_STEPS = [2, 3, 4, 5, 6, 8, 10, 15, 20], [1, 2, 4, 8]


def write_studio(
    pipelines: Mapping[str, MNISTDiffusionPipeline], folder: Path, *, title: str, runtime: Path | None = None
) -> None:
    """Write a folder that any server of static files serves as it is.

    Args:
        pipelines: class-conditional, in float32 on the CPU, by the names that the page shows; the first is shown first.
        folder: made if it does not exist.
        title: of the page.
        runtime: the `dist` folder of the npm package `onnxruntime-web`; fetched with npm if omitted.

    Raises:
        UserError: a pipeline is unconditional, they do not sample the same classes, or the runtime cannot be fetched.
        UserError: a network or a sampler could not be exported.
    """
    first = next(iter(pipelines.values()))
    for name, pipeline in pipelines.items():
        if pipeline.num_classes is None:
            raise UserError(f"{name} is unconditional, but the page lets visitors choose a class")
        if (pipeline.image_shape, class_names(pipeline)) != (first.image_shape, class_names(first)):
            raise UserError(f"{name} draws other images or classes than {next(iter(pipelines))}")
    models = [_model(pipeline, name, f"{index}.onnx") for index, (name, pipeline) in enumerate(pipelines.items())]
    files = _runtime_files(runtime)
    for model, pipeline in zip(models, pipelines.values(), strict=True):
        with tempfile.TemporaryDirectory() as temporary:
            content = read_bytes(export_onnx(pipeline, Path(temporary)), MAX_NETWORK_BYTES)
        files[model["file"]] = content
    settings = {
        "title": title,
        "names": class_names(first),
        "shape": first.image_shape,
        "num_train_timesteps": first.scheduler.config.num_train_timesteps,
        "models": models,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_bytes(folder / name, content)
    replace_text(folder / "settings.json", json.dumps(settings))
    for name in PAGE:
        replace_bytes(folder / name, read_bytes(HERE / name, MAX_RUNTIME_BYTES))


def _model(pipeline: MNISTDiffusionPipeline, name: str, file: str) -> dict[str, Any]:
    """The settings of a network that the page needs."""
    config, scales = pipeline.config, list(pipeline.config.guidance_distilled or ())
    own, available = config.num_inference_steps, pipeline.scheduler.config.num_train_timesteps
    counts = sorted({own, *(count for count in (STUDENT_STEPS if scales else TEACHER_STEPS) if count <= available)})
    return {
        "name": name,
        "file": file,
        "null_class": pipeline.null_class,
        "scale": config.guidance_scale,
        "scales": scales or None,
        "interval": list(config.guidance_interval),
        "steps": own,
        "plans": {count: sampler_plan(pipeline, count) for count in counts},
    }


def _runtime_files(folder: Path | None) -> dict[str, bytes]:
    """The files of ONNX Runtime Web, by name."""
    if folder is not None:
        if missing := [name for name in RUNTIME_FILES if not (folder / name).is_file()]:
            raise UserError(f"runtime={str(folder)!r} has no {', '.join(missing)}; name the package's `dist` folder")
        return {name: read_bytes(folder / name, MAX_RUNTIME_BYTES) for name in RUNTIME_FILES}
    if (npm := shutil.which("npm")) is None:
        raise UserError(f"npm is needed to fetch {RUNTIME}; install it, or set --runtime to the package's `dist`")
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", RUNTIME, "--silent", "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=temporary)
        archives = list(Path(temporary).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = " ".join(done.stderr.split())[-300:]
            raise UserError(f"npm could not fetch {RUNTIME}: {reason}; or pass its `dist` folder as --runtime")
        with tarfile.open(fileobj=io.BytesIO(read_bytes(archives[0], MAX_PACKAGE_BYTES))) as package:
            return {name: package.extractfile(f"package/dist/{name}").read() for name in RUNTIME_FILES}  # type: ignore[union-attr]
