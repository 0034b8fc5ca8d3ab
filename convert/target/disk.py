"""The system calls that change the target, each synced, with errors translated into ours.

Nothing here knows what the files hold.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from jlayer import durable
from jlayer.durable import FULL, write_all
from jlayer.errors import DoesNotFitError, JlayerError, StorageError
from jlayer.strict import close, is_there, resolve

# The suffix of a file until it is whole and synced.
TEMPORARY = ".jlayer-tmp"


def failure(path: str, error: OSError, doing: str) -> JlayerError:
    """The error to raise for an OSError: DoesNotFitError where space ran out, else StorageError."""
    if error.errno in FULL:
        return DoesNotFitError(
            f"{path}: no space to go on ({error.strerror}); free some or name a folder elsewhere"
        )
    return StorageError(f"{path}: cannot be {doing} ({error.strerror})")


def uninterrupted(call: Callable, *arguments):
    """Calls again after EINTR. Python does so itself for reads, writes, opens and syncs, but not
    for renames and the like."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            pass


def make_folders(folder: str) -> list[str]:
    """Makes the folder and missing ones above it, synced, so that a power cut does not undo them.

    Returns those that it made, outermost first.
    """
    path, missing = resolve(folder, strict=False), []
    while not is_there(path, follow=False):
        missing.append(path)
        path = os.path.dirname(path)
    made = []
    for path in reversed(missing):
        try:
            uninterrupted(os.mkdir, path)
            made.append(path)
            sync_folder(os.path.dirname(path))
        except FileExistsError:
            pass  # another process made it meanwhile
        except OSError as error:
            raise failure(path, error, "made") from None
    return made


def sync_folder(folder: str) -> None:
    """Makes the names in a folder durable. Raises DoesNotFitError or StorageError."""
    try:
        durable.sync_folder(folder)
    except OSError as error:
        raise failure(folder, error, "synced") from None


def remove(path: str) -> None:
    """Removes a file; does nothing where it is gone already."""
    try:
        uninterrupted(os.unlink, path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise failure(path, error, "removed") from None


@contextlib.contextmanager
def written_aside(path: str) -> Iterator[str]:
    """Yields a temporary name to write and sync a file under, then renames it to `path`, durably.

    After an error nothing is left of the file.
    """
    aside = path + TEMPORARY
    try:
        yield aside
        try:
            uninterrupted(os.rename, aside, path)
        except OSError as error:
            raise failure(path, error, "renamed") from None
        sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(JlayerError):  # the first error is the one to report
            remove(aside)
        raise


def replace_file(path: str, content: bytes) -> None:
    """Replaces a small file in one step, durably: until then the old content stays."""
    with written_aside(path) as aside:
        try:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                write_all(fd, content, 0)
                os.fsync(fd)
            finally:
                close(fd)
        except OSError as error:
            raise failure(path, error, "written") from None
