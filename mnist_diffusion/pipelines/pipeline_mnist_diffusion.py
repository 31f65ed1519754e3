"""Class-conditional image diffusion with classifier-free guidance, in one file that needs torch and diffusers only.

    pipeline = DiffusionPipeline.from_pretrained("path/or/repo", trust_remote_code=True)
    image = pipeline(class_labels=[3], guidance_scale=5).images[0]

It ships in every pipeline folder.
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
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

SOURCE = Path(__file__).read_bytes()
MODULE = f"pipeline_mnist_diffusion_{hashlib.sha256(SOURCE).hexdigest()[:12]}"
"""This file's name in a pipeline folder. diffusers caches modules by name, so two versions need two names."""
OUTPUT_TYPES, FLOW = ("pil", "np", "pt", "latent"), "flow_prediction"
SECOND_ORDER_IN_SIGMA = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
SDE = "sde-dpmsolver++"


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
    """A denoising step of `B` images, from which a guidance rule makes one prediction."""

    pipeline: "MNISTDiffusionPipeline"
    step: int  # 0 for the first
    num_steps: int
    timestep: torch.Tensor  # where the step starts
    model_input: torch.Tensor  # float32 [B, C, H, W]
    conditions: "Conditions"
    acts: bool  # whether the step is inside the guidance interval
    scales: torch.Tensor  # guidance scales, float32 [B] on the CPU, lowered to 1 outside the interval
    nfe: int = 0  # network evaluations so far, summed over the images

    def predict(self, conditional: Any = True, unconditional: Any = True, *, unet: Any = None) -> Any:
        """Predict under the classes and under the null class, float32 `[B, C, H, W]` each, in one batch.

        Each can be limited to some images (bool `[B]`) and is zero elsewhere. `unet` replaces the pipeline's network.
        """
        predictions = self.model_input.new_zeros(2, *self.model_input.shape)
        wanted, null = (torch.as_tensor(each).expand(len(predictions[0])) for each in (conditional, unconditional))
        kept, null_rows, null_class = wanted[self.conditions.rows], null.nonzero().flatten(), self.pipeline.null_class
        rows, labels, shares = (part[kept].to(predictions.device) for part in vars(self.conditions).values())
        null_rows = null_rows.to(predictions.device)
        labels = torch.cat([labels, torch.full_like(null_rows, null_class or 0)])
        if len(inputs := self.model_input[torch.cat([rows, null_rows])]):
            outputs = self.pipeline._unet_forward(unet, inputs, self.timestep, None if null_class is None else labels)
            predictions[0].index_add_(0, rows, outputs[: len(rows)] * shares.float().view(-1, 1, 1, 1))
            predictions[1][null_rows] = outputs[len(rows) :]
        self.nfe += len(inputs)
        return predictions[0], predictions[1]


def classifier_free_guidance(step: GuidanceStep) -> torch.Tensor:
    """The default rule: [`guided_prediction`] under the classes and under the null class."""
    conditional, unconditional = step.predict(step.scales != 0, step.scales != 1)
    return guided_prediction(conditional, unconditional, step.scales.to(conditional.device).view(-1, 1, 1, 1))


def unusable(scheduler_class: Any, flow: bool) -> str | None:
    """Why no scheduler of a class can sample from a model, trained by flow matching or not; None if one can."""
    name, known = scheduler_class.__name__, inspect.signature(scheduler_class).parameters
    followed = known.keys() >= {"beta_schedule", "prediction_type"} and "snr_shift_scale" not in known
    if not followed and not (flow and name.startswith("FlowMatch")):
        return "ignores the betas or the prediction type of the training, or shifts its noise levels"
    if "Inverse" in name or "timestep_back" in inspect.signature(scheduler_class.step).parameters:
        return "does not go from noise to images one step at a time"
    return None


