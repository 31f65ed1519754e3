"""What diffusers' own tests ask of a pipeline, and what its users do: folders, subclasses, threads and callbacks."""

import copy
import functools
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from mnist_diffusion.config import DiffusionConfig, SamplingSettings
from mnist_diffusion.errors import FileError
from mnist_diffusion.method.noise import build_noise_scheduler
from mnist_diffusion.pipelines.pipeline import CODE, CODE_FILE, CODE_INDEX, MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import SAMPLERS, build_sampler
from mnist_diffusion.training.checkpoint import save_checkpoint
from tests.conftest import ALL_SAMPLERS, DEFAULT, make_pipeline
from tests.pipelines.test_pipeline import draw
from tests.support.hub_server import HubServer

load = MNISTDiffusionPipeline.from_pretrained


class TestFolders:
    @pytest.mark.parametrize(
        ("first", "name"), [*(("dpmpp-sde", name) for name in ALL_SAMPLERS), ("lcm", "ddim"), ("lcm", "dpmpp")]
    )
    def test_swaps_give_the_same_images_before_and_after_saving(self, tmp_path: Path, first: Any, name: Any) -> None:
        """From any sampler, in memory or loaded, by name or by the stock idiom."""
        pipeline = make_pipeline(sampling=SamplingSettings(scheduler=first))
        pipeline.save_pretrained(tmp_path)
        loaded = load(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        scheduler_class = getattr(diffusers, SAMPLERS.get(name, (name,))[0])

        def drawn_with(pipeline: MNISTDiffusionPipeline, scheduler: Any) -> torch.Tensor:
            pipeline.scheduler, kept = scheduler, pipeline.scheduler
            image = draw(pipeline, 1, seed=3, num_inference_steps=4)
            pipeline.scheduler = kept
            return image

        expected = drawn_with(pipeline, build_sampler(name, build_noise_scheduler(DEFAULT.diffusion).config))
        for each in (pipeline, loaded):
            assert torch.equal(drawn_with(each, build_sampler(name, each.scheduler.config)), expected)
            # The stock idiom passes on the algorithm of another variant.
            if first == "lcm" or name not in ("dpmpp-sde", "dpmpp", "DEISMultistepScheduler"):
                assert torch.equal(drawn_with(each, scheduler_class.from_config(each.scheduler.config)), expected)

    def test_folder_is_complete_and_loads_again_without_its_code(
        self, pipeline: MNISTDiffusionPipeline, tmp_path: Path
    ) -> None:
        pipeline.save_pretrained(tmp_path / "a")
        files = {path.name for path in (tmp_path / "a").rglob("*") if path.is_file()}
        described = {"model_index.json", "scheduler_config.json", "config.json"}
        assert files == {CODE_FILE, "diffusion_pytorch_model.safetensors", *described}
        (tmp_path / "a" / CODE_FILE).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        loaded = load(tmp_path / "a")
        loaded.save_pretrained(tmp_path / "b")
        assert type(loaded) is MNISTDiffusionPipeline
        assert not (tmp_path / "ran").exists()
        assert "_name_or_path" not in json.loads((tmp_path / "b" / "model_index.json").read_text())
        assert load(tmp_path / "b")(3, num_inference_steps=1).images

    def test_what_loading_takes(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path)
        assert load(tmp_path, device_map="meta").device.type == "meta"
        assert load(tmp_path, device_map="balanced").device.type in ("cpu", "cuda")
        for given in ({"dtype": torch.half}, {"torch_dtype": torch.half}):
            assert load(tmp_path, **given).unet.dtype == torch.half
        unet = make_pipeline(seed=5).unet
        assert load(tmp_path, unet=unet, id2label=None, use_safetensors=None, low_cpu_mem_usage=True).unet is unet
        assert load(tmp_path, guidance_scale=3.5).config.guidance_scale == 3.5
        with pytest.raises(TypeError, match="takes no argument 'guidence_scale'"):
            load(tmp_path, guidence_scale=3.5)
        with pytest.raises(TypeError, match="use_safetensors must be true"):
            load(tmp_path, use_safetensors=False)
        with pytest.raises(TypeError, match="save_pretrained takes no argument 'max_shard_size'"):
            pipeline.save_pretrained(tmp_path, max_shard_size="1MB")
        (tmp_path / "run" / "pipeline").mkdir(parents=True)
        pipeline.save_pretrained(tmp_path / "run" / "pipeline")
        assert load(tmp_path / "run").num_classes == 10

    def test_two_versions_in_one_process(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        """Each draws by its own code, and saves it, whichever was loaded first."""
        kept = [tmp_path / "plain", tmp_path / "changed"]
        for folder in kept:
            pipeline.save_pretrained(folder)
        changed = CODE.replace(b"return unconditional +", b"return unconditional + 3 +")  # as another release might
        assert changed != CODE
        (kept[1] / CODE_FILE).unlink()
        name = f"pipeline_mnist_diffusion_{hashlib.sha256(changed).hexdigest()[:12]}"
        (kept[1] / f"{name}.py").write_bytes(changed)
        index = json.loads((kept[1] / "model_index.json").read_text())
        index["_class_name"][0] = name
        (kept[1] / "model_index.json").write_text(json.dumps(index))
        for order in ((0, 1), (1, 0)):
            loaded = {which: load_plainly(kept[which]) for which in order}
            for which, each in loaded.items():
                each.set_progress_bar_config(disable=True)
                same = torch.equal(draw(each, 3, guidance_scale=2.0), draw(pipeline, 3, guidance_scale=2.0))
                assert same == (which == 0)
                each.save_pretrained(tmp_path / f"again {which} {order[0]}")
                [code] = (tmp_path / f"again {which} {order[0]}").glob("*.py")
                assert code.read_bytes() == (CODE, changed)[which]

    def test_files_have_the_mode_that_others_have(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            pipeline.save_pretrained(tmp_path / "folder")
            save_checkpoint(tmp_path, 1, {"unet": {"w": torch.zeros(1)}}, {}, keep=1, about={"run_id": "r"})
        finally:
            os.umask(before)
        for path in tmp_path.rglob("*.safetensors"):
            assert path.stat().st_mode & 0o777 == 0o640


class MyScheduler(DDIMScheduler):
    """A scheduler of a user's own."""


def test_a_scheduler_that_could_not_be_loaded_again_is_not_saved(
    pipeline: MNISTDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.scheduler = MyScheduler.from_config(pipeline.scheduler.config)
    assert len(pipeline(["a"], num_inference_steps=2).images) == 1
    with pytest.raises(ValueError, match=r"scheduler must be one of diffusers' own .* got .*MyScheduler"):
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline.scheduler = DDIMScheduler(num_train_timesteps=5)
    with pytest.raises(ValueError, match="num_inference_steps must be from 1 to 5"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Mine(MNISTDiffusionPipeline):
    """A subclass of a user's, in a file of theirs."""


class TestSubclasses:
    def test_saves_the_shipped_file_and_loads_with_both_loaders(
        self, pipeline: MNISTDiffusionPipeline, tmp_path: Path
    ) -> None:
        mine = Mine(**pipeline.components, id2label=pipeline.config.id2label)
        mine.set_progress_bar_config(disable=True)
        mine.save_pretrained(tmp_path / "mine")
        assert (tmp_path / "mine" / CODE_FILE).read_bytes() == CODE
        expected = draw(mine, 3, "d")
        for loading in (Mine.from_pretrained, load, load_plainly):
            loaded = loading(tmp_path / "mine")
            loaded.set_progress_bar_config(disable=True)
            assert torch.equal(draw(loaded, 3, "d"), expected)
            loaded.save_pretrained(tmp_path / "again")
            assert (tmp_path / "again" / CODE_FILE).read_bytes() == CODE
            assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == CODE_INDEX
        assert type(Mine.from_pretrained(tmp_path / "mine")) is Mine

    def test_pushes_the_shipped_file(self, pipeline: MNISTDiffusionPipeline, hub: HubServer) -> None:
        Mine(**pipeline.components).push_to_hub("owner/mine")
        assert hub.repositories["owner/mine"].files()[CODE_FILE] == CODE

    @pytest.mark.parametrize("kind", [MNISTDiffusionPipeline, Mine])
    def test_from_pipe_shares_the_network_both_ways(
        self, pipeline: MNISTDiffusionPipeline, tmp_path: Path, kind: type[MNISTDiffusionPipeline]
    ) -> None:
        pipeline.register_to_config(guidance_distilled=[1.5], guidance_scale=1.5)
        pipeline.save_pretrained(tmp_path)
        plain = load_plainly(tmp_path)
        for source, target in ((pipeline, kind), (plain, kind), (pipeline, type(plain))):
            other = target.from_pipe(source)
            assert type(other) is target
            assert other.unet is source.unet
            for name in ("id2label", "num_inference_steps", "guidance_scale", "eta", "guidance_distilled"):
                assert other.config[name] == source.config[name]
            other.set_progress_bar_config(disable=True)
            source.set_progress_bar_config(disable=True)
            assert torch.equal(draw(other, 3), draw(source, 3))
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        assert kind.from_pipe(plain, scheduler=scheduler).scheduler is scheduler


def load_plainly(folder: Path) -> Any:
    """By plain diffusers, with the code of the folder."""
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def test_a_callback_may_change_the_guidance_scale(pipeline: MNISTDiffusionPipeline) -> None:
    scales: list[float] = []

    def add_one(p: Any, *_: Any) -> dict[str, torch.Tensor]:
        p._guidance_scale += 1
        scales.append(p.guidance_scale)
        return {}

    changed = draw(pipeline, 3, guidance_scale=1.5, callback_on_step_end=add_one)
    assert scales == [2.5, 3.5, 4.5]
    assert pipeline.guidance_scale == 1.5 + pipeline.num_timesteps
    noise = torch.Generator().manual_seed(0)
    stream = pipeline.stream([3], generator=noise, num_inference_steps=3, guidance_scale=1.5)
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
    pipeline: MNISTDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipeline.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    type(plain).from_pipe(MNISTDiffusionPipeline.from_pipe(plain)).save_pretrained(tmp_path / "again")
    load(tmp_path / "again")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers")]
    diffusers_own = "that should be kept in float32: []"  # of every UNet2DModel, and about none of its modules
    assert [words for words in said if diffusers_own not in words] == []


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_plain_diffusers_and_variants(tmp_path: Path, hub: HubServer, variant: str | None) -> None:
    pipeline = make_pipeline()
    DiffusionPipeline.save_pretrained(pipeline, tmp_path, variant=variant, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    files = [path for path in tmp_path.rglob("*.*") if path.is_file()]
    hub.add("user/name", {str(path.relative_to(tmp_path)): path.read_bytes() for path in files})
    for place in (tmp_path, "user/name"):
        loaded = load(place, variant=variant)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(draw(loaded, 3), draw(pipeline, 3))
    next(iter((tmp_path / "unet").glob("*00001-of*.safetensors"))).unlink()
    with pytest.raises(FileError, match=r"there is no .*00001-of"):
        load(tmp_path, variant=variant)


SHIFTED = (CogVideoXDDIMScheduler(), ValueError, "CogVideoXDDIMScheduler ignores the betas or the prediction type of")
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("unet", DDIMScheduler(), TypeError, "unet must be a UNet2DModel, got DDIMScheduler"),
    ("scheduler", "ddim", TypeError, "scheduler must be a SchedulerMixin, got str"),
    ("scheduler", *SHIFTED),
    ("scheduler", DDIMScheduler(num_train_timesteps=5), ValueError, "num_inference_steps must be from 1 to 5, got"),
    ("torch_dtype", torch.float16, TypeError, "only one of them"),
    ("device_map", "auto", ValueError, "device_map must be balanced or a device, got 'auto'"),
    ("variant", "fp8", FileError, r"there is no .*diffusion_pytorch_model\.fp8\.safetensors"),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), WRONG)
def test_what_is_wrong_is_refused_by_the_constructor_and_the_loader(
    pipeline: MNISTDiffusionPipeline, tmp_path: Path, name: str, value: Any, kind: type[Exception], message: str
) -> None:
    if name in pipeline.components:
        with pytest.raises(kind, match=message):
            MNISTDiffusionPipeline(**{**pipeline.components, name: value})
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(kind, match=message):
        load(tmp_path, **{"dtype": torch.float16, name: value})


def test_another_default_type_changes_nothing(pipeline: MNISTDiffusionPipeline) -> None:
    expected = draw(pipeline, 3, guidance_scale=2)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw(pipeline, 3, guidance_scale=2), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class TestOtherCode:
    """Threads, official callbacks, the schedulers' own steps, and components of a student."""

    @pytest.mark.parametrize("name", ["dpmpp-sde", "unipc", "heun", "PNDMScheduler"])
    def test_calls_from_threads(self, pipeline: MNISTDiffusionPipeline, name: str) -> None:
        pipeline.scheduler = build_sampler(name, pipeline.scheduler.config)
        expected = [draw(pipeline, 1, seed=seed, num_inference_steps=4) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            asked = list(range(4)) * 3
            drawn = list(pool.map(lambda seed: draw(pipeline, 1, seed=seed, num_inference_steps=4), asked))
        for seed, images in zip(asked, drawn, strict=True):
            assert torch.equal(images, expected[seed])

    @pytest.mark.parametrize(
        ("name", "prediction_type"),
        [
            *(("ddim", each) for each in ("epsilon", "v_prediction", "sample")),
            *((each, "v_prediction") for each in ("euler", "heun", "EulerAncestralDiscreteScheduler")),
        ],
    )
    def test_the_predicted_image_is_the_solvers_own(self, name: str, prediction_type: Any) -> None:
        """Against what diffusers' own step returns, where it returns one."""
        pipeline = make_pipeline(diffusion=DiffusionConfig(prediction_type=prediction_type, beta_schedule="linear"))
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
            with pytest.raises(ValueError, match=r"guidance_distilled must be \[1\.5\], as distilled into this net"):
                MNISTDiffusionPipeline(**student.components, **other)
        with pytest.raises(ValueError, match=r"guidance_scale must be one of guidance_distilled=\[1\.5\], got 3"):
            MNISTDiffusionPipeline(**teacher.components, guidance_scale=3, guidance_distilled=[1.5])
        with pytest.raises(ValueError, match=r"must be one of \[1\.5\], distilled into this model, got 3"):
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
    assert torch.equal(draw(load(tmp_path), 3, 7), plain)
