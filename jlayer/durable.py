"""What is on the disk when a call returns, and files that one process at a time works on.

Locks are the system's, which gives them back when a process ends in whatever way: so a lock file
that a dead process left behind blocks nobody, and what it says serves messages alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time

from jlayer.strict import close

LOCK = ".jlayer-lock"  # the name of a folder's lock file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNLOCKABLE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
_SIGNED_S = 0.5  # who has a lock signs it a moment later


def room_advice(error: OSError) -> str:
    """What to do where a disk is full; empty for other errors."""
    return "; free some space" if error.errno in FULL else ""


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data`: a full disk or a signal may shorten one write without an error. Raises
    OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def sync_tree(folder: str) -> None:
    """Makes the files in a folder and in those inside durable. Raises OSError."""
    for where, _, names in os.walk(folder):
        for name in names:
            _sync(os.path.join(where, name), os.O_RDONLY)
        sync_folder(where)


def sync_folder(folder: str) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path, flags):
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # folders need no sync on this file system
            raise
    finally:
        close(fd)


def open_lock(path: str) -> int:
    """Opens a lock file, which is made if need be. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def take_lock(fd: int) -> OSError | None:
    """Locks an open file for this process alone; the error of a file system that has no locks,
    which is then to be told of. Raises BlockingIOError where another process has it, or OSError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _UNLOCKABLE:
            raise
        return error
    return None


def is_file_of(fd: int, path: str) -> bool:
    """Whether an open file still has its name: its holder removes a lock file as it leaves. Raises
    OSError."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def sign_lock(fd: int) -> None:
    """Writes who holds a lock. Raises OSError; on a full disk nothing, since the lock is needed to
    make room."""
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        if error.errno not in FULL:
            raise


def lock_holder(fd: int) -> str:
    """Who holds a lock, in its own words."""
    until = time.monotonic() + _SIGNED_S
    while True:
        try:
            content = os.pread(fd, 200, 0)
        except OSError:
            return "unknown process"
        if content.endswith(b"\n"):
            return ascii(content.decode(errors="replace").strip())[1:-1]
        if time.monotonic() > until:
            return "unknown process"
        time.sleep(0.01)