def prediction_type_of(scheduler: Any) -> Any:
    """The prediction target of a scheduler; those of flow matching do not name it themselves."""
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
    """The state after a denoising step of `B` images."""

    step: int  # 0 for the first
    timestep: torch.Tensor  # where the step started
    latents: torch.Tensor  # the samples after it, float32 [B, C, H, W] on the device
    model_output: torch.Tensor  # the guided prediction, float32 [B, C, H, W]
    pred_original_sample: torch.Tensor  # the clean image it implies, float32 [B, C, H, W]
    nfe: int  # network evaluations so far, summed over the images
    changes: dict[str, Any] | None = None  # to the remaining steps, as [`stream`] takes them

    def images(self, output_type: str = "pil") -> Any:
        """The samples as images, in an `output_type` of a call."""
        return VaeImageProcessor().postprocess(self.latents, output_type)


@dataclass(frozen=True)
class Conditions:
    """Pairs of an image's row and a class; empty for unconditional sampling."""

    rows: torch.Tensor  # int64 [P]
    labels: torch.Tensor  # int64 [P]
    shares: torch.Tensor  # of the class in the image's conditional prediction, float32 [P]; 1 but for mixed classes


class MNISTDiffusionPipeline(DiffusionPipeline):
    """Samples images of given classes.

    Args:
        unet: a `UNet2DModel`. With class embeddings, the last of its `num_class_embeds` is the null class; without, the
            pipeline is unconditional.
        scheduler: any diffusers scheduler made from the training scheduler's configuration.
        id2label: class names by index; a call may then use names in place of numbers.
        num_inference_steps: default number of denoising steps.
        guidance_scale: default guidance scale.
        guidance_interval: default noise levels at which guidance acts; None is everywhere.
        eta: default noise of the schedulers that take an eta.
        noise_interval: default noise levels at which an SDE solver adds noise; None is everywhere.
        patch_size: side of the patches whose pixels are the network's channels; None is for one or three channels.
        guidance_distilled: guidance scales distilled into the network, which has embeddings for all classes at each of
            them and then the null class. `True` stands for `guidance_scale` alone.
        flow_matching: whether the network was trained by flow matching; taken from the scheduler if None.
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
        guidance_interval: list[float] | None = None,
        eta: float = 0.0,
        patch_size: int | None = None,
        guidance_distilled: bool | list[float] = False,
        flow_matching: bool | None = None,
        noise_interval: list[float] | None = None,
    ):
        super().__init__()
        bare = getattr(unet, "_orig_mod", unet)  # without torch.compile
        for name, part, kind in (("unet", bare, UNet2DModel), ("scheduler", scheduler, SchedulerMixin)):
            if not isinstance(part, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(part).__name__}")
        scales = [guidance_scale] if guidance_distilled is True else list(guidance_distilled or ())
        if scales != (learned := getattr(unet, "guidance_distilled", scales)):
            raise ValueError(f"guidance_distilled must be {learned}, as distilled into this network, got {scales}")
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
            guidance_interval=list(guidance_interval or (0.0, 1.0)),
            noise_interval=list(noise_interval or (0.0, 1.0)),
            eta=eta,
            patch_size=patch_size or _patch_size(unet.config.in_channels),
            guidance_distilled=scales or False,  # not an empty list, which diffusers takes for a component's
            flow_matching=prediction_type_of(scheduler) == FLOW if flow_matching is None else flow_matching,
        )
        self._guidance_scale: Any = guidance_scale
        self._check_scheduler()
        self._check_steps(num_inference_steps, None, None)

    @property
    def guidance_scale(self) -> Any:
        """Guidance scale of the running or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that scale is above 1 for any image."""
        return not self.config.guidance_distilled and bool((torch.as_tensor(self._guidance_scale) > 1).any())

    @property
    def null_class(self) -> Any:
        """The label of the null class, the last embedding; None for an unconditional model."""
        embeddings = self.unet.config.num_class_embeds
        return None if embeddings is None else embeddings - 1

    @property
    def num_classes(self) -> Any:
        """Number of classes, without the null class; None for an unconditional model."""
        return None if self.null_class is None else self.null_class // max(1, len(self.config.guidance_distilled or ()))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        size, patch = self.unet.config.sample_size, self.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels // patch**2, height * patch, width * patch)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and this file, so that plain diffusers can load the folder."""
        super().save_config(save_directory, **kwargs)
        (Path(save_directory) / f"{MODULE}.py").write_bytes(SOURCE)
        index_file = Path(save_directory) / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [MODULE, MNISTDiffusionPipeline.__name__]
        index.pop("_name_or_path", None)  # a local path
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        values = super()._dict_from_json_file(json_file)
        if isinstance(values.get("_class_name"), list):
            values["_class_name"] = values["_class_name"][-1]
        return values

    def label_ids(self, class_labels: Any) -> list[int] | None:
        """Class indices of `class_labels`: an int, a name, or a sequence, array or tensor of them."""
        if class_labels is None:
            return None
        if self.num_classes is None:
            raise ValueError(f"class_labels must be None for an unconditional model, got {class_labels!r}")
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence | range):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError(f"class_labels must name at least one class, got {class_labels!r}")
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: Any) -> int:
        label = label.item() if getattr(label, "ndim", None) == 0 else label
        if isinstance(label, str):
            ids = {name: int(index) for index, name in (self.config.id2label or {}).items()}
            if label not in ids:
                raise ValueError(f"class_labels: there is no class named {label!r}, the names are {list(ids)}")
            return ids[label]
        _check_count("class_labels", label, low=0, high=self.num_classes - 1)
        return int(label)

    def _conditions(self, class_labels: Any, num_images_per_label: int) -> tuple[Conditions, int]:
        """The classes of each image, and the number of images."""
        _check_count("num_images_per_label", num_images_per_label)
        ids, repeats = self.label_ids(class_labels), int(num_images_per_label)
        labels = torch.tensor(ids or [], dtype=torch.int64).repeat_interleave(repeats)
        return Conditions(torch.arange(len(labels)), labels, torch.ones(len(labels))), len(labels) or repeats

    def _guidance_scales(self, guidance_scale: Any, batch_size: int) -> torch.Tensor:
        """One scale per image, float32 `[B]` on the CPU."""
        scales = self.config.guidance_scale if guidance_scale is None else guidance_scale
        scales = scales.tolist() if isinstance(scales, torch.Tensor | np.ndarray) else scales
        scales = list(scales) if isinstance(scales, list | tuple) else [scales] * batch_size
        if len(scales) != batch_size:
            raise ValueError(f"guidance_scale must be one number or {batch_size} (one per image), got {len(scales)}")
        for scale in scales:
            _check_number("guidance_scale", scale, low=0)
        return torch.tensor([float(scale) for scale in scales], dtype=torch.float32)

    def _conditioned(self, class_labels: Any, repeats: int, guidance_scale: Any) -> tuple[Conditions, torch.Tensor]:
        """Classes and scales of the images; distilled guidance becomes class embeddings at scale 1."""
        conditions, batch_size = self._conditions(class_labels, repeats)
        if class_labels is None and guidance_scale is not None:
            raise ValueError(f"guidance_scale needs class_labels, got guidance_scale={guidance_scale!r} without them")
        scales = self._guidance_scales(guidance_scale, batch_size)
        if not (learned := self.config.guidance_distilled):
            return conditions, scales
        apart = (scales[:, None].double() - torch.tensor(learned, dtype=torch.float64)).abs()
        if (apart.amin(dim=1) > 1e-5).any():
            other = float(scales[apart.amin(dim=1).argmax()])
            raise ValueError(f"guidance_scale must be one of {learned}, distilled into this model, got {other:g}")
        if class_labels is not None:
            labels = conditions.labels + self.num_classes * apart.argmin(dim=1)[conditions.rows]
            conditions = replace(conditions, labels=labels)
        return conditions, torch.ones_like(scales)

    def _rule(self, guidance: Any, class_labels: Any, interval: Any, scale: Any) -> Any:
        """The guidance rule of a call, a function of a [`GuidanceStep`]."""
        _check_interval("guidance_interval", interval)
        name = getattr(guidance, "__name__", type(guidance).__name__)
        if self.config.guidance_distilled and (interval or guidance):
            raise ValueError(f"guidance_interval={interval!r} and guidance={name} have no effect on a distilled model")
        if guidance is None:
            return classifier_free_guidance
        if class_labels is None:
            raise ValueError(f"guidance needs class_labels, got guidance={name} without them")
        if not callable(guidance) or isinstance(guidance, type) or hasattr(guidance, "prepare_inputs"):
            raise TypeError(f"guidance must be a function of a GuidanceStep, got {guidance!r:.100}")
        return guidance

    def _check_scheduler(self) -> None:
        name, config = type(self.scheduler).__name__, self.scheduler.config
        flow = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
        if not flow == (prediction_type_of(self.scheduler) == FLOW) == self.config.flow_matching:
            given = f"scheduler: {name} with prediction_type={config.get('prediction_type')!r}"
            takes = f"if true, it takes FlowMatch or use_flow_sigmas=True with prediction_type={FLOW!r}"
            raise ValueError(f"{given} does not fit flow_matching={self.config.flow_matching}; {takes}")
        if reason := unusable(type(self.scheduler), flow):
            raise ValueError(f"scheduler: {name} {reason}")
        if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
            raise ValueError(f"scheduler: {name} has zero SNR at its last timestep, where epsilon is not enough")

    def _check_steps(self, num_inference_steps: Any, timesteps: Any, sigmas: Any) -> None:
        available = self.scheduler.config.num_train_timesteps
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"only one of {list(given)} can be given")
        if (steps := given.pop("num_inference_steps", None)) is not None:
            _check_count("num_inference_steps", steps, high=available)
        for name, values in given.items():
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{name} is not supported by {type(self.scheduler).__name__}")
            if not isinstance(values, list | tuple | np.ndarray | torch.Tensor) or len(values) == 0:
                raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
            for value in values:
                _check_number(name, value, low=0, high=available - 1 if name == "timesteps" else None)
            if any(later >= earlier for earlier, later in pairwise(values)):
                raise ValueError(f"{name} must be strictly decreasing, got {list(values)}")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        num_images_per_label: int = 1,
        guidance_scale: float | Sequence[float] | torch.Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
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
        noise_interval: tuple[float, float] | None = None,
    ) -> Any:
        """Sample images of each class label. Bad arguments raise TypeError or ValueError before sampling.

        Args:
            class_labels: an int, a class name, or a list, array or tensor of them. None samples unconditionally.
            num_images_per_label: images for each label, next to each other in the result.
            guidance_scale: a number, or one per image: 0 is unconditional, 1 conditional; others take two evaluations.
            guidance_interval: `(low, high)` in t / num_train_timesteps, 0 being clean: scales above 1 act inside only.
                Kynkäänniemi et al. (2024), https://arxiv.org/abs/2404.07724.
            num_inference_steps: number of denoising steps.
            timesteps: falling timesteps, if the scheduler takes them.
            sigmas: falling noise levels, if the scheduler takes them.
            eta: noise of DDIM and TCD, from 0 (deterministic) to 1.
            noise_interval: `(low, high)`, as above: SDE-DPM-Solver++ adds noise inside, and is DPM-Solver++ outside.
            generator: one for the batch, or one per image, which makes an image independent of the batch.
            latents: the initial noise, `[B, C, H, W]` of unit variance.
            output_type: `pil`, `np` `[B, H, W, C]` or `pt` `[B, C, H, W]` in [0, 1], or `latent`, not clamped.
            return_dict: False returns a tuple `(images,)` in place of an `ImagePipelineOutput`.
            callback_on_step_end: `callback(pipeline, step, timestep, tensors)`; may return new `latents`; setting
                `pipeline._guidance_scale` changes the remaining steps, `pipeline._interrupt = True` stops.
            callback_on_step_end_tensor_inputs: which of `latents`, `model_output`, `pred_original_sample` it gets.
            guidance: another rule than [`classifier_free_guidance`], a function of a [`GuidanceStep`].
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be callable, got {callback_on_step_end!r}")
        given = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if not set(given) <= set(known := self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs must be among {known}, got {given}")
        guided = (class_labels, num_images_per_label, guidance_scale, guidance_interval, num_inference_steps)
        others: tuple[Any, ...] = (timesteps, sigmas, eta, generator, latents, guidance, noise_interval)
        with contextlib.closing(self.stream(*guided, *others)) as stream:
            for done in stream:
                if callback_on_step_end is not None:
                    tensors = {name: getattr(done, name) for name in given}
                    before = self._guidance_scale
                    changed = callback_on_step_end(self, done.step, done.timestep, tensors) or {}
                    done.latents = changed.get("latents", done.latents)
                    if self._guidance_scale is not before:
                        done.changes = {"guidance_scale": self._guidance_scale}
        return ImagePipelineOutput(images=done.images(output_type)) if return_dict else (done.images(output_type),)

    def stream(
        self,
        class_labels: Any = None,
        num_images_per_label: int = 1,
        guidance_scale: float | Sequence[float] | torch.Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: Any = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        guidance: Any = None,
        noise_interval: tuple[float, float] | None = None,
    ) -> Generator[DenoisingStep, dict[str, Any] | None, None]:
        """Sample as a call with these arguments does, and yield a [`DenoisingStep`] after each step.

            for done in pipeline.stream([3], guidance_scale=5):
                done.images()[0].save(f"{done.step}.png")

        `stream.send({"class_labels": [8], "guidance_scale": 2})` changes the remaining steps and returns the next one;
        assigning to a step's `latents` replaces the samples.
        """
        given = {"class_labels": class_labels, "repeats": num_images_per_label, "guidance_scale": guidance_scale}
        batch_size = len((conditioned := self._conditioned(**given))[1])
        self._check_scheduler()
        rule = self._rule(guidance, class_labels, guidance_interval, guidance_scale)
        _check_interval("noise_interval", noise_interval)
        if noise_interval is not None and self.scheduler.config.get("algorithm_type") != SDE:
            raise ValueError(f"noise_interval={noise_interval!r} has no effect with {type(self.scheduler).__name__}")
        self._check_steps(num_inference_steps, timesteps, sigmas)
        generator = _checked_generators(generator, batch_size)
        options, shape = self._step_kwargs(eta, generator), (batch_size, *self.image_shape)
        if latents is not None:
            _check_images("latents", latents, shape)
        scheduler, device = self._prepared_scheduler(num_inference_steps, timesteps, sigmas), self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32) * getattr(scheduler, "init_noise_sigma", 1)
        plain = guidance_scale.tolist() if isinstance(guidance_scale, torch.Tensor) else guidance_scale
        self._guidance_scale = self.config.guidance_scale if plain is None else plain
        self._interrupt = False
        return self._denoise(latents, conditioned, given, scheduler, rule, (guidance_interval, noise_interval), options)

    @torch.no_grad()
    def _denoise(
        self, latents: Any, conditioned: Any, given: Any, scheduler: Any, rule: Any, intervals: Any, options: Any
    ) -> Generator[DenoisingStep, dict[str, Any] | None, None]:
        """The denoising loop, which every call, sheet and measurement goes through."""
        nfe, total, (conditions, scales) = 0, len(scheduler.timesteps), conditioned
        scaled = getattr(scheduler, "scale_model_input", lambda sample, _: sample)  # flow matching has none
        with contextlib.ExitStack() as stack:
            stack.callback(self.maybe_free_model_hooks)
            progress_bar = stack.enter_context(self.progress_bar(total=total))
            for step, timestep in enumerate(scheduler.timesteps):
                model_input = scaled(latents, timestep)
                acts = self._is_inside("guidance_interval", timestep, intervals[0])
                lowered = scales if acts else scales.clamp(max=1)
                guided = GuidanceStep(self, step, total, timestep, model_input, conditions, acts, lowered, nfe)
                model_output = rule(guided) if len(conditions.rows) else guided.predict(False)[1]
                nfe = guided.nfe
                if getattr(model_output, "shape", None) != latents.shape:
                    raise TypeError(f"guidance must predict {tuple(latents.shape)}, got {model_output!r:.100}")
                _set_ddim_stride(scheduler, step)
                if self.scheduler.config.get("algorithm_type") == SDE:
                    # Multistep DPM-Solver reads it in every step: switching it turns the noise on or off.
                    adds_noise = self._is_inside("noise_interval", timestep, intervals[1])
                    scheduler.register_to_config(algorithm_type=SDE if adds_noise else "dpmsolver++")
                latents = scheduler.step(model_output, timestep, latents, **options, return_dict=False)[0]
                alpha, kind = _alpha_cumprod(scheduler, step), prediction_type_of(scheduler)
                clean = predicted_original_sample(model_output, model_input, alpha, kind)
                progress_bar.update()
                done = DenoisingStep(step, timestep, latents, model_output, clean, nfe)
                changes = (yield done) or done.changes
                latents = done.latents
                if self._interrupt:
                    break
                if changes:
                    if unknown := changes.keys() - {"class_labels", "guidance_scale"}:
                        raise ValueError(f"a stream takes class_labels and guidance_scale, got {sorted(unknown)}")
                    given.update(changes)
                    conditions, scales = self._conditioned(**given)
                    if len(scales) != len(latents):
                        raise ValueError(f"class_labels must be for {len(latents)} images, got {changes!r:.200}")

    def _prepared_scheduler(self, num_inference_steps: Any, timesteps: Any, sigmas: Any) -> Any:
        """A copy of the scheduler for one call, which threads do not share, with timesteps on the CPU."""
        scheduler, steps = copy.deepcopy(self.scheduler), int(num_inference_steps or self.config.num_inference_steps)
        given: dict[str, Any] = {"num_inference_steps": steps}
        if timesteps is not None:
            given = {"timesteps": [int(timestep) for timestep in timesteps]}
        elif sigmas is not None:
            given = {"sigmas": [float(sigma) for sigma in sigmas]}
        else:
            _space(scheduler, steps)
        try:
            scheduler.set_timesteps(**given)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{given} does not work with {type(scheduler).__name__}: {error}") from error
        if prediction_type_of(scheduler) == FLOW:  # as some round down
            scheduler.timesteps = scheduler.sigmas[: len(scheduler.timesteps)] * scheduler.config.num_train_timesteps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        self.num_timesteps = len(scheduler.timesteps)  # of the last call
        return scheduler

    def _step_kwargs(self, eta: float | None, generator: Any) -> dict[str, Any]:
        """Further arguments of the scheduler's `step`; DDIM clips the image, which its noise must follow."""
        own = {"eta": self.config.eta if eta is None else eta, "use_clipped_model_output": True}
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta is not None:
            _check_number("eta", eta, low=0, high=1)
            if eta > 0 and "eta" not in accepted:
                raise ValueError(f"eta={eta!r} has no effect with {type(self.scheduler).__name__}; DDIM takes it")
        return {name: value for name, value in {**own, "generator": generator}.items() if name in accepted}

    def _is_inside(self, name: str, timestep: torch.Tensor, interval: Any) -> bool:
        low, high = self.config[name] if interval is None else interval
        return low <= float(timestep) / self.scheduler.config.num_train_timesteps <= high

    def _unet_forward(self, unet: Any, model_input: torch.Tensor, timestep: torch.Tensor, labels: Any) -> torch.Tensor:
        unet = self.unet if unet is None else unet
        patches = F.pixel_unshuffle(model_input.to(unet.dtype), self.config.patch_size)
        kind = torch.float32 if timestep.is_floating_point() else torch.int64  # not every device has float64
        predicted = unet(patches, timestep.to(patches.device, kind), class_labels=labels, return_dict=False)[0]
        return F.pixel_shuffle(predicted, self.config.patch_size).float()


