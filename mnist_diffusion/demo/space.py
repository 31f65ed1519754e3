"""Write the folder of a Space: the studio, which runs in browsers, or the app, which runs on the Hub."""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mnist_diffusion.demo.studio.build import write_studio
from mnist_diffusion.files import read_bytes, replace_bytes, replace_text
from mnist_diffusion.hub_client import hub_errors, open_repository, upload
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline

PACKAGE = Path(__file__).parents[1]
MAX_FILE_BYTES = 2**24
SOURCES = (".py", ".html", ".js", ".css", ".md", ".yaml", ".json", ".safetensors")
CARD = """---
title: {title}
emoji: 🔢
colorFrom: indigo
colorTo: gray
sdk: {sdk}
{more}short_description: Watch a class-conditional diffusion model sample
---

# {title}

{about} Made with `mnist-diffusion space`.
"""
APP = '''"""The app of this Space, without training."""

import os

from mnist_diffusion.command_options import AppOptions
from mnist_diffusion.demo.server import serve

host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"  # for a try elsewhere
serve(AppOptions(pipelines={pipelines!r}, only_draw=True, host=host))
'''


def write_static_space(
    pipelines: Mapping[str, MNISTDiffusionPipeline], folder: Path, *, title: str, runtime: Path | None = None
) -> None:
    """Write the studio with the card of a static Space, which costs nothing and never sleeps.

    Raises:
        UserError: as of [`write_studio`].
    """
    write_studio(pipelines, folder, title=title, runtime=runtime)
    about = "A diffusion model that runs in your browser alone; nothing is sent anywhere."
    replace_text(folder / "README.md", CARD.format(title=title, sdk="static", more="", about=about))


def write_gradio_space(pipelines: Mapping[str, MNISTDiffusionPipeline], folder: Path, *, title: str) -> None:
    """Write the app as a Space: pipelines, this package, and the versions installed here."""
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    for path in PACKAGE.rglob("*"):
        if path.suffix in SOURCES and path.is_file():
            copied = folder / PACKAGE.name / path.relative_to(PACKAGE)
            copied.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(copied, read_bytes(path, MAX_FILE_BYTES))
    replace_text(folder / "app.py", APP.format(pipelines=tuple(pipelines)))
    versions = pinned()
    replace_text(folder / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in versions.items()))
    version = ".".join(platform.python_version_tuple()[:2])
    more = f"sdk_version: {versions['gradio']}\npython_version: '{version}'\napp_file: app.py\n"
    about = "Sample, steer and compare, with a diffusion model on the CPU of this Space."
    replace_text(folder / "README.md", CARD.format(title=title, sdk="gradio", more=more, about=about))


def pinned() -> dict[str, str]:
    """All that this package and its app require, and what that requires, in the versions installed here."""
    found: dict[str, str] = {}
    waiting = [("mnist-diffusion", "app")]
    seen = set(waiting)
    while waiting:
        package, extra = waiting.pop(0)
        for each in map(Requirement, metadata.requires(package) or ()):
            name = canonicalize_name(each.name)
            new = {(name, extra) for extra in ("", *each.extras)} - seen
            if new and (each.marker is None or each.marker.evaluate({"extra": extra})):
                with contextlib.suppress(metadata.PackageNotFoundError):  # of another platform
                    found[name] = metadata.version(name).partition("+")[0]
                    waiting += sorted(new)
                    seen |= new
    return found


def push_space(folder: Path, repo_id: str, *, kind: str, private: bool) -> str:
    """Push a Space's folder in one commit; its address.

    Raises:
        HubError: the Hub refused or could not be reached.
        FileError: a file holds the token.
    """
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
    stale = [f"{path.name}/*" for path in folder.iterdir() if path.is_dir()]
    repo_id = open_repository(repo_id, private=private, space_sdk=kind)
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        return upload(folder, repo_id, message="Upload the Space", stale=stale, repo_type="space")
