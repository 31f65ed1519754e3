"""What went wrong with the Hub, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token

from mnist_diffusion.config import UserError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
SERVER_ERROR = 500
BY_STATUS = {
    403: "the token may not do this to {repo_id}; use one that may write to it, or propose the change (--create_pr)",
    404: "there is no {repo_id}, or it is private and this token may not see it",
    409: "somebody else changed {repo_id} at the same time; try again",
    412: "somebody else changed {repo_id} at the same time; try again",
    413: "the Hub does not take files as large as these",
    429: "the Hub asks to wait, after too many requests; try again in a few minutes",
}


class HubError(UserError):
    """Something could not be pushed to the Hub or fetched from it."""


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `HubError` that says what to do.

    Args:
        repo_id: the repository.
        doing: what could not be done, such as `push`.
    """
    try:
        yield
    except (OSError, HTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = explain_hub_error(error, repo_id)
        if reason is None:
            raise
        raise HubError(f"cannot {doing} {repo_id}: {reason}") from None  # the client's own may tell more than is meant


def explain_hub_error(error: Exception, repo_id: str) -> str | None:
    """What an error of the Hub's client means and what to do; None where it is not one of the Hub."""
    if isinstance(error, HFValidationError):
        return f"a repository is named user/name, got {repo_id!r}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, LocalTokenNotFoundError):
        return LOG_IN
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repo_id)
    if isinstance(error, LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} cannot be reached, and there is no cached copy"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"{constants.ENDPOINT} cannot be reached, or the connection broke ({type(error).__name__}); try again"
    return None


def _explain_answer(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"it is gated: ask for access at {constants.ENDPOINT}/{repo_id}, and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if status == 401 and get_token() is not None:
        if isinstance(error, RepositoryNotFoundError):
            return BY_STATUS[404].format(repo_id=repo_id)
        return f"the Hub does not know the token that is set; {LOG_IN}"
    if status == 401:
        return f"it is private, or it is not there; {LOG_IN} to see private ones"
    if status >= SERVER_ERROR:
        return f"the Hub has trouble of its own (it answered {status}); try again later"
    said = f"the Hub refused ({status}): {error.server_message or 'without a reason'}"
    return BY_STATUS.get(status, said).format(repo_id=repo_id)
