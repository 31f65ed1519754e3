"""The speedrun: a recipe timed and measured, and its record checked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mnist_diffusion.cli import main
from mnist_diffusion.cli.options import find_recipe
from mnist_diffusion.config import Config, TrainConfig
from mnist_diffusion.errors import ConfigError, FileError, UserError
from mnist_diffusion.evaluation import speedrun
from mnist_diffusion.evaluation.evaluator import ImageEvaluator, save_evaluator
from tests.conftest import REPOSITORY

ENTRIES = sorted((REPOSITORY / "docs" / "speedrun").glob("*.json"))
CHANCE = "cannot be told from chance"


def written(record: dict[str, Any], path: Path, *, hashed: bool = True) -> Path:
    """A record as somebody might write it who knows how it is hashed."""
    if hashed:
        record |= speedrun._summary(record["runs"])
        record["sha256"] = speedrun._digest(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.slow
def test_a_recipe_and_its_record(
    tmp_path: Path, digits_evaluator: ImageEvaluator, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out, evaluator = tmp_path / "quick.yaml", tmp_path / "out", tmp_path / "evaluator"
    quick = yaml.safe_load(find_recipe("tiny").read_text())
    quick["train"] |= {"max_steps": 300, "pictures": False, "num_eval_images": 16}
    recipe.write_text(yaml.safe_dump(quick))
    save_evaluator(digits_evaluator, evaluator)
    asked = ["--data.source", "digits", "--seeds", "1", "--evaluator", str(evaluator), "--out", str(out)]
    assert main(["speedrun", str(recipe), "--diffusion.timesteps", "lognormal", *asked]) == 0
    assert "mean ± s.d." in capsys.readouterr().out
    assert "| mean ± s.d. | " in (out / "record.md").read_text()
    path = out / "record.json"
    record = json.loads(path.read_text())
    [run] = record["runs"]
    assert record["reached"] is run["reached"] is True
    assert run["seconds"] > json.loads((out / "seed-0" / "summary.json").read_text())["train_seconds"]
    assert run["calibrations"] == run["seconds"] / run["calibration_seconds"]
    assert record["config"]["train"]["max_steps"] == 300
    assert record["config"]["diffusion"]["timesteps"] == "lognormal"
    assert str(tmp_path) not in path.read_text()
    assert main(["speedrun", "--check", str(path), "--evaluator", str(evaluator)]) == 0
    assert "seed 0: the same weights, which drew and were measured again" in capsys.readouterr().out

    def refused(change: dict[str, Any], message: str, **options: bool) -> None:
        forged = json.loads(path.read_text())
        forged["runs"][0] |= change
        with pytest.raises(FileError, match=message):
            speedrun.check(written(forged, out / "forged.json", **options), evaluator=evaluator)

    refused({"seconds": 1.0}, "was altered", hashed=False)
    refused({"accuracy": 1.0}, "accuracy of seed 0 is 1.0, but")
    refused({"weights": "0" * 64}, "holds other weights")
    refused({"reached": False}, "does not follow from the runs")
    easy = json.loads(path.read_text())
    easy["target"]["accuracy"] = 0.1
    with pytest.raises(FileError, match="has another target than the speedrun digits"):
        speedrun.check(written(easy, out / "forged.json"), evaluator=evaluator)
    # A clear miss is one after a first look.
    far = dataclasses.replace(speedrun.TARGETS["digits"], num_images=200, accuracy=0.9999)
    missed = speedrun._measured(out / "seed-0", far, evaluator, tmp_path / "look")
    assert (missed["num_images"], missed["reached"]) == (100, False)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path, alone)
    assert "not measured again" in speedrun.check(alone / "record.json")[1]


@pytest.mark.parametrize("content", ["{}", '{"sha256": 1}', '{"sha256": null, "runs": 3}', "[]", "no JSON"])
def test_what_is_no_record(content: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(FileError, match="record"):
        speedrun.check(path)


def test_mean_and_spread() -> None:
    runs = [
        {"seconds": 300.0, "calibrations": 100.0, "accuracy": 0.98, "fid_ratio": 8.0, "reached": True},
        {"seconds": 302.0, "calibrations": 104.0, "accuracy": 0.99, "fid_ratio": 10.0, "reached": False},
    ]
    found = speedrun._summary(runs)
    assert found["reached"] is False
    assert found["seconds"] == {"mean": 301.0, "standard_deviation": pytest.approx(2**0.5)}
    assert speedrun._summary(runs[:1])["seconds"] == {"mean": 300.0, "standard_deviation": None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.source", "digits", "--train.seed", "3"], "--train.seed is set for each training; give --seeds"),
        (["tiny", "--output_dir=x"], "--output_dir is set for each training; give --out"),
        (["--check", "record.json", "--data.source", "digits"], "--check takes no --data.source"),
        (["--check", "a.json", "b.json", "c.json"], "--check takes one record or two, got 3"),
        (["--seeds", "0", "--data.source", "digits"], "--seeds must be at least 1, got 0"),
        (["no_recipe", "--data.source", "digits"], "no_recipe"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speedrun", *argv])
    assert message in capsys.readouterr().err


def test_trained_weights_are_refused(tmp_path: Path) -> None:
    config = Config(train=TrainConfig(init_from="user/name"))
    with pytest.raises(ConfigError, match=r"train\.init_from must be null in a speedrun, got 'user/name'"):
        speedrun.run(config, [], seeds=1, evaluator=None, out=tmp_path)


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_entries_stand_on_the_page_as_they_were_measured(path: Path) -> None:
    assert speedrun.check(path)[0].startswith("unaltered")
    cells = " | ".join(speedrun.rows(json.loads(path.read_text()))[-1][1:5])
    assert f"({path.parent.name}/{path.name}) | {cells} |" in (REPOSITORY / "docs" / "speedrun.md").read_text()


@pytest.mark.parametrize(
    "again", [path for path in ENTRIES if path.stem.endswith("_again")], ids=lambda path: path.stem
)
def test_records_were_reproduced(again: Path) -> None:
    paths = (again.with_stem(again.stem.removesuffix("_again")), again)
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first["config"] == second["config"]
    assert first["reached"] is second["reached"] is True
    assert first["runs"][0]["seconds"] != second["runs"][0]["seconds"]
    assert {row[-1] for row in speedrun.compare(*paths)} == {CHANCE}


def test_every_record_has_a_second_run() -> None:
    names = {path.stem for path in ENTRIES}
    assert names == {
        each for name in names for each in (name.removesuffix("_again"), f"{name.removesuffix('_again')}_again")
    }


def test_what_two_records_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = {"name": "mnist", **dataclasses.asdict(speedrun.TARGETS["mnist"])}

    def record(name: str, *accuracies: float, machine: str = "here", **others: object) -> Path:
        kept = {"seconds": 300.0, "calibrations": 100.0, "fid_ratio": 5.0, "num_images": 10_000, "passes_per_image": 16}
        runs = [
            {"seed": seed, "accuracy": each, "reached": each >= 0.985, **kept} for seed, each in enumerate(accuracies)
        ]
        return written({"target": target, "machine": machine, "runs": runs, **others}, tmp_path / name)

    first, same = record("first", 0.99, 0.991, 0.992), record("same", 0.991, 0.992, 0.993)
    assert main(["speedrun", "--check", str(first), str(same)]) == 0
    assert capsys.readouterr().out.count(CHANCE) == 4
    # The mean and deviation of the better one, by the formula of the page: 2.8 * sqrt((s1**2 + s2**2) / 3).
    just, over = (0.991 + factor * 2.776 * (2 * 0.001**2 / 3) ** 0.5 for factor in (0.99, 1.01))
    assert speedrun.compare(first, record("just", just - 0.001, just, just + 0.001))[2][-1] == CHANCE
    assert speedrun.compare(first, record("over", over - 0.001, over, over + 0.001))[2][-1] == "yes"
    elsewhere = speedrun.compare(first, record("elsewhere", 0.99, 0.991, machine="there"))
    assert [row[0] for row in elsewhere] == ["calibrations", "class accuracy", "ratio to floor"]
    with pytest.raises(FileError, match="one has one run"):
        speedrun.compare(first, record("one", 0.99))
    with pytest.raises(FileError, match="have not the same target"):
        speedrun.compare(first, record("other", 0.99, 0.99, target={}))


def test_a_target_is_for_its_images() -> None:
    assert speedrun.target_for(speedrun.TARGETS["mnist"].data + "0") == "mnist"
    with pytest.raises(UserError, match="mnist or digits, got others with fingerprint 1234"):
        speedrun.target_for("1234")
