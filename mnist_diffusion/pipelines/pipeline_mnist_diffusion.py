"""Class-conditional image diffusion with classifier-free guidance, in one file that needs torch and diffusers only.

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("path/or/repo", trust_remote_code=True)
    image = pipeline(class_labels=[3], guidance_scale=5).images[0]

This file ships inside every pipeline folder, so it must not import anything of the package it comes from.
"""

import contextlib
import copy
import hashlib
import inspect
import json
import math
import numbers
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

SOURCE = Path(__file__).read_bytes()
MODULE = f"pipeline_mnist_diffusion_{hashlib.sha256(SOURCE).hexdigest()[:12]}"
"""The name of this file in a pipeline folder. To diffusers, files of one name are one module, which the last one loaded
replaces, so that two versions in one process must have two names."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
FLOW = "flow_prediction"
SECOND_ORDER_IN_SIGMA = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
LARGEST_SIGMA = 80.0


def guided_prediction(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: Any) -> torch.Tensor:
    """Classifier-free guidance: `unconditional + guidance_scale * (conditional - unconditional)`.

    Ho and Salimans (2022), https://arxiv.org/abs/2207.12598, write `(1 + w) * conditional - w * unconditional`
    (equation 6): their `w` is `guidance_scale - 1`. Scale 1 is the conditional prediction, 0 the unconditional one.

    Args:
        conditional: prediction under the class label, `[B, C, H, W]`.
        unconditional: prediction under the null class, `[B, C, H, W]`.
        guidance_scale: a number, or a tensor that broadcasts to `[B, C, H, W]`.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


@dataclass
class GuidanceStep:
    """A step of drawing `B` images, as a guidance rule is given it to make one prediction of.

    Args:
        pipeline: draws them.
        step: its number, 0 for the first.
        num_steps: how many there are.
        timestep: where it begins.
        model_input: what the network sees, float32 `[B, C, H, W]`.
        conditions: what the images are conditioned on.
        acts: whether it is within the guidance interval.
        scales: their guidance scales, float32 `[B]` on the CPU, lowered to 1 where guidance does not act.
        passes: network passes so far, summed over the images.
    """

    pipeline: "MNISTDiffusionPipeline"
    step: int
    num_steps: int
    timestep: torch.Tensor
    model_input: torch.Tensor
    conditions: "Conditions"
    acts: bool
    scales: torch.Tensor
    passes: int = 0

    def predict(self, conditional: Any = True, unconditional: Any = True, *, unet: Any = None) -> Any:
        """The predictions under the classes and under the null class, float32 `[B, C, H, W]` each, from one pass.

        Each is asked for, or for some of the images alone (bool `[B]`), and zero elsewhere. `unet` takes the place of
        the pipeline's own network.
        """
        found = self.model_input.new_zeros(2, *self.model_input.shape)
        asked, null = (torch.as_tensor(each).expand(len(found[0])) for each in (conditional, unconditional))
        kept, null_rows, null_class = asked[self.conditions.rows], null.nonzero().flatten(), self.pipeline.null_class
        rows, labels, shares = (part[kept].to(found.device) for part in vars(self.conditions).values())
        null_rows = null_rows.to(found.device)
        labels = torch.cat([labels, torch.full_like(null_rows, null_class or 0)])
        if len(inputs := self.model_input[torch.cat([rows, null_rows])]):
            predictions = self.pipeline._unet_pass(unet, inputs, self.timestep, None if null_class is None else labels)
            found[0].index_add_(0, rows, predictions[: len(rows)] * shares.view(-1, 1, 1, 1))
            found[1][null_rows] = predictions[len(rows) :]
        self.passes += len(inputs)
        return found[0], found[1]


def classifier_free_guidance(step: GuidanceStep, guidance_rescale: float = 0.0) -> torch.Tensor:
    """The rule of a call that names none: [`guided_prediction`], and [`rescale_guidance`] for scales above 1."""
    conditional, unconditional = step.predict(step.scales != 0, step.scales != 1)
    scales = step.scales.to(conditional.device).view(-1, 1, 1, 1)
    guided = guided_prediction(conditional, unconditional, scales)
    if guidance_rescale > 0:
        guided = torch.where(scales > 1, rescale_guidance(guided, conditional, guidance_rescale), guided)
    return guided


