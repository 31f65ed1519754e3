"""Push a pipeline or a run to the Hub, and pull it back.

A push is one commit, so the repository is what it was before or what was pushed, never a part of it. Only named files
are pushed, and training state only if asked for.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, HfApi, get_token, snapshot_download

from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import file_within, pipeline_folder, read_json, read_text, read_yaml, replace_folder
from mnist_diffusion.run_folder.checkpoint import newest_intact
from mnist_diffusion.run_folder.lock import RUN_ID, is_empty
from mnist_diffusion.sharing import reading
from mnist_diffusion.sharing.card import (
    CARD,
    EVAL_RESULTS,
    PICTURE,
    card_for,
    parse_card,
    places_of,
    short_card,
    without_places,
)
from mnist_diffusion.sharing.commit import commit_files
from mnist_diffusion.sharing.errors import LOG_IN, HubError, hub_errors
from mnist_diffusion.sharing.pipeline import CODE, CODE_FILE, CODE_INDEX, MNISTDiffusionPipeline
from mnist_diffusion.sharing.reading import MAX_CARD_BYTES, PIPELINE_FILES, fetch_pipeline, index_arguments

CHECKPOINTS = "checkpoints"
CHECKPOINT = re.compile(rf"{CHECKPOINTS}/step-\d+/[\w-][\w.-]*")
RUN_FILES = ("config.yaml", "summary.json")
RESUME_FILES = ("metrics.jsonl",)
"""Files of a run that, beside its checkpoint, are pushed to resume from."""
EXPORTS = ("pipeline", "pipeline_best")
"""The folders that a run exports; snapshots are in a folder of their own."""
PUSHED = {*PIPELINE_FILES, *RUN_FILES, CARD, PICTURE, EVAL_RESULTS, "unet/", "scheduler/"}
"""Of these names and folders, what a push does not hold is removed from the repository."""


def find_pipeline(source: Path) -> Path:
    """The pipeline folder that `source` is, or that it holds if it is a run folder.

    Raises:
        UserError: there is none.
    """
    if ((folder := pipeline_folder(source)) / "model_index.json").is_file():
        return folder
    raise UserError(f"{source} is neither a pipeline folder nor a run folder with one")


def files_to_push(
    folder: Path, repo_id: str, *, with_checkpoints: bool, license: str | None = None
) -> dict[str, Path | bytes]:
    """The files of a pipeline folder, and of the run that exported it, by their names in the repository.

    The pipeline is loaded, so that nothing is pushed that could not be pulled.

    Raises:
        UserError: it is invalid, a link leads out of the folder, or there is no checkpoint.
    """
    num_classes = MNISTDiffusionPipeline.from_pretrained(folder).num_classes
    beside = [name for name in (PICTURE, EVAL_RESULTS, *RUN_FILES) if (folder / name).is_file()]
    found: dict[str, Path | bytes] = {name: file_within(folder, name) for name in (*PIPELINE_FILES, *beside)}
    run = _run_of(folder.resolve())
    if run is not None:
        names = (*RUN_FILES, *(RESUME_FILES if with_checkpoints else ()))
        found |= {name: file_within(run, name) for name in names if (run / name).is_file()}
    # Never the code in a folder, which may be somebody else's, nor the name of it.
    found[CODE_FILE] = CODE
    index = {**read_json(file_within(folder, "model_index.json")), "_class_name": CODE_INDEX}
    found["model_index.json"] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    places: list[str] = []
    if isinstance(path := found.get("config.yaml"), Path):
        config = read_yaml(path)
        places = places_of(config)
        written = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10**6)
        found["config.yaml"] = without_places(written, places).encode()
    if isinstance(path := found.get("summary.json"), Path):
        written = json.dumps(read_json(path), indent=1, ensure_ascii=False) + "\n"
        found["summary.json"] = without_places(written, places).encode()
    has_card = (folder / CARD).is_file()
    card = read_text(file_within(folder, CARD)) if has_card else short_card(num_classes)
    found[CARD] = _named(without_places(card_for(card, repo_id), places), repo_id, license).encode()
    if with_checkpoints:
        newest = None if run is None else newest_intact(run / CHECKPOINTS)[0]
        if newest is None:
            raise UserError(f"--with_checkpoints: there is no valid checkpoint to push with {folder}")
        found |= {f"{CHECKPOINTS}/{newest.name}/{file.name}": file for file in sorted(newest.iterdir())}
    return found


def _run_of(folder: Path) -> Path | None:
    """The run that exported a pipeline folder; None if it stands alone."""
    above = folder.parent if folder.name in EXPORTS else folder.parent.parent
    exported = folder.name in EXPORTS or folder.parent.name == "snapshots"
    return above if exported and any((above / name).exists() for name in (RUN_ID, CHECKPOINTS)) else None


def push(
    source: Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    with_checkpoints: bool = False,
    message: str = "Upload pipeline",
    license: str | None = None,
) -> str:
    """Push a run or a pipeline folder, as one commit.

    Args:
        source: a run folder, or a pipeline folder.
        repo_id: the repository, `user/name`; created if it does not exist.
        private: nobody else may see it. A repository that is public already is refused.
        create_pr: propose the commit as a pull request.
        revision: the branch; created if it does not exist.
        with_checkpoints: also the newest checkpoint, to resume training from.
        message: title of the commit.
        license: of the model, by the Hub's short name such as `mit`; the card keeps its own if omitted.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UserError: there is nothing to push, or it holds the token.
        HubError: the Hub refused or could not be reached. Nothing has changed there but that the repository may be new.
    """
    folder = find_pipeline(source)
    mirrored = {*PUSHED, f"{CHECKPOINTS}/"} if with_checkpoints else PUSHED
    try:
        chosen: dict[str, Any] = {"with_checkpoints": with_checkpoints, "license": license}
        files_to_push(folder, repo_id, **chosen)  # what is wrong is said before any change
        repo_id = open_repository(repo_id, private=private, revision=revision, create_pr=create_pr)
        with hub_errors(repo_id, f"cannot push to {repo_id}"):
            files = files_to_push(folder, repo_id, **chosen)
            return commit_files(HfApi(), repo_id, files, mirrored, message, create_pr=create_pr, revision=revision)
    except FileError as error:
        raise UserError(f"cannot push {source}: {error}") from error


def open_repository(
    repo_id: str, *, private: bool, revision: str | None = None, create_pr: bool = False, space_sdk: str | None = None
) -> str:
    """Create a repository if it does not exist, and return its whole name, with the account in front.

    It is of a model, or with `space_sdk` (`gradio` or `static`) a Space.

    Raises:
        HubError: nobody is logged in, the Hub refused, or it is public though `private` is asked for.
    """
    api = HfApi()
    if get_token() is None:
        raise HubError(f"cannot push to {repo_id}: nobody is logged in; {LOG_IN}")
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        kind = "model" if space_sdk is None else "space"
        created = api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=kind, space_sdk=space_sdk)
        repo_id = created.repo_id
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise HubError(
                f"cannot push to {repo_id} as private: it exists already, and is public; make it private at "
                f"{api.endpoint}/{repo_id}/settings, or name another"
            )
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _named(text: str, repo_id: str, license: str | None) -> str:
    """A card with a licence, if one is given, whose measured results, if it has any, are named after a repository.

    Raises:
        FileError: its metadata could not be read.
    """
    card = parse_card(text)
    values = card.data.to_dict()
    if "model-index" not in values and license is None:
        return text
    try:
        if "model-index" in values:
            values["model-index"][0]["name"] = repo_id.rsplit("/", 1)[-1]
    except (TypeError, KeyError, IndexError) as error:
        raise FileError(f"the metadata at the top of {CARD} has no model-index as it should be") from error
    if license is not None:
        values["license"] = license
    card.data = CardData(**values)
    return str(card)


def pull(repo_id: str, out: Path, *, revision: str | None = None, with_checkpoints: bool = False) -> Path:
    """Fetch a pipeline, or a run to resume, running no code of it.

    Args:
        repo_id: the repository, `user/name`.
        out: the folder for it, which must hold nothing.
        revision: branch, tag or commit.
        with_checkpoints: also the checkpoint: `out` is then a run folder, the pipeline in `out/pipeline`.

    Returns:
        `out`.

    Raises:
        UserError: `out` holds something, or the repository has no pipeline or checkpoint.
        HubError: the Hub refused or could not be reached.
    """
    out = out.resolve()
    if out == Path.cwd() or out.is_file() or not is_empty(out):
        raise UserError(f"--out {out} is the current folder, or holds something already; name a new one")
    try:
        with hub_errors(repo_id, f"cannot pull {repo_id}"):
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
            checkpoint = [name for name in sizes if CHECKPOINT.fullmatch(name)] if with_checkpoints else []
            if with_checkpoints and not checkpoint:
                raise UserError(f"{repo_id} has no checkpoint to resume from; pull without --with_checkpoints")
            wanted = (CARD, PICTURE, EVAL_RESULTS, *RUN_FILES)
            beside = [name for name in sizes if name in wanted or reading.CODE_FILE.fullmatch(name)]
            for name in beside:
                if sizes[name] > MAX_CARD_BYTES:
                    limit = f"more than the {MAX_CARD_BYTES:,} it may have"
                    raise UserError(f"{repo_id}: {name} is of {sizes[name]:,} bytes, {limit}")
            beside += [name for name in RESUME_FILES if name in sizes and checkpoint]
            fetch_pipeline(repo_id, index_arguments(MNISTDiffusionPipeline), revision=info.sha)
            names = [*PIPELINE_FILES, *beside, *checkpoint]
            fetched = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=names))
        MNISTDiffusionPipeline.from_pretrained(fetched)
        _put(fetched, names, out, below="pipeline" if with_checkpoints else "")
    except FileError as error:
        raise UserError(f"cannot pull {repo_id}: {error}") from error
    return out


def _put(fetched: Path, names: Sequence[str], out: Path, *, below: str) -> None:
    """Copy what was fetched into `out`, whole or not at all; the pipeline goes to the folder `below` in it."""

    def write(temporary: Path) -> None:
        for name in names:
            of_the_run = name.startswith(f"{CHECKPOINTS}/") or name in (*RUN_FILES, *RESUME_FILES)
            target = temporary / ("" if of_the_run else below) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file_within(fetched, name), target)

    replace_folder(out, write)
