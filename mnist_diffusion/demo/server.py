"""Serve the app: on loopback by default, with the routes it needs and no others."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Mapping
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, create_server
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnist_diffusion.command_options import AppOptions
from mnist_diffusion.demo.models import Models
from mnist_diffusion.demo.page import HERE, build_page
from mnist_diffusion.environment import set_num_threads
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_text
from mnist_diffusion.pipelines.drawing import default_sources

ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)/?|/(assets|static)/.*"
    r"|/gradio_api/(info|run/predict|queue/join|queue/data|startup-events|cancel|reset|app_id|heartbeat/\w+)/?"
)
"""The routes of the app. Gradio has more, which it does not need: files by path, uploads, proxies."""
CSP = "Content-Security-Policy"
HEADERS = {
    CSP: "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LOOPBACK = ("127.0.0.1", "localhost")
MAX_BODY_BYTES, MAX_CONNECTIONS = 2**20, 256
SECONDS_TO_CLOSE = 3


class RouteAllowlist:
    """Middleware that allows only the listed routes, rejects JSON objects, and blocks content from other origins.

    The app sends strings, numbers and lists of them. To Gradio an object may name a file: mounted by
    `mount_gradio_app`, Gradio 6.31 copies any file that a visitor names into its cache and serves it, since it checks
    paths only in apps that were started with `launch()`.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]):
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await _allowed_body(Request(scope, receive))
        except HTTPException as refused:
            await PlainTextResponse(refused.detail, refused.status_code)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        read = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Message:
            return next(read, None) or await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive_again, send_with_headers)


async def _allowed_body(request: Request) -> bytes:
    """The body of a request that the app may see.

    Raises:
        HTTPException: it may not.
    """
    if not ROUTES.fullmatch(request.scope["path"]):
        raise HTTPException(404, "no such page")
    if request.method in ("GET", "HEAD"):
        return b""
    length = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not length.isdigit() or int(length) > MAX_BODY_BYTES:
        raise HTTPException(413, "too large, or of unknown length")
    if not _has_no_objects(body := await request.body()):
        raise HTTPException(400, "objects are not accepted")
    return body


def _has_no_objects(body: bytes) -> bool:
    """Whether the values for a function are strings, numbers and lists of them."""
    try:
        values = json.loads(body or b"{}").get("data") or []
        flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
        return isinstance(values, list) and not any(isinstance(each, dict | list) for each in flat)
    except (ValueError, AttributeError, RecursionError, TypeError):
        return False


def guard(app: FastAPI, host: str) -> None:
    """Allow only the routes of the app, and on loopback only requests that name a loopback host, from no frame."""
    try:
        loopback, host = ip_address(host).is_loopback, str(ip_address(host))
    except ValueError:  # a name
        loopback = host == "localhost" or host.startswith("127.")
    framed = {CSP: f"{HEADERS[CSP]}; frame-ancestors 'none'"} if loopback else {}
    app.add_middleware(RouteAllowlist, headers={**HEADERS, **framed})
    if loopback:  # DNS rebinding; `[` is how an IPv6 address begins, and no name does
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, host, f"[{host}]", "["])


def build_app(options: AppOptions) -> FastAPI:
    """The server's application.

    Raises:
        UserError: a pipeline could not be loaded.
    """
    set_num_threads()
    page = build_page(Models(options.pipelines or default_sources()))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    guard(app, options.host)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    look: dict[str, Any] = {"ssr_mode": False, "show_error": False, "run_history": False, "footer_links": []}
    return gr.mount_gradio_app(app, page, "/", theme=theme, css=read_text(HERE / "app.css"), **look)


def serve(options: AppOptions) -> None:
    """Serve the app until INT or TERM.

    Raises:
        UserError: a pipeline could not be loaded, or the port is not free.
    """
    app = build_app(options)
    host, family = (f"[{options.host}]", AF_INET6) if ":" in options.host else (options.host, AF_INET)
    try:
        listening = create_server((options.host, options.port), family=family)
    except OSError as error:
        raise UserError(f"host={options.host!r}, port={options.port}: {error.strerror}; choose others") from error
    print(f"The app is at http://{host}:{options.port} (Ctrl-C ends it)", flush=True)
    limits: dict[str, Any] = {"timeout_graceful_shutdown": SECONDS_TO_CLOSE, "limit_concurrency": MAX_CONNECTIONS}
    config = uvicorn.Config(app, log_level="error", **limits)  # a warning for each refused connection fills a disk
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which uvicorn raises again when it has closed
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
