"""`mnist-diffusion data`: inspect labelled images before training on them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from mnist_diffusion.cli.options import Parser
from mnist_diffusion.config import ImagesConfig
from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import open_file, replace_picture, replace_text
from mnist_diffusion.option_types import STRICT, FilePath

SHOWN = 10
WRITTEN_BY = "mnist-diffusion data"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    """Options of `mnist-diffusion data`."""

    data: ImagesConfig
    """The images, as in training."""
    out: FilePath = Path("survey")
    """Output folder for contact_sheet.png and data.json."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Count, preview and check images; the exit code is 1 if one could not be read."""
    about = "Inspect labelled images before training: classes, sizes, duplicates, unreadable files."
    usage = f"{prog} SOURCE [--option VALUE ...]"
    parser = Parser(Options, positional=["data.source"], prog=prog, usage=usage, description=about)
    options: Options = parser.read(argv)
    if (source := options.data.source) is None:
        parser.error("SOURCE is missing: a folder, a file, a Hub id, or digits")
    _require_own(options.out, Path(source))
    from mnist_diffusion.data.survey import survey
    from mnist_diffusion.plots import tables
    from mnist_diffusion.plots.grids import image_grid

    found = survey(options.data)
    console = tables.console()
    console.print("\n".join([found.description, *found.notes]), markup=False, soft_wrap=True)
    counts = [[name, *(str(split.counts[name]) for split in found.splits.values())] for name in found.class_names]
    console.print(tables.screen_table(["class", *found.splits], counts))
    for name, split in found.splits.items():
        sizes = ", ".join(
            f"{count} of {width} x {height} {'grey' if channels == 1 else 'RGB'}"
            for (channels, height, width), count in split.shapes.most_common(5)
        )
        more = f", and {len(split.shapes) - 5} more sizes" if len(split.shapes) > 5 else ""
        console.print(f"{name}: {sum(split.counts.values())} images: {sizes}{more}", markup=False, soft_wrap=True)
    unreadable = [line for split in found.splits.values() for line in split.unreadable]
    for title, lines in (
        ("could not be read", unreadable),
        ("the same pixels in two classes", [" = ".join(group) for group in found.in_two_classes]),
        ("the same pixels in the training and the held-out split", [" = ".join(g) for g in found.in_both_splits]),
        ("the same pixels more than once", [" = ".join(group) for group in found.duplicates]),
    ):
        if lines:
            console.print(f"\n{len(lines)} {title}:", markup=False)
            rest = [f"and {len(lines) - SHOWN} more, in {options.out / 'data.json'}"] if len(lines) > SHOWN else []
            console.print("\n".join(f"  {line}" for line in [*lines[:SHOWN], *rest]), markup=False, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    tiles, names, columns = found.contact_sheet()
    sheet = options.out / "contact_sheet.png"
    replace_picture(image_grid(tiles, columns, row_labels=names, title="The first images of each class"), sheet)
    replace_text(options.out / "data.json", json.dumps(_plain(found), indent=1, ensure_ascii=False))
    console.print(f"\nThe first images of each class are in {sheet}", markup=False, soft_wrap=True)
    return 1 if unreadable else 0


def _plain(found: Any) -> dict[str, Any]:
    splits = {
        name: {
            "counts": {each: split.counts[each] for each in found.class_names},
            "shapes": [[*shape, count] for shape, count in split.shapes.most_common()],
            "unreadable": split.unreadable,
        }
        for name, split in found.splits.items()
    }
    groups = {name: getattr(found, name) for name in ("duplicates", "in_two_classes", "in_both_splits")}
    return {"written_by": WRITTEN_BY, "source": found.description, "notes": found.notes, "splits": splits, **groups}


def _require_own(out: Path, source: Path) -> None:
    """Make sure that nothing is written into the source, or over what this command did not write.

    Raises:
        UserError: it would be.
    """
    if source.exists() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out={out} lies in the source {source}; name a folder of its own")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; name a folder")
    told, sheet = out / "data.json", out / "contact_sheet.png"
    own = False
    with contextlib.suppress(FileError), open_file(told) as file:
        own = WRITTEN_BY.encode() in file.read(100)
    if not own and (told.exists() or sheet.exists()):
        raise UserError(f"--out={out} holds a data.json or contact_sheet.png of other origin; name another folder")
