"""What the server refuses: routes, bodies, and settings that are out of bounds; and Spaces."""

import asyncio
import base64
import http.client
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from mnist_diffusion.cli import main
from mnist_diffusion.command_options import AppOptions
from mnist_diffusion.demo import drawing
from mnist_diffusion.demo.models import Models
from mnist_diffusion.demo.page import MAX_SESSIONS, MAX_UNFETCHED, Unfetched
from mnist_diffusion.demo.server import MAX_BODY_BYTES, MAX_CONNECTIONS, guard, serve
from mnist_diffusion.demo.space import write_gradio_space
from mnist_diffusion.errors import UserError
from tests.conftest import make_pipeline
from tests.data.test_formats import encoded
from tests.support.browser import answer, free_port
from tests.support.hub_server import HubServer


def request(**changes: Any) -> drawing.Request:
    asked = {"classes": ("d",), "count": 2, "seed": 0, "sampler": drawing.PIPELINE_DEFAULT, "steps": 2, "scale": 2}
    return drawing.request_of(**{**asked, **changes})


def png(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(encoded(picture)).decode()}"


def noise(width: int, height: int) -> Image.Image:
    values = torch.randint(0, 2, (height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(values.numpy() * 255).convert("1")


def with_second_header(address: str, width: int, height: int) -> str:
    """A PNG that says its size twice, each time another."""
    content = base64.b64decode(address.partition(",")[2])
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    second = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return f"data:image/png;base64,{base64.b64encode(content[:33] + second + content[33:]).decode()}"


def ask(address: str, method: str, path: str, **how: Any) -> tuple[int, Any, bytes]:
    """What the server answers to a path that is sent as it is: status, headers, body."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, **how)
        answered = connection.getresponse()
        return answered.status, answered.headers, answered.read()
    finally:
        connection.close()


ABSENT = [
    *(("GET", f"/gradio_api/{path}") for path in ("file=/etc/hostname", "file/etc/hostname", "proxy=https://a.b/")),
    *(("GET", f"/gradio_api/{path}") for path in ("vibe-code/", "run-history/records", "deep_link")),
    *(("GET", path) for path in ("/monitoring", "/docs", "/custom_component/1/client/component/a.js")),
    *(("POST", path) for path in ("/gradio_api/upload", "/gradio_api/vibe-edit/", "/gradio_api/call/x", "/login")),
]


def test_routes_that_the_page_does_not_need_are_not_there(address: str) -> None:
    assert {each: ask(address, *each)[0] for each in ABSENT} == dict.fromkeys(ABSENT, 404)
    for path in ("/assets/../../blocks.py", "/static/..%2f..%2fblocks.py", "/assets/%2e%2e/%2e%2e/blocks.py"):
        assert ask(address, "GET", path)[0] in (403, 404)


def test_bodies_are_bounded(address: str) -> None:
    too_long = {"Content-Length": str(MAX_BODY_BYTES + 1)}
    assert ask(address, "POST", "/gradio_api/queue/join", headers=too_long)[0] == 413
    assert ask(address, "POST", "/gradio_api/queue/join", body=iter([b"{}"]))[0] == 413  # of unknown length
    both = {"Content-Length": "2", "Transfer-Encoding": "chunked"}
    assert ask(address, "POST", "/gradio_api/queue/join", headers=both)[0] in (400, 413)  # of the server, or ours


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
@pytest.mark.parametrize("where", ["/dev/zero", "/etc/hostname", "https://example.com/x.png"])
def test_objects_that_gradio_takes_for_files_are_refused(address: str, path: str, where: str) -> None:
    file = {"path": where, "meta": {"_type": "gradio.FileData"}}
    for values in ([file], [1, [file]], [[[file]]], file, "data"):
        body = json.dumps({"data": values, "fn_index": 0, "session_hash": "x"})
        status, _, said = ask(address, "POST", path, body=body, headers={"Content-Type": "application/json"})
        assert (status, said) == (400, b"objects are not accepted")
    assert ask(address, "POST", path, body=b"{" * 100_000)[0] == 400


@pytest.mark.parametrize(
    ("host", "asked", "status"),
    [
        *(("127.0.0.1", each, status) for each, status in (("example.com", 400), ("127.0.0.1:7860", 200))),
        *(("127.0.0.2", each, status) for each, status in (("example.com", 400), ("127.0.0.2:7860", 200))),
        *(("::1", each, status) for each, status in (("example.com", 400), ("[::1]:7860", 200))),
        ("0:0:0:0:0:0:0:1", "example.com", 400),
        ("0.0.0.0", "example.com", 200),
    ],
)
def test_loopback_is_what_the_address_says(host: str, asked: str, status: int) -> None:
    app = FastAPI()
    app.get("/theme.css")(lambda: "")
    guard(app, host)
    answered = TestClient(app).get("/theme.css", headers={"Host": asked})
    assert answered.status_code == status
    if status == 200:
        framed = "frame-ancestors 'none'" not in answered.headers["content-security-policy"]
        assert framed == (host == "0.0.0.0")


def test_the_page_is_for_its_own_address_and_loads_nothing_from_elsewhere(address: str) -> None:
    assert ask(address, "GET", "/", headers={"Host": "example.com"})[0] == 400
    status, headers, _ = ask(address, "GET", "/", headers={"Host": "localhost:1234"})
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    config = json.loads(ask(address, "GET", "/config")[2])
    assert config["analytics_enabled"] is False
    assert not any("fonts.googleapis" in each for each in config.get("stylesheets") or [])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 2.5, "images per class must be a whole number, got 2.5"),
        ("scale", float("nan"), "guidance scale must be a number from 0 to 20, got nan"),
        ("steps", 10**9, "steps must be a number from 1 to 100, got 1000000000"),
        ("seed", -1, "seed must be a number from 0 to"),
        ("sampler", "../secret", "scheduler must be one of ddpm,"),
        ("classes", tuple("d" * 40), "images in all must be a number from 1 to 64, got 80"),
    ],
)
def test_settings_out_of_bounds(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        request(**{name: value})


def test_settings_that_do_not_fit_the_pipeline() -> None:
    pipeline = make_pipeline()
    with pytest.raises(UserError, match=r"class must be one of a, b, .*, got 'z'"):
        request(classes=("z",)).call(pipeline)
    assert "class_labels" in request().call(make_pipeline(conditional=False))
    with pytest.raises(UserError, match="pipeline must be one of"):
        Models()["../elsewhere"]
    many: dict[str, Any] = {"samplers": ["ddim"] * 10**5, "steps": [5] * 10**5, "scales": [1.0] * 10**5}
    with pytest.raises(UserError, match="combinations must be a number from 1 to 12, got 1000000000000000"):
        list(drawing.compared({"a": pipeline}, **many, seed=0))
    plain = make_pipeline(conditional=False)
    with pytest.raises(UserError, match="this pipeline is unconditional"):
        drawing.interpolated(plain, classes=("a", "b"), seeds=(0, 1), frames=3, scale=1.0)
    with pytest.raises(UserError, match="this pipeline is unconditional"):
        drawing.steered(drawing.Drawing(plain, request(classes=[None], count=1)), "", 1.0)


def test_pipelines_have_the_names_of_their_runs(tmp_path: Path) -> None:
    folders = [str(tmp_path / place / "run" / "pipeline") for place in "ab"]
    for folder in folders:
        make_pipeline().save_pretrained(folder)
    models = Models([*folders, folders[0]])
    assert (models.names, models.source("run (2)")) == (["run", "run (2)"], folders[1])


def test_a_drawing_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MAX_SECONDS", 0.0)
    with pytest.raises(UserError, match="took longer than 0 s"):
        list(drawing.stream_frames(make_pipeline(), request()))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        *((each, "draw a picture first") for each in (None, {"path": "/etc/hostname"}, "https://example.com/a.png")),
        *(("data:text/html;base64,PGI+", "draw a picture"), (f"data:image/png;base64,{'A' * 2**22}", "draw a picture")),
        *((f"data:image/png;base64,{content}", "the drawing must be a PNG") for content in ("!!!", "AAAA")),
        (png(Image.new("L", (28, 28), 200)).replace("png", "jpeg"), "draw a picture first"),
        (png(Image.new("L", (28, 28))), "the drawing is blank"),
        (png(noise(1025, 1025)), "1025 x 1025 pixels, more than the limit"),
        (with_second_header(png(noise(8, 8)), 1025, 1025), "1025 x 1025 pixels, more than the limit"),
    ],
)
def test_what_is_no_drawing_is_refused(address: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawing.decode_sketch(address, (1, 8, 8))


def test_connections_over_the_limit_are_dropped_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict[str, Any] = {}

    def run(self: Any, *, sockets: Any) -> None:
        served.update(vars(self.config))
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.setattr("mnist_diffusion.demo.server.build_app", lambda options: FastAPI())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    serve(AppOptions(port=free_port()))
    assert (served["log_level"], served["limit_concurrency"]) == ("error", MAX_CONNECTIONS)


def test_drawings_that_nobody_fetches_are_few() -> None:
    """Of each session, and sessions are few."""
    kept = Unfetched(MAX_SESSIONS)
    for number in range(2 * MAX_SESSIONS):
        kept[str(number)] = asyncio.Queue[Any]()
    for number in range(2 * MAX_UNFETCHED):
        kept["150"].put_nowait(number)
    assert (len(kept), kept["150"].qsize()) == (MAX_SESSIONS, MAX_UNFETCHED)
    assert kept["150"].get_nowait() == MAX_UNFETCHED  # the oldest are dropped


def test_a_picture_drawn_again_comes_back() -> None:
    pipeline = make_pipeline()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = drawing.reconstruct(pipeline, image, source_class="a", target_class="b", scale=2.0)
    titles = ["Your picture", "Its noise, as a", "Sampled from this noise as a", "Sampled from this noise as b"]
    assert re.findall(r"<figcaption>(.*?) <small>", shown) == titles
    with pytest.raises(UserError, match=r"class must be one of a, .*, got 'z'"):
        drawing.reconstruct(pipeline, image, source_class="z", target_class="b", scale=2.0)


def test_words_are_escaped() -> None:
    shown = drawing.figure("<script>alert(1)</script>", Image.new("L", (8, 8)), '"><b>')
    assert "<script>" not in shown
    assert "<b>" not in shown


def test_addresses_and_ports_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["app", "--port", "99999"])
    assert "port must be less than 65536, got '99999'" in capsys.readouterr().err
    assert main(["app", "no/such/folder"]) == 2
    assert "could not be loaded" in capsys.readouterr().err
    assert AppOptions().host == "127.0.0.1"


@pytest.mark.slow
def test_a_space_starts_from_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "space"
    write_gradio_space({"pipeline": make_pipeline()}, folder, title="Letters")
    assert "sdk: gradio\nsdk_version: 6." in (folder / "README.md").read_text()
    requirements = (folder / "requirements.txt").read_text()
    assert "\ntorch==2." in requirements
    assert "\nstarlette==" in requirements  # which Gradio requires
    assert "+" not in requirements
    port = free_port()
    app = folder / "app.py"
    app.write_text(app.read_text().replace("host=host", f"host=host, port={port}"))
    command = [sys.executable, "-c", f"import runpy, sys; sys.path.insert(0, '.'); import mnist_diffusion; "
               f"assert mnist_diffusion.__file__.startswith({str(folder)!r}); runpy.run_path('app.py')"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        try:
            assert answer(f"http://127.0.0.1:{port}/config", process)
        finally:
            process.terminate()


def test_a_space_is_pushed_in_one_commit(
    tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pipeline().save_pretrained("pipeline")
    command = ["space", "pipeline", "owner/letters", "--kind", "gradio", "--push"]
    assert main(command) == 0
    assert "Pushed: " in capsys.readouterr().out
    for wrong in (["--private"], ["--kind", "gradio", "--runtime", "."]):
        assert main(["space", "pipeline", "owner/letters", "--out", "other", *wrong]) == 2
        assert "has no effect" in capsys.readouterr().err
    found = hub.repositories["owner/letters"]
    names = found.files()
    assert {"README.md", "app.py", "requirements.txt", "pipeline/model_index.json"} <= names.keys()
    assert "mnist_diffusion/demo/page.py" in names
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)
    assert len(found.commits) == 2  # the first is the repository's own
    assert main(command) == 2
    assert "out='space' must be an empty or a new folder" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert main([*command, "--out", "other"]) == 2  # before anything is written
    assert "nobody is logged in" in capsys.readouterr().err
    assert not Path("other").exists()
