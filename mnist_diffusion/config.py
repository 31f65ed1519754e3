"""Every option of a run, with its range declared at the field.

The defaults are the textbook's (DDPM with classifier-free guidance). `configs/default.yaml` holds the tuned recipe that
`train_cfg.py` runs when it is given no other.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from mnist_diffusion.errors import ConfigError
from mnist_diffusion.files import replace_text, yaml_text
from mnist_diffusion.option_types import (
    CFG,
    FLOW,
    STRICT,
    Background,
    Count,
    Fit,
    GuidanceRule,
    GuidanceScale,
    Interval,
    MixedPrecision,
    NoiseLevels,
    Place,
    Positive,
    Probability,
    Sampler,
    Seed,
    Text,
    checked,
    distinct,
    find_recipe,
    read_mapping,
)

RECIPES = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig:
    """Random changes to a training image, drawn anew in every epoch."""

    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift along each axis, as a fraction of the image size."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in either direction, in degrees."""
    scale: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest relative change of size: 0.1 draws factors from 0.9 to 1.1."""
    horizontal_flip: bool = False
    """Flip images left to right half the time; wrong for digits and letters."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImagesConfig:
    """Where labelled images come from, and the shape they are converted to."""

    source: Place | None = None
    """`digits`, a folder or zip of images, tables or arrays, such a file, or a Hub data set id. Null takes MNIST from
    the Hub, or the embedded digits if the Hub cannot be reached."""
    subset: Text | None = None
    """Subset to read of a source that has several, such as `letters` of EMNIST; for the Hub, the data set's
    configuration."""
    image_column: Text | None = None
    """Column with the images or their file names; null takes the only candidate."""
    label_column: Text | None = None
    """Column with the labels; null takes the only candidate."""
    train_split: Text = "train"
    """Split to train on; `train` also finds `Training` and similar names."""
    test_split: Text | None = None
    """Split to hold out. Null takes the test or validation split, or else a random tenth of each class."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Side of the square images in pixels; null keeps the source's size."""
    fit: Fit = "resize"
    """How images reach `image_size`: `contain` scales to fit and pads, `resize` scales and crops, `pad` only pads."""
    background: Background = "auto"
    """Colour behind transparent pixels and padding. `auto` takes white if more of the transparent images would nearly
    vanish on black than on white, else black."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB; null keeps the source's channels."""
    class_names: Annotated[tuple[Text, ...], AfterValidator(distinct)] | None = None
    """Class names in label order; null takes the source's own names, or the labels."""
    skip_unreadable: bool = False
    """Skip images that cannot be decoded and report how many; otherwise the first one stops the run."""


