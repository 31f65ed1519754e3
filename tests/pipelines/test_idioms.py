"""What diffusers' own tests ask of a pipeline, and what its users do with one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.utils import logging as diffusers_logging

from mnist_diffusion.errors import FileError
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from tests.conftest import make_pipeline
from tests.pipelines.test_pipeline import draw

load = MNISTDiffusionPipeline.from_pretrained


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What diffusers logs."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    diffusers_logging.get_logger("diffusers").addHandler(handler)
    yield seen
    diffusers_logging.get_logger("diffusers").removeHandler(handler)


def test_a_callback_may_change_the_guidance_scale(pipeline: MNISTDiffusionPipeline) -> None:
    scales: list[float] = []

    def add_one(p: Any, *_: Any) -> dict[str, torch.Tensor]:
        p._guidance_scale += 1
        scales.append(p.guidance_scale)
        return {}

    changed = draw(pipeline, 3, guidance_scale=1.5, callback_on_step_end=add_one)
    assert scales == [2.5, 3.5, 4.5]
    assert pipeline.guidance_scale == 1.5 + pipeline.num_timesteps
    noise = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "guidance_scale": 1.5}
    stream = pipeline.stream([3], **noise)
    next(stream)
    stream.send({"guidance_scale": 2.5})
    assert torch.equal(stream.send({"guidance_scale": 3.5}).images("pt"), changed)


@pytest.mark.parametrize(("scale", "guided"), [(1, False), (0.5, False), (2, True), ([1, 3], True)])
def test_do_classifier_free_guidance(pipeline: MNISTDiffusionPipeline, scale: Any, guided: bool) -> None:
    draw(pipeline, 3, 4, guidance_scale=scale)
    assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance) == (scale, guided)


@pytest.mark.parametrize(("channels", "patch_size"), [(1, 1), (1, 2), (1, 4), (3, 1), (3, 2)])
def test_patches_follow_from_the_components(pipeline: MNISTDiffusionPipeline, channels: int, patch_size: int) -> None:
    values = channels * patch_size**2
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = UNet2DModel(8 // patch_size, values, values, **blocks, norm_num_groups=4)
    unconditional = MNISTDiffusionPipeline(unet, pipeline.scheduler)
    assert MNISTDiffusionPipeline(**unconditional.components).image_shape == (channels, 8, 8)


def test_the_scheduler_handed_in_is_left_alone(pipeline: MNISTDiffusionPipeline) -> None:
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    config, values = copy.deepcopy(scheduler.config), copy.deepcopy(vars(scheduler))
    draw(MNISTDiffusionPipeline(pipeline.unet, scheduler), 3, num_inference_steps=7)
    assert scheduler.config == config
    assert vars(scheduler).keys() == values.keys()
    assert scheduler.num_inference_steps == values["num_inference_steps"]


def test_loading_saving_and_from_pipe_warn_of_nothing(
    pipeline: MNISTDiffusionPipeline, tmp_path: Path, warnings: list[str]
) -> None:
    pipeline.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    type(plain).from_pipe(MNISTDiffusionPipeline.from_pipe(plain)).save_pretrained(tmp_path / "again")
    load(tmp_path / "again")
    diffusers_own = "that should be kept in float32: []"  # of every UNet2DModel, and about none of its modules
    assert [warning for warning in warnings if diffusers_own not in warning] == []


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_plain_diffusers_and_variants(tmp_path: Path, variant: str | None) -> None:
    pipeline = make_pipeline()
    DiffusionPipeline.save_pretrained(pipeline, tmp_path, variant=variant, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = load(tmp_path, variant=variant)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, 3), draw(pipeline, 3))
    next(iter((tmp_path / "unet").glob("*00001-of*.safetensors"))).unlink()
    with pytest.raises(FileError, match=r"there is no .*00001-of"):
        load(tmp_path, variant=variant)


NOT_FOLLOWED = (
    "CogVideoXDDIMScheduler ignores the betas or the prediction type of the training, or shifts its noise levels"
)
WRONG_COMPONENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"unet": None}, TypeError, "unet must be a UNet2DModel, got NoneType"),
    ({"unet": UNet2DConditionModel}, TypeError, "unet must be a UNet2DModel, got type"),
    ({"scheduler": "ddim"}, TypeError, "scheduler must be a SchedulerMixin, got str"),
    ({"scheduler": CogVideoXDDIMScheduler()}, ValueError, NOT_FOLLOWED),
    (
        {"scheduler": DDIMScheduler(num_train_timesteps=10)},
        ValueError,
        "num_inference_steps must be from 1 to 10, got 50",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG_COMPONENTS)
def test_wrong_components_are_refused_when_the_pipeline_is_made(
    pipeline: MNISTDiffusionPipeline, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        MNISTDiffusionPipeline(**{**pipeline.components, **change})


WRONG_LOADS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": torch.float16, "torch_dtype": torch.float16}, TypeError, "only one of them"),
    ({"unet": DDIMScheduler()}, TypeError, "unet must be a UNet2DModel, got DDIMScheduler"),
    ({"scheduler": CogVideoXDDIMScheduler()}, ValueError, NOT_FOLLOWED),
    ({"device_map": "auto"}, ValueError, "device_map must be balanced or a device, got 'auto'"),
    ({"device_map": {"unet": 0}}, ValueError, r"device_map must be balanced or a device, got \{'unet': 0\}"),
    ({"variant": "fp8"}, FileError, r"there is no .*diffusion_pytorch_model\.fp8\.safetensors"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG_LOADS)
def test_wrong_arguments_of_from_pretrained(
    pipeline: MNISTDiffusionPipeline, tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(kind, match=message):
        load(tmp_path, **arguments)


def test_another_default_type_changes_nothing(pipeline: MNISTDiffusionPipeline) -> None:
    expected = draw(pipeline, 3, guidance_scale=2)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw(pipeline, 3, guidance_scale=2), expected)
    finally:
        torch.set_default_dtype(torch.float32)
