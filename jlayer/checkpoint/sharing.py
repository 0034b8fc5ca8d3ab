"""The store of blobs that all models of a hub cache share: which of it only some blobs use.

`CACHE/blobs/XX/HASH` is a file that blobs of models link to. It is removed under the lock that the
hub's library takes to link to it, and only where no link in the whole cache leads there any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Collection, Iterator, Sequence

from jlayer.checkpoint.cache import BLOBS
from jlayer.strict import close

_MARK = ".huggingface-shared-blobs"
_ENTRY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def unused_with(cache: str, blobs: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what only these blobs use of the store, what others use as well)."""
    mine = {target for blob in blobs if (target := _target(cache, blob))}
    if not mine:
        return (), ()
    others = {target for blob, target in _links(cache) if blob not in blobs}
    return tuple(sorted(mine - others)), tuple(sorted(mine & others))


def release(cache: str, path: str, blobs: Collection[str]) -> None:
    """Removes a file of the store, unless others than these blobs have come to use it. Raises
    OSError."""
    fd = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if any(target == path and blob not in blobs for blob, target in _links(cache)):
            return
        for name in (path, f"{path}.refs"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    finally:
        close(fd)


def _links(cache) -> Iterator[tuple[str, str]]:
    """(blob, file of the store that it leads to) of everything in the cache."""
    for name in os.listdir(cache):
        folder = os.path.join(cache, name, BLOBS)
        if "--" in name and os.path.isdir(folder):
            for blob in os.listdir(folder):
                path = os.path.join(folder, blob)
                if target := _target(cache, path):
                    yield path, target


def _target(cache, blob):
    """The file of the store that a blob leads to; None where it leads to none."""
    store = os.path.join(cache, BLOBS)
    if not os.path.islink(blob) or not os.path.isfile(os.path.join(store, _MARK)):
        return None
    path = os.path.abspath(os.path.join(os.path.dirname(blob), os.readlink(blob)))
    inside = path.startswith(store + os.sep) and _ENTRY.fullmatch(os.path.relpath(path, store))
    return path if inside and os.path.isfile(path) and not os.path.islink(path) else None
