"""Tables of text, for the screen and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mnist_diffusion.pipelines.card import as_markdown

WIDTH = 140
"""Characters per line in files and logs, so that tables are not cut there."""


def console() -> Console:
    """The screen."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=WIDTH)


def screen_table(headings: Sequence[str], table: Sequence[Sequence[str]]) -> Table:
    """A table for the screen, all columns but the first aligned to the right."""
    rich_table = Table()
    for index, heading in enumerate(headings):
        rich_table.add_column(escape(heading), justify="right" if index else "left")
    for row in table:
        rich_table.add_row(*(escape(cell) for cell in row))
    return rich_table


def markdown(headings: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *table]
    return "\n".join("| " + " | ".join(as_markdown(cell) for cell in line) + " |" for line in lines)
