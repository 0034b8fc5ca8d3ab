"""A folder that appears whole or not at all, and what is written in it on the disk when it does;
and the folder that a run keeps beside it, until it does."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping

from jlayer.checkpoint.adapter import WEIGHTS
from jlayer.durable import (
    LOCK,
    is_file_of,
    lock_holder,
    open_lock,
    room_advice,
    sign_lock,
    sync_folder,
    take_lock,
)
from jlayer.errors import LockedError, StorageError, UsageError
from jlayer.strict import close, is_there, resolve

WORK = ".tuning"  # after the name of OUT
MADE = "made"  # in that folder, the adapter before it is moved to OUT
UNFINISHED = ".jlayer-tmp"
TRIES = 100  # to take a lock whose holder is just leaving
UNSAVED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written


def refuse_existing(folder: str | os.PathLike) -> None:
    """Raises UsageError where something of that name is there, be it an empty folder, and
    StorageError where none can be made. Changes nothing."""
    path = os.fspath(folder)
    if is_there(os.path.join(path, WEIGHTS), follow=False):
        raise UsageError(
            f"{path}: is there already, and is an adapter that is complete, so nothing is left to "
            f"do; use it by --adapter {path}, or name a new folder (with --adapter {path} to train "
            "it further)"
        )
    if is_there(path, follow=False):
        raise UsageError(f"{path}: is there already; name a new folder")
    parent = os.path.dirname(resolve(path, strict=False))
    while not is_there(parent, follow=True):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: cannot be made, since {parent} is not a folder to write in")


def new_folder(folder: str, files: Mapping[str, Iterable[bytes | memoryview]]) -> None:
    """Makes a folder of these files (name -> pieces of its content): beside it, synced, and then
    renamed. Raises UsageError (it is there already) or StorageError; then nothing is left."""
    refuse_existing(folder)
    path = resolve(folder, strict=False)
    aside = path + UNFINISHED
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run has left
        os.makedirs(aside)
        try:
            for name, pieces in files.items():
                _write(os.path.join(aside, name), pieces)
            sync_folder(aside)
            os.rename(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_folder(os.path.dirname(path))
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror}){room_advice(error)}"
        ) from None


class WorkFolder:
    """`OUT.tuning`, where a run keeps what it needs to go on, for one process at a time. A context
    manager: what was made in it and is still empty is not left behind. `note`: told what is no
    error.

    `out`: the folder that there will be; `path`: this one. Raises UsageError (OUT is there and was
    not begun here, or the folder is another's), LockedError or StorageError.
    """

    def __init__(self, out: str, *, note: Callable[[str], None] = print):
        self.out = out.rstrip("/")
        if os.path.basename(self.out) in ("", ".", ".."):
            raise UsageError(f"OUT: found {out!r}, expected the name of a new folder")
        self.path = self.out + WORK
        self._note, self._made, self._fd = note, [], -1

    def __enter__(self) -> WorkFolder:
        if not is_there(self.path, follow=False):
            refuse_existing(self.out)
        else:
            self._check_content()
        try:
            if not any(self._take() for _ in range(TRIES)):
                raise StorageError(f"{self.path}: cannot be made; name another OUT")
            if not self.has_checkpoints():  # another may have made OUT meanwhile
                refuse_existing(self.out)
        except BaseException:
            self._leave()
            raise
        shutil.rmtree(self.path + UNFINISHED, ignore_errors=True)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._leave()

    def has_checkpoints(self) -> bool:
        """Whether a run goes on here. Raises StorageError."""
        return any(map(_is_number, self._names()))

    def move_out(self) -> None:
        """Moves the adapter that was made in here to OUT. Raises StorageError."""
        try:
            os.rename(os.path.join(self.path, MADE), self.out)
            sync_folder(os.path.dirname(os.path.abspath(self.out)))
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be made ({error.strerror})") from None

    def remove(self) -> None:
        """Removes the folder and what is in it: all at once by its name, since a part of it would
        look like a damaged run. The next run removes what a kill leaves of that."""
        aside = self.path + UNFINISHED
        shutil.rmtree(aside, ignore_errors=True)
        try:
            os.rename(self.path, aside)
            # A power cut must not leave it under its name, with a part of its checkpoints.
            sync_folder(os.path.dirname(os.path.abspath(self.path)))
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be removed ({error.strerror}); {self.out} is complete, "
                "remove the other yourself"
            ) from None
        shutil.rmtree(aside, ignore_errors=True)

    def _check_content(self):
        """A folder of this name may be anything; it is going to be removed."""
        if os.path.islink(self.path) or not os.path.isdir(self.path):
            raise UsageError(
                f"{self.path}: is there and no folder, expected that of a run; remove it, or name "
                f"another folder than {self.out}"
            )
        others = sorted(name for name in self._names() if not _is_own(name))
        if others:
            raise UsageError(
                f"{self.path}: has {others[0]!a:.80}, which is no part of a run; remove it, or "
                f"name another folder than {self.out}"
            )

    def _names(self):
        try:
            return os.listdir(self.path)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read ({error.strerror})") from None

    def _take(self) -> bool:
        """Tries to take the lock; False where its holder has just removed the file."""
        lock = os.path.join(self.path, LOCK)
        try:
            self._make()
            fd = open_lock(lock)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error.strerror}){room_advice(error)}"
            ) from None
        try:
            self._lock(fd)
            if not is_file_of(fd, lock):
                close(fd)
                return False
            with contextlib.suppress(OSError):  # it is for messages alone
                sign_lock(fd)
        except BaseException:
            close(fd)
            raise
        self._fd = fd
        return True

    def _make(self):
        """Makes the folder, and those above it."""
        path, missing = resolve(self.path, strict=False), []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
                self._made.append(path)
                sync_folder(os.path.dirname(path))

    def _lock(self, fd):
        try:
            without = take_lock(fd)
        except BlockingIOError:
            raise LockedError(
                f"{self.path}: another run is at work on it ({lock_holder(fd)}); wait until it is "
                "done, or stop it and run the same command again"
            ) from None
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be locked ({error.strerror}){room_advice(error)}"
            ) from None
        if without is not None:
            self._note(
                f"{self.path}: its file system has no locks ({without.strerror}); see that no "
                "other run works on it"
            )

    def _leave(self):
        """Gives the lock back, and removes what is empty."""
        if self._fd >= 0:
            lock = os.path.join(self.path, LOCK)
            with contextlib.suppress(OSError):  # while locked: who comes now makes a new file
                if is_file_of(self._fd, lock):
                    os.unlink(lock)
            close(self._fd)
            self._fd = -1
        for folder in (self.path, *reversed(self._made)):
            with contextlib.suppress(OSError):  # not empty, or removed
                os.rmdir(folder)


def _is_own(name):
    """Whether a run makes what has this name in its folder."""
    return _is_number(name) or name in (LOCK, MADE, MADE + UNFINISHED) or UNSAVED in name


def _is_number(name):
    return name.isascii() and name.isdigit()


def _write(path, pieces):
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
