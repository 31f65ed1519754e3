"""What went wrong with the Hub, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mnist_diffusion.config import UserError

HTTPError: type[Exception] = vars(errors)["HTTPError"]  # of the HTTP client that this version has
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
UNSEEN = "it is not there, or it is private and {who} may not see it"
CONFLICT = "somebody else changed it at the same time; try again"

BY_KIND: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (HFValidationError, "a repository is named user/name, got {repo_id!r}"),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (LocalTokenNotFoundError, LOG_IN),
    (GatedRepoError, f"it is gated: ask for access at {{endpoint}}/{{repo_id}}, and {LOG_IN}"),
    (RevisionNotFoundError, "it has no such revision"),
    (HfHubHTTPError, "{answer}"),
    (LocalEntryNotFoundError, "{endpoint} cannot be reached, and there is no cached copy"),
    ((HTTPError, ConnectionError, TimeoutError), "{endpoint} cannot be reached, or the connection broke; try again"),
)
"""What each kind of error means; the first that fits."""

SERVER_ERROR = 500
BY_STATUS = {
    403: "the token may not write to it; use one that may, or propose the change with --create_pr",
    404: UNSEEN.format(who="this token"),
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
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        # An upload's own errors come wrapped.
        reason = explain_hub_error(error, repo_id) or explain_hub_error(error.__cause__, repo_id)
        if reason is None:
            raise
        raise HubError(f"{what}: {reason}") from None  # the client's own may tell more than is meant


def explain_hub_error(error: BaseException | None, repo_id: str) -> str | None:
    """What an error of the Hub's client means and what to do; None where it is not one of the Hub."""
    answer = _explain_answer(error) if isinstance(error, HfHubHTTPError) else ""
    for kind, text in BY_KIND:
        if isinstance(error, kind):
            return text.format(repo_id=repo_id, endpoint=constants.ENDPOINT, answer=answer)
    return None


def _explain_answer(error: HfHubHTTPError) -> str:
    """What an answer that is no success means."""
    status = error.response.status_code
    if status == 401:
        if get_token() is None:
            return f"{UNSEEN.format(who='nobody without a token')}; {LOG_IN}"
        return BY_STATUS[404] if isinstance(error, RepositoryNotFoundError) else f"the Hub rejects the token; {LOG_IN}"
    if status >= SERVER_ERROR:
        return f"the Hub has trouble of its own (it answered {status}); try again later"
    return BY_STATUS.get(status, f"the Hub refused ({status}): {error.server_message or 'without a reason'}")
