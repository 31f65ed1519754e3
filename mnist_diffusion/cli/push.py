"""`mnist-diffusion push`: push a run or a pipeline folder to the Hub in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser, add_switch


def main(argv: Sequence[str], *, prog: str) -> int:
    """Push."""
    parser = Parser(
        prog=prog,
        description="Push a run's pipeline to the Hub in one commit: weights, code, card, sample grid, configuration.",
        epilog="The token is that of `hf auth login` or of HF_TOKEN; it is never an argument.",
    )
    add = parser.add_argument
    add("source", type=Path, help="a run folder, or a pipeline folder")
    add("repo_id", type=str, help="the repository, user/name; created if it does not exist")
    add_switch(parser, "--private", "nobody else may see the repository")
    add_switch(parser, "--create_pr", "propose the commit as a pull request")
    add("--revision", type=str | None, help="the branch, created if it does not exist; main if omitted")
    add_switch(parser, "--with_checkpoints", "also the newest checkpoint, to resume training from")
    add("--license", type=str | None, help="of the model, such as mit; left out of the card if omitted")
    add("--message", type=str, default="Upload pipeline", help="title of the commit")
    values = parser.parse_args(list(argv))
    from mnist_diffusion.sharing.hub import push

    print(f"Pushed: {push(**values.as_dict())}")
    return 0
