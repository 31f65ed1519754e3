"""Push a pipeline or a run to the Hub, and pull it back.

A push is one commit, so that the repository is what it was before or what was pushed, never a part of it. Named files
are pushed and no others; training state only where it is asked for.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import (
    CardData,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    snapshot_download,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from mnist_diffusion.checkpoint import newest_intact
from mnist_diffusion.config import HubConfig, UserError
from mnist_diffusion.export import swap_in
from mnist_diffusion.folder import is_empty
from mnist_diffusion.hub_errors import LOG_IN, HubError, hub_errors
from mnist_diffusion.pipelines.pipeline_mnist_diffusion import (
    ANYWHERE,
    CARD,
    MAX_CARD_BYTES,
    PICTURE,
    MNISTDiffusionPipeline,
    PipelineFolderError,
    fetch_pipeline,
    file_within,
    read_unet,
)

CHECKPOINTS, SETTINGS = "checkpoints", "config.yaml"
OF_A_PIPELINE: tuple[str, ...] = (
    "model_index.json",
    "pipeline_mnist_diffusion.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
OF_A_DENOISER: tuple[str, ...] = ("config.json", "diffusion_pytorch_model.safetensors")
BESIDE = (CARD, PICTURE)
OF_A_RUN = (SETTINGS, "summary.json")
TO_GO_ON = ("metrics.jsonl",)
"""Of a run, beside its checkpoint, where training is to go on from it."""
MIRRORED = ("unet/", "scheduler/")
"""What of these is on the Hub but not in a push is removed by it."""


@dataclass(frozen=True)
class Parcel:
    """What is pushed: a folder to load, and the run that made it where it is still there.

    Args:
        folder: a pipeline folder, or a denoiser's.
        run: its run folder; None for a folder that stands alone.
        required: what must be in the folder.
    """

    folder: Path
    run: Path | None
    required: tuple[str, ...]

    def files(self, *, with_checkpoints: bool) -> dict[str, Path]:
        """The files to push, by their names in the repository.

        Raises:
            UserError: there is no checkpoint, or no run.
        """
        found = {name: file_within(self.folder, name) for name in self.required}
        found |= {name: self.folder / name for name in BESIDE if (self.folder / name).is_file()}
        names = (*OF_A_RUN, *(TO_GO_ON if with_checkpoints else ()))
        if self.run is not None:
            found |= {name: self.run / name for name in names if (self.run / name).is_file()}
        if with_checkpoints:
            newest = None if self.run is None else newest_intact(self.run / CHECKPOINTS)
            if newest is None:
                raise UserError(f"--with_checkpoints: there is no whole checkpoint to push with {self.folder}")
            found |= {f"{CHECKPOINTS}/{newest.name}/{file.name}": file for file in sorted(newest.iterdir())}
        return found


def find_parcel(source: Path) -> Parcel:
    """What `source`, a run folder or a folder to load, has to push; it loads, which is tried.

    Raises:
        UserError: there is nothing to push, or it is broken.
    """
    for folder in (source, source / "pipeline", source / "denoiser"):
        if (folder / "model_index.json").is_file() or (folder / OF_A_DENOISER[-1]).is_file():
            break
    else:
        raise UserError(f"{source} is neither a pipeline folder nor a run folder with one")
    try:
        if (folder / "model_index.json").is_file():
            MNISTDiffusionPipeline.from_pretrained(folder)
            required = OF_A_PIPELINE
        else:
            read_unet(folder)
            required = OF_A_DENOISER
        for name in required:
            file_within(folder, name)
    except PipelineFolderError as error:
        raise UserError(f"{folder} cannot be pushed: {error}") from error
    above = [parent for parent in folder.resolve().parents[:2] if (parent / SETTINGS).is_file()]
    return Parcel(folder, above[0] if above else None, required)


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
    parcel = find_parcel(source)
    files = parcel.files(with_checkpoints=with_checkpoints)
    api = open_repository(repo_id, private=private, revision=revision, create_pr=create_pr)
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        there = api.list_repo_files(repo_id, revision=revision)
        mirrored = (*MIRRORED, f"{CHECKPOINTS}/") if with_checkpoints else MIRRORED
        stale = [name for name in there if name.startswith(mirrored) and name not in files]
        added = [
            CommitOperationAdd(name, _card(path, repo_id) if name == CARD else str(path))
            for name, path in files.items()
        ]
        _require_no_token(files)
        commit = api.create_commit(
            repo_id,
            [*added, *(CommitOperationDelete(name) for name in stale)],
            commit_message=message,
            create_pr=create_pr,
            revision=revision,
        )
    return str(commit.pr_url or commit.commit_url)


def open_repository(repo_id: str, *, private: bool, revision: str | None, create_pr: bool = False) -> HfApi:
    """Make sure that a repository is there and may be pushed to.

    Raises:
        HubError: nobody is logged in, the Hub refused, or it is public though `private` is asked for.
    """
    api = HfApi()
    if get_token() is None:
        raise HubError(f"cannot push to {repo_id}: nobody is logged in; {LOG_IN}")
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise HubError(
                f"cannot push to {repo_id} as private: it is there already, and public; make it private at "
                f"{api.endpoint}/{repo_id}/settings, or name another"
            )
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api


def whole_name(repo_id: str | None, folder_name: str) -> str:
    """`repo_id`, or the account that is logged in with the name of a folder.

    Raises:
        HubError: nobody is logged in.
    """
    if repo_id is not None:
        return repo_id
    if get_token() is None:
        raise HubError(f"cannot push {folder_name}: nobody is logged in; {LOG_IN}")
    with hub_errors(folder_name, f"cannot push {folder_name}"):
        return f"{HfApi().whoami()['name']}/{folder_name}"


def _card(path: Path, repo_id: str) -> bytes:
    """The card as it reads in a repository."""
    card = ModelCard(path.read_text(encoding="utf-8").replace(ANYWHERE, repo_id))
    values = card.data.to_dict()
    if "model-index" in values:
        values["model-index"][0]["name"] = repo_id.rsplit("/", 1)[-1]
    card.data = CardData(**values)
    return str(card).encode()


def _require_no_token(files: dict[str, Path]) -> None:
    """The token is in nothing that is pushed, as it would be if it stood in a path or a name.

    Raises:
        UserError: it is.
    """
    token = (get_token() or "").encode()
    for name, path in files.items():
        if token and path.suffix != ".safetensors" and token in path.read_bytes():
            raise UserError(f"{name} holds the Hub token that is logged in with; take it out before anything is pushed")


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
    if out.is_file() or not is_empty(out):
        raise UserError(f"--out {out} holds something already; name another folder")
    with hub_errors(repo_id, f"cannot pull {repo_id}"):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        required = OF_A_DENOISER if "model_index.json" not in sizes and OF_A_DENOISER[0] in sizes else OF_A_PIPELINE
        checkpoint = _checkpoint_names(sizes) if with_checkpoints else []
        if with_checkpoints and not checkpoint:
            raise UserError(f"{repo_id} has no checkpoint to go on from; pull without --with_checkpoints")
        beside = [name for name in (*BESIDE, *OF_A_RUN, *TO_GO_ON, OF_A_PIPELINE[1]) if name in sizes]
        for name in beside:
            if sizes[name] > MAX_CARD_BYTES and name not in TO_GO_ON:
                raise UserError(
                    f"{repo_id}: {name} is of {sizes[name]:,} bytes, more than the {MAX_CARD_BYTES:,} allowed"
                )
        try:
            if required is OF_A_PIPELINE:
                fetch_pipeline(repo_id, revision=info.sha)
            names = [*(name for name in required if name in sizes), *beside, *checkpoint]
            fetched = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=names))
            kind = "pipeline" if required is OF_A_PIPELINE else "denoiser"
            _put(fetched, names, out, below=kind if with_checkpoints else "")
        except PipelineFolderError as error:
            raise UserError(f"cannot pull {repo_id}: {error}") from error
    return out


def _checkpoint_names(names: Sequence[str] | dict[str, int]) -> list[str]:
    return [name for name in names if name.startswith(f"{CHECKPOINTS}/")]


def _put(fetched: Path, names: Sequence[str], out: Path, *, below: str) -> None:
    """Copy what was fetched into `out`, whole or not at all; what is to load goes `below`, where that is named."""

    def write(temporary: Path) -> None:
        for name in names:
            of_the_run = name.startswith(f"{CHECKPOINTS}/") or name in (*OF_A_RUN, *TO_GO_ON)
            target = temporary / ("" if of_the_run else below) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file_within(fetched, name), target)
        find_parcel(temporary)

    swap_in(out, write)


class Publisher:
    """Pushes a run's snapshots while it goes on, and its pipeline when it has ended; nothing where none is asked for.

    Args:
        config: where to and what.
        folder: the run folder.
        accelerator: its main process pushes; all learn of what is wrong.

    Raises:
        HubError: nobody is logged in, or the Hub refuses. Training has not begun then.
    """

    def __init__(self, config: HubConfig, folder: Path, accelerator: Accelerator):
        self.config, self.folder = config, folder
        self.main = config.push and accelerator.is_main_process
        self.repo_id, problem = "", None
        if self.main:
            try:
                self.repo_id = whole_name(config.repo_id, folder.name)
                open_repository(self.repo_id, private=config.private, revision=config.revision)
            except HubError as error:
                problem = str(error)
        [problem] = broadcast_object_list([problem])
        if problem is not None:
            raise HubError(problem)
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="push")
        self.last: Future[None] | None = None

    def snapshot(self, folder: Path) -> None:
        """Push a snapshot in the background, in place of one that still waits for its turn."""
        if self.main and self.config.every_snapshot:
            disable_progress_bars()
            if self.last is not None:
                self.last.cancel()
            self.last = self.worker.submit(self._push_snapshot, folder)

    def _push_snapshot(self, folder: Path) -> None:
        where: dict[str, Any] = {"private": self.config.private, "revision": self.config.revision}
        try:
            push(folder, self.repo_id, **where, message=f"Upload {folder.name}")
        except Exception as error:  # whatever it is, the run goes on
            print(f"warning: {folder} was not pushed: {error}", file=sys.stderr)

    def finish(self, *, whole: bool) -> None:
        """Push the run after the snapshots that are on their way; where it is not `whole`, say how to do it later.

        Raises:
            HubError: it could not be pushed; the message says how to do it later.
        """
        self.worker.shutdown(wait=True, cancel_futures=not whole)
        if not self.main:
            return
        later = f"mnist-diffusion push {self.folder} {' '.join([self.repo_id, *self._flags()])}"
        if not whole:
            print(f"Not pushed, because the run is not finished; as it is, it can be pushed with: {later}")
            return
        where: dict[str, Any] = {"private": self.config.private, "revision": self.config.revision}
        try:
            address = push(self.folder, self.repo_id, **where, with_checkpoints=self.config.with_checkpoints)
        except UserError as error:
            raise HubError(f"{error}\nThe run is whole in {self.folder}; push it later with: {later}") from None
        print(f"Pushed: {address}")

    def _flags(self) -> Iterator[str]:
        if self.config.private:
            yield "--private"
        if self.config.revision is not None:
            yield f"--revision {self.config.revision}"
        if self.config.with_checkpoints:
            yield "--with_checkpoints"
