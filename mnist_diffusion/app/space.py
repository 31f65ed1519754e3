"""Write a folder that is a Space: the studio, which runs in browsers alone, or the page, which the Hub runs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi
from packaging.requirements import Requirement

from mnist_diffusion.files import read_bytes, replace_bytes, replace_text
from mnist_diffusion.sharing.commit import commit_files
from mnist_diffusion.sharing.errors import hub_errors
from mnist_diffusion.sharing.hub import open_repository
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.studio.build import write_studio

PACKAGE = Path(__file__).parents[1]
MAX_FILE_BYTES = 2**24
SOURCES = (".py", ".html", ".js", ".css", ".md", ".yaml", ".json", ".safetensors")
CARD = """---
title: {title}
emoji: 🔢
colorFrom: indigo
colorTo: gray
sdk: {sdk}
{more}short_description: Watch a class-conditional diffusion model draw
---

# {title}

{about} Made with `mnist-diffusion space`.
"""
APP = '''"""The page, as this Space serves it: it draws, and leaves out training and evaluation."""

import os

from mnist_diffusion.app.server import serve
from mnist_diffusion.requests import AppRequest

host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"  # elsewhere it is tried
serve(AppRequest(pipelines={pipelines!r}, only_draw=True, host=host))
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
    """Write the page as a Space: pipelines, this package, and the versions that are installed here."""
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
    about = "Draw, steer and compare, with a diffusion model on the CPU of this Space."
    replace_text(folder / "README.md", CARD.format(title=title, sdk="gradio", more=more, about=about))


def pinned() -> dict[str, str]:
    """What this package and its page need, in the versions that are installed here."""
    wanted = [Requirement(each) for each in metadata.requires("mnist-diffusion") or ()]
    names = [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": "app"})]
    return {name: metadata.version(name).partition("+")[0] for name in names}


def push_space(folder: Path, repo_id: str, *, kind: str, private: bool) -> str:
    """Push a Space's folder in one commit; its address.

    Raises:
        HubError: the Hub refused or could not be reached.
        FileError: a file holds the token.
    """
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    mirrored = {name.partition("/")[0] + "/" for name in files if "/" in name}
    repo_id = open_repository(repo_id, private=private, space_sdk=kind)
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        return commit_files(HfApi(), repo_id, files, mirrored, "Upload the Space", repo_type="space")
