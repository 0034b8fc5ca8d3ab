"""One converter at a time on a target: a lock on a file in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from jlayer.convert.target.disk import failure, make_folders, remove, uninterrupted
from jlayer.durable import LOCK, is_file_of, lock_holder, open_lock, sign_lock, take_lock
from jlayer.errors import JlayerError, LockedError
from jlayer.strict import close


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
            fd = open_lock(self._path)
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
            without = take_lock(fd)
        except BlockingIOError:
            raise LockedError(
                f"{self.folder}: another converter is at work on it ({lock_holder(fd)}); wait "
                "until it is done, or stop it and run the same command again"
            ) from None
        except OSError as error:
            raise failure(self._path, error, "locked") from None
        if without is not None:
            self._note(
                f"{self.folder}: its file system has no locks ({without.strerror}); "
                "see that no other converter works on it"
            )

    def _is_in_place(self, fd):
        try:
            return is_file_of(fd, self._path)
        except OSError as error:
            raise failure(self._path, error, "looked at") from None

    def _sign(self, fd):
        try:
            sign_lock(fd)
        except OSError as error:
            raise failure(self._path, error, "written") from None

    def _remove_made(self):
        for folder in reversed(self._made):
            try:
                uninterrupted(os.rmdir, folder)
            except OSError:  # not empty, and so are all above it
                return
