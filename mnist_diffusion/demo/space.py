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
from mnist_diffusion.files import replace_text
from mnist_diffusion.hub_client import hub_errors, open_repository, upload
from mnist_diffusion.pipelines.pipeline import MNISTDiffusionPipeline

PACKAGE = Path(__file__).parents[1]
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
APP = '''"""The app of this Space."""

import os

from mnist_diffusion.command_options import AppOptions
from mnist_diffusion.demo.server import serve

host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"  # for a try elsewhere
serve(AppOptions(pipelines={pipelines!r}, host=host))
'''


def write_static_space(
    pipelines: Mapping[str, MNISTDiffusionPipeline], folder: Path, *, title: str, runtime: Path | None = None
) -> None:
    """Write the studio with the card of a static Space, which costs nothing and never sleeps.

    Raises:
        UserError: see [`write_studio`].
    """
    write_studio(pipelines, folder, title=title, runtime=runtime)
    about = "A diffusion model that runs in your browser alone; nothing is sent anywhere."
    replace_text(folder / "README.md", CARD.format(title=title, sdk="static", more="", about=about))


def write_gradio_space(pipelines: Mapping[str, MNISTDiffusionPipeline], folder: Path, *, title: str) -> None:
    """Write the app as a Space: pipelines, this package, and the versions installed here.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
    """
    gradio, versions = metadata.version("gradio"), pinned()
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    replace_text(folder / "app.py", APP.format(pipelines=tuple(pipelines)))
    replace_text(folder / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in versions.items()))
    version = ".".join(platform.python_version_tuple()[:2])
    more = f"sdk_version: {gradio}\npython_version: '{version}'\napp_file: app.py\n"
    about = "Sample, steer and compare, with a diffusion model on the CPU of this Space."
    replace_text(folder / "README.md", CARD.format(title=title, sdk="gradio", more=more, about=about))


def pinned() -> dict[str, str]:
    """The direct and indirect requirements of this package and its app, in the versions installed here."""
    versions: dict[str, str] = {}
    waiting = [("mnist-diffusion", "app")]
    for package, extra in waiting:  # which grows
        with contextlib.suppress(metadata.PackageNotFoundError):  # of another platform
            versions[package] = metadata.version(package).partition("+")[0]
            for each in map(Requirement, metadata.requires(package) or ()):
                if each.marker is None or each.marker.evaluate({"extra": extra}):
                    new = {(canonicalize_name(each.name), more) for more in ("", *each.extras)}
                    waiting += sorted(new.difference(waiting))
    return {name: version for name, version in versions.items() if name != "mnist-diffusion"}


def push_space(folder: Path, repo_id: str, *, kind: str, private: bool) -> str:
    """Push a Space's folder in one commit; its address.

    Raises:
        HubError: the Hub rejected the request or could not be reached.
        FileError: a file holds the token.
    """
    stale = [f"{path.name}/*" for path in folder.iterdir() if path.is_dir()]
    repo_id = open_repository(repo_id, private=private, space_sdk=kind)
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        return upload(folder, repo_id, message="Upload the Space", stale=stale, repo_type="space")
