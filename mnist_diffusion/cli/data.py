"""`mnist-diffusion data`: inspect labelled images before training on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.errors import UserError
from mnist_diffusion.files import read_bytes, replace_picture, replace_text, require_writable
from mnist_diffusion.option_types import STRICT, FilePath

SHOWN, MAX_SURVEY_BYTES = 10, 2**30
BEGINNING = b'{\n "description"'
"""The first bytes of every `survey.json` that this command writes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Inspect labelled images before training: classes, sizes, duplicates, unreadable files."""

    data: ImagesConfig
    """The images, as in training."""
    out: FilePath = Path("survey")
    """Output folder for contact_sheet.png and survey.json."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Count, preview and check images; the exit code is 1 if one could not be read."""
    usage = f"{prog} SOURCE [--option VALUE ...]"
    options: Options = Parser(Options, "data.source", prog=prog, usage=usage).read(argv)
    if (source := options.data.source) is None:
        raise UserError("SOURCE is missing: a folder, a file, a Hub id, or digits")
    require_writable(out := options.out)
    if Path(source).exists() and out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"--out={out} is inside the source {source}; choose a folder outside it")
    survey_file = out / "survey.json"
    own = survey_file.is_file() and read_bytes(survey_file, MAX_SURVEY_BYTES).startswith(BEGINNING)
    if out.is_dir() and any(out.iterdir()) and not own:
        raise UserError(f"--out={out} contains files that this command did not write; choose another folder")
    from mnist_diffusion.data.survey import survey
    from mnist_diffusion.plots import tables
    from mnist_diffusion.plots.grids import image_grid

    result = survey(options.data)
    console = tables.console()
    console.print("\n".join([result.description, *result.notes]), markup=False, soft_wrap=True)
    counts = [[name, *(str(split.counts[name]) for split in result.splits.values())] for name in result.class_names]
    console.print(tables.screen_table(["class", *result.splits], counts))
    for name, split in result.splits.items():
        sizes = ", ".join(f"{count} of {size}" for size, count in split.sizes.most_common(5))
        more = f", and {len(split.sizes) - 5} more sizes" if len(split.sizes) > 5 else ""
        console.print(f"{name}: {sum(split.counts.values())} images: {sizes}{more}", markup=False, soft_wrap=True)
    unreadable = [line for split in result.splits.values() for line in split.unreadable]
    for title, lines in (
        ("could not be read", unreadable),
        ("the same pixels in two classes", [" = ".join(group) for group in result.in_two_classes]),
        ("the same pixels in the training and the held-out split", [" = ".join(g) for g in result.in_both_splits]),
        ("the same pixels more than once", [" = ".join(group) for group in result.duplicates]),
    ):
        if lines:
            console.print(f"\n{len(lines)} {title}:", markup=False)
            rest = [f"and {len(lines) - SHOWN} more, in {survey_file}"] if len(lines) > SHOWN else []
            console.print("\n".join(f"  {line}" for line in [*lines[:SHOWN], *rest]), markup=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    tiles, names, columns = result.contact_sheet()
    sheet = out / "contact_sheet.png"
    replace_picture(image_grid(tiles, columns, row_labels=names, title="The first images of each class"), sheet)
    replace_text(survey_file, json.dumps(vars(result), default=_plain, indent=1, ensure_ascii=False))
    console.print(f"\nThe first images of each class are in {sheet}", markup=False, soft_wrap=True)
    return 1 if unreadable else 0


def _plain(split: Any) -> dict[str, Any]:
    """What was counted in a split, without its pictures."""
    return {name: value for name, value in vars(split).items() if name != "previews"}
