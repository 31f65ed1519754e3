"""Read pipeline folders that others may have made: JSON and safetensors, checked first, running no code."""

from __future__ import annotations

import inspect
import math
import re
import struct
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mnist_diffusion.errors import FileError
from mnist_diffusion.files import (
    MAX_JSON_BYTES,
    MAX_NAME,
    PICKLES,
    file_within,
    is_plain,
    open_file,
    pipeline_folder,
    read_json,
)

MAX_HEADER_BYTES, MAX_CARD_BYTES = 2**22, 2**23
MAX_LEVELS, MAX_LAYERS, MAX_SIDE, MAX_NUMBER, MAX_SCALES = 10, 16, 4096, 100_000, 100
FLOATS = ("BF16", "F16", "F32", "F64")
PIPELINE_CLASS, CODE_STEM = "MNISTDiffusionPipeline", "pipeline_mnist_diffusion"
CODE_FILE = re.compile(rf"{CODE_STEM}(_[0-9a-f]{{12}})?\.py")
"""The pipeline code in a folder, which is named by its content."""
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
UNET_CONFIG, UNET_WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
PIPELINE_FILES = ("model_index.json", SCHEDULER_CONFIG, UNET_CONFIG, UNET_WEIGHTS)
"""The files that make a pipeline folder; no other is read to load one."""
PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path")


def read_unet(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> UNet2DModel:
    """The network of a pipeline folder, from safetensors with the names, shapes and types that its configuration says.

    Args:
        folder: the pipeline folder.
        variant: `fp16` reads `diffusion_pytorch_model.fp16.safetensors`.
        dtype: of the weights.

    Raises:
        FileError: it is invalid.
    """
    unet, path = _empty_unet(folder), file_within(folder, _weights_name(variant))
    require_weights(path, unet)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in load_file(path).items()}
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def _weights_name(variant: str | None) -> str:
    return UNET_WEIGHTS.replace(".safetensors", f".{variant}.safetensors") if variant else UNET_WEIGHTS


def _empty_unet(folder: Path) -> UNet2DModel:
    """The network that `unet/config.json` describes, without memory for its weights; it has been tried on one image."""
    path, values = _read_config(folder, UNET_CONFIG, "UNet2DModel")
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(values.get(name, []), list) or len(values.get(name, [])) > MAX_LEVELS:
            raise FileError(f"{path}: {name} must be a list of at most {MAX_LEVELS}")
    layers = values.get("layers_per_block", 1)
    if not isinstance(layers, int) or layers > MAX_LAYERS:
        raise FileError(f"{path}: layers_per_block must be an integer up to {MAX_LAYERS}, got {layers!r:.100}")
    try:
        with torch.device("meta"), torch.no_grad():
            unet = UNet2DModel.from_config(values)
            size = unet.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            if max(height, width) > MAX_SIDE:
                raise ValueError(f"sample_size must be at most {MAX_SIDE}")
            image = torch.empty(1, unet.config.in_channels, height, width)
            labels = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.long)
            shape = unet.eval()(image, torch.zeros(1), class_labels=labels).sample.shape
    except Exception as error:  # whatever a constructor raises for values that it does not expect
        raise FileError(f"{path} describes no network: {type(error).__name__}: {str(error)[:200]}") from error
    if shape != image.shape:
        raise FileError(f"{path} describes a network that turns {[*image.shape]} into {[*shape]}")
    return unet


