"""The command line: `mnist-diffusion <verb>`, and the parsing that every command shares.

Values come from the defaults of the schema, then from `--config`, then from dotted flags, which win wherever
`--config` stands. Heavy imports wait until the arguments are known to be right.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from mnist_diffusion.cli.options import refuse_tokens, reporting_errors
from mnist_diffusion.files import read_text

HERE = Path(__file__).parent
COMMANDS = sorted(path.stem for path in HERE.glob("[a-z]*.py") if path.stem != "options")
VERBS = {"train": "train_cfg", "distill": "distill_cfg", **{name: f"cli.{name}" for name in COMMANDS}}
"""The module of each verb, whose `main` carries it out: the pages of the two kinds of runs, and all of this folder."""


def _about(module: str) -> str:
    """What a verb does, from the first line of its module, which is not imported for it."""
    text = read_text(HERE.parent / f"{module.replace('.', '/')}.py")
    about = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].rpartition("`: ")[2].removesuffix(".")
    return about[:1].lower() + about[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """The console command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mnist-diffusion",
        description="Class-conditional diffusion on Hugging Face diffusers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {verb:16} {_about(module)}" for verb, module in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS, metavar="verb", help="what to do; `<verb> --help` tells more")
    parser.add_argument("--version", action="version", version=f"mnist-diffusion {version('mnist-diffusion')}")
    refuse_tokens(parser, argv)
    verb = parser.parse_args(argv[:1]).verb
    command = import_module(f"mnist_diffusion.{VERBS[verb]}")
    return reporting_errors(lambda: int(command.main(argv[1:], prog=f"mnist-diffusion {verb}")))
