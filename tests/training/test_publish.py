"""A run that is pushed at its end."""

import dataclasses
from pathlib import Path

import pytest

from mnist_diffusion import cli
from mnist_diffusion.config import HubConfig
from mnist_diffusion.hub import pull
from mnist_diffusion.hub_client import HubError
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.training.run_folder import read_metrics
from tests.conftest import tiny_config
from tests.support.hub_server import HubServer, failing
from tests.test_hub import GUEST, NAME, PUSHED
from tests.training.conftest import run

PUSHING = dataclasses.replace(tiny_config(), hub=HubConfig(push=True, repo_id=NAME))


def test_a_run_and_the_one_that_goes_on_from_it(hub: HubServer, tmp_path: Path) -> None:
    options = HubConfig(push=True, repo_id=NAME, private=True, with_checkpoints=True)
    run(dataclasses.replace(PUSHING, hub=options), tmp_path / "run", max_steps=6)
    repository = hub.repositories[NAME]
    assert repository.private
    files = repository.files()
    assert PUSHED - {"samples.png"} <= set(files)
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {"step-6"}
    out = pull(NAME, tmp_path / "elsewhere", with_checkpoints=True)
    named_after = dataclasses.replace(PUSHING, hub=HubConfig(push=True))  # the account and the folder
    run(named_after, out, max_steps=8, resume=True)
    assert "owner/elsewhere" in hub.repositories
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, 9))


def test_a_hub_that_fails_at_the_end(hub: HubServer, tmp_path: Path) -> None:
    """The run is complete; the message says how to push it later, and that works."""
    hub.fault = failing(403, where="/commit/")
    later = r"The run is complete in .*push it later with: mnist-diffusion push"
    with pytest.raises(HubError, match=later) as caught:
        run(PUSHING, tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()
    hub.fault = lambda request: None
    assert cli.main(str(caught.value).rsplit("push it later with: mnist-diffusion ", 1)[1].split()) == 0
    assert MNISTDiffusionPipeline.from_pretrained(NAME)(3, num_inference_steps=1).images


def test_what_is_wrong_is_said_before_training(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", GUEST)
    with pytest.raises(HubError, match="the token may not do this"):
        run(PUSHING, tmp_path / "run")
    assert not (tmp_path / "run").exists()
