"""A Hub that refuses, breaks off or is out of reach, and a push that is killed anywhere."""

import os
import signal
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_diffusion import cli
from mnist_diffusion.errors import FileError
from mnist_diffusion.hub import pull, push
from mnist_diffusion.hub_client import HubError
from mnist_diffusion.pipelines.drawing import load_pipeline
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline
from tests.conftest import make_pipeline, use_hub
from tests.support import survival
from tests.support.hub_server import Fault, HubServer, Request, failing
from tests.test_hub import GUEST, NAME, PUSHED, content

WRONG = {
    "no token": (None, None, r"nobody is logged in; log in with `hf auth login`, or set HF_TOKEN"),
    "wrong token": ("hf_wrong", None, r"the Hub rejects the token"),
    "not one's own": (GUEST, None, r"the token may not do this; .*--create_pr.* \(You may not create"),
    "gone": ("", failing(404, code="RepoNotFound", where="preupload"), r"repository not found, or private"),
    "conflict": ("", failing(409, where="/commit/"), r"somebody else changed it at the same time; try again"),
    "too many": ("", failing(429, where="/commit/"), r"too many requests; try again in a few minutes"),
    "trouble": ("", failing(500, where="/preupload/"), r"the Hub has a problem \(status 500\); try again later"),
    "gated": ("", failing(403, code="GatedRepo", where="tree"), r"it is gated: ask for access at"),
    "cut": ("", lambda request: Fault(cut="within") if request.path.startswith("/lfs/") else None, "cannot be reached"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_said(hub: HubServer, made_run: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Each is a message that says what to do, without the token or an error behind it; nothing here has changed."""
    token, fault, message = WRONG[case]
    before = content(made_run)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    elif token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.fault = fault or hub.fault
    with pytest.raises(HubError, match=message) as caught:
        push(made_run, NAME)
    assert str(caught.value).startswith(f"cannot push to {NAME}: ")
    assert caught.value.__suppress_context__ == (token is not None)
    assert "hf_" not in "".join(traceback.format_exception(caught.value))
    assert content(made_run) == before


def test_a_file_of_unknown_size_is_not_fetched(hub: HubServer, made_run: Path) -> None:
    push(made_run, NAME)
    hub.fault = lambda request: Fault(cut="size") if request.method == "HEAD" else None
    with pytest.raises(FileError, match=r"the Hub does not say how large model_index\.json is"):
        MNISTDiffusionPipeline.from_pretrained(NAME)


def test_slow_and_halting_answers(hub: HubServer, made_run: Path, tmp_path: Path) -> None:
    """Now and then an answer takes its time or breaks off: the client asks again."""
    push(made_run, NAME)
    weights = [0]

    def fault(request: Request) -> Fault | None:
        if request.method == "GET" and request.path.endswith(".safetensors") and weights[0] < 2:
            weights[0] += 1
            return Fault(cut="answer")
        return Fault(wait=0.2) if request.number % 3 == 0 else None

    hub.fault = fault
    assert set(content(pull(NAME, tmp_path / "pulled"))) == PUSHED - {".gitattributes"}
    assert weights[0] == 2


def test_hub_out_of_reach(made_run: Path, hub: HubServer, tmp_path: Path) -> None:
    use_hub("http://127.0.0.1:9", tmp_path / "empty")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached"):
        push(made_run, NAME)
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached"):
        load_pipeline(NAME, device="cpu", dtype="float32")
    with pytest.raises(HubError, match=r"a repository is named user/name, got 'a//b'"):
        push(made_run, "a//b")


def _push_in_a_process(arguments: list[str], *, url: str, cache: str) -> int:
    use_hub(url, Path(cache))
    os.environ["HF_TOKEN"] = "hf_owner0123456789"
    return cli.main(["push", *arguments])


@pytest.mark.slow
def test_a_push_killed_anywhere(hub: HubServer, made_run: Path, tmp_path: Path) -> None:
    """Before, within and after each of its requests: the remote always loads, and the next push is whole."""
    push(made_run, NAME)
    requests = len(hub.requests)
    work = partial(_push_in_a_process, url=hub.url, cache=str(tmp_path / "cache"))
    ways = (("before", "within"), ("before", "after"), ("within", "after"))
    points = [(number, where) for number in range(requests) for where in ways[number % 3]]
    assert len(points) >= 15
    killed, started = 0, list[Any]()

    def kill() -> None:
        started[0].kill()

    def at(number: int, fault: Fault, request: Request) -> Fault | None:
        return fault if request.number == number else None

    for seed, (number, where) in enumerate(points):
        make_pipeline(seed=seed + 10).save_pretrained(made_run / "pipeline")
        first = len(hub.requests)
        hub.fault = partial(at, first + number, Fault(cut=where, then=kill))
        started[:] = survival.start([str(made_run), NAME], log=tmp_path / "log.txt", work=work)
        started[0].join(60)
        killed += started[0].exitcode == -signal.SIGKILL
        hub.fault = lambda request: None
        assert MNISTDiffusionPipeline.from_pretrained(NAME)(3, num_inference_steps=1).images
    assert killed >= 15
    push(made_run, NAME)
    assert set(hub.repositories[NAME].files()) == PUSHED
    loaded, last = MNISTDiffusionPipeline.from_pretrained(NAME), make_pipeline(seed=len(points) + 9)
    assert torch.equal(loaded.unet.conv_in.weight, last.unet.conv_in.weight)
