"""Put files into a Hub repository as one commit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from mnist_diffusion.errors import FileError
from mnist_diffusion.files import open_file, read_bytes
from mnist_diffusion.run_folder.metrics import MAX_LOG_BYTES
from mnist_diffusion.sharing.reading import CODE_FILE, MAX_HEADER_BYTES

CHANGED_MEANWHILE = 412  # HTTP: the head is not the parent any more


def commit_files(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    mirrored: Collection[str],
    message: str,
    *,
    create_pr: bool = False,
    revision: str | None = None,
    repo_type: str = "model",
) -> str:
    """Put files into a repository as one commit on top of what is there, and remove what is left over.

    Args:
        api: the Hub's client.
        repo_id: the repository, `user/name`.
        files: paths or contents by name.
        mirrored: names, and folders that end in a slash: what is there of these and not among `files` is removed, as is
            older pipeline code.
        message: title of the commit.
        create_pr: propose the commit instead.
        revision: the branch.
        repo_type: `model` or `space`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: one of the files holds the token.
        OSError: the Hub refused, or could not be reached; nothing has changed there.
    """
    token = (api.token if isinstance(api.token, str) else get_token() or "").encode()
    for name, content in {**files, "the message": message.encode()}.items():
        read = content if isinstance(content, bytes) else _text_of(content)
        if token and token in read:
            raise FileError(f"{name} holds the Hub token that is used; take it out before it is pushed")
    for attempt in range(2):
        head = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
        there = api.list_repo_files(repo_id, revision=head, repo_type=repo_type)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        stale = [name for name in there if name in mirrored or name.partition("/")[0] + "/" in mirrored]
        stale += [name for name in there if CODE_FILE.fullmatch(name)]
        operations += [CommitOperationDelete(name) for name in stale if name not in files]
        try:
            how: dict[str, Any] = {
                "create_pr": create_pr,
                "revision": revision,
                "parent_commit": None if create_pr else head,
            }
            commit = api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type, **how)
            return str(commit.pr_url or commit.commit_url)
        except HfHubHTTPError as error:
            if error.response.status_code != CHANGED_MEANWHILE or attempt == 1:
                raise
    raise AssertionError("unreachable")


def _text_of(path: Path) -> bytes:
    """What a file says in words: all of it, or the header of safetensors."""
    if path.suffix != ".safetensors":
        return read_bytes(path, MAX_LOG_BYTES)
    with open_file(path) as file:
        return file.read(min(MAX_HEADER_BYTES, int.from_bytes(file.read(8), "little")))