IMAGE_FIELDS = tuple(field.name for field in dataclasses.fields(ImagesConfig))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig(ImagesConfig):
    """The images of a run, and how they are batched."""

    balance: bool = False
    """Draw every class equally often, whatever its share of the training images."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Random changes to training images."""
    batch_size: Count = 128
    """Images per optimizer step, over all processes and accumulated micro-batches."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The shape of the `UNet2DModel`."""

    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1, max_length=10)] = (64, 128, 128)
    """Channels at each resolution level, finest first."""
    patch_size: Count = 1
    """Side of the pixel patches that become input channels; 2 costs about a quarter of 1."""
    layers_per_block: Count = 2
    """Residual blocks per level."""
    attention_levels: Annotated[tuple[int, ...], AfterValidator(distinct)] = ()
    """Levels with self-attention, 0 being the finest; any also adds attention to the middle block."""
    attention_head_dim: Count = 8
    """Channels per attention head."""
    norm_num_groups: Count = 8
    """Groups of each group normalisation; must divide every level's channels."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How time and class enter a block: added (`default`), or as scale and shift of its normalisation."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability in the residual blocks."""
    class_conditional: bool = True
    """Condition on the class label; false trains an unconditional model."""

    def __post_init__(self) -> None:
        widths, groups, levels = list(self.block_out_channels), self.norm_num_groups, self.attention_levels
        if any(width % groups for width in widths):
            raise ConfigError(f"model.norm_num_groups={groups} must divide every width of block_out_channels={widths}")
        if any(not 0 <= level < len(widths) for level in levels):
            raise ConfigError(f"model.attention_levels={list(levels)} must be levels from 0 to {len(widths) - 1}")
        attending = {widths[-1], *(widths[level] for level in levels)} if levels else set()
        if any(width % self.attention_head_dim for width in attending):
            head = self.attention_head_dim
            raise ConfigError(f"model.attention_head_dim={head} must divide the attention widths {sorted(attending)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DiffusionConfig:
    """The noising process and the training target."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    """Timesteps of the noising process."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule: `linear` is DDPM's, from 0.0001 to 0.02; `squaredcos_cap_v2` is the cosine schedule."""
    noise_shift: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Shifts the noise schedule: above 1, more timesteps lie at high noise levels. The log SNR is lower by
    2 log(noise_shift) at every timestep."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    """What the network predicts: the noise, the velocity or the clean image. `flow_prediction` is flow matching, in
    which every image moves to its noise on a straight line."""
    loss_space: Literal["prediction", "epsilon", "v_prediction", "sample", "flow_prediction"] = "prediction"
    """Quantity the squared error is measured on: the network's prediction, or the noise, velocity, image or flow
    derived from it."""
    loss_weighting: Literal["uniform", "sigmoid", "min_snr"] = "uniform"
    """Weight of each timestep in the loss: uniform; sigmoid(2 - log SNR) times the error in `loss_space`; or min-SNR
    with gamma 5."""
    timesteps: Literal["uniform", "stratified", "lognormal"] = "uniform"
    """Distribution of training timesteps: uniform; uniform with one draw per equal part; or log-normal noise levels."""
    lognormal: tuple[float, Positive] = (0.5, 1.0)
    """Mean and standard deviation of the log noise-to-signal ratio for `timesteps: lognormal`."""
    label_dropout: Probability = 0.1
    """Probability of replacing a label by the null class, so that the network also learns the
    unconditional prediction that guidance needs."""

    def __post_init__(self) -> None:
        if self.prediction_type == "epsilon" and self.loss_space not in ("prediction", "epsilon"):
            raise ConfigError(
                f"diffusion.loss_space={self.loss_space!r} cannot be derived from a prediction of the noise: at the "
                "last timestep the image is lost; use prediction_type v_prediction or sample"
            )
        if self.loss_weighting == "min_snr" and self.loss_space != "prediction":
            raise ConfigError(
                f"diffusion.loss_space={self.loss_space!r} must be prediction with loss_weighting min_snr"
            )
        if self.prediction_type == FLOW and self.beta_schedule != "linear":
            raise ConfigError(f"diffusion.beta_schedule={self.beta_schedule!r} has no effect on {FLOW}; leave it out")
        if self.prediction_type == FLOW and self.noise_shift != 1:
            raise ConfigError(f"diffusion.noise_shift={self.noise_shift} has no effect on {FLOW}; leave it out")
        if self.noise_shift != 1 and (steps := self.num_train_timesteps) > 30_000:  # a scheduler then lists every beta
            raise ConfigError(f"diffusion.num_train_timesteps={steps} must be at most 30000 with a noise_shift")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingSettings:
    """How images are sampled; null takes the pipeline's own default."""

    scheduler: Sampler | None = None
    """Sampler: a short name such as `ddim` or `dpmpp`, or the name of a diffusers scheduler class."""
    num_inference_steps: Count | None = None
    """Denoising steps."""
    guidance_scale: GuidanceScale | None = None
    """Guidance scale: 0 is unconditional, 1 conditional; above 1 samples follow their class more closely."""
    guidance_interval: NoiseLevels | None = None
    """Noise levels from 0 (clean) to 1 between which scales above 1 act; outside, sampling is conditional."""
    guidance: GuidanceRule = CFG
    """Guidance rule: `cfg` (classifier-free), `autoguidance:PIPELINE` with a weaker pipeline, or a diffusers guider."""
    eta: Probability | None = None
    """Noise added by DDIM and TCD: 0 is deterministic."""
    noise_interval: NoiseLevels | None = None
    """Noise levels from 0 (clean) to 1 at which `dpmpp-sde` adds noise; outside them it behaves like `dpmpp`."""

    def __str__(self) -> str:
        steps = f"{self.num_inference_steps} step{'s' if self.num_inference_steps != 1 else ''}"
        guided = "" if self.guidance_scale is None else f", guidance {self.guidance_scale:g}"
        if self.guidance_interval is not None:
            guided += " from {:g} to {:g}".format(*self.guidance_interval)
        return f"{self.scheduler or 'own sampler'}, {steps}{guided}" + (
            f" by {self.guidance}" if self.guidance != CFG else ""
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillationConfig:
    """What a student learns from its teacher."""

    teacher: Place
    """Teacher: a pipeline folder, or a Hub id such as `user/name`."""
    guidance_scales: Annotated[
        tuple[GuidanceScale, ...], Field(min_length=1, max_length=100), AfterValidator(distinct)
    ] = (1.0,)
    """Guidance scales of the teacher that the student learns to sample at; the first is its default."""
    num_teacher_steps: Count = 8
    """Steps of a teacher trajectory; the student samples in this many steps, or in a divisor of it."""
    points_per_trajectory: Count = 2
    """Points of a trajectory that each update learns from: the noise, and evenly spread later ones."""
    split_seed: Seed = 0
    """`train.seed` of the teacher's run, which chose its held-out images; read from the teacher's run folder."""

    def __post_init__(self) -> None:
        if self.points_per_trajectory > self.num_teacher_steps:
            points, steps = self.points_per_trajectory, self.num_teacher_steps
            raise ConfigError(f"distillation.points_per_trajectory={points} must not exceed num_teacher_steps={steps}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The loop: how long it runs, how fast it learns, what it saves. A step is one optimizer update."""

    seed: Seed = 0
    """Seed of all randomness: weights, order, noise, dropout, the held-out split."""
    init_from: Place | None = None
    """Start from the weights of this pipeline folder or Hub id; null starts from random weights."""
    max_steps: Count | None = None
    """Stop after this many steps."""
    max_epochs: Positive | None = None
    """Stop after this many epochs."""
    max_minutes: Positive | None = None
    """Set alone: as many steps as fit in this time. With `max_steps` or `max_epochs`: an upper limit.
    Five minutes if none of the three is set. Evaluations do not count."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for convolutions and linear layers with AdamW for the rest."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 2e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    lr_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """Learning rate after the warm-up. A run limited only by minutes holds it, then decays it linearly (unless
    `constant`)."""
    lr_decay: tuple[Annotated[int, Field(ge=0)], Count] | None = None
    """First step and length in steps of a linear decay, in place of `lr_schedule`. A run limited by minutes alone
    records its own decay here."""
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    """Steps over which the learning rate rises linearly from 0."""
    final_lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Final learning rate as a fraction of the peak."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient norm to this value; null disables clipping."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """On a NaN or infinite loss or gradient: stop before anything is saved, or skip the update."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per step and process."""
    mixed_precision: MixedPrecision | None = None
    """Precision of the forward pass; null uses the launcher's. A run limited only by minutes, on a CPU with bf16
    hardware, also tries bf16 and keeps it if it is faster."""
    channels_last: bool | None = None
    """Use the channels-last memory format. If null, a run limited only by minutes on a CPU uses it if it is faster,
    and other runs do not use it."""
    compile: bool = False
    """Compile the network with torch.compile; the first step then takes about a minute."""
    num_threads: Count | None = None
    """CPU threads per process. Null uses OMP_NUM_THREADS, or divides the cores among the processes; a run limited only
    by minutes on a CPU also tries a single thread."""
    ema_decay: Probability = 0.9999
    """Largest decay of the exponential moving average of the weights, which is sampled and exported; after `n` updates
    the decay is at most (1 + n) / (10 + n)."""
    averages_every: Interval | None = None
    """Save two power-function averages of the weights this often; `mnist-diffusion average` builds others from them."""
    num_eval_images: Annotated[int, Field(ge=0)] = 2000
    """Number of held-out images for the held-out loss; 0 disables it. Timesteps are uniform and the noise is fixed by
    `seed`, so values are comparable over time, and between runs with the same seed and the same loss."""
    log_every_steps: Count = 50
    """Steps between writes to `metrics.jsonl` and the trackers."""
    checkpoint_every: Interval | None = "500 steps"
    """Save a checkpoint to resume from, such as `500 steps` or `0.5 epochs`; one is always saved at the end."""
    keep_checkpoints: Count = 2
    """Checkpoints to keep."""
    sample_every: Interval | None = "500 steps"
    """Sample the sheet and measure the held-out loss this often, and at the end."""
    samples_per_class: Count = 8
    """Columns of the sample sheet, which has one row per class."""
    evaluate_every: Interval | None = None
    """Sample and score 1,000 images this often, and at the end; keep the pipeline with the best FID in
    `pipeline_best/`."""
    pictures: bool = True
    """Draw curves, the noise schedule, noising and denoising strips, and animations into `pictures/`."""
    snapshot_every: Interval | None = None
    """Export a pipeline folder of the averaged weights this often."""
    trackers: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], AfterValidator(distinct)] = ()
    """Experiment trackers to report to."""
    resume: bool = False
    """Resume from the newest checkpoint in `output_dir`; without one, start at step 0."""

    @property
    def time_limit_minutes(self) -> float | None:
        """`max_minutes`, or five if nothing else limits the run."""
        unlimited = self.max_steps is None and self.max_epochs is None and self.max_minutes is None
        return 5.0 if unlimited else self.max_minutes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubConfig:
    """Publishing on the Hub, with the token of `hf auth login` or HF_TOKEN.

    A run's `config.yaml` resets this section to its defaults, so that repeating the run publishes nothing.
    """

    push: bool = False
    """Push the pipeline, its card, its code and the configuration when the run has finished."""
    repo_id: Text | None = None
    """Repository, `user/name`, created if missing; null takes the account and the run folder's name."""
    private: bool = False
    """Create a private repository."""
    with_checkpoints: bool = False
    """Also push the newest checkpoint, to resume from."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value and not self.push:
                raise ConfigError(f"hub.{name}={value!r} has no effect without hub.push")


SECTIONS = ("distillation", "data", "model", "diffusion", "sampling", "train", "hub", "output_dir")
"""The order in which a configuration is written."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Options common to training and distillation runs."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    """Defaults of the exported pipeline."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The loop."""
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    """Publishing."""
    output_dir: Place | None = None
    """Run folder; null makes `runs/<recipe>-<time>`."""

    RECIPE_FOLDER: ClassVar[Path] = RECIPES
    FIXED: ClassVar[tuple[str, ...]] = ()
    """Options that a resumed run may not change, besides `resume.FIXED`."""

    def __post_init__(self) -> None:
        if self.train.resume and self.output_dir is None:
            raise ConfigError("train.resume=true needs output_dir, the run folder to resume")
        if self.sampling.guidance != CFG:
            raise ConfigError(f"sampling.guidance={self.sampling.guidance!r} must be cfg: a folder holds one network")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Load a recipe by its name, or a YAML file by its path.

        Raises:
            ConfigError: there is no such recipe, or a value is out of range; the message names it.
        """
        return cls.from_dict(read_mapping(find_recipe(str(name_or_path), cls.RECIPE_FOLDER)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain nested dicts, checking every value.

        Raises:
            ConfigError: a value is out of range or unknown; the message names it.
        """
        return checked(cls, values)

    def save(self, path: str | Path) -> None:
        """Write YAML that `load` reads back to an equal configuration."""
        replace_text(Path(path), self.to_yaml())

    def reproducible(self) -> Self:
        """The configuration that repeats this run, in a folder of its own, without publishing."""
        train = dataclasses.replace(self.train, resume=False)
        return dataclasses.replace(self, train=train, hub=HubConfig(), output_dir=None)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dicts, lists and scalars."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists
        return {name: values[name] for name in SECTIONS if name in values}

    def to_yaml(self) -> str:
        """The configuration as YAML."""
        return yaml_text(self.to_dict())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """Train a class-conditional diffusion model, and export a pipeline folder that diffusers loads."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The network."""
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    """The noising process and the training target."""

    FIXED: ClassVar[tuple[str, ...]] = ("model", "diffusion")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig(RunConfig):
    """Distil TEACHER, a folder or a Hub id, into a student that samples in a step or a few: TEACHER --out FOLDER.

    Network and noising process are the teacher's. The batch size counts trajectories.
    """

    distillation: DistillationConfig
    """What is learned from the teacher."""

    RECIPE_FOLDER: ClassVar[Path] = RECIPES / "distillation"
    FIXED: ClassVar[tuple[str, ...]] = tuple(
        f"distillation.{field.name}" for field in dataclasses.fields(DistillationConfig) if field.name != "teacher"
    )
    """The teacher may be moved: it is recognised by its weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.init_from is not None:
            raise ConfigError(
                f"train.init_from={self.train.init_from!r} must be null: a student starts from its teacher's weights"
            )
