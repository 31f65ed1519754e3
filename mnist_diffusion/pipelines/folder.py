"""Pipeline folders: read untrusted ones without running code, and write them as a whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mnist_diffusion.errors import ConfigError, FileError
from mnist_diffusion.files import (
    MAX_JSON_BYTES,
    PICKLES,
    file_within,
    open_file,
    pipeline_folder,
    read_json,
    replace_folder,
    replace_picture,
    replace_text,
)
from mnist_diffusion.option_types import GuidanceScale, Probability, checked, rising_pair
from mnist_diffusion.pipelines.card import CARD, PICTURE, render_card

MAX_HEADER_BYTES, MAX_CARD_BYTES = 2**22, 2**23
MAX_LEVELS, MAX_NUMBER = 10, 100_000
RANGES = {"sample_size": (1, 4096), "layers_per_block": (1, 16)}
RANGES |= dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), (1, 4))
"""Ranges of the whole numbers that decide most about memory and time; all others are within `MAX_NUMBER`."""
FLOATS = ("BF16", "F16", "F32", "F64")
PIPELINE_CLASS, CODE_STEM = "MNISTDiffusionPipeline", "pipeline_mnist_diffusion"
CODE_FILE = re.compile(rf"{CODE_STEM}(_[0-9a-f]{{12}})?\.py")
"""The pipeline code in a folder, named by its content."""
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
UNET_CONFIG, UNET_WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
PIPELINE_FILES = ("model_index.json", SCHEDULER_CONFIG, UNET_CONFIG, UNET_WEIGHTS)
"""The files of a pipeline folder; no other is read to load one."""
SHARD = re.compile(r"diffusion_pytorch_model[\w.-]*\.safetensors")
PRIVATE = ("_class_name", "_diffusers_version", "_name_or_path")


Printable = Annotated[str, Field(pattern=r"^\P{Cc}{0,200}$")]
Levels = Annotated[list[Probability], Field(min_length=2, max_length=2), AfterValidator(rising_pair)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class IndexValues:
    """The pipeline's own values in `model_index.json`, the arguments of its class, with their ranges."""

    id2label: dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], Printable] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_NUMBER)] = 50
    guidance_scale: GuidanceScale = 1.0
    guidance_interval: Levels = field(default_factory=lambda: [0.0, 1.0])
    noise_interval: Levels = field(default_factory=lambda: [0.0, 1.0])
    eta: Probability = 0.0
    patch_size: Annotated[int, Field(ge=1, le=MAX_NUMBER)] = 1
    guidance_distilled: bool | Annotated[list[GuidanceScale], Field(max_length=100)] = False
    flow_matching: bool | None = None


