"""The figures of the README and the documents, written anew by the commands that stand above them.

    python benchmarks/performance.py path/to/mnist                          # all of them, for hours
    python benchmarks/performance.py path/to/mnist --only sampling.py       # those with this word in their command
    python benchmarks/performance.py path/to/mnist --only nothing           # none: the list of them alone

A document has its commands in comments, `<!-- figures: COMMAND -->` or, where it needs a GPU, `<!-- figures on cuda:
COMMAND -->`. What stands between one and `<!-- end -->` is replaced by the table that the command prints or leaves in
its `--out`, under the command, the machine and the date. `docs/results.md` lists them all, and its commands come
first, as they leave runs in `runs/results` that others use. What is there is not trained again: remove it to do so.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli

from mnist_diffusion.environment import DEFAULT_DEVICE, machine_description

DOCUMENTS = Path(__file__).parents[1] / "docs"
FIGURES = re.compile(r"(<!-- figures(?: on (\w+))?: (.*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
TABLE = re.compile(r"^\|.*\n(?:\|.*\n)+", re.MULTILINE)
CAPTION = re.compile(
    r"^(?P<heading>##+ .*)$|^`(?P<command>.+)`, (?P<machine>.+), (?P<date>\d{4}-\d\d-\d\d):$", re.MULTILINE
)
LIST = re.compile(r"<!-- list -->\n.*?<!-- end -->", re.DOTALL)


def main(data: str, *, only: str = "", documents: Path = DOCUMENTS) -> None:
    """Write the figures of all documents in a folder.

    Args:
        data: the folder of MNIST that `path/to/mnist` stands for.
        only: leave the figures as they are whose command does not contain this.
        documents: the folder.
    """
    pages, listing = sorted(documents.glob("*.md")), documents / "results.md"
    for page in [*sorted(pages, key=lambda page: page != listing), documents.parent / "README.md"]:
        for found in FIGURES.finditer(page.read_text(encoding="utf-8")):
            opening, device, command = found.groups()
            if only not in command or (device or DEFAULT_DEVICE) != DEFAULT_DEVICE:
                continue
            print(f"{page.name}: {command}", flush=True)
            table = measured(command.replace("path/to/mnist", shlex.quote(data)))
            caption = (
                f"`{command}`, {machine_description(torch.device(DEFAULT_DEVICE), 1)}, {time.strftime('%Y-%m-%d')}:"
            )
            text = page.read_text(encoding="utf-8").replace(found[0], f"{opening}{caption}\n\n{table}\n")
            page.write_text(text, encoding="utf-8")
    rows = [row for page in pages for row in captions(page)]
    lines = [" | ".join(row) for row in (["figures", "command", "machine", "date"], ["---"] * 4, *rows)]
    table = "\n".join(["<!-- list -->", *(f"| {line} |" for line in lines), "<!-- end -->"])
    listing.write_text(LIST.sub(lambda _: table, listing.read_text(encoding="utf-8")), encoding="utf-8")


def measured(commands: str) -> str:
    """The table that the last of some commands, joined by `&&`, prints or leaves in its `--out`.

    Those before it train, and are left out if what they train is there.
    """
    *trainings, last = commands.split(" && ")
    for line in [*(each for each in trainings if not _folder(each).is_dir()), last]:
        program, *arguments = shlex.split(line)
        here = Path(sys.executable).with_name(program)
        text = subprocess.run([str(here), *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    reports = [_folder(last) / name for name in ("report.md", "record.md")]
    text += "".join(path.read_text(encoding="utf-8") for path in reports if path.is_file())
    if (table := TABLE.search(text)) is None:
        raise SystemExit(f"no table is printed by, or left in the --out of: {last}")
    return table[0]


def _folder(command: str) -> Path:
    """What a command writes into: its `--out` or `--output_dir`; a place that is not there if it has neither."""
    found = re.search(r" --out(?:put_dir)? (\S+)", command)
    return Path(found[1] if found else "/nowhere")


def captions(page: Path) -> list[list[str]]:
    """A row for each of the figures of a page: under which heading, by which program, where and when."""
    rows, place = [], f"[{page.stem}]({page.name})"
    for found in CAPTION.finditer(page.read_text(encoding="utf-8")):
        if heading := found["heading"]:
            title = heading.lstrip("# ")
            anchor = re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
            place = f"[{title}]({page.name}#{anchor})"
        else:
            program = found["command"].split(" && ")[-1]
            name = re.match(r"(?:python )?(\S+(?: [a-z]+(?= |$))?)", program)
            rows.append([place, f"`{name[1] if name else program}`", found["machine"], found["date"]])
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
