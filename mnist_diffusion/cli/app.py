"""`mnist-diffusion app`: serve the web app, which samples, steers and compares."""

from __future__ import annotations

from collections.abc import Sequence

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.command_options import AppOptions
from mnist_diffusion.errors import UserError


def main(argv: Sequence[str], *, prog: str) -> int:
    """Serve the app until it is interrupted."""
    options: AppOptions = Parser(AppOptions, "pipelines", prog=prog).read(argv)
    try:
        from mnist_diffusion.demo.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"the app needs {error.name}; pip install 'mnist-diffusion[app]'") from error
    serve(options)
    return 0
