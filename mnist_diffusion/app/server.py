"""Serve the page: on loopback unless told otherwise, with the routes that the page needs and no others."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnist_diffusion.app.models import Models
from mnist_diffusion.app.page import HERE, build_page
from mnist_diffusion.app.work import Work
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text
from mnist_diffusion.requests import AppRequest

ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)/?|/(assets|static)/.*"
    r"|/gradio_api/(info|run/predict|queue/join|queue/data|startup-events|cancel|reset|app_id|heartbeat/\w+)/?"
)
"""What the page asks for. Gradio has more: files by their paths, uploads, proxies, which this page does without."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LOOPBACK = ("127.0.0.1", "localhost")
MAX_BODY_BYTES = 2**20
SECONDS_TO_CLOSE = 3


class OnlyThePage:
    """Middleware that refuses what the page does not need, and lets browsers load nothing from elsewhere.

    The page sends words, numbers and lists of them. To Gradio, an object may also be a file by its path or address, so
    objects are refused before Gradio sees them.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused, body = None, b""
        if not ROUTES.fullmatch(scope["path"]):
            refused = PlainTextResponse("no such page", 404)
        elif scope["method"] not in ("GET", "HEAD"):
            headers = Headers(scope=scope)
            length = headers.get("content-length", "")
            if "transfer-encoding" in headers or not length.isdigit() or int(length) > MAX_BODY_BYTES:
                refused = PlainTextResponse("too large, or of unknown length", 413)
            elif not _is_plain(body := await Request(scope, receive).body()):
                refused = PlainTextResponse("not what this page sends", 400)
        if refused is not None:
            await refused(scope, receive, send)
            return
        read = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Message:
            return next(read, None) or await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive_again, send_with_headers)


def _is_plain(body: bytes) -> bool:
    """Whether the values for a function are words, numbers and lists of them."""
    try:
        values = json.loads(body or b"{}").get("data") or []
        flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
        return isinstance(values, list) and not any(isinstance(each, dict | list) for each in flat)
    except (ValueError, AttributeError, RecursionError):
        return False


def build_app(request: AppRequest) -> tuple[FastAPI, Work | None]:
    """The server's application, and what trains and evaluates in it.

    Raises:
        UserError: a pipeline could not be loaded.
    """
    set_num_threads()
    work = None if request.only_draw else Work(request.runs)
    page = build_page(Models(request.pipelines), work, _arguments(request.data))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(OnlyThePage)
    if request.host in LOOPBACK:  # so that no other site can pass itself off as this one
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    options: dict[str, Any] = {"ssr_mode": False, "show_error": False, "run_history": False, "footer_links": []}
    return gr.mount_gradio_app(app, page, "/", theme=theme, css=read_text(HERE / "app.css"), **options), work


def _arguments(data: ImagesConfig) -> list[str]:
    """The options that name these images, without those that say nothing new."""
    default, found = ImagesConfig(), []
    for each in dataclasses.fields(ImagesConfig):
        if (value := getattr(data, each.name)) != getattr(default, each.name):
            found += [f"--data.{each.name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return found


def serve(request: AppRequest) -> None:
    """Serve the page until INT or TERM; a training that runs then ends with what it has.

    Raises:
        UserError: a pipeline could not be loaded, or the port is not free.
    """
    app, work = build_app(request)
    version_6 = ":" in request.host
    try:
        listening = socket.create_server(
            (request.host, request.port), family=socket.AF_INET6 if version_6 else socket.AF_INET
        )
    except OSError as error:
        raise UserError(f"host={request.host!r}, port={request.port}: {error.strerror}; choose others") from error
    print(
        f"The page is at http://{f'[{request.host}]' if version_6 else request.host}:{request.port} (Ctrl-C ends it)",
        flush=True,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_CLOSE)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which uvicorn raises again when it has closed
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()
        if work is not None:
            work.stop(wait=True)
