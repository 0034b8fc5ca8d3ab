"""The errors of huggingface_hub as errors of ours: one line, and what to do."""

from __future__ import annotations

import errno

from jlayer.errors import DoesNotFitError, JlayerError, NetworkError, StorageError

_STAYS = "what is fetched stays"


class UnreachableError(NetworkError):
    """The hub did not answer (as opposed to a refusal)."""


class AbsentError(NetworkError):
    """The repository has no such file."""


def translated(
    error: Exception, name: str, *, ref: str, repo: str, revision: str, endpoint: str
) -> JlayerError:
    """What went wrong when `name` of a repository was asked for, as an error of ours."""
    from huggingface_hub import errors as hub

    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)

    def first(kind):
        return next((each for each in chain if isinstance(each, kind)), None)

    if first(hub.GatedRepoError):
        return NetworkError(f"{ref}: gated: ask for access on {endpoint}/{repo}, and set HF_TOKEN")
    if first(hub.RevisionNotFoundError):
        return NetworkError(f"{ref}: no revision {revision!r} on {endpoint}")
    if first(hub.RemoteEntryNotFoundError):
        return AbsentError(f"{ref}: no {name} on {endpoint}; not a model that jlayer reads")
    response = getattr(first(hub.HfHubHTTPError), "response", None)
    status = response.status_code if response is not None else None
    if first(hub.RepositoryNotFoundError) and status != 403:
        return NetworkError(
            f"{ref}: no such folder here, and no such model on {endpoint} ({status}), or a "
            "private one; check the name, or set HF_TOKEN"
        )
    if status in (401, 403):
        return NetworkError(
            f"{ref}: {endpoint} denies access to {name} ({status}); set HF_TOKEN to one that "
            "may read it"
        )
    if status == 429:
        return NetworkError(
            f"{ref}: {endpoint} limits how often it is asked (429); wait some minutes, or set "
            f"HF_TOKEN; {_STAYS}"
        )
    if status is not None:
        return NetworkError(f"{ref}: {endpoint} fails ({status}); try again later; {_STAYS}")
    system = first(OSError)
    if system is not None and system.errno is not None and not first(hub.HTTPError):
        if system.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DoesNotFitError(f"{ref}: no room to go on in the cache; {_STAYS}")
        return StorageError(f"{ref}: {name} cannot be written ({system.strerror}); {_STAYS}")
    return UnreachableError(
        f"{ref}: {endpoint} cannot be reached, or {name} was cut off; look after the network "
        f"and run the same command again; {_STAYS}"
    )
