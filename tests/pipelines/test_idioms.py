"""What diffusers' own tests ask of a pipeline, and what its users do with one."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging as diffusers_logging

from mnist_diffusion.errors import FileError
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import _alpha_cumprod
from mnist_diffusion.pipelines.samplers import build_sampler
from tests.conftest import ALL_SAMPLERS, make_pipeline
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
    noise: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
    }
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


class TestOtherCode:
    """Threads, official callbacks, the schedulers' own steps, and components of a student."""

    @pytest.mark.parametrize("name", ALL_SAMPLERS)
    def test_calls_from_threads(self, pipeline: MNISTDiffusionPipeline, name: str) -> None:
        pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
        expected = [draw(pipeline, 1, seed=seed, num_inference_steps=4) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            asked = list(range(4)) * 3
            drawn = list(pool.map(lambda seed: draw(pipeline, 1, seed=seed, num_inference_steps=4), asked))
        for seed, images in zip(asked, drawn, strict=True):
            assert torch.equal(images, expected[seed])

    @pytest.mark.parametrize("name", ["ddim", "euler", "heun", "EulerAncestralDiscreteScheduler"])
    def test_the_predicted_image_is_the_solvers_own(self, pipeline: MNISTDiffusionPipeline, name: str) -> None:
        """Against what diffusers' own step returns, where it returns one."""
        pipeline.scheduler = build_sampler(name, {**pipeline.scheduler.config, "clip_sample": False})
        own, step = [], type(pipeline.scheduler).step

        def recording(self: Any, *arguments: Any, **named: Any) -> Any:
            given = step(self, *arguments, **{**named, "return_dict": True})
            own.append(given.pred_original_sample)
            return (given.prev_sample,)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(pipeline.scheduler), "step", functools.wraps(step)(recording))
            found = pipeline.sample_trajectory([1, 2], num_inference_steps=5).pred_original_samples
        assert len(found) == len(own) >= 5
        for ours, theirs in zip(found, own, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("name", [*ALL_SAMPLERS, "KDPM2AncestralDiscreteScheduler"])
    def test_noise_levels_are_those_of_the_timesteps(self, pipeline: MNISTDiffusionPipeline, name: str) -> None:
        pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
        scheduler = pipeline._prepared_scheduler(6, None, None)
        for step, timestep in enumerate(scheduler.timesteps.tolist()):
            expected = float(scheduler.alphas_cumprod[round(timestep)])
            assert _alpha_cumprod(scheduler, step) == pytest.approx(expected, abs=5e-3)

    def test_official_callbacks_bring_their_tensors(self, pipeline: MNISTDiffusionPipeline) -> None:
        class Seen(PipelineCallback):
            tensor_inputs: ClassVar[list[str]] = ["latents", "pred_original_sample"]

            def callback_fn(self, pipeline: Any, step_index: Any, timestep: Any, callback_kwargs: Any) -> Any:
                seen.append(set(callback_kwargs))
                return callback_kwargs

        seen: list[set[str]] = []
        for callback in (Seen(), MultiPipelineCallbacks([Seen()])):
            draw(pipeline, 1, callback_on_step_end=callback)
        assert seen == [{"latents", "pred_original_sample"}] * 6

    def test_components_of_a_student_keep_its_promise(self) -> None:
        teacher = make_pipeline()
        student = MNISTDiffusionPipeline(**teacher.components, guidance_scale=1.5, guidance_distilled=[1.5])
        others: list[dict[str, Any]] = [{}, {"guidance_distilled": [2.0], "guidance_scale": 2.0}]
        for other in others:
            with pytest.raises(
                ValueError, match=r"guidance_distilled must be \[1\.5\], as distilled into this network"
            ):
                MNISTDiffusionPipeline(**student.components, **other)
        with pytest.raises(ValueError, match=r"guidance_scale must be one of guidance_distilled=\[1\.5\], got 3"):
            MNISTDiffusionPipeline(**teacher.components, guidance_scale=3, guidance_distilled=[1.5])
        with pytest.raises(
            ValueError, match=r"guidance_scale must be one of \[1\.5\], distilled into this model, got 3"
        ):
            MNISTDiffusionPipeline.from_pipe(student)([1], guidance_scale=3)


def test_a_compiled_network_draws_and_saves_the_same(pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
    plain = draw(pipeline, 3, 7)
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(len(inputs))
        return graph.forward

    pipeline.unet.compile(backend=backend)
    assert torch.equal(draw(pipeline, 3, 7), plain)
    assert seen
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(MNISTDiffusionPipeline.from_pretrained(tmp_path), 3, 7), plain)


def test_hooks_of_an_offloaded_network_are_freed_after_each_call(
    pipeline: MNISTDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(type(pipeline), "maybe_free_model_hooks", lambda self: freed.append("freed"))
    pipeline([1], num_inference_steps=2)
    pipeline.interpolate([1, 2], 3, num_inference_steps=2)
    pipeline.sample_trajectory([1], num_inference_steps=2)
    assert len(freed) == 3
