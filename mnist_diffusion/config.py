"""The schema of a run: frozen dataclasses, one sentence per field, checked when they are made.

Everything that shapes a run stands here and nowhere else. `Config` is read from defaults, a YAML recipe and
dotted flags (see `mnist_diffusion.cli`), and written back to the run folder as `config.yaml`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import yaml

RECIPES = Path(__file__).parent / "configs"

MAX_YAML_BYTES, MAX_YAML_DEPTH = 2**15, 10
OPENING = (
    *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
    *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
)
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)

SchedulerName = Literal[
    "ddpm",
    "ddim",
    "dpmpp",
    "dpmpp-sde",
    "unipc",
    "deis",
    "pndm",
    "euler",
    "euler-a",
    "heun",
    "kdpm2",
    "lcm",
    "tcd",
]
TrajectorySampler = Literal["dpmpp", "unipc", "deis", "ddim"]
TrackerName = Literal["tensorboard", "wandb"]
MixedPrecision = Literal["no", "fp16", "bf16"]


class UserError(ValueError):
    """Something the user can put right; commands print its message without a traceback."""


class ConfigError(UserError):
    """A field of the configuration has a value that cannot work."""


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


def _require_at_least(low: float, section: str, config: object, *names: str) -> None:
    """Check the named fields of `config`; None passes, NaN and infinity do not."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(math.isfinite(value) and value >= low, f"{section}.{name}", value, f"at least {low}")


