"""The installed pipeline class: the shipped one, with safe loading, pushing, inversion and interpolation."""

from __future__ import annotations

import copy
import inspect
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from diffusers.guiders import BaseGuidance
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi

from mnist_diffusion.environment import DEFAULT_DEVICE
from mnist_diffusion.errors import FileError
from mnist_diffusion.files import copy_permissions, file_within, read_text, replace_text
from mnist_diffusion.hub_client import upload
from mnist_diffusion.pipelines import folder as reading
from mnist_diffusion.pipelines import pipeline_mnist_diffusion as shipped
from mnist_diffusion.pipelines.card import CARD, PICTURE, card_for, short_card

DenoisingStep = shipped.DenoisingStep
GuidanceStep = shipped.GuidanceStep
guided_prediction = shipped.guided_prediction
predicted_original_sample = shipped.predicted_original_sample
prediction_type_of = shipped.prediction_type_of

CODE_FILE, CODE = f"{shipped.MODULE}.py", shipped.SOURCE
"""The pipeline code that every exported and pushed folder holds."""
CODE_INDEX = [shipped.MODULE, reading.PIPELINE_CLASS]

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
INVERSION_ITERATIONS = 5
"""Network evaluations of each step of an inversion; twice as many if it is guided."""
IGNORED = ("trust_remote_code", "low_cpu_mem_usage")  # no code is run, and memory is allocated once, either way


