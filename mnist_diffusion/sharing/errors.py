"""Explain the Hub client's errors in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors, get_token

from mnist_diffusion.errors import FileError, UserError

HTTPError: type[Exception] = vars(errors)["HTTPError"]  # of the HTTP client that this version has
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
UNSEEN = "it is not there, or it is private and may be seen only {by}"
CONFLICT = "somebody else changed it at the same time; try again"

BY_KIND: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (errors.HFValidationError, "a repository is named user/name, got {repo_id!r}"),
    (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (errors.LocalTokenNotFoundError, LOG_IN),
    (errors.GatedRepoError, f"it is gated: ask for access at {{endpoint}}/{{repo_id}}, and {LOG_IN}"),
    (errors.RevisionNotFoundError, "it has no such revision"),
    (errors.RemoteEntryNotFoundError, "a file that is needed is not there: {error}"),
    (errors.HfHubHTTPError, "{answer}"),
    (errors.LocalEntryNotFoundError, "{endpoint} cannot be reached, and there is no cached copy"),
    ((HTTPError, ConnectionError, TimeoutError), "{endpoint} cannot be reached, or the connection broke; try again"),
    (ValueError, "the Hub's answer, or what it was asked, is not right: {error}"),
)
"""What each kind of error means; the first that fits."""

SERVER_ERROR = 500
BY_STATUS = {
    403: "the token may not do this; to push, use one that may write to it, or propose the change with --create_pr",
    404: UNSEEN.format(by="with another token"),
    409: CONFLICT,
    412: CONFLICT,
    413: "the Hub does not take files as large as these",
    429: "the Hub asks to wait, after too many requests; try again in a few minutes",
}


class HubError(UserError):
    """Something could not be pushed to the Hub or fetched from it."""


@contextmanager
def hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `HubError` that says what to do.

    Args:
        repo_id: the repository.
        what: what failed, which begins the message.
    """
    try:
        yield
    except (UserError, FileError):
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        # An upload's own errors come wrapped.
        reason = explain_hub_error(error, repo_id) or explain_hub_error(error.__cause__, repo_id)
        if reason is None:
            raise
        raise HubError(f"{what}: {reason}") from None  # the client's own may tell more than is meant


def explain_hub_error(error: BaseException | None, repo_id: str) -> str | None:
    """What an error of the Hub's client means and what to do; None if it is not one of the Hub."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # it was asked for first
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and there is no cached copy"
    answer = _explain_answer(error) if isinstance(error, errors.HfHubHTTPError) else ""
    said = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    for kind, text in BY_KIND:
        if isinstance(error, kind):
            return text.format(repo_id=repo_id, endpoint=constants.ENDPOINT, answer=answer, error=said)
    return None


def _explain_answer(error: errors.HfHubHTTPError) -> str:
    """What an answer that is no success means."""
    status = error.response.status_code
    if status == 401:
        if get_token() is None:
            return f"{UNSEEN.format(by='with a token')}; {LOG_IN}"
        unseen = isinstance(error, errors.RepositoryNotFoundError)
        return BY_STATUS[404] if unseen else f"the Hub rejects the token; {LOG_IN}"
    if status >= SERVER_ERROR:
        return f"the Hub has trouble of its own (it answered {status}); try again later"
    reason = f" ({error.server_message})" if error.server_message else ""
    return BY_STATUS.get(status, f"the Hub refused with status {status}") + reason