def _require_between(low: float, high: float, section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(low <= value <= high, f"{section}.{name}", value, f"between {low} and {high}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to a training image, drawn anew for each image in each epoch."""

    shift: float = 0.0
    """Largest shift along each axis, as a share of the image's side."""
    rotate: float = 0.0
    """Largest rotation either way, in degrees."""
    scale: float = 0.0
    """Largest relative change of size either way: 0.1 draws factors from 0.9 to 1.1."""
    horizontal_flip: bool = False
    """Mirror every other image left to right; wrong for digits and letters."""

    def __post_init__(self) -> None:
        _require_between(0, 0.5, "data.augment", self, "shift", "scale")
        _require_between(0, 180, "data.augment", self, "rotate")


LEADS_TO_IMAGES = (
    "source",
    "subset",
    "image_column",
    "label_column",
    "train_split",
    "test_split",
    "image_size",
    "fit",
    "channels",
    "class_names",
)
"""The fields of `DataConfig` that say which images there are and what they look like."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the labelled images come from and how they become a batch."""

    source: str | None = None
    """`digits`, a folder (IDX files, one folder a class, parquet or arrow), a parquet or arrow file, or a Hub
    data set id; null takes MNIST from the Hub, or the embedded digits where the Hub cannot be reached."""
    subset: str | None = None
    """The part of a source that has several: a configuration of a Hub data set, or such as `letters` of EMNIST."""
    image_column: str | None = None
    """The column with the images; null takes the only image column."""
    label_column: str | None = None
    """The column with the labels; null takes the only class-label column, or the one named `label`."""
    train_split: str = "train"
    """The split to train on."""
    test_split: str | None = None
    """The split to hold out; null takes `test` where there is one, else a tenth of each class chosen by the seed."""
    image_size: int | None = None
    """Side of the square images in pixels; null keeps the size of the source."""
    fit: Literal["pad", "resize"] = "resize"
    """How an image of another size is brought to `image_size`: centred on black, or resized and centre-cropped."""
    channels: int | None = None
    """1 for grey, 3 for RGB; null keeps what the source has."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels; null takes the source's own, or the labels themselves."""
    in_memory: bool | None = None
    """Decode all images before training, or each when it is needed; null decodes them all where they take at most
    2 GB."""
    balance: bool = False
    """Draw each class equally often, whatever its share of the training images."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to training images."""
    batch_size: int = 64
    """Images per optimizer update, over all processes and accumulated micro-batches."""

    def __post_init__(self) -> None:
        _require_at_least(1, "data", self, "batch_size")
        _require_at_least(8, "data", self, "image_size")
        _require(self.channels in (None, 1, 3), "data.channels", self.channels, "1, 3 or null")
        for name in ("source", "subset", "train_split", "test_split", "image_column", "label_column"):
            _require(getattr(self, name) != "", f"data.{name}", "", "a name or null")
        names = self.class_names
        if names is not None:
            object.__setattr__(self, "class_names", tuple(names))  # a list where it comes from a file
            _require(all(names) and len(set(names)) == len(names), "data.class_names", list(names), "distinct names")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the `UNet2DModel`."""

    block_out_channels: tuple[int, ...] = (16, 32, 64)
    """Width of each resolution level, finest first."""
    layers_per_block: int = 1
    """Residual blocks a level."""
    attention_levels: tuple[int, ...] = ()
    """Levels (0 is the finest) with self-attention; any makes the middle block attend too."""
    attention_head_dim: int = 32
    """Channels of each attention head."""
    norm_num_groups: int = 8
    """Groups of each group normalisation; must divide every width."""
    act_fn: Literal["silu", "mish", "gelu", "relu"] = "silu"
    """Activation function."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks."""
    class_conditional: bool = True
    """Condition on the class label; false trains an unconditional model."""

    def __post_init__(self) -> None:
        widths = self.block_out_channels
        _require(len(widths) > 0 and all(w > 0 for w in widths), "model.block_out_channels", widths, "positive widths")
        _require_at_least(1, "model", self, "layers_per_block", "norm_num_groups", "attention_head_dim")
        _require_between(0, 0.95, "model", self, "dropout")
        for width in widths:
            if width % self.norm_num_groups:
                raise ConfigError(
                    f"model.norm_num_groups={self.norm_num_groups} must divide every width in "
                    f"model.block_out_channels={list(widths)}, but not {width}"
                )
        levels = self.attention_levels
        rule = f"distinct levels from 0 to {len(widths) - 1}"
        known = all(0 <= level < len(widths) for level in levels)
        _require(known and len(set(levels)) == len(levels), "model.attention_levels", list(levels), rule)
        for width in {widths[-1], *(widths[level] for level in levels)} if levels else ():
            if width % self.attention_head_dim:
                raise ConfigError(
                    f"model.attention_head_dim={self.attention_head_dim} must divide the width {width} of a level "
                    "that attends"
                )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noising process and the training target."""

    num_train_timesteps: int = 1000
    """Steps of the noising process."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """How the noise variance grows over the steps."""
    beta_start: float = 0.0001
    """First beta of the linear schedules."""
    beta_end: float = 0.02
    """Last beta of the linear schedules."""
    trained_betas: tuple[float, ...] | None = None
    """Custom betas, one a step, in place of a named schedule."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """What the network predicts: the noise, the velocity, or the clean image."""
    rescale_betas_zero_snr: bool = False
    """Rescale the betas so that the last step is pure noise (zero terminal SNR)."""
    clip_sample: bool = True
    """Let samplers that can clip the predicted clean image to [-1, 1] do so."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """Weight of the loss over timesteps."""
    min_snr_gamma: float = 5.0
    """The gamma of the min-SNR weighting."""
    label_dropout: float = 0.1
    """Share of the labels replaced by the null class, which is what classifier-free guidance learns from."""

    def __post_init__(self) -> None:
        _require_at_least(2, "diffusion", self, "num_train_timesteps")
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            _require(0 < value < 1, f"diffusion.{name}", value, "between 0 and 1, both excluded")
        if self.beta_start > self.beta_end:
            raise ConfigError(
                f"diffusion.beta_start={self.beta_start} must not exceed diffusion.beta_end={self.beta_end}"
            )
        if self.trained_betas is not None:
            count = len(self.trained_betas)
            rule = f"num_train_timesteps={self.num_train_timesteps} values"
            _require(count == self.num_train_timesteps, "diffusion.trained_betas", f"{count} values", rule)
            outside = [beta for beta in self.trained_betas if not 0 < beta < 1]
            _require(not outside, "diffusion.trained_betas", outside[:3], "between 0 and 1, both excluded")
        _require_between(0, 1, "diffusion", self, "label_dropout")
        _require(
            math.isfinite(self.min_snr_gamma) and self.min_snr_gamma > 0,
            "diffusion.min_snr_gamma",
            self.min_snr_gamma,
            "a positive number",
        )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ConfigError(
                "diffusion.rescale_betas_zero_snr=true needs diffusion.prediction_type v_prediction or sample: at zero "
                "SNR the image cannot be recovered from a prediction of the noise, got 'epsilon'"
            )


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """A single-step denoiser in place of a diffusion model; it knows neither time nor class."""

    sigma: float | None = None
    """Train a denoiser on noise of this standard deviation, for pixels from 0 to 1; null trains a diffusion model."""

    def __post_init__(self) -> None:
        if self.sigma is not None:
            _require(math.isfinite(self.sigma) and self.sigma > 0, "denoiser.sigma", self.sigma, "a positive number")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What the pipeline folder does when it is called without further arguments."""

    scheduler: SchedulerName = "dpmpp"
    """The sampler, by its short name."""
    num_inference_steps: int = 10
    """Denoising steps."""
    guidance_scale: float = 2.0
    """Strength of classifier-free guidance: 1 is conditional, 0 unconditional, above 1 sharpens the class."""
    eta: float = 0.0
    """Noise added by the samplers that take an eta (DDIM, TCD): 0 is deterministic."""

    def __post_init__(self) -> None:
        _require_at_least(1, "sampling", self, "num_inference_steps")
        _require_at_least(0, "sampling", self, "guidance_scale")
        _require_between(0, 1, "sampling", self, "eta")


@dataclass(frozen=True, kw_only=True)
class FewStepConfig:
    """What a student's pipeline folder does when it is called without further arguments."""

    scheduler: SchedulerName = "lcm"
    """The sampler, by its short name."""
    num_inference_steps: int = 1
    """Denoising steps, one network pass each."""
    eta: float = 0.0
    """Noise added by the samplers that take an eta (DDIM, TCD): 0 is deterministic."""

    def __post_init__(self) -> None:
        _require_at_least(1, "sampling", self, "num_inference_steps")
        _require_between(0, 1, "sampling", self, "eta")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a student learns from its teacher."""

    teacher: str
    """The teacher: a pipeline folder, or a Hub id such as `user/name`."""
    guidance_scale: float = 1.5
    """The guidance of the teacher that the student learns to draw with, in one pass a step."""
    scheduler: TrajectorySampler = "dpmpp"
    """The sampler that draws the teacher's trajectories: one that adds no noise of its own on the way."""
    num_teacher_steps: int = 8
    """Steps of a trajectory. Its points are those from which the student can be sampled in as many steps, or in a
    divisor of them."""
    points_per_trajectory: int = 2
    """How many points of a trajectory the student learns from: the noise, and others in turn."""
    clean_within: float = 0.04
    """How near to black or white, of a range from -1 to 1, a pixel of the teacher is taken for it."""
    huber_c: float = 0.5
    """Where the pseudo-Huber loss of a pixel turns from square to linear."""
    label_dropout: float = 0.1
    """Share of the labels replaced by the null class, from which the student learns to draw without a class."""
    split_seed: int = 0
    """The `train.seed` of the teacher's run, which chose its held-out images where the source has no split for them;
    taken from the teacher's run folder together with the images."""

    def __post_init__(self) -> None:
        _require(self.teacher != "", "distillation.teacher", "", "a pipeline folder or a Hub id")
        _require_at_least(0, "distillation", self, "guidance_scale")
        _require_at_least(1, "distillation", self, "num_teacher_steps")
        _require_between(1, self.num_teacher_steps, "distillation", self, "points_per_trajectory")
        _require_at_least(0, "distillation", self, "split_seed")
        _require_between(0, 0.5, "distillation", self, "clean_within")
        _require_between(0, 1, "distillation", self, "label_dropout")
        _require(
            math.isfinite(self.huber_c) and self.huber_c > 0, "distillation.huber_c", self.huber_c, "a positive number"
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how fast, how often it reports and saves. A step is one optimizer update."""

    seed: int = 0
    """Seed of everything random: weights, order, noise, dropout, the held-out split."""
    init_from: str | None = None
    """Start with the weights of this pipeline folder or Hub id, and an optimizer that knows nothing yet; null starts
    with random weights."""
    max_steps: int | None = None
    """Stop after this many steps; if set, it alone shapes the learning-rate schedule."""
    max_epochs: float | None = None
    """Stop after this many passes over the training images."""
    max_minutes: float | None = None
    """Alone: plan as many steps as fit into this time at the speed measured at the start. With `max_steps` or
    `max_epochs`: stop at this time. With none of the three set: five minutes."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine", "exponential"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    final_lr_factor: float = 0.01
    """The last learning rate as a share of the peak (linear, cosine, exponential)."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's norm to this; null leaves it alone."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """When the loss or its gradient is NaN or infinite: stop at the next report, before anything is saved, or skip the
    update, which makes each step wait for its loss."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a process works through for one step."""
    mixed_precision: MixedPrecision | None = None
    """Precision of the forward pass; null takes the launcher's."""
    channels_last: bool = False
    """Keep convolution weights in channels-last memory order, which is faster on tensor cores and some CPUs."""
    num_threads: int | None = None
    """CPU threads of each process; null divides the cores between the processes of this machine."""
    ema_decay: float = 0.9995
    """Decay of the exponential moving average of the weights, which are the ones sampled and published."""
    ema_start_step: int = 0
    """Until this step the average is a plain copy of the weights; then the decay rises as (1 + n) / (10 + n)."""
    ema_update_every_steps: int = 1
    """Update the average every so many steps."""
    num_eval_images: int = 2000
    """Held-out images on which the loss is measured, with the same noise each time; 0 leaves it out."""
    log_every_steps: int = 50
    """Write `metrics.jsonl` and the trackers every so many steps."""
    checkpoint_every_steps: int | None = 500
    """Save the state to resume from every so many steps; null leaves it to the epochs and the end."""
    checkpoint_every_epochs: float | None = None
    """Save the state to resume from every so many epochs."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    sample_every_steps: int | None = 500
    """Draw the sample grid and measure the held-out loss every so many steps."""
    sample_every_epochs: float | None = None
    """Draw the sample grid and measure the held-out loss every so many epochs."""
    samples_per_class: int = 8
    """Columns of the sample grid, which has one row a class."""
    evaluate_every_steps: int | None = None
    """Draw and measure images every so many steps, and at the end; the best so far is kept in `pipeline_best/`."""
    evaluate_every_epochs: float | None = None
    """Draw and measure images every so many epochs, and at the end. The time comes on top of a planned run's."""
    num_evaluation_images: int = 1000
    """How many images each evaluation draws, from the same seeds; the same number of each class."""
    best_metric: Literal["fid", "accuracy"] = "fid"
    """What the best is told by: the lowest Fréchet distance, or the largest share read as asked."""
    animate_at_epochs: tuple[float, ...] = ()
    """Draw the sample grid as an animation of its denoising after each of these epochs."""
    pictures: bool = True
    """Draw curves, schedule, strips and histograms into `pictures/` whenever the sample grid is drawn."""
    snapshot_every_steps: int | None = None
    """Keep a pipeline folder of the averaged weights every so many steps."""
    snapshot_every_epochs: float | None = None
    """Keep a pipeline folder of the averaged weights every so many epochs."""
    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers to report to."""
    resume: bool = False
    """Go on from the newest checkpoint in `output_dir`; without one, start at step 0."""

    def __post_init__(self) -> None:
        events = ("checkpoint", "sample", "evaluate", "snapshot")
        optional = ("max_steps", "num_threads", *(f"{event}_every_steps" for event in events))
        counts = ("gradient_accumulation_steps", "ema_update_every_steps", "log_every_steps", "keep_checkpoints")
        _require_at_least(1, "train", self, *optional, *counts, "samples_per_class")
        _require_at_least(0, "train", self, "seed", "warmup_steps", "ema_start_step", "num_eval_images", "weight_decay")
        positive = ("max_epochs", "max_minutes", "learning_rate", "max_grad_norm", "final_lr_factor")
        for name in (*positive, *(f"{event}_every_epochs" for event in events)):
            value = getattr(self, name)
            if value is not None:
                _require(math.isfinite(value) and value > 0, f"train.{name}", value, "a positive number")
        _require_between(0, 1, "train", self, "final_lr_factor", "ema_decay")
        _require_at_least(50, "train", self, "num_evaluation_images")
        _require(self.seed < 2**63, "train.seed", self.seed, "below 2**63")
        _require(self.init_from != "", "train.init_from", "", "a pipeline folder, a Hub id or null")
        epochs = self.animate_at_epochs
        rule = "positive numbers in rising order"
        rising = list(epochs) == sorted(set(epochs)) and all(math.isfinite(epoch) and epoch > 0 for epoch in epochs)
        _require(rising, "train.animate_at_epochs", list(epochs), rule)
        unique = len(set(self.trackers)) == len(self.trackers)
        _require(unique, "train.trackers", list(self.trackers), f"distinct names from {get_args(TrackerName)}")

    @property
    def evaluates(self) -> bool:
        """Whether images are measured during training."""
        return self.evaluate_every_steps is not None or self.evaluate_every_epochs is not None

    @property
    def time_limit_minutes(self) -> float | None:
        """`max_minutes`, or five where nothing else limits the run."""
        unlimited = self.max_steps is None and self.max_epochs is None and self.max_minutes is None
        return 5.0 if unlimited else self.max_minutes


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Publishing on the Hub, with the token of `hf auth login` or of HF_TOKEN. A run's saved configuration leaves it
    out."""

    push: bool = False
    """Push the pipeline with its card, its code and the configuration when the run has ended."""
    repo_id: str | None = None
    """The repository, `user/name`, made where it is not there; null takes the account and the run folder's name."""
    private: bool = False
    """Nobody else may see the repository."""
    revision: str | None = None
    """The branch, made where it is not there; null takes main."""
    every_snapshot: bool = False
    """Push each snapshot too, in the background."""
    with_checkpoints: bool = False
    """At the end also push the newest checkpoint, to go on training from."""

    def __post_init__(self) -> None:
        for name in ("repo_id", "private", "revision", "every_snapshot", "with_checkpoints"):
            _require(
                self.push or not getattr(self, name), f"hub.{name}", getattr(self, name), "left out without hub.push"
            )


class Saved:
    """What both kinds of run can do with their fields: become plain data and YAML."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dicts, lists and scalars."""
        return _plain(asdict(self))  # type: ignore[call-overload]

    def to_yaml(self) -> str:
        """The configuration as YAML that `--config` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True, kw_only=True)
class Config(Saved):
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The noising process and the training target."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """A denoiser in place of a diffusion model."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """What the pipeline folder does by default."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    hub: HubConfig = field(default_factory=HubConfig)
    """Where the result goes."""
    output_dir: str | None = None
    """The run folder; null makes `runs/<recipe>-<time>`."""

    FIXED: ClassVar[tuple[str, ...]] = ("model", "diffusion", "denoiser")
    """What a resumed run may not change, beside what no run may."""

    def __post_init__(self) -> None:
        steps, available = self.sampling.num_inference_steps, self.diffusion.num_train_timesteps
        if steps > available:
            raise ConfigError(
                f"sampling.num_inference_steps={steps} must not exceed diffusion.num_train_timesteps={available}"
            )
        if self.train.best_metric == "accuracy" and not self.model.class_conditional:
            raise ConfigError("train.best_metric='accuracy' needs model.class_conditional=true, got false")
        if self.denoiser.sigma is not None:
            self._require_denoiser()
        _require_run(self)

    def _require_denoiser(self) -> None:
        """A denoiser draws nothing, so that what has to do with drawing cannot be asked of it."""
        rule = "with a denoiser, which knows no classes and draws no images"
        _require(not self.model.class_conditional, "model.class_conditional", True, f"false {rule}")
        for name, section in (("diffusion", DiffusionConfig()), ("sampling", SamplingConfig())):
            _require(getattr(self, name) == section, name, asdict(getattr(self, name)), f"left alone {rule}")
        for name in ("evaluate_every_steps", "evaluate_every_epochs"):
            _require(getattr(self.train, name) is None, f"train.{name}", getattr(self.train, name), f"null {rule}")
        epochs = self.train.animate_at_epochs
        _require(not epochs, "train.animate_at_epochs", list(epochs), f"empty {rule}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Saved):
    """A whole run of distilling, in which network and noising process are the teacher's."""

    data: DataConfig = field(default_factory=lambda: DataConfig(batch_size=32))
    """The images; where nothing is said of them, those of the teacher's run folder, or else as for training. A batch
    is as many trajectories of the teacher."""
    distillation: DistillationConfig
    """What is learned from the teacher."""
    sampling: FewStepConfig = field(default_factory=FewStepConfig)
    """What the pipeline folder does by default."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            learning_rate=2e-3, weight_decay=0.0, warmup_steps=30, ema_decay=0.995, num_eval_images=64
        )
    )
    """The loop."""
    hub: HubConfig = field(default_factory=HubConfig)
    """Where the result goes."""
    output_dir: str | None = None
    """The run folder; null makes `runs/student-<recipe>-<time>`."""

    FIXED: ClassVar[tuple[str, ...]] = tuple(
        f"distillation.{name}" for name in DistillationConfig.__dataclass_fields__ if name != "teacher"
    )
    """What a resumed run may not change, beside what no run may; the teacher may move, and is told by its weights."""

    def __post_init__(self) -> None:
        started = self.train.init_from
        _require(started is None, "train.init_from", started, "null: a student starts with its teacher's weights")
        _require_run(self)


RunConfig = Config | DistillConfig


def _require_run(config: RunConfig) -> None:
    train = config.train
    if train.resume and config.output_dir is None:
        raise ConfigError("train.resume=true needs output_dir, the run folder to go on with, got null")
    if config.hub.every_snapshot and train.snapshot_every_steps is None and train.snapshot_every_epochs is None:
        raise ConfigError("hub.every_snapshot=true needs train.snapshot_every_steps or train.snapshot_every_epochs")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def require_no_nulls(schema: Any, values: Any, prefix: str = "") -> None:
    """Make sure that only fields of a schema that may be null are, which the parser does not look at.

    Raises:
        ConfigError: another one is.
    """
    hints = get_type_hints(schema)
    for each in fields(schema):
        hint, value = hints[each.name], values[each.name]
        if value is None and type(None) not in get_args(hint):
            raise ConfigError(f"{prefix}{each.name} must not be null")
        if is_dataclass(hint):
            require_no_nulls(hint, value, f"{prefix}{each.name}.")


def require_plain_yaml(path: Path) -> None:
    """Make sure that a YAML file is a configuration's: small, flat, without anchors, which can grow when read.

    Raises:
        ConfigError: it is not.
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_YAML_BYTES:,} bytes")
    depth = 0
    try:
        for token in yaml.scan(content, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                raise ConfigError(f"{path} has YAML anchors and aliases, which are not read")
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > MAX_YAML_DEPTH:
                raise ConfigError(f"{path} is nested deeper than {MAX_YAML_DEPTH} levels")
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error


def find_recipe(name_or_path: str, recipes: Path = RECIPES) -> Path:
    """The YAML file of a recipe: a path, or the name of one in `recipes` that ships with the package.

    Raises:
        ConfigError: there is no such file or recipe; the message lists the recipes.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = recipes / f"{name_or_path}.yaml"
    if shipped.is_file() and shipped.parent == recipes:
        return shipped
    known = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
    raise ConfigError(f"--config must be a YAML file or one of the recipes {known}, got {name_or_path!r}")
