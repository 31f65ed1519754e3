"""Push a pipeline or a run to the Hub in one commit, and pull it back without running any of its code."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from mnist_diffusion.errors import UserError
from mnist_diffusion.files import (
    file_within,
    pipeline_folder,
    read_json,
    read_text,
    read_yaml,
    replace_bytes,
    replace_folder,
    replace_text,
    yaml_text,
)
from mnist_diffusion.hub_client import hub_errors, open_repository, upload
from mnist_diffusion.pipelines import folder as reading
from mnist_diffusion.pipelines.card import CARD, PICTURE, card_for, local_paths_in, parse_card, redact_paths, short_card
from mnist_diffusion.pipelines.folder import MAX_CARD_BYTES, PIPELINE_FILES, fetch_pipeline
from mnist_diffusion.pipelines.pipeline import CODE, CODE_FILE, CODE_INDEX, MNISTDiffusionPipeline
from mnist_diffusion.training.checkpoint import newest_intact
from mnist_diffusion.training.run_folder import RUN_ID, is_empty

CHECKPOINTS = "checkpoints"
CHECKPOINT_FILE = re.compile(rf"{CHECKPOINTS}/step-\d+/[\w-][\w.-]*")
RUN_FILES, LOG = ("config.yaml", "summary.json"), "metrics.jsonl"
EXPORTS = ("pipeline", "pipeline_best")
STALE = (*RUN_FILES, PICTURE, ".eval_results/evaluation.yaml", "unet/*", "scheduler/*", f"{reading.CODE_STEM}*.py")
"""Files that a push removes from the repository unless it replaces them; version 0.2.0 pushed the YAML file."""


def stage(folder: Path, staged: Path, repo_id: str, *, with_checkpoints: bool, license: str | None) -> None:
    """Copy the files to push from a pipeline folder and from its run, without local paths.

    Raises:
        UserError: the folder does not load, a link leads out of it, a file could not be read, or there is no
            checkpoint.
    """
    pipeline, run = MNISTDiffusionPipeline.from_pretrained(folder), _run_of(folder.resolve())
    files = {name: file_within(folder, name) for name in PIPELINE_FILES}
    files |= {name: file_within(folder, name) for name in (PICTURE, *RUN_FILES) if (folder / name).is_file()}
    if run is not None:
        names = (*RUN_FILES, LOG) if with_checkpoints else RUN_FILES
        files |= {name: file_within(run, name) for name in names if (run / name).is_file()}
    if with_checkpoints:
        newest = None if run is None else newest_intact(run / CHECKPOINTS)
        if newest is None:
            raise UserError(f"--with_checkpoints: there is no valid checkpoint to push with {folder}")
        files |= {f"{CHECKPOINTS}/{newest.name}/{file.name}": file for file in sorted(newest.iterdir())}
    for name, file in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, staged / name)
    # Never the code in a folder, which may be somebody else's.
    replace_bytes(staged / CODE_FILE, CODE)
    index = {**read_json(staged / "model_index.json"), "_class_name": CODE_INDEX}
    replace_text(staged / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    paths: list[str] = []
    if (config_file := staged / "config.yaml").is_file():
        paths = local_paths_in(config := read_yaml(config_file))
        replace_text(config_file, redact_paths(yaml_text(config, width=10**6), paths))
    if (summary_file := staged / "summary.json").is_file():
        text = json.dumps(read_json(summary_file), indent=1, ensure_ascii=False) + "\n"
        replace_text(summary_file, redact_paths(text, paths))
    card = read_text(file_within(folder, CARD)) if (folder / CARD).is_file() else short_card(pipeline.num_classes)
    replace_text(staged / CARD, _with_repo_metadata(redact_paths(card_for(card, repo_id), paths), repo_id, license))


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
    """Push a run or a pipeline folder as one commit.

    Args:
        source: a run folder or a pipeline folder.
        repo_id: the repository, `user/name`; created if missing.
        private: create it as a private repository; an existing public one is an error.
        create_pr: open a pull request instead of committing to the branch.
        revision: the branch; created if missing.
        with_checkpoints: also push the newest checkpoint, to resume training from.
        message: title of the commit.
        license: licence of the model, by the Hub's short name such as `mit`; None keeps the card's.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UserError: there is nothing to push, or it holds the token.
        HubError: the Hub rejected the request or could not be reached. At most an empty repository has been created.
    """
    stale = (*STALE, f"{CHECKPOINTS}/*") if with_checkpoints else STALE
    if not ((folder := pipeline_folder(source)) / "model_index.json").is_file():
        raise UserError(f"{source} is neither a pipeline folder nor a run folder with one")
    with tempfile.TemporaryDirectory() as temporary:  # staged first, so that errors come early
        stage(folder, staged := Path(temporary), repo_id, with_checkpoints=with_checkpoints, license=license)
        repo_id = open_repository(repo_id, private=private, revision=revision, create_pr=create_pr)
        replace_text(staged / CARD, card_for(read_text(staged / CARD), repo_id))  # by its full name
        with hub_errors(repo_id, f"cannot push to {repo_id}"):
            return upload(staged, repo_id, message=message, stale=stale, create_pr=create_pr, revision=revision)


def _with_repo_metadata(text: str, repo_id: str, license: str | None) -> str:
    """A card with the licence, if one is given, whose evaluation results are named after the repository.

    Raises:
        FileError: its metadata could not be read.
    """
    card, changes = parse_card(text), {} if license is None else {"license": license}
    if card.data.get("eval_results") is not None:
        changes["model_name"] = repo_id.rsplit("/", 1)[-1]
    vars(card.data).update(changes)
    return str(card) if changes else text


def pull(repo_id: str, out: Path, *, revision: str | None = None, with_checkpoints: bool = False) -> Path:
    """Download a pipeline, or a run to resume, without running any of its code.

    Args:
        repo_id: the repository, `user/name`.
        out: the output folder, which must be empty or missing.
        revision: branch, tag or commit.
        with_checkpoints: also download the checkpoint; `out` is then a run folder with the pipeline in `out/pipeline`.

    Returns:
        `out`.

    Raises:
        UserError: `out` is not empty, or the repository has no valid pipeline or checkpoint.
        HubError: the Hub rejected the request or could not be reached.
    """
    out = out.resolve()
    if out == Path.cwd() or out.is_file() or not is_empty(out):
        raise UserError(f"--out {out} is the current folder, or is not empty; name a new one")
    with hub_errors(repo_id, f"cannot pull {repo_id}"):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        checkpoint = [name for name in sizes if CHECKPOINT_FILE.fullmatch(name)] if with_checkpoints else []
        if with_checkpoints and not checkpoint:
            raise UserError(f"{repo_id} has no checkpoint to resume from; pull without --with_checkpoints")
        known = (CARD, PICTURE, *RUN_FILES)
        others = [name for name in sizes if name in known or reading.CODE_FILE.fullmatch(name)]
        for name in others:
            if sizes[name] > MAX_CARD_BYTES:
                raise UserError(f"{repo_id}: {name} has {sizes[name]:,} bytes, more than {MAX_CARD_BYTES:,}")
        others += [LOG] if checkpoint and LOG in sizes else []
        fetch_pipeline(repo_id, revision=info.sha)
        names = [*PIPELINE_FILES, *others, *checkpoint]
        fetched = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=names))
    MNISTDiffusionPipeline.from_pretrained(fetched)

    def copy(temporary: Path) -> None:
        for name in names:
            of_the_run = name.startswith(f"{CHECKPOINTS}/") or name in (*RUN_FILES, LOG)
            target = temporary / ("pipeline" if with_checkpoints and not of_the_run else "") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file_within(fetched, name), target)

    replace_folder(out, copy)
    return out
