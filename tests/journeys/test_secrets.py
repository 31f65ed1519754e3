"""The token is in nothing that is written, said or sent, but in the header that it belongs in."""

import traceback
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from mnist_diffusion import cli
from tests.support.hub_server import Fault, HubServer
from tests.support.survival import FLAGS

TOKEN = "hf_owner0123456789"
NAME = "owner/digits"


def require_nowhere(folder: Path) -> int:
    """No file below holds the token, nor does a name; how many were looked at."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
        assert TOKEN not in str(path)
    return len(files)


@pytest.mark.slow
def test_train_push_fail_and_crash(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trained with both trackers and pushed; refused; and crashed in the midst: searched, all of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def command(*arguments: str) -> tuple[int, str]:
        """The exit code, and all that is printed."""
        AcceleratorState._reset_state(reset_partial_state=True)
        code = cli.main(list(arguments))
        printed = "".join(capfd.readouterr())
        assert TOKEN not in printed
        return code, printed

    flags = [*FLAGS, "--train.max_steps", "2", "--train.trackers", "[tensorboard,wandb]", "--train.pictures", "true"]
    pushing = ["--hub.push", "true", "--hub.repo_id", NAME, "--hub.with_checkpoints", "true"]
    code, printed = command("train", *flags, *pushing, "--output_dir", "run")
    assert code == 0
    assert f"Pushed: {hub.url}/{NAME}" in printed
    hub.fault = lambda request: Fault(status=500) if "/commit/" in request.path else None
    code, printed = command("train", *flags, *pushing, "--output_dir", "failed")
    assert code == 2
    assert "push it later with: mnist-diffusion push failed" in printed
    hub.fault = lambda request: Fault(status=401) if "preupload" in request.path else None
    assert command("push", "run", NAME)[0] == 2
    hub.fault = lambda request: None
    monkeypatch.setattr("mnist_diffusion.hub.upload", None)
    with pytest.raises(TypeError) as crashed:
        command("push", "run", NAME)
    assert TOKEN not in "".join(traceback.format_exception(crashed.value)) + "".join(capfd.readouterr())

    assert require_nowhere(tmp_path) > 20
    assert (tmp_path / "run" / "wandb").is_dir()
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            assert all(TOKEN.encode() not in content for content in files.values())
    assert all(TOKEN.encode() not in body for body in hub.bodies)
    assert not any(TOKEN in request.path for request in hub.requests)


def test_the_token_is_no_argument(capsys: pytest.CaptureFixture[str], made_run: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["push", str(made_run), NAME, "--token", TOKEN])
    error = capsys.readouterr().err
    assert "a token is never an argument" in error
    assert TOKEN not in error
