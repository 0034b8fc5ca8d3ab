"""Which process has a file open or mapped, as /proc says.

Without root it tells of one's own processes alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence


def user_of(paths: Collection[str], folders: Sequence[str]) -> tuple[int, str] | None:
    """(process id, path) of a process that uses one of these files, or one in these folders; None
    where none is known to. Paths without links. This process does not count."""
    inside = tuple(folder + os.sep for folder in folders)
    for pid in _processes():
        for path in _files_of(pid):
            if path in paths or path.startswith(inside):
                return pid, path
    return None


def _processes():
    with contextlib.suppress(OSError):  # a system without /proc
        own = os.getpid()
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != own]
    return []


def _files_of(pid) -> Iterator[str]:
    """The files that a process has open, and those that it has mapped. It may end meanwhile."""
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                yield os.readlink(os.path.join(folder, name))
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="surrogateescape") as maps:
        for line in maps:
            _, _, path = line.partition("/")
            if path:
                yield f"/{path.rstrip(chr(10))}"
