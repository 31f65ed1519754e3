"""The configuration: precedence, errors that name option and value, and the way through YAML and back."""

import io
import math
from pathlib import Path

import pytest
import yaml

from mnist_diffusion.cli.options import reporting_errors
from mnist_diffusion.command_options import SampleOptions
from mnist_diffusion.config import RECIPES, Config, DataConfig, DistillationConfig, DistillConfig, TrainConfig
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.files import parse_yaml
from mnist_diffusion.option_types import find_recipe
from tests.conftest import parse_distill, parse_train

SMALL = ["--model.block_out_channels", "[20]"]
BAD_OPTIONS = [
    (["--train.max_step", "3"], "unrecognized arguments: --train.max_step 3; did you mean --train.max_steps?"),
    (["--train.learning_rate", "fast"], "train.learning_rate must be a valid number, got 'fast'"),
    (["--train.learning_rate", "0"], "train.learning_rate must be greater than 0, got '0'"),
    (["--data.fit", "stretch"], "data.fit must be 'contain', 'pad' or 'resize', got 'stretch'"),
    (SMALL, "model.norm_num_groups=8 must divide every width of block_out_channels=[20]"),
    (["--sampling.guidance_interval", "[0.8,0.2]"], "sampling.guidance_interval must not be reversed, got [0.8, 0.2]"),
    (
        ["--diffusion.loss_weighting", "min_snr", "--diffusion.loss_space", "epsilon"],
        "diffusion.loss_space='epsilon' must be prediction with loss_weighting min_snr",
    ),
    (
        ["--diffusion.prediction_type", "epsilon", "--diffusion.loss_space", "sample"],
        "diffusion.loss_space='sample' cannot be derived from a prediction of the noise",
    ),
    (["--config", "flow_matching", "--diffusion.noise_shift", "2"], "diffusion.noise_shift=2.0 has no effect on flow"),
    (["--train.sample_every", "0 steps"], "train.sample_every must be a number of steps or epochs"),
    (["--model.block_out_channels", "[8, 16"], "'[8, 16' is not a list such as [8, 16]"),
    (["--train.trackers", "[abacus]"], "train.trackers.0 must be 'tensorboard', 'trackio' or 'wandb', got 'abacus'"),
    (["--train.resume", "true"], "train.resume=true needs output_dir"),
    (["--hub.private", "true"], "hub.private=True has no effect without hub.push"),
    (["--config", "no-such-recipe"], "config must be a YAML file or one of the recipes compact_500, ddpm_1000,"),
]
BAD_DISTILLATIONS = [
    ([], "distillation.teacher is missing"),
    (["a/b", "--config", "nowhere"], "recipes default, tiny, got 'nowhere'"),
    (["a/b", "--distillation.guidance_scales", "[2, 2]"], "distillation.guidance_scales must not repeat a value"),
    (["a/b", "--model.dropout", "0.1"], "model.dropout"),
]


