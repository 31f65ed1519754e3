"""From teacher to student: the loss against its definition, and whole runs of the command."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, LCMScheduler
from torch import nn

from mnist_diffusion import distill
from mnist_diffusion.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    DistillationConfig,
    DistillConfig,
    SamplingSettings,
    TrainConfig,
)
from mnist_diffusion.data.dataset import ImageData
from mnist_diffusion.errors import UserError
from mnist_diffusion.method.distillation import (
    SNAP_TOLERANCE,
    distillation_objective,
    draw_trajectories,
    learned_points,
    snap_to_black_or_white,
    student_of,
)
from mnist_diffusion.method.objective import Batch
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline, prediction_type_of
from mnist_diffusion.pipelines.samplers import build_sampler, sampler_name, student_scheduler
from mnist_diffusion.training.run import load_teacher, validate_teacher, with_images_of_teacher
from tests.conftest import changed, make_pipeline
from tests.pipelines.test_pipeline import CountingUNet
from tests.support.survival import final_state

ONE_STEP = SamplingSettings(scheduler="lcm", num_inference_steps=1)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher of 28 x 28 pixels and the digits' classes."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "pipeline", seed=0)


def save_teacher(folder: Path, *, seed: int, **changes: Any) -> Path:
    pipeline = make_pipeline(seed=seed, **changes)
    pipeline.unet.register_to_config(sample_size=28)
    if pipeline.null_class is not None:
        pipeline.register_to_config(id2label={str(index): str(index) for index in range(10)})
    pipeline.save_pretrained(folder)
    return folder


def distillation(teacher: Path, **changes: Any) -> DistillationConfig:
    scales = (1.9, 1.0, 1.4, 2.8)
    return DistillationConfig(**{"teacher": str(teacher), "num_teacher_steps": 4, "guidance_scales": scales, **changes})


def student_config(teacher: Path, folder: Path, **train: Any) -> DistillConfig:
    defaults = {"max_steps": 4, "warmup_steps": 1, "num_eval_images": 4, "samples_per_class": 1, "optimizer": "muon"}
    often = {"checkpoint_every": "2 steps", "sample_every": None, "log_every_steps": 1, "pictures": False}
    return DistillConfig(
        data=DataConfig(source="digits", batch_size=4),
        distillation=distillation(teacher),
        sampling=ONE_STEP,
        train=TrainConfig(**{**defaults, **often, **train}),
        output_dir=str(folder),
    )


def run(config: DistillConfig, **train: Any) -> Path:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    return distill(config).folder


@pytest.fixture(scope="module")
def student_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that has learned a little, at two guidance scales."""
    learning: dict[str, Any] = {"max_steps": 40, "learning_rate": 5e-3, "ema_decay": 0.9, "checkpoint_every": None}
    config = student_config(teacher_folder, tmp_path_factory.mktemp("student") / "run", **learning)
    return run(changed(config, distillation={"guidance_scales": (1.0, 2.8)})) / "pipeline"


def make_batch(count: int, dropped: list[int], size: int = 8) -> Batch:
    noise = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[dropped] = True
    return Batch(torch.zeros_like(noise), torch.arange(count), noise, torch.zeros(count).long(), mask)


def loaded(teacher: Path, **config: Any) -> MNISTDiffusionPipeline:
    settings = DistillConfig(distillation=distillation(teacher), **config)
    return load_teacher(settings, Accelerator(cpu=True))


