"""`mnist-diffusion push`: push a run or a pipeline folder to the Hub in one commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.option_types import STRICT, FilePath, Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Push a run's pipeline to the Hub in one commit: weights, code, card, sample sheet, configuration.

    The token is that of `hf auth login` or of HF_TOKEN; it is never an argument.
    """

    source: FilePath
    """Run folder or pipeline folder."""
    repo_id: Text
    """Repository, user/name; created if missing."""
    private: bool = False
    """Create a private repository."""
    create_pr: bool = False
    """Open a pull request instead of committing to the branch."""
    revision: Text | None = None
    """Branch, created if missing; main if omitted."""
    with_checkpoints: bool = False
    """Also push the newest checkpoint, to resume training from."""
    license: Text | None = None
    """Model licence, e.g. mit; the card's own if omitted."""
    message: Text = "Upload pipeline"
    """Title of the commit."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Push."""
    options: Options = Parser(Options, "source", "repo_id", prog=prog).read(argv)
    from mnist_diffusion.hub import push

    print(f"Pushed: {push(**{field.name: getattr(options, field.name) for field in dataclasses.fields(options)})}")
    return 0
