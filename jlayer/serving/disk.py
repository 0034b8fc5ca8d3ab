"""Small writes that survive a crash: whole or not at all, and synced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from jlayer.errors import StorageError
from jlayer.strict import close

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp"  # the suffix of a file until it is whole


def room_advice(error: OSError) -> str:
    """What to do where a disk is full; empty for other errors."""
    return "; free some space" if error.errno in FULL else ""


def write_all(fd: int, raw: bytes, offset: int) -> None:
    """A full disk or a signal may shorten one write without an error."""
    view = memoryview(raw)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def sync_folder(folder: str) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # folders need no sync on this file system
            raise
    finally:
        close(fd)


def write_file(path: str, write: Callable) -> None:
    """Has `write(file)` fill a new file, and puts it in the place of `path`. Raises StorageError;
    then nothing is changed."""
    aside = path + TEMPORARY
    try:
        try:
            with open(aside, "wb", opener=_private) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(os.path.dirname(path))
        except BaseException:
            remove(aside)
            raise
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}){room_advice(error)}"
        ) from None


def remove(path: str) -> None:
    """Removes a file, if it is there and can be."""
    try:
        os.unlink(path)
    except OSError:  # gone, or it stays: nothing depends on it
        return


def _private(path, flags):
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