class Oracle(nn.Module):
    """A student that sees the image at the end of each trajectory exactly, off by `error`."""

    def __init__(self, ends: torch.Tensor, alphas_cumprod: torch.Tensor, error: float):
        super().__init__()
        self.ends, self.alphas_cumprod, self.error = ends, alphas_cumprod, error

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any, **_: Any) -> Any:
        self.sample, self.timestep, self.labels = sample, timestep, class_labels
        alpha = self.alphas_cumprod[timestep].double().view(-1, 1, 1, 1)
        image = self.ends.double().repeat(len(sample) // len(self.ends), 1, 1, 1) + self.error
        return ((alpha.sqrt() * sample.double() - image) / (1 - alpha).sqrt(),)


class TestLoss:
    def test_nearly_black_and_white_is_black_and_white(self) -> None:
        images = torch.tensor([-1.2, -0.97, -0.95, 0.0, 0.95, 0.97, 1.2])
        expected = torch.tensor([-1.0, -1.0, -0.95, 0.0, 0.95, 1.0, 1.0])
        torch.testing.assert_close(snap_to_black_or_white(images, SNAP_TOLERANCE), expected)

    @pytest.mark.parametrize("error", [-0.25, 0.25])
    def test_it_is_the_error_of_the_image_at_every_point(self, error: float, teacher_folder: Path) -> None:
        """Of a student that is too dark or bright everywhere: the Huber of it, but for black or white, where it is cut.

        So the error ends where clipping makes it right.
        """
        teacher = make_pipeline()
        config = distillation(teacher_folder, points_per_trajectory=4)
        teacher.scheduler = build_sampler("dpmpp", teacher.scheduler.config)
        batch = dataclasses.replace(make_batch(3, dropped=[1]), timesteps=torch.full((3,), 8))
        trajectory = draw_trajectories(teacher, config, batch)
        ends = snap_to_black_or_white(trajectory.latents[-1], SNAP_TOLERANCE)
        student = Oracle(ends, teacher.scheduler.alphas_cumprod, error)
        loss = distillation_objective(config, teacher).loss(student, batch).mean()
        errors = torch.where(ends == (1 if error > 0 else -1), 0.0, error).double()
        expected = ((errors**2 + 0.25).sqrt() - 0.5).mean()
        assert float(loss) == pytest.approx(float(expected), abs=2e-4)
        assert student.timestep.tolist() == [t for t in (999, 749, 499, 249) for _ in range(3)]
        assert student.labels.tolist() == [0, 40, 2] * 4
        torch.testing.assert_close(student.sample[:3], batch.noise)
        torch.testing.assert_close(student.sample[3:], trajectory.latents[:-1].flatten(0, 1))

    def test_the_noise_is_always_learned_from_and_every_other_point_comes_up(self) -> None:
        noise, others = learned_points(DistillationConfig(teacher="a/b"), torch.arange(100))
        assert (noise == 0).all()
        assert set(others.tolist()) == set(range(1, 8))

    def test_trajectories_are_the_teachers_own_pictures(self, teacher_folder: Path) -> None:
        teacher, config = make_pipeline(), distillation(teacher_folder, guidance_scales=(3.0, 1.5, 2.0))
        batch = dataclasses.replace(make_batch(3, dropped=[1]), timesteps=torch.tensor([3, 2, 4]))
        ends = draw_trajectories(teacher, config, batch).latents[-1]
        common: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
        guided = teacher([0, 2], guidance_scale=[3.0, 1.5], latents=batch.noise[[0, 2]], **common).images
        free = teacher(None, latents=batch.noise[1:2], **common).images
        torch.testing.assert_close(ends[[0, 2]].clamp(-1, 1) / 2 + 0.5, guided, atol=1e-5, rtol=0)
        torch.testing.assert_close(ends[1:2].clamp(-1, 1) / 2 + 0.5, free, atol=1e-5, rtol=0)

    def test_students_steps_are_points_of_the_trajectory(self) -> None:
        teacher = make_pipeline()
        student = build_sampler("lcm", student_scheduler(teacher.scheduler.config).config)
        trajectory = build_sampler("dpmpp", teacher.scheduler.config)
        trajectory.set_timesteps(8)
        for steps in (1, 2, 4, 8):
            student.set_timesteps(steps)
            assert student.timesteps.tolist() == trajectory.timesteps.tolist()[:: 8 // steps]


class TestTeachers:
    def test_what_a_teacher_cannot_teach(self, tmp_path: Path, teacher_folder: Path, digits: ImageData) -> None:
        pipeline = MNISTDiffusionPipeline.from_pretrained(teacher_folder)
        pipeline.register_to_config(guidance_distilled=[pipeline.config.guidance_scale])
        pipeline.save_pretrained(student := tmp_path / "student")
        unconditional = save_teacher(tmp_path / "unconditional", seed=0, conditional=False)
        letters = dataclasses.replace(digits, class_names=tuple("abcdefghij"))
        for teacher, data, message in (
            (student, digits, "is itself a student"),
            (unconditional, digits, r"guidance_scales=\[1\.9, .*\] must be \[1\] for an unconditional teacher"),
            (teacher_folder, letters, r"class names: \('0', .* for the pipeline, but \('a', 'b'"),
        ):
            with pytest.raises(UserError, match=message):
                validate_teacher(student_config(teacher, tmp_path), loaded(teacher), data)

    def test_images_of_the_teachers_run(self, tmp_path: Path) -> None:
        teacher = save_teacher(tmp_path / "run" / "pipeline", seed=0)
        named = student_config(teacher, tmp_path / "student")
        silent = dataclasses.replace(named, data=DataConfig(batch_size=4))
        told = Config(data=DataConfig(source="digits", image_size=28, batch_size=99), train=TrainConfig(seed=5))
        told.save(tmp_path / "run" / "config.yaml")
        found = with_images_of_teacher(silent)
        assert found.data == DataConfig(source="digits", image_size=28, batch_size=4)
        assert found.distillation.split_seed == 5
        assert with_images_of_teacher(named) == named


class TestRuns:
    def test_a_student_is_a_pipeline_folder_like_any_other(self, teacher_folder: Path, student_folder: Path) -> None:
        own = MNISTDiffusionPipeline.from_pretrained(student_folder)
        plain = DiffusionPipeline.from_pretrained(student_folder, trust_remote_code=True)
        pictures = []
        for pipeline in (own, plain):
            assert type(pipeline.scheduler) is LCMScheduler
            counter, generator = CountingUNet(pipeline), torch.Generator().manual_seed(0)
            pictures.append(pipeline(class_labels=[3, "7"], generator=generator, output_type="pt").images)
            assert counter.nfe == 2
        assert torch.equal(*pictures)
        card = (student_folder / "README.md").read_text()
        method = "4 steps of dpmpp at guidance 1, 2.8"
        for part in ("This is a distilled student", f"| `{teacher_folder.name}`, weights", method, "1 step of lcm"):
            assert part in card
        assert "pipeline(class_labels=[3]).images" in card
        assert "other scales that a call may name:\n2.8. Others are refused." in card

    def test_guidance_scale_is_explained(self, student_folder: Path) -> None:
        student = MNISTDiffusionPipeline.from_pretrained(student_folder)
        for scale in (5, 1.5, 0, [1.0, 2.0]):
            with pytest.raises(ValueError, match=r"guidance_scale must be one of \[1\.0, 2\.8\], distilled into"):
                student([1, 2], guidance_scale=scale)
        counter = CountingUNet(student)
        student([1, 2])
        student([1, 2], guidance_scale=[1.0, torch.tensor(2.8)])
        student()
        assert counter.labels == [[1, 2], [1, 12], [20]]
        with pytest.raises(ValueError, match="have no effect on a distilled model"):
            student([1, 2], guidance_interval=(0.2, 0.8))
        with pytest.raises(ValueError, match="cannot be inverted with a distilled model"):
            student.invert(torch.rand(1, 1, 28, 28), 1)

    def test_the_student_comes_nearer_to_the_teachers_pictures(
        self, teacher_folder: Path, student_folder: Path
    ) -> None:
        teacher, student = loaded(teacher_folder), MNISTDiffusionPipeline.from_pretrained(student_folder)
        noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        common: dict[str, Any] = {"class_labels": range(10), "latents": noise, "output_type": "pt"}
        goals = {scale: teacher(**common, num_inference_steps=4, guidance_scale=scale).images for scale in (1.0, 2.8)}
        learned = {scale: student(**common, guidance_scale=scale).images for scale in goals}
        student.unet = student_of(teacher, 2).eval()
        for scale, goal in goals.items():
            unlearned = student(**common, guidance_scale=scale).images
            assert (learned[scale] - goal).square().mean() < 0.6 * (unlearned - goal).square().mean()
        assert (learned[1.0] - goals[1.0]).square().mean() < (learned[2.8] - goals[1.0]).square().mean()

    @pytest.mark.parametrize(
        ("diffusion", "scheduler", "defaults"),
        [
            ({"prediction_type": "epsilon"}, "TCDScheduler", {"num_inference_steps": 4, "eta": 0.3}),
            ({"prediction_type": "sample"}, "lcm", {"num_inference_steps": 1}),
            ({"prediction_type": "flow_prediction"}, "lcm", {"num_inference_steps": 2}),
            (None, "lcm", {}),  # an unconditional one
        ],
        ids=str,
    )
    def test_other_teachers_and_samplers(self, diffusion: Any, scheduler: str, defaults: Any, tmp_path: Path) -> None:
        kind: dict[str, Any] = {"diffusion": DiffusionConfig(**diffusion or {}), "conditional": diffusion is not None}
        config = student_config(save_teacher(tmp_path / "teacher", seed=0, **kind), tmp_path / "run", max_steps=1)
        config = changed(config, sampling={"scheduler": scheduler, **defaults})
        if diffusion is None:
            config = changed(config, distillation={"guidance_scales": (1.0,)})
        student = MNISTDiffusionPipeline.from_pretrained(run(config) / "pipeline")
        flow = kind["diffusion"].prediction_type == "flow_prediction"
        assert prediction_type_of(student.scheduler) == ("flow_prediction" if flow else "v_prediction")
        assert sampler_name(student.scheduler) == scheduler
        assert {name: student.config[name] for name in defaults} == defaults
        assert student(None if diffusion is None else 3, output_type="pt").images.isfinite().all()

    def test_resumed_from_a_teacher_that_has_moved_alone_and_of_any_micro_batch(
        self, teacher_folder: Path, tmp_path: Path
    ) -> None:
        config = student_config(teacher_folder, tmp_path / "run", num_threads=1)
        whole = final_state(folder := run(config))
        shutil.rmtree(folder / "checkpoints" / "step-4")
        other = save_teacher(tmp_path / "other", seed=1)
        with pytest.raises(UserError, match="the objective was distillation, fingerprint"):
            run(changed(config, distillation={"teacher": str(other)}), resume=True)
        with pytest.raises(UserError, match=r"distillation\.guidance_scales was \[1\.9, .*\], now \[3\.0\]"):
            run(changed(config, distillation={"guidance_scales": (3.0,)}), resume=True)
        moved = save_teacher(tmp_path / "moved", seed=0)
        resumed = final_state(run(changed(config, distillation={"teacher": str(moved)}), resume=True))
        assert [name for name in whole if whole[name] != resumed[name]] == []
        micro = dataclasses.replace(config, output_dir=str(tmp_path / "micro"))
        losses = [line["loss"] for line in final_state(run(micro, gradient_accumulation_steps=2))["log"]]
        assert losses == pytest.approx([line["loss"] for line in whole["log"]], rel=1e-3)
