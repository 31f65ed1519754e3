"""A run that is pushed while it trains, and at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import train_cfg
from mnist_diffusion import cli
from mnist_diffusion.cli.options import RunArguments
from mnist_diffusion.config import Config, HubConfig
from mnist_diffusion.errors import ConfigError
from mnist_diffusion.training.metrics_log import read_metrics
from mnist_diffusion.hub_errors import HubError
from mnist_diffusion.hub import pull
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from tests.conftest import tiny_config
from tests.sharing.test_hub import GUEST, NAME, PUSHED, failing
from tests.support.hub_server import Fault, HubServer


class TestTraining:
    def train(self, folder: Path, hub: HubConfig, **train: Any) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = dataclasses.replace(tiny_config(), output_dir=str(folder), hub=HubConfig())
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train), hub=hub)
        return train_cfg.run(RunArguments(config, "tiny", dry_run=False))

    def test_snapshots_on_the_way_and_the_run_at_the_end(self, hub: HubServer, tmp_path: Path) -> None:
        asked = HubConfig(push=True, repo_id=NAME, private=True, every_snapshot=True, with_checkpoints=True)
        hub.fault = lambda request: Fault(wait=0.05)
        assert self.train(tmp_path / "run", asked, max_steps=6, snapshot_every="2 steps") == 0
        repository = hub.repositories[NAME]
        assert repository.private
        assert len(repository.history) >= 3  # made, at least one snapshot, the run
        files = repository.files()
        assert PUSHED - {"samples.png"} <= set(files)
        assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {"step-6"}
        for sha in repository.history[1:]:
            assert MNISTDiffusionPipeline.from_pretrained(NAME, revision=sha)(3, num_inference_steps=1).images
        out = pull(NAME, tmp_path / "elsewhere", with_checkpoints=True)
        resumed = HubConfig(push=True)  # the account and the folder's name
        assert self.train(out, resumed, max_steps=8, resume=True) == 0
        assert "owner/elsewhere" in hub.repositories
        assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, 9))

    def test_a_hub_that_fails_on_the_way(
        self, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The run goes on and is whole; the message says how to push it later, and that works."""
        hub.fault = failing(403, where="/commit/")
        with pytest.raises(HubError, match=r"The run is whole in .*push it later with: mnist-diffusion push") as caught:
            self.train(
                tmp_path / "run", HubConfig(push=True, repo_id=NAME, every_snapshot=True), snapshot_every="2 steps"
            )
        assert "was not pushed: cannot push to owner/digits: the token may not do this" in capsys.readouterr().err
        assert (tmp_path / "run" / "summary.json").is_file()
        hub.fault = lambda request: None
        assert cli.main(str(caught.value).rsplit("push it later with: mnist-diffusion ", 1)[1].split()) == 0
        assert MNISTDiffusionPipeline.from_pretrained(NAME)(3, num_inference_steps=1).images

    def test_what_is_wrong_is_said_before_training(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", GUEST)
        with pytest.raises(HubError, match="the token may not do this"):
            self.train(tmp_path / "run", HubConfig(push=True, repo_id=NAME))
        assert not (tmp_path / "run").exists()
        with pytest.raises(ConfigError, match=r"hub\.private must be left out without hub\.push, got True"):
            HubConfig(private=True)
        with pytest.raises(ConfigError, match=r"hub\.every_snapshot=true needs train\.snapshot_every"):
            Config(hub=HubConfig(push=True, every_snapshot=True))
