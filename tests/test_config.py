"""The configuration: precedence, errors that name field and value, and the way through YAML and back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mnist_diffusion.option_types import parse_interval
from mnist_diffusion.config import RECIPES
from mnist_diffusion.option_types import find_recipe
from tests.conftest import parse_distill, parse_train
from mnist_diffusion.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    DistillationConfig,
    DistillConfig,
    ModelConfig,
    SamplingSettings,
    TrainConfig,
)
from mnist_diffusion.errors import ConfigError

BAD_FLAGS = [
    (["--train.max_stepz", "3"], "unrecognized arguments: --train.max_stepz 3; did you mean --train.max_steps?"),
    (["--train.max_step", "3"], "unrecognized arguments: --train.max_step 3; did you mean --train.max_steps?"),
    (["--train.learning_rate", "fast"], "train.learning_rate must be of type float, got fast"),
    (["--data.batch_size", "0"], "data.batch_size must be at least 1, got 0"),
    (["--data.batch_size", "many"], "data.batch_size"),
    (["--data.batch_size", "1.5"], "data.batch_size"),
    (["--data.channels", "2"], "data.channels must be 1, 3 or null, got 2"),
    (["--data.image_size", "4"], "data.image_size must be at least 8, got 4"),
    (["--data.fit", "stretch"], "data.fit"),
    (["--data.augment.shift", "0.9"], "data.augment.shift must be between 0 and 0.5, got 0.9"),
    (["--data.source", ""], "data.source"),
    (["--model.block_out_channels", "[]"], "model.block_out_channels must be positive widths of at most 16384"),
    (["--model.block_out_channels", "[100000]"], "model.block_out_channels must be positive widths of at most 16384"),
    (["--data.batch_size", "1000000000000"], "data.batch_size must be at most 100000, got 1000000000000"),
    (["--data.image_size", "100000"], "data.image_size must be at most 4096, got 100000"),
    (["--train.learning_rate", "1e300"], "train.learning_rate must be at most 100, got 1e+300"),
    (["--diffusion.num_train_timesteps", "1000000"], "diffusion.num_train_timesteps must be at most 100000"),
    (["--model.block_out_channels", "[20]"], "model.norm_num_groups must be a divisor of every width"),
    (["--model.attention_levels", "[3]"], "model.attention_levels must be distinct levels from 0 to 1, got [3]"),
    (["--model.dropout", "1.0"], "model.dropout must be between 0 and 0.95, got 1.0"),
    (["--diffusion.min_snr_gamma", "5"], "diffusion.sigmoid_bias must be null with min_snr_gamma=5.0, got 2.0"),
    (["--sampling.guidance_interval", "[0.8,0.2]"], "sampling.guidance_interval must be a rising pair from 0 to 1"),
    (
        ["--diffusion.min_snr_gamma", "5", "--diffusion.sigmoid_bias", "null", "--diffusion.loss_space", "epsilon"],
        "diffusion.loss_space must be prediction with min_snr_gamma=5.0, got 'epsilon'",
    ),
    (
        ["--diffusion.prediction_type", "epsilon", "--diffusion.loss_space", "sample"],
        "diffusion.loss_space must be prediction or epsilon with diffusion.prediction_type epsilon",
    ),
    (["--diffusion.lognormal", "[0, 0]"], "diffusion.lognormal must be a mean and a positive standard deviation"),
    (["--diffusion.min_snr_gamma", "0"], "diffusion.min_snr_gamma must be a positive number, got 0"),
    (["--train.checkpoint_every", "often"], "train.checkpoint_every must be null, or so many steps or epochs"),
    (["--train.sample_every", "0 steps"], "train.sample_every must be null, or so many steps or epochs"),
    (["--train.snapshot_every", "0.5 steps"], "train.snapshot_every must be null, or so many steps or epochs"),
    (["--train.evaluate_every", "-1 epochs"], "train.evaluate_every"),
    (["--hub.push", "true", "--hub.every_snapshot", "true"], "hub.every_snapshot=true needs train.snapshot_every"),
    (["--diffusion.beta_schedule", "steep"], "diffusion.beta_schedule"),
    (["--diffusion.beta_start", "0.5"], "diffusion.beta_start must be at most diffusion.beta_end=0.02, got 0.5"),
    (["--diffusion.trained_betas", "[0.1]"], "diffusion.trained_betas must be"),
    (
        ["--diffusion.prediction_type", "epsilon", "--diffusion.rescale_betas_zero_snr", "true"],
        "diffusion.rescale_betas_zero_snr=true needs diffusion.prediction_type",
    ),
    (["--diffusion.label_dropout", "1.1"], "diffusion.label_dropout must be between 0 and 1, got 1.1"),
    (["--sampling.scheduler", "magic"], "sampling.scheduler"),
    (["--sampling.num_inference_steps", "2000"], "sampling.num_inference_steps=2000 must not exceed"),
    (["--sampling.guidance_scale", ".nan"], "sampling.guidance_scale must be at least 0, got nan"),
    (["--train.learning_rate", "0"], "train.learning_rate must be a positive number, got 0"),
    (["--train.learning_rate", ".nan"], "train.learning_rate must be a positive number, got nan"),
    (["--train.max_steps", "-1"], "train.max_steps must be at least 1, got -1"),
    (["--train.max_minutes", "0"], "train.max_minutes must be a positive number, got 0"),
    (["--train.ema_decay", "1.5"], "train.ema_decay must be between 0 and 1, got 1.5"),
    (["--train.mixed_precision", "int4"], "train.mixed_precision"),
    (["--train.trackers", "[abacus]"], "train.trackers"),
    (["--train.resume", "true"], "train.resume=true needs output_dir"),
    (["--config", "no-such-recipe"], "--config must be a YAML file or one of the recipes compact_500, ddpm_1000,"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_values_name_field_and_value(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_train(flags)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 2
    assert message in " ".join(printed.split())


def test_switches_stand_alone_and_lists_take_several_values() -> None:
    flags = ["--train.resume", "--output_dir", "x", "--data.balance", "--data.class_names", "1", "b, c"]
    flags += ["--sampling.guidance_interval", "0.1", "0.9", "--model.block_out_channels", "8", "--train.seed", "5"]
    config = parse_train(flags).config
    assert (config.train.resume, config.data.balance, config.data.class_names) == (True, True, ("1", "b, c"))
    assert (config.sampling.guidance_interval, config.model.block_out_channels) == ((0.1, 0.9), (8,))
    assert parse_train(["--data.class_names", "null", "--data.balance", "false"]).config.data.balance is False


def test_flags_win_wherever_config_stands(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  max_steps: 5\n  seed: 3\n")
    before = parse_train(["--train.max_steps", "7", "--config", str(file)])
    after = parse_train(["--config", str(file), "--train.max_steps", "7"])
    assert before.config == after.config
    assert before.config.train.max_steps == 7
    assert before.config.train.seed == 3
    assert before.recipe == "mine"


def test_later_config_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("train: {seed: 1, max_steps: 5}")
    second.write_text("train: {seed: 2}")
    config = parse_train(["--config", str(first), "--config", str(second)]).config
    assert (config.train.seed, config.train.max_steps) == (2, 5)


def test_unknown_key_in_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  max_stepz: 5\n")
    with pytest.raises(SystemExit):
        parse_train(["--config", str(file)])
    assert "max_stepz" in capsys.readouterr().err


def test_default_recipe_is_the_schema() -> None:
    assert parse_train([]).config == Config()
    assert parse_train(["--config", "default"]).config == Config()


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_parse_and_come_back_from_yaml(recipe: str, tmp_path: Path) -> None:
    config = parse_train(["--config", recipe]).config
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert parse_train(["--config", str(saved)]).config == config
    assert find_recipe(recipe).read_text().startswith("#")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (RECIPES / "distillation").glob("*.yaml")))
def test_recipes_of_students_parse_and_come_back_from_yaml(recipe: str, tmp_path: Path) -> None:
    config = parse_distill(["teacher", "--config", recipe, "--out", "folder"]).config
    assert (config.distillation.teacher, config.output_dir) == ("teacher", "folder")
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert parse_distill(["--config", str(saved)]).config == config


def test_default_student_is_the_schema() -> None:
    expected = DistillConfig(distillation=DistillationConfig(teacher="a/b"))
    assert parse_distill(["a/b"]).config == expected
    assert parse_distill(["a/b", "--config", "default"]).config == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "distillation.teacher"),
        (["a/b", "--config", "nowhere"], "recipes default, tiny, got 'nowhere'"),
        (["a/b", "--distillation.guidance_scales", "[-1]"], "distillation.guidance_scales must be one to 100 distinct"),
        (["a/b", "--distillation.guidance_scales", "[.nan]"], "distillation.guidance_scales"),
        (["a/b", "--distillation.num_teacher_steps", "0"], "distillation.num_teacher_steps must be at least 1, got 0"),
        (["a/b", "--distillation.points_per_trajectory", "9"], "points_per_trajectory must be between 1 and 8, got 9"),
        (["a/b", "--distillation.snap_tolerance", "0.6"], "distillation.snap_tolerance must be between 0 and 0.5"),
        (["a/b", "--distillation.huber_c", "0"], "distillation.huber_c must be a positive number, got 0"),
        (["a/b", "--distillation.label_dropout", "2"], "distillation.label_dropout"),
        (["a/b", "--distillation.scheduler", "best"], "distillation.scheduler"),
        (["a/b", "--sampling.num_inference_steps", "0"], "sampling.num_inference_steps"),
        (["a/b", "--model.dropout", "0.1"], "model.dropout"),
        (["a/b", "--train.resume", "true"], "train.resume=true needs output_dir"),
    ],
)
def test_bad_distillations_name_field_and_value(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_distill(flags)
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_yaml_keeps_every_kind_of_value(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(source="a b/é", channels=3),
        model=ModelConfig(attention_levels=(0, 1)),
        diffusion=DiffusionConfig(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
        sampling=SamplingSettings(num_inference_steps=2, scheduler="EulerAncestralDiscreteScheduler"),
        train=TrainConfig(
            trackers=("tensorboard", "wandb"), max_epochs=0.5, mixed_precision="bf16", learning_rate=1e-5
        ),
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert parse_train(["--config", str(saved)]).config == config


def test_time_limit_is_five_minutes_where_nothing_else_limits() -> None:
    assert TrainConfig().time_limit_minutes == 5
    assert TrainConfig(max_steps=3).time_limit_minutes is None
    assert TrainConfig(max_steps=3, max_minutes=2).time_limit_minutes == 2


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"train\.weight_decay must be at least 0, got inf"):
        TrainConfig(weight_decay=math.inf)
    with pytest.raises(ConfigError):
        ModelConfig(block_out_channels=(-8,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500 steps", (500, "steps")),
        ("1 step", (1, "steps")),
        ("0.5 epochs", (0.5, "epochs")),
        ("2epoch", (2, "epochs")),
    ],
)
def test_intervals(text: str, expected: tuple[float, str]) -> None:
    assert parse_interval(text, "train.sample_every") == expected


def test_sections_are_written_in_the_order_of_a_run() -> None:
    assert list(Config().to_dict()) == ["data", "model", "diffusion", "sampling", "train", "hub", "output_dir"]
