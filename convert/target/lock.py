"""One converter at a time on a target: the system's own lock on a file in it.

The lock goes with the process that holds it, however that ends. So a lock file that is left behind
(by a dead process, on another boot) holds nobody up; what stands in it serves messages alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable

from convert.target.disk import FULL, again, failure, make_folders, remove
from jlayer.errors import JlayerError, LockedError
from jlayer.strict import close

LOCK = ".jlayer-lock"
# What file systems without such locks say.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class TargetLock:
    """Holds a target, making the folder where it is not there. A context.

    Leaves no lock file behind, nor folders that it has made and that are still empty. Raises
    LockedError where another process is at work, DoesNotFitError or StorageError.
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
            remove(self._path)  # while it is held: whoever opens it from now on makes a new one
        finally:
            close(self._fd)
            self._remove_made()

    def _take(self) -> bool:
        """False where the file was removed by its holder just now."""
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
            with contextlib.suppress(JlayerError):  # the error that brought us here is to be told
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
            if error.errno not in FULL:  # on a full disk the lock is what lets us clear up
                raise failure(self._path, error, "written") from None

    def _remove_made(self):
        for folder in reversed(self._made):
            try:
                again(os.rmdir, folder)
            except OSError:  # what has something in it stays, and so does all above it
                return


def _holder(fd):
    """Who holds the lock, as the holder has written it; between the two a moment may pass."""
    for _ in range(50):
        try:
            found = os.pread(fd, 200, 0)
        except OSError:
            break
        if found.endswith(b"\n"):
            return ascii(found.decode(errors="replace").strip())[1:-1]
        time.sleep(0.01)
    return "unknown process"
