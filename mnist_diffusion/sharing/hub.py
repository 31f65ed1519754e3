"""Push a pipeline or a run to the Hub, and pull it back.

A push is one commit, so that the repository is what it was before or what was pushed, never a part of it. Named files
are pushed and no others; training state only where it is asked for.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CardData, HfApi, ModelCard, get_token, snapshot_download
from yaml import YAMLError

from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import file_within, replace_folder
from mnist_diffusion.run_folder.checkpoint import newest_intact
from mnist_diffusion.run_folder.lock import RUN_ID, is_empty
from mnist_diffusion.sharing.card import CARD, PICTURE, card_for, short_card
from mnist_diffusion.sharing.commit import commit_files
from mnist_diffusion.sharing.errors import LOG_IN, HubError, hub_errors
from mnist_diffusion.sharing.pipeline import MNISTDiffusionPipeline
from mnist_diffusion.sharing.reading import MAX_CARD_BYTES, fetch_pipeline, fetch_unet, read_unet

CHECKPOINTS, SETTINGS = "checkpoints", "config.yaml"
CHECKPOINT = re.compile(rf"{CHECKPOINTS}/step-\d+/[\w-][\w.-]*")
CODE = "pipeline_mnist_diffusion.py"
OF_A_PIPELINE: tuple[str, ...] = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
OF_A_DENOISER: tuple[str, ...] = ("config.json", "diffusion_pytorch_model.safetensors")
OF_A_RUN = (SETTINGS, "summary.json")
TO_GO_ON = ("metrics.jsonl",)
"""Of a run, beside its checkpoint, where training is to go on from it."""
MADE_BY_A_RUN = ("pipeline", "pipeline_best", "denoiser")
MANAGED = {*OF_A_PIPELINE, *OF_A_DENOISER, *OF_A_RUN, CODE, CARD, PICTURE}
MIRRORED = ("unet/", "scheduler/")
"""What a push does not hold of these and of the managed names is removed from the repository."""


@dataclass(frozen=True)
class Upload:
    """What is pushed: a folder to load, and the run that made it where it is still there.

    Args:
        folder: a pipeline folder, or a denoiser's.
        run: its run folder; None for a folder that stands alone.
        num_classes: of a pipeline; None without classes.
        required: what must be in the folder.
    """

    folder: Path
    run: Path | None
    num_classes: int | None
    required: tuple[str, ...]

    def files(self, repo_id: str, *, with_checkpoints: bool) -> dict[str, Path | bytes]:
        """The files to push, by their names in the repository.

        Raises:
            UserError: there is no checkpoint, or no run.
            FileError: a link leads out of the folder.
        """
        found: dict[str, Path | bytes] = {name: file_within(self.folder, name) for name in self.required}
        beside = [name for name in (PICTURE, *OF_A_RUN) if (self.folder / name).is_file()]
        found |= {name: file_within(self.folder, name) for name in beside}
        if self.run is not None:
            names = (*OF_A_RUN, *(TO_GO_ON if with_checkpoints else ()))
            found |= {name: file_within(self.run, name) for name in names if (self.run / name).is_file()}
        if self.required is OF_A_PIPELINE:
            # Never that of a folder, which may be somebody else's.
            found[CODE] = Path(inspect.getfile(MNISTDiffusionPipeline))
        has_card = (self.folder / CARD).is_file()
        card = file_within(self.folder, CARD).read_text(encoding="utf-8") if has_card else short_card(self.num_classes)
        if has_card or self.required is OF_A_PIPELINE:
            found[CARD] = _named(card_for(card, repo_id), repo_id).encode()
        if with_checkpoints:
            newest = None if self.run is None else newest_intact(self.run / CHECKPOINTS)
            if newest is None:
                raise UserError(f"--with_checkpoints: there is no whole checkpoint to push with {self.folder}")
            found |= {f"{CHECKPOINTS}/{newest.name}/{file.name}": file for file in sorted(newest.iterdir())}
        return found


def find_upload(source: Path) -> Upload:
    """What `source`, a run folder or a folder to load, has to push; it loads, which is tried.

    Raises:
        UserError: there is nothing to push, or it is broken.
    """
    for folder in (source, source / "pipeline", source / "denoiser"):
        if (folder / "model_index.json").is_file() or (folder / OF_A_DENOISER[-1]).is_file():
            break
    else:
        raise UserError(f"{source} is neither a pipeline folder nor a run folder with one")
    num_classes, required = _load(folder)
    return Upload(folder, _run_of(folder.resolve()), num_classes, required)


def _load(folder: Path) -> tuple[int | None, tuple[str, ...]]:
    """Load what is in a folder: its number of classes, and the files that it needs.

    Raises:
        UserError: it does not load.
    """
    try:
        if (folder / "model_index.json").is_file():
            return MNISTDiffusionPipeline.from_pretrained(folder).num_classes, OF_A_PIPELINE
        read_unet(folder)
    except FileError as error:
        raise UserError(str(error)) from error
    return None, OF_A_DENOISER


def _run_of(folder: Path) -> Path | None:
    """The run that made a folder; None where it stands alone."""
    above = folder.parent if folder.name in MADE_BY_A_RUN else folder.parents[1]
    made = folder.name in MADE_BY_A_RUN or folder.parent.name == "snapshots"
    return above if made and any((above / name).exists() for name in (RUN_ID, CHECKPOINTS)) else None


def push(
    source: Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    with_checkpoints: bool = False,
    message: str = "Upload pipeline",
) -> str:
    """Push a run or a folder to load, as one commit.

    Args:
        source: a run folder, a pipeline folder, or a denoiser's.
        repo_id: the repository, `user/name`; made where it is not there.
        private: nobody else may see it. A repository that is public already is refused.
        create_pr: propose the commit as a pull request.
        revision: the branch; made where it is not there.
        with_checkpoints: also the newest checkpoint, to go on training from.
        message: title of the commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UserError: there is nothing to push, or it holds the token.
        HubError: the Hub refused or could not be reached. Nothing has changed there but that the repository may be new.
    """
    parcel = find_upload(source)
    try:
        parcel.files(repo_id, with_checkpoints=with_checkpoints)  # what is wrong is said before anything is made
        repo_id = open_repository(repo_id, private=private, revision=revision, create_pr=create_pr)
        mirrored = (*MIRRORED, f"{CHECKPOINTS}/") if with_checkpoints else MIRRORED
        with hub_errors(repo_id, f"cannot push to {repo_id}"):
            commit = commit_files(
                HfApi(),
                repo_id,
                parcel.files(repo_id, with_checkpoints=with_checkpoints),
                is_stale=lambda name: name in MANAGED or name.startswith(mirrored),
                message=message,
                create_pr=create_pr,
                revision=revision,
            )
    except FileError as error:
        raise UserError(f"cannot push {source}: {error}") from error
    return str(commit.pr_url or commit.commit_url)


def open_repository(repo_id: str, *, private: bool, revision: str | None, create_pr: bool = False) -> str:
    """Make sure that a repository is there and may be pushed to; its whole name, with the account in front.

    Raises:
        HubError: nobody is logged in, the Hub refused, or it is public though `private` is asked for.
    """
    api = HfApi()
    if get_token() is None:
        raise HubError(f"cannot push to {repo_id}: nobody is logged in; {LOG_IN}")
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"cannot push to {repo_id} as private: it is there already, and public; make it private at "
                f"{api.endpoint}/{repo_id}/settings, or name another"
            )
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _named(text: str, repo_id: str) -> str:
    """A card whose measured results, if it has any, are those of a repository.

    Raises:
        FileError: its metadata cannot be read.
    """
    try:
        card = ModelCard(text)
        values = card.data.to_dict()
        if "model-index" not in values:
            return text
        values["model-index"][0]["name"] = repo_id.rsplit("/", 1)[-1]
        card.data = CardData(**values)
        return str(card)
    except (YAMLError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileError(f"the metadata at the top of {CARD} cannot be read: {reason}") from error


def pull(repo_id: str, out: Path, *, revision: str | None = None, with_checkpoints: bool = False) -> Path:
    """Fetch a pipeline, or a run to go on training, running nothing of it.

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
            required = OF_A_DENOISER if "model_index.json" not in sizes and OF_A_DENOISER[0] in sizes else OF_A_PIPELINE
            checkpoint = [name for name in sizes if CHECKPOINT.fullmatch(name)] if with_checkpoints else []
            if with_checkpoints and not checkpoint:
                raise UserError(f"{repo_id} has no checkpoint to go on from; pull without --with_checkpoints")
            beside = [name for name in (CARD, PICTURE, CODE, *OF_A_RUN) if name in sizes]
            for name in beside:
                if sizes[name] > MAX_CARD_BYTES:
                    limit = f"more than the {MAX_CARD_BYTES:,} it may have"
                    raise UserError(f"{repo_id}: {name} is of {sizes[name]:,} bytes, {limit}")
            beside += [name for name in TO_GO_ON if name in sizes and checkpoint]
            if required is OF_A_PIPELINE:
                fetch_pipeline(repo_id, revision=info.sha)
            else:
                fetch_unet(repo_id, revision=info.sha)
            names = [*required, *beside, *checkpoint]
            fetched = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=names))
            kind = "pipeline" if required is OF_A_PIPELINE else "denoiser"
        _load(fetched)
        _put(fetched, names, out, below=kind if with_checkpoints else "")
    except FileError as error:
        raise UserError(f"cannot pull {repo_id}: {error}") from error
    return out


def _put(fetched: Path, names: Sequence[str], out: Path, *, below: str) -> None:
    """Copy what was fetched into `out`, whole or not at all; what is to load goes `below`, where that is named."""

    def write(temporary: Path) -> None:
        for name in names:
            of_the_run = name.startswith(f"{CHECKPOINTS}/") or name in (*OF_A_RUN, *TO_GO_ON)
            target = temporary / ("" if of_the_run else below) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file_within(fetched, name), target)

    replace_folder(out, write)
