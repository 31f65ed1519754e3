"""`mnist-diffusion pull`: fetch a pipeline, or a run to resume, from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mnist_diffusion.cli.options import Parser, add_switch


def main(argv: Sequence[str], *, prog: str) -> int:
    """Pull."""
    parser = Parser(prog=prog, description="Fetch a pipeline from the Hub, running no code of it.")
    parser.add_argument("source", type=str, help="user/name, or user/name@revision with a branch, tag or commit")
    parser.add_argument("--out", type=Path, required=True, help="the folder for it, which must be empty")
    add_switch(parser, "--with_checkpoints", "a run folder with the checkpoint, to resume training")
    values = parser.parse_args(list(argv))
    from mnist_diffusion.sharing.hub import pull

    repo_id, _, revision = values.source.partition("@")
    out = pull(repo_id, values.out, revision=revision or None, with_checkpoints=values.with_checkpoints)
    print(f"Pulled {values.source} into {out}")
    if values.with_checkpoints:
        print(f"Resume with: --config {out / 'config.yaml'} --train.resume true --output_dir {out}")
    return 0
