"""One converter at a time on a target: flock on a file in it.

The system releases the lock when the process ends, in whatever way. So a lock file that a dead
process left behind blocks nobody; its content only serves messages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable

from jlayer.convert.target.disk import FULL, failure, make_folders, remove, uninterrupted
from jlayer.errors import JlayerError, LockedError
from jlayer.strict import close

LOCK = ".jlayer-lock"
# The errors of file systems without such locks.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class TargetLock:
    """Locks a target folder, which it makes if need be. A context manager.

    At the end it removes the lock file, and the folders that it made and that are still empty.
    Raises LockedError where another process holds the lock, DoesNotFitError or StorageError.
    """

    def __init__(self, folder: str, *, note: Callable[[str], None]):
        self.folder = folder
        self._path = os.path.join(folder, LOCK)
        self._note = note
        self._made: list[str] = []
        self._fd = -1

    def __enter__(self) -> TargetLock:
        try:
            while not self._take():
                pass
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            remove(self._path)  # while locked: who opens it from now on makes a new file
        finally:
            close(self._fd)
            self._remove_made()

    def _take(self) -> bool:
        """Tries to take the lock; False where its holder has just removed the file."""
        self._made += make_folders(self.folder)
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise failure(self._path, error, "written") from None
        try:
            self._lock(fd)
        except BaseException:
            close(fd)
            raise
        try:
            if self._is_in_place(fd):
                self._sign(fd)
                self._fd = fd
                return True
        except BaseException:
            with contextlib.suppress(JlayerError):  # the first error is the one to report
                remove(self._path)
            close(fd)
            raise
        close(fd)
        return False

    def _lock(self, fd):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{self.folder}: another converter is at work on it ({_holder(fd)}); wait until it "
                "is done, or stop it and run the same command again"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise failure(self._path, error, "locked") from None
            self._note(
                f"{self.folder}: its file system has no locks ({error.strerror}); "
                "see that no other converter works on it"
            )

    def _is_in_place(self, fd):
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(fd))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise failure(self._path, error, "looked at") from None

    def _sign(self, fd):
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            if error.errno not in FULL:  # on a full disk the lock is needed to clean up
                raise failure(self._path, error, "written") from None

    def _remove_made(self):
        for folder in reversed(self._made):
            try:
                uninterrupted(os.rmdir, folder)
            except OSError:  # not empty, and so are all above it
                return


def _holder(fd):
    """The holder of the lock, in its own words, which it writes a moment after it has the lock."""
    for _ in range(50):
        try:
            content = os.pread(fd, 200, 0)
        except OSError:
            break
        if content.endswith(b"\n"):
            return ascii(content.decode(errors="replace").strip())[1:-1]
        time.sleep(0.01)
    return "unknown process"
