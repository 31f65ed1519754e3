"""Hooks of MkDocs: pages beside `docs/`, a reference of all commands and modules, and links that leave the site."""

from __future__ import annotations

import contextlib
import io
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page

from mnist_diffusion.cli import VERBS, main

REPOSITORY = Path(__file__).parents[1]
BESIDE = {"index.md": "README.md"} | {
    f"{name.lower()}.md": f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages beside the folder of documents, and those of the reference."""
    for name, source in BESIDE.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, path in BESIDE.items():
            text = text.replace(f"]({path}", f"]({other}")
        files.append(File.generated(config, name, content=text))
    commands = "# Commands and options\n\n" + "\n".join(map(help_of, VERBS))
    files.append(File.generated(config, "reference/commands.md", content=commands))
    for path in sorted((REPOSITORY / "mnist_diffusion").rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not parts[-1].endswith("__main__"):
            files.append(File.generated(config, f"reference/{module}.md", content=f"# {module}\n\n::: {module}\n"))
    return files


def help_of(verb: str) -> str:
    """What `mnist-diffusion VERB --help` prints, below a heading."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return f"## {verb}\n\n```text\n{printed.getvalue()}```\n"


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Take links to files that are not part of the site for words: those files are in the repository."""

    def kept(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        target = target.replace("../CONTRIBUTING.md", "contributing.md").replace("../SECURITY.md", "security.md")
        target = target.replace("../CHANGELOG.md", "changelog.md")
        path = target.partition("#")[0]
        inside = "://" in target or not path or files.get_file_from_path(path) is not None
        return f"{picture}[{words}]({target})" if inside else words

    return LINK.sub(kept, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which needs no script; names that docstrings put into brackets, without them."""

    def formula(match: re.Match[str]) -> str:
        return str(convert(unescape(match[2]), display="block" if match[1] == "div" else "inline"))

    html = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, html, flags=re.DOTALL)
    return re.sub(r"\[(<code>[^<]+</code>)\]", r"\1", html)


def on_nav(nav: Navigation, config: Any, files: Files) -> Navigation:
    """A section of the reference, whose pages are made above."""
    pages = [Page(None, file, config) for file in files.documentation_pages() if file.src_uri.startswith("reference/")]
    nav.items.append(Section("Reference", pages))
    nav.pages.extend(pages)
    return nav
