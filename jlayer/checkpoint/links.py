"""Which links a folder's files may be: those that stay inside, or what the user allows.

What is found behind a link is for others to check.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jlayer.checkpoint.agree import listed
from jlayer.errors import CheckpointError
from jlayer.strict import resolve

_TAKEN: ContextVar[list[tuple[str, str]] | None] = ContextVar("taken_links", default=None)


@contextmanager
def links_followed(*, wanted: bool = True) -> Iterator[list[tuple[str, str]]]:
    """Lets `real_path` follow links that lead outside a folder, where that is `wanted`; yields the
    list of those that it followed, each with where it leads.

    A user allows this for a whole command, so it is not handed from reader to reader.
    """
    taken: list[tuple[str, str]] = []
    token = _TAKEN.set(taken if wanted else None)
    try:
        yield taken
    finally:
        _TAKEN.reset(token)


def real_path(folder: str, path: str) -> str:
    """The path without links of something in the folder; links in a hub cache lead to its blobs.

    Raises CheckpointError where it leads outside and `links_followed` does not allow it, or
    StorageError.
    """
    real, home = resolve(path), resolve(folder)
    if any(real.startswith(root + os.sep) for root in (home, *_blobs(home))):
        return real
    taken = _TAKEN.get()
    if taken is None:
        found = f"{path}: a link that leads outside the folder, to {real}; put the file there"
        raise CheckpointError(
            f"{found}, or allow it with follow_links=True",
            command_line=f"{found}, or allow it with --follow-links",
        )
    taken.append((path, real))
    return real


def links_note(folder: str, taken: list[tuple[str, str]]) -> list[str]:
    """A note that names the links that were followed; `taken` has each as often as it was."""
    links = sorted(f"{os.path.relpath(path, folder)} to {real}" for path, real in set(taken))
    return [f"{folder}: links followed outside the folder: {listed(links)}"] if links else []


def _blobs(home):
    """Where the files of a hub cache lie: snapshots/REVISION/NAME links to ../../blobs/HASH, which
    may be a link itself, to a store that all models of the cache share."""
    repository, found, _ = home.rpartition(f"{os.sep}snapshots{os.sep}")
    if not found:
        return []
    cache, name = os.path.split(repository)
    shared = [os.path.join(cache, "blobs")] if name.startswith("models--") else []
    return [os.path.join(repository, "blobs"), *shared]
