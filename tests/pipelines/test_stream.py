"""Drawing that is watched and steered: what may change between steps, and how a stream ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.pipelines.samplers import build_sampler
from tests.pipelines.test_pipeline import NAN, CountingUNet, generators


class TestStream:
    def test_the_class_and_the_guidance_change_half_way(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = build_sampler("ddim", pipeline.scheduler.config)
        counted, labels = CountingUNet(pipeline), []
        pipeline.unet.register_forward_pre_hook(
            lambda module, arguments, named: labels.append(named["class_labels"].tolist()), with_kwargs=True
        )
        stream = pipeline.stream([3, 4], guidance_scale=2.0, num_inference_steps=4, generator=generators(1, 2))
        seen = [next(stream), stream.send({"class_labels": ["h", 8]}), stream.send({"guidance_scale": [1.0, 0]})]
        seen.append(next(stream))
        with pytest.raises(StopIteration):
            next(stream)
        assert labels == [[3, 4, 10, 10], [7, 8, 10, 10], [7, 10], [7, 10]]
        assert [done.nfe for done in seen] == [4, 8, 10, 12]
        assert counted.nfe == 12
        assert [done.step for done in seen] == [0, 1, 2, 3]
        unchanged = pipeline.stream([3, 4], guidance_scale=2.0, num_inference_steps=4, generator=generators(1, 2))
        assert torch.equal(next(unchanged).latents, seen[0].latents)
        assert not torch.equal(next(unchanged).latents, seen[1].latents)

    def test_samples_can_be_replaced(self, pipeline: MNISTDiffusionPipeline) -> None:
        pipeline.scheduler = build_sampler("ddim", pipeline.scheduler.config)
        one = pipeline.stream([3], num_inference_steps=3, generator=generators(1))
        other = pipeline.stream([3], num_inference_steps=3, generator=generators(2))
        next(one).latents = next(other).latents
        assert torch.equal(next(one).latents, next(other).latents)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"class_labels": [1, 2]}, "class_labels must be for 1 images"),
            ({"class_labels": [10]}, "class_labels must be from 0 to 9, got 10"),
            ({"guidance_scale": NAN}, "guidance_scale must be at least 0"),
            ({"eta": 1}, r"a stream takes class_labels and guidance_scale, got \['eta'\]"),
        ],
        ids=str,
    )
    def test_what_cannot_change(self, pipeline: MNISTDiffusionPipeline, changes: Any, message: str) -> None:
        stream = pipeline.stream([3], num_inference_steps=3)
        next(stream)
        with pytest.raises(ValueError, match=message):
            stream.send(changes)

    def test_one_that_is_left_frees_its_hooks(
        self, pipeline: MNISTDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        freed: list[str] = []
        monkeypatch.setattr(type(pipeline), "maybe_free_model_hooks", lambda self: freed.append("freed"))
        stream = pipeline.stream([3], num_inference_steps=3)
        next(stream)
        stream.close()
        assert freed == ["freed"]

    def test_a_callback_that_fails_ends_the_call_and_frees_its_hooks(
        self, pipeline: MNISTDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        freed: list[str] = []
        monkeypatch.setattr(type(pipeline), "maybe_free_model_hooks", lambda self: freed.append("freed"))
        with pytest.raises(StopIteration) as kept:
            pipeline([3], num_inference_steps=3, callback_on_step_end=lambda *_: next(iter(())))
        assert kept.tb is not None
        assert freed == ["freed"]

    def test_bad_arguments_are_refused_before_the_first_step(self, pipeline: MNISTDiffusionPipeline) -> None:
        with pytest.raises(ValueError, match="num_inference_steps must be"):
            pipeline.stream([3], num_inference_steps=0)
