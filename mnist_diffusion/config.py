"""The options of a run: frozen dataclasses, one sentence per field, checked when they are made.

All that shapes a run is here. `Config` is read from defaults, a YAML recipe and
dotted flags (see `mnist_diffusion.cli`), and written back to the run folder as `config.yaml`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import yaml

from mnist_diffusion import checks
from mnist_diffusion.checks import parse_interval, require, require_at_least, require_between, require_positive
from mnist_diffusion.errors import ConfigError

Line = tuple[int, int, float, float]
"""A straight line of the learning rate: from a step to another, from a share of the peak to another."""
TrajectorySampler = Literal["dpmpp", "unipc", "ddim"]
TrackerName = Literal["tensorboard", "wandb"]
MixedPrecision = Literal["no", "fp16", "bf16"]
MOST, MOST_PIXELS, MOST_CHANNELS = 100_000, 4096, 16_384
"""Bounds out of all proportion, beyond which a number is a slip."""
MOST_SCALES = 100
BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr", "clip_sample")
Background = Literal["black", "white", "edge"]
Fit = Literal["contain", "pad", "resize"]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to a training image, drawn again for each image in each epoch."""

    shift: float = 0.0
    """Largest shift along each axis, as a share of the image's side."""
    rotate: float = 0.0
    """Largest rotation either way, in degrees."""
    scale: float = 0.0
    """Largest relative change of size either way: 0.1 draws factors from 0.9 to 1.1."""
    horizontal_flip: bool = False
    """Mirror every other image left to right; wrong for digits and letters."""

    def __post_init__(self) -> None:
        require_between(0, 0.5, "data.augment", self, "shift", "scale")
        require_between(0, 180, "data.augment", self, "rotate")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where labelled images come from and what shape they are brought to."""

    source: str | None = None
    """`digits`, a folder or an archive of pictures, tables or arrays, such a table or array, or a Hub data set id; null
    takes MNIST from the Hub, or the embedded digits where the Hub cannot be reached."""
    subset: str | None = None
    """The part of a source that has several: a configuration of a Hub data set, or one such as `letters` of EMNIST."""
    image_column: str | None = None
    """The column with the images, or with the names of their files; null takes the only one that can be."""
    label_column: str | None = None
    """The column with the labels; null takes the only one that can be."""
    label_pattern: str | None = None
    """A regular expression whose one group finds the class in a picture's path, such as `(cat|dog)`; null takes the
    folder's name."""
    train_split: str = "train"
    """The split to train on; `train` also finds `Training` and the like."""
    test_split: str | None = None
    """The split to hold out; null takes the one for tests or else for validation, by its name, or else a tenth of each
    class, chosen by the seed."""
    image_size: int | None = None
    """Side of the square images in pixels; null keeps the size of the source."""
    fit: Fit = "resize"
    """How an image of another size is brought to `image_size`: `contain` resizes it to fit in and fills up with the
    background, `resize` makes it cover the square and crops the middle, `pad` only fills up."""
    background: Background = "black"
    """What fills up, and is seen through transparent pixels: `edge` takes the colour of each image's edge."""
    channels: int | None = None
    """1 for grey, 3 for RGB; null keeps what the source has."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their labels; null takes the source's own, or the labels themselves."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read, and say how many; else one is an error."""
    in_memory: bool | None = None
    """Decode all images before training, or each when it is needed; null decodes them all if they take at most 2 GB."""

    def __post_init__(self) -> None:
        require_at_least(8, "data", self, "image_size")
        require((self.image_size or 8) <= MOST_PIXELS, "data.image_size", self.image_size, f"at most {MOST_PIXELS}")
        require(self.channels in (None, 1, 3), "data.channels", self.channels, "1, 3 or null")
        columns = ("image_column", "label_column", "label_pattern")
        for name in ("source", "subset", "train_split", "test_split", *columns):
            require(getattr(self, name) != "", f"data.{name}", "", "a name or null")
        if self.label_pattern is not None:
            try:
                groups = re.compile(self.label_pattern).groups
            except re.error as error:
                raise ConfigError(
                    f"data.label_pattern={self.label_pattern!r} is no regular expression: {error}"
                ) from error
            require(groups == 1, "data.label_pattern", self.label_pattern, "a regular expression with one group")
        names = self.class_names
        if names is not None:
            object.__setattr__(self, "class_names", tuple(names))  # a list where it comes from a file
            require(all(names) and len(set(names)) == len(names), "data.class_names", list(names), "distinct names")


