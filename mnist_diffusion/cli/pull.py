"""`mnist-diffusion pull`: download a pipeline, or a run to resume, from the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.option_types import STRICT, FilePath, Text


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Download a pipeline from the Hub, without running any of its code."""

    source: Text
    """Repository user/name, or user/name@revision with a branch, tag or commit."""
    out: FilePath
    """Output folder, which must be empty or missing."""
    with_checkpoints: bool = False
    """Download a run folder with its checkpoint, to resume training."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Pull."""
    options: Options = Parser(Options, "source", prog=prog).read(argv)
    from mnist_diffusion.hub import pull

    repo_id, _, revision = options.source.partition("@")
    out = pull(repo_id, options.out, revision=revision or None, with_checkpoints=options.with_checkpoints)
    print(f"Pulled {options.source} into {out}")
    if options.with_checkpoints:
        print(f"Resume with: --config {out / 'config.yaml'} --train.resume --output_dir {out}")
    return 0