def read_unet(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> UNet2DModel:
    """Read the network of a pipeline folder from safetensors that match its configuration.

    Args:
        folder: the pipeline folder.
        variant: `fp16` reads `diffusion_pytorch_model.fp16.safetensors`.
        dtype: data type of the weights.

    Raises:
        FileError: it is invalid.
    """
    unet, paths = _empty_unet(folder), _weight_files(folder, variant)
    require_weights(paths, unet)
    weights = {name: tensor.to(dtype, copy=True) for path in paths for name, tensor in load_file(path).items()}
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def _weights_names(variant: str | None) -> tuple[str, str]:
    """The file of the weights, and the index of its shards if it was saved in several."""
    whole = UNET_WEIGHTS.replace(".safetensors", f".{variant}.safetensors") if variant else UNET_WEIGHTS
    return whole, f"{UNET_WEIGHTS}.index{f'.{variant}' if variant else ''}.json"


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The file of the weights, or its shards, as diffusers writes with `max_shard_size`."""
    whole, index = _weights_names(variant)
    if (folder / whole).exists() or not (folder / index).exists():
        return [file_within(folder, whole)]
    return [file_within(folder, shard) for shard in _shards(folder, index)]


def _shards(folder: Path, index: str) -> list[str]:
    """The shards that the index of some weights names."""
    shards = read_json(file_within(folder, index)).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(SHARD.fullmatch(str(shard)) for shard in shards.values()):
        raise FileError(f"{folder / index} must name the shards of the weights in its weight_map")
    return [f"unet/{shard}" for shard in sorted(set(shards.values()))]


def _empty_unet(folder: Path) -> UNet2DModel:
    """Build the network of `unet/config.json` without memory for its weights, and try it on one image."""
    path, values = _read_config(folder, UNET_CONFIG, "UNet2DModel", longest=MAX_LEVELS)
    try:
        with torch.device("meta"), torch.no_grad():
            unet = UNet2DModel.from_config(values)
            size = unet.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            image = torch.empty(1, unet.config.in_channels, height, width)
            labels = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.long)
            shape = unet.eval()(image, torch.zeros(1), class_labels=labels).sample.shape
    except Exception as error:  # constructors raise anything for values they do not expect
        raise FileError(f"{path} describes no network: {type(error).__name__}: {str(error)[:200]}") from error
    if shape != image.shape:
        raise FileError(f"{path} describes a network that turns {[*image.shape]} into {[*shape]}")
    return unet


def require_weights(paths: Sequence[Path], model: torch.nn.Module) -> None:
    """Check, from their headers alone, that safetensors files hold exactly the weights of a model.

    Raises:
        FileError: names, shapes or types differ, or a header is invalid.
    """
    expected = model.state_dict()
    seen: dict[str, Any] = {}
    for path in paths:
        for name, (shape, dtype) in (tensors := _tensors_in(path)).items():
            if name not in expected or name in seen:
                raise FileError(f"{path} has a tensor {name[:200]!r} that is not expected, or is in another file, too")
            if shape != tuple(expected[name].shape):
                needed = tuple(expected[name].shape)
                raise FileError(f"{path}: {name} has shape {shape}, but config.json needs {needed}")
            dtypes = FLOATS if expected[name].is_floating_point() else ("I64",)
            if dtype not in dtypes:
                raise FileError(f"{path}: {name} has type {dtype}, not {' or '.join(dtypes)}")
        seen |= tensors
    for name in sorted(expected.keys() - seen.keys()):
        raise FileError(f"{paths[0]} lacks tensor {name[:200]!r}")


def _tensors_in(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor, from the header of a safetensors file."""
    with open_file(path) as file:
        size, start = path.stat().st_size, file.read(8)
    if (length := int.from_bytes(start, "little")) > min(MAX_HEADER_BYTES, size - 8):
        raise FileError(f"{path} is not a safetensors file: it claims a header of {length:,} bytes in {size:,}")
    try:
        with safe_open(path, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  (not a dictionary)
            return {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise FileError(f"{path} is not a safetensors file: {str(error)[:200]}") from error


def read_scheduler(folder: Path, class_name: str) -> SchedulerMixin:
    """Read the scheduler of a folder, which must be diffusers' own class of that name."""
    path, values = _read_config(folder, SCHEDULER_CONFIG, class_name)
    scheduler_class: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if SchedulerMixin not in getattr(scheduler_class, "__mro__", ()):
        raise FileError(f"{path}: diffusers {diffusers.__version__} has no scheduler {class_name!r:.100}")
    try:
        return scheduler_class.from_config(values)
    except Exception as error:  # constructors raise anything for values they do not expect
        raise FileError(f"{path} describes no {class_name}: {type(error).__name__}: {str(error)[:200]}") from error


def _read_config(folder: Path, name: str, class_name: str, *, longest: int = MAX_NUMBER) -> tuple[Path, dict[str, Any]]:
    """The file and values of a class's configuration: numbers, words and lists of at most `longest`, none too large."""
    path = file_within(folder, name)
    values = read_json(path)
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if len(items) > longest or any(isinstance(item, list | dict) for item in items):
            expected = f"a plain value or a list of at most {longest:,}"
            raise FileError(f"{path}: {key[:100]} must be {expected}, got {str(value)[:100]}")
        low, high = RANGES.get(key, (-MAX_NUMBER, MAX_NUMBER))
        for item in items:
            if isinstance(item, int) and not low <= item <= high:
                raise FileError(f"{path}: {key[:100]} must be from {low:,} to {high:,}, got {str(item)[:100]}")
    if (named_class := values.get("_class_name")) != class_name:
        raise FileError(f"{path}: _class_name must be {class_name!r:.100}, got {named_class!r:.100}")
    return path, values


def read_index(folder: Path) -> dict[str, Any]:
    """The pipeline's own values in `model_index.json`, and its scheduler's class as `scheduler`."""
    path = file_within(folder, "model_index.json")
    index = read_json(path)
    values = {key: value for key, value in index.items() if key not in PRIVATE}
    class_name = index.get("_class_name")
    pair = class_name if isinstance(class_name, list) and len(class_name) == 2 else [CODE_STEM, class_name]
    if pair[1] != PIPELINE_CLASS or not CODE_FILE.fullmatch(f"{pair[0]}.py"):
        raise FileError(f"{path}: _class_name must be {PIPELINE_CLASS!r}, got {class_name!r:.100}")
    unet, scheduler = values.pop("unet", None), values.pop("scheduler", None)
    if unet != ["diffusers", "UNet2DModel"]:
        raise FileError(f"{path}: unet must be ['diffusers', 'UNet2DModel'], got {unet!r:.100}")
    is_pair = isinstance(scheduler, list) and len(scheduler) == 2
    if not (is_pair and scheduler[0] == "diffusers" and isinstance(scheduler[1], str)):
        raise FileError(f"{path}: scheduler must be one of diffusers', got {scheduler!r:.100}")
    try:
        checked(IndexValues, values)
    except ConfigError as error:
        raise FileError(f"{path}: {str(error)[:400]}") from error
    return {**values, "scheduler": scheduler[1]}


def require_fit(folder: Path, pipeline: Any) -> None:
    """Check that names, patches and guidance scales of an index fit the network."""
    config, channels, scales = pipeline.config, pipeline.unet.config.in_channels, pipeline.config.guidance_distilled
    if scales and (pipeline.null_class or 0) % len(scales):
        shared = f"{len(scales)} scales cannot share {pipeline.null_class} class embeddings"
        raise FileError(f"{folder}: guidance_distilled={str(scales)[:100]}: {shared}")
    if channels % config.patch_size**2:
        raise FileError(f"{folder}: patch_size={config.patch_size} does not fit a network of {channels} channels")
    for number in config.id2label or {}:
        if int(number) >= (pipeline.num_classes or 0):
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
        why = "is a pickle, which can run code when loaded" if path.suffix in PICKLES else "is not a folder"
        raise FileError(f"{source} {why}; give a pipeline folder or a Hub id")
    if path.is_absolute() or source.startswith(".") or len(path.parts) != 2 or path.suffix in PICKLES:
        raise FileError(f"there is no folder {source}, and a Hub id is user/name")
    return None


def fetch_pipeline(repo_id: str, variant: str | None = None, **hub: Any) -> Path:
    """Download the files of one commit that make a pipeline, none larger than its configuration implies.

    Returns:
        Their folder in the Hub's cache.

    Raises:
        FileError: there is no pipeline, or it is invalid.
        OSError: the Hub has no such repository, or could not be reached.
    """
    folder = fetch_file(repo_id, PIPELINE_FILES[0], MAX_JSON_BYTES, **hub).parent
    read_index(folder)
    hub["revision"] = folder.name
    for name in PIPELINE_FILES[1:3]:
        fetch_file(repo_id, name, MAX_JSON_BYTES, **hub)
    size = 8 * sum(tensor.numel() for tensor in _empty_unet(folder).state_dict().values())
    whole, index = _weights_names(variant)
    try:
        fetch_file(repo_id, whole, MAX_HEADER_BYTES + size, **hub)
    except (FileError, LocalEntryNotFoundError) as missing:
        try:
            fetch_file(repo_id, index, MAX_JSON_BYTES, **hub)
        except (FileError, LocalEntryNotFoundError):
            raise missing from None
        remaining = MAX_HEADER_BYTES + size
        for shard in _shards(folder, index):
            remaining -= fetch_file(repo_id, shard, remaining, **hub).stat().st_size
    return folder


def fetch_file(repo_id: str, name: str, limit: int, **hub: Any) -> Path:
    """Download a file of at most `limit` bytes into the Hub's cache."""
    try:
        size = hf_hub_download(repo_id, name, dry_run=True, **hub).file_size
        if size is None:
            raise FileError(f"{repo_id}: the Hub does not say how large {name} is")
        if size > limit:
            raise FileError(f"{repo_id}: {name} has {size:,} bytes, more than the limit of {limit:,}")
        return Path(hf_hub_download(repo_id, name, **hub))
    except RemoteEntryNotFoundError as error:
        reason = "only JSON and safetensors files are read, never pickles (.bin, .pt, .ckpt)"
        raise FileError(f"{repo_id} has no {name}; {reason}") from error


def export_pipeline(
    pipeline: Any, folder: Path, *, card: Mapping[str, Any], samples: Image.Image | None = None
) -> None:
    """Write a pipeline folder with its code and card, replacing the existing one as a whole.

    Args:
        pipeline: the pipeline; its weights are saved as safetensors.
        folder: the output folder.
        card: values of the card's template.
        samples: the picture on the card.

    Raises:
        FileError: the weights could not be written.
    """

    def write(temporary: Path) -> None:
        # Safetensors rejects weights in channels-last order.
        unet = copy.deepcopy(pipeline.unet).to(memory_format=torch.contiguous_format)
        values = {name: value for name, value in pipeline.config.items() if not name.startswith("_")}
        type(pipeline)(**{**values, **pipeline.components, "unet": unet}).save_pretrained(temporary)
        if samples is not None:
            replace_picture(samples, temporary / PICTURE)
        replace_text(temporary / CARD, str(render_card({**card, "samples": PICTURE if samples is not None else None})))

    try:
        replace_folder(folder, write)
    except SafetensorError as error:  # for example, when the disk is full
        raise FileError(f"{folder} could not be written: {error}") from error