def slerp(start: torch.Tensor, end: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation between two noises `[C, H, W]` at each of `weights` `[F]`, giving `[F, C, H, W]`.

    Shoemake (1985). Unlike a straight line it keeps the norm, which for Gaussian noise is where the mass is.
    """
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    weights = weights.to(start).view(-1, *([1] * start.ndim))
    if angle.sin() < 1e-4:
        return start + weights * (end - start)
    return (((1 - weights) * angle).sin() * start + (weights * angle).sin() * end) / angle.sin()


@dataclass
class TrajectoryOutput(BaseOutput):
    """A denoising trajectory of `S` steps.

    Args:
        images: the images, of the `output_type`.
        latents: the samples after each step, float32 `[S, B, C, H, W]` on the CPU.
        pred_original_samples: the clean image predicted at each step, float32 `[S, B, C, H, W]` on the CPU.
        timesteps: the timesteps, `[S]`.
    """

    images: Any
    latents: torch.Tensor
    pred_original_samples: torch.Tensor
    timesteps: torch.Tensor


def is_loadable(folder: Path) -> bool:
    """Whether a pipeline folder is complete."""
    try:
        return folder.is_dir() and bool(MNISTDiffusionPipeline.from_pretrained(folder))
    except (OSError, ValueError):
        return False


def guider_rule(guider: Any) -> Callable[[shipped.GuidanceStep], torch.Tensor]:
    """A guidance rule from a guider of `diffusers.guiders` that combines conditional and unconditional predictions.

    Raises:
        ValueError: it needs other predictions, or (`MagnitudeAwareGuidance` of diffusers 0.42) does not take images.
    """
    name, models = type(guider).__name__, type(guider).prepare_models.__qualname__
    usual = {"pred_cond", "pred_uncond"} >= set(guider._input_predictions) and models == "BaseGuidance.prepare_models"
    if not usual or name == "MagnitudeAwareGuidance":
        raise ValueError(f"guidance={name} needs other predictions than the conditional and the unconditional one")
    guider = copy.deepcopy(guider)

    def rule(step: shipped.GuidanceStep) -> torch.Tensor:
        guider.set_state(step.step, step.num_steps, step.timestep)
        parts = guider.prepare_inputs({"conditional": (torch.tensor(True), torch.tensor(False))})
        if not step.acts:  # after `prepare_inputs`, which resets a guider at step 0
            return step.predict(True, False)[0]
        conditional = [bool(part.conditional) for part in parts]
        predictions = step.predict(any(conditional), not all(conditional))
        for part, is_conditional in zip(parts, conditional, strict=True):
            part.noise_pred = predictions[0] if is_conditional else predictions[1]
        return guider(parts)[0]

    return rule


class MNISTDiffusionPipeline(shipped.MNISTDiffusionPipeline):
    """Samples images of given classes, like the shipped class; loading it runs no code from a folder.

    See [`pipelines.pipeline_mnist_diffusion.MNISTDiffusionPipeline`] for its components and its call.
    """

    _origin: tuple[Path | None, Any] = (None, None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load a pipeline folder or Hub repository without running code from it.

        Only `model_index.json`, the two configurations and the safetensors weights are read, and checked before memory
        is allocated. To run the code of a repository that you trust, use `DiffusionPipeline.from_pretrained` with
        `trust_remote_code=True` and a pinned `revision`.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id such as `user/name`.
            kwargs: `dtype`, `variant`, `device_map` (a device, or `balanced` for a GPU if there is one), `unet` and
                `scheduler` in place of the folder's own, values of the constructor; for the Hub `revision`, `token`,
                `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            FileError: it is not a pipeline folder, or it is invalid.
            TypeError: an argument is not one of these.
            OSError: the Hub has no such repository, or could not be reached.
        """
        source, given = str(pretrained_model_name_or_path), dict(kwargs)
        hub = {name: given.pop(name) for name in HUB_ARGUMENTS if name in given}
        if {"dtype", "torch_dtype"} <= given.keys():
            raise TypeError("torch_dtype is the earlier name of dtype; only one of them can be given")
        dtype = given.pop("dtype", given.pop("torch_dtype", None)) or torch.float32
        variant, device_map = given.pop("variant", None), given.pop("device_map", None)
        for name in IGNORED:
            given.pop(name, None)
        if given.pop("use_safetensors", None) is False:
            raise TypeError("use_safetensors must be true: only safetensors are read")
        for name in given:
            if name not in inspect.signature(cls).parameters:
                raise TypeError(f"{cls.__name__}.from_pretrained takes no argument {name!r}")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        folder = reading.folder_or_none(source) or reading.fetch_pipeline(source, variant, **hub)
        values = reading.read_index(folder)
        unet, scheduler = given.get("unet"), given.get("scheduler")
        if unet is None:
            unet = reading.read_unet(folder, variant=variant, dtype=dtype)
        if scheduler is None:
            scheduler = reading.read_scheduler(folder, values["scheduler"])
        try:
            pipeline = cls(**{**values, **given, "unet": unet, "scheduler": scheduler})
        except ValueError as error:
            if given:  # which may be wrong
                raise
            raise FileError(f"{folder}: {error}") from error
        reading.require_fit(folder, pipeline)
        pipeline.register_to_config(_name_or_path=source)
        pipeline._origin = (folder, hub.get("cache_dir"))
        if device_map is not None:  # one network is on one device
            try:
                pipeline.to(DEFAULT_DEVICE if device_map == "balanced" else device_map)
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"device_map must be balanced or a device, got {device_map!r}: {error}") from error
        return pipeline

    def _conditions(self, class_labels: Any, num_images_per_label: int) -> tuple[shipped.Conditions, int]:
        """As in the base class, but also accepts float weights `[images, num_classes]` of the classes' predictions."""
        mixed = getattr(class_labels, "ndim", 0) == 2 and torch.as_tensor(class_labels).is_floating_point()
        if self.num_classes is None or not mixed:
            return super()._conditions(class_labels, num_images_per_label)
        shipped._check_count("num_images_per_label", num_images_per_label)
        weights = torch.as_tensor(class_labels).float().cpu()
        if len(weights) == 0 or weights.shape[1] != self.num_classes:
            shape = f"[images, {self.num_classes}]"
            raise ValueError(f"class_labels as weights must be {shape}, got shape {tuple(weights.shape)}")
        if not (weights >= 0).all() or not torch.allclose(weights.sum(dim=1), torch.tensor(1.0), atol=1e-4):
            raise ValueError("class_labels as weights must be at least 0 and sum to 1 for each image")
        weights = weights.repeat_interleave(int(num_images_per_label), dim=0)
        rows, labels = weights.nonzero(as_tuple=True)
        if len(rows) > len(weights):  # every class for every image, so that an image's bits do not depend on the batch
            used = torch.tensor(list(dict.fromkeys(labels.tolist())))
            labels, rows = torch.cartesian_prod(used, torch.arange(len(weights))).T
        return shipped.Conditions(rows, labels, weights[rows, labels]), len(weights)

    def _rule(self, guidance: Any, class_labels: Any, interval: Any, scale: Any) -> Any:
        """As in the base class, but also accepts a guider of diffusers, which has its own scale."""
        if isinstance(guidance, BaseGuidance):
            if scale is not None:
                kind = type(guidance).__name__
                raise ValueError(f"guidance_scale={scale!r} has no effect with guidance={kind}, which has its own")
            guidance = guider_rule(guidance)
        return super()._rule(guidance, class_labels, interval, scale)

    @torch.no_grad()
    def invert(
        self,
        images: torch.Tensor,
        class_labels: Any = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """Find the noise from which DDIM (eta 0) samples given images.

        DDIM's step is a rotation, `x_s = cos(d) x_t - sin(d) v(x_t)`, by the angle `d` between the two noise levels.
        Each is undone by solving `x_t = (x_s + sin(d) v(x_t)) / cos(d)` by fixed-point iteration. Song et al. (2020),
        https://arxiv.org/abs/2010.02502, section 4.3; Pan et al. (2023), https://arxiv.org/abs/2309.04907.

        Args:
            images: float `[B, C, H, W]` in [0, 1].
            class_labels: one label per image, or None.
            num_inference_steps: number of steps; sample with as many.
            guidance_scale: the scale to sample with.

        Returns:
            float32 latents `[B, C, H, W]` for a call with a `DDIMScheduler` made from this scheduler's configuration.

        Raises:
            TypeError, ValueError: an argument cannot work; nothing has been computed yet.
        """
        if self.config.flow_matching:
            raise ValueError("images cannot be inverted with flow matching: there is no DDIM for it")
        if self.config.guidance_distilled:
            raise ValueError("images cannot be inverted with a distilled model; use its teacher")
        labels = self.label_ids(class_labels)
        shape = (len(images) if isinstance(images, torch.Tensor) else 0, *self.image_shape)
        shipped._check_images("images", images, shape)
        if images.min() < 0 or images.max() > 1:
            raise ValueError(f"images must be from 0 to 1, got {float(images.min())} to {float(images.max())}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"class_labels must be one for each of the {len(images)} images, got {len(labels)}")
        scales = self._guidance_scales(0.0 if labels is None else guidance_scale, len(images))
        self._check_scheduler()
        self._check_steps(num_inference_steps, None, None)
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(int(num_inference_steps))
        conditions, _ = self._conditions(labels, len(images) if labels is None else 1)
        sample, before = images.to(self._execution_device, torch.float32) * 2 - 1, torch.tensor(1.0)
        limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf
        for timestep in self.progress_bar(scheduler.timesteps.flip(0)):
            alpha = scheduler.alphas_cumprod[timestep]
            angle = torch.arccos(alpha.sqrt()) - torch.arccos(before.sqrt())
            target, sample = sample, sample / angle.cos()
            acts = self._is_inside("guidance_interval", timestep, None)
            now = acts, scales if acts else scales.clamp(max=1)
            for _ in range(INVERSION_ITERATIONS):
                step = shipped.GuidanceStep(self, 0, 1, timestep, sample, conditions, *now)
                output = shipped.classifier_free_guidance(step)
                clean = shipped.predicted_original_sample(output, sample, alpha, scheduler.config.prediction_type)
                velocity = (alpha.sqrt() * sample - clean.clamp(-limit, limit)) / (1 - alpha).sqrt()
                sample = (target + angle.sin() * velocity) / angle.cos()
            before = alpha
        return sample

    def sample_trajectory(
        self, class_labels: Any = None, *, output_type: str = "pil", **arguments: Any
    ) -> TrajectoryOutput:
        """Sample images, and keep the samples and predictions of every step.

        Args:
            class_labels: as in a call.
            output_type: as in a call.
            arguments: further arguments of [`stream`].
        """
        if output_type not in shipped.OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {shipped.OUTPUT_TYPES}, got {output_type!r}")
        latents, predicted, timesteps = [], [], []
        for done in self.stream(class_labels, **arguments):
            timesteps.append(done.timestep)
            latents.append(done.latents)
            predicted.append(done.pred_original_sample)
        stacked = (torch.stack(each).cpu() for each in (latents, predicted, timesteps))
        return TrajectoryOutput(done.images(output_type), *stacked)

    @torch.no_grad()
    def interpolate(
        self,
        class_labels: Any,
        num_frames: int = 8,
        *,
        latents: torch.Tensor | None = None,
        generator: Any = None,
        **arguments: Any,
    ) -> Any:
        """Sample images between two noises or two classes.

        Args:
            class_labels: one label, or two: then the conditional prediction is mixed from the first to the second.
            num_frames: images, both ends included.
            latents: the noise, `[1, C, H, W]` for all frames or `[2, C, H, W]` for the two ends; see [`slerp`].
            generator: draws the noise if `latents` is None: one for all frames, or two for the two ends. If the sampler
                adds noise, every frame gets the same noise, from the first generator.
            arguments: further arguments of a call.

        Returns:
            As a call, `.images` of `num_frames` images.

        Raises:
            TypeError, ValueError: an argument cannot work; nothing has been computed yet.
        """
        labels = self.label_ids(class_labels)
        if labels is None or len(labels) > 2:
            raise ValueError(f"class_labels must be one label or two to interpolate, got {class_labels!r}")
        shipped._check_count("num_frames", num_frames, low=2)
        drawing = shipped._checked_generators(generator, 1, 2)
        if not isinstance(drawing, list):
            drawing = [drawing or torch.Generator().manual_seed(int(torch.randint(2**62, ())))]
        ends = latents
        if ends is None:
            noise = {"shape": (1, *self.image_shape), "device": self._execution_device}
            ends = torch.cat([randn_tensor(generator=each, **noise) for each in drawing])
        elif not isinstance(ends, torch.Tensor) or len(ends) not in (1, 2):
            raise ValueError(f"latents must be a tensor of one noise or two, got {getattr(ends, 'shape', ends)}")
        shipped._check_images("latents", ends, (len(ends), *self.image_shape))
        along = torch.linspace(0, 1, int(num_frames))
        frames = slerp(ends[0].float(), ends[-1].float(), along)
        weights = torch.zeros(len(along), self.num_classes)
        weights[:, labels[0]] += 1 - along
        weights[:, labels[-1]] += along
        alike = [torch.Generator(drawing[0].device) for _ in along]
        for each in alike:
            each.set_state(drawing[0].get_state())
        return self(weights, latents=frames, generator=alike, **arguments)

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write a folder that this class and plain diffusers load; push it too, if asked.

        Args:
            save_directory: the folder.
            push_to_hub: whether to push what was saved.
            kwargs: `variant`; with `push_to_hub` also `repo_id` and the other arguments of [`push_to_hub`].

        Raises:
            ValueError: pickles are asked for, or the scheduler is not diffusers' own.
            TypeError: an argument is not one of these.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization must be true: pickles can run code when they are read")
        variant = kwargs.pop("variant", None)
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained takes no argument {next(iter(kwargs))!r}")
        kind = type(self.scheduler)
        if getattr(diffusers, kind.__name__, None) is not kind:
            raise ValueError(f"scheduler must be one of diffusers' own to be saved and loaded again, got {kind}")
        self._check_scheduler()
        self._check_steps(self.config.num_inference_steps, None, None)
        super().save_pretrained(save_directory, variant=variant)
        for path in Path(save_directory, "unet").glob("*.safetensors"):
            copy_permissions(path.with_name("config.json"), path)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload pipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        variant: str | None = None,
    ) -> str:
        """Push this pipeline in one commit, with its code and the card of the folder it was loaded from.

        Args:
            repo_id: the repository, which is created if it does not exist.
            commit_message: title of the commit.
            private: whether a new repository is private; None leaves it to the account.
            token: a Hub token, if not the one that is logged in with.
            create_pr: propose the commit instead.
            revision: the branch, which must exist.
            variant: word in the name of the weights' file, such as `fp16`; other weights there then stay.

        Returns:
            The address of the commit.

        Raises:
            ValueError: a file or the commit message holds the token.
            OSError: the Hub rejected the request or could not be reached; the files are unchanged.
        """

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary, variant=variant)
            loaded = self._beside(CARD, token)
            card = short_card(self.num_classes) if loaded is None else read_text(loaded)
            replace_text(Path(temporary, CARD), card_for(card, repo_id))
            if (picture := self._beside(PICTURE, token)) is not None:
                shutil.copyfile(picture, Path(temporary, PICTURE))
            stale = [f"{reading.CODE_STEM}*.py", *(() if variant else ("unet/*", "scheduler/*"))]
            how: dict[str, Any] = {"create_pr": create_pr, "revision": revision}
            return upload(Path(temporary), repo_id, message=commit_message, stale=stale, api=api, **how)

    def _beside(self, name: str, token: str | None) -> Path | None:
        """A file beside this pipeline where it was loaded from; None if there is none."""
        folder, cache_dir = self._origin
        if folder is None:
            return None
        source = self.config._name_or_path
        try:
            if not Path(source).is_dir():
                how = {"revision": folder.name, "cache_dir": cache_dir, "token": token}
                reading.fetch_file(source, name, reading.MAX_CARD_BYTES, **how)
            path = file_within(folder, name)
        except FileError:
            return None
        return path if path.stat().st_size <= reading.MAX_CARD_BYTES else None
