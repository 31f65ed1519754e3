"""`mnist-diffusion app`: serve a page that draws, steers, compares, trains and evaluates."""

from __future__ import annotations

from collections.abc import Sequence

from mnist_diffusion.cli.options import Parser, add_options, from_options, parse
from mnist_diffusion.errors import UserError
from mnist_diffusion.requests import AppRequest


def main(argv: Sequence[str], *, prog: str) -> int:
    """Serve the page until it is interrupted."""
    parser = Parser(
        prog=prog,
        description="Serve a page on this machine that draws, steers, compares, trains and evaluates (extra `app`).",
        epilog="With no pipeline, the page begins with training one.",
    )
    parser.add_argument("pipelines", type=str, nargs="*", default=[], help="pipeline folders or Hub ids")
    add_options(parser, AppRequest, skip={"pipelines"})
    request = from_options(AppRequest, parse(parser, argv))
    try:
        from mnist_diffusion.app.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}; pip install 'mnist-diffusion[app]'") from error
    serve(request)
    return 0
