"""Guidance rules besides the pipeline's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mnist_diffusion.pipelines.pipeline_mnist_diffusion import (
    GuidanceStep,
    MNISTDiffusionPipeline,
    guided_prediction,
    prediction_type_of,
)


@dataclass(frozen=True)
class Autoguidance:
    """Guide away from a weaker model under the same class: `weak + scale * (strong - weak)`.

    Karras et al. (2024), https://arxiv.org/abs/2406.02507, equation 3. It costs two network evaluations where the scale
    is neither 0 nor 1. (What diffusers calls AutoGuidance drops layers of one network.)

    Args:
        weak: the weaker model, such as an earlier snapshot of the same run.

    Raises:
        ValueError: from the call of a pipeline with other images, classes, prediction target or noising process.
    """

    weak: MNISTDiffusionPipeline

    def __call__(self, step: GuidanceStep) -> Tensor:
        """The guided prediction of a step, float32 `[B, C, H, W]`."""
        if step.step == 0:
            weaker = _compared(self.weak)
            for name, value in _compared(step.pipeline).items():
                if weaker[name] != value:
                    raise ValueError(f"guidance: {name} of the weaker model must be {value}, got {weaker[name]}")
        strong, _ = step.predict(step.scales != 0, False)
        weak, _ = step.predict(step.scales != 1, False, unet=self.weak.unet)
        return guided_prediction(strong, weak, step.scales.to(strong.device).view(-1, 1, 1, 1))


def _compared(pipeline: MNISTDiffusionPipeline) -> dict[str, Any]:
    """The properties that two models must share for one to guide the other."""
    betas = () if pipeline.config.flow_matching else ("beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    return {
        **{name: getattr(pipeline, name) for name in ("image_shape", "num_classes", "device")},
        **{name: pipeline.config[name] for name in ("patch_size", "guidance_distilled", "flow_matching")},
        **{name: pipeline.scheduler.config.get(name) for name in ("num_train_timesteps", *betas)},
        "prediction_type": prediction_type_of(pipeline.scheduler),
    }