@pytest.mark.parametrize(("options", "message"), [*BAD_OPTIONS, *BAD_DISTILLATIONS], ids=str)
def test_bad_values_name_option_and_value(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [] if options == SMALL or "--config" in options else ["--config", "tiny"]
    with pytest.raises(SystemExit) as stopped:
        parse_distill(options) if (options, message) in BAD_DISTILLATIONS else parse_train([*tiny, *options])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 2
    assert message in printed


def test_switches_stand_alone_and_lists_take_several_values() -> None:
    flags = ["--train.resume", "--output_dir", "x", "--train.channels_last", "--data.balance", "--train.seed", "5"]
    flags += ["--data.class_names", "1", "b, c", "--sampling.guidance_interval", "0.1", "0.9"]
    flags += ["--model.block_out_channels", "8"]
    config = parse_train(flags).config
    assert config.train.channels_last is True
    assert (config.train.resume, config.data.balance, config.data.class_names) == (True, True, ("1", "b, c"))
    assert (config.sampling.guidance_interval, config.model.block_out_channels) == ((0.1, 0.9), (8,))
    assert parse_train(["--data.class_names", "null", "--data.balance", "false"]).config.data.balance is False


def test_flags_win_wherever_config_stands_and_a_later_config_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {seed: 1, max_steps: 5}")
    second.write_text("train: {seed: 2}")
    before = parse_train(["--train.max_steps", "7", "--config", str(first), "--config", str(second)])
    after = parse_train(["--config", str(first), "--config", str(second), "--train.max_steps", "7"])
    assert before.config == after.config
    assert (after.config.train.max_steps, after.config.train.seed) == (7, 2)
    assert after.recipe == "second"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  max_stepz: 5\n", "train.max_stepz is not a known name, got 5"),
        ("train: fast", "train must be a section of options, got 'fast'"),
        ("train:\nmax_steps: 5", "mine.yaml: the section train is empty"),
        *((text, "mine.yaml has no options") for text in ("", "# nothing\n")),
        ("t\0r\0", "mine.yaml is not YAML"),
        ("train:\n  checkpoint_every: 500", "train.checkpoint_every must be a number of steps or epochs, such as"),
        ("data:\n  class_names: [1, 2]", "data.class_names.0 must be a word, in quotes if it looks like a number"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse_train(["--config", str(file), "--train.seed", "3"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_come_back_from_yaml(recipe: str, tmp_path: Path) -> None:
    config = parse_train(["--config", recipe]).config
    config.save(tmp_path / "config.yaml")
    assert Config.load(recipe) == Config.load(tmp_path / "config.yaml") == config
    assert find_recipe(recipe, RECIPES).read_text().startswith("#")


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (RECIPES / "distillation").glob("*.yaml")))
def test_recipes_of_students_come_back_from_yaml(recipe: str, tmp_path: Path) -> None:
    config = parse_distill(["teacher", "--config", recipe, "--output_dir", "folder"]).config
    assert (config.distillation.teacher, config.output_dir) == ("teacher", "folder")
    config.save(tmp_path / "config.yaml")
    assert DistillConfig.load(tmp_path / "config.yaml") == config


def test_without_a_recipe_the_default_one_is_run() -> None:
    assert parse_train([]).config == Config.load("default") != Config()
    assert parse_distill(["a/b"]).config != DistillConfig(distillation=DistillationConfig(teacher="a/b"))


def test_defaults_in_code_are_those_of_ddpm() -> None:
    """Ho et al. (2020): the noise is predicted on a linear schedule, with a plain squared error, by Adam at 2e-4."""
    config = Config()
    assert (config.diffusion.prediction_type, config.diffusion.beta_schedule) == ("epsilon", "linear")
    assert (config.diffusion.loss_weighting, config.diffusion.timesteps) == ("uniform", "uniform")
    assert (config.train.learning_rate, config.train.ema_decay, config.data.batch_size) == (2e-4, 0.9999, 128)


def test_time_limit_is_five_minutes_where_nothing_else_limits() -> None:
    assert TrainConfig().time_limit_minutes == 5
    assert TrainConfig(max_steps=3).time_limit_minutes is None
    assert TrainConfig(max_steps=3, max_minutes=2).time_limit_minutes == 2


def test_errors_in_python_are_value_errors() -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        TrainConfig(weight_decay=math.inf)
    with pytest.raises(ConfigError, match=r"train\.weight_decay must be a finite number, got inf"):
        Config.from_dict({"train": {"weight_decay": math.inf}})


WORDS = [
    *("1e3", "1e5", "0123", "0o17", "0x10", "1_000", "12:30", "2026-11-29", ".5", "1.", "+1", "-", "=", "<<", ".inf"),
    *("no", "On", "y", "~", "null", "true", "NaN", "a: b", "- a", "# a", " a ", "a\tb", "'a'", '"', "é 猫", "{", "[a]"),
]


@pytest.mark.parametrize("word", WORDS)
def test_every_word_comes_back_from_yaml(word: str, tmp_path: Path) -> None:
    config = Config(data=DataConfig(class_names=(word, "other"), subset=word))
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config
    assert yaml.safe_load(config.to_yaml())["data"]["subset"] == word  # as other readers read it


@pytest.mark.parametrize(("text", "value"), [("0123", 123), ("1e3", 1000.0), ("3e-3", 0.003), ("no", "no"), ("", None)])
def test_numbers_and_words_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(f"x: {text}") == {"x": value}


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("output_dir: ~/run")
    config = parse_train(["--config", "~/mine.yaml", "--data.source", "~/pictures"]).config
    assert (config.output_dir, config.data.source) == (f"{tmp_path}/run", f"{tmp_path}/pictures")
    options = SampleOptions(pipeline="~/run", out=Path("~/out"))
    assert (options.pipeline, options.out) == (f"{tmp_path}/run", tmp_path / "out")


def test_an_output_that_cannot_show_every_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, "ascii", write_through=True))
    assert reporting_errors(lambda: print("0.1 ± 0.2") or 0) == 0
    assert output.getvalue() == b"0.1 ? 0.2\n"
