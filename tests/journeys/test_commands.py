"""The real commands in processes of their own, as a user would start them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import train_cfg
from mnist_diffusion.cli import main
from mnist_diffusion.training import probe
from tests.conftest import REPOSITORY
from tests.support.browser import free_port
from tests.support.hub_server import HubServer
from tests.support.survival import FLAGS, finish
from tests.training.test_survival import recording_batches, require_slices

BIN = Path(sys.executable).parent
ACCELERATE, TORCHRUN = str(BIN / "accelerate"), str(BIN / "torchrun")
SCRIPT = str(REPOSITORY / "train_cfg.py")
SHORT = [
    *("--config", "tiny", "--data.source", "digits", "--train.max_steps", "3", "--train.num_eval_images", "16"),
    *("--train.samples_per_class", "1"),
]


def command(
    *arguments: str, cwd: Path, environment: dict[str, str] | None = None, code: int = 0, timeout: int = 120
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "OMP_"))}
    result = subprocess.run(
        arguments,
        cwd=cwd,
        env={**kept, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def require_a_run(printed: str, folder: Path) -> None:
    latest, run = sorted((folder / "runs").iterdir())
    assert latest.name == "latest"
    assert latest.readlink() == Path(run.name)
    assert run.name.startswith("tiny-")
    assert (run / "pipeline" / "model_index.json").is_file()
    assert f'DiffusionPipeline.from_pretrained("{Path("runs") / run.name / "pipeline"}"' in printed


def test_launch_and_the_lines_that_it_prints(tmp_path: Path) -> None:
    configured = ["--config_file", str(REPOSITORY / "accelerate_config.yaml")]
    printed = command(ACCELERATE, "launch", *configured, SCRIPT, *SHORT, cwd=tmp_path).stdout
    require_a_run(printed, tmp_path)
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec("\n".join(lines), {})
    assert (tmp_path / "sample.png").is_file()


def test_dry_run_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.05)
    assert train_cfg.main([*SHORT, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for part in ("17,657 parameters", "1617 to train on", "expected     3 steps", "memory       about", "squaredcos"):
        assert part in printed
    assert list(tmp_path.iterdir()) == []


def test_errors_are_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on the standard error, exit code 2, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    assert train_cfg.main([*SHORT, "--data.source", "/no/such"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.source='/no/such' was not found")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for verb in ("sample", "evaluate"):  # before anything is loaded or drawn
        assert main([verb, "no/where", "--out", "file"]) == 2
        assert "file cannot be written to" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["sample", "no/where", "--out", "new"]) == 2
    assert "is read-only" in capsys.readouterr().err


@pytest.mark.slow
def test_hub_out_of_reach(tmp_path: Path) -> None:
    """With no source named: a loud notice, digits, and the notice again in summary and card."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    unnamed = [flag for flag in SHORT if flag not in ("--data.source", "digits")]
    result = command(sys.executable, SCRIPT, *unnamed, "--output_dir", "run", cwd=tmp_path, environment=nowhere)
    assert result.stdout.count("FALLING BACK") == 2
    assert "FALLING BACK" in json.loads((tmp_path / "run" / "summary.json").read_text())["notice"]
    assert "FALLING BACK" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_two_torchrun_nodes_on_loopback(tmp_path: Path) -> None:
    """Each sees its half of what one process sees, and both end with the same weights, to the bit."""
    worker, log = tmp_path / "worker.py", tmp_path / "log.txt"
    recording = "import sys\nfrom tests.training.test_survival import recording_batches\n"
    worker.write_text(recording + "sys.exit(recording_batches(sys.argv[1:]))\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"}
    flags = [*FLAGS, "--train.max_steps", "4", "--output_dir"]
    group = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    with log.open("w") as said:
        nodes = [
            subprocess.Popen(
                [TORCHRUN, *group, "--node_rank", node, str(worker), *flags, str(tmp_path / "two")],
                cwd=tmp_path,
                env=environment,
                stdout=said,
                stderr=said,
            )
            for node in "01"
        ]
        assert [node.wait(timeout=120) for node in nodes] == [0, 0], log.read_text()
    assert finish([*flags, str(tmp_path / "one")], log=log, work=recording_batches) == [0], log.read_text()
    require_slices(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_the_cards_lines_in_a_fresh_process_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """The three lines of a pushed card, pinned to the commit, where the project cannot be imported."""
    run = [sys.executable, SCRIPT, *SHORT, "--output_dir", "run", "--hub.push", "true", "--hub.repo_id", "owner/digits"]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
    command(*run, cwd=tmp_path, environment=environment)
    [_, pushed] = hub.repositories["owner/digits"].commits
    card = hub.repositories["owner/digits"].files(pushed)["README.md"].decode()
    [lines] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = [line for line in lines.splitlines() if line]
    assert len(code) == 3
    pinned = lines.replace("trust_remote_code=True", f'trust_remote_code=True, revision="{pushed}"')
    assert pinned != lines
    hub.repositories["owner/digits"].commit("main", {"model_index.json": b"what somebody pushed later"})
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = "import sys\nsys.modules['mnist_diffusion'] = None\n"
    environment["HF_TOKEN"] = ""
    command(sys.executable, "-c", missing + pinned + "image.save('digit.png')\n", cwd=empty, environment=environment)
    with Image.open(empty / "digit.png") as image:
        assert image.size == (28, 28)
    metadata = ModelCard(card).data.to_dict()
    assert metadata["library_name"] == "diffusers"
    assert "license" not in metadata
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