def no_guidance(step: GuidanceStep) -> torch.Tensor:
    """The prediction under no class."""
    return step.predict(False)[1]


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, guidance_rescale: float) -> torch.Tensor:
    """Bring the standard deviation of each guided prediction back towards that of the conditional one.

    Lin et al. (2023), https://arxiv.org/abs/2305.08891, equations 15 and 16; `guidance_rescale` is their phi.
    """
    dims = tuple(range(1, guided.ndim))
    rescaled = guided * (conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided


def prediction_type_of(scheduler: Any) -> Any:
    """What a network should predict for a scheduler: those of flow matching do not say so themselves."""
    return FLOW if type(scheduler).__name__.startswith("FlowMatch") else scheduler.config.get("prediction_type")


def predicted_original_sample(
    model_output: torch.Tensor, sample: torch.Tensor, alpha_cumprod: torch.Tensor | float, prediction_type: str
) -> torch.Tensor:
    """The clean image that a prediction at `sample` implies, all `[B, C, H, W]`.

    DDPM, equation 15 for `epsilon`; Salimans and Ho (2022), https://arxiv.org/abs/2202.00512, appendix D for
    `v_prediction`. For `flow_prediction` the sample is on a straight path (Lipman et al., 2022,
    https://arxiv.org/abs/2210.02747), elsewhere its variance is 1; `alpha_cumprod` is the signal's share of it.
    """
    if prediction_type == "sample":
        return model_output
    signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    if prediction_type == FLOW:
        return sample - noise / (signal + noise) * model_output
    if prediction_type == "v_prediction":
        return signal * sample - noise * model_output
    return (sample - noise * model_output) / signal


@dataclass
class DenoisingStep:
    """What there is after a step of drawing `B` images.

    Args:
        step: its number, 0 for the first.
        timestep: where it began.
        latents: the samples after it, float32 `[B, C, H, W]` on the device.
        model_output: the guided prediction, float32 `[B, C, H, W]`.
        pred_original_sample: the clean image that it implies, float32 `[B, C, H, W]`.
        passes: network passes so far, summed over the images.
    """

    step: int
    timestep: torch.Tensor
    latents: torch.Tensor
    model_output: torch.Tensor
    pred_original_sample: torch.Tensor
    passes: int

    def images(self, output_type: str = "pil") -> Any:
        """The samples as images, as a call with this `output_type` gives them."""
        return VaeImageProcessor().postprocess(self.latents, output_type)


@dataclass(frozen=True)
class Conditions:
    """Pairs of an image's row and a class, with the class's share in the image's conditional prediction, `[P]` each.

    None at all where images are drawn under no class.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    shares: torch.Tensor


class MNISTDiffusionPipeline(DiffusionPipeline):
    """Draws images of given classes.

    Args:
        unet: a `UNet2DModel`. With class embeddings, the last of its `num_class_embeds` is the null class; without,
            the pipeline is unconditional.
        scheduler: any diffusers scheduler made from the training scheduler's configuration.
        id2label: names of the classes by index; a call may then name classes in place of numbers.
        num_inference_steps: denoising steps if a call names none.
        guidance_scale: guidance scale if a call names none.
        guidance_interval: noise levels at which guidance acts, if a call names none.
        eta: noise of the schedulers that take an eta, if a call names none.
        patch_size: side of the square patches whose pixels are the channels of the network's input and output.
        guidance_distilled: scales at which the network has learned to draw as if guided, in one pass per step. Others
            cannot be asked for then. It has embeddings for all classes at each of them, one scale after the other, and
            then the null class. `True` stands for `guidance_scale` alone.
        flow_matching: whether the network was trained by flow matching; as the scheduler is, if left out.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "model_output", "pred_original_sample"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        eta: float = 0.0,
        patch_size: int = 1,
        guidance_distilled: bool | Sequence[float] = (),
        flow_matching: bool | None = None,
    ):
        super().__init__()
        scales = [guidance_scale] if guidance_distilled is True else list(guidance_distilled or ())
        if scales != (learned := getattr(unet, "guidance_distilled", scales)):
            raise ValueError(
                f"guidance_distilled must be {learned} for this network, into which guidance at these scales was "
                f"distilled, got {scales}; from_pipe passes it on"
            )
        if scales:
            if guidance_scale not in scales:
                raise ValueError(f"guidance_scale must be one of guidance_distilled={scales}, got {guidance_scale!r}")
            unet.guidance_distilled = scales
        self.register_modules(unet=unet, scheduler=scheduler)
        names = None if id2label is None else {str(index): str(name) for index, name in id2label.items()}
        self.register_to_config(
            id2label=names,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=list(guidance_interval),
            eta=eta,
            patch_size=patch_size,
            guidance_distilled=scales or False,  # not an empty list, which diffusers takes for a component's
            flow_matching=prediction_type_of(scheduler) == FLOW if flow_matching is None else flow_matching,
        )
        self._interrupt = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and hasattr(value, "register_to_config"):
            # Not for another solver that is made from this one's configuration, which has kinds of its own.
            value.register_to_config(_use_default_values=["algorithm_type", "solver_type"])
        super().__setattr__(name, value)

    @property
    def null_class(self) -> Any:
        """The label that stands for no class, the last embedding; None for an unconditional model."""
        embeddings = self.unet.config.num_class_embeds
        return None if embeddings is None else embeddings - 1

    @property
    def num_classes(self) -> Any:
        """How many classes there are, the null class not counted; None for an unconditional model."""
        return None if self.null_class is None else self.null_class // max(1, len(self.config.guidance_distilled or ()))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        size, patch = self.unet.config.sample_size, self.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels // patch**2, height * patch, width * patch)

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop, by setting `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the last call."""
        return self._num_timesteps

    def compile(self, **options: Any) -> None:
        """Compile the network in place, with options of `torch.compile`; the first call of each size takes a minute."""
        self.unet.compile(**options)

    # Saving.

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and, beside it, this file, so that plain diffusers can load the folder."""
        super().save_config(save_directory, **kwargs)
        # This file as it was imported, whatever has become of it, and whatever subclass of the class in it is saved.
        (Path(save_directory) / f"{MODULE}.py").write_bytes(SOURCE)
        index_file = Path(save_directory) / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [MODULE, MNISTDiffusionPipeline.__name__]
        index.pop("_name_or_path", None)  # a place on this machine
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        values = super()._dict_from_json_file(json_file)
        if isinstance(values.get("_class_name"), list):
            values["_class_name"] = values["_class_name"][-1]
        return values

    # Inputs.

    def label_ids(self, class_labels: Any) -> list[int] | None:
        """Class indices for any spelling of `class_labels`: an int, a name, or a sequence, array or tensor of them.

        Raises:
            TypeError: a label is neither an integer nor a name.
            ValueError: there is no such class, the list is empty or nested, or the model is unconditional.
        """
        if class_labels is None:
            return None
        if self.num_classes is None:
            raise ValueError(f"class_labels must be None for an unconditional model, got {class_labels!r}")
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            if class_labels.ndim > 1:
                raise ValueError(f"class_labels must have at most one dimension, got shape {tuple(class_labels.shape)}")
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence | range):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError(f"class_labels must name at least one class, got {class_labels!r}")
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: Any) -> int:
        if isinstance(label, torch.Tensor | np.ndarray) and label.ndim == 0:
            label = label.item()
        if isinstance(label, str):
            ids = {name: int(index) for index, name in (self.config.id2label or {}).items()}
            if label not in ids:
                raise ValueError(f"class_labels: there is no class named {label!r}, the names are {list(ids)}")
            return ids[label]
        if isinstance(label, bool | np.bool_) or not isinstance(label, numbers.Integral):
            raise TypeError(f"class_labels must be integers or class names, got {label!r} ({type(label).__name__})")
        if not 0 <= int(label) < self.num_classes:
            raise ValueError(f"class_labels must be from 0 to {self.num_classes - 1}, got {label}")
        return int(label)

    def _conditions(self, class_labels: Any, num_images_per_label: int) -> tuple[Conditions, int]:
        """What each image is conditioned on, and how many images there are."""
        _check_count("num_images_per_label", num_images_per_label)
        repeats = int(num_images_per_label)
        if self.num_classes is not None and getattr(class_labels, "ndim", 0) == 2:
            weights = torch.as_tensor(class_labels)
            if weights.is_floating_point():
                weights = weights.float().cpu()
                if len(weights) == 0 or weights.shape[1] != self.num_classes:
                    wanted = f"[images, {self.num_classes}]"
                    raise ValueError(f"class_labels as weights must be {wanted}, got shape {tuple(weights.shape)}")
                if not (weights >= 0).all() or not torch.allclose(weights.sum(dim=1), torch.tensor(1.0), atol=1e-4):
                    raise ValueError("class_labels as weights must be at least 0 and sum to 1 for each image")
                weights = weights.repeat_interleave(repeats, dim=0)
                rows, labels = weights.nonzero(as_tuple=True)
                if len(rows) > len(weights):  # mixed: each class for all images, as the last bits depend on the batch
                    used = torch.tensor(list(dict.fromkeys(labels.tolist())))
                    labels, rows = torch.cartesian_prod(used, torch.arange(len(weights))).T
                return Conditions(rows, labels, weights[rows, labels]), len(weights)
        ids = self.label_ids(class_labels)
        labels = torch.tensor(ids or [], dtype=torch.int64).repeat_interleave(repeats)
        return Conditions(torch.arange(len(labels)), labels, torch.ones(len(labels))), len(labels) or repeats

    def _guidance_scales(self, guidance_scale: Any, batch_size: int) -> torch.Tensor:
        """One scale per image, float32 `[B]` on the CPU."""
        scales = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if getattr(scales, "ndim", 0) > 1:
            raise ValueError(f"guidance_scale must be a number or one per image, got shape {tuple(scales.shape)}")
        scales = scales.tolist() if isinstance(scales, torch.Tensor | np.ndarray) else scales
        scales = list(scales) if isinstance(scales, list | tuple) else [scales] * batch_size
        if len(scales) != batch_size:
            raise ValueError(f"guidance_scale must be one number or {batch_size} (one per image), got {len(scales)}")
        for scale in scales:
            _check_number("guidance_scale", scale, low=0)
        return torch.tensor([float(scale) for scale in scales], dtype=torch.float32)

    def _conditioned(
        self, class_labels: Any, num_images_per_label: int, guidance_scale: Any
    ) -> tuple[Conditions, torch.Tensor]:
        """What a [`GuidanceStep`] takes: labels for these scales, at scale 1, if guidance was distilled."""
        conditions, batch_size = self._conditions(class_labels, num_images_per_label)
        if class_labels is None and guidance_scale is not None:
            raise ValueError(f"guidance_scale needs class_labels, got guidance_scale={guidance_scale!r} without them")
        scales = self._guidance_scales(guidance_scale, batch_size)
        if not (learned := self.config.guidance_distilled):
            return conditions, scales
        apart = (scales[:, None].double() - torch.tensor(learned, dtype=torch.float64)).abs()
        if (apart.amin(dim=1) > 1e-5).any():
            other = float(scales[apart.amin(dim=1).argmax()])
            raise ValueError(
                f"guidance_scale must be one of {learned} for this model, got {other:g}: guidance at these scales was "
                "distilled into its weights; for another scale distil the teacher again"
            )
        if class_labels is not None:
            labels = conditions.labels + self.num_classes * apart.argmin(dim=1)[conditions.rows]
            conditions = replace(conditions, labels=labels)
        return conditions, torch.ones_like(scales)

    def _rule(self, guidance: Any, class_labels: Any, scale: Any, interval: Any, rescale: Any) -> Any:
        """The guidance rule of a call, which takes a [`GuidanceStep`]."""
        if interval is not None:
            if not isinstance(interval, list | tuple) or len(interval) != 2:
                raise TypeError(f"guidance_interval must be a pair (low, high), got {interval!r}")
            for bound in interval:
                _check_number("guidance_interval", bound, low=0, high=1)
            if interval[0] > interval[1]:
                raise ValueError(f"guidance_interval must not be reversed, got {interval!r}")
        _check_number("guidance_rescale", rescale, low=0, high=1)
        rule, guider = type(guidance).__name__, hasattr(guidance, "prepare_inputs")
        if self.config.guidance_distilled and (interval or rescale or guidance):
            raise ValueError(
                f"guidance_interval={interval!r}, guidance_rescale={rescale!r}, guidance={rule} have no effect on this "
                "model, whose guidance was distilled into its weights"
            )
        if guidance is None:
            return partial(classifier_free_guidance, guidance_rescale=rescale)
        if class_labels is None:
            raise ValueError(f"guidance needs class_labels, got guidance={rule} without them")
        if not callable(guidance) or isinstance(guidance, type):
            raise TypeError(f"guidance must be a function of a GuidanceStep or a guider of diffusers, got {guidance!r}")
        for name, value in (("guidance_rescale", rescale or None), ("guidance_scale", scale if guider else None)):
            if value is not None:
                raise ValueError(f"{name}={value!r} has no effect with guidance={rule}, which decides itself")
        return _rule_of_guider(copy.deepcopy(guidance)) if guider else guidance

    def _check_callback(self, callback: Any, tensor_inputs: Sequence[str]) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end must be callable, got {callback!r}")
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )

    def _check_scheduler(self) -> None:
        name, config = type(self.scheduler).__name__, self.scheduler.config
        arguments = inspect.signature(type(self.scheduler).__init__).parameters
        flow = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
        if not flow == (prediction_type_of(self.scheduler) == FLOW) == self.config.flow_matching:
            raise ValueError(
                f"scheduler: {name} with prediction_type={config.get('prediction_type')!r} does not fit a model with "
                f"flow_matching={self.config.flow_matching}; for flow matching take one whose name begins with "
                f"FlowMatch, or DPMSolverMultistepScheduler with use_flow_sigmas=True, prediction_type={FLOW!r}, for "
                "others one made from the model's own scheduler's configuration"
            )
        if not flow and not {"beta_schedule", "prediction_type"} <= arguments.keys():
            raise ValueError(
                f"scheduler: {name} ignores the betas or the prediction type that the model was trained with; use one "
                "that is made from them, such as DDIMScheduler, DPMSolverMultistepScheduler or EulerDiscreteScheduler"
            )
        if "Inverse" in name or "timestep_back" in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"scheduler: {name} does not go from noise to images one step at a time")
        if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
            raise ValueError(
                f"scheduler: {name} has rescale_betas_zero_snr=True with prediction_type='epsilon', but at zero SNR "
                "the image cannot be recovered from a prediction of the noise"
            )

    def _check_steps(self, num_inference_steps: Any, timesteps: Any, sigmas: Any) -> None:
        given = {"timesteps": timesteps, "sigmas": sigmas}
        custom = {name: value for name, value in given.items() if value is not None}
        if len(custom) + (num_inference_steps is not None) > 1:
            names = [*(["num_inference_steps"] if num_inference_steps is not None else []), *custom]
            raise ValueError(f"only one of {names} can be given")
        available = self.scheduler.config.num_train_timesteps
        if num_inference_steps is not None:
            _check_count("num_inference_steps", num_inference_steps, high=available)
        for name, values in custom.items():
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{name} cannot be chosen with {type(self.scheduler).__name__}")
            if not isinstance(values, list | tuple | np.ndarray | torch.Tensor) or len(values) == 0:
                raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
            top = available - 1 if name == "timesteps" else None
            for value in values:
                _check_number(name, value, low=0, high=top)
            if any(later >= earlier for earlier, later in pairwise(values)):
                raise ValueError(f"{name} must fall from step to step, got {list(values)}")

    # Drawing.

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        num_images_per_label: int = 1,
        guidance_scale: float | Sequence[float] | torch.Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        num_inference_steps: Any = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance: Any = None,
    ) -> Any:
        """Draw one image for each class label.

        Args:
            class_labels: an int, a class name, or a list, array or tensor of them; or float weights
                `[images, num_classes]`, the share of each class in the conditional prediction, which sum to 1 for each
                image. None draws unconditionally.
            num_images_per_label: images for each label, next to each other in the result.
            guidance_scale: one number or one per image. 1 is conditional and 0 unconditional, with one network pass
                per step; anything else takes two. See [`guided_prediction`] for how other papers' `w` maps to it.
                For a model with distilled guidance, one of the scales that it has learned.
            guidance_interval: `(low, high)` in t / num_train_timesteps, 0 being clean: scales above 1 act inside only;
                outside, the prediction is conditional. Kynkäänniemi et al. (2024), https://arxiv.org/abs/2404.07724.
            guidance_rescale: phi of [`rescale_guidance`], from 0 (off) to 1.
            num_inference_steps: denoising steps.
            timesteps: the timesteps themselves, falling, if the scheduler takes them.
            sigmas: the noise levels themselves, falling, if the scheduler takes them.
            eta: noise of DDIM and TCD, from 0 (deterministic) to 1.
            generator: one for the batch, or one per image, which then does not depend on the batch.
            latents: the noise to start from, `[B, C, H, W]` of unit variance.
            output_type: `pil`, `np` (float `[B, H, W, C]` in [0, 1]), `pt` (float `[B, C, H, W]` in [0, 1]) or `latent`
                (float `[B, C, H, W]` in [-1, 1], not clamped).
            return_dict: False returns a tuple `(images,)`.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; what it
                returns replaces `latents`; setting `pipeline._interrupt = True` ends the loop.
            callback_on_step_end_tensor_inputs: which of `latents`, `model_output`, `pred_original_sample` it gets.
            guidance: another rule than [`classifier_free_guidance`]: a function of a [`GuidanceStep`] that gives the
                prediction; or a guider, one of `diffusers.guiders` that asks for these two predictions alone and has a
                scale of its own.

        Returns:
            `ImagePipelineOutput` with `.images`, or the tuple.

        Raises:
            TypeError, ValueError: an argument cannot work; nothing has been computed yet.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        wanted = (class_labels, num_images_per_label, guidance_scale, guidance_interval, guidance_rescale)
        solved: tuple[Any, ...] = (num_inference_steps, timesteps, sigmas, eta, generator, latents, guidance)
        stream = self.stream(*wanted, *solved)
        with contextlib.closing(stream):
            for done in stream:
                if callback_on_step_end is not None:
                    chosen = {name: getattr(done, name) for name in callback_on_step_end_tensor_inputs}
                    found = callback_on_step_end(self, done.step, done.timestep, chosen) or {}
                    done.latents = found.get("latents", done.latents)
        images = done.images(output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def stream(
        self,
        class_labels: Any = None,
        num_images_per_label: int = 1,
        guidance_scale: float | Sequence[float] | torch.Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        num_inference_steps: Any = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        guidance: Any = None,
    ) -> Generator[DenoisingStep, dict[str, Any] | None, None]:
        """Draw as a call with these arguments does, and give a [`DenoisingStep`] after each step.

            for done in pipeline.stream([3], guidance_scale=5):
                done.images()[0].save(f"{done.step}.png")

        What is sent to the generator changes what follows: `stream.send({"class_labels": [8], "guidance_scale": 2})`
        gives the next step under another class and scale. What is assigned to the `latents` of a step replaces them.

        Raises:
            TypeError, ValueError: an argument cannot work; nothing has been computed yet.
        """
        conditions, scales = self._conditioned(class_labels, num_images_per_label, guidance_scale)
        self._check_scheduler()
        rule = self._rule(guidance, class_labels, guidance_scale, guidance_interval, guidance_rescale)
        self._check_steps(num_inference_steps, timesteps, sigmas)
        generator = _checked_generators(generator, len(scales))
        step_kwargs = self._step_kwargs(eta, generator)
        shape = (len(scales), *self.image_shape)
        if latents is not None:
            _check_images("latents", latents, shape)
        scheduler, device = self._prepared_scheduler(num_inference_steps, timesteps, sigmas), self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32) * getattr(scheduler, "init_noise_sigma", 1)
        scaled = getattr(scheduler, "scale_model_input", lambda sample, _: sample)  # not so for flow matching
        self._interrupt = False
        asked = {"class_labels": class_labels, "repeats": num_images_per_label, "guidance_scale": guidance_scale}

        @torch.no_grad()
        def denoise(
            latents: torch.Tensor, conditions: Conditions, scales: torch.Tensor
        ) -> Generator[DenoisingStep, dict[str, Any] | None, None]:
            passes, total = 0, len(scheduler.timesteps)
            with contextlib.ExitStack() as stack:
                stack.callback(self.maybe_free_model_hooks)
                progress_bar = stack.enter_context(self.progress_bar(total=total))
                for step, timestep in enumerate(scheduler.timesteps):
                    model_input = scaled(latents, timestep)
                    now = self._guided(timestep, scales, guidance_interval)
                    guided = GuidanceStep(self, step, total, timestep, model_input, conditions, *now, passes)
                    model_output = rule(guided) if len(conditions.rows) else no_guidance(guided)
                    passes = guided.passes
                    if getattr(model_output, "shape", None) != latents.shape:
                        raise TypeError(f"guidance must give a prediction {tuple(shape)}, got {model_output!r:.100}")
                    _set_ddim_stride(scheduler, step)
                    latents = scheduler.step(model_output, timestep, latents, **step_kwargs, return_dict=False)[0]
                    alpha, kind = _alpha_cumprod(scheduler, step), prediction_type_of(scheduler)
                    clean = predicted_original_sample(model_output, model_input, alpha, kind)
                    progress_bar.update()
                    done = DenoisingStep(step, timestep, latents, model_output, clean, passes)
                    changes = yield done
                    latents = done.latents
                    if self._interrupt:
                        break
                    if not changes:
                        continue
                    if unknown := changes.keys() - {"class_labels", "guidance_scale"}:
                        raise ValueError(f"a stream takes class_labels and guidance_scale, got {sorted(unknown)}")
                    asked.update(changes)
                    conditions, scales = self._conditioned(*asked.values())
                    self._rule(guidance, asked["class_labels"], asked["guidance_scale"], None, 0)  # which checks
                    if len(scales) != len(latents):
                        raise ValueError(f"class_labels must be for {len(latents)} images, got {changes!r:.200}")

        return denoise(latents, conditions, scales)

    # Denoising.

    def _prepared_scheduler(self, num_inference_steps: Any, timesteps: Any, sigmas: Any) -> Any:
        """A scheduler for one call, so that calls from several threads do not meet in the state of a common one.

        Its timesteps are set, and stay on the CPU, where its tables are.
        """
        chosen: dict[str, Any] = {"num_inference_steps": int(num_inference_steps or self.config.num_inference_steps)}
        if timesteps is not None:
            chosen = {"timesteps": [int(timestep) for timestep in timesteps]}
        elif sigmas is not None:
            chosen = {"sigmas": [float(sigma) for sigma in sigmas]}
        scheduler = copy.deepcopy(self.scheduler)
        if "num_inference_steps" in chosen:
            _space(scheduler, chosen["num_inference_steps"])
        try:
            scheduler.set_timesteps(**chosen)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{chosen} does not work with {type(scheduler).__name__}: {error}") from error
        if prediction_type_of(scheduler) == FLOW:  # as some round down
            scheduler.timesteps = scheduler.sigmas[: len(scheduler.timesteps)] * scheduler.config.num_train_timesteps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        self._num_timesteps = len(scheduler.timesteps)
        return scheduler

    def _step_kwargs(self, eta: float | None, generator: Any) -> dict[str, Any]:
        """The arguments that this scheduler's `step` takes beside the usual three.

        DDIM clips the predicted clean image but by default keeps the noise that does not belong to it any more,
        which ruins few-step samples; `use_clipped_model_output` derives both from the same clipped image.
        """
        offered = {"eta": self.config.eta if eta is None else eta, "generator": generator}
        offered["use_clipped_model_output"] = True
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta is not None:
            _check_number("eta", eta, low=0, high=1)
            if eta > 0 and "eta" not in accepted:
                raise ValueError(f"eta={eta!r} has no effect with {type(self.scheduler).__name__}; DDIM takes it")
        return {name: value for name, value in offered.items() if name in accepted}

    def _guided(self, timestep: torch.Tensor, scales: torch.Tensor, interval: Any) -> tuple[bool, torch.Tensor]:
        """Whether guidance acts in a step, and its scales."""
        low, high = self.config.guidance_interval if interval is None else interval
        acts = low <= float(timestep) / self.scheduler.config.num_train_timesteps <= high
        return acts, scales if acts else scales.clamp(max=1)

    def _unet_pass(
        self, unet: Any, model_input: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        unet = self.unet if unet is None else unet
        patches = F.pixel_unshuffle(model_input.to(unet.dtype), self.config.patch_size)
        kind = torch.float32 if timestep.is_floating_point() else torch.int64  # float64 is not known on every device
        predicted = unet(patches, timestep.to(patches.device, kind), class_labels=labels, return_dict=False)[0]
        return F.pixel_shuffle(predicted, self.config.patch_size).float()


def _rule_of_guider(guider: Any) -> Callable[[GuidanceStep], torch.Tensor]:
    """The rule of a guider of `diffusers.guiders`, which asks for predictions under the classes and under no class."""
    name, inside = type(guider).__name__, type(guider).prepare_models.__qualname__
    other = not {"pred_cond", "pred_uncond"} >= set(guider._input_predictions) or name == "MagnitudeAwareGuidance"
    if other or inside != "BaseGuidance.prepare_models":  # MagnitudeAwareGuidance takes no images, in diffusers 0.42
        raise ValueError(f"guidance={name} needs other predictions than those under the classes and under no class")

    def rule(step: GuidanceStep) -> torch.Tensor:
        guider.set_state(step.step, step.num_steps, step.timestep)
        parts = guider.prepare_inputs({"conditional": (torch.tensor(True), torch.tensor(False))})
        if not step.acts:  # after the line above, with which a guider begins its memory at step 0
            return step.predict(True, False)[0]
        asked = [bool(part.conditional) for part in parts]
        predictions = step.predict(any(asked), not all(asked))
        for part, conditional in zip(parts, asked, strict=True):
            part.noise_pred = predictions[not conditional]
        return guider(parts)[0]

    return rule


def _space(scheduler: Any, num_inference_steps: int) -> None:
    """Space the noise levels of flow matching evenly, and those of Heun and KDPM2 as Karras et al. (2022) do.

    The schedulers of flow matching end on a step from sigma 0.001, which is wasted.
    Heun and KDPM2: equation 5, from sigma 80 at the most.

    These solvers take a second look at the end of each step, which is worth something only where sigma falls smoothly;
    on the cosine schedule the default spacing's first step falls from sigma 20,000 to 13. A spacing chosen in the
    scheduler's configuration is kept.
    """
    if type(scheduler).__name__.startswith("FlowMatch"):
        scheduler.sigma_min = 1 / num_inference_steps
    chosen = any(scheduler.config.get(f"use_{name}_sigmas") for name in ("karras", "exponential", "beta"))
    if not chosen and type(scheduler).__name__ in SECOND_ORDER_IN_SIGMA:
        alpha_cumprod = float(scheduler.alphas_cumprod[-1])
        largest = math.sqrt((1 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0 else math.inf
        scheduler.register_to_config(use_karras_sigmas=True, sigma_max=min(largest, LARGEST_SIGMA))


def _alpha_cumprod(scheduler: Any, step: int) -> float:
    """The share of signal, squared, in the network's input at a step: by the solver's own sigma if it has one."""
    sigmas: Any = getattr(scheduler, "sigmas", None)
    if prediction_type_of(scheduler) == FLOW:
        noise = float(sigmas[step])
        return (1 - noise) ** 2 / ((1 - noise) ** 2 + noise**2)
    if sigmas is None or hasattr(scheduler, "mid_point_sigma"):
        return float(scheduler.alphas_cumprod[round(float(scheduler.timesteps[step]))])
    if step % 2 and hasattr(scheduler, "sigmas_interpol"):  # KDPM2 looks between two levels at every other step
        sigmas, step = scheduler.sigmas_interpol, step - ("Ancestral" in type(scheduler).__name__)
    return 1 / (1 + float(sigmas[step]) ** 2)


def _set_ddim_stride(scheduler: Any, step: int) -> None:
    """Make DDIM step to the timestep that comes next.

    Its own previous timestep is `timestep - num_train_timesteps // num_inference_steps`, which misses the next one
    where the steps do not divide the training steps. The quotient of a `Fraction` is the true gap, exactly.
    """
    if type(scheduler) is DDIMScheduler:
        timesteps = scheduler.timesteps.tolist()
        gap = timesteps[step] - (timesteps[step + 1] if step + 1 < len(timesteps) else -1)
        scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, gap)


def _checked_generators(generator: Any, *counts: int) -> Any:
    """A generator, or a list of as many as one of `counts`; a list is the only sequence that schedulers take."""
    several = isinstance(generator, list | tuple)
    for each in generator if several else [generator]:
        if not isinstance(each, torch.Generator) and (several or generator is not None):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {each!r}")
    if several and len(generator) not in counts:
        raise ValueError(f"generator must be one or {counts[-1]} (one per image), got {len(generator)}")
    return list(generator) if several else generator


def _check_number(name: str, value: Any, *, low: float, high: float | None = None) -> None:
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or float(value) < low or (high is not None and float(value) > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")


def _check_count(name: str, value: Any, *, low: int = 1, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    _check_number(name, value, low=low, high=high)


def _check_images(name: str, images: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if tuple(images.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
