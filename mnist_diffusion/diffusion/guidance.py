"""Guidance rules beside the pipeline's own, and how a command names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import guiders
from torch import Tensor

from mnist_diffusion.checks import AUTOGUIDANCE, PLAIN_GUIDANCE, require_guidance
from mnist_diffusion.diffusion.pipeline import fingerprint, load_pipeline
from mnist_diffusion.sharing.pipeline import GuidanceStep, MNISTDiffusionPipeline, guided_prediction, prediction_type_of


@dataclass(frozen=True)
class Autoguidance:
    """Away from what a weaker model predicts under the same classes: `weak + scale * (strong - weak)`.

    Karras et al. (2024), https://arxiv.org/abs/2406.02507, equation 3. It takes two passes where the scale is neither 0
    nor 1. (What diffusers calls AutoGuidance drops layers of one network.)

    Args:
        weak: the weaker model, such as an earlier snapshot of the same run.

    Raises:
        ValueError: from the call of a pipeline that draws other images, has other classes, or was trained for another
            prediction or noising process.
    """

    weak: MNISTDiffusionPipeline

    def __call__(self, step: GuidanceStep) -> Tensor:
        """The guided prediction of a step, float32 `[B, C, H, W]`."""
        if step.step == 0:
            wanted = _kind(step.pipeline)
            for what, found in _kind(self.weak).items():
                if found != wanted[what]:
                    raise ValueError(f"guidance: {what} of the weaker model must be {wanted[what]}, got {found}")
        strong, _ = step.predict(step.scales != 0, False)
        weak, _ = step.predict(step.scales != 1, False, unet=self.weak.unet)
        return guided_prediction(strong, weak, step.scales.to(strong.device).view(-1, 1, 1, 1))


def _kind(pipeline: Any) -> dict[str, Any]:
    """What two models must have in common for one to guide the other."""
    betas = () if pipeline.config.flow_matching else ("beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    process = {name: pipeline.scheduler.config.get(name) for name in ("num_train_timesteps", *betas)}
    process["prediction_type"] = prediction_type_of(pipeline.scheduler)
    own = {name: getattr(pipeline, name) for name in ("image_shape", "num_classes", "device")}
    return {
        **own,
        **{name: pipeline.config[name] for name in ("patch_size", "guidance_distilled", "flow_matching")},
        **process,
    }


def guidance_arguments(
    pipeline: MNISTDiffusionPipeline,
    name: str,
    scale: float | None = None,
    interval: tuple[float, float] | None = None,
    *,
    load: Callable[[str], MNISTDiffusionPipeline] | None = None,
) -> dict[str, Any]:
    """The arguments of a call that draws by a rule named on a command line.

    Args:
        pipeline: draws.
        name: `cfg`, `autoguidance:` with the weaker model's folder or Hub id, or a class of `diffusers.guiders`.
        scale: the guidance scale; the pipeline's own if omitted.
        interval: the noise levels at which guidance acts; the pipeline's own if omitted.
        load: gives the weaker model; it is loaded beside the pipeline if omitted.

    Raises:
        ConfigError: there is no such rule.
        UserError: the weaker model could not be loaded.
    """
    require_guidance("guidance", name)
    given = {"guidance_scale": scale, "guidance_interval": interval}
    plain: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if name.startswith(AUTOGUIDANCE):
        plain["guidance"] = Autoguidance((load or partial(load_beside, pipeline))(name.removeprefix(AUTOGUIDANCE)))
    elif name != PLAIN_GUIDANCE:
        own = plain.pop("guidance_scale", pipeline.config.guidance_scale)
        plain["guidance"] = getattr(guiders, name)(guidance_scale=own)
    return plain


def fingerprints(pipeline: MNISTDiffusionPipeline, arguments: Mapping[str, Any]) -> list[str]:
    """Those of the networks with which a call with these arguments draws."""
    rule = arguments.get("guidance")
    return [fingerprint(each) for each in (pipeline, *([rule.weak] if isinstance(rule, Autoguidance) else []))]


def load_beside(pipeline: MNISTDiffusionPipeline, source: str) -> MNISTDiffusionPipeline:
    """A second pipeline on the device and in the precision of the first."""
    return load_pipeline(source, device=str(pipeline.device), dtype=str(pipeline.dtype).removeprefix("torch."))
