"""Serve the page: on loopback unless told otherwise, with the routes that the page needs and no others."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnist_diffusion.app.models import Models
from mnist_diffusion.app.page import HERE, build_page
from mnist_diffusion.app.work import Work
from mnist_diffusion.config import IMAGE_FIELDS, ImagesConfig
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.files import read_text
from mnist_diffusion.requests import AppRequest

ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)/?|/(assets|static)/[^?]*"
    r"|/gradio_api/(info|run/predict|queue/join|queue/data|startup-events|cancel|reset|app_id|heartbeat/\w+)/?"
)
"""What the page asks for. Gradio has more: files by their paths, uploads, proxies, which this page does without."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
MAX_BODY_BYTES = 2**22
SECONDS_TO_CLOSE = 3


class OnlyThePage:
    """Middleware that refuses what the page does not need, and lets browsers load nothing from elsewhere."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not ROUTES.fullmatch(scope["path"]):
            await PlainTextResponse("no such page", 404)(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0" if scope["method"] in ("GET", "HEAD") else "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            await PlainTextResponse("too large, or of unknown length", 413)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


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
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    options: dict[str, Any] = {"ssr_mode": False, "show_error": False, "run_history": False, "footer_links": []}
    return gr.mount_gradio_app(app, page, "/", theme=theme, css=read_text(HERE / "app.css"), **options), work


def _arguments(data: ImagesConfig) -> list[str]:
    """The options that name these images, without those that say nothing new."""
    default, found = ImagesConfig(), []
    for name in IMAGE_FIELDS:
        if (value := getattr(data, name)) != getattr(default, name):
            found += [f"--data.{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return found


def serve(request: AppRequest) -> None:
    """Serve the page until it is interrupted; a training that runs then ends with what it has.

    Raises:
        UserError: a pipeline could not be loaded.
    """
    app, work = build_app(request)
    shown = f"[{request.host}]" if ":" in request.host else request.host
    print(f"The page is at http://{shown}:{request.port} (Ctrl-C ends it)", flush=True)
    try:
        uvicorn.run(
            app, host=request.host, port=request.port, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_CLOSE
        )
    finally:
        if work is not None:
            work.stop(wait=True)
