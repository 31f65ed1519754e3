"""Pipeline folders: saved, loaded, loaded plainly, by subclasses, and with schedulers that could not come back."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel

from mnist_diffusion.config import SamplingSettings
from mnist_diffusion.errors import FileError
from mnist_diffusion.method.noise import build_noise_scheduler
from mnist_diffusion.pipelines.pipeline import CODE, CODE_FILE, CODE_INDEX, MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import SAMPLERS, build_sampler
from mnist_diffusion.training.checkpoint import save_checkpoint
from tests.conftest import ALL_SAMPLERS, DEFAULT, make_pipeline
from tests.pipelines.test_pipeline import draw
from tests.support.hub_server import HubServer


class TestFolders:
    @pytest.mark.parametrize("first", ["dpmpp-sde", "lcm"])
    @pytest.mark.parametrize("name", ALL_SAMPLERS)
    def test_swaps_give_the_same_images_before_and_after_saving(self, tmp_path: Path, first: Any, name: Any) -> None:
        """From any sampler, in memory or loaded, by name or by the stock idiom."""
        pipeline = make_pipeline(sampling=SamplingSettings(scheduler=first))
        pipeline.save_pretrained(tmp_path)
        loaded = MNISTDiffusionPipeline.from_pretrained(tmp_path)
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
            # The stock idiom passes on the algorithm of another variant, and LCM keeps nothing that is PNDM's alone.
            kept_algorithm = first == "dpmpp-sde" and name in ("dpmpp", "DEISMultistepScheduler")
            if name != "dpmpp-sde" and not kept_algorithm and (first, name) != ("lcm", "PNDMScheduler"):
                assert torch.equal(drawn_with(each, scheduler_class.from_config(each.scheduler.config)), expected)

    def test_folder_is_complete_and_safe(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path)
        files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {
            "model_index.json",
            CODE_FILE,
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
        }
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == CODE_INDEX

    def test_a_loaded_one_saves_and_loads_again(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path / "a")
        MNISTDiffusionPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        assert "_name_or_path" not in json.loads((tmp_path / "b" / "model_index.json").read_text())
        assert MNISTDiffusionPipeline.from_pretrained(tmp_path / "b")(3, num_inference_steps=1).images

    def test_what_loading_takes(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path)
        load = MNISTDiffusionPipeline.from_pretrained
        assert load(tmp_path, device_map="meta").device.type == "meta"
        assert load(tmp_path, device_map="balanced").device.type in ("cpu", "cuda")
        for arguments in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
            assert load(tmp_path, **arguments).unet.dtype == torch.bfloat16
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

    def test_own_class_never_runs_the_folders_code(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path / "folder")
        canary = tmp_path / "ran"
        (tmp_path / "folder" / CODE_FILE).write_text(f"open({str(canary)!r}, 'w')")
        loaded = MNISTDiffusionPipeline.from_pretrained(tmp_path / "folder")
        assert type(loaded) is MNISTDiffusionPipeline
        assert not canary.exists()

    def test_two_versions_in_one_process(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        """Each draws by its own code, and saves it, whichever was loaded first."""
        kept = [tmp_path / "plain", tmp_path / "changed"]
        for folder in kept:
            pipeline.save_pretrained(folder)
        changed = CODE.replace(
            b"return unconditional + guidance_scale", b"return unconditional + 3 + guidance_scale"
        )  # as another release might
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
        for load in (Mine.from_pretrained, MNISTDiffusionPipeline.from_pretrained, load_plainly):
            loaded = load(tmp_path / "mine")
            loaded.set_progress_bar_config(disable=True)
            assert torch.equal(draw(loaded, 3, "d"), expected)
            loaded.save_pretrained(tmp_path / "again")
            assert (tmp_path / "again" / CODE_FILE).read_bytes() == CODE
            assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == CODE_INDEX
        assert type(Mine.from_pretrained(tmp_path / "mine")) is Mine

    def test_pushes_the_shipped_file(self, pipeline: MNISTDiffusionPipeline, hub: HubServer) -> None:
        Mine(**pipeline.components).push_to_hub("owner/mine")
        assert hub.repositories["owner/mine"].files()[CODE_FILE] == CODE

    def test_one_that_takes_more_keeps_it(self, pipeline: MNISTDiffusionPipeline, tmp_path: Path) -> None:
        class More(MNISTDiffusionPipeline):
            def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, mood: str = "calm", **values: Any):
                super().__init__(unet, scheduler, **values)
                self.register_to_config(mood=mood)

        More(**pipeline.components, mood="wild").save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["mood"] == "wild"
        with pytest.raises(FileError, match="mood"):
            MNISTDiffusionPipeline.from_pretrained(tmp_path)

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