IMAGE_FIELDS = tuple(name for name in ImagesConfig.__dataclass_fields__ if name != "in_memory")
"""The fields that decide which images there are."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """The images of a run, and how they become a batch."""

    balance: bool = False
    """Draw each class equally often, whatever its share of the training images."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes to training images."""
    batch_size: int = 64
    """Images per optimizer update, over all processes and accumulated micro-batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, "data", self, "batch_size")
        require(self.batch_size <= MOST, "data.batch_size", self.batch_size, f"at most {MOST}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the `UNet2DModel`."""

    block_out_channels: tuple[int, ...] = (24, 48)
    """Width of each resolution level, finest first."""
    patch_size: int = 2
    """Side of the square patches whose pixels the network takes as channels, at a fraction of the cost; 1 takes single
    pixels."""
    layers_per_block: int = 1
    """Residual blocks per level."""
    attention_levels: tuple[int, ...] = ()
    """Levels (0 is the finest) with self-attention; any makes the middle block attend too."""
    attention_head_dim: int = 8
    """Channels of each attention head."""
    norm_num_groups: int = 8
    """Groups of each group normalisation; must divide every width."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "scale_shift"
    """How the embedding of time and class enters a block: added, or as scale and shift of its normalisation."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks."""
    class_conditional: bool = True
    """Condition on the class label; false trains an unconditional model."""

    def __post_init__(self) -> None:
        widths = self.block_out_channels
        possible = 0 < len(widths) <= 10 and all(0 < width <= MOST_CHANNELS for width in widths)
        rule = f"positive widths of at most {MOST_CHANNELS}, of at most 10 levels"
        require(possible, "model.block_out_channels", widths, rule)
        require_at_least(1, "model", self, "patch_size", "layers_per_block", "norm_num_groups", "attention_head_dim")
        require_between(0, 0.95, "model", self, "dropout")
        groups, head = self.norm_num_groups, self.attention_head_dim
        every = f"a divisor of every width in model.block_out_channels={list(widths)}"
        require(not any(width % groups for width in widths), "model.norm_num_groups", groups, every)
        levels = self.attention_levels
        rule = f"distinct levels from 0 to {len(widths) - 1}"
        known = all(0 <= level < len(widths) for level in levels)
        require(known and len(set(levels)) == len(levels), "model.attention_levels", list(levels), rule)
        attending = {widths[-1], *(widths[level] for level in levels)} if levels else set()
        rule = f"a divisor of the widths {sorted(attending)} of the levels with attention"
        require(not any(width % head for width in attending), "model.attention_head_dim", head, rule)


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
    """Custom betas, one per step, in place of a named schedule."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "v_prediction"
    """What the network predicts: the noise, the velocity, or the clean image; or, for flow matching, the difference
    between noise and image, where each image goes to its noise in a straight line, whatever the betas."""
    rescale_betas_zero_snr: bool = False
    """Rescale the betas so that the last step is pure noise (zero terminal SNR)."""
    loss_on: Literal["prediction", "epsilon", "v_prediction", "sample", "flow_prediction"] = "prediction"
    """Whose squared error is the loss: of what the network predicts, or of the noise, the velocity, the image or the
    flow that follow from it."""
    timesteps: Literal["uniform", "stratified", "lognormal"] = "uniform"
    """How timesteps are drawn for training: all alike; all alike and evenly over each batch; or so that the ratio of
    noise to signal is log-normal."""
    lognormal: tuple[float, float] = (0.5, 1.0)
    """Mean and standard deviation of the logarithm of that ratio."""
    clip_sample: bool = True
    """Let samplers that can clip the predicted clean image to [-1, 1] do so."""
    min_snr_gamma: float | None = None
    """Weight the loss over timesteps by min-SNR with this gamma, usually 5, in place of `sigmoid_bias`."""
    sigmoid_bias: float | None = 2.0
    """Weight the loss over timesteps by sigmoid(bias - log SNR), small for little noise; null weights all alike."""
    label_dropout: float = 0.1
    """Share of the labels replaced by the null class, which is what classifier-free guidance learns from."""

    def __post_init__(self) -> None:
        require_at_least(2, "diffusion", self, "num_train_timesteps")
        start, end, steps, betas = self.beta_start, self.beta_end, self.num_train_timesteps, self.trained_betas
        require(steps <= MOST, "diffusion.num_train_timesteps", steps, f"at most {MOST}")
        for name, value in (
            ("beta_start", start),
            ("beta_end", end),
            *(("trained_betas", beta) for beta in betas or ()),
        ):
            require(0 < value < 1, f"diffusion.{name}", value, "between 0 and 1, both excluded")
        require(start <= end, "diffusion.beta_start", start, f"at most diffusion.beta_end={end}")
        if betas is not None:
            rule = f"diffusion.num_train_timesteps={steps} values"
            require(len(betas) == steps, "diffusion.trained_betas", f"{len(betas)} values", rule)
        require_between(0, 1, "diffusion", self, "label_dropout")
        require_positive("diffusion", self, "min_snr_gamma")
        bias, gamma = self.sigmoid_bias, self.min_snr_gamma
        require(bias is None or math.isfinite(bias), "diffusion.sigmoid_bias", bias, "a finite number or null")
        require(bias is None or gamma is None, "diffusion.sigmoid_bias", bias, f"null with min_snr_gamma={gamma}")
        if self.prediction_type == "epsilon" and self.loss_on not in ("prediction", "epsilon"):
            rule = (
                "prediction or epsilon with diffusion.prediction_type epsilon, which tells nothing else in pure noise"
            )
            raise ConfigError(f"diffusion.loss_on must be {rule}, got {self.loss_on!r}")
        if self.prediction_type == checks.FLOW:
            for each in fields(self):
                value, rule = getattr(self, each.name), f"left out with diffusion.prediction_type {checks.FLOW}"
                require(each.name not in BETAS or value == each.default, f"diffusion.{each.name}", value, rule)
        own = self.loss_on == "prediction"
        require(own or gamma is None, "diffusion.loss_on", self.loss_on, f"prediction with min_snr_gamma={gamma}")
        possible = all(map(math.isfinite, self.lognormal)) and self.lognormal[1] > 0
        require(possible, "diffusion.lognormal", list(self.lognormal), "a mean and a positive standard deviation")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ConfigError(
                "diffusion.rescale_betas_zero_snr=true needs diffusion.prediction_type v_prediction or sample: at zero "
                "SNR the image cannot be recovered from a prediction of the noise, got 'epsilon'"
            )


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The sampler of a pipeline folder, used where a call names none."""

    scheduler: str = "dpmpp"
    """The sampler: a short name such as `ddim` or `dpmpp`, or the name of a scheduler class of diffusers with betas."""
    num_inference_steps: int = 10
    """Denoising steps."""
    eta: float = 0.0
    """Noise added by the samplers that take an eta (DDIM, TCD): 0 is deterministic."""

    def __post_init__(self) -> None:
        checks.require_sampler("sampling.scheduler", self.scheduler)
        require_at_least(1, "sampling", self, "num_inference_steps")
        require_between(0, 1, "sampling", self, "eta")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(SamplerConfig):
    """What the pipeline folder does when it is called without further arguments."""

    guidance_scale: float = 1.9
    """Strength of classifier-free guidance: 1 is conditional, 0 unconditional, above 1 sharpens the class."""
    guidance_interval: tuple[float, float] = (0.2, 0.8)
    """Noise levels, from 0 (clean) to 1, between which scales above 1 act; outside, the prediction is conditional."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, "sampling", self, "guidance_scale")
        low, high = self.guidance_interval
        require(0 <= low <= high <= 1, "sampling.guidance_interval", [low, high], "a rising pair from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What a student learns from its teacher."""

    teacher: str
    """The teacher: a pipeline folder, or a Hub id such as `user/name`."""
    guidance_scales: tuple[float, ...] = (1.9, 1.0, 1.4, 2.8)
    """Guidance scales of the teacher, within its own interval, with which the student learns to draw in one pass per
    step; a call that names none takes the first."""
    scheduler: TrajectorySampler = "dpmpp"
    """The sampler that draws the teacher's trajectories: one that adds no noise of its own on the way."""
    num_teacher_steps: int = 8
    """Steps of a trajectory. Its points are those from which the student can be sampled in as many steps, or in a
    divisor of them."""
    points_per_trajectory: int = 2
    """How many points of a trajectory the student learns from: the noise, and others in turn."""
    clean_within: float = 0.04
    """How near to black or white, in a range from -1 to 1, a pixel of the teacher counts as black or white."""
    huber_c: float = 0.5
    """Where the pseudo-Huber loss of a pixel turns from square to linear."""
    label_dropout: float = 0.1
    """Share of the labels replaced by the null class, from which the student learns to draw without a class."""
    split_seed: int = 0
    """The `train.seed` of the teacher's run, which chose its held-out images if the source has no split for them;
    taken from the teacher's run folder together with the images."""

    def __post_init__(self) -> None:
        require(self.teacher != "", "distillation.teacher", "", "a pipeline folder or a Hub id")
        scales = self.guidance_scales
        possible = 0 < len(scales) <= MOST_SCALES and all(0 <= scale < math.inf for scale in scales)
        rule = f"one to {MOST_SCALES} distinct scales of at least 0"
        require(possible and len(set(scales)) == len(scales), "distillation.guidance_scales", list(scales), rule)
        require_at_least(1, "distillation", self, "num_teacher_steps")
        require_between(1, self.num_teacher_steps, "distillation", self, "points_per_trajectory")
        require_at_least(0, "distillation", self, "split_seed")
        require_between(0, 0.5, "distillation", self, "clean_within")
        require_between(0, 1, "distillation", self, "label_dropout")
        require_positive("distillation", self, "huber_c")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how fast, how often it reports and saves. A step is one optimizer update."""

    seed: int = 0
    """Seed of everything random: weights, order, noise, dropout, the held-out split."""
    init_from: str | None = None
    """Start with the weights of this pipeline folder or Hub id; null starts with random weights."""
    max_steps: int | None = None
    """Stop after this many steps; if set, it alone shapes the learning-rate schedule."""
    max_epochs: float | None = None
    """Stop after this many passes over the training images."""
    max_minutes: float | None = None
    """Alone: as many steps as fit into this time. With `max_steps` or `max_epochs`: stop at this time. If none of the
    three is set: five minutes. Neither evaluations nor pauses of the machine count."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """AdamW for all weights, or Muon for those of convolutions and linear layers and AdamW for the rest."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay, which AdamW and Muon decouple from the gradient."""
    lr_schedule: Literal["constant", "linear", "cosine", "exponential"] = "cosine"
    """How the learning rate falls after the warm-up. Where `max_minutes` alone ends the run, which does not know its
    length, it stays constant, or else falls on a straight line in the last two fifths of the time."""
    lr_lines: tuple[Line, ...] = ()
    """The learning rate in place of `lr_schedule`: lines `[from step, to step, from share of the peak, to share]`, of
    which the last that has begun counts. A run that `max_minutes` alone ends writes down here what it decides."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    final_lr_factor: float = 0.01
    """The last learning rate as a share of the peak (linear, cosine, exponential)."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's norm to this; null does not clip it."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """If the loss or its gradient is NaN or infinite: stop at the next report, before anything is saved, or skip the
    update, which makes each step wait for its loss."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step and process."""
    mixed_precision: MixedPrecision | None = None
    """Precision of the forward pass; null takes the launcher's."""
    channels_last: bool = False
    """Keep convolution weights in channels-last memory order, which is faster on tensor cores and some CPUs."""
    compile: bool = False
    """Compile the network, which takes a minute at the first step; a GPU then gets each pass as one CUDA graph."""
    num_threads: int | None = None
    """CPU threads of each process; null divides the cores among the processes of this machine, or takes one thread if
    `max_minutes` alone ends the run and one is faster here."""
    ema_decay: float = 0.9995
    """Decay of the exponential moving average of the weights, which are the ones sampled and published."""
    ema_start_step: int = 0
    """Until this step the average is a plain copy of the weights; then the decay rises as (1 + n) / (10 + n), which is
    the smaller one for 18,000 steps if `ema_decay` is 0.9995."""
    averages_every: str | None = None
    """Keep two averages by power functions every so often, and at the end, from which `mnist-diffusion average` makes
    one of any length."""
    num_eval_images: int = 2000
    """Held-out images on which the loss is measured, with the same noise each time; 0 leaves it out."""
    log_every_steps: int = 50
    """Write `metrics.jsonl` and the trackers every so many steps."""
    checkpoint_every: str | None = "500 steps"
    """Save the state to resume from every so often, such as `500 steps` or `0.5 epochs`, and at the end."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    sample_every: str | None = "500 steps"
    """Draw the sample grid and measure the held-out loss every so often, and at the end."""
    samples_per_class: int = 8
    """Columns of the sample grid, which has one row per class."""
    evaluate_every: str | None = None
    """Draw and measure images every so often, and at the end; the best so far is kept in `pipeline_best/`. The time
    comes on top of a planned run's."""
    num_evaluation_images: int = 1000
    """Images that each evaluation draws, from the same seeds; the same number of each class."""
    best_metric: Literal["fid", "accuracy"] = "fid"
    """What is best: the lowest Fréchet distance, or the highest class accuracy."""
    animate_at_epochs: tuple[float, ...] = ()
    """Draw the sample grid as an animation of its denoising after each of these epochs."""
    pictures: bool = True
    """Draw curves, schedule, strips and histograms into `pictures/` whenever the sample grid is drawn."""
    snapshot_every: str | None = None
    """Keep a pipeline folder of the averaged weights every so often."""
    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers to report to."""
    resume: bool = False
    """Resume from the newest checkpoint in `output_dir`; without one, start at step 0 if nothing would be lost."""

    def __post_init__(self) -> None:
        counts = ("gradient_accumulation_steps", "log_every_steps", "keep_checkpoints", "samples_per_class")
        require_at_least(1, "train", self, "max_steps", "num_threads", *counts)
        require_at_least(0, "train", self, "seed", "warmup_steps", "ema_start_step", "num_eval_images", "weight_decay")
        require_positive("train", self, "max_epochs", "max_minutes", "learning_rate", "max_grad_norm")
        require_positive("train", self, "final_lr_factor")
        require(self.learning_rate <= 100, "train.learning_rate", self.learning_rate, "at most 100")
        for name in ("checkpoint_every", "sample_every", "evaluate_every", "snapshot_every", "averages_every"):
            if getattr(self, name) is not None:
                parse_interval(getattr(self, name), f"train.{name}")
        require_between(0, 1, "train", self, "final_lr_factor", "ema_decay")
        require_at_least(50, "train", self, "num_evaluation_images")
        require(self.seed < 2**63, "train.seed", self.seed, "below 2**63")
        require(self.init_from != "", "train.init_from", "", "a pipeline folder, a Hub id or null")
        starts = [line[0] for line in self.lr_lines]
        possible = all(0 <= start < end and 0 <= min(share) <= max(share) <= 1 for start, end, *share in self.lr_lines)
        rule = "lines [step, later step, share, share], each of which begins after the one before"
        require(possible and starts == sorted(set(starts)), "train.lr_lines", list(self.lr_lines), rule)
        epochs = self.animate_at_epochs
        rule = "positive numbers in rising order"
        rising = list(epochs) == sorted(set(epochs)) and all(math.isfinite(epoch) and epoch > 0 for epoch in epochs)
        require(rising, "train.animate_at_epochs", list(epochs), rule)
        unique = len(set(self.trackers)) == len(self.trackers)
        require(unique, "train.trackers", list(self.trackers), f"distinct names from {get_args(TrackerName)}")

    @property
    def time_limit_minutes(self) -> float | None:
        """`max_minutes`, or five if nothing else limits the run."""
        unlimited = self.max_steps is None and self.max_epochs is None and self.max_minutes is None
        return 5.0 if unlimited else self.max_minutes


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Publishing on the Hub, with the token of `hf auth login` or of HF_TOKEN. A run's saved configuration leaves it
    out."""

    push: bool = False
    """Push the pipeline with its card, its code and the configuration when the run has ended."""
    repo_id: str | None = None
    """The repository, `user/name`, created if it does not exist; null takes the account and the run folder's name."""
    private: bool = False
    """Nobody else may see the repository."""
    revision: str | None = None
    """The branch, created if it does not exist; null takes main."""
    every_snapshot: bool = False
    """Push each snapshot too, in the background."""
    with_checkpoints: bool = False
    """At the end also push the newest checkpoint, to resume training from."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(self.push or not value, f"hub.{name}", value, "left out without hub.push")


SECTIONS = ("distillation", "data", "model", "diffusion", "sampling", "train", "hub", "output_dir")
"""The order in which a configuration is written."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has: images, a loop, and a place for the result."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    sampling: SamplerConfig = field(default_factory=SamplerConfig)
    """What the pipeline folder does by default."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    hub: HubConfig = field(default_factory=HubConfig)
    """Where the result goes."""
    output_dir: str | None = None
    """The run folder; null makes `runs/<recipe>-<time>`."""

    FIXED: ClassVar[tuple[str, ...]] = ()
    """What a resumed run may not change, beside what no run may."""

    def __post_init__(self) -> None:
        if self.train.resume and self.output_dir is None:
            raise ConfigError("train.resume=true needs output_dir, the run folder to resume, got null")
        if self.hub.every_snapshot and self.train.snapshot_every is None:
            raise ConfigError("hub.every_snapshot=true needs train.snapshot_every, got null")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dicts, lists and scalars."""
        values = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return {name: values[name] for name in SECTIONS if name in values}

    def to_yaml(self) -> str:
        """The configuration as YAML that `--config` reads back to an equal one."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The noising process and the training target."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """What the pipeline folder does by default."""

    FIXED: ClassVar[tuple[str, ...]] = ("model", "diffusion")

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, available = self.sampling.num_inference_steps, self.diffusion.num_train_timesteps
        if steps > available:
            raise ConfigError(
                f"sampling.num_inference_steps={steps} must not exceed diffusion.num_train_timesteps={available}"
            )
        if self.train.best_metric == "accuracy" and not self.model.class_conditional:
            raise ConfigError("train.best_metric='accuracy' needs model.class_conditional=true, got false")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """A distillation, in which network and noising process are the teacher's."""

    data: DataConfig = field(default_factory=lambda: DataConfig(batch_size=32))
    """The images; by default those of the teacher's run folder, or else as for training. The batch size counts
    trajectories of the teacher."""
    distillation: DistillationConfig
    """What is learned from the teacher."""
    sampling: SamplerConfig = field(default_factory=lambda: SamplerConfig(scheduler="lcm", num_inference_steps=1))
    """What the pipeline folder does by default."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            learning_rate=2e-3, weight_decay=0.0, warmup_steps=30, ema_decay=0.995, num_eval_images=64
        )
    )
    """The loop."""

    FIXED: ClassVar[tuple[str, ...]] = tuple(
        f"distillation.{name}" for name in DistillationConfig.__dataclass_fields__ if name != "teacher"
    )
    """The teacher may be moved; it is recognised by its weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        started = self.train.init_from
        require(started is None, "train.init_from", started, "null: a student starts with its teacher's weights")
