"""The Hub's client: uploads as one commit, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token

from mnist_diffusion.errors import FileError, UserError
from mnist_diffusion.files import read_bytes

HTTPError: type[Exception] = vars(errors)["HTTPError"]  # of the HTTP client that this version has
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
NOT_FOUND = "repository not found, or private"
CONFLICT = "somebody else changed it at the same time; try again"
SERVER_ERROR = 500
BY_STATUS = {
    403: "the token may not do this; to push, use one with write access, or propose the change with --create_pr",
    404: f"{NOT_FOUND} (use another token)",
    409: CONFLICT,
    412: CONFLICT,
    413: "the Hub does not accept files as large as these",
    429: "too many requests; try again in a few minutes",
}
BY_KIND: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (errors.HFValidationError, "a repository is named user/name, got {repo_id!r}"),
    (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (errors.LocalTokenNotFoundError, LOG_IN),
    (errors.GatedRepoError, f"it is gated: ask for access at {{endpoint}}/{{repo_id}}, and {LOG_IN}"),
    (errors.RevisionNotFoundError, "no such revision"),
    (errors.RemoteEntryNotFoundError, "a file is missing: {error}"),
    (errors.HfHubHTTPError, "{answer}"),
    (errors.LocalEntryNotFoundError, "{endpoint} cannot be reached, and there is no cached copy"),
    ((HTTPError, ConnectionError, TimeoutError), "{endpoint} cannot be reached, or the connection broke; try again"),
    (ValueError, "the Hub rejected the request, or its answer is invalid: {error}"),
)
"""The meaning of each kind of error; the first that fits."""


class HubError(UserError):
    """Something could not be pushed to the Hub or fetched from it."""


@contextmanager
def hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Turn the Hub client's exceptions into a `HubError` that starts with `what` and says what to do."""
    try:
        yield
    except UserError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        # Errors of an upload come wrapped.
        reason = explain_hub_error(error, repo_id) or explain_hub_error(error.__cause__, repo_id)
        if reason is None:
            raise
        raise HubError(f"{what}: {reason}") from None  # the client's own message may hold more than intended


def explain_hub_error(error: BaseException | None, repo_id: str) -> str | None:
    """What an exception of the Hub's client means and what to do; None if it is not one."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the Hub was asked first
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and there is no cached copy"
    answer = _explain_answer(error) if isinstance(error, errors.HfHubHTTPError) else ""
    last_line = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    for kind, text in BY_KIND:
        if isinstance(error, kind):
            return text.format(repo_id=repo_id, endpoint=constants.ENDPOINT, answer=answer, error=last_line)
    return None


def _explain_answer(error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        if get_token() is None:
            return f"{NOT_FOUND}; {LOG_IN}"
        private = isinstance(error, errors.RepositoryNotFoundError)
        return BY_STATUS[404] if private else f"the Hub rejects the token; {LOG_IN}"
    if status >= SERVER_ERROR:
        return f"the Hub has a problem (status {status}); try again later"
    reason = f" ({error.server_message})" if error.server_message else ""
    return BY_STATUS.get(status, f"the Hub rejected the request with status {status}") + reason


def require_login(repo_id: str) -> None:
    """Raise a `HubError` if nobody is logged in; pushing to the repository needs it."""
    if get_token() is None:
        raise HubError(f"cannot push to {repo_id}: nobody is logged in; {LOG_IN}")


def open_repository(
    repo_id: str, *, private: bool, revision: str | None = None, create_pr: bool = False, space_sdk: str | None = None
) -> str:
    """Create a repository if it is missing (a Space if `space_sdk` is set), and return its full name.

    Raises:
        HubError: not logged in, the Hub rejected the request, or the repository is public but `private` is set.
    """
    require_login(repo_id)
    api, kind = HfApi(), "model" if space_sdk is None else "space"
    with hub_errors(repo_id, f"cannot push to {repo_id}"):
        created = api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=kind, space_sdk=space_sdk)
        repo_id = created.repo_id
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            settings = f"{api.endpoint}/{repo_id}/settings"
            raise HubError(f"cannot push to {repo_id} as private: it is public; change that at {settings}")
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def upload(
    folder: Path, repo_id: str, *, message: str, stale: Sequence[str], api: HfApi | None = None, **how: Any
) -> str:
    """Upload a folder as one commit, and delete what is left over from earlier ones.

    Args:
        folder: the staged files.
        repo_id: the repository, which exists.
        message: title of the commit.
        stale: patterns of files to delete from the repository unless they are in the folder.
        api: the client; a fresh one if None.
        how: `revision`, `create_pr`, `repo_type` of `HfApi.upload_folder`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        FileError: a file holds the Hub token.
        OSError: the Hub rejected the request or could not be reached, or somebody else pushed meanwhile; nothing was
            uploaded.
    """
    api = api or HfApi()
    # Named, so that a push by somebody else in the meantime is an error, and not a mixture of two models.
    parent = api.repo_info(repo_id, repo_type=how.get("repo_type"), revision=how.get("revision")).sha
    token = (api.token if isinstance(api.token, str) else get_token() or "").encode()
    for path in sorted(folder.rglob("*")) if token else ():
        if path.is_file() and token in read_bytes(path, path.stat().st_size):
            raise FileError(f"{path.relative_to(folder)} holds the Hub token; remove it before pushing")
    if token and token in message.encode():
        raise FileError("the commit message holds the Hub token; remove it before pushing")
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        delete_patterns=list(stale),
        parent_commit=parent,
        **how,
    )
    return str(commit.pr_url or commit.commit_url)