def _patch_size(channels: int) -> int:
    return next((side for side in range(1, channels) if channels in (side**2, 3 * side**2)), 1)


def _space(scheduler: Any, num_inference_steps: int) -> None:
    """Space the noise levels of flow matching evenly, and those of Heun and KDPM2 as Karras et al. (2022), equation 5.

    Else the former end at 0.001, and the latter fall from 20,000 to 13 in one step.
    """
    if type(scheduler).__name__.startswith("FlowMatch"):
        scheduler.sigma_min = 1 / num_inference_steps
    configured = any(scheduler.config.get(f"use_{name}_sigmas") for name in ("karras", "exponential", "beta"))
    if not configured and type(scheduler).__name__ in SECOND_ORDER_IN_SIGMA:
        alpha_cumprod = float(scheduler.alphas_cumprod[-1])
        largest = math.sqrt((1 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0 else math.inf
        scheduler.register_to_config(use_karras_sigmas=True, sigma_max=min(largest, 80.0))


def _alpha_cumprod(scheduler: Any, step: int) -> float:
    """The signal's share of the variance of the network's input, from the solver's own sigma if it has one."""
    sigmas: Any = getattr(scheduler, "sigmas", None)
    if prediction_type_of(scheduler) == FLOW:
        noise = float(sigmas[step])
        return (1 - noise) ** 2 / ((1 - noise) ** 2 + noise**2)
    if sigmas is None or hasattr(scheduler, "mid_point_sigma"):
        return float(scheduler.alphas_cumprod[round(float(scheduler.timesteps[step]))])
    if step % 2 and hasattr(scheduler, "sigmas_interpol"):  # KDPM2 evaluates between two levels at every other step
        sigmas, step = scheduler.sigmas_interpol, step - ("Ancestral" in type(scheduler).__name__)
    return 1 / (1 + float(sigmas[step]) ** 2)


def _set_ddim_stride(scheduler: Any, step: int) -> None:
    """Make DDIM step to the next timestep in its list, which its own stride misses if the division has a remainder."""
    if type(scheduler) is DDIMScheduler:  # which goes to t - num_train_timesteps // num_inference_steps
        timesteps = [*scheduler.timesteps.tolist(), -1]
        scheduler.num_inference_steps = 1
        scheduler.register_to_config(num_train_timesteps=timesteps[step] - timesteps[step + 1])


def _checked_generators(generator: Any, *counts: int) -> Any:
    """A generator, or a list with one of `counts` of them; schedulers take no other sequence."""
    several = isinstance(generator, list | tuple)
    for each in generator if several else [generator]:
        if not isinstance(each, torch.Generator) and (several or generator is not None):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {each!r}")
    if several and len(generator) not in counts:
        raise ValueError(f"generator must be one or {counts[-1]} (one per image), got {len(generator)}")
    return list(generator) if several else generator


def _check_number(name: str, value: Any, *, low: float, high: float | None = None) -> None:
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or float(value) < low or (high is not None and float(value) > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")


def _check_interval(name: str, interval: Any) -> None:
    if interval is not None:
        if not isinstance(interval, list | tuple) or len(interval) != 2:
            raise TypeError(f"{name} must be a pair (low, high), got {interval!r}")
        for bound in interval:
            _check_number(name, bound, low=0, high=1)
        if interval[0] > interval[1]:
            raise ValueError(f"{name} must not be reversed, got {interval!r}")


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
