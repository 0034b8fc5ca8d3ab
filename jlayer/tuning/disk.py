"""A folder that appears whole or not at all, and what is written in it on the disk when it does."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping

from jlayer.errors import StorageError, UsageError
from jlayer.strict import close, is_there, resolve

UNFINISHED = ".jlayer-tmp"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_existing(folder: str | os.PathLike) -> None:
    """Raises UsageError where something of that name is there, be it an empty folder, and
    StorageError where none can be made. Changes nothing."""
    path = os.fspath(folder)
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


def room_advice(error: OSError) -> str:
    """What to do where a disk is full; empty for other errors."""
    return "; free some space" if error.errno in FULL else ""


def _write(path, pieces):
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


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