def require_weights(path: Path, model: torch.nn.Module) -> None:
    """Make sure, from its header alone, that a safetensors file holds exactly the weights of a model.

    Raises:
        FileError: names, shapes or types differ, or the header is not one.
    """
    with open_file(path) as file:
        size, start = path.stat().st_size, file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if length is None or length > min(MAX_HEADER_BYTES, size - 8):
        claim = "has no header" if length is None else f"claims a header of {length:,} bytes in {size:,}"
        raise FileError(f"{path} is not a safetensors file: it {claim}")
    try:
        with safe_open(path, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  (not a dictionary)
            found = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise FileError(f"{path} is not a safetensors file: {str(error)[:200]}") from error
    wanted = model.state_dict()
    for name in sorted(wanted.keys() ^ found.keys()):
        raise FileError(f"{path} {'lacks' if name in wanted else 'has a'} tensor {name[:200]!r}")
    for name, (shape, dtype) in found.items():
        if shape != tuple(wanted[name].shape):
            asked = tuple(wanted[name].shape)
            raise FileError(f"{path}: {name} has the shape {shape}, but config.json asks for {asked}")
        dtypes = FLOATS if wanted[name].is_floating_point() else ("I64",)
        if dtype not in dtypes:
            raise FileError(f"{path}: {name} is of type {dtype}, not {' or '.join(dtypes)}")


def read_scheduler(folder: Path, class_name: str) -> SchedulerMixin:
    """The scheduler of a folder, which must be diffusers' own class of that name."""
    path, values = _read_config(folder, SCHEDULER_CONFIG, class_name, why=", as in the index")
    made: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if SchedulerMixin not in getattr(made, "__mro__", ()):
        raise FileError(f"{path}: diffusers {diffusers.__version__} has no scheduler {class_name!r:.100}")
    try:
        return made.from_config(values)
    except Exception as error:  # whatever a constructor raises for values that it does not expect
        raise FileError(f"{path} describes no {class_name}: {type(error).__name__}: {str(error)[:200]}") from error


def _read_config(folder: Path, name: str, class_name: str, *, why: str = "") -> tuple[Path, dict[str, Any]]:
    """The file and values of a class's configuration: numbers, words and lists of them, none too large."""
    path = file_within(folder, name)
    values = read_json(path)
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if len(items) > MAX_NUMBER or any(isinstance(item, list | dict) for item in items):
            raise FileError(f"{path}: {key[:100]} must be a plain value or a list, got {str(value)[:100]}")
        for item in items:
            if isinstance(item, int) and abs(item) > MAX_NUMBER:
                raise FileError(f"{path}: {key[:100]} must be within ±{MAX_NUMBER:,}, got {str(item)[:100]}")
    for key in ("solver_order", "predictor_order", "corrector_order"):
        if key in values and values[key] not in (1, 2, 3, 4):
            raise FileError(f"{path}: {key} must be from 1 to 4, got {str(values[key])[:100]}")
    if (found := values.get("_class_name")) != class_name:
        raise FileError(f"{path}: _class_name must be {class_name!r:.100}{why}, got {found!r:.100}")
    return path, values


def read_index(folder: Path, arguments: Container[str]) -> dict[str, Any]:
    """The pipeline's own values in `model_index.json`, among `arguments`, and its scheduler's class as `scheduler`."""
    path = file_within(folder, "model_index.json")
    found = read_json(path)
    values = {key: value for key, value in found.items() if key not in PRIVATE}
    named = found.get("_class_name")
    pair = named if isinstance(named, list) and len(named) == 2 else [CODE_STEM, named]
    if pair[1] != PIPELINE_CLASS or not CODE_FILE.fullmatch(f"{pair[0]}.py"):
        raise FileError(f"{path}: _class_name must be {PIPELINE_CLASS!r}, got {named!r:.100}")
    unet, scheduler = values.pop("unet", None), values.pop("scheduler", None)
    if unet != ["diffusers", "UNet2DModel"]:
        raise FileError(f"{path}: unet must be ['diffusers', 'UNet2DModel'], got {unet!r:.100}")
    is_pair = isinstance(scheduler, list) and len(scheduler) == 2
    if not (is_pair and scheduler[0] == "diffusers" and isinstance(scheduler[1], str)):
        raise FileError(f"{path}: scheduler must be one of diffusers', got {scheduler!r:.100}")
    for name in values:
        if name not in arguments:
            raise FileError(f"{path}: {PIPELINE_CLASS} has no {name[:100]!r}")
    _require_index_values(path, values)
    return {**values, "scheduler": scheduler[1]}


def _require_index_values(path: Path, values: Mapping[str, Any]) -> None:
    names = values.get("id2label")
    if names is not None and not (
        isinstance(names, dict)
        and all(re.fullmatch("[0-9]{1,6}", key) and isinstance(value, str) for key, value in names.items())
    ):
        raise FileError(f"{path}: id2label must name classes by their numbers, got {str(names)[:100]}")
    for name in (names or {}).values():
        if not is_plain(name):
            raise FileError(f"{path}: id2label has {name[:MAX_NAME]!a}, which is no plain line of text, or too long")
    ranges = {"num_inference_steps": (1, MAX_NUMBER), "patch_size": (1, MAX_NUMBER)}
    for name, (low, high) in {**ranges, "guidance_scale": (0, math.inf), "eta": (0, 1)}.items():
        value = values.get(name, low)
        kind = int if name in ranges else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or value == math.inf:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise FileError(f"{path}: {name} must be finite and {bounds}, got {str(value)[:100]}")
    interval = values.get("guidance_interval", [0, 1])
    pair = isinstance(interval, list) and len(interval) == 2 and all(type(end) in (int, float) for end in interval)
    if not pair or not 0 <= interval[0] <= interval[1] <= 1:
        raise FileError(f"{path}: guidance_interval must be a rising pair from 0 to 1, got {str(interval)[:100]}")
    if not isinstance(flow := values.get("flow_matching"), bool | None):
        raise FileError(f"{path}: flow_matching must be true or false, got {str(flow)[:100]}")
    scales = values.get("guidance_distilled", False)
    if not isinstance(scales, bool) and not (
        isinstance(scales, list)
        and len(scales) <= MAX_SCALES
        and all(type(each) in (int, float) and 0 <= each < math.inf for each in scales)
    ):
        raise FileError(
            f"{path}: guidance_distilled must be a list of at most {MAX_SCALES} scales, got {str(scales)[:100]}"
        )
    if isinstance(scales, list) and scales and values.get("guidance_scale") not in scales:
        raise FileError(f"{path}: guidance_scale must be one of guidance_distilled={str(scales)[:100]}")


def require_fit(folder: Path, values: Mapping[str, Any], unet: Any, scheduler: Any) -> None:
    """Make sure that names and patches in an index are those of the network, and its steps within the scheduler's."""
    steps, available = values.get("num_inference_steps"), getattr(scheduler.config, "num_train_timesteps", None)
    if not isinstance(available, int):
        raise FileError(f"{folder}: {type(scheduler).__name__} has no num_train_timesteps")
    if steps is not None and steps > available:
        raise FileError(f"{folder}: num_inference_steps={steps} exceeds the scheduler's {available} timesteps")
    embeddings, names, patch = unet.config.num_class_embeds, values.get("id2label"), values.get("patch_size", 1)
    if isinstance(scales := values.get("guidance_distilled"), list) and scales and embeddings is not None:
        if (embeddings - 1) % len(scales):
            shared = f"{len(scales)} scales cannot share {embeddings - 1} class embeddings"
            raise FileError(f"{folder}: guidance_distilled={str(scales)[:100]}: {shared}")
        embeddings = (embeddings - 1) // len(scales) + 1
    if unet.config.in_channels % patch**2:
        raise FileError(f"{folder}: patch_size={patch} does not fit a network of {unet.config.in_channels} channels")
    for number in names or {}:
        if embeddings is None or int(number) >= embeddings - 1:
            raise FileError(f"{folder}: id2label names class {number}, which the network does not have")


def folder_or_none(source: str) -> Path | None:
    """The pipeline folder that `source` names, itself or as the folder of a run; None if it is a Hub id.

    Raises:
        FileError: it is a file, or a path that does not exist.
    """
    path = Path(source)
    if path.is_dir():
        return pipeline_folder(path)
    if path.exists():
        why = "is a pickle, which can run code when it is read" if path.suffix in PICKLES else "is not a folder"
        raise FileError(f"{source} {why}; give a pipeline folder or a Hub id")
    if path.is_absolute() or source.startswith(".") or len(path.parts) != 2 or path.suffix in PICKLES:
        raise FileError(f"there is no folder {source}, and a Hub id is user/name")
    return None


def index_arguments(pipeline_class: type) -> Collection[str]:
    """The values that an index may hold: the arguments of the class."""
    return inspect.signature(pipeline_class).parameters


def fetch_pipeline(repo_id: str, arguments: Container[str], variant: str | None = None, **hub: Any) -> Path:
    """Fetch the files of one commit that make a pipeline, none larger than it has to be.

    Returns:
        Their folder in the Hub's cache.

    Raises:
        FileError: it has no pipeline, or an invalid one.
        OSError: the Hub has no such repository, or could not be reached.
    """
    folder = fetch_file(repo_id, PIPELINE_FILES[0], MAX_JSON_BYTES, **hub).parent
    read_index(folder, arguments)
    hub["revision"] = folder.name
    for name in PIPELINE_FILES[1:3]:
        fetch_file(repo_id, name, MAX_JSON_BYTES, **hub)
    size = 8 * sum(tensor.numel() for tensor in _empty_unet(folder).state_dict().values())
    fetch_file(repo_id, _weights_name(variant), MAX_HEADER_BYTES + size, **hub)
    return folder


def fetch_file(repo_id: str, name: str, limit: int, **hub: Any) -> Path:
    """Fetch a file of the Hub into its cache, if it is not larger than `limit` bytes."""
    try:
        size = hf_hub_download(repo_id, name, dry_run=True, **hub).file_size
        if size > limit:
            raise FileError(f"{repo_id}: {name} is of {size:,} bytes, more than the {limit:,} it may have")
        return Path(hf_hub_download(repo_id, name, **hub))
    except RemoteEntryNotFoundError as error:
        reason = "only JSON and whole safetensors files are read, never pickles (.bin, .pt, .ckpt)"
        raise FileError(f"{repo_id} has no {name}; {reason}") from error
