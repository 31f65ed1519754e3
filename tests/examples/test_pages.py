"""The examples run as they stand, and what they leave can be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from examples import own_objective, sample, steering

SHORT = ["--config", "tiny", "--data.source", "digits", "--train.max_steps", "3", "--train.num_eval_images", "16"]


def test_own_objective_trains_a_pipeline_that_the_other_example_draws_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert own_objective.main([*SHORT, "--output_dir", str(folder)]) == 0
    sample.main(str(folder / "pipeline"), str(tmp_path / "digits.png"))
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (10 * 28, 3 * 28)
    # A run with the usual loss cannot be resumed with this one, nor the other way round.
    import train_cfg

    AcceleratorState._reset_state(reset_partial_state=True)
    resume = [*SHORT, "--output_dir", str(folder), "--train.resume", "true", "--train.max_steps", "5"]
    assert train_cfg.main(resume) == 2
    assert "fingerprint" in capsys.readouterr().err
    sample.main(str(folder), str(tmp_path / "of the run.png"))
    assert (tmp_path / "of the run.png").is_file()
    steering.main(str(folder), str(tmp_path / "steering.png"))
    assert capsys.readouterr().out.endswith(f"6 rows in {tmp_path / 'steering.png'}\n")
    with Image.open(tmp_path / "steering.png") as picture:
        assert picture.convert("L").getextrema() == (0, 255)
